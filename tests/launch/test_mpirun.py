"""The start of jobs, with pretended MPIs and with the `mpirun` of this environment."""

from __future__ import annotations

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest

from distdl import cli, mpirun
from distdl.errors import UserError
from distdl.job.mpirun_command import environment_for, find_mpirun, mpirun_command

REPOSITORY = Path(mpirun.__file__).parents[1]
VERSIONS = {
    "mpich": "HYDRA build details:\\n    Version:                                 4.3.0",
    "intel": "Intel(R) MPI Library for Linux* OS, Version 2021.11 Build 20231005 (id: 74c4a23)",
    "openmpi4": "mpirun (Open MPI) 4.1.4\\n\\nReport bugs to http://www.open-mpi.org/community/help/",
    "openmpi4-debian": "mpirun.openmpi (OpenRTE) 4.1.4",
    "openmpi5": "mpirun (Open MPI) 5.0.11",
    "openmpi10": "mpirun (Open MPI) 10.0.0",
}
AS_ROOT = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
PLACEMENT = {
    4: {"OMPI_MCA_rmaps_base_oversubscribe": "1", "OMPI_MCA_hwloc_base_binding_policy": "none"},
    5: {
        "PRTE_MCA_rmaps_default_mapping_policy": "slot:oversubscribe",
        "PRTE_MCA_hwloc_default_binding_policy": "none",
        "PRTE_MCA_oob_tcp_keepalive_time": "20",
        "PRTE_MCA_oob_tcp_keepalive_intvl": "5",
        "PRTE_MCA_oob_tcp_keepalive_probes": "5",
    },
}


