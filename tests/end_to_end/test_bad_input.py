"""More than five hundred wrong command lines, settings, data sets, checkpoints and folders, in one process.

Each is refused with exit code 2 (what the user gave) or 3 (a damaged file) and one line of ours that names what is
wrong; nothing is printed besides, nothing is left behind or changed, and memory stays bounded.
"""

from __future__ import annotations

import errno
import fcntl
import gzip
import hashlib
import io
import json
import os
import random
import shutil
import struct
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import safetensors.numpy
from bad_inputs import (
    MNIST_FILES,
    TEST_IMAGES,
    TEST_LABELS,
    TINY,
    TRAIN_IMAGES,
    TRAIN_LABELS,
    changes,
    idx_bytes,
    mnist_files,
    picture,
    without_launcher,
    write_files,
)

from distdl import config, engine, startup, train
from distdl.engine import checkpoint as checkpoints
from distdl.launcher import read_launch

pytestmark = pytest.mark.skipif(read_launch().size > 1, reason="starts trainings of one process")

LEAST_CASES = 500
MOST_BYTES = 100e6
TOO_LONG = "x" * 300
PATH_FLAGS = ("--config", "--data-dir", "--run-dir", "--resume")

USER, DAMAGED = 2, 3


@dataclass
class Case:
    """A command line, the exit code it deserves, and what its one line must mention."""

    name: str
    arguments: list[str]
    code: int
    words: list[str] = field(default_factory=list)
    during: Callable[[], AbstractContextManager[object]] = nullcontext


@pytest.fixture
def workshop(tmp_path, monkeypatch):
    """An empty working folder, a plain start's environment, and shared memory where leftovers are seen."""
    from distdl.parallel import shared

    folder = tmp_path / "workshop"
    (folder / "shm").mkdir(parents=True)
    monkeypatch.chdir(folder)
    monkeypatch.setattr(shared, "SHARED_MEMORY", folder / "shm")
    for name in os.environ.keys() - without_launcher(os.environ).keys():
        monkeypatch.delenv(name)
    for name in [name for name in os.environ if name.endswith("_NUM_THREADS")]:
        monkeypatch.setenv(name, os.environ[name])  # so that what a case sets is undone
    return folder


class Memory:
    """Measures the most bytes held inside. Where nothing reads a file it is left out: it takes five times as long."""

    peak = 0

    def __enter__(self):
        tracemalloc.start()

    def __exit__(self, *_):
        self.peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()


def outcome(arguments):
    """Run the command and return its exit code, what it printed, and the most bytes it held."""
    out, err, memory = io.StringIO(), io.StringIO(), Memory()
    reads_a_config = any(argument.startswith("--config") for argument in arguments)
    original = engine.train

    def measured(checked):
        with nullcontext() if reads_a_config else memory:
            return original(checked)

    whole = memory if reads_a_config else nullcontext()
    with patch.object(engine, "train", measured), redirect_stdout(out), redirect_stderr(err), whole:
        code = startup.run(train.main, arguments)
    return code, out.getvalue(), err.getvalue(), memory.peak


def problems_of(case: Case) -> list[str]:
    """Run a case and return what is wrong with the way it was refused."""
    before = picture(".")
    try:
        with case.during():
            code, out, err, peak = outcome(case.arguments)
    except (Exception, SystemExit) as error:  # noqa: BLE001  what a user would see as a traceback
        return [f"raised {error!r}", *changes(before, picture("."))]
    problems = changes(before, picture("."))
    if code != case.code:
        problems.append(f"exit code {code} instead of {case.code}")
    if not (err.startswith("distdl: error: ") and err.endswith("\n") and len(err.splitlines()) == 1):
        problems.append("not one line of ours")
    problems += [f"no word of {word!r}" for word in case.words if word not in err]
    problems += ["a traceback"] if "Traceback" in err else []
    problems += [f"printed {out[:200]!r}"] if out else []
    problems += [f"held {peak / 1e6:.0f} MB"] if peak > MOST_BYTES else []
    return [*problems, f"said {err!r}"] if problems else []


# ------------------------------------------------------------------------------------------------------ flags


def flag_of(name):
    return "--" + name.replace("_", "-")


def typos(name):
    """Return some ways to misspell a flag: a letter left out, two swapped, one too many, one replaced."""
    rng = random.Random(name)
    flag, place = flag_of(name), rng.randrange(3, len(flag_of(name)))
    known = {flag_of(other) for other in config.FIELDS}
    made = {
        flag[:place] + flag[place + 1 :],
        flag[: place - 1] + flag[place] + flag[place - 1] + flag[place + 1 :],
        flag + "s",
        flag[:place] + "q" + flag[place + 1 :],
        flag.upper(),
    }
    return sorted(made - known)


