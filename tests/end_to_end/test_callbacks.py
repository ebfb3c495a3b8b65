"""Callbacks get the records of a run, each once, from the coordinator alone, also if it is killed."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from injected import faults, spoil_records
from recorder import Recorder, records_in
from small_runs import VERY_RAGGED, piece_of_digits, small_config

import distdl
from distdl.errors import DamagedFileError, UserError
from distdl.job.launched_by import read_launch
from distdl.job.mpirun_command import mpirun_command
from distdl.parallel import OneProcess

HERE = Path(__file__).parent
SETTINGS = {"checkpoint_every": 2, "log_every": 2}
#: Trains with a `Recorder`, with the faults that the rules of `saboteur.py` describe.
PROGRAM = """
import json, sys
from pathlib import Path
sys.path[:0] = json.loads(sys.argv[1])
import distdl, saboteur
from recorder import Recorder
from small_runs import VERY_RAGGED, piece_of_digits, small_config
saboteur.set_faults(json.loads(sys.argv[3]))
config = small_config(Path(sys.argv[2]), **json.loads(sys.argv[4]))
result = distdl.train(config, dataset=piece_of_digits(VERY_RAGGED), callbacks=[Recorder()])
print("rank", result.rank, "has", len(result.history), "epochs", result.receipt, flush=True)
"""

pytestmark = pytest.mark.skipif(read_launch().by is not None, reason="starts jobs of its own")


def train(folder, *callbacks, **settings):
    dataset = piece_of_digits(VERY_RAGGED)
    config = small_config(folder, **SETTINGS | settings)
    return distdl.train(config, dataset=dataset, callbacks=callbacks, communicator=OneProcess())


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Return the result of a run without failures in one process, and its records."""
    result = train(tmp_path_factory.mktemp("undisturbed") / "run", Recorder())
    return result, records_in(result.run_dir)


def run_job_with(run_job, tmp_path, ranks, rules, **settings):
    program, folder = tmp_path / "program.py", tmp_path / "run"
    program.write_text(PROGRAM)
    paths = [str(HERE), str(HERE.parent / "faults")]
    words = [json.dumps(paths), str(folder), json.dumps(rules), json.dumps(SETTINGS | settings)]
    done = run_job(mpirun_command(ranks, [sys.executable, str(program), *words]), timeout=120)
    return folder, done


def test_the_records_are_those_of_the_metrics(undisturbed):
    result, records = undisturbed
    assert [event for event, _ in records] == [
        *("on_step", "on_step", "on_checkpoint", "on_step", "on_epoch", "on_checkpoint"),
        *("on_step", "on_checkpoint", "on_step", "on_step", "on_epoch", "on_checkpoint", "on_end"),
    ]
    metrics = [json.loads(line) for line in (result.run_dir / "metrics.jsonl").read_text().splitlines()]
    of_epochs = [record for event, record in records if event == "on_epoch"]
    assert of_epochs == result.history == [one for one in metrics if "validation_loss" in one]
    of_steps = [record for event, record in records if event == "on_step"]
    assert [one["step"] for one in of_steps] == [1, 2, 3, 4, 5, 6]
    assert [one for one in of_steps if one["step"] % 2 == 0] == [one for one in metrics if "lr" in one]
    summary = json.loads((result.run_dir / "summary.json").read_text())
    assert records[-1][1]["weights_sha256"] == summary["weights_sha256"] == result.receipt


def test_callbacks_change_neither_logs_nor_the_receipt(tmp_path, undisturbed):
    result, _ = undisturbed
    plain = train(tmp_path / "plain")
    assert plain.receipt == result.receipt
    assert (plain.run_dir / "metrics.jsonl").read_bytes() == (result.run_dir / "metrics.jsonl").read_bytes()


def test_three_ranks_make_the_calls_of_one(run_job, tmp_path, undisturbed):
    folder, done = run_job_with(run_job, tmp_path, 3, [])
    assert done.returncode == 0, done.stdout + done.stderr
    assert records_in(folder) == undisturbed[1]
    said = sorted(line for line in done.stdout.splitlines() if line.startswith("rank "))
    assert said == [f"rank {rank} has 2 epochs {undisturbed[0].receipt}" for rank in range(3)]


