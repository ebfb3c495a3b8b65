"""Faults that several tests inject: values that are not finite, flipped bits, checkpoints written at once."""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np

from distdl.engine.fault_injection import fail_at, forget


@contextmanager
def faults() -> Iterator[None]:
    """Forget the faults that were registered inside, at the end."""
    try:
        yield
    finally:
        forget()


def flip(array, *, byte=6, bit=3):
    """Flip one bit of an array in place; the default is in the mantissa of the second float32."""
    array.reshape(-1).view(np.uint8)[byte] ^= 1 << bit


def spoil_records(spoil, *, step, rank=None, micro_batches=None, once=False):
    """Let ``spoil(record)`` change the record of each micro-batch of a step, also when it is computed again.

    It changes only those of one rank, or of the given micro-batches, or only the first one on each rank.
    """

    def act(owner):
        index, record = owner
        if micro_batches is None or index in micro_batches:
            spoil(record)

    fail_at("backward", when="after", rank=rank, step=step, nth=1 if once else None, action=act)


def spoil_state(spoil, *, step, rank):
    """Let ``spoil(state)`` change the state of one rank before a step."""
    fail_at("step", rank=rank, step=step, action=spoil)


def write_checkpoints_at_once(monkeypatch):
    """Let the writer thread complete each checkpoint before the training continues."""

    def submit(_pool, work, *arguments):
        future = Future()
        try:
            future.set_result(work(*arguments))
        except Exception as error:  # noqa: BLE001  as the thread does
            future.set_exception(error)
        return future

    monkeypatch.setattr(ThreadPoolExecutor, "submit", submit)
