"""A dataset: images with their targets, and its prepared form, the object that every rank has.

A source makes a `Dataset`. `PreparedDataset.prepare` splits it and measures its pixels, on rank 0. `to_arrays` and
`from_arrays` carry it through memory that the ranks of a host share. `sha256` identifies it in checkpoints.

Dimensions: N samples, H height, W width, C channels, D numbers of a sample.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distdl.arrays import sha256_of_arrays
from distdl.data.image_shapes import canonical_images
from distdl.data.labels import (
    RENUMBER,
    Unfit,
    about_numbers,
    canonical,
    check_classes,
    classes_missing_in,
    for_loss,
    missing_classes,
    refuse_numbers,
    similar_names,
)
from distdl.data.normalization import Normalization, constant_channels, measure
from distdl.data.signature import Signature, Task, default_loss
from distdl.data.split import DEFAULT_SHARE, Rows, Shares, Split, split
from distdl.errors import UserError
from distdl.rng import Key

MOST_CLASSES = 2**31 - 1
#: All names of classes together, as JSON within JSON: a checkpoint stores them so in its header.
MOST_NAME_BYTES = 2**19


class _Labelled:
    """The task that the labels define."""

    labels: NDArray[Any]

    @property
    def targets_per_sample(self) -> int:
        """The number of labels of a sample: 1, or one for each pixel; 0 if the targets are numbers (regression)."""
        return 0 if self.labels.dtype.kind == "f" else math.prod(self.labels.shape[1:])

    @property
    def task(self) -> Task:
        """The task of a network that learns such targets."""
        if self.labels.dtype.kind == "f":
            return "regression"
        return "classification" if self.labels.ndim == 1 else "segmentation"

    @property
    def default_loss(self) -> str:
        """The name of the loss for such targets."""
        return default_loss(self.task)

    def loss_named(self, name: str) -> str:
        """Return the name of the loss that ``--loss name`` selects."""
        return self.default_loss if name == "auto" else name


@dataclass(frozen=True, eq=False)
class Dataset(_Labelled):
    """Images with their targets. The labels define the task: a label for each image (classification), a label for each
    pixel (segmentation), or numbers for each image (regression).
    """

    name: str
    images: NDArray[Any]
    """(N, H, W, C), uint8 or float32. `checked` converts other floats."""
    labels: NDArray[Any]
    """Integers in 0 .. classes-1, (N,) or (N, H, W); or float32 (N, D). `checked` converts other forms to these."""
    classes: int
    """The number of classes; D for regression."""
    test_start: int | None
    """The first row of the dataset's own test part; None: it has no test part."""
    class_names: tuple[str, ...] | None = None
    """The user's names of the classes, in the order of the labels; for regression, of the numbers. None: no names."""
    notes: tuple[str, ...] = ()
    """Warnings about the data for the user; a run prints them."""
    validation_start: int | None = None
    """The first row of the dataset's own validation part, which lies before the test part; None: it has none."""
    resize: str | None = None
    """How image files of any size became these images, as `--resize` says; None: they had this size."""
    skipped_files: tuple[str, ...] = ()
    """Files that `--skip-damaged` left out, each with the reason."""

    def sha256(self) -> str:
        """Return the hash of images and labels."""
        return sha256_of_arrays([("images", self.images), ("labels", self.labels)])

    @classmethod
    def from_labels(
        cls,
        name: str,
        images: NDArray[Any],
        labels: NDArray[Any],
        *,
        test_start: int | None = None,
        validation_start: int | None = None,
        class_names: tuple[str, ...] | None = None,
        notes: tuple[str, ...] = (),
    ) -> Dataset:
        """Return a checked dataset; its labels or their names determine the number of classes. Raises `UserError`."""
        known = len(class_names) if isinstance(class_names, tuple | list) else 1
        given = cls(name, images, labels, known, test_start, class_names, notes, validation_start)._canonical()
        names, labels = given.class_names, given.labels
        if labels.dtype.kind == "f":
            classes = labels.shape[-1]
        else:
            classes = int(labels.max(initial=0)) + 1 if names is None else len(names)
        return replace(given, classes=classes).checked()._noting_missing_classes()

    def for_loss(self, loss: str) -> Dataset:
        """Return a checked dataset with the labels that ``--loss loss`` needs.

        Raises `UserError` if the labels may be classes or numbers and the loss does not decide.
        """
        if self.labels.dtype.kind != "f":
            return self
        with self._naming_it():
            labels = for_loss(self.labels, loss)
        if labels.dtype.kind == "f":
            return self
        given = replace(self, labels=labels, classes=int(labels.max()) + 1 if self.classes == 1 else self.classes)
        return replace(given, labels=given._checked_labels())._noting_missing_classes()

    def for_training(self, loss: str) -> Dataset:
        """Return `for_loss`, with warnings about its classes; raise `UserError` if there are not two classes."""
        dataset = self.for_loss(loss)
        if dataset.task == "regression":
            return replace(dataset, notes=(*dataset.notes, *about_numbers(dataset.labels)))
        with self._naming_it():
            if dataset.task == "classification":
                refuse_numbers(loss)
            check_classes(dataset.labels, dataset.classes, dataset.class_names)
        return replace(dataset, notes=(*dataset.notes, *similar_names(dataset.class_names or ())))

    def _noting_missing_classes(self) -> Dataset:
        """Return the dataset with a warning about classes without samples, if its labels determine the classes."""
        if self.task == "regression":
            return self
        return replace(self, notes=(*self.notes, *missing_classes(self.labels, self.classes, self.class_names)))

    def earlier_forms(self) -> Iterator[tuple[Dataset, bool]]:
        """Yield this dataset as earlier versions used it, if that differs, with the argument `stratified` of `split`.

        - They drew the validation part beside an own test part without regard to the classes.
        - They numbered the classes of a folder in plain order of their names: 10 before 2.
        """
        if self.validation_start is not None:  # no earlier version had such a part
            return
        is_stratified = self.labels.ndim > 1 or self.test_start is None
        if not is_stratified:
            yield self, False
        names = self.class_names
        if names is not None and self.name.startswith("folder:") and tuple(sorted(names)) != names:
            yield self._in_plain_order(names), is_stratified

    def _in_plain_order(self, names: tuple[str, ...]) -> Dataset:
        """Return the dataset of a folder with its classes, and the rows of each part, in plain order of the names."""
        ordered = sorted(names)
        labels = np.array([ordered.index(name) for name in names], np.int64)[self.labels]
        is_test = np.arange(len(labels)) >= (len(labels) if self.test_start is None else self.test_start)
        rows = np.lexsort((labels, is_test))  # equal labels keep their order
        return replace(self, images=self.images[rows], labels=labels[rows], class_names=tuple(ordered))

    def _canonical(self) -> Dataset:
        """Return the dataset with images and labels in the form of training, if that needs no choice."""
        for kind, array in (("images", self.images), ("labels", self.labels)):
            if not isinstance(array, np.ndarray):
                raise self._wrong(f"{kind} of type {type(array).__name__}", f"a NumPy array: numpy.array({kind})")
            if isinstance(array, np.ma.MaskedArray):  # the masked values would be used like any other
                raise self._wrong(f"{kind} with a mask", f"a plain array: {kind}.filled(VALUE)")
        names = self._names()
        with self._naming_it():
            images, notes = canonical_images(self.images, len(self.labels) if self.labels.ndim else 0)
            labels, names = canonical(self.labels, names, self.classes)
        return replace(self, images=images, labels=labels, class_names=names, notes=(*self.notes, *notes))

    def checked(self) -> Dataset:
        """Return the dataset in the form that training needs (integer labels as int64). Check one from a script.

        Raises `UserError` if a field differs from its description above, and no conversion is obvious.
        """
        return self._canonical()._checked()

    def _checked(self) -> Dataset:
        images, labels, classes = self.images, self.labels, self.classes
        count = len(images)
        if images.dtype == np.float32 and not np.isfinite(images).all():
            sample = int(np.argmin(np.isfinite(images).all(axis=(1, 2, 3))))
            raise self._wrong(f"NaN or infinity in images, first in sample {sample}", "finite pixels")
        if not isinstance(classes, int | np.integer) or not 1 <= classes <= MOST_CLASSES:
            raise self._wrong(f"classes {classes!r}", f"an int up to {MOST_CLASSES}, the greatest label + 1")
        labels = self._checked_numbers() if labels.dtype == np.float32 and labels.ndim == 2 else self._checked_labels()
        test_start = self._checked_start("test", count)
        validation_start = self._checked_start("validation", count if test_start is None else test_start)
        self._check_names()
        return replace(
            self, labels=labels, classes=int(classes), test_start=test_start, validation_start=validation_start
        )

    def _checked_start(self, part: str, end: int) -> int | None:
        start = getattr(self, f"{part}_start")
        if start is None:
            return None
        if not isinstance(start, int | np.integer) or isinstance(start, bool) or not 0 < start < end:
            expected = f"None, or the first row of the {part} part, 1 to {end - 1}"
            raise self._wrong(f"{part}_start {start!r}", expected)
        return int(start)

    def _checked_labels(self) -> NDArray[np.int64]:
        labels, classes = self.labels, self.classes
        count, height, width, _ = self.images.shape
        if labels.shape not in {(count,), (count, height, width)} or labels.dtype.kind not in "iu":
            raise self._wrong(
                f"labels {labels.dtype} {labels.shape}",
                f"{count} integers, one for each image; or {(count, height, width)}, one for each pixel; or float32 "
                f"({count}, D), numbers for each image",
            )
        if not 0 <= labels.min() <= labels.max() < classes:
            expected = f"0 to {classes - 1} for {classes} classes: {RENUMBER}"
            raise self._wrong(f"labels {labels.min()} to {labels.max()}", expected)
        return labels.astype(np.int64)

    def _checked_numbers(self) -> NDArray[np.float32]:
        labels, expected = self.labels, (len(self.images), self.classes)
        if labels.shape != expected:
            raise self._wrong(
                f"labels float32 {labels.shape}",
                f"{expected}, as many numbers for each image as `classes` says; or integers, a label for each image",
            )
        if not np.isfinite(labels).all():
            sample = int(np.argmin(np.isfinite(labels).all(axis=1)))
            raise self._wrong(f"NaN or infinity in labels, first in sample {sample}", "finite numbers")
        return labels

    def _names(self) -> tuple[str, ...] | None:
        """Return the names of the classes as a tuple; raise `UserError` for anything but texts in an order."""
        names, expected = self.class_names, "a tuple of texts, in the order of the classes"
        if names is None:
            return None
        if not isinstance(names, tuple | list):
            raise self._wrong(f"class_names of type {type(names).__name__}", expected)
        if other := [name for name in names if not isinstance(name, str)]:
            raise self._wrong(f"class_names with {other[0]!r}", expected)
        return tuple(map(str, names))

    def _check_names(self) -> None:
        names = self.class_names
        if names is None:
            return
        [(common, times)] = Counter(names).most_common(1) or [("", 0)]
        if times > 1:
            raise self._wrong(f"class_names with {common!r} {times} times", "different texts")
        if len(names) != self.classes:
            raise self._wrong(f"{len(names)} class_names", f"{self.classes}, one for each class")
        if len(json.dumps(json.dumps(names))) > MOST_NAME_BYTES:
            raise self._wrong("long class_names", f"at most {MOST_NAME_BYTES} bytes of JSON in all")

    @contextmanager
    def _naming_it(self) -> Iterator[None]:
        try:
            yield
        except Unfit as error:
            raise self._wrong(error.given, error.expected, error.remedy) from None

    def _wrong(self, given: str, expected: str, remedy: str = "correct the dataset") -> UserError:
        return UserError(f"the dataset {self.name!r} has {given}; expected {expected}; {remedy}")


