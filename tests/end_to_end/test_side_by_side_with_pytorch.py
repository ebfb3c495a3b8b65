"""distdl and PyTorch, trained from the same weights on the same batches, have the same loss curve and accuracy.

The PyTorch side is ordinary PyTorch code: `nn.Sequential`, images (N, C, H, W), the mean of the cross-entropy,
`torch.optim.Adam`. Both sides share only the initial weights (converted to PyTorch's layouts), the normalized pixels
and the samples of each batch.

Both compute in float32 and round differently. Training amplifies the difference. If PyTorch's initial weights change by
1e-7 of their size, its losses differ by several percent per step after some hundred steps. So the tests compare:

- the first steps, tightly;
- the mean loss of each ten of the first hundred steps;
- the mean loss of each epoch, and the accuracy on the test part.

By default the test uses the first 6,000 training images of MNIST, and takes seconds. All of MNIST, three epochs of
54,000 samples, takes minutes. It also trains PyTorch with the changed weights, and prints the difference:

    DISTDL_FULL=1 pytest -s tests/end_to_end/test_side_by_side_with_pytorch.py
"""

import dataclasses
import json
import os

import numpy as np
import pytest

from distdl.config import TrainConfig
from distdl.data import batch_order, normalization, sources, split
from distdl.engine import train
from distdl.nn import simple_convnet
from distdl.parallel import OneProcess
from distdl.rng import Key

torch = pytest.importorskip("torch")

SEED = 0
BATCH_SIZE = 128
LEARNING_RATE = 0.001
NUDGE = 1e-7
FULL = os.environ.get("DISTDL_FULL") == "1"


def mnist(folder):
    whole = sources.load("mnist", folder)
    if FULL:
        return whole
    rows = np.r_[:6000, whole.test_start : len(whole.labels)]
    return dataclasses.replace(whole, images=whole.images[rows], labels=whole.labels[rows], test_start=6000)


def trained_here(dataset, epochs, folder):
    """Return the loss of each step and epoch, and the test accuracy, as this trainer reports them."""
    config = TrainConfig(
        dataset=dataset.name,
        epochs=epochs,
        batch_size=BATCH_SIZE,
        lr=LEARNING_RATE,
        seed=SEED,
        log_every=1,
        run_dir=folder,
    )
    summary = train(config, OneProcess(), dataset=dataset)
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = np.array([record["loss"] for record in records if "loss" in record])
    epoch_losses = np.array([record["train_loss"] for record in records if "train_loss" in record])
    return steps, epoch_losses, summary.test_accuracy


def pytorch_model(network, classes):
    """Return SimpleConvNet in PyTorch's own layers, with the weights of `network`."""
    weights = {name: torch.tensor(view) for name, view in network.named_parameters()}
    FH, FW, C, FN = weights["conv2d_1.weight"].shape
    D, hidden = weights["affine_1.weight"].shape
    size = round((D / FN) ** 0.5)  # of the pooled image, height and width
    model = torch.nn.Sequential(
        torch.nn.Conv2d(C, FN, (FH, FW)),
        torch.nn.ReLU(),
        torch.nn.MaxPool2d(2),
        torch.nn.Flatten(),
        torch.nn.Linear(D, hidden),
        torch.nn.ReLU(),
        torch.nn.Linear(hidden, classes),
    )
    in_rows = weights["affine_1.weight"].reshape(size, size, FN, hidden)
    copies = {
        "0.weight": weights["conv2d_1.weight"].permute(3, 2, 0, 1),  # FN, C, FH, FW
        "0.bias": weights["conv2d_1.bias"],
        "4.weight": in_rows.permute(3, 2, 0, 1).reshape(hidden, D),  # inputs ordered as FN, H, W
        "4.bias": weights["affine_1.bias"],
        "6.weight": weights["affine_2.weight"].T,
        "6.bias": weights["affine_2.bias"],
    }
    model.load_state_dict(copies)
    return model


