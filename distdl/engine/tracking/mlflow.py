"""The records of a run in MLflow, in a local folder; nothing is sent to a server."""

import importlib
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distdl.engine.callbacks import Callback
from distdl.engine.storage.files import write_durably
from distdl.engine.tracking import require
from distdl.errors import UserError
from distdl.regular_files import read_regular

EXPERIMENT = "distdl"
#: Report no use to the makers of MLflow. Write files: newer versions prefer a database.
SETTINGS = ("MLFLOW_DISABLE_TELEMETRY", "DO_NOT_TRACK", "MLFLOW_ALLOW_FILE_STORE")
#: The file in the run folder that holds the identifier of MLflow's run.
IDENTIFIER = "mlflow-run-id"
#: The longest value of a parameter that every version of MLflow accepts.
LONGEST_VALUE = 250


class MLflow(Callback):
    """Records the settings, the metrics and the results of a run in MLflow's files below `folder`.

    A run folder has one run of MLflow. If a record comes again, it is the same as before, and is left out.
    Raises `UserError` if mlflow-skinny is not installed.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        require("mlflow", "--mlflow", "mlflow")

    def on_start(self, record: Mapping[str, Any]) -> None:  # noqa: ARG002
        """Open the run of MLflow, or create it."""
        for name in SETTINGS:  # MLflow reads them when it is imported
            os.environ[name] = "true"
        mlflow = importlib.import_module("mlflow")
        self._client = mlflow.MlflowClient(tracking_uri=self._folder.absolute().as_uri())
        identifier = self.run.folder / IDENTIFIER
        if identifier.exists():
            self._id = read_regular(identifier).decode("ascii", "replace")
            try:
                metrics = self._client.get_run(self._id).data.metrics
            except mlflow.MlflowException:
                raise UserError(
                    f"--mlflow {self._folder} does not have the run {self._id!r} that {identifier} names: give the "
                    "folder that the run began with, or remove that file for a new run of MLflow"
                ) from None
            histories = [self._client.get_metric_history(self._id, name) for name in metrics]
            self._recorded = {history[0].key: max(one.step for one in history) for history in histories}
            return
        self._recorded = {}
        experiment = self._client.get_experiment_by_name(EXPERIMENT)
        number = self._client.create_experiment(EXPERIMENT) if experiment is None else experiment.experiment_id
        self._id = self._client.create_run(number, run_name=self.run.folder.name).info.run_id
        write_durably(identifier, self._id.encode("ascii"))
        for name, value in self.run.config.to_json().items():
            if value is not None:
                self._client.log_param(self._id, name, str(value)[:LONGEST_VALUE])

    def on_step(self, record: Mapping[str, Any]) -> None:
        """Record every `--log-every`-th step."""
        every = self.run.config.log_every
        if every and record["step"] % every == 0:
            self._log(record)

    def on_epoch(self, record: Mapping[str, Any]) -> None:
        """Record the results of training and validation."""
        self._log(record)

    def on_end(self, record: Mapping[str, Any]) -> None:
        """Record the score of the test part and the receipt, and end the run of MLflow."""
        self._log({"step": record["steps"], "test_loss": record["test_loss"], "test_accuracy": record["test_accuracy"]})
        self._client.set_tag(self._id, "weights_sha256", record["weights_sha256"])
        self._client.set_terminated(self._id)

    def _log(self, record: Mapping[str, Any]) -> None:
        step, milliseconds = record["step"], int(time.time() * 1000)
        numbers = {name: value for name, value in record.items() if name not in {"step", "epoch"} and value is not None}
        for name, value in numbers.items():
            if step > self._recorded.get(name, -1):
                self._client.log_metric(self._id, name, value, timestamp=milliseconds, step=step)
