"""What tests let go wrong in a training: numbers that are not finite, and flipped bits."""

import numpy as np

from distdl.engine.trainer import Trainer


def flip(array, *, byte=6, bit=3):
    """Flip one bit of an array in place; the default is in the mantissa of the second float32."""
    array.reshape(-1).view(np.uint8)[byte] ^= 1 << bit


def spoil_records(monkeypatch, spoil, *, step, when=lambda rank, index: True, once=False):
    """Let `spoil` change the record of each micro-batch of a step (from 1) where ``when(rank, index)``."""
    original, spoiled = Trainer._computed, []

    def computed(self, rows, key, shard):
        for index, record in original(self, rows, key, shard):
            if self.state.step + 1 == step and when(self.communicator.rank, index) and not (once and spoiled):
                spoiled.append(index)
                spoil(record)
            yield index, record

    monkeypatch.setattr(Trainer, "_computed", computed)


def spoil_state(monkeypatch, spoil, *, step, rank):
    """Let `spoil` change the state of one rank before a step (from 1)."""
    original = Trainer.step

    def spoiled(self):
        if self.state.step + 1 == step and self.communicator.rank == rank:
            spoil(self.state)
        original(self)

    monkeypatch.setattr(Trainer, "step", spoiled)
