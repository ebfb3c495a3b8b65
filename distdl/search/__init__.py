"""Hyperparameter search: settings, the book's procedure and halving, trials on groups of ranks, tables and chart.

Importing this package loads neither NumPy nor MPI.
"""
