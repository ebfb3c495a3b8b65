"""The rows of the comparison with PyTorch, their results, and tables of results.

Each measured row is one line of a JSON file. Such files of several days can be merged into one table.
"""

import json
import os
import platform
import statistics
import time
from collections import defaultdict
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from distdl.errors import UserError

TITLES = {
    "logistic": "Logistic regression",
    "mlp": "MLP 784-100-10",
    "simple_convnet": "SimpleConvNet",
    "deep_convnet": "DeepConvNet",
    "lenet": "LeNet",
    "alexnet": "AlexNet",
    "vgg11": "VGG11",
    "vgg16": "VGG16",
    "googlenet": "GoogLeNet",
    "resnet18": "ResNet-18",
    "resnet20": "ResNet-20",
    "resnet50": "ResNet-50",
}


@dataclass(frozen=True)
class Job:
    """A row of the table: the training that both sides do."""

    model: str
    ranks: int
    batch_size: int
    micro_batch_size: int
    steps: int
    """Steps of an epoch."""
    epochs: int
    """Epochs of a whole run. The first one is the warm-up."""
    kernels: str | None = None

    @property
    def title(self):
        return f"{TITLES[self.model]}, {self.ranks} rank{'s' if self.ranks > 1 else ''}, batch {self.batch_size}"


def _row(model, micro_batch_size, steps, epochs):
    return Job(model, 2, 128, micro_batch_size, steps, epochs)


#: PyTorch has no micro-batches. Of the sizes that divide a rank's share evenly, these were the fastest on one machine:
#: large ones suit affine layers, and small ones stay in the cache. An epoch is long enough that the checkpoint, which a
#: thread writes during the next one, takes a small part of it.
ROWS = {
    "simple_convnet-2": _row("simple_convnet", 64, steps=400, epochs=5),
    "deep_convnet-2": _row("deep_convnet", 32, steps=200, epochs=3),
    "simple_convnet-1": Job("simple_convnet", 1, 100, 100, steps=400, epochs=4),
    "deep_convnet-1": Job("deep_convnet", 1, 100, 100, steps=100, epochs=3),
    "mlp-1": Job("mlp", 1, 100, 100, steps=400, epochs=10),
    "mlp-2": _row("mlp", 64, steps=400, epochs=10),
    "logistic-2": _row("logistic", 64, steps=400, epochs=10),
    "lenet-2": _row("lenet", 64, steps=400, epochs=4),
    "alexnet-2": _row("alexnet", 64, steps=40, epochs=2),
    "vgg11-2": _row("vgg11", 64, steps=40, epochs=2),
    "vgg16-2": _row("vgg16", 64, steps=20, epochs=2),
    "googlenet-2": _row("googlenet", 64, steps=20, epochs=2),
    "resnet18-2": _row("resnet18", 64, steps=20, epochs=2),
    "resnet20-2": _row("resnet20", 64, steps=60, epochs=3),
    "resnet50-2": _row("resnet50", 64, steps=10, epochs=2),
}


def cpu():
    """Return the name of the CPU, and the number of cores that this process may use."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {len(os.sched_getaffinity(0))} cores"


@dataclass(frozen=True)
class Result:
    """Samples per second of each form in each round. In a round each form takes a turn, or makes a whole run."""

    job: Job
    way: str
    """turns or runs"""
    kernels: str
    """The form of our kernels in use."""
    ours: list[float]
    theirs: dict[str, list[float]]
    about: str
    """The versions of both sides."""
    date: str = field(default_factory=lambda: time.strftime("%Y-%m-%d"))
    cpu: str = field(default_factory=cpu)

    @property
    def better(self):
        return max(self.theirs, key=lambda form: statistics.median(self.theirs[form]))

    @property
    def ratio(self):
        return middle([ours / theirs for ours, theirs in zip(self.ours, self.theirs[self.better], strict=True)])

    def cells(self):
        of_layout = {form.split(",")[0]: form for form in self.theirs}
        theirs = ["–"] * 2
        for column, layout in enumerate(("default", "channels-last")):
            if layout in of_layout:
                adam = of_layout[layout].split(", ")[1].removesuffix(" Adam")
                theirs[column] = f"{speed(self.theirs[of_layout[layout]])} ({adam})"
        low, median, high = self.ratio
        return [self.job.title, speed(self.ours), *theirs, f"**{median:.2f} ×** ({low:.2f} to {high:.2f})"]


def table_of(results):
    """Return the lines of a table with one row per result."""
    return table(
        [["", "distdl", "PyTorch", "PyTorch, channels-last", "ratio to the better"], *map(Result.cells, results)]
    )


def middle(values):
    """Return the first quartile, the median, and the third quartile."""
    if len(values) == 1:
        return values * 3
    return statistics.quantiles(values, n=4, method="inclusive")


def speed(values):
    low, median, high = middle(values)
    return f"{median:,.0f} ±{(high - low) / 2 / median:.0%}"


def table(rows):
    """Return the lines of a Markdown table whose columns are aligned."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in rows]
    head, *lines = [f"| {' | '.join(row)} |" for row in rows]
    return [head, f"|{'|'.join('-' * (width + 2) for width in widths)}|", *lines]


# --------------------------------------------------------------------------------------------- several days


def save(path, result):
    """Append a result to a file, as one line of JSON; raise `UserError` if it cannot be written."""
    try:
        with path.open("a", encoding="utf-8") as file:
            print(json.dumps(asdict(result)), file=file)
    except OSError as error:
        raise UserError(f"cannot write --json {path}: {error.strerror}; give another file") from None


def load(path):
    """Return the results of a file; raise `UserError` if it has none."""
    try:
        records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        results = [Result(**{**record, "job": Job(**record["job"])}) for record in records]
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; give files that --json has written") from None
    except (ValueError, TypeError, KeyError):
        raise UserError(f"{path} does not hold results: give files that --json has written") from None
    if not results:
        raise UserError(f"{path} is empty: give files that --json has written")
    return results


def merged_table(results):
    """Return the lines of a table with the spread of each row over its results, and what was measured when."""
    groups = defaultdict(list)
    for result in results:
        groups[replace(result.job, kernels=result.kernels), result.way].append(result)
    rows = [["", "measured", "kernels", "micro-batch", "days", "distdl", "PyTorch's better form", "ratio"]]
    for (job, way), group in groups.items():
        days = str(len({result.date for result in group}))
        days += f" ({len(group)} times)" if len(group) > int(days) else ""
        ours = [statistics.median(result.ours) for result in group]
        theirs = [statistics.median(result.theirs[result.better]) for result in group]
        ratios = [result.ratio[1] for result in group]
        ratio = f"**{statistics.median(ratios):.2f} ×** ({min(ratios):.2f} to {max(ratios):.2f})"
        rows.append([job.title, way, job.kernels, str(job.micro_batch_size), days, spread(ours), spread(theirs), ratio])
    measured = {f"{result.date}: {result.cpu}; {result.about}." for result in results}
    note = "Samples per second. Each number is the median of all times, with the lowest and the highest."
    return [*table(rows), "", note, *sorted(measured)]


def spread(values):
    return f"{statistics.median(values):,.0f} ({min(values):,.0f} to {max(values):,.0f})"
