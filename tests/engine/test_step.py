"""The optimizer step: the same bits on any number of ranks, and an oracle in plain NumPy."""

import numpy as np
import pytest

from distdl import nn
from distdl.data import MicroBatches, PreparedDataset, batch_order
from distdl.engine.clipping import clip_by_norm
from distdl.engine.step import OptimizerStep, StepObserver, supervised
from distdl.nn import Affine, BatchNorm, Flatten, ReLU, Sequential, SoftmaxCrossEntropy
from distdl.optim import SGD
from distdl.parallel import Field, OneProcess
from distdl.rng import Key

SAMPLES, SIZE = 30, 4
IMAGES = (Key(1).words(SAMPLES * 12).view(np.uint8)[: SAMPLES * 12] % 16).reshape(SAMPLES, 3, 4, 1)
DATA = PreparedDataset.for_training_only(IMAGES, np.arange(SAMPLES) % 5, classes=5)
ROWS = np.arange(SAMPLES)


def new_network(*, batch_norm=True):
    layers = [Flatten(), Affine(8), *([BatchNorm()] if batch_norm else []), ReLU(), Affine(5)]
    network = Sequential(layers, (3, 4, 1))
    network.initialize(Key(2))
    return network


def compute_of(network, rows=ROWS):
    batches = MicroBatches(DATA, SIZE)
    return supervised(network, SoftmaxCrossEntropy(), lambda index: batches.load(rows, index), Key(3))


def taken(communicator, *, steps=3, frozen=(), batch_norm=True, **settings):
    """Return the network and the sums after some steps."""
    network = new_network(batch_norm=batch_norm)
    optimizer = SGD(network.parameters.size, frozen=frozen)
    step = OptimizerStep(communicator, network, optimizer, micro_batch_size=SIZE, **settings)
    total = None
    for number in range(steps):
        total = step.take(compute_of(network), samples=SAMPLES, learning_rate=0.1, update_number=number + 1)
        total = {name: array.copy() for name, array in total.items()}
    step.close()
    return network, total


@pytest.mark.mpi
def test_any_number_of_ranks_gives_the_bits_of_one(communicator):
    here, total = taken(communicator)
    alone, expected = taken(OneProcess())
    assert here.parameters.tobytes() == alone.parameters.tobytes()
    assert here.buffers.tobytes() == alone.buffers.tobytes()
    assert {name: array.tobytes() for name, array in total.items()} == {
        name: array.tobytes() for name, array in expected.items()
    }


def test_a_step_is_the_textbook_step():
    """The oracle: the mean gradient of the whole batch in one pass, clipped, times the learning rate."""
    oracle = new_network(batch_norm=False)
    images, labels = MicroBatches(DATA, SAMPLES).load(ROWS, 0)
    loss = SoftmaxCrossEntropy()
    expected_loss = loss.forward(oracle.forward(images, training=True, key=Key(0)), labels)
    oracle.backward(loss.backward())
    gradient = oracle.gradients / SAMPLES
    clip_by_norm(gradient, 0.01)
    expected = oracle.parameters - np.float32(0.1) * gradient
    network, total = taken(OneProcess(), steps=1, batch_norm=False, clip_norm=0.01)
    np.testing.assert_allclose(network.parameters, expected, rtol=0, atol=1e-7)
    assert total["loss_sum"][0] == pytest.approx(expected_loss)
    assert total["counts"].tolist()[1] == SAMPLES


def test_frozen_parameters_keep_their_bits_and_do_not_count_in_clipping():
    frozen = [new_network().slices["affine_1.weight"]]
    network, _ = taken(OneProcess(), frozen=frozen)
    assert network.parameters[frozen[0]].tobytes() == new_network().parameters[frozen[0]].tobytes()
    assert not np.array_equal(network.parameters, new_network().parameters)


class Diary(StepObserver):
    """Record the calls and add a field to the reduced vector."""

    fields = (Field("mine", "i8", 1),)

    def __init__(self, *, wanted=True):
        self.calls = []
        self.wanted = wanted

    def begin(self, step):
        self.calls.append("begin")

    def micro_batch_done(self, step, index, record):
        self.calls.append(index)
        record["mine"] = np.array([index])

    def shard_done(self, step):
        self.calls.append("computed")

    def allows_update(self, step):
        self.calls.append("reduced")
        self.before = step.network.parameters.copy()
        return self.wanted

    def before_update(self, step):
        self.calls.append("committed")
        assert np.array_equal(self.before, step.network.parameters)

    def end(self, step):
        self.calls.append(("ended", int(step.total["mine"][0])))


def test_an_observer_is_called_at_each_point_and_its_numbers_are_summed():
    diary = Diary()
    taken(OneProcess(), steps=1, observers=[diary])
    assert diary.calls == ["begin", *range(8), "computed", "reduced", "committed", ("ended", 28)]


def test_an_observer_can_refuse_the_update():
    diary = Diary(wanted=False)
    network, _ = taken(OneProcess(), steps=2, observers=[diary])
    fresh = new_network()
    assert network.parameters.tobytes() == fresh.parameters.tobytes()
    assert network.buffers.tobytes() == fresh.buffers.tobytes()


def test_the_last_micro_batch_may_be_smaller():
    assert batch_order.micro_batch_count(SAMPLES, SIZE) == 8
    _, total = taken(OneProcess(), steps=1)
    assert total["counts"].tolist()[1] == SAMPLES


def test_a_custom_computation_needs_no_labels():
    """Fit the two parameters of a line by the squared error. The computation and its fields are those of the test."""
    network = nn.Sequential([Affine(1)], (1,))
    network.initialize(Key(0))
    x = np.linspace(-1, 1, 16, dtype=np.float32)[:, None]
    y = 3 * x + 1

    def compute(index):
        part = slice(index * 4, index * 4 + 4)
        error = network.forward(x[part], training=True) - y[part]
        network.backward(2 * error)
        return {"error": np.array([float((error * error).sum())])}

    step = OptimizerStep(
        OneProcess(), network, SGD(network.parameters.size), micro_batch_size=4, fields=[Field("error", "f8", 1)]
    )
    errors = [step.take(compute, samples=16, learning_rate=0.3, update_number=n + 1)["error"][0] for n in range(60)]
    assert errors[-1] < 1e-6 < errors[0]
    assert [view.item() for _, view in network.named_parameters()] == pytest.approx([3, 1], abs=1e-3)
