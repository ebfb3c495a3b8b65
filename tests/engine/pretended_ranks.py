"""Simulated ranks: threads with separate clocks. The test sets the time of each event and the error of each clock."""

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from distdl.parallel import OneProcess


class Rank(OneProcess):
    """One rank. `now` is its true time; `clock` shows a wrong time. A barrier ends when all ranks have reached it."""

    def __init__(self, rank, world, *, ahead=0.0, drift=0.0):
        super().__init__()
        self.rank, self.size, self.world = rank, world.size, world
        self.now, self.ahead, self.drift = 0.0, ahead, drift

    def clock(self):
        return self.now * (1 + self.drift) + self.ahead

    def barrier(self):
        self._exchanged(None)

    def _exchanged(self, value):
        self.world.values[self.rank] = value
        self.world.times[self.rank] = self.now
        self.world.gate.wait()
        everything, self.now = list(self.world.values), max(self.world.times) + self.world.latency
        self.world.gate.wait()
        return everything

    def allgather_json(self, value):
        return self._exchanged(value)

    def allgatherv(self, array, counts):
        starts = np.cumsum([0, *counts])
        mine = array[starts[self.rank] : starts[self.rank + 1]]
        array[...] = np.concatenate(self._exchanged(mine.copy()))


class World:
    """The simulated ranks; `ahead` and `drift` are the errors of each rank's clock."""

    def __init__(self, ahead, drift=None, latency=1e-5):
        self.size, self.latency = len(ahead), latency
        self.gate = threading.Barrier(self.size)
        self.values, self.times = [None] * self.size, [0.0] * self.size
        drift = drift or [0.0] * self.size
        self.ranks = [Rank(rank, self, ahead=ahead[rank], drift=drift[rank]) for rank in range(self.size)]

    def run(self, work):
        """Do the same work on every rank; return the results by rank."""

        def guarded(rank):
            try:
                return work(rank)
            except BaseException:
                self.gate.abort()
                raise

        with ThreadPoolExecutor(self.size) as pool:
            return list(pool.map(guarded, self.ranks))
