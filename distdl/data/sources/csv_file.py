"""A user's own images with their labels in a CSV file: ``csv:FILE``. The file is not trusted.

The first line names the columns. One column has the paths of the images, relative to the folder of the CSV file. One
has the labels; an optional one names the part of each image (train, val or test). The names of the columns are known
from `COLUMNS`, or given by ``--csv-columns PATH,LABEL``.

- Texts and whole numbers are classes. The classes keep their texts as names.
- Numbers with decimals are numbers to predict. So are several label columns.
"""

import csv
import io
import math
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from distdl.data.dataset import Dataset
from distdl.data.labels import natural_order
from distdl.data.sources.folder import PART_OF, PARTS
from distdl.data.sources.image_files import ListedFiles
from distdl.data.sources.images import SUFFIXES, pillow
from distdl.errors import UserError, nearest, one_line, quoted
from distdl.image_options import ImageOptions
from distdl.regular_files import NotRegularError, open_regular

#: The usual names of the columns, in lower case, without spaces and punctuation.
COLUMNS = {
    "path": (
        *("path", "file", "filename", "filepath", "image", "imagepath", "imagename", "imagefile"),
        *("img", "imgpath", "imgname"),
    ),
    "label": ("label", "labels", "class", "classname", "labelname", "target", "category", "y"),
    "part": ("split", "part", "partition", "subset", "set"),
}
DELIMITERS = ",;\t|"
WHOLE = re.compile("[+-]?[0-9]{1,18}")
NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")
MOST_LINES_NAMED = 10


@dataclass
class Rows:
    """The lines of a CSV file that have content."""

    paths: list[str] = field(default_factory=list)
    labels: list[tuple[str, ...]] = field(default_factory=list)
    parts: list[str] = field(default_factory=list)
    lines: list[int] = field(default_factory=list)
    """The number of each line in the file."""


@dataclass(frozen=True)
class Columns:
    """The numbers of the columns that are read."""

    path: int
    labels: tuple[int, ...]
    part: int | None


def load_csv(path: Path, options: ImageOptions | None = None) -> Dataset:
    """Return the images that a CSV file lists, in the order of the file.

    Raises `UserError` if the file cannot be read, a column is missing, or a line or image does not fit;
    `DamagedFileError` if an image is damaged.
    """
    pillow()
    options = options or ImageOptions()
    try:
        header, rows, notes, label_columns = _read(path, options.csv_columns)
    except UnicodeDecodeError as error:
        raise UserError(
            f"{quoted(path)} is not a text in UTF-8 (byte {error.start}): expected a CSV file; save it as CSV UTF-8"
        ) from None
    except csv.Error as error:
        raise UserError(f"{quoted(path)} is not a CSV file: {error}; expected lines of values") from None
    except NotRegularError:
        raise UserError(f"{quoted(path)} is not a regular file: expected a CSV file") from None
    except OSError as error:
        raise UserError(f"{quoted(path)} cannot be read: {error.strerror or error}") from error
    if not rows.paths:
        raise UserError(f"{quoted(path)} lists no images: expected a line for each, after the names of the columns")
    _check_filled(path, rows)
    numbers = _numbers(path, rows, [header[column] for column in label_columns])
    if numbers is None:
        names = sorted({label for (label,) in rows.labels}, key=_order)
        place = {name: number for number, name in enumerate(names)}
        labels: Sequence[int | list[float]] = [place[label] for (label,) in rows.labels]
    else:
        names, labels = [header[column] for column in label_columns], numbers
    listed = ListedFiles(f"csv:{path}", quoted(path), tuple(names), is_regression=numbers is not None, notes=notes)
    files = [_file(path.parent, text) for text in rows.paths]
    _check_once(path, files, rows, notes)
    for part in PARTS:
        for row, file in enumerate(files):
            if rows.parts[row] == part:
                listed.add(part, [file], labels[row])
    return listed.read(options)


def _read(path: Path, given: str | None) -> tuple[list[str], Rows, list[str], tuple[int, ...]]:
    """Return the names of the columns, the rows, notes, and the numbers of the label columns."""
    with io.TextIOWrapper(open_regular(path, follow=True), "utf-8-sig", newline="") as file:
        first = file.readline(csv.field_size_limit())
        file.seek(0)
        delimiter = max(DELIMITERS, key=first.count)
        lines = csv.reader(file, delimiter=delimiter, strict=True)
        header = [one_line(name.strip()) for name in next(lines, [])]
        columns = _columns(path, header, given)
        rows = Rows()
        for values in _same_length(path, lines, len(header)):
            rows.paths.append(values[columns.path])
            rows.labels.append(tuple(values[column] for column in columns.labels))
            rows.parts.append("training" if columns.part is None else _part(path, values[columns.part], lines.line_num))
            rows.lines.append(lines.line_num)
    if "training" not in rows.parts and rows.parts:
        raise UserError(f"{quoted(path)} has no line for training: expected train in the column of the parts")
    used = {columns.path, *columns.labels, columns.part}
    unused = [repr(name) for number, name in enumerate(header) if number not in used]
    notes = [f"columns of {quoted(path)} that are not used: {', '.join(unused)}"] if unused else []
    return header, rows, notes, columns.labels


