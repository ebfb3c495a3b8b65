"""Predict images, print a line for each, and write the requested files: the work of `distdl.predict`."""

from __future__ import annotations

import importlib
import io
import sys
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distdl.data.room import Room
from distdl.engine.console import Console
from distdl.engine.storage.files import check_output, indented_json, write_output
from distdl.errors import EXIT_DAMAGED, EXIT_USER, UserError, listed
from distdl.inference.inputs import Inputs, UnusedInput, find_inputs
from distdl.inference.load import Trained, load_without_data, refuse_unlike_members
from distdl.inference.options import PredictOptions, check_names
from distdl.inference.prediction import Block, predict
from distdl.inference.prediction_text import Lines, Prediction, prediction_json, prediction_of, predictions_csv
from distdl.job import streams
from distdl.parallel import guard, on_rank_0, together, world

#: Classes that a PNG file of one byte per pixel can hold.
MOST_MASK_CLASSES = 256
#: Names of skipped files that the warning lists.
MOST_NAMED = 5


def predict_images(options: PredictOptions) -> int:
    """Predict the images on all ranks; rank 0 prints and writes. Return the exit code. Collective.

    An image that cannot be used gets an error line, and the others are predicted. Then the exit code is 3 if a file
    is damaged, otherwise 2. Raises `UserError` for any other error.
    """
    check_names(options)
    if options.top < 1:
        raise UserError(f"--top must be at least 1, not {options.top}")
    communicator = world()
    with guard(communicator):
        on_rank_0(communicator, lambda: _check_outputs(options))
        members = load_without_data([options.run, *options.others], communicator, options, best=options.best)
        together(communicator, lambda: refuse_unlike_members(members))
        inputs = find_inputs(options.inputs, members[0].signature, communicator, Room(options.data_gigabytes))
        together(communicator, lambda: _check_masks(options, members[0], inputs))
        output = _Output(options, members, inputs)
        on_rank_0(communicator, output.introduce)
        for block in predict(members, inputs, communicator):
            output.unused += [one for _, one in block.unused]
            on_rank_0(communicator, partial(output.add, block))
        on_rank_0(communicator, output.finish)
    return output.exit_code


class _Output:
    """The results: lines at once, files at the end. Every rank has one; rank 0 prints and writes."""

    def __init__(self, options: PredictOptions, members: Sequence[Trained], inputs: Inputs) -> None:
        self._options, self._members, self._inputs = options, members, inputs
        self._signature, self._console = members[0].signature, Console(live=False)
        self._lines = Lines(self._signature, inputs.names, options.top)
        self._predictions: list[Prediction] = []
        self.unused: list[UnusedInput] = []

    @property
    def exit_code(self) -> int:
        """0 if every image has a prediction."""
        if not self.unused:
            return 0
        return EXIT_DAMAGED if any(one.is_damaged for one in self.unused) else EXIT_USER

    def introduce(self) -> None:
        """Print the warnings before the predictions."""
        for warning in (warning for one in self._members for warning in one.warnings):
            self._console.warning(warning)
        if skipped := self._inputs.skipped:
            names = listed(skipped, MOST_NAMED)
            self._console.warning(f"skipped, because the name is not that of an image: {names}")

    def add(self, block: Block) -> None:
        """Print the predictions of a block, and keep them for the files."""
        unused, lines = dict(block.unused), []
        for number, values in enumerate(block.values, block.start):
            if number in unused:
                streams.say_line(f"error: {unused[number].reason}")
                continue
            prediction = prediction_of(self._inputs.names[number], values, self._signature, self._options.top)
            lines.append(self._lines.of(prediction))
            if self._options.csv or self._options.json:
                self._predictions.append(prediction)
            if self._options.masks:
                write_output(_mask_of(self._options.masks, prediction.name), mask_png(values), "--masks")
        if lines:
            self._console.line("\n".join(lines))

    def finish(self) -> None:
        """Write the files."""
        options, signature = self._options, self._signature
        if options.csv:
            write_output(options.csv, predictions_csv(self._predictions, signature, options.top), "--csv")
        if options.json:
            values: dict[str, Any] = {
                "task": signature.task,
                "classes": None if signature.names is None else list(signature.names),
                "members": [
                    {
                        "run": str(one.given),
                        "checkpoint": str(one.path),
                        "step": one.step,
                        "model": one.config.model,
                        "weights_sha256": one.weights_sha256,
                    }
                    for one in self._members
                ],
                "predictions": [prediction_json(one, signature) for one in self._predictions],
                "errors": [{"file": one.name, "error": one.reason} for one in self.unused],
            }
            write_output(options.json, indented_json(values), "--json")
        if self.unused:
            streams.say_line(
                f"error: {len(self.unused)} of {len(self._inputs.names)} images have no prediction; the lines above "
                "name them"
            )
        if self._console.lost is not None:  # the predictions are the result of this command
            raise UserError(f"the predictions cannot be printed: {self._console.lost}; make room, or give --csv FILE")


def mask_png(classes: NDArray[np.uint16]) -> bytes:
    """Return a PNG file of the class of each pixel (H, W): its bytes are the classes, shown in distinct colours."""
    image_module = importlib.import_module("PIL.Image")
    image = image_module.fromarray(classes.astype(np.uint8), mode="L").convert("P")
    image.putdata(classes.astype(np.uint8).reshape(-1).tolist())
    image.putpalette([level for number in range(MOST_MASK_CLASSES) for level in _colour(number)])
    content = io.BytesIO()
    image.save(content, format="PNG")
    return content.getvalue()


def _colour(number: int) -> tuple[int, ...]:
    """Return the colour of a class: the bits of its number, as in the PASCAL VOC data; class 0 is black."""
    bits = [[number >> (3 * place + channel) & 1 for place in range(3)] for channel in range(3)]
    return tuple(sum(bit << (7 - place) for place, bit in enumerate(one)) for one in bits)


def _mask_of(folder: Path, name: str) -> Path:
    return folder / f"{Path(name).stem}.png"


def _check_outputs(options: PredictOptions) -> None:
    """Raise `UserError` if the predictions could not be printed or a file not be written, before any work."""
    if streams.was_closed(sys.stdout) and not (options.csv or options.json or options.masks):
        raise UserError("the predictions cannot be printed: standard output is closed; open it, or give --csv FILE")
    for path, flag in ((options.csv, "--csv"), (options.json, "--json")):
        if path is not None:
            check_output(path, flag)
    if options.csv is not None and options.csv == options.json:
        raise UserError(f"--csv and --json name the same file {options.csv}: give two names")
    if options.masks is not None:
        if options.masks.exists() and not options.masks.is_dir():
            raise UserError(f"--masks {options.masks} is not a folder: give the name of a folder")
        check_output(options.masks / "0.png", "--masks")


def _check_masks(options: PredictOptions, one: Trained, inputs: Inputs) -> None:
    """Raise `UserError` if `--masks` does not fit the network or the images."""
    if options.masks is None:
        return
    if one.signature.task != "segmentation" or one.signature.outputs > MOST_MASK_CLASSES:
        raise UserError(
            f"--masks is for networks that label pixels, in up to {MOST_MASK_CLASSES} classes: {one.given} is for "
            f"{one.signature.task} with {one.signature.outputs} outputs; leave the flag out"
        )
    name, times = Counter(_mask_of(options.masks, name).name for name in inputs.names).most_common(1)[0]
    if times > 1:
        raise UserError(f"--masks: {times} images would get the mask {name}: give them different names")
    importlib.import_module("distdl.data.sources.images").pillow()
