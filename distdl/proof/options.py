"""The options of the commands about proof. This module does not import NumPy."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from distdl.inference.options import LoadOptions


@dataclass(frozen=True, kw_only=True)
class CompareOptions:
    """The flags of `distdl.compare`."""

    runs: tuple[Path, ...]
    """Two run folders, or two files that distdl.replay has written."""


@dataclass(frozen=True, kw_only=True)
class ReplayOptions(LoadOptions):
    """The flags of `distdl.replay`."""

    run: Path
    """Run folder."""
    step: int
    """Step to take again, counted from 1 as in metrics.jsonl; also the step after the last one, at which a run has
    failed."""
    micro_batch: int | None = None
    """Micro-batch to look into, counted from 0; by default the one with the greatest loss."""
    layer: str | None = None
    """Write and draw the arrays of this layer only, such as conv2d_1."""
    out: Path | None = None
    """File to write; by default replay-step-….npz in the run folder. The picture is written next to it, as .png."""


@dataclass(frozen=True, kw_only=True)
class AuditOptions(LoadOptions):
    """The flags of `distdl.audit`."""

    run: Path
    """Run folder."""
    fraction: float = 0.1
    """Share of the stretches between checkpoints to compute again, above 0 and at most 1."""
    seed: int | None = None
    """Number that chooses the stretches, to repeat an audit; by default nobody can foresee the choice."""
