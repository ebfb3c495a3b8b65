"""Every optimizer follows its textbook formula, elementwise, in place, with the same bits for any block size."""

import math
import tracemalloc

import numpy as np
import pytest

from distdl import optim
from distdl.config import NEEDS, TrainConfig
from distdl.engine.clipping import clip_by_norm
from distdl.engine.state import TrainingState
from distdl.engine.storage.checkpoints import Checkpoint
from distdl.engine.storage.restoring import copy_tensors
from distdl.errors import UserError
from distdl.nn import Affine, Sequential
from distdl.optim import BLOCK, OPTIMIZERS, optimizer_class

SIZES = (1, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 7)
STEPS = 50
#: Rates like those of a schedule: a warm-up, a drop to a tenth, and then a change in every step.
RATES = [0.004, 0.008, 0.012, *[0.016] * 17, *[0.0016] * 10, *[0.01 * (1.5 + math.sin(step)) for step in range(20)]]


#: Each takes the start, the gradient and the learning rate of each step, and the weight decay of each element.


def textbook_sgd(w, gradients, rates, decay):
    for g, lr in zip(gradients, rates, strict=True):
        w = w - lr * (g + decay * w)
    return w


def textbook_momentum(w, gradients, rates, decay, momentum=0.9):
    """Follow the formula in PyTorch's documentation."""
    v = np.zeros_like(w)
    for g, lr in zip(gradients, rates, strict=True):
        v = momentum * v + (g + decay * w)
        w = w - lr * v
    return w


def textbook_nesterov(w, gradients, rates, decay, momentum=0.9):
    """Follow the formula in PyTorch's documentation."""
    v = np.zeros_like(w)
    for g, lr in zip(gradients, rates, strict=True):
        gradient = g + decay * w
        v = momentum * v + gradient
        w = w - lr * (gradient + momentum * v)
    return w


def textbook_adagrad(w, gradients, rates, decay, epsilon=1e-10):
    h = np.zeros_like(w)
    for g, lr in zip(gradients, rates, strict=True):
        gradient = g + decay * w
        h = h + gradient**2
        w = w - lr * gradient / (np.sqrt(h) + epsilon)
    return w


def textbook_rmsprop(w, gradients, rates, decay, beta2=0.99, epsilon=1e-8):
    h = np.zeros_like(w)
    for g, lr in zip(gradients, rates, strict=True):
        gradient = g + decay * w
        h = beta2 * h + (1 - beta2) * gradient**2
        w = w - lr * gradient / (np.sqrt(h) + epsilon)
    return w


def textbook_adam(w, gradients, rates, decay, decoupled=0.0, beta1=0.9, beta2=0.999, epsilon=1e-8):
    m, v = np.zeros_like(w), np.zeros_like(w)
    for t, (g, lr) in enumerate(zip(gradients, rates, strict=True), start=1):
        gradient = g + decay * w
        m = beta1 * m + (1 - beta1) * gradient
        v = beta2 * v + (1 - beta2) * gradient**2
        m_hat = m / (1 - beta1**t)
        v_hat = v / (1 - beta2**t)
        w = w - lr * decoupled * w - lr * m_hat / (np.sqrt(v_hat) + epsilon)
    return w


def textbook_adamw(w, gradients, rates, decay, **settings):
    return textbook_adam(w, gradients, rates, 0.0, decoupled=decay, **settings)


TEXTBOOK = {
    "sgd": textbook_sgd,
    "momentum": textbook_momentum,
    "nesterov": textbook_nesterov,
    "adagrad": textbook_adagrad,
    "rmsprop": textbook_rmsprop,
    "adam": textbook_adam,
    "adamw": textbook_adamw,
}
#: Other constants of each rule than its own.
SETTINGS = {
    "sgd": {},
    "momentum": {"momentum": 0.5},
    "nesterov": {"momentum": 0.0},
    "adagrad": {"epsilon": 0.1},
    "rmsprop": {"beta2": 0.5, "epsilon": 0.01},
    "adam": {"beta1": 0.5, "beta2": 0.9, "epsilon": 0.01},
    "adamw": {"beta1": 0.0, "beta2": 0.0, "epsilon": 1e-3},
}
STATE = {
    "sgd": [],
    "momentum": ["momentum_buffer"],
    "nesterov": ["velocity"],
    "adagrad": ["sum_of_squares"],
    "rmsprop": ["mean_of_squares"],
    "adam": ["first_moment", "second_moment"],
    "adamw": ["first_moment", "second_moment"],
}

