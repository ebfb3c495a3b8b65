"""Environment variables with which a process computes as on another kind of CPU.

They choose the kernels of OpenBLAS, the loops of NumPy, the functions of the C library, and the instructions that numba
compiles for. Each takes effect when a process starts.
"""

import os
import platform
import signal
import subprocess
import sys
from pathlib import Path

_AVX2 = "+sse3,+ssse3,+sse4.1,+sse4.2,+popcnt,+cx16,+avx,+avx2,+fma,+f16c,+bmi,+bmi2,+lzcnt,+movbe"
_WITHOUT_AVX512 = {"NPY_DISABLE_CPU_FEATURES": "AVX512_SPR AVX512_ICL X86_V4", "NUMBA_CPU_FEATURES": _AVX2}

FAMILIES = {
    "its own": {},
    "Haswell": {**_WITHOUT_AVX512, "OPENBLAS_CORETYPE": "Haswell", "NUMBA_CPU_NAME": "haswell"},
    "Zen": {**_WITHOUT_AVX512, "OPENBLAS_CORETYPE": "Zen", "NUMBA_CPU_NAME": "znver3"},
    "without AVX2 and FMA": {
        "NPY_DISABLE_CPU_FEATURES": "AVX512_SPR AVX512_ICL X86_V4 X86_V3",
        "OPENBLAS_CORETYPE": "Nehalem",
        "GLIBC_TUNABLES": "glibc.cpu.hwcaps=-AVX512F,-AVX2,-FMA,-FMA4,-AVX",
    },
}
#: Families that compiled kernels support: they need FMA.
WITH_FMA = ("its own", "Haswell", "Zen")


def can_pretend():
    """Return whether this CPU has the instructions of these families."""
    return platform.machine() in {"x86_64", "AMD64"} and "avx2" in _cpu_flags() and "fma" in _cpu_flags()


def _cpu_flags():
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    return next((line.split() for line in lines if line.startswith("flags")), [])


def output_as(family, program, **variables):
    """Return the output of a Python program that runs as this family."""
    done = subprocess.run(
        [sys.executable, program],
        env={**os.environ, "OPENBLAS_NUM_THREADS": "1", **FAMILIES[family], **variables},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != -signal.SIGILL, f"this CPU lacks instructions of {family}"
    assert not done.returncode, done.stderr
    return done.stdout
