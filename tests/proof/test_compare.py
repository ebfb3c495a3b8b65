"""`distdl.compare` says "equal", or names the first step, tensor and element that differ."""

import dataclasses
import json
import re
import shutil

import numpy as np
import pytest
from recorded_runs import EVERY_STEP, STEPS_PER_EPOCH, plant, recorded_run
from small_runs import remove, small_run, worlds

from distdl import compare
from distdl.engine.fault_injection import forget
from distdl.engine.recorded import StepRecord, first_difference, first_element
from distdl.engine.storage import checkpoints
from distdl.errors import DamagedFileError, UserError
from distdl.job.launched_by import Launch
from distdl.parallel import OneProcess

PLANTED = 50
STEPS = 2 * STEPS_PER_EPOCH


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    return recorded_run(tmp_path_factory.mktemp("undisturbed") / "run", record_hashes=True, **EVERY_STEP)


@pytest.fixture(scope="module")
def with_hashes_only(tmp_path_factory):
    return recorded_run(tmp_path_factory.mktemp("hashes") / "run", record_hashes=True)


@pytest.fixture
def compared(capsys):
    """Return a function that compares two runs; it returns the exit code and the output."""

    def call(one, other):
        capsys.readouterr()
        code = compare.main([str(one), str(other)])
        return code, capsys.readouterr().out

    return call


def place_in(output):
    [(step, tensor, element)] = re.findall(r"DIFFERENT, first at step (\d+), tensor (\S+), element ([^:]+):", output)
    return {"step": int(step), "tensor": tensor, "element": tuple(map(int, re.findall(r"\d+", element)))}


@pytest.mark.parametrize("number", range(PLANTED))
def test_a_planted_bit_is_found_at_its_exact_place(undisturbed, compared, tmp_path, number):
    """Every second run records no hashes, so only its checkpoints tell the place."""
    planted = plant(number, steps=STEPS)
    run = recorded_run(tmp_path / "run", record_hashes=number % 2 == 0, **EVERY_STEP)
    forget()
    code, output = compared(undisturbed, run)
    bit = planted.pop("bit")
    assert code == 1
    assert place_in(output) == planted
    if planted["step"] > 1 or number % 2 == 0:  # otherwise the loss was computed before the flip
        assert "its loss is equal" in output
    assert f"bit {bit} differs" in output
    assert "no other tensor differs" in output
    assert (f"all tensors are equal after step {planted['step'] - 1}" in output) == (planted["step"] > 1)


@pytest.mark.parametrize("number", range(5))
def test_without_checkpoints_the_hashes_tell_step_and_tensor(with_hashes_only, compared, tmp_path, number):
    planted = plant(number, steps=STEPS_PER_EPOCH - 1)
    run = recorded_run(tmp_path / "run", record_hashes=True)
    code, output = compared(with_hashes_only, run)
    assert code == 1
    assert re.search(
        rf"DIFFERENT, first at step {planted['step']}, tensor {re.escape(planted['tensor'])}: hash \w{{16}} \| hash",
        output,
    )
    assert "the element is unknown: at least one of the runs has no checkpoint after this step" in output


def test_without_hashes_the_first_loss_that_differs_is_named(compared, tmp_path):
    """The bit flips in the update of step 1, the loss of step 2 differs, and the next checkpoint is that of step 4."""
    one = recorded_run(tmp_path / "one")
    plant_weight_of_step(1)
    other = recorded_run(tmp_path / "other")
    code, output = compared(one, other)
    assert code == 1
    assert re.search(r"DIFFERENT, first at step 2, loss in metrics.jsonl: [\d.]+ \| [\d.]+\n", output)
    assert "no state before it was compared; the step between was not recorded by both" in output


def plant_weight_of_step(step):
    from distdl.engine.fault_injection import fail_at

    def flip(state):
        state.network.parameters.view(np.uint32)[0] ^= np.uint32(1 << 22)

    fail_at("update", when="after", rank=None, step=step, action=flip)


def test_the_output_shows_how_to_look_inside_both_sides(undisturbed, compared, tmp_path):
    plant_weight_of_step(3)
    run = recorded_run(tmp_path / "a run", **EVERY_STEP)
    _, output = compared(undisturbed, run)
    assert f"  python -m distdl.replay {undisturbed} --step 3 --micro-batch 0\n" in output
    assert f"  python -m distdl.replay '{run}' --step 3 --micro-batch 0\n" in output
    assert f"  python -m distdl.compare {undisturbed}/replay-step-000000003-micro-batch-0.npz '{run}/replay" in output


