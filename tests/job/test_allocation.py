"""The allocation of a scheduler, and the hosts in it that have no rank."""

import pytest

from distdl.job.allocation import placement_lines, read_allocation

SLURM = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_JOB_CPUS_PER_NODE": "2(x2)"}


def test_each_scheduler_lists_its_hosts(tmp_path):
    (tmp_path / "nodes").write_text("n1\nn1\nn2\nn2\n")
    pbs = {"PBS_JOBID": "8.head", "PBS_NODEFILE": str(tmp_path / "nodes")}
    lsf = {"LSB_JOBID": "9", "LSB_MCPU_HOSTS": "n1 2 n2 2"}
    for variables, job in ((SLURM, "Slurm job 7"), (pbs, "PBS job 8.head"), (lsf, "LSF job 9")):
        found = read_allocation(variables)
        assert found is not None
        assert (found.job, found.cores) == (job, {"n1": 2, "n2": 2})


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"SLURM_JOB_ID": "7"},
        {**SLURM, "SLURM_JOB_CPUS_PER_NODE": "2"},
        {**SLURM, "SLURM_JOB_NODELIST": "n[a-b]"},
        {"PBS_JOBID": "8", "PBS_NODEFILE": "/nowhere"},
        {"LSB_JOBID": "9", "LSB_MCPU_HOSTS": "n1"},
    ],
)
def test_incomplete_variables_are_no_allocation(variables):
    assert read_allocation(variables) is None


@pytest.mark.parametrize(
    ("hosts", "fact", "idle"),
    [
        ({"n1": 2, "n2": 2}, "2 of 2 nodes in use, 4 ranks on 4 cores", None),
        ({"n1": 4}, "1 of 2 nodes in use, 4 ranks on 4 cores", "2 nodes, but n2 has no rank: start 4 ranks"),
        ({"N2.cluster": 1}, "1 of 2 nodes in use, 1 rank on 4 cores", "n1 has no rank"),
        ({"an-alias": 1}, "1 of 2 nodes in use", None),
    ],
)
def test_the_nodes_without_a_rank_are_named(hosts, fact, idle):
    facts, warnings = placement_lines(read_allocation(SLURM), hosts)
    assert fact in facts[0]
    assert len(warnings) == (idle is not None)
    assert idle is None or idle in warnings[0]


def test_without_a_scheduler_nothing_is_said():
    assert placement_lines(None, {"here": 4}) == ([], [])
