"""Hyperparameter search: what a search is asked, the book's procedure and halving, trials on groups of ranks, reports.

It stands on the engine, as the benchmark does; ``distdl/search.py`` is its command.
"""
