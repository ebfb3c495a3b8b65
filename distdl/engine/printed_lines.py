"""The lines that a run prints: the banner, the line of an epoch, phrases for the shares of the ranks."""

from collections.abc import Mapping, Sequence
from typing import Any

from distdl.config import TrainConfig
from distdl.data import PreparedDataset
from distdl.engine.best import ends_plateau, epochs_since_best
from distdl.engine.metrics import Sums
from distdl.engine.state import TrainingState
from distdl.engine.timing.timeline import Spent
from distdl.parallel import Communicator

#: With more ranks than this, `describe_shares` prints a summary.
MOST_RANKS_LISTED = 16


def banner_of(
    config: TrainConfig,
    data: PreparedDataset,
    parameter_count: int,
    environment: Mapping[str, Any],
    communicator: Communicator,
) -> list[str]:
    """Return the first lines of a run."""
    parts = data.parts
    described = (
        f"{config.dataset} ({len(parts.training)} training, {len(parts.validation)} validation, "
        f"{len(parts.test)} test) · {config.model} ({parameter_count:,} parameters) · "
        f"{config.optimizer} lr {config.lr:g} · seed {config.seed}"
    )
    batch = f"batch {config.batch_size} = {config.micro_batches} micro-batches of {config.micro_batch_size}"
    shares = shares_of(config.micro_batches, communicator.size) + (" at first (--balance)" if config.balance else "")
    lines = banner(environment, described, config.threads_per_rank, batch, shares, _survives(communicator))
    if config.reduction != "tree":
        moves = ", and with --balance from run to run" if config.balance else ""
        lines.append(f"--reduction {config.reduction}: bits may differ from those of another number of ranks{moves}")
    return lines


def banner(
    environment: Mapping[str, Any], described: str, threads: int, batch: str, shares: str, survives: str
) -> list[str]:
    """Return the lines for these phrases."""
    ranks = environment["ranks"]
    hosts = ", ".join(f"{name} ({count})" for name, count in environment["hosts"].items())
    return [
        f"distdl {environment['versions']['distdl']} · {described}",
        f"{ranks} rank{'s' if ranks > 1 else ''} × {threads} thread{'s' if threads > 1 else ''}"
        f" · {environment['communicator']} · host{'s' if len(environment['hosts']) > 1 else ''} {hosts}",
        f"{batch} · {shares}",
        f"survives failures: {survives}",
    ]


def _survives(communicator: Communicator) -> str:
    """Return whether the run survives failures, and why not."""
    if communicator.survives_failures:
        return "yes"
    if communicator.size == 1:
        return "no, because there is one rank; --resume continues from the last checkpoint"
    return (
        "no, because only Open MPI 5 started as mpirun --with-ft ulfm continues without a rank; "
        "--resume continues from the last checkpoint"
    )


def epoch_line(epoch: int, epochs: int, training: Sums, validation: Sums, spent: Spent, rate: float) -> str:
    """Return the line of an epoch; `rate` is in samples per second."""
    scores = (
        f"train {training.accuracy:7.2%}  validation {validation.accuracy:7.2%}"
        if validation.targets_per_sample
        else f"validation loss {validation.loss:.4f}"
    )
    time_split = f"  {spent}" if len(spent.compute) > 1 else ""
    return (
        f"epoch {epoch:3d}/{epochs}  loss {training.loss:.4f}  {scores}  {spent.seconds:6.1f} s  "
        f"{rate:,.0f} samples/s{time_split}"
    )


def plateau_line(config: TrainConfig, state: TrainingState, steps_per_epoch: int) -> str | None:
    """Return the line of a reduced learning rate after the validation of this step; None if it stays."""
    if not ends_plateau(config, state, steps_per_epoch):
        return None
    rates = (
        config.scaled_learning_rate * config.plateau_factor ** (state.progress.plateau_cuts - one) for one in (1, 0)
    )
    epochs = epochs_since_best(state, steps_per_epoch)
    return f"learning rate {' → '.join(f'{rate:.3g}' for rate in rates)}: no better validation for {_epochs(epochs)}"


def result_lines(config: TrainConfig, test: Sums | None, summary: Mapping[str, Any]) -> list[str]:
    """Return the lines about the end of a training: why it ended early, the best epoch, and the score on the test part.

    `summary` is the content of ``summary.json``.
    """
    lines, best = [], summary["best_epoch"]
    if summary["stopped_early"]:
        lines.append(
            f"stopped early after epoch {summary['epochs']}: no better validation for "
            f"{_epochs(summary['epochs'] - best)} (--early-stopping {config.early_stopping}); best: epoch {best}"
        )
    if test is not None:
        score = f"loss: {test.loss:.6f}" if test.accuracy is None else f"accuracy: {test.accuracy:.2%}"
        lines.append(f"test {score}{_scored_weights(config, summary)}")
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


def recovery_line(lost: Sequence[int], when: str, ranks: int, seconds: float) -> str:
    """Return the line of a recovery, after which `ranks` ranks continue."""
    several = len(lost) > 1
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
