"""Check that a command line is refused: exit code, one line, no changed file, little memory."""

from __future__ import annotations

import io
import re
import tracemalloc
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from unittest.mock import patch

from bad_inputs import changes, picture

from distdl import cli, engine, train_command

MOST_BYTES = 100e6
USER, DAMAGED = 2, 3


@dataclass
class Case:
    """A command line, its expected exit code, and words that its one line must contain."""

    name: str
    arguments: list[str]
    code: int
    words: list[str] = field(default_factory=list)
    during: Callable[[], AbstractContextManager[object]] = nullcontext


class Memory:
    """Measure the peak memory inside the block. It makes the block five times slower."""

    peak = 0

    def __enter__(self):
        tracemalloc.start()

    def __exit__(self, *_):
        self.peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()


FEW_SAMPLES = re.compile(r"warning: .*\bclass(es)? ha(s|ve) no (\w+ )?sample")


def outcome(arguments):
    """Run the command and return its exit code, output, errors and peak memory.

    The errors are without the warnings about the few samples of the tiny datasets.
    The parsing of flags is measured only if it reads a config file.
    """
    out, err, memory = io.StringIO(), io.StringIO(), Memory()
    reads_a_config = any(argument.startswith("--config") for argument in arguments)
    original = engine.train

    def measured(checked):
        with nullcontext() if reads_a_config else memory:
            return original(checked)

    whole = memory if reads_a_config else nullcontext()
    with patch.object(engine, "train", measured), redirect_stdout(out), redirect_stderr(err), whole:
        code = cli.run(train_command.main, arguments)
    lines = err.getvalue().splitlines(keepends=True)
    return code, out.getvalue(), "".join(line for line in lines if not FEW_SAMPLES.search(line)), memory.peak


def problems_of(case: Case) -> list[str]:
    """Run a case and return the problems of its refusal."""
    before = picture(".")
    try:
        with case.during():
            code, out, err, peak = outcome(case.arguments)
    except (Exception, SystemExit) as error:  # noqa: BLE001  the user would see a traceback
        return [f"raised {error!r}", *changes(before, picture("."))]
    problems = changes(before, picture("."))
    if code != case.code:
        problems.append(f"exit code {code} instead of {case.code}")
    if not (err.startswith("distdl: error: ") and err.endswith("\n") and len(err.splitlines()) == 1):
        problems.append("not one line of distdl")
    problems += [f"no word of {word!r}" for word in case.words if word not in err]
    problems += ["a traceback"] if "Traceback" in err else []
    problems += [f"printed {out[:200]!r}"] if out else []
    problems += [f"held {peak / 1e6:.0f} MB"] if peak > MOST_BYTES else []
    return [*problems, f"said {err!r}"] if problems else []
