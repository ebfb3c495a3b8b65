"""Fit other data to a trained network: its images to the network's inputs, its labels to the network's classes.

N samples, H height, W width, C channels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distdl.config import reads_data_dir, reads_image_files
from distdl.data import Dataset, PreparedDataset
from distdl.data.signature import Signature
from distdl.data.sources.folder import PART_OF
from distdl.data.split import Split
from distdl.engine.console import Console
from distdl.engine.user_code import load_dataset, read_data
from distdl.errors import UserError, listed
from distdl.image_options import ImageOptions
from distdl.inference.load import Trained
from distdl.inference.options import EvaluateOptions, Part
from distdl.parallel import Communicator, on_rank_0, share_arrays

#: Brightness of red, green and blue, in 65536ths (ITU-R 601-2), as Pillow converts to gray.
BRIGHTNESS = (19595, 38470, 7471)


def fitted(images: NDArray[Any], signature: Signature, name: str) -> NDArray[Any]:
    """Return images (N, H, W, C) with the channels that the network takes: gray as three equal colours, or colours as
    gray. Raises `UserError` if their size or kind of numbers is another, or if a pixel is not finite.
    """
    height, width, channels = signature.image_shape
    if images.dtype.kind == "f" and not (is_finite := np.isfinite(images).all(axis=(1, 2, 3))).all():
        raise UserError(f"{name} has NaN or infinity in image {np.argmin(is_finite)}: expected finite pixels; fix them")
    if images.dtype != signature.pixels:
        raise UserError(
            f"{name} has images of {images.dtype}, the network was trained on {signature.pixels}: prepare them as for "
            "the training"
        )
    if images.shape[1:3] != (height, width):
        size = "x".join(map(str, images.shape[1:3]))
        raise UserError(
            f"{name} has images of {size} pixels (height x width), the network takes {height}x{width}: resize them "
            "first"
        )
    found = images.shape[3]
    if found == channels:
        return images
    if (found, channels) == (1, 3):
        return np.repeat(images, 3, axis=3)
    if (found, channels, signature.pixels) == (3, 1, "uint8"):
        weighted = np.tensordot(images.astype(np.int64), BRIGHTNESS, 1)
        return ((weighted + 2**15) >> 16).astype(np.uint8)[..., np.newaxis]
    raise UserError(f"{name} has images of {found} channels, the network takes {channels}: convert them first")


def fitted_labels(data: Dataset, signature: Signature) -> NDArray[Any]:
    """Return the labels of a dataset as the network numbers its classes; raise `UserError` if they do not fit.

    Classes are matched by name. If the dataset or the network has no names, they are matched by number. For regression
    the numbers of a sample are matched likewise, and none may be absent.
    """
    data = data.for_loss("mean_squared_error" if signature.task == "regression" else "cross_entropy")
    if data.task != signature.task:
        raise UserError(
            f"{data.name} is for {data.task}, the network was trained for {signature.task}: give other data"
        )
    what = "numbers" if data.task == "regression" else "classes"
    if data.class_names is not None:
        places = _places(data.class_names, signature, data.name, what)
        if data.task == "regression":
            if data.classes != signature.outputs:
                raise UserError(f"{data.name} has {data.classes} numbers, the network returns {signature.outputs}")
            ordered = np.empty_like(data.labels)
            ordered[:, places] = data.labels
            return ordered
        return np.take(np.array(places, np.int64), data.labels)
    labels: NDArray[Any] = data.labels
    greatest = data.classes if data.task == "regression" else int(data.labels.max()) + 1
    if greatest > signature.outputs or (data.task == "regression" and greatest < signature.outputs):
        raise UserError(
            f"{data.name} has {greatest} {what}, the network returns {signature.outputs}: give data with the "
            f"{what} of the training"
        )
    return labels


def _places(names: tuple[str, ...], signature: Signature, data: str, what: str) -> list[int]:
    """Return the place of each name among the network's outputs."""
    known = {signature.name_of(output): output for output in range(signature.outputs)}
    unknown = [name for name in names if name not in known]
    if unknown:
        shown = listed(list(map(repr, unknown)), most=5)
        expected = ", ".join(list(known)[:20]) + (" …" if len(known) > 20 else "")
        raise UserError(
            f"{data} has {what} that the network does not know: {shown}; expected {expected}; leave them out, or "
            "correct their names"
        )
    return [known[name] for name in names]