def misspelt_flags(_workshop) -> Iterator[Case]:
    for name in config.FIELDS:
        for typo in typos(name):
            yield Case(f"flag {typo}", [typo, "1"], USER, ["unknown flag", typo])
    for flag in ("--", "--=3", "---epochs=2", "--no-record-hashes", "--tyro-print-completion=bash", "--\u00e9pochs"):
        yield Case(f"flag {flag}", [flag], USER, ["unknown flag"])
    for stray in ("stray", "run.toml", "3", "-x", "-epochs", "-1", "\u00bd", "@flags.txt"):
        yield Case(f"stray {stray}", [stray], USER, [stray, "--help"])
    yield Case("two values for one flag", ["--epochs", "3", "4"], USER, ["4"])


INTEGERS = {
    "epochs": 1,
    "batch_size": 1,
    "micro_batch_size": 1,
    "lr_step_epochs": 1,
    "seed": 0,
    "max_steps": 1,
    "checkpoint_every": 0,
    "keep_checkpoints": 1,
    "log_every": 0,
    "threads_per_rank": 1,
}
NO_INTEGERS = ("x", "", "1.5", "1e3", "0x10", "\u00bd", "nan", "1,000", "--5", "true", "9" * 5000, "1\x00")
NO_FLOATS = ("x", "", "1,5", "0x1", "1e", "--1", "1 2", "\u00bd", "1\x00")
FLOATS = {
    "lr": ("0", "-0.0", "-1", "nan", "-nan", "inf", "-inf", "1e999"),
    "weight_decay": ("-1", "-1e-300", "nan", "inf", "-inf", "1e999"),
    "l1_decay": ("-1", "-1e-300", "nan", "inf", "-inf", "1e999"),
    "clip_norm": ("0", "-1", "nan", "inf", "-inf", "1e999"),
    "lr_step_factor": ("0", "-0.5", "nan", "inf", "-inf", "1e999"),
    "stall_warning": ("-1", "-1e-300", "nan", "inf", "-inf", "1e999"),
    "detect_hangs": ("-1", "0.5", "1e-300", "nan", "inf", "1e999", "86400.01"),
}


def wrong_values(_workshop) -> Iterator[Case]:
    for name, least in INTEGERS.items():
        flag = flag_of(name)
        for value in NO_INTEGERS:
            yield Case(f"{flag}={value[:10]!r}", [f"{flag}={value}"], USER, [flag])
        for value in (least - 1, -7, -(10**30)):
            yield Case(f"{flag}={value}", [f"{flag}={value}"], USER, [flag, f"at least {least}", str(value)])
    for name, values in FLOATS.items():
        flag = flag_of(name)
        for value in (*NO_FLOATS, *values):
            yield Case(f"{flag}={value!r}", [f"{flag}={value}"], USER, [flag])
    for name in config.FIELDS.keys() - {"record_hashes", "balance"}:
        flag = flag_of(name)
        yield Case(f"{flag} without value", ["--seed=1", flag], USER, [flag])
    for value in ("true", "yes", "0", "False"):
        yield Case(f"switch with value {value}", [f"--record-hashes={value}"], USER, [value])
    for value in (1025, 10**6, 10**30):
        yield Case(f"{value} threads", [f"--threads-per-rank={value}"], USER, ["--threads-per-rank", "1024"])
    for batch, micro in ((1, 2), (15, 16), (128, 129), (8, 10**30)):
        arguments = [f"--batch-size={batch}", f"--micro-batch-size={micro}"]
        yield Case(f"micro-batch {micro} > batch {batch}", arguments, USER, [f"{micro} is larger", f" {batch}:"])
    yield Case("batch below the micro-batch's default", ["--batch-size=15"], USER, ["--micro-batch-size 16"])


CHOICES = {
    "dataset": config.DATASETS,
    "model": config.MODELS,
    "optimizer": config.OPTIMIZERS,
    "loss": ("auto", "cross_entropy", "binary_cross_entropy", "mean_squared_error"),
    "schedule": ("constant", "step", "cosine"),
    "reduction": ("tree", "allreduce"),
}


def endless_schedules(_workshop) -> Iterator[Case]:
    for factor, epochs, length in (("1e200", 3, 1), ("10", 400, 1), ("1.5", 10**30, 1), ("1e308", 21, 10)):
        flags = [f"--lr-step-factor={factor}", f"--epochs={epochs}", f"--lr-step-epochs={length}", "--lr=10"]
        yield Case(f"factor {factor}", ["--schedule=step", *flags], USER, ["--lr-step-factor", "infinite"])


