"""Compute stretches of a run again and compare them: the work of `distdl.audit`.

A stretch is the steps between two checkpoints that follow each other in the run folder; the first one begins with the
initial weights. It is computed from the checkpoint at its start. So a forged stretch is one whose end does not follow
from its start, and each stretch can be checked without the others.
"""

from __future__ import annotations

import math
import secrets
import time
from collections.abc import Sequence
from itertools import pairwise

from distdl.engine.console import Console
from distdl.engine.recorded import Recorded, StepRecord, contradictions, first_difference
from distdl.engine.state import TrainingState
from distdl.errors import EXIT_DIFFERENT, DamagedFileError, UserError, counted
from distdl.inference.options import check_names
from distdl.parallel import Communicator, guard, on_rank_0, world
from distdl.proof.again import MORE_CHECKPOINTS, PastRun, lost_rank_decides_nothing, past_run
from distdl.proof.options import AuditOptions
from distdl.rng import Key

#: The first and the last step of a stretch: the state after the first is its start.
Stretch = tuple[int, int]
#: Numbers of forged stretches that the result names.
FORGED = (1, 2, 5, 10, 100)
SEED_BITS = 53
#: The progress that later steps depend on, and the scores of the latest epoch.
PROGRESS = (
    *("skipped_steps", "plateau_cuts", "best_step", "best_score"),
    *("train_loss", "validation_loss", "validation_accuracy"),
)


def audit(options: AuditOptions) -> int:
    """Audit a run on all ranks; rank 0 prints. Return the exit code, the same on all ranks.

    Collective. Raises `UserError` on every rank.
    """
    check_names(options)
    if not 0 < options.fraction <= 1:
        raise UserError(f"--fraction must be above 0 and at most 1, not {options.fraction}")
    if options.seed is not None and options.seed < 0:
        raise UserError(f"--seed must be at least 0, not {options.seed}")
    communicator = world()
    with guard(communicator), lost_rank_decides_nothing():
        planned = on_rank_0(communicator, lambda: _planned(options))
        seed, every, complaints = communicator.bcast_json(planned)
        chosen = choose(every, options.fraction, seed)
        console = Console(live=False)
        on_rank_0(communicator, lambda: console.line("\n".join(complaints)) if complaints else None)
        try:
            failed = _audit_stretches(options, communicator, every, chosen, console) or bool(complaints)
            last = _last_lines(every, chosen, seed, failed=failed)
        except UserError as error:  # on every rank
            if not complaints:
                raise
            failed, last = True, [f"DIFFERENT, and the rest cannot be computed: {error}"]

        def show() -> None:
            for line in last:
                console.line(line)

        on_rank_0(communicator, show)
        communicator.barrier()  # rank 0 has printed everything before any rank ends
        return EXIT_DIFFERENT if failed else 0


def _audit_stretches(
    options: AuditOptions,
    communicator: Communicator,
    every: Sequence[Stretch],
    chosen: Sequence[Stretch],
    console: Console,
) -> bool:
    """Compute the chosen stretches and the receipt again; return whether anything differs, on all ranks. Collective."""
    with past_run(options, options.run, chosen[0][0] + 1, communicator) as run:
        failed = False
        for stretch in chosen:
            failed |= _audit_stretch(run, stretch, console)
        return _audit_receipt(run, every[-1][1], console) or failed


def _planned(options: AuditOptions) -> tuple[int, list[Stretch], list[str]]:
    """Return the seed, all stretches and the contradictions within the run folder. On rank 0."""
    records = Recorded.read(options.run)
    every = stretches_of(records.checkpoint_steps)
    if not every:
        raise UserError(f"{options.run} has no checkpoint, so there is nothing to compute again: {MORE_CHECKPOINTS}")
    seed = secrets.randbits(SEED_BITS) if options.seed is None else options.seed
    return seed, every, [f"DIFFERENT: {one}" for one in contradictions(records)]


def stretches_of(checkpoint_steps: Sequence[int]) -> list[Stretch]:
    """Return the stretches between the checkpoints of a run, from its start.

    >>> stretches_of([10, 20, 25])
    [(0, 10), (10, 20), (20, 25)]
    """
    return list(pairwise([0, *(step for step in checkpoint_steps if step)]))


def choose(every: Sequence[Stretch], fraction: float, seed: int) -> list[Stretch]:
    """Return this share of the stretches, at least one, chosen at random, in the order of the run."""
    count = math.ceil(fraction * len(every))
    order = Key(seed).of("audit").permutation(len(every)).tolist()
    return sorted((every[place][0], every[place][1]) for place in order[:count])


