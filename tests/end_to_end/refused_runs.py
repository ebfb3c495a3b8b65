"""Families of refused checkpoints and run folders, for test_bad_input."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import random
import shutil
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import safetensors.numpy
from bad_inputs import TINY, TRAIN_IMAGES, mnist_files, write_files
from refusals import DAMAGED, USER, Case, outcome

from distdl.engine.storage import checkpoints


class RunShop:
    """A short run in ``run``. Its checkpoints can be damaged one at a time."""

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
        """Return a case that resumes from the newest checkpoint, which holds `content`."""
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
    """Return a safetensors file with these metadata and a correct digest."""
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
        more = ["--schedule=step"] if flag.startswith("--lr-step") else []  # they have no effect without it
        yield shop.resume(f"{flag} {value}", USER, [f"{flag} is", value, "in the checkpoint"], flag, value, *more)
    yield shop.resume("fewer epochs", USER, ["--epochs 1 ", "--epochs 2 or more"], "--epochs=1")
    yield shop.resume("fewer steps", USER, ["taken 6 steps", "--max-steps is 5"], "--max-steps=5")
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
    words = ["run/config.toml", "missing or empty", "--config"]
    (shop.folder / "config.toml").write_text("")
    for arguments in (["--resume=run"], ["--resume=auto", "--run-dir=run"], [f"--resume={shop.newest}"]):
        yield Case(f"config.toml empty, {arguments[0][:13]}", arguments, DAMAGED, words)
    (shop.folder / "config.toml").unlink()
    for arguments in (["--resume=run"], ["--resume=auto", "--run-dir=run"]):
        yield Case(f"config.toml missing, {arguments[0]}", [*arguments, "--seed=0"], DAMAGED, words)
    (workshop / "mine.toml").write_text(text)
    yield shop.resume("config.toml missing, and another", USER, ["--seed is 1 here"], "--config=mine.toml", "--seed=1")
    (shop.folder / "config.toml").write_text(text)
    for path in shop.paths:
        path.write_bytes(path.read_bytes()[:-1])
    for arguments in (["--resume=run"], ["--resume=auto", "--run-dir=run"], ["--resume=run", "--run-dir=new"]):
        words = ["no checkpoint in", "intact", "damaged"]
        yield Case(f"all checkpoints damaged, {arguments}", arguments, DAMAGED, words)


def transfers(workshop) -> Iterator[Case]:
    shop = RunShop(workshop)
    new = [*shop.settings, "--run-dir=new"]
    os.mkfifo(workshop / "pipe")
    (workshop / "loop").symlink_to("loop")
    (workshop / "bare" / "checkpoints").mkdir(parents=True)
    for path in ("", "missing", "run/checkpoints/step-000000009.safetensors", "bare", "pipe", "loop", "/dev/zero"):
        yield Case(f"--init-from {path}", [*new, f"--init-from={path}"], USER, [f"--init-from {path}"])
    yield Case("--init-from of a text", [*new, "--init-from=run/config.toml"], DAMAGED, ["config.toml", "damaged"])
    yield from state_dicts(workshop, new)
    words = [str(shop.newest.relative_to(workshop)), "--model logistic", "(16, 100) there", "(16, 10) here"]
    yield Case("nothing agrees", [*new, "--model=logistic", "--init-from=run"], USER, words)
    yield shop.resume("another --init-from", USER, ["--init-from is 'run' here and None"], "--init-from=run")
    yield shop.resume("another --freeze", USER, ["--freeze is 'affine_1' here and None"], "--freeze=affine_1")
    for name, meant in (("afine_1", "affine_1"), ("affine_1.weihgt", "affine_1.weight"), ("Affine_2", "affine_2")):
        words = [repr(name), "affine_1.bias", f"did you mean {meant!r}?"]
        yield Case(f"--freeze {name}", [*new, f"--freeze=affine_1,{name}"], USER, words)
    for nothing in ("", ",", "affine_1,", "\0", "x" * 500):
        yield Case(f"--freeze {nothing[:9]!r}", [*new, f"--freeze={nothing}"], USER, ["--freeze", "affine_1.bias"])
    for everything in ("affine_1,affine_2", "affine_2.bias,affine_1, affine_2.weight"):
        yield Case(f"--freeze {everything}", [*new, f"--freeze={everything}"], USER, [everything, "nothing to train"])
    shop.newest.write_bytes(shop.whole[:-1])
    path = str(shop.newest.relative_to(workshop))
    yield Case("--init-from a damaged file", [*new, f"--init-from={path}"], DAMAGED, [path, "damaged"])
    for one in shop.paths:
        one.write_bytes(one.read_bytes()[:-1])
    yield Case("--init-from with all damaged", [*new, "--init-from=run"], DAMAGED, ["no checkpoint in", "intact"])


def state_dicts(workshop, new) -> Iterator[Case]:
    """Yield files of PyTorch that are no initial weights of the network."""
    shape, half = np.ones((1, 5, 5, 1), np.float32), np.ones(100, np.float16)
    wrong = {
        "unknown": ({"encoder.weight": shape}, ["encoder.weight", "affine_1.weight"]),
        "small": ({"affine_1.weight": shape[0, 0]}, ["(1, 5) there", "(16, 100) here"]),
        "half": ({"affine_1.bias": half}, ["affine_1.bias in F16", "F32"]),
        "nan": ({"affine_1.bias": np.full(100, np.nan, np.float32)}, ["NaN", "affine_1.bias"]),
    }
    for name, (arrays, words) in wrong.items():
        safetensors.numpy.save_file(arrays, workshop / f"{name}.safetensors")
        flag = f"--init-from={name}.safetensors"
        yield Case(f"a state dict: {name}", [*new, flag], USER, [f"{name}.safetensors", *words])
    (workshop / "cut.safetensors").write_bytes((workshop / "small.safetensors").read_bytes()[:-1])
    yield Case("a torn state dict", [*new, "--init-from=cut.safetensors"], DAMAGED, ["cut.safetensors", "damaged"])
    (workshop / "model.pth").write_bytes(b"PK\x03\x04" + bytes(100))
    yield Case("a pickled state dict", [*new, "--init-from=model.pth"], USER, ["model.pth", "pickled", "safetensors"])


# --------------------------------------------------------------------------------------------------- run folders


class Locked:
    """A lock on a run folder as by another process: flock distinguishes open files, not processes."""

    def __enter__(self):
        self.file = Path("run/lock").open("rb")
        fcntl.flock(self.file, fcntl.LOCK_EX)

    def __exit__(self, *_):
        self.file.close()


class Refusing:
    """A disk on which a system call fails, from the `after`-th call on, for paths that contain `where`."""

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
    flipped_bits,
    torn_checkpoints,
    foreign_checkpoints,
    other_runs,
    transfers,
    unusable_run_folders,
    refusing_disks,
]
