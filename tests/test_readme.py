"""README is short, its links lead to files, and it has the set-up commands.

`tests/end_to_end/test_library.py` runs its script.
"""

import re
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
PAGES = [
    REPOSITORY / "README.md",
    REPOSITORY / "CONTRIBUTING.md",
    REPOSITORY / "examples" / "README.md",
    *sorted((REPOSITORY / "docs").glob("*.md")),
]
NEW_ENVIRONMENT = "python3 -m venv .venv && .venv/bin/pip install"
SET_UP = [
    f"{NEW_ENVIRONMENT} '.[mpich]' && .venv/bin/mpirun -n 4 .venv/bin/python -m distdl.train",
    f"{NEW_ENVIRONMENT} -e '.[mpich,dev]' && .venv/bin/python -m pytest",
]


def anchors(page):
    """Return the link names of the headings of a page, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_readme_has_at_most_900_words():
    assert len(README.split()) <= 900


@pytest.mark.parametrize("command", SET_UP)
def test_readme_has_the_set_up_command_on_one_line(command):
    assert f"    {command}" in README.splitlines()


def test_readme_shows_no_receipt_that_only_one_cpu_reproduces():
    assert re.findall(r"\b[0-9a-f]{64}\b|\b[0-9a-f]{8,}…", README) == []


def test_readme_links_to_every_page():
    linked = set(re.findall(r"\]\(([^)#]+)", README))
    assert {page.relative_to(REPOSITORY).as_posix() for page in PAGES[1:]} <= linked


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(REPOSITORY).as_posix())
def test_every_relative_link_leads_to_a_file_and_a_heading(page):
    for link in re.findall(r"\]\(([^)]+)\)", page.read_text(encoding="utf-8")):
        if "://" not in link:
            path, _, heading = link.partition("#")
            target = (page.parent / path).resolve() if path else page
            assert target.exists(), link
            assert not heading or heading in anchors(target), link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(REPOSITORY).as_posix())
def test_every_python_file_that_a_page_names_exists(page):
    roots = [REPOSITORY, REPOSITORY / "distdl", page.parent, REPOSITORY / "tests" / "faults"]
    for name in re.findall(r"`([\w/]+\.py)`", page.read_text(encoding="utf-8")):
        assert any((root / name).is_file() for root in roots), name
