"""A dry run checks what a start checks, prints a plan whose numbers are right, and writes nothing."""

import re
from pathlib import Path

import numpy as np
import pytest
from small_runs import small_config

from distdl.config import TrainConfig
from distdl.data import PreparedDataset
from distdl.data.sources import Dataset
from distdl.engine import dry_run, train
from distdl.engine.console import Console
from distdl.errors import UserError
from distdl.parallel import OneProcess

NAMES = ("cone", "cowrie", "whelk")


class Printed(Console):
    """Keeps the lines and the warnings."""

    def __init__(self):
        super().__init__(live=False)
        self.lines, self.warnings = [], []

    def line(self, text=""):
        self.lines.append(text)

    def warning(self, text):
        self.warnings.append(text)


class Ticks:
    """A clock that advances by half a second with each reading."""

    now = 0.0

    def __call__(self):
        self.now += 0.5
        return self.now


def shells(*, repeated=()):
    """Return images of three classes, 30, 60 and 10; `repeated` holds pairs of rows that get the same image."""
    labels = np.repeat([0, 1, 2], [30, 60, 10]).astype(np.int64)
    images = np.arange(100 * 8 * 8).reshape(100, 8, 8, 1) % 251
    for row, of in repeated:
        images[row] = images[of]
    return Dataset("shells", images.astype(np.uint8), labels, 3, None, class_names=NAMES, notes=("a note",))


def plan(dataset, communicator=None, **settings):
    printed = Printed()
    config = TrainConfig(model="mlp", batch_size=16, micro_batch_size=4, epochs=5, **settings)
    dry_run(config, communicator or OneProcess(), dataset=dataset, console=printed, clock=Ticks())
    assert max(map(len, printed.lines), default=0) <= 80
    return printed


def test_the_plan_shows_classes_memory_steps_and_time_and_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    printed = plan(shells())
    text = "\n".join(printed.lines)
    assert "distdl 0.1.0 · shells · 68 training, 16 validation, 16 test" in text
    assert "classification · 3 classes: cone, cowrie, whelk" in text
    rows = [line.split() for line in printed.lines if line.startswith((*NAMES, "class "))]
    assert rows[0] == ["class", "training", "validation", "test"]
    counts = np.array([[int(number) for number in row[1:]] for row in rows[1:]])
    assert counts.sum(axis=0).tolist() == [68, 16, 16]
    assert counts.sum(axis=1).tolist() == [30, 60, 10]
    assert re.search(r"^memory per rank, an estimate: \d+ MB \(layers [\d.]+ MB\)$", text, re.MULTILINE)
    assert "steps: 5 per epoch, 25 in all" in text
    assert "micro-batches per step: 4, 4 micro-batches a rank" in text
    # Half a second for a step of 16 samples, and for the evaluation of the 16 validation samples, 5 times.
    assert "time, from a short measurement: 32 samples/s, 0:15 in all (validation 0:02)" in text
    assert printed.lines[-1] == "nothing was written; to start, leave out --dry-run"
    assert printed.warnings == ["a note"]
    assert list(tmp_path.iterdir()) == []


def parts_of(dataset):
    """Return the rows of each part, as a training splits them."""
    return PreparedDataset.prepare(dataset, 0).parts


def test_the_plan_counts_identical_images():
    parts = parts_of(shells())
    first, second, third = parts.training[:3]
    pairs = [(parts.test[0], first), (parts.test[1], first), (parts.validation[0], second), (third, second)]
    lines = plan(shells(repeated=pairs)).lines
    # The pixels repeat after 251 samples, so without the pairs all images differ.
    assert "identical images in training and validation: 1 (of 16)" in lines
    assert "identical images in training and test: 2 (of 16)" in lines
    assert "identical images within training: 1 (of 68)" in lines


def test_many_classes_are_shortened_and_an_imbalance_has_a_hint():
    labels = np.r_[np.repeat(np.arange(30), 4), np.zeros(80)].astype(np.int64)
    images = np.zeros((200, 8, 8, 1), np.uint8)
    images[:, 0, 0, 0] = np.arange(200)
    lines = plan(Dataset("many", images, labels, 30, None)).lines
    table = lines[next(n for n, line in enumerate(lines) if line.startswith("class ")) :]
    assert [line.split()[0] for line in table[1:21]] == [*map(str, range(19)), "…"]
    assert table[20] == "… 11 more"
    assert table[21] == ""
    assert "consider --class-weights balanced" in " ".join(" ".join(lines).split())


def test_the_plan_of_a_regression_shows_the_range_of_each_number():
    numbers = np.linspace(0, 1, 100, dtype=np.float32).reshape(-1, 1) * [[1, -10]]
    dataset = Dataset("numbers", shells().images, numbers.astype(np.float32), 2, None, class_names=("x", "angle"))
    lines = plan(dataset).lines
    assert "regression · 2 numbers per image: x, angle" in lines
    [x, angle] = [line.split() for line in lines if line.startswith(("x ", "angle "))]
    assert 0 <= float(x[1]) < float(x[2]) < float(x[3]) <= 1
    assert -10 <= float(angle[1]) < float(angle[2]) < float(angle[3]) <= 0


def test_a_dry_run_refuses_what_a_start_refuses(tmp_path):
    folder = tmp_path / "run"
    train(small_config(folder), OneProcess(), dataset=shells())
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    with pytest.raises(UserError, match="--resume"):
        plan(shells(), run_dir=folder)
    with pytest.raises(UserError, match="cannot use the run folder"):
        plan(shells(), run_dir=Path("/proc/nowhere"))
    with pytest.raises(UserError, match="dry_run trains nothing"):
        train(TrainConfig(dry_run=True), OneProcess(), dataset=shells())
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_a_dry_run_of_a_resume_shows_the_remaining_steps(tmp_path):
    folder = tmp_path / "run"
    settings = {"model": "mlp", "batch_size": 16, "micro_batch_size": 4, "epochs": 5, "run_dir": folder}
    train(TrainConfig(**settings, max_steps=7), OneProcess(), dataset=shells(), console=Printed())
    written = (folder / "metrics.jsonl").read_bytes()
    assert (
        "steps: 5 per epoch, 18 in all, continuing after step 7" in plan(shells(), run_dir=folder, resume="auto").lines
    )
    assert (folder / "metrics.jsonl").read_bytes() == written
    train(TrainConfig(**settings, resume="auto"), OneProcess(), dataset=shells(), console=Printed())
    assert "the training is complete" in plan(shells(), run_dir=folder, resume="auto").lines


@pytest.mark.mpi(min_size=1)
def test_all_ranks_measure_and_rank_0_prints(communicator):
    printed = plan(shells(), communicator)
    assert (printed.lines != []) == (communicator.rank == 0)
    if communicator.rank == 0:
        assert sum(line.startswith("time, from a short measurement: ") for line in printed.lines) == 1
