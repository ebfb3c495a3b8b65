"""If a rank dies in the middle of a reduction, all others learn of it, for any rank that they wait for.

If MPI never completes the group of the survivors, the job ends.
"""

import sys

import pytest

from distdl.job.mpirun_command import mpirun_command

#: Every rank reduces again and again, until the victim kills itself before or after it has filled its slots.
PROGRAM = """
import os, pathlib, signal, sys, time
import numpy as np
from distdl.errors import PeerLost
from distdl.parallel import REDUCTIONS, Field, Layout, contiguous_shards, world

victim, spread, after_adding = int(sys.argv[1]), sys.argv[2], sys.argv[3] == "after"
communicator = world()
rank, size = communicator.rank, communicator.size
host = {"one host": 0, "a host each": rank, "pairs": rank // 2}[spread]
reduction = REDUCTIONS["tree"](communicator, Layout([Field("gradient", "f4", 200_000)]), host=communicator.split(host))
shards = contiguous_shards(8, size)
try:
    for step in range(1000):
        reduction.begin(shards)
        if step == 3 and rank == victim and not after_adding:
            os.kill(os.getpid(), signal.SIGKILL)
        for index in shards[rank]:
            reduction.add(index, {"gradient": np.ones(200_000, "f4")})
        if step == 3 and rank == victim:
            os.kill(os.getpid(), signal.SIGKILL)
        reduction.total()
    outcome = "never noticed"
except PeerLost as error:
    outcome = f"lost a peer in step {step}"
# No rank exits before all have noticed: the end of a second rank would wake the others too.
folder = pathlib.Path(sys.argv[4])
(folder / f"noticed-{rank}").touch()
ends = time.monotonic() + 30
while len(list(folder.glob("noticed-*"))) < size - 1 and time.monotonic() < ends:
    time.sleep(0.01)
if len(list(folder.glob("noticed-*"))) < size - 1:
    outcome += ", but not all did"
sys.stdout.write(f"rank {rank} {outcome}\\n")
sys.stdout.flush()
os._exit(0)  # MPI_Finalize may wait for the dead rank
"""


@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize("victim", [0, 3])
@pytest.mark.parametrize("spread", ["one host", "a host each", "pairs"])
def test_all_survivors_of_a_kill_see_that_a_peer_is_lost(tmp_path, run_job, ulfm, spread, victim, moment):
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    launch = mpirun_command(4, [sys.executable, str(program), str(victim), spread, moment, str(tmp_path)])
    done = run_job(launch, timeout=120)
    printed = sorted(line for line in done.stdout.splitlines() if line.startswith("rank "))
    survivors = [rank for rank in range(4) if rank != victim]
    assert printed == [f"rank {rank} lost a peer in step 3" for rank in survivors], done.stdout + done.stderr


#: Rank 2 dies. The others see that in an agreement, or in a collective call before the agreement in which they vote no.
AGREEING = """
import os, signal, sys
from distdl.errors import PeerLost
from distdl.parallel import world

communicator = world()
rank, size = communicator.rank, communicator.size
if rank == 2:
    os.kill(os.getpid(), signal.SIGKILL)
told = []
if sys.argv[1] == "collective":
    try:
        communicator.barrier()
    except PeerLost as lost:
        told.append(f"barrier: agreed {lost.agreed}")
try:
    told.append(f"agreement: {communicator.agree(sys.argv[1] != 'collective')}")
except PeerLost as lost:
    told.append(f"agreement: agreed {lost.agreed}")
communicator = communicator.shrink()
told.append(f"agreement of {communicator.world_ranks}: {communicator.agree(True)} {communicator.agree(rank == 0)}")
print(f"rank {rank} {', '.join(told)}", flush=True)
"""


@pytest.mark.parametrize(
    ("first", "told"), [("agreement", []), ("collective", ["barrier: agreed False"])], ids=["agreement", "collective"]
)
def test_a_failure_in_an_agreement_is_known_to_all_and_one_in_another_call_is_not(tmp_path, run_job, ulfm, first, told):
    """After a failure of the second kind a rank votes no in the next agreement. After one of the first it must not."""
    program = tmp_path / "program.py"
    program.write_text(AGREEING)
    done = run_job(mpirun_command(3, [sys.executable, str(program), first]), timeout=60)
    lines = sorted(line for line in done.stdout.splitlines() if line.startswith("rank "))
    expected = ", ".join([*told, "agreement: agreed True", "agreement of [0, 1]: True False"])
    assert lines == [f"rank {rank} {expected}" for rank in (0, 1)], done.stdout + done.stderr


#: Rank 2 dies; rank 1 does not join the shrink, as if it hung inside MPI.
STUCK = """
import os, signal, time
from distdl.errors import PeerLost
from distdl.parallel import mpi, world

mpi.SECONDS_TO_SHRINK = 1.0
communicator = world()
if communicator.rank == 2:
    os.kill(os.getpid(), signal.SIGKILL)
try:
    communicator.barrier()
except PeerLost:
    if communicator.rank == 1:
        time.sleep(100)
    communicator.shrink()
print("the end was reached")
"""


def test_a_shrink_that_never_completes_ends_the_job(tmp_path, run_job, ulfm):
    program = tmp_path / "program.py"
    program.write_text(STUCK)
    done = run_job(mpirun_command(3, [sys.executable, str(program)]), timeout=60)
    assert done.returncode != 0
    assert "the end was reached" not in done.stdout
    assert "[rank 0] the group of the surviving ranks was not created within 1 s, so the job ends" in done.stderr