#: Learning rate and steps: for the parabola x² + y², for the book's valley x²/20 + y², and for Rosenbrock's.
PARABOLA = {
    "sgd": (0.1, 100),  # the book's own
    "momentum": (0.1, 300),
    "nesterov": (0.1, 200),
    "adagrad": (1.5, 100),
    "rmsprop": (0.003, 5000),
    "adam": (0.3, 500),
    "adamw": (0.3, 500),
}
VALLEY = {
    "sgd": (0.9, 200),
    "momentum": (0.1, 300),
    "nesterov": (0.1, 300),
    "adagrad": (1.5, 300),
    "rmsprop": (0.003, 5000),
    "adam": (0.3, 500),
    "adamw": (0.3, 500),
}
ROSENBROCK = {
    "sgd": (1e-3, 20_000),
    "momentum": (1e-3, 4000),
    "nesterov": (1e-3, 4000),
    "adagrad": (0.5, 6000),
    "rmsprop": (2e-3, 8000),
    "adam": (0.02, 4000),
    "adamw": (0.02, 4000),
}

every_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)


def test_every_optimizer_is_in_the_tables_of_these_tests():
    for table in (TEXTBOOK, SETTINGS, STATE, PARABOLA, VALLEY, ROSENBROCK):
        assert set(table) == set(OPTIMIZERS)


def gradients_of(size, dtype=np.float32):
    """Return a start and one gradient per step, over many orders of magnitude."""
    rng = np.random.default_rng(size)
    start = rng.standard_normal(size).astype(dtype)
    scale = 10.0 ** rng.integers(-4, 2, size)
    base = (scale * rng.standard_normal(size)).astype(dtype)
    return start, [(base * dtype(np.cos(step + 1))).astype(dtype) for step in range(STEPS)]


def run(name, start, gradients, lr, **settings):
    """Take a step for each gradient; `lr` is the rate of all steps, or a list with one rate per step."""
    w = start.copy()
    optimizer = OPTIMIZERS[name](w.size, dtype=w.dtype, **settings)
    rates = lr if isinstance(lr, list) else [lr] * len(gradients)
    for step, (gradient, rate) in enumerate(zip(gradients, rates, strict=True), start=1):
        optimizer.update(w, gradient.copy(), rate, step)
    return w, optimizer


