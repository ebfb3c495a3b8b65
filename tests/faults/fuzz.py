"""Alter files at random and run the command on each of them, in one process: ``fuzz.py KIND SEED COUNT``.

A run must end with exit code 2 or 3 and one line of distdl. If the altered file is still valid, the command must accept
it; a plain reading of the same bytes decides that. The training itself does not run.

The result is printed as JSON. A failure names seed and number; ``fuzz.py KIND SEED COUNT NUMBER`` repeats that one.
"""

from __future__ import annotations

import copy
import gzip
import hashlib
import importlib
import io
import json
import os
import random
import shutil
import struct
import sys
import tempfile
import time
import tomllib
import traceback
import warnings
import zlib
from collections import Counter
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import ClassVar

sys.path.insert(0, str(Path(__file__).parents[1] / "end_to_end"))

import numpy as np
import safetensors.numpy
from bad_inputs import MNIST_FILES, TINY, mnist_files, write_files

from distdl import cli, config, train_command
from distdl.engine.fault_injection import fail_at
from distdl.engine.storage import checkpoints

USER, DAMAGED = 2, 3
MOST_BYTES = 300e6
MOST_SECONDS = 2.0  # of CPU time of this process, so other processes do not matter

SMALL = [0, 1, 7, 8, 9, 0x7F, 0x80, 0xFF]
WIDE = [0, 1, 2**7, 2**8, 2**15, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**62, 2**63 - 1, 2**63, 2**64 - 1]


def altered(rng: random.Random, data: bytes, words: list[bytes]) -> bytes:
    """Return the bytes with one to four alterations."""
    changed = bytearray(data)
    for _ in range(rng.choice([1, 1, 1, 2, 3, 4])):
        place = rng.randrange(len(changed) + 1)
        end = min(len(changed), place + rng.choice([1, 2, 4, 8, 64, 1000]))
        what = rng.randrange(9)
        if what == 0 and place < len(changed):
            changed[place] ^= 1 << rng.randrange(8)
        elif what == 1 and place < len(changed):
            changed[place] = rng.choice(SMALL)
        elif what == 2:
            width, order = rng.choice([2, 4, 8]), rng.choice(["little", "big"])
            changed[place : place + width] = (rng.choice(WIDE) % 2 ** (8 * width)).to_bytes(width, order)
        elif what == 3:
            del changed[place:end]
        elif what == 4:
            changed[place:place] = changed[place:end] * rng.choice([1, 2, 50])
        elif what == 5:
            changed[place:place] = rng.randbytes(rng.choice([1, 4, 100]))
        elif what == 6:
            del changed[place:]
        elif what == 7:
            changed[place:end] = rng.choice(words)
        else:
            other = rng.randrange(len(changed) + 1)
            changed[place:end] = changed[other : other + end - place]
    return bytes(changed)


class Kind:
    """A kind of file: how to alter it, the command that reads it, and whether the command should accept it."""

    arguments: ClassVar[list[str]] = [*TINY, "--run-dir=new"]

    def alter(self, rng: random.Random) -> None:
        """Write an altered file."""

    def is_valid(self) -> bool | None:
        """Return whether the command should accept the file; None if that is unknown."""


class Idx(Kind):
    """One of MNIST's four files."""

    arguments: ClassVar = [*Kind.arguments, "--dataset=mnist", "--data-dir=data"]
    gzipped = False

    def __init__(self) -> None:
        self.files = mnist_files()
        self.words = [gzip.compress(bytes(2**20), mtime=0), bytes(5000)]

    def alter(self, rng: random.Random) -> None:
        shutil.rmtree("data", ignore_errors=True)
        write_files("data", self.files)
        self.name = rng.choice(MNIST_FILES)
        content = self.files[self.name]
        if self.gzipped:
            content = gzip.compress(content, rng.choice([0, 1, 9]), mtime=0)
            Path("data", self.name).unlink()
        self.changed = altered(rng, content, [content[:20], *self.words])
        Path("data", self.name + (".gz" if self.gzipped else "")).write_bytes(self.changed)

    def is_valid(self) -> bool:
        data, whole = self.changed, self.files[self.name]
        if data[:2] == b"\x1f\x8b":
            try:
                data = gzip.decompress(data)
            except (OSError, EOFError, zlib.error, struct.error):
                return False
        head = 16 if "images" in self.name else 8
        right = len(data) == len(whole) and data[:head] == whole[:head]  # another shape does not match the other files
        return right and ("images" in self.name or max(data[head:]) <= 9)


class Gzip(Idx):
    """One of MNIST's four files, compressed."""

    gzipped = True