def unknown_choices(_workshop) -> Iterator[Case]:
    for name, known in CHOICES.items():
        for choice in known:
            for value in {choice[:-1], choice + "s", choice.upper(), " " + choice, choice + "\n"} - set(known):
                words = [value.strip(), *known]
                yield Case(f"--{name}={value!r}", [f"--{name}={value}"], USER, words)
        for value in ("", "None", "../x", "\x1b[31m", "x" * 500):
            yield Case(f"--{name}={value[:10]!r}", [f"--{name}={value}"], USER, [name, *known])


def impossible_paths(workshop) -> Iterator[Case]:
    shutil.rmtree(workshop / "none", ignore_errors=True)
    for flag in PATH_FLAGS:
        mnist = ["--dataset=mnist"] if flag == "--data-dir" else []
        for path in ("a\0b", "\0", TOO_LONG, f"none/{TOO_LONG}", "x/" * 3000):
            word = "\\x00" if "\0" in path else path[:40]
            yield Case(f"{flag}={path[:10]!r}", [*TINY, *mnist, f"{flag}={path}"], USER, [word])
        if flag != "--config":
            yield Case(f"{flag} not UTF-8", [*TINY, *mnist, f"{flag}=a\udcff"], USER, [flag, "UTF-8"])
    yield Case("auto and an impossible folder", [*TINY, "--resume=auto", f"--run-dir={TOO_LONG}"], USER, ["too long"])
    yield Case("auto and no folder", [*TINY, "--resume=auto"], USER, ["--run-dir"])


# ------------------------------------------------------------------------------------------------ config files

VALID_TOML = config.TrainConfig(data_dir=Path("data"), max_steps=3).checked().to_toml()

NO_TOML = {
    "a word": "epochs",
    "no value": "epochs =",
    "two values": "epochs = 1 2",
    "twice": "epochs = 1\nepochs = 2",
    "open text": 'model = "mlp',
    "open array": "epochs = [1,",
    "open table": "[train",
    "bad escape": 'model = "\\q"',
    "surrogate": 'data_dir = "\\ud83d"',
    "leading zero": "epochs = 01",
    "python": "epochs = None",
    "python bool": "record_hashes = True",
    "json": '{"epochs": 1}',
    "yaml": "epochs: 1",
    "ini without equals": "[run]\nepochs 1",
    "bare text": "model = mlp",
    "single equals": "=",
    "a zip": "PK\x03\x04",
    "carriage return": "epochs = 1\rseed = 2",
    "hex float": "lr = 0x1p3",
    "comma number": "lr = 0,1",
    "quotes inside": 'model = "a"b"',
    "a million nines": "epochs = " + "9" * 5000,
    "key with space": "batch size = 1",
    "double dash": "--epochs = 1 1",
    "nested deeply": "epochs = " + "[" * 5000 + "]" * 5000,
    "tables nested deeply": "epochs = " + "{a=" * 3000,
}

WRONG_SETTINGS = {
    "epochs": ("true", '"x"', "1.5", "[1]", "{a=1}", "1979-05-27", "0", "-3", "inf"),
    "batch_size": ("false", '"many"', "0", "[8, 16]", "12:00:00"),
    "micro_batch_size": ("true", '""', "0", "1e3", "129"),
    "lr": ("true", '"fast"', "[0.1]", "nan", "inf", "-1", "0", "{}"),
    "weight_decay": ("true", '"x"', "-1", "nan", "[]"),
    "lr_step_factor": ("0", "nan", '"half"', "true"),
    "seed": ("-1", '"one"', "0.5", "true"),
    "model": ("true", "5", '"resnet"', '["mlp"]', '"MLP"', '"mlp\\u0000"'),
    "dataset": ("1", '"cifar"', "{name='digits'}", "true"),
    "optimizer": ("1", '"adamax"', "true", '[ "adam" ]'),
    "schedule": ('"linear"', "5", "false"),
    "reduction": ('"ring"', "1.5", "true"),
    "record_hashes": ('"yes"', "1", "0", '"true"', "[true]"),
    "threads_per_rank": ("0", "-2", '"all"', "100000"),
    "data_dir": ("true", "[]", '"a\\u0000b"', "{}"),
    "max_steps": ("0", '"x"', "true", "2.5"),
    "log_every": ("-1", "true", '"never"'),
    "stall_warning": ("-1", "true", '"never"', "nan", "inf"),
    "checkpoint_every": ("-1", "true", "1.5"),
    "keep_checkpoints": ("0", "true", '"all"'),
    "lr_step_epochs": ("0", "-1", "true"),
}


