"""Compare the training speed of distdl with that of PyTorch on your machine; print a table in Markdown.

    python examples/versus_pytorch.py
    python examples/versus_pytorch.py --torch-python ~/torch-venv/bin/python --rows mlp-2,simple_convnet-2
    python examples/versus_pytorch.py --whole-runs --data-dir ~/mnist --json days.jsonl
    python examples/versus_pytorch.py --table days.jsonl

A step is: pick the batch's rows from a dataset in memory, forward, backward, sum the gradients over the ranks, Adam.
The data are MNIST, or random pixels in MNIST's shape and random labels. Each rank is a process with one thread.

There are two ways to compare. Both start each side several times, because a process can be lucky or unlucky with its
memory for all its life:

- `versus_turns.py`: the steps alone, in turns of a few seconds.
- `versus_runs.py` (`--whole-runs`): whole runs of `distdl.train` and of PyTorch.

`pytorch_ddp.py` is PyTorch's side. It first tries all its forms. The fastest form of each layout takes part in the
rounds, and the better of these is compared with distdl. Each round gives a ratio of samples per second. The table shows
its median and quartiles.
"""

import math
import os
import subprocess
import sys
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Literal

from versus_results import ROWS, load, merged_table, save, table_of
from versus_runs import compare_runs
from versus_turns import SLOWER_KERNELS, compare_turns

from distdl import cli
from distdl.engine.storage.files import check_output
from distdl.errors import UserError, unknown_name

PIP = "pip install torch --index-url https://download.pytorch.org/whl/cpu"


def parse_rows(text):
    """Return the rows of a text such as mlp-1,mlp-2; raise `UserError`."""
    for name in text.split(","):
        if name not in ROWS:
            raise unknown_name("row", name, ROWS)
    return tuple(text.split(","))


@dataclass(frozen=True, kw_only=True)
class Options:
    """The flags of the comparison."""

    torch_python: str | None = None
    """Python interpreter that has PyTorch; by default this one."""
    rows: tuple[str, ...] = tuple(ROWS)
    """Rows of the table, separated by commas; by default all."""
    kernels: Literal["numpy", "compiled"] | None = None
    """The form of our kernels; by default the one that distdl chooses."""
    micro_batch_size: int | None = None
    """Our micro-batch size, for all rows; by default that of each row."""
    starts: int = 3
    """Number of starts of both programs."""
    rounds: int = 4
    """Turns of each after a start."""
    seconds: float = 2.0
    """Length of a turn."""
    whole_runs: bool = False
    """Compare whole runs, one after each start, instead of turns."""
    data_dir: Path | None = None
    """Folder of MNIST's files, for whole runs; by default they train on random pixels."""
    epochs: int | None = None
    """Epochs of a whole run, of which the first is the warm-up; by default those of each row."""
    quick: bool = False
    """Two very short rounds, or one of short runs, to see whether the comparison runs."""
    json: Path | None = None
    """File to append the results to, one line for each row."""
    table: tuple[Path, ...] = ()
    """File of such results: print a table of all, with the spread over days, and measure nothing; may be repeated."""


COMMAND = cli.Command(
    program="python examples/versus_pytorch.py",
    summary="Compare the speed of this trainer with that of PyTorch on this machine.",
    settings=Options,
    examples=(
        "python examples/versus_pytorch.py",
        "python examples/versus_pytorch.py --rows mlp-2,simple_convnet-2",
        "python examples/versus_pytorch.py --torch-python ~/torch/bin/python",
        "python examples/versus_pytorch.py --whole-runs --json days.jsonl",
        "python examples/versus_pytorch.py --table days.jsonl",
    ),
    groups={"flags": [field.name for field in fields(Options)]},
    flags={
        "torch_python": cli.Flag(value="PYTHON"),
        "rows": cli.Flag(value="ROWS", names=ROWS, parse=parse_rows),
        "json": cli.Flag(value="FILE.jsonl"),
        "table": cli.Flag(value="FILE.jsonl", repeated=True),
    },
)


def parse(arguments):
    """Return the options of a command line; raise `UserError`."""
    options = COMMAND.parse(arguments)
    if min(options.starts, options.rounds) < 1 or not 0 < options.seconds < math.inf:
        given = f"--starts {options.starts} --rounds {options.rounds} --seconds {options.seconds:g}"
        raise UserError(f"{given} given: all must be above 0")
    if options.epochs is not None and options.epochs < 2:
        raise UserError(f"--epochs {options.epochs} given: expected at least 2, because the first is the warm-up")
    if not options.whole_runs and (options.data_dir, options.epochs) != (None, None):
        raise UserError("--data-dir and --epochs are for whole runs: give --whole-runs too")
    for name in options.rows:
        size, row = options.micro_batch_size, ROWS[name]
        if size is not None and not 1 <= size <= row.batch_size // row.ranks:
            raise UserError(
                f"--micro-batch-size {size} does not fit {name}: expected 1 to {row.batch_size // row.ranks}, at least "
                "one micro-batch per rank"
            )
    if options.json is not None:
        check_output(options.json, "--json")
    return options


def check_torch(python):
    """Raise `UserError` unless the interpreter has PyTorch."""
    look = "import importlib.util, sys; sys.exit(importlib.util.find_spec('torch') is None)"
    try:
        missing = subprocess.run([python, "-c", look], check=False).returncode != 0
    except OSError as error:
        raise UserError(f"cannot run {python}: {error.strerror}; give an interpreter by --torch-python") from None
    if missing:
        raise UserError(f"{python} has no PyTorch: {PIP}, or give an interpreter that has it by --torch-python")


def job_of(name, options):
    """Return the job of a row, with the options for all rows."""
    row = ROWS[name]
    given = {"micro_batch_size": options.micro_batch_size, "epochs": options.epochs, "kernels": options.kernels}
    if options.quick:
        given |= {"steps": 4, "epochs": 2}
    return replace(row, **{name: value for name, value in given.items() if value is not None})


def main(arguments):
    """Measure row by row, then print the table."""
    options = parse(arguments)
    if options.table:
        print("\n".join(merged_table([result for path in options.table for result in load(path)])))
        return 0
    torch_python = options.torch_python or sys.executable
    check_torch(torch_python)
    starts, rounds, seconds = options.starts, options.rounds, options.seconds
    if options.quick:
        starts, rounds, seconds = 1, 2, 0.02
    results = []
    for name in options.rows:
        job = job_of(name, options)
        if options.whole_runs:
            result = compare_runs(job, torch_python, starts, options.data_dir)
        else:
            result = compare_turns(job, torch_python, starts, rounds, seconds)
        results.append(result)
        if options.json is not None:
            save(options.json, result)
        low, median, high = result.ratio
        print(f"{job.title}: {median:.2f} × PyTorch, {result.better} ({low:.2f} to {high:.2f})", flush=True)
    medians = f"{starts} x {rounds} interleaved turns of {seconds:g} s (both started {starts} times)"
    if options.whole_runs:
        medians = f"{starts} interleaved runs, without their first epoch"
    sizes = ", ".join(
        f"{name} {result.job.micro_batch_size}" for name, result in zip(options.rows, results, strict=True)
    )
    print()
    print("\n".join(table_of(results)))
    print()
    print(f"Samples per second, medians of {medians}, one thread per rank; {results[-1].cpu}.")
    print(f"{results[-1].about}. Kernels: {results[-1].kernels}. Micro-batches: {sizes}.")
    for variable in SLOWER_KERNELS:
        if variable in os.environ:
            print(f"{variable}={os.environ[variable]} is set here; distdl was measured without it.")
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))
