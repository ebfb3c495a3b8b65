"""The reading list names files and functions that exist, and the core is small enough for an afternoon."""

import ast
import re
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
PAGE = (REPOSITORY / "docs" / "reading.md").read_text(encoding="utf-8")
ROWS = [[cell.strip() for cell in line.strip("|").split("|")] for line in PAGE.splitlines() if line.startswith("| `")]
#: File and approximate number of lines.
CORE = {row[0].strip("`"): int(row[1]) for row in ROWS if len(row) == 3 and row[1].isdigit()}
#: File and function.
PLACES = [(row[0].strip("`* "), row[1].strip("`")) for row in ROWS if len(row) == 3 and row[1].startswith("`")]
MOST_LINES = 4_500


def lines_of(file):
    return len((REPOSITORY / file).read_text(encoding="utf-8").splitlines())


def names_in(file):
    """Return the classes and functions that a file defines; a method also as ``Class.method``."""
    names = set()
    for outer in ast.walk(ast.parse((REPOSITORY / file).read_text(encoding="utf-8"))):
        if isinstance(outer, ast.FunctionDef | ast.ClassDef):
            names.add(outer.name)
        if isinstance(outer, ast.ClassDef):
            names |= {f"{outer.name}.{inner.name}" for inner in outer.body if isinstance(inner, ast.FunctionDef)}
    return names


def test_the_core_can_be_read_in_an_afternoon():
    assert len(CORE) > 20
    assert sum(map(lines_of, CORE)) <= MOST_LINES


@pytest.mark.parametrize("file", CORE)
def test_the_line_counts_of_the_page_are_about_right(file):
    assert abs(CORE[file] - lines_of(file)) <= max(20, lines_of(file) // 10)


def test_the_page_gives_the_sum():
    [given] = re.findall(r"about ([\d,]+) lines", PAGE)
    assert abs(int(given.replace(",", "")) - sum(map(lines_of, CORE))) <= 100


@pytest.mark.parametrize(("file", "name"), PLACES)
def test_every_function_on_the_way_exists(file, name):
    assert name in names_in(file)


def test_files_outside_of_the_core_are_marked():
    for row in ROWS:
        if len(row) == 3 and row[1].startswith("`"):
            assert row[0].endswith("*") == (row[0].strip("`* ") not in CORE), row


def test_every_file_and_folder_of_the_page_exists():
    for name in re.findall(r"`(distdl/[\w/.]+)`", PAGE):
        assert (REPOSITORY / name).exists(), name