def unseen(every: int, audited: int, forged: int) -> float:
    """Return the probability that an audit of some of all stretches meets none of the forged ones.

    The stretches are drawn without replacement, each set with the same probability: ``C(n - f, m) / C(n, m)``.

    >>> unseen(10, 1, 1), unseen(10, 5, 2), unseen(10, 10, 1)
    (0.9, 0.2222222222222222, 0.0)
    """
    return math.comb(every - forged, audited) / math.comb(every, audited)


def _audit_stretch(run: PastRun, stretch: Stretch, console: Console) -> bool:
    """Compute a stretch again, up to the first difference; return whether there is one, on all ranks. Collective."""
    first, last = stretch
    begun = time.perf_counter()
    if first:  # also if the stretch before ended here: with other bits, perhaps
        try:
            run.start_from(first)
        except DamagedFileError:
            raise
        except UserError as error:  # on every rank: no training with these settings wrote this checkpoint
            line = f"steps {first + 1} to {last}: DIFFERENT, they cannot start: {error}"
            on_rank_0(run.communicator, lambda: console.line(line))
            return True

    def differs(recomputed: StepRecord) -> bool:
        difference = first_difference(run.records.at(recomputed.step), recomputed)
        text = None if difference is None else f"first at {difference} here"
        if text is None and recomputed.step == last:
            text = _progress_that_differs(run.records, run.again.trainer.state)
        if text is not None:
            console.line(f"steps {first + 1} to {last}: DIFFERENT, {text}")
            if run.other_bits is not None:
                console.line(f"  but {run.other_bits}")
        return text is not None

    while run.again.step < last:
        recomputed = run.again.take_step()
        if run.communicator.bcast_json(on_rank_0(run.communicator, lambda: differs(recomputed))):  # noqa: B023
            return True
    seconds = time.perf_counter() - begun
    on_rank_0(run.communicator, lambda: console.line(f"steps {first + 1} to {last}: the same bits ({seconds:.1f} s)"))
    return False


def _progress_that_differs(records: Recorded, state: TrainingState) -> str | None:
    """Return what differs in the progress that the checkpoint after the current step has; None if nothing does."""
    header = records.header(state.step)
    assert header is not None
    for name in PROGRESS:
        recorded, here = getattr(header.progress, name), getattr(state.progress, name)
        if recorded != here:
            return f"{name} of the checkpoint after step {state.step}: {recorded} | {here} here"
    return None


def _audit_receipt(run: PastRun, newest: int, console: Console) -> bool:
    """Compare the receipts in ``summary.json`` with the newest checkpoint; return whether they differ. Collective."""

    def has_receipt() -> bool:
        summary = run.records.summary
        return summary is not None and summary["steps"] == newest

    if not run.communicator.bcast_json(on_rank_0(run.communicator, has_receipt)):
        return False
    run.start_from(newest)

    def differs() -> bool:
        summary, state = run.records.summary, run.again.trainer.state
        assert summary is not None
        found = {"weights_sha256": state.weights_sha256(), "state_sha256": state.state_sha256()}
        for name, here in found.items():
            if summary[name] != here:
                console.line(f"summary.json: DIFFERENT, {name}: {summary[name]} | {here} here")
                return True
        console.line(f"weights sha256: {found['weights_sha256']}")
        return False

    return bool(run.communicator.bcast_json(on_rank_0(run.communicator, differs)))


def _last_lines(every: Sequence[Stretch], chosen: Sequence[Stretch], seed: int, *, failed: bool) -> list[str]:
    steps, of_all = (sum(last - first for first, last in some) for some in (chosen, every))
    count, audited = len(every), len(chosen)
    stretches = "stretch" if count == 1 else "stretches"
    choice = f" (--seed {seed} chooses the same)" if audited < count else ""
    lines = [f"audited: {audited} of {count} {stretches}, {steps} of {counted(of_all, 'step')}{choice}"]
    if failed:
        return [*lines, "DIFFERENT: the records of this run are not those of its training here"]
    if audited == count:
        return [*lines, "no difference: every step of the run was computed again"]
    shares = [
        f"{unseen(count, audited, forged):.2g} if {forged} {'is' if forged == 1 else 'are'} forged"
        for forged in FORGED
        if forged <= count - audited
    ]
    lines.append("no difference in these; the probability that a forged stretch remains unseen:")
    return [*lines, f"  {', '.join(shares)}"]
