"""A process knows its rank from the launcher's variables, before MPI is started."""

import pytest

from distdl.job.launched_by import Launch, compatible, read_launch, survives_failures

OPEN_MPI = {"OMPI_COMM_WORLD_RANK": "2", "OMPI_COMM_WORLD_SIZE": "4"}
MPICH = {"PMI_RANK": "1", "PMI_SIZE": "3"}
SALLOC = {"SLURM_JOB_ID": "17", "SLURM_NTASKS": "8", "SLURM_NNODES": "2"}
SBATCH = {**SALLOC, "SLURM_PROCID": "0"}
SRUN = {**SALLOC, "SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "6"}


@pytest.mark.parametrize(
    ("environment", "launch"),
    [
        ({}, Launch(None, 0, 1)),
        (OPEN_MPI, Launch("Open MPI's mpirun", 2, 4)),
        (MPICH, Launch("MPICH's mpirun", 1, 3)),
        (SRUN, Launch("srun", 5, 6)),
        ({**OPEN_MPI, "OMPI_COMM_WORLD_LOCAL_RANK": "1"}, Launch("Open MPI's mpirun", 2, 4, 1)),
        ({**SBATCH, "SLURM_LOCALID": "0", **MPICH, "MPI_LOCALRANKID": "1"}, Launch("MPICH's mpirun", 1, 3, 1)),
        ({**SRUN, "SLURM_LOCALID": "3"}, Launch("srun", 5, 6, 3)),
    ],
    ids=["none", "Open MPI", "MPICH", "srun", "Open MPI on a host", "MPICH on a host", "srun on a host"],
)
def test_each_launcher_is_recognized_by_its_variables(environment, launch):
    assert read_launch(environment) == launch


@pytest.mark.parametrize("job", [SALLOC, SBATCH], ids=["salloc", "sbatch"])
def test_the_single_process_of_a_shell_or_batch_script_is_no_rank(job):
    assert read_launch(job) == Launch(None, 0, 1)


@pytest.mark.parametrize(
    ("environment", "library", "together"),
    [
        (OPEN_MPI, "Open MPI", True),
        (OPEN_MPI, "Fujitsu MPI", True),  # built from Open MPI
        (OPEN_MPI, "MPICH", False),
        (OPEN_MPI, "Intel MPI", False),
        (MPICH, "MPICH", True),
        (MPICH, "Intel MPI", True),
        (MPICH, "Open MPI", False),
        (SRUN, "MPICH", True),  # a wrong --mpi of srun is detected only after MPI has started
        (SRUN, "Open MPI", True),
        ({**SRUN, **MPICH}, "Open MPI", True),  # srun --mpi=pmi2; Open MPI up to 4 can be built for it
        ({}, "Open MPI", True),
    ],
)
def test_a_library_is_not_compatible_with_the_launcher_of_another(environment, library, together):
    assert compatible(read_launch(environment), library, environment) is together


@pytest.mark.parametrize("job", [SALLOC, SBATCH, SRUN], ids=["salloc", "sbatch", "srun"])
@pytest.mark.parametrize(
    ("mpirun", "by"),
    [
        ({"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "1"}, "Open MPI's mpirun"),
        ({"PMI_RANK": "0", "PMI_SIZE": "1"}, "MPICH's mpirun"),
    ],
    ids=["Open MPI", "MPICH"],
)
def test_mpirun_of_one_rank_inside_a_slurm_job_is_one_rank(mpirun, by, job):
    assert read_launch({**job, **mpirun}) == Launch(by, 0, 1)


def test_a_step_smaller_than_its_job_has_the_size_of_the_step():
    assert read_launch({**SBATCH, "SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2"}) == Launch("srun", 1, 2)


@pytest.mark.parametrize(
    "environment",
    [
        {"PMI_RANK": "1"},
        {"PMI_SIZE": "4"},
        {"PMI_RANK": "", "PMI_SIZE": "4"},
        {"PMI_RANK": "one", "PMI_SIZE": "4"},
        {"PMI_RANK": "-1", "PMI_SIZE": "4"},
        {"OMPI_COMM_WORLD_RANK": "1", "PMI_SIZE": "4"},
        {"SLURM_PROCID": "0", "SLURM_NTASKS": ""},
    ],
    ids=str,
)
def test_half_a_launch_or_no_number_is_no_launch(environment):
    assert read_launch(environment) == Launch(None, 0, 1)


def test_the_variables_of_the_process_are_read_at_the_time_of_the_call(monkeypatch):
    for name in {**OPEN_MPI, **MPICH, **SRUN}:
        monkeypatch.delenv(name, raising=False)
    assert read_launch().by is None
    monkeypatch.setenv("PMI_RANK", "1")
    monkeypatch.setenv("PMI_SIZE", "3")
    assert read_launch() == Launch("MPICH's mpirun", 1, 3)


def test_rank_0_alone_prints_for_all():
    assert read_launch({}).prints_for_all
    assert read_launch({"PMI_RANK": "0", "PMI_SIZE": "4"}).prints_for_all
    assert not read_launch({"PMI_RANK": "3", "PMI_SIZE": "4"}).prints_for_all


@pytest.mark.parametrize(
    ("value", "survives"),
    [("1", True), ("true", True), ("True", True), ("yes", True), ("0", False), ("false", False), ("", False)],
)
def test_failures_are_survived_if_the_launcher_sets_it(value, survives):
    assert survives_failures({"OMPI_MCA_mpi_ft_enable": value}) is survives


def test_failures_are_not_survived_if_the_launcher_does_not_set_it():
    assert survives_failures({}) is False
    assert survives_failures({**OPEN_MPI, "OMPI_MCA_mpi_ft_verbose": "1"}) is False
