"""From files to rows of pixels: sources, split and order, augmentation, normalization.

    sources          the data sets by name: bytes from files or the network into one `Dataset`
    idx              the IDX format of MNIST, read without trusting it
    split            which rows train, validate and test, and in which order: pure index arithmetic
    augmentation     training images changed at random, from keys that name no rank
    normalization    mean and deviation per channel, measured on the training part alone

Nothing here knows ranks, networks or configuration.
"""

from distdl.data.dataset import Dataset, PreparedDataset
from distdl.data.micro_batches import MicroBatches

__all__ = ["Dataset", "MicroBatches", "PreparedDataset"]
