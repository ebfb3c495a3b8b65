"""Take one step of a run again, check it, and write what is inside: the work of `distdl.replay`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from distdl.config import flag_of
from distdl.data.batch_order import micro_batch_count
from distdl.engine.console import Console
from distdl.engine.recorded import Difference, StepRecord, check_run_folder, compared_in, first_difference
from distdl.engine.storage.files import check_output, write_output
from distdl.errors import EXIT_DIFFERENT, DamagedFileError, UserError, counted, unknown_name
from distdl.inference import figures
from distdl.inference.options import check_names
from distdl.parallel import guard, on_rank_0, together, world
from distdl.proof import replay_files
from distdl.proof.again import PastRun, lost_rank_decides_nothing, past_run
from distdl.proof.inside import Inside, StepWatcher, Weights, arrays_of, look_inside
from distdl.proof.options import ReplayOptions

#: Losses of micro-batches in a line.
LOSSES_PER_LINE = 8


def replay(options: ReplayOptions) -> int:
    """Take the step again on all ranks; rank 0 prints and writes. Return the exit code, the same on all ranks.

    Collective. Raises `UserError` on every rank.
    """
    check_names(options)
    communicator = world()
    with guard(communicator), lost_rank_decides_nothing():
        on_rank_0(communicator, lambda: _check_out(options))
        with past_run(options, options.run, options.step, communicator) as run:
            together(communicator, lambda: _check(options, run))
            exit_code = Replay(options, run).take()
            communicator.barrier()  # rank 0 has printed everything before any rank ends
            return exit_code


def _check_out(options: ReplayOptions) -> None:
    if options.out is not None and options.out.suffix != ".npz":
        raise UserError(f"--out {options.out}: expected a name that ends in .npz")
    check_run_folder(options.run)  # before its name is part of a path that cannot be written
    check_output(options.out or replay_files.path_of(options.run, options.step, 0), "--out")


def _check(options: ReplayOptions, run: PastRun) -> None:
    """Raise `UserError` for a step, a micro-batch or a layer that the run does not have."""
    trainer, step = run.again.trainer, options.step
    last = min(run.last_step + 1, trainer.total_steps)
    if not 1 <= step <= last:
        taken = f"{run.folder} has taken {counted(run.last_step, 'step')}"
        raise UserError(f"--step {step}: {taken}; give a step from 1 to {last}")
    samples = len(trainer.data.parts.training)
    of_step = samples % run.config.batch_size if step % trainer.steps_per_epoch == 0 else 0
    count = micro_batch_count(of_step or min(run.config.batch_size, samples), run.config.micro_batch_size)
    if options.micro_batch is not None and not 0 <= options.micro_batch < count:
        has = f"step {step} has {count} micro-batch{'es' if count > 1 else ''}"
        raise UserError(f"--micro-batch {options.micro_batch}: {has}; give a number from 0 to {count - 1}")
    names = trainer.state.network.layer_names
    if options.layer is not None and options.layer not in names:
        raise unknown_name(f"value of {flag_of('layer')}", options.layer, names)


def greatest(losses: Sequence[float]) -> int:
    """Return the number of the greatest loss; NaN is greater than all others.

    >>> greatest([0.1, 0.3, 0.2]), greatest([0.1, math.nan, math.inf])
    (1, 1)
    """
    return max(range(len(losses)), key=lambda place: (math.isnan(losses[place]), losses[place]))


class Replay:
    """One step of a run, taken again."""

    def __init__(self, options: ReplayOptions, run: PastRun) -> None:
        self.options, self.run = options, run
        self.console = Console(live=False)
        self.difference: Difference | None = None
        self.checked: list[int] = []
        """The steps that the run has records of, and that were compared with them; on rank 0."""
        self.compared: list[str] = []
        """The records of the step itself that were compared."""

    def take(self) -> int:
        """Take the steps up to the requested one, and look inside it; return the exit code. Collective."""
        again, step = self.run.again, self.options.step
        first = again.step
        while again.step < step - 1:
            self._check(again.take_step())
        trainer, watcher = again.trainer, StepWatcher()
        trainer.optimizer_step.observers = [*trainer.optimizer_step.observers, watcher]
        before = Weights.of(trainer.state.network)
        self._check(again.take_step())
        loss_sums = watcher.loss_sums(self.run.communicator)

        def show() -> bool:
            self._show(first, loss_sums, before, watcher)
            return self.difference is not None

        is_different = self.run.communicator.bcast_json(on_rank_0(self.run.communicator, show))
        return EXIT_DIFFERENT if is_different else 0

    def _check(self, recomputed: StepRecord) -> None:
        """Compare a step with the records of the run, on rank 0."""

        def check() -> None:
            recorded = self.run.records.at(recomputed.step)
            try:
                difference = first_difference(recorded, recomputed)
            except DamagedFileError as error:
                self.console.warning(f"{error}; step {recomputed.step} is not compared with it")
                recorded = replace(recorded, tensors=None)
                difference = first_difference(recorded, recomputed)
            self.compared = compared_in(recorded, recomputed)
            if self.compared:
                self.checked.append(recomputed.step)
            self.difference = self.difference or difference

        on_rank_0(self.run.communicator, check)

    def _show(self, first: int, loss_sums: list[tuple[float, int]], before: Weights, watcher: StepWatcher) -> None:
        """Print the losses and the result of the check, and write the files. On rank 0."""
        options, console, trainer = self.options, self.console, self.run.again.trainer
        network, step = trainer.state.network, options.step
        start = f"the checkpoint after step {first}" if first else "the initial weights"
        console.line(f"{self.run.folder}: step {step}, taken again from {start}")
        means = [loss / max(samples, 1) for loss, samples in loss_sums]
        for place in range(0, len(means), LOSSES_PER_LINE):
            shown = [f"{mean:.4f}" for mean in means[place : place + LOSSES_PER_LINE]]
            console.line(f"losses of micro-batches {place} to {place + len(shown) - 1}: {' '.join(shown)}")
        micro_batch = greatest(means) if options.micro_batch is None else options.micro_batch
        for line in self._lines_of_check():
            console.line(line)

        gradient, after = watcher.gradient, Weights.of(network)
        before.copy_into(network)
        found = look_inside(trainer, step - 1, micro_batch)
        after.copy_into(network)
        assert repr(found.loss_sum) == repr(loss_sums[micro_batch][0]), "the same micro-batch has another loss"
        step_gradients = {name: view.copy() for name, view in network.views(gradient)}
        arrays = arrays_of(found, before, after, step_gradients, options.layer)
        about = {"step": step, "micro_batch": micro_batch, "layer": options.layer, "as_written": found.as_written}
        path = options.out or replay_files.path_of(self.run.folder, step, micro_batch)
        write_output(path, replay_files.encoded(about, arrays), "--out")
        chosen = "" if options.micro_batch is not None else ", that with the greatest loss"
        console.line(
            f"micro-batch {micro_batch}{chosen}: {counted(len(found.rows), 'sample')}, {counted(len(arrays), 'array')}"
        )
        console.line(f"written: {path}")
        self._draw(path.with_suffix(".png"), found)

    def _lines_of_check(self) -> list[str]:
        if self.difference is not None:
            lines = [f"DIFFERENT from the records of the run, first at {self.difference} here"]
            lines += [f"in step {self.difference.step}: {self.difference.others}"] if self.difference.others else []
            why = self.run.other_bits
            return [
                *lines,
                why
                if why is not None
                else "the arithmetic is that of the run, by its fingerprint: so a "
                "record or a checkpoint was changed, or the hardware was at fault",
            ]
        checked = len([step for step in self.checked if step != self.options.step])
        before = f"; the same bits in {counted(checked, 'step')} before it" if checked else ""
        if not self.compared:
            return [f"the run has no record of step {self.options.step} to check it against{before}"]
        names = {"step": "loss and accuracy", "epoch": "the scores of the epoch"}
        names |= {"hashes": "the hash of every tensor", "tensors": "every tensor of the checkpoint"}
        what = ", ".join(text for kind, text in names.items() if kind in self.compared)
        return [f"the same bits as the run has recorded: {what}{before}"]

    def _draw(self, path: Path, found: Inside) -> None:
        if not figures.has_matplotlib():
            self.console.warning(f"no picture is drawn: {figures.NEEDS_MATPLOTLIB}")
            return
        layer = self.options.layer
        activations = {name: one for name, one in found.activations.items() if layer in {None, name}}
        gradients = {
            name: one for name, one in found.gradients.items() if layer is None or name.startswith(f"{layer}.")
        }
        figure = figures.micro_batch(found.images, found.losses, activations, gradients)
        write_output(path, figures.content_of(figure, "png"), "--out")
        self.console.line(f"picture: {path}")
