"""A process that cannot use compiled kernels says why in one line, with the remedy."""

import gc
import importlib
import os
from importlib.metadata import PackageNotFoundError
from types import SimpleNamespace

import pytest

from distdl.nn.kernels import NUMPY, choice
from distdl.nn.kernels.choice import kernels_named, obstacle


def raises(error):
    def fail(*_):
        raise error

    return fail


def machine(name):
    return lambda: os.uname_result(("Linux", "host", "6", "1", name))


def cpu(folder, flags):
    path = folder / "cpuinfo"
    path.write_text(f"processor\t: 0\nflags\t\t: fpu {flags} sse\n")
    return path


#: The change of the machine, and what the line says.
OBSTACLES = {
    "no numba": ((choice, "version", raises(PackageNotFoundError("numba"))), "numba is not installed: pip install"),
    "old numba": ((choice, "version", lambda name: "0.62.1"), "numba 0.62.1 is too old, expected 0.63 or later: pip"),
    "very old": ((choice, "version", lambda name: "0.9"), "numba 0.9 is too old"),
    "no fma": ((os, "uname", machine("x86_64")), "this CPU (x86_64) has no fused multiply-add"),
    "other CPU": ((os, "uname", machine("riscv64")), "this CPU (riscv64) has no fused multiply-add"),
    "broken": (
        (importlib, "import_module", raises(ImportError("Numba needs NumPy 2.3 or less. Got NumPy 2.9.\nmore"))),
        "does not work here (Numba needs NumPy 2.3 or less. Got NumPy 2.9.)",
    ),
    "switched off": (
        (importlib, "import_module", lambda _: SimpleNamespace(config=SimpleNamespace(DISABLE_JIT=1))),
        "NUMBA_DISABLE_JIT forbids numba to compile: unset",
    ),
    "no library": ((importlib, "import_module", raises(OSError("libllvmlite.so: cannot open"))), "does not work here"),
}


@pytest.mark.parametrize("what", OBSTACLES)
def test_an_obstacle_is_named_with_its_remedy(monkeypatch, tmp_path, what):
    (owner, name, replacement), said = OBSTACLES[what]
    if what == "no fma":
        monkeypatch.setattr(choice, "CPU_INFO", cpu(tmp_path, "sse2 avx"))
    monkeypatch.setattr(owner, name, replacement)
    found = obstacle()
    assert said in found
    assert "\n" not in found
    assert gc.isenabled()


@pytest.mark.parametrize("architecture", ["x86_64", "aarch64"])
def test_a_cpu_with_fused_multiply_add_has_no_obstacle(monkeypatch, tmp_path, architecture):
    monkeypatch.setattr(os, "uname", machine(architecture))
    monkeypatch.setattr(choice, "CPU_INFO", cpu(tmp_path, "fma avx2") if architecture == "x86_64" else tmp_path)
    assert obstacle() is None


def test_the_names_give_the_kernels():
    assert [kernels_named(name).name for name in ("numpy", "compiled")] == ["numpy", "compiled"]
    assert kernels_named("numpy") is NUMPY
