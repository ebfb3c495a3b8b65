"""A trained network for scripts: `distdl.load` returns a `Model`.

N images or samples, H height, W width, C channels, K outputs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distdl.config import TrainConfig
from distdl.data import Dataset
from distdl.data.image_shapes import canonical_images
from distdl.data.labels import Unfit
from distdl.engine.console import Console
from distdl.engine.user_code import BuildNetwork
from distdl.errors import UserError
from distdl.inference.fit import fitted, fitted_labels, with_test_part
from distdl.inference.inputs import ImageArray
from distdl.inference.load import Trained, load
from distdl.inference.prediction import predict
from distdl.inference.score import Score, evaluate
from distdl.nn import Sequential
from distdl.parallel import Communicator, guard, on_rank_0, present, share_arrays, together, world


class Model:
    """A trained network with the facts of its checkpoint. Its methods are collective, and return the same on all ranks.

    The bits of a prediction do not depend on the number of ranks.
    """

    def __init__(self, trained: Trained, communicator: Communicator) -> None:
        self._trained = trained
        self._communicator = communicator

    @property
    def network(self) -> Sequential:
        """The network; it takes images that are normalized as in the training."""
        return self._trained.network

    @property
    def config(self) -> TrainConfig:
        """The settings of the training."""
        return self._trained.config

    @property
    def receipt(self) -> str:
        """The sha256 of the weights."""
        return self._trained.weights_sha256

    @property
    def step(self) -> int:
        """The step of the weights."""
        return self._trained.step

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Height, width and channels of an image."""
        return self._trained.signature.image_shape

    @property
    def class_names(self) -> tuple[str, ...]:
        """The name of each class, or of each number of a regression; the number itself if the user gave no names."""
        signature = self._trained.signature
        return tuple(signature.name_of(output) for output in range(signature.outputs))

    def predict(self, images: NDArray[Any]) -> NDArray[Any]:
        """Return the prediction for each image, for images (N, H, W, C) as in the training, not normalized.

        - classification: the probability of each class, float64 (N, K);
        - regression: the numbers, in the units of the labels, float64 (N, K);
        - segmentation: the class of each pixel, uint16 (N, H, W).

        Gray images become three equal colours for a network that takes colours, and colours become gray. Rank 0's
        images count. Raises `UserError` if the images do not fit the network.
        """
        communicator = present(self._communicator)
        with guard(communicator):
            arrays = on_rank_0(communicator, lambda: {"images": self._fitted(images)})
            inputs = ImageArray(share_arrays(communicator, arrays or {})["images"])
            blocks = [block.values for block in predict([self._trained], inputs, communicator)]
        return np.concatenate(blocks)

    def evaluate(self, dataset: Dataset) -> Score:
        """Return loss and accuracy on all samples of a dataset.

        Its classes are matched by name, or by number if the dataset or the network has no names. Rank 0's dataset
        counts. Raises `UserError` if the dataset does not fit the network.
        """
        communicator = present(self._communicator)
        with guard(communicator):
            arrays = on_rank_0(communicator, lambda: self._samples(dataset))
            one = with_test_part([self._trained], share_arrays(communicator, arrays or {}))
            return evaluate(one, "test", communicator).ensemble

    def _fitted(self, images: NDArray[Any]) -> NDArray[Any]:
        if isinstance(images, np.ma.MaskedArray):  # the masked values would be used like any other
            raise UserError("cannot predict images with a mask: expected a plain array; images.filled(VALUE) is one")
        try:
            canonical, _ = canonical_images(np.asarray(images))
        except Unfit as error:
            raise UserError(f"cannot predict {error.given}: expected {error.expected}; {error.remedy}") from None
        except ValueError as error:  # a list of images of several shapes
            kind = type(images).__name__
            raise UserError(f"cannot predict an object of {kind}: {error}; expected an array (N, H, W, C)") from None
        return fitted(canonical, self._trained.signature, "the array")

    def _samples(self, dataset: Dataset) -> dict[str, NDArray[Any]]:
        if not isinstance(dataset, Dataset):
            raise UserError(
                f"cannot evaluate on {type(dataset).__name__}: expected a distdl.Dataset; "
                "distdl.Dataset.from_labels(name, images, labels) makes one"
            )
        checked, signature = dataset.checked(), self._trained.signature
        return {
            "images": fitted(checked.images, signature, checked.name),
            "labels": fitted_labels(checked, signature),
            "rows": np.arange(len(checked.images), dtype=np.int64),
        }


def load_model(
    run: Path | str, *, best: bool, build_network: BuildNetwork | None, communicator: Communicator | None
) -> Model:
    """Return the model of a run folder or checkpoint; print warnings about it. Collective. Raises `UserError`."""
    communicator = world() if communicator is None else communicator
    with guard(communicator):
        path = together(communicator, lambda: _path(run))
    [trained] = load([path], communicator, best=best, build_network=build_network, with_data=False)
    if communicator.rank == 0:
        for warning in trained.warnings:
            Console(live=False).warning(warning)
    return Model(trained, communicator)


def _path(run: object) -> Path:
    if not isinstance(run, str | Path):
        raise UserError(f"cannot load {run!r}: expected the path of a run folder or checkpoint, such as result.run_dir")
    return Path(run)
