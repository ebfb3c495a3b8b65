"""Fit a small cost model to the measurements, and predict steps on more ranks. Pure functions.

N ranks, V micro-batches per step, m = ⌈V / N⌉ micro-batches of the largest shard, B bytes of a gradient.
The model of a step is

    T(N) = compute(m) · (1 + σ z(N)) + reduction(N)

    compute(m)    a + b m: a once per step (the update), b per micro-batch
    reduction(N)  α f(N) + β g(N): f messages in sequence, g bytes sent by a rank
    z(N)          expected maximum of N standard normal numbers, because all ranks wait for the slowest rank of the
                  step; σ is the measured relative deviation of compute over steps and ranks

- The cost of a message is latency plus bytes over bandwidth: R. W. Hockney, *The communication challenge for MPP:
  Intel Paragon and Meiko CS-2*, 1994.
- f and g of collective calls: R. Thakur, R. Rabenseifner, W. Gropp, *Optimization of collective communication
  operations in MPICH*, 2005. The tree is a pairwise exchange and a ring, f = 2 (N - 1) and
  g = (k + 1) B (N - 1) / N with k tree nodes per rank; Allreduce is Rabenseifner's, f = 2 ⌈log₂ N⌉,
  g = 2 B (N - 1) / N.
- z: G. Blom, *Statistical estimates and transformed beta-variables*, 1958: Φ⁻¹((N - 0.375) / (N + 0.25)).

The model leaves out ranks that share a host's memory and network card, congestion, and the additions of the owners
(part of a measured β, not of a given one). It does not apply to ranks that share cores: such measurements are neither
fitted nor predicted.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import TypeAlias

from distdl.bench.settings import Interconnect, rank_counts
from distdl.parallel import contiguous_shards
from distdl.parallel.tree import maximal_nodes

MOST_RANKS = 1024
#: The number of tree nodes per rank soon repeats from rank to rank, so the first ranks suffice.
SHARDS_INSPECTED = 64
#: Number of ranks, bytes of a vector, and seconds of its reduction alone, with one tree node per rank.
MeasuredReduction: TypeAlias = tuple[int, int, float]


@dataclass(frozen=True)
class MeasuredStep:
    """The medians of one case, per step. Every rank has its own core."""

    kind: str
    ranks: int
    micro_batches: int
    step_seconds: float
    compute_seconds: float
    """On a rank with the largest shard."""
    reduction_seconds: float
    deviation: float
    """Relative standard deviation of compute over steps and ranks."""


@dataclass(frozen=True)
class PredictedStep:
    """The seconds of a step that the model predicts."""

    compute: float
    reduction: float
    waiting: float

    @property
    def seconds(self) -> float:
        """Seconds of the whole step."""
        return self.compute + self.reduction + self.waiting


@dataclass(frozen=True)
class CostModel:
    """The fitted numbers a, b, α, β and σ."""

    reduction: str
    gradient_bytes: int
    once_seconds: float
    micro_batch_seconds: float
    latency_seconds: float
    byte_seconds: float
    deviation: float

    def step(self, ranks: int, micro_batches: int) -> PredictedStep:
        """Return the prediction for a step."""
        compute = self.once_seconds + self.micro_batch_seconds * -(-micro_batches // ranks)
        f, g = messages(self.reduction, ranks), bytes_sent(self.reduction, ranks, micro_batches, self.gradient_bytes)
        reduction = self.latency_seconds * f + self.byte_seconds * g
        return PredictedStep(compute, reduction, compute * self.deviation * expected_largest(ranks))


@dataclass(frozen=True)
class FitCheck:
    """A measured step and its predictions: by the fit to all steps, and by a fit without this step."""

    point: MeasuredStep
    fitted_seconds: float
    left_out_seconds: float | None
    """None if the other steps do not determine a fit."""
    fitted_error: float
    """Relative error of the fit to all steps."""
    left_out_error: float | None


def messages(reduction: str, ranks: int) -> int:
    """Return f(N), the number of messages in sequence.

    >>> messages("tree", 8), messages("allreduce", 8), messages("tree", 1)
    (14, 6, 0)
    """
    return 2 * (ranks - 1) if reduction == "tree" else 2 * (ranks - 1).bit_length()


def bytes_sent(reduction: str, ranks: int, micro_batches: int, gradient_bytes: int) -> float:
    """Return g(N), the bytes sent by the rank with the most tree nodes.

    >>> bytes_sent("tree", 2, 8, 1000), bytes_sent("tree", 3, 8, 1000), bytes_sent("allreduce", 2, 8, 1000)
    (1000.0, 2000.0, 1000.0)
    """
    tree_nodes = 1
    if reduction == "tree" and ranks > 1:
        shards = contiguous_shards(micro_batches, ranks)[:SHARDS_INSPECTED]
        tree_nodes = max(len(maximal_nodes(shard, micro_batches)) for shard in shards)
    return (tree_nodes + 1) * gradient_bytes * (ranks - 1) / ranks


def expected_largest(count: int) -> float:
    """Return z(N), the expected maximum of `count` standard normal numbers, by Blom's formula."""
    return NormalDist().inv_cdf((count - 0.375) / (count + 0.25)) if count > 1 else 0.0