def with_other_data(trained: Sequence[Trained], options: EvaluateOptions, communicator: Communicator) -> list[Trained]:
    """Return the networks with the data of `--on` as their test part. Collective. Raises `UserError`.

    `--part` chooses a part that the data itself has; None: all samples. The normalization stays that of the training.
    """
    arrays = on_rank_0(communicator, lambda: _arrays_of(options, trained[0].signature, trained))
    return with_test_part(trained, share_arrays(communicator, arrays or {}))


def with_test_part(trained: Sequence[Trained], shared: Mapping[str, NDArray[Any]]) -> list[Trained]:
    """Return the networks with the fitted `images` and `labels` as their data, and `rows` of them as the test part."""
    rows = shared["rows"]
    return [
        replace(
            one,
            loaded=PreparedDataset(
                shared["images"],
                shared["labels"],
                Split(rows[:0], rows[:0], rows),
                one.signature.normalization,
                one.signature.outputs,
                class_names=one.signature.names,
                target_normalization=one.signature.target_normalization,
            ),
        )
        for one in trained
    ]


def _arrays_of(
    options: EvaluateOptions, signature: Signature, trained: Sequence[Trained] = ()
) -> dict[str, NDArray[Any]]:
    name = options.on
    assert name is not None
    if options.data_dir is not None and not reads_data_dir(name):
        raise UserError(f"--data-dir has no effect with --on {name}: leave it out")
    if options.skip_damaged and not reads_image_files(name):
        raise UserError(f"--skip-damaged has no effect with --on {name}: it is for image files; leave it out")
    if options.csv_columns is not None and not name.startswith("csv:"):
        raise UserError(f"--csv-columns has no effect with --on {name}: give --on csv:FILE, or leave it out")
    image_options = ImageOptions(
        resize=signature.resize,
        skip_damaged=options.skip_damaged,
        csv_columns=options.csv_columns,
        data_gigabytes=options.data_gigabytes,
        channels=signature.channels_of_files,
        least_classes=1,
    )
    data = load_dataset(name, options.data_dir, image_options)
    console, names = Console(live=False), signature.names
    for note in data.notes:
        console.warning(note)
    runs = [str(one.given) for one in trained if _has_training_images(one, data, options)]
    if runs:
        console.warning(
            f"{name} has the training images of {listed(runs, most=5)}, so the scores are not those of new images; "
            "without --on the test part is scored"
        )
    if data.class_names is None and names is not None:
        first = ", ".join(f"{k} is {names[k]}" for k in range(min(3, len(names)))) + (", …" if len(names) > 3 else "")
        console.warning(f"{name} has no names of classes, so its labels are taken as numbers of the network's: {first}")
    return {
        "images": fitted(data.images, signature, name),
        "labels": fitted_labels(data, signature),
        "rows": _rows_of(data, options.part),
    }


def _has_training_images(one: Trained, data: Dataset, options: EvaluateOptions) -> bool:
    """Return whether the samples to score are, or include, the training part of a network.

    The hash finds the same data in any place, the path also a part of it, or data with additions.
    """
    if options.part not in {None, "training"}:
        return False
    assert options.on is not None
    prefix, _, place = options.on.partition(":")
    kind, _, trained_on = one.config.dataset.partition(":")
    if prefix == kind:
        path, training = Path(place).resolve(), Path(trained_on).resolve()
        is_training_part = prefix == "folder" and path.parent == training and PART_OF.get(path.name.lower())
        if path == training or is_training_part == "training":
            return True
    try:
        return read_data(one.config, data, one.data_sha256).sha256() == one.data_sha256
    except UserError:  # it cannot be split as that of the training
        return False


def _rows_of(data: Dataset, part: Part | None) -> NDArray[np.int64]:
    """Return the rows of a part that the data itself has; None: all rows."""
    count = len(data.images)
    test = count if data.test_start is None else data.test_start
    validation = test if data.validation_start is None else data.validation_start
    bounds = {None: (0, count), "training": (0, validation), "validation": (validation, test), "test": (test, count)}
    start, stop = bounds[part]
    if start == stop or (part == "training" and validation == count):
        raise UserError(f"--part {part}: {data.name} has no {part} part of its own; leave the flag out for all samples")
    return np.arange(start, stop, dtype=np.int64)
