"""Whole searches: the same files on any number of ranks and after any interruption; errors in one line."""

import errno
import json
import os
import shlex
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from bad_inputs import changes, picture
from small_runs import piece_of_digits, remove, worlds

from distdl import cli, nn
from distdl.config import TrainConfig
from distdl.engine import train
from distdl.engine.fault_injection import fail_at
from distdl.errors import DamagedFileError, Stopped, UserError
from distdl.inference import figures
from distdl.job.mpirun_command import mpirun_command
from distdl.parallel import OneProcess
from distdl.search import __main__ as command
from distdl.search import trials
from distdl.search.folder import CHART
from distdl.search.settings import Range, SearchSettings
from distdl.search.trials import search
from distdl.train_command import parse

ROWS = 90
CONFIG = TrainConfig(model="mlp", epochs=2, batch_size=32, micro_batch_size=8)
RANDOM = SearchSettings(
    ranges=(Range("lr", 1e-4, 1e-1, "log"), Range("weight_decay", 1e-8, 1e-4, "log")),
    config=CONFIG,
    rounds=2,
    trials=5,
)
HALVING = replace(RANDOM, method="halving", trials=4, config=replace(CONFIG, epochs=4), rounds=3)
#: Adam's steps are as long as the learning rate. From about 1e20 the loss overflows.
DIVERGING = replace(RANDOM, ranges=(Range("lr", 1e-3, 1e30, "log"),), rounds=2, trials=6)
FILES = ("search.json", "results.jsonl", "summary.json")


def searched(settings, folder, communicator=None, **more):
    return search(replace(settings, out=folder, **more), communicator or OneProcess(), dataset=piece_of_digits(ROWS))


def files(folder):
    return [(folder / name).read_bytes() for name in FILES]


def ink(shape, outputs):
    return nn.Sequential([nn.Flatten(), nn.Affine(outputs)], shape)


