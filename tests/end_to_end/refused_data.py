"""Refused data files: families of cases for test_bad_input."""

from __future__ import annotations

import gzip
import io
import os
import random
import shutil
import struct
from collections.abc import Iterator

import numpy as np
from bad_inputs import (
    MNIST_FILES,
    TEST_IMAGES,
    TEST_LABELS,
    TINY,
    TRAIN_IMAGES,
    TRAIN_LABELS,
    idx_bytes,
    mnist_files,
    write_files,
)
from refusals import DAMAGED, USER, Case


class DataShop:
    """Restores a folder with a tiny MNIST before every case."""

    def __init__(self, workshop):
        self.folder = workshop / "data"
        self.files = mnist_files()
        self.arguments = [*TINY, "--dataset=mnist", "--data-dir=data", "--run-dir=run"]

    def restore(self, **sizes):
        shutil.rmtree(self.folder, ignore_errors=True)
        return write_files(self.folder, mnist_files(**sizes))

    def case(self, what, name, content, code=DAMAGED, *words, suffix=""):
        self.restore()
        (self.folder / name).unlink()
        (self.folder / (name + suffix)).write_bytes(content)
        return Case(f"{name}: {what}", self.arguments, code, [name, *words])


def header_of(name):
    return 16 if "images" in name else 8


def torn_data(workshop) -> Iterator[Case]:
    shop, rng = DataShop(workshop), random.Random(1)
    for name, whole in shop.files.items():
        lengths = [*range(header_of(name)), len(whole) - 1, rng.randrange(header_of(name), len(whole))]
        for length in sorted(set(lengths)):
            yield shop.case(f"ends after {length}", name, whole[:length])
        for extra in (b"\0", b"\xff" * 1000):
            yield shop.case(f"{len(extra)} more bytes", name, whole + extra)
        yield shop.case("empty and gzipped", name, gzip.compress(b""), suffix=".gz")
        yield shop.case("random bytes", name, rng.randbytes(200))
        yield shop.case("text", name, b"<html>404 Not Found</html>\n")


def lying_headers(workshop) -> Iterator[Case]:
    shop, rng = DataShop(workshop), random.Random(2)
    for name in (TRAIN_IMAGES, TEST_LABELS):
        whole = shop.files[name]
        for place in range(4):
            for value in rng.sample(sorted(set(range(256)) - {whole[place]}), 4):
                changed = whole[:place] + bytes([value]) + whole[place + 1 :]
                yield shop.case(f"magic byte {place} is {value:#x}", name, changed)
        for dtype in (0x09, 0x0B, 0x0C, 0x0D, 0x0E):
            yield shop.case(
                f"element type {dtype:#x}", name, whole[:2] + bytes([dtype]) + whole[3:], DAMAGED, "expected"
            )
        for place in range(4, header_of(name)):
            bit = rng.randrange(8)
            changed = whole[:place] + bytes([whole[place] ^ 1 << bit]) + whole[place + 1 :]
            yield shop.case(f"bit {bit} of size byte {place}", name, changed)
            yield shop.case(f"bit {bit} of size byte {place}, gzipped", name, gzip.compress(changed), suffix=".gz")
    images, labels = shop.files[TRAIN_IMAGES], shop.files[TRAIN_LABELS]
    for shape in ((0, 4, 4), (20, 0, 4), (20, 4, 0), (2**32 - 1,) * 3, (2**31, 1, 1), (1, 2**16, 2**16), (320, 1, 2)):
        content = images[:4] + struct.pack(">3I", *shape) + images[16:]
        yield shop.case(f"shape {shape}", TRAIN_IMAGES, content)
        yield shop.case(f"shape {shape}, gzipped", TRAIN_IMAGES, gzip.compress(content), suffix=".gz")
    for count in (0, 19, 21, 2**32 - 1):
        yield shop.case(f"{count} labels", TRAIN_LABELS, labels[:4] + struct.pack(">I", count) + labels[8:])
    yield shop.case("labels are images", TRAIN_LABELS, images)
    yield shop.case("images are labels", TRAIN_IMAGES, labels)


def wrong_labels(workshop) -> Iterator[Case]:
    shop, rng = DataShop(workshop), random.Random(3)
    for name in (TRAIN_LABELS, TEST_LABELS):
        whole = shop.files[name]
        for value in (10, 11, 128, 255):
            place = rng.randrange(8, len(whole))
            changed = whole[:place] + bytes([value]) + whole[place + 1 :]
            yield shop.case(f"label {value} at {place - 8}", name, changed, DAMAGED, str(value), str(place - 8))
        for count in (1, len(whole) - 9, len(whole) - 7, 1000):
            other = idx_bytes(np.ones(count, np.uint8))
            yield shop.case(f"{count} labels for {len(whole) - 8} images", name, other, USER, f"{count} labels")
    for height, width in ((4, 5), (5, 4), (1, 1), (16, 1), (28, 28)):
        other = mnist_files(height=height, width=width)[TEST_IMAGES]
        yield shop.case(f"test images {height}x{width}", TEST_IMAGES, other, USER, str((height, width)), "(4, 4)")
    for training in range(1, 10):
        shop.restore(training=training)
        yield Case(f"{training} training images", shop.arguments, USER, ["validation part", "empty"])