def config_files(workshop) -> Iterator[Case]:
    file = workshop / "bad.toml"

    def case(name, content, *words):
        file.write_bytes(content.encode() if isinstance(content, str) else content)
        return Case(f"TOML: {name}", ["--config=bad.toml"], USER, list(words))

    for name, content in NO_TOML.items():
        yield case(name, content, "bad.toml")
    rng = random.Random(7)
    for control in (0x00, 0x01, 0x07, 0x0B, 0x1B, 0x7F):
        for _ in range(4):
            place = rng.randrange(len(VALID_TOML))
            yield case(f"{control:#x} at {place}", VALID_TOML[:place] + chr(control) + VALID_TOML[place:], "bad.toml")
    for sequence in (b"\xff", b"\xfe\xff", b"\xc3", b"\xed\xa0\x80", b"\xf8\x88\x80\x80\x80", b"\x80"):
        place = rng.randrange(len(VALID_TOML))
        content = VALID_TOML.encode()
        yield case(f"bytes {sequence.hex()}", content[:place] + sequence + content[place:], "bad.toml")
    yield case("UTF-16", VALID_TOML.encode("utf-16"), "bad.toml")
    for line in VALID_TOML.splitlines()[1:]:
        name = line.split(" = ")[0]
        yield case(f"ends after {name} =", VALID_TOML.partition(line)[0] + f"{name} =", "bad.toml")
        unknown = typos(name)[0].removeprefix("--").replace("-", "_")
        yield case(f"unknown {unknown}", f"{unknown} = 1", "bad.toml", "unknown setting", unknown)
    for name in ("config", "run_dir", "resume", "train", "epoch-s", "epochs "):
        yield case(f"setting {name}", f'"{name}" = "x"', "bad.toml", name)
    for content in ("[train]\nepochs = 1", "train.epochs = 1", "[[train]]", "[epochs]\nx = 1", "epochs.x = 1"):
        yield case(f"table {content}", content, "bad.toml")
    yield case("a deep dotted key", "a" + ".a" * 2000 + " = 1", "bad.toml", "'a'")
    for name, values in WRONG_SETTINGS.items():
        for value in values:
            yield case(f"{name} = {value}", f"{name} = {value}", name.replace("_", "-").split("-")[0])
    yield case("too large", VALID_TOML + "#" * 2**20, "bad.toml", "larger")


def config_paths(workshop) -> Iterator[Case]:
    (workshop / "folder").mkdir()
    os.mkfifo(workshop / "pipe")
    (workshop / "loop").symlink_to("loop")
    (workshop / "dangling").symlink_to("nowhere")
    (workshop / "file").write_text("x")
    for path in ("missing.toml", "folder", "pipe", "loop", "dangling", "/dev/zero", "/dev/stdin", "file/x", "/proc"):
        yield Case(f"--config {path}", ["--config", path], USER, [path, "config file"])
        yield Case(f"--config={path} and flags", ["--seed=1", f"--config={path}", "--lr=1"], USER, [path])


# --------------------------------------------------------------------------------------------------- data files


class DataShop:
    """A folder of a tiny MNIST that is intact again for every case."""

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
            yield shop.case(f"{len(extra)} bytes more", name, whole + extra)
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
    yield shop.case("two members", TRAIN_IMAGES, whole + whole, DAMAGED, "goes on", suffix=".gz")
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
    yield shop.case("a bomb behind whole images", TRAIN_IMAGES, bomb.getvalue(), DAMAGED, "goes on", suffix=".gz")
    labels = gzip.compress(shop.files[TRAIN_LABELS] + zeros * 64)
    yield shop.case("a bomb behind whole labels", TRAIN_LABELS, labels, DAMAGED, "goes on", suffix=".gz")
    huge = idx_bytes(np.zeros(0), (2**20, 2**6, 2**6))
    yield shop.case("4 GiB declared in little", TRAIN_IMAGES, gzip.compress(huge), DAMAGED, "declares", suffix=".gz")
    some = gzip.compress(idx_bytes(np.zeros(0), (2**7, 2**10, 2**10)) + zeros * 4)
    yield shop.case("128 MiB declared, 4 there", TRAIN_IMAGES, some, suffix=".gz")
    # A header that tells the truth about a sparse file, which is too large.
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


# --------------------------------------------------------------------------------------------------- checkpoints


class RunShop:
    """A short run in ``run``, whose checkpoints can be damaged, one at a time."""

    def __init__(self, workshop, *flags):
        self.folder = workshop / "run"
        write_files(workshop / "data", mnist_files())
        self.settings = [*TINY, "--dataset=mnist", "--data-dir=data", *flags]
        code, _, err, _ = outcome([*self.settings, "--run-dir=run"])
        assert (code, err) == (0, "")
        self.paths = sorted((self.folder / "checkpoints").iterdir())
        self.newest = self.paths[-1]
        self.whole = self.newest.read_bytes()
        self.header_bytes = int.from_bytes(self.whole[:8], "little")
        self.metadata = json.loads(json.loads(self.whole[8 : 8 + self.header_bytes])["__metadata__"]["distdl"])

    def case(self, what, content, code=DAMAGED, *words):
        """The newest checkpoint holds `content` and is asked for by name."""
        self.newest.write_bytes(content)
        path = str(self.newest.relative_to(Path.cwd()))
        return Case(f"checkpoint: {what}", ["--resume", path], code, [path, *words])

    def resume(self, what, code, words, *flags, during=nullcontext):
        return Case(f"resume: {what}", ["--resume=run", *flags], code, words, during)