def write_program(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


class PretendedEnvironment:
    """An environment with an `mpirun` that prints its version or else its arguments."""

    def __init__(self, folder: Path) -> None:
        self.mpirun = folder / "bin" / "mpirun"

    def install(self, version: str) -> None:
        write_program(
            self.mpirun,
            f"""#!/bin/sh
if [ "$1" = --version ]; then printf '{VERSIONS[version]}\\n'; exit 0; fi
for argument in "$0" "$@"; do printf '%s\\n' "$argument"; done
""",
        )


@pytest.fixture
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PretendedEnvironment:
    """Pretend that Python is in an environment without MPI, and that the user is not root."""
    for variable in [*AS_ROOT, *PLACEMENT[4], *PLACEMENT[5], "SLURM_STEP_ID", "SLURM_OVERLAP"]:
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bin" / "python"))
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    return PretendedEnvironment(tmp_path)


def test_the_mpirun_next_to_python_precedes_the_one_on_the_path(
    environment: PretendedEnvironment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_path = write_program(tmp_path / "system" / "mpirun", "#!/bin/sh\n")
    monkeypatch.setenv("PATH", str(on_path.parent))
    assert find_mpirun() == on_path
    environment.install("mpich")
    assert find_mpirun() == environment.mpirun


@pytest.mark.usefixtures("environment")
def test_without_mpirun_one_line_names_a_package_to_install(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match=r"pip install 'distdl-mpi\[mpich\]'"):
        find_mpirun()
    assert cli.run(mpirun.main, ["-n", "2", "--module", "json"]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("distdl: error: no mpirun")
    assert printed.err.count("\n") == 1


@pytest.mark.parametrize("version", ["mpich", "intel"])
@pytest.mark.parametrize("user", [0, 1000])
def test_relatives_of_mpich_need_only_the_number_of_ranks(
    environment: PretendedEnvironment, version: str, user: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment.install(version)
    monkeypatch.setattr(os, "geteuid", lambda: user)
    launch = mpirun_command(64, ["python", "-m", "distdl.train"])
    assert launch.argv == [str(environment.mpirun), "-n", "64", "python", "-m", "distdl.train"]
    assert launch.environment == {}


@pytest.mark.parametrize("version", ["openmpi4", "openmpi4-debian"])
def test_open_mpi_4_may_share_cores_and_has_no_ulfm(environment: PretendedEnvironment, version: str) -> None:
    environment.install(version)
    launch = mpirun_command(3, ["python"])
    assert launch.argv == [str(environment.mpirun), "-n", "3", "python"]
    assert launch.environment == PLACEMENT[4]


@pytest.mark.parametrize("version", ["openmpi5", "openmpi10"])
def test_open_mpi_from_5_on_may_share_cores_and_survives_failures(
    environment: PretendedEnvironment, version: str
) -> None:
    environment.install(version)
    launch = mpirun_command(3, ["python"])
    assert launch.argv == [str(environment.mpirun), "--with-ft", "ulfm", "-n", "3", "python"]
    assert launch.environment == PLACEMENT[5]


@pytest.mark.parametrize("version", [4, 5])
def test_only_root_tells_open_mpi_that_root_may_run(
    environment: PretendedEnvironment, version: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment.install(f"openmpi{version}")
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert mpirun_command(1, ["python"]).environment == AS_ROOT | PLACEMENT[version]


def test_variables_of_the_user_are_kept(environment: PretendedEnvironment, monkeypatch: pytest.MonkeyPatch) -> None:
    environment.install("openmpi5")
    monkeypatch.setenv("PRTE_MCA_hwloc_default_binding_policy", "core")
    launch = mpirun_command(2, ["python"])
    kept = "PRTE_MCA_hwloc_default_binding_policy"
    assert launch.environment == {name: value for name, value in PLACEMENT[5].items() if name != kept}
    whole = environment_for(launch)
    assert whole["PRTE_MCA_hwloc_default_binding_policy"] == "core"
    assert whole["PRTE_MCA_rmaps_default_mapping_policy"] == "slot:oversubscribe"
    assert whole.items() >= dict(os.environ).items()


@pytest.mark.parametrize("version", ["mpich", "intel", "openmpi4", "openmpi5"])
def test_in_a_shell_that_srun_started_the_daemons_share_its_cores(
    environment: PretendedEnvironment, version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment.install(version)
    elsewhere = mpirun_command(2, ["python"]).environment
    assert "SLURM_OVERLAP" not in elsewhere
    monkeypatch.setenv("SLURM_STEP_ID", "0")
    assert mpirun_command(2, ["python"]).environment == {"SLURM_OVERLAP": "1", **elsewhere}
    monkeypatch.setenv("SLURM_OVERLAP", "0")
    assert mpirun_command(2, ["python"]).environment == elsewhere


@pytest.mark.parametrize("ranks", [0, -3])
def test_fewer_ranks_than_one_are_refused(environment: PretendedEnvironment, ranks: int) -> None:
    environment.install("mpich")
    with pytest.raises(UserError, match=f"cannot start {ranks} ranks"):
        mpirun_command(ranks, ["python"])


@pytest.mark.parametrize("text", ["#!/bin/sh\nexit 127\n", "#!/nowhere/sh\n"])
def test_an_mpirun_that_does_not_work_is_named(environment: PretendedEnvironment, text: str) -> None:
    write_program(environment.mpirun, text)
    with pytest.raises(UserError, match=f"{environment.mpirun} does not work"):
        mpirun_command(2, ["python"])


def test_an_mpirun_that_fails_is_quoted(environment: PretendedEnvironment) -> None:
    write_program(environment.mpirun, "#!/bin/sh\necho 'Unable to get the\nuser home directory' >&2\nexit 1\n")
    with pytest.raises(UserError, match="does not work; it says: Unable to get the user home directory: reinstall"):
        mpirun_command(2, ["python"])


def test_an_mpirun_without_permission_is_named_with_the_line_that_gives_it(environment: PretendedEnvironment) -> None:
    write_program(environment.mpirun, "#!/bin/sh\n").chmod(0o644)
    with pytest.raises(UserError, match=f"{environment.mpirun} has no execute permission: chmod"):
        find_mpirun()


@pytest.mark.parametrize("known", [True, False], ids=["a user", "a user that the system does not know"])
def test_without_a_home_open_mpi_gets_one(
    environment: PretendedEnvironment, known: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_program(
        environment.mpirun,
        """#!/bin/sh
[ -d "$HOME" ] || { echo 'Unable to get the user home directory' >&2; exit 1; }
echo 'mpirun (Open MPI) 5.0.9'
""",
    )
    users = {1000: SimpleNamespace(pw_dir=str(tmp_path))} if known else {}
    monkeypatch.setattr("pwd.getpwuid", users.__getitem__)
    monkeypatch.delenv("HOME", raising=False)
    expected = str(tmp_path) if known else tempfile.gettempdir()
    assert mpirun_command(2, ["python"]).environment["HOME"] == expected
    monkeypatch.setenv("HOME", expected)
    assert "HOME" not in mpirun_command(2, ["python"]).environment


@pytest.mark.parametrize("version", ["mpich", "openmpi4", "openmpi5"])
def test_the_dry_run_line_does_the_same_when_pasted_into_a_shell(
    environment: PretendedEnvironment, version: str, capsys: pytest.CaptureFixture[str]
) -> None:
    environment.install(version)
    flags = ["--run-dir", "my runs/$HOME", "it's"]
    assert mpirun.main(["-n", "4", "--dry-run", "--module", "json", "--", *flags]) == 0
    line = capsys.readouterr().out
    assert line.count("\n") == 1

    launch = mpirun_command(4, [sys.executable, "-m", "json", *flags])
    variables = [f"{name}={value}" for name, value in launch.environment.items()]
    assert shlex.split(line) == (["env", *variables] if variables else []) + launch.argv
    pasted = subprocess.run(
        ["/bin/sh", "-c", line], capture_output=True, text=True, check=True, env={"PATH": os.defpath}
    )
    assert pasted.stdout.splitlines() == launch.argv


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "required: -n"),
        (["-n", "four"], "'four'"),
        (["--module", "json", "-n", "0"], "cannot start 0 ranks"),
        (["-n", "2", "--epochs", "3"], "after --"),
        (["-n", "2", "--dry"], "--dry"),
        (["-n", "2", "--module", "distdl.nothing"], "no Python module 'distdl.nothing'"),
        (["-n", "2", "--module", "nowhere.at_all"], "no Python module 'nowhere.at_all'"),
        (["-n", "2", "--restarts", "-1"], "cannot restart -1 times"),
        (["-n", "2", "--restarts", "1", "--module", "distdl.search"], "--restarts is for trainings, and distdl.search"),
        (["-n", "2", "--restarts", "1", "--module", "distdl.evaluate"], "leave it out"),
        (["-n", "2", "--module", ""], "no Python module ''"),
    ],
)
def test_a_wrong_flag_is_one_line_and_exit_2(
    environment: PretendedEnvironment,
    arguments: list[str],
    said: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    environment.install("mpich")
    assert cli.run(mpirun.main, arguments) == 2
    printed = capsys.readouterr()
    assert said in printed.err
    assert printed.err.count("\n") == 1
    assert printed.out == ""


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("-- predict my-run photos", "distdl.predict my-run photos"),
        ("-- train --epochs 3", "distdl.train --epochs 3"),
        ("-- search --trials 3", "distdl.search --trials 3"),
        ("-- --run-dir predict", "distdl.train --run-dir predict"),
        ("--module distdl.evaluate -- predict", "distdl.evaluate predict"),
        ("-- mpirun", "distdl.train mpirun"),
    ],
)
def test_a_command_after_the_dashes_means_its_module(
    environment: PretendedEnvironment, capsys: pytest.CaptureFixture[str], words: str, expected: str
) -> None:
    environment.install("mpich")
    assert mpirun.main(["-n", "2", "--dry-run", *words.split()]) == 0
    assert capsys.readouterr().out.endswith(f" -m {expected}\n")


def test_restarts_are_refused_for_a_command_that_does_not_train() -> None:
    with pytest.raises(UserError, match="predict is not a training"):
        mpirun.main(["-n", "2", "--restarts", "1", "--", "predict", "my-run", "photos"])


def test_the_launcher_imports_neither_numpy_nor_mpi() -> None:
    program = "import sys, distdl.mpirun; print(sorted({'numpy', 'mpi4py'} & set(sys.modules)))"
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=REPOSITORY)
    assert answer.stdout == "[]\n"


# The real mpirun


def has_mpirun() -> bool:
    try:
        find_mpirun()
    except UserError:
        return False
    return True


real = pytest.mark.skipif(not has_mpirun(), reason="this environment has no mpirun")

RANK = "int(os.environ.get('OMPI_COMM_WORLD_RANK', os.environ.get('PMI_RANK', '-1')))"


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a working folder. Every rank can import its modules and distdl."""
    monkeypatch.setenv("PYTHONPATH", f"{REPOSITORY}{os.pathsep}{tmp_path}")
    return tmp_path


def start(job: Path, ranks: int, program: str, *flags: str, supervised: Sequence[str] = ()) -> subprocess.Popen[str]:
    (job / "program_of_this_test.py").write_text(program)
    return subprocess.Popen(
        [
            *(sys.executable, "-m", "distdl.mpirun", "-n", str(ranks), *supervised),
            *("--module", "program_of_this_test", "--", *flags),
        ],
        cwd=job,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def exit_code_and_output(process: subprocess.Popen[str]) -> tuple[int, str]:
    with process:
        try:
            output, _ = process.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
    return process.returncode, output


@real
@pytest.mark.parametrize("supervised", [[], ["--restarts", "1"]], ids=["alone", "supervised"])
def test_files_of_a_killed_launcher_with_the_same_process_number_do_no_harm(
    job: Path, supervised: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(job))
    monkeypatch.setattr(tempfile, "tempdir", None)
    latest = subprocess.Popen(["true"])
    latest.wait()
    for pid in range(latest.pid + 1, latest.pid + 300):  # one of the next numbers will be the launcher's
        (job / f"ompi.{pid}").mkdir()
        (job / f"ompi.{pid}" / f"pmix.{socket.gethostname()}.tool").write_text("old")
    output = exit_code_and_output(start(job, 1, "print('started')", supervised=supervised))[1]
    assert "started" in output
    assert "listener thread" not in output


@real
def test_ranks_start_without_a_home(job: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HOME", raising=False)
    code, output = exit_code_and_output(start(job, 1, "print('started')"))
    assert (code, output) == (0, "started\n")


@real
def test_three_ranks_start_with_the_flags_as_they_were_given(job: Path) -> None:
    program = f"""
import json, os, pathlib, sys
pathlib.Path(f"rank-{{{RANK}}}.json").write_text(json.dumps(sys.argv[1:]))
"""
    flags = ["--run-dir", "a folder with spaces", "", "it's", "$HOME", "--", "*"]
    code, output = exit_code_and_output(start(job, 3, program, *flags))
    assert code == 0, output
    written = {path.name: json.loads(path.read_text()) for path in job.glob("rank-*.json")}
    assert written == {f"rank-{rank}.json": flags for rank in range(3)}


@real
def test_the_ranks_form_one_world(job: Path) -> None:
    program = """
import pathlib
from mpi4py import MPI
world = MPI.COMM_WORLD
pathlib.Path(f"rank-{world.rank}").write_text(str(world.allreduce(world.rank)))
"""
    code, output = exit_code_and_output(start(job, 3, program))
    assert code == 0, output
    assert {path.name: path.read_text() for path in job.glob("rank-*")} == {
        "rank-0": "3",
        "rank-1": "3",
        "rank-2": "3",
    }


@real
def test_the_exit_code_is_that_of_the_program(job: Path) -> None:
    code, _ = exit_code_and_output(start(job, 2, "raise SystemExit(7)"))
    assert code == 7


@real
def test_a_warning_signal_to_the_launcher_reaches_every_rank(job: Path) -> None:
    program = f"""
import os, pathlib, signal, time
warned = []
signal.signal(signal.SIGUSR1, lambda *_: warned.append(True))
pathlib.Path(f"ready-{{{RANK}}}").touch()
deadline = time.monotonic() + 40
while not warned and time.monotonic() < deadline:
    time.sleep(0.01)
pathlib.Path(f"warned-{{{RANK}}}").touch() if warned else None
"""
    process = start(job, 3, program)
    deadline = time.monotonic() + 40
    while len(list(job.glob("ready-*"))) < 3 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGUSR1)
    code, output = exit_code_and_output(process)
    assert code == 0, output
    assert len(list(job.glob("warned-*"))) == 3
