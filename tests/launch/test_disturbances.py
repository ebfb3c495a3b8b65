"""200 disturbed jobs never wait long without a message, end, and keep their receipt: with DISTDL_FAULTS=full."""

import faulthandler
import os
import sys

import pytest
from disturbances import SLURM, possible_runs, run_all, table

SEED = int(os.environ.get("DISTDL_FAULTS_SEED", "0"))


@pytest.mark.skipif(os.environ.get("DISTDL_FAULTS") != "full", reason="takes an hour: DISTDL_FAULTS=full")
@pytest.mark.usefixtures("needs_mpirun")
def test_disturbed_jobs_speak_at_least_once_a_minute_and_keep_their_receipt(tmp_path):
    """Slurm is left to the program `disturbances.py`."""
    faulthandler.cancel_dump_traceback_later()  # each job has its own limit
    possible = [one for one in possible_runs([sys.executable]) if not one[0].startswith(SLURM)]
    records = list(run_all(range(200), SEED, tmp_path / "log", 2, possible))
    outputs = [path.read_text() for path in tmp_path.glob("log.*.txt")]
    assert not [record for record in records if record["wrong"]], "\n".join([table(records), *outputs])
