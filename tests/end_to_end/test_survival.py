"""If ranks are killed, the others finish that same step, to the same receipt and the same metrics.

These tests use real processes and real SIGKILLs, at chosen points. `tests/faults` kills at random moments.
"""

import json
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from small_runs import VERY_RAGGED, piece_of_digits, small_config, small_run

from distdl.engine import train
from distdl.engine.storage import checkpoints
from distdl.engine.storage.files import TEMPORARY_SUFFIX
from distdl.job.mpirun_command import mpirun_command
from distdl.parallel import OneProcess

#: Trains as `small_run` does, with the faults that the rules of `saboteur.py` describe.
PROGRAM = """
import json, sys
from pathlib import Path
sys.path[:0] = json.loads(sys.argv[1])
from distdl import cli
cli.set_blas_threads(1)
import saboteur

def main(arguments):
    from small_runs import VERY_RAGGED, piece_of_digits, small_config
    from distdl.engine import train
    saboteur.set_faults(json.loads(arguments[2]))
    train(small_config(Path(arguments[1]), **json.loads(arguments[3])), dataset=piece_of_digits(VERY_RAGGED))
    return 0

sys.exit(cli.run(main))
"""
HERE = Path(__file__).parent
SETTINGS = {"checkpoint_every": 2, "record_hashes": True, "kernels": "numpy"}
#: Fields of summary.json that may differ after a failure.
OF_THIS_RUN = {"ranks", "recoveries", "train_seconds", "samples_per_second"}


def fault(rank, phase, **more):
    """Return a rule of `saboteur.py`; by default it kills the rank."""
    return {"rank": rank, "phase": phase, **more}


def summary_of(folder):
    return json.loads((folder / "summary.json").read_text())


def compared(summary):
    """Return the part of a summary that no failure changes."""
    return {name: value for name, value in summary.items() if name not in OF_THIS_RUN}


class Undisturbed:
    """The results of a run without failures."""

    def __init__(self, folder):
        self.weights, self.state, self.metrics = small_run(OneProcess(), folder, **SETTINGS)
        self.hashes = (folder / "hashes.jsonl").read_bytes()
        self.summary = compared(summary_of(folder))
        self.progress = self._progress(folder)

    @staticmethod
    def _progress(folder):
        """Return the header of the last checkpoint, except for its seconds."""
        newest, checkpoint, complaints = checkpoints.newest_intact(folder / "checkpoints")
        assert (newest.name, complaints) == ("step-000000006.safetensors", [])
        return {name: value for name, value in checkpoint.header["progress"].items() if name != "train_seconds"}

    def assert_equal(self, folder):
        """Assert that the run in `folder` has ended with the same bits, logs and checkpoints."""
        summary = summary_of(folder)
        assert (summary["weights_sha256"], summary["state_sha256"]) == (self.weights, self.state)
        assert compared(summary) == self.summary
        assert (folder / "metrics.jsonl").read_bytes() == self.metrics
        assert (folder / "hashes.jsonl").read_bytes() == self.hashes
        assert self._progress(folder) == self.progress
        assert not [path for path in folder.rglob("*") if path.name.endswith(TEMPORARY_SUFFIX)]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, ulfm):
    return Undisturbed(tmp_path_factory.mktemp("undisturbed") / "run")


def run_with_faults(run_job, tmp_path, faults, ranks, **settings):
    program, folder = tmp_path / "program.py", tmp_path / "run"
    program.write_text(PROGRAM)
    paths = [str(HERE), str(HERE.parent / "faults")]
    arguments = [json.dumps(paths), str(folder), json.dumps(faults), json.dumps(SETTINGS | settings)]
    done = run_job(mpirun_command(ranks, [sys.executable, str(program), *arguments]), timeout=120)
    assert done.stderr.count("[saboteur]") == len(faults), done.stdout + done.stderr
    return folder, done


def recoveries_of(folder):
    return [(one["step"], one["lost_ranks"], one["ranks"]) for one in summary_of(folder)["recoveries"]]


