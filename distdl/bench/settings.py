"""The settings of a benchmark, and the parsers of its flags. This module imports neither NumPy nor MPI."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distdl.config import DATASETS, KERNELS, OPTIMIZERS, REDUCTIONS, check_model_name, reads_data_dir
from distdl.errors import UserError, unknown_name

SCALINGS = {"both": ("strong", "weak"), "strong": ("strong",), "weak": ("weak",), "none": ()}

_SECONDS = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6, "ns": 1e-9}
_PREFIXES = {"K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
_NUMBER = r"(\d+(?:\.\d+)?)"
#: The largest accepted size, count or number of ranks.
MOST = 2**20


@dataclass(frozen=True)
class Interconnect:
    """The connection between hosts: the latency of a message, and the bandwidth."""

    latency_seconds: float
    bytes_per_second: float

    def __str__(self) -> str:
        return f"{self.latency_seconds * 1e6:g} us, {self.bytes_per_second * 8 / 1e9:g} Gbit/s"


@dataclass(frozen=True, kw_only=True)
class BenchSettings:
    """The settings of a benchmark. With the defaults it takes about a minute on two cores."""

    model: str = "simple_convnet"
    """Network to train; or your own file.py:function or package.module:function."""
    input_shape: tuple[int, int, int] = (28, 28, 1)
    """Height, width and channels of the random pixels to train on; by default 28x28x1."""
    dataset: str | None = None
    """Dataset to train on instead of random pixels."""
    data_dir: Path | None = None
    """Folder of the dataset's files."""
    batch_size: int = 128
    """Samples of one optimizer step; with weak scaling, of one rank."""
    micro_batch_size: int = 16
    """Samples of one forward and backward pass."""
    optimizer: str = "adam"
    """Rule of the weight update."""
    reduction: str = "tree"
    """How gradients are summed."""
    kernels: str = "auto"
    """Implementation of the computations; auto: compiled if every rank can use them."""
    ranks: tuple[int, ...] | None = None
    """Numbers of ranks to measure; by default 1, 2, 4 ... and all."""
    scaling: str = "both"
    """Scaling to measure."""
    steps: int | None = None
    """Steps of a measurement; by default as many as one rank takes in a second."""
    repetitions: int = 5
    """Number of repetitions of each measurement."""
    layers: bool = False
    """Measure each layer, and the matrix products of this machine for comparison."""
    communication: bool = False
    """Measure the reduction of several sizes, and MPI's Allreduce for comparison."""
    interconnect: Interconnect | None = None
    """Latency and bandwidth of another interconnect, to predict up to 1,024 ranks on it; by default the measured
    ones."""
    out: Path | None = None
    """Folder for bench.json and scaling.svg; by default a new folder under runs/."""
    trace: Path | None = None
    """JSON file for the times in which each rank computed, reduced and waited; view it in ui.perfetto.dev."""

    def checked(self) -> BenchSettings:
        """Return the settings; raise `UserError` if one is invalid."""
        check_model_name(self.model)
        for kind, known in (
            *(("dataset", DATASETS), ("optimizer", OPTIMIZERS)),
            *(("reduction", REDUCTIONS), ("scaling", tuple(SCALINGS)), ("kernels", KERNELS)),
        ):
            name = getattr(self, kind)
            if name is not None and name not in known:
                raise unknown_name(kind, name, known)
        for flag, value in (
            ("--batch-size", self.batch_size),
            ("--micro-batch-size", self.micro_batch_size),
            ("--steps", 1 if self.steps is None else self.steps),
            ("--repetitions", self.repetitions),
            *(("--ranks", count) for count in self.ranks or (1,)),
            *(("--input", size) for size in self.input_shape),
        ):
            if not 1 <= value <= MOST:
                raise UserError(f"{flag} must be at least 1 and at most {MOST}, not {value}")
        self._check_combinations()
        return self

    def _check_combinations(self) -> None:
        if self.micro_batch_size > self.batch_size:
            raise UserError(
                f"--micro-batch-size {self.micro_batch_size} is larger than --batch-size {self.batch_size}: "
                "give a smaller one or a larger batch"
            )
        if self.batch_size % self.micro_batch_size:
            raise UserError(
                f"--batch-size {self.batch_size} is not a multiple of --micro-batch-size {self.micro_batch_size}: "
                "the ranks cannot share it equally; give a multiple"
            )
        if not (SCALINGS[self.scaling] or self.layers or self.communication):
            raise UserError("--scaling none leaves nothing to measure: give --layers or --communication too")
        if self.interconnect is not None and not SCALINGS[self.scaling]:
            raise UserError("--network has no effect with --scaling none: leave one of them out")
        if self.data_dir is not None and not (self.dataset and reads_data_dir(self.dataset)):
            raise UserError("--data-dir has no effect without --dataset mnist: give that too, or leave it out")
        if "\0" in f"{self.data_dir}{self.out}{self.trace}":
            raise UserError("a path contains a NUL character: no file can have this name; give another path")

    @property
    def micro_batches(self) -> int:
        """Number of micro-batches in the batch."""
        return self.batch_size // self.micro_batch_size

    def to_json(self) -> dict[str, Any]:
        """Return the settings as JSON values."""
        values = {name: str(value) if isinstance(value, Path) else value for name, value in vars(self).items()}
        interconnect = values.pop("interconnect")
        return values | {"network": None if interconnect is None else vars(interconnect)}


