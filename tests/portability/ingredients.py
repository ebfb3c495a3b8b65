"""Print hashes of everything outside of the kernels that enters the weights of a run, as JSON.

The names in brackets are functions whose bits do depend on the CPU: they show that the families differ.
"""

import hashlib
import json

import numpy as np

from distdl.data import batch_order, normalization, split
from distdl.data.augmentation import Augmentation
from distdl.engine.environment import numerics
from distdl.nn.initializers import He, Normal, Xavier
from distdl.optim import OPTIMIZERS
from distdl.rng import Key
from distdl.schedules import make_schedule

KEY = Key(3)
AUGMENTATIONS = ("rotate=10", "rotate=15,shift=2,scale=0.1,flip,brightness=0.1", "crop=2,flip", "rotate=180")


def digest(*arrays):
    found = hashlib.sha256()
    for array in arrays:
        found.update(np.ascontiguousarray(array).tobytes())
    return found.hexdigest()[:12]


def ingredients():
    """Yield the name and the arrays of each."""
    yield "normal numbers", [KEY.of("normal").normal(100_001)]
    for initializer, fan_in in ((He(), 577), (Xavier(), 300), (Normal(0.01), 1)):
        yield f"initial weights {initializer}", [initializer(KEY, (9, 64, 77), fan_in).astype(np.float32)]
    yield "uniform numbers", [KEY.of("uniform").uniform(10_001)]
    yield "dropout masks", [KEY.of("mask").mask(10_001, 0.3)]
    yield "order of an epoch", [batch_order.epoch_order(KEY, 3, 60_000)]

    random = KEY.of("images").uniform(120 * 28 * 28 * 3).reshape(120, 28, 28, 3)
    images = {"float32": (random * 7 - 1.3).astype(np.float32), "bytes": (random * 256).astype(np.uint8)}
    rows = np.arange(3, 110)
    for name, array in images.items():
        for channels in (1, 3):
            part = array[..., :channels].copy()
            found = normalization.measure(part, rows)
            yield f"normalization of {channels} channels of {name}", [found.mean, found.deviation, found.apply(part)]
        for text in AUGMENTATIONS:
            augmentation = Augmentation.parse(text)
            batches = [array[start : start + 16] for start in range(0, 120, 16)]
            yield (
                f"{name} augmented by {text}",
                [augmentation.apply(batch, KEY.of(number)).copy() for number, batch in enumerate(batches)],
            )
    targets = (random[:, 0, :4, 0] * 5).astype(np.float32)[:, None, None]
    found = normalization.measure(targets, rows)
    yield "standardized targets", [found.mean, found.deviation, found.apply(targets)]
    labels = (KEY.of("labels").uniform(5000) * 10).astype(np.int64)
    for test_start in (None, 4000):
        parts = split.split(labels, test_start, KEY)
        yield f"split with test part {test_start}", [parts.training, parts.validation, parts.test]
    for name in ("cosine", "step"):
        schedule = make_schedule(name, 0.003, every_steps=3, factor=0.93, total_steps=3001, warmup_steps=5)
        yield f"schedule {name}", [np.array([schedule(step) for step in range(3001)])]
    for name in OPTIMIZERS:
        w = images["float32"].reshape(-1).copy()
        optimizer = OPTIMIZERS[name](w.size, weight_decay=1e-4, l1=1e-5, decay_slices=[slice(0, 50_000)])
        for step in range(1, 6):
            optimizer.update(w, (w * np.float32(0.1)), 0.003, step)
        yield f"optimizer {name}", [w, *optimizer.state.values()]

    x = images["float32"].reshape(-1)
    yield "[exp]", [np.exp(x)]
    yield "[log1p of float64]", [np.log1p(np.abs(x.astype(np.float64)))]
    yield "[product]", [x[:6400].reshape(64, 100) @ x[:6000].reshape(100, 60)]


if __name__ == "__main__":
    with numerics(1):
        print(json.dumps({name: digest(*arrays) for name, arrays in ingredients()}))
