"""Killed ranks: the others finish the step they are in and go on, to the same receipt and the same metrics.

Real processes and real SIGKILLs, at chosen places; `tests/faults` kills at random moments.
"""

import json
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from small_runs import small_run

from distdl.engine.storage import checkpoints
from distdl.engine.storage.files import TEMPORARY_SUFFIX
from distdl.mpirun import mpirun_command
from distdl.parallel import OneProcess

#: Trains as `small_run` does. A trap is a rank, a function, "before" or "after", and at which of its calls.
PROGRAM = """
import importlib, json, os, signal, sys
from pathlib import Path
from distdl import cli
cli.set_blas_threads(1)

def set_trap(rank, function, when, count):
    owner, calls = importlib.import_module(function.split(":")[0]), []
    *path, name = function.split(":")[1].split(".")
    for part in path:
        owner = getattr(owner, part)
    work = getattr(owner, name)

    def trapped(*arguments, **keywords):
        calls.append(1)
        if len(calls) == count and when == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        result = work(*arguments, **keywords)
        if len(calls) == count and when == "after":
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(owner, name, trapped)

def main(arguments):
    sys.path.insert(0, arguments[0])
    from small_runs import VERY_RAGGED, piece_of_digits, small_config
    from distdl.engine import train
    from distdl.parallel import world
    communicator = world()
    for trap in json.loads(arguments[2]):
        if trap[0] == communicator.rank:
            set_trap(*trap)
    train(small_config(Path(arguments[1]), **json.loads(arguments[3])), dataset=piece_of_digits(VERY_RAGGED))
    return 0

sys.exit(cli.run(main))
"""

FULL_DISK = """
import distdl.engine.storage.checkpoints

def write(*_):
    raise OSError(28, "No space left on device")

distdl.engine.storage.checkpoints.write = write
"""

STEP = "distdl.engine.trainer:Trainer.step"
VALIDATION = "distdl.engine.trainer:Trainer._end_epoch"
CHECKPOINT = "distdl.engine.coordinator:Coordinator.checkpoint"
WRITE = "distdl.engine.storage.checkpoints:write"  # by the coordinator's thread, while training goes on
SETTINGS = {"checkpoint_every": 2, "record_hashes": True}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, ulfm):
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    return small_run(OneProcess(), folder, **SETTINGS), (folder / "hashes.jsonl").read_bytes()


def run_with_traps(run_job, tmp_path, traps, ranks, more=""):
    program, folder = tmp_path / "program.py", tmp_path / "run"
    program.write_text(PROGRAM.replace("def main", f"{more}\ndef main"))
    arguments = [str(Path(__file__).parent), str(folder), json.dumps(traps), json.dumps(SETTINGS)]
    launch = mpirun_command(ranks, [sys.executable, str(program), *arguments])
    done = run_job(launch, timeout=120)
    return folder, done


@pytest.mark.parametrize(
    ("ranks", "traps", "recoveries"),
    [
        pytest.param(
            4,
            [[2, STEP, "before", 2], [0, VALIDATION, "before", 1], [1, CHECKPOINT, "after", 1]],
            [(2, [2], 3), (3, [0], 2), (3, [1], 1)],
            id="one after the other, two coordinators, down to one",
        ),
        pytest.param(
            4,
            [[1, STEP, "before", 2], [0, "distdl.engine.trainer:Trainer.rebuild", "after", 1]],
            [(2, [0, 1], 2)],
            id="in a recovery",
        ),
        pytest.param(
            3,
            [[0, STEP, "before", 3], [1, "distdl.engine.takeover:JsonLines", "after", 2]],
            [(3, [0, 1], 1)],
            id="while taking over the run folder",
        ),
        pytest.param(
            3,
            [[0, "distdl.engine.prepare:read_data", "after", 1], [1, "distdl.engine.prepare:Coordinator", "after", 1]],
            [(0, [0, 1], 1)],
            id="while distributing data, and with the run folder made",
        ),
        pytest.param(
            2,
            [[0, "distdl.engine.coordinator:Coordinator.finished", "after", 1]],
            [(6, [0], 1)],
            id="at the very end",
        ),
    ],
)
def test_the_others_go_on_to_the_same_receipt_and_logs(run_job, tmp_path, undisturbed, ranks, traps, recoveries):
    folder, done = run_with_traps(run_job, tmp_path, traps, ranks)
    assert done.returncode == 0, done.stdout + done.stderr
    summary = json.loads((folder / "summary.json").read_text())
    assert [(loss["step"], loss["lost_ranks"], loss["ranks"]) for loss in summary["recoveries"]] == recoveries
    assert summary["ranks"] == recoveries[-1][2]
    (weights, state, metrics), hashes = undisturbed
    assert (summary["weights_sha256"], summary["state_sha256"]) == (weights, state)
    assert (folder / "metrics.jsonl").read_bytes() == metrics
    assert (folder / "hashes.jsonl").read_bytes() == hashes
    assert f"weights sha256: {weights}" in done.stdout
    newest, _, complaints = checkpoints.newest_intact(folder / "checkpoints")
    assert (newest.name, complaints) == ("step-000000006.safetensors", [])
    assert all(json.loads(line) for line in (folder / "timing.jsonl").read_text().splitlines())


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("count", [1, 3])
def test_a_coordinator_killed_while_its_thread_writes_a_checkpoint(run_job, tmp_path, undisturbed, when, count):
    """In which step the others are meanwhile, nobody knows; the last checkpoint is written again by the successor."""
    folder, done = run_with_traps(run_job, tmp_path, [[0, WRITE, when, count]], 2)
    assert done.returncode == 0, done.stdout + done.stderr
    summary = json.loads((folder / "summary.json").read_text())
    assert [loss["lost_ranks"] for loss in summary["recoveries"]] == [[0]]
    (weights, state, metrics), hashes = undisturbed
    assert (summary["weights_sha256"], summary["state_sha256"]) == (weights, state)
    assert (folder / "metrics.jsonl").read_bytes() == metrics
    assert (folder / "hashes.jsonl").read_bytes() == hashes
    newest, _, complaints = checkpoints.newest_intact(folder / "checkpoints")
    assert (newest.name, complaints) == ("step-000000006.safetensors", [])
    assert not [path for path in folder.rglob("*") if path.name.endswith(TEMPORARY_SUFFIX)]


