"""How kernels are compiled: by numba, without fast-math, once for each kind of CPU (see `cache`)."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from numba import njit
from numba.core import codegen, config, serialize
from numba.core.compiler import CompileResult
from numba.core.runtime import rtsys

from distdl.nn.kernels.compiled.cache import kernel_cache

#: Is told the name of each kernel that is about to be compiled.
_listeners: list[Callable[[str], None]] = []


@contextmanager
def compilations_told_to(listener: Callable[[str], None]) -> Iterator[None]:
    """Call `listener` with the name of each kernel before it is compiled inside the block."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)


def kernel(function: Callable[..., Any]) -> Any:
    """Turn a function into a kernel: all arithmetic is as written; LLVM reorders, contracts, approximates nothing."""
    dispatcher = njit(nogil=True, error_model="numpy")(function)
    dispatcher._cache = _Cache(f"{function.__module__.rpartition('.')[2]}.{function.__name__}")
    return dispatcher


class _Cache:
    """numba's interface of a cache for one function, with the checked files of `KernelCache` (numba's have no hash)."""

    cache_path = ""

    def __init__(self, name: str) -> None:
        self._name = name

    def load_overload(self, signature: Any, target: Any) -> Any:
        """Return the function compiled for a signature, or None.

        A loaded function needs numba's runtime library. It needs none of the implementations that `target.refresh`
        loads, which takes longer than all kernels of a network.
        """
        name = f"{self._name}{signature}"
        content = kernel_cache().read(name)
        if content is None:
            for listener in _listeners:
                listener(name)
            return None
        rtsys.initialize(target)
        return CompileResult._rebuild(target, *serialize.pickle.loads(content))

    def save_overload(self, signature: Any, result: Any) -> None:
        """Save the function compiled for a signature."""
        kernel_cache().write(f"{self._name}{signature}", serialize.dumps(result._reduce()))

    def enable(self) -> None:
        """Do nothing; numba may call it."""

    def disable(self) -> None:
        """Do nothing; numba may call it."""


def _cpu_features() -> str:
    return str(config.CPU_FEATURES if config.CPU_FEATURES is not None else codegen.get_host_cpu_features())


HAS_WIDE_REGISTERS = "+avx512f" in _cpu_features()
