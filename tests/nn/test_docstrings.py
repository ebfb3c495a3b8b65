"""The docstring of every public name gives its source: a section of the book, a paper or a course."""

import inspect
import re

import pytest

from distdl import nn, optim, schedules
from distdl.engine import clipping

#: This library's own names, without a counterpart in the book or a paper.
OWN = {"BufferSpec", "ParameterSpec", "Workspace", "build_model", "make_loss", "make_schedule", "optimizer_class"}
SECTION = r"\b(sections?|book) [2-8]\.[1-7]\b"
SOURCE = r"\bNg('s course)?, week [1-4]|\b[A-Z][a-z]+ (et al\.|and [A-Z][a-z]+) (19|20)\d\d\b"


def named_objects():
    for module in (nn, optim, clipping, schedules):
        public = getattr(module, "__all__", [name for name in vars(module) if not name.startswith("_")])
        for name in public:
            found = getattr(module, name)
            if callable(found) and getattr(found, "__module__", "").startswith(module.__name__):
                yield name, found


NAMED = dict(named_objects())


def test_all_kinds_of_names_are_checked():
    assert {"Affine", "vgg16", "patches", "LossFunction", "Adam", "clip_by_norm", "cosine"} <= NAMED.keys()
    assert NAMED.keys() >= OWN


@pytest.mark.parametrize("name", sorted(NAMED.keys() - OWN))
def test_the_docstring_names_a_section_of_the_book_or_another_source(name):
    text = " ".join(inspect.getdoc(NAMED[name]).split())
    assert re.search(SECTION, text) or re.search(SOURCE, text)


@pytest.mark.parametrize("name", NAMED)
def test_a_section_of_a_paper_does_not_count_as_a_section_of_the_book(name):
    """After a year, a section is not one of the book."""
    for found in re.finditer(
        r"\d{4}[^;.]{0,40} section \d\.\d\S*([^;.]*)", " ".join(inspect.getdoc(NAMED[name]).split())
    ):
        assert found[1].startswith(" of the paper"), found[0]
