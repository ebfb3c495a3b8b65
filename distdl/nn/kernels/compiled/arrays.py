"""The working arrays of compiled layers, by how long they are in use.

- Within one call of a kernel: `scratch`, shared by all layers.
- From a forward pass to its backward pass: `KeptArrays`, of one layer.
- Within a backward pass, from one layer to the next: `GradientArrays`, shared by the layers of a network.

All are made on first use and then used again, so a steady step allocates nothing.
"""

import math

import numpy as np
from numpy.typing import DTypeLike

from distdl.arrays import ALIGNMENT_BYTES, aligned_empty, aligned_zeros
from distdl.nn.layers import Array, Shape

#: From this size on, a kernel writes an output past the caches: such an array does not stay in a second-level cache.
STREAMED_BYTES = 2**20
#: Floats between the boundaries to which arrays are aligned.
LINE = ALIGNMENT_BYTES // 4


def is_streamed(array: Array) -> bool:
    """Return whether a kernel should write this array past the caches."""
    return array.nbytes >= STREAMED_BYTES and array.ctypes.data % ALIGNMENT_BYTES == 0


_scratch: dict[str, Array] = {}


def scratch(name: str, size: int) -> Array:
    """Return float32 numbers that only the next kernel uses: the next request for this name returns the same memory."""
    if name not in _scratch or _scratch[name].size < size:
        _scratch[name] = aligned_empty((size,), np.float32)
    return _scratch[name][:size]


class KeptArrays:
    """Arrays by name. Requests for fewer samples, the first axis, return the beginning of the largest array."""

    def __init__(self) -> None:
        self._arrays: dict[str, Array] = {}

    def array(self, name: str, shape: Shape, dtype: DTypeLike = np.float32) -> Array:
        """Return the array of this name; only a new array is zeros."""
        size = math.prod(shape)
        flat = self._arrays.get(name)
        if flat is None or flat.size < size:
            flat = self._arrays[name] = aligned_zeros((size,), dtype)
        return flat[:size].reshape(shape)


class GradientArrays:
    """The gradients with respect to the inputs of layers: each is in use until the layer in front has read it.

    They are slices of one memory: each takes the first gap that is large enough. If a pass needs more memory than
    there is, the rest are arrays of their own, and the next pass finds enough.
    """

    def __init__(self) -> None:
        self._memory = aligned_empty((0,), np.float32)
        self._needed = 0
        #: By address: the first float in the memory, the one behind the last, and the array.
        self._used: dict[int, tuple[int, int, Array]] = {}
        #: Overwrite released arrays with NaN: a test that reads one fails.
        self.poison = False

    def take(self, shape: Shape) -> Array:
        """Return an array that is not in use."""
        size = math.prod(shape)
        room = max(-(-size // LINE), 1) * LINE
        start = 0
        for first, behind, _ in sorted(self._used.values(), key=lambda place: place[0]):
            if start + room <= first:
                break
            start = behind
        stop = start + room
        self._needed = max(self._needed, stop)
        fits = stop <= self._memory.size
        flat = self._memory[start:stop] if fits else aligned_empty((room,), np.float32)
        self._used[flat.ctypes.data] = start, stop, flat
        return flat[:size].reshape(shape)

    def has(self, gradient: Array) -> bool:
        """Return whether the array is one of `take` that is in use."""
        return gradient.ctypes.data in self._used

    def release(self, gradient: Array, *in_use: Array | None) -> None:
        """Declare that the array is no longer in use, unless it shares memory with one that is.

        Arrays that are not from `take` are ignored.
        """
        address = gradient.ctypes.data
        if address not in self._used or any(one is not None and np.may_share_memory(gradient, one) for one in in_use):
            return
        *_, flat = self._used.pop(address)
        if self.poison:
            flat.fill(np.nan)

    def release_all(self) -> None:
        """Declare that no array is in use."""
        self._used.clear()
        if self._needed > self._memory.size:
            self._memory = aligned_empty((self._needed,), np.float32)