def parse_shape(text: str) -> tuple[int, int, int]:
    """Return (H, W, C) of a text such as ``28x28x1``, or raise `UserError`."""
    if not re.fullmatch(r"[0-9]{1,7}x[0-9]{1,7}x[0-9]{1,7}", text):
        raise UserError(f"--input {text[:80]!r}: expected height x width x channels, such as 28x28x1")
    height, width, channels = map(int, text.split("x"))
    return height, width, channels


def parse_ranks(text: str) -> tuple[int, ...]:
    """Return the numbers of ranks in a text such as ``1,2,4``, in ascending order, or raise `UserError`."""
    if not re.fullmatch(r"[0-9]{1,7}(,[0-9]{1,7})*", text):
        raise UserError(f"--ranks {text[:80]!r}: expected numbers with commas, such as 1,2,4")
    return tuple(sorted({int(number) for number in text.split(",")}))


def parse_interconnect(text: str) -> Interconnect:
    """Return the interconnect that a text such as ``10us,10Gbit`` describes, or raise `UserError`.

    >>> parse_interconnect("10us,10Gbit")
    Interconnect(latency_seconds=1e-05, bytes_per_second=1250000000.0)
    """
    match = re.fullmatch(rf"{_NUMBER}(s|ms|us|µs|ns),{_NUMBER}([KMGT])(bit|B)(?:/s)?", text.replace(" ", ""))
    if match is None or not float(match[3]):
        raise UserError(
            f"--network {text[:80]!r}: expected latency and bandwidth, such as 10us,10Gbit; "
            "units s, ms, us, ns, and Kbit, Mbit, Gbit, Tbit or KB, MB, GB, TB per second"
        )
    latency = float(f"{float(match[1]) * _SECONDS[match[2]]:.12g}")
    return Interconnect(latency, float(match[3]) * _PREFIXES[match[4]] / (8 if match[5] == "bit" else 1))


def rank_counts(given: Sequence[int] | None, world_size: int) -> tuple[int, ...]:
    """Return the numbers of ranks to measure: 1 and the given ones, or by default 1, 2, 4 … and all.

    Raises `UserError` if the job has fewer ranks than a given number.

    >>> rank_counts(None, 6), rank_counts([3], 4)
    ((1, 2, 4, 6), (1, 3))
    """
    if given is None:
        return tuple(sorted({2**k for k in range(world_size.bit_length())} | {world_size}))
    if max(given) > world_size:
        raise UserError(
            f"--ranks {max(given)} is more than the {world_size} rank{'s' if world_size > 1 else ''} of this job: "
            f"start it with mpirun -n {max(given)}, or give fewer ranks"
        )
    return tuple(sorted({1, *given}))
