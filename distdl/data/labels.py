"""Labels as people save them, and the task that they define. The task is never guessed.

`canonical` turns labels into one of three forms without a choice: integers (N,) or (N, H, W), or float32 (N, D). Whole
numbers in a float array may be classes or numbers to predict. `for_loss` decides this by ``--loss``, or refuses.
`check_classes` looks for classes without samples.

Dimensions: N samples, H height, W width, K classes, D numbers of a sample.
"""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distdl.errors import listed

Names = tuple[str, ...] | None
CLASSIFICATION_LOSSES = ("cross_entropy", "binary_cross_entropy")
#: More classes than this are labels that are ids, if few of them have samples.
MANY_CLASSES = 1000
#: More distinct labels than this are ids, if most of them have one sample.
MANY_DISTINCT = 20
#: The most values in a message.
MOST_VALUES = 5
RENUMBER = "numpy.unique(labels, return_inverse=True)[1] numbers the classes 0, 1, …"
AS_NUMBERS = "--loss mean_squared_error to predict the numbers"


class Unfit(ValueError):  # noqa: N818  it describes the data
    """The data does not fit: what it has, what is expected, and the remedy."""

    def __init__(self, given: str, expected: str, remedy: str = "correct the dataset") -> None:
        super().__init__(given, expected, remedy)
        self.given, self.expected, self.remedy = given, expected, remedy

    def __str__(self) -> str:
        return f"{self.given}; expected {self.expected}; {self.remedy}"


def canonical(labels: NDArray[Any], names: Names = None, classes: int = 1) -> tuple[NDArray[Any], Names]:
    """Return the labels as integers (N,) or (N, H, W) or as float32 (N, D), and the names of the classes.

    - (N, 1) becomes (N,), and (N, H, W, 1) becomes (N, H, W).
    - Texts and True/False become classes with these names, in natural order; `names` may give another order.
    - Pixels can only have classes. So whole floats and one-hot vectors (N, H, W, K) become integers.
    - So do whole floats (N,) if the caller knows that there are several `classes`.
    - Other floats and integers (N, D) become float32 (N, D).

    Raises `Unfit`.

    >>> canonical(np.array(["b10", "b9", "b10"]))
    (array([1, 0, 1]), ('b9', 'b10'))
    """
    kind = labels.dtype.kind
    if kind not in "biufUS":
        raise Unfit(f"labels {labels.dtype} {labels.shape}", "integers, floats, texts or True/False")
    if labels.ndim in {2, 4} and labels.shape[-1] == 1:
        labels = labels[..., 0]
    if kind in "US":
        return _numbered(labels, names)
    if labels.ndim == 4 and is_one_hot(labels):
        labels = labels.argmax(axis=-1)
    elif kind == "b" and labels.ndim in {1, 3}:
        labels, names = labels.astype(np.int64), names or ("False", "True")
    elif kind == "f" and (labels.ndim == 3 or (labels.ndim == 1 and classes > 1)) and _fits_int(labels):
        labels = labels.astype(np.int64)
    elif kind == "f" or labels.ndim == 2:
        with np.errstate(over="ignore"):  # the check for finite numbers reports an overflow
            labels = labels.astype(np.float32, copy=False)
        labels = labels[:, np.newaxis] if labels.ndim == 1 else labels
    return labels, names


def _numbered(labels: NDArray[Any], names: Names) -> tuple[NDArray[Any], Names]:
    """Return texts as the numbers of their names."""
    if labels.ndim != 1:
        raise Unfit(f"labels of texts {labels.shape}", "one text for each image, (N,)")
    found, numbers = np.unique(labels, return_inverse=True)
    try:
        texts = [text.decode() if isinstance(text, bytes) else text for text in found.tolist()]
    except UnicodeDecodeError:
        raise Unfit("labels of bytes that are not UTF-8", "texts") from None
    if "" in texts:
        sample = int(np.argmin(labels.astype(bool)))
        raise Unfit(f"an empty label, first in sample {sample}", "a text for each image")
    names = tuple(sorted(texts, key=natural_order)) if names is None else names
    if unknown := [text for text in texts if text not in names]:
        raise Unfit(f"labels {_listed(unknown)}, which class_names does not list", "a name for each class")
    place = np.array([names.index(text) for text in texts], np.int64)
    return place[numbers], names


