"""The micro-batches of a batch, as a network takes them: normalized, and augmented in training.

Dimensions: N samples of a micro-batch, H height, W width, C channels.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from distdl.arrays import aligned_empty
from distdl.data.augmentation import Augmentation
from distdl.data.batch_order import micro_batch, micro_batch_count
from distdl.data.dataset import PreparedDataset
from distdl.data.split import Rows
from distdl.mapped_files import release_pages, rows_to_keep
from distdl.rng import Key

LoadRows: TypeAlias = Callable[[NDArray[np.int64], NDArray[np.float32]], NDArray[np.float32]]
RowLoader: TypeAlias = Callable[[NDArray[Any], NDArray[np.float32], NDArray[np.float32]], LoadRows | None]


@dataclass(eq=False)
class MicroBatches:
    """Loads micro-batches of a dataset into buffers that it keeps, for each number of samples."""

    dataset: PreparedDataset
    micro_batch_size: int
    augmentation: Augmentation | None = None
    row_loader: RowLoader | None = None
    """See ``Kernels.row_loader``."""
    #: The number of micro-batches loaded so far.
    loaded: int = field(default=0, init=False)
    _buffers: dict[int, tuple[NDArray[Any], NDArray[np.float32]]] = field(default_factory=dict, init=False)
    _load_rows: LoadRows | None = field(default=None, init=False)
    _release_after: int = field(init=False)
    """Micro-batches between two releases of the pages of a mapped file."""

    def __post_init__(self) -> None:
        if self.row_loader is not None:
            normalization = self.dataset.normalization
            self._load_rows = self.row_loader(self.dataset.images, normalization.mean, normalization.deviation)
        self._release_after = max(1, rows_to_keep(self.dataset.images) // self.micro_batch_size)

    def count(self, samples: int) -> int:
        """Return the number of micro-batches in a batch of `samples` samples; the last one may be ragged."""
        return micro_batch_count(samples, self.micro_batch_size)

    def load(self, rows: Rows, index: int, key: Key | None = None) -> tuple[NDArray[np.float32], NDArray[Any]]:
        """Return images (N, H, W, C), normalized, and targets (N, ...) of micro-batch `index` of the batch `rows`.

        With a key they are augmented: labels of pixels move along. The next call with the same N overwrites the images.
        """
        self.loaded += 1
        rows = micro_batch(rows, index, self.micro_batch_size)
        dataset = self.dataset
        if self.loaded % self._release_after == 0:
            release_pages(dataset.images)
        if len(rows) not in self._buffers:
            shape = (len(rows), *dataset.images.shape[1:])
            self._buffers[len(rows)] = aligned_empty(shape, dataset.images.dtype), aligned_empty(shape)
        pixels, out = self._buffers[len(rows)]
        labels = dataset.targets(rows)
        if self._load_rows is not None and (key is None or self.augmentation is None):
            return self._load_rows(rows, out), labels
        # The modes but "raise" write without a temporary copy. No row is out of range.
        images = np.take(dataset.images, rows, axis=0, out=pixels, mode="clip")
        if key is not None and self.augmentation is not None:
            images = self.augmentation.apply(images, key, out=out)
            if labels.ndim == 3:
                labels = self.augmentation.apply_to_labels(labels, key)
        return dataset.normalization.apply(images, out=out), labels
