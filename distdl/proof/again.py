"""Prepare a run of the past, so that its steps can be taken again: on all ranks, without writing anything."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from distdl.config import TrainConfig, comes_from_script, is_own
from distdl.engine.console import Console
from distdl.engine.environment import numerics
from distdl.engine.fingerprint import fingerprint
from distdl.engine.kernels import compile_for
from distdl.engine.prepare import Preparation
from distdl.engine.recomputation import Recomputation
from distdl.engine.recorded import Recorded
from distdl.engine.same_bits import bits_of_ranks, change_of_bits
from distdl.engine.stop import StopRequest
from distdl.engine.storage.checkpoints import FoundCheckpoint
from distdl.engine.storage.run_folder import StartingPoint
from distdl.errors import DamagedFileError, PeerLost, UserError
from distdl.inference.load import config_in, dataset_of, model_named, user_code_flags
from distdl.inference.options import LoadOptions
from distdl.parallel import Communicator, from_rank_0, on_rank_0, together

#: Settings that do not change the bits of a step, and that only a training needs.
WITHOUT: Mapping[str, Any] = {
    "max_steps": None,
    "early_stopping": 0,
    "cross_check": 0,
    "verify_every": 0,
    "balance": False,
    "dry_run": False,
    "require_same_bits": False,
    "detect_hangs": 0.0,
    "on_nonfinite": "skip",  # a run that stopped at such a step took none before it
}


#: The remedy for a run without a checkpoint.
MORE_CHECKPOINTS = "resume the run, or train again with a smaller --checkpoint-every if it stops before the first one"


@dataclass
class PastRun:
    """A run of the past, on every rank; its records are on rank 0 only."""

    communicator: Communicator
    folder: Path
    config: TrainConfig
    last_step: int
    """The last step that the run has recorded."""
    again: Recomputation
    data_sha256: str
    other_bits: str | None
    """What is known to differ between the arithmetic of the run and of this process; on rank 0."""
    _records: Recorded | None

    @property
    def records(self) -> Recorded:
        """The records; on rank 0 only."""
        assert self._records is not None
        return self._records

    def start_from(self, step: int) -> None:
        """Take the state of the checkpoint after a step. Collective. Raises `UserError` on every rank."""
        self.again.start_from(lambda: self.records.checkpoint(step), self.data_sha256)


@contextmanager
def lost_rank_decides_nothing() -> Iterator[None]:
    """Turn a lost rank inside the ``with`` block into a `UserError`: it must not look like a difference."""
    try:
        yield
    except PeerLost as lost:
        raise UserError(f"{lost}; the result is unknown: start the command again") from lost


@contextmanager
def past_run(options: LoadOptions, folder: Path, before: int, communicator: Communicator) -> Iterator[PastRun]:
    """Yield a run of the past in the state of its newest intact checkpoint before step `before`, or in its first state.

    NumPy and BLAS are set up as the run had them inside the ``with`` block.
    Collective. Raises `UserError` on every rank if the run folder, its data or its network is not available.
    """
    found = on_rank_0(communicator, lambda: _read(folder, before))
    facts = from_rank_0(communicator, lambda: None if found is None else found.to_json())
    assert facts is not None
    config, last_step = TrainConfig.from_json(facts["config"]), facts["last_step"]
    together(communicator, lambda: _check_user_code(options, folder, config))
    model = together(communicator, lambda: model_named(config.model, facts["path"], options.model))
    config = replace(config, model=model, tensorboard=False, mlflow=None)  # nothing is recorded again
    with numerics(config.threads_per_rank):
        dataset = on_rank_0(
            communicator,
            lambda: dataset_of(folder, config, options.data_dir, options.dataset, options.data_gigabytes),
        )
        console = Console(live=False)
        start = StartingPoint(folder, None if found is None else found.start, folder)
        preparation = Preparation(config, None, dataset, console, StopRequest(), find=lambda *_, **__: start)
        trainer, run_facts, _ = preparation.build(communicator)
        warnings = [*preparation.warnings, *compile_for(trainer, console)]
        ours = together(communicator, lambda: fingerprint(trainer.config, trainer.data, trainer.state.network))
        bits = bits_of_ranks(communicator, ours)

        def check() -> str | None:
            assert found is not None
            for complaint in (*found.complaints, *warnings):
                console.warning(complaint)
            if run_facts.data_sha256 != found.data_sha256:
                raise UserError(
                    f"{folder} was trained on other images or labels than {config.dataset} has here, or with another "
                    "split: give the same data"
                )
            trained_on = found.records.environment.get("ranks")
            if config.reduction == "allreduce" and communicator.size != trained_on:
                console.warning(
                    f"trained with --reduction allreduce on {trained_on} ranks, so bits depend on the ranks"
                )
            return change_of_bits(found.newest.header(), {**run_facts.environment, **bits})

        other_bits = on_rank_0(communicator, check)
        again = Recomputation(trainer, hashes=facts["has_hashes"])
        records = None if found is None else found.records
        yield PastRun(communicator, folder, config, last_step, again, run_facts.data_sha256, other_bits, records)


@dataclass(frozen=True)
class _Found:
    """The files of a run, on rank 0."""

    records: Recorded
    newest: FoundCheckpoint
    start: FoundCheckpoint | None
    complaints: list[str]

    @property
    def data_sha256(self) -> str:
        return self.newest.header().data_sha256

    def to_json(self) -> dict[str, Any]:
        """Return the facts for the other ranks."""
        config = replace(config_in(self.newest.header(), self.newest.path), **WITHOUT)
        return {
            "config": config.to_json(),
            "path": str(self.newest.path),
            "last_step": self.records.steps[-1],
            "has_hashes": bool(self.records.hashes),
        }


def _check_user_code(options: LoadOptions, folder: Path, config: TrainConfig) -> None:
    """Raise `UserError` if the model and the dataset both come from user code and neither is named: one line for both.

    If only one is missing, the functions that need it say so.
    """
    dataset_is_own = is_own(config.dataset) or comes_from_script(config.dataset)
    if is_own(config.model) and dataset_is_own and not options.model and options.dataset is None:
        raise UserError(
            f"{folder} was trained with a model and a dataset from user code; if you trust that code, add "
            f"{user_code_flags(config.model, config.dataset)} (a function(data_dir) that returns the same data; "
            "npz:FILE.npz works too)"
        )


def _read(folder: Path, before: int) -> _Found:
    """Read the run folder, its newest intact checkpoint and the one to start from."""
    records = Recorded.read(folder)
    complaints: list[str] = []
    newest = _newest_before(records, sys.maxsize, complaints)
    if newest is None:
        raise UserError(f"{folder} has no intact checkpoint, which has the settings of the run: {MORE_CHECKPOINTS}")
    start = _newest_before(records, before, complaints)
    return _Found(records, newest, start, list(dict.fromkeys(complaints)))


def _newest_before(records: Recorded, before: int, complaints: list[str]) -> FoundCheckpoint | None:
    for step in reversed([step for step in records.checkpoint_steps if step < before]):
        try:
            return records.checkpoint(step)
        except DamagedFileError as error:
            complaints.append(f"{error}; the one before it is used")
    return None
