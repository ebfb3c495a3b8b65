"""Effects of the launcher and of the operating system on a rank: one process of a job.

Modules here import neither NumPy nor MPI.
"""
