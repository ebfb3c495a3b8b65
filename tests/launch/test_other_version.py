"""A host with another version of distdl is found before the first step, by its sources: the number may be the same."""

import os
import shutil
import sys
from pathlib import Path

import distdl
from distdl.job.mpirun_command import environment_for, mpirun_command
from distdl.job.program import hash_of_sources

PACKAGE = Path(distdl.__file__).parent


def test_a_rank_with_other_sources_is_refused_before_the_first_step(needs_mpirun, run_program, tmp_path):
    shutil.copytree(PACKAGE, tmp_path / "other" / "distdl", ignore=shutil.ignore_patterns("__pycache__"))
    with (tmp_path / "other" / "distdl" / "optim.py").open("a") as file:
        file.write("# another version\n")

    def rank(folder):
        path = f"PYTHONPATH={folder}"
        return ["-n", "1", "env", path, sys.executable, "-m", "distdl.train", "--epochs=1", "--run-dir=run"]

    launch = mpirun_command(1, [])
    argv = [*launch.argv[: launch.argv.index("-n")], *rank(PACKAGE.parent), ":", *rank(tmp_path / "other")]
    done = run_program(argv, env=environment_for(launch), cwd=tmp_path, timeout=100)
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    assert not (tmp_path / "run").exists()
    (line,) = [one for one in done.stderr.splitlines() if "distdl: error:" in one]
    for folder in (PACKAGE, tmp_path / "other" / "distdl"):
        assert f"(sources {hash_of_sources(folder)[:10]}) on {os.uname().nodename}" in line
    assert "install the same version on every host" in line
