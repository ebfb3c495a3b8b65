"""JSON from files that may come from anyone: `checked` compares a value with a description of its parts.

A description is a type, ``float`` (any finite number), a union of types, a list with the description of each item, a
dictionary of fields, or ``{str: description}`` for any names. A field is required, unless its name ends in ``?``. A
value may have further fields, which nobody reads.
"""

import json
import math
import types
import typing
from pathlib import Path
from typing import Any

from distdl.errors import DamagedFileError, UserError
from distdl.regular_files import MOST_BYTES, read_regular

#: Every whole number that we write is smaller, and becomes a float without an overflow.
MOST = 2**63


def fits(value: Any, described: Any) -> bool:
    """Return whether a value fits a description.

    >>> fits({"step": 3, "ranks": [0, 1]}, {"step": int, "ranks": [int], "loss?": float | None})
    True
    >>> fits({"step": True}, {"step": int}), fits({"loss": "low"}, {"loss?": float}), fits(1e400, float)
    (False, False, False)
    """
    match described:
        case dict() if str in described:
            return isinstance(value, dict) and all(fits(one, described[str]) for one in value.values())
        case dict():
            return isinstance(value, dict) and all(
                fits(value[name.rstrip("?")], one) if name.rstrip("?") in value else name.endswith("?")
                for name, one in described.items()
            )
        case [item]:
            return isinstance(value, list) and all(fits(one, item) for one in value)
        case types.UnionType():
            return any(fits(value, one) for one in typing.get_args(described))
    if isinstance(value, int | float) and not isinstance(value, bool):
        is_of_type = type(value) is described or described is float
        return is_of_type and (math.isfinite(value) if isinstance(value, float) else abs(value) < MOST)
    return type(value) is described


def parsed_json(text: bytes | str) -> Any:
    """Return the value of a JSON text; raise `ValueError` for NaN and infinite numbers, which we never write."""

    def finite(number: str) -> float:
        if not math.isfinite(float(number)):
            raise ValueError(number)
        return float(number)

    return json.loads(text, parse_float=finite, parse_constant=finite)


def check(value: Any, described: Any, path: Path, line: int = 0) -> None:
    """Raise `DamagedFileError` if a value in a file, in its line number `line` if that is given, does not fit."""
    if not fits(value, described):
        raise _damaged(path, line, "it does not have the values that distdl writes")


def read_json(path: Path, described: Any, *, most: int = MOST_BYTES) -> Any:
    """Return the content of a JSON file; raise `UserError` if it cannot be read, `DamagedFileError` if damaged."""
    return _parsed(_content(path, most), described, path)


def read_json_lines(path: Path, described: Any, *, having: str | None = None) -> list[Any]:
    """Return the records of a file of one JSON object per line, those with the field `having` if it is given.

    Raises as `read_json` does.
    """
    records = []
    for number, line in enumerate(_content(path, MOST_BYTES).splitlines(), 1):
        record = _parsed(line, {}, path, number)
        if having is None or having in record:
            check(record, described, path, number)
            records.append(record)
    return records


def _parsed(text: bytes, described: Any, path: Path, line: int = 0) -> Any:
    try:
        value = parsed_json(text)
    except (ValueError, RecursionError):
        raise _damaged(path, line, "it is not valid JSON") from None
    check(value, described, path, line)
    return value


def _damaged(path: Path, line: int, what: str) -> DamagedFileError:
    return DamagedFileError(f"{path} is damaged: {f'line {line}: ' if line else ''}{what}; restore it, or remove it")


def _content(path: Path, most: int) -> bytes:
    try:
        return read_regular(path, follow=True, most=most)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None
