"""The records of a run folder, and the first place at which two runs differ.

A run records its losses and scores (``metrics.jsonl``), with ``--record-hashes`` the hash of each tensor after each
step (``hashes.jsonl``), and all tensors after some steps (``checkpoints/``). `Recorded` reads them and never writes.
`first_difference` compares what two sides know about one step; a side is a run folder, or a run that is computed again.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distdl.arrays import sha256_of_arrays
from distdl.config import TrainConfig, differences
from distdl.engine.storage import checkpoints
from distdl.engine.storage.checkpoints import FoundCheckpoint
from distdl.engine.storage.header import CheckpointHeader
from distdl.engine.storage.restoring import described
from distdl.engine.storage.run_folder import refuse_links
from distdl.errors import DamagedFileError, UserError
from distdl.json_files import read_json, read_json_lines
from distdl.regular_files import read_regular

Tensors = Mapping[str, NDArray[Any]]
#: The digits of a hash in ``hashes.jsonl``.
HASH_DIGITS = 16
#: A record of ``metrics.jsonl`` belongs to a step, to an epoch, or to the test part.
KINDS = ("step", "epoch", "test")
#: The sums of the epoch. A checkpoint at the end of an epoch has them cleared, ``hashes.jsonl`` not yet.
EPOCH_SUMS = "epoch."

_METRICS = {"step": int}
_HASHES = {"step": int, "hashes": {str: str}, "loss?": float | None}
_SUMMARY = {"steps": int, "weights_sha256": str, "state_sha256": str}
_ENVIRONMENT = {
    "versions?": {str: str},
    "fingerprint?": {str: str},
    **dict.fromkeys(("kernels?", "communicator?", "machine?", "system?"), str),
    "kernel_families?": [str],
    "ranks?": int,
    "hosts?": {str: int},
}


def check_run_folder(folder: Path) -> None:
    """Raise `UserError` unless the path is a folder."""
    if not folder.is_dir():
        what = "is not a folder" if folder.exists() else "does not exist"
        raise UserError(f"{folder} {what}: expected the run folder of a training")


def hash_of(name: str, array: NDArray[Any]) -> str:
    """Return the hash of a tensor as ``hashes.jsonl`` has it."""
    return sha256_of_arrays([(name, array)])[:HASH_DIGITS]


@dataclass(frozen=True)
class StepRecord:
    """What one side knows about a step."""

    step: int
    metrics: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """The records of ``metrics.jsonl``, by kind."""
    hashes: Mapping[str, str] = field(default_factory=dict)
    """The hash of each tensor after the step, in the order of the state."""
    loss: float | None = None
    """The loss in the record of the hashes."""
    tensors: Callable[[], Tensors] | None = None
    """Returns the tensors of the checkpoint after the step, if there is one."""


@dataclass(frozen=True)
class Difference:
    """The first place at which two sides differ."""

    step: int
    what: str
    """The place, for the user: the tensor and element, or the record of the metrics."""
    one: str
    other: str
    tensor: str | None = None
    element: tuple[int, ...] | None = None
    """The index of the first element of the tensor that differs; None if a side has only the hash of the tensor."""
    others: str = ""
    """What else differs in this step."""

    def __str__(self) -> str:
        return f"step {self.step}, {self.what}: {self.one} | {self.other}"


@dataclass(frozen=True)
class Recorded:
    """The records of a run folder."""

    folder: Path
    metrics: Mapping[tuple[int, str], Mapping[str, Any]]
    hashes: Mapping[int, Mapping[str, Any]]
    checkpoint_steps: Sequence[int]
    environment: Mapping[str, Any]
    summary: Mapping[str, Any] | None

    @classmethod
    def read(cls, folder: Path) -> Recorded:
        """Return the records of a run folder.

        Raises `UserError` if it is not a run folder, `DamagedFileError` if a file is damaged. Checkpoints are read when
        needed.
        """
        check_run_folder(folder)
        refuse_links(folder)

        def found(name: str) -> Path | None:
            return folder / name if (folder / name).is_file() else None

        lines = {name: found(f"{name}.jsonl") for name in ("metrics", "hashes")}
        metrics = [] if lines["metrics"] is None else read_json_lines(lines["metrics"], _METRICS)
        hashes = [] if lines["hashes"] is None else read_json_lines(lines["hashes"], _HASHES)
        env, summary = found("env.json"), found("summary.json")
        one = cls(
            folder,
            {(record["step"], kind_of(record)): record for record in metrics},
            {record["step"]: record for record in hashes},
            checkpoints.steps_in(folder / "checkpoints"),
            {} if env is None else read_json(env, _ENVIRONMENT),
            None if summary is None else read_json(summary, _SUMMARY),
        )
        if not one.steps:
            raise UserError(f"{folder} has no metrics.jsonl, hashes.jsonl or checkpoint: expected a run folder")
        return one

    @property
    def steps(self) -> list[int]:
        """The steps that the run has records of, ascending."""
        return sorted({*(step for step, _ in self.metrics), *self.hashes, *self.checkpoint_steps})

    def checkpoint(self, step: int) -> FoundCheckpoint:
        """Return the checkpoint after a step; raise `DamagedFileError` if it is damaged."""
        path = checkpoints.path_of_step(self.folder / "checkpoints", step)
        return FoundCheckpoint(path, checkpoints.read(path, follow=False), [])

    def header(self, step: int | None = None) -> CheckpointHeader | None:
        """Return the header of the checkpoint after a step, by default of the newest one; None without a checkpoint."""
        if step is None and not self.checkpoint_steps:
            return None
        return self.checkpoint(self.checkpoint_steps[-1] if step is None else step).header()

    def at(self, step: int) -> StepRecord:
        """Return the records of a step."""
        hashed = self.hashes.get(step, {})
        is_saved = step in self.checkpoint_steps
        return StepRecord(
            step,
            {kind: self.metrics[step, kind] for kind in KINDS if (step, kind) in self.metrics},
            hashed.get("hashes", {}),
            hashed.get("loss"),
            partial(self._tensors, step) if is_saved else None,
        )

    def _tensors(self, step: int) -> Tensors:
        return self.checkpoint(step).checkpoint.tensors


def kind_of(record: Mapping[str, Any]) -> str:
    """Return what a record of ``metrics.jsonl`` belongs to: one of `KINDS`."""
    return next(
        (kind for kind, name in (("test", "test_loss"), ("epoch", "validation_loss")) if name in record), "step"
    )


def compared_in(one: StepRecord, other: StepRecord) -> list[str]:
    """Return which records of a step both sides have: kinds of metrics, ``hashes`` and ``tensors``."""
    both = [kind for kind in KINDS if kind in one.metrics and kind in other.metrics]
    both += ["hashes"] if one.hashes and other.hashes else []
    return both + (["tensors"] if one.tensors is not None and other.tensors is not None else [])


def first_difference(one: StepRecord, other: StepRecord) -> Difference | None:
    """Return the first difference between two records of a step, in the order in which a step computes; None if none.

    The loss comes from the forward pass. So if tensors differ, they are the place, and `Difference.others` tells
    whether the loss was still equal.
    """
    tensors = list(_tensors_that_differ(one, other))
    loss = _metrics_that_differ(one, other, "step")
    if tensors:
        name, element, ours, theirs = tensors[0]
        where = "" if element is None else f", element {shown_index(element)}"
        more = f"{len(tensors) - 1} more of its tensors differ" if len(tensors) > 1 else "no other tensor differs"
        known = "step" in compared_in(one, other) or (one.loss is not None and other.loss is not None)
        of_loss = "; its loss differs too" if loss else "; its loss is equal" if known else ""
        return Difference(one.step, f"tensor {name}{where}", ours, theirs, name, element, more + of_loss)
    for kind in KINDS:
        for name, ours, theirs in _metrics_that_differ(one, other, kind):
            return Difference(one.step, f"{name} in metrics.jsonl", ours, theirs)
    return None


def _metrics_that_differ(one: StepRecord, other: StepRecord, kind: str) -> list[tuple[str, str, str]]:
    """Return name and values of the metrics of one kind that differ."""
    ours, theirs = dict(one.metrics.get(kind, {})), dict(other.metrics.get(kind, {}))
    if not (ours and theirs):
        if kind != "step" or one.loss is None or other.loss is None:
            return []
        ours, theirs = {"loss": one.loss}, {"loss": other.loss}
    pairs = [(name, json.dumps(ours.get(name)), json.dumps(theirs.get(name))) for name in ours | theirs]
    return [(name, first, second) for name, first, second in pairs if first != second]


def _tensors_that_differ(one: StepRecord, other: StepRecord) -> Iterator[tuple[str, tuple[int, ...] | None, str, str]]:
    """Yield the name of each tensor that differs, its first element that differs, if it is known, and the values."""
    left = dict(one.tensors()) if one.tensors is not None and other.tensors is not None else {}
    right = dict(other.tensors()) if left and other.tensors is not None else {}
    hashed = {**one.hashes, **other.hashes} if one.hashes and other.hashes else {}
    for name in [*hashed, *sorted((left | right).keys() - hashed.keys(), key=_place)]:
        if name in left or name in right:
            found = first_element(left.get(name), right.get(name))
            if found is not None:
                yield name, *found
                continue
        ours, theirs = one.hashes.get(name, "absent"), other.hashes.get(name, "absent")
        if name in hashed and ours != theirs:
            yield name, None, f"hash {ours}", f"hash {theirs}"


def _place(name: str) -> tuple[int, str]:
    """Return the place of a tensor whose order is unknown: parameters, vectors of the optimizer, sums."""
    return (2 if name == "step" or name.startswith(EPOCH_SUMS) else 1 if "/" in name else 0), name


def first_element(
    one: NDArray[Any] | None, other: NDArray[Any] | None
) -> tuple[tuple[int, ...] | None, str, str] | None:
    """Return the index of the first element whose bits differ and both values; None if all bits are equal.

    Without an index the shapes or dtypes differ.

    >>> first_element(np.array([[1.0, 2.0]], np.float32), np.array([[1.0, 2.5]], np.float32))
    ((0, 1), '2 (0x40000000)', '2.5 (0x40200000), bit 21 differs')
    """
    if one is None or other is None or one.shape != other.shape or one.dtype != other.dtype:
        return None, described(one), described(other)
    ours, theirs = (_words(array) for array in (one, other))
    different = np.flatnonzero(ours != theirs)
    if not different.size:
        return None
    place = int(different[0])
    bits = int(ours[place]) ^ int(theirs[place])
    flipped = f", bit {bits.bit_length() - 1} differs" if bits.bit_count() == 1 else ""
    index = tuple(int(n) for n in np.unravel_index(place, one.shape))
    return index, _shown(one, ours, place), _shown(other, theirs, place) + flipped


def _words(array: NDArray[Any]) -> NDArray[Any]:
    """Return the bits of the elements as unsigned integers."""
    flat = np.ascontiguousarray(array).reshape(-1)
    return flat.view(np.dtype(f"u{array.dtype.itemsize}"))


def _shown(array: NDArray[Any], words: NDArray[Any], place: int) -> str:
    value, digits = array.reshape(-1)[place], 2 * array.dtype.itemsize
    text = f"{value:.{9 if digits == 8 else 17}g}" if array.dtype.kind == "f" else str(value)
    return f"{text} (0x{int(words[place]):0{digits}x})"


def shown_index(element: tuple[int, ...]) -> str:
    """Return an index as text.

    >>> shown_index((0, 2)), shown_index((7,))
    ('(0, 2)', '[7]')
    """
    text = ", ".join(map(str, element))
    return f"({text})" if len(element) > 1 else f"[{text}]"


# ------------------------------------------------------------------------------------------------ two whole runs


@dataclass(frozen=True)
class Comparison:
    """The result of comparing the records of two runs, step by step."""

    difference: Difference | None
    compared: Mapping[str, Sequence[int]]
    """By kind of record, the steps at which both runs have it, up to the first difference."""
    lasts: tuple[int, int]
    """The last step of each run."""

    @property
    def last_equal_state(self) -> int | None:
        """The last step after which all tensors are known to be equal."""
        steps = {*self.compared.get("hashes", ()), *self.compared.get("tensors", ())}
        before = self.difference.step if self.difference is not None else None
        return max((step for step in steps if before is None or step < before), default=None)


def compare_records(one: Recorded, other: Recorded) -> Comparison:
    """Compare the records of all steps that both runs have; raise `UserError` if they cannot tell."""
    compared: dict[str, list[int]] = {}
    lasts = one.steps[-1], other.steps[-1]
    for step in sorted(set(one.steps) & set(other.steps)):
        left, right = one.at(step), other.at(step)
        for kind in compared_in(left, right):
            compared.setdefault(kind, []).append(step)
        difference = first_difference(left, right)
        if difference is not None:
            return Comparison(difference, compared, lasts)
    summaries = one.summary, other.summary
    difference = None
    if summaries[0] is not None and summaries[1] is not None and summaries[0]["steps"] == summaries[1]["steps"]:
        compared["receipts"] = [summaries[0]["steps"]]
        for name in ("weights_sha256", "state_sha256"):
            ours, theirs = summaries[0][name], summaries[1][name]
            if ours != theirs and difference is None:
                difference = Difference(summaries[0]["steps"], f"{name} in summary.json", ours, theirs)
    states = {step for kind in ("hashes", "tensors", "receipts") for step in compared.get(kind, ())}
    if difference is None and max(states, default=-1) < min(lasts):
        raise UserError(
            f"{one.folder} and {other.folder} show no difference, but have no state after the same last step: expected "
            "checkpoints, hashes.jsonl (--record-hashes) or a summary.json of both; resume the shorter run to step "
            f"{max(lasts)}, or train again with --record-hashes"
        )
    return Comparison(difference, compared, lasts)


# ------------------------------------------------------------------------------------------------- within one run


def contradictions(run: Recorded, steps: Iterable[int] | None = None) -> list[str]:
    """Return where the files of a run contradict each other: then one of them was changed after the training.

    Each of its checkpoints, or only those after `steps`, is compared with the logs and with ``config.toml``. Of each
    file the first contradiction is returned.
    """
    found: dict[str, str] = {}
    config_file = run.folder / "config.toml"
    settings: Mapping[str, Any] | None = None
    logs = {name: run.folder / f"{name}.jsonl" for name in ("metrics", "hashes")}
    contents = {name: read_regular(path) for name, path in logs.items() if path.is_file()}
    for step in run.checkpoint_steps if steps is None else steps:
        saved = run.checkpoint(step)
        header, tensors = saved.header(), saved.checkpoint.tensors
        if settings is None:
            settings = settings_in(config_file) if config_file.is_file() else {}
        if changes := differences(_config_of(config_file, settings, header), header.config):
            found.setdefault("config", f"{config_file} does not fit {saved.path}: {', '.join(changes)}")
        hashes = run.hashes.get(step, {}).get("hashes", {})
        for name in [one for one in hashes if one in tensors and not one.startswith(EPOCH_SUMS)]:
            if hash_of(name, tensors[name]) != hashes[name]:
                found[str(saved.path)] = f"{saved.path} has another {name} than hashes.jsonl after step {step}"
                break
        for name, expected in (header.log_sha256 or {}).items():
            content = contents.get(name)
            if content is not None and sha256(content[: header.log_bytes[name]]).hexdigest() != expected:
                found.setdefault(name, f"{logs[name]} was changed after the checkpoint after step {step}")
    return list(found.values())


def settings_in(path: Path) -> dict[str, Any]:
    """Return the settings in a ``config.toml``; raise `DamagedFileError`."""
    try:
        return tomllib.loads(read_regular(path).decode())
    except (ValueError, RecursionError, OSError) as error:
        raise DamagedFileError(f"{path} is damaged: {error}; restore it, or remove it") from None


def _config_of(path: Path, settings: Mapping[str, Any], header: CheckpointHeader) -> TrainConfig:
    """Return the config of the settings in a ``config.toml``; those that the file lacks are those of a checkpoint."""
    try:
        return TrainConfig.from_json({**header.config, **settings})
    except (LookupError, TypeError, UserError) as error:
        raise DamagedFileError(f"{path} is damaged: {error}; restore it, or remove it") from None
