"""The doctor: whether training will work here, and what makes it slow. `python -m distdl.doctor`."""
