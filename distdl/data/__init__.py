"""Data, from the bytes of a source to the micro-batches of a network. It knows no ranks, networks or configuration.

A function of `sources` returns a `Dataset`. `PreparedDataset` is the form that every rank has: with its `split`, and
its `normalization` measured on the training part. `MicroBatches` loads images and labels, with `augmentation` if asked.
"""

from distdl.data.dataset import Dataset, PreparedDataset
from distdl.data.micro_batches import MicroBatches

__all__ = ["Dataset", "MicroBatches", "PreparedDataset"]
