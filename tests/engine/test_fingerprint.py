"""The fingerprint shows whether ranks, or a run and the checkpoint that it resumes from, compute the same bits."""

import dataclasses
import json
import socket
from pathlib import Path

import numpy as np
import pytest
from small_runs import piece_of_digits, small_config, small_run, warnings_in

from distdl.config import TrainConfig
from distdl.data import PreparedDataset
from distdl.engine import same_bits
from distdl.engine.fingerprint import fingerprint, first_difference
from distdl.engine.same_bits import bits_of_ranks, change_of_bits, check_same_bits, warnings_about_bits
from distdl.engine.storage import checkpoints
from distdl.engine.storage.header import CheckpointHeader
from distdl.engine.storage.run_folder import StartingPoint
from distdl.errors import UserError
from distdl.nn import Affine, BatchNorm, Conv2d, Flatten, ReLU, Sequential
from distdl.nn.kernels import NUMPY
from distdl.nn.layers import Layer
from distdl.parallel import OneProcess
from distdl.rng import Key


class Foreign(Layer):
    """A layer of a user: it counts its calls."""

    calls = 0

    def forward(self, x, *, training, key):
        self.calls += 1
        return x


def prepared(*more, kernels=NUMPY, seed=0, **settings):
    """Return the arguments of `fingerprint` for a small network."""
    config = small_config(None, seed=seed, **settings).checked()
    network = Sequential(
        [Conv2d(5, 3), BatchNorm(), ReLU(), Flatten(), *more, Affine(4)], (8, 8, 1), kernels=kernels.for_network()
    )
    network.initialize(Key(seed).of("initialization"))
    return config, PreparedDataset.prepare(piece_of_digits(94), 0), network


class Portable(type(NUMPY)):
    """NumPy's kernels that claim to give the same bits on every CPU."""

    portable = True


@pytest.mark.parametrize("kernels", [NUMPY, Portable()], ids=["numpy", "portable"])
def test_a_fingerprint_repeats_and_leaves_the_network_as_it_was(kernels):
    config, data, network = prepared(kernels=kernels)
    before = network.parameters.tobytes(), network.buffers.tobytes()
    first = fingerprint(config, data, network)
    assert fingerprint(config, data, network) == first == fingerprint(*prepared(kernels=kernels))
    assert fingerprint(*prepared(kernels=kernels, seed=1)) == first, "it does not depend on the weights"
    assert (network.parameters.tobytes(), network.buffers.tobytes()) == before
    assert not network.gradients.any()
    assert not network.statistics.any()
    assert json.loads(json.dumps(first)) == first
    assert all(len(value) == 8 for value in first.values())


def test_only_operations_that_enter_the_results_count():
    """Portable kernels run the layers themselves; a layer of the user is not run, but may use all of NumPy."""
    names = list(fingerprint(*prepared()))
    assert names[:3] == ["normal numbers", "loss", "optimizer adam"]
    assert {"product (16,2048)×(2048,16)", "product (16,9)×(9,5)", "exp", "log", "tanh", "sum"} <= set(names)
    assert not any("Conv2d" in name for name in names)

    portable = list(fingerprint(*prepared(kernels=Portable())))
    assert [name.split(" ")[0] for name in portable[3:]] == [
        *("conv2d_1", "batchnorm_1", "relu_1", "flatten_1", "affine_1")
    ]
    foreign = Foreign()
    with_own = list(fingerprint(*prepared(foreign, kernels=Portable())))
    assert foreign.calls == 0
    assert not any("Foreign" in name for name in with_own)
    assert set(portable) < set(with_own)
    assert set(names) <= set(with_own)


def test_a_function_with_other_bits_is_found(monkeypatch):
    ours = fingerprint(*prepared())
    exp = np.exp
    monkeypatch.setattr(np, "exp", lambda x, **more: exp(np.nextafter(x, x.dtype.type(2)), **more))
    assert first_difference(ours, fingerprint(*prepared())) in {"loss", "exp"}


