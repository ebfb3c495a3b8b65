"""Train NumPy CNNs data-parallel over MPI, with the same bits on any number of ranks.

This module imports neither NumPy nor MPI, because NumPy reads the number of BLAS threads when it is loaded.
"""

__version__ = "0.1.0"
