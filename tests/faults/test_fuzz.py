"""Randomly altered files give exit code 2 or 3 and one line, or are valid. They cost below 300 MB and 2 s of CPU time.

There are 500 files of each kind, or 10,000 with ``DISTDL_FULL=1``. A failure names the arguments of `fuzz.py` to repeat
it.
"""

import json
import os
import sys
from pathlib import Path

import pytest
from bad_inputs import without_launcher

from distdl.job.launched_by import read_launch

pytestmark = pytest.mark.skipif(read_launch().size > 1, reason="starts its own processes")

HERE = Path(__file__).parent
FULL = os.environ.get("DISTDL_FULL") == "1" or os.environ.get("DISTDL_FAULTS") == "full"
COUNT = 500
SEED = int(os.environ.get("DISTDL_FAULTS_SEED", "0"))
SEEDS = range(SEED, SEED + 20) if FULL else [SEED]
KINDS = [
    *("IDX", "gzip", "npz", "labels", "arrays", "images", "photos", "csv", "cifar"),
    *("config", "checkpoint", "sealed"),
]
SECONDS = 280  # prevents hanging


@pytest.fixture(scope="module")
def run_python(run_program):
    """Return a function that runs Python with one BLAS thread and without a launcher."""
    env = {**without_launcher(os.environ), "OPENBLAS_NUM_THREADS": "1"}
    return lambda *arguments: run_program([sys.executable, *map(str, arguments)], env=env, timeout=SECONDS)


@pytest.fixture(scope="module")
def fuzzed(side_by_side, run_python):
    return side_by_side(
        test_files_altered_at_random_are_refused_in_one_line_or_are_valid,
        lambda kind, seed: run_python(HERE / "fuzz.py", kind, seed, COUNT),
    )


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("kind", KINDS)
def test_files_altered_at_random_are_refused_in_one_line_or_are_valid(kind, seed, fuzzed):
    done = fuzzed(kind=kind, seed=seed)
    assert done.stdout, done.stderr
    found = json.loads(done.stdout)
    assert found["failures"] == [], "\n".join(found["failures"][:5])
    assert (done.returncode, done.stderr) == (0, "")
    assert sum(found["codes"].values()) == COUNT
    refused = found["codes"].get("2", 0) + found["codes"].get("3", 0)
    assert refused > COUNT / 2, "most alterations should matter"
    log = os.environ.get("DISTDL_FAULTS_LOG")
    if log:
        ended = "exit code 2 or 3, one line; or valid; below 300 MB and 2 s"
        record = {"fault": f"fuzz: {kind}", "mpi": "one process", "seed": seed, "ok": True, "ended": ended}
        with Path(log).open("a") as file:
            file.writelines(json.dumps({**record, "number": number}) + "\n" for number in range(COUNT))


@pytest.mark.parametrize(
    ("defect", "said"),
    [
        ("checkpoints.read = lambda path: 1 / 0", "Traceback"),
        ("cli.streams.say_line = lambda text: None", "not one line"),
        (
            "cli.streams.say_line = lambda text: print('one', 'two', sep='\\n', file=sys.stderr)",
            "not one line",
        ),
        ("train_command.parse = lambda *_: bytearray(400 * 2**20) and 1 / 0", "MB"),
        ("fuzz.MOST_SECONDS = 0.0", "took"),
    ],
)
def test_the_fuzzer_finds_a_defect(defect, said, run_python):
    """The test puts each kind of defect into the program."""
    program = (
        f"import sys; sys.path.insert(0, {str(HERE)!r}); import fuzz\n"
        "from fuzz import checkpoints, cli, train_command\n"
        "kind = fuzz.KINDS['checkpoint']\n"
        "class Defective(kind):\n"
        "    def __init__(self):\n"
        f"        super().__init__()\n        {defect}\n"
        "fuzz.KINDS['checkpoint'] = Defective\n"
        "sys.exit(fuzz.main('checkpoint', 0, 2))\n"
    )
    done = run_python("-c", program)
    assert done.returncode == 1, done.stderr
    assert any(said in failure for failure in json.loads(done.stdout)["failures"])
