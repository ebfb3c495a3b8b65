"""An invalid number or layer is one line with the given and the expected value; valid ones are accepted."""

import re

import numpy as np
import pytest

from distdl.errors import UserError
from distdl.nn import (
    Affine,
    AvgPool2d,
    Branches,
    Conv2d,
    ConvTranspose2d,
    LocalResponseNorm,
    MaxPool2d,
    ReLU,
    Residual,
    Sequential,
    Upsample2d,
)

#: The name of each setting in messages, and a layer with it.
NUMBERS = {
    "Affine: outputs": Affine,
    "Conv2d: filters": lambda n: Conv2d(n, 3),
    "ConvTranspose2d: filters": lambda n: ConvTranspose2d(n, 3),
    "LocalResponseNorm: size": LocalResponseNorm,
    "Upsample2d: factor": Upsample2d,
}
#: The same for settings that may be one number or two, with the smallest one.
PAIRS = {
    "Conv2d: size": (lambda n: Conv2d(4, n), 1),
    "Conv2d: stride": (lambda n: Conv2d(4, 3, stride=n), 1),
    "Conv2d: padding": (lambda n: Conv2d(4, 3, padding=n), 0),
    "ConvTranspose2d: size": (lambda n: ConvTranspose2d(4, n), 1),
    "MaxPool2d: size": (MaxPool2d, 1),
    "MaxPool2d: stride": (lambda n: MaxPool2d(2, stride=n), 1),
    "AvgPool2d: size": (AvgPool2d, 1),
    "AvgPool2d: padding": (lambda n: AvgPool2d(3, padding=n), 0),
}
INVALID = [0, -1, 2.5, 3.0, np.float32(3), True, "3", None]
VALID = [2, np.int64(2), np.uint8(2), np.array(2)]


@pytest.mark.parametrize("given", INVALID, ids=repr)
@pytest.mark.parametrize("setting", NUMBERS)
def test_a_setting_that_is_not_a_whole_number_is_refused(setting, given):
    with pytest.raises(UserError) as caught:
        NUMBERS[setting](given)
    assert str(caught.value) == f"{setting} {given!r} given, expected a whole number of at least 1"


@pytest.mark.parametrize("given", [*INVALID[:-1], (1, 2, 3), (3, 2.5), (), "33"], ids=repr)
@pytest.mark.parametrize("setting", PAIRS)
def test_a_setting_that_is_not_one_or_two_whole_numbers_is_refused(setting, given):
    make, least = PAIRS[setting]
    if given == least == 0:
        make(given)
        return
    with pytest.raises(UserError) as caught:
        make(given)
    assert str(caught.value) == f"{setting} {given!r} given, expected one or two whole numbers of at least {least}"


@pytest.mark.parametrize("given", VALID, ids=repr)
def test_a_whole_number_of_any_type_becomes_an_int(given):
    found = [Affine(given).outputs, Conv2d(given, given).filters, LocalResponseNorm(given).size]
    found += [ConvTranspose2d(given, 3).filters, Upsample2d(given).factor]
    for window in (Conv2d(4, given).window, Conv2d(4, (given, 2)).window, MaxPool2d(np.array([2, 2])).window):
        found += window.kernel
    assert found == [2] * len(found)
    assert {type(n) for n in found} == {int}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Sequential([Affine(2), ReLU], (3,)), "Sequential: the class ReLU given, expected a layer: ReLU(...)"),
        (lambda: Sequential([Affine(2), "relu"], (3,)), "Sequential: 'relu' given, expected a layer"),
        (lambda: Sequential(Affine(2), (3,)), "Sequential: Affine 2 given, expected a list of layers"),
        (lambda: Residual(ReLU()), "Residual, body: ReLU given, expected a list of layers"),
        (lambda: Residual([ReLU()], None), "Residual, shortcut: None given, expected a list of layers"),
        (lambda: Branches([ReLU()], [ReLU]), "Branches, branch_2: the class ReLU given"),
        (lambda: Branches([[ReLU()]]), "Branches, branch_1: [<"),
        (lambda: Sequential([ReLU()], 3), "input shape 3 given, expected sizes of at least 1, such as (28, 28, 1)"),
        (lambda: Sequential([ReLU()], (3.5, 2)), "input shape (3.5, 2) given"),
        (lambda: Sequential([ReLU()], (3, 0)), "input shape (3, 0) given"),
    ],
)
def test_anything_else_than_a_layer_or_a_shape_is_refused(make, message):
    with pytest.raises(UserError, match=re.escape(message)):
        make()
