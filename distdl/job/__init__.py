"""Effects of the launcher and the operating system on a rank. Modules here import neither NumPy nor MPI."""