def test_no_process_is_left_after_a_survived_kill(run_job, tmp_path, ulfm):
    folder, done = run_with_traps(run_job, tmp_path, [[1, STEP, "before", 2]], 2)
    assert done.returncode == 0, done.stdout + done.stderr
    left = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended meanwhile
            left.append((process / "cmdline").read_bytes())
    assert not [line for line in left if str(folder).encode() in line]
    assert "survives failures: yes" in done.stdout
    assert "rank 1 was lost in step 2; 1 rank goes on" in done.stdout


#: Lets rank 1 end otherwise than by a SIGKILL when it first adds a gradient in its second step.
OTHER_ENDS = """
import distdl.engine.trainer

class Trainer(distdl.engine.trainer.Trainer):
    def step(self):
        if self.communicator.world_ranks[self.communicator.rank] == 1 and self.state.step == 1:
            {end}
        super().step()

import distdl.engine.prepare
distdl.engine.prepare.Trainer = Trainer
"""


@pytest.mark.parametrize(
    ("end", "said"),
    [
        ("os.abort()", ""),
        ("raise MemoryError('no memory')", "[rank 1] MemoryError: no memory"),
        ("raise OSError(5, 'Input/output error')", "[rank 1] OSError: [Errno 5] Input/output error"),
    ],
)
def test_a_rank_whose_host_fails_it_is_gone_on_without(run_job, tmp_path, undisturbed, end, said):
    folder, done = run_with_traps(run_job, tmp_path, [], 2, more=OTHER_ENDS.format(end=end))
    assert done.returncode == 0, done.stdout + done.stderr
    assert said in done.stderr
    summary = json.loads((folder / "summary.json").read_text())
    assert [loss["lost_ranks"] for loss in summary["recoveries"]] == [[1]]
    assert summary["weights_sha256"] == undisturbed[0][0]


def test_a_defect_after_a_survived_kill_ends_the_job(run_job, tmp_path, ulfm):
    defect = OTHER_ENDS.format(end="raise RuntimeError('a defect')").replace("step == 1", "step == 2")
    _, done = run_with_traps(run_job, tmp_path, [[0, STEP, "before", 1]], 3, more=defect)
    assert done.returncode != 0
    assert "rank 0 was lost in step 1" in done.stdout
    assert any("RuntimeError: a defect" in line for line in done.stderr.splitlines())
    assert "weights sha256" not in done.stdout


def test_what_every_survivor_raises_later_keeps_its_exit_code(run_job, tmp_path, ulfm):
    """A disk that refuses every checkpoint, after a rank was lost: one line, exit code 2."""
    _, done = run_with_traps(run_job, tmp_path, [[1, STEP, "before", 1]], 3, more=FULL_DISK)
    assert done.returncode == 2, done.stdout + done.stderr
    (line,) = [line for line in done.stderr.splitlines() if "error" in line and "checkpoint" in line]
    assert "No space left on device" in line
    assert "Traceback" not in done.stderr