def kill(rank, phase, **more):
    return {"rank": rank, "phase": phase, **more}


@pytest.mark.parametrize(
    ("ranks", "rules"),
    [
        (2, [kill(0, "step")]),
        (2, [kill(0, "step", nth=4)]),
        (2, [kill(0, "update", nth=2, when="after")]),
        (3, [kill(0, "validation", when="committed")]),
        (3, [kill(0, "checkpoint", nth=2)]),
        (3, [kill(0, "checkpoint", nth=3, when="after")]),
        (2, [kill(0, "checkpoint", nth=2, when="committed")]),
        (2, [kill(0, "test", when="committed")]),
        (2, [kill(0, "finish", when="after")]),
        (3, [kill(0, "step", nth=3), kill(1, "step", nth=6)]),
        (3, [kill(0, "step", nth=5), kill(1, "takeover", nth=2)]),
        (3, [kill(2, "step", nth=3)]),
        (2, [kill(0, "data")]),
    ],
    ids=lambda value: " ".join("{rank}-{phase}".format(**one) for one in value) if isinstance(value, list) else None,
)
def test_the_records_are_those_of_the_undisturbed_run_if_ranks_are_killed(
    run_job, tmp_path, ulfm, undisturbed, ranks, rules
):
    folder, done = run_job_with(run_job, tmp_path, ranks, rules)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr.count("[saboteur]") == len(rules)
    assert records_in(folder) == undisturbed[1]
    told = [record for event, record in records_in(folder, of_this_run=True) if event == "on_recovery"]
    in_summary = json.loads((folder / "summary.json").read_text())["recoveries"]
    assert told[-1:] == in_summary[-1:] != []
    assert f"{undisturbed[0].receipt}" in done.stdout


def test_a_resumed_run_gets_the_later_records(tmp_path, undisturbed):
    folder = tmp_path / "run"
    train(folder, Recorder(), max_steps=4)
    train(folder, Recorder(), resume="auto")
    of_both = [one for one in records_in(folder) if one[0] != "on_end"]
    assert of_both == undisturbed[1][:-1]


def test_a_skipped_step_has_numbers_but_no_loss(tmp_path):
    with faults():
        spoil_records(lambda record: record["loss_sum"].fill(np.nan), step=2)
        result = train(tmp_path / "run", Recorder(), on_nonfinite="skip")
    [skipped] = [record for _, record in records_in(result.run_dir) if "skipped_steps" in record]
    assert skipped == {"step": 2, "epoch": 1, "micro_batch": 0, "skipped_steps": 1}


class Reading(distdl.Callback):
    """Reads what a callback may read."""

    def on_start(self, record):
        self.run_at_start = self.run
        self.weights = self.run.network.parameters.copy()

    def on_end(self, record):
        self.is_changed = not np.array_equal(self.weights, self.run.network.parameters)


def test_a_callback_reads_the_run(tmp_path):
    reading = Reading()
    result = train(tmp_path / "run", reading)
    run = reading.run_at_start
    assert run.folder == result.run_dir
    assert run.network is result.network
    assert reading.is_changed
    assert (run.config.epochs, run.steps_per_epoch, run.data.classes) == (2, 3, 4)


class Failing(distdl.Callback):
    """Raises an exception of its own."""

    def __init__(self, event, error):
        setattr(self, event, self.fail)
        self.error = error

    def fail(self, record):
        raise self.error


@pytest.mark.parametrize("event", ["on_start", "on_step", "on_epoch", "on_checkpoint", "on_end"])
def test_a_callback_that_raises_ends_the_training_with_one_line(tmp_path, event):
    with pytest.raises(UserError) as caught:
        train(tmp_path / "run", Failing(event, ValueError("two\nlines")))
    said = str(caught.value)
    assert said.startswith(f"the callback Failing.{event} raised ValueError: two lines (line ")
    assert said.endswith("of test_callbacks.py): fix it, and continue with --resume")


