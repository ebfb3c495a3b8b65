"""PyTorch's side of `versus_pytorch.py`: the networks of `pytorch_models.py`, trained by PyTorch as an expert would.

It needs only PyTorch, so any interpreter that has it can run this file. `versus_pytorch.py` starts one process per
rank, which does one of these:

- `take_turns`: Over a socket each process learns which form of the training to continue, and for how many steps. An
  idle process is blocked in a read.
- `run`: train for some epochs in one form, on the MNIST files of a folder.
- `introduce`: print the forms, the number of parameters and the version.

The speed-ups that PyTorch offers on a CPU are in use:

- Layouts: the default one (N, C, H, W), and channels-last. Adam: fused, and over lists of tensors ("foreach"). Each
  combination is a form.
- `DistributedDataParallel` over gloo, with gradients as views of its buckets, and a static graph.
- Gradients are dropped, not set to zero. The images are normalized float32 in memory before the first step, so a step
  only picks the rows of the batch. The loss is added up, and read at the end of an epoch.
"""

import json
import socket
import struct
import sys
import time
from pathlib import Path

import torch
import torch.distributed
from pytorch_models import CLASSES, MODELS, SIDE
from torch import nn
from torch.nn.parallel import DistributedDataParallel

LAYOUTS = {"default": torch.contiguous_format, "channels-last": torch.channels_last}
ADAMS = ("fused", "foreach")
WITHOUT_CHANNELS = ("logistic", "mlp")


def forms_of(model):
    """Return the names of all forms of a training: `fused Adam` in the layout `default`, …"""
    layouts = ["default"] if model in WITHOUT_CHANNELS else LAYOUTS
    return [f"{layout}, {adam} Adam" for layout in layouts for adam in ADAMS]


class Training:
    """One form of the training: a replica of the network, and the optimizer of its weights."""

    def __init__(self, form, job, rank, images, labels):
        layout, adam = form.removesuffix(" Adam").split(", ")
        torch.manual_seed(0)
        self.layout = LAYOUTS[layout]
        network = MODELS[job["model"]]().to(memory_format=self.layout)
        self.network = network
        if job["ranks"] > 1:
            self.network = DistributedDataParallel(network, gradient_as_bucket_view=True, static_graph=True)
        self.optimizer = torch.optim.Adam(network.parameters(), lr=0.001, **{adam: True})
        self.loss = nn.CrossEntropyLoss()
        self.images, self.labels = images.contiguous(memory_format=self.layout), labels
        self.batch_size = batch_size = job["batch_size"]
        # All ranks have the same order of the epoch. This rank takes the rows from start to stop of each batch.
        self.start, self.stop = batch_size * rank // job["ranks"], batch_size * (rank + 1) // job["ranks"]
        self.random = torch.Generator().manual_seed(1)
        self.order, self.position = torch.empty(0, dtype=torch.int64), 0
        self.loss_sum = torch.zeros(())

    def step(self):
        if self.position + self.batch_size > len(self.order):
            self.order, self.position = torch.randperm(len(self.labels), generator=self.random), 0
        rows = self.order[self.position + self.start : self.position + self.stop]
        self.position += self.batch_size
        images = self.images[rows].contiguous(memory_format=self.layout)
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.loss(self.network(images), self.labels[rows])
        loss.backward()
        self.optimizer.step()
        self.loss_sum += loss.detach()


def take_turns(rank, job, address):
    """Connect to the socket at `address`, introduce this rank, and take steps until the socket closes."""
    samples = job["batch_size"] * job["steps"]
    torch.manual_seed(2)
    images, labels = torch.randn(samples, 1, SIDE, SIDE), torch.randint(CLASSES, (samples,))
    trainings = {form: Training(form, job, rank, images, labels) for form in forms_of(job["model"])}
    with socket.socket(socket.AF_UNIX) as channel:
        channel.connect(address)
        with channel.makefile("rw") as lines:
            answer = {"rank": rank, **introduction(job["model"])}
            while True:
                print(json.dumps(answer), file=lines, flush=True)
                command = lines.readline()
                if not command:
                    break
                form, steps = json.loads(command)
                started = time.perf_counter()
                for _ in range(steps):
                    trainings[form].step()
                answer = time.perf_counter() - started


def run(rank, job, folder, form):
    """Train for all epochs on the MNIST files of `folder`; rank 0 prints the seconds and the mean loss of each."""
    samples = job["batch_size"] * job["steps"]
    images = read_idx(Path(folder, "train-images-idx3-ubyte"))[:samples, None].float()
    labels = read_idx(Path(folder, "train-labels-idx1-ubyte"))[:samples].long()
    training = Training(form, job, rank, (images - images.mean()) / images.std(), labels)
    del images
    epochs = []
    for _ in range(job["epochs"]):
        started = time.perf_counter()
        training.loss_sum.zero_()
        for _ in range(job["steps"]):
            training.step()
        loss = training.loss_sum.item() / job["steps"]
        epochs.append({"seconds": time.perf_counter() - started, "samples": samples, "loss": loss})
    if rank == 0:
        print(json.dumps({**introduction(job["model"]), "epochs": epochs}))


def read_idx(path):
    """Return the bytes of an IDX file as a tensor: https://yann.lecun.com/exdb/mnist."""
    content = bytearray(path.read_bytes())
    dimensions = content[3]
    shape = struct.unpack_from(f">{dimensions}I", content, 4)
    return torch.frombuffer(content, dtype=torch.uint8, offset=4 + 4 * dimensions).reshape(shape)


def introduction(model):
    return {
        "about": f"PyTorch {torch.__version__} ({torch.backends.cpu.get_cpu_capability()})",
        "forms": forms_of(model),
        "parameters": sum(weights.numel() for weights in MODELS[model]().parameters()),
    }


def introduce(rank, job):
    if rank == 0:
        print(json.dumps(introduction(job["model"])))


def main(function, meeting, rank, job, *words):
    """Call a function of this file on each rank. The ranks meet in the file `meeting`."""
    torch.set_num_threads(1)
    rank, job = int(rank), json.loads(job)
    if job["ranks"] > 1:
        torch.distributed.init_process_group("gloo", f"file://{meeting}", rank=rank, world_size=job["ranks"])
    {"take_turns": take_turns, "run": run, "introduce": introduce}[function](rank, job, *words)
    if job["ranks"] > 1:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