def trained_by_pytorch(dataset, epochs, nudge=0.0):
    """Return the same as `trained_here`; `nudge` is the relative change of each initial weight."""
    key = Key(SEED)
    parts = split.split(dataset.labels, dataset.test_start, key)
    pixels = normalization.measure(dataset.images, parts.training)
    network = simple_convnet(dataset.images.shape[1:], dataset.classes)
    network.initialize(key.of("initialization"))
    network.parameters *= 1 + nudge * key.of("nudge").normal(network.parameters.size).astype(np.float32)
    model = pytorch_model(network, dataset.classes)
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.999), eps=1e-8)
    mean_cross_entropy = torch.nn.CrossEntropyLoss()

    def batch(rows):
        images = np.ascontiguousarray(pixels.apply(dataset.images[rows]).transpose(0, 3, 1, 2))
        return torch.from_numpy(images), torch.from_numpy(dataset.labels[rows])

    steps, epoch_losses = [], []
    for epoch in range(epochs):
        summed = 0.0
        rows = parts.training[batch_order.epoch_order(key, epoch, len(parts.training))]
        for start in range(0, len(rows), BATCH_SIZE):
            images, labels = batch(rows[start : start + BATCH_SIZE])
            optimizer.zero_grad()
            loss = mean_cross_entropy(model(images), labels)
            loss.backward()
            optimizer.step()
            steps.append(loss.item())
            summed += loss.item() * len(labels)
        epoch_losses.append(summed / len(rows))

    right = 0
    with torch.no_grad():
        for start in range(0, len(parts.test), 1000):
            images, labels = batch(parts.test[start : start + 1000])
            right += int((model(images).argmax(dim=1) == labels).sum())
    return np.array(steps), np.array(epoch_losses), right / len(parts.test)


def apart(one, other):
    """Return the largest relative difference of two runs in each part of the curve."""
    (steps, epoch_losses, _), (their_steps, their_epoch_losses, _) = one, other

    def stretches(losses):
        return losses[: len(losses) // 10 * 10].reshape(-1, 10).mean(axis=1)

    return {
        "first 10 steps": relative(steps[:10], their_steps[:10]),
        "stretches of 10 in the first 100": relative(stretches(steps[:100]), stretches(their_steps[:100])),
        "stretches of 10": relative(stretches(steps), stretches(their_steps)),
        "epochs": relative(epoch_losses, their_epoch_losses),
    }


def relative(losses, others):
    return float((np.abs(losses - others) / others).max())


def assert_same_course(dataset, epochs, folder):
    here, pytorch = trained_here(dataset, epochs, folder), trained_by_pytorch(dataset, epochs)
    assert len(here[0]) == len(pytorch[0])
    distance = apart(here, pytorch)
    print(f"\n{dataset.name}, {len(here[0])} steps")
    show("here", here, distance)
    show("PyTorch", pytorch, {})
    if FULL:
        nudged = trained_by_pytorch(dataset, epochs, NUDGE)
        show("PyTorch, nudged", nudged, apart(nudged, pytorch))
    assert distance["first 10 steps"] < 1e-5
    assert distance["stretches of 10 in the first 100"] < 0.01
    assert distance["epochs"] < 0.01
    assert abs(here[2] - pytorch[2]) <= 0.002


def show(who, run, distance):
    _, epoch_losses, accuracy = run
    print(f"{who}: epoch losses {' '.join(f'{loss:.5f}' for loss in epoch_losses)}, test accuracy {accuracy:.2%}")
    if distance:
        print("    from PyTorch: " + ", ".join(f"{where} {most:.1e}" for where, most in distance.items()))


def test_on_mnist_both_have_the_same_loss_curve_and_test_accuracy(mnist_dir, tmp_path):
    assert_same_course(mnist(mnist_dir), 3, tmp_path / "run")


def test_on_the_digits_both_have_the_same_loss_curve_and_test_accuracy(tmp_path):
    """Needs no files: the digits are part of the package."""
    assert_same_course(sources.load("digits", None), 10, tmp_path / "run")
