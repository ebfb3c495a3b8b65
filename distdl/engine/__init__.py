"""Training: the trainer on every rank, the coordinator on rank 0, checkpoints, metrics, progress."""

from distdl.engine.prepare import train
from distdl.engine.summary import Summary

__all__ = ["Summary", "train"]
