"""Ready-made callbacks: the records of a run for TensorBoard and MLflow (docs/library.md)."""

import importlib.util

from distdl.config import TrainConfig
from distdl.engine.callbacks import Callback
from distdl.errors import UserError


def callbacks_of(config: TrainConfig) -> list[Callback]:
    """Return the callbacks that the config asks for; raise `UserError` if a package is not installed."""
    found: list[Callback] = []
    if config.tensorboard:
        from distdl.engine.tracking.tensorboard import TensorBoard  # noqa: PLC0415  rarely needed

        found.append(TensorBoard())
    if config.mlflow is not None:
        from distdl.engine.tracking.mlflow import MLflow  # noqa: PLC0415  rarely needed

        found.append(MLflow(config.mlflow))
    return found


def require(package: str, flag: str, extra: str) -> None:
    """Raise `UserError` if the package that a flag needs is not installed.

    Every rank checks this at the start. The coordinator alone imports the package, which may take seconds.
    """
    if importlib.util.find_spec(package) is None:
        raise UserError(f"{flag} needs {package}, which is not installed: pip install 'distdl-mpi[{extra}]'")
