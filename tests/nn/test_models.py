"""The book's own models equal the book's, and fit any image that is large enough."""

from __future__ import annotations

import numpy as np
import pytest

from distdl.errors import UserError
from distdl.nn import Normal, SoftmaxCrossEntropy, build_model, count_correct, mlp, multilayer_net
from distdl.rng import Key

from .oracles import normal

OF_ANY_SIZE = ("logistic", "mlp", "simple_convnet", "deep_convnet", "resnet20")


def shapes(name, input_shape=(28, 28, 1)):
    return {key: view.shape for key, view in build_model(name, input_shape, 10).named_parameters()}


def test_simple_convnet_is_that_of_the_book():
    """Section 7.5: 30 filters of 5x5, then 12 * 12 * 30 = 4,320 - 100 - 10."""
    assert shapes("simple_convnet") == {
        "conv2d_1.weight": (5, 5, 1, 30),
        "conv2d_1.bias": (30,),
        "affine_1.weight": (4320, 100),
        "affine_1.bias": (100,),
        "affine_2.weight": (100, 10),
        "affine_2.bias": (10,),
    }


def test_deep_convnet_is_that_of_the_book():
    """Section 8.1: 28, pooled 14, padded by 2 to 16, pooled 8, pooled 4; then 4 * 4 * 64 = 1,024 - 50 - 10."""
    weights = {name: shape for name, shape in shapes("deep_convnet").items() if name.endswith("weight")}
    assert weights == {
        "conv2d_1.weight": (3, 3, 1, 16),
        "conv2d_2.weight": (3, 3, 16, 16),
        "conv2d_3.weight": (3, 3, 16, 32),
        "conv2d_4.weight": (3, 3, 32, 32),
        "conv2d_5.weight": (3, 3, 32, 64),
        "conv2d_6.weight": (3, 3, 64, 64),
        "affine_1.weight": (1024, 50),
        "affine_2.weight": (50, 10),
    }
    kinds = [name.split("_")[0] for name in build_model("deep_convnet", (28, 28, 1), 10).layer_names]
    block = ["conv2d", "relu"] * 2 + ["maxpool2d"]
    assert kinds == [*block * 3, "flatten", "affine", "relu", "dropout", "affine", "dropout"]


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("mlp", 784 * 100 + 100 + 100 * 10 + 10),  # 79,510
        ("simple_convnet", 433_890),
        ("deep_convnet", 123_552),
    ],
)
def test_parameter_counts_are_those_of_the_book_on_28x28(name, count):
    assert build_model(name, (28, 28, 1), 10).parameter_count == count


def test_initial_weights_have_the_standard_deviation_of_the_book():
    for name, stds in {
        "mlp": {"affine_1.weight": 0.01},
        "simple_convnet": {"affine_1.weight": 0.01, "conv2d_1.weight": 0.01},
        "deep_convnet": {"conv2d_6.weight": np.sqrt(2 / 576), "affine_1.weight": np.sqrt(2 / 1024)},
    }.items():
        network = build_model(name, (28, 28, 1), 10)
        network.initialize(Key(0))
        parameters = dict(network.named_parameters())
        for parameter, std in stds.items():
            assert parameters[parameter].std() == pytest.approx(std, rel=0.1)


@pytest.mark.parametrize("name", OF_ANY_SIZE)
@pytest.mark.parametrize("input_shape", [(8, 8, 1), (28, 28, 1), (32, 32, 3), (17, 30, 2)])
def test_models_fit_any_image_that_is_large_enough(name, input_shape):
    network = build_model(name, input_shape, 7)
    network.initialize(Key(0))
    logits = network.forward(normal((2, *input_shape), dtype=np.float32), training=True, key=Key(0))
    assert network.output_shape == (7,)
    assert logits.shape == (2, 7)
    assert logits.dtype == np.float32


@pytest.mark.parametrize("name", [name for name in OF_ANY_SIZE if name != "resnet20"])
def test_models_learn_to_predict_a_few_samples(name):
    network = build_model(name, (8, 8, 1), 4)
    network.initialize(Key(0))
    x, labels = normal((8, 8, 8, 1), dtype=np.float32), np.arange(8) % 4
    loss = SoftmaxCrossEntropy()
    velocity = np.zeros_like(network.parameters)
    for _ in range(200):
        loss.forward(network.forward(x), labels)
        network.backward(loss.backward())
        velocity *= 0.9
        velocity -= 0.005 * network.gradients
        network.parameters += velocity
    assert count_correct(network.forward(x), labels) == 8


