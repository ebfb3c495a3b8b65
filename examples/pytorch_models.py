"""The networks of distdl's zoo for MNIST's shape, written for PyTorch.

Each has the layers, sizes and number of parameters of the network of the same name in `distdl/nn/models/`. The networks
for large images are in their variants for 28x28. ReLU is before max-pooling, as in the book. The other order gives the
same result, and a faster SimpleConvNet.
"""

import torch
from torch import nn

SIDE = 28
CLASSES = 10


def affine(inputs, outputs):
    return [nn.Linear(inputs, outputs), nn.ReLU(inplace=True)]


def convolution(channels, filters, kernel, padding=0):
    return [nn.Conv2d(channels, filters, kernel, padding=padding), nn.ReLU(inplace=True)]


def normalized(channels, filters, kernel, stride=1):
    """Return a convolution that keeps the size, except for its stride, and a BatchNorm, whose beta is the bias."""
    layer = nn.Conv2d(channels, filters, kernel, stride=stride, padding=kernel // 2, bias=False)
    return [layer, nn.BatchNorm2d(filters)]


def response_norm():
    return nn.LocalResponseNorm(5, alpha=5e-4, beta=0.75, k=2)


def logistic():
    return nn.Sequential(nn.Flatten(), nn.Linear(SIDE * SIDE, CLASSES))


def mlp():
    return nn.Sequential(nn.Flatten(), *affine(SIDE * SIDE, 100), nn.Linear(100, CLASSES))


def simple_convnet():
    layers = [*convolution(1, 30, 5), nn.MaxPool2d(2), nn.Flatten()]
    return nn.Sequential(*layers, *affine(30 * 12 * 12, 100), nn.Linear(100, CLASSES))


def deep_convnet():
    return nn.Sequential(
        *(*convolution(1, 16, 3, 1), *convolution(16, 16, 3, 1), nn.MaxPool2d(2)),
        *(*convolution(16, 32, 3, 1), *convolution(32, 32, 3, 2), nn.MaxPool2d(2)),
        *(*convolution(32, 64, 3, 1), *convolution(64, 64, 3, 1), nn.MaxPool2d(2)),
        *(nn.Flatten(), *affine(64 * 4 * 4, 50), nn.Dropout(0.5)),
        *(nn.Linear(50, CLASSES), nn.Dropout(0.5)),
    )


def lenet():
    return nn.Sequential(
        *(nn.Conv2d(1, 6, 5, padding=2), nn.Tanh(), nn.AvgPool2d(2)),
        *(nn.Conv2d(6, 16, 5), nn.Tanh(), nn.AvgPool2d(2)),
        *(nn.Flatten(), nn.Linear(16 * 5 * 5, 120), nn.Tanh()),
        *(nn.Linear(120, 84), nn.Tanh(), nn.Linear(84, CLASSES)),
    )


def alexnet():
    return nn.Sequential(
        *(*convolution(1, 64, 5, 2), response_norm(), nn.MaxPool2d(3, stride=2)),
        *(*convolution(64, 192, 5, 2), response_norm(), nn.MaxPool2d(3, stride=2)),
        *(*convolution(192, 384, 3, 1), *convolution(384, 256, 3, 1)),
        *(*convolution(256, 256, 3, 1), nn.MaxPool2d(3, stride=2)),
        *(nn.Flatten(), nn.Dropout(0.5), *affine(256 * 2 * 2, 1024)),
        *(nn.Dropout(0.5), *affine(1024, 1024), nn.Linear(1024, CLASSES)),
    )


def vgg11():
    return vgg((1, 1, 2, 2, 2))


def vgg16():
    return vgg((2, 2, 3, 3, 3))


def vgg(depths):
    layers, channels = [], 1
    for filters, depth in zip((64, 128, 256, 512, 512), depths, strict=True):
        for _ in range(depth):
            layers += convolution(channels, filters, 3, 1 if layers else 3)  # the first one makes 28x28 to 32x32
            channels = filters
        layers.append(nn.MaxPool2d(2))
    layers += [nn.Flatten(), *affine(512, 512), nn.Dropout(0.5), *affine(512, 512), nn.Dropout(0.5)]
    return nn.Sequential(*layers, nn.Linear(512, CLASSES))


class Inception(nn.Module):
    """Four branches side by side: 1x1; 1x1 - 3x3; 1x1 - 5x5; pooling - 1x1."""

    def __init__(self, channels, ones, before_threes, threes, before_fives, fives, after_pool):
        super().__init__()
        self.ones = nn.Sequential(*convolution(channels, ones, 1))
        self.threes = nn.Sequential(*convolution(channels, before_threes, 1), *convolution(before_threes, threes, 3, 1))
        self.fives = nn.Sequential(*convolution(channels, before_fives, 1), *convolution(before_fives, fives, 5, 2))
        self.pooled = nn.Sequential(nn.MaxPool2d(3, stride=1, padding=1), *convolution(channels, after_pool, 1))

    def forward(self, x):
        return torch.cat([self.ones(x), self.threes(x), self.fives(x), self.pooled(x)], 1)


def googlenet():
    def pool():
        return nn.MaxPool2d(3, stride=2, padding=1)

    return nn.Sequential(
        *(*convolution(1, 64, 3, 1), pool(), response_norm()),
        *(*convolution(64, 64, 1), *convolution(64, 192, 3, 1), response_norm()),
        *(Inception(192, 64, 96, 128, 16, 32, 32), Inception(256, 128, 128, 192, 32, 96, 64), pool()),
        *(Inception(480, 192, 96, 208, 16, 48, 64), Inception(512, 160, 112, 224, 24, 64, 64)),
        *(Inception(512, 128, 128, 256, 24, 64, 64), Inception(512, 112, 144, 288, 32, 64, 64)),
        *(Inception(528, 256, 160, 320, 32, 128, 128), pool()),
        *(Inception(832, 256, 160, 320, 32, 128, 128), Inception(832, 384, 192, 384, 48, 128, 128)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.4), nn.Linear(1024, CLASSES)),
    )