def test_the_shown_commands_name_the_user_code(compared, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.py").write_text(
        "from distdl import nn\n\ndef build(shape, classes):\n"
        "    return nn.Sequential([nn.Flatten(), nn.Affine(classes)], shape)\n"
    )
    runs = [recorded_run(tmp_path / f"{lr}", model="net.py:build", lr=lr, epochs=1) for lr in (0.1, 0.2)]
    code, output = compared(*runs)
    assert code == 1
    for run in runs:
        [line] = [line for line in output.splitlines() if f"distdl.replay {run}" in line]
        assert line.endswith(" --micro-batch 0 --model net.py:build")


def test_equal_runs_are_equal_and_their_other_differences_are_listed(undisturbed, compared, tmp_path):
    run = recorded_run(tmp_path / "run", checkpoint_every=3, verify_every=2, on_nonfinite="skip")
    code, output = compared(undisturbed, run)
    assert code == 0
    assert f"equal bit for bit: every record that both runs have, and all tensors after step {STEPS}\n" in output
    assert (
        f"compared: {STEPS} steps in metrics.jsonl, 2 epochs in metrics.jsonl, 3 checkpoints (after step 4, 6, 8)"
        in output
    )
    assert "differences that changed no bit:\n  --on-nonfinite: 'stop' | 'skip'\n" in output


@pytest.mark.mpi(min_size=2)
def test_runs_on_other_numbers_of_ranks_are_equal(communicator, shared_tmp_path, capsys):
    one = shared_tmp_path / "one"
    if communicator.rank == 0:
        small_run(OneProcess(), one, record_hashes=True)
    communicator.barrier()
    for size, part in worlds(communicator, (2, 3, 4)):
        small_run(part, shared_tmp_path / f"{size}", record_hashes=True)
        if part.rank == 0:
            from distdl.proof.compare_runs import compare as compare_folders

            capsys.readouterr()
            assert compare_folders(one, shared_tmp_path / f"{size}") == 0
            output = capsys.readouterr().out
            assert "equal bit for bit: every record that both runs have, and all tensors after step 6\n" in output
            assert f"  ranks: 1 | {size}\n" in output
    remove(communicator, shared_tmp_path)


def test_a_run_that_ends_earlier_is_equal_up_to_its_end(undisturbed, compared, tmp_path):
    run = recorded_run(tmp_path / "run", max_steps=5)
    code, output = compared(run, undisturbed)
    assert code == 1
    assert f"equal up to step 5, where run 1 ends; the other one has {STEPS} steps" in output


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"seed": 1}, "--seed: 0 | 1"),
        ({"lr": 0.002}, "--lr: 0.001 | 0.002"),
        ({"batch_size": 192, "epochs": 1}, "--batch-size: 384 | 192"),
    ],
)
def test_other_settings_are_listed(undisturbed, compared, tmp_path, settings, line):
    code, output = compared(undisturbed, recorded_run(tmp_path / "run", record_hashes=True, **settings))
    assert code == 1
    assert "DIFFERENT, first at step 1, tensor affine_1.weight" in output
    heading, listed = output.partition("differences in settings, data, versions and machines:\n")[1:]
    assert heading
    assert f"  {line}\n" in listed
    assert ("  data sha256: " in listed) == ("seed" in settings)  # it covers the split


def test_other_data_versions_and_fingerprints_are_listed(undisturbed, compared, tmp_path):
    """The second run pretends to come from another machine: its env.json tells it."""
    run = tmp_path / "run"
    shutil.copytree(undisturbed, run)
    environment = json.loads((run / "env.json").read_text())
    environment["versions"]["numpy"] = "3.1"
    environment["kernel_families"] = ["Toaster"]
    operation = next(iter(environment["fingerprint"]))
    environment["fingerprint"][operation] = "00000000"
    (run / "env.json").write_text(json.dumps(environment))
    code, output = compared(undisturbed, run)
    assert code == 0
    assert f"  version of numpy: {np.__version__} | 3.1\n" in output
    assert re.search(r"  kernel families: .* \| Toaster\n", output)
    assert re.search(rf"  fingerprint: 1 of \d+ operations differ, first {operation}: \w+ \| 00000000\n", output)