def test_a_task_without_an_accuracy_is_judged_by_its_validation_loss(tmp_path, capsys):
    """Halving, and numbers as targets: the amount of ink in each row of a digit."""
    digits = piece_of_digits(ROWS)
    numbers = digits.images[..., 0].mean(axis=2).astype(np.float32) / 16
    data = replace(digits, labels=numbers, classes=numbers.shape[1])
    found = search(replace(HALVING, out=tmp_path / "search"), OneProcess(), build_network=ink, dataset=data)
    assert all(result.validation_accuracy is None and not result.diverged for result in found.results)
    [*others, last] = found.results
    assert found.best == last
    at_first = [result for result in others if result.round == 1]
    assert {result.trial for result in others if result.round == 2} == {
        result.trial for result in sorted(at_first, key=lambda result: result.validation_loss)[:2]
    }
    assert f"validation loss {last.validation_loss:.4g}" in capsys.readouterr().out


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Return the files of each search in one process."""
    folder = tmp_path_factory.mktemp("undisturbed")
    for name, settings in (("random", RANDOM), ("halving", HALVING)):
        searched(settings, folder / name)
    return folder


@pytest.mark.mpi(min_size=3)
@pytest.mark.parametrize(("settings", "ranks_per_trial"), [(RANDOM, 1), (RANDOM, 2), (HALVING, 1), (DIVERGING, 2)])
def test_every_number_of_ranks_gives_the_same_files(communicator, shared_tmp_path, settings, ranks_per_trial):
    expected = None
    if communicator.rank == 0:
        searched(settings, shared_tmp_path / "one")
        expected = files(shared_tmp_path / "one")
    for size, part in worlds(communicator, (1, 2, 3)):
        if ranks_per_trial <= size:
            searched(settings, shared_tmp_path / f"{size}", part, ranks_per_trial=ranks_per_trial)
            if part.rank == 0:
                assert files(shared_tmp_path / f"{size}") == expected, f"{size} ranks"
    remove(communicator, shared_tmp_path)


def test_a_result_equals_the_summary_in_the_run_folder(undisturbed):
    lines = (undisturbed / "random" / "results.jsonl").read_text().splitlines()
    assert len(lines) == 10
    for record in map(json.loads, lines):
        summary = json.loads((undisturbed / "random" / record["run_folder"] / "summary.json").read_text())
        for name in trials.OUTCOME:
            assert record[name] == summary[name]
    assert len({json.loads(line)["weights_sha256"] for line in lines}) == 10


def test_the_last_line_is_the_command_that_trains_with_the_best_settings(tmp_path, capsys):
    own = ["--range", "lr=1e-4:1e-1:log", "--trials", "2", "--rounds", "1", "--out"]
    assert command.main([*own, str(tmp_path / "search"), "--", "--model", "mlp", "--epochs", "1"]) == 0
    said = capsys.readouterr().out
    last = said.splitlines()[-1]
    assert last.startswith("best: python -m distdl.train --model mlp --epochs 1 --lr ")
    summary = train(replace(parse(shlex.split(last)[4:]), run_dir=tmp_path / "run"), OneProcess())
    best = json.loads((tmp_path / "search" / "summary.json").read_text())["best"]
    assert summary.weights_sha256 == best["weights_sha256"]
    assert said.count("weights sha256") == 0, "trials are quiet"
    assert len([line for line in said.splitlines() if line.startswith("  trial")]) == 2


def test_halving_continues_a_training_as_if_it_had_not_been_interrupted(undisturbed, tmp_path, monkeypatch):
    folder = undisturbed / "halving"
    records = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    assert [(record["round"], record["epochs"]) for record in records] == [(1, 1)] * 4 + [(2, 2)] * 2 + [(3, 4)]
    config = replace(HALVING.config, **records[-1]["settings"], run_dir=tmp_path / "run")
    summary = train(config, OneProcess(), dataset=piece_of_digits(ROWS))
    assert summary.weights_sha256 == records[-1]["weights_sha256"]
    assert summary.test_accuracy == records[-1]["test_accuracy"]
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == (
        folder / records[-1]["run_folder"] / "metrics.jsonl"
    ).read_bytes()
    assert [record["test_accuracy"] for record in records[:-1]] == [None] * 6
    # No step was taken twice: each epoch was timed once.
    timed = (folder / records[-1]["run_folder"] / "timing.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in timed] == [1, 2, 3, 4]


@pytest.mark.parametrize(("name", "settings"), [("random", RANDOM), ("halving", HALVING)])
def test_interrupted_after_any_trial_and_resumed_gives_the_same_files(
    undisturbed, tmp_path, monkeypatch, name, settings
):
    """Each start trains two trials, and is interrupted when the third starts."""
    folder, calls = tmp_path / "search", []

    def interrupted(*arguments, **keywords):
        calls.append(1)
        if len(calls) % 3 == 0:
            raise KeyboardInterrupt
        return train(*arguments, **keywords)

    monkeypatch.setattr(trials, "train", interrupted)
    for _ in range(20):
        try:
            searched(settings, folder, resume=True)
            break
        except KeyboardInterrupt:
            pass
    assert files(folder) == files(undisturbed / name)
    assert len(calls) > len((folder / "results.jsonl").read_bytes().splitlines()), "it was interrupted"
    assert len(calls) < 2 * len((folder / "results.jsonl").read_bytes().splitlines()), "nothing was repeated"


def test_a_resume_of_a_finished_search_trains_nothing(undisturbed, tmp_path, monkeypatch, capsys):
    searched(RANDOM, tmp_path / "search")
    monkeypatch.setattr(trials, "train", None)
    searched(RANDOM, tmp_path / "search", resume=True)
    assert files(tmp_path / "search") == files(undisturbed / "random")
    assert "resumed from" in capsys.readouterr().out


def test_a_signal_stops_the_search_within_a_trial_and_a_resume_continues_there(undisturbed, tmp_path, monkeypatch):
    folder, calls = tmp_path / "search", []

    def signaled(*arguments, **keywords):
        calls.append(1)
        if len(calls) == 3:
            fail_at("step", rank=0, action=lambda _: os.kill(os.getpid(), signal.SIGUSR1))
        return train(*arguments, **keywords)

    monkeypatch.setattr(trials, "train", signaled)
    with pytest.raises(Stopped, match="stopped by SIGUSR1 after 2 trials: the same command with --resume"):
        searched(RANDOM, folder)
    assert signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL
    third = folder / "trials" / "round-1-trial-3" / "checkpoints"
    assert len(list(third.iterdir())) == 1, "the step that it stopped after is saved"
    searched(RANDOM, folder, resume=True)
    assert files(folder) == files(undisturbed / "random")


def test_a_trial_that_diverges_is_a_result_and_the_worst(tmp_path, capsys):
    found = searched(DIVERGING, tmp_path / "search")
    diverged = [result for result in found.results if result.diverged]
    assert 0 < len(diverged) < len(found.results)
    assert found.ranges[0].high < min(result.settings["lr"] for result in diverged), "no diverged trial is kept"
    assert all(json.loads(line)["weights_sha256"] is None for line in lines_of(tmp_path / "search", diverged=True))
    said = capsys.readouterr().out
    assert len([line for line in said.splitlines() if "  diverged     " in line]) >= len(diverged)
    assert "training has diverged" not in said
    assert json.loads((tmp_path / "search" / "summary.json").read_text())["diverged"] == len(diverged)
    (tmp_path / "search" / "summary.json").unlink()
    assert searched(DIVERGING, tmp_path / "search", resume=True).results == found.results


def lines_of(folder, *, diverged):
    lines = (folder / "results.jsonl").read_text().splitlines()
    return [line for line in lines if (json.loads(line)["steps"] is None) == diverged]


def test_a_search_whose_trials_all_diverge_ends_in_one_line(tmp_path, capsys):
    flags = ["--range", "lr=1e30:1e31", "--trials", "2", "--rounds", "2", "--out"]
    rest = ["--", "--model", "mlp", "--epochs", "1", "--optimizer", "sgd"]
    assert cli.run(command.main, [*flags, str(tmp_path / "search"), *rest]) == 2
    said = capsys.readouterr()
    assert said.err == "distdl: error: all 4 trials have diverged: give ranges of smaller values\n"
    assert json.loads((tmp_path / "search" / "summary.json").read_text())["best"] is None


def test_the_chart_is_drawn_or_a_line_says_how_to_get_it(undisturbed, tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    drawn = (undisturbed / "random" / CHART).read_text()
    assert drawn.lstrip().startswith("<?xml")
    assert drawn.count("weight-decay") >= 1
    monkeypatch.setattr(figures.importlib.util, "find_spec", lambda name: None)
    searched(RANDOM, tmp_path / "search", rounds=1)
    assert not (tmp_path / "search" / CHART).exists()
    assert f"no {CHART}: drawing it needs matplotlib" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------- invalid input


def refused(settings, folder, said, communicator=None, *, kind=UserError, dataset=True, **more):
    before = picture(folder.parent)
    with pytest.raises(kind, match=said) as raised:
        search(
            replace(settings, out=folder, **more),
            communicator or OneProcess(),
            dataset=piece_of_digits(ROWS) if dataset else None,
        )
    assert "\n" not in str(raised.value)
    assert changes(before, picture(folder.parent)) == []


def test_a_used_folder_needs_resume_and_the_same_settings(tmp_path):
    folder, settings = tmp_path / "search", replace(RANDOM, rounds=1, trials=2)
    searched(settings, folder)
    refused(settings, folder, "is not empty: give another folder, or --resume to continue its search")
    for changed, said in (
        ({"trials": 3}, "trials is 3 here and 2 there"),
        ({"seed": 3}, "seed is 3 here and 0 there"),
        ({"method": "halving"}, "method is 'halving' here and 'random' there"),
        ({"ranges": RANDOM.ranges[:1]}, "ranges is .* here and .* there"),
        ({"config": replace(CONFIG, epochs=3)}, "epochs is 3 here and 2 there"),
        ({"config": replace(CONFIG, optimizer="sgd")}, "optimizer is 'sgd' here and 'adam' there"),
    ):
        refused(settings, folder, said, resume=True, **changed)
    refused(settings, folder, "data-sha256 is", resume=True, dataset=False, config=replace(CONFIG, dataset="digits"))
    searched(settings, folder, resume=True, ranks_per_trial=1, config=replace(CONFIG, log_every=3))


def test_a_folder_with_other_content_is_refused_and_not_changed(tmp_path):
    (tmp_path / "file").write_text("x")
    refused(RANDOM, tmp_path / "file", "is not a folder")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "letter").write_text("x")
    refused(RANDOM, tmp_path / "folder", "is not empty")
    refused(RANDOM, tmp_path / "folder", "holds no search, but other files", resume=True)
    refused(RANDOM, tmp_path / "file" / "below", "cannot be used")
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "search.json").symlink_to(tmp_path / "file")
    refused(RANDOM, tmp_path / "linked", "is a symbolic link", resume=True)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda text: text[:-20],
        lambda text: text.replace('"steps": 6', '"steps": "6"', 1),
        lambda text: text.replace('"trial": 1', '"trial": 2', 1),
        lambda text: text + text.splitlines()[-1],
        lambda text: "[" * 100_000,
    ],
    ids=["torn", "another kind", "another trial", "one too many", "nested"],
)
def test_damaged_results_are_named_and_not_changed(undisturbed, tmp_path, spoil):
    folder = tmp_path / "search"
    folder.mkdir()
    (folder / "search.json").write_bytes((undisturbed / "random" / "search.json").read_bytes())
    whole = (undisturbed / "random" / "results.jsonl").read_text()
    (folder / "results.jsonl").write_text(spoil(whole))
    assert (folder / "results.jsonl").read_text() != whole
    refused(RANDOM, folder, "results.jsonl is damaged", kind=DamagedFileError, resume=True)


@pytest.mark.parametrize("content", ["[1]", "{", "[" * 100_000], ids=["a list", "torn", "nested"])
def test_damaged_settings_are_named(tmp_path, content):
    (tmp_path / "search").mkdir()
    (tmp_path / "search" / "search.json").write_text(content)
    refused(RANDOM, tmp_path / "search", "search.json is damaged", kind=DamagedFileError, resume=True)


def test_two_searches_cannot_share_a_folder(tmp_path, monkeypatch):
    folder = tmp_path / "search"

    def meanwhile(*arguments, **keywords):
        with pytest.raises(UserError, match="is in use by another search: wait for it, or give another"):
            searched(RANDOM, folder, resume=True)
        raise KeyboardInterrupt

    monkeypatch.setattr(trials, "train", meanwhile)
    with pytest.raises(KeyboardInterrupt):
        searched(RANDOM, folder)


def test_a_full_disk_at_the_start_is_named(tmp_path, monkeypatch):
    def full(path, *parts):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("distdl.search.folder.files.write_durably", full)
    refused(RANDOM, tmp_path / "search", r"cannot write .*search\.json: No space left on device; make room")


def test_a_resume_without_a_search_says_so(tmp_path, monkeypatch, capsys):
    def stopped(*arguments, **keywords):
        (tmp_path / "search" / "trials" / "any" / "checkpoints" / "any").mkdir(parents=True, exist_ok=True)
        raise KeyboardInterrupt

    monkeypatch.setattr(trials, "train", stopped)
    for begins in (True, False):
        with pytest.raises(KeyboardInterrupt):
            searched(RANDOM, tmp_path / "search", resume=True)
        assert ("there is no search in" in capsys.readouterr().out) is begins


def test_a_search_that_its_first_training_refuses_leaves_nothing(tmp_path):
    deep = replace(CONFIG, model="no_such_net")
    refused(RANDOM, tmp_path / "new" / "search", "unknown model 'no_such_net'", config=deep)
    (tmp_path / "empty").mkdir()
    refused(RANDOM, tmp_path / "empty", "unknown model 'no_such_net'", config=deep)
    refused(RANDOM, tmp_path / "search", "unknown dataset", dataset=False, config=replace(CONFIG, dataset="digitz"))
    refused(RANDOM, tmp_path / "search", "--ranks-per-trial 2 is more than the 1 rank of this job", ranks_per_trial=2)


def test_a_user_s_own_model_is_searched_by_name_and_a_bad_one_is_refused_before_the_folder_exists(tmp_path):
    (tmp_path / "own.py").write_text(
        "from distdl import nn\n\ndef net(shape, outputs):\n"
        "    return nn.Sequential([nn.Flatten(), nn.Affine(outputs)], shape)\n\n"
        "def bad(shape, outputs): return shape[7]\n"
    )
    short = replace(RANDOM, rounds=1, trials=2)
    by_name = searched(short, tmp_path / "search", config=replace(CONFIG, model=f"{tmp_path / 'own.py'}:net"))
    short = replace(short, out=tmp_path / "script")
    by_script = search(short, OneProcess(), build_network=ink, dataset=piece_of_digits(ROWS))
    written = json.loads((by_script.folder / "search.json").read_bytes())["config"]
    assert (written["model"], written["dataset"]) == (f"{__name__}:ink", piece_of_digits(ROWS).name)
    assert [one.weights_sha256 for one in by_name.results] == [one.weights_sha256 for one in by_script.results]
    bad = replace(CONFIG, model=f"{tmp_path / 'own.py'}:bad")
    refused(
        RANDOM, tmp_path / "new", "own.py:bad raised IndexError: tuple index out of range .line 6 of own.py", config=bad
    )


@pytest.mark.mpi(min_size=2)
def test_groups_that_build_different_networks_are_refused(communicator, shared_tmp_path):
    """A model's file may differ between hosts. No other check compares the groups, because each trains alone."""

    def network(shape, outputs):
        between = nn.Tanh if communicator.rank == 1 else nn.ReLU
        return nn.Sequential([nn.Flatten(), nn.Affine(9), between(), nn.Affine(outputs)], shape)

    settings, data = replace(RANDOM, out=shared_tmp_path / "search"), piece_of_digits(ROWS)
    with pytest.raises(
        UserError, match=r"the network .*\.network of rank 1 is not that of rank 0: give every host the same files"
    ) as raised:
        search(settings, communicator, build_network=network, dataset=data)
    assert raised.value.agreed
    assert not (shared_tmp_path / "search").exists()
    remove(communicator, shared_tmp_path)


