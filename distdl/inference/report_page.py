"""The report: a run on one page of HTML, with all pictures inside, that loads nothing from elsewhere."""

from __future__ import annotations

import base64
import copy
import html
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from distdl.config import TrainConfig
from distdl.engine.console import Console
from distdl.engine.pictures import confusion_matrix
from distdl.engine.storage.files import check_output, write_output
from distdl.errors import UserError
from distdl.inference import figures
from distdl.inference.class_scores import class_scores, number_scores
from distdl.inference.load import Trained, load
from distdl.inference.options import ReportOptions, check_names
from distdl.inference.score import Evaluation, evaluate
from distdl.inference.score_table import class_table, number_table, score_text
from distdl.json_files import read_json, read_json_lines
from distdl.nn import Sequential
from distdl.nn.network_copies import layer_outputs
from distdl.parallel import Communicator, from_rank_0, guard, on_rank_0, world
from distdl.rng import Key

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Test images whose activations are drawn.
IMAGES_SHOWN = 100
#: Layers whose outputs are drawn.
MOST_LAYERS = 8
#: What the page reads of the files of a run; see `json_files`.
FILES = {
    "summary.json": {
        **dict.fromkeys(("ranks?", "steps?", "epochs?", "best_epoch?", "test_epoch?"), int | None),
        **dict.fromkeys(("train_loss?", "validation_loss?", "validation_accuracy?", "train_seconds?"), float | None),
        **dict.fromkeys(("test_loss?", "test_accuracy?"), float | None),
        "recoveries?": [{"step": int, "lost_ranks": [int], "ranks": int}],
    },
    "env.json": {
        "ranks?": int,
        **dict.fromkeys(("communicator?", "system?"), str),
        "kernel_families?": [str],
        "versions?": {str: str},
    },
}
#: The record of an epoch in ``timing.jsonl``.
TIMES = dict.fromkeys(("train_seconds", "compute_share", "reduction_share", "wait_share"), float)
STYLE = (
    "body{font-family:sans-serif;max-width:70em;margin:2em auto;padding:0 1em}table{border-collapse:collapse}"
    "td,th{padding:.15em .8em;text-align:left;border-bottom:1px solid #ddd}img{max-width:100%}"
)


def write_report(options: ReportOptions) -> None:
    """Score the run on all ranks, and write its page. Collective. Raises `UserError`."""
    check_names(options)
    figures.need_matplotlib()
    communicator, run, out = world(), options.run, options.out or options.run / "report.html"

    def check() -> None:
        if not (run / "config.toml").is_file():
            raise UserError(f"{run} is not a run folder: expected a folder of distdl.train, such as runs/…")
        if out.suffix.lower() != ".html":
            raise UserError(f"--out {out}: expected a name that ends in .html")
        check_output(out, "--out")

    def write() -> None:
        write_output(out, page_of(run, trained, found, why_not).encode(), "--out")
        console = Console(live=False)
        for warning in trained.warnings:
            console.warning(warning)
        if why_not:
            console.warning(f"the report has no parts that need the training data: {why_not}")
        console.line(f"report: {out}")

    with guard(communicator):
        on_rank_0(communicator, check)
        trained, why_not = _load(options, communicator)
        found = None if why_not else evaluate([trained], "test", communicator)
        on_rank_0(communicator, write)


def _load(options: ReportOptions, communicator: Communicator) -> tuple[Trained, str | None]:
    """Return the network of the run, and why its data is not loaded, if so. Collective.

    Its weights are those that the run scored: with --test-with best those of the best validation. Data that the command
    line names must be there.
    """
    runs, models, most = [options.run], options.model, options.data_gigabytes
    best = from_rank_0(communicator, lambda: _best_is_scored(_json(options.run / "summary.json")))
    if options.data_dir is None and options.dataset is None:
        try:
            return load(runs, communicator, best=best, models=models, data_gigabytes=most)[0], None
        except UserError as error:
            [trained] = load(runs, communicator, best=best, models=models, with_data=False)
            return trained, str(error)
    data_dir, dataset = options.data_dir, options.dataset
    trained = load(
        runs, communicator, best=best, data_dir=data_dir, dataset=dataset, models=models, data_gigabytes=most
    )[0]
    return trained, None


