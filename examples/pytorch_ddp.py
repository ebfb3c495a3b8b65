"""PyTorch's side of `versus_pytorch.py`: the book's networks, trained by PyTorch as an expert would.

It needs only PyTorch, so any interpreter that has it can run this file. `versus_pytorch.py` starts one process per
rank. Over a socket it tells each process which form of the training to continue, and for how many steps. An idle
process is blocked in a read. The speed-ups that PyTorch offers on a CPU are in use:

- Layouts: the default one (N, C, H, W), and channels-last. Adam: fused, and over lists of tensors ("foreach"). Each
  combination is a form.
- `DistributedDataParallel` over gloo, with gradients as views of its buckets, and a static graph.
- Gradients are dropped, not set to zero. The images are normalized float32 in memory before the first step, so a step
  only picks the rows of the batch. The loss is not read.

The networks are written as in the book, with ReLU before max-pooling. The other order gives the same result, and a
faster SimpleConvNet.
"""

import json
import socket
import sys
import time

import torch
import torch.distributed
from torch import nn
from torch.nn.parallel import DistributedDataParallel

LAYOUTS = {"default": torch.contiguous_format, "channels-last": torch.channels_last}
ADAMS = ("fused", "foreach")
CLASSES = 10


def mlp():
    return nn.Sequential(nn.Flatten(), nn.Linear(28 * 28, 100), nn.ReLU(inplace=True), nn.Linear(100, CLASSES))


def simple_convnet():
    return nn.Sequential(
        nn.Conv2d(1, 30, 5),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(30 * 12 * 12, 100),
        nn.ReLU(inplace=True),
        nn.Linear(100, CLASSES),
    )


def deep_convnet():
    def convolution(channels, filters, padding=1):
        return [nn.Conv2d(channels, filters, 3, padding=padding), nn.ReLU(inplace=True)]

    return nn.Sequential(
        *convolution(1, 16),
        *convolution(16, 16),
        nn.MaxPool2d(2),
        *convolution(16, 32),
        *convolution(32, 32, padding=2),
        nn.MaxPool2d(2),
        *convolution(32, 64),
        *convolution(64, 64),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(64 * 4 * 4, 50),
        nn.ReLU(inplace=True),
        nn.Dropout(0.5),
        nn.Linear(50, CLASSES),
        nn.Dropout(0.5),
    )


class Residual(nn.Module):
    """Two convolutions plus a shortcut: the input itself, or halved and widened by a 1x1 convolution."""

    def __init__(self, channels, filters, stride):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, filters, 3, stride=stride, padding=1, bias=False),
            nn.BatchNorm2d(filters),
            nn.ReLU(inplace=True),
            nn.Conv2d(filters, filters, 3, padding=1, bias=False),
            nn.BatchNorm2d(filters),
        )
        self.shortcut = nn.Sequential()
        if stride > 1:
            shrunk = nn.Conv2d(channels, filters, 1, stride=stride, bias=False)
            self.shortcut = nn.Sequential(shrunk, nn.BatchNorm2d(filters))

    def forward(self, x):
        return nn.functional.relu(self.body(x) + self.shortcut(x), inplace=True)


def resnet20():
    first = [nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(inplace=True)]
    widths = [(16, 16), (16, 16), (16, 16), (16, 32), (32, 32), (32, 32), (32, 64), (64, 64), (64, 64)]
    blocks = [Residual(channels, filters, filters // channels) for channels, filters in widths]
    return nn.Sequential(*first, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, CLASSES))


MODELS = {"mlp": mlp, "simple_convnet": simple_convnet, "deep_convnet": deep_convnet, "resnet20": resnet20}


class Training:
    """One form of the training: a replica of the network, and the optimizer of its weights."""

    def __init__(self, model, layout, adam, images, labels, batch_size, rank, ranks):
        torch.manual_seed(0)
        self.layout = LAYOUTS[layout]
        network = MODELS[model]().to(memory_format=self.layout)
        self.network = network
        if ranks > 1:
            self.network = DistributedDataParallel(network, gradient_as_bucket_view=True, static_graph=True)
        self.optimizer = torch.optim.Adam(network.parameters(), lr=0.001, **{adam: True})
        self.loss = nn.CrossEntropyLoss()
        self.images, self.labels = images.contiguous(memory_format=self.layout), labels
        self.batch_size = batch_size
        # All ranks have the same order of the epoch. This rank takes the rows from start to stop of each batch.
        self.start, self.stop = batch_size * rank // ranks, batch_size * (rank + 1) // ranks
        self.random = torch.Generator().manual_seed(1)
        self.order, self.position = torch.empty(0, dtype=torch.int64), 0

    def step(self):
        if self.position + self.batch_size > len(self.order):
            self.order, self.position = torch.randperm(len(self.labels), generator=self.random), 0
        rows = self.order[self.position + self.start : self.position + self.stop]
        self.position += self.batch_size
        images = self.images[rows].contiguous(memory_format=self.layout)
        self.optimizer.zero_grad(set_to_none=True)
        self.loss(self.network(images), self.labels[rows]).backward()
        self.optimizer.step()


def main(address, rank, job):
    """Connect to the socket at `address`, introduce this rank, and take steps until the socket closes."""
    torch.set_num_threads(1)
    if job["ranks"] > 1:
        store = f"file://{address}.ranks"
        torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=job["ranks"])
    torch.manual_seed(2)
    images = torch.randn(job["samples"], 1, 28, 28)
    labels = torch.randint(CLASSES, (job["samples"],))
    layouts = LAYOUTS if job["model"] != "mlp" else ["default"]
    trainings = {
        f"{layout}, {adam} Adam": Training(
            job["model"], layout, adam, images, labels, job["batch_size"], rank, job["ranks"]
        )
        for layout in layouts
        for adam in ADAMS
    }
    about = f"PyTorch {torch.__version__} ({torch.backends.cpu.get_cpu_capability()})"
    with socket.socket(socket.AF_UNIX) as channel:
        channel.connect(address)
        with channel.makefile("rw") as lines:
            parameters = sum(weights.numel() for weights in MODELS[job["model"]]().parameters())
            answer = {"rank": rank, "about": about, "forms": list(trainings), "parameters": parameters}
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
    if job["ranks"] > 1:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3]))
