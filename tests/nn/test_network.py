"""A network is one flat vector, and a pure function: same input, same bits."""

from __future__ import annotations

import re

import numpy as np
import pytest

from distdl.errors import UserError
from distdl.nn import (
    Affine,
    Branches,
    Constant,
    Conv2d,
    ConvTranspose2d,
    Dropout,
    Flatten,
    Layer,
    MaxPool2d,
    ParameterSpec,
    ReLU,
    Residual,
    Sequential,
    Sigmoid,
    SoftmaxCrossEntropy,
    build_model,
    numerical_gradient,
)
from distdl.nn.kernels import NUMPY, PLAIN
from distdl.rng import Key

from .oracles import built, normal, relative_error

MODELS = ("mlp", "simple_convnet", "deep_convnet")


def small(name, dtype=np.float32):
    network = build_model(name, (12, 12, 1), 10, dtype=dtype)
    network.initialize(Key(0))
    return network


def one_step(network, x, labels, key):
    """Return the bytes of logits, loss and gradients of a training step."""
    logits = network.forward(x, training=True, key=key).tobytes()
    loss = SoftmaxCrossEntropy()
    value = loss.forward(network.forward(x, training=True, key=key), labels)
    network.backward(loss.backward())
    return logits, value, network.gradients.tobytes()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_parameters_and_gradients_are_aligned_views_of_one_flat_vector(dtype):
    network = small("deep_convnet", dtype)
    network.gradients[...] = 1
    for flat, named in (
        (network.parameters, network.named_parameters()),
        (network.gradients, network.named_gradients()),
    ):
        assert flat.dtype == dtype
        assert sum(view.size for _, view in named) == network.parameter_count
        for _, view in named:
            assert np.shares_memory(view, flat)
            assert view.ctypes.data % 64 == 0
    assert network.gradients.size >= network.parameter_count
    layer = network.layers[0]
    network.parameters[0] = 42
    assert layer.parameters["weight"].flat[0] == 42
    layer.gradients["weight"].flat[0] = 43
    assert network.gradients[0] == 43


def test_padding_between_parameters_stays_zero():
    network = small("mlp")
    is_parameter = np.zeros(network.parameters.shape, bool)
    for _, view in network.views(is_parameter):
        view[...] = True
    assert not is_parameter.all(), "the last bias of 10 leaves a gap"
    one_step(network, normal((4, 12, 12, 1), dtype=np.float32), np.arange(4), Key(1))
    assert (network.parameters[~is_parameter] == 0).all()
    assert (network.gradients[~is_parameter] == 0).all()


def test_any_vector_of_the_layout_can_be_read_by_name():
    network = small("simple_convnet")
    velocity = np.arange(network.parameters.size, dtype=np.float64)
    views = dict(network.views(velocity))
    assert list(views) == [name for name, _ in network.named_parameters()]
    assert views["affine_2.bias"].shape == (10,)
    assert np.shares_memory(views["affine_2.bias"], velocity)
    with pytest.raises(ValueError, match="expected"):
        network.views(velocity[1:])


def test_a_layers_name_is_its_class_and_number():
    network = small("simple_convnet")
    assert network.layer_names == [
        "conv2d_1", "relu_1", "maxpool2d_1", "flatten_1", "affine_1", "relu_2", "affine_2",
    ]  # fmt: skip
    assert [(name, view.shape) for name, view in network.named_parameters()] == [
        ("conv2d_1.weight", (5, 5, 1, 30)),
        ("conv2d_1.bias", (30,)),
        ("affine_1.weight", (480, 100)),
        ("affine_1.bias", (100,)),
        ("affine_2.weight", (100, 10)),
        ("affine_2.bias", (10,)),
    ]


def test_weight_decay_applies_to_weights_and_not_to_biases():
    network = small("simple_convnet")
    decayed = np.zeros(network.parameters.shape)
    for where in network.decay_slices:
        decayed[where] += 1
    for name, view in network.views(decayed):
        assert (view == (1 if name.endswith("weight") else 0)).all(), name
    assert decayed.sum() == 750 + 48000 + 1000


def test_each_parameter_is_initialized_from_its_own_key():
    network = small("simple_convnet")
    parameters = dict(network.named_parameters())
    expected = 0.01 * Key(0).of("affine_2.weight").normal(1000).reshape(100, 10)
    assert (parameters["affine_2.weight"] == expected.astype(np.float32)).all()
    assert not parameters["affine_2.bias"].any()