def _best_is_scored(summary: Mapping[str, Any]) -> bool:
    """Return whether a run has scored the weights of its best validation, and they are not its last ones."""
    scored = summary.get("test_epoch")
    return scored is not None and scored == summary.get("best_epoch") != summary.get("epochs")


def page_of(run: Path, trained: Trained, found: Evaluation | None, why_not: str | None = None) -> str:
    """Return the page of a run folder, with its network and its score on the test part.

    Without a score, parts are absent; `why_not` is the reason.
    """
    config = trained.config
    title = f"{config.model} on {config.dataset}"
    time, environment = _time(run), _environment(run)  # a damaged file is named before the slow pictures are drawn
    parts = [
        f"<h1>{html.escape(title)}</h1>",
        f"<p>{html.escape(str(run))}, step {trained.step:,}. Receipt: <code>weights sha256: "
        f"{trained.weights_sha256}</code></p>",
        "<h2>Result</h2>",
        *(
            [f"<p>Pictures and scores that need the training data are absent: {html.escape(why_not)}.</p>"]
            if why_not
            else []
        ),
        _table(_scores(run, trained, found)),
        *(_per_class(trained, found) if found else []),
        *(f"<h2>{html.escape(head)}</h2>{_picture(figure)}" for head, figure in _figures(run, trained, found)),
        *time,
        "<h2>Settings</h2>",
        "<p>Those that differ from the defaults.</p>",
        _table(settings_of(config)),
        "<h2>Environment</h2>",
        _table(environment),
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


def _scores(run: Path, trained: Trained, found: Evaluation | None) -> dict[str, Any]:
    summary, rows = _json(run / "summary.json"), {"parameters": f"{trained.network.parameter_count:,}"}
    if _best_is_scored(summary):
        rows["weights"] = (
            f"those of epoch {summary['test_epoch']}, the best validation (--test-with best); losses and accuracies of "
            "training and validation are of the last epoch"
        )
    names = ["epochs", "steps", "train_loss", "validation_loss", "validation_accuracy", "train_seconds", "ranks"]
    if found:
        score, parts = found.ensemble, trained.data.parts
        samples = {name: f"{len(getattr(parts, name)):,} {name}" for name in ("training", "validation", "test")}
        rows = {
            "test": "" if score.accuracy is None else score_text(score),
            "test loss": f"{score.loss:.6g}",
            "samples": ", ".join(samples.values()),
        } | rows
    else:
        names = ["test_accuracy", "test_loss", *names]
    for name in names:
        if summary.get(name) is not None:
            value = summary[name]
            rows[name.replace("_", " ")] = f"{value:.6g}" if isinstance(value, float) else str(value)
    return {name: value for name, value in rows.items() if value}


def _per_class(trained: Trained, found: Evaluation) -> list[str]:
    """Return the part of the page with the scores of each class, or of each number of a regression."""
    signature = trained.signature
    if signature.task == "regression":
        return ["<h3>Numbers</h3>", _lines(number_table(number_scores(found.labels, found.predictions), signature))]
    scores = class_scores(_matrix(trained, found))
    return ["<h3>Classes</h3>", _lines(class_table(scores, signature))]


def _matrix(trained: Trained, found: Evaluation) -> NDArray[np.int64]:
    return confusion_matrix(found.labels, found.predictions, trained.signature.outputs)


def _figures(run: Path, trained: Trained, found: Evaluation | None) -> Iterator[tuple[str, Figure]]:
    """Yield the pictures of this run, with their headings."""
    networks, task, names = _before_and_after(trained), trained.signature.task, trained.signature.names
    metrics = run / "metrics.jsonl"
    if metrics.exists() and (epochs := read_json_lines(metrics, figures.EPOCH, having="validation_loss")):
        yield "Learning curves", figures.curves(epochs)
    if found and task != "regression":
        yield "Confusion matrix", figures.confusion(_matrix(trained, found), names)
    if found and task == "classification":
        images = trained.data.images[found.rows]
        yield "Misclassified images", figures.misclassified(images, found.labels, found.predictions, names)
    if any(view.ndim == 4 for _, view in trained.network.named_parameters()):
        yield "Filters of the first convolution", figures.filters(networks)
    if found is None:
        return
    shown = trained.signature.normalization.apply(trained.data.images[found.rows[:IMAGES_SHOWN]])
    if any(view.ndim == 4 for _, view in trained.network.named_parameters()):
        yield "Feature maps of an image", figures.feature_maps(trained.network, shown[0])
    of_networks = {title: _some(layer_outputs(network, shown)) for title, network in networks.items()}
    yield "Activations of the layers", figures.activation_histograms(of_networks)


def _before_and_after(trained: Trained) -> dict[str, Sequential]:
    """Return the trained network, and before it the untrained one, if the seed determines it."""
    network, config = trained.network, trained.config
    if config.init_from is not None:
        return {"after training": network}
    kernels = network.stack.kernels
    untrained = Sequential(copy.deepcopy(network.layers), network.input_shape, dtype=network.dtype, kernels=kernels)
    untrained.initialize(Key(config.seed).of("initialization"))
    return {"before training": untrained, "after training": network}


def _some(of_layers: Mapping[str, Any]) -> dict[str, Any]:
    """Return a few of the layers, at equal distances, with the last one."""
    names = list(of_layers)
    step = -(-len(names) // MOST_LAYERS)
    return {name: of_layers[name] for name in names[(len(names) - 1) % step :: step]}


def _time(run: Path) -> list[str]:
    """Return the parts of the page about time and lost ranks."""
    timing, recoveries = run / "timing.jsonl", _json(run / "summary.json").get("recoveries")
    epochs = read_json_lines(timing, TIMES, having="train_seconds") if timing.exists() else []
    parts = []
    if epochs:
        seconds = sum(epoch["train_seconds"] for epoch in epochs)
        rows: dict[str, Any] = {"training": f"{seconds:.1f} s in {len(epochs)} epochs"}
        for name in ("compute", "reduction", "wait"):
            of_all = sum(epoch[f"{name}_share"] * epoch["train_seconds"] for epoch in epochs)
            rows[name] = f"{of_all / seconds:.1%}" if seconds else "–"
        parts += ["<h2>Where the time went</h2>", _table(rows)]
    if recoveries:
        lost = {
            f"step {one['step']}": f"ranks {', '.join(map(str, one['lost_ranks']))} lost, {one['ranks']} continued"
            for one in recoveries
        }
        parts += ["<h2>Failures survived</h2>", _table(lost)]
    return parts


def _environment(run: Path) -> dict[str, Any]:
    found = _json(run / "env.json")
    rows = {name: found.get(name) for name in ("ranks", "communicator", "system") if found.get(name) is not None}
    rows["kernels"] = ", ".join(map(str, found.get("kernel_families", [])))
    return rows | {name: str(version) for name, version in found.get("versions", {}).items()}


def _json(path: Path) -> dict[str, Any]:
    """Return the content of a file of the run; nothing if there is no file, as before the end of a run."""
    content: dict[str, Any] = read_json(path, FILES[path.name]) if path.exists() else {}
    return content


def _table(rows: Mapping[str, Any]) -> str:
    lines = (
        f"<tr><th>{html.escape(str(name))}</th><td>{html.escape(str(value))}</td></tr>" for name, value in rows.items()
    )
    return f"<table>{''.join(lines)}</table>"


def _lines(lines: Sequence[str]) -> str:
    return f"<pre>{html.escape(chr(10).join(lines))}</pre>"


def _picture(figure: Figure) -> str:
    content = base64.b64encode(figures.content_of(figure, "png", dpi=110)).decode()
    return f'<img alt="" src="data:image/png;base64,{content}">'