def damaged_gzip(workshop) -> Iterator[Case]:
    shop, rng = DataShop(workshop), random.Random(4)
    for name, plain in shop.files.items():
        whole = gzip.compress(plain, mtime=0)
        for length in sorted({2, 3, 9, 10, 11, len(whole) - 1, len(whole) - 8, rng.randrange(12, len(whole))}):
            yield shop.case(f"gzip ends after {length}", name, whole[:length], suffix=".gz")
        for place in range(-8, 0):
            changed = bytearray(whole)
            changed[place] ^= 1 << rng.randrange(8)
            yield shop.case(f"bit flipped in gzip checksum {place}", name, bytes(changed), suffix=".gz")
    whole = gzip.compress(shop.files[TRAIN_IMAGES], mtime=0)
    yield shop.case("gzip method 9", TRAIN_IMAGES, whole[:2] + b"\x09" + whole[3:], suffix=".gz")
    yield shop.case("gzip reserved flags and a cut", TRAIN_IMAGES, whole[:3] + b"\xff" + whole[4:20], suffix=".gz")
    yield shop.case("gzip, then rubbish", TRAIN_IMAGES, whole + b"rubbish", suffix=".gz")
    yield shop.case("two members", TRAIN_IMAGES, whole + whole, DAMAGED, "continues", suffix=".gz")
    yield shop.case("not gzip", TRAIN_IMAGES, b"\x1f\x9d" + whole[2:], suffix=".gz")
    yield shop.case("gzip of gzip", TRAIN_IMAGES, gzip.compress(whole), suffix=".gz")
    yield shop.case("zip", TRAIN_IMAGES, b"PK\x03\x04" + whole[4:], suffix=".gz")
    yield shop.case("bzip2", TRAIN_IMAGES, b"BZh9" + whole[4:], suffix=".gz")
    # A quarter of a gigabyte of zeros, in a quarter of a megabyte.
    zeros = bytes(2**20)
    bomb = io.BytesIO()
    with gzip.GzipFile(fileobj=bomb, mode="wb", compresslevel=9) as stream:
        stream.write(shop.files[TRAIN_IMAGES])
        for _ in range(256):
            stream.write(zeros)
    yield shop.case("a bomb after intact images", TRAIN_IMAGES, bomb.getvalue(), DAMAGED, "continues", suffix=".gz")
    labels = gzip.compress(shop.files[TRAIN_LABELS] + zeros * 64)
    yield shop.case("a bomb after intact labels", TRAIN_LABELS, labels, DAMAGED, "continues", suffix=".gz")
    huge = idx_bytes(np.zeros(0), (2**20, 2**6, 2**6))
    yield shop.case("4 GiB declared in little", TRAIN_IMAGES, gzip.compress(huge), DAMAGED, "declares", suffix=".gz")
    some = gzip.compress(idx_bytes(np.zeros(0), (2**7, 2**10, 2**10)) + zeros * 4)
    yield shop.case("128 MiB declared, 4 there", TRAIN_IMAGES, some, suffix=".gz")
    # A correct header of a sparse file that is too large.
    case = shop.case("3 GiB", TRAIN_IMAGES, idx_bytes(np.zeros(0), (3, 2**15, 2**15)), USER, "at most")
    os.truncate(shop.folder / TRAIN_IMAGES, 16 + 3 * 2**30)
    yield case


def missing_data(workshop) -> Iterator[Case]:
    shop = DataShop(workshop)
    for name in MNIST_FILES:
        (shop.restore() / name).unlink()
        yield Case(f"no {name}", shop.arguments, USER, [name, "--data-dir"])
        for kind in ("folder", "pipe", "loop", "dangling", "/dev/zero", "/dev/full"):
            path = shop.restore() / name
            path.unlink()
            if kind == "folder":
                path.mkdir()
            elif kind == "pipe":
                os.mkfifo(path)
            else:
                path.symlink_to({"loop": name, "dangling": "nowhere"}.get(kind, kind))
            yield Case(f"{name} is {kind}", shop.arguments, USER, [name])
    (workshop / "empty").mkdir()
    (workshop / "file").write_text("x")
    for path in ("missing", "empty", "file", "file/x", "data/" + TRAIN_IMAGES, "/dev/null", "/proc/self"):
        arguments = [*TINY, "--dataset=mnist", "--run-dir=run", f"--data-dir={path}"]
        yield Case(f"--data-dir {path}", arguments, USER, [path, "--data-dir"])


def images_that_do_not_fit(workshop) -> Iterator[Case]:
    shop = DataShop(workshop)
    for model, least in (("simple_convnet", 6), ("deep_convnet", 4)):
        for height, width in [(side, side) for side in range(1, least)] + [(1, 20), (20, 1), (least - 1, 9), (9, 2)]:
            shop.restore(height=height, width=width)
            arguments = [*shop.arguments, f"--model={model}"]
            yield Case(f"{model} on {height}x{width}", arguments, USER, ["2d_", "input", "larger image"])


FAMILIES = [
    torn_data,
    lying_headers,
    wrong_labels,
    damaged_gzip,
    missing_data,
    images_that_do_not_fit,
]