@pytest.mark.parametrize("when", ["before", "after", "committed"])
def test_the_best_weights_are_scored_after_rank_0_is_lost(run_job, tmp_path, ulfm, when):
    """The first epoch stays the best, so the plateau schedule has reduced the rate too."""
    settings = {"test_with": "best", "schedule": "plateau", "plateau_patience": 1, "lr": 1e-6, "epochs": 3}
    weights, state, metrics = small_run(OneProcess(), tmp_path / "undisturbed", **SETTINGS, **settings)
    faults = [fault(1, "step", nth=8), fault(0, "test", when=when)]
    folder, done = run_with_faults(run_job, tmp_path, faults, 3, **settings)
    assert done.returncode == 0, done.stdout + done.stderr
    summary = summary_of(folder)
    assert (summary["weights_sha256"], summary["state_sha256"]) == (weights, state)
    assert (folder / "metrics.jsonl").read_bytes() == metrics
    assert compared(summary) == compared(summary_of(tmp_path / "undisturbed"))
    assert summary["test_epoch"] == summary["best_epoch"] == 1
    assert "(best weights, epoch 1)" in done.stdout


@pytest.mark.parametrize(
    ("ranks", "faults", "recoveries"),
    [
        pytest.param(
            4,
            [fault(2, "step", nth=2), fault(0, "validation"), fault(1, "checkpoint", when="after", nth=3)],
            [(2, [2], 3), (3, [0], 2), (4, [1], 1)],
            id="one after the other, two coordinators, down to one",
        ),
        pytest.param(4, [fault(1, "step", nth=2), fault(0, "agree")], [(2, [0, 1], 2)], id="in a recovery"),
        pytest.param(
            3,
            [fault(0, "step", nth=3), fault(1, "takeover", nth=3)],
            [(3, [0, 1], 1)],
            id="while taking over the run folder",
        ),
        pytest.param(
            3,
            [fault(0, "data"), fault(1, "run-folder")],
            [(0, [0, 1], 1)],
            id="while distributing data, and after making the run folder",
        ),
        pytest.param(
            2, [fault(0, "checkpoint", when="committed")], [(3, [0], 1)], id="after a checkpoint is committed"
        ),
        pytest.param(2, [fault(0, "test", when="committed")], [(6, [0], 1)], id="after the committed test"),
        pytest.param(2, [fault(0, "finish", when="after")], [(6, [0], 1)], id="at the very end"),
    ],
)
def test_the_others_continue_to_the_same_receipt_and_logs(run_job, tmp_path, undisturbed, ranks, faults, recoveries):
    folder, done = run_with_faults(run_job, tmp_path, faults, ranks)
    assert done.returncode == 0, done.stdout + done.stderr
    assert recoveries_of(folder) == recoveries
    assert summary_of(folder)["ranks"] == recoveries[-1][2]
    undisturbed.assert_equal(folder)
    assert f"weights sha256: {undisturbed.weights}" in done.stdout
    assert all(json.loads(line) for line in (folder / "timing.jsonl").read_text().splitlines())


def learns_late(rank, killed, phase, **more):
    """Kill one rank; let one survivor learn of it after the commit, before it has changed its state.

    MPI promises that all survivors get the same answer about a commit. The recovery does not rely on it.
    """
    return [fault(killed, phase, **more), fault(rank, phase, do="lose-a-peer", **more)]


@pytest.mark.parametrize(
    ("faults", "recoveries"),
    [
        *(
            pytest.param(learns_late(1, 2, "update", step=step), [(after, [2], 2)], id=f"in step {step}")
            for step, after in ((1, 2), (2, 2), (3, 3), (5, 6))
        ),
        pytest.param(
            [*learns_late(1, 2, "validation", when="committed", nth=2), fault(0, "checkpoint", step=6, nth=2)],
            [(6, [2], 2), (6, [0], 1)],
            id="in validation; then it must continue alone",
        ),
        pytest.param(
            [*learns_late(1, 2, "test", when="committed"), fault(0, "finish")],
            [(6, [2], 2), (6, [0], 1)],
            id="in the test; then it must continue alone",
        ),
        *(
            pytest.param(learns_late(1, 0, "update", step=step), [(after, [0], 2)], id=f"in step {step}, as new rank 0")
            for step, after in ((1, 2), (4, 4))
        ),
        *(
            pytest.param(learns_late(0, 2, "update", step=step), [(after, [2], 2)], id=f"in step {step}, as rank 0")
            for step, after in ((1, 2), (4, 4))
        ),
        *(
            pytest.param(learns_late(0, 2, phase, when="committed"), [(step, [2], 2)], id=f"in {phase}, as rank 0")
            for phase, step in (("validation", 3), ("checkpoint", 3), ("test", 6))
        ),
    ],
)
def test_a_survivor_at_an_earlier_step_takes_the_state_of_one_at_a_later_step(
    run_job, tmp_path, undisturbed, faults, recoveries
):
    folder, done = run_with_faults(run_job, tmp_path, faults, 3)
    assert done.returncode == 0, done.stdout + done.stderr
    assert recoveries_of(folder) == recoveries
    undisturbed.assert_equal(folder)