class Npz(Kind):
    """A user's own data set, plain or compressed."""

    arguments: ClassVar = [*Kind.arguments, "--dataset=npz:data/mine.npz"]

    def __init__(self) -> None:
        images = np.arange(40 * 4 * 4, dtype=np.uint8).reshape(40, 4, 4)
        self.wholes = []
        for save in (np.savez, np.savez_compressed):
            for arrays in self.datasets(images, np.arange(40) % 10):
                content = io.BytesIO()
                save(content, **arrays)
                self.wholes.append(content.getvalue())

    def datasets(self, images: np.ndarray, labels: np.ndarray) -> list[dict[str, np.ndarray]]:
        """Return the arrays of valid files."""
        return [{"images": images, "labels": labels}]

    def alter(self, rng: random.Random) -> None:
        whole = rng.choice(self.wholes)
        words = [b"PK\x03\x04", b"PK\x05\x06", whole[:200], b"\x93NUMPY", b"(9999999999, 4, 4)", b"'|O'", b"'<f8'"]
        self.changed = altered(rng, whole, words)
        write_files("data", {"mine.npz": self.changed})

    def is_valid(self) -> bool | None:
        return True if self.changed in self.wholes else None  # a changed time in an archive is also valid


class Labels(Npz):
    """A user's own data set with other forms of labels, names of classes, and a validation part."""

    def datasets(self, images: np.ndarray, labels: np.ndarray) -> list[dict[str, np.ndarray]]:
        names = np.array([f"class {i}" for i in range(10)])
        parts = {"x_train": images[:20], "x_val": images[20:30], "x_test": images[30:]}
        return [
            {"images": images, "labels": names[labels]},
            {"images": images, "labels": labels > 4},
            {"images": images / 255, "labels": np.eye(2)[labels % 2]},
            {"images": images, "labels": labels[:, None] * 1.0},
            {"images": images, "labels": labels.astype(np.uint8), "class_names": names},
            {**parts, "y_train": labels[:20], "y_val": labels[20:30], "y_test": labels[30:]},
        ]

    arguments: ClassVar = [*Npz.arguments, "--loss=cross_entropy"]


