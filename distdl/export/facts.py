"""The facts about a trained network that every exported file has: what its inputs and outputs mean, and its origin."""

from __future__ import annotations

from typing import Any

import distdl
from distdl.errors import one_line
from distdl.inference.load import Trained


def facts_of(trained: Trained) -> dict[str, Any]:
    """Return the facts as plain values; None: it does not apply."""
    signature = trained.signature
    return {
        "task": signature.task,
        "names": [signature.name_of(output) for output in range(signature.outputs)],
        "activation": activation_of(trained),
        "image_shape": list(signature.image_shape),
        "pixels": signature.pixels,
        "mean": list(signature.mean),
        "deviation": list(signature.deviation),
        "resize": signature.resize,
        "target_mean": _listed(signature.target_mean),
        "target_deviation": _listed(signature.target_deviation),
        "model": one_line(trained.config.model.rpartition("/")[2]),  # without the folder of the user's file
        "step": trained.step,
        "weights_sha256": trained.weights_sha256,
        "distdl_version": distdl.__version__,
    }


def activation_of(trained: Trained) -> str | None:
    """Return the function that makes probabilities of the outputs; None if they are numbers, not logits."""
    return {"cross_entropy": "softmax", "binary_cross_entropy": "sigmoid"}.get(trained.loss_name)


def _listed(values: tuple[float, ...] | None) -> list[float] | None:
    return None if values is None else list(values)
