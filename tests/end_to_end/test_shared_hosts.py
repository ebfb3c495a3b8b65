"""Another user of the host, or a folder from elsewhere, cannot stop a run, make it run code, or exhaust memory."""

import io
import json
import os
import shutil
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from bad_inputs import TINY, changes, mnist_files, picture, without_launcher, write_files
from refusals import DAMAGED, USER, outcome
from refused_runs import RunShop, sealed

from distdl import cli, evaluate, predict, report
from distdl.engine.storage import checkpoints
from distdl.job.launched_by import read_launch
from distdl.search import __main__ as search_command

pytestmark = pytest.mark.skipif(read_launch().size > 1, reason="starts trainings of one process")

LINE = "distdl: error: "
REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def shop(workshop):
    return RunShop(workshop, "--kernels=numpy")


def outcome_of(command, *arguments):
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = cli.run(command.main, list(map(str, arguments)))
    return code, out.getvalue(), err.getvalue()


def assert_refused(found, code, *words):
    assert (found[0], found[1]) == (code, ""), found
    assert found[2].startswith(LINE)
    assert len(found[2].splitlines()) == 1, found[2]
    assert [word for word in words if word not in found[2]] == [], found[2]


# ------------------------------------------------------------------------------------------------------------- pipes


@pytest.mark.parametrize("name", ["lock", "owner"])
@pytest.mark.parametrize("way", ["flock", "link"])
def test_a_pipe_in_a_new_run_folder_stops_no_start(workshop, name, way):
    (workshop / "run").mkdir()
    os.mkfifo(workshop / "run" / name)
    before = picture(".")
    assert_refused(outcome([*TINY, "--run-dir=run", f"--lock={way}"]), USER, f"run/{name} is not a regular file")
    assert changes(before, picture(".")) == []


@pytest.mark.parametrize("name", ["search.json", "results.jsonl", "lock", "owner"])
def test_a_pipe_in_the_folder_of_a_search_stops_no_start(workshop, name):
    flags = ["--range=lr=0.01:0.1", "--rounds=1", "--trials=1", "--out=found", "--", *TINY, "--kernels=numpy"]
    assert outcome_of(search_command, *flags)[0] == 0
    (workshop / "found" / name).unlink(missing_ok=True)
    os.mkfifo(workshop / "found" / name)
    assert_refused(outcome_of(search_command, "--resume", *flags), USER, "found")


@pytest.mark.parametrize("name", ["summary.json", "env.json", "timing.jsonl", "metrics.jsonl", "config.toml"])
def test_a_pipe_in_a_run_folder_stops_no_report(shop, name):
    pytest.importorskip("matplotlib")
    (shop.folder / name).unlink()
    os.mkfifo(shop.folder / name)
    assert_refused(outcome_of(report, "run"), USER, "run")


def test_a_pipe_in_place_of_data_or_a_config_stops_no_start(workshop):
    write_files(workshop / "data", mnist_files())
    (workshop / "data" / "train-images-idx3-ubyte").unlink()
    for name in ("data/train-images-idx3-ubyte", "x.npz", "x.csv", "x.toml"):
        os.mkfifo(workshop / name)
    for flags in (["--dataset=mnist", "--data-dir=data"], ["--dataset=npz:x.npz"], ["--dataset=csv:x.csv"]):
        assert_refused(outcome([*TINY, *flags]), USER, "is not a regular file")
    assert_refused(outcome(["--config=x.toml"]), USER, "x.toml is not a regular file")


# ------------------------------------------------------------------------------------------------------- checkpoints


