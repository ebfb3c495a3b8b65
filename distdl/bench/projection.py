"""What more ranks would bring: a small model fitted to what was measured. Pure functions.

N ranks, V micro-batches of a step, m = ⌈V / N⌉ of the rank that has most, B bytes of a gradient. A step takes

    T(N) = compute(m) · (1 + σ z(N)) + reduction(N)

    compute(m)    a + b m: what every rank does once (the update), and once a micro-batch
    reduction(N)  α f(N) + β g(N): f messages one after the other, g bytes that a rank sends
    z(N)          the expected largest of N standard normal numbers: all wait for the rank that is slowest in
                  this step; σ is the measured relative deviation of compute from step to step and rank to rank

- The cost of messages, latency plus bytes through a bandwidth: R. W. Hockney, *The communication challenge for MPP:
  Intel Paragon and Meiko CS-2*, 1994.
- f and g of collective calls: R. Thakur, R. Rabenseifner, W. Gropp, *Optimization of collective communication
  operations in MPICH*, 2005. The tree is a pairwise exchange and a ring, f = 2 (N - 1) and
  g = (k + 1) B (N - 1) / N with k nodes a rank; Allreduce is Rabenseifner's, f = 2 ⌈log₂ N⌉, g = 2 B (N - 1) / N.
- z: G. Blom, *Statistical estimates and transformed beta-variables*, 1958: Φ⁻¹((N - 0.375) / (N + 0.25)).

What it leaves out: several ranks sharing a host's memory and its network card, congestion, and the additions of
the owners (which are part of a measured β, not of a given one). Ranks that share cores are outside of it: such
measurements are neither fitted nor predicted.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

from distdl.bench.settings import Network
from distdl.parallel import contiguous_shards
from distdl.parallel.tree import maximal_nodes

MOST_RANKS = 1024
#: How many ranks hold how many nodes repeats soon, so the first of them tell.
SHARDS_LOOKED_AT = 64


@dataclass(frozen=True)
class Point:
    """What was measured of one setup, a step, with every rank on a core of its own."""

    kind: str
    ranks: int
    micro_batches: int
    step_seconds: float
    compute_seconds: float
    """Of a rank that has most micro-batches."""
    reduction_seconds: float
    deviation: float
    """Relative standard deviation of compute over steps and ranks."""


@dataclass(frozen=True)
class Reduced:
    """What the reduction alone took, for a vector of `nbytes` of which every rank held one node."""

    ranks: int
    nbytes: int
    seconds: float


@dataclass(frozen=True)
class StepTime:
    """The seconds of a step, by the model."""

    compute: float
    reduction: float
    waiting: float

    @property
    def seconds(self) -> float:
        """The whole step."""
        return self.compute + self.reduction + self.waiting


@dataclass(frozen=True)
class Model:
    """The fitted numbers; letters as above."""

    reduction: str
    gradient_bytes: int
    once_seconds: float
    micro_batch_seconds: float
    latency_seconds: float
    byte_seconds: float
    deviation: float

    def step(self, ranks: int, micro_batches: int) -> StepTime:
        """Return what a step would take."""
        compute = self.once_seconds + self.micro_batch_seconds * -(-micro_batches // ranks)
        f, g = messages(self.reduction, ranks), bytes_sent(self.reduction, ranks, micro_batches, self.gradient_bytes)
        return StepTime(
            compute,
            self.latency_seconds * f + self.byte_seconds * g,
            compute * self.deviation * expected_largest(ranks),
        )


@dataclass(frozen=True)
class Check:
    """A measured step beside the model's: fitted with this point among the others, and without it."""

    point: Point
    fitted_seconds: float
    left_out_seconds: float | None
    """None where the other points do not suffice for a fit."""

    @property
    def fitted_error(self) -> float:
        """By how much the fit misses the measured step, relative to it."""
        return self.fitted_seconds / self.point.step_seconds - 1

    @property
    def left_out_error(self) -> float | None:
        """By how much the fit without this point misses it."""
        return None if self.left_out_seconds is None else self.left_out_seconds / self.point.step_seconds - 1


def messages(reduction: str, ranks: int) -> int:
    """Return f(N): messages that follow one another.

    >>> messages("tree", 8), messages("allreduce", 8), messages("tree", 1)
    (14, 6, 0)
    """
    return 2 * (ranks - 1) if reduction == "tree" else 2 * (ranks - 1).bit_length()


