"""Prove that this start computes the same bits as the run that it resumes: ``--resume … --prove``.

The run has recorded what its steps gave. So before the run continues, the ranks take recorded steps again, from the
checkpoint before, with the libraries, hosts and MPI of this start. Only if all recorded bits come out again, the
training continues. A fingerprint (`same_bits.py`) compares samples of the arithmetic; a proof compares the training.

The proof ends at the first step with the hashes of all tensors: with ``--record-hashes`` that is one step, otherwise it
is the checkpoint to resume from. The losses in between are compared too.
"""

import time
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from distdl.engine.checks.watchdog import Watchdog
from distdl.engine.console import Console
from distdl.engine.coordinator import RunFacts
from distdl.engine.recomputation import Recomputation
from distdl.engine.recorded import Recorded, StepRecord, contradictions, first_difference
from distdl.engine.same_bits import change_of_bits, with_bits
from distdl.engine.storage.checkpoints import FoundCheckpoint
from distdl.engine.storage.run_folder import StartingPoint
from distdl.engine.trainer import Trainer
from distdl.errors import DamagedFileError, UserError, counted
from distdl.parallel import on_rank_0


@dataclass(frozen=True)
class _Plan:
    """The recorded steps to take again."""

    run: Recorded
    first: int
    """The step of the checkpoint to start from."""
    last: int


def with_proof(
    facts: RunFacts,
    trainer: Trainer,
    start: StartingPoint | None,
    console: Console,
    watchdog: Watchdog | None = None,
) -> RunFacts:
    """Return the facts with the part of the environment about bits, proved if `--prove` is set: see `prove`.

    The watchdog counts the steps of the proof as progress.
    Collective; `start` is needed on rank 0. Raises `UserError` on every rank.
    """
    facts = with_bits(facts, trainer, start)
    if not trainer.config.prove:
        return facts
    with nullcontext() if watchdog is None else watchdog.watching(lambda: trainer.work_done):
        proof = prove(facts, trainer, start)
    if proof is None:
        return facts
    if trainer.communicator.rank == 0:
        console.line(proof)
    return replace(facts, environment={**facts.environment, "proof": proof})


def prove(facts: RunFacts, trainer: Trainer, start: StartingPoint | None) -> str | None:
    """Take recorded steps again; return a line about the proof, or None if there is no checkpoint to resume.

    Afterwards the state is as before. Collective; `start` is needed on rank 0. Raises `UserError` on every rank if a
    bit differs, or if the run folder has no earlier checkpoint.
    """
    communicator, state = trainer.communicator, trainer.state
    plan = on_rank_0(communicator, lambda: None if start is None or start.found is None else _plan_of(start))
    steps = communicator.bcast_json(None if plan is None else [plan.first, plan.last])
    if steps is None:
        return None
    (first, last), newest = steps, state.step
    begun = time.perf_counter()
    kept = [(array, array.copy()) for _, array in state.named_arrays()]
    progress, phase, listeners = state.progress, trainer.phase, trainer.listeners

    def read() -> FoundCheckpoint:
        assert plan is not None
        return plan.run.checkpoint(first)

    def check(recomputed: StepRecord) -> None:
        assert plan is not None
        recorded = plan.run.at(recomputed.step)
        if recomputed.step < newest:  # a checkpoint in between may be damaged
            recorded = replace(recorded, tensors=None)
        difference = first_difference(recorded, recomputed)
        if difference is not None:
            assert start is not None
            assert start.found is not None
            change = change_of_bits(start.found.header(), facts.environment)
            raise UserError(
                f"--prove: cannot resume from {start.found.path}: this start computes other bits than the run, first "
                f"at {difference} here{'' if change is None else f' ({change})'}; resume with the libraries and hosts "
                "of the run, or leave the flag out: then the bits change"
            )

    again = Recomputation(trainer, hashes=True)
    again.start_from(read, facts.data_sha256)
    while again.step < last:
        recomputed = again.take_step()
        trainer.stop.stop_if_asked(communicator)
        on_rank_0(communicator, partial(check, recomputed))
    for array, before in kept:
        np.copyto(array, before)
    state.progress, trainer.phase, trainer.listeners, trainer.samples_since_epoch = progress, phase, listeners, 0
    names = f"step {last}" if last == first + 1 else f"steps {first + 1} to {last}"
    return (
        f"proved: {names}, taken again from the checkpoint after step {first}, gave the same bits in "
        f"{counted(len(kept), 'tensor')} ({time.perf_counter() - begun:.2f} s)"
    )


def _plan_of(start: StartingPoint) -> _Plan:
    """Return the fewest steps that end with the hashes of all tensors. Raises `UserError` without an earlier state."""
    assert start.found is not None
    newest = start.found.header().step
    if start.origin is None:
        raise UserError(f"--prove: {start.found.path} is not in a run folder: resume from one, or leave the flag out")
    run = Recorded.read(start.origin)
    for complaint in contradictions(run, [newest]):
        raise UserError(f"--prove: cannot resume: {complaint}; restore the run folder, or leave the flag out")
    for first in reversed([step for step in run.checkpoint_steps if step < newest]):
        try:
            run.checkpoint(first)
        except DamagedFileError:
            continue
        return _Plan(run, first, min([newest, *(step for step in run.hashes if first < step <= newest)]))
    raise UserError(
        f"--prove: {start.origin} has no intact checkpoint before step {newest} to compute from: write more of them "
        "(--checkpoint-every, --keep-checkpoints), or leave the flag out"
    )
