"""Compare the outputs of an ONNX file, computed by onnxruntime, with those of distdl."""

from __future__ import annotations

import importlib
import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distdl.arrays import aligned_empty
from distdl.data.signature import Signature
from distdl.engine.environment import numerics
from distdl.errors import DistdlError
from distdl.inference.load import Trained
from distdl.rng import Key

#: Images in each batch; two sizes show that the batch is dynamic.
BATCHES = (1, 4)
#: The largest difference, of outputs up to 1; of larger ones it is relative to the largest.
TOLERANCE = 1e-4


def verified(trained: Trained, content: bytes) -> str:
    """Return a line that says how far the outputs of the ONNX file are from distdl's, or that nobody compared them.

    The images are random. Raises `DistdlError` if the outputs are too far apart.
    """
    try:
        runtime = importlib.import_module("onnxruntime")
    except ImportError:
        return "not verified: onnxruntime is not installed (pip install onnxruntime)"
    pixels = random_pixels(trained.signature, sum(BATCHES))
    parts = np.split(pixels, np.cumsum(BATCHES)[:-1])
    theirs = np.concatenate([computed_by_onnxruntime(content, part) for part in parts])
    ours = np.concatenate([outputs_of(trained, part) for part in parts])
    difference = float(np.abs(ours - theirs).max())
    if not difference <= TOLERANCE * max(1, float(np.abs(ours).max())):
        raise DistdlError(
            f"the ONNX file computes other outputs than distdl: they differ by up to {difference:.1e}; nothing is "
            "written; this is a defect of distdl or of onnxruntime"
        )
    return (
        f"verified by onnxruntime {runtime.__version__} on {len(pixels)} images of random pixels: the outputs "
        f"differ by at most {difference:.1e}"
    )


def computed_by_onnxruntime(content: bytes, pixels: NDArray[Any]) -> NDArray[np.float32]:
    """Return the outputs (N, ...) that onnxruntime computes, on one thread, for pixels (N, H, W, C)."""
    runtime = importlib.import_module("onnxruntime")
    settings = runtime.SessionOptions()
    settings.intra_op_num_threads = settings.inter_op_num_threads = 1
    session = runtime.InferenceSession(content, settings, providers=["CPUExecutionProvider"])
    (outputs,) = session.run(None, {"pixels": pixels})
    found: NDArray[np.float32] = outputs
    return found


def outputs_of(trained: Trained, pixels: NDArray[Any]) -> NDArray[np.float32]:
    """Return the outputs (N, ...) that distdl computes for pixels (N, H, W, C); numbers in the units of the labels."""
    x = trained.signature.normalization.apply(pixels, out=aligned_empty(pixels.shape))
    with numerics(trained.config.threads_per_rank):
        outputs: NDArray[np.float32] = trained.in_units_of_labels(trained.network.forward(x)).copy()
    return outputs


def random_pixels(signature: Signature, count: int) -> NDArray[Any]:
    """Return random images (N, H, W, C) with the mean and deviation of the training, of its kind of numbers."""
    shape = (count, *signature.image_shape)
    normal = Key(0).of("export", "pixels").normal(math.prod(shape)).astype(np.float32).reshape(shape)
    pixels = signature.normalization.undo(normal)
    return np.clip(np.rint(pixels), 0, 255).astype(np.uint8) if signature.pixels == "uint8" else pixels
