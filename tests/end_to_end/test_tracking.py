"""TensorBoard and MLflow get one run with all records, for any number of ranks, also if the coordinator is killed."""

import json
import struct
import sys
from collections import Counter

import numpy as np
import pytest
from small_runs import VERY_RAGGED, piece_of_digits, small_config
from test_callbacks import HERE, PROGRAM, SETTINGS, kill

import distdl
from distdl import cli, replay, train_command
from distdl.engine import tracking
from distdl.engine.pictures import confusion_matrix
from distdl.engine.tracking.tensorboard import confusion_of
from distdl.errors import UserError
from distdl.inference.load import load
from distdl.inference.score import evaluate
from distdl.job.launched_by import read_launch
from distdl.job.mpirun_command import mpirun_command
from distdl.parallel import OneProcess

pytestmark = pytest.mark.skipif(read_launch().by is not None, reason="starts jobs of its own")
RULES = {
    "nobody": [],
    "rank 0 in the second epoch": [kill(0, "step", nth=5)],
    "rank 0 at a checkpoint": [kill(0, "checkpoint", nth=2, when="committed")],
    "rank 0 at the end": [kill(0, "finish", when="after")],
}


def train(folder, **settings):
    config = small_config(folder, **SETTINGS | settings)
    return distdl.train(config, dataset=piece_of_digits(VERY_RAGGED), communicator=OneProcess())


def train_job(run_job, tmp_path, rules, **settings):
    program, folder = tmp_path / "program.py", tmp_path / "run"
    program.write_text(PROGRAM)
    paths = [str(HERE), str(HERE.parent / "faults")]
    words = [json.dumps(paths), str(folder), json.dumps(rules), json.dumps(SETTINGS | settings)]
    done = run_job(mpirun_command(3, [sys.executable, str(program), *words]), timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def events_in(folder):
    """Return what TensorBoard shows of a folder: (tag, step) and the value. A purge removes events of later steps."""
    from tensorboardX.proto.event_pb2 import Event, SessionLog

    shown = {}
    for path in sorted(folder.iterdir(), key=lambda path: path.name):
        content, place = path.read_bytes(), 0
        while place + 12 <= len(content):
            (length,) = struct.unpack_from("<Q", content, place)
            event = Event.FromString(content[place + 12 : place + 12 + length])
            place += length + 16
            if event.session_log.status == SessionLog.START and event.step:
                shown = {key: value for key, value in shown.items() if key[1] < event.step}
            for value in event.summary.value:
                number = value.image.encoded_image_string if value.HasField("image") else value.simple_value
                assert (value.tag, event.step) not in shown, "each record once"
                shown[value.tag, event.step] = number
    return shown


# ------------------------------------------------------------------------------------------------------ TensorBoard


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    """Return the events of an undisturbed run in one process."""
    pytest.importorskip("tensorboardX")
    folder = tmp_path_factory.mktemp("shown") / "run"
    train(folder, tensorboard=True)
    return events_in(folder / "tensorboard")


def test_tensorboard_shows_the_numbers_of_the_metrics_and_pictures(tmp_path, shown):
    tags = Counter(tag for tag, _ in shown)
    assert tags == {
        **dict.fromkeys(("loss/step", "accuracy/step", "lr"), 6),
        **dict.fromkeys(("loss/train", "accuracy/train", "loss/validation", "accuracy/validation"), 2),
        "filters/conv2d_1": 2,
        **dict.fromkeys(("loss/test", "accuracy/test", "confusion/test"), 1),
    }
    result = train(tmp_path / "run")
    last = result.history[-1]
    for part in ("train", "validation"):
        for number in ("loss", "accuracy"):
            assert shown[f"{number}/{part}", 6] == np.float32(last[f"{part}_{number}"])
    assert shown["accuracy/test", 6] == np.float32(result.summary.test_accuracy)
    assert shown["confusion/test", 6].startswith(b"\x89PNG")


def test_the_confusion_matrix_is_that_of_the_evaluation(tmp_path):
    dataset = piece_of_digits(VERY_RAGGED)
    result = train(tmp_path / "run")
    [one] = load([result.run_dir], OneProcess(), dataset=dataset)
    found = evaluate([one], "test", OneProcess())
    expected = confusion_matrix(found.labels, found.predictions, 4)
    assert np.array_equal(confusion_of(result.network, one.data, result.summary.ranks * 4), expected)


@pytest.mark.parametrize("who", RULES)
def test_tensorboard_has_one_run_with_the_same_events_if_ranks_are_killed(
    run_job, tmp_path, needs_mpirun, survives, shown, who
):
    if RULES[who] and not survives:
        pytest.skip("survivors continue only with Open MPI 5 and later")
    folder = train_job(run_job, tmp_path, RULES[who], tensorboard=True)
    assert events_in(folder / "tensorboard") == shown
    assert not [path for path in folder.rglob("events.out*") if path.parent != folder / "tensorboard"], "one run"


def test_tensorboard_continues_a_resumed_run(tmp_path, shown):
    train(tmp_path / "run", tensorboard=True, max_steps=4)
    train(tmp_path / "run", tensorboard=True, resume="auto")
    assert events_in(tmp_path / "run" / "tensorboard") == shown


def test_a_link_in_the_run_folder_is_not_followed(tmp_path):
    pytest.importorskip("tensorboardX")
    train(tmp_path / "run", max_steps=4)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "run" / "tensorboard").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="tensorboard is a symbolic link"):
        train(tmp_path / "run", tensorboard=True, resume="auto")
    assert not list((tmp_path / "elsewhere").iterdir())


