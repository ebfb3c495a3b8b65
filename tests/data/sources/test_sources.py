"""The datasets by name."""

import pytest

from distdl.data.sources import load
from distdl.errors import UserError


def test_an_unknown_name_lists_the_known_ones_and_the_nearest():
    with pytest.raises(UserError) as caught:
        load("mnits", None)
    known = "cifar10, digits, fashion-mnist, kmnist, mnist"
    assert str(caught.value) == f"unknown dataset 'mnits': expected one of {known}; did you mean 'mnist'?"
