"""The outputs that a dataset and a loss need."""

import numpy as np
import pytest

from distdl.config import TrainConfig
from distdl.data import Dataset
from distdl.engine.requirements import check_outputs, outputs_of
from distdl.errors import UserError

IMAGES = np.zeros((6, 4, 3, 1), np.float32)
KINDS = {
    "classification": (np.arange(6) % 3, 3),
    "two classes": (np.arange(6) % 2, 2),
    "segmentation": (np.arange(72).reshape(6, 4, 3) % 3, 3),
    "two classes for each pixel": (np.arange(72).reshape(6, 4, 3) % 2, 2),
    "regression": (np.zeros((6, 2), np.float32), 2),
}


@pytest.mark.parametrize(
    ("kind", "loss", "outputs"),
    [
        ("classification", "auto", (3,)),
        ("two classes", "cross_entropy", (2,)),
        ("two classes", "binary_cross_entropy", (1,)),
        ("segmentation", "auto", (4, 3, 3)),
        ("regression", "auto", (2,)),
        ("classification", "binary_cross_entropy", "is for one label of two classes"),
        ("two classes for each pixel", "binary_cross_entropy", "is for one label of two classes"),
        ("regression", "binary_cross_entropy", "is for one label of two classes"),
        ("regression", "cross_entropy", "which has numbers"),
        ("segmentation", "mean_squared_error", "which has labels"),
    ],
)
def test_labels_and_loss_give_the_outputs_of_a_sample_or_a_refusal(kind, loss, outputs):
    labels, classes = KINDS[kind]
    data = Dataset("mine", IMAGES, labels, classes, None).checked()
    config = TrainConfig(loss=loss).checked()
    if isinstance(outputs, str):
        with pytest.raises(UserError, match=outputs):
            outputs_of(config, data)
    else:
        assert outputs_of(config, data) == outputs
        check_outputs(config, outputs, data)
        with pytest.raises(UserError, match="returns outputs"):
            check_outputs(config, (*outputs, 1), data)
