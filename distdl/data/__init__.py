"""Data, from the bytes of a source to the micro-batches of a network.

    sources          the datasets by name
    dataset          `Dataset`, and `PreparedDataset`, the form that every rank has
    split            the rows of each part and their order: index arithmetic
    normalization    mean and deviation of each channel, measured on the training part
    augmentation     random changes of training images; the keys name no rank
    micro_batches    the images and labels of a micro-batch

This package knows no ranks, networks or configuration.
"""

from distdl.data.dataset import Dataset, PreparedDataset
from distdl.data.micro_batches import MicroBatches

__all__ = ["Dataset", "MicroBatches", "PreparedDataset"]
