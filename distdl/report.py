"""A run on one page: ``python -m distdl.report RUN`` writes ``report.html`` into its folder, or to `--out`.

Settings, scores, learning curves, where the time went, losses survived, and what the network does: its filters before
and after training, the maps of one image, what its layers put out, which class is taken for which, and the images
behind it. One file, with all pictures in it, that needs nothing else and loads nothing. Under mpirun the ranks share
the samples to score.
"""

from __future__ import annotations

import base64
import copy
import html
import io
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distdl import cli
from distdl.cli import Command, Flag
from distdl.config import TrainConfig
from distdl.errors import DamagedFileError, UserError
from distdl.evaluate import check_names

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from distdl.inference.evaluation import Evaluation, Trained
    from distdl.nn import Sequential

NAME = "report.html"
#: Images of the test part whose activations are drawn.
IMAGES_SHOWN = 100
#: Layers whose outputs are drawn.
MOST_LAYERS = 8
STYLE = (
    "body{font-family:sans-serif;max-width:70em;margin:2em auto;padding:0 1em}table{border-collapse:collapse}"
    "td,th{padding:.15em .8em;text-align:left;border-bottom:1px solid #ddd}img{max-width:100%}"
)


@dataclass(frozen=True, kw_only=True)
class ReportOptions:
    """The flags of the command."""

    run: Path
    """Run folder."""
    out: Path | None = None
    """File to write; by default report.html in the run folder."""
    data_dir: Path | None = None
    """Folder of the dataset's files; by default that of the run."""
    model: tuple[str, ...] = ()
    """Your own model that the run was trained with; its code is run."""
    dataset: str | None = None
    """Your own dataset that the run was trained on; its code is run. Or npz:FILE.npz or folder:PATH, if it moved."""


COMMAND = Command(
    program="python -m distdl.report",
    summary="Write a page of scores, curves and pictures (needs matplotlib).",
    settings=ReportOptions,
    examples=(
        "python -m distdl.report my-run",
        "python -m distdl.report my-run --out page.html",
        "mpirun -n 4 python -m distdl.report my-run --data-dir mnist",
    ),
    groups={"flags": ("run", "out", "data_dir", "model", "dataset")},
    flags={
        "run": Flag(name="RUN"),
        "out": Flag(value="FILE.html"),
        "model": Flag(value="FILE.py:FUNCTION", repeated=True),
        "dataset": Flag(value="FILE.py:FUNCTION"),
    },
)


def main(arguments: Sequence[str]) -> int:
    """Score the run, draw, and write; return the exit code."""
    given = COMMAND.parse(arguments)
    cli.set_blas_threads(1)
    from distdl.engine.console import Console  # noqa: PLC0415
    from distdl.engine.storage.files import write_output  # noqa: PLC0415
    from distdl.inference.evaluation import evaluate, load  # noqa: PLC0415  NumPy reads the threads when it is loaded
    from distdl.inference.figures import need_matplotlib  # noqa: PLC0415
    from distdl.parallel import guard, together, world  # noqa: PLC0415

    check_names(given.model, given.dataset)
    need_matplotlib()
    communicator = world()
    with guard(communicator):
        speaks = communicator.rank == 0
        out = given.out or given.run / NAME
        together(communicator, lambda: _refuse(given.run, out) if speaks else None)
        [trained] = load([given.run], communicator, data_dir=given.data_dir, dataset=given.dataset, models=given.model)
        found = evaluate([trained], "test", communicator)

        def write() -> None:
            write_output(out, page_of(given.run, trained, found).encode(), "--out")
            Console(live=False).line(f"report: {out}")

        together(communicator, lambda: write() if speaks else None)
    return 0


def _refuse(run: Path, out: Path) -> None:
    """Raise `UserError` for what is no run folder, or a page that could not be written."""
    from distdl.engine.storage.files import check_output  # noqa: PLC0415

    if not (run / "config.toml").is_file():
        raise UserError(f"{run} is no run folder: expected one that distdl.train has written, such as runs/…")
    if out.suffix.lower() != ".html":
        raise UserError(f"--out {out}: expected a name that ends in .html")
    check_output(out, "--out")


def page_of(run: Path, trained: Trained, found: Evaluation) -> str:
    """Return the page of a run folder, whose network was loaded and scored."""
    config = trained.config
    title = f"{config.model} on {config.dataset}"
    parts = [
        f"<h1>{html.escape(title)}</h1>",
        f"<p>{html.escape(str(run))}, step {trained.step:,}. Receipt: <code>weights sha256: "
        f"{trained.weights_sha256}</code></p>",
        "<h2>Result</h2>",
        _table(_scores(run, trained, found)),
        *(f"<h2>{html.escape(head)}</h2>{_picture(figure)}" for head, figure in _figures(run, trained, found)),
        *_time(run),
        "<h2>Settings</h2>",
        "<p>Those that are not the defaults.</p>",
        _table(settings_of(config)),
        "<h2>Environment</h2>",
        _table(_environment(run)),
    ]
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{STYLE}</style></head><body>\n" + "\n".join(parts) + "\n</body></html>\n"
    )


def settings_of(config: TrainConfig) -> dict[str, Any]:
    """Return the settings of a run that differ from the defaults.

    >>> settings_of(TrainConfig(model="mlp").checked())
    {'model': 'mlp'}
    """
    usual = TrainConfig(dataset=config.dataset, optimizer=config.optimizer).checked().to_json()
    usual |= {"dataset": TrainConfig.dataset, "optimizer": TrainConfig.optimizer}
    return {name: value for name, value in config.to_json().items() if value != usual[name]}