def test_portable_kernels_find_a_layer_that_computes_other_bits(monkeypatch):
    ours = fingerprint(*prepared(kernels=Portable()))
    forward = BatchNorm.forward
    monkeypatch.setattr(BatchNorm, "forward", lambda *args, **more: forward(*args, **more) * np.float32(1 + 2.0**-20))
    theirs = fingerprint(*prepared(kernels=Portable()))
    assert first_difference(ours, theirs) == "batchnorm_1 (BatchNorm)"
    assert sum(ours[name] != theirs[name] for name in ours) == 1


class FourRanks(OneProcess):
    """Four ranks on three hosts, as rank 0 sees them; ranks 1 and 3 are on one host and compute another `sum`."""

    size = 4

    def __init__(self):
        super().__init__("four ranks")

    def allgather_json(self, value):
        if value == socket.gethostname():
            return ["a", "b", "c", "b"]
        other = {**value, "sum": "ff", "tanh": "ff"} if isinstance(value, dict) else f"{value}'"
        return [value, other, value, other]


def test_ranks_that_differ_are_named_with_their_hosts_and_the_first_operation():
    ours = {"exp": "1", "sum": "2", "tanh": "3"}
    assert bits_of_ranks(OneProcess(), ours) == {"fingerprint": ours, "ranks_that_differ": []}
    text = "ranks 1, 3 on b and rank 0 on a compute other bits, first in: sum"
    found = bits_of_ranks(FourRanks(), ours)
    assert found == {"fingerprint": ours, "ranks_that_differ": [text]}
    with pytest.raises(
        UserError,
        match=f"^--require-same-bits: {text}; give --kernels compiled or hosts of one kind, or leave the flag out",
    ):
        check_same_bits(None, found)


@pytest.mark.mpi(min_size=2)
def test_a_rank_that_differs_is_a_warning_or_an_error_on_every_rank(communicator, shared_tmp_path, monkeypatch, capsys):
    """The receipt does not change: here only the fingerprint differs."""
    expected = small_run(communicator, shared_tmp_path / "same", kernels="numpy")
    capsys.readouterr()

    def other(*given):
        return fingerprint(*given) | ({"sum": "0"} if communicator.rank == 1 else {})

    monkeypatch.setattr(same_bits, "fingerprint", other)
    assert small_run(communicator, shared_tmp_path / "run", kernels="numpy") == expected
    warnings = warnings_in(capsys.readouterr().err)
    host = socket.gethostname()
    assert len(warnings) == (communicator.rank == 0)
    if communicator.rank == 0:
        text = f"rank 1 on {host} and rank 0 on {host} compute other bits, first in: sum"
        assert warnings == [f"distdl: warning: {text}: bits depend on the ranks"]
        assert json.loads((shared_tmp_path / "run" / "env.json").read_text())["ranks_that_differ"] == [text]
    with pytest.raises(UserError, match=r"--require-same-bits: rank 1 on .* compute other bits, first in: sum"):
        small_run(communicator, shared_tmp_path / "refused", kernels="numpy", require_same_bits=True)
    assert not (shared_tmp_path / "refused").exists()


def test_a_resume_with_other_bits_is_a_warning_or_an_error_that_names_the_operation(tmp_path, monkeypatch, capsys):
    small_run(OneProcess(), tmp_path / "run", max_steps=2, kernels="numpy")
    small_run(OneProcess(), tmp_path / "run", max_steps=3, resume="auto", require_same_bits=True)
    assert warnings_in(capsys.readouterr().err) == []
    written = json.loads((tmp_path / "run" / "env.json").read_text())["fingerprint"]
    header = checkpoints.newest_intact(tmp_path / "run" / "checkpoints")[1].header
    assert header["fingerprint"] == written
    assert list(written)[:2] == ["normal numbers", "loss"]

    monkeypatch.setattr(same_bits, "fingerprint", lambda *given: fingerprint(*given) | {"exp": "0", "tanh": "0"})
    with pytest.raises(UserError, match=r"--require-same-bits: cannot resume from .*step-0*3.* first in: exp; resume"):
        small_run(OneProcess(), tmp_path / "run", max_steps=4, resume="auto", require_same_bits=True)
    small_run(OneProcess(), tmp_path / "run", max_steps=4, resume="auto")
    [warning] = warnings_in(capsys.readouterr().err)
    assert warning.endswith("computed other bits than this one, first in: exp: bits may differ")