@pytest.mark.parametrize("code", [0, 3, "a message"])
def test_a_callback_that_exits_ends_the_training_with_one_line_too(tmp_path, code):
    with pytest.raises(
        UserError, match=rf"^the callback Failing.on_step raised SystemExit: {code} \(line \d+ of test_"
    ):
        train(tmp_path / "run", Failing("on_step", SystemExit(code)))


#: Uses a model and trains in a callback, which rank 0 alone runs.
INSIDE = f"""
import sys
sys.path.insert(0, {str(HERE)!r})
from pathlib import Path
import distdl
from small_runs import piece_of_digits, small_config
digits = piece_of_digits(94)
earlier = distdl.load(distdl.train(small_config(Path("earlier"), epochs=1), dataset=digits).run_dir)

class Using(distdl.Callback):
    def on_epoch(self, record):
        loaded = distdl.load("earlier")
        inner = distdl.train(small_config(Path(f"inner-{{record['epoch']}}"), epochs=1), dataset=digits)
        print("rank 0 has", *(one.predict(digits.images[:3])[0, 0] for one in (earlier, loaded)),
              earlier.evaluate(digits).loss, inner.receipt, flush=True)

result = distdl.train(small_config(Path("run")), dataset=digits, callbacks=[Using()])
print("rank", result.rank, "ends with", result.receipt, flush=True)
"""


def test_a_callback_may_predict_and_train_on_its_rank_alone(run_on_ranks, tmp_path, undisturbed):
    said = []
    for ranks in (1, 3):
        folder = tmp_path / str(ranks)
        folder.mkdir()
        (folder / "program.py").write_text(INSIDE)
        done = run_on_ranks(ranks, [sys.executable, "program.py"], cwd=folder, timeout=120)
        assert done.returncode == 0, done.stderr
        said.append([line for line in done.stdout.splitlines() if line.startswith("rank 0 ")])
    assert len(said[0]) == 3
    assert said[0] == said[1], "with the same bits"
    assert said[0][2] == f"rank 0 ends with {undisturbed[0].receipt}"


def test_a_user_error_of_a_callback_stays_as_it_is(tmp_path):
    with pytest.raises(DamagedFileError, match=r"^my file is damaged$"):
        train(tmp_path / "run", Failing("on_step", DamagedFileError("my file is damaged")))


@pytest.mark.parametrize("ranks", [1, 3])
def test_a_callback_that_raises_ends_the_job_with_one_line(run_job, tmp_path, survives, ranks):
    program = tmp_path / "program.py"
    program.write_text(
        "import sys\n"
        f"sys.path.insert(0, {str(HERE)!r})\n"
        "from pathlib import Path\nimport distdl\nfrom distdl import cli\n"
        "class Wrong(distdl.Callback):\n"
        "    def on_epoch(self, record):\n"
        "        return 1 / 0\n"
        "def main(arguments):\n"
        "    from small_runs import piece_of_digits, small_config\n"
        "    distdl.train(small_config(Path('run')), dataset=piece_of_digits(94), callbacks=[Wrong()])\n"
        "sys.exit(cli.run(main, trains=True))\n"
    )
    done = run_job(mpirun_command(ranks, [sys.executable, str(program)]), timeout=120, cwd=tmp_path)
    assert done.returncode in {2, 1 if survives and ranks > 1 else 2}, done.stderr  # docs/exit-codes.md
    said = [line for line in done.stderr.splitlines() if "Wrong" in line]
    assert len(said) == 1, done.stderr
    assert "the callback Wrong.on_epoch raised ZeroDivisionError: division by zero (line 8 of program.py)" in said[0]
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("callback", "said"),
    [(Reading, "a callback is the class Reading"), (print, "a callback is an object of builtin_function_or_method")],
)
def test_something_else_than_a_callback_is_refused_before_the_run_folder_is_made(tmp_path, callback, said):
    with pytest.raises(UserError, match=f"{said}: expected an object of a subclass of distdl.Callback"):
        train(tmp_path / "run", callback)
    assert not (tmp_path / "run").exists()
