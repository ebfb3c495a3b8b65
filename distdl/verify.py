"""Prove that a training gives the same bits on any number of ranks.

    python -m distdl.verify --ranks 1,2,4 -- --model deep_convnet --epochs 2

runs ``distdl.train`` with the flags after ``--`` once for each number of ranks, with NumPy kernels and, if this machine
can use them, with compiled kernels. It compares the receipts and the bytes of ``metrics.jsonl``. If they differ, it
names the first step and tensor that differ and exits with 1.
"""

import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from distdl import cli
from distdl.cli import Command, Flag
from distdl.errors import EXIT_DAMAGED, EXIT_DIFFERENT, DamagedFileError, UserError
from distdl.job.launched_by import read_launch
from distdl.job.mpirun_command import environment_for, mpirun_command, python_command

#: Flags of distdl.train that this command sets itself.
OURS = ("--run-dir", "--dry-run", "--resume", "--record-hashes", "--log-every")


@dataclass(frozen=True, kw_only=True)
class VerifyOptions:
    """The flags of the command."""

    ranks: tuple[int, ...] = (1, 2, 4)
    """Numbers of ranks to compare, separated by commas; by default 1,2,4."""


def parse_ranks(text: str) -> tuple[int, ...]:
    """Return the numbers in a text such as ``1,2,4``; raise `UserError`."""
    try:
        ranks = tuple(int(number) for number in text.split(","))
    except ValueError:
        ranks = ()
    if len(set(ranks)) < 2 or min(ranks) < 1:
        raise UserError(f"--ranks {text}: expected at least two different numbers from 1 up, such as 1,2,4")
    return ranks


COMMAND = Command(
    program="python -m distdl.verify",
    summary="Prove that a training gives the same bits on any number of ranks.",
    settings=VerifyOptions,
    examples=(
        "python -m distdl.verify",
        "python -m distdl.verify --ranks 1,3 -- --model deep_convnet --epochs 2",
        "python -m distdl.verify --ranks 1,2,4 -- --max-steps 20 --augment flip",
    ),
    groups={"flags": ("ranks",)},
    flags={"ranks": Flag(value="1,2,4", parse=parse_ranks)},
    flags_after_dashes="distdl.train",
)


@dataclass(frozen=True)
class Outcome:
    """The results of one training."""

    ranks: int
    folder: Path
    seconds: float
    steps: int
    proof: tuple[str, str, bytes]
    """The data that must be equal: the hashes of weights and state, and the bytes of ``metrics.jsonl``."""
    kernels: str = "numpy"


def main(arguments: Sequence[str]) -> int:
    """Train and compare; return 0 if all results are equal, 1 if they differ."""
    own, flags = cli.split_at_dashes(arguments)
    options = COMMAND.parse(own)
    if read_launch().size > 1:
        raise UserError("distdl.verify starts its ranks itself: call it without mpirun")
    for flag in flags:
        if flag in {"-h", "--help"}:
            raise UserError(f"{flag} after -- trains nothing: python -m distdl.train --help lists the flags")
        if flag.split("=")[0].replace("_", "-") in OURS:
            raise UserError(f"{flag.split('=')[0]} is set by distdl.verify itself: leave it out")

    folder = Path(tempfile.mkdtemp(prefix="distdl-verify-"))
    different = False
    try:
        different = any(
            _are_different(options.ranks, words, folder / str(number)) for number, words in enumerate(_forms(flags))
        )
    finally:
        if not different:
            shutil.rmtree(folder)
    return EXIT_DIFFERENT if different else 0


def _forms(flags: Sequence[str]) -> list[list[str]]:
    """Return the flags, once for each kind of kernels to prove unless they choose the kernels."""
    if any(flag.split("=")[0] == "--kernels" for flag in flags):
        return [list(flags)]
    from distdl.nn.kernels.choice import obstacle  # noqa: PLC0415  it imports NumPy

    return [[*flags, f"--kernels={kernels}"] for kernels in ("numpy", *(["compiled"] if obstacle() is None else []))]


def _are_different(ranks: Sequence[int], flags: Sequence[str], folder: Path) -> bool:
    """Train on each number of ranks, in folders below `folder`, and return whether the results differ."""
    from distdl.engine.console import Console  # noqa: PLC0415  it imports NumPy

    console = Console(live=False)
    outcomes = []
    for count in ranks:
        outcomes.append(_trained(count, flags, folder / f"{count}-ranks"))
        weights, state = (digest[:16] for digest in outcomes[-1].proof[:2])
        seconds = outcomes[-1].seconds
        console.line(f"{count:3d} rank{'s' if count > 1 else ' '}  weights {weights}  state {state}  {seconds:.1f} s")
    first = outcomes[0]
    for other in outcomes[1:]:
        if other.proof != first.proof:
            console.line(f"DIFFERENT: {first_difference(first, other)}; the runs are kept in {folder}")
            return True
    numbers = ",".join(map(str, ranks))
    console.line(f"same bits on {numbers} ranks: weights, state and metrics.jsonl agree after {first.steps} steps")
    console.line(f"kernels: {first.kernels}")
    console.line(f"weights sha256: {first.proof[0]}")
    return False


def _trained(ranks: int, flags: Sequence[str], folder: Path) -> Outcome:
    """Train on `ranks` ranks in separate processes."""
    program = [*python_command("distdl.train"), *flags]
    program += ["--record-hashes", "--log-every=1", f"--run-dir={folder}"]
    command = mpirun_command(ranks, program)
    started = time.perf_counter()
    done = subprocess.run(
        program if ranks == 1 else command.argv,
        env=environment_for(command),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if line.startswith("distdl: error: ")]
        if errors:
            kind = DamagedFileError if done.returncode == EXIT_DAMAGED else UserError
            raise kind(f"with {ranks} ranks: {errors[0].removeprefix('distdl: error: ')}")
        raise RuntimeError(f"training with {ranks} ranks ended with exit code {done.returncode}:\n{done.stderr}")
    seconds = time.perf_counter() - started
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    proof = (summary["weights_sha256"], summary["state_sha256"], (folder / "metrics.jsonl").read_bytes())
    return Outcome(ranks, folder, seconds, summary["steps"], proof, summary["kernels"])


def first_difference(one: Outcome, other: Outcome) -> str:
    """Return the first place at which the records of the runs differ, or else the part of the results that differs."""
    from distdl.engine.recorded import Recorded, compare_records  # noqa: PLC0415  it imports NumPy

    found = compare_records(Recorded.read(one.folder), Recorded.read(other.folder)).difference
    if found is not None:
        return (
            f"first at step {found.step}, {found.what}: {found.one} with {one.ranks} ranks, {found.other} with "
            f"{other.ranks}"
        )
    if one.proof[:2] == other.proof[:2]:
        return f"the weights agree, metrics.jsonl does not, with {one.ranks} and {other.ranks} ranks"
    return f"all recorded steps agree, the final states do not, with {one.ranks} and {other.ranks} ranks"


if __name__ == "__main__":
    sys.exit(cli.run(main, trains=COMMAND.trains))
