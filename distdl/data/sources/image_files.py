"""Many image files become one array. All files that cannot be used are named at once.

Each file is opened once. The images are gray until the first that has colors; then the gray ones get three equal
channels.

Dimensions: N files, H height, W width, C channels.
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distdl.data.dataset import Dataset
from distdl.data.room import Room, on_disk
from distdl.data.sources import images
from distdl.data.sources.image_cache import Decoded, Make, Pixels, read_cached
from distdl.data.sources.images import OtherSizeError, UnusableImageError
from distdl.errors import UserError, listed, quoted
from distdl.image_options import ImageOptions, Resize
from distdl.mapped_files import release_pages

#: The most names in a message.
MOST_NAMES = 10
#: The longest side of the size that a message suggests, and the number that both sides are multiples of.
SUGGESTED_PIXELS, SUGGESTED_STEP = 128, 8

#: A dataset is dark if no pixel of about this many images reaches this value: 12 bits in 16 give 15.
IMAGES_LOOKED_AT, DARK = 256, 16
#: Images with a longer side make a training on CPUs slow.
LARGE = 256
#: The pages of a mapped file are released after this many images.
IMAGES_MAPPED = 256


@dataclass(eq=False)
class ListedFiles:
    """The files of a dataset with their labels, in the order of the parts: training, validation, test."""

    name: str
    source: str
    """The name of the dataset in messages."""
    class_names: tuple[str, ...]
    is_regression: bool = False
    notes: list[str] = field(default_factory=list)
    unusable: dict[Path, UnusableImageError] = field(default_factory=dict)
    """Files that are already known to be no images."""
    files: list[Path] = field(default_factory=list)
    labels: list[Any] = field(default_factory=list)
    starts: dict[str, int] = field(default_factory=dict)

    def add(self, part: str, files: Sequence[Path], label: Any) -> None:
        """Add files with one label, the number of a class or a list of numbers."""
        self.starts.setdefault(part, len(self.files))
        self.files += files
        self.labels += [label] * len(files)

    def read(self, options: ImageOptions) -> Dataset:
        """Return the dataset; raise `UserError` or `DamagedFileError` as `read_image_files` does."""
        count = len(self.files) + len(self.unusable)
        found, rows, skipped = read_image_files(self.source, self.files, options, self.unusable)
        labels = np.array(self.labels, np.float32 if self.is_regression else np.int64)[rows]
        starts = {part: int(np.searchsorted(rows, start)) for part, start in self.starts.items()}
        if skipped:
            self.notes.append(f"--skip-damaged left out {len(skipped)} of {count} files: {_list(skipped)}")
        if not self.is_regression:
            self._check_classes(labels, starts)
        if options.resize is None and max(found.shape[1:3]) > LARGE:
            height, width = found.shape[1:3]
            self.notes.append(
                f"the images of {self.source} have {height}x{width} pixels, so the training is slow: --resize "
                f"{_suggested([(height, width)])}, for example, makes them smaller"
            )
        brightest = int(found[:: max(1, len(found) // IMAGES_LOOKED_AT)].max())
        if brightest < DARK:
            self.notes.append(
                f"the pixels of {self.source} are very dark, at most {brightest} of 255: if the files have 16 bits a "
                "channel but use fewer, scale them up first"
            )
        return Dataset(
            self.name,
            found,
            labels,
            len(self.class_names),
            starts.get("test"),
            self.class_names,
            tuple(self.notes),
            starts.get("validation"),
            None if options.resize is None else str(Resize.parse(options.resize)),
            tuple(skipped),
        ).checked()

    def _check_classes(self, labels: NDArray[Any], starts: Mapping[str, int]) -> None:
        """Raise `UserError` if a class has no image for training, or if a part has lost all its images."""
        ends = [*list(starts.values())[1:], len(labels)]
        for (part, start), end in zip(starts.items(), ends, strict=True):
            missing = sorted(set(range(len(self.class_names))) - set(labels[start:end].tolist()))
            if missing and (part == "training" or start == end):
                names = _list([repr(self.class_names[label]) for label in missing])
                raise UserError(f"{self.source} has no image for the {part} part of {names} that can be used; add some")


def read_image_files(
    source: str, files: Sequence[Path], options: ImageOptions, unusable: Mapping[Path, UnusableImageError]
) -> Decoded:
    """Return the images (n, H, W, C), the numbers (n,) of their files, and the other files, each with the reason.

    `source` names the dataset in messages; `unusable` are further files. Raises `UserError` if images differ in size
    and there is no `options.resize`, if memory does not suffice, or, unless `options.skip_damaged` is set, if a file
    cannot be used; `DamagedFileError` if a file is damaged.
    """
    with images.strict_warnings():
        if options.cache is None:
            return _decode_all(source, files, options, unusable)
        colored = {row for row, file in enumerate(files) if options.channels is None and images.has_colors(file)}

        def decode(make: Make) -> Decoded:
            decoded = _decode_all(source, files, options, unusable, make, colored=bool(colored))
            if colored and colored.isdisjoint(decoded[1].tolist()):
                raise _NoColorsError
            return decoded

        try:
            return read_cached(options.cache, files, [*unusable], options, decode)
        except _NoColorsError:
            colored.clear()
            return read_cached(options.cache, files, [*unusable], options, decode)


class _NoColorsError(Exception):
    """All files with colors are damaged, so the images are gray."""


def _decode_all(
    source: str,
    files: Sequence[Path],
    options: ImageOptions,
    unusable: Mapping[Path, UnusableImageError],
    make: Make | None = None,
    *,
    colored: bool = False,
) -> Decoded:
    """Decode all images into an array from `make`, by default in memory; if `colored`, with three channels."""
    resize = None if options.resize is None else Resize.parse(options.resize)
    unusable = dict(unusable)
    rows: list[int] = []
    found: Pixels | None = None
    try:
        for row, file in enumerate(files):
            size = None if found is None else (found.shape[1], found.shape[2])
            channels = 3 if colored or (found is not None and found.shape[3] == 3) else options.channels
            try:
                pixels = images.decode(file, size=size, resize=resize, channels=channels)
            except OtherSizeError:
                raise _mixed_sizes(source, files, file) from None
            except UnusableImageError as error:
                unusable[file] = error
                continue
            if found is None:
                found = make(len(files), pixels.shape) if make else _empty(source, files, pixels, options)
            elif pixels.shape[2] > found.shape[3]:
                found = _with_colors(source, files, found, len(rows), pixels, options)
            found[len(rows)] = pixels
            rows.append(row)
            if row % IMAGES_MAPPED == 0:
                release_pages(found)
    except MemoryError:
        raise UserError(f"there is not enough memory for {source}: give --resize, or --cache FOLDER") from None
    if unusable and not options.skip_damaged:
        raise _refusal(source, unusable, len(set(files) | set(unusable)))
    if found is None:
        raise UserError(f"{source} has no image that can be used")
    skipped = [f"{quoted(file)} ({reason})" for file, reason in unusable.items()]
    return found[: len(rows)], np.array(rows, np.int64), skipped


def _list(texts: Sequence[str]) -> str:
    return listed(texts, MOST_NAMES, "; ")


def _refusal(source: str, unusable: dict[Path, UnusableImageError], count: int) -> UserError:
    """Return the error that names the files."""
    if len(unusable) == 1:
        [(file, reason)] = unusable.items()
        error = reason.of(quoted(file))
        remedy = ", or leave it out" if reason.is_damaged else "; replace it, or leave it out"
        return type(error)(f"{error}{remedy} by --skip-damaged")
    names = _list([f"{quoted(file)} ({error})" for file, error in unusable.items()])
    worst = max(unusable.values(), key=lambda error: error.is_damaged)
    return type(worst.of(""))(
        f"{len(unusable)} of {count} files in {source} cannot be used: {names}; replace or remove them, or leave them "
        "out by --skip-damaged"
    )


def _mixed_sizes(source: str, files: Sequence[Path], other: Path) -> UserError:
    """Return the error for images of different sizes, with the usual size as a suggestion."""
    sizes: dict[tuple[int, int], Path] = {}
    every: list[tuple[int, int]] = []
    for file in files:
        try:
            size = images.size_of(file)
        except UnusableImageError:
            continue
        every.append(size)
        sizes.setdefault(size, file)
    (first, of_first), *_ = sizes.items()
    second, of_second = next(((size, file) for size, file in sizes.items() if size != first), (first, other))
    return UserError(
        f"{source} has images of different sizes (height x width): {quoted(of_first)} has {first[0]}x{first[1]}, "
        f"{quoted(of_second)} has {second[0]}x{second[1]}, {_of(len(sizes))} in all: expected one size; give "
        f"--resize {_suggested(every)}"
    )


def _of(sizes: int) -> str:
    return "one size and turned images" if sizes == 1 else f"{sizes} sizes"


def _suggested(sizes: Sequence[tuple[int, int]]) -> str:
    """Return a size with the usual ratio of the sides, in which a training on a CPU is still feasible.

    >>> _suggested([(1500, 1000), (3000, 2000), (10, 10)]), _suggested([(16, 16), (17, 16)])
    ('128x88', '16x16')
    """
    height, width = (statistics.median_low(sides) for sides in zip(*sizes, strict=True))
    shrink = min(1, SUGGESTED_PIXELS / max(height, width))
    rounded = [max(1, round(side * shrink / SUGGESTED_STEP)) * SUGGESTED_STEP for side in (height, width)]
    return f"{rounded[0]}x{rounded[1]}"


def _empty(source: str, files: Sequence[Path], pixels: Pixels, options: ImageOptions) -> Pixels:
    """Return an array for as many images such as `pixels`; raise `UserError` if memory does not suffice."""
    height, width, channels = pixels.shape
    smaller = "a smaller --resize" if options.resize else f"--resize {_suggested([(height, width)])}, for example"
    Room(options.data_gigabytes).take(
        f"{len(files)} images of {height}x{width}x{channels} (height x width x channels) in {source}",
        len(files) * pixels.size,
        on_disk(*files),
        f"give {smaller}, or --cache FOLDER to keep the images on a disk",
    )
    return np.empty((len(files), *pixels.shape), np.uint8)


def _with_colors(
    source: str, files: Sequence[Path], found: Pixels, count: int, pixels: Pixels, options: ImageOptions
) -> Pixels:
    """Return the first `count` gray images with three channels, and room for the others."""
    colored = _empty(source, files, pixels, options)
    colored[:count] = found[:count]  # one channel becomes three
    return colored
