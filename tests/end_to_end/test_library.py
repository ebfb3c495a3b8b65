"""`import distdl` in a script, under mpirun and in a notebook: the pages' code works, to one receipt."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from small_runs import piece_of_digits, small_config, small_run

import distdl
from distdl import cli, evaluate, nn, predict, report, train_command
from distdl.engine.callbacks import Callback
from distdl.errors import Stopped, UserError
from distdl.inference.load import load
from distdl.inference.score import evaluate as score_on_part
from distdl.job.launched_by import read_launch
from distdl.job.mpirun_command import mpirun_command
from distdl.parallel import OneProcess

REPOSITORY = Path(__file__).parents[2]
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
PAGE = (REPOSITORY / "docs" / "library.md").read_text(encoding="utf-8")
PUBLIC = ["Callback", "Dataset", "TrainConfig", "__version__", "load", "nn", "train"]
USER = 2

pytestmark = pytest.mark.skipif(read_launch().by is not None, reason="starts jobs of its own")


def code_of(heading, page=PAGE):
    """Return the first block of code below a heading of the page."""
    section = page.partition(f"## {heading}\n")[2].partition("\n## ")[0]
    return textwrap.dedent(re.search(r"^ {4}.*\n(?:(?: {4}.*)?\n)*", section, re.MULTILINE)[0]).strip() + "\n"


FIFTEEN_LINES = code_of("Your script", README)


def run_python(code, folder):
    return subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=120, check=True
    ).stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a folder with the script of the page, and arrays for it."""
    folder = tmp_path_factory.mktemp("library")
    digits = piece_of_digits(94)
    np.savez(folder / "mine.npz", images=digits.images, labels=digits.labels)
    np.savez(folder / "new.npz", images=digits.images[:20], labels=digits.labels[:20])
    (folder / "script.py").write_text(FIFTEEN_LINES)
    return folder


@pytest.fixture(scope="module")
def trained(folder, run_program):
    """Return the run folder, receipt and accuracy that the script prints in one process of plain Python."""
    done = run_program([sys.executable, "script.py"], cwd=folder, timeout=120)
    assert done.returncode == 0, done.stderr
    accuracy, run_dir, receipt = done.stdout.splitlines()[-1].split()
    assert f"weights sha256: {receipt}" in done.stdout.splitlines()
    return Path(run_dir), receipt, float(accuracy)


