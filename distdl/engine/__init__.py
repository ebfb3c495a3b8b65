"""Training: the trainer on every rank, the coordinator on rank 0, checkpoints, metrics, progress."""

from distdl.engine.plan import dry_run
from distdl.engine.prepare import train
from distdl.engine.summary import Summary

__all__ = ["Summary", "dry_run", "train"]
