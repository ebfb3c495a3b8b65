"""Mutation run: change the package at random places, one at a time, and check whether a test fails.

    python tests/mutants.py                             # 200 mutants of all modules: hours
    python tests/mutants.py --count 20 --only distdl/engine --seed 3
    python tests/mutants.py --longest 60                # no test file that takes over a minute
    python tests/mutants.py --list                      # the mutants that are known to be equivalent

A mutant is killed if a test fails. The run prints the diff of each survivor, and the percentage of killed mutants. A
survivor shows a missing test, unless the mutant is equivalent: it changes nothing that a user could observe. Add an
equivalent mutant, with the reason, to `tests/mutants_equivalent.txt`. It then no longer counts.

The run works in a temporary copy of the repository. For each mutant it runs test files until one fails: the doctests of
the module, the file that mirrors the module, the other files of that folder, the files that mention the module, and
some end-to-end files. It leaves out files that fail without a mutant, or take longer than `--longest`. Use an
environment with Open MPI: other MPIs skip most tests of recovery.

It mutates comparisons, boundaries, `and`/`or`, conditions, arithmetic, numbers, booleans and statements. It does not
mutate docstrings, annotations, messages, assertions, constants in capitals and `__main__` guards.
"""

from __future__ import annotations

import argparse
import ast
import copy
import difflib
import os
import queue
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
EQUIVALENT = Path(__file__).with_name("mutants_equivalent.txt")
#: Run for each mutant that has survived the tests of its module.
END_TO_END = (
    *(f"tests/end_to_end/test_{name}.py" for name in ("main_job", "nonfinite", "same_bits", "stop_signals")),
    "tests/end_to_end/test_survival.py",
    "tests/golden/test_receipts.py",
    "tests/test_under_mpirun.py",
)
NOT_COPIED = shutil.ignore_patterns(".git", ".venv*", "runs", "__pycache__", ".*_cache", "build", "*.egg-info")
#: The time limit of a test file: this factor times its time without a mutant, plus these seconds.
FACTOR, SECONDS_MORE = 4.0, 60.0
#: The mark, in the environment, of all processes that a test file starts.
MARK = "DISTDL_MUTANT_TEST"

COMPARISONS: dict[type[ast.cmpop], tuple[type[ast.cmpop], ...]] = {
    ast.Lt: (ast.LtE, ast.GtE),
    ast.LtE: (ast.Lt, ast.Gt),
    ast.Gt: (ast.GtE, ast.LtE),
    ast.GtE: (ast.Gt, ast.Lt),
    ast.Eq: (ast.NotEq,),
    ast.NotEq: (ast.Eq,),
    ast.Is: (ast.IsNot,),
    ast.IsNot: (ast.Is,),
    ast.In: (ast.NotIn,),
    ast.NotIn: (ast.In,),
}
ARITHMETIC: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv,
    ast.Pow: ast.Mult,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
}


@dataclass(frozen=True)
class Mutant:
    """One change of a file of the package: the bytes from `start` to `end` become `text`."""

    path: Path
    line: int
    kind: str
    start: int
    end: int
    text: str

    def apply(self, source: bytes) -> bytes:
        return source[: self.start] + self.text.encode() + source[self.end :]

    def changed_lines(self, source: bytes) -> tuple[str, str]:
        """The lines before and after the change, each in one line of text."""
        first, last = source.rfind(b"\n", 0, self.start) + 1, source.find(b"\n", self.end)
        longer = len(self.text.encode()) - (self.end - self.start)
        old, new = source[first:last], self.apply(source)[first : last + longer]
        return " ".join(old.decode().split()), " ".join(new.decode().split())

    def entry(self, source: bytes) -> str:
        """The line that lists it as equivalent."""
        old, new = self.changed_lines(source)
        return f"{self.path}: {old} -> {new}"

    def diff(self, source: bytes) -> str:
        before, after = (text.decode().splitlines(keepends=True) for text in (source, self.apply(source)))
        return "".join(difflib.unified_diff(before, after, str(self.path), str(self.path), n=2))


