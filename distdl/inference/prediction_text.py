"""Predictions as lines of text for the user, and as CSV and JSON for programs.

Text has at most 80 columns if the names of files and classes allow it: only names of classes are shortened.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distdl.data.signature import Signature
from distdl.engine.table import shortened
from distdl.errors import one_line

COLUMNS = 80
#: A longer name of a file does not move the columns of the others.
LONGEST_NAME = 40
#: Names of classes have at least this many characters, if they are as long.
LEAST_CLASS = 10


@dataclass(frozen=True)
class Prediction:
    """The prediction of an image: outputs with their values.

    For classification the most probable classes, the best first, with their probabilities; for segmentation the most
    frequent classes with their shares of the pixels; for regression all numbers.
    """

    name: str
    outputs: list[int]
    values: list[float]


def prediction_of(name: str, values: NDArray[Any], signature: Signature, top: int) -> Prediction:
    """Return the prediction of an image from its values (see `prediction.Block`)."""
    if signature.task == "regression":
        return Prediction(name, list(range(len(values))), values.tolist())
    if signature.task == "segmentation":
        values = np.bincount(values.reshape(-1), minlength=signature.outputs) / values.size
    best = np.argsort(-values, kind="stable")[:top]
    return Prediction(name, best.tolist(), values[best].tolist())


class Lines:
    """Makes the line of each prediction, with aligned columns."""

    def __init__(self, signature: Signature, names: Sequence[str], top: int) -> None:
        self._signature = signature
        self._width = min(max(len(_printable(name)) for name in names), LONGEST_NAME)
        outputs = [one_line(signature.name_of(output)) for output in range(signature.outputs)]
        shown = min(top, signature.outputs)
        room = (COLUMNS - self._width) // shown - len("   100.00%")
        width = min(max(map(len, outputs)), max(room, LEAST_CLASS))
        self._outputs = [shortened(output, width).ljust(width) for output in outputs]

    def of(self, prediction: Prediction) -> str:
        """Return the line of a prediction, without a line break."""
        is_regression = self._signature.task == "regression"
        cells = []
        for output, value in zip(prediction.outputs, prediction.values, strict=True):
            text = f"{value:12.6g}" if is_regression else f"{value:7.2%}"
            is_named = not is_regression or self._signature.names is not None
            cells.append(f"{self._outputs[output]} {text}" if is_named else text)
        return "  ".join([_printable(prediction.name).ljust(self._width), *cells])


def _printable(name: str) -> str:
    """Return the name of a file, with control characters escaped."""
    return name if name.isprintable() else one_line(name)


def predictions_csv(predictions: Iterable[Prediction], signature: Signature, top: int) -> bytes:
    """Return the content of a CSV file: a line per image; two columns per class shown, or one per number."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    if signature.task == "regression":
        writer.writerow(["file", *map(signature.name_of, range(signature.outputs))])
        writer.writerows([one.name, *one.values] for one in predictions)
    else:
        what = "share" if signature.task == "segmentation" else "probability"
        places = range(1, min(top, signature.outputs) + 1)
        writer.writerow(["file", *(f"{column}_{place}" for place in places for column in ("class", what))])
        for one in predictions:
            pairs = zip(map(signature.name_of, one.outputs), one.values, strict=True)
            writer.writerow([one.name, *(cell for pair in pairs for cell in pair)])
    return text.getvalue().encode(errors="surrogateescape")


def prediction_json(prediction: Prediction, signature: Signature) -> dict[str, Any]:
    """Return a prediction as plain values; a number that is not finite is None."""
    values = [value if math.isfinite(value) else None for value in prediction.values]
    if signature.task == "regression":
        numbers = dict(zip(map(signature.name_of, prediction.outputs), values, strict=True))
        return {"file": prediction.name, "numbers": numbers}
    what = "share" if signature.task == "segmentation" else "probability"
    classes = [
        {"class": signature.name_of(output), "index": output, what: value}
        for output, value in zip(prediction.outputs, values, strict=True)
    ]
    return {"file": prediction.name, "classes": classes}