def test_a_model_of_another_shape_differs_in_the_shape(compared, tmp_path):
    one = recorded_run(tmp_path / "one", **EVERY_STEP, max_steps=1)
    other = recorded_run(tmp_path / "other", **EVERY_STEP, max_steps=1, model_settings="hidden=20")
    code, output = compared(one, other)
    assert code == 1
    assert re.search(r"tensor affine_1\.bias: float32 \(\d+,\) \| float32 \(20,\)", output)


def forged(run, step, tensor, element=0, bit=3):
    """Flip a bit in a checkpoint, and give the file a valid checksum."""
    path = checkpoints.path_of_step(run / "checkpoints", step)
    checkpoint = checkpoints.read(path)
    array = checkpoint.tensors[tensor].copy()
    array.reshape(-1).view(np.uint8)[element * array.itemsize + bit // 8] ^= 1 << bit % 8
    checkpoints.write(path, dataclasses.replace(checkpoint, tensors={**checkpoint.tensors, tensor: array}))


def test_a_forged_checkpoint_differs_and_contradicts_its_own_records(undisturbed, compared, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(undisturbed, run)
    forged(run, 5, "affine_2.weight", element=7)
    code = compare.main([str(undisturbed), str(run)])
    out, err = capsys.readouterr()
    assert code == 1
    assert place_in(out)["tensor"] == "affine_2.weight"
    assert place_in(out)["step"] == 5
    assert "step-000000005.safetensors has another affine_2.weight than hashes.jsonl after step 5" in err


def test_an_edited_log_contradicts_the_checkpoints(undisturbed, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(undisturbed, run)
    log = run / "metrics.jsonl"
    log.write_bytes(log.read_bytes().replace(b'"step": 2', b'"step": 2 ', 1))
    assert compare.main([str(undisturbed), str(run)]) == 0
    assert "metrics.jsonl was changed after the checkpoint after step 2" in capsys.readouterr().err


def test_a_damaged_checkpoint_is_named(undisturbed, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(undisturbed, run)
    path = checkpoints.path_of_step(run / "checkpoints", 3)
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    with pytest.raises(DamagedFileError, match=r"step-000000003\.safetensors is damaged: its checksum"):
        compare.main([str(undisturbed), str(run)])


def test_what_cannot_be_compared_is_refused(undisturbed, tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    without = tmp_path / "without"
    shutil.copytree(undisturbed, without)
    shutil.rmtree(without / "checkpoints")
    for name in ("hashes.jsonl", "summary.json"):
        (without / name).unlink()
    for arguments, message in (
        ([], "required: RUN"),
        ([undisturbed], "1 runs given, expected two"),
        ([undisturbed, tmp_path / "missing"], "missing does not exist: expected the run folder of a training"),
        ([undisturbed, tmp_path / "empty"], "has no metrics.jsonl, hashes.jsonl or checkpoint: expected a run folder"),
        ([undisturbed, undisturbed], "are the same folder: give two runs"),
        ([undisturbed, without], "show no difference, but have no state after the same last step"),
        ([undisturbed, undisturbed / "env.json"], "is a folder|is not a file|cannot be read|not a regular file"),
    ):
        with pytest.raises(UserError, match=message):
            compare.main(list(map(str, arguments)))
    monkeypatch.setattr(compare, "read_launch", lambda: Launch("MPICH's mpirun", 0, 2))
    with pytest.raises(UserError, match="call it without mpirun"):
        compare.main([str(undisturbed), str(without)])


def test_the_bits_of_numbers_are_compared_not_their_values():
    zeros = np.array([0.0, np.nan], np.float32), np.array([-0.0, np.nan], np.float32)
    assert first_element(*zeros) == ((0,), "0 (0x00000000)", "-0 (0x80000000), bit 31 differs")
    assert first_element(zeros[0], zeros[0].copy()) is None


def test_the_place_is_the_first_tensor_in_the_order_of_the_state():
    hashes = {"conv2d_1.weight": "a", "affine_1.weight": "b", "m/conv2d_1.weight": "c"}
    one, other = (StepRecord(3, hashes={name: h + x for name, h in hashes.items()}) for x in ("", "!"))
    found = first_difference(one, other)
    assert (found.step, found.tensor, found.one, found.other) == (3, "conv2d_1.weight", "hash a", "hash a!")
    assert found.others == "2 more of its tensors differ"