BEFORE = CheckpointHeader.parse(
    {
        "step": 6,
        "config": {"seed": 0},
        "progress": {
            **dict.fromkeys(("train_loss", "validation_loss", "validation_accuracy", "best_step")),
            "train_seconds": 1.0,
        },
        "log_bytes": {},
        "data_sha256": "0",
        "versions": {"numpy": "2"},
        "kernel_family": "Zen",
    },
    "x",
)


@pytest.mark.parametrize(
    ("then", "families", "now", "said"),
    [
        (None, ["Zen"], {"exp": "1"}, None),
        (None, ["Haswell", "Zen"], {"exp": "1"}, "the checkpoint was made with the kernels Zen, this run has Haswell"),
        ({"exp": "1"}, ["Haswell"], {"exp": "1"}, None),
        ({"exp": "1"}, ["Zen"], {"exp": "2"}, "the run that wrote the checkpoint computed other bits than this one"),
        ({"exp": "1"}, ["Haswell"], {"exp": "2"}, "the checkpoint (Zen; here Haswell) computed other bits .*in: exp"),
        ({"exp": "1", "old": "1"}, ["Zen"], {"new": "2", "exp": "1"}, None),
    ],
)
def test_a_checkpoint_without_a_fingerprint_is_compared_by_the_name_of_its_kernels(then, families, now, said):
    header = dataclasses.replace(BEFORE, fingerprint=then)
    change = change_of_bits(header, {"kernel_families": families, "fingerprint": now})
    if said is None:
        assert change is None
    else:
        for part in said.replace("(", "").replace(")", "").split(" .*"):
            assert part in change.replace("(", "").replace(")", "")


def test_a_checkpoint_of_an_earlier_version_proves_no_bits(tmp_path, monkeypatch):
    small_run(OneProcess(), tmp_path / "run", max_steps=2)
    monkeypatch.setattr(CheckpointHeader, "fingerprint", None)
    parse = CheckpointHeader.parse.__func__
    monkeypatch.setattr(
        CheckpointHeader,
        "parse",
        classmethod(lambda cls, *given: dataclasses.replace(parse(cls, *given), fingerprint=None)),
    )
    with pytest.raises(UserError, match="an earlier version wrote the checkpoint, without a fingerprint; resume where"):
        small_run(OneProcess(), tmp_path / "run", resume="auto", require_same_bits=True)


def test_packages_with_other_versions_on_a_host_are_named_with_the_hosts(monkeypatch):
    ours = {"distdl": "0.1", "python": "3.11", "numpy": "2.2", "mpi4py": "4.0"}
    assert same_bits.versions_that_differ(OneProcess(), ours) == []
    theirs = {"numpy": "2.1", "mpi4py": "4.0"}

    def found(_ranks, text):
        assert json.loads(text) == {"numpy": "2.2", "mpi4py": "4.0"}
        return {text: ["a", "c"], json.dumps(theirs): ["b"]}

    monkeypatch.setattr(same_bits, "hosts_by_text", found)
    (text,) = same_bits.versions_that_differ(OneProcess(), ours)
    assert text == "numpy has different versions (2.2 on a, c; 2.1 on b): install the same version on every host"
    assert warnings_about_bits(StartingPoint(Path("run")), TrainConfig(), {"versions_that_differ": [text]}) == [text]
