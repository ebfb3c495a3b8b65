"""Give more than five hundred wrong command lines, settings, datasets, checkpoints and folders to one process.

Each must end with exit code 2 (wrong input) or 3 (a damaged file) and one line that names the error. The command prints
nothing else, changes no file, and uses little memory.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import refused_data
import refused_runs
import refused_settings
from bad_inputs import TINY, mnist_files, without_launcher, write_files
from refusals import USER, outcome, problems_of
from refused_runs import RunShop

from distdl.job.launched_by import read_launch

pytestmark = pytest.mark.skipif(read_launch().size > 1, reason="starts trainings of one process")

LEAST_CASES = 500

FAMILIES = [*refused_settings.FAMILIES, *refused_data.FAMILIES, *refused_runs.FAMILIES]

CASES_RUN: dict[str, set[str]] = {}


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.__name__)
def test_bad_input_is_refused_in_one_line_and_changes_no_file(family, workshop):
    names, failures = [], []
    for case in family(workshop):
        names.append(case.name)
        failures += [f"{case.name}: {'; '.join(problems)}" for problems in [problems_of(case)] if problems]
    CASES_RUN[family.__name__] = set(names)
    assert not failures, f"{len(failures)} of {len(names)} cases:\n" + "\n".join(failures)
    assert len(set(names)) == len(names), "two cases have the same name"


def test_more_than_five_hundred_cases_ran():
    if len(CASES_RUN) < len(FAMILIES):
        pytest.skip("only some of the families ran")
    assert sum(map(len, CASES_RUN.values())) >= LEAST_CASES


def test_a_wrong_flag_is_reported_before_numpy_or_mpi_are_imported():
    import subprocess
    import sys

    program = (
        "import sys; from distdl import cli, train_command; code = cli.run(train_command.main, ['--epocs', '3']); "
        "sys.exit(code if not {'numpy', 'mpi4py'} & sys.modules.keys() else 99)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        check=False,
        text=True,
        timeout=60,
        env={**without_launcher(os.environ), "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert done.returncode == USER
    assert done.stderr == "distdl: error: unknown flag --epocs: did you mean --epochs?\n"


# Similar input that is accepted


@pytest.mark.parametrize("how", [["--resume=run"], ["--resume=auto", "--run-dir=run"]])
def test_the_checkpoint_before_a_damaged_one_is_used_and_the_damaged_one_named(workshop, how):
    shop = RunShop(workshop)
    receipt = [line for line in outcome(["--resume=run"])[1].splitlines() if "sha256" in line]
    damaged = bytearray(shop.whole)
    damaged[-5] ^= 4
    shop.newest.write_bytes(bytes(damaged))
    code, out, err, _ = outcome(how)
    assert code == 0
    assert err.startswith("distdl: warning: ")
    assert len(err.splitlines()) == 1
    assert str(shop.newest.relative_to(workshop)) in err
    assert "damaged" in err
    assert shop.paths[-2].name in out
    assert [line for line in out.splitlines() if "sha256" in line] == receipt
    assert shop.newest.read_bytes()[-8:] == shop.whole[-8:], "written again"


def test_each_of_several_damaged_checkpoints_is_named(workshop):
    shop = RunShop(workshop, "--checkpoint-every=1", "--keep-checkpoints=5")
    for path in shop.paths[-2:]:
        path.write_bytes(b"")
    code, _, err, _ = outcome(["--resume=run"])
    assert code == 0
    assert [path.name in err for path in shop.paths[-3:]] == [False, True, True]
    assert len(err.splitlines()) == 2


def test_the_config_file_of_a_run_can_be_read_with_any_folder_name(workshop):
    for name in ("emoji \U0001f600", 'quote " and \\', "delete \x7f bell \x07", "line\nbreak"):
        folder = write_files(workshop / name, mnist_files())
        arguments = [*TINY, "--dataset=mnist", f"--data-dir={folder}", f"--run-dir={workshop}/run {name}"]
        assert outcome([*arguments, "--max-steps=1"])[0] == 0
        assert outcome([f"--resume={workshop}/run {name}", "--epochs=1"])[0] == 0


def test_a_resume_without_max_steps_continues_to_the_end(workshop):
    write_files(workshop / "data", mnist_files())
    assert outcome([*TINY, "--dataset=mnist", "--data-dir=data", "--run-dir=run", "--max-steps=1"])[0] == 0
    code, out, err, _ = outcome(["--resume=run"])
    assert (code, err) == (0, "")
    assert "test accuracy" in out


def test_a_resume_may_stop_at_the_current_step(workshop):
    shop = RunShop(workshop, "--max-steps=2")
    code, out, err, _ = outcome(["--resume=run", "--max-steps=2"])  # as a second start of the same job does
    assert (code, err) == (0, "")
    assert "weights sha256: " in out
    assert shop.newest.read_bytes() == shop.whole