@pytest.fixture(scope="module")
def notebook(folder, run_program):
    """Run a notebook with the fifteen lines by `jupyter nbconvert --execute`; return the text that each cell prints.

    Its second cell is interrupted during a training, the third one continues it.
    """
    interrupting = (
        "import os, signal\nfrom pathlib import Path\nfrom distdl.errors import Stopped\n"
        "class Interrupting(distdl.Callback):\n"
        "    def on_step(self, record):\n"
        "        if record['step'] == 2:\n"
        "            os.kill(os.getpid(), signal.SIGINT)\n"
        "settings = dict(epochs=5, run_dir=Path('interrupted'))\n"
    )
    run = "distdl.train(distdl.TrainConfig(**settings{}), dataset=dataset, build_network=network{})"
    first, second = run.format("", ", callbacks=[Interrupting()]"), run.format(", resume='auto'", "")
    caught = f"try:\n    {first}\nexcept Stopped as stopped:\n    print(stopped)"
    cells = [
        {"cell_type": "code", "execution_count": None, "metadata": {}, "outputs": [], "source": source}
        for source in (FIFTEEN_LINES, interrupting + caught, f"print('resumed', {second}.receipt)")
    ]
    content = {"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 4}
    (folder / "notebook.ipynb").write_text(json.dumps(content))
    flags = ["--to=notebook", "--execute", "--output=executed.ipynb", "notebook.ipynb"]
    own = {f"JUPYTER_{kind}_DIR": str(folder / "jupyter") for kind in ("CONFIG", "DATA", "RUNTIME")}
    done = run_program(
        [sys.executable, "-m", "jupyter", "nbconvert", *flags],
        cwd=folder,
        env=os.environ | own | {"IPYTHONDIR": str(folder / "jupyter")},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    outputs = [one["outputs"] for one in json.loads((folder / "executed.ipynb").read_text())["cells"]]
    return ["".join("".join(part.get("text", "")) for part in parts) for parts in outputs]


# ---------------------------------------------------------------------------------------------------------- the names


def test_the_public_names_are_these():
    assert sorted(distdl.__all__) == PUBLIC
    assert set(PUBLIC) <= set(dir(distdl)), "tab completion offers them"
    for name in PUBLIC:
        assert getattr(distdl, name) is not None
    with pytest.raises(AttributeError, match="module 'distdl' has no attribute 'tarin'"):
        distdl.tarin  # noqa: B018


def test_import_distdl_imports_no_other_module_of_it(tmp_path):
    code = (
        "import sys, distdl; print(sorted(m for m in sys.modules if m.startswith('distdl.')), 'numpy' in sys.modules)"
    )
    assert run_python(code, tmp_path) == "[] False\n"


def test_the_functions_of_the_library_import_numpy_when_they_are_called(tmp_path):
    code = "import sys, distdl; distdl.train, distdl.load, distdl.TrainConfig; print('numpy' in sys.modules)"
    assert run_python(code, tmp_path) == "False\n"


@pytest.mark.parametrize(
    "imports",
    [
        "import distdl; f = distdl.train; import distdl.train",
        "import distdl.train; f = distdl.train",
        "from distdl import train as f; import distdl.train",
        "import distdl.train; from distdl import train as f",
        "import distdl.__main__, importlib; importlib.import_module('distdl.train'); f = distdl.train",
    ],
)
def test_distdl_train_is_the_function_in_any_order_of_imports(imports, tmp_path):
    code = f"{imports}; print(f is distdl.train, type(f).__name__, f.__module__)"
    assert run_python(code, tmp_path) == "True function distdl.library\n"


def test_the_command_of_the_same_name_still_starts(run_program, tmp_path):
    for argv in (["-m", "distdl.train"], ["-m", "distdl", "train"]):
        done = run_program([sys.executable, *argv, "--help"], cwd=tmp_path, timeout=60)
        assert (done.returncode, done.stderr) == (0, "")
        assert "--epochs" in done.stdout


def test_a_type_checker_sees_the_public_names(tmp_path):
    pytest.importorskip("mypy")
    (tmp_path / "user.py").write_text(
        "import distdl\nimport distdl.train\n"
        "result = distdl.train(distdl.TrainConfig(epochs=1))\n"
        "reveal_type(result.receipt)\nreveal_type(distdl.load(result.run_dir).step)\n"
        "reveal_type(distdl.Dataset)\nreveal_type(distdl.Callback)\nreveal_type(distdl.nn.Affine(3))\n"
        "distdl.train(epochs=1)\n"
    )
    argv = [sys.executable, "-m", "mypy", "--no-error-summary", f"--cache-dir={tmp_path}/cache", "user.py"]
    done = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True, timeout=600, check=False)
    lines = [line.partition(": ")[2] for line in done.stdout.splitlines()]
    assert [line.partition('"')[2].rstrip('"') for line in lines[:2]] == ["str", "int"], done.stdout
    assert "distdl.data.dataset.Dataset" in lines[2]
    assert "distdl.engine.callbacks.Callback" in lines[3]
    assert "distdl.nn.layers.Affine" in lines[4]
    assert 'error: Unexpected keyword argument "epochs" for "train"' in lines[5]


# ------------------------------------------------------------------------------------------------------- the script


def test_the_lines_of_readme_are_fifteen_and_those_of_the_page():
    assert len(FIFTEEN_LINES.splitlines()) == 15
    assert code_of("Your arrays and your network") == FIFTEEN_LINES


@pytest.mark.parametrize("form", ["three ranks", "a notebook", "the command"])
def test_the_fifteen_lines_have_one_receipt_in_every_form(form, folder, trained, run_program, request):
    if form == "a notebook":
        [printed, *_] = request.getfixturevalue("notebook")
    elif form == "three ranks":
        run_job = request.getfixturevalue("run_job")
        printed = run_job(mpirun_command(3, [sys.executable, "script.py"]), cwd=folder, timeout=120).stdout
    else:
        flags = ["--epochs=5", "--dataset=npz:mine.npz", "--model=script.py:network", "--run-dir=of-the-command"]
        printed = run_program([sys.executable, "-m", "distdl.train", *flags], cwd=folder, timeout=120).stdout
    lines = printed.splitlines()
    assert lines.count(f"weights sha256: {trained[1]}") == 1, printed
    if form != "the command":
        assert lines[-1].endswith(f" {trained[1]}")
        assert sum(line.endswith(trained[1]) for line in lines) == 2, "only rank 0 prints the result"


def test_the_result_has_history_network_folder_and_receipt(tmp_path):
    dataset = piece_of_digits(94)
    result = distdl.train(small_config(tmp_path / "run"), dataset=dataset, communicator=OneProcess())
    assert result.run_dir == tmp_path / "run"
    assert result.receipt == json.loads((result.run_dir / "summary.json").read_text())["weights_sha256"]
    records = [json.loads(line) for line in (result.run_dir / "metrics.jsonl").read_text().splitlines()]
    assert result.history == [one for one in records if "validation_loss" in one]
    assert [one["epoch"] for one in result.history] == [1, 2]
    assert result.rank == 0
    model = distdl.load(result.run_dir, communicator=OneProcess())
    assert np.array_equal(model.network.parameters, result.network.parameters)
    assert (model.receipt, model.step) == (result.receipt, result.summary.steps)


def test_the_history_of_a_resumed_run_begins_with_the_run(tmp_path):
    config, dataset = small_config(tmp_path / "run", max_steps=4), piece_of_digits(94)
    first = distdl.train(config, dataset=dataset, communicator=OneProcess())
    assert [one["epoch"] for one in first.history] == [1]
    again = small_config(tmp_path / "run", resume="auto")
    assert [one["epoch"] for one in distdl.train(again, dataset=dataset).history] == [1, 2]


class Interrupting(Callback):
    """Presses Ctrl-C after a step."""

    def on_step(self, record):
        if record["step"] == 2:
            os.kill(os.getpid(), signal.SIGINT)


def test_a_training_can_be_interrupted_continued_and_repeated_in_one_process(tmp_path, signals_at_their_defaults):
    expected = small_run(OneProcess(), tmp_path / "undisturbed")
    dataset, run = piece_of_digits(94), tmp_path / "run"
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(Stopped, match="stopped by SIGINT after step 3"):
        distdl.train(small_config(run), dataset=dataset, callbacks=[Interrupting()])
    assert signal.getsignal(signal.SIGINT) is handler
    result = distdl.train(small_config(run, resume="auto"), dataset=dataset)
    assert result.receipt == expected[0]
    assert distdl.train(small_config(tmp_path / "again"), dataset=dataset).receipt == expected[0]
    with pytest.raises(UserError, match="again"):
        distdl.train(small_config(tmp_path / "again"), dataset=dataset)


def test_numpy_before_distdl_changes_no_bit_and_keeps_its_threads(folder, trained):
    code = """
import numpy, threadpoolctl
before = threadpoolctl.threadpool_info()
import script
exec(compile(open("script.py").read(), "script.py", "exec"), {"__name__": "__main__"})
assert threadpoolctl.threadpool_info() == before
"""
    environment = {name: value for name, value in os.environ.items() if not name.endswith("_NUM_THREADS")}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].endswith(trained[1])