def fit_two(rows: Sequence[tuple[float, float]], observed: Sequence[float]) -> tuple[float, float] | None:
    """Return p, q ≥ 0 that minimize the squared relative errors of ``p u + q v`` over the rows (u, v).

    Returns None if the rows do not determine both.
    """
    scaled = [(u / y, v / y) for (u, v), y in zip(rows, observed, strict=True) if y > 0]
    uu, uv, vv = (sum(row[i] * row[j] for row in scaled) for i, j in ((0, 0), (0, 1), (1, 1)))
    u1, v1 = sum(row[0] for row in scaled), sum(row[1] for row in scaled)
    determinant = uu * vv - uv * uv
    if determinant <= 1e-9 * uu * vv:  # also without rows
        return None
    p, q = (u1 * vv - v1 * uv) / determinant, (v1 * uu - u1 * uv) / determinant
    if p >= 0 and q >= 0:
        return p, q
    # The minimum is on an edge: p or q is 0.
    edges = [(u1 / uu, 0.0), (0.0, v1 / vv)]
    return min(edges, key=lambda pq: sum((pq[0] * u + pq[1] * v - 1) ** 2 for u, v in scaled))


def fit(
    steps: Sequence[MeasuredStep],
    reductions: Sequence[MeasuredReduction],
    reduction: str,
    gradient_bytes: int,
    interconnect: Interconnect | None = None,
) -> CostModel | None:
    """Return the fitted model, with the given interconnect instead of the measured one, if there is one.

    Returns None if the measurements do not determine it: compute needs two values of m, the reduction two sizes.
    """
    compute = fit_two(
        [(1.0, -(-step.micro_batches // step.ranks)) for step in steps], [step.compute_seconds for step in steps]
    )
    latency_and_byte: tuple[float, float] | None
    if interconnect is not None:
        latency_and_byte = (interconnect.latency_seconds, 1 / interconnect.bytes_per_second)
    else:
        observed = [(ranks, ranks, nbytes, seconds) for ranks, nbytes, seconds in reductions]
        observed += [
            (step.ranks, step.micro_batches, gradient_bytes, step.reduction_seconds) for step in steps if step.ranks > 1
        ]
        latency_and_byte = fit_two(
            [(messages(reduction, ranks), bytes_sent(reduction, ranks, *size)) for ranks, *size, _ in observed],
            [seconds for *_, seconds in observed],
        )
    if compute is None or latency_and_byte is None:
        return None
    deviation = statistics.median(step.deviation for step in steps)
    return CostModel(reduction, gradient_bytes, *compute, *latency_and_byte, deviation)


def check(steps: Sequence[MeasuredStep], reductions: Sequence[MeasuredReduction], model: CostModel) -> list[FitCheck]:
    """Return each measured step of strong and weak scaling with its predictions."""
    checks = []
    for step in (one for one in steps if one.kind != "share"):
        others = [other for other in steps if other is not step]
        interconnect = Interconnect(0.0, 1.0) if step.ranks == 1 else None  # any, because one rank reduces nothing
        without = fit(others, reductions, model.reduction, model.gradient_bytes, interconnect)
        fitted = model.step(step.ranks, step.micro_batches).seconds
        left_out = None if without is None else without.step(step.ranks, step.micro_batches).seconds
        left_out_error = None if left_out is None else left_out / step.step_seconds - 1
        checks.append(FitCheck(step, fitted, left_out, fitted / step.step_seconds - 1, left_out_error))
    return checks


def projected_ranks(kind: str, micro_batches: int) -> list[int]:
    """Return the numbers of ranks to predict for: powers of two; strong scaling stops at one micro-batch per rank."""
    most = min(micro_batches, MOST_RANKS) if kind == "strong" else MOST_RANKS
    return list(rank_counts(None, most))


def predict(model: CostModel, kind: str, micro_batches: int) -> list[tuple[int, float, PredictedStep]]:
    """Return (ranks, speed-up over the predicted one rank, step); `micro_batches` are those of one rank's batch."""
    one = model.step(1, micro_batches).seconds
    found = []
    for ranks in projected_ranks(kind, micro_batches):
        factor = ranks if kind == "weak" else 1
        step = model.step(ranks, micro_batches * factor)
        found.append((ranks, factor * one / step.seconds, step))
    return found
