"""All ranks choose one kind of kernels; compiling them changes nothing but the time."""

import dataclasses
import json

import pytest
from small_runs import small_run

from distdl.config import TrainConfig
from distdl.engine import kernels, prepare, train
from distdl.engine.kernels import agreed_kernels, compile_kernels, usable_kernels, with_kernels
from distdl.errors import UserError
from distdl.nn import Affine, BatchNorm, Dropout, Flatten, ReLU, Sequential
from distdl.nn.kernels.choice import kernels_named
from distdl.nn.kernels.compiled import jit
from distdl.parallel import OneProcess


class ThreeRanks(OneProcess):
    """Three ranks on two hosts, as rank 0 sees them; the second one has the given obstacle."""

    def __init__(self, obstacle):
        super().__init__("three ranks")
        self.size, self.obstacle = 3, obstacle

    def allgather_json(self, value):
        return [value, ["elsewhere", self.obstacle], value]


WITHOUT = "numba is not installed: pip install 'distdl-mpi[fast]'"


@pytest.fixture
def machine(monkeypatch):
    """Return a function that sets why this rank cannot use compiled kernels."""
    return lambda reason: monkeypatch.setattr(kernels, "obstacle", lambda: reason)


@pytest.mark.parametrize(
    ("wanted", "ours", "theirs", "expected"),
    [
        ("auto", None, None, "compiled"),
        ("auto", WITHOUT, None, "numpy"),
        ("auto", None, WITHOUT, "numpy"),
        ("numpy", None, None, "numpy"),
        ("numpy", WITHOUT, WITHOUT, "numpy"),
        ("compiled", None, None, "compiled"),
        ("compiled", WITHOUT, None, None),
        ("compiled", None, WITHOUT, f"--kernels compiled: on host elsewhere, {WITHOUT}; or give --kernels numpy"),
    ],
)
def test_all_ranks_use_compiled_kernels_or_none_does(machine, wanted, ours, theirs, expected):
    machine(ours)
    if expected in {"numpy", "compiled"}:
        assert agreed_kernels(wanted, ThreeRanks(theirs)) == expected
        return
    with pytest.raises(UserError) as caught:
        agreed_kernels(wanted, ThreeRanks(theirs))
    assert caught.value.agreed
    assert expected in {None, str(caught.value)}


class Start:
    """A start from a checkpoint with these settings, or from none."""

    def __init__(self, config):
        self.found = None if config is None else self
        self.config = config

    def header(self):
        return self


@pytest.mark.parametrize(
    ("ours", "in_checkpoint", "expected"),
    [
        ("auto", {"kernels": "numpy"}, "numpy"),
        ("auto", {"kernels": "compiled"}, "compiled"),
        ("auto", {}, "numpy"),
        ("auto", None, "compiled"),
        ("numpy", None, "numpy"),
    ],
)
def test_a_resume_keeps_the_kernels_of_the_checkpoint(machine, ours, in_checkpoint, expected):
    machine(None)
    assert with_kernels(TrainConfig(kernels=ours), OneProcess(), Start(in_checkpoint)).kernels == expected


@pytest.mark.parametrize(
    ("kept", "said"), [("compiled", "--kernels compiled: numba"), ("cuda", "'cuda' are no kernels")]
)
def test_a_resume_that_cannot_keep_them_ends_in_one_line(machine, kept, said):
    machine(WITHOUT)
    with pytest.raises(UserError, match=said):
        with_kernels(TrainConfig(), OneProcess(), Start({"kernels": kept}))


def test_a_network_of_compiled_kernels_is_used_with_numpy_where_there_are_none(machine):
    machine(WITHOUT)
    found, note = usable_kernels("compiled", OneProcess())
    assert (found.name, WITHOUT in note, "the last digits may differ" in note) == ("numpy", True, True)
    assert usable_kernels("numpy", OneProcess())[1] is None
    machine(None)
    assert (usable_kernels("compiled", OneProcess())[0].name, usable_kernels("compiled", OneProcess())[1]) == (
        "compiled",
        None,
    )


class Recording(OneProcess):
    """Rank 1 of two ranks of a host: records the calls."""

    def __init__(self, log):
        super().__init__()
        self.log = log
        self.rank, self.size = 1, 2

    def barrier(self, longest_pause_seconds=0.0):
        self.log.append("waits")

    def allgather_json(self, value):
        return [value if value is None else ["a complaint"], value]


def compiled_network():
    return Sequential([Affine(3)], (4,), kernels=kernels_named("compiled"))


def test_the_first_rank_of_a_host_compiles_and_the_others_wait_and_load():
    log = []
    said = compile_kernels(Recording(log), compiled_network(), lambda: log.append("compiles"), log.append)
    assert log == ["waits", "compiles"]
    assert said == ["a complaint"]
    alone = []
    compile_kernels(OneProcess(), compiled_network(), lambda: alone.append("compiles"), alone.append)
    assert alone == ["compiles"]
    numpy = Sequential([Affine(3)], (4,))
    assert compile_kernels(Recording(alone), numpy, lambda: alone.append("again"), alone.append) == []
    assert alone == ["compiles"]


def test_the_progress_of_the_compiler_is_shown(monkeypatch):
    now, lines = [0.0], []
    monkeypatch.setattr(kernels.time, "monotonic", lambda: now[0])

    def warm_up():
        for seconds in (0.0, 4.0, 9.0, 3.0):
            now[0] += seconds
            for listener in jit._listeners:
                listener("a kernel")

    compile_kernels(OneProcess(), compiled_network(), warm_up, lines.append)
    assert lines[0].startswith("compiling kernels for this CPU (once, about ")
    assert lines[1:] == ["  2 kernels compiled in 13 s", "  4 kernels compiled in 16 s"]


def normalized(shape, classes):
    return Sequential([Flatten(), Affine(6), BatchNorm(), ReLU(), Dropout(0.5), Affine(classes)], shape)


def test_compiling_changes_no_bit_of_the_training(tmp_path, monkeypatch):
    """The passes that call each kernel leave parameters, moments, optimizer and random numbers as they were."""
    settings = {"build_network": normalized, "kernels": "compiled", "weight_decay": 0.1}
    found = small_run(OneProcess(), tmp_path / "with", **settings)
    monkeypatch.setattr(prepare, "compile_for", lambda trainer, console: [])
    assert small_run(OneProcess(), tmp_path / "without", **settings) == found


@pytest.mark.parametrize("chosen", ["numpy", "compiled"])
def test_the_run_folder_and_the_last_lines_name_the_kernels(tmp_path, capsys, chosen):
    folder = tmp_path / "run"
    train(TrainConfig(model="mlp", kernels=chosen, max_steps=1, run_dir=folder), OneProcess())
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2] == f"kernels: {chosen}"
    assert any(f" · kernels {chosen} · " in line for line in lines)
    assert f'kernels = "{chosen}"\n' in (folder / "config.toml").read_text()
    for name in ("env.json", "summary.json"):
        assert json.loads((folder / name).read_text())["kernels"] == chosen


def test_auto_is_resolved_once_and_kept_by_the_resume(tmp_path, machine):
    machine(WITHOUT)
    folder = tmp_path / "run"
    config = TrainConfig(model="mlp", max_steps=1, run_dir=folder, resume="auto")
    assert train(config, OneProcess()).kernels == "numpy"
    machine(None)
    assert train(dataclasses.replace(config, max_steps=2), OneProcess()).kernels == "numpy"
    with pytest.raises(UserError, match="--kernels is 'compiled' here and 'numpy' in the checkpoint"):
        train(dataclasses.replace(config, max_steps=3, kernels="compiled"), OneProcess())
