"""The report page shows the content of the run's files, and loads nothing from elsewhere."""

import base64
import io
import json
import os
import re
import shutil
from contextlib import redirect_stderr, redirect_stdout

import numpy as np
import pytest
from bad_inputs import changes, picture

from distdl import cli, report
from distdl.config import TrainConfig
from distdl.data.sources import load
from distdl.engine import train
from distdl.job.launched_by import read_launch
from distdl.parallel import OneProcess

pytestmark = pytest.mark.skipif(read_launch().by is not None, reason="already under a launcher")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    train(TrainConfig(epochs=2, lr=0.003, run_dir=folder / "digits"), OneProcess())
    train(TrainConfig(model="mlp", max_steps=3, run_dir=folder / "stopped"), OneProcess())
    data = load("digits", None)
    numbers = data.images.mean(axis=(1, 2)).astype(np.float32)
    np.savez(folder / "<b>.npz", images=data.images, labels=numbers)
    train(TrainConfig(dataset=f"npz:{folder}/<b>.npz", epochs=1, run_dir=folder / "numbers"), OneProcess())
    return folder


def outcome(*arguments):
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = cli.run(report.main, list(map(str, arguments)))
    return code, out.getvalue(), err.getvalue()


def page_of(run, **flags):
    code, out, err = outcome(run, *(f"--{name}={value}" for name, value in flags.items()))
    page = flags.get("out", run / "report.html")
    assert (code, out, err) == (0, f"report: {page}\n", "")
    return page.read_text(encoding="utf-8")


def heads(page):
    return re.findall("<h2>(.*?)</h2>", page)


PICTURES = ["Filters of the first convolution", "Feature maps of an image", "Activations of the layers"]


@pytest.fixture(scope="module")
def digits(runs):
    """Return the page of the run on the digits."""
    return page_of(runs / "digits")


def test_the_page_shows_the_values_of_the_files_of_the_run(runs, digits):
    page, run = digits, runs / "digits"
    summary = json.loads((run / "summary.json").read_text())
    assert f"weights sha256: {summary['weights_sha256']}" in page
    assert f"{summary['test_accuracy']:.2%}" in page
    assert "<tr><th>lr</th><td>0.003</td></tr>" in page
    assert "<tr><th>model</th>" not in page, "the default"
    assert heads(page)[1:7] == [
        "Learning curves",
        "Confusion matrix",
        "Misclassified images",
        *PICTURES,
    ]
    assert "Where the time went" in heads(page)


def test_the_page_scores_the_weights_that_the_run_scored(tmp_path):
    """The rate is so small that no later validation is better than the first."""
    run = tmp_path / "run"
    summary = train(TrainConfig(model="mlp", epochs=3, lr=1e-9, test_with="best", run_dir=run), OneProcess())
    page = page_of(run)
    assert summary.test_epoch == 1
    assert f"<td>{summary.test_loss:.6g}</td>" in page
    assert "those of epoch 1, the best validation (--test-with best)" in page
    assert summary.weights_sha256 not in page, "the receipt is that of the last weights"
    (run / "summary.json").unlink()  # as if the training had not ended
    assert summary.weights_sha256 in page_of(run)


def test_every_picture_is_inside_the_page(digits):
    page = digits
    images = re.findall(r'<img alt="" src="data:image/png;base64,([^"]*)">', page)
    assert len(images) == page.count("<img") == 6
    assert all(base64.b64decode(image).startswith(b"\x89PNG") for image in images)
    assert not re.search(r"https?:|<script|<link", page)


def test_a_page_omits_sections_that_do_not_apply_to_the_run(runs):
    page = page_of(runs / "numbers")
    assert heads(page)[1:5] == ["Learning curves", *PICTURES]
    assert "&lt;b&gt;.npz" in page
    assert "<b>" not in page
    assert heads(page_of(runs / "stopped", out=runs / "a new folder" / "elsewhere.html"))[1:4] == [
        "Confusion matrix",
        "Misclassified images",
        "Activations of the layers",
    ]


def test_a_run_without_its_data_has_a_page_without_the_parts_that_need_it(runs, tmp_path):
    shutil.copytree(runs / "numbers", tmp_path / "run")
    (runs / "<b>.npz").rename(runs / "gone.npz")
    try:
        code, out, err = outcome(tmp_path / "run")
    finally:
        (runs / "gone.npz").rename(runs / "<b>.npz")
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert (code, out) == (0, f"report: {tmp_path}/run/report.html\n")
    assert len(err.splitlines()) == 1
    assert f"there is no {runs}/<b>.npz" in err
    assert "Pictures and scores that need the training data are absent: the data of " in page
    assert heads(page)[:3] == ["Result", "Learning curves", "Filters of the first convolution"]
    assert f"{json.loads((tmp_path / 'run/summary.json').read_text())['test_loss']:.6g}" in page
    assert outcome(tmp_path / "run", f"--dataset=npz:{tmp_path}/nowhere.npz")[0] == 2


def test_the_page_has_the_scores_of_each_class(digits):
    table = re.search(r"<h3>Classes</h3>\s<pre>(.*?)</pre>", digits, re.DOTALL)[1].splitlines()
    assert table[0].split() == ["class", "samples", "precision", "recall", "F1"]
    assert [line.split()[0] for line in table[1:11]] == [str(k) for k in range(10)]
    assert sum(int(line.split()[1]) for line in table[1:11]) == 269
    assert table[11].startswith("balanced accuracy: ")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere"], "nowhere is not a run folder"),
        (["digits/config.toml"], "is not a run folder"),
        (["digits", "--out=pipe.html"], "not a regular file"),
        (["digits", "--out=page.txt"], "ends in .html"),
        (["digits", "--out=digits/config.toml/page.html"], "cannot be written"),
        (["digits", "--model=net.py:net"], "the runs were trained with"),
        (["digits", "--dataset=mnist"], "was trained on digits"),
        (["digits", "--model=net"], "unknown model 'net'"),
        (["digits", "numbers"], "unexpected argument 'numbers'"),
    ],
)
def test_a_refusal_is_one_line_and_nothing_is_written(arguments, said, runs, monkeypatch):
    monkeypatch.chdir(runs)
    if not (runs / "pipe.html").exists():
        os.mkfifo(runs / "pipe.html")
    before = picture(runs)
    code, out, err = outcome(*arguments)
    assert (code, out) == (2, "")
    assert said in err
    assert len(err.splitlines()) == 1
    assert changes(before, picture(runs)) == []


@pytest.mark.parametrize("name", ["metrics.jsonl", "timing.jsonl", "summary.json", "env.json"])
@pytest.mark.parametrize("content", [b"garbage", b"[1]", b"\xff"], ids=["no JSON", "a list", "no text"])
def test_a_damaged_file_of_the_run_is_named(name, content, runs, tmp_path, monkeypatch):
    shutil.copytree(runs / "digits", tmp_path / "run")
    (tmp_path / "run" / name).write_bytes(content)
    monkeypatch.chdir(tmp_path)
    code, out, err = outcome("run")
    assert (code, out) == (3, "")
    assert f"run/{name} is damaged" in err
    assert len(err.splitlines()) == 1
