"""`distdl.audit` computes random stretches of a run again, and finds every forged one that it computes."""

import dataclasses
import itertools
import json
import re
import shutil
from fractions import Fraction

import numpy as np
import pytest
from recorded_runs import EVERY_STEP, STEPS_PER_EPOCH, plant, recorded_run
from small_runs import remove, worlds

from distdl import audit
from distdl.engine.fault_injection import forget
from distdl.engine.storage import checkpoints
from distdl.errors import DamagedFileError, PeerLost, UserError
from distdl.proof import audit_run
from distdl.proof.audit_run import choose, stretches_of, unseen
from distdl.proof.options import AuditOptions
from distdl.rng import Key

STEPS = 2 * STEPS_PER_EPOCH
PLANTED = 50


@pytest.fixture(scope="module")
def honest(tmp_path_factory):
    return recorded_run(tmp_path_factory.mktemp("honest") / "run", **EVERY_STEP)


@pytest.fixture
def run(honest, tmp_path):
    """A copy of the run, to forge."""
    shutil.copytree(honest, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def audited(capsys):
    """Return a function that audits a run; it returns the exit code and the output."""

    def call(folder, *flags):
        capsys.readouterr()
        code = audit.main([str(folder), *flags])
        return code, capsys.readouterr().out

    return call


def rewritten(folder, step, change):
    """Replace a checkpoint by what `change` makes of it, with a valid checksum."""
    path = checkpoints.path_of_step(folder / "checkpoints", step)
    checkpoints.write(path, change(checkpoints.read(path)))


def test_an_honest_run_has_no_difference(honest, audited):
    code, output = audited(honest, "--fraction", "1")
    assert code == 0
    assert output.count(": the same bits (") == STEPS
    assert f"audited: {STEPS} of {STEPS} stretches, {STEPS} of {STEPS} steps\n" in output
    assert "no difference: every step of the run was computed again\n" in output
    receipt = json.loads((honest / "summary.json").read_text())["weights_sha256"]
    assert f"weights sha256: {receipt}\n" in output


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("settings", [{}, {"schedule": "plateau", "plateau_patience": 1, "augment": "flip"}])
def test_the_number_of_ranks_does_not_matter(communicator, shared_tmp_path, monkeypatch, capsys, settings):
    folder = recorded_run(
        shared_tmp_path / "run", communicator, epochs=3, checkpoint_every=3, record_hashes=True, **settings
    )
    for _, part in worlds(communicator, (1, 2, 3)):
        monkeypatch.setattr(audit_run, "world", lambda part=part: part)
        capsys.readouterr()
        assert audit_run.audit(AuditOptions(run=folder, fraction=1.0)) == 0
        if part.rank == 0:
            assert "no difference: every step of the run was computed again" in capsys.readouterr().out
    remove(communicator, shared_tmp_path)


@pytest.mark.parametrize("number", range(PLANTED))
def test_a_planted_bit_is_found_at_its_exact_place(run, audited, number):
    words = Key(number).of("forge").words(4).tolist()
    step, place = 1 + words[0] % STEPS, {}

    def forge(checkpoint):
        names = sorted(name for name, array in checkpoint.tensors.items() if array.dtype == np.float32)
        name = place["tensor"] = names[words[1] % len(names)]
        array = checkpoint.tensors[name].copy()
        place["element"] = tuple(map(int, np.unravel_index(words[2] % array.size, array.shape)))
        array.view(np.uint32)[place["element"]] ^= np.uint32(1 << words[3] % 23)
        return dataclasses.replace(checkpoint, tensors={**checkpoint.tensors, name: array})

    rewritten(run, step, forge)
    code, output = audited(run, "--fraction", "1")
    assert code == 1
    [(found, tensor, element)] = re.findall(
        rf"steps {step} to {step}: DIFFERENT, first at step (\d+), tensor (\S+), element ([^:]+):", output
    )
    assert (int(found), tensor, tuple(map(int, re.findall(r"\d+", element)))) == (step, *place.values())
    honest_steps = set(range(1, STEPS + 1)) - {step, step + 1}  # the next one starts from the forged checkpoint
    assert all(f"steps {one} to {one}: the same bits" in output for one in honest_steps)


@pytest.mark.parametrize("number", range(5))
def test_a_bit_that_flipped_in_training_is_found(tmp_path, audited, number):
    planted = plant(number, steps=STEPS)
    folder = recorded_run(tmp_path / "run", checkpoint_every=2, keep_checkpoints=20, record_hashes=True)
    forget()
    code, output = audited(folder, "--fraction", "1")
    assert code == 1
    step = planted["step"]
    assert re.findall(r"DIFFERENT, first at step (\d+), tensor ([^\s:,]+)", output) == [(str(step), planted["tensor"])]


def test_only_the_chosen_share_is_computed_and_the_seed_repeats_the_choice(honest, audited):
    code, output = audited(honest, "--fraction", "0.3")
    assert code == 0
    seed = re.findall(r"audited: 3 of 8 stretches, 3 of 8 steps \(--seed (\d+) chooses the same\)", output)[0]
    assert output.count(": the same bits (") == 3
    assert "the probability that a forged stretch remains unseen:\n" in output
    assert "  0.62 if 1 is forged, 0.36 if 2 are forged, 0.018 if 5 are forged\n" in output
    steps = re.findall(r"steps (\d+) to", output)
    assert re.findall(r"steps (\d+) to", audited(honest, "--fraction", "0.3", "--seed", seed)[1]) == steps


def test_without_a_seed_the_choice_cannot_be_foreseen(honest, audited):
    assert len({re.findall(r"steps (\d+) to", audited(honest, "--fraction", "0.1")[1])[0] for _ in range(12)}) > 1


def test_the_probability_is_the_share_of_choices_that_meet_no_forged_stretch():
    for count, audited, forged in itertools.product(range(1, 8), range(1, 8), range(8)):
        if audited <= count and forged <= count:
            choices = list(itertools.combinations(range(count), audited))
            without = sum(min(choice) >= forged for choice in choices)
            assert unseen(count, audited, forged) == pytest.approx(float(Fraction(without, len(choices))))


def test_every_stretch_is_chosen_equally_often():
    every = stretches_of([3, 6, 9, 12, 15, 18, 21, 24, 27, 30])
    chosen = [one for seed in range(2000) for one in choose(every, 0.3, seed)]
    counts = [chosen.count(one) for one in every]
    assert sum(counts) == 6000
    assert all(abs(count - 600) < 5 * (2000 * 0.3 * 0.7) ** 0.5 for count in counts)


@pytest.mark.parametrize(
    ("file", "change", "told"),
    [
        ("metrics.jsonl", (b'"loss": 2.', b'"loss": 3.'), "first at step 1, loss in metrics.jsonl: 3."),
        ("metrics.jsonl", (b'"validation_loss": ', b'"validation_loss": 1'), "validation_loss in metrics.jsonl: 1"),
        ("summary.json", (b'"weights_sha256": "', b'"weights_sha256": "f'), "summary.json: DIFFERENT, weights_sha256"),
        ("summary.json", (b'"state_sha256": "', b'"state_sha256": "f'), "summary.json: DIFFERENT, state_sha256"),
    ],
)
def test_a_forged_number_is_found(run, audited, file, change, told):
    content = (run / file).read_bytes()
    assert change[0] in content
    (run / file).write_bytes(content.replace(*change, 1))
    code, output = audited(run, "--fraction", "1")
    assert code == 1
    assert told in output
    assert output.endswith("DIFFERENT: the records of this run are not those of its training here\n")
    if file == "metrics.jsonl":
        assert "metrics.jsonl was changed after the checkpoint after step" in output


@pytest.mark.parametrize("name", ["plateau_cuts", "best_step", "validation_loss"])
def test_forged_progress_is_found(run, audited, name):
    """The learning rate of a later step would depend on it."""

    def forge(checkpoint):
        progress = {**checkpoint.header["progress"], name: 1}
        if name == "validation_loss":
            progress[name] = 0.5
        return dataclasses.replace(checkpoint, header={**checkpoint.header, "progress": progress})

    rewritten(run, 6, forge)
    code, output = audited(run, "--fraction", "1")
    assert code == 1
    assert f"steps 6 to 6: DIFFERENT, {name} of the checkpoint after step 6: " in output


def test_a_forged_hash_is_found(tmp_path, audited):
    folder = recorded_run(tmp_path / "run", record_hashes=True)
    content = (folder / "hashes.jsonl").read_bytes()
    digest = re.findall(rb'"affine_1\.bias": "(\w+)"', content)[2]
    (folder / "hashes.jsonl").write_bytes(content.replace(digest, b"0" * 16))
    code, output = audited(folder, "--fraction", "1")
    assert code == 1
    assert "DIFFERENT, first at step 3, tensor affine_1.bias: hash 0000000000000000 | hash " in output


def test_edited_settings_are_found(run, audited):
    path = run / "config.toml"
    path.write_text(path.read_text().replace("batch_size = 384", "batch_size = 128"))
    code, output = audited(run, "--fraction", "0.1")
    assert code == 1
    assert re.search(r"^DIFFERENT: .*config.toml does not fit .*: --batch-size is 128 here and 384 in", output)
    path.write_text("batch_size = many\n")
    with pytest.raises(DamagedFileError, match=r"config.toml is damaged"):
        audited(run, "--fraction", "0.1")


@pytest.mark.parametrize("step", [3, 4])
def test_a_checkpoint_of_another_training_is_a_difference_not_wrong_input(run, audited, tmp_path, step):
    other = recorded_run(tmp_path / "other", **EVERY_STEP, optimizer="sgd")
    place = checkpoints.path_of_step(run / "checkpoints", step)
    shutil.copy(checkpoints.path_of_step(other / "checkpoints", step), place)
    code, output = audited(run, "--fraction", "1")
    assert code == 1
    assert re.search(r"does not fit .*: --optimizer is 'adam' here and 'sgd' in the checkpoint, --lr is", output)
    assert f"steps {step} to {step}: DIFFERENT, first at step {step}, tensor " in output
    assert f"steps {step + 1} to {step + 1}: DIFFERENT, they cannot start: " in output
    assert "steps 7 to 7: the same bits" in output
    seed = next(seed for seed in range(99) if choose(stretches_of(range(1, 9)), 0.1, seed) == [(step, step + 1)])
    code, output = audited(run, "--fraction", "0.1", "--seed", str(seed))
    assert code == 1
    assert "DIFFERENT, and the rest cannot be computed: " in output


def test_a_lost_rank_is_not_a_difference(run, audited, monkeypatch):
    def lose(*_):
        raise PeerLost("a rank was lost")

    monkeypatch.setattr(audit_run, "_audit_stretch", lose)
    with pytest.raises(UserError, match="a rank was lost; the result is unknown: start the command again") as caught:
        audited(run)
    assert caught.value.exit_code == 2


def test_a_damaged_checkpoint_is_named(run, audited):
    path = checkpoints.path_of_step(run / "checkpoints", 3)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DamagedFileError, match=r"step-000000003\.safetensors is damaged"):
        audited(run, "--fraction", "1")


def test_an_audit_writes_nothing(run, audited):
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    audited(run, "--fraction", "1")
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_what_cannot_be_audited_is_refused(honest, tmp_path):
    without = tmp_path / "without"
    shutil.copytree(honest, without)
    shutil.rmtree(without / "checkpoints")
    for arguments, message in (
        ([], "required: RUN"),
        ([honest, "--fraction", "0"], "--fraction must be above 0 and at most 1, not 0.0"),
        ([honest, "--fraction", "1.5"], "at most 1, not 1.5"),
        ([honest, "--fraction", "nan"], "at most 1, not nan"),
        ([honest, "--seed", "-1"], "--seed must be at least 0, not -1"),
        ([without], "has no checkpoint, so there is nothing to compute again"),
        ([tmp_path / "missing"], "does not exist: expected the run folder of a training"),
    ):
        with pytest.raises(UserError, match=message):
            audit.main(list(map(str, arguments)))
