"""Predict images with a trained network: ``python -m distdl.predict RUN FILE…``; ``--help`` lists all flags.

It prints a line for each image, with the most probable classes. It does not need the training data. Under mpirun each
rank reads and predicts a part of the images; the output has the same bytes.
"""

import sys
from collections.abc import Sequence

from distdl import cli
from distdl.cli import USER_CODE, Command, Flag
from distdl.inference.options import PredictOptions

COMMAND = Command(
    program="python -m distdl.predict",
    summary="Predict images with trained networks, without the training data.",
    settings=PredictOptions,
    examples=(
        "python -m distdl.predict my-run photo.jpg more-photos --csv classes.csv",
        "python -m distdl.predict my-run --with run-2 --top 1 npz:images.npz",
        "mpirun -n 4 python -m distdl.predict my-run photos --json classes.json",
    ),
    groups={
        "what": ("run", "inputs", "others", "best", "data_gigabytes"),
        "results": ("top", "csv", "json", "masks"),
        "code and old checkpoints": ("model", "dataset", "data_dir"),
    },
    flags={
        "run": Flag(name="RUN"),
        "inputs": Flag(name="IMAGES", is_path=True, repeated=True),
        "others": Flag(name="--with", value="RUN", repeated=True),
        "csv": Flag(value="FILE"),
        "json": Flag(value="FILE"),
        "masks": Flag(value="FOLDER"),
        **USER_CODE,
    },
)


def main(arguments: Sequence[str]) -> int:
    """Predict the images of the command line; return the exit code."""
    options = COMMAND.parse(arguments)
    cli.set_blas_threads(1)
    from distdl.inference.predict_images import predict_images  # noqa: PLC0415  NumPy reads the threads when loaded

    return predict_images(options)


if __name__ == "__main__":
    sys.exit(cli.run(main, trains=COMMAND.trains))
