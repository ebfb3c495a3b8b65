"""Train a tiny network with compiled kernels; print its receipt, its metrics and its fingerprint as JSON."""

import dataclasses
import json
import os
import tempfile
from pathlib import Path

from distdl.config import TrainConfig
from distdl.data import sources
from distdl.engine import train
from distdl.nn import Affine, BatchNorm, Conv2d, Dropout, Flatten, MaxPool2d, ReLU, Sequential
from distdl.parallel import OneProcess


def build(input_shape, classes):
    convolution = [Conv2d(5, 3, padding=1), BatchNorm(), ReLU(), MaxPool2d(2)]
    affine = [Flatten(), Affine(6), ReLU(), Dropout(0.2), Affine(classes)]
    return Sequential([*convolution, *affine], input_shape)


def main():
    digits = sources.load("digits", None)
    dataset = dataclasses.replace(digits, images=digits.images[:131], labels=digits.labels[:131], test_start=94)
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        config = TrainConfig(
            batch_size=32, micro_batch_size=4, epochs=1, schedule="cosine", clip_norm=1.0, augment="rotate=10,shift=1",
            weight_decay=1e-4, kernels="compiled", run_dir=run,
        )  # fmt: skip
        summary = train(config, OneProcess(), build_network=build, dataset=dataset)
        found = {
            "receipt": summary.weights_sha256,
            "state": summary.state_sha256,
            "metrics": (run / "metrics.jsonl").read_text(),
            "fingerprint": json.loads((run / "env.json").read_text())["fingerprint"],
        }
    print(json.dumps(found))


if __name__ == "__main__":
    assert os.environ["OPENBLAS_NUM_THREADS"] == "1"
    main()
