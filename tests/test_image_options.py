"""The text of --resize is read as described; a wrong part is named."""

import pytest

from distdl.errors import UserError
from distdl.image_options import Resize


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("32", Resize(32, 32, "crop")),
        ("32x48", Resize(32, 48, "crop")),
        ("32x48:crop", Resize(32, 48, "crop")),
        (" 32x48 : pad ", Resize(32, 48, "pad")),
        ("4096x1:stretch", Resize(4096, 1, "stretch")),
    ],
)
def test_a_text_gives_height_width_and_mode(text, expected):
    assert Resize.parse(text) == expected
    assert Resize.parse(str(expected)) == expected


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "expected the height and width"),
        ("x", "expected the height and width"),
        ("32x", "expected the height and width"),
        ("32X48", "expected the height and width"),
        ("32,48", "expected the height and width"),
        ("-3", "expected the height and width"),
        ("9" * 5000, "expected the height and width"),
        ("\u00b3", "expected the height and width"),
        ("0", "from 1 to 4096"),
        ("5x4097", "from 1 to 4096"),
        ("32:", "unknown mode ''"),
        ("32:pda", "did you mean 'pad'"),
        ("32:crop:pad", "unknown mode 'crop:pad'"),
        ("32\n", "expected the height and width"),
    ],
)
def test_a_wrong_part_is_named(text, said):
    with pytest.raises(UserError, match=r"^--resize ") as caught:
        Resize.parse(text)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
