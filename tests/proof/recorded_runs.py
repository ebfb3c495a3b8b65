"""Short trainings on the digits whose folders the tests of proof compare, replay and audit."""

import numpy as np

from distdl.config import TrainConfig
from distdl.engine import train
from distdl.engine.fault_injection import fail_at
from distdl.parallel import OneProcess
from distdl.rng import Key

#: The digits have 1,259 training samples: three full batches of 384, and a last one of 107 with a ragged micro-batch.
STEPS_PER_EPOCH = 4
SETTINGS = {"model": "mlp", "batch_size": 384, "micro_batch_size": 48, "epochs": 2, "log_every": 1}
EVERY_STEP = {"checkpoint_every": 1, "keep_checkpoints": 20}


def recorded_run(folder, communicator=None, **settings):
    """Train in `folder`, and return it."""
    communicator = OneProcess() if communicator is None else communicator
    train(TrainConfig(**{**SETTINGS, "run_dir": folder, **settings}), communicator)
    communicator.barrier()
    return folder


def plant(number, *, steps):
    """Flip one bit at a random place of the next training, after the update of a step; return the place.

    The dictionary is filled when the bit flips. The bit is one of the mantissa, so no number becomes infinite.
    """
    words = Key(number).of("plant").words(4).tolist()
    place = {"step": 1 + words[0] % steps}

    def flip(state):
        arrays = [(name, array) for name, array in state.named_arrays() if array.dtype == np.float32]
        place["tensor"], array = arrays[words[1] % len(arrays)]
        place["element"] = tuple(map(int, np.unravel_index(words[2] % array.size, array.shape)))
        place["bit"] = words[3] % 23
        array.view(np.uint32)[place["element"]] ^= np.uint32(1 << place["bit"])

    fail_at("update", when="after", rank=None, step=place["step"], action=flip)
    return place