@pytest.mark.parametrize("model", MODELS)
def test_a_repeated_step_gives_the_same_bits(model):
    network, fresh = small(model), small(model)
    x, labels, key = normal((5, 12, 12, 1), dtype=np.float32), np.arange(5), Key(2).of("step", 1)
    first = one_step(network, x, labels, key)
    for N in (1, 16, 3):  # other batch sizes in between, and evaluation
        other = normal((N, 12, 12, 1), "other", np.float32)
        one_step(network, other, np.zeros(N, int), Key(9))
        network.forward(other[:1])
    network.forward(normal((5, 12, 12, 1), "same size", np.float32))
    assert one_step(network, x, labels, key) == first
    assert one_step(fresh, x.copy(), labels, key) == first, "another replica"


LAYERS = {
    "affine": (lambda: Affine(3), (5,)),
    "relu": (ReLU, (4, 4, 2)),
    "sigmoid": (Sigmoid, (4, 4, 2)),
    "dropout": (Dropout, (20,)),
    "convolution": (lambda: Conv2d(2, 3, padding=1), (5, 5, 2)),
    "convolution, padding 2": (lambda: Conv2d(2, 3, padding=2), (5, 5, 2)),
    "convolution, stride 2": (lambda: Conv2d(3, 3, stride=2, padding=1), (6, 5, 2)),
    "pooling": (lambda: MaxPool2d(2), (5, 6, 2)),
    "pooling, overlapping": (lambda: MaxPool2d(3, 2, padding=1), (6, 6, 2)),
}


@pytest.mark.parametrize("case", LAYERS)
def test_a_layers_result_does_not_depend_on_earlier_calls(case):
    make, input_shape = LAYERS[case]
    used, fresh = built(make(), input_shape), built(make(), input_shape)

    def results(layer, N, name, backward_calls=1):
        y = layer.forward(normal((N, *input_shape), name), training=True, key=Key(0).of(name)).copy()
        for _ in range(backward_calls):
            dx = layer.backward(normal(y.shape, f"d {name}")).copy()
        return [array.tobytes() for array in (y, dx, *layer.gradients.values())]

    for N, name in ((3, "a"), (1, "b"), (3, "c"), (16, "d")):
        results(used, N, name)
    expected = results(fresh, 3, "x")
    assert results(used, 3, "x") == expected
    assert results(used, 3, "x", backward_calls=2) == expected


def test_the_bits_do_not_depend_on_the_memory_layout_of_the_input():
    network = small("deep_convnet")
    x, key = normal((4, 12, 12, 1), dtype=np.float32), Key(1)
    first = one_step(network, x, np.arange(4), key)
    turned = np.asfortranarray(x)
    shifted = np.zeros(x.size + 1, np.float32)[1:].reshape(x.shape)
    shifted[...] = x
    assert one_step(network, turned, np.arange(4), key) == first
    assert one_step(network, shifted, np.arange(4), key) == first


class Scale(Layer):
    def __init__(self, factor):
        self.factor = factor

    def forward(self, x, *, training, key):
        return x * np.float32(self.factor)


class CountsPreparations(Layer):
    """Multiplies by the number that `prepare` copies from its parameter."""

    preparations = 0

    def parameter_specs(self):
        return [ParameterSpec("factor", (1,), Constant(1), fan_in=1)]

    def prepare(self):
        self.preparations += 1
        self.factor = self.parameters["factor"].copy()

    def forward(self, x, *, training, key):
        return x * self.factor

    def backward(self, dy):
        return dy * self.factor


def network_that_counts():
    """Return a network that multiplies by its parameters, and a function that returns its layers' preparations."""
    layers = [CountsPreparations() for _ in range(3)]
    network = Sequential([layers[0], Residual([layers[1]], [Scale(0)]), Branches([layers[2]])], (1,))
    return network, lambda: [layer.preparations for layer in layers]


def test_outside_constant_parameters_every_change_is_seen():
    network, preparations = network_that_counts()
    one = np.ones((1, 1), np.float32)
    for number in range(1, 4):
        network.parameters[...] = number
        assert network.forward(one) == number**3
        assert preparations() == [number] * 3
    for number in range(4, 7):
        network.parameters[...] = number
        with network.constant_parameters():
            assert network.forward(one) == number**3
        network.parameters[...] = -number
        assert network.forward(one) == -(number**3)


def test_constant_parameters_are_prepared_once_per_entry():
    network, preparations = network_that_counts()
    one = np.ones((1, 1), np.float32)
    with network.constant_parameters():
        assert preparations() == [0] * 3
        for _ in range(3):
            network.forward(one)
        assert preparations() == [1] * 3
        with network.constant_parameters():
            for _ in range(3):
                network.forward(one)
        assert preparations() == [2] * 3
        network.forward(one)
    assert preparations() == [2] * 3
    with pytest.raises(UserError), network.constant_parameters():
        network.forward(one[0])
    for number in (3, 4):
        network.forward(one)
        assert preparations() == [number] * 3


