"""More activations, pooling, normalization and upsampling follow their formulas, and so do their gradients."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distdl.errors import UserError
from distdl.nn import (
    AvgPool2d,
    Conv2d,
    ConvTranspose2d,
    GlobalAvgPool2d,
    Identity,
    LeakyReLU,
    LocalResponseNorm,
    ReLU,
    Sigmoid,
    Softmax,
    Tanh,
    Upsample2d,
    check_layer,
)

from .oracles import built, normal, relative_error

LAYERS = {
    "tanh": (Tanh, (4, 3)),
    "leaky ReLU": (LeakyReLU, (4, 3)),
    "leaky ReLU with another slope": (lambda: LeakyReLU(0.3), (7,)),
    "identity": (Identity, (4, 3, 2)),
    "softmax": (Softmax, (5,)),
    "softmax of each pixel": (Softmax, (3, 2, 4)),
    "mean pooling": (lambda: AvgPool2d(2), (4, 6, 3)),
    "mean pooling, odd image": (lambda: AvgPool2d(2), (5, 7, 2)),
    "mean pooling, overlapping and padded": (lambda: AvgPool2d(3, stride=2, padding=1), (6, 5, 2)),
    "mean pooling, rectangular": (lambda: AvgPool2d((1, 3), stride=(2, 1)), (5, 6, 2)),
    "global mean pooling": (GlobalAvgPool2d, (4, 3, 5)),
    "local response": (lambda: LocalResponseNorm(5, alpha=0.5), (3, 2, 7)),
    "local response, even window": (lambda: LocalResponseNorm(4, alpha=0.5, beta=0.5, k=2.0), (2, 2, 6)),
    "local response, window beyond the channels": (lambda: LocalResponseNorm(9, alpha=0.5), (2, 2, 3)),
    "upsampling": (Upsample2d, (3, 4, 2)),
    "upsampling by three": (lambda: Upsample2d(3), (1, 2, 1)),
    "transposed convolution": (lambda: ConvTranspose2d(3, 3), (4, 3, 2)),
    "transposed convolution, stride": (lambda: ConvTranspose2d(2, (2, 3), stride=(2, 3), padding=(0, 1)), (3, 4, 3)),
    "transposed convolution, gaps": (lambda: ConvTranspose2d(2, 1, stride=2), (3, 3, 2)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_every_gradient_equals_central_differences(name):
    layer, shape = LAYERS[name]
    assert check_layer(layer(), shape) < 1e-6


@pytest.mark.parametrize("name", LAYERS)
def test_layers_do_not_change_their_arguments_and_repeat_their_bits(name):
    make, shape = LAYERS[name]
    layer, other = built(make(), shape, np.float32), built(make(), shape, np.float32)
    x = normal((3, *shape), dtype=np.float32)
    y = layer.forward(x, training=True, key=None).copy()
    dy = normal(y.shape, "dy", np.float32)
    dx = layer.backward(dy).copy()
    assert (x == normal(x.shape, dtype=np.float32)).all()
    assert (dy == normal(dy.shape, "dy", np.float32)).all()
    assert other.forward(x, training=True, key=None).tobytes() == y.tobytes()
    assert other.backward(dy).tobytes() == dx.tobytes()
    assert y.dtype == dx.dtype == np.float32


def test_softmax_sums_to_one_and_does_not_overflow():
    y = built(Softmax(), (3,)).forward(
        np.array([[1010.0, 1000.0, 990.0], [-1e300, 0, 1e300]]), training=False, key=None
    )
    assert y.sum(axis=1) == pytest.approx([1, 1])
    assert y[0] == pytest.approx([0.9999546, 4.5397868e-5, 2.0610600e-9], rel=1e-6)
    assert y[1].tolist() == [0, 0, 1]


@pytest.mark.parametrize("activation", [Identity, LeakyReLU, ReLU, Sigmoid, Tanh])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_an_element_gets_the_same_bits_at_any_position(activation, dtype):
    """NumPy computes several elements at once, and the remaining ones of other lengths one by one."""
    x = (5 * normal((70,))).astype(dtype)
    whole = built(activation(), x.shape, dtype).forward(x[None], training=True, key=None)[0]
    for start, stop in [(0, n) for n in range(1, 70)] + [(n, 70) for n in range(1, 20)]:
        part = x[start:stop]  # aligned to no more than an element
        y = built(activation(), part.shape, dtype).forward(part[None], training=True, key=None)[0]
        assert y.tobytes() == whole[start:stop].tobytes(), (start, stop)


def test_leaky_relu_gives_the_negative_side_its_slope():
    layer = built(LeakyReLU(), (4,))
    x = np.array([[-2.0, 0.0, 1e-300, 3.0]])
    assert layer.forward(x, training=True, key=None).tolist() == [[-0.02, 0, 1e-300, 3]]
    assert layer.backward(np.ones((1, 4))).tolist() == [[0.01, 0.01, 1, 1]]


def plain_mean_pooling(x, size, stride, padding):
    padded = np.pad(x, ((0, 0), (padding[0],) * 2, (padding[1],) * 2, (0, 0)))
    OH = (padded.shape[1] - size[0]) // stride[0] + 1
    OW = (padded.shape[2] - size[1]) // stride[1] + 1
    y = np.zeros((len(x), OH, OW, x.shape[3]))
    for i, j in itertools.product(range(OH), range(OW)):
        top, left = i * stride[0], j * stride[1]
        y[:, i, j] = padded[:, top : top + size[0], left : left + size[1]].mean(axis=(1, 2))
    return y


@given(
    st.tuples(st.integers(1, 3), st.integers(1, 7), st.integers(1, 7), st.integers(1, 3)),
    st.tuples(st.integers(1, 4), st.integers(1, 4)),
    st.tuples(st.integers(1, 3), st.integers(1, 3)),
    st.tuples(st.integers(0, 2), st.integers(0, 2)),
)
def test_mean_pooling_is_the_mean_of_each_window(shape, size, stride, padding):
    x = normal(shape)
    try:
        layer = built(AvgPool2d(size, stride, padding), shape[1:])
    except UserError:
        return
    y = layer.forward(x, training=True, key=None)
    assert relative_error(y, plain_mean_pooling(x, size, stride, padding)) < 1e-12


def test_global_mean_pooling_is_one_window_as_large_as_the_image():
    x = normal((3, 4, 5, 2))
    y = built(GlobalAvgPool2d(), (4, 5, 2)).forward(x, training=True, key=None)
    assert y == pytest.approx(x.mean(axis=(1, 2)))


@pytest.mark.parametrize("size", [1, 2, 3, 5, 8])
def test_local_response_is_the_formula_channel_by_channel(size):
    x = normal((2, 3, 1, 6))
    layer = built(LocalResponseNorm(size, alpha=0.3, beta=0.6, k=1.5), (3, 1, 6))
    y = layer.forward(x, training=True, key=None)
    expected = np.zeros(x.shape)
    for c in range(6):
        window = x[..., max(0, c - size // 2) : c + (size - 1) // 2 + 1]
        expected[..., c] = x[..., c] / (1.5 + 0.3 / size * (window**2).sum(axis=-1)) ** 0.6
    assert y == pytest.approx(expected, rel=1e-12)


@given(
    st.tuples(st.integers(1, 2), st.integers(1, 4), st.integers(1, 4), st.integers(1, 3)),
    st.integers(1, 3),
    st.tuples(st.integers(1, 4), st.integers(1, 4)),
    st.tuples(st.integers(1, 3), st.integers(1, 3)),
    st.tuples(st.integers(0, 2), st.integers(0, 2)),
)
def test_transposed_convolution_is_the_adjoint_of_the_convolution(shape, filters, kernel, stride, padding):
    """``<conv(x), z> == <x, transposed(z)>`` for the same weights without bias, for every x and z."""
    try:
        transposed = built(ConvTranspose2d(filters, kernel, stride=stride, padding=padding), shape[1:])
    except UserError:
        return
    z = normal(shape, "z")
    transposed.parameters["bias"][...] = 0
    y = transposed.forward(z, training=True, key=None).copy()
    convolution = built(Conv2d(shape[3], kernel, stride=stride, padding=padding), y.shape[1:])
    convolution.parameters["bias"][...] = 0
    convolution.parameters["weight"][...] = transposed.parameters["weight"]
    x = normal(y.shape)
    assert (convolution.forward(x, training=True, key=None) * z).sum() == pytest.approx((x * y).sum(), abs=1e-9)


def test_upsampling_keeps_constants_and_straight_lines_inside():
    layer = built(Upsample2d(4), (5, 6, 1))
    assert layer.forward(np.full((1, 5, 6, 1), 3.0), training=True, key=None) == pytest.approx(
        np.full((1, 20, 24, 1), 3)
    )
    ramp = np.broadcast_to(np.arange(6.0)[:, None], (1, 5, 6, 1))
    y = layer.forward(np.ascontiguousarray(ramp), training=True, key=None)
    assert np.diff(y[0, :, 2:-2, 0], axis=1) == pytest.approx(np.full((20, 19), 0.25))


def test_the_layers_equal_pytorchs():
    torch = pytest.importorskip("torch")
    functional = torch.nn.functional
    x = normal((2, 6, 5, 7))

    def nchw(array):
        return torch.tensor(array.transpose(0, 3, 1, 2).copy())

    def check(layer, theirs):
        y = built(layer, x.shape[1:]).forward(x, training=True, key=None)
        assert relative_error(y, theirs(nchw(x)).numpy().transpose(0, 2, 3, 1)) < 1e-10

    check(
        LocalResponseNorm(5, alpha=0.5, beta=0.7, k=1.2), lambda t: functional.local_response_norm(t, 5, 0.5, 0.7, 1.2)
    )
    check(LocalResponseNorm(4, alpha=0.5), lambda t: functional.local_response_norm(t, 4, 0.5, 0.75, 1.0))
    check(AvgPool2d(3, stride=2, padding=1), lambda t: functional.avg_pool2d(t, 3, 2, 1))
    check(LeakyReLU(), functional.leaky_relu)
    check(Upsample2d(3), lambda t: functional.interpolate(t, scale_factor=3, mode="bilinear", align_corners=False))
    layer = built(ConvTranspose2d(4, (3, 2), stride=(2, 3), padding=(1, 0)), x.shape[1:])
    weight = torch.tensor(layer.parameters["weight"].transpose(3, 2, 0, 1).copy())
    theirs = functional.conv_transpose2d(
        nchw(x), weight, torch.tensor(layer.parameters["bias"]), stride=(2, 3), padding=(1, 0)
    )
    y = layer.forward(x, training=True, key=None)
    assert relative_error(y, theirs.numpy().transpose(0, 2, 3, 1)) < 1e-10


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: built(GlobalAvgPool2d(), (4,)), "input 4 is not an image"),
        (lambda: built(Upsample2d(2), (4,)), "input 4 is not an image"),
        (lambda: built(ConvTranspose2d(1, 1, padding=2), (2, 2, 1)), "removes the whole output"),
        (lambda: LeakyReLU(-1), "slope -1 given"),
        (lambda: LocalResponseNorm(alpha=np.inf), "alpha inf"),
        (lambda: built(AvgPool2d(5), (4, 4, 1)), "is smaller than the 5x5 window"),
    ],
)
def test_invalid_layers_and_inputs_are_one_line(make, message):
    with pytest.raises(UserError, match=message):
        make()