def flipped_bits(workshop) -> Iterator[Case]:
    shop, rng = RunShop(workshop), random.Random(5)
    end = 8 + shop.header_bytes
    digest = shop.whole.index(shop.metadata["sha256"].encode())
    places = {*range(8), 8, 9, end - 1, end, end + 1, len(shop.whole) - 1, digest, digest + 1, digest + 63}
    places |= set(rng.sample(range(8, end), 60)) | set(rng.sample(range(end, len(shop.whole)), 40))
    for place in sorted(places):
        changed = bytearray(shop.whole)
        changed[place] ^= 1 << rng.randrange(8)
        yield shop.case(f"bit flipped in byte {place}", bytes(changed), DAMAGED, "damaged")
    capital = shop.metadata["sha256"].upper().encode()
    yield shop.case("digest in capitals", shop.whole[:digest] + capital + shop.whole[digest + 64 :])
    yield shop.case("no digest", shop.whole[:digest] + b"0" * 64 + shop.whole[digest + 64 :])


def torn_checkpoints(workshop) -> Iterator[Case]:
    shop, rng = RunShop(workshop), random.Random(6)
    end = 8 + shop.header_bytes
    lengths = {0, 1, 7, 8, 9, end - 1, end, end + 1, len(shop.whole) - 1, 4096}
    lengths |= set(rng.sample(range(9, end), 10)) | set(rng.sample(range(end, len(shop.whole)), 10))
    for length in sorted(lengths):
        yield shop.case(f"ends after {length}", shop.whole[:length], DAMAGED, "damaged")
        if length not in (0, len(shop.whole)):
            zeros = shop.whole[:length] + bytes(len(shop.whole) - length)
            yield shop.case(f"zeros after {length}", zeros, DAMAGED, "damaged")
    for extra in (b"\0", b"x", bytes(8), rng.randbytes(5000), shop.whole):
        yield shop.case(f"more: {extra[:2]} x {len(extra)}", shop.whole + extra, DAMAGED, "damaged")
    for length in (1, 8, 9, 100, 4096, 100_000):
        yield shop.case(f"{length} random bytes", rng.randbytes(length), DAMAGED, "damaged")
        yield shop.case(f"{length} zeros", bytes(length), DAMAGED, "damaged")
    for announced in (0, 1, shop.header_bytes - 1, shop.header_bytes + 1, 2**20, 2**31, 2**32, 2**63, 2**64 - 1):
        content = announced.to_bytes(8, "little") + shop.whole[8:]
        yield shop.case(f"header of {announced} bytes announced", content, DAMAGED, "damaged")
    case = shop.case("sparse and huge", shop.whole, DAMAGED, "damaged")
    os.truncate(shop.newest, 2**33)
    yield case
    case = shop.case("only zeros and huge", b"", DAMAGED, "damaged")
    os.truncate(shop.newest, 2**33)
    yield case


def sealed(metadata, tensors=None):
    """Return a safetensors file with our metadata and a true digest, whatever else the metadata says."""
    given = {"format": checkpoints.FORMAT, "sha256": checkpoints.NO_DIGEST, **metadata}
    data = safetensors.numpy.save(tensors or {"a": np.zeros(3)}, {"distdl": json.dumps(given)})
    digest = hashlib.sha256(data).hexdigest().encode()
    return data.replace(checkpoints.NO_DIGEST.encode(), digest, 1)


