"""distdl trains NumPy CNNs data-parallel over MPI, with the same bits on any number of ranks.

This module imports neither NumPy nor MPI, so that the number of BLAS threads can still be set.
"""

__version__ = "0.1.0"