def test_a_context_left_open_hides_no_change_from_the_next_one():
    def outputs():
        with network.constant_parameters():
            while True:
                yield float(network.forward(np.ones((1, 1), np.float32))[0, 0])

    network, _ = network_that_counts()
    network.parameters[...] = 2
    abandoned = outputs()
    assert next(abandoned) == 8
    network.parameters[...] = 3
    following = outputs()
    assert next(following) == 27
    abandoned.close()
    following.close()
    network.parameters[...] = 4
    assert network.forward(np.ones((1, 1), np.float32)) == 64


def test_binding_again_prepares_again():
    network = small("deep_convnet")
    x = normal((2, 12, 12, 1), dtype=np.float32)
    with network.constant_parameters():
        expected = network.forward(x).tobytes()
        network.bind()
        assert network.forward(x).tobytes() == expected


def front_layers():
    return [Conv2d(3, 3, padding=1), ReLU(), MaxPool2d(2), Conv2d(2, 3, padding=1)]


def back_layers():
    return [ReLU(), Conv2d(4, 3, padding=1), Residual([Conv2d(4, 1)]), Flatten(), Affine(3)]


@pytest.mark.parametrize("kernels", [NUMPY, PLAIN])
@pytest.mark.parametrize(
    "layers", [front_layers, back_layers, lambda: [Residual([ReLU()])], lambda: [Branches([], [])]]
)
def test_backward_returns_the_input_gradient_if_bind_asks_for_it(layers, kernels):
    network = Sequential(layers(), (6, 4, 2), dtype=np.float64, kernels=kernels)
    network.initialize(Key(0))
    x = normal((3, 6, 4, 2))
    dy = normal(network.forward(x).shape, "dy")
    assert network.backward(dy) is None
    gradients = network.gradients.copy()
    network.bind(needs_input_gradient=True)
    network.forward(x)
    dx = network.backward(dy).copy()
    expected = numerical_gradient(lambda: float((network.forward(x) * dy).sum()), x)
    assert relative_error(dx, expected) < 1e-7
    assert network.gradients == pytest.approx(gradients, rel=1e-10, abs=1e-12)
    network.bind()
    network.forward(x)
    assert network.backward(dy) is None
    assert network.gradients.tobytes() == gradients.tobytes()


def test_the_input_gradient_connects_two_networks():
    front, back, whole = (
        Sequential(layers, shape, dtype=np.float64)
        for layers, shape in (
            (front_layers(), (6, 4, 2)),
            (back_layers(), (3, 2, 2)),
            (front_layers() + back_layers(), (6, 4, 2)),
        )
    )
    back.bind(needs_input_gradient=True)
    whole.initialize(Key(0))
    for network, views in (
        (front, whole.named_parameters()[:4]),
        (back, whole.named_parameters()[4:]),
    ):
        for (_, target), (_, source) in zip(network.named_parameters(), views, strict=True):
            target[...] = source
    x, dy = normal((5, 6, 4, 2)), normal((5, 3), "dy")
    assert back.forward(front.forward(x)) == pytest.approx(whole.forward(x))
    assert front.backward(back.backward(dy)) is None
    whole.backward(dy)
    gradients = [*front.named_gradients(), *back.named_gradients()]
    for (_, found), (name, expected) in zip(gradients, whole.named_gradients(), strict=True):
        assert relative_error(found, expected) < 1e-10, name


def test_layers_are_given_contiguous_arrays():
    class Turned(Layer):
        def forward(self, x, *, training, key):
            self.was_contiguous = x.flags.c_contiguous
            return np.asfortranarray(x)

        def backward(self, dy):
            self.was_contiguous &= dy.flags.c_contiguous
            return np.asfortranarray(dy)

    layers = [Affine(4), Turned(), Turned()]
    network = Sequential(layers, (4,))
    network.forward(normal((3, 4), dtype=np.float32))
    network.backward(np.asfortranarray(normal((3, 4), "d", np.float32)))
    assert layers[1].was_contiguous
    assert layers[2].was_contiguous


def test_backward_overwrites_the_gradients():
    network = small("mlp")
    x, labels = normal((4, 12, 12, 1), dtype=np.float32), np.arange(4)
    first = one_step(network, x, labels, None)
    for _, view in network.named_gradients():
        view[...] = np.nan
    assert one_step(network, x, labels, None) == first


def test_a_step_does_not_change_its_arguments():
    network = small("deep_convnet")
    x, d = normal((2, 12, 12, 1), dtype=np.float32), normal((2, 10), "d", np.float32)
    network.forward(x, training=True, key=Key(0))
    network.backward(d)
    assert (x == normal(x.shape, dtype=np.float32)).all()
    assert (d == normal(d.shape, "d", np.float32)).all()