# ------------------------------------------------------------------------------------------------- places to change


def mutants_of(path: Path, source: bytes) -> Iterator[Mutant]:
    """Yield all mutants of a file."""
    starts = [0]
    for line in source.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    tree = ast.parse(source)
    skipped = {id(inside) for node in ast.walk(tree) for root in not_mutated(node) for inside in ast.walk(root)}
    nested = {
        id(child)
        for node in ast.walk(tree)
        if isinstance(node, ast.If | ast.For | ast.While | ast.With)
        for child in ast.iter_child_nodes(node)
    }
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        for place, kind, text in changes(node, is_nested=id(node) in nested):
            start = starts[place.lineno - 1] + place.col_offset
            end = starts[place.end_lineno - 1] + place.end_col_offset
            yield Mutant(path, place.lineno, kind, start, end, text)


def not_mutated(node: ast.AST) -> Iterator[ast.AST]:
    """Yield the parts of a node that are not mutated."""
    if isinstance(node, ast.arg | ast.AnnAssign) and node.annotation is not None:
        yield node.annotation
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        yield from [*node.decorator_list, *([node.returns] if node.returns is not None else [])]
    if isinstance(node, ast.Raise):
        yield from filter(None, [node.exc, node.cause])
    if isinstance(node, ast.Assert | ast.JoinedStr):
        yield node
    if isinstance(node, ast.If) and ast.unparse(node.test) in {"TYPE_CHECKING", "__name__ == '__main__'"}:
        yield node
    if isinstance(node, ast.Module):
        yield from (statement for statement in node.body if is_constant(statement))
    if isinstance(node, ast.Call) and getattr(node.func, "id", "") in {"TypeVar", "UserError"}:
        yield node


def is_constant(statement: ast.stmt) -> bool:
    """Return whether a statement assigns to names in capitals, or to names such as ``__all__``."""
    targets = statement.targets if isinstance(statement, ast.Assign) else [getattr(statement, "target", None)]
    names = [target.id for target in targets if isinstance(target, ast.Name)]
    return bool(names) and all(name.isupper() or name.startswith("__") for name in names)


def changes(node: ast.AST, *, is_nested: bool) -> Iterator[tuple[ast.AST, str, str]]:
    """Yield the changes of a node: the part to replace, the kind, and the new text."""

    def replaced(**parts: object) -> str:
        new = copy.copy(node)
        for name, part in parts.items():
            setattr(new, name, part)
        return f"({ast.unparse(new)})"

    if isinstance(node, ast.Compare):
        for number, operator in enumerate(node.ops):
            for other in COMPARISONS[type(operator)]:
                yield node, "comparison", replaced(ops=[*node.ops[:number], other(), *node.ops[number + 1 :]])
    elif isinstance(node, ast.BoolOp):
        yield node, "and/or", replaced(op=ast.Or() if isinstance(node.op, ast.And) else ast.And())
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not | ast.USub):
        yield node, "operator removed", f"({ast.unparse(node.operand)})"
    elif isinstance(node, ast.BinOp) and type(node.op) in ARITHMETIC and not is_text(node.left) | is_text(node.right):
        yield node, "arithmetic", replaced(op=ARITHMETIC[type(node.op)]())
    elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield node, "boolean", str(not node.value)
    elif isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        for value in (node.value + 1, node.value - 1):
            yield node, "number", f"({value})"
    elif isinstance(node, ast.AugAssign) or is_deletable(node, is_nested=is_nested):
        yield node, "statement deleted", "pass"
    if isinstance(node, ast.If | ast.While | ast.IfExp):
        yield node.test, "condition negated", f"(not ({ast.unparse(node.test)}))"


def is_text(node: ast.expr) -> bool:
    """Return whether an operand is a text or a list, so that the operator joins them."""
    return isinstance(node, ast.JoinedStr | ast.List | ast.Tuple) or (
        isinstance(node, ast.Constant) and isinstance(node.value, str | bytes)
    )