def foreign_checkpoints(workshop) -> Iterator[Case]:
    shop = RunShop(workshop)
    tensors = safetensors.numpy.load(shop.whole)
    yield shop.case("no metadata", safetensors.numpy.save(tensors), DAMAGED, "no checkpoint of distdl")
    for value in (
        "",
        "1",
        "null",
        "[]",
        "{}",
        "{",
        '"x"',
        '{"sha256": 1}',
        '{"sha256": ""}',
        "[" * 100_000,
        "9" * 5000,
    ):
        content = safetensors.numpy.save(tensors, {"distdl": value})
        yield shop.case(f"metadata {value[:20]}", content, DAMAGED, "damaged")
    for header in (
        b"",
        b"{}",
        b"[]",
        b"null",
        b"{",
        b"\xff" * 64,
        b"[" * 2**19,
        b"[[]," * 2**17,
        b'{"__metadata__": {}}',
    ):
        content = len(header).to_bytes(8, "little") + header
        yield shop.case(f"header {header[:12]!r}", content, DAMAGED, "damaged")
    header = shop.metadata["header"]
    yield shop.case("a later format", sealed({"format": "distdl checkpoint 2", "header": header}), USER, "format")
    for broken in (None, [], {}, "x", 1):
        yield shop.case(f"sealed header {broken}", sealed({"header": broken}), DAMAGED, "damaged")
    for name in ("step", "config", "progress", "log_bytes", "data_sha256", "versions", "kernel_family"):
        for value in (None, []):
            content = sealed({"header": {**header, name: value}}, tensors)
            yield shop.case(f"sealed header with {name} {value}", content, DAMAGED, name)
    yield shop.case("other tensors", sealed({"header": header}), USER, "another model", "absent")
    fewer = {name: array for name, array in tensors.items() if name != "affine_1.weight"}
    yield shop.case("a tensor fewer", sealed({"header": header}, fewer), USER, "another model", "affine_1.weight")
    wider = {**tensors, "affine_1.weight": tensors["affine_1.weight"].astype(np.float64)}
    yield shop.case("float64", sealed({"header": header}, wider), USER, "affine_1.weight", "float64", "float32")
    for name, settings in (("step", {"step": [1]}), ("config", {"config": {"seed": 5}})):
        yield shop.case(
            f"sealed {name}", sealed({"header": {**header, **settings}}, tensors), 3 if name == "step" else 2
        )


OTHER_SETTINGS = {
    "--dataset": "digits",
    "--model": "simple_convnet",
    "--batch-size": "16",
    "--micro-batch-size": "2",
    "--optimizer": "sgd",
    "--lr": "0.5",
    "--weight-decay": "0.1",
    "--schedule": "step",
    "--lr-step-epochs": "1",
    "--lr-step-factor": "0.2",
    "--seed": "1",
    "--reduction": "allreduce",
}


def other_runs(workshop) -> Iterator[Case]:
    shop = RunShop(workshop)
    for flag, value in OTHER_SETTINGS.items():
        yield shop.resume(f"{flag} {value}", USER, [f"{flag} is", value, "in the checkpoint"], flag, value)
    yield shop.resume("fewer epochs", USER, ["--epochs 1 ", "--epochs 2 or more"], "--epochs=1")
    changed = mnist_files()
    changed[TRAIN_IMAGES] = changed[TRAIN_IMAGES][:-1] + bytes([changed[TRAIN_IMAGES][-1] ^ 1])
    write_files("other", changed)
    yield shop.resume("another pixel", USER, ["trained on other images"], "--data-dir=other")
    yield shop.resume("two differ", USER, ["--seed is 1", "--lr is 0.5"], "--seed=1", "--lr=0.5")
    for height, width in ((4, 5), (28, 28), (1, 1)):
        write_files("other", mnist_files(height=height, width=width))
        words = ["another model", "affine_1.weight", "(16, 100)", str((height * width, 100))]
        yield shop.resume(f"images {height}x{width}", USER, words, "--data-dir=other")
    shutil.rmtree("other")
    yield shop.resume("data gone", USER, ["other", "--data-dir"], "--data-dir=other")
    text = (shop.folder / "config.toml").read_text()
    for broken in ("epochs = [", "\0", "nonsense = 1", "batch_size = -1"):
        (shop.folder / "config.toml").write_text(text + broken)
        yield shop.resume(f"config.toml with {broken}", USER, ["config.toml"])
    (shop.folder / "config.toml").write_text(text)
    for path in shop.paths:
        path.write_bytes(path.read_bytes()[:-1])
    for arguments in (["--resume=run"], ["--resume=auto", "--run-dir=run"], ["--resume=run", "--run-dir=new"]):
        words = ["no checkpoint in", "intact", "damaged"]
        yield Case(f"all checkpoints damaged, {arguments}", arguments, DAMAGED, words)


# --------------------------------------------------------------------------------------------------- run folders


class Locked:
    """Another process's lock on a run folder: for flock, another open file is another process."""

    def __enter__(self):
        self.file = Path("run/lock").open("rb")
        fcntl.flock(self.file, fcntl.LOCK_EX)

    def __exit__(self, *_):
        self.file.close()


