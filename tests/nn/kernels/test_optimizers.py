"""The compiled optimizers have the bits of the NumPy form; the compiled norm has those of its formula."""

import math

import numpy as np
import pytest
from small_runs import small_run

from distdl.engine import prepare
from distdl.engine.clipping import clip_by_norm
from distdl.nn.kernels import NUMPY
from distdl.optim import BLOCK, OPTIMIZERS
from distdl.parallel import OneProcess
from tests.nn.kernels.exact import fma, numbers

pytest.importorskip("numba")

#: The number of parameters, with the slices that decay and those that are frozen.
SHAPES = {
    "one": (1, [slice(0, 1)], []),
    "less than a vector": (13, [slice(0, 6)], []),
    "several blocks": (BLOCK + 45, [slice(0, 700), slice(704, BLOCK + 5)], []),
    "frozen": (1050, [slice(0, 100), slice(112, 500), slice(640, 1003)], [slice(112, 500), slice(1008, 1033)]),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    "settings",
    [{}, {"weight_decay": 0.1}, {"l1": 0.03}, {"weight_decay": 1e-4, "l1": 1e-5}],
    ids=["plain", "decay", "l1", "both"],
)
def test_every_update_has_the_bits_of_the_numpy_form(name, shape, settings):
    from distdl.nn.kernels.compiled import COMPILED

    size, decay_slices, frozen = SHAPES[shape]
    given = {"decay_slices": decay_slices, "frozen": frozen, **settings}
    plain = OPTIMIZERS[name](size, **given)
    fused = OPTIMIZERS[name](size, **given, fused=COMPILED.optimizer_rule(name))
    w = numbers(size, special=0.1)
    ours, theirs = w.copy(), w.copy()
    with np.errstate(all="ignore"):
        for step, samples in enumerate((1, 100, 128, 7, 1000), 1):
            total = numbers(size, seed=step, special=0.1)
            rate = 0.01 / step
            plain.update(theirs, total / np.float32(samples), rate, step)
            fused.update(ours, total, rate, step, samples)
    assert np.isnan(theirs).any() == np.isnan(w).any() or size > 1000
    np.testing.assert_array_equal(bits(ours), bits(theirs))
    for vector in plain.state:
        np.testing.assert_array_equal(bits(fused.state[vector]), bits(plain.state[vector]))
    for where in frozen:
        assert ours[where].tobytes() == w[where].tobytes()


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("adam", {}),
        ("adam", {"beta1": 0.5, "beta2": 0.3}),
        ("adam", {"epsilon": 1e-30}),
        ("momentum", {}),
        ("momentum", {"momentum": 0.3}),
        ("nesterov", {}),
    ],
)
@pytest.mark.parametrize("rate", [0.001, 1e9])
def test_subnormal_moments_have_the_bits_of_the_numpy_form(name, settings, rate):
    from distdl.nn.kernels.compiled import COMPILED

    size, random = 4096, np.random.default_rng(0)
    plain, fused = (OPTIMIZERS[name](size, fused=one, **settings) for one in (None, COMPILED.optimizer_rule(name)))
    mantissas = random.integers(0, 2**24, size) >> random.integers(0, 24, size)
    first = (mantissas | random.integers(0, 2, size) << 31).astype(np.uint32).view(np.float32)
    second = np.roll(mantissas, 5).astype(np.uint32).view(np.float32)
    for optimizer in (plain, fused):
        for vector, values in zip(optimizer.state.values(), (first, second), strict=False):
            vector[...] = values
    w = random.choice(np.array([0, 1, -1, 2.0**-29, 1e-9, -1e-20, 1e-30, -1e-40, np.inf], np.float32), size)
    gradient = random.choice(np.array([0, -0.0, 0, 1e-37, 1e-20, 1, np.nan], np.float32), size)
    ours, theirs = w.copy(), w.copy()
    with np.errstate(all="ignore"):
        for step in (1, 50):
            plain.update(theirs, gradient.copy(), rate, step)
            fused.update(ours, gradient, rate, step)
            for vector in plain.state:
                np.testing.assert_array_equal(bits(fused.state[vector]), bits(plain.state[vector]))
            np.testing.assert_array_equal(bits(ours), bits(theirs))
            gradient = np.zeros_like(gradient)


