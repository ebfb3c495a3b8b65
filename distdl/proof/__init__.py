"""Proof after the fact: compare the records of two runs, look inside a step, and audit a run by computing it again."""
