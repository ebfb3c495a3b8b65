"""The options of `distdl.export`. This module does not import NumPy."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from distdl.inference.options import LoadOptions

Format = Literal["onnx", "pytorch", "npz"]


@dataclass(frozen=True, kw_only=True)
class ExportOptions(LoadOptions):
    """The flags of `distdl.export`."""

    run: Path
    """Run folder or checkpoint."""
    to: Format
    """Format to write: onnx, a file; pytorch, a folder with model.py and its weights; npz, a file of arrays."""
    out: Path | None = None
    """File to write, or for pytorch the folder; by default model.onnx, pytorch or model.npz in the run folder."""
    best: bool = False
    """Export the checkpoint with the best validation accuracy."""
