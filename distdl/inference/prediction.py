"""Predict images with one network or an ensemble, block by block, so that few images are in memory at once.

The images keep their places in micro-batches, whatever the number of ranks and of unusable images: micro-batch i of a
network has the images from ``i * micro_batch_size`` on. So a prediction has the same bits on any number of ranks, and
the same as in an evaluation of the same images.

N images of a block, K outputs. ``...`` are the places of a prediction: none for one per image, (H, W) for one per
pixel.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distdl.arrays import aligned_empty
from distdl.data import MicroBatches, PreparedDataset
from distdl.data.split import Split
from distdl.engine.environment import numerics
from distdl.inference.inputs import Inputs, UnusedInput
from distdl.inference.load import Trained
from distdl.inference.score import predictions_of, probabilities_of
from distdl.parallel import Communicator, contiguous_shards

#: A rank reads at most about this many images, and bytes of normalized images, at once.
MOST_IMAGES, MOST_BYTES = 1024, 2**26
#: Classes of pixels are sent in this type.
MASK = np.uint16


@dataclass(frozen=True, eq=False)
class Block:
    """The predictions of some images."""

    start: int
    """The number of the first image."""
    values: NDArray[Any]
    """(N, K), the probability of each class, or the numbers of a regression; (N, H, W), the class of each pixel."""
    unused: list[tuple[int, UnusedInput]]
    """The images without a prediction, by their number."""


def predict(members: Sequence[Trained], inputs: Inputs, communicator: Communicator) -> Iterator[Block]:
    """Yield the predictions of all images, in order, on every rank. Collective.

    Several networks are an ensemble: the mean of their probabilities, or of the numbers of a regression. All must have
    one signature, except for the normalization.
    """
    count, unit = len(inputs.names), math.lcm(*(one.config.micro_batch_size for one in members))
    height, width, channels = members[0].signature.image_shape
    images_at_once = min(MOST_IMAGES, MOST_BYTES // (4 * height * width * channels))
    units_of_rank = max(images_at_once // unit, 1)
    images = aligned_empty((units_of_rank * unit, height, width, channels), np.dtype(members[0].signature.pixels))
    batches = [_batches(one, images) for one in members]
    for start in range(0, count, units_of_rank * unit * communicator.size):
        units = min(-(-(count - start) // unit), units_of_rank * communicator.size)
        ends = [min(start + shard.stop * unit, count) for shard in contiguous_shards(units, communicator.size)]
        begins = [start, *ends[:-1]]
        begin, end = begins[communicator.rank], ends[communicator.rank]
        found = inputs.read(begin, images[: end - begin])
        values = np.zeros((ends[-1] - start, *_shape(members[0])), _dtype(members[0]))
        values[begin - start : end - start] = _predicted(members, batches, end - begin)
        counts = [(stop - first) * values[:1].nbytes for first, stop in zip(begins, ends, strict=True)]
        communicator.allgatherv(values.reshape(-1).view(np.uint8), counts)
        told = communicator.allgather_json([[number, *vars(one).values()] for number, one in found])
        unused = [(number, UnusedInput(*rest)) for of_rank in told for number, *rest in of_rank]
        yield Block(start, values, unused)


def _batches(one: Trained, images: NDArray[np.uint8] | NDArray[np.float32]) -> MicroBatches:
    """Return the micro-batches of a network over a buffer of images."""
    rows = np.arange(len(images), dtype=np.int64)
    signature, parts = one.signature, Split.training_only(rows)
    data = PreparedDataset(images, np.zeros_like(rows), parts, signature.normalization, signature.outputs)
    return MicroBatches(data, one.config.micro_batch_size)


def _shape(one: Trained) -> tuple[int, ...]:
    """Return the shape of an image's prediction."""
    return one.signature.image_shape[:2] if one.signature.task == "segmentation" else (one.signature.outputs,)


def _dtype(one: Trained) -> type[np.uint16] | type[np.float64]:
    return MASK if one.signature.task == "segmentation" else np.float64


def _predicted(members: Sequence[Trained], batches: Sequence[MicroBatches], count: int) -> NDArray[Any]:
    """Return the predictions of the first `count` images of the buffer."""
    outputs = [_outputs(one, its_batches, count) for one, its_batches in zip(members, batches, strict=True)]
    if len(members) == 1 and members[0].signature.task == "segmentation":
        return predictions_of(members[0], outputs[0])
    mean = probabilities_of(members[0], outputs[0])
    for one, its_outputs in zip(members[1:], outputs[1:], strict=True):
        mean += probabilities_of(one, its_outputs)
    mean /= len(members)
    return mean.argmax(axis=-1) if members[0].signature.task == "segmentation" else mean


def _outputs(one: Trained, batches: MicroBatches, count: int) -> NDArray[np.float32]:
    """Return the outputs (N, ..., K) of a network for the first `count` images of its buffer."""
    rows, size = np.arange(count, dtype=np.int64), one.config.micro_batch_size
    outputs = np.empty((count, *one.network.output_shape), np.float32)
    with numerics(one.config.threads_per_rank), one.network.constant_parameters():
        for index in range(batches.count(count)):
            images, _ = batches.load(rows, index)
            outputs[index * size : index * size + len(images)] = one.network.forward(images)
    return outputs