class Refusing:
    """A disk that refuses a system call on any path or file, from the `after`-th call on."""

    def __init__(self, call, number, after=0, where=""):
        self.call, self.number, self.after, self.where = call, number, after, where
        self.original = getattr(os, call)

    def __enter__(self):
        setattr(os, self.call, self.refuse)

    def __exit__(self, *_):
        setattr(os, self.call, self.original)

    def refuse(self, first, *others, **named):
        if self.where in str(first):
            self.after -= 1
            if self.after < 0:
                raise OSError(self.number, os.strerror(self.number), str(first))
        return self.original(first, *others, **named)


def unusable_run_folders(workshop) -> Iterator[Case]:
    shop = RunShop(workshop)
    (workshop / "file").write_text("x")
    (workshop / "loop").symlink_to("loop")
    (workshop / "full").mkdir()
    (workshop / "full" / "thesis.txt").write_text("two years of work")
    (workshop / "full" / "config.toml").write_text('title = "not a run"')
    for path in ("file", "file/x", "file/x/y/z", "loop", "loop/x", "/dev/null", "/proc/none/x", "/proc/self/new"):
        yield Case(f"--run-dir {path}", [*shop.settings, f"--run-dir={path}"], USER, [path])
        yield Case(f"auto --run-dir {path}", [*shop.settings, "--resume=auto", f"--run-dir={path}"], USER, [path])
    for path in ("run", "full", "."):
        yield Case(f"used {path}", [*shop.settings, f"--run-dir={path}"], USER, ["not empty", "--resume"])
    os.mkfifo(workshop / "pipe")
    (workshop / "bare" / "checkpoints").mkdir(parents=True)
    for path in (
        "missing",
        "missing/checkpoints/step-000000001.safetensors",
        "bare",
        "loop",
        "pipe",
        "/dev/zero",
    ):
        yield Case(f"--resume {path}", [*shop.settings, "--resume", path], USER, [f"--resume {path}"])
    yield Case("--resume of no run", [*shop.settings, "--resume=full"], USER, ["full/config.toml", "title"])
    strays = [shutil.copy(shop.newest, workshop / "stray.safetensors")]
    (workshop / "thesis" / "checkpoints").mkdir(parents=True)
    strays.append(shutil.copy(shop.newest, workshop / "thesis" / "checkpoints" / shop.newest.name))
    for name, content in (("notes.partial", "unsaved"), ("checkpoints/notes.partial", "unsaved")):
        (workshop / "thesis" / name).write_text(content)
    for stray in strays:
        path = str(stray.relative_to(workshop))
        yield Case(f"a checkpoint in no run, {path}", [*shop.settings, "--resume", path], USER, [path, "--run-dir"])
        arguments = [*shop.settings, "--resume", path, "--run-dir=thesis"]
        yield Case(f"into an unrelated folder, {path}", arguments, USER, ["thesis", "not empty"])
    yield Case("--resume of a text", [*shop.settings, "--resume=full/thesis.txt"], DAMAGED, ["thesis.txt"])
    yield Case("resume into a used folder", ["--resume=run", "--run-dir=full"], USER, ["full", "not empty"])
    (workshop / "odd" / "checkpoints" / "step-000000004.safetensors").mkdir(parents=True)
    for resume in (["--resume=odd"], ["--resume=auto", "--run-dir=odd"]):
        yield Case(f"a folder as checkpoint, {resume}", [*shop.settings, *resume], USER, ["step-000000004"])
    yield shop.resume("locked", USER, ["run", "in use"], during=Locked)
    yield Case("auto, locked", ["--resume=auto", "--run-dir=run"], USER, ["run", "in use"], Locked)


def refusing_disks(workshop) -> Iterator[Case]:
    shop = RunShop(workshop)
    (workshop / "empty").mkdir()
    for number in (errno.ENOSPC, errno.EACCES, errno.EROFS):
        reason = os.strerror(number)
        for call, after, where in (
            ("mkdir", 0, ""),
            ("mkdir", 1, ""),
            ("mkdir", 2, ""),
            ("open", 0, ".toml"),
            ("open", 0, ".json"),
            ("fsync", 0, ""),
            ("fsync", 3, ""),
            ("rename", 0, ""),
            ("rename", 1, ""),
        ):

            def refusing(call=call, number=number, after=after, where=where):
                return Refusing(call, number, after, where)

            name = f"{errno.errorcode[number]} from {call} {after} {where}"
            yield Case(f"new, {name}", [*shop.settings, "--run-dir=new/a/b"], USER, ["new/a/b", reason], refusing)
            if call != "mkdir":
                yield Case(f"empty, {name}", [*shop.settings, "--run-dir=empty"], USER, ["empty", reason], refusing)
                yield shop.resume(name, USER, ["run", reason], during=refusing)
    for number in (errno.EACCES, errno.EIO):

        def refusing(number=number):
            return Refusing("stat", number, 0, "elsewhere")

        reason = os.strerror(number)
        yield Case(f"stat {reason}", [*shop.settings, "--run-dir=elsewhere"], USER, ["elsewhere", reason], refusing)
        yield Case(f"resume, stat {reason}", [*shop.settings, "--resume=elsewhere"], USER, ["elsewhere"], refusing)

    def no_room():
        return Refusing("posix_fallocate", errno.ENOSPC)

    yield Case("no room for the data", [*shop.settings, "--run-dir=new"], USER, ["no room", "TMPDIR"], no_room)


