"""The records of a run as event files of TensorBoard: ``tensorboard --logdir runs`` shows them.

H height, W width, C channels, F filters, K classes.
"""

import importlib
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distdl.data import MicroBatches
from distdl.engine.callbacks import Callback
from distdl.engine.pictures import confusion_matrix, filter_images, first_convolution, row_shares
from distdl.engine.tracking import require
from distdl.errors import UserError
from distdl.nn import Sequential

#: The folder in the run folder.
FOLDER = "tensorboard"
#: The least side of a picture: smaller ones are enlarged by a whole number.
LEAST_SIDE = 256


class TensorBoard(Callback):
    """Writes scalars, the filters of the first convolution and the confusion matrix of the test part.

    All event files of a run are in one folder, so they are one run of TensorBoard. If a record comes again, TensorBoard
    drops the earlier one. Raises `UserError` if tensorboardX is not installed.
    """

    def __init__(self) -> None:
        for package in ("tensorboardX", "PIL"):
            require(package, "--tensorboard", "tensorboard")

    def on_start(self, record: Mapping[str, Any]) -> None:
        """Begin an event file that replaces the records of later steps."""
        folder, step = self.run.folder / FOLDER, record["step"]
        if folder.is_symlink():
            raise UserError(f"{folder} is a symbolic link: distdl follows no link inside a run folder; remove it")
        files = len(list(folder.iterdir())) if folder.is_dir() else 0
        writer_class = importlib.import_module("tensorboardX").SummaryWriter
        # TensorBoard reads the files in the order of their names, which begin with the second of their creation.
        suffix = f".{files:04d}"
        self._writer = writer_class(str(folder), purge_step=step + 1 if files else None, filename_suffix=suffix)

    def on_step(self, record: Mapping[str, Any]) -> None:
        """Write the loss, the accuracy and the learning rate."""
        self._scalars(record, {"loss": "loss/step", "accuracy": "accuracy/step", "lr": "lr"})

    def on_epoch(self, record: Mapping[str, Any]) -> None:
        """Write the results of training and validation, and the filters."""
        parts, numbers = ("train", "validation"), ("loss", "accuracy")
        self._scalars(record, {f"{part}_{number}": f"{number}/{part}" for part in parts for number in numbers})
        if any(view.ndim == 4 for _, view in self.run.network.named_parameters()):
            name, weight = first_convolution(self.run.network)
            self._image(f"filters/{name}", grid(filter_images(weight)), record["step"])

    def on_checkpoint(self, record: Mapping[str, Any]) -> None:  # noqa: ARG002
        """Bring all records to the disk."""
        self._writer.flush()

    def on_end(self, record: Mapping[str, Any]) -> None:
        """Write the score of the test part and, with the last weights, its confusion matrix."""
        if record["test_loss"] is not None:
            self._scalars(
                {**record, "step": record["steps"]}, {"test_loss": "loss/test", "test_accuracy": "accuracy/test"}
            )
            if self.run.data.task != "regression":
                matrix = row_shares(confusion_of(self.run.network, self.run.data, self.run.config.micro_batch_size))
                self._image("confusion/test", 1 - matrix[..., np.newaxis], record["steps"])
        self._writer.close()

    def _scalars(self, record: Mapping[str, Any], tags: Mapping[str, str]) -> None:
        for name, tag in tags.items():
            if record.get(name) is not None:
                self._writer.add_scalar(tag, record[name], record["step"])

    def _image(self, tag: str, image: NDArray[np.float64], step: int) -> None:
        """Write an image (H, W, 1 or 3) of numbers from 0 to 1."""
        factor = math.ceil(LEAST_SIDE / max(image.shape[:2]))
        pixels = np.round(image * 255).astype(np.uint8).repeat(factor, axis=0).repeat(factor, axis=1)
        self._writer.add_image(tag, pixels, step, dataformats="HWC")


def grid(images: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return images (F, H, W, C) side by side in rows, with gray lines in between.

    >>> grid(np.ones((3, 1, 1, 1)))[..., 0]
    array([[1. , 0.5, 1. ],
           [0.5, 0.5, 0.5],
           [1. , 0.5, 0.5]])
    """
    count, height, width, channels = images.shape
    columns = math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    whole = np.full((rows, height + 1, columns, width + 1, channels), 0.5)
    for number, image in enumerate(images):
        whole[number // columns, :height, number % columns, :width] = image
    return whole.reshape(rows * (height + 1), columns * (width + 1), channels)[:-1, :-1]


def confusion_of(network: Sequential, data: Any, micro_batch_size: int) -> NDArray[np.int64]:
    """Return the confusion matrix (K, K) of the test part of a `PreparedDataset`, computed by this rank alone."""
    rows, batches = data.parts.test, MicroBatches(data, micro_batch_size)
    total = np.zeros((data.classes, data.classes), np.int64)
    with network.constant_parameters():
        for index in range(batches.count(len(rows))):
            images, labels = batches.load(rows, index)
            outputs = network.forward(images)
            is_logistic = data.task == "classification" and outputs.shape[-1] == 1
            predictions = np.greater(outputs[..., 0], 0).astype(np.int64) if is_logistic else outputs.argmax(axis=-1)
            total += confusion_matrix(labels, predictions, data.classes)
    return total