def bytes_sent(reduction: str, ranks: int, micro_batches: int, gradient_bytes: int) -> float:
    """Return g(N): bytes that a rank sends, of the rank that holds most nodes.

    >>> bytes_sent("tree", 2, 8, 1000), bytes_sent("tree", 3, 8, 1000), bytes_sent("allreduce", 2, 8, 1000)
    (1000.0, 2000.0, 1000.0)
    """
    nodes = 1
    if reduction == "tree" and ranks > 1:
        shards = contiguous_shards(micro_batches, ranks)[:SHARDS_LOOKED_AT]
        nodes = max(len(maximal_nodes(shard, micro_batches)) for shard in shards)
    return (nodes + 1) * gradient_bytes * (ranks - 1) / ranks


def expected_largest(count: int) -> float:
    """Return z(N), the expected largest of `count` standard normal numbers, by Blom's formula.

    >>> [round(expected_largest(n), 2) for n in (1, 2, 1024)]
    [0.0, 0.59, 3.23]
    """
    return NormalDist().inv_cdf((count - 0.375) / (count + 0.25)) if count > 1 else 0.0


def fit_two(rows: Sequence[tuple[float, float]], observed: Sequence[float]) -> tuple[float, float] | None:
    """Return p, q ≥ 0 with ``p u + q v`` nearest to what was observed for each row (u, v), by relative squares.

    None where the rows do not tell the two apart.
    """
    scaled = [(u / y, v / y) for (u, v), y in zip(rows, observed, strict=True) if y > 0]
    uu, uv, vv = (sum(row[i] * row[j] for row in scaled) for i, j in ((0, 0), (0, 1), (1, 1)))
    u1, v1 = sum(row[0] for row in scaled), sum(row[1] for row in scaled)
    determinant = uu * vv - uv * uv
    if determinant <= 1e-9 * uu * vv:  # also where there are no rows
        return None
    p, q = (u1 * vv - v1 * uv) / determinant, (v1 * uu - u1 * uv) / determinant
    if p >= 0 and q >= 0:
        return p, q
    # The best lies on an edge: one of the two is 0.
    edges = [(u1 / uu, 0.0), (0.0, v1 / vv)]
    return min(edges, key=lambda pq: sum((pq[0] * u + pq[1] * v - 1) ** 2 for u, v in scaled))


def fit(
    points: Sequence[Point],
    reduced: Sequence[Reduced],
    reduction: str,
    gradient_bytes: int,
    network: Network | None = None,
) -> Model | None:
    """Return the model that fits; a network that is given takes the place of the measured one.

    None where the measurements do not determine it: compute needs two different m, the reduction two sizes.
    """
    compute = fit_two(
        [(1.0, -(-point.micro_batches // point.ranks)) for point in points],
        [point.compute_seconds for point in points],
    )
    if compute is None:
        return None
    wire: tuple[float, float] | None
    if network is not None:
        wire = (network.latency_seconds, 1 / network.bytes_per_second)
    else:
        shared = [point for point in points if point.ranks > 1]
        wire = fit_two(
            [
                *(
                    (messages(reduction, one.ranks), bytes_sent(reduction, one.ranks, one.ranks, one.nbytes))
                    for one in reduced
                ),
                *(
                    (
                        messages(reduction, one.ranks),
                        bytes_sent(reduction, one.ranks, one.micro_batches, gradient_bytes),
                    )
                    for one in shared
                ),
            ],
            [*(one.seconds for one in reduced), *(one.reduction_seconds for one in shared)],
        )
    if wire is None:
        return None
    deviation = statistics.median(point.deviation for point in points)
    return Model(reduction, gradient_bytes, *compute, *wire, deviation)


def check(points: Sequence[Point], reduced: Sequence[Reduced], model: Model) -> list[Check]:
    """Return every measured point of a sweep beside the model and beside a fit that has not seen it."""
    checks = []
    for point in points:
        if point.kind != "share":
            others = [other for other in points if other is not point]
            # With one rank there is nothing to reduce, and any network does.
            network = Network(0.0, 1.0) if point.ranks == 1 else None
            without = fit(others, reduced, model.reduction, model.gradient_bytes, network)
            checks.append(
                Check(
                    point,
                    model.step(point.ranks, point.micro_batches).seconds,
                    None if without is None else without.step(point.ranks, point.micro_batches).seconds,
                )
            )
    return checks


def projected_ranks(kind: str, micro_batches: int) -> list[int]:
    """Return the numbers of ranks to predict for: powers of two; strong scaling ends at one micro-batch a rank.

    >>> projected_ranks("strong", 12), projected_ranks("weak", 12)[-1]
    ([1, 2, 4, 8, 12], 1024)
    """
    most = min(micro_batches, MOST_RANKS) if kind == "strong" else MOST_RANKS
    return sorted({2**k for k in range(most.bit_length()) if 2**k <= most} | {most})
