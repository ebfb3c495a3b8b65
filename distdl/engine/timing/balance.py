"""Shards of micro-batches: equal ones, or with `--balance` shards by measured speed.

The seconds of each rank's micro-batches travel in the record of the reduction. So after each step all ranks hold the
same numbers and draw the same conclusions (`Balance`). The rank that computes a micro-batch does not change the bits.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from distdl.engine.step import OptimizerStep, StepObserver
from distdl.parallel import Field, Record, Shard, contiguous_shards, deal, loads_by_speed

#: The weight of a new measurement in the smoothed seconds of a micro-batch.
SMOOTHING = 0.1
#: A measurement counts as at most this many times, and at least this fraction of, the expected seconds: one delay of a
#: machine is not its speed.
LARGEST_SURPRISE = 4.0
#: Shares change if the step's computation is expected to become shorter by more than this part of it,
LEAST_GAIN = 0.05
#: and not again within this number of steps.
LEAST_STEPS = 5
#: A rank without a share is tried with one micro-batch after this number of steps, since it may have recovered,
STEPS_BETWEEN_TRIALS = 50
#: or later, so that trials cost at most this part of the time.
COST_OF_TRIALS = 0.02
#: A rank that sleeps on a core with another load gets the core back only after the load's time slice of some
#: milliseconds. So with `--balance` waiting ranks poll for longer than a slice.
SPIN_SECONDS = 20e-3


class Balance:
    """Decides the shares of the next step from the seconds of all ranks so far. A pure function of these."""

    def __init__(self, ranks: int, leaves: int) -> None:
        """Start with equal shares of the `leaves` micro-batches of a full batch."""
        self._speeds = (1.0,) * ranks
        self.loads = loads_by_speed(leaves, self._speeds)
        self._seconds = [0.0] * ranks  # of a micro-batch, smoothed
        self._times_measured = [0] * ranks
        self._steps_unmeasured = [0] * ranks
        self._steps = 0
        self._last_change = 0

    def shares(self, leaves: int) -> tuple[int, ...]:
        """Return the number of micro-batches of each rank in a step of `leaves` micro-batches."""
        loads = list(loads_by_speed(leaves, self._speeds))
        on_trial = [rank for rank, load in enumerate(loads) if load == 0 and self._is_due(rank)]
        for rank in on_trial:
            giver = max(set(range(len(loads))) - set(on_trial), key=lambda other: (loads[other], other), default=rank)
            if loads[giver] > 0:
                loads[giver] -= 1
                loads[rank] = 1
        return tuple(loads)

    def observe(self, seconds: Sequence[float | None]) -> bool:
        """Take in the seconds per micro-batch of each rank, None if it computed none; return whether shares change."""
        self._steps += 1
        if self._steps == 1:
            return False  # the first step also allocates buffers
        for rank, measured in enumerate(seconds):
            self._steps_unmeasured[rank] += 1
            if measured is not None:
                self._smooth(rank, measured)
        if self._steps - self._last_change < LEAST_STEPS:
            return False
        speeds = tuple(1 / seconds for seconds in self._expected())
        loads = loads_by_speed(sum(self.loads), speeds)
        if self._seconds_of(loads) >= (1 - LEAST_GAIN) * self._seconds_of(self.loads):
            return False
        self._speeds, self.loads, self._last_change = speeds, loads, self._steps
        return True

    def _smooth(self, rank: int, measured: float) -> None:
        """Average a measurement in. Its weight grows with the steps since the previous one; at first it is the mean."""
        self._times_measured[rank] += 1
        expected = self._seconds[rank] if self._times_measured[rank] > 1 else measured
        expected = min(expected, LARGEST_SURPRISE * measured)
        measured = min(measured, LARGEST_SURPRISE * expected)
        weight = max(1 - (1 - SMOOTHING) ** self._steps_unmeasured[rank], 1 / self._times_measured[rank])
        self._seconds[rank] = expected + weight * (measured - expected)
        self._steps_unmeasured[rank] = 0

    def _expected(self) -> list[float]:
        """Return the seconds per micro-batch of each rank. An unmeasured rank counts as fast, so it gets measured."""
        fastest = min((seconds for seconds in self._seconds if seconds), default=1.0)
        return [seconds or fastest for seconds in self._seconds]

    def _seconds_of(self, loads: Sequence[int]) -> float:
        return max(load * seconds for load, seconds in zip(loads, self._expected(), strict=True))

    def _is_due(self, rank: int) -> bool:
        wait = self._expected()[rank] / (COST_OF_TRIALS * self._seconds_of(self.loads))
        return self._steps_unmeasured[rank] >= max(STEPS_BETWEEN_TRIALS, wait)


class Dealer(StepObserver):
    """Deals equal, contiguous shards, and measures nothing."""

    #: The new shares of a full batch if the latest step changed them.
    new_shares: Sequence[int] | None = None

    def __init__(self, ranks: int) -> None:
        self.ranks = ranks

    def shards(self, micro_batches: int) -> Sequence[Shard]:
        """Return the micro-batches of each rank, for a step or an evaluation of `micro_batches`."""
        return contiguous_shards(micro_batches, self.ranks)

    def epoch_record(self) -> dict[str, Any]:
        """Return the dealer's entries in ``timing.jsonl`` for the epoch that just ended, and forget them."""
        return {}


class BalancedDealer(Dealer):
    """Deals by measured speed; `micro_batches` is the number of a full batch."""

    def __init__(
        self, rank: int, ranks: int, micro_batches: int, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        super().__init__(ranks)
        self.rank = rank
        self.fields = (Field("seconds", "f8", ranks), Field("timed", "i8", ranks))
        self._balance = Balance(ranks, micro_batches)
        self._clock = clock
        self._now = 0.0
        self._seconds = np.zeros(ranks)
        self._timed = np.zeros(ranks, np.int64)
        self._computed = [0] * ranks

    def shards(self, micro_batches: int) -> Sequence[Shard]:
        """Return the micro-batches of each rank, for a step or an evaluation of `micro_batches`."""
        return deal(self._balance.shares(micro_batches))

    def begin(self, step: OptimizerStep) -> None:  # noqa: ARG002
        """Start the clock before the first micro-batch."""
        self._now = self._clock()

    def micro_batch_done(self, step: OptimizerStep, index: int, record: Record) -> None:
        """Send the seconds since the previous micro-batch. Only full ones tell a speed."""
        is_full = (index + 1) * step.micro_batch_size <= step.samples
        before, self._now = self._now, self._clock()
        self._seconds[self.rank] = self._now - before if is_full else 0.0
        self._timed[self.rank] = is_full
        record["seconds"], record["timed"] = self._seconds, self._timed

    def end(self, step: OptimizerStep) -> None:
        """Take in the seconds of all ranks, and decide whether shares change."""
        self._computed = [count + len(shard) for count, shard in zip(self._computed, step.shards, strict=True)]
        timed, summed = step.total["timed"].tolist(), step.total["seconds"].tolist()
        seconds = [total / count if count else None for total, count in zip(summed, timed, strict=True)]
        self.new_shares = self._balance.loads if self._balance.observe(seconds) else None

    def epoch_record(self) -> dict[str, Any]:
        """Return the number of micro-batches that each rank computed in the epoch."""
        computed, self._computed = self._computed, [0] * self.ranks
        return {"shares": computed}
