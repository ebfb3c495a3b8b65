"""The scaling benchmark: what is measured, the projection fitted to it, the chart and the files it ends in.

Importing this package loads neither NumPy nor MPI; `run` does.
"""
