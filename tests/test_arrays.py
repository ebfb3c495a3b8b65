"""Arrays start on 64-byte boundaries, and a hash depends on an array's content, not on its place in memory."""

import hashlib
import struct

import numpy as np
import pytest

from distdl.arrays import ALIGNMENT_BYTES, aligned_empty, aligned_zeros, sha256_of_arrays


@pytest.mark.parametrize("make", [aligned_empty, aligned_zeros])
@pytest.mark.parametrize("dtype", ["u1", "f4", "f8", "i8"])
@pytest.mark.parametrize("shape", [0, 1, 3, 17, 1001, (), (3, 5, 7), [2, 9], (0, 4), (1, 1, 1)], ids=str)
def test_the_first_byte_lies_on_a_64_byte_boundary(make, dtype, shape):
    for _ in range(5):  # the allocator gives another address each time
        array = make(shape, dtype)
        assert ALIGNMENT_BYTES == 64
        assert array.size == 0 or array.ctypes.data % 64 == 0
        assert array.shape == ((shape,) if isinstance(shape, int) else tuple(shape))
        assert array.dtype == np.dtype(dtype)
        assert array.flags.c_contiguous
        assert array.flags.writeable


def test_zeros_are_zero_and_float32_by_default():
    for _ in range(20):
        dirty = aligned_empty(1001)
        dirty[...] = np.nan
        del dirty
        zeros = aligned_zeros(1001)
        assert zeros.dtype == aligned_empty(1).dtype == np.float32
        assert not zeros.any()


def test_arrays_do_not_overlap():
    arrays = [aligned_zeros(5) for _ in range(50)]
    for number, array in enumerate(arrays):
        array[...] = number
    assert [array.tolist() for array in arrays] == [[number] * 5 for number in range(50)]


def test_the_hash_is_the_hash_of_the_documented_bytes():
    weights = np.array([[1.0, -2.5, 3.25], [0.0, -0.0, 1e-30]], np.float32)
    step = np.array([7, -1], np.int64)
    pixels = np.arange(4, dtype=np.uint8).reshape(1, 2, 2, 1)
    scalar = np.array(2.5)
    by_hand = hashlib.sha256(
        b"affine_1.weights\x00<f4\x002,3\x00"
        + struct.pack("<6f", 1.0, -2.5, 3.25, 0.0, -0.0, 1e-30)
        + b"step\x00<i8\x002\x00"
        + struct.pack("<2q", 7, -1)
        + "größe".encode()
        + b"\x00|u1\x001,2,2,1\x00"
        + bytes([0, 1, 2, 3])
        + b"scalar\x00<f8\x00\x00"
        + struct.pack("<d", 2.5)
        + b"empty\x00<f4\x000,3\x00"
    )
    named = [
        ("affine_1.weights", weights),
        ("step", step),
        ("größe", pixels),
        ("scalar", scalar),
        ("empty", np.zeros((0, 3), np.float32)),
    ]
    assert sha256_of_arrays(named) == by_hand.hexdigest()
    assert sha256_of_arrays(iter(named)) == by_hand.hexdigest()
    assert sha256_of_arrays([]) == hashlib.sha256().hexdigest()


def test_the_hash_does_not_depend_on_the_memory_layout():
    array = np.arange(24, dtype=np.float32).reshape(4, 6)
    wide = np.zeros((8, 18), np.float32)
    wide[::2, ::3] = array
    read_only = array.copy()
    read_only.flags.writeable = False
    unaligned = np.frombuffer(b"x" + array.tobytes(), np.float32, offset=1).reshape(4, 6)
    same = {
        "fortran order": np.asfortranarray(array),
        "strided": wide[::2, ::3],
        "reversed twice": array[::-1, ::-1].copy()[::-1, ::-1],
        "big-endian": array.astype(">f4"),
        "read-only": read_only,
        "unaligned": unaligned,
    }
    expected = sha256_of_arrays([("a", array)])
    assert {name: sha256_of_arrays([("a", other)]) for name, other in same.items()} == dict.fromkeys(same, expected)


def test_the_hash_depends_on_name_shape_dtype_order_and_every_bit():
    array = np.arange(6, dtype=np.float32)
    flipped = array.copy()
    flipped.view(np.uint32)[3] ^= 1
    minus_zero = array.copy()
    minus_zero[0] = -0.0
    different = [
        [("a", array)],
        [("b", array)],
        [("", array)],
        [("a", array.reshape(2, 3))],
        [("a", array.reshape(3, 2))],
        [("a", array.reshape(1, 6))],
        [("a", array.view(np.int32))],
        [("a", array.astype(np.float64))],
        [("a", flipped)],
        [("a", minus_zero)],
        [("a", array[:3]), ("a", array[3:])],
        [("a", array), ("b", array)],
        [("b", array), ("a", array)],
        [("a", array), ("empty", array[:0])],
        [("a", array[:0])],
        [],
    ]
    assert len({sha256_of_arrays(named) for named in different}) == len(different)


def test_hashing_leaves_the_array_unchanged():
    array = np.arange(6, dtype=">f4")
    sha256_of_arrays([("a", array)])
    assert array.dtype.str == ">f4"
    assert array.tolist() == [0, 1, 2, 3, 4, 5]
