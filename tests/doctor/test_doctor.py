"""The doctor as a command, alone and under the mpirun of this environment; it ends, whatever is wrong."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from distdl.doctor import examination, supervisor
from distdl.doctor.supervisor import examined
from distdl.errors import UserError
from distdl.job import probes
from distdl.job.mpirun_command import environment_for, mpirun_command
from distdl.job.processes import look_at

DOCTOR = [sys.executable, "-m", "distdl.doctor"]
ALONE = {"launcher", "hosts", "cores", "threads", "shared memory", "arithmetic", "versions", "run folder", "locks"}


def levels(done):
    """Return the level of each check of a report in JSON."""
    assert done.stderr == ""
    report = json.loads(done.stdout)
    assert report["exit_code"] == done.returncode
    return {finding["check"]: finding["level"] for finding in report["findings"]}


@pytest.fixture
def doctor(run_program, tmp_path):
    """Return a function that runs the doctor in an empty folder, without a launcher unless `before` names one."""

    def run(*flags, before=(), **variables):
        return run_program([*before, *DOCTOR, *flags], cwd=tmp_path, env=os.environ | variables, timeout=120)

    return run


def test_one_process_is_examined_without_a_launcher(doctor, tmp_path):
    done = doctor("--json", "--run-dir", "new/run")
    found = levels(done)
    assert found.keys() == ALONE
    assert "broken" not in found.values(), done.stdout
    assert list(tmp_path.iterdir()) == []


def test_the_report_fits_80_columns_and_ends_with_a_verdict(doctor):
    done = doctor()
    lines = done.stdout.splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[-1].startswith(("fine: ", "works, but "))
    assert done.stdout.isascii()


def test_two_ranks_are_examined_together(run_job, tmp_path):
    done = run_job(mpirun_command(2, [*DOCTOR, "--json", "--ranks", "2"]), timeout=120, cwd=tmp_path)
    found = levels(done)
    assert found.keys() == ALONE | {"memory access", "within a host", "failures"}
    assert "broken" not in found.values(), done.stdout
    assert "2 ranks" in done.stdout


def test_more_ranks_than_cores_work_but_slowly(run_job, tmp_path):
    done = run_job(mpirun_command(3, ["taskset", "-c", one_core(), *DOCTOR, "--json"]), timeout=120, cwd=tmp_path)
    assert levels(done)["cores"] == "slow"
    assert done.returncode == 1


def one_core():
    return str(min(os.sched_getaffinity(0)))


def test_a_wrong_number_of_ranks_is_broken(run_job, tmp_path):
    done = run_job(mpirun_command(2, [*DOCTOR, "--ranks", "3"]), timeout=120, cwd=tmp_path)
    assert done.returncode == 2
    assert "3 ranks are expected, MPI has 2" in done.stdout


@pytest.mark.usefixtures("needs_mpirun")
@pytest.mark.parametrize(
    ("name", "variables", "fix"),
    [
        ("hydra_pmi_proxy", {"PMI_RANK": "0", "PMI_SIZE": "2"}, "-m distdl.mpirun -n 2"),
        ("slurmstepd", {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "2"}, "srun --mpi=pm"),
    ],
    ids=["mpirun", "srun"],
)
def test_a_launcher_that_does_not_fit_is_named_with_the_right_one(doctor, name, variables, fix, tmp_path):
    launcher = tmp_path / name
    launcher.write_text('#!/bin/sh\n"$@"\nexit $?\n')
    launcher.chmod(0o755)
    done = doctor("--timeout", "20", before=[launcher], **variables)
    assert done.returncode == 2
    assert "broken  launcher" in done.stdout
    assert fix in done.stdout[done.stdout.index("fix: ") :]


@pytest.mark.usefixtures("needs_mpirun")
def test_variables_left_over_from_another_job_are_named(doctor):
    done = doctor("--timeout", "20", OMPI_COMM_WORLD_RANK="0", OMPI_COMM_WORLD_SIZE="2")
    assert done.returncode == 2
    assert "OMPI_COMM_WORLD_RANK=0" in done.stdout
    assert "unset" in done.stdout[done.stdout.index("fix: ") :]


def test_a_rank_that_does_not_start_is_named_in_time(needs_mpirun, tmp_path):
    """Rank 1 never starts MPI. Without the limit, rank 0 would wait forever."""
    command = mpirun_command(1, [*DOCTOR, "--timeout", "8", ":", "-n", "1", "sleep", "300"])
    started = time.monotonic()
    done = subprocess.run(
        command.argv,
        env=environment_for(command),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert time.monotonic() - started < 90
    # MPICH's launcher kills rank 1, and rarely returns this instead of the code of rank 0.
    assert done.returncode == 2 or (done.returncode, "Killed (signal 9)" in done.stdout) == (9, True), done.stderr
    assert "waited 8 s for 1 other rank to start MPI" in " ".join(done.stdout.split())
    assert "fine    arithmetic" in done.stdout  # the facts so far


def test_the_launcher_starts_no_training_that_the_doctor_calls_broken(run_program, needs_mpirun, tmp_path):
    words = ["-m", "distdl.mpirun", "-n", "2", "--doctor", "--module", "program", "--", "--run-dir", "/proc/no/run"]
    (tmp_path / "program.py").write_text("print('started')")
    done = run_program([sys.executable, *words], cwd=tmp_path, timeout=120)
    assert (done.returncode, "started" in done.stdout) == (2, False)
    assert "broken  run folder" in done.stdout
    done = run_program([sys.executable, *words[:-2]], cwd=tmp_path, timeout=120)
    assert (done.returncode, done.stdout.count("started")) == (0, 2), done.stdout + done.stderr
    assert "broken" not in done.stdout


def test_a_folder_without_access_is_broken(doctor, tmp_path):
    done = doctor("--json", "--run-dir", "/proc/no/run")
    assert levels(done)["run folder"] == "broken"


def test_a_folder_below_a_file_or_a_dead_link_cannot_be_written(tmp_path):
    from distdl.doctor import meeting
    from distdl.parallel.communicator import OneProcess

    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to("nowhere")
    alone = OneProcess()
    for name in ("file", "file/run", "link", "link/run"):
        facts, _ = meeting.check_folder(alone, alone, tmp_path / name)
        assert facts["error"].startswith(f"{tmp_path / name.partition('/')[0]}: ")
    facts, _ = meeting.check_folder(alone, alone, tmp_path / "new" / "run")
    assert facts["error"] is None


@pytest.mark.parametrize(("flag", "said"), [("--timeout=0", "--timeout 0: expected 1"), ("--ranks=-2", "--ranks -2: ")])
def test_a_wrong_number_is_one_line(doctor, flag, said):
    done = doctor(flag)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert said in done.stderr


def small_shared_memory(size):
    """Return the beginning of a command line with this much shared memory; skip the test if that is not possible."""
    script = f'mount -t tmpfs -o size={size} tmpfs /dev/shm && exec "$@"'
    start = ["unshare", "--mount", "sh", "-c", script, "sh"]
    if shutil.which("unshare") is None or subprocess.run([*start, "true"], capture_output=True, check=False).returncode:
        pytest.skip("no mount namespaces here")
    return start


@pytest.mark.parametrize("size", ["2m", "60m"])
def test_small_shared_memory_is_named_even_if_mpi_ends_by_a_bus_error(run_program, size, needs_mpirun, tmp_path):
    command = mpirun_command(2, [*DOCTOR, "--timeout", "30"])
    start = small_shared_memory(size)
    done = run_program([*start, *command.argv], env=environment_for(command), cwd=tmp_path, timeout=120)
    said = done.stdout + done.stderr  # the launcher may end rank 0 before its report; then another rank speaks
    assert "MB free in /dev/shm" in said
    assert "--shm-size=" in said
    assert done.returncode != 0


# the parts


@pytest.mark.parametrize(
    ("fail", "failure", "error"),
    [(signal.pause, r"waited \d+ s for nobody", None), (lambda: raising(UserError("no room")), None, "no room")],
    ids=["waits", "raises"],
)
def test_a_failed_child_lives_until_the_report_is_written(fail, failure, error):
    """Its end may end the job: a launcher kills all processes when it loses the connection to one."""

    def examine(tell):
        tell.facts(pid=os.getpid())
        tell.stage("nobody")
        fail()

    outcome = examined(examine, 0.5, notices=False, name="rank 0")
    assert outcome.failure is None if failure is None else re.fullmatch(failure, outcome.failure)
    assert outcome.facts.get("error") == error
    child = look_at(outcome.facts["pid"])
    assert child is not None
    outcome.end_child()
    assert not child.lives


@pytest.mark.parametrize(
    ("end", "failure", "error"),
    [
        (lambda: os.kill(os.getpid(), signal.SIGKILL), "ended by SIGKILL during: MPI to start", None),
        (lambda: os._exit(7), "ended with code 7 during: MPI to start", None),
        (lambda: raising(UserError("no room")), None, "no room"),
        (lambda: raising(ImportError("no numpy")), None, "ImportError: no numpy"),
    ],
    ids=["signal", "exit", "user error", "import error"],
)
def test_every_end_of_the_child_is_reported(end, failure, error):
    def examine(tell):
        tell.facts(library="MPICH")
        tell.stage("MPI to start")
        end()

    outcome = examined(examine, 20, notices=False, name="rank 0")
    assert (outcome.failure, outcome.facts.get("error")) == (failure, error)
    assert outcome.facts["library"] == "MPICH"
    outcome.end_child()


def raising(error):
    raise error


def test_a_long_stage_is_named_before_it_is_ended(monkeypatch, capsys):
    monkeypatch.setattr(supervisor, "SECONDS_TO_NOTICE", 0.1)

    def examine(tell):
        tell.stage("3 other ranks to start MPI")
        signal.pause()

    examined(examine, 1.2, notices=True, name="rank 0 on n1").end_child()
    said = capsys.readouterr().err
    assert re.fullmatch(r"distdl: doctor: rank 0 on n1 has waited \d+ s for 3 other ranks to start MPI\n", said)


def test_the_facts_of_this_process_need_no_numpy(run_program):
    program = "import sys; from distdl.doctor.examination import of_process; of_process()\n"
    program += "from distdl.doctor import judgement, __main__\nprint({'numpy', 'mpi4py'} & sys.modules.keys())"
    assert run_program([sys.executable, "-c", program], timeout=60).stdout == "set()\n"


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({"cpu.max": "150000 100000\n"}, 1.5),
        ({"cpu.max": "max 100000\n"}, None),
        ({"cpu/cpu.cfs_quota_us": "200000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 2.0),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
        ({}, None),
    ],
)
def test_the_time_limit_of_a_container_is_read(tmp_path, files, cores):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert examination.cpu_quota(tmp_path) == cores


def test_thread_variables_are_those_of_the_user(doctor):
    done = doctor("--json", OMP_NUM_THREADS="8")
    [found] = [one for one in json.loads(done.stdout)["findings"] if one["check"] == "threads"]
    assert (found["level"], "OMP_NUM_THREADS=8 has no effect" in found["text"]) == ("fine", True)


@pytest.mark.mpi
def test_rank_0_gathers_each_value_once(communicator):
    from distdl.doctor.meeting import gathered

    found = gathered(communicator, {"rank": communicator.rank, "text": "x" * communicator.rank})
    expected = [{"rank": rank, "text": "x" * rank} for rank in range(communicator.size)]
    assert found == (expected if communicator.rank == 0 else [])


@pytest.mark.mpi
def test_the_ranks_of_a_host_read_each_others_memory(communicator):
    from distdl.doctor.meeting import memory_access

    assert memory_access(communicator.host()) is None


def test_memory_of_a_missing_process_cannot_be_read():
    assert probes.error_of_reading(2**22 + 1, 4096) == errno.ESRCH


@pytest.mark.mpi
def test_every_host_sees_the_folder_of_rank_0(communicator, shared_tmp_path):
    from distdl.doctor.meeting import check_folder

    facts, seen = check_folder(communicator, communicator.host(), shared_tmp_path / "new" / "run")
    communicator.barrier()
    assert seen
    assert (facts is None) == (communicator.rank > 0)
    if facts is not None:
        assert (facts["error"], facts["lock_error"]) == (None, None)
        assert list(Path(shared_tmp_path).iterdir()) == []
