"""Checksums detect every flipped bit. All ranks have the same reports, so they name the same ranks."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from injected import flip

from distdl.engine.checks.corruption import checksum, odd_ones_out


@given(st.binary(min_size=1, max_size=40), st.data())
def test_a_checksum_detects_every_flipped_bit(content, data):
    array = np.frombuffer(content, np.uint8).copy()
    before = checksum(array)
    byte, bit = data.draw(st.integers(0, array.size - 1)), data.draw(st.integers(0, 7))
    flip(array, byte=byte, bit=bit)
    after = checksum(array)
    assert before[0] != after[0]
    assert before[1] != after[1]
    flip(array, byte=byte, bit=bit)
    assert checksum(array) == before


@pytest.mark.parametrize("dtype", ["f4", "f8", "i8", "u1"])
@pytest.mark.parametrize("shape", [(0,), (1,), (3, 5), (64,)])
def test_a_checksum_is_that_of_the_bytes_in_order_of_the_elements(dtype, shape):
    array = np.arange(np.prod(shape)).astype(dtype).reshape(shape)
    octets = array.tobytes() + bytes(-array.nbytes % 8)
    words = [int.from_bytes(octets[start : start + 8], "little") for start in range(0, len(octets), 8)]
    expected_xor = 0
    for word in words:
        expected_xor ^= word
    assert checksum(array) == (sum(words) % 2**64, expected_xor)
    assert checksum(np.asfortranarray(array)) == checksum(array)


@pytest.mark.parametrize(
    ("values", "odd"),
    [("a", []), ("aaaa", []), ("ab", [0, 1]), ("aba", [1]), ("baaa", [0]), ("aabc", [2, 3]), ("aabb", [0, 1, 2, 3])],
)
def test_the_minority_is_named_or_all_ranks_if_there_is_no_minority(values, odd):
    assert odd_ones_out(values) == odd