def is_deletable(node: ast.AST, *, is_nested: bool) -> bool:
    """Return whether removing a statement causes no `NameError` soon after."""
    if isinstance(node, ast.Assign):
        return all(isinstance(target, ast.Attribute | ast.Subscript) for target in node.targets)
    if isinstance(node, ast.Expr):
        return isinstance(node.value, ast.Call)
    return isinstance(node, ast.Raise | ast.Break | ast.Continue) or (isinstance(node, ast.Return) and is_nested)


# ------------------------------------------------------------------------------------------------------------- tests


def tests_of(path: Path, root: Path) -> list[str]:
    """Return the files with tests for a module, in the order in which they run; first its own doctests."""
    module = ".".join(path.with_suffix("").parts).removesuffix(".__init__")
    package, _, name = module.rpartition(".")
    folder = Path("tests", *path.parts[1:-1])
    while not (root / folder).is_dir():
        folder = folder.parent
    mention = re.compile(rf"{re.escape(module)}\b|from {re.escape(package)} import (\([^)]*|[^\n]*)\b{name}\b")
    own, beside, others = [], [], []
    for file in sorted(root.glob("tests/**/test_*.py"), key=lambda file: file.stat().st_size):
        relative = file.relative_to(root)
        if str(relative) in END_TO_END or relative.parts[1] == "faults":
            continue
        if relative.parent == folder or folder in relative.parents[:-2]:
            (own if file.stem == f"test_{name}" else beside).append(str(relative))
        elif mention.search(file.read_text()):
            others.append(str(relative))
    return [str(path), *own, *beside, *others, *END_TO_END]