def _scores(run: Path, trained: Trained, found: Evaluation) -> dict[str, Any]:
    summary, score, parts = _json(run / "summary.json"), found.ensemble, trained.data.parts
    rows = {
        "test": f"{score.accuracy:.2%} ({score.correct} of {score.targets})" if score.accuracy is not None else "",
        "test loss": f"{score.loss:.6g}",
        "samples": f"{len(parts.training):,} training, {len(parts.validation):,} validation, {len(parts.test):,} test",
        "parameters": f"{trained.network.parameter_count:,}",
    }
    for name in ("epochs", "steps", "train_loss", "validation_loss", "validation_accuracy", "train_seconds", "ranks"):
        if summary.get(name) is not None:
            value = summary[name]
            rows[name.replace("_", " ")] = f"{value:.6g}" if isinstance(value, float) else str(value)
    return {name: value for name, value in rows.items() if value}


def _figures(run: Path, trained: Trained, found: Evaluation) -> Iterator[tuple[str, Figure]]:
    """Yield each picture that can be drawn of this run, with its heading."""
    from distdl.inference import figures  # noqa: PLC0415
    from distdl.nn.between import activations  # noqa: PLC0415

    data, networks = trained.data, _before_and_after(trained)
    if epochs := _lines(run / "metrics.jsonl", "validation_loss"):
        yield "Learning curves", figures.curves(epochs)
    if data.targets_per_sample:
        matrix = figures.confusion_matrix(found.labels, found.predictions, data.classes)
        yield "Which class is taken for which", figures.confusion(matrix)
    if data.targets_per_sample == 1:
        yield "Images named wrong", figures.misclassified(data.images[found.rows], found.labels, found.predictions)
    images = data.normalization.apply(data.images[found.rows[:IMAGES_SHOWN]])
    if any(view.ndim == 4 for _, view in trained.network.named_parameters()):
        yield "Filters of the first convolution", figures.filters(networks)
        yield "What it makes of an image", figures.feature_maps(trained.network, images[0])
    of_networks = {title: _some(activations(network, images)) for title, network in networks.items()}
    yield "What the layers put out", figures.activation_histograms(of_networks)


def _before_and_after(trained: Trained) -> dict[str, Sequential]:
    """Return the trained network, and before it that which training began with where the seed alone decided it."""
    from distdl.nn import Sequential  # noqa: PLC0415
    from distdl.rng import Key  # noqa: PLC0415

    network, config = trained.network, trained.config
    if config.init_from is not None:
        return {"after training": network}
    untrained = Sequential(copy.deepcopy(network.layers), network.input_shape, dtype=network.dtype)
    untrained.initialize(Key(config.seed).of("initialization"))
    return {"before training": untrained, "after training": network}


def _some(of_layers: Mapping[str, Any]) -> dict[str, Any]:
    """Return a few of the layers, spread over all of them, the last among them."""
    names = list(of_layers)
    step = -(-len(names) // MOST_LAYERS)
    return {name: of_layers[name] for name in names[(len(names) - 1) % step :: step]}


def _time(run: Path) -> list[str]:
    """Return the parts of the page that tell of time, and of ranks that were lost."""
    epochs, recoveries = _lines(run / "timing.jsonl", "train_seconds"), _json(run / "summary.json").get("recoveries")
    parts = []
    if epochs:
        seconds = sum(epoch["train_seconds"] for epoch in epochs)
        rows: dict[str, Any] = {"training": f"{seconds:.1f} s in {len(epochs)} epochs"}
        for what in ("compute", "reduction", "wait"):
            of_all = sum(epoch[f"{what}_share"] * epoch["train_seconds"] for epoch in epochs)
            rows[what] = f"{of_all / seconds:.1%}" if seconds else "–"
        parts += ["<h2>Where the time went</h2>", _table(rows)]
    if recoveries:
        lost = {
            f"step {one['step']}": f"ranks {', '.join(map(str, one['lost_ranks']))} lost, {one['ranks']} went on"
            for one in recoveries
        }
        parts += ["<h2>Losses survived</h2>", _table(lost)]
    return parts


def _environment(run: Path) -> dict[str, Any]:
    found = _json(run / "env.json")
    rows = {name: found.get(name) for name in ("ranks", "communicator", "system") if found.get(name) is not None}
    rows["kernels"] = ", ".join(map(str, found.get("kernel_families", [])))
    return rows | {name: str(version) for name, version in dict(found.get("versions", {})).items()}


def _json(path: Path) -> dict[str, Any]:
    """Return what a file of the run holds; nothing where it is not there, as before the end of a run."""
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise DamagedFileError(f"{path} is damaged: it is not what distdl.train writes")
    return found


def _lines(path: Path, having: str) -> list[dict[str, Any]]:
    """Return the records of a log that have a field; none where there is no log."""
    from distdl.inference.figures import records_of  # noqa: PLC0415

    return [record for record in records_of(path) if having in record] if path.is_file() else []


def _table(rows: Mapping[str, Any]) -> str:
    lines = (
        f"<tr><th>{html.escape(str(name))}</th><td>{html.escape(str(value))}</td></tr>" for name, value in rows.items()
    )
    return f"<table>{''.join(lines)}</table>"


def _picture(figure: Figure) -> str:
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=110)
    return f'<img alt="" src="data:image/png;base64,{base64.b64encode(content.getvalue()).decode()}">'


if __name__ == "__main__":
    sys.exit(cli.run(main, trains=COMMAND.trains))
