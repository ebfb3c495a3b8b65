"""Train a network by the NumPy form, the compiled form and PyTorch; print the loss of each epoch, in Markdown.

    python -m tests.nn.kernels.losses_per_epoch simple_convnet 1 ~/mnist
    python -m tests.nn.kernels.losses_per_epoch deep_convnet 10

The number is that of runs, each with another seed; the table has the means. In each run all forms have the same initial
weights, order of samples, dropout masks and Adam. The data are the first 6,400 images of MNIST in a folder, or those of
digits. It needs PyTorch.
"""

import sys
from pathlib import Path

import numpy as np

from distdl.engine.user_code import load_dataset
from distdl.nn import Affine, Conv2d, Dropout, Flatten, MaxPool2d, ReLU, SoftmaxCrossEntropy, build_model
from distdl.nn.kernels import NUMPY
from distdl.nn.kernels.compiled import COMPILED
from distdl.optim import OPTIMIZERS
from distdl.rng import Key

try:
    import torch
    from torch.nn import functional
except ImportError:  # pytest imports this file too, in search of doctests
    torch = None

SAMPLES, BATCH, EPOCHS, RATE = 6400, 64, 3, 0.001


def batches(seed, count):
    """Yield the epoch and the rows of each batch; the last rows that fill none are left out."""
    for epoch in range(EPOCHS):
        order = np.random.default_rng([seed, epoch]).permutation(count)
        for first in range(0, count - BATCH + 1, BATCH):
            yield epoch, order[first : first + BATCH]


def network_of(model, seed, images):
    network = build_model(model, images.shape[1:], 10)
    network.initialize(Key(seed))
    return network


def losses(model, kernels, seed, images, labels):
    """Return the mean loss of each epoch, trained with these kernels."""
    network, found = network_of(model, seed, images), [[] for _ in range(EPOCHS)]
    network.use(kernels)
    optimizer = OPTIMIZERS["adam"](network.parameters.size, fused=kernels.optimizer_rule("adam"))
    loss = kernels.loss(SoftmaxCrossEntropy())
    for step, (epoch, rows) in enumerate(batches(seed, len(labels)), 1):
        outputs = network.forward(images[rows], training=True, key=Key(seed).of(step))
        found[epoch].append(loss.forward(outputs, labels[rows]) / BATCH)
        network.backward(loss.backward())
        network.gradients /= np.float32(BATCH)
        optimizer.update(network.parameters, network.gradients, RATE, step)
    return np.mean(found, axis=1)


def losses_of_pytorch(model, seed, images, labels):
    """Return the mean loss of each epoch, trained by PyTorch."""
    network, found = network_of(model, seed, images), [[] for _ in range(EPOCHS)]
    leaves = {name: torch.tensor(view, requires_grad=True) for name, view in network.named_parameters()}
    optimizer = torch.optim.Adam(leaves.values(), lr=RATE)
    for step, (epoch, rows) in enumerate(batches(seed, len(labels)), 1):
        optimizer.zero_grad()
        outputs = forward_of_pytorch(network, leaves, torch.tensor(images[rows]), Key(seed).of(step))
        loss = functional.cross_entropy(outputs, torch.tensor(labels[rows]))
        loss.backward()
        optimizer.step()
        found[epoch].append(loss.item())
    return np.mean(found, axis=1)


def forward_of_pytorch(network, leaves, x, key):
    z = x.permute(0, 3, 1, 2)
    for layer, name in zip(network.layers, network.layer_names, strict=True):
        weight, bias = leaves.get(f"{name}.weight"), leaves.get(f"{name}.bias")
        match layer:
            case Conv2d():
                z = functional.conv2d(z, weight.permute(3, 2, 0, 1), bias, layer.window.stride, layer.window.padding)
            case MaxPool2d():
                z = functional.max_pool2d(z, layer.window.kernel, layer.window.stride, layer.window.padding)
            case Flatten():
                z = z.permute(0, 2, 3, 1).flatten(1)
            case Affine():
                z = z @ weight + bias
            case ReLU():
                z = functional.relu(z)
            case Dropout():
                mask = key.of(name).mask(z.numel(), 1 - layer.ratio).reshape(z.shape)
                z = z * torch.tensor(mask) / (1 - layer.ratio)
            case _:
                raise ValueError(f"no PyTorch counterpart of {layer} is written here")
    return z


def main(model, runs, folder=None):
    """Print the table."""
    torch.set_num_threads(1)
    options = ("digits", None) if folder is None else ("mnist", Path(folder))
    data = load_dataset(*options).checked()
    images, labels = data.images[:SAMPLES].astype(np.float32), data.labels[:SAMPLES].astype(np.int64)
    images = (images - images.mean()) / images.std()
    found = []
    for seed in range(int(runs)):
        ours = [losses(model, kernels, seed, images, labels) for kernels in (NUMPY, COMPILED)]
        found.append([*ours, losses_of_pytorch(model, seed, images, labels)])
    print(f"| {model}, {len(labels):,} images of {options[0]} | NumPy | compiled | PyTorch | compiled / PyTorch |")
    print("|---|---|---|---|---|")
    for epoch, (a, b, c) in enumerate(np.mean(found, axis=0).T, 1):
        print(f"| epoch {epoch}, mean of {runs} | {a:.4f} | {b:.4f} | {c:.4f} | {b / c - 1:+.2%} |")
    for other, name in enumerate(("NumPy", "compiled")):
        ratios = [of_run[other][-1] / of_run[2][-1] - 1 for of_run in found]
        print(f"last epoch, {name} / PyTorch of the single runs: {' '.join(f'{ratio:+.2%}' for ratio in ratios)}")


if __name__ == "__main__":
    main(*sys.argv[1:])