def bits(x):
    """Return the bits of float32 numbers, the same for every NaN."""
    return np.where(np.isnan(x), np.uint32(0x7FC00000), x.view(np.uint32))


def norm_by_its_formula(x):
    total = 0.0
    for block in (x[start : start + 4096] for start in range(0, x.size, 4096)):
        chains = np.zeros(64, np.float32)
        for row in (block[start : start + 64] for start in range(0, block.size, 64)):
            chains[: row.size] = fma(row, row, chains[: row.size])
        for chain in chains.tolist():
            total += chain
    if not math.isfinite(total):
        total = 0.0
        for number in x.tolist():
            total += number * number
    return math.sqrt(total)


@pytest.mark.parametrize("size", [1, 15, 16, 17, 63, 64, 65, 100, 4095, 4096, 4097, 4096 + 64, 20_011])
def test_the_norm_has_the_bits_of_its_formula(size):
    from distdl.nn.kernels.compiled import COMPILED

    for scale in (1, 1e-3, 1e-20, 1e18, 1e25):  # squares may underflow or overflow in float32
        x = numbers(size, seed=size) * np.float32(scale)
        assert COMPILED.norm(x) == norm_by_its_formula(x)
        if 1e-10 < scale < 1e19:
            assert COMPILED.norm(x) == pytest.approx(np.linalg.norm(x.astype(np.float64)), rel=1e-6)
    assert COMPILED.norm(np.zeros(size, np.float32)) == 0
    assert math.isnan(COMPILED.norm(np.full(size, np.nan, np.float32)))
    assert COMPILED.norm(np.full(size, np.inf, np.float32)) == math.inf


def test_other_dtypes_keep_the_numpy_rule():
    from distdl.nn.kernels.compiled import COMPILED

    x = np.arange(5.0)
    assert COMPILED.norm(x) == pytest.approx(math.sqrt(30), rel=1e-15)
    assert COMPILED.optimizer_rule("of the user") is None
    results = []
    for fused in (None, COMPILED.optimizer_rule("adam")):
        w = x.copy()
        OPTIMIZERS["adam"](5, dtype=np.float64, fused=fused).update(w, x.copy(), 0.1, 1)
        results.append(w.tobytes())
    assert results[0] == results[1]


class Spy(type(NUMPY)):
    """NumPy's kernels, with an own norm and an own optimizer that count their calls."""

    def __init__(self):
        self.called = []

    def norm(self, vector):
        self.called.append("norm")
        return math.sqrt(float(np.vdot(vector, vector)))

    def optimizer_rule(self, name):
        def made(optimizer):
            def update(*given):
                self.called.append(name)
                plain.update(*given)

            plain = type(optimizer)(len(optimizer._scratch))  # the network is smaller than a block
            plain.state = optimizer.state
            return update

        return made


def test_a_training_uses_the_norm_and_the_optimizer_of_its_kernels(tmp_path, monkeypatch):
    spy, settings = Spy(), {"kernels": "numpy", "model": "mlp", "optimizer": "momentum", "clip_norm": 0.5}
    expected = small_run(OneProcess(), tmp_path / "plain", **settings)
    monkeypatch.setattr(prepare, "kernels_named", lambda name: spy)
    assert small_run(OneProcess(), tmp_path / "spy", **settings) == expected
    assert spy.called[-12:] == ["norm", "momentum"] * 6


def test_clipping_takes_the_given_norm():
    gradient = np.array([3.0, 4.0], np.float32)
    assert clip_by_norm(gradient, 1.0, lambda vector: 10.0) == 10.0
    np.testing.assert_allclose(gradient, [0.3, 0.4], rtol=1e-6)