class Arrays(Labels):
    """A correct archive whose arrays have other names, types, shapes or values."""

    NAMES = (
        *("images", "labels", "val_images", "val_labels", "test_images", "test_labels", "class_names"),
        *("x_train", "y_train", "X_TEST", "y_test", "data", "target", "arr_0", "", "a/b", "images.npy"),
    )
    DTYPES = ("u1", "i1", ">i8", "u8", "f2", "f4", ">f8", "?", "U3", "S2", "c8", "M8[s]", "O", "V3", "f16")
    VALUES = (0, 1, -1, 255, 2**31, 2**63 - 1, 0.5, 1e300, float("nan"), float("inf"))

    def alter(self, rng: random.Random) -> None:
        with np.load(io.BytesIO(rng.choice(self.wholes))) as archive:
            arrays = dict(archive)
        for _ in range(rng.choice([1, 1, 2, 3])):
            name = rng.choice(sorted(arrays))
            what = rng.randrange(6)
            array = arrays[name]
            if what == 0:
                arrays[rng.choice(self.NAMES)] = arrays.pop(name)
            elif what == 1:
                arrays[rng.choice(self.NAMES)] = array[: rng.choice([None, 1, 0])] if array.ndim else array
            else:
                arrays[name] = self._changed(rng, array, what)
        content = io.BytesIO()
        np.savez(content, **arrays)
        self.changed = content.getvalue()
        write_files("data", {"mine.npz": self.changed})

    def _changed(self, rng: random.Random, array: np.ndarray, what: int) -> np.ndarray:
        """Return the changed array; unchanged if NumPy cannot do it."""
        with np.errstate(all="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                return self._changed_if_possible(rng, array, what)
            except (ValueError, TypeError, OverflowError, RuntimeError):
                return array

    def _changed_if_possible(self, rng: random.Random, array: np.ndarray, what: int) -> np.ndarray:
        if what == 2:
            return array.astype(rng.choice(self.DTYPES))
        if what == 3:
            shape = [rng.choice([1, 2, 3, 4, 16, 40, 49, -1]) for _ in range(rng.randrange(6))]
            return array.reshape(shape)
        if what == 4:
            return array.transpose(rng.sample(range(array.ndim), array.ndim))
        changed = array.copy()
        changed.reshape(-1)[: rng.choice([1, 7, None])] = rng.choice(self.VALUES)
        return changed


class Images(Kind):
    """One of a user's own images."""

    arguments: ClassVar = [*Kind.arguments, "--dataset=folder:data"]

    def __init__(self) -> None:
        image = importlib.import_module("PIL.Image").linear_gradient("L").resize((4, 4))
        self.wholes = []
        for mode in ("L", "P", "RGB"):
            content = io.BytesIO()
            image.convert(mode).save(content, "PNG")
            self.wholes.append(content.getvalue())
        self.names = [f"{number}.png" for number in range(20)]

    def alter(self, rng: random.Random) -> None:
        shutil.rmtree("data", ignore_errors=True)
        whole = rng.choice(self.wholes)
        self.changed = altered(
            rng, whole, [b"IHDR", b"IDAT", b"IEND", b"tRNS", b"\xff\xd8\xff\xe0", b"P5 4 4 255\n", whole]
        )
        for part in "ab":
            write_files(f"data/{part}", dict.fromkeys(self.names, whole))
        Path("data", rng.choice("ab"), rng.choice(self.names)).write_bytes(self.changed)

    def is_valid(self) -> bool | None:
        return True if self.changed in self.wholes else None  # an image has no checksum over all of its bytes


class Photos(Images):
    """One of a user's own images, in another format than PNG, or of another kind."""

    arguments: ClassVar = [*Images.arguments, "--resize=3x2"]

    def __init__(self) -> None:
        super().__init__()
        images = importlib.import_module("PIL.Image")
        image = images.linear_gradient("L").resize((24, 16))
        exif = images.Exif()
        exif[0x0112] = 6
        self.wholes = []
        for mode, form, settings in (
            *(("RGB", "JPEG", {"exif": exif}), ("CMYK", "JPEG", {}), ("RGB", "MPO", {})),
            *(("P", "GIF", {}), ("RGB", "BMP", {}), ("1", "PPM", {}), ("RGB", "WEBP", {}), ("RGBA", "WEBP", {})),
            *(("RGB", "TIFF", {}), ("RGBA", "TIFF", {"compression": "tiff_lzw"}), ("L", "TIFF", {"exif": exif})),
            *(("I;16", "TIFF", {}), ("I;16", "PNG", {}), ("LA", "PNG", {"exif": exif}), ("I;16", "PPM", {})),
        ):
            content = io.BytesIO()
            deep = images.fromarray(np.asarray(image).astype(np.uint16) * 257)
            (deep if mode == "I;16" else image.convert(mode)).save(content, form, **settings)
            self.wholes.append(content.getvalue())


class Csv(Kind):
    """A CSV file that lists a user's own images."""

    arguments: ClassVar = [*Kind.arguments, "--dataset=csv:data/list.csv"]

    def __init__(self) -> None:
        image = importlib.import_module("PIL.Image").linear_gradient("L").resize((4, 4))
        content = io.BytesIO()
        image.save(content, "PNG")
        write_files("data", {f"{number}.png": content.getvalue() for number in range(40)})
        plain = "".join(f"{number}.png,{'ab'[number % 2]}\n" for number in range(40))
        numbers = "".join(f"{number}.png;{number / 2}\r\n" for number in range(40))
        parts = "".join(f"{number}.png\t{number % 3}\t{['train', 'val'][number > 30]}\n" for number in range(40))
        texts = ("path,label\n" + plain, "\ufefffile;target\r\n" + numbers, "image\tclass\tsplit\n" + parts)
        self.wholes = [text.encode() for text in texts]
        self.words = [
            b",",
            b";",
            b'"',
            b"\n",
            b"\r",
            b"\0",
            b"9" * 5000,
            b"nan",
            b"1e999",
            b"../",
            b"0.png,c\n",
            b"\xff",
        ]

    def alter(self, rng: random.Random) -> None:
        self.changed = altered(rng, rng.choice(self.wholes), self.words)
        write_files("data", {"list.csv": self.changed})

    def is_valid(self) -> bool | None:
        return True if self.changed in self.wholes else None  # another label is also valid


class Cifar(Kind):
    """One of CIFAR-10's files."""

    arguments: ClassVar = [*Kind.arguments, "--dataset=cifar10", "--data-dir=data"]

    def __init__(self) -> None:
        names = [*(f"data_batch_{number}.bin" for number in range(1, 6)), "test_batch.bin"]
        records = random.Random(0).randbytes(6 * 3072)
        self.files = {
            name: b"".join(bytes([label]) + records[3072 * place : 3072 * (place + 1)] for label in range(4))
            for place, name in enumerate(names)
        }
        write_files("data", self.files)

    def alter(self, rng: random.Random) -> None:
        write_files("data", self.files)
        name = rng.choice(sorted(self.files))
        self.changed = altered(rng, self.files[name], [bytes(3073), self.files[name][:3073], b"\x0a"])
        write_files("data", {name: self.changed})

    def is_valid(self) -> bool:
        labels = self.changed[::3073]
        return len(self.changed) % 3073 == 0 and len(labels) > 0 and max(labels) < 10


class Config(Kind):
    """A config file with every setting."""

    arguments: ClassVar = ["--config=mine.toml", "--run-dir=new"]

    def __init__(self) -> None:
        every = config.TrainConfig(batch_size=8, micro_batch_size=4, model="mlp", data_dir=Path("data"), max_steps=3)
        self.text = every.checked().to_toml()
        self.words = [line.encode() + b"\n" for line in self.text.splitlines()]
        for value in (*config.DATASETS, *config.MODELS, *config.OPTIMIZERS, "step", "allreduce"):
            self.words.append(f'"{value}"'.encode())
        self.words += [
            b"true",
            b"nan",
            b"inf",
            b"-1",
            b"1e400",
            b"9" * 5000,
            b"[[",
            b"]]",
            b"{a=",
            b'"""',
            b"\xff",
            b"\0",
        ]
        self.words += [
            b"= ",
            b"\n",
            b"#",
            b"1979-05-27T07:32:00Z",
            "\u2028".encode(),
            b"\\u0000",
            b"[" * 3000,
            b"x." * 999,
        ]

    def alter(self, rng: random.Random) -> None:
        self.changed = altered(rng, self.text.encode(), self.words)
        Path("mine.toml").write_bytes(self.changed)

    def is_valid(self) -> bool | None:
        try:
            values = tomllib.loads(self.changed.decode())
        except (ValueError, RecursionError):
            return False
        if not values.keys() <= config.FIELDS.keys() - config.NOT_IN_CONFIG_FILE:
            return False
        return None if tomllib.loads(self.text) != values else True


class Checkpoint(Kind):
    """The newest checkpoint of a run, altered at any place."""

    def __init__(self) -> None:
        write_files("data", mnist_files())
        _run([*TINY, "--dataset=mnist", "--data-dir=data", "--run-dir=run", "--max-steps=4"])
        (self.path,) = [path for path in Path("run/checkpoints").iterdir() if "4" in path.name]
        self.arguments = ["--run-dir=new", f"--resume={self.path}"]  # type: ignore[misc]
        self.whole = self.path.read_bytes()

    def alter(self, rng: random.Random) -> None:
        self.changed = altered(rng, self.whole, [self.whole[:8], self.whole[8:300], b"{}", b"[" * 9999, b'"', b"\\u"])
        self.path.write_bytes(self.changed)

    def is_valid(self) -> bool | None:
        return self.changed == self.whole


class Sealed(Checkpoint):
    """A checkpoint with altered content and a correct digest, as an attacker could create it."""

    def __init__(self) -> None:
        super().__init__()
        found = checkpoints.read(self.path)
        self.header, self.tensors = found.header, found.tensors

    def alter(self, rng: random.Random) -> None:
        header, tensors = json.loads(json.dumps(self.header)), dict(self.tensors)
        for _ in range(rng.choice([1, 1, 2])):
            if rng.randrange(3):
                _alter_json(rng, header)
            elif tensors:
                name = rng.choice(sorted(tensors))
                array = tensors.pop(name)
                if rng.randrange(4):
                    kind = rng.choice([array.dtype, np.float64, np.int64, np.uint8])
                    with np.errstate(all="ignore"):
                        array = array.astype(kind)
                    tensors[rng.choice([name, name, name + "x", "step"])] = array.reshape(-1)[
                        : rng.choice([None, 1, 0])
                    ]
        text = {"format": checkpoints.FORMAT, "sha256": checkpoints.NO_DIGEST, "header": header}
        data = safetensors.numpy.save(tensors, {"distdl": json.dumps(text)})
        if rng.randrange(3) == 0:  # also alter the outer header, with the same length
            length = int.from_bytes(data[:8], "little")
            place = data.index(b"}", 8) if rng.randrange(2) else rng.randrange(8, 8 + length)
            data = data[:place] + rng.choice([b"1", b"-", b"]", b"9", b" ", b"}"]) + data[place + 1 :]
        self.changed = data.replace(b"0" * 64, hashlib.sha256(data).hexdigest().encode(), 1)
        self.path.write_bytes(self.changed)

    def is_valid(self) -> None:
        return None  # a changed version text is also valid


VALUES = [
    None,
    True,
    False,
    0,
    1,
    -1,
    0.5,
    1e308,
    10**30,
    float("nan"),
    float("inf"),
    "",
    "x",
    "../../x",
    "\x1b[31m\n",
    [],
    {},
]
VALUES += [[1], {"a": 1}, "x" * 5000, "\u2028", -(2**63)]


def _alter_json(rng: random.Random, value: dict) -> None:
    """Change, remove or add a value at a random place of an object."""
    while True:
        key = rng.choice(sorted(value)) if value else "x"
        if isinstance(value.get(key), dict) and rng.randrange(4):
            value = value[key]
            continue
        what = rng.randrange(4)
        if what == 0:
            value.pop(key, None)
        elif what == 1:
            value[rng.choice(["x", "../../x", key + "x", "/tmp/x", ""])] = copy.deepcopy(rng.choice(VALUES))
        else:
            value[key] = copy.deepcopy(rng.choice(VALUES))  # the copy may be altered next
        return


KINDS: dict[str, Callable[[], Kind]] = {
    "IDX": Idx,
    "gzip": Gzip,
    "npz": Npz,
    "labels": Labels,
    "arrays": Arrays,
    "images": Images,
    "photos": Photos,
    "csv": Csv,
    "cifar": Cifar,
    "config": Config,
    "checkpoint": Checkpoint,
    "sealed": Sealed,
}


class _Prepared(BaseException):
    """All input is accepted, and the training would start."""


def _end_before_training() -> None:
    def end(_state: object) -> None:
        raise _Prepared

    fail_at("training", rank=0, nth=None, action=end)


def _run(arguments: list[str]) -> tuple[int, str]:
    err = io.StringIO()
    with redirect_stdout(io.StringIO()), redirect_stderr(err):
        try:
            code = cli.run(train_command.main, arguments)
        except _Prepared:
            code = 0
    return code, err.getvalue()


def problem_of(kind: Kind) -> tuple[str, int]:
    """Run the command once; return the problem (empty if there is no problem) and the exit code."""
    try:
        code, err = _run(kind.arguments)
    except BaseException:  # noqa: BLE001  a user would see a traceback
        return traceback.format_exc(), 1
    valid = kind.is_valid()
    if code == 0:
        problem = "accepted" if valid is False else ""
        lines = err.splitlines()
        problem += "" if all(line.startswith("distdl: warning: ") for line in lines) else f" and printed {err!r}"
        shutil.rmtree("new", ignore_errors=True)
    else:
        problem = "refused" if valid else "" if code in (USER, DAMAGED) else f"exit code {code}"
        one = (
            err.startswith("distdl: error: ")
            and err.endswith("\n")
            and len(err.splitlines()) == 1
            and err.count("\n") == 1
        )
        problem += "" if one and err[:-1].isprintable() else " and not one line"
        problem += " and did not remove the new folder" if Path("new").exists() else ""
        problem += f": {err[:500]!r}" if problem else ""
    return problem, code


def peak_bytes() -> int:
    """Return the peak memory of this program. `getrusage` would include that of its parent process."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])


def main(name: str, seed: int, count: int, only: int | None = None) -> int:
    """Test `count` altered files of a kind, or one of them, and print the result."""
    codes: Counter[str] = Counter()
    failures, slowest, heaviest = [], (0.0, -1), (0, -1)
    sys.modules["pooch"] = None  # type: ignore[assignment]  no config causes a download
    with (
        tempfile.TemporaryDirectory() as folder,
    ):
        os.chdir(folder)
        kind = KINDS[name]()
        _end_before_training()
        for number in range(count) if only is None else [only]:
            kind.alter(random.Random(f"{name} {seed} {number}"))
            started = time.process_time()
            problem, code = problem_of(kind)
            slowest = max(slowest, (time.process_time() - started, number))
            heaviest = max(heaviest, (peak_bytes(), -number))
            codes[str(code)] += 1
            if problem:
                failures.append(f"{name} {seed} {number}: {problem}")
        os.chdir("/")
    if slowest[0] > MOST_SECONDS:
        failures.append(f"{name} {seed} {slowest[1]}: took {slowest[0]:.1f} s")
    if heaviest[0] > MOST_BYTES:
        failures.append(f"{name} {seed} {-heaviest[1]}: {heaviest[0] / 1e6:.0f} MB")
    found = {"codes": codes, "failures": failures, "seconds": slowest[0], "megabytes": heaviest[0] / 1e6}
    sys.stdout.write(json.dumps(found) + "\n")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], *map(int, sys.argv[2:])))