def natural_order(name: str) -> tuple[tuple[int, str], ...]:
    """Return a key that sorts numbers in names by their value.

    >>> sorted(["b", "10", "2", "a10", "a9"], key=natural_order)
    ['2', '10', 'a9', 'a10', 'b']
    """
    key = []
    for place, piece in enumerate(re.split("([0-9]+)", name)):
        number = piece.lstrip("0")
        key.append((len(number), number) if place % 2 else (0, piece))
    return (*key, (0, name))  # 01 after 1, always


def is_whole(labels: NDArray[Any]) -> bool:
    """Return whether all numbers are finite and whole."""
    with np.errstate(invalid="ignore"):
        return bool(np.isfinite(labels).all() and (labels == np.rint(labels)).all())


def _fits_int(labels: NDArray[Any]) -> bool:
    return is_whole(labels) and bool((np.abs(labels) < 2**53).all())


def is_one_hot(labels: NDArray[Any]) -> bool:
    """Return whether each vector along the last axis has a single 1, and 0 otherwise; K is 2 or more."""
    ones = labels == 1
    return labels.shape[-1] > 1 and bool((ones | (labels == 0)).all() and (ones.sum(axis=-1) == 1).all())


def for_loss(labels: NDArray[Any], loss: str) -> NDArray[Any]:
    """Return canonical float labels (N, D) as the loss needs them: as integers (N,) for a classification.

    Raises `Unfit` if ``auto`` does not decide between classes and numbers, or if an image has several classes.
    """
    if loss == "mean_squared_error" or not is_whole(labels):
        return labels
    one_hot = is_one_hot(labels)
    what = f"one-hot labels of {labels.shape[1]} classes" if one_hot else "whole numbers as labels"
    if loss in CLASSIFICATION_LOSSES:
        if one_hot:
            numbers: NDArray[np.int64] = np.argmax(labels, axis=1)
            return numbers
        if labels.shape[1] == 1 and _fits_int(labels):
            return labels[:, 0].astype(np.int64)
    elif labels.shape[1] == 1 or one_hot:
        expected = "a --loss that says whether they are classes or numbers"
        raise Unfit(what, expected, f"give --loss cross_entropy for classes, or {AS_NUMBERS}")
    what = f"{labels.shape[1]} whole numbers as labels of each image"
    raise Unfit(
        what, "one class for each image (several are not supported)", f"correct the labels, or give {AS_NUMBERS}"
    )


def refuse_numbers(loss: str) -> None:
    """Raise `Unfit` if the loss is for numbers; a label for each image is a class."""
    if loss == "mean_squared_error":
        raise Unfit(
            "labels of classes, which --loss mean_squared_error does not fit",
            "another loss",
            "leave --loss out, or save labels.astype(numpy.float32) to predict the numbers",
        )


def _present(labels: NDArray[Any], classes: int) -> NDArray[Any]:
    """Return the classes that have samples, ascending."""
    if classes > labels.size + MANY_CLASSES:  # a count of each class would need much memory
        return np.unique(labels)
    return np.flatnonzero(np.bincount(labels.reshape(-1), minlength=classes))


def _are_ids(found: NDArray[Any], classes: int, names: Names) -> bool:
    return names is None and classes > MANY_CLASSES and classes > 10 * found.size


def check_classes(labels: NDArray[Any], classes: int, names: Names) -> None:
    """Raise `Unfit` for a single class, or labels that are ids instead of classes."""
    found = _present(labels, classes)
    if found.size == 1:
        only = int(found[0]) if names is None else names[found[0]]
        raise Unfit(f"the single class {only!r}", "samples of two classes or more")
    shown = _listed(found.tolist())
    renumber = "numpy.unique(labels, return_inverse=True)[1]"
    predict = f"save labels.astype(numpy.float32) and give {AS_NUMBERS}"
    if labels.ndim == 1 and found.size > MANY_DISTINCT and 2 * found.size > len(labels):
        given = f"{found.size} different labels ({shown}) for {len(labels)} samples"
        raise Unfit(given, "several samples of each class", f"correct the labels, or {predict}")
    if _are_ids(found, classes, names):
        raise Unfit(
            f"labels that give {classes} classes, of which {found.size} have samples ({shown})",
            f"labels 0 to {found.size - 1} for {found.size} classes",
            f"save {renumber}, or {predict}",
        )