@every_optimizer
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("weight_decay", [0.0, 0.1], ids=["no decay", "decay"])
@pytest.mark.parametrize("settings", [{}, SETTINGS], ids=["its own constants", "others"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float32, 2e-5), (np.float64, 1e-12)], ids=["f4", "f8"])
def test_fifty_steps_with_changing_rates_equal_the_textbooks(name, size, weight_decay, settings, dtype, tolerance):
    settings = settings.get(name, {})
    start, gradients = gradients_of(size, dtype)
    decay_slices = (slice(0, size // 3), slice(size // 2, size))
    got, _ = run(name, start, gradients, RATES, weight_decay=weight_decay, decay_slices=decay_slices, **settings)

    decay = np.zeros(size)
    for where in decay_slices:
        decay[where] = weight_decay
    oracle = TEXTBOOK[name](
        start.astype(np.float64), [g.astype(np.float64) for g in gradients], RATES, decay, **settings
    )
    moved = np.abs(oracle - start).max()
    assert moved > 1e-3 or size == 1
    np.testing.assert_allclose(got, oracle, rtol=tolerance, atol=tolerance * max(1.0, moved) / 10)


def momentum_of_the_book(w, gradients, rates):
    v = np.zeros_like(w)
    for g, lr in zip(gradients, rates, strict=True):
        v = 0.9 * v - lr * g
        w = w + v
    return w


def nesterov_as_first_written(w, gradients, rates):
    """Take the gradient ahead along the velocity; `w` is the point ahead."""
    v = np.zeros_like(w)
    for g, lr in zip(gradients, rates, strict=True):
        before = w - 0.9 * v
        v = 0.9 * v - lr * g
        w = before + v + 0.9 * v
    return w


@pytest.mark.parametrize(
    ("name", "other"), [("momentum", momentum_of_the_book), ("nesterov", nesterov_as_first_written)]
)
def test_the_other_formula_of_momentum_takes_the_same_steps_at_a_constant_rate(name, other):
    start, gradients = gradients_of(100, np.float64)
    for rates, same in (([0.01] * STEPS, True), (RATES, False)):
        got, _ = run(name, start, gradients, rates)
        difference = np.abs(got - other(start, gradients, rates)).max()
        assert difference < 1e-12 if same else difference > 0.01


@every_optimizer
@pytest.mark.parametrize("size", SIZES)
def test_blocks_give_the_bits_of_one_block(name, size, monkeypatch):
    start, gradients = gradients_of(size)
    settings = {"weight_decay": 0.1, "decay_slices": (slice(0, size // 3), slice(size // 2, size))}
    in_blocks, state_in_blocks = run(name, start, gradients, 0.01, **settings)
    monkeypatch.setattr(optim, "BLOCK", 10 * max(SIZES))
    at_once, state_at_once = run(name, start, gradients, 0.01, **settings)
    assert in_blocks.tobytes() == at_once.tobytes()
    for vector in state_at_once.state:
        assert state_in_blocks.state[vector].tobytes() == state_at_once.state[vector].tobytes()


@every_optimizer
def test_weight_decay_changes_only_its_slices(name):
    size = BLOCK + 100
    decayed = np.zeros(size, bool)
    for where in (slice(10, 20), slice(BLOCK - 5, BLOCK + 5)):
        decayed[where] = True
    start = np.full(size, 2.0, np.float32)
    still = [np.zeros(size, np.float32)] * 3
    slices = (slice(10, 20), slice(BLOCK - 5, BLOCK + 5))
    w, _ = run(name, start, still, 0.1, weight_decay=0.5, decay_slices=slices)
    assert (w[decayed] < 2.0).all()
    assert (w[~decayed] == 2.0).all()
    for nothing in ({"weight_decay": 0.5}, {"decay_slices": slices}):
        w, _ = run(name, start, still, 0.1, **nothing)
        assert (w == 2.0).all()


@every_optimizer
def test_frozen_slices_keep_their_bits_and_do_not_affect_the_others(name):
    """Even -0.0 keeps its bits: adding a velocity of 0.0 would lose its sign. Decay changes no frozen slice."""
    size = 2 * BLOCK + 100
    start, gradients = gradients_of(size)
    start[::3] = -0.0
    whole, half = slice(0, 70), slice(BLOCK - 5, BLOCK + 5)
    settings = {"weight_decay": 0.1, "l1": 0.1, "decay_slices": (whole, half, slice(BLOCK + 5, size - 1))}
    without, _ = run(name, start, gradients, 0.01, **settings)
    found, _ = run(name, start, gradients, 0.01, frozen=[whole, half, slice(size - 1, size)], **settings)
    frozen = np.zeros(size, bool)
    frozen[whole], frozen[half], frozen[-1] = True, True, True
    assert found[frozen].tobytes() == start[frozen].tobytes()
    assert found[~frozen].tobytes() == without[~frozen].tobytes()
    assert (without[frozen] != start[frozen]).all()


@every_optimizer
def test_l1_changes_every_decayed_weight_by_the_same_amount(name):
    start = np.array([3.0, -3.0, 0.0, 3.0], np.float32)
    gradient = np.array([0.25, -0.25, 0.0, 0.0], np.float32)  # the term of l1 = 0.25 for the first three
    pulled, _ = run(name, start, [np.zeros(4, np.float32)] * 5, 0.1, l1=0.25, decay_slices=(slice(0, 3),))
    pushed, _ = run(name, start, [gradient] * 5, 0.1)
    assert pulled.tobytes() == pushed.tobytes()
    assert pulled[2] == 0
    assert pulled[3] == 3


def test_a_gradient_is_clipped_to_the_norm_only_if_it_is_longer():
    gradient = np.array([3.0, 4.0] * 50, np.float32)
    length = float(np.sqrt((gradient.astype(np.float64) ** 2).sum()))
    clipped = gradient.copy()
    assert clip_by_norm(clipped, 10.0) == pytest.approx(length)
    np.testing.assert_allclose(clipped, gradient * 10 / length, rtol=1e-6)
    left = gradient.copy()
    assert clip_by_norm(left, 36.0) == pytest.approx(length)
    assert left.tobytes() == gradient.tobytes()
    nothing = np.zeros(5, np.float32)
    assert clip_by_norm(nothing, 1.0) == 0
    assert not nothing.any()


def test_clipping_equals_pytorchs():
    torch = pytest.importorskip("torch")
    gradient = np.random.default_rng(0).standard_normal(1000).astype(np.float32)
    for largest in (0.5, 30.0, 40.0):
        theirs = torch.zeros(1000, requires_grad=True)
        theirs.grad = torch.tensor(gradient)
        length = torch.nn.utils.clip_grad_norm_([theirs], largest)
        ours = gradient.copy()
        assert clip_by_norm(ours, largest) == pytest.approx(float(length), rel=1e-6)
        np.testing.assert_allclose(ours, theirs.grad.numpy(), rtol=1e-6)


@every_optimizer
def test_every_optimizer_finds_the_minimum_of_a_parabola(name):
    """From (-3, 4), as in section 4.4.1, whose result for SGD is (-6.1e-10, 8.1e-10)."""
    lr, steps = PARABOLA[name]
    near = lr if name == "rmsprop" else 1e-4  # its steps keep the size of the learning rate
    found = minimized(name, [-3.0, 4.0], lambda x, y: (2 * x, 2 * y), lr, steps)
    assert found == pytest.approx([0, 0], abs=near)
    assert name != "sgd" or found == pytest.approx([-6.1e-10, 8.1e-10], rel=0.01)


@every_optimizer
def test_every_optimizer_finds_the_minimum_of_a_long_valley(name):
    lr, steps = VALLEY[name]
    near = lr if name == "rmsprop" else 1e-4  # its steps keep the size of the learning rate
    assert minimized(name, [-7.0, 2.0], lambda x, y: (x / 10, 2 * y), lr, steps) == pytest.approx([0, 0], abs=near)


@every_optimizer
def test_every_optimizer_finds_the_minimum_of_rosenbrocks_function(name):
    def gradient(x, y):
        return -2 * (1 - x) - 400 * x * (y - x * x), 200 * (y - x * x)

    lr, steps = ROSENBROCK[name]
    assert minimized(name, [-1.2, 1.0], gradient, lr, steps) == pytest.approx([1, 1], abs=1e-2)


def minimized(name, start, gradient, lr, steps):
    w = np.array(start)
    optimizer = OPTIMIZERS[name](2, dtype=np.float64)
    for step in range(1, steps + 1):
        optimizer.update(w, np.array(gradient(*w.tolist())), lr, step)
    return w.tolist()


@every_optimizer
def test_state_vectors_have_names_zeros_and_the_length_of_the_parameters(name):
    optimizer = OPTIMIZERS[name](1001)
    assert list(optimizer.state) == STATE[name]
    for vector in optimizer.state.values():
        assert vector.shape == (1001,)
        assert vector.dtype == np.float32
        assert vector.ctypes.data % 64 == 0
        assert not vector.any()


@every_optimizer
def test_a_later_step_needs_only_the_state(name):
    start, gradients = gradients_of(1001)
    straight, _ = run(name, start, gradients, 0.01)
    w, first = run(name, start, gradients[:20], 0.01)
    second = OPTIMIZERS[name](w.size)
    for vector in second.state:
        second.state[vector][...] = first.state[vector]
    for step, gradient in enumerate(gradients[20:], start=21):
        second.update(w, gradient.copy(), 0.01, step)
    assert w.tobytes() == straight.tobytes()


def test_a_checkpoint_with_the_velocity_of_the_book_is_refused():
    """Earlier versions stored momentum as in the book: with the learning rate inside."""
    network = Sequential([Affine(2)], (3,))
    state = TrainingState(network, OPTIMIZERS["momentum"](network.parameters.size))
    now = {name: array.copy() for name, array in state.named_arrays()}
    then = {name.replace("momentum_buffer/", "velocity/"): array for name, array in now.items()}
    assert now.keys() != then.keys()
    copy_tensors(Checkpoint(now, {}), state.named_arrays(), "run/checkpoints/step-000000002.safetensors")
    with pytest.raises(
        UserError, match=r"step-000000002.safetensors .*: momentum_buffer/affine_1.bias is absent there"
    ):
        copy_tensors(Checkpoint(then, {}), state.named_arrays(), "run/checkpoints/step-000000002.safetensors")


@every_optimizer
def test_an_update_works_in_place_and_allocates_almost_nothing(name):
    size = 3 * BLOCK + 7
    start, gradients = gradients_of(size)
    optimizer = OPTIMIZERS[name](size, weight_decay=0.1, decay_slices=(slice(0, size - 5),))
    vectors = list(optimizer.state.values())
    w = start.copy()
    gradient = gradients[0].copy()
    optimizer.update(w, gradient, 0.01, 1)
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        optimizer.update(w, gradient, 0.01, 2)
        assert tracemalloc.get_traced_memory()[1] - before < 16 * 1024
    finally:
        tracemalloc.stop()
    assert (w != start).any()
    assert all(now is then for now, then in zip(optimizer.state.values(), vectors, strict=True))


@every_optimizer
def test_the_config_passes_on_exactly_the_settings_of_the_rule(name):
    """So a flag without effect is refused, and no other flag is."""
    effective = {setting for setting, (other, choices) in NEEDS.items() if other == "optimizer" and name in choices}
    assert effective == set(OPTIMIZERS[name].setting_names) == set(SETTINGS[name])
    plain, given = TrainConfig(optimizer=name), TrainConfig(optimizer=name, **SETTINGS[name])
    assert given.optimizer_settings == SETTINGS[name]
    made = OPTIMIZERS[name](3, **plain.optimizer_settings)
    assert all(getattr(made, setting) == getattr(OPTIMIZERS[name], setting) for setting in effective)


def test_a_setting_of_another_rule_is_refused():
    with pytest.raises(TypeError, match="SGD has no setting momentum"):
        OPTIMIZERS["sgd"](3, momentum=0.9)


def test_an_unknown_optimizer_is_an_error_that_lists_the_known():
    assert optimizer_class("adam") is OPTIMIZERS["adam"]
    with pytest.raises(UserError, match=r"'adma': expected one of adagrad, adam, adamw, .*; did you mean 'adam'\?"):
        optimizer_class("adma")


@every_optimizer
@pytest.mark.parametrize("weight_decay", [0.0, 0.05], ids=["no decay", "decay"])
@pytest.mark.parametrize("rates", [[0.02] * 100, RATES + RATES[::-1]], ids=["constant", "changing"])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-6), ("float32", 1e-4)])
def test_a_hundred_steps_equal_pytorchs(name, weight_decay, rates, dtype, tolerance):
    torch = pytest.importorskip("torch")
    made = {
        "sgd": lambda w: torch.optim.SGD([w], lr=0.02, weight_decay=weight_decay),
        "momentum": lambda w: torch.optim.SGD([w], lr=0.02, momentum=0.9, weight_decay=weight_decay),
        "nesterov": lambda w: torch.optim.SGD([w], lr=0.02, momentum=0.9, nesterov=True, weight_decay=weight_decay),
        "adagrad": lambda w: torch.optim.Adagrad([w], lr=0.02, weight_decay=weight_decay),
        "rmsprop": lambda w: torch.optim.RMSprop([w], lr=0.02, weight_decay=weight_decay),
        "adam": lambda w: torch.optim.Adam([w], lr=0.02, weight_decay=weight_decay),
        "adamw": lambda w: torch.optim.AdamW([w], lr=0.02, weight_decay=weight_decay),
    }
    size = 200
    rng = np.random.default_rng(0)
    curvature = rng.uniform(0.1, 3.0, size).astype(dtype)
    centre = rng.standard_normal(size).astype(dtype)
    start = (3 + rng.standard_normal(size)).astype(dtype)

    theirs = torch.tensor(start, requires_grad=True)
    optimizer = made[name](theirs)
    for rate in rates:
        optimizer.param_groups[0]["lr"] = rate
        theirs.grad = torch.tensor(curvature) * (theirs.detach() - torch.tensor(centre))
        optimizer.step()

    ours = start.copy()
    mine = OPTIMIZERS[name](size, weight_decay=weight_decay, decay_slices=(slice(0, size),), dtype=dtype)
    for step, rate in enumerate(rates, start=1):
        mine.update(ours, curvature * (ours - centre), rate, step)
    assert np.abs(ours - start).max() > 0.2
    np.testing.assert_allclose(ours, theirs.detach().numpy(), rtol=tolerance, atol=tolerance / 10)
