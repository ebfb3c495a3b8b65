"""Look inside a step: all arrays of one of its micro-batches, with the bits of the training.

N samples of the micro-batch; ``...`` is the shape of one sample.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distdl.arrays import aligned_empty
from distdl.data import batch_order
from distdl.data.batch_order import BatchOrder
from distdl.engine.objective import losses
from distdl.engine.step import OptimizerStep, StepObserver
from distdl.engine.trainer import Trainer
from distdl.nn import Sequential
from distdl.parallel import Communicator, Record
from distdl.rng import Key

Array = NDArray[Any]


class StepWatcher(StepObserver):
    """Keeps the loss of each micro-batch of a step, and the sum of all gradients."""

    def __init__(self) -> None:
        self._losses: dict[int, tuple[float, int]] = {}
        self.gradient: Array = np.empty(0)
        """The sum over the batch."""

    def begin(self, step: OptimizerStep) -> None:  # noqa: ARG002
        """Forget the step before."""
        self._losses = {}

    def micro_batch_done(self, step: OptimizerStep, index: int, record: Record) -> None:  # noqa: ARG002
        """Keep the loss."""
        self._losses[index] = float(record["loss_sum"][0]), int(record["counts"][1])

    def end(self, step: OptimizerStep) -> None:
        """Keep the sum of all gradients."""
        self.gradient = step.total["gradient"].copy()

    def loss_sums(self, communicator: Communicator) -> list[tuple[float, int]]:
        """Return the summed loss and the samples of each micro-batch. Collective."""
        mine = [[index, loss.hex(), samples] for index, (loss, samples) in self._losses.items()]
        everyone = sorted(one for rank in communicator.allgather_json(mine) for one in rank)
        return [(float.fromhex(loss), samples) for _, loss, samples in everyone]


@dataclass(frozen=True)
class Weights:
    """A copy of the parameters and buffers of a network, with their names."""

    parameters: dict[str, Array]
    buffers: dict[str, Array]

    @classmethod
    def of(cls, network: Sequential) -> Weights:
        """Return a copy of those of a network."""
        parameters, buffers = network.named_parameters(), network.named_buffers()
        return cls({name: view.copy() for name, view in parameters}, {name: view.copy() for name, view in buffers})

    def copy_into(self, network: Sequential) -> None:
        """Give the network these values."""
        for name, view in network.named_parameters():
            np.copyto(view, self.parameters[name])
        for name, view in network.named_buffers():
            np.copyto(view, self.buffers[name])


@dataclass
class Inside:
    """The arrays of one forward and backward pass."""

    rows: Array
    """The rows (N,) of the dataset."""
    images: Array
    """The input of the network (N, H, W, C), normalized and augmented."""
    targets: Array
    losses: Array
    """The loss of each sample, (N,) in float64."""
    loss_sum: float
    gradients: dict[str, Array]
    """The gradient of each parameter, summed over the samples."""
    activations: dict[str, Array] = field(default_factory=dict)
    """The output of each layer, (N, ...)."""
    as_written: list[str] = field(default_factory=list)
    """The layers that the kernels compute together with the next one, without their output. These outputs are computed
    by the layers as written, from the same input; so their last digits may differ from those inside the kernels."""


def look_inside(trainer: Trainer, step: int, micro_batch: int) -> Inside:
    """Return the arrays of a micro-batch of the step after `step` steps, computed with the weights of the network.

    The gradients of the network are overwritten. Local: every rank gets the same bits.
    """
    config, data, network = trainer.config, trainer.data, trainer.state.network
    batch = BatchOrder(data.parts.training, config.batch_size, Key(config.seed)).rows(step)
    key = Key(config.seed).of("training", step, micro_batch)
    _, loss = losses(config, data, network.stack.kernels)
    images, targets = trainer.micro_batches.load(batch, micro_batch, key.of("augmentation"))
    inputs, activations, outputs = _forward(network, images, key)
    loss_sum = loss.forward(outputs, targets)
    network.backward(loss.backward())
    found = Inside(
        rows=batch_order.micro_batch(batch, micro_batch, config.micro_batch_size),
        images=images.copy(),
        targets=targets,
        losses=np.array([loss.forward(outputs[n : n + 1], targets[n : n + 1]) for n in range(len(outputs))]),
        loss_sum=loss_sum,
        gradients={name: view.copy() for name, view in network.named_gradients()},
    )
    for first, last in _segments(network):
        for place in range(first, last):
            name, layer = network.layer_names[place], network.layers[place]
            x = inputs[first] if place == first else found.activations[network.layer_names[place - 1]]
            found.activations[name] = _kept(layer.forward(x, training=True, key=key.of(name)))
            found.as_written.append(name)
        found.activations[network.layer_names[last]] = activations[network.layer_names[last]]
    return found


def _segments(network: Sequential) -> list[tuple[int, int]]:
    """Return the first and the last layer of each group of layers that the kernels compute together."""
    starts = [network.layer_names.index(name) for name, *_ in network.stack.segments]
    return [(start, end - 1) for start, end in zip(starts, [*starts[1:], len(network.layers)], strict=True)]


def _forward(network: Sequential, images: Array, key: Key) -> tuple[dict[int, Array], dict[str, Array], Array]:
    """Run the forward pass of `Sequential.forward`.

    Return copies of the inputs by the number of the first layer and of the outputs by the name of the last layer, and
    the output of the network itself.
    """
    stack, x = network.stack, images
    stack.prepare()
    inputs: dict[int, Array] = {}
    outputs: dict[str, Array] = {}
    for (first, last), (name, layer, _, fused) in zip(_segments(network), stack.segments, strict=True):
        x = np.ascontiguousarray(x)
        inputs[first] = _kept(x)
        if fused is not None:
            x = fused.forward(x, training=True, key=key)
        else:
            x = layer.forward(x, training=True, key=key.of(name))
        outputs[network.layer_names[last]] = _kept(x)
    return inputs, outputs, x


def _kept(x: Array) -> Array:
    """Return a copy, aligned as the arrays of layers are."""
    copied = aligned_empty(x.shape, x.dtype)
    np.copyto(copied, x)
    return copied


def arrays_of(
    found: Inside, before: Weights, after: Weights, step_gradients: Mapping[str, Array], layer: str | None
) -> dict[str, Array]:
    """Return all arrays by their names in the file, in the order in which a step computes them.

    With `layer` only the arrays of this layer are listed, with rows, images, targets and losses.
    """

    def chosen(prefix: str, arrays: Mapping[str, Array]) -> dict[str, Array]:
        names = [name for name in arrays if layer is None or name == layer or name.startswith(f"{layer}.")]
        return {f"{prefix}/{name}": arrays[name] for name in names}

    backwards = dict(reversed(found.gradients.items()))
    return {
        **chosen("weights", before.parameters),
        **chosen("buffers", before.buffers),
        "rows": found.rows,
        "images": found.images,
        "targets": found.targets,
        **chosen("activations", found.activations),
        "losses": found.losses,
        **chosen("gradients", backwards),
        **chosen("step_gradients", {name: step_gradients[name] for name in backwards}),
        **chosen("weights_after", after.parameters),
        **chosen("buffers_after", after.buffers),
    }