# ----------------------------------------------------------------------------------------------------------- MLflow


def runs_in(folder):
    """Return the metrics of each run in a folder of MLflow: (step, value) by name."""
    return [
        {path.name: [tuple(line.split()[1:]) for line in path.read_text().splitlines()] for path in metrics.iterdir()}
        for metrics in folder.glob("*/*/metrics")
    ]


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """Return the metrics of an undisturbed run in one process."""
    pytest.importorskip("mlflow")
    folder = tmp_path_factory.mktemp("recorded")
    result = train(folder / "run", mlflow=folder / "mlruns")
    [metrics] = runs_in(folder / "mlruns")
    assert [float(value) for value, _ in metrics["validation_loss"]] == [
        one["validation_loss"] for one in result.history
    ]
    assert [int(step) for _, step in metrics["loss"]] == [2, 4, 6]
    assert float(metrics["test_accuracy"][0][0]) == result.summary.test_accuracy
    [receipt] = (folder / "mlruns").glob("*/*/tags/weights_sha256")
    assert receipt.read_text() == result.receipt
    return metrics


@pytest.mark.parametrize("who", RULES)
def test_mlflow_has_one_run_with_the_same_metrics_if_ranks_are_killed(
    run_job, tmp_path, needs_mpirun, survives, recorded, who
):
    if RULES[who] and not survives:
        pytest.skip("survivors continue only with Open MPI 5 and later")
    train_job(run_job, tmp_path, RULES[who], mlflow=str(tmp_path / "mlruns"))
    assert runs_in(tmp_path / "mlruns") == [recorded]


def test_mlflow_continues_a_resumed_run(tmp_path, recorded):
    train(tmp_path / "run", mlflow=tmp_path / "mlruns", max_steps=4)
    train(tmp_path / "run", mlflow=tmp_path / "mlruns", resume="auto")
    assert runs_in(tmp_path / "mlruns") == [recorded]
    with pytest.raises(UserError, match=r"does not have the run .* give the folder that the run began with"):
        train(tmp_path / "run", mlflow=tmp_path / "others", resume="auto", epochs=3)


# ---------------------------------------------------------------------------------------------------- both


@pytest.mark.parametrize(
    ("flags", "package"), [(["--tensorboard"], "tensorboardX"), (["--mlflow=mlruns"], "mlflow")], ids=str
)
def test_a_missing_package_is_one_line_with_the_remedy(tmp_path, monkeypatch, capsys, flags, package):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tracking.importlib.util, "find_spec", lambda _name: None)
    assert cli.run(train_command.main, ["--epochs=1", "--run-dir=run", *flags]) == 2
    said = capsys.readouterr().err
    extra = package.removesuffix("X")
    assert said == (
        f"distdl: error: {flags[0].partition('=')[0]} needs {package}, which is not installed: pip install "
        f"'distdl-mpi[{extra}]'\n"
    )
    assert not (tmp_path / "run").exists()


def test_a_replay_needs_no_package_that_the_run_recorded_with(tmp_path, monkeypatch, capsys):
    pytest.importorskip("tensorboardX")
    monkeypatch.chdir(tmp_path)
    assert cli.run(train_command.main, ["--model=mlp", "--max-steps=2", "--run-dir=run", "--tensorboard"]) == 0
    monkeypatch.setattr(tracking.importlib.util, "find_spec", lambda _name: None)
    assert cli.run(replay.main, ["run", "--step=2"]) == 0, capsys.readouterr().err
