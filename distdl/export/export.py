"""Export a trained network and check the result: the work of `distdl.export`."""

from __future__ import annotations

from pathlib import Path

from distdl.config import run_folder_of
from distdl.engine.console import Console
from distdl.engine.storage.files import check_output, try_folder, write_output, write_outputs
from distdl.errors import UserError
from distdl.export.npz_file import npz_file
from distdl.export.onnx_file import import_onnx, onnx_file
from distdl.export.onnx_verification import verified
from distdl.export.options import ExportOptions
from distdl.export.pytorch_files import pytorch_files
from distdl.inference.load import Trained, load_without_data
from distdl.inference.options import check_names
from distdl.parallel import guard, on_rank_0, world

#: The default names in the run folder.
NAMES = {"onnx": "model.onnx", "pytorch": "pytorch", "npz": "model.npz"}


def export(options: ExportOptions) -> None:
    """Export the network of a run; rank 0 writes. Collective.

    Raises `UserError`, and `DistdlError` if the ONNX file computes other outputs; then nothing is written.
    """
    check_names(options)
    communicator, out = world(), options.out or _place(options.run) / NAMES[options.to]
    with guard(communicator):
        on_rank_0(communicator, lambda: _check(options, out))
        (trained,) = load_without_data([options.run], communicator, options, best=options.best)
        on_rank_0(communicator, lambda: _export(options, trained, out))


def _place(run: Path) -> Path:
    """Return the run folder, or for a checkpoint outside of a run folder its own folder."""
    return run_folder_of(run) or run.parent


def _check(options: ExportOptions, out: Path) -> None:
    """Raise `UserError` if the result could not be written, before the work."""
    if options.to == "onnx":
        import_onnx()
    if options.to != "pytorch":
        suffix = Path(NAMES[options.to]).suffix
        if out.suffix.lower() != suffix:
            raise UserError(f"--out {out}: expected a name that ends in {suffix}, as --to {options.to} writes")
        check_output(out, "--out")
        return
    try:
        if out.exists() and not out.is_dir():
            raise UserError(f"--out {out} is a file, and --to pytorch writes a folder: give another name")
        try_folder(out)
    except OSError as error:
        raise UserError(f"--out {out} cannot be written: {error.strerror}; give another folder") from None


def _export(options: ExportOptions, trained: Trained, out: Path) -> None:
    """Write the files and say so."""
    console = Console(live=False)
    for warning in trained.warnings:
        console.warning(warning)
    lines = []
    if options.to == "onnx":
        content = onnx_file(trained)
        lines = [verified(trained, content)]
        write_output(out, content, "--out")
    elif options.to == "npz":
        write_output(out, npz_file(trained), "--out")
    else:
        write_outputs(out, pytorch_files(trained), "--out")
    parameters = f"{trained.network.parameter_count:,} parameters"
    console.line(f"wrote {out}: {trained.config.model} after step {trained.step:,}, {parameters}")
    for line in [*lines, f"weights sha256: {trained.weights_sha256}"]:
        console.line(line)
