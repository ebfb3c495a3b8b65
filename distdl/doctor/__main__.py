"""Check whether a training will work here: ``python -m distdl.doctor``, also under mpirun and srun.

Exit code 0: fine. 1: it works, but something makes it slow or should be known. 2: it will not work.
"""

import sys
import time
from collections.abc import Sequence

from distdl import cli
from distdl.cli import Command, Flag
from distdl.doctor import findings
from distdl.doctor.examination import Facts, mpirun_of_this_python, of_process
from distdl.doctor.examine import DoctorOptions, examine
from distdl.doctor.findings import Level
from distdl.doctor.judgement import judged, needs_shared_memory
from distdl.doctor.supervisor import Outcome, Tell, examined
from distdl.errors import UserError
from distdl.job.launched_by import Launch, read_launch
from distdl.job.streams import say_line, write

#: Rank 0 reports for all. If it cannot, another rank speaks after this time.
SECONDS_FOR_RANK_0 = 5.0

COMMAND = Command(
    program="python -m distdl.doctor",
    summary="Check whether training will work here, and what makes it slow.",
    settings=DoctorOptions,
    examples=(
        "python -m distdl.doctor",
        "mpirun -n 4 python -m distdl.doctor --run-dir my-run",
        "srun --mpi=pmix python -m distdl.doctor --ranks 8",
    ),
    groups={"flags": ("ranks", "run_dir", "timeout", "json")},
    flags={"timeout": Flag(value="SECONDS")},
)


def main(arguments: Sequence[str]) -> int:
    """Examine this rank and the job; rank 0 prints the findings. Return the exit code: that of the worst finding."""
    options = COMMAND.parse(arguments)
    for flag, value in (("--timeout", options.timeout), ("--ranks", options.ranks)):
        if value is not None and value < 1:
            raise UserError(f"{flag} {value}: expected 1 or more")
    launch = read_launch()
    own = of_process()
    cli.set_blas_threads(1)

    def examine_rank(tell: Tell) -> None:
        examine(options, own, tell, launch.local_rank)

    name = f"rank {launch.rank} on {own['host']}" if launch.size > 1 else own["host"]
    outcome = examined(examine_rank, options.timeout, notices=launch.rank == 0, name=name)
    if outcome is None:  # the child: it ends here, with MPI_Finalize
        return 0
    facts: Facts = {"ranks": [own], "wanted": options.ranks} | outcome.facts
    if outcome.failure is not None:
        facts |= {"failure": f"{name} {outcome.failure}", "failure_fix": _remedy(facts, outcome)}
    try:
        if facts.get("is_first", launch.rank == 0):  # MPI may number the ranks differently
            return _report(options, facts, launch)
        return _speak_for_rank_0(facts, launch)
    finally:
        outcome.end_child()


def _report(options: DoctorOptions, facts: Facts, launch: Launch) -> int:
    """Print the report and return the exit code."""
    if launch.by is None:
        facts |= {"mpirun": mpirun_of_this_python()}
    found = judged(facts)
    write(sys.stdout, findings.as_json(found) if options.json else findings.as_text(found))
    return int(findings.worst(found))


def _speak_for_rank_0(facts: Facts, launch: Launch) -> int:
    """Return the exit code of another rank. Report its failure, unless rank 0 does so and ends the job."""
    if not facts.keys() & {"error", "failure"}:
        return 0
    if "failure" not in facts and launch.local_rank > 0:
        return int(Level.BROKEN)  # the first rank of this host has the same error
    broken = [finding for finding in judged(facts) if finding.level == Level.BROKEN]
    time.sleep(SECONDS_FOR_RANK_0 + launch.local_rank)  # the first one to end also ends the others
    say_line(f"doctor: {broken[0].text}; {broken[0].fix}")
    return int(Level.BROKEN)


def _remedy(facts: Facts, outcome: Outcome) -> str:
    own = facts["ranks"][0]
    if "to start MPI" in outcome.stage and needs_shared_memory(own) and "SIGBUS" in (outcome.failure or ""):
        return "docker run --shm-size=1g ...  (MPICH needs shared memory)"
    if (outcome.failure or "").startswith("ended"):
        return "see the messages of MPI and Python above"
    if "other rank" in outcome.stage and own["on_host"] == own["expected"]:
        return f"launch/local.sh -n {own['expected']} -- doctor  (and see the messages of the other ranks)"
    if "other rank" in outcome.stage or "between" in outcome.stage:
        return "launch/hosts.sh --check HOSTFILE  (do the hosts reach each other, and all have this Python?)"
    if "disk" in outcome.stage:
        return "--run-dir /a/folder/on/another/file/system"
    return "a slow file system or a busy host: try again with --timeout 300"


if __name__ == "__main__":
    sys.exit(cli.run(main, trains=COMMAND.trains))
