"""Figures of a network, a training or an evaluation: functions that return matplotlib figures.

`figure.savefig("name.png")` saves one; no display is needed. Plain NumPy functions compute the numbers to draw.

N samples, H height, W width, C channels, F filters, K classes. Sources: sections 6.2.2, 7.6 and 8.1.
"""

from __future__ import annotations

import importlib.util
import io
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from distdl.engine.pictures import filter_images, first_convolution, row_shares, scaled
from distdl.engine.table import shortened
from distdl.errors import UserError
from distdl.json_files import read_json_lines
from distdl.nn import Sequential
from distdl.nn.network_copies import layer_outputs

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, FigureBase

#: The record of an epoch in ``metrics.jsonl``. Regression has no accuracy.
EPOCH = {
    "epoch": int,
    **dict.fromkeys(("train_loss", "validation_loss"), float | None),
    **dict.fromkeys(("train_accuracy?", "validation_accuracy?"), float | None),
}
INCHES_PER_IMAGE = 0.9
#: The most characters of a class's name in a picture.
LONGEST_NAME = 24
#: A larger confusion matrix has no counts in its cells.
MOST_COUNTS = 20


# ------------------------------------------------------------------------------------------------------------ numbers


def epochs_of(metrics: Path | Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the records of whole epochs, from a ``metrics.jsonl`` or its records; raise `UserError` without any.

    Raises the errors of `read_json_lines`.
    """
    if isinstance(metrics, Path):
        epochs = read_json_lines(metrics, EPOCH, having="validation_loss")
    else:
        epochs = [record for record in metrics if "validation_loss" in record]
    if not epochs:
        raise UserError("the metrics have no whole epoch, so there are no curves to draw: train for one or more")
    return epochs


# ------------------------------------------------------------------------------------------------------------ figures


def filters(networks: Sequential | Mapping[str, Sequential]) -> Figure:
    """Return the filters of the first convolution; those of several networks side by side, each under its title.

    The minimum weight of each filter is black, the maximum white. Source: section 7.6.1.
    """
    by_title = {"": networks} if isinstance(networks, Sequential) else dict(networks)
    shown = {title: filter_images(first_convolution(network)[1]) for title, network in by_title.items()}
    columns = max(_columns(len(images)) for images in shown.values())
    rows = max(-(-len(images) // columns) for images in shown.values())
    figure = _figure(columns * len(shown), rows)
    parts = np.atleast_1d(np.asarray(figure.subfigures(1, len(shown)), dtype=object))
    for part, (title, images) in zip(parts, shown.items(), strict=True):
        if title:
            part.suptitle(title)
        for axes, image in zip(_grid(part, len(images), columns, rows), images, strict=True):
            _draw(axes, image)
    return figure


def feature_maps(network: Sequential, image: NDArray[Any], layer: str | None = None) -> Figure:
    """Return an image (H, W, C), normalized for the network, and the output of a layer for it, one map per channel.

    `layer` is a name such as ``relu_1``; the first convolution by default. Each map is scaled separately. Raises
    `UserError` if the network has no such layer, or its outputs are no images. Source: section 7.6.
    """
    outputs = layer_outputs(network, np.ascontiguousarray(image[np.newaxis], network.dtype))
    name = layer or first_convolution(network)[0].split(".")[0]
    images = {known: output for known, output in outputs.items() if output.ndim == 4}
    if name not in images:
        raise UserError(f"no layer {name!r} has images as outputs: expected one of {', '.join(images) or 'none here'}")
    maps = scaled(images[name].transpose(3, 1, 2, 0))
    figure = _figure(_columns(1 + len(maps)), -(-(1 + len(maps)) // _columns(1 + len(maps))))
    first, *others = _grid(figure, 1 + len(maps))
    _draw(first, image, "input")
    for axes, one in zip(others, maps, strict=True):
        _draw(axes, one)
    figure.suptitle(name)
    return figure


def misclassified(
    images: NDArray[Any],
    labels: NDArray[Any],
    predictions: NDArray[Any],
    names: Sequence[str] | None = None,
    *,
    most: int = 40,
) -> Figure:
    """Return the misclassified ones of the images (N, H, W, C), each with its actual and predicted class.

    `labels` and `predictions` are (N,); `names` are the names of the classes. At most the first `most` are drawn; the
    title counts all. Source: section 8.1.1.
    """
    wrong = np.flatnonzero(np.asarray(labels) != predictions)
    shown = wrong[:most]
    figure = _figure(_columns(len(shown)) * 1.4, -(-max(len(shown), 1) // _columns(len(shown))) * 1.6)
    for axes, sample in zip(_grid(figure, len(shown)), shown.tolist(), strict=True):
        actual, predicted = (
            str(k) if names is None else shortened(names[k], LONGEST_NAME)
            for k in (labels[sample], predictions[sample])
        )
        _draw(axes, images[sample], f"{actual},\npredicted {predicted}")
    first = f", the first {len(shown)}" if len(shown) < len(wrong) else ""
    figure.suptitle(f"{len(wrong)} of {len(labels)} misclassified{first}")
    return figure


def confusion(matrix: NDArray[Any], names: Sequence[str] | None = None) -> Figure:
    """Return a confusion matrix (K, K): a row for each actual class, a column for each predicted class.

    Colours show shares of a row: correct predictions, on the diagonal, in blue; mistakes in red. The darkest red is the
    greatest share of mistakes. Cells have counts.
    """
    classes = len(matrix)
    shares = row_shares(matrix)
    is_correct = np.eye(classes, dtype=bool)
    figure = _figure(max(classes * 0.6, 4), max(classes * 0.6, 4))
    axes = figure.subplots()
    most = {"Blues": 1.0, "Reds": float(np.where(is_correct, 0, shares).max()) or 1.0}
    for colours, hidden in (("Blues", ~is_correct), ("Reds", is_correct)):
        axes.imshow(np.ma.masked_array(shares, hidden), cmap=colours, vmin=0, vmax=most[colours])
    if classes <= MOST_COUNTS:
        for row, column in np.ndindex(classes, classes):
            dark = 2 * shares[row, column] > most["Blues" if row == column else "Reds"]
            colour = "white" if dark else "black"
            axes.text(column, row, str(matrix[row, column]), ha="center", va="center", color=colour, fontsize=8)
    ticks = range(classes) if classes <= MOST_COUNTS or names is not None else None
    if ticks is not None:
        labels = [str(k) if names is None else shortened(names[k], LONGEST_NAME) for k in ticks]
        axes.set_xticks(ticks, labels, rotation=0 if names is None else 90, parse_math=False)
        axes.set_yticks(ticks, labels, parse_math=False)
    axes.set_xlabel("predicted class")
    axes.set_ylabel("actual class")
    axes.set_title(f"{int(np.trace(matrix))} of {int(np.sum(matrix))} correct")
    return figure


def activation_histograms(
    of_networks: Mapping[str, Mapping[str, NDArray[Any]]], *, bins: int = 30, limits: tuple[float, float] | None = None
) -> Figure:
    """Return histograms of the outputs of layers (see `layer_outputs`): a row for each network, under its title.

    `limits` are the limits of all histograms. Source: section 6.2.2.
    """
    columns = max(map(len, of_networks.values()), default=0)
    figure = _figure(2.6 * max(columns, 1), 1.9 * max(len(of_networks), 1), inches=1)
    every = _subplots(figure, max(len(of_networks), 1), columns)
    for row, (title, of_layers) in enumerate(of_networks.items()):
        for axes, (name, outputs) in zip(every[row * columns :], of_layers.items(), strict=False):
            _histogram(axes, outputs, f"{title}: {name}" if title else name, bins=bins, limits=limits)
    _set_apart(figure)
    return figure


def curves(metrics: Path | Iterable[Mapping[str, Any]]) -> Figure:
    """Return loss and accuracy of training and validation over the epochs, from ``metrics.jsonl`` or its records.

    Regression has no accuracy.
    """
    epochs = epochs_of(metrics)
    shown = [name for name in ("loss", "accuracy") if f"train_{name}" in epochs[0]]
    figure = _figure(4.5 * len(shown), 3.6, inches=1)
    for axes, name in zip(_subplots(figure, 1, len(shown)), shown, strict=True):
        for part in ("train", "validation"):
            values = np.array([record.get(f"{part}_{name}") for record in epochs], np.float64)
            axes.plot([record["epoch"] for record in epochs], values, label=part)
        axes.set_xlabel("epoch")
        axes.set_title(name)
        axes.legend()
    return figure


def micro_batch(
    images: NDArray[Any],
    losses: NDArray[Any],
    activations: Mapping[str, NDArray[Any]],
    gradients: Mapping[str, NDArray[Any]],
    *,
    columns: int = 8,
    most_rows: int = 3,
) -> Figure:
    """Return the inside of a step: samples (N, H, W, C) with their losses (N,), activations, and gradients by name.

    The samples are those with the greatest loss. Activations and gradients are histograms; but if there is only one
    layer, and its activations are images, they are drawn for the first of these samples, one map per channel. Of more
    than `most_rows` rows of either, some are drawn, from the first to the last.
    """
    shown = np.argsort(-losses, kind="stable")[:columns].tolist()
    maps: Mapping[str, NDArray[Any]] = {}
    if len(activations) == 1 and (only := next(iter(activations.values()))).ndim == 4:
        maps = {f"channel {k}": only[shown[0], :, :, k : k + 1] for k in range(only.shape[3])}
    groups = [
        {f"sample {sample}\nloss {losses[sample]:.3g}": images[sample] for sample in shown},
        _spread(maps or activations, columns * most_rows),
        _spread({f"d {name}": gradient for name, gradient in gradients.items()}, columns * most_rows),
    ]
    places = [(row, column) for row in range(2 * most_rows + 1) for column in range(columns)]
    rows = [-(-len(group) // columns) for group in groups]
    figure = _figure(1.5 * columns, 1.5 * sum(rows), inches=1)
    grid = figure.add_gridspec(sum(rows), columns)
    for number, group in enumerate(groups):
        for (title, numbers), (row, column) in zip(group.items(), places, strict=False):
            axes = figure.add_subplot(grid[sum(rows[:number]) + row, column])
            if number == 0 or (number == 1 and maps):
                axes.set_axis_off()
                _draw(axes, numbers, title)
            else:
                _histogram(axes, numbers[np.isfinite(numbers)], title, bins=30, limits=None)
    _set_apart(figure)
    return figure


def _spread(arrays: Mapping[str, NDArray[Any]], most: int) -> dict[str, NDArray[Any]]:
    """Return at most so many of the arrays, evenly spread, with the first and the last."""
    names = list(arrays)
    if len(names) > most:
        names = [names[place] for place in np.linspace(0, len(names) - 1, most).round().astype(int).tolist()]
    return {name: arrays[name] for name in names}


# --------------------------------------------------------------------------------------------------------- matplotlib


#: A message of a program that continues without a figure.
NEEDS_MATPLOTLIB = "drawing it needs matplotlib (pip install 'distdl-mpi[plots]')"


def has_matplotlib() -> bool:
    """Return whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def need_matplotlib() -> None:
    """Raise `UserError` if matplotlib is not installed."""
    if not has_matplotlib():
        raise UserError("drawing needs matplotlib, which is not installed: pip install 'distdl-mpi[plots]'")


def content_of(figure: Figure, kind: str, *, dpi: float | str = "figure") -> bytes:
    """Return a figure as the content of a file: ``png``, ``svg`` or ``pdf``.

    In SVG text stays text, and equal figures give equal bytes.
    """
    import matplotlib as mpl  # noqa: PLC0415  half a second, and not installed everywhere

    content = io.BytesIO()
    with mpl.rc_context({"svg.hashsalt": "distdl", "svg.fonttype": "none"}):
        figure.savefig(content, format=kind, dpi=dpi, metadata={"Date": None} if kind == "svg" else None)
    return content.getvalue()


def _figure(columns: float, rows: float, *, inches: float = INCHES_PER_IMAGE) -> Figure:
    """Return an empty figure with room for `columns` times `rows` images."""
    need_matplotlib()
    from matplotlib.figure import Figure  # noqa: PLC0415  half a second, and not installed everywhere

    return Figure(figsize=(max(columns * inches, 2.5), max(rows * inches, 1.5) + 0.5), layout="constrained")


def _histogram(axes: Axes, numbers: NDArray[Any], title: str, *, bins: int, limits: tuple[float, float] | None) -> None:
    counts, edges = np.histogram(numbers, bins=bins, range=limits)
    axes.bar(edges[:-1], counts, width=np.diff(edges), align="edge")
    axes.set_title(title, fontsize=8)
    axes.set_yticks([])
    axes.locator_params(axis="x", nbins=4)
    axes.tick_params(labelsize=7)
    axes.xaxis.get_offset_text().set_fontsize(7)


def _set_apart(figure: Figure) -> None:
    """Leave some space between the axes, so that their labels do not touch."""
    layout: Any = figure.get_layout_engine()
    layout.set(w_pad=0.08, h_pad=0.08)


def _columns(count: int) -> int:
    """Return the number of columns of a grid that is about square."""
    return max(math.ceil(math.sqrt(count)), 1)


def _subplots(figure: FigureBase, rows: int, columns: int) -> list[Axes]:
    """Return the axes of a grid, row by row."""
    return list(np.asarray(figure.subplots(rows, max(columns, 1), squeeze=False), dtype=object).ravel())


def _grid(figure: FigureBase, count: int, columns: int | None = None, rows: int | None = None) -> Iterator[Axes]:
    """Yield axes without ticks for `count` images; the other axes of the grid are blank."""
    columns = columns or _columns(count)
    axes = _subplots(figure, rows or -(-max(count, 1) // columns), columns)
    for one in axes:
        one.set_axis_off()
    yield from axes[:count]


def _draw(axes: Axes, image: NDArray[Any], title: str = "") -> None:
    """Draw an image (H, W, C) with its minimum in black and its maximum in white.

    Three channels are colours, unscaled if they are uint8. Of other numbers of channels the mean is drawn.
    """
    colours = image.shape[-1] == 3
    shown = image if colours else image.mean(axis=-1, keepdims=True)
    if not (colours and image.dtype == np.uint8):
        shown = scaled(shown[np.newaxis])[0]
    axes.imshow(shown if colours else shown[..., 0], cmap="gray", vmin=0, vmax=1)
    if title:
        axes.set_title(title, fontsize=8, parse_math=False)
