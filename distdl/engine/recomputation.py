"""Take steps of a run again, from one of its checkpoints or from its start, on all ranks. Nothing is written.

The steps are those of the trainer, and the records are made by the logbook. So a step that is computed again can be
compared with the records of the run, bit for bit.
"""

import json
import math
from collections.abc import Callable
from dataclasses import replace

from distdl.engine.console import Console
from distdl.engine.logbook import Logbook
from distdl.engine.recorded import StepRecord, Tensors, kind_of
from distdl.engine.requirements import restore
from distdl.engine.storage.checkpoints import FoundCheckpoint
from distdl.engine.trainer import Trainer
from distdl.errors import DivergedError
from distdl.parallel import on_rank_0


class Recomputation:
    """Takes the next steps of a trainer that has not been opened, and returns their records.

    With `hashes` each record has the hash of every tensor.
    """

    def __init__(self, trainer: Trainer, *, hashes: bool) -> None:
        self.trainer = trainer
        config = replace(trainer.config, log_every=1, record_hashes=hashes)
        self._logbook = Logbook(config, trainer.steps_per_epoch, Console(live=False), keeps=True)
        trainer.listeners = [self._logbook]

    @property
    def step(self) -> int:
        """The number of steps taken."""
        return self.trainer.state.step

    def start_from(self, read: Callable[[], FoundCheckpoint], data_sha256: str) -> None:
        """Take the state of the checkpoint that `read` returns on rank 0. Collective. Raises `UserError` on all."""
        trainer = self.trainer

        def load() -> None:
            restore(trainer.state, read(), data_sha256, trainer.config, trainer.steps_per_epoch)

        on_rank_0(trainer.communicator, load)
        trainer.state.send_from_rank_0(trainer.communicator)

    def take_step(self) -> StepRecord:
        """Take the next step, and judge the epoch that it ends; return the records. Collective.

        A validation that is not finite ended the run. Here it is a record of the epoch that the run does not have.
        The tensors of the record are views of the state: valid until the next step.
        """
        trainer = self.trainer
        trainer.take_step()
        diverged = False
        if self.step % trainer.steps_per_epoch == 0:
            try:
                trainer.validate()
            except DivergedError:  # on all ranks; the run ended here, without a record of the epoch
                diverged = True
        lines = {name: list(map(json.loads, lines.splitlines())) for name, lines in self._logbook.lines.items()}
        self._logbook.lines = dict.fromkeys(lines, b"")
        [hashed] = lines.get("hashes", [{}])
        metrics = {kind_of(record): record for record in lines["metrics"]}
        if diverged:
            metrics["epoch"] = {"validation_loss": math.nan}
        return StepRecord(self.step, metrics, hashed.get("hashes", {}), hashed.get("loss"), self._tensors)

    def _tensors(self) -> Tensors:
        return dict(self.trainer.state.named_arrays())
