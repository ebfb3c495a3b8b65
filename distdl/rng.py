"""Random numbers keyed by their purpose, so no generator has state that survives a step.

A `Key` is a path of words and numbers: ``Key(seed).of("dropout", step, micro_batch)``. Each path names one Philox4x64
stream (Salmon et al., *Parallel random numbers: as easy as 1, 2, 3*, 2011). Its 128-bit key is the BLAKE2b digest of
the path. The same path gives the same numbers on any rank, any number of times. So nothing must be saved, and a
repeated step draws the same numbers again.

Only the raw 64-bit words of Philox are used: its definition fixes them. Uniforms, normals, masks and shuffles are
derived here, because NumPy does not promise that its own stay the same in later releases.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from distdl.elementary import logarithm, sine_and_cosine


@dataclass(frozen=True)
class Key:
    """The name of a stream of random numbers.

    >>> key = Key(0).of("dropout", 3)
    >>> bool((key.uniform(5) == Key(0).of("dropout", 3).uniform(5)).all())
    True
    """

    seed: int
    path: tuple[str | int, ...] = ()

    def of(self, *names: str | int) -> Key:
        """Return the key of a stream below this one; names are plain integers and words without a slash."""
        for name in names:  # a NumPy integer or a word like "a/str:b" would silently name another stream
            assert type(name) is int or (type(name) is str and "/" not in name), f"no name of a stream: {name!r}"
        return Key(self.seed, self.path + names)

    def words(self, count: int) -> NDArray[np.uint64]:
        """Return the first `count` raw 64-bit words of the stream."""
        text = "/".join([f"{self.seed:d}", *(f"{type(name).__name__}:{name}" for name in self.path)])
        digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
        return np.random.Philox(key=int.from_bytes(digest, "little")).random_raw(count)

    def half_words(self, count: int) -> NDArray[np.uint32]:
        """Return `count` 32-bit words: the low half of each raw word, then its high half."""
        words = self.words((count + 1) // 2).astype("<u8", copy=False)
        return words.view("<u4")[:count]

    def uniform(self, count: int) -> NDArray[np.float64]:
        """Return `count` numbers uniform in [0, 1), with 53 random bits each, as float64."""
        return (self.words(count) >> np.uint64(11)).astype(np.float64) * 2.0**-53

    def normal(self, count: int) -> NDArray[np.float64]:
        """Return `count` standard normal numbers (Box-Muller) as float64."""
        pairs = (count + 1) // 2
        u = self.uniform(2 * pairs)
        radius = np.sqrt(-2.0 * logarithm(1.0 - u[:pairs]))
        sine, cosine = sine_and_cosine(2.0 * np.pi * u[pairs:])
        return np.concatenate([radius * cosine, radius * sine])[:count]

    def mask(self, count: int, probability: float) -> NDArray[np.bool_]:
        """Return `count` booleans, each true with the given probability (to a precision of 2**-32)."""
        if probability >= 1.0:
            return np.ones(count, np.bool_)
        return self.half_words(count) < np.uint32(int(probability * 2.0**32))

    def permutation(self, count: int) -> NDArray[np.int64]:
        """Return a uniformly random order of 0 .. count-1 as int64 (the stable order of random words)."""
        return np.argsort(self.words(count), kind="stable").astype(np.int64, copy=False)
