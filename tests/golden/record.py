"""Golden receipts: the hashes of a few short runs, so that a change of bits is always seen and never by accident.

    python tests/golden/record.py            write the receipts of this machine into receipts.json
    python tests/golden/record.py --print    print those of this one process instead

The bits of a run depend on its config, on library versions and on the CPU's kernel family. So `receipts.json` has an
entry for each combination seen so far (see `family`), and the tests assert the one they run on. The families of
other CPUs that this one can play (`PLAYED`) are recorded as well, each in a process of its own, since the variables
that choose them are read when NumPy is loaded.
"""

import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import threadpoolctl

from distdl.config import TrainConfig
from distdl.data import sources
from distdl.engine import train
from distdl.engine.environment import kernel_family
from distdl.parallel import OneProcess
from distdl.rng import Key

RECEIPTS = Path(__file__).with_name("receipts.json")
COMMAND = "python tests/golden/record.py"

#: What a CPU without AVX-512 finds, and what OpenBLAS chooses there (the same kernels for Haswell and Zen).
WITHOUT_AVX512 = {"OPENBLAS_CORETYPE": "Haswell", "NPY_DISABLE_CPU_FEATURES": "AVX512_SPR AVX512_ICL X86_V4"}
#: Families by the variables that ask for them; the first is whatever this process has.
PLAYED = {"its own": {}}
if platform.machine() == "x86_64":
    PLAYED |= {
        "SkylakeX": {"OPENBLAS_CORETYPE": "SkylakeX"},
        "Haswell": {"OPENBLAS_CORETYPE": "Haswell"},
        "without AVX-512": WITHOUT_AVX512,
    }

#: 85 rows for training make batches of 32, 32 and 21: the last one has 6 micro-batches, the last of a single sample.
DIGITS = {"batch_size": 32, "micro_batch_size": 4, "epochs": 1}
#: 27 rows for training make a batch of 16, in micro-batches of 6, 6 and 4, and one of 11, in 6 and 5.
PIXELS = {"dataset": "pixels", "batch_size": 16, "micro_batch_size": 6, "epochs": 1}
OPTIMIZERS = {"adam": {"lr": 0.002}, "momentum": {"lr": 0.02, "weight_decay": 1e-4}}
MODELS = ("mlp", "simple_convnet", "deep_convnet")  # deep_convnet has dropout

RUNS = {
    **{
        f"digits, {model}, {optimizer}": {**DIGITS, "model": model, "optimizer": optimizer, **settings}
        for model in MODELS
        for optimizer, settings in OPTIMIZERS.items()
    },
    "28x28 pixels, simple_convnet, adam": {**PIXELS, "model": "simple_convnet"},
    "28x28 pixels, deep_convnet, adam": {**PIXELS, "model": "deep_convnet"},
}


def family():
    """Return the name of what decides the bits here: kernels, and the versions of what computes.

    The C library is part of it: NumPy takes exp and log of float64 from there where it has no kernel of its own.
    """
    libraries = [library for library in threadpoolctl.threadpool_info() if library["user_api"] == "blas"]
    blas = [f"{library['internal_api']} {library['version']}" for library in libraries]
    c_library = " ".join(platform.libc_ver()).strip() or platform.system()
    return " · ".join([kernel_family(), f"numpy {np.__version__}", *blas, c_library])


def receipt_of(name):
    """Return both hashes of one of `RUNS`, and its loss to the last bit."""
    settings = RUNS[name]
    dataset = pixels() if settings.get("dataset") == "pixels" else piece_of_digits()
    with tempfile.TemporaryDirectory() as folder:
        config = TrainConfig(**{**settings, "dataset": "digits", "run_dir": Path(folder) / "run"})
        summary = train(config, OneProcess(), dataset=dataset)
    return {
        "weights_sha256": summary.weights_sha256,
        "state_sha256": summary.state_sha256,
        "train_loss": summary.train_loss.hex(),
    }


def piece_of_digits():
    digits = sources.load("digits", None)
    return sources.Dataset("digits", digits.images[:131].copy(), digits.labels[:131].copy(), 10, test_start=94)


def pixels():
    """Return 40 images of random bytes: no ties in max-pooling, every value there is."""
    images = Key(0).of("pixels").words(40 * 28 * 28 // 8).astype("<u8").view(np.uint8).reshape(40, 28, 28, 1)
    labels = np.arange(40, dtype=np.int64) % 10
    return sources.Dataset("pixels", images, labels, 10, test_start=30)


def entry_of_this_process():
    """Return the name of this process's family and its receipts."""
    return family(), {name: receipt_of(name) for name in RUNS}


def entry_when_played(variables):
    """Return the same as a new process with these variables computes it; None where this CPU lacks the instructions.

    The family that it names is the one that it has, which need not be the one asked for.
    """
    done = subprocess.run(
        [sys.executable, __file__, "--print"],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode == -signal.SIGILL:
        return None
    if done.returncode:
        raise RuntimeError(f"{variables}: {done.stderr}")
    [(name, receipts)] = json.loads(done.stdout.splitlines()[-1]).items()
    return name, receipts


def renewed(known, recorded):
    """Return the entries to be written, and the families that are dropped since their receipts are out of date.

    Where the bits of a family that was recorded again have changed, those of families that this CPU cannot play
    have changed too: they are dropped, to be recorded again where they can be.
    """
    changed = any(name in known and known[name] != receipts for name, receipts in recorded.items())
    dropped = sorted(set(known) - set(recorded)) if changed else []
    kept = {name: receipts for name, receipts in known.items() if name not in dropped}
    return dict(sorted({**kept, **recorded}.items())), dropped


def load():
    return json.loads(RECEIPTS.read_text(encoding="utf-8")) if RECEIPTS.exists() else {}


def main(arguments):
    if arguments == ["--print"]:
        name, receipts = entry_of_this_process()
        print(json.dumps({name: receipts}))
        return
    known = load()
    recorded = dict(filter(None, map(entry_when_played, PLAYED.values())))
    entries, dropped = renewed(known, recorded)
    RECEIPTS.write_text(json.dumps(entries, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    for name, receipts in recorded.items():
        news = "added" if name not in known else "as before" if known[name] == receipts else "CHANGED"
        print(f"{news}: {name}")
    for name in dropped:
        print(f"dropped, to be recorded again on a CPU that has it: {name}")


if __name__ == "__main__":
    main(sys.argv[1:])
