"""A run warns of settings that are valid, but hardly what the user wants."""

import pytest

from distdl.config import TrainConfig
from distdl.engine.requirements import warnings_about
from distdl.nn import Affine, BatchNorm, Residual, Sequential

PLAIN, NORMALIZED = Sequential([Affine(2)], (3,)), Sequential([Residual([BatchNorm()]), Affine(2)], (3,))


@pytest.mark.parametrize(
    ("settings", "network", "ranks", "said"),
    [
        ({}, PLAIN, 8, []),
        ({"batch_size": 200}, PLAIN, 8, []),
        (
            {"batch_size": 201},
            PLAIN,
            1,
            ["--batch-size 201 is larger than the training part: every step has its 200 samples, 13 micro-batches"],
        ),
        ({"batch_size": 512}, PLAIN, 16, ["200 samples, 13 micro-batches; 3 of 16 ranks compute nothing"]),
        ({"epochs": 5, "warmup_steps": 9}, PLAIN, 1, []),
        ({"epochs": 5, "warmup_steps": 10}, PLAIN, 1, ["--warmup-steps 10 is not less than the 10 steps of the run"]),
        ({"batch_size": 99}, PLAIN, 1, []),
        (
            {"batch_size": 99},
            NORMALIZED,
            1,
            ["has 2 samples, too few for batch normalization; with --batch-size 100 it"],
        ),
        ({"batch_size": 100}, NORMALIZED, 1, []),
    ],
)
def test_a_warning_names_the_setting(settings, network, ranks, said):
    found = warnings_about(TrainConfig(**settings).checked(), 200, network, ranks)
    assert len(found) == len(said)
    for warning, part in zip(found, said, strict=True):
        assert part in warning