def test_a_notebook_stops_after_the_step_on_interrupt_and_continues(notebook, trained):
    assert "stopped by SIGINT after step 3, which is saved" in notebook[1]
    assert notebook[2].splitlines()[-1] == f"resumed {trained[1]}"


# ------------------------------------------------------------------------------------------- predictions and scores


def test_the_page_predicts_and_scores_without_the_training_data(folder, trained, tmp_path):
    (tmp_path / "my-run").symlink_to(trained[0])
    for name in ("script.py", "new.npz"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    printed = run_python(code_of("Predictions and scores"), tmp_path)
    assert re.fullmatch(r"\['\d', '\d', '\d'\] [01]\.\d+\n", printed)


def test_predictions_and_scores_are_those_of_the_evaluation(folder, trained):
    def network(input_shape, classes):
        return nn.Sequential([nn.Flatten(), nn.Affine(50), nn.ReLU(), nn.Affine(classes)], input_shape)

    with np.load(folder / "mine.npz") as arrays:
        images, labels = arrays["images"], arrays["labels"]
    dataset = distdl.Dataset.from_labels("mine", images, labels)
    [one] = load([trained[0]], OneProcess(), build_network=network, dataset=dataset)
    expected = score_on_part([one], "test", OneProcess())
    model = distdl.load(trained[0], build_network=network, communicator=OneProcess())
    assert np.array_equal(model.predict(images[expected.rows]), expected.probabilities)
    rows = distdl.Dataset.from_labels("the same rows", images[expected.rows], labels[expected.rows])
    assert model.evaluate(rows) == expected.ensemble
    assert model.class_names == tuple("0123")
    assert model.image_shape == (8, 8, 1)
    assert (model.config.epochs, model.receipt) == (5, trained[1])


@pytest.mark.parametrize(
    ("images", "said"),
    [
        (np.zeros((3, 8, 8), np.uint8), r"cannot predict images uint8 \(3, 8, 8\): .*numpy.newaxis"),
        (np.zeros((3, 9, 9, 1), np.uint8), "the array has images of 9x9 pixels .* takes 8x8"),
        (np.zeros((3, 8, 8, 1)), "the array has images of float32, the network was trained on uint8"),
        (np.zeros((0, 8, 8, 1), np.uint8), "cannot predict images"),
        ("photo.jpg", "cannot predict images"),
    ],
)
def test_images_that_do_not_fit_are_refused_in_one_line(images, said, tmp_path):
    result = distdl.train(small_config(tmp_path / "run", max_steps=1), dataset=piece_of_digits(94))
    model = distdl.load(result.run_dir)
    with pytest.raises(UserError, match=said) as caught:
        model.predict(images)
    assert "\n" not in str(caught.value)


def test_data_that_is_no_dataset_is_refused_in_one_line(tmp_path):
    digits = piece_of_digits(94)
    result = distdl.train(small_config(tmp_path / "run", max_steps=1), dataset=digits)
    with pytest.raises(UserError, match=r"cannot evaluate on tuple: .*Dataset.from_labels"):
        distdl.load(result.run_dir).evaluate((digits.images, digits.labels))


# ---------------------------------------------------------------------------------------- commands on a script's run


@pytest.fixture
def in_folder(folder, monkeypatch):
    monkeypatch.chdir(folder)
    return folder


def refusal(main, arguments, capsys, **options):
    assert cli.run(main, list(map(str, arguments)), **options) == USER
    printed = capsys.readouterr()
    assert len(printed.err.splitlines()) == 1, printed.err
    return printed.err


def test_the_commands_of_the_page_use_the_run_of_a_script(in_folder, trained, run_program):
    commands = re.findall(r"^ {4}python -m (distdl\.(?:predict|evaluate|report|train) .*my-run.*)$", PAGE, re.MULTILINE)
    assert len(commands) == 4
    shutil.rmtree(in_folder / "my-run", ignore_errors=True)
    shutil.copytree(in_folder / trained[0], in_folder / "my-run")
    for command in commands:
        done = run_program([sys.executable, "-m", *command.split()], cwd=in_folder, timeout=120)
        assert done.returncode == 0, done.stderr
    assert "epoch 6/6" in done.stdout


def test_an_error_says_what_to_give_for_a_model_of_a_script(in_folder, trained, capsys):
    said = refusal(evaluate.main, [trained[0], "--on=npz:new.npz"], capsys)
    assert "add --model SCRIPT.py:network, or in a script distdl.load(…, build_network=network)" in said
    said = refusal(predict.main, [trained[0], "npz:new.npz"], capsys)
    assert "--model SCRIPT.py:network" in said
    said = refusal(train_command.main, ["--resume", trained[0], "--dataset=npz:mine.npz"], capsys)
    assert "resume the run with that script, or give --model SCRIPT.py:network" in said


def test_an_error_says_what_to_give_for_a_dataset_of_a_script(in_folder, trained, capsys):
    own = "--model=script.py:network"
    said = refusal(evaluate.main, [trained[0], own], capsys)
    assert "trained on the dataset 'mine' of a script: give the same data by --dataset npz:FILE.npz" in said
    said = refusal(train_command.main, ["--resume", trained[0], own], capsys)
    assert "the dataset 'mine' comes from a script" in said
    assert "--dataset npz:FILE.npz" in said
    said = refusal(train_command.main, ["--resume", trained[0], own, "--epochs=6", "--dataset=npz:new.npz"], capsys)
    assert "it was trained on other images or labels" in said


def test_the_report_of_a_script_s_run_says_what_it_lacks(in_folder, trained, capsys):
    pytest.importorskip("matplotlib")
    words = [trained[0], "--model=script.py:network", f"--out={in_folder}/page.html"]
    assert cli.run(report.main, list(map(str, words))) == 0
    assert "the dataset 'mine' of a script" in capsys.readouterr().err


def test_a_script_that_trains_when_it_is_imported_is_refused(in_folder, trained, capsys):
    unguarded = FIFTEEN_LINES.replace('__name__ == "__main__"', "True")
    (in_folder / "script_without_guard.py").write_text(unguarded)
    before = set((in_folder / "runs").iterdir())
    words = [trained[0], "--on=npz:new.npz", "--model=script_without_guard.py:network"]
    said = refusal(evaluate.main, words, capsys)
    assert 'move the training into a block if __name__ == "__main__" (line ' in said
    assert set((in_folder / "runs").iterdir()) == before


# ----------------------------------------------------------------------------------- callbacks, and a loop of your own


def test_the_callback_of_the_page_stores_the_loss_of_each_step(tmp_path, run_program):
    (tmp_path / "script.py").write_text(code_of("Callbacks"))
    done = run_program([sys.executable, "script.py"], cwd=tmp_path, timeout=120)
    assert done.returncode == 0, done.stderr
    [run] = (tmp_path / "runs").iterdir()
    stored = [line.split() for line in (run / "losses.txt").read_text().splitlines()]
    assert [int(step) for step, _ in stored] == list(range(1, 21))
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [float(loss) for step, loss in stored if int(step) % 10 == 0] == [
        one["loss"] for one in metrics if "lr" in one
    ]


@pytest.fixture(scope="module")
def receipt_of_the_command(tmp_path_factory, run_program):
    """Return the last line of the command that the page compares with its loop."""
    [command] = re.findall(r"`python -m (distdl.train --model mlp .*?)`", PAGE)
    done = run_program([sys.executable, "-m", *command.split()], cwd=tmp_path_factory.mktemp("command"), timeout=120)
    return done.stdout.splitlines()[-1]


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_the_loop_of_the_page_has_the_receipt_of_the_command(tmp_path, run_on_ranks, receipt_of_the_command, ranks):
    (tmp_path / "loop.py").write_text(code_of("A loop of your own"))
    done = run_on_ranks(ranks, [sys.executable, "loop.py"], cwd=tmp_path, timeout=120)
    assert done.returncode == 0, done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["loss"] * 5 + ["weights"]
    assert done.stdout.splitlines()[-1] == receipt_of_the_command
