"""The summary of a run on several simulated ranks."""

import pytest

from distdl.config import TrainConfig
from distdl.engine.state import TrainingState
from distdl.engine.summary import summarize
from distdl.errors import CorruptionError
from distdl.nn import build_model
from distdl.optim import optimizer_class
from distdl.parallel import OneProcess

CONFIG = TrainConfig(model="mlp").checked()


class ThreeRanks(OneProcess):
    """Rank 0 of three; the receipt of rank 2 is `other`, if given."""

    def __init__(self, other):
        super().__init__()
        self.size, self.other, self.receipt = 3, other, None

    def allgather_json(self, value):
        self.receipt = self.receipt or value  # the first exchange
        return [value, value, self.other if self.other and value == self.receipt else value]


@pytest.mark.parametrize("other", [None, "0" * 64], ids=["equal", "different"])
def test_the_receipts_of_all_ranks_are_compared_at_the_end(other):
    network = build_model("mlp", (8, 8, 1), 10)
    state = TrainingState(network, optimizer_class("sgd")(network.parameters.size))
    ranks = ThreeRanks(other)
    if other is None:
        summary = summarize(ranks, state, None, CONFIG, training_samples=7, recoveries=[])
        assert (summary.ranks, summary.weights_sha256) == (3, state.weights_sha256())
        assert summary.samples_per_second == 0, "no step was timed"
    else:
        with pytest.raises(CorruptionError, match=r"silent corruption on rank 2 .*the weights differ at the end"):
            summarize(ranks, state, None, CONFIG, training_samples=7, recoveries=[])
