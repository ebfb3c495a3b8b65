"""The scaling benchmark: measurements, the projection fitted to them, tables, and the chart.

Importing this package loads neither NumPy nor MPI.
"""