def test_no_input_gradient_is_computed_if_no_layer_in_front_has_parameters():
    layers = [Sigmoid(), Conv2d(2, 3), ReLU(), Flatten(), Affine(3)]
    network = Sequential(layers, (6, 6, 1))
    assert [layer.needs_input_gradient for layer in layers] == [False, False, True, True, True]
    network.initialize(Key(0))

    def never(_):
        pytest.fail("backward continued in front of the first parameters")

    layers[0].backward = never
    network.forward(normal((2, 6, 6, 1), dtype=np.float32))
    network.backward(normal((2, 3), "d", np.float32))
    assert network.gradients.any()


@pytest.mark.parametrize(
    "layer",
    [
        *(Conv2d(2, 3), Conv2d(2, 3, stride=2), Conv2d(2, 3, bias=False), ConvTranspose2d(2, 3)),
        *(Affine(3), Residual([Conv2d(2, 3, padding=1)], [Conv2d(2, 1)]), Branches([Conv2d(2, 1)], [Conv2d(3, 1)])),
    ],
    ids=str,
)
def test_the_first_layer_with_parameters_returns_no_input_gradient(layer):
    layers = [layer] if not isinstance(layer, Affine) else [Flatten(), layer]
    network = Sequential(layers, (6, 6, 1), kernels=PLAIN)
    network.initialize(Key(0))
    dy = normal((2, *network.output_shape), "d", np.float32)
    network.forward(normal((2, 6, 6, 1), dtype=np.float32))
    assert layer.backward(dy) is None
    assert all(gradient.any() for _, gradient in network.named_gradients())


def test_a_layer_draws_from_the_key_of_its_name():
    class Recorder(Layer):
        def forward(self, x, *, training, key):
            self.seen = (training, key)
            return x

    layers = [Recorder(), Recorder()]
    network = Sequential(layers, (2,))
    network.forward(normal((1, 2), dtype=np.float32), training=True, key=Key(5).of("m", 3))
    assert layers[1].seen == (True, Key(5).of("m", 3, "recorder_2"))
    network.forward(normal((1, 2), dtype=np.float32))
    assert layers[1].seen == (False, None)


SHARED = ReLU()
IMPOSSIBLE = [
    (
        [Conv2d(30, 5)],
        (3, 3, 1),
        "conv2d_1 (Conv2d 30@5x5): input 3x3x1 is smaller than the 5x5 kernel (padding 0); use a larger",
    ),
    (
        [Conv2d(4, (3, 5), stride=2, padding=(1, 0))],
        (3, 3, 1),
        "conv2d_1 (Conv2d 4@3x5 stride 2 padding 1x0): input 3x3x1 is smaller than the 3x5 kernel (pad",
    ),
    (
        [MaxPool2d(2), ReLU(), MaxPool2d(2)],
        (3, 3, 1),
        "maxpool2d_2 (MaxPool2d 2x2 stride 2): input 1x1x1 is smaller than the 2x2 window",
    ),
    ([ReLU(), Affine(2)], (4, 4, 2), "affine_1 (Affine 2): input 4x4x2 is not flat; put Flatten()"),
    ([Flatten(), Conv2d(2, 3)], (4, 4, 2), "conv2d_1 (Conv2d 2@3x3): input 32 is not an image"),
    ([], (4,), "at least one layer"),
    ([Affine(2)], (0,), "expected sizes of at least 1"),
    ([ReLU()] * 2, (4,), "each layer only once"),
    ([Residual([SHARED]), Branches([ReLU()], [SHARED])], (4,), "each layer only once"),
]


@pytest.mark.parametrize(("layers", "input_shape", "message"), IMPOSSIBLE)
def test_an_impossible_network_is_an_error_that_names_the_layer(layers, input_shape, message):
    with pytest.raises(UserError, match=re.escape(message)):
        Sequential(layers, input_shape)


def test_an_input_of_another_shape_or_type_is_refused():
    network = small("mlp")
    with pytest.raises(UserError, match=r"float32 \(2, 12, 12\); expected float32 \(N, 12, 12, 1\)"):
        network.forward(np.zeros((2, 12, 12), np.float32))
    with pytest.raises(UserError, match="input is uint8"):
        network.forward(np.zeros((2, 12, 12, 1), np.uint8))


def test_a_layer_whose_output_differs_from_its_announced_shape_is_named():
    class Wrong(Layer):
        def forward(self, x, *, training, key):
            return x[:, :1]

    message = r"wrong_1 \(Wrong\): forward returned \(2, 1\); build announced \(3,\)"
    with pytest.raises(UserError, match=message):
        Sequential([Wrong()], (3,)).forward(np.zeros((2, 3), np.float32))