def missing_classes(labels: NDArray[Any], classes: int, names: Names) -> list[str]:
    """Return a warning about classes without samples, if there are any and `check_classes` accepts the labels."""
    found = _present(labels, classes)
    if found.size in {1, classes} or _are_ids(found, classes, names):
        return []
    missing, shown = np.setdiff1d(np.arange(classes), found), _listed(found.tolist())
    none = f"class {missing[0]} has no sample" if missing.size == 1 else f"{missing.size} classes have no sample"
    if names is not None:
        return [f"{none} ({_listed([names[i] for i in missing])})"]
    text = f"labels are {shown}, which gives {classes} classes: {none}"
    if found.tolist() == [0, 255]:
        return [f"{text}; labels // 255 gives the classes 0 and 1"]
    if classes == 256 and found.tolist() == [*range(found.size - 1), 255]:
        pixels = "255 is a class here, because no label means 'ignore'; " if labels.ndim > 1 else ""
        return [f"{text}; {pixels}255 may be the -1 of unsigned numbers (uint8); {RENUMBER}"]
    if found.tolist() == list(range(1, classes)):
        return [f"{text}; labels - 1 starts at 0"]
    return [f"{text}; {RENUMBER}"]


def similar_names(names: Sequence[str]) -> list[str]:
    """Return a warning about names that differ only in spaces or capitals.

    >>> similar_names(["cat", "dog", "Cat "])
    ["the classes 'cat' and 'Cat ' differ only in spaces or capitals"]
    """
    seen: dict[str, str] = {}
    pairs = [(seen.setdefault(" ".join(name.split()).casefold(), name), name) for name in names]
    return [
        f"the classes {one!r} and {name!r} differ only in spaces or capitals" for one, name in pairs if one != name
    ][:1]


def about_numbers(labels: NDArray[Any]) -> list[str]:
    """Return a warning if numbers to predict (N, D) may be the probabilities of classes."""
    if labels.shape[1] < 2 or is_whole(labels) or labels.min() < 0 or np.abs(labels.sum(axis=1) - 1).max() > 1e-3:
        return []
    return ["the numbers of each image sum to 1 and are learned as numbers; for classes save labels.argmax(axis=1)"]


def classes_missing_in(
    parts: dict[str, NDArray[np.int64]], labels: NDArray[Any], classes: int, names: Names
) -> list[str]:
    """Return a warning for each part that lacks a class which has samples; `parts` has the rows of each part."""
    counts = {part: np.bincount(labels[rows], minlength=classes) for part, rows in parts.items()}
    present = sum(counts.values()) > 0
    warnings = []
    for part, of_part in counts.items():
        missing = np.flatnonzero(present & (of_part == 0)).tolist()
        if missing:
            listed = _listed([i if names is None else names[i] for i in missing])
            what = "class has" if len(missing) == 1 else "classes have"
            warnings.append(f"{len(missing)} {what} no {part} sample ({listed}): give more samples of each class")
    return warnings


def _listed(values: Sequence[object]) -> str:
    """Return different values, numbers in ascending order, as a text, shortened if there are many.

    >>> _listed([0, 7]), _listed([*range(1, 11)]), _listed(["a", "b", "c", "d", "e", "f", "g"])
    ('0, 7', '1 to 10', 'a, b, c, d, e and 2 more')
    """
    numbers = [value for value in values if isinstance(value, int)]
    if len(numbers) == len(values) > 2 and numbers[-1] - numbers[0] == len(numbers) - 1:
        return f"{numbers[0]} to {numbers[-1]}"
    return listed(list(map(str, values)), MOST_VALUES)
