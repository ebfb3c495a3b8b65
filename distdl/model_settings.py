"""The value of `--model-settings`, parsed and checked. The model checks whether it has these settings.

This module imports neither NumPy nor MPI. So the config can check the flag before they are loaded.
"""

import re
from collections.abc import Callable
from typing import Any

from distdl.errors import UserError

#: The forms of a value, each with its conversion.
KINDS: tuple[tuple[str, Callable[[str], Any]], ...] = (
    ("[0-9]{1,9}", int),
    ("[0-9]{1,9}(-[0-9]{1,9})+", lambda text: tuple(map(int, text.split("-")))),
    (r"-?([0-9]+\.?[0-9]*|\.[0-9]+)(e-?[0-9]{1,3})?", float),
    ("true|false", lambda text: text == "true"),
    ("[A-Za-z_][A-Za-z0-9_]*", str),
)


def parse_model_settings(text: str | None) -> dict[str, Any]:
    """Return the settings in a text, by name; raise `UserError`.

    >>> parse_model_settings("hidden=100-50,batch_norm,dropout=0.2,activation=tanh")
    {'hidden': (100, 50), 'batch_norm': True, 'dropout': 0.2, 'activation': 'tanh'}
    """
    settings: dict[str, Any] = {}
    for part in [] if text is None else text.split(","):
        name, equals, value = (piece.strip(" ") for piece in part.partition("="))
        shown = f"--model-settings {part[:80].strip(' ')!r}"
        if not re.fullmatch("[A-Za-z_][A-Za-z0-9_]*", name):
            raise UserError(f"{shown} does not name a setting: give name=value, with commas in between")
        if name in settings:
            raise UserError(f"{shown}: {name} is given twice; give it once")
        for pattern, kind in KINDS:
            if equals and re.fullmatch(pattern, value):
                settings[name] = kind(value)
                break
        else:
            if equals:
                raise UserError(
                    f"{shown}: expected a number, a word, true, false, or whole numbers with - in between, such as "
                    "hidden=100-50"
                )
            settings[name] = True
    return settings
