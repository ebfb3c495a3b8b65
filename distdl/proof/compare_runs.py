"""Compare two runs and print the result: the work of `distdl.compare`."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distdl.config import BEFORE_THE_SETTING, FIELDS, FREE_TO_CHANGE_ON_RESUME, RENAMED, flag_of
from distdl.engine.console import Console
from distdl.engine.fingerprint import first_difference as first_operation
from distdl.engine.recorded import Comparison, Difference, Recorded, compare_records, contradictions, settings_in
from distdl.engine.storage.header import CheckpointHeader
from distdl.errors import EXIT_DIFFERENT, UserError, counted, listed
from distdl.inference.load import user_code_flags
from distdl.proof import replay_files

#: Names of steps in a line.
MOST_STEPS = 6


def compare(one: Path, other: Path) -> int:
    """Compare two run folders, or two files of `distdl.replay`, and print the result; return the exit code."""
    console = Console(live=False)
    if one.is_file() or other.is_file():
        return _compare_files(one, other, console)
    runs = Recorded.read(one), Recorded.read(other)
    if one.resolve() == other.resolve():
        raise UserError(f"{one} and {other} are the same folder: give two runs")
    for complaint in [*contradictions(runs[0]), *contradictions(runs[1])]:
        console.warning(complaint)
    found = compare_records(*runs)
    for line in [*lines_of(found, *runs), *lines_of_facts(*runs, is_equal=found.difference is None)]:
        console.line(line)
    return 0 if found.difference is None and found.lasts[0] == found.lasts[1] else EXIT_DIFFERENT


# --------------------------------------------------------------------------------------------------------------- lines


def lines_of(found: Comparison, one: Recorded, other: Recorded) -> list[str]:
    """Return the lines about the bits."""
    lines = [
        f"1: {one.folder} ({counted(found.lasts[0], 'step')})",
        f"2: {other.folder} ({counted(found.lasts[1], 'step')})",
    ]
    if found.difference is not None:
        return [*lines, *_lines_of_difference(found, found.difference, one, other)]
    shortest, longest = sorted(found.lasts)
    if shortest == longest:
        lines.append(f"equal bit for bit: every record that both runs have, and all tensors after step {shortest}")
    else:
        ends = 1 + found.lasts.index(shortest)
        lines.append(f"equal up to step {shortest}, where run {ends} ends; the other one has {longest} steps")
    lines.append(_what_was_compared(found))
    if one.summary is not None and "receipts" in found.compared:
        lines.append(f"weights sha256: {one.summary['weights_sha256']}")
    return lines


def _lines_of_difference(found: Comparison, difference: Difference, one: Recorded, other: Recorded) -> list[str]:
    lines = [f"DIFFERENT, first at {difference}"]
    if difference.others:
        lines.append(f"in step {difference.step}: {difference.others}")
    if difference.tensor is not None and difference.element is None and "hash" in difference.one:
        lines.append("the element is unknown: at least one of the runs has no checkpoint after this step")
    before = found.last_equal_state
    equal = "no state before it was compared" if before is None else f"all tensors are equal after step {before}"
    gap = difference.step - (before or 0)
    between = "the step between was" if gap == 2 else f"the {gap - 1} steps between were"
    lines.append(equal + (f"; {between} not recorded by both" if gap > 1 else ""))
    lines.append(_what_was_compared(found))
    lines.append("to look inside this step, on both sides:")
    files = []
    for run in (one, other):
        words = ["python", "-m", "distdl.replay", str(run.folder), "--step", str(difference.step)]
        lines.append(f"  {shlex.join([*words, '--micro-batch', '0'])}{_user_code_of(run)}")
        files.append(str(replay_files.path_of(run.folder, difference.step, 0)))
    return [*lines, f"  {shlex.join(['python', '-m', 'distdl.compare', *files])}"]


def _user_code_of(run: Recorded) -> str:
    """Return the flags that a command needs for the user code of a run, after a space."""
    settings = _settings(run, run.header())
    names = [settings.get(name, FIELDS[name].default) for name in ("model", "dataset")]
    flags = user_code_flags(*map(str, names))
    return f" {flags}" if flags else ""


def _what_was_compared(found: Comparison) -> str:
    """Return the line that lists the compared records."""
    compared = found.compared
    parts = [
        f"{counted(len(compared[kind]), what)} in {file}"
        for kind, what, file in (
            ("step", "step", "metrics.jsonl"),
            ("epoch", "epoch", "metrics.jsonl"),
            ("hashes", "step", "hashes.jsonl"),
        )
        if kind in compared
    ]
    if "tensors" in compared:
        steps = listed([str(step) for step in compared["tensors"]], MOST_STEPS)
        parts.append(f"{counted(len(compared['tensors']), 'checkpoint')} (after step {steps})")
    parts += [name for kind, name in (("test", "the test scores"), ("receipts", "the receipts")) if kind in compared]
    return f"compared: {', '.join(parts)}"


# --------------------------------------------------------------------------------------------------------------- facts


def lines_of_facts(one: Recorded, other: Recorded, *, is_equal: bool) -> list[str]:
    """Return the lines about differences in data, settings, versions and machines."""
    headers = one.header(), other.header()
    facts = [_facts_of(run, header) for run, header in zip((one, other), headers, strict=True)]
    lines = [
        f"  {name}: {facts[0].get(name, 'unknown')} | {facts[1].get(name, 'unknown')}"
        for name in facts[0] | facts[1]
        if facts[0].get(name) != facts[1].get(name)
    ]
    lines += [
        f"  {line}"
        for line in _lines_of_fingerprints(
            one, other, headers, is_alone=not any(line.startswith(("  --", "  data")) for line in lines)
        )
    ]
    if not lines:
        return ["settings, data, versions and machines are the same"]
    heading = (
        "differences that changed no bit:" if is_equal else "differences in settings, data, versions and machines:"
    )
    return [heading, *lines]


def _facts_of(run: Recorded, header: CheckpointHeader | None) -> dict[str, str]:
    """Return everything that bits could depend on, by its name for the user; first what should determine them."""
    environment = run.environment
    versions = environment.get("versions") or (header.versions if header is not None else {})
    settings = {
        **{name: field.default for name, field in FIELDS.items()},
        **BEFORE_THE_SETTING,
        **{RENAMED.get(name, name): value for name, value in _settings(run, header).items()},
    }
    facts = {} if header is None else {"data sha256": header.data_sha256}
    facts |= {flag_of(name): repr(value) for name, value in settings.items() if name not in FREE_TO_CHANGE_ON_RESUME}
    facts |= {flag_of(name): repr(value) for name, value in settings.items() if name in _SHOWN_FREE}
    facts |= {f"version of {name}": version for name, version in versions.items()}
    facts |= {
        name.replace("_", " "): ", ".join(map(str, value)) if isinstance(value, list) else str(value)
        for name in ("kernel_families", "ranks", "communicator", "machine", "system")
        if (value := environment.get(name)) is not None
    }
    if hosts := environment.get("hosts"):
        facts["hosts"] = listed(list(hosts), MOST_STEPS)
    return facts


#: Settings that a resume may change, and that a reader wants to see. Bits should not depend on them, except on threads.
_SHOWN_FREE = ("epochs", "max_steps", "threads_per_rank", "on_nonfinite", "early_stopping", "balance")


def _settings(run: Recorded, header: CheckpointHeader | None) -> Mapping[str, Any]:
    """Return the settings in ``config.toml``, or without that file those in the newest checkpoint."""
    path = run.folder / "config.toml"
    if not path.is_file():
        return {} if header is None else header.config
    return settings_in(path)


def _lines_of_fingerprints(
    one: Recorded,
    other: Recorded,
    headers: tuple[CheckpointHeader | None, CheckpointHeader | None],
    *,
    is_alone: bool,
) -> list[str]:
    """Return the line about the fingerprints, which samples of settings and data are part of."""
    ours, theirs = (
        run.environment.get("fingerprint") or (header.fingerprint if header is not None else None)
        for run, header in zip((one, other), headers, strict=True)
    )
    if not ours or not theirs:
        return []
    name = first_operation(ours, theirs)
    if name is None:
        return []
    common = ours.keys() & theirs.keys()
    number = sum(ours[operation] != theirs[operation] for operation in common)
    note = "" if is_alone else "; some operations use settings and data"
    return [
        f"fingerprint: {number} of {len(common)} operations differ, first {name}: {ours[name]} | {theirs[name]}{note}"
    ]


def _compare_files(one: Path, other: Path, console: Console) -> int:
    """Compare two files of `distdl.replay`."""
    difference, count = replay_files.compare(one, other)
    if difference is None:
        console.line(f"equal: the same bits in {counted(count, 'array')}")
        return 0
    console.line(f"DIFFERENT, first in {difference}")
    return EXIT_DIFFERENT
