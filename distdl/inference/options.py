"""The options of the commands that use trained networks. This module does not import NumPy."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from distdl.config import check_dataset_name, check_kind, check_model_name
from distdl.errors import UserError

Part = Literal["test", "validation", "training"]
#: Other names of the parts.
PARTS = {"train": "training", "val": "validation"}


def part_of(text: str) -> str:
    """Return the part that a text names; raise `UserError`.

    >>> part_of("val"), part_of("test")
    ('validation', 'test')
    """
    part = PARTS.get(text, text)
    check_kind("part", part, Part)
    return part


@dataclass(frozen=True, kw_only=True)
class LoadOptions:
    """The flags for loading trained networks."""

    data_dir: Path | None = None
    """Folder of the dataset's files; by default that of the first run."""
    model: tuple[str, ...] = ()
    """Your own model that a run was trained with; its code is run."""
    dataset: str | None = None
    """Your own dataset that the runs were trained on; its code is run. Or npz:FILE.npz or folder:PATH, if it moved."""
    data_gigabytes: float | None = None
    """Most gigabytes that the images may take in memory; by default as in the training, or a quarter of the memory that
    is available."""


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions(LoadOptions):
    """The flags of `distdl.evaluate`."""

    runs: tuple[Path, ...]
    """Run folder or checkpoint; several form an ensemble."""
    on: str | None = None
    """Other labelled data to score instead, as for --dataset of training: npz:FILE.npz, folder:PATH …; the training
    data is not needed."""
    skip_damaged: bool = False
    """With --on, leave out image files that cannot be used, and list them; otherwise they are refused."""
    csv_columns: str | None = None
    """With --on csv:FILE, columns of the paths and of the labels, such as file,species; by default the usual names."""
    part: Part | None = None
    """Part of the data to score; by default test, and with --on all samples."""
    best: bool = False
    """Of each run, use the checkpoint with the best validation accuracy."""
    half: bool = False
    """Also score with weights and activations stored as float16."""
    confusion: bool = False
    """Print the confusion matrix."""
    confusion_figure: Path | None = None
    """Draw the confusion matrix; needs matplotlib."""
    misclassified: Path | None = None
    """Draw misclassified images; needs matplotlib."""
    json: Path | None = None
    """Write all numbers to this file."""


@dataclass(frozen=True, kw_only=True)
class PredictOptions(LoadOptions):
    """The flags of `distdl.predict`."""

    run: Path
    """Run folder or checkpoint."""
    inputs: tuple[str, ...]
    """Image files, folders of images, npz:FILE.npz with an array of images, or - for file names on standard input."""
    others: tuple[Path, ...] = ()
    """Another run, for an ensemble; may be given several times."""
    best: bool = False
    """Of each run, use the checkpoint with the best validation accuracy."""
    top: int = 3
    """Number of classes to show for each image, the most probable first."""
    csv: Path | None = None
    """Write the predictions to this file as a table."""
    json: Path | None = None
    """Write the predictions to this file."""
    masks: Path | None = None
    """Folder for the class of each pixel, a PNG file for each image; for networks that label pixels."""


@dataclass(frozen=True, kw_only=True)
class ReportOptions(LoadOptions):
    """The flags of `distdl.report`."""

    run: Path
    """Run folder."""
    out: Path | None = None
    """File to write; by default report.html in the run folder."""


def check_names(options: LoadOptions) -> None:
    """Raise `UserError` unless `--model` and `--dataset` can name a model and a dataset."""
    for model in options.model:
        check_model_name(model)
    if options.dataset is not None:
        check_dataset_name(options.dataset)
    if options.data_gigabytes is not None and not 0 < options.data_gigabytes < math.inf:
        raise UserError(f"--data-gigabytes must be above 0, a finite number, not {options.data_gigabytes}")
