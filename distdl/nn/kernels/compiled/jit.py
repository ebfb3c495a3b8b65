"""How kernels are compiled: by numba, without fast-math, into a cache folder of their own."""

from numba import njit
from numba.core import codegen, config

#: All arithmetic is as written: LLVM may not reorder, contract or approximate it.
kernel = njit(cache=True, nogil=True, error_model="numpy")


def _cpu_features() -> str:
    return str(config.CPU_FEATURES if config.CPU_FEATURES is not None else codegen.get_host_cpu_features())


HAS_WIDE_REGISTERS = "+avx512f" in _cpu_features()
