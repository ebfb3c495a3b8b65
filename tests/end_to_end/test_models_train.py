"""The trainer trains one model of every kind on images of 28x28."""

import json

import numpy as np
import pytest
from bad_inputs import mnist_files, write_files
from refusals import FEW_SAMPLES

from distdl import cli, config, engine, train_command
from distdl.job.launched_by import read_launch

pytestmark = pytest.mark.skipif(read_launch().size > 1, reason="starts trainings of one process")


@pytest.mark.parametrize("model", ["logistic", "lenet", "alexnet", "googlenet", "resnet20"])
def test_a_model_trains_for_an_epoch(model, tmp_path, monkeypatch, capsys):
    for name in ("OPENBLAS", "OMP", "MKL", "BLIS", "VECLIB_MAXIMUM"):
        monkeypatch.setenv(f"{name}_NUM_THREADS", "1")  # undoes the settings of the command
    data = write_files(tmp_path / "data", mnist_files(training=12, test=3, height=28, width=28))
    flags = [f"--model={model}", "--dataset=mnist", f"--data-dir={data}", "--epochs=1", "--log-every=1"]
    code = cli.run(train_command.main, [*flags, "--batch-size=8", "--micro-batch-size=4", f"--run-dir={tmp_path}/run"])
    out, err = capsys.readouterr()
    assert (code, [line for line in err.splitlines() if not FEW_SAMPLES.search(line)]) == (0, [])
    assert f"{model} (" in out
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [np.isfinite(record["loss"]) for record in records if "loss" in record] == [True, True]


def test_a_script_names_its_model_as_the_command_does(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = "from distdl import nn\n\ndef net(shape, classes):\n    return nn.mlp(shape, classes, hidden=(20, 20))\n"
    (tmp_path / "deep.py").write_text(text)
    settings = config.TrainConfig(model="deep.py:net", max_steps=2, run_dir=tmp_path / "run")
    assert engine.train(settings).steps == 2
