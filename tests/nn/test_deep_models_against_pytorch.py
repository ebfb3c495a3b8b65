"""ResNet-20 and GoogLeNet train like the same networks written in PyTorch by hand.

The PyTorch side shares only the initial weights (copied in the order of the layers), the samples and the Dropout mask.
Both compute in float64, so that a difference comes from the network and not from rounding.
"""

import numpy as np
import pytest

from distdl.nn import SoftmaxCrossEntropy, build_model
from distdl.optim import optimizer_class
from distdl.rng import Key

from .oracles import normal, relative_error

torch = pytest.importorskip("torch")
nn = torch.nn

KEY = Key(5)
LEARNING_RATE, STEPS = 0.01, 3


def normalized(inputs, outputs, kernel, stride=1):
    convolution = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs))


class Block(nn.Module):
    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.body = nn.Sequential(normalized(inputs, outputs, 3, stride), nn.ReLU(), normalized(outputs, outputs, 3))
        self.shortcut = nn.Identity() if inputs == outputs else normalized(inputs, outputs, 1, stride)

    def forward(self, x):
        return nn.functional.relu(self.body(x) + self.shortcut(x))


def resnet20(channels, classes):
    blocks = [Block(16, 16, 1), Block(16, 16, 1), Block(16, 16, 1)]
    blocks += [Block(16, 32, 2), Block(32, 32, 1), Block(32, 32, 1)]
    blocks += [Block(32, 64, 2), Block(64, 64, 1), Block(64, 64, 1)]
    beginning = [normalized(channels, 16, 3), nn.ReLU()]
    return nn.Sequential(*beginning, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, classes))


def convolved(inputs, outputs, kernel):
    return nn.Sequential(nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2), nn.ReLU())


class Inception(nn.Module):
    def __init__(self, inputs, ones, before_threes, threes, before_fives, fives, after_pool):
        super().__init__()
        self.branches = nn.ModuleList(
            [
                convolved(inputs, ones, 1),
                nn.Sequential(convolved(inputs, before_threes, 1), convolved(before_threes, threes, 3)),
                nn.Sequential(convolved(inputs, before_fives, 1), convolved(before_fives, fives, 5)),
                nn.Sequential(nn.MaxPool2d(3, 1, 1), convolved(inputs, after_pool, 1)),
            ]
        )

    def forward(self, x):
        return torch.cat([branch(x) for branch in self.branches], dim=1)


class SameDropout(nn.Module):
    """Dropout with our mask."""

    def forward(self, x):
        if not self.training:
            return x
        return x * torch.tensor(KEY.of("dropout_1").mask(x.numel(), 0.6).reshape(x.shape)) / 0.6


def googlenet(channels, classes):
    def norm():
        return nn.LocalResponseNorm(5, alpha=5e-4, beta=0.75, k=2)

    return nn.Sequential(
        *(convolved(channels, 64, 3), nn.MaxPool2d(3, 2, 1), norm()),
        *(convolved(64, 64, 1), convolved(64, 192, 3), norm()),
        *(Inception(192, 64, 96, 128, 16, 32, 32), Inception(256, 128, 128, 192, 32, 96, 64), nn.MaxPool2d(3, 2, 1)),
        *(Inception(480, 192, 96, 208, 16, 48, 64), Inception(512, 160, 112, 224, 24, 64, 64)),
        *(Inception(512, 128, 128, 256, 24, 64, 64), Inception(512, 112, 144, 288, 32, 64, 64)),
        *(Inception(528, 256, 160, 320, 32, 128, 128), nn.MaxPool2d(3, 2, 1)),
        *(Inception(832, 256, 160, 320, 32, 128, 128), Inception(832, 384, 192, 384, 48, 128, 128)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), SameDropout(), nn.Linear(1024, classes)),
    )


def in_our_layout(parameter):
    """Convert (FN, C, FH, FW) to (FH, FW, C, FN), and (K, D) to (D, K)."""
    array = parameter.detach().numpy()
    return {4: lambda: array.transpose(2, 3, 1, 0), 2: lambda: array.T, 1: lambda: array}[array.ndim]()


def copy_weights(model, network):
    for parameter, (_, view) in zip(model.parameters(), network.named_parameters(), strict=True):
        in_our_layout(parameter)[...] = view


def images(x):
    return torch.tensor(x).permute(0, 3, 1, 2)  # N, C, H, W


@pytest.mark.parametrize(("name", "make", "N"), [("resnet20", resnet20, 4), ("googlenet", googlenet, 2)])
def test_steps_of_momentum_equal_those_of_the_same_network_in_pytorch(name, make, N):
    x, labels = normal((N, 28, 28, 1)), np.arange(N)
    x[:, 14:] = 0  # blank areas, where poolings have ties
    network, model = build_model(name, (28, 28, 1), 10, dtype=np.float64), make(1, 10).double()
    network.initialize(Key(0))
    copy_weights(model, network)
    optimizer = optimizer_class("momentum")(network.parameters.size, dtype=np.float64)
    theirs = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE, momentum=0.9)
    loss = SoftmaxCrossEntropy()
    for step in range(1, STEPS + 1):
        value = loss.forward(network.forward(x, training=True, key=KEY), labels) / N
        network.backward(loss.backward())
        network.gradients /= N
        their_loss = nn.functional.cross_entropy(model(images(x)), torch.tensor(labels))
        theirs.zero_grad()
        their_loss.backward()
        assert value == pytest.approx(their_loss.item(), rel=1e-8)
        for (parameter, gradient), other in zip(network.named_gradients(), model.parameters(), strict=True):
            assert relative_error(gradient, in_our_layout(other.grad)) < 1e-6, (step, parameter)
        optimizer.update(network.parameters, network.gradients, LEARNING_RATE, step)
        network.update_buffers(network.statistics)
        theirs.step()
    model.eval()
    assert relative_error(network.forward(x), model(images(x)).detach().numpy()) < 1e-6, "by the running moments"
