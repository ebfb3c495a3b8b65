"""A steady step allocates almost nothing. All large arrays are allocated once."""

import tracemalloc

import numpy as np
import pytest

from distdl.config import TrainConfig
from distdl.data import PreparedDataset
from distdl.engine.environment import numerics
from distdl.engine.state import TrainingState
from distdl.engine.stop import StopRequest
from distdl.engine.trainer import Trainer
from distdl.nn import build_model
from distdl.nn.kernels.choice import kernels_named
from distdl.optim import optimizer_class
from distdl.parallel import OneProcess
from distdl.rng import Key

WARM_UP_STEPS, STEPS = 3, 5
MOST_BYTES = 64 * 1024


def trainer_of(model, kernels, batch_size, micro_batch_size, augment=None):
    samples = batch_size * (WARM_UP_STEPS + STEPS)
    images = Key(0).of("pixels").words(samples * 98).view(np.uint8).reshape(samples, 28, 28, 1)
    data = PreparedDataset.for_training_only(images, np.arange(samples) % 10, classes=10)
    network = build_model(model, (28, 28, 1), 10)
    network.use(kernels)
    network.initialize(Key(0).of("initialization"))
    sizes = {"batch_size": batch_size, "micro_batch_size": micro_batch_size}
    config = TrainConfig(model=model, augment=augment, **sizes).checked()
    rule = kernels.optimizer_rule("adam")
    optimizer = optimizer_class("adam")(network.parameters.size, decay_slices=network.decay_slices, fused=rule)
    return Trainer(config, OneProcess(), data, TrainingState(network, optimizer), StopRequest())


@pytest.mark.parametrize(
    ("model", "augment"),
    [
        ("mlp", None),
        ("simple_convnet", None),
        ("deep_convnet", None),
        ("mlp", "rotate=10,shift=2,scale=0.1,crop=2,flip,brightness=0.1"),
    ],
)
@pytest.mark.parametrize("sizes", [(128, 16), (100, 25)])
@pytest.mark.parametrize("kernels", ["numpy", "compiled"])
def test_a_steady_step_allocates_less_than_64_kib_at_any_moment_and_keeps_nothing(model, augment, sizes, kernels):
    if kernels == "compiled":
        pytest.importorskip("numba")
    with numerics(threads=1):
        training = trainer_of(model, kernels_named(kernels), *sizes, augment=augment)
        for _ in range(WARM_UP_STEPS):
            training.take_step()
        tracemalloc.start()
        try:
            before, _ = tracemalloc.get_traced_memory()
            for _ in range(STEPS):
                training.take_step()
            after, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    assert peak - before < MOST_BYTES
    assert after - before < MOST_BYTES / 4
