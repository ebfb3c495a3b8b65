"""The second way of `versus_pytorch.py`: whole runs of `distdl.train`, and whole runs of PyTorch on the same images.

A run starts its processes, reads MNIST's files, and trains for some epochs. The first epoch is the warm-up. The rate is
that of the steps of all later epochs:

- distdl: `samples` and `train_seconds` of `timing.jsonl`. An epoch ends with a validation, which does not count, and
  with a checkpoint. A thread writes it during the next epoch, which does count.
- PyTorch: the time of the loop over the batches. PyTorch normalizes all images before the loop, and saves nothing.

In each round every form makes a run, one after the other. After the first round, only the fastest form of each of
PyTorch's layouts continues.
"""

import json
import struct
import subprocess
import tempfile
import time
import tomllib
from functools import partial
from pathlib import Path

import numpy as np
from versus_results import Result
from versus_turns import distdl_command, fastest_of_each_layout, pytorch_commands, random_images

from distdl.data import sources
from distdl.errors import UserError
from distdl.nn import build_model

TEST_IMAGES = 100


def compare_runs(job, python, rounds, data_dir):
    """Make `rounds` runs of each form, on the first images of MNIST in `data_dir` or on random pixels."""
    with tempfile.TemporaryDirectory(prefix="distdl-") as name:
        folder = Path(name)
        write_mnist(folder, job, data_dir)
        theirs = run_pytorch(folder, job, python, "introduce")
        parameters = build_model(job.model, (28, 28, 1), 10).parameter_count
        assert theirs["parameters"] == parameters, "both sides train the same network"
        runs = {"distdl": partial(run_distdl, folder, job)}
        runs |= {form: partial(run_pytorch, folder, job, python, "run", folder, form) for form in theirs["forms"]}
        measured, done = {form: [] for form in runs}, {}
        for number in range(rounds):
            # Every other round is in reverse order, so that the order does not favor one side.
            for form in [*measured] if number % 2 == 0 else [*reversed(measured)]:
                done[form] = runs[form]()
                measured[form].append(rate_after_warm_up(done[form]["epochs"]))
            if number == 0:
                rates = measured.pop("distdl")
                measured = {"distdl": rates} | {form: measured[form] for form in fastest_of_each_layout(measured)}
    ours = done["distdl"]
    about = f"{ours['about']}; {theirs['about']}"
    return Result(job, "runs", ours["kernels"], measured.pop("distdl"), measured, about)


def rate_after_warm_up(epochs):
    """Return the samples per second of all epochs but the first."""
    return sum(epoch["samples"] for epoch in epochs[1:]) / sum(epoch["seconds"] for epoch in epochs[1:])


def run_distdl(folder, job):
    """Train with distdl; return the samples and the seconds of each epoch, and the versions and kernels in use."""
    with tempfile.TemporaryDirectory(dir=folder) as name:
        run = Path(name, "run")
        flags = {
            "dataset": "mnist",
            "data-dir": folder,
            "run-dir": run,
            "model": job.model,
            "batch-size": job.batch_size,
            "micro-batch-size": job.micro_batch_size,
            "epochs": job.epochs,
            **({"kernels": job.kernels} if job.kernels else {}),
        }
        words = [f"--{flag}={value}" for flag, value in flags.items()]
        finish("distdl", job, [distdl_command(job.ranks, ["-m", "distdl.train", *words])], folder)
        timings = [json.loads(line) for line in (run / "timing.jsonl").read_text(encoding="utf-8").splitlines()]
        environment = json.loads((run / "env.json").read_text(encoding="utf-8"))
        config = tomllib.loads((run / "config.toml").read_text(encoding="utf-8"))
    families = ", ".join(environment["kernel_families"])
    return {
        "epochs": [{"samples": timing["samples"], "seconds": timing["train_seconds"]} for timing in timings],
        "about": f"distdl on NumPy {environment['versions']['numpy']} ({families}), {environment['communicator']}",
        "kernels": config.get("kernels", "numpy"),
    }


def run_pytorch(folder, job, python, function, *words):
    """Call a function of `pytorch_ddp.py` on each rank, and return what rank 0 prints."""
    with tempfile.TemporaryDirectory(dir=folder) as name:
        commands = pytorch_commands(job, python, function, f"{name}/ranks", *words)
        return json.loads(finish("PyTorch", job, commands, folder))


def finish(name, job, commands, folder):
    """Run processes to their end, and return what they print; raise `UserError` if one fails."""
    with (folder / "output").open("w+", encoding="utf-8") as output:
        processes = [
            subprocess.Popen(argv, env=environment, stdin=subprocess.DEVNULL, stdout=output)
            for argv, environment in commands
        ]
        try:
            while None in (codes := [process.poll() for process in processes]) and not any(codes):
                time.sleep(0.1)
        finally:
            for process in processes:
                process.terminate()
                process.wait()
        output.seek(0)
        text = output.read()
    if any(codes):
        raise UserError(f"{name}'s run of {job.title} failed: see its output above")
    return text


def write_mnist(folder, job, data_dir):
    """Write MNIST's four files, with as many images that the training part of distdl has the steps of the job."""
    training = job.batch_size * job.steps
    count = training + (training - 1) // 9  # a tenth of them, rounded down, is for validation
    if data_dir is None:
        images, labels = random_images(count + TEST_IMAGES)
    else:
        dataset = sources.load("mnist", data_dir)
        images, labels = dataset.images[..., 0], dataset.labels
        if len(images) < count + TEST_IMAGES:
            raise UserError(f"{data_dir} has {len(images)} images: {job.title} needs {count + TEST_IMAGES}")
    for part, rows in (("train", slice(count)), ("t10k", slice(count, count + TEST_IMAGES))):
        write_idx(folder / f"{part}-images-idx3-ubyte", images[rows])
        write_idx(folder / f"{part}-labels-idx1-ubyte", labels[rows])


def write_idx(path, elements):
    """Write bytes in the format of MNIST's files; `distdl.data.sources.idx` describes it."""
    header = struct.pack(f">4B{elements.ndim}I", 0, 0, 8, elements.ndim, *elements.shape)
    path.write_bytes(header + elements.astype(np.uint8).tobytes())