@pytest.mark.mpi(min_size=3)
def test_more_ranks_for_a_trial_than_micro_batches_are_refused_on_all_ranks(communicator, shared_tmp_path):
    settings = replace(RANDOM, ranges=(Range("batch_size", 8, 32),), config=replace(CONFIG, micro_batch_size=4))
    with pytest.raises(UserError, match="3 ranks cannot share a trial whose batch has 2 micro-batches") as raised:
        searched(settings, shared_tmp_path / "search", communicator, ranks_per_trial=3)
    assert raised.value.agreed
    assert not (shared_tmp_path / "search").exists()
    remove(communicator, shared_tmp_path)


FLAGS = ["--range", "lr=1e-4:1e-1:log", "--range", "weight-decay=1e-8:1e-4:log", "--rounds", "2", "--trials", "3"]
REST = ["--", "--model", "mlp", "--epochs", "1"]

#: A search that kills a rank when it begins its n-th training.
KILLED = """
import os, signal, sys
from distdl import cli
from distdl.search import __main__ as search
from distdl.job.launched_by import read_launch
cli.set_blas_threads(1)
from distdl.search import trials

def main(arguments):
    train, calls = trials.train, []

    def trapped(*given, **named):
        calls.append(1)
        if [read_launch().rank, len(calls)] == [int(word) for word in arguments[:2]]:
            os.kill(os.getpid(), signal.SIGKILL)
        return train(*given, **named)

    trials.train = trapped
    return search.main(arguments[2:])

sys.exit(cli.run(main))
"""


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_costs_no_trial(run_job, survives, tmp_path, rank):
    """With Open MPI the survivors continue. Otherwise the job ends, and a resume in one process continues."""
    (tmp_path / "program.py").write_text(KILLED)
    words = [*FLAGS, "--out", str(tmp_path / "search")]
    program = [sys.executable, str(tmp_path / "program.py"), str(rank), "2", *words, *REST]
    done = run_job(mpirun_command(2, program), timeout=100)
    if survives:
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("a rank was lost; 1 rank continues") == 1
        assert done.stdout.splitlines()[-1].startswith("best: ")
    else:
        assert done.returncode != 0
        assert not (tmp_path / "search" / "summary.json").exists()
    assert command.main([*words, "--resume", *REST]) == 0
    assert command.main([*FLAGS, "--out", str(tmp_path / "undisturbed"), *REST]) == 0
    assert files(tmp_path / "search") == files(tmp_path / "undisturbed")


