"""The header of a checkpoint, typed and checked: everything in the file except the tensors.

Anyone can write a file with a valid checksum. So `CheckpointHeader.parse`, the only reader of headers, trusts nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, get_args, get_origin, get_type_hints

from numpy.typing import NDArray

from distdl.data.signature import Signature
from distdl.engine.storage.files import LOGS
from distdl.errors import DamagedFileError

#: Fields of the progress that earlier versions did not have, with their values then.
ADDED_LATER = {"skipped_steps": 0, "plateau_cuts": 0, "test_step": None}


@dataclass
class RunProgress:
    """The values that a run reports. Only `skipped_steps` and `plateau_cuts` affect later weights."""

    train_loss: float | None = None
    validation_loss: float | None = None
    validation_accuracy: float | None = None
    best_step: int | None = None
    train_seconds: float = 0.0
    best_score: float | None = None
    """None until there is a best step."""
    skipped_steps: int = 0
    plateau_cuts: int = 0
    """How often the plateau schedule has reduced the learning rate."""
    test_step: int | None = None
    """The step of the weights that the test part was scored with."""

    def to_json(self) -> dict[str, Any]:
        """Return the values; the best score only if there is a best step, later fields only if they have a value.

        >>> RunProgress().to_json()["best_step"], RunProgress(best_step=3, best_score=0.5).to_json()["best_score"]
        (None, 0.5)
        """
        absent = {name for name, without in ADDED_LATER.items() if getattr(self, name) == without}
        absent |= {"best_score"} if self.best_step is None else set()
        return {name: value for name, value in asdict(self).items() if name not in absent}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> RunProgress:
        """Return the progress that `to_json` gave; raise `ValueError` for a missing value or another type."""
        given = {**ADDED_LATER, **values}
        if given.get("best_step") is None:
            given["best_score"] = None
        types = _types(cls)
        for name, allowed in types.items():
            if name not in given or type(given[name]) not in allowed:
                raise ValueError(f"{name} is missing or of another type")
        if given["best_step"] is not None and given["best_score"] is None:
            raise ValueError("there is a best step, but no best score")
        return cls(**{name: given[name] for name in types})


@dataclass(frozen=True)
class CheckpointHeader:
    """All that a run needs from a checkpoint in addition to the tensors."""

    step: int
    config: dict[str, Any]
    """The settings, as `TrainConfig.to_json` returns them; another version may have other settings."""
    progress: RunProgress
    log_bytes: dict[str, int]
    """The length of each log at this step."""
    data_sha256: str
    versions: dict[str, str]
    kernel_family: str
    signature: Signature | None = None
    """None in a checkpoint of a version that did not store it; so are the fingerprint and the hashes."""
    fingerprint: dict[str, str] | None = None
    log_sha256: dict[str, str] | None = None
    """The hash of each log at this step."""

    def to_json(self) -> dict[str, Any]:
        """Return the header as a checkpoint stores it. Its progress is a copy."""
        values = {name: value for name, value in vars(self).items() if value is not None}
        signature = {} if self.signature is None else {"signature": self.signature.to_json()}
        return values | {"progress": self.progress.to_json()} | signature

    @classmethod
    def parse(cls, raw: Any, path: Path | str, tensors: Mapping[str, NDArray[Any]] | None = None) -> CheckpointHeader:
        """Return the header of the checkpoint at `path`; raise `DamagedFileError` if a field cannot be used.

        If the `tensors` are given, the header must agree with them about the step.
        """

        def damaged(name: str) -> DamagedFileError:
            return DamagedFileError(f"{path} is damaged: its header has no {name!r} that distdl can use")

        later = dict.fromkeys(("signature", "fingerprint", "log_sha256"), (dict, NoneType))
        types = _types(cls) | {"progress": (dict,)} | later
        raw = {**dict.fromkeys(later), **raw} if isinstance(raw, dict) else raw
        for name, allowed in types.items():
            if not isinstance(raw, dict) or type(raw.get(name)) not in allowed:
                raise damaged(name)
        try:
            progress = RunProgress.from_json(raw["progress"])
        except ValueError:
            raise damaged("progress") from None
        try:
            signature = None if raw["signature"] is None else Signature.from_json(raw["signature"])
        except ValueError:
            raise damaged("signature") from None
        header = cls(**{name: raw[name] for name in types} | {"progress": progress, "signature": signature})
        step = header.step
        counts = (progress.best_step or 0, progress.skipped_steps, progress.plateau_cuts, progress.test_step or 0)
        valid = {
            "step": step >= 0 and (tensors is None or "step" not in tensors or tensors["step"].tolist() == [step]),
            "log_bytes": all(name in LOGS and type(n) is int and n >= 0 for name, n in header.log_bytes.items()),
            "versions": all(isinstance(version, str) for version in header.versions.values()),
            "fingerprint": all(isinstance(digest, str) for digest in (header.fingerprint or {}).values()),
            "log_sha256": all(isinstance(digest, str) for digest in (header.log_sha256 or {}).values()),
            "progress": all(0 <= count <= step for count in counts),
        }
        if wrong := [name for name, holds in valid.items() if not holds]:
            raise damaged(wrong[0])
        return header


def _types(cls: type) -> dict[str, tuple[type, ...]]:
    """Return the types that each field of a dataclass may have in JSON."""
    hints = get_type_hints(cls).items()
    return {
        name: get_args(hint) if isinstance(hint, UnionType) else (get_origin(hint) or hint,) for name, hint in hints
    }
