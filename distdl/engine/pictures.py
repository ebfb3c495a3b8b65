"""Arrays to draw: scaled images, the filters of a network, a confusion matrix. Plain NumPy; no file is written.

N samples, H height, W width, C channels, F filters, K classes.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from distdl.errors import UserError
from distdl.nn import Sequential


def scaled(images: NDArray[Any]) -> NDArray[np.float64]:
    """Return images (N, H, W, C), each scaled so that its minimum is 0 and its maximum 1. A constant image is 0.5.

    >>> scaled(np.array([[-2.0, 0.0, 2.0], [3, 3, 3]]).reshape(2, 1, 3, 1)).reshape(2, 3)
    array([[0. , 0.5, 1. ],
           [0.5, 0.5, 0.5]])
    """
    exact = images.astype(np.float64)
    least = exact.min(axis=(1, 2, 3), keepdims=True)
    span = exact.max(axis=(1, 2, 3), keepdims=True) - least
    return np.where(span > 0, (exact - least) / np.where(span > 0, span, 1), 0.5)


def filter_images(weight: NDArray[Any]) -> NDArray[np.float64]:
    """Return the filters of a convolution weight (FH, FW, C, F) as images (F, FH, FW, C or 1), each scaled to 0 .. 1.

    Of other numbers than one or three channels the mean is taken. Source: section 7.6.1.
    """
    images = weight.transpose(3, 0, 1, 2)
    return scaled(images if images.shape[3] in {1, 3} else images.mean(axis=3, keepdims=True))


def first_convolution(network: Sequential) -> tuple[str, NDArray[Any]]:
    """Return the name and weight (FH, FW, C, F) of the first convolution; raise `UserError` without one."""
    for name, view in network.named_parameters():
        if view.ndim == 4:
            return name.removesuffix(".weight"), view
    raise UserError("the network has no convolution, so no filters to show: expected one like simple_convnet")


def confusion_matrix(labels: NDArray[Any], predictions: NDArray[Any], classes: int) -> NDArray[np.int64]:
    """Return the confusion matrix (K, K): the count of each actual class (rows) and predicted class (columns).

    `labels` and `predictions` have the same shape, any.

    >>> confusion_matrix(np.array([0, 0, 1]), np.array([0, 1, 1]), 2)
    array([[1, 1],
           [0, 1]])
    """
    pairs = np.asarray(labels, np.int64) * classes + predictions
    counts = np.bincount(pairs[np.asarray(labels) >= 0], minlength=classes * classes)  # not NO_LABEL
    return counts.reshape(classes, classes).astype(np.int64, copy=False)


def row_shares(matrix: NDArray[Any]) -> NDArray[np.float64]:
    """Return a confusion matrix (K, K) with each row divided by its sum; a row of zeros stays as it is.

    >>> row_shares(np.array([[3, 1], [0, 0]]))
    array([[0.75, 0.25],
           [0.  , 0.  ]])
    """
    shares: NDArray[np.float64] = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    return shares
