"""The next comparison finds a flipped bit in a replica. The cross-check of a step finds one in a gradient."""

import sys

import numpy as np
import pytest
from injected import faults, flip, spoil_records, spoil_state
from small_runs import remove, small_run, worlds

from distdl import nn
from distdl.engine.storage import checkpoints
from distdl.engine.timing.balance import Balance
from distdl.errors import CorruptionError
from distdl.job.mpirun_command import mpirun_command
from distdl.parallel import OneProcess

FLIPS = {
    "parameters": lambda state: flip(state.network.parameters),
    "optimizer": lambda state: flip(next(iter(state.optimizer.state.values()))),
    "epoch sums": lambda state: flip(state.epoch_sums.counts, byte=0, bit=1),
}


def named(error):
    """Return the ranks that the message names as suspects."""
    text = str(error).removeprefix("silent corruption on rank ").split(": ")[0]
    return [int(part.split()[0]) for part in text.split(" or ")]


def expected_suspects(size, victim):
    return [victim] if size > 2 else [0, 1]


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("what", FLIPS)
def test_a_flipped_bit_in_one_replica_is_found_at_the_next_comparison(communicator, shared_tmp_path, what):
    """The bit flips before step 2. Steps 2, 4 and 6 are compared. The last checkpoint is that of step 1."""
    for size, part in worlds(communicator, (2, 3, 4)):
        expected = small_run(part, shared_tmp_path / f"{size}", optimizer="momentum")
        for victim in sorted({0, size - 1}):
            folder = shared_tmp_path / f"{size}-{victim}"
            with faults():
                spoil_state(FLIPS[what], step=2, rank=victim)
                with pytest.raises(CorruptionError, match="after step 2, first in") as caught:
                    small_run(part, folder, verify_every=2, checkpoint_every=1, optimizer="momentum")
            assert (caught.value.agreed, caught.value.exit_code) == (True, 4)
            assert named(caught.value) == expected_suspects(size, victim)
            part.barrier()
            assert checkpoints.steps_in(folder / "checkpoints") == [1]
            assert small_run(part, folder, resume="auto", optimizer="momentum") == expected
    remove(communicator, shared_tmp_path)


@pytest.mark.mpi(min_size=2)
def test_a_replica_that_differs_is_not_saved(communicator, shared_tmp_path):
    """Replicas are compared every 100 steps, and before the checkpoint at the end of the epoch (step 3)."""
    for size, part in worlds(communicator, (2, 3, 4)):
        with faults():
            spoil_state(FLIPS["parameters"], step=1, rank=0)
            with pytest.raises(CorruptionError, match="after step 3, first in conv"):
                small_run(part, shared_tmp_path / f"{size}")
        part.barrier()
        assert checkpoints.steps_in(shared_tmp_path / f"{size}" / "checkpoints") == []
    remove(communicator, shared_tmp_path)


@pytest.mark.mpi(min_size=2)
def test_without_comparisons_the_receipts_are_compared_at_the_end(communicator, shared_tmp_path):
    for size, part in worlds(communicator, (3, 4)):
        with faults():
            spoil_state(FLIPS["parameters"], step=1, rank=2)
            with pytest.raises(CorruptionError, match="the weights differ at the end") as caught:
                small_run(part, shared_tmp_path / f"{size}", verify_every=0)
            assert named(caught.value) == [2]
    remove(communicator, shared_tmp_path)


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("field", ["gradient", "loss_sum", "counts"])
@pytest.mark.parametrize("reduction", ["tree", "allreduce"])
def test_a_bit_flipped_once_in_a_gradient_is_found_in_that_step_and_its_rank_named(
    communicator, shared_tmp_path, field, reduction
):
    for size, part in worlds(communicator):
        for victim in sorted({0, size - 1}):
            with faults():
                spoil_records(
                    lambda record: flip(record[field], byte=0),
                    step=2,
                    rank=victim,
                    once=True,
                )
                with pytest.raises(CorruptionError, match="step 2 has other bits when computed again") as caught:
                    small_run(part, shared_tmp_path / f"{size}-{victim}", cross_check=1, reduction=reduction)
            assert (caught.value.agreed, caught.value.exit_code) == (True, 4)
            assert named(caught.value) == [victim]
    remove(communicator, shared_tmp_path)