class Residual(nn.Module):
    """Two or three convolutions plus a shortcut: the input itself, or its 1x1 convolution if the shape changes."""

    def __init__(self, channels, filters, stride, body):
        super().__init__()
        self.body = nn.Sequential(*body)
        self.shortcut = nn.Sequential()
        if stride > 1 or channels != filters:
            self.shortcut = nn.Sequential(*normalized(channels, filters, 1, stride))

    def forward(self, x):
        return nn.functional.relu(self.body(x) + self.shortcut(x), inplace=True)


def basic(channels, width, stride):
    first = [*normalized(channels, width, 3, stride), nn.ReLU(inplace=True)]
    return Residual(channels, width, stride, [*first, *normalized(width, width, 3)])


def bottleneck(channels, width, stride):
    narrow = [*normalized(channels, width, 1), nn.ReLU(inplace=True)]
    narrow += [*normalized(width, width, 3, stride), nn.ReLU(inplace=True)]
    return Residual(channels, 4 * width, stride, [*narrow, *normalized(width, 4 * width, 1)])


def resnet(block, widths, depths, factor=1):
    channels = widths[0]
    layers = [*normalized(1, channels, 3), nn.ReLU(inplace=True)]
    for stage, (width, depth) in enumerate(zip(widths, depths, strict=True)):
        for number in range(depth):
            layers.append(block(channels, width, 2 if stage and not number else 1))
            channels = factor * width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, CLASSES))


def resnet18():
    return resnet(basic, (64, 128, 256, 512), (2, 2, 2, 2))


def resnet20():
    return resnet(basic, (16, 32, 64), (3, 3, 3))


def resnet50():
    return resnet(bottleneck, (64, 128, 256, 512), (3, 4, 6, 3), factor=4)


MODELS = {
    model.__name__: model
    for model in (
        *(logistic, mlp, simple_convnet, deep_convnet, lenet, alexnet),
        *(vgg11, vgg16, googlenet, resnet18, resnet20, resnet50),
    )
}
