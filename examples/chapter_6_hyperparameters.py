"""Random search of learning rate and weight decay, judged on validation data (section 6.5.2).

    python examples/chapter_6_hyperparameters.py
    mpirun -n 2 python examples/chapter_6_hyperparameters.py --dataset mnist --data-dir FOLDER

Six hidden layers of 100 with ReLU on few samples, SGD, batches of 100, 50 epochs, 100 trainings: 50 from the book's
ranges, and 50 from the ranges that the best of these span. Every rank trains its own trials. The results are the same.
"""

from dataclasses import replace

import chapter

from distdl import nn
from distdl.config import TrainConfig
from distdl.data import sources
from distdl.inference import figures
from distdl.parallel import together
from distdl.rng import Key
from distdl.search.procedure import leaderboard
from distdl.search.settings import Range, SearchSettings
from distdl.search.trials import search

RANGES = (Range("lr", 1e-6, 1e-2, "log"), Range("weight_decay", 1e-8, 1e-4, "log"))
#: 15 % are validation and 15 % test data. The search uses the other 500 samples, as in the book.
SAMPLES = 588
BOOK = "the book, on MNIST: .83 with lr .0092 and weight decay 3.86e-07"


def multi_layer_net(input_shape, classes):
    """Return the book's network of seven affine layers."""
    return nn.multilayer_net(input_shape, classes, (100,) * 6)


def few_samples(options):
    """Return some samples of the dataset, none of them from its own test part."""
    whole = sources.load(options.dataset, options.data_dir)
    rows = Key(options.seed).of("few samples").permutation(whole.test_start or len(whole.labels))[:SAMPLES]
    return replace(whole, images=whole.images[rows], labels=whole.labels[rows], test_start=None)


def draw(found, path):
    """Draw the accuracies of the best twenty trainings: solid for validation, dashed for training."""
    from matplotlib.figure import Figure  # noqa: PLC0415  matplotlib is an extra

    figure = Figure(figsize=(10, 7.5), layout="constrained")
    axes = figure.subplots(4, 5, sharex=True, sharey=True).flat
    best = [trial for trial in leaderboard(found.results) if not trial.diverged]
    for number, (ax, trial) in enumerate(zip(axes, best, strict=False), start=1):
        epochs = figures.epochs_of(found.folder / trial.run_folder / "metrics.jsonl")
        ax.plot([epoch["validation_accuracy"] for epoch in epochs])
        ax.plot([epoch["train_accuracy"] for epoch in epochs], "--")
        ax.set(ylim=(0, 1))
        lr, decay = trial.settings["lr"], trial.settings["weight_decay"]
        ax.set_title(f"{number}: lr {lr:.2g}, decay {decay:.1g}", fontsize="small")
    chapter.write(figure, path)


def main(options):
    """Search, draw the best trainings, and print the best one next to the book's."""
    communicator = options.communicator
    dataset = together(communicator, lambda: few_samples(options))
    trials, epochs = (3, 2) if options.quick else (50, 50)
    config = TrainConfig(
        dataset=options.dataset,
        model=multi_layer_net.__name__,
        optimizer="sgd",
        batch_size=100,
        micro_batch_size=50,
        epochs=epochs,
        seed=options.seed,
    )
    settings = SearchSettings(ranges=RANGES, config=config, rounds=2, trials=trials, seed=options.seed)
    found = search(settings, communicator, build_network=multi_layer_net, dataset=dataset)
    if communicator.rank == 0:
        draw(found, options.out)
        best = found.best
        lr, decay = best.settings["lr"], best.settings["weight_decay"]
        print(
            f"best: validation {best.validation_accuracy:.4f}, test {best.test_accuracy:.4f} "
            f"with lr {lr:.2g} and weight decay {decay:.2e} ({BOOK})"
        )


if __name__ == "__main__":
    chapter.run(main, __doc__, has_data=True)
