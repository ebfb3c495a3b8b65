"""Record golden receipts: the hashes of a few short runs. A test compares them, so no change of bits goes unnoticed.

    python tests/golden/record.py            write the receipts of this machine into receipts.json
    python tests/golden/record.py --print KERNELS    print the receipts of this one process instead

With compiled kernels, one entry holds for every CPU. The rest of this text is about NumPy's kernels.

The bits of a run depend on its config, on library versions and on the CPU's kernel family. So `receipts.json` has an
entry for each combination seen so far (see `family`). The tests use the entry of the machine that they run on. A name
proves nothing about bits. So each entry also has the fingerprint of one of the runs: it shows which operation differs
if another machine of the same name has other receipts.

This CPU can also simulate some families of other CPUs (`PLAYED`). Each is recorded in a separate process, because NumPy
reads the variables that choose a family when it is loaded.
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
from distdl.data.split import split
from distdl.engine import train
from distdl.engine.environment import kernel_family
from distdl.nn.kernels.choice import obstacle
from distdl.parallel import OneProcess
from distdl.rng import Key

RECEIPTS = Path(__file__).with_name("receipts.json")
COMMAND = "python tests/golden/record.py"

#: The features of a CPU without AVX-512, and the choice of OpenBLAS there (the same kernels for Haswell and Zen).
WITHOUT_AVX512 = {"OPENBLAS_CORETYPE": "Haswell", "NPY_DISABLE_CPU_FEATURES": "AVX512_SPR AVX512_ICL X86_V4"}
#: The features of a CPU that has AVX-512, but not the newest part of it.
WITH_OLDER_AVX512 = {"NPY_DISABLE_CPU_FEATURES": "AVX512_SPR"}
#: The name of the entry with compiled kernels.
COMPILED = "compiled kernels, every CPU"
#: Families and the variables that select them; the first is the family of this process.
PLAYED = {"its own": {}}
if platform.machine() == "x86_64":
    PLAYED |= {
        "SkylakeX": {**WITH_OLDER_AVX512, "OPENBLAS_CORETYPE": "SkylakeX"},
        "Haswell": {**WITH_OLDER_AVX512, "OPENBLAS_CORETYPE": "Haswell"},
        "without AVX-512": WITHOUT_AVX512,
    }

#: 85 training samples make batches of 32, 32 and 21. The last batch has 6 micro-batches, the last of one sample.
DIGITS = {"batch_size": 32, "micro_batch_size": 4, "epochs": 1}
#: 27 training samples make a batch of 16 (micro-batches of 6, 6 and 4) and one of 11 (6 and 5).
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
#: The run whose fingerprint is recorded.
FINGERPRINTED = "digits, simple_convnet, adam"


def family(kernels):
    """Return the CPU kernels and library versions that determine the bits here, as one name.

    The C library is included: NumPy uses its exp and log of float64 if NumPy has no kernel of its own.
    """
    if kernels == "compiled":
        return COMPILED
    libraries = [library for library in threadpoolctl.threadpool_info() if library["user_api"] == "blas"]
    blas = [f"{library['internal_api']} {library['version']}" for library in libraries]
    c_library = " ".join(platform.libc_ver()).strip() or platform.system()
    return " · ".join([kernel_family(), f"numpy {np.__version__}", *blas, c_library])


def receipt_of(name, kernels):
    """Return both hashes of one of `RUNS`, and every bit of its loss; and the fingerprint of the run."""
    settings = RUNS[name]
    dataset = pixels() if settings.get("dataset") == "pixels" else piece_of_digits()
    with tempfile.TemporaryDirectory() as folder:
        config = TrainConfig(**{**settings, "dataset": "digits", "kernels": kernels, "run_dir": Path(folder) / "run"})
        summary = train(config, OneProcess(), dataset=dataset)
        fingerprint = json.loads((config.run_dir / "env.json").read_text(encoding="utf-8"))["fingerprint"]
    return fingerprint, {
        "weights_sha256": summary.weights_sha256,
        "state_sha256": summary.state_sha256,
        "train_loss": summary.train_loss.hex(),
    }


def piece_of_digits():
    digits = sources.load("digits", None)
    return with_own_validation("digits", digits.images[:131], digits.labels[:131], 10, test_start=94)


def pixels():
    """Return 40 images of random bytes. They hold every value and have no ties in max-pooling."""
    images = Key(0).of("pixels").words(40 * 28 * 28 // 8).astype("<u8").view(np.uint8).reshape(40, 28, 28, 1)
    labels = np.arange(40, dtype=np.int64) % 10
    return with_own_validation("pixels", images, labels, 10, test_start=30)


def with_own_validation(name, images, labels, classes, test_start):
    """Return a dataset whose validation part is fixed. The receipts are older than the stratified draw of that part."""
    parts = split(labels, test_start, Key(0), stratified=False)
    rows = np.concatenate([parts.training, parts.validation, parts.test])
    start = len(parts.training)
    return sources.Dataset(name, images[rows], labels[rows], classes, test_start, validation_start=start)


def entry_of_this_process(kernels):
    """Return the name and the receipts of this process's family."""
    found = {name: receipt_of(name, kernels) for name in RUNS}
    receipts = {name: receipt for name, (_, receipt) in found.items()}
    return family(kernels), {"fingerprint": found[FINGERPRINTED][0], **receipts}


def entry_when_played(variables, kernels="numpy"):
    """Return the name and receipts of a new process with these variables; None if this CPU lacks the instructions.

    The name is that of the actual family, which may differ from the requested one.
    """
    done = subprocess.run(
        [sys.executable, __file__, "--print", kernels],
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
    """Return the entries to write, and the families to drop because their receipts are out of date.

    If the bits of a family recorded here have changed, those of families that this CPU cannot simulate have changed
    too. These are dropped, and must be recorded again on other CPUs.
    """
    changed = any(
        name in known and bits_of(known[name]) != bits_of(entry) for name, entry in recorded.items() if name != COMPILED
    )
    dropped = sorted(set(known) - {*recorded, COMPILED}) if changed else []
    kept = {name: receipts for name, receipts in known.items() if name not in dropped}
    return dict(sorted({**kept, **recorded}.items())), dropped


def bits_of(entry):
    """Return an entry without its fingerprint, whose operations may be others in another version."""
    return {name: receipt for name, receipt in entry.items() if name != "fingerprint"}


def load():
    return json.loads(RECEIPTS.read_text(encoding="utf-8")) if RECEIPTS.exists() else {}


def main(arguments):
    if arguments[:1] == ["--print"]:
        name, receipts = entry_of_this_process(*arguments[1:])
        print(json.dumps({name: receipts}))
        return
    known = load()
    recorded = dict(filter(None, map(entry_when_played, PLAYED.values())))
    if obstacle() is None:
        recorded |= [entry_when_played({}, "compiled")]
    entries, dropped = renewed(known, recorded)
    RECEIPTS.write_text(json.dumps(entries, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    for name, entry in recorded.items():
        same = name in known and bits_of(known[name]) == bits_of(entry)
        news = "added" if name not in known else "as before" if same else "CHANGED"
        print(f"{news}: {name}")
    for name in dropped:
        print(f"dropped; record it again on a CPU that has it: {name}")


if __name__ == "__main__":
    main(sys.argv[1:])
