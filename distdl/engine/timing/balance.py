"""Who computes which micro-batches: equal shards, or with `--balance` shards by measured speed.

Every rank times its micro-batches. The seconds travel in the record of the reduction, in a field with one entry
a rank, so that after each step all ranks hold the same numbers and draw the same conclusions (`Balance`, pure).
Who computes a micro-batch does not show in its bits, nor in those of the sum.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distdl.parallel import Field, Shard, contiguous_shards, deal, loads_by_speed

#: The weight of a new measurement in the smoothed seconds of a micro-batch.
SMOOTHING = 0.1
#: A measurement and what was expected may differ by this factor and count no more beyond it: one hiccup of a
#: machine is not its speed.
LARGEST_SURPRISE = 4.0
#: Shares change if the step's computation is expected to become shorter by more than this part of it,
LEAST_GAIN = 0.05
#: and not again within so many steps.
LEAST_STEPS = 5
#: A rank whose share is nothing is tried with one micro-batch after so many steps, since it may have recovered,
STEPS_BETWEEN_TRIALS = 50
#: or after as many as it takes for trials to cost no more than this part of the time.
COST_OF_TRIALS = 0.02
#: A rank that shares its core with another load and sleeps while it waits gets the core back only after the load's
#: time slice, some milliseconds, in each of the step's waits. So with `--balance` ranks poll longer than a slice.
SPIN_SECONDS = 20e-3


class Balance:
    """From the seconds that ranks took in the steps so far to the shares of the next one; a function of those alone."""

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
        """Return how many of the `leaves` micro-batches of the next step each rank computes."""
        loads = list(loads_by_speed(leaves, self._speeds))
        on_trial = [rank for rank, load in enumerate(loads) if load == 0 and self._is_due(rank)]
        for rank in on_trial:
            giver = max(set(range(len(loads))) - set(on_trial), key=lambda other: (loads[other], other), default=rank)
            if loads[giver] > 0:
                loads[giver] -= 1
                loads[rank] = 1
        return tuple(loads)

    def observe(self, seconds: Sequence[float | None]) -> bool:
        """Take in the seconds that each rank took a micro-batch, None if it computed none; say if shares change."""
        self._steps += 1
        if self._steps == 1:
            return False  # buffers were made, pages touched for the first time
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
        """Weigh in a measurement: the more, the longer the rank has not been measured; at first the plain mean."""
        self._times_measured[rank] += 1
        expected = self._seconds[rank] if self._times_measured[rank] > 1 else measured
        expected = min(expected, LARGEST_SURPRISE * measured)
        measured = min(measured, LARGEST_SURPRISE * expected)
        weight = max(1 - (1 - SMOOTHING) ** self._steps_unmeasured[rank], 1 / self._times_measured[rank])
        self._seconds[rank] = expected + weight * (measured - expected)
        self._steps_unmeasured[rank] = 0

    def _expected(self) -> list[float]:
        """Return each rank's seconds a micro-batch; who was never measured is taken for fast, and so gets measured."""
        fastest = min((seconds for seconds in self._seconds if seconds), default=1.0)
        return [seconds or fastest for seconds in self._seconds]

    def _seconds_of(self, loads: Sequence[int]) -> float:
        return max(load * seconds for load, seconds in zip(loads, self._expected(), strict=True))

    def _is_due(self, rank: int) -> bool:
        wait = self._expected()[rank] / (COST_OF_TRIALS * self._seconds_of(self.loads))
        return self._steps_unmeasured[rank] >= max(STEPS_BETWEEN_TRIALS, wait)


class Dealer:
    """Deals equal, contiguous shards, and measures nothing."""

    #: What the dealer adds to the record of a micro-batch.
    fields: tuple[Field, ...] = ()

    def __init__(self, rank: int, ranks: int) -> None:
        self.rank = rank
        self.ranks = ranks

    def shards(self, leaves: int) -> Sequence[Shard]:
        """Return the micro-batches that each rank computes, of the `leaves` of a step or an evaluation."""
        return contiguous_shards(leaves, self.ranks)

    def begin(self) -> None:
        """Start the clock before the first micro-batch of a step."""

    def values(self, *, whole: bool) -> Mapping[str, NDArray[Any]]:  # noqa: ARG002
        """Return what belongs into `fields` for the micro-batch just computed; `whole` if of full size."""
        return {}

    def stepped(
        self,
        shards: Sequence[Shard],  # noqa: ARG002
        total: Mapping[str, NDArray[Any]],  # noqa: ARG002
    ) -> Sequence[int] | None:
        """Take in the reduced record of a step; return the new shares of a full batch if they change."""
        return None

    def epoch_record(self) -> dict[str, Any]:
        """Return what ``timing.jsonl`` says of the epoch that has ended, and forget it."""
        return {}


class BalancedDealer(Dealer):
    """Deals by measured speed, whole blocks of the canonical tree first."""

    def __init__(self, rank: int, ranks: int, leaves: int, clock: Callable[[], float] = time.perf_counter) -> None:
        super().__init__(rank, ranks)
        self.fields = (Field("seconds", "f8", ranks), Field("timed", "i8", ranks))
        self._balance = Balance(ranks, leaves)
        self._clock = clock
        self._now = 0.0
        self._seconds = np.zeros(ranks)
        self._timed = np.zeros(ranks, np.int64)
        self._computed = [0] * ranks

    def shards(self, leaves: int) -> Sequence[Shard]:
        """Return the micro-batches that each rank computes, of the `leaves` of a step or an evaluation."""
        return deal(self._balance.shares(leaves))

    def begin(self) -> None:
        """Start the clock before the first micro-batch of a step."""
        self._now = self._clock()

    def values(self, *, whole: bool) -> Mapping[str, NDArray[Any]]:
        """Return our entry of the seconds since the micro-batch before; a smaller one does not tell a speed."""
        before, self._now = self._now, self._clock()
        self._seconds[self.rank] = self._now - before if whole else 0.0
        self._timed[self.rank] = whole
        return {"seconds": self._seconds, "timed": self._timed}

    def stepped(self, shards: Sequence[Shard], total: Mapping[str, NDArray[Any]]) -> Sequence[int] | None:
        """Take in the reduced record of a step; return the new shares of a full batch if they change."""
        self._computed = [count + len(shard) for count, shard in zip(self._computed, shards, strict=True)]
        seconds = [
            float(total["seconds"][rank]) / int(count) if count else None for rank, count in enumerate(total["timed"])
        ]
        return self._balance.loads if self._balance.observe(seconds) else None

    def epoch_record(self) -> dict[str, Any]:
        """Return how many micro-batches each rank has computed in the epoch."""
        computed, self._computed = self._computed, [0] * self.ranks
        return {"shares": computed}