def test_too_small_an_image_is_an_error_that_names_the_layer():
    message = r"conv2d_1 \(Conv2d 30@5x5\): input 4x4x1 is smaller than the 5x5 kernel"
    with pytest.raises(UserError, match=message):
        build_model("simple_convnet", (4, 4, 1), 10)
    with pytest.raises(UserError, match=r"maxpool2d_1 \(MaxPool2d 2x2 stride 2\): input 1x1x16"):
        build_model("deep_convnet", (1, 1, 1), 10)


def test_an_unknown_model_is_an_error_with_a_suggestion():
    with pytest.raises(UserError, match=r"unknown model 'simple_convet': .*did you mean 'simple_convnet'\?"):
        build_model("simple_convet", (28, 28, 1), 10)


def kinds(network):
    return [name.split("_")[0] for name in network.layer_names]


def test_logistic_regression_is_one_affine_layer():
    assert shapes("logistic") == {"affine_1.weight": (784, 10), "affine_1.bias": (10,)}


def test_the_multilayer_net_of_the_book_has_any_depth():
    """Sections 6.1.8 and 6.4: 784 - 100 - 100 - 100 - 100 - 10; also its extension with BatchNorm and Dropout."""
    plain = multilayer_net((28, 28, 1), 10, (100,) * 4)
    assert kinds(plain) == ["flatten", *["affine", "relu"] * 4, "affine"]
    assert plain.parameter_count == 78_500 + 3 * 10_100 + 1_010
    extended = multilayer_net((28, 28, 1), 10, (50, 30), "sigmoid", batch_norm=True, dropout=0.2)
    assert kinds(extended) == ["flatten", *["affine", "batchnorm", "sigmoid", "dropout"] * 2, "affine"]
    assert str(extended.layers[4]) == "Dropout 0.2"
    assert kinds(multilayer_net((28, 28, 1), 10, ())) == ["flatten", "affine"]
    assert build_model("mlp", (28, 28, 1), 10, hidden=(7, 6)).parameter_count == 785 * 7 + 8 * 6 + 7 * 10
    assert build_model("mlp", (28, 28, 1), 10, hidden=50).parameter_count == 785 * 50 + 51 * 10  # section 4.5


@pytest.mark.parametrize(("activation", "gain"), [("relu", 2), ("leaky_relu", 2), ("sigmoid", 1), ("tanh", 1)])
def test_initial_weights_suit_the_activation(activation, gain):
    network = multilayer_net((28, 28, 1), 10, (300,), activation)
    network.initialize(Key(0))
    assert dict(network.named_parameters())["affine_1.weight"].std() == pytest.approx(np.sqrt(gain / 784), rel=0.01)


def test_the_mlp_is_a_multilayer_net_of_one_hidden_layer_bit_for_bit():
    one, other = mlp((28, 28, 1), 10), multilayer_net((28, 28, 1), 10, (100,), "relu", Normal(0.01))
    for network in (one, other):
        network.initialize(Key(3))
    assert one.layer_names == ["flatten_1", "affine_1", "relu_1", "affine_2"]
    assert one.parameters.tobytes() == other.parameters.tobytes()


def test_invalid_settings_of_a_multilayer_net_are_refused():
    with pytest.raises(UserError, match=r"unknown activation 'rely': .*did you mean 'relu'\?"):
        multilayer_net((8, 8, 1), 10, activation="rely")
    with pytest.raises(UserError, match=r"hidden=1\.5 given.*: \(100, 50\), or by flag"):
        multilayer_net((8, 8, 1), 10, hidden=1.5)
    with pytest.raises(UserError, match=r"unknown setting of the model mlp 'hiddn': .*did you mean 'hidden'\?"):
        build_model("mlp", (8, 8, 1), 10, hiddn=3)
    with pytest.raises(UserError, match="outputs 0 given"):
        multilayer_net((8, 8, 1), 10, hidden=(5, 0))


def test_zero_classes_are_refused():
    with pytest.raises(UserError, match="0 classes given"):
        build_model("mlp", (8, 8, 1), 0)