FAMILIES = [
    misspelt_flags,
    wrong_values,
    endless_schedules,
    unknown_choices,
    impossible_paths,
    config_files,
    config_paths,
    torn_data,
    lying_headers,
    wrong_labels,
    damaged_gzip,
    missing_data,
    images_that_do_not_fit,
    flipped_bits,
    torn_checkpoints,
    foreign_checkpoints,
    other_runs,
    unusable_run_folders,
    refusing_disks,
]

CASES_RUN: dict[str, set[str]] = {}


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.__name__)
def test_bad_input_is_refused_in_one_line_and_leaves_nothing_behind(family, workshop):
    names, failures = [], []
    for case in family(workshop):
        names.append(case.name)
        failures += [f"{case.name}: {'; '.join(problems)}" for problems in [problems_of(case)] if problems]
    CASES_RUN[family.__name__] = set(names)
    assert not failures, f"{len(failures)} of {len(names)} cases:\n" + "\n".join(failures)
    assert len(set(names)) == len(names), "two cases of one name"


def test_more_than_five_hundred_cases_ran():
    if len(CASES_RUN) < len(FAMILIES):
        pytest.skip("only some of the families ran")
    assert sum(map(len, CASES_RUN.values())) >= LEAST_CASES


def test_a_wrong_flag_is_said_before_numpy_or_mpi_are_imported():
    import subprocess
    import sys

    program = (
        "import sys; from distdl import startup, train; code = startup.run(train.main, ['--epocs', '3']); "
        "sys.exit(code if not {'numpy', 'mpi4py'} & sys.modules.keys() else 99)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        check=False,
        text=True,
        timeout=60,
        env={**without_launcher(os.environ), "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert done.returncode == USER
    assert done.stderr == "distdl: error: unknown flag --epocs: did you mean --epochs?\n"


# ----------------------------------------------------------------------------------------- what is mended instead


@pytest.mark.parametrize("how", [["--resume=run"], ["--resume=auto", "--run-dir=run"]])
def test_the_checkpoint_before_a_damaged_one_is_used_and_the_damaged_one_named(workshop, how):
    shop = RunShop(workshop)
    receipt = [line for line in outcome(["--resume=run"])[1].splitlines() if "sha256" in line]
    damaged = bytearray(shop.whole)
    damaged[-5] ^= 4
    shop.newest.write_bytes(bytes(damaged))
    code, out, err, _ = outcome(how)
    assert code == 0
    assert err.startswith("distdl: warning: ")
    assert len(err.splitlines()) == 1
    assert str(shop.newest.relative_to(workshop)) in err
    assert "damaged" in err
    assert shop.paths[-2].name in out
    assert [line for line in out.splitlines() if "sha256" in line] == receipt
    assert shop.newest.read_bytes()[-8:] == shop.whole[-8:], "made anew"


def test_of_several_damaged_checkpoints_each_is_named(workshop):
    shop = RunShop(workshop, "--checkpoint-every=1", "--keep-checkpoints=5")
    for path in shop.paths[-2:]:
        path.write_bytes(b"")
    code, _, err, _ = outcome(["--resume=run"])
    assert code == 0
    assert [path.name in err for path in shop.paths[-3:]] == [False, True, True]
    assert len(err.splitlines()) == 2


def test_a_config_file_written_by_a_run_can_be_read_whatever_the_folder_is_called(workshop):
    for name in ("emoji \U0001f600", 'quote " and \\', "delete \x7f bell \x07", "line\nbreak"):
        folder = write_files(workshop / name, mnist_files())
        arguments = [*TINY, "--dataset=mnist", f"--data-dir={folder}", f"--run-dir={workshop}/run {name}"]
        assert outcome([*arguments, "--max-steps=1"])[0] == 0
        assert outcome([f"--resume={workshop}/run {name}", "--epochs=1"])[0] == 0


def test_a_resume_without_max_steps_goes_on_to_the_end(workshop):
    write_files(workshop / "data", mnist_files())
    assert outcome([*TINY, "--dataset=mnist", "--data-dir=data", "--run-dir=run", "--max-steps=1"])[0] == 0
    code, out, err, _ = outcome(["--resume=run"])
    assert (code, err) == (0, "")
    assert "test accuracy" in out
