"""The objective: the loss that training minimizes. Validation and test use the plain loss.

`--label-smoothing` and `--class-weights` change the objective alone. So the validation losses of two runs can be
compared, whatever these settings are.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from distdl.config import TrainConfig, flag_of
from distdl.data import Dataset, PreparedDataset
from distdl.data.signature import Signature
from distdl.errors import UserError
from distdl.nn import make_loss
from distdl.nn.kernels import Kernels
from distdl.nn.losses import LossFunction

#: The losses that each setting fits.
LOSSES_OF_SETTING = {
    "label_smoothing": {"cross_entropy"},
    "class_weights": {"cross_entropy", "binary_cross_entropy"},
}
#: Images whose labels are counted at a time: a label of each pixel needs much memory.
BLOCK = 256


def check_objective(config: TrainConfig, data: Dataset | PreparedDataset | Signature) -> None:
    """Raise `UserError` for a setting that does not fit the loss."""
    loss = data.loss_named(config.loss)
    for name in _settings_given(config):
        if loss not in LOSSES_OF_SETTING[name]:
            fits = " and ".join(sorted(LOSSES_OF_SETTING[name]))
            raise UserError(
                f"{flag_of(name)} is for --loss {fits}, and {config.dataset} is trained with {loss}: leave the flag out"
            )


def losses(config: TrainConfig, data: PreparedDataset, kernels: Kernels) -> tuple[LossFunction, LossFunction]:
    """Return the plain loss and the loss that training minimizes, as these kernels compute them."""
    return kernels.loss(make_loss(data.loss_named(config.loss))), kernels.loss(training_loss(config, data))


def training_loss(config: TrainConfig, data: PreparedDataset) -> LossFunction:
    """Return the loss that training minimizes; a pure function of config and data."""
    settings: dict[str, Any] = {name: getattr(config, name) for name in _settings_given(config)}
    if "class_weights" in settings:
        settings["class_weights"] = balanced_weights(data)
    return make_loss(data.loss_named(config.loss), **settings)


def balanced_weights(data: PreparedDataset) -> NDArray[np.float64]:
    """Return the weight of each class, (K,): ``n / (K' n[k])`` for n labels, of which n[k] have class k.

    The labels are those of the training part; pixels without a label do not count. K' is the number of classes that
    occur. So the mean weight of a label is 1. A class that does not occur has weight 0.

    Source: scikit-learn's ``class_weight="balanced"``, after King and Zeng 2001.
    """
    rows, counts = data.parts.training, np.zeros(data.classes, np.int64)
    for start in range(0, len(rows), BLOCK):
        labels = data.labels[rows[start : start + BLOCK]].reshape(-1)
        counts += np.bincount(labels[labels >= 0], minlength=data.classes)
    occurs = counts > 0
    weights: NDArray[np.float64] = counts.sum() / (occurs.sum() * np.maximum(counts, 1))
    return weights * occurs


def _settings_given(config: TrainConfig) -> list[str]:
    """Return the settings of the objective that differ from their default."""
    given = {"label_smoothing": config.label_smoothing > 0, "class_weights": config.class_weights != "none"}
    return [name for name in given if given[name]]
