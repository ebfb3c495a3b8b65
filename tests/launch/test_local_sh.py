"""`launch/local.sh` as a user runs it."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
SCRIPT = REPOSITORY / "launch" / "local.sh"


def run_script(
    *arguments: str, folder: Path, script: Path = SCRIPT, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run the script in a folder, by default with the Python of these tests."""
    environment = {
        name: value for name, value in os.environ.items() if name not in {"PYTHON", "VIRTUAL_ENV", "PYTHONPATH"}
    }
    environment |= {"PYTHONPATH": f"{REPOSITORY}{os.pathsep}{folder}"}
    environment |= variables or {"PYTHON": sys.executable}
    return subprocess.run(
        [script, *arguments], cwd=folder, env=environment, capture_output=True, text=True, timeout=60, check=False
    )


def fake_python(path: Path, name: str) -> Path:
    """Write a fake Python that can import everything, and prints its name and its arguments."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'#!/bin/sh\nif [ "$2" = -c ]; then exit 0; fi\necho {name} "$@"\n')
    path.chmod(0o755)
    return path


@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_shows_how_to_start(flag: str, tmp_path: Path) -> None:
    done = run_script(flag, folder=tmp_path, PYTHON="/nowhere")
    assert done.returncode == 0
    assert done.stdout.startswith("usage: launch/local.sh -n RANKS")
    assert done.stderr == ""


def test_each_way_to_choose_a_python_wins_over_the_next(tmp_path: Path) -> None:
    script = tmp_path / "repository" / "launch" / "local.sh"
    script.parent.mkdir(parents=True)
    shutil.copy(SCRIPT, script)
    on_path = fake_python(tmp_path / "bin" / "python3", "path").parent
    variables = {"PATH": f"{on_path}{os.pathsep}{os.environ['PATH']}"}

    def chosen() -> str:
        done = run_script("-n", "2", "--", "a b", folder=tmp_path, script=script, **variables)
        assert done.stderr == ""
        name, command = done.stdout.split(maxsplit=1)
        assert command == "-P -m distdl.mpirun -n 2 -- a b\n"
        return name

    assert chosen() == "path"
    fake_python(tmp_path / "repository" / ".venv" / "bin" / "python", "beside")
    assert chosen() == "beside"
    variables["VIRTUAL_ENV"] = str(fake_python(tmp_path / "venv" / "bin" / "python", "activated").parents[1])
    assert chosen() == "activated"
    variables["PYTHON"] = str(fake_python(tmp_path / "given", "given"))
    assert chosen() == "given"


def test_a_missing_python_is_reported_in_one_line(tmp_path: Path) -> None:
    done = run_script("-n", "2", folder=tmp_path, PYTHON="/nowhere/python")
    assert done.returncode == 2
    assert done.stderr.startswith("launch/local.sh: no Python called /nowhere/python")
    assert done.stderr.count("\n") == 1


def no_permission(path: Path) -> str:
    fake_python(path, "x").chmod(0o644)
    return f"{path} has no execute permission: chmod +x {path}"


def broken_link(path: Path) -> str:
    path.symlink_to(path.parent / "removed")
    return f"{path} is a link to a file that does not exist"


def old_python(path: Path) -> str:
    fake_python(path, "x").write_text("#!/bin/sh\necho 'Unknown option: -P' >&2\nexit 2\n")
    return f"{path} is older than Python 3.11"


def no_program(path: Path) -> str:
    fake_python(path, "x").write_text("#!/nowhere/sh\n")
    return f"{path} cannot be executed here"


@pytest.mark.parametrize("spoil", [no_permission, broken_link, old_python, no_program])
def test_a_python_that_cannot_run_is_named_with_the_reason(spoil: Callable[[Path], str], tmp_path: Path) -> None:
    python = tmp_path / "repository" / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    expected = spoil(python)
    script = tmp_path / "repository" / "launch" / "local.sh"
    script.parent.mkdir()
    shutil.copy(SCRIPT, script)
    for done in (
        run_script("-n", "2", folder=tmp_path, PYTHON=str(python)),
        run_script("-n", "2", folder=tmp_path, script=script, PATH=os.environ["PATH"]),
    ):
        assert done.returncode == 2
        assert done.stderr.startswith(f"launch/local.sh: {expected}")
        assert done.stderr.count("\n") == 1


def test_from_a_read_only_checkout_the_advice_is_to_copy_it(tmp_path: Path) -> None:
    """Pip builds inside the folder."""
    repository = tmp_path / "repository"
    (repository / "launch").mkdir(parents=True)
    shutil.copy(SCRIPT, repository / "launch" / "local.sh")
    (repository / "pyproject.toml").touch()
    python = fake_python(tmp_path / "python", "without")
    python.write_text("#!/bin/sh\nexit 1\n")
    script = 'mount --bind "$1" "$1" && mount -o remount,bind,ro "$1" && exec "$1/launch/local.sh" -n 2'
    unshare = ["unshare", "-U", "-r", "-m", "sh", "-c", script, "sh", str(repository)]
    if shutil.which("unshare") is None:
        pytest.skip("no unshare here")
    variables = {**os.environ, "PYTHON": str(python)}
    done = subprocess.run(unshare, env=variables, capture_output=True, text=True, timeout=60, check=False)
    if "mount" in done.stderr or "unshare" in done.stderr:
        pytest.skip(done.stderr)
    assert f"cp -r '{repository}' /tmp/distdl && {python} -m pip install '/tmp/distdl[mpich]'" in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_python_without_distdl_is_one_line_that_names_the_remedy(tmp_path: Path) -> None:
    python = fake_python(tmp_path / "python", "without")
    python.write_text("#!/bin/sh\necho 'No module named distdl' >&2\nexit 1\n")
    done = run_script("-n", "2", folder=tmp_path, PYTHON=str(python))
    assert done.returncode == 2
    assert f"{python} -m pip install '{REPOSITORY}[mpich]'" in done.stderr
    assert done.stderr.count("\n") == 1
    (tmp_path / "copied").mkdir()
    copied = shutil.copy(SCRIPT, tmp_path / "copied" / "local.sh")
    done = run_script("-n", "2", folder=tmp_path, script=copied, PYTHON=str(python))
    assert f"run {python} -m pip install 'distdl-mpi[mpich]', or set PYTHON" in done.stderr


def test_a_wrong_flag_is_one_line_and_exit_2(tmp_path: Path) -> None:
    for arguments in ([], ["-n", "many"], ["--epochs", "3"]):
        done = run_script(*arguments, folder=tmp_path)
        assert done.returncode == 2
        assert done.stderr.startswith("distdl: error: ")
        assert done.stderr.count("\n") == 1


needs_mpirun = pytest.mark.skipif(
    shutil.which("mpirun", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}") is None,
    reason="this environment has no mpirun",
)


@needs_mpirun
def test_dry_run_prints_the_command_and_runs_nothing(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text("open('was-here', 'w').close()")
    done = run_script("-n", "2", "--dry-run", "--module", "program", "--", "a b", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert shlex.split(done.stdout)[-6:] == ["-n", "2", sys.executable, "-m", "program", "a b"]
    assert not (tmp_path / "was-here").exists()


@needs_mpirun
def test_relative_paths_start_at_the_folder_of_the_caller(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text("import sys; open(sys.argv[1], 'a').close()")
    done = run_script("-n", "2", "--module", "program", "--", "my run", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "my run").exists()
