"""Families of refused flags and config files, for test_bad_input."""

from __future__ import annotations

import os
import random
import shutil
import typing
from collections.abc import Iterator
from pathlib import Path

from bad_inputs import TINY
from refusals import USER, Case

from distdl import config

TOO_LONG = "x" * 300
PATH_FLAGS = ("--config", "--data-dir", "--run-dir", "--resume", "--init-from")


def flag_of(name):
    return "--" + name.replace("_", "-")


def typos(name):
    """Return misspellings of a flag: a letter left out, two swapped, one too many, one replaced."""
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
    "plateau_patience": 1,
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
    "plateau_factor": ("0", "1", "-0.5", "nan", "inf"),
    "momentum": ("-1e-300", "1", "nan", "inf"),
    "beta1": ("-1", "1", "nan", "inf"),
    "beta2": ("-1", "1.5", "nan", "1e999"),
    "epsilon": ("0", "-1", "nan", "inf"),
    "label_smoothing": ("-0.1", "1", "nan", "inf"),
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
        for value in (config.MOST + 1, 10**30, 10**400) if name != "seed" else ():
            yield Case(f"{flag}={value:.3g}" if value < 10**300 else flag, [f"{flag}={value}"], USER, [flag, "at most"])
    for name, values in FLOATS.items():
        flag = flag_of(name)
        for value in (*NO_FLOATS, *values):
            yield Case(f"{flag}={value!r}", [f"{flag}={value}"], USER, [flag])
    for name in (name for name, field in config.FIELDS.items() if not isinstance(field.default, bool)):
        flag = flag_of(name)
        yield Case(f"{flag} without value", ["--seed=1", flag], USER, [flag])
    for value in ("true", "yes", "0", "False"):
        yield Case(f"switch with value {value}", [f"--record-hashes={value}"], USER, [value])
    for value in (1025, 10**6, 10**15):
        yield Case(f"{value} threads", [f"--threads-per-rank={value}"], USER, ["--threads-per-rank", "1024"])
    for batch, micro in ((1, 2), (15, 16), (128, 129), (8, 10**15)):
        arguments = [f"--batch-size={batch}", f"--micro-batch-size={micro}"]
        yield Case(f"micro-batch {micro} > batch {batch}", arguments, USER, [f"{micro} is larger", f" {batch}:"])
    yield Case("batch below the micro-batch's default", ["--batch-size=15"], USER, ["--micro-batch-size 16"])


CHOICES = {
    "dataset": config.DATASETS,
    "model": config.MODELS,
    "optimizer": config.OPTIMIZERS,
    "loss": typing.get_args(config.LossName),
    "schedule": typing.get_args(config.ScheduleName),
    "reduction": config.REDUCTIONS,
}


def endless_schedules(_workshop) -> Iterator[Case]:
    for factor, epochs, length in (("1e200", 3, 1), ("10", 400, 1), ("1.5", 10**15, 1), ("1e308", 21, 10)):
        flags = [f"--lr-step-factor={factor}", f"--epochs={epochs}", f"--lr-step-epochs={length}", "--lr=10"]
        yield Case(f"factor {factor}", ["--schedule=step", *flags], USER, ["--lr-step-factor", "infinite"])


def unknown_choices(_workshop) -> Iterator[Case]:
    for name, known in CHOICES.items():
        spelt = [(one[:-1], one + "s", one.upper(), " " + one, one + "\n") for one in known]
        for value in sorted({value for values in spelt for value in values} - set(known)):
            yield Case(f"--{name}={value!r}", [f"--{name}={value}"], USER, [value.strip(), *known])
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


FAMILIES = [
    misspelt_flags,
    wrong_values,
    endless_schedules,
    unknown_choices,
    impossible_paths,
    config_files,
    config_paths,
]