def test_a_survivor_at_an_earlier_step_takes_a_request_to_stop(run_job, tmp_path, undisturbed):
    faults = [fault(0, "step", step=2, do="signal:SIGUSR1"), *learns_late(1, 2, "update", step=2)]
    folder, done = run_with_faults(run_job, tmp_path, faults, 3)
    assert done.returncode == 75, done.stdout + done.stderr
    assert "stopped by SIGUSR1 after step 2, which is saved" in done.stderr
    assert recoveries_of(folder) == [(2, [2], 2)]
    train(small_config(folder, resume="auto", **SETTINGS), OneProcess(), dataset=piece_of_digits(VERY_RAGGED))
    undisturbed.assert_equal(folder)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("nth", [1, 3])
def test_a_coordinator_killed_while_its_thread_writes_a_checkpoint(run_job, tmp_path, undisturbed, when, nth):
    """The step of the other rank at that moment is unknown. The successor writes the last checkpoint again."""
    folder, done = run_with_faults(run_job, tmp_path, [fault(0, "checkpoint-write", when=when, nth=nth)], 2)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [lost for _, lost, _ in recoveries_of(folder)] == [[0]]
    undisturbed.assert_equal(folder)


def test_no_process_remains_after_a_survived_kill(run_job, tmp_path, ulfm):
    folder, done = run_with_faults(run_job, tmp_path, [fault(1, "step", nth=2)], 2)
    assert done.returncode == 0, done.stdout + done.stderr
    remaining = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended meanwhile
            remaining.append((process / "cmdline").read_bytes())
    assert not [line for line in remaining if str(folder).encode() in line]
    assert "survives failures: yes" in done.stdout
    assert "rank 1 was lost in step 2; 1 rank continues" in done.stdout


@pytest.mark.parametrize(
    ("end", "said"),
    [
        ("abort", ""),
        ("memory-error", "[rank 1] MemoryError: no memory"),
        ("os-error:5", "[rank 1] OSError: [Errno 5] Input/output error"),
    ],
)
def test_the_others_continue_without_a_rank_whose_host_fails(run_job, tmp_path, undisturbed, end, said):
    folder, done = run_with_faults(run_job, tmp_path, [fault(1, "step", step=2, do=end)], 2)
    assert done.returncode == 0, done.stdout + done.stderr
    assert said in done.stderr
    assert recoveries_of(folder) == [(2, [1], 1)]
    undisturbed.assert_equal(folder)


def test_a_defect_after_a_survived_kill_ends_the_job(run_job, tmp_path, ulfm):
    faults = [fault(0, "step"), fault(1, "step", step=3, do="raise")]
    _, done = run_with_faults(run_job, tmp_path, faults, 3)
    assert done.returncode != 0
    assert "rank 0 was lost in step 1" in done.stdout
    assert any("RuntimeError: a defect" in line for line in done.stderr.splitlines())
    assert "weights sha256" not in done.stdout


def test_an_error_that_all_survivors_raise_keeps_its_exit_code(run_job, tmp_path, ulfm):
    """A disk that refuses every checkpoint, after a rank was lost: one line, exit code 2."""
    faults = [fault(1, "step"), *(fault(0, "checkpoint-write", nth=nth, do="os-error:28") for nth in (1, 2, 3))]
    _, done = run_with_faults(run_job, tmp_path, faults, 3)
    assert done.returncode == 2, done.stdout + done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("distdl: error: ")]
    assert "cannot write the checkpoint after step" in line
    assert "No space left on device" in line
    assert "Traceback" not in done.stderr
