"""The kernels of a run: all ranks choose them together, and one rank per host compiles them."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Literal, TypeAlias

import numpy as np

from distdl.arrays import aligned_zeros
from distdl.config import BEFORE_THE_SETTING, KERNELS, TrainConfig
from distdl.engine.clipping import clip_by_norm
from distdl.engine.console import Console
from distdl.engine.objective import training_loss
from distdl.engine.step import supervised
from distdl.errors import UserError, counted
from distdl.job.streams import say_line
from distdl.nn import Sequential
from distdl.nn.kernels import NUMPY, Kernels
from distdl.nn.kernels.choice import kernels_named, obstacle
from distdl.parallel import Communicator, together
from distdl.rng import Key

if TYPE_CHECKING:
    from distdl.engine.storage.run_folder import StartingPoint
    from distdl.engine.trainer import Trainer

ResolvedName: TypeAlias = Literal["numpy", "compiled"]
#: A rank that waits for the compiler looks this often whether it is done.
PAUSE_SECONDS = 0.1
SECONDS_BETWEEN_LINES = 10.0
#: Samples of the passes, and elements of the vectors, that call each kernel for the first time.
SAMPLES, ELEMENTS = 2, 64
#: Rough seconds to compile what every training needs, and the kernels of another kind of layer.
SECONDS_FOR_ALL, SECONDS_FOR_A_KIND = 2, 4


def with_kernels(config: TrainConfig, communicator: Communicator, start: StartingPoint | None) -> TrainConfig:
    """Return the config with the kernels to use: numpy or compiled. Collective.

    `start` is needed on rank 0: a resumed run keeps the kernels of its checkpoint. Raises `UserError` on every rank if
    compiled kernels are required and a rank cannot use them.
    """
    found = None if start is None or start.found is None else start.found.header().config
    in_checkpoint = communicator.bcast_json(None if found is None else (BEFORE_THE_SETTING | found)["kernels"])
    if in_checkpoint is None:
        return replace(config, kernels=agreed_kernels(config.kernels, communicator))
    return replace(config, kernels=agreed_kernels(in_checkpoint, communicator, "the run to resume needs them"))


def agreed_kernels(wanted: str, communicator: Communicator, otherwise: str = "or give --kernels numpy") -> ResolvedName:
    """Return numpy or compiled, the same on all ranks; auto means compiled if every rank can use them. Collective.

    Raises `UserError` on every rank if compiled kernels are wanted and a rank cannot use them; its message ends with
    `otherwise`.
    """
    if wanted not in KERNELS:
        raise UserError(f"{wanted!r} are no kernels of this version of distdl: expected {' or '.join(KERNELS[1:])}")
    reason = None if wanted == "numpy" else why_not_compiled(communicator)
    if wanted == "compiled" and reason is not None:
        raise UserError(f"--kernels compiled: {reason}; {otherwise}", agreed=True)
    return "numpy" if wanted == "numpy" or reason is not None else "compiled"


def usable_kernels(trained_with: str, communicator: Communicator) -> tuple[Kernels, str | None]:
    """Return the kernels for a trained network, and a note if they are not those of its training. Collective."""
    reason = why_not_compiled(communicator) if trained_with == "compiled" else None
    if reason is None:
        return kernels_named(trained_with), None
    note = f"it was trained with compiled kernels, and this machine has none ({reason}): the last digits may differ"
    return NUMPY, note


def why_not_compiled(communicator: Communicator) -> str | None:
    """Return why some rank cannot use compiled kernels; None if all can. Collective."""
    found = communicator.allgather_json([socket.gethostname(), obstacle()])
    several = len({host for host, _ in found}) > 1
    reasons = (f"on host {host}, {reason}" if several else reason for host, reason in found if reason is not None)
    return next(reasons, None)


def compile_for(trainer: Trainer, console: Console) -> list[str]:
    """Compile or load all kernels that a training needs; see `compile_kernels`. The state does not change."""
    config, data, network = trainer.config, trainer.data, trainer.state.network
    rows, loss = data.parts.training[:SAMPLES], network.stack.kernels.loss(training_loss(config, data))

    def warm_up() -> None:
        key = Key(config.seed)
        supervised(network, loss, lambda index: trainer.micro_batches.load(rows, index, key), key)(0)
        images, targets = trainer.micro_batches.load(rows, 0)
        trainer.loss.forward(network.forward(images), targets)
        _update(trainer)
        network.use(network.stack.kernels)  # this frees the working arrays for these few samples

    return compile_kernels(trainer.communicator, network, warm_up, console.line)


def compile_for_network(
    network: Sequential, communicator: Communicator, show: Callable[[str], None] = say_line, *, training: bool = False
) -> list[str]:
    """Compile or load the kernels of a network, with `training` also those of a backward pass; see `compile_kernels`.

    The parameters and buffers do not change. By default the progress goes to the error stream.
    """

    def warm_up() -> None:
        x = np.zeros((SAMPLES, *network.input_shape), network.dtype)
        outputs = network.forward(x, training=training, key=Key(0))
        if training:
            network.backward(np.zeros_like(outputs))
        network.use(network.stack.kernels)  # this frees the working arrays for these few samples

    return compile_kernels(communicator, network, warm_up, show)


def _update(trainer: Trainer) -> None:
    """Call the kernels of the update, with vectors of their own."""
    optimizer, kernels = trainer.state.optimizer, trainer.state.network.stack.kernels
    small = type(optimizer)(
        ELEMENTS,
        weight_decay=optimizer.weight_decay,
        l1=optimizer.l1,
        decay_slices=[slice(0, ELEMENTS)],
        fused=kernels.optimizer_rule(trainer.config.optimizer),
        **{name: getattr(optimizer, name) for name in optimizer.setting_names},
    )
    parameters, gradient = aligned_zeros(ELEMENTS, np.float32), aligned_zeros(ELEMENTS, np.float32)
    if trainer.config.clip_norm is not None:
        clip_by_norm(gradient, trainer.config.clip_norm, kernels.norm)
    small.update(parameters, gradient, 0.0, 1)


def compile_kernels(
    communicator: Communicator, network: Sequential, warm_up: Callable[[], None], show: Callable[[str], None]
) -> list[str]:
    """Compile the kernels that `warm_up` calls, or load them; return warnings, the same on every rank. Collective.

    The first rank of each host compiles; the others wait and then load. Rank 0 calls `show` with lines of progress.
    """
    if network.stack.kernels.name != "compiled":
        return []
    from distdl.nn.kernels.compiled.cache import kernel_cache  # noqa: PLC0415  it imports LLVM
    from distdl.nn.kernels.compiled.jit import compilations_told_to  # noqa: PLC0415

    is_first = communicator.host().rank == 0
    progress = _Progress(network, show if communicator.rank == 0 else lambda _: None)

    def first_of_host() -> None:
        try:
            if is_first:
                with compilations_told_to(progress.compiling):
                    warm_up()
                progress.done()
        finally:
            communicator.barrier(longest_pause_seconds=PAUSE_SECONDS)

    together(communicator, first_of_host)
    if not is_first:
        warm_up()
    everyone = communicator.allgather_json(kernel_cache().complaints)
    return list(dict.fromkeys(complaint for complaints in everyone for complaint in complaints))


class _Progress:
    """Shows the progress of the compiler."""

    def __init__(self, network: Sequential, show: Callable[[str], None]) -> None:
        self._network, self._show = network, show
        self._count, self._begun, self._next_line = 0, 0.0, 0.0

    def compiling(self, _name: str) -> None:
        """Note that another kernel is about to be compiled."""
        now = time.monotonic()
        if not self._count:
            kinds = {type(layer) for layer in self._network.every_layer()}
            seconds = SECONDS_FOR_ALL + SECONDS_FOR_A_KIND * len(kinds)
            self._show(f"compiling kernels for this CPU (once, about {seconds} s)")
            self._begun, self._next_line = now, now + SECONDS_BETWEEN_LINES
        elif now >= self._next_line:
            self._show_count(now)
            self._next_line = now + SECONDS_BETWEEN_LINES
        self._count += 1

    def done(self) -> None:
        """Show the number of compiled kernels, if there are any."""
        if self._count:
            self._show_count(time.monotonic())

    def _show_count(self, now: float) -> None:
        self._show(f"  {counted(self._count, 'kernel')} compiled in {now - self._begun:.0f} s")
