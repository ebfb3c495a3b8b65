"""Short training runs on a part of the digits, for tests that compare many runs."""

import dataclasses
import shutil
from functools import cache

from distdl.config import TrainConfig
from distdl.data import sources
from distdl.engine import train

#: 72 rows before the test part give 65 for training: two batches of 32, and a last batch of a single sample.
LAST_BATCH_OF_ONE = 72
#: 88 give 80: two batches of 32, and a last batch of 16, which is 4 micro-batches.
RAGGED = 88
#: 94 give 85: the last batch of 21 has 6 micro-batches, the last of one sample.
VERY_RAGGED = 94
#: Few enough that every class has samples in the small validation part. Otherwise each run would warn.
CLASSES = 4


@cache
def piece_of_digits(test_start):
    digits = sources.load("digits", None)
    rows = test_start + 37  # the test part is ragged too
    labels = digits.labels[:rows] % CLASSES
    return dataclasses.replace(
        digits, images=digits.images[:rows].copy(), labels=labels, classes=CLASSES, test_start=test_start
    )


def warnings_in(errors):
    """Return the warnings in an error stream, without the one about the few samples of `piece_of_digits`."""
    return [line for line in errors.splitlines() if "has no validation sample" not in line]


def small_config(run_dir, **settings):
    return TrainConfig(
        **{"batch_size": 32, "micro_batch_size": 4, "epochs": 2, "log_every": 1, "run_dir": run_dir, **settings}
    )


def proof(folder, summary):
    """Return the results that must be equal: both hashes, and the bytes of the metrics."""
    metrics = (folder / "metrics.jsonl").read_bytes()
    return summary.weights_sha256, summary.state_sha256, metrics


def small_run(communicator, folder, *, rows=VERY_RAGGED, build_network=None, **settings):
    """Train in `folder` and return the results."""
    config, dataset = small_config(folder, **settings), piece_of_digits(rows)
    summary = train(config, communicator, build_network=build_network, dataset=dataset)
    communicator.barrier()
    return proof(folder, summary)


def sub_world(communicator, size):
    """Return the first `size` ranks as a separate world; None on the other ranks."""
    return communicator.split(0 if communicator.rank < size else None)


def worlds(communicator, sizes=(1, 2, 3, 4)):
    """For each n in turn, yield (n, the world of the first n ranks) on these ranks; the others wait."""
    for size in sizes:
        part = sub_world(communicator, size) if size <= communicator.size else None
        if part is not None:
            yield size, part
        communicator.barrier()


def remove(communicator, folder):
    communicator.barrier()
    if communicator.rank == 0:
        shutil.rmtree(folder, ignore_errors=True)
    communicator.barrier()
