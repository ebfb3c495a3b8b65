"""The launch files for hosts, batch systems, containers and Kubernetes: dry runs, checks, and jobs on two hosts.

A program that takes HOST COMMAND, as ssh does, runs the command on this machine. So MPICH sees two hosts.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
LAUNCH = REPOSITORY / "launch"
SCRIPTS = sorted([*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch")])
RSH = """#!/bin/sh
host=$1
shift
case $host in
gone*) echo "ssh: connect to host $host port 22: No route to host" >&2; exit 255 ;;
old*) echo 0.0.1 2.0.0 4.0.0 ;;
bare*) echo "sh: python: not found" >&2; exit 127 ;;
greeting*) echo "Welcome to $host"; exec sh -c "$*" ;;
*) exec sh -c "$*" ;;
esac
"""


@pytest.fixture
def run(tmp_path, run_program):
    """Return a function that runs a launch file in an empty folder, with the Python of these tests."""
    rsh = tmp_path / "rsh"
    rsh.write_text(RSH)
    rsh.chmod(0o755)

    def run(script, *words, timeout=120, **variables):
        variables = {"PYTHON": sys.executable, "RSH": str(rsh), **variables}
        return run_program([LAUNCH / script, *words], cwd=tmp_path, env=os.environ | variables, timeout=timeout)

    return run


def hostfile(folder, text):
    (folder / "hosts.txt").write_text(text)
    return "hosts.txt"


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_each_script_is_bash_that_can_be_parsed(script):
    subprocess.run(["bash", "-n", script], check=True, timeout=60)
    assert os.access(script, os.X_OK) or script.suffix == ".sbatch"


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_each_script_starts_with_the_doctor_or_can(script):
    assert "doctor" in script.read_text() or "launch/hosts.sh" in script.read_text() or script.name == "local.sh"


@pytest.mark.parametrize(
    ("text", "hosts", "ranks"),
    [
        ("n1:2\nn2:3\n", "n1:2,n2:3", 5),
        ("# two hosts\n\nn1 slots=2  # big\nn2 slots=2", "n1:2,n2:2", 4),
        ("n1\nn1\nn2\nn2\n", "n1:2,n2:2", 4),
        ("n1.a-b.example\n", "n1.a-b.example:1", 1),
        ("\ufeffn1:2\r\n\r\n# one\r\nn2 slots=3\r\n", "n1:2,n2:3", 5),
        ("  n1\tslots=2 max_slots=8\nn2 # slots=9\nn2:08#\n", "n1:2,n2:9", 11),
    ],
    ids=["colons", "slots", "repeated", "names", "Windows", "spaces and comments"],
)
def test_each_form_of_a_hostfile_gives_hosts_and_ranks(run, tmp_path, text, hosts, ranks):
    done = run("hosts.sh", hostfile(tmp_path, text), "--dry-run", "--restarts", "2", "--", "--model", "a b")
    assert (done.returncode, done.stderr) == (0, "")
    start = [sys.executable, "-P", "-m", "distdl.mpirun", "-n", str(ranks), "--hosts", hosts]
    assert shlex.split(done.stdout) == [*start, "--doctor", "--restarts", "2", "--", "--model", "a b"]


@pytest.mark.parametrize(
    ("text", "words", "said"),
    [
        ("n1:two\n", [], "line 1: cannot read 'n1:two'"),
        ("n1\n\nn2; rm -rf x\n", [], "line 3: cannot read 'n2; rm -rf x'"),
        ("-oProxyCommand=x\n", [], "cannot read '-oProxyCommand=x'"),
        ("n1 slots=many\n", [], "cannot read 'n1 slots=many'"),
        ("n1 slots = 4\n", [], "cannot read 'n1 slots = 4'"),
        ("n1 4\n", [], "cannot read 'n1 4': expected HOST, HOST:RANKS or HOST slots=RANKS$"),
        ("n1:2 slots=3\n", [], "cannot read 'n1:2 slots=3'"),
        ("n1 max_slots=3\n", [], "cannot read 'n1 max_slots=3'"),
        ("n1:-2\n", [], "cannot read 'n1:-2'"),
        ("n1:2:3\n", [], "cannot read 'n1:2:3'"),
        ("n1:99999999999999999999\n", [], "cannot read 'n1:9+'"),
        ("n1:0\n", [], "line 1: 'n1:0' has no rank: expected 1 or more"),
        ("n1 slots=0\n", [], "'n1 slots=0' has no rank: expected 1 or more"),
        ("me@n1:2\n", [], "the name of a user belongs in ~/.ssh/config"),
        ("fe80::1\n", [], "give an IPv6 address a name in ~/.ssh/config"),
        ("", [], "names no host"),
        ("# none\n", [], "names no host"),
        ("n1\n", ["--epochs", "3"], "unknown flag --epochs"),
        ("n1\n", ["other"], "unexpected word other"),
        ("n1\n", ["--restarts"], "--restarts needs a whole number, not '': --restarts 5"),
        ("n1\n", ["--restarts", "--", "--epochs", "3"], "--restarts needs a whole number, not '--'"),
        ("n1\n", ["--restarts", "few"], "--restarts needs a whole number, not 'few'"),
    ],
)
def test_a_wrong_hostfile_or_flag_is_one_line_and_exit_2(run, tmp_path, text, words, said):
    done = run("hosts.sh", hostfile(tmp_path, text), *words)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert re.search(said, done.stderr)


def test_a_folder_is_no_hostfile(run):
    done = run("hosts.sh", ".")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "launch/hosts.sh: cannot read .: expected a file with one host per line\n"


@pytest.mark.parametrize("program", ["no-such-program", "ssh -p 2222"])
def test_a_missing_program_instead_of_ssh_is_one_line(run, tmp_path, program):
    done = run("hosts.sh", hostfile(tmp_path, "n1\nn2\n"), RSH=program)
    assert (done.returncode, done.stdout) == (2, "")
    start = f"launch/hosts.sh: no program {program} on this host: install an ssh client, or set RSH to a program"
    assert done.stderr.startswith(start)
    assert done.stderr.count("\n") == 1


def test_a_python_without_distdl_is_one_line(run, tmp_path):
    (tmp_path / "python").write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')
    (tmp_path / "python").chmod(0o755)
    done = run("hosts.sh", hostfile(tmp_path, "n1\n"), PYTHON=f"{tmp_path}/python")
    assert (done.returncode, done.stdout) == (2, "")
    start = f"launch/hosts.sh: {tmp_path}/python cannot import distdl, NumPy and mpi4py: run {tmp_path}/python -m pip"
    assert done.stderr.startswith(start)
    assert done.stderr.count("\n") == 1


def test_a_check_examines_the_run_folder_of_the_training_and_admits_a_greeting(run, tmp_path, survives):
    """Open MPI cannot take one machine for two hosts."""
    names = ["localhost"] if survives else ["greeting1", "n2"]
    for folder in (["--run-dir", "a run"], ["--epochs", "3", "--run-dir=a run"]):
        done = run("hosts.sh", hostfile(tmp_path, "\n".join(names)), "--check", "--", *folder)
        assert done.returncode in {0, 1}, done.stdout + done.stderr
        assert re.search(r"run folder +[\d.]+ GB free in a run", done.stdout)


def test_hosts_that_cannot_work_are_named_before_anything_starts(run, tmp_path):
    done = run("hosts.sh", hostfile(tmp_path, "n1\ngone\nold\nbare\n"), "--", "--run-dir", "run")
    assert (done.returncode, done.stdout) == (2, "")
    gone, old, bare = done.stderr.splitlines()
    assert "gone cannot be reached (ssh: connect to host gone port 22: No route to host)" in gone
    assert "old has 0.0.1 2.0.0 4.0.0, this host has " in old
    assert f"bare cannot run distdl (sh: python: not found): it needs {sys.executable}" in bare
    assert not (tmp_path / "run").exists()


def test_the_doctor_examines_the_hosts_and_the_training_starts(run, tmp_path, survives):
    """Open MPI cannot take one machine for two hosts."""
    names = ["localhost", "localhost"] if survives else ["n1", "n2"]
    training = ["--max-steps", "2", "--kernels", "numpy", "--run-dir", "run"]
    done = run("hosts.sh", hostfile(tmp_path, "\n".join(names)), "--", *training)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"on {' '.join(dict.fromkeys(names))}\n" in done.stdout
    assert done.stdout.index("mpi4py") < done.stdout.index("launcher  ") < done.stdout.index("step")
    assert ("hosts          2 hosts" in done.stdout) == (not survives)
    assert (tmp_path / "run" / "summary.json").exists()


@pytest.mark.parametrize(("script", "variable"), [("pbs.sh", "PBS_NODEFILE"), ("lsf.sh", "LSB_DJOB_HOSTFILE")])
def test_a_batch_script_starts_hosts_sh_with_the_hosts_of_its_scheduler(run, script, variable):
    done = run(script, "--dry-run", **{variable: "/hosts/of/the job"})
    assert (done.returncode, done.stderr) == (0, "")
    words = shlex.split(done.stdout)
    assert words[:8] == ["timeout", "--foreground", "--preserve-status", "-s", "USR1", "-k", "100", "238m"]
    assert words[8:10] == ["launch/hosts.sh", "/hosts/of/the job"]
    assert {"--resume", "auto", "--run-dir"} <= set(words)
    outside = run(script)
    assert outside.returncode != 0
    assert "start this script with" in outside.stderr


@pytest.mark.parametrize(("script", "variable"), [("pbs.sh", "PBS_NODEFILE"), ("lsf.sh", "LSB_DJOB_HOSTFILE")])
def test_a_batch_script_outside_of_the_repository_is_refused_in_one_line(run, tmp_path, script, variable):
    done = run(script, **{variable: "x"})
    assert done.returncode == 2
    assert done.stderr.startswith(f"{script}: no launch/hosts.sh in {tmp_path}: submit the job in the folder of the")
    assert done.stderr.count("\n") == 1


def test_a_batch_script_warns_before_its_limit_and_ends_with_code_75(tmp_path):
    """`timeout` sends SIGUSR1 to hosts.sh, which has become the launcher; its exit code is kept. A copy is renamed."""
    text = (LAUNCH / "pbs.sh").read_text().replace("limit=238m ", "limit=2 ")
    text = text.replace("this=launch/pbs.sh ", "this=launch/mine.sh ")
    launch = tmp_path / "launch"
    launch.mkdir()
    (launch / "mine.sh").write_text(text)
    (launch / "hosts.sh").write_text("#!/bin/bash\ntrap 'exit 75' USR1\nwhile :; do sleep 0.05; done\n")
    (launch / "hosts.sh").chmod(0o755)
    (tmp_path / "qsub").write_text('#!/bin/sh\necho again: "$@"\n')
    (tmp_path / "qsub").chmod(0o755)
    variables = {"PBS_NODEFILE": "x", "PBS_O_WORKDIR": str(tmp_path), "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", launch / "mine.sh"],
        env=os.environ | variables,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 75, done.stderr
    assert done.stdout.splitlines()[1:] == ["again: launch/mine.sh"]


# Kubernetes


def faults(value, schema, path="MPIJob"):
    """Yield each unknown field and each wrong type of a manifest."""
    kinds = {"object": dict, "array": list, "string": str, "integer": int, "boolean": bool}
    kind = schema.get("type")
    if not isinstance(value, kinds.get(kind, (int, str))):
        yield f"{path} is no {kind}"
    elif "enum" in schema and value not in schema["enum"]:
        yield f"{path} is {value}"
    elif kind == "array":
        for number, item in enumerate(value):
            yield from faults(item, schema["items"], f"{path}[{number}]")
    elif kind == "object" and path != "MPIJob.metadata":
        known = schema.get("properties", {})
        for name in set(schema.get("required", [])) - value.keys():
            yield f"{path} lacks {name}"
        for name, item in value.items():
            below = known.get(name, schema.get("additionalProperties"))
            yield from faults(item, below, f"{path}.{name}") if below else [f"{path} has no field {name}"]


@pytest.fixture
def manifest():
    yaml = pytest.importorskip("yaml")
    return yaml.safe_load((LAUNCH / "kubernetes" / "mpijob.yaml").read_text())


@pytest.fixture
def schema():
    """Return the schema of kubeflow/mpi-operator caa3c47 (2026-07-02), with the levels that the manifest uses."""
    return json.loads((Path(__file__).parent / "mpijob_schema.json").read_text())


def test_the_manifest_has_only_fields_of_the_mpi_operator(manifest, schema):
    assert (manifest["apiVersion"], manifest["kind"]) == ("kubeflow.org/v2beta1", "MPIJob")
    assert list(faults(manifest, schema)) == []
    launcher = manifest["spec"]["mpiReplicaSpecs"]["Launcher"]["template"]["spec"]["containers"][0]
    ranks = manifest["spec"]["slotsPerWorker"] * manifest["spec"]["mpiReplicaSpecs"]["Worker"]["replicas"]
    assert launcher["args"][:2] == ["-n", str(ranks)]


def test_a_wrong_manifest_is_noticed(manifest, schema):
    manifest["spec"]["slotsPerWorker"] = "four"
    manifest["spec"]["mpiImplementation"] = "OpenMpi"
    worker = manifest["spec"]["mpiReplicaSpecs"]["Worker"]["template"]["spec"]
    worker["containers"][0]["volumeMount"] = worker["containers"][0].pop("volumeMounts")
    del worker["volumes"][0]["name"]
    assert sorted(fault.rpartition(" ")[2] for fault in faults(manifest, schema)) == [
        *("OpenMpi", "integer", "name", "name", "volumeMount")
    ]