def _same_length(path: Path, lines: Iterator[list[str]], count: int) -> Iterator[list[str]]:
    """Yield the values of each line, without blanks around them; raise `UserError` if a line has another number."""
    for values in lines:
        stripped = [value.strip() for value in values]
        if not any(stripped):
            continue
        if len(stripped) != count:
            number = getattr(lines, "line_num", "?")
            raise UserError(
                f"{quoted(path)} has {len(stripped)} values in line {number}, expected {count}, as many as columns; "
                "put a value that holds the separator in quotes"
            )
        yield stripped


def _columns(path: Path, header: list[str], given: str | None) -> Columns:
    """Return the columns to read: those of ``--csv-columns``, or those with usual names."""
    twice = sorted({name for name in header if header.count(name) > 1})
    if twice:
        raise UserError(f"{quoted(path)} has two columns with the name {twice[0]!r}: expected different names")
    usual = {
        kind: [number for number, name in enumerate(header) if re.sub("[^a-z0-9]", "", name.lower()) in names]
        for kind, names in COLUMNS.items()
    }
    listed = ", ".join(map(repr, header[:20]))
    if given is not None:
        names = [name.strip() for name in given.split(",")]
        if unknown := [name for name in names if name not in header]:
            near = nearest(unknown[0], header, {})
            raise UserError(
                f"{quoted(path)} has no column {unknown[0]!r} of --csv-columns: its first line has {listed}"
                + (f"; did you mean {near!r}?" if near else "")
            )
        chosen = [header.index(name) for name in names]
        found = {"path": chosen[:1], "label": chosen[1:], "part": [n for n in usual["part"] if n not in chosen]}
    else:
        found = usual
    for kind, numbers in found.items():
        if len(numbers) > 1 and (given is None or kind == "part"):
            several = " and ".join(repr(header[number]) for number in numbers)
            raise UserError(
                f"{quoted(path)} has the columns {several}, each of which may hold the {kind}: name the columns by "
                "--csv-columns PATH,LABEL"
            )
        if not numbers and kind != "part":
            raise UserError(
                f"{quoted(path)} has no column for the {kind}: its first line has {listed}; expected names such as "
                f"{COLUMNS['path'][0]} and {COLUMNS['label'][0]}, or --csv-columns PATH,LABEL"
            )
    return Columns(found["path"][0], tuple(found["label"]), found["part"][0] if found["part"] else None)


def _part(path: Path, text: str, line: int) -> str:
    part = PART_OF.get(text.lower())
    if part is None:
        raise UserError(f"{quoted(path)} has the part {text[:40]!r} in line {line}: expected train, val or test")
    return part


def _check_filled(path: Path, rows: Rows) -> None:
    """Raise `UserError` for lines without a path or label."""
    lines = [rows.lines[row] for row, labels in enumerate(rows.labels) if "" in (rows.paths[row], *labels)]
    if lines:
        listed = ", ".join(map(str, lines[:MOST_LINES_NAMED])) + (", …" if len(lines) > MOST_LINES_NAMED else "")
        raise UserError(
            f"{quoted(path)} has no path or label in {len(lines)} of its lines ({listed}): complete or delete them"
        )


def _numbers(path: Path, rows: Rows, names: Sequence[str]) -> list[list[float]] | None:
    """Return the labels as numbers to predict, or None if they are classes."""
    if len(names) == 1:
        texts = [label for (label,) in rows.labels]
        if all(map(WHOLE.fullmatch, texts)) or not all(map(NUMBER.fullmatch, texts)):
            return None
    for row, labels in enumerate(rows.labels):
        for name, text in zip(names, labels, strict=True):
            if not (NUMBER.fullmatch(text) and math.isfinite(float(text))):
                raise UserError(
                    f"{quoted(path)} has {text[:40]!r} in the column {name!r}, line {rows.lines[row]}: expected a "
                    "number (several label columns hold numbers to predict)"
                )
    return [[float(text) for text in labels] for labels in rows.labels]


def _order(name: str) -> tuple[object, ...]:
    """Return the sort key of a class: whole numbers by value, before texts in natural order."""
    return (0, int(name), natural_order(name)) if WHOLE.fullmatch(name) else (1, 0, natural_order(name))


def _file(folder: Path, text: str) -> Path:
    """Return the path of an image. A path of Windows has the other slash; some tables leave the suffix out."""
    file = folder / text
    if "\0" in text or os.path.lexists(file):
        return file
    other = folder / text.replace("\\", "/")
    with_suffix = [] if other.suffix else [Path(f"{other}{suffix}") for suffix in SUFFIXES]
    found = [one for one in with_suffix if os.path.lexists(one)]
    return found[0] if len(found) == 1 else other


def _check_once(path: Path, files: Sequence[Path], rows: Rows, notes: list[str]) -> None:
    """Raise `UserError` if an image is listed with two labels; note images that are listed twice."""
    first: dict[Path, int] = {}
    again = 0
    for row, file in enumerate(files):
        before = first.setdefault(file, row)
        if rows.labels[before] != rows.labels[row]:
            raise UserError(
                f"{quoted(path)} lists {rows.paths[row][:200]!r} with two labels, in the lines {rows.lines[before]} "
                f"and {rows.lines[row]}: expected one label for each image; delete a line"
            )
        again += before != row
    if again:
        notes.append(f"{again} lines of {quoted(path)} list an image that another line lists too")
