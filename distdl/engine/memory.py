"""The memory of a rank: an estimate from the shapes, compared with the memory of its host before the first step.

Without it, a run that is too large is killed by the system, without a message. The estimate may be wrong by a third. So
a run is refused only if it needs far more than there is; in between there is a warning.
"""

import math
import socket
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from numpy.typing import NDArray

from distdl.config import TrainConfig, is_own
from distdl.data import PreparedDataset
from distdl.data.batch_order import micro_batch_count
from distdl.engine.state import TrainingState
from distdl.engine.user_code import network_builder
from distdl.errors import UserError
from distdl.host_memory import available_bytes, available_to_this_process
from distdl.image_options import Resize
from distdl.mapped_files import is_first_rows_of_file
from distdl.nn.working_memory import working_bytes
from distdl.optim import optimizer_class
from distdl.parallel import Communicator

#: A run is refused if this share of its estimate does not fit.
SURE_SHARE = 0.7
#: About the memory of Python, NumPy and MPI in a rank. It is in use before the check.
PROGRAM_BYTES = 60_000_000


@dataclass(frozen=True)
class Need:
    """The estimated bytes that a rank allocates after the preparation of a run."""

    working: int
    """The layers' working arrays, and the buffers of the micro-batches."""
    state: int
    """Gradient, and the optimizer's vectors; the parameters are there already."""
    sums: int
    """Partial sums of the gradients."""
    checkpoint: int
    """The copy of the state that rank 0 writes."""

    @property
    def bytes(self) -> int:
        """All together."""
        return self.working + self.state + self.sums + self.checkpoint


