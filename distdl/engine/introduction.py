"""The first lines of a run, and the warnings about its data and its memory."""

from collections.abc import Sequence

from distdl.engine.printed_lines import banner_of
from distdl.engine.requirements import warnings_about
from distdl.engine.trainer import Trainer
from distdl.engine.transfer import Transfer
from distdl.job.allocation import placement_lines, read_allocation


def introduce(trainer: Trainer, transferred: Transfer | None, warnings: Sequence[str]) -> None:
    """Print the banner on rank 0, and tell all listeners of the start."""
    if trainer.communicator.rank == 0:
        config, console, data, network = trainer.config, trainer.console, trainer.data, trainer.state.network
        environment = trainer.facts.environment
        placement, idle = placement_lines(read_allocation(), environment["hosts"])
        for line in [*banner_of(config, data, network, environment, trainer.communicator), *placement]:
            console.line(line)
        about_settings = warnings_about(config, len(data.parts.training), network, trainer.communicator.size)
        for warning in (*data.notes, *warnings, *about_settings, *idle):
            console.warning(warning)
        if transferred is not None:
            for complaint in transferred.complaints:
                console.warning(f"{complaint}; the one before it is used")
            console.line(str(transferred))
        if frozen := sum(where.stop - where.start for where in trainer.state.optimizer.frozen):
            console.line(f"frozen: {frozen:,} of {network.parameter_count:,} parameters (--freeze {config.freeze})")
    for listener in trainer.listeners:
        listener.started(trainer.state)
