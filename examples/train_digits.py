"""Train a network on handwritten digits, from your own script.

    python examples/train_digits.py
    mpirun -n 2 python examples/train_digits.py

Every rank runs this whole file, and computes its share of every batch. Any number of ranks produces the same weights,
to the last bit. So both commands print the same receipt as

    python -m distdl.train --epochs 20 --lr 0.005
"""

import sys

from distdl import cli
from distdl.config import TrainConfig
from distdl.engine import train
from distdl.parallel import world


def main(_arguments):
    """Train, print the results, and return the exit code."""
    # Names and defaults are those of the flags in `python -m distdl.train --help`.
    config = TrainConfig(dataset="digits", model="simple_convnet", epochs=20, lr=0.005)

    communicator = world()  # all ranks that mpirun started, or this one process
    summary = train(config, communicator)

    # Every rank has this summary; only the seconds differ. One rank prints it.
    if communicator.rank == 0:
        print(f"{summary.test_accuracy:.1%} of the test images are correct after {summary.steps} steps")
        print(f"the receipt of {summary.ranks} rank(s) is {summary.weights_sha256}")
    return 0


if __name__ == "__main__":
    # `run` reports a wrong setting, or more ranks than micro-batches, in one line, and returns exit code 2.
    sys.exit(cli.run(main, trains=True))
