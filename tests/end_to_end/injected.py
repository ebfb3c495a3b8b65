"""Faults that several tests inject: values that are not finite, flipped bits, checkpoints written at once."""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np

from distdl.engine.fault_injection import fail_at, forget


@contextmanager
def faults() -> Iterator[None]:
    """At the end, forget the faults that were registered inside."""
    try:
        yield
    finally:
        forget()


def flip(array, *, byte=6, bit=3):
    """Flip one bit of an array in place; the default is in the mantissa of the second float32."""
    array.reshape(-1).view(np.uint8)[byte] ^= 1 << bit


def spoil_records(spoil, *, step, rank=None, micro_batches=None, once=False):
    """Call ``spoil(record)`` to change the record of each micro-batch of a step, even if it is computed again.

    It can be limited to one rank, to the given micro-batches, or to the first record on each rank.
    """

    def act(owner):
        index, record = owner
        if micro_batches is None or index in micro_batches:
            spoil(record)

    fail_at("backward", when="after", rank=rank, step=step, nth=1 if once else None, action=act)


def spoil_state(spoil, *, step, rank):
    """Call ``spoil(state)`` to change the state of one rank before a step."""
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