def _note_of_constant(channels: Sequence[int], first: NDArray[Any]) -> str:
    """Return the note about channels that are the same in all training images; `first` is a pixel (C,) of one.

    Raises `UserError` if all channels are.
    """
    if len(channels) == len(first):
        raise UserError(
            f"every pixel of every training image has the value {', '.join(f'{value:g}' for value in first[:8])}: "
            "expected images that differ; look at the files (transparent pixels are laid over white)"
        )
    named = f"channels {', '.join(map(str, channels))}" if len(channels) > 1 else f"channel {channels[0]}"
    return f"{named} (of 0 to {len(first) - 1}) of the images holds one value in all training images: nothing to learn"


@dataclass(frozen=True, eq=False)
class PreparedDataset(_Labelled):
    """A dataset as every rank has it: images and labels (shared by a host's ranks), split and normalization."""

    images: NDArray[Any]
    labels: NDArray[Any]
    parts: Split
    normalization: Normalization
    """Measured on the training part alone."""
    classes: int
    class_names: tuple[str, ...] | None = None
    notes: tuple[str, ...] = ()
    """Warnings about the data for the user."""
    resize: str | None = None
    target_normalization: Normalization | None = None
    """Of the numbers to predict, measured on the training part alone. None: they are not standardized."""
    skipped_files: tuple[str, ...] = ()

    @classmethod
    def prepare(
        cls,
        dataset: Dataset,
        seed: int,
        *,
        shares: Shares = (None, None),
        data_sha256: str | None = None,
        standardize_targets: bool = False,
    ) -> PreparedDataset:
        """Split a dataset (see `split`), and measure the pixels of its training part; raise `UserError`.

        With `standardize_targets` measure the numbers to predict too. `data_sha256` is the hash in a checkpoint. If an
        earlier version prepared this dataset in another way, it is prepared in that way.
        """
        _check_shares(dataset, shares)
        if standardize_targets and dataset.targets_per_sample:
            raise UserError(
                f"--standardize-targets is for numbers, and {dataset.name} has labels of classes: leave the flag out"
            )
        prepared = cls._split(dataset, seed, shares, standardize_targets=standardize_targets)
        if data_sha256 is None or prepared.sha256() == data_sha256:
            return prepared
        forms = (cls._split(form, seed, shares, stratified=flag) for form, flag in dataset.earlier_forms())
        return next((earlier for earlier in forms if earlier.sha256() == data_sha256), prepared)

    @classmethod
    def _split(
        cls, dataset: Dataset, seed: int, shares: Shares, *, stratified: bool = True, standardize_targets: bool = False
    ) -> PreparedDataset:
        parts = split(
            dataset.labels,
            dataset.test_start,
            Key(seed),
            validation_start=dataset.validation_start,
            shares=shares,
            stratified=stratified,
        )
        normalization = measure(dataset.images, parts.training)
        notes = [*dataset.notes]
        if constant := constant_channels(dataset.images, parts.training, normalization):
            notes.append(_note_of_constant(constant, dataset.images[parts.training[0], 0, 0]))
        if dataset.task == "classification":
            notes += classes_missing_in(vars(parts), dataset.labels, dataset.classes, dataset.class_names)
        if dataset.validation_start and not dataset.test_start:
            notes.append(f"there is no test part: {len(parts.test)} of the training samples are the test part")
        return cls(
            dataset.images,
            dataset.labels,
            parts,
            normalization,
            dataset.classes,
            class_names=dataset.class_names,
            notes=tuple(notes),
            resize=dataset.resize,
            target_normalization=measure(dataset.labels, parts.training) if standardize_targets else None,
            skipped_files=dataset.skipped_files,
        )

    @classmethod
    def for_training_only(cls, images: NDArray[Any], labels: NDArray[Any], classes: int) -> PreparedDataset:
        """Return all samples as the training part, as a benchmark needs them; the other parts are empty."""
        parts = Split.training_only(np.arange(len(images), dtype=np.int64))
        return cls(images, labels, parts, measure(images, parts.training), classes)

    def with_training_rows(self, rows: Rows) -> PreparedDataset:
        """Return the dataset with these rows as its training part, repeated rows allowed; the others are empty."""
        return replace(self, parts=Split.training_only(rows))

    def to_arrays(self, prefix: str = "") -> dict[str, NDArray[Any]]:
        """Return the content as named arrays, for `from_arrays`.

        `prefix` begins the names of the arrays that depend on the seed: one dict can hold the splits of several seeds.
        """
        texts = [self.class_names, self.notes, self.resize, self.skipped_files]
        of_the_seed = vars(self.parts) | vars(self.normalization)
        if self.target_normalization is not None:
            of_the_seed |= {f"target_{name}": array for name, array in vars(self.target_normalization).items()}
        return {
            "images": self.images,
            "labels": self.labels,
            "classes": np.array([self.classes]),
            "texts": np.frombuffer(json.dumps(texts).encode(), np.uint8),
            **{f"{prefix}{name}": array for name, array in of_the_seed.items()},
        }

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]], prefix: str = "") -> PreparedDataset:
        """Return the dataset that `to_arrays` has written with this prefix."""
        parts = Split(*(arrays[f"{prefix}{name}"] for name in ("training", "validation", "test")))
        normalization = Normalization(arrays[f"{prefix}mean"], arrays[f"{prefix}deviation"])
        names, notes, resize, skipped = json.loads(arrays["texts"].tobytes())
        target_mean = arrays.get(f"{prefix}target_mean")
        return cls(
            arrays["images"],
            arrays["labels"],
            parts,
            normalization,
            int(arrays["classes"][0]),
            class_names=None if names is None else tuple(names),
            notes=tuple(notes),
            resize=resize,
            target_normalization=None
            if target_mean is None
            else Normalization(target_mean, arrays[f"{prefix}target_deviation"]),
            skipped_files=tuple(skipped),
        )

    def signature(self) -> Signature:
        """Return the signature of a network that is trained on this dataset."""
        height, width, channels = self.images.shape[1:]
        targets = self.target_normalization
        return Signature(
            task=self.task,
            outputs=self.classes,
            names=self.class_names,
            image_shape=(height, width, channels),
            pixels="uint8" if self.images.dtype == np.uint8 else "float32",
            mean=tuple(self.normalization.mean.tolist()),
            deviation=tuple(self.normalization.deviation.tolist()),
            resize=self.resize,
            target_mean=None if targets is None else tuple(targets.mean.tolist()),
            target_deviation=None if targets is None else tuple(targets.deviation.tolist()),
        )

    def targets(self, rows: Rows) -> NDArray[Any]:
        """Return the labels of some rows, as a loss compares them with outputs: numbers are standardized if asked."""
        labels = self.labels[rows]
        return labels if self.target_normalization is None else self.target_normalization.apply(labels)

    def sha256(self) -> str:
        """Return the hash of images, labels and split, the ``data_sha256`` of a checkpoint: 0.1 s for MNIST."""
        return sha256_of_arrays([("images", self.images), ("labels", self.labels), *vars(self.parts).items()])

    def samples(self, rows: Rows) -> dict[str, NDArray[Any]]:
        """Return the images, not normalized, and the labels of some rows."""
        return {"images": self.images[rows], "labels": self.labels[rows]}


def _check_shares(dataset: Dataset, shares: Shares) -> None:
    """Raise `UserError` if the user's share of a part has no effect, or if the shares leave no training part."""
    drawn = 0.0
    for part, share in zip(("validation", "test"), shares, strict=True):
        if getattr(dataset, f"{part}_start") is None:
            drawn += DEFAULT_SHARE if share is None else share
        elif share is not None:
            raise UserError(
                f"--{part}-share {share} has no effect: {dataset.name} has its own {part} part; leave it out"
            )
    if drawn >= 1:
        raise UserError(
            f"--validation-share and --test-share take {drawn:g} of the samples (by default each is {DEFAULT_SHARE}): "
            "expected less than 1, so that some are left for training; give smaller shares"
        )
