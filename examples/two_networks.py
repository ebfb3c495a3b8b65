"""Train two networks that learn from each other, in a training loop of your own (deep mutual learning).

    python examples/two_networks.py
    mpirun -n 3 python examples/two_networks.py

A network minimizes the cross-entropy of its probabilities p, plus their divergence from the other network's
probabilities q, ``KL(q, p) = Σ q log(q / p)``. The networks take turns: in each batch, first one takes a step, then the
other. Source: Y. Zhang et al. 2018, *Deep Mutual Learning*, algorithm 1.

`OptimizerStep` does the rest of a step: it adds up the micro-batches of all ranks in a fixed order, and updates the
network. So any number of ranks prints the same two receipts.
"""

import sys

import numpy as np

from distdl import cli, nn
from distdl.data import MicroBatches, PreparedDataset, batch_order, sources
from distdl.engine.environment import numerics
from distdl.engine.metrics import Sums
from distdl.engine.state import TrainingState
from distdl.engine.step import OptimizerStep
from distdl.errors import UserError
from distdl.optim import Adam
from distdl.parallel import guard, together, world
from distdl.rng import Key

MODELS = ("simple_convnet", "mlp")
EPOCHS, BATCH_SIZE, MICRO_BATCH_SIZE, LEARNING_RATE = 20, 96, 16, 0.002


def divergence(logits, other_logits):
    """Return KL(q, p) summed over the samples, and its gradient with respect to the logits of p, which is p - q.

    p and q are the softmax of `logits` and of `other_logits`, both (N, K).
    """
    log_p, log_q = (z - np.logaddexp.reduce(z, axis=1, keepdims=True) for z in (logits, other_logits))
    p, q = np.exp(log_p), np.exp(log_q)
    return float(np.sum(q * (log_q - log_p), dtype=np.float64)), p - q


def mutual(network, other, load, key):
    """Return the function that computes a micro-batch of `network`; `other` only predicts."""
    cross_entropy, sums = nn.SoftmaxCrossEntropy(), Sums()

    def compute(index):
        images, labels = load(index)
        logits = network.forward(images, training=True, key=key.of(index))
        kl, kl_gradient = divergence(logits, other.forward(images))
        loss = cross_entropy.forward(logits, labels) + kl
        sums.set(loss, cross_entropy.count_correct(logits, labels), len(labels))
        network.backward(cross_entropy.backward() + kl_gradient)
        return sums.values()

    return compute


def new_network(name, data, key):
    """Return the state of a new network, with its optimizer."""
    network = nn.build_model(name, data.images.shape[1:], data.classes)
    network.initialize(key.of("initialization", name))
    return TrainingState(network, Adam(network.parameters.size, decay_slices=network.decay_slices))


def train(communicator, data, states, key, epochs):
    """Train the two networks. Collective."""
    micro_batches = MicroBatches(data, MICRO_BATCH_SIZE)
    steps = [
        OptimizerStep(communicator, state.network, state.optimizer, micro_batch_size=MICRO_BATCH_SIZE)
        for state in states
    ]
    samples, number = len(data.parts.training), 0
    for epoch in range(epochs):
        order = data.parts.training[batch_order.epoch_order(key, epoch, samples)]
        for position in range(batch_order.steps_per_epoch(samples, BATCH_SIZE)):
            rows = batch_order.batch_rows(order, position, BATCH_SIZE)
            number += 1
            for step, state, other in zip(steps, states, reversed(states), strict=True):
                compute = mutual(
                    state.network,
                    other.network,
                    lambda index, rows=rows: micro_batches.load(rows, index),
                    key.of("training", number),
                )
                step.take(compute, samples=len(rows), learning_rate=LEARNING_RATE, update_number=number)


def main(arguments):
    """Train on the digits, print the accuracy and the receipt of each network, and return the exit code."""
    if arguments:
        raise UserError(f"{arguments[0]}: this example has no flags; change the constants in the file")
    communicator, key = world(), Key(0)
    with guard(communicator), numerics(threads=1):
        dataset = together(communicator, lambda: sources.load("digits", None))
        data = PreparedDataset.prepare(dataset, seed=0)
        states = [new_network(name, data, key) for name in MODELS]
        train(communicator, data, states, key, EPOCHS)
        if communicator.rank == 0:
            images, labels = data.normalization.apply(data.images[data.parts.test]), data.labels[data.parts.test]
            for name, state in zip(MODELS, states, strict=True):
                accuracy = nn.count_correct(state.network.forward(images), labels) / len(labels)
                print(f"{name}: test accuracy {accuracy:.2%}, weights sha256: {state.weights_sha256()}")
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))