def need_of(config: TrainConfig, data: PreparedDataset, state: TrainingState, *, ranks: int, rank: int) -> Need:
    """Return the estimate for a rank."""
    network, parts = state.network, data.parts
    size, batch, samples = config.micro_batch_size, config.batch_size, len(parts.training)
    # Arrays are kept for each number of samples that a micro-batch has. The last rank computes the ragged ones.
    training, evaluation = {min(size, batch)}, {size}
    if rank == ranks - 1:
        training |= {n for n in (min(batch, samples) % size, samples % batch % size) if n}
        evaluation |= {n for n in (len(parts.validation) % size, len(parts.test) % size) if n}
    vectors = 4 * network.parameters.size
    image = data.images[0].size * (4 + data.images.itemsize)
    outputs = 40 * max(training) * math.prod(network.output_shape)  # the loss computes in float64
    shard = -(-micro_batch_count(min(batch, samples), size) // ranks)
    slots = max((shard - 1).bit_length(), 1) + (2 if ranks > 1 else 0)
    state_vectors = 1 + len(state.optimizer.state)  # the gradient is no part of the state, the parameters are
    return Need(
        working=working_bytes(network, training, evaluation) + image * sum(training | evaluation) + outputs,
        state=state_vectors * vectors,
        sums=slots * vectors,
        checkpoint=state_vectors * vectors if rank == 0 else 0,
    )


def check_resized(config: TrainConfig) -> None:
    """Raise `UserError` if the network has no room for images of the size of `--resize`, before any is decoded.

    The estimate is a lower bound, for gray images and two classes. `check_memory` compares all ranks later.
    """
    if config.image_options.resize is None or is_own(config.model):
        return
    resize, size, left = Resize.parse(config.image_options.resize), config.micro_batch_size, available_bytes()
    vectors = 2 + len(optimizer_class(config.optimizer)(1).state)  # with parameters and gradient
    try:
        network = network_builder(config.model, config.model_settings)((resize.height, resize.width, 1), 2)
        needed = working_bytes(network, {size}, {size}) + vectors * network.parameters.nbytes
    except MemoryError as error:
        needed = vectors * math.prod(getattr(error, "shape", ()))  # NumPy tells the bytes that it cannot allocate
    except UserError:  # the images do not fit the network: it is built again, with their channels
        return
    if SURE_SHARE * needed > left:
        raise UserError(
            f"--resize {resize}: --model {config.model} on such images needs at least {gigabytes(needed)} of memory, "
            f"but {gigabytes(left)} are available: give a smaller size"
        )


def check_memory(
    config: TrainConfig, data: PreparedDataset, state: TrainingState, communicator: Communicator
) -> list[str]:
    """Return warnings if memory may not suffice; raise `UserError` on every rank if it cannot. Collective."""
    ranks, rank = communicator.size, communicator.rank

    def needed(micro_batch_size: int) -> int:
        smaller = replace(config, micro_batch_size=micro_batch_size)
        return need_of(smaller, data, state, ranks=ranks, rank=rank).bytes

    smaller = [config.micro_batch_size >> halvings for halvings in range(config.micro_batch_size.bit_length())]
    mine = [socket.gethostname(), [needed(size) for size in smaller], available_bytes(), available_to_this_process()]
    everyone = communicator.allgather_json([None if value == math.inf else value for value in mine])
    height, width, channels = data.images.shape[1:]
    warnings = []
    for host in dict.fromkeys(name for name, *_ in everyone):
        ours = [(needs, of_host, own) for name, needs, of_host, own in everyone if name == host]

        def fits(number: int, share: float, ours: list[Any] = ours) -> bool:
            limits = [of_host for _, of_host, _ in ours if of_host is not None]
            total = share * sum(needs[number] for needs, *_ in ours)
            alone = all(own is None or share * needs[number] <= own for needs, _, own in ours)
            return alone and all(total <= limit for limit in limits)

        if fits(0, 1.0):
            continue
        left = min(limit for _, *limits in ours for limit in limits if limit is not None)
        own_limit = " within its limits (ulimit -v, -d)" if any(left == own for *_, own in ours) else ""
        what = (
            f"--model {config.model} on images of {height}x{width}x{channels} needs about "
            f"{gigabytes(sum(needs[0] for needs, *_ in ours))} of memory on the host {host} ({len(ours)} "
            f"rank{'s' if len(ours) > 1 else ''}), which has {gigabytes(left)}{own_limit}"
        )
        size = next((size for number, size in enumerate(smaller) if fits(number, 1.0)), None)
        remedy = f"give --micro-batch-size {size}" if size else "give a smaller --micro-batch-size"
        remedy += ", smaller images with --resize, " + ("or fewer ranks" if len(ours) > 1 else "or a smaller model")
        if not fits(0, SURE_SHARE):
            raise UserError(f"{what}: {remedy}", agreed=True)
        warnings.append(f"{what}, so the system may kill the run: {remedy}")
    return warnings


def check_room_for_dataset(communicator: Communicator, arrays: Mapping[str, NDArray[Any]] | None) -> None:
    """Raise `UserError` on every rank if the memory of a host cannot hold a copy of these arrays. Collective.

    Only rank 0 reads `arrays`. Arrays in files need no memory.
    """
    in_memory = [array.nbytes for array in (arrays or {}).values() if not is_first_rows_of_file(array)]
    nbytes = communicator.bcast_json(sum(in_memory))
    for host, left in communicator.allgather_json([socket.gethostname(), min(available_bytes(), 2.0**62)]):
        if nbytes > left:
            raise UserError(
                f"the dataset needs {gigabytes(nbytes)} of memory on the host {host}, which has {gigabytes(left)}: "
                "give smaller images with --resize, or fewer of them",
                agreed=True,
            )


def gigabytes(nbytes: float) -> str:
    """Return a number of bytes for a message.

    >>> gigabytes(123_456_789_000), gigabytes(12_345_678), gigabytes(123_456)
    ('123.5 GB', '12 MB', '0.1 MB')
    """
    return f"{nbytes / 1e9:.1f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.{0 if nbytes >= 1e7 else 1}f} MB"