@pytest.mark.mpi(min_size=2)
def test_a_rank_that_always_computes_wrong_bits_is_named_if_there_are_three_ranks(communicator, shared_tmp_path):
    for size, part in worlds(communicator, (2, 3, 4)):
        for victim in sorted({0, size - 1}):
            with faults():
                spoil_records(lambda record: flip(record["gradient"]), step=2, rank=victim)
                with pytest.raises(CorruptionError, match="the same shard of step 2 has other bits") as caught:
                    small_run(part, shared_tmp_path / f"{size}-{victim}", cross_check=2)
            assert named(caught.value) == expected_suspects(size, victim)
    remove(communicator, shared_tmp_path)


@pytest.mark.mpi(min_size=2)
def test_a_cross_check_finds_flipped_weights_before_the_step_is_taken(communicator, shared_tmp_path):
    for size, part in worlds(communicator, (2, 3, 4)):
        for victim in sorted({0, size - 1}):
            with faults():
                spoil_state(FLIPS["parameters"], step=2, rank=victim)
                with pytest.raises(CorruptionError, match=r"after step 1, first in conv2d_1\.weight") as caught:
                    small_run(part, shared_tmp_path / f"{size}-{victim}", cross_check=2)
            assert named(caught.value) == expected_suspects(size, victim)
    remove(communicator, shared_tmp_path)


class Counting(nn.Flatten):
    """A layer that is not pure: its output depends on the number of calls."""

    calls = 0

    def forward(self, x, *, training, key):
        self.calls += 1
        return super().forward(x, training=training, key=key) + np.float32(self.calls)


def test_the_cross_check_of_a_user_s_model_also_names_its_layers(tmp_path):
    def build(input_shape, classes):
        return nn.Sequential([Counting(), nn.Affine(classes)], input_shape)

    with pytest.raises(CorruptionError, match=r"computed again \(or a layer of the model is not a pure function"):
        small_run(OneProcess(), tmp_path / "run", build_network=build, cross_check=1)


def test_a_single_rank_checks_itself(tmp_path):
    spoil_records(lambda record: flip(record["gradient"]), step=2, once=True)
    with pytest.raises(CorruptionError, match=r"on rank 0 .*step 2 has other bits when computed again; leave"):
        small_run(OneProcess(), tmp_path / "run", cross_check=1)


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("model", ["simple_convnet", "deep_convnet"])
@pytest.mark.parametrize("balance", [False, True])
def test_cross_checks_and_comparisons_do_not_change_the_bits(
    communicator, shared_tmp_path, monkeypatch, model, balance
):
    """Shards change in every step. Some are empty in the ragged batch of more than 6 ranks."""
    if balance:
        monkeypatch.setattr(Balance, "observe", lambda *_: True)
    expected = small_run(OneProcess(), shared_tmp_path / "one", model=model) if communicator.rank == 0 else None
    for size, part in worlds(communicator, (1, 2, 3, 4, 8)):
        folder = shared_tmp_path / f"{size}"
        found = small_run(part, folder, model=model, cross_check=1, verify_every=1, balance=balance)
        if part.rank == 0:
            assert found == expected
    remove(communicator, shared_tmp_path)


#: The main job with a flipped bit on rank 1.
PROGRAM = """
import sys
sys.path.insert(0, sys.argv[1])
from injected import faults, flip, spoil_records, spoil_state
from distdl import cli, train_command
{spoil}
sys.exit(cli.run(train_command.main, sys.argv[2:]))
"""


@pytest.mark.parametrize(
    ("ranks", "spoil", "flags", "told"),
    [
        (
            2,
            "spoil_state(lambda state: flip(state.network.parameters), step=6, rank=1)",
            ["--verify-every", "4"],
            "after step 8, first in affine_1.weight",
        ),
        (
            4,
            "spoil_records(lambda record: flip(record['gradient']), step=6, rank=1, once=True)",
            ["--cross-check", "1"],
            "a shard of step 6 has other bits when computed again",
        ),
    ],
)
def test_the_job_ends_with_one_line_and_its_own_exit_code(run_job, tmp_path, ranks, spoil, flags, told):
    program = tmp_path / "program.py"
    program.write_text(PROGRAM.format(spoil=spoil))
    here = __file__.rpartition("/")[0]
    arguments = ["--model", "mlp", "--kernels", "numpy", "--epochs", "2", "--run-dir", str(tmp_path / "run"), *flags]
    launch = mpirun_command(ranks, [sys.executable, str(program), here, *arguments])
    done = run_job(launch, timeout=120)
    assert done.returncode == 4, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("distdl: ")]
    assert line.startswith("distdl: error: silent corruption on rank ")
    assert "1 (host " in line
    assert told in line
    assert "Traceback" not in done.stderr