def test_under_mpirun_an_error_is_printed_once(run_job, tmp_path):
    words = [*FLAGS, "--ranks-per-trial", "3", "--out", str(tmp_path / "search"), *REST]
    done = run_job(mpirun_command(2, [sys.executable, "-m", "distdl.search", *words]), timeout=60, cwd=tmp_path)
    assert done.returncode == 2
    said = "distdl: error: --ranks-per-trial 3 is more than the 2 ranks of this job"
    assert (done.stdout + done.stderr).count(said) == 1
    assert (done.stdout + done.stderr).count("distdl: ") == 1
    assert list(tmp_path.iterdir()) == []


def test_the_command_of_the_documentation_is_valid():
    page = (Path(__file__).parents[2] / "docs" / "search.md").read_text(encoding="utf-8")
    [line] = [line for line in page.splitlines() if line.startswith("    ") and "distdl.search" in line]
    words = shlex.split(line)
    settings = command.parse(words[words.index("--") + 1 :])
    assert (settings.config.model, settings.config.epochs) == ("mlp", 5)
    assert (settings.rounds, settings.trials, settings.share) == (3, 16, 0.25)


def test_help_lists_what_can_be_searched():
    done = subprocess.run(
        [sys.executable, "-m", "distdl.search", "--help"], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0
    assert "--ranks-per-trial" in done.stdout
    assert "weight_decay" in done.stdout