def announcing(whole, nbytes):
    """Return the beginning of a checkpoint whose header announces another tensor of `nbytes`, and its whole size."""
    length = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + length])
    end = max(tensor["data_offsets"][1] for name, tensor in header.items() if name != "__metadata__")
    header["huge"] = {"dtype": "U8", "shape": [nbytes], "data_offsets": [end, end + nbytes]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + whole[8 + length :], 8 + len(text) + end + nbytes


@pytest.mark.parametrize("nbytes", [3 * 10**8, 10**12], ids=["0.3 GB", "1 TB"])
def test_a_checkpoint_that_announces_a_huge_tensor_is_refused_without_memory_and_the_older_one_is_used(shop, nbytes):
    content, size = announcing(shop.whole, nbytes)
    shop.newest.write_bytes(content)
    os.truncate(shop.newest, size)
    code, out, err, peak = outcome(["--resume", str(shop.newest.relative_to(Path.cwd()))])
    assert_refused((code, out, err), DAMAGED, "is damaged")
    assert peak < 1e8
    code, out, err, peak = outcome(["--resume=auto", "--run-dir=run"])
    assert (code, f"resumed from {shop.paths[-2].relative_to(Path.cwd())}" in out) == (0, True)
    assert err.count("is damaged") == 1
    assert peak < 1e8


def test_a_checkpoint_under_the_name_of_another_step_is_refused_and_removes_no_other(shop):
    """Otherwise the newer checkpoint, which the run would repeat, would be removed."""
    genuine = shop.newest.read_bytes()
    later = checkpoints.path_of_step(shop.newest.parent, 9)
    shutil.copy(shop.paths[0], later)
    named = str(later.relative_to(Path.cwd()))
    for command, flags in ((evaluate, [later]), (predict, [later, "npz:x.npz"])):
        assert_refused(outcome_of(command, *flags), DAMAGED, "its name is that of another step")
    assert_refused(outcome([*shop.settings, f"--resume={named}", "--epochs=3"])[:3], DAMAGED, named)
    code, out, err, _ = outcome(["--resume=auto", "--run-dir=run", "--epochs=3", "--max-steps=7"])
    assert code == 0, err
    assert f"resumed from {shop.newest.relative_to(Path.cwd())} after step 6" in out
    assert f"{named} is damaged" in err
    assert shop.newest.read_bytes() == genuine


def test_an_edited_log_is_noticed_by_a_resume_and_an_old_checkpoint_still_resumes(shop):
    tensors, header = safetensors.numpy.load(shop.whole), shop.metadata["header"]
    assert header["log_sha256"].keys() == header["log_bytes"].keys() == {"metrics", "timing"}
    log = shop.folder / "metrics.jsonl"
    log.write_bytes(log.read_bytes().replace(b'"epoch": 1', b'"epoch": 2', 1))
    kept = log.read_bytes()[: header["log_bytes"]["metrics"]]
    shutil.copytree(shop.folder, "old")
    code, _, err, _ = outcome(["--resume=run", "--epochs=3"])
    assert (code, len(err.splitlines())) == (0, 1)
    assert err.startswith("distdl: warning: run/metrics.jsonl was edited: its records are not those of the checkpoint")
    assert log.read_bytes().startswith(kept)
    old = {name: value for name, value in header.items() if name != "log_sha256"}
    (Path("old/checkpoints") / shop.newest.name).write_bytes(sealed({"header": old}, tensors))
    assert outcome(["--resume=old", "--epochs=3"])[::2] == (0, "")


# ------------------------------------------------------------------------------------------- values of another type

RECOVERY = {"step": 1, "lost_ranks": [1], "ranks": 2}
TIMES = {"train_seconds": 1.0, "compute_share": 1, "reduction_share": 0.0, "wait_share": 0.0}
EPOCH = {"step": 3, "epoch": 1, "train_loss": 1.0, "validation_loss": 1.0}
OTHER_TYPES = [
    *(("summary.json", {name: value}) for name in ("epochs", "test_epoch", "train_loss") for value in ([], {}, "x")),
    *(("summary.json", {"recoveries": value}) for value in (5, {}, [5], [{}], [RECOVERY | {"lost_ranks": 5}])),
    ("summary.json", {"train_seconds": 10**400}),
    *(("env.json", {"kernel_families": value}) for value in (5, [5], "x")),
    *(("env.json", {"versions": value}) for value in (5, [5], {"numpy": 2})),
    *(("timing.jsonl", TIMES | {name: value}) for name in TIMES for value in ("x", None, [1], True)),
    ("timing.jsonl", {"train_seconds": 1.0}),
    *(("metrics.jsonl", EPOCH | {name: value}) for name in ("epoch", "train_loss") for value in ("x", [1], {})),
    ("metrics.jsonl", {"validation_loss": 1.0}),
    ("metrics.jsonl", EPOCH | {"validation_accuracy": "x"}),
]


def test_values_of_another_type_in_the_files_of_a_run_are_a_damaged_file(shop):
    pytest.importorskip("matplotlib")
    for name, values in OTHER_TYPES:
        whole = (shop.folder / name).read_bytes()
        try:
            (shop.folder / name).write_text(json.dumps(values) + "\n")
            assert_refused(outcome_of(report, "run"), DAMAGED, f"run/{name} is damaged")
        finally:
            (shop.folder / name).write_bytes(whole)


@pytest.mark.parametrize("content", ["5", "[]", '{"config": 5}', '{"config": {"kernels": []}}', "NaN"])
def test_values_of_another_type_in_the_file_of_a_search_are_a_damaged_file(workshop, content):
    (workshop / "found").mkdir()
    (workshop / "found" / "search.json").write_text(content)
    flags = ["--range=lr=0.01:0.1", "--out=found", "--resume", "--", *TINY]
    assert_refused(outcome_of(search_command, *flags), DAMAGED, "found/search.json is damaged")


def test_settings_of_another_type_in_a_checkpoint_are_one_line(shop):
    """Also in a file with a correct digest."""
    tensors, header = safetensors.numpy.load(shop.whole), shop.metadata["header"]
    np.savez("x.npz", images=np.zeros((1, 4, 4), np.uint8))
    for name in header["config"]:
        for value in ([], {"a": 1}, 1e308, "\0"):
            changed = {**header, "config": {**header["config"], name: value}}
            shop.newest.write_bytes(sealed({"header": changed}, tensors))
            for command, flags in ((evaluate, ["--on=npz:x.npz"]), (predict, ["npz:x.npz"])):
                code, _, err = outcome_of(command, shop.newest, *flags)
                lines = [line for line in err.splitlines() if not line.startswith("distdl: warning: ")]
                assert code in {0, USER, DAMAGED}, (name, value, err)
                assert len(lines) == (code != 0), (name, value, err)


# -------------------------------------------------------------------------------------------------------------- code

#: It stands in for a module; a process that runs it says so.
INTRUDER = "import sys; sys.stderr.write('INTRUDER ' + __name__ + '\\n')\n"
#: The console command that pip installs.
CONSOLE_COMMAND = "import sys; sys.argv = ['distdl', 'train', '--help']; from distdl.__main__ import main; main()"
SHADOWED = ["numpy", "argparse", "random", "json", "safetensors", "threadpoolctl", "mpi4py", "shutil", "tomllib"]


@pytest.mark.parametrize(
    "program",
    [
        ["-m", "distdl.train", *TINY, "--dataset=mnist", "--data-dir=data"],
        ["-m", "distdl", "train", "--epohcs=3"],
        ["-m", "distdl.search", "--help"],
        ["-P", "-c", CONSOLE_COMMAND],
    ],
    ids=["train", "distdl", "search", "console command"],
)
def test_no_file_of_the_working_folder_replaces_a_module(workshop, program):
    write_files(workshop / "data", mnist_files())
    for name in SHADOWED:
        (workshop / f"{name}.py").write_text(INTRUDER)
    environment = {**without_launcher(os.environ), "PYTHONPATH": str(REPOSITORY), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, *program], env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert "INTRUDER" not in done.stderr
    assert done.returncode in {0, USER}, done.stderr


LAUNCHERS = {"local.sh": [str(REPOSITORY / "launch/local.sh")], "mpirun": [sys.executable, "-P", "-m", "distdl.mpirun"]}


@pytest.mark.parametrize("command", LAUNCHERS.values(), ids=LAUNCHERS)
def test_launchers_run_no_file_of_the_working_folder(workshop, command):
    (workshop / "distdl").mkdir()
    for name in [*SHADOWED, "distdl/__init__", "distdl/train"]:
        (workshop / f"{name}.py").write_text(INTRUDER)
    environment = {**without_launcher(os.environ), "PYTHONPATH": str(REPOSITORY), "PYTHON": sys.executable}
    argv = [*command, "-n", "1", "--", *TINY, "--kernels=numpy", "--run-dir=run"]
    done = subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=60, check=False)
    if "no mpirun" in done.stderr:
        pytest.skip("no mpirun")
    assert "INTRUDER" not in done.stderr
    assert done.returncode == 0, done.stderr


def test_a_module_of_the_working_folder_is_imported_if_the_command_line_names_it(workshop, monkeypatch):
    write_files(workshop / "data", mnist_files())
    (workshop / "mine").mkdir()
    (workshop / "mine" / "helper.py").write_text("units = 5\n")
    (workshop / "mine" / "net.py").write_text(
        "from distdl import nn\ndef build(shape, classes):\n    from mine.helper import units\n"
        "    return nn.Sequential([nn.Flatten(), nn.Affine(units), nn.Affine(classes)], shape)\n"
    )
    monkeypatch.setattr(sys, "path", [one for one in sys.path if one not in {"", str(workshop)}])
    code, _, err, _ = outcome(
        [*TINY[2:], "--dataset=mnist", "--data-dir=data", "--model=mine.net:build", "--run-dir=run"]
    )
    assert (code, err) == (0, "")