class Copy:
    """A copy of the repository in which one mutant at a time is tested."""

    def __init__(self, folder: Path, of: Path, longest: float, baseline: dict[str, float | None]) -> None:
        self.folder, self.longest = folder, longest
        shutil.copytree(of, folder, ignore=NOT_COPIED, symlinks=True)
        self._writes = 0
        self._baseline = baseline

    def sources(self, only: str) -> dict[Path, bytes]:
        """The files of the package whose path starts with `only`."""
        files = sorted(self.folder.glob("distdl/**/*.py"))
        sources = {file.relative_to(self.folder): file.read_bytes() for file in files}
        return {path: source for path, source in sources.items() if str(path).startswith(only)}

    def test(self, mutant: Mutant) -> tuple[str, str]:
        """Return "killed", "timed out" or "survived", and the test file that decided."""
        source = (self.folder / mutant.path).read_bytes()
        for file in tests_of(mutant.path, self.folder):
            limit = self.seconds_of(file)
            if limit is None:
                continue
            self._write(mutant.path, mutant.apply(source))
            try:
                code = self._run(file, FACTOR * limit + SECONDS_MORE)
            finally:
                self._write(mutant.path, source)
            if code is None:
                return "timed out", file
            if code:
                return "killed", file
        return "survived", ""

    def seconds_of(self, file: str) -> float | None:
        """Return the time of a test file without a mutant; None if it fails, takes too long, or has no test to run."""
        if file not in self._baseline:
            started = time.monotonic()
            code = self._run(file, self.longest)
            self._baseline[file] = time.monotonic() - started if code == 0 else None
            if code not in {0, 5}:
                reason = f"takes over {self.longest:.0f} s" if code is None else "fails without a mutant"
                print(f"{file} {reason} and is left out", flush=True)
        return self._baseline[file]

    def _write(self, path: Path, content: bytes) -> None:
        """Write a file with a unique time. Otherwise Python may use the compiled form of another mutant."""
        self._writes += 1
        (self.folder / path).write_bytes(content)
        os.utime(self.folder / path, (self._writes, self._writes))

    def _run(self, file: str, seconds: float) -> int | None:
        """Return the exit code of a test file; None if it does not end in time. No process of it remains."""
        mark = uuid.uuid4().hex
        # A mutant may send a signal to its parent process: that is the shell.
        shell = ["sh", "-c", '"$@"; exit "$?"', "sh"]
        command = [*shell, sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", file]
        process = subprocess.Popen(
            command,
            cwd=self.folder,
            env={**os.environ, "PYTHONPATH": str(self.folder), MARK: mark},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None
        finally:
            for entry in Path("/proc").glob("[0-9]*"):
                with suppress(OSError):
                    if f"{MARK}={mark}".encode() in (entry / "environ").read_bytes():
                        os.kill(int(entry.name), signal.SIGKILL)
            process.wait()


# --------------------------------------------------------------------------------------------------------------- run


def equivalent() -> set[str]:
    """Return the known equivalent mutants. A reason follows after #."""
    lines = EQUIVALENT.read_text().splitlines() if EQUIVALENT.is_file() else []
    return {line.partition("  # ")[0].strip() for line in lines if line.strip() and not line.startswith("#")}


def chosen(sources: Mapping[Path, bytes], count: int, seed: int) -> list[Mutant]:
    """Choose places at random, and one mutant of each place; leave out those known to be equivalent."""
    known, choice = equivalent(), random.Random(seed)
    places: dict[tuple[Path, int, int], list[Mutant]] = {}
    for path, source in sources.items():
        for mutant in mutants_of(path, source):
            if mutant.entry(source) not in known:
                places.setdefault((path, mutant.start, mutant.end), []).append(mutant)
    return [choice.choice(found) for found in choice.sample(list(places.values()), min(count, len(places)))]


def main() -> int:
    parser = argparse.ArgumentParser(description="Change the package at random places and check whether a test fails.")
    parser.add_argument("--count", type=int, default=200, help="mutants to test (200)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the choice of mutants (0)")
    parser.add_argument("--only", default="distdl", metavar="PATH", help="mutants of these files only (distdl)")
    parser.add_argument("--jobs", type=int, default=1, help="mutants at the same time, each in a separate copy (1)")
    parser.add_argument(
        "--longest", type=float, default=1800.0, help="leave out test files that take longer, in s (1800)"
    )
    parser.add_argument("--list", action="store_true", help="print the known equivalent mutants")
    arguments = parser.parse_args()
    if arguments.list:
        print(EQUIVALENT.read_text(), end="")
        return 0
    outcomes: dict[str, list[Mutant]] = {"killed": [], "timed out": [], "survived": []}
    with tempfile.TemporaryDirectory(prefix="distdl-mutants-") as folder:
        baseline: dict[str, float | None] = {}
        first, copies = Copy(Path(folder, "0"), REPOSITORY, arguments.longest, baseline), queue.Queue[Copy]()
        sources = first.sources(arguments.only.rstrip("/"))
        mutants = chosen(sources, arguments.count, arguments.seed)
        copies.put(first)
        for number in range(1, arguments.jobs):
            copies.put(Copy(Path(folder, f"{number}"), first.folder, arguments.longest, baseline))

        def test(mutant: Mutant) -> None:
            own = copies.get()
            started = time.monotonic()
            outcome, file = own.test(mutant)
            copies.put(own)
            outcomes[outcome].append(mutant)
            done, seconds = sum(map(len, outcomes.values())), time.monotonic() - started
            where = f"{mutant.path}:{mutant.line} {mutant.kind}"
            if outcome == "survived":
                where = f"{where}: {' -> '.join(mutant.changed_lines(sources[mutant.path]))}"
            print(f"[{done}/{len(mutants)}] {outcome:9} {where} ({file}, {seconds:.0f} s)", flush=True)

        with ThreadPoolExecutor(arguments.jobs) as pool:
            list(pool.map(test, mutants))
    for mutant in sorted(outcomes["survived"], key=lambda mutant: (mutant.path, mutant.line)):
        source = sources[mutant.path]
        print(f"\nsurvived: {mutant.entry(source)}\n{mutant.diff(source)}")
    counts = {outcome: len(found) for outcome, found in outcomes.items()}
    percent = 100 * (1 - counts["survived"] / len(mutants)) if mutants else 100.0
    print(f"\n{', '.join(f'{count} {outcome}' for outcome, count in counts.items())}: {percent:.1f} % detected")
    return 0


if __name__ == "__main__":
    sys.exit(main())
