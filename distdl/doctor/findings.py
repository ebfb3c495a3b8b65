"""Findings: the result of one check, its level, and the line that fixes it; as text of 80 columns or as JSON."""

import json
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum

COLUMNS, NAME_COLUMN, TEXT_COLUMN = 80, 8, 23


class Level(IntEnum):
    """How bad a finding is; the worst one is the exit code."""

    FINE = 0
    SLOW = 1
    BROKEN = 2


@dataclass(frozen=True)
class Finding:
    """The result of a check. `fix` is a command or a setting; a fine finding has none."""

    check: str
    level: Level
    text: str
    fix: str = ""

    def lines(self) -> list[str]:
        """Return it as lines of at most 80 columns."""
        head = self.level.name.lower().ljust(NAME_COLUMN) + self.check.ljust(TEXT_COLUMN - NAME_COLUMN)
        lines = _wrapped(self.text, head, TEXT_COLUMN)
        return lines + (_wrapped(self.fix, f"{'':{NAME_COLUMN}}fix: ", NAME_COLUMN + 5) if self.fix else [])


def worst(findings: Iterable[Finding]) -> Level:
    """Return the worst level."""
    return max((finding.level for finding in findings), default=Level.FINE)


def as_text(findings: Sequence[Finding]) -> str:
    """Return the report: one entry per finding, and the verdict."""
    bad = [finding for finding in findings if finding.level]
    verdict = {
        Level.FINE: "fine: distdl works here",
        Level.SLOW: "works, but not at its best",
        Level.BROKEN: "distdl will not work here",
    }[worst(findings)]
    count = f": {len(bad)} of {len(findings)} checks found something" if bad else ""
    return "\n".join([*(line for finding in findings for line in finding.lines()), f"{verdict}{count}", ""])


def as_json(findings: Sequence[Finding]) -> str:
    """Return the report as one line of JSON."""
    entries = [
        {"check": one.check, "level": one.level.name.lower(), "text": one.text, "fix": one.fix} for one in findings
    ]
    level = worst(findings)
    return json.dumps({"level": level.name.lower(), "exit_code": int(level), "findings": entries}) + "\n"


def _wrapped(text: str, head: str, indent: int) -> list[str]:
    return textwrap.wrap(
        text,
        COLUMNS,
        initial_indent=head,
        subsequent_indent=" " * indent,
        break_on_hyphens=False,
        break_long_words=False,
    )
