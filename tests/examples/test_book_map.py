"""The tables from sections of the book to code name existing files, and every example."""

import re
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
BOOK = (REPOSITORY / "docs" / "book.md").read_text(encoding="utf-8")
EXAMPLES = (REPOSITORY / "examples" / "README.md").read_text(encoding="utf-8")
ROWS = [
    line for line in BOOK.splitlines() if line.startswith("|") and not line.startswith(("|---", "| section", "| week"))
]


@pytest.mark.parametrize("row", ROWS, ids=[row.split("|")[1].strip() for row in ROWS])
def test_every_file_of_a_row_exists(row):
    _, _, _, code, test, _ = row.split("|")
    for cell, folders in ((code, ("distdl/", "examples/")), (test, ("tests/",))):
        files = re.findall(r"`([^`]+)`", cell)
        assert files
        for file in files:
            assert file.startswith(folders)
            assert (REPOSITORY / file).is_file(), file


def test_every_example_of_a_chapter_is_in_both_tables():
    for pattern in ("chapter_*.py", "ng_*.py"):
        for path in (REPOSITORY / "examples").glob(pattern):
            assert f"`examples/{path.name}`" in BOOK
            assert any(f"`{path.name}`" in line for line in EXAMPLES.splitlines() if line.startswith("|"))


def test_every_file_in_the_table_of_the_examples_exists():
    rows = [line.split("|") for line in EXAMPLES.splitlines() if line.startswith("|")]
    assert {len(row) for row in rows} == {7}
    for row in rows[2:]:
        for file in re.findall(r"`([^`]+)`", row[3]):
            assert (REPOSITORY / "examples" / file).is_file(), file
