"""The estimate of the working arrays agrees with the arrays that compiled layers make, for every model."""

import gc
import sys

import numpy as np
import pytest

pytest.importorskip("numba")
from numba.core.dispatcher import Dispatcher

from distdl import nn
from distdl.nn.kernels.compiled import COMPILED, arrays, sigmoids
from distdl.nn.working_memory import working_bytes
from distdl.rng import Key

SAMPLES = 64
SIDES = {"lenet": 32, "alexnet": 32}


@pytest.fixture
def no_arithmetic(monkeypatch):
    """Replace all kernels by nothing: the layers make their arrays, and compute nothing."""
    for name, module in list(sys.modules.items()):
        if name.startswith("distdl.nn.kernels.compiled"):
            for function in [key for key, value in vars(module).items() if isinstance(value, Dispatcher)]:
                monkeypatch.setattr(module, function, lambda *_: None)
    no_kernels = {kind: (lambda *_: None, lambda *_: None, False) for kind in sigmoids._KERNELS}
    monkeypatch.setattr(sigmoids, "_KERNELS", no_kernels)
    monkeypatch.setattr(arrays, "_scratch", {})


def bytes_kept():
    gc.collect()
    kept = [one for one in gc.get_objects() if isinstance(one, arrays.KeptArrays)]
    return sum(array.nbytes for one in kept for array in one._arrays.values())


@pytest.mark.parametrize("name", nn.MODELS)
@pytest.mark.filterwarnings("ignore:.*encountered in.*:RuntimeWarning")
@pytest.mark.usefixtures("no_arithmetic")
def test_the_estimate_of_a_model_is_right_within_15_percent_or_2_megabytes(name):
    before, side = bytes_kept(), SIDES.get(name, 28)
    network = nn.build_model(name, (side, side, 1), 10)
    network.use(COMPILED)
    for _ in range(2):
        y = network.forward(np.zeros((SAMPLES, *network.input_shape), np.float32), training=True, key=Key(1))
        network.backward(np.zeros_like(y))
    memory = [*arrays._scratch.values(), network.stack.kernels._gradients._memory]
    made = bytes_kept() - before + sum(array.nbytes for array in memory)
    assert working_bytes(network, {SAMPLES}, {SAMPLES}) == pytest.approx(made, rel=0.15, abs=2e6)
