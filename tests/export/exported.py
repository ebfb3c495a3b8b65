"""Networks to export: trained ones in run folders, and any layers with random numbers."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import numpy as np
import pytest

from distdl import cli
from distdl.config import TrainConfig
from distdl.data.signature import Signature
from distdl.export import __main__ as export_command
from distdl.inference.load import Trained, load
from distdl.nn import (
    Affine,
    AvgPool2d,
    BatchNorm,
    Branches,
    Conv2d,
    ConvTranspose2d,
    Dropout,
    Flatten,
    GlobalAvgPool2d,
    Identity,
    LeakyReLU,
    LocalResponseNorm,
    MaxPool2d,
    ReLU,
    Residual,
    Sequential,
    Sigmoid,
    Softmax,
    Tanh,
    Upsample2d,
)
from distdl.parallel import OneProcess
from distdl.rng import Key

SHAPE = (7, 6, 3)


def convolution(**settings):
    return Conv2d(4, 3, padding=1, **settings)


#: Layers on images of SHAPE, by what is special about them. Each ends with a row of numbers.
STACKS = {
    "flatten, affine": lambda: [convolution(), Flatten(), Affine(5)],
    "elementwise in between": lambda: [
        *(convolution(), Flatten(), Dropout(0.3), LeakyReLU(0.2), Flatten(), Sigmoid(), Tanh(), Identity(), ReLU()),
        *(Affine(5), LeakyReLU()),
    ],
    "flatten, batch norm": lambda: [convolution(), Flatten(), BatchNorm(epsilon=0.01, momentum=0.3), Affine(5)],
    "flatten, softmax": lambda: [Conv2d(2, 3), Flatten(), Softmax()],
    "flatten at the end": lambda: [Conv2d(2, 3), Flatten()],
    "flatten of one channel": lambda: [Conv2d(1, 3), Flatten(), BatchNorm(), Affine(3)],
    "flatten of one pixel": lambda: [Conv2d(3, (7, 6)), Flatten(), BatchNorm(), Affine(3)],
    "flatten in branches": lambda: [Branches([Conv2d(2, 3), Flatten()], [Flatten(), Affine(4)]), Affine(3)],
    "flatten before branches": lambda: [Flatten(), Branches([Affine(3)], [Affine(2), ReLU()]), Affine(3)],
    "flat residual": lambda: [Flatten(), Residual([Affine(126), ReLU(), Affine(126)]), Affine(3)],
    "two flattens": lambda: [Residual([Flatten(), Affine(4)], [convolution(), Flatten(), Affine(4)])],
    "odd convolutions": lambda: [
        *(Conv2d(5, (3, 2), stride=(2, 1), padding=(0, 2), bias=False), BatchNorm(), Tanh()),
        *(Conv2d(3, 1, stride=3), Flatten(), Affine(2)),
    ],
    "transposed convolutions": lambda: [
        *(ConvTranspose2d(4, (3, 2), stride=(2, 3), padding=(1, 0)), ReLU()),
        *(ConvTranspose2d(2, 1), GlobalAvgPool2d(), Affine(3)),
    ],
    "poolings": lambda: [
        *(MaxPool2d(2, padding=1), AvgPool2d(3, stride=1, padding=1), MaxPool2d((2, 3), stride=(1, 2)), Flatten()),
        Affine(3),
    ],
    "poolings with a wide margin": lambda: [
        *(MaxPool2d(3, stride=2, padding=2), AvgPool2d(4, stride=1, padding=(3, 2)), Flatten(), Affine(3)),
    ],
    "pooling of a part": lambda: [AvgPool2d((4, 4)), MaxPool2d(1), Flatten(), Affine(3)],
    "norms": lambda: [
        *(Conv2d(9, 3), LocalResponseNorm(5, alpha=0.3, beta=0.6, k=2), BatchNorm(), LocalResponseNorm(3)),
        *(Softmax(), GlobalAvgPool2d(), BatchNorm(), Affine(3)),
    ],
    "residual": lambda: [
        *(convolution(), Residual([convolution(bias=False), BatchNorm(), ReLU(), convolution()]), ReLU()),
        *(Residual([Conv2d(6, 3, stride=2, padding=1), BatchNorm()], [Conv2d(6, 1, stride=2)]), ReLU()),
        *(GlobalAvgPool2d(), Affine(3)),
    ],
    "nested branches": lambda: [
        Branches(
            [Conv2d(2, 1)],
            [Conv2d(3, 1), ReLU(), Branches([convolution()], [MaxPool2d(3, stride=1, padding=1)], [])],
            [Residual([convolution(), ReLU(), Conv2d(3, 5, padding=2)])],
        ),
        *(Flatten(), Affine(4)),
    ],
    "upsampling": lambda: [Conv2d(2, 3), Upsample2d(3), ReLU(), Upsample2d(1), Flatten(), Affine(3)],
    "upsampling of a pixel": lambda: [Conv2d(3, (7, 6)), Upsample2d(4), Flatten(), Affine(3)],
}


def random_trained(layers, *, input_shape=SHAPE, pixels="uint8", names=None, seed=0, **signature) -> Trained:
    """Return a network of these layers with random parameters and buffers, as if it had been trained."""
    network = Sequential(layers, input_shape)
    key = Key(seed).of("test")
    network.initialize(key)
    for name, view in network.named_parameters():
        if view.ndim == 1:  # biases, gamma and beta
            view[...] = 0.5 + key.of(name).uniform(view.size)
    for name, view in network.named_buffers():
        view[...] = 0.5 + key.of(name).uniform(view.size)
    of_channels = key.of("pixels").uniform(2 * input_shape[2]).reshape(2, -1).astype(np.float32)
    mean, deviation = (255 * of_channels if pixels == "uint8" else of_channels) + 0.1
    outputs = len(names) if names else network.output_shape[-1]
    signature = {
        "task": "classification",
        "outputs": outputs,
        "names": names,
        "image_shape": input_shape,
        "pixels": pixels,
        "mean": tuple(mean.tolist()),
        "deviation": tuple(deviation.tolist()),
        **signature,
    }
    loss = signature.pop("loss", "auto")
    config = TrainConfig(model="/home/ada/net.py:network", loss=loss)
    return Trained(
        *(Path("run"), Path("run/step"), config, 3, "0" * 64, network, Signature(**signature), ()),
        data_sha256="",
    )


def command(*arguments):
    """Run `distdl.export` in this process; return its exit code, its lines of output and of errors."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", out)
        patch.setattr(sys, "stderr", err)
        code = cli.run(export_command.main, list(map(str, arguments)))
    return code, out.getvalue().splitlines(), err.getvalue().splitlines()


def loaded(folder, **settings) -> Trained:
    """Return the network of a run folder, loaded without its data."""
    (trained,) = load([folder], OneProcess(), with_data=False, **settings)
    return trained
