"""IDX files: an intact file is read exactly, damage is named, and no file is trusted."""

from __future__ import annotations

import gzip
import os
import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from distdl.data.sources import idx
from distdl.data.sources.idx import read_idx
from distdl.errors import DamagedFileError, UserError

KINDS = {"images": 3, "labels": 1}
SMALL = 4 * 2**20
"""The peak memory in bytes that reading may take, if the file is small or its header is wrong."""


def idx_bytes(array, declared=None):
    shape = array.shape if declared is None else declared
    return struct.pack(f">4B{len(shape)}I", 0, 0, 8, len(shape), *shape) + array.astype(np.uint8).tobytes()


def written(folder, content):
    path = Path(folder) / "train-images-idx3-ubyte"
    path.write_bytes(content)
    return path


def peak_bytes(function):
    tracemalloc.start()
    try:
        function()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def assert_names_the_damage(path, kind, *words):
    with pytest.raises(DamagedFileError) as caught:
        read_idx(path, kind=kind)
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    assert "expected" in message
    for word in words:
        assert word in message


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("idx")


IMAGES = np.arange(3 * 4 * 5, dtype=np.uint8).reshape(3, 4, 5)
LABELS = np.array([3, 1, 4, 1, 5, 9], np.uint8)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("compress", [bytes, gzip.compress], ids=["plain", "gzip"])
@settings(deadline=None, max_examples=50)
@given(data=st.data())
def test_a_written_array_is_read_back(folder, kind, compress, data):
    shape = data.draw(hnp.array_shapes(min_dims=KINDS[kind], max_dims=KINDS[kind], max_side=9))
    array = data.draw(hnp.arrays(np.uint8, shape))
    read = read_idx(written(folder, compress(idx_bytes(array))), kind=kind)
    assert read.dtype == np.uint8
    np.testing.assert_array_equal(read, array)


@pytest.mark.parametrize("compress", [bytes, gzip.compress], ids=["plain", "gzip"])
def test_a_file_of_many_blocks_is_read_back(tmp_path, monkeypatch, compress):
    monkeypatch.setattr(idx, "BLOCK_BYTES", 7)
    np.testing.assert_array_equal(read_idx(written(tmp_path, compress(idx_bytes(IMAGES))), kind="images"), IMAGES)


@pytest.mark.parametrize("compress", [bytes, gzip.compress], ids=["plain", "gzip"])
@settings(deadline=None, max_examples=400)
@given(data=st.data())
def test_a_mutated_file_is_read_correctly_or_named(folder, compress, data):
    """Any change of bytes gives an array that the file really holds, or one line of a known error."""
    content = bytearray(compress(idx_bytes(IMAGES)))
    for _ in range(data.draw(st.integers(1, 4))):
        where = data.draw(st.integers(0, max(0, len(content) - 1)))
        match data.draw(st.sampled_from(["flip", "cut", "insert", "repeat"])):
            case "flip" if content:
                content[where] ^= data.draw(st.integers(1, 255))
            case "cut":
                del content[where:]
            case "insert":
                content[where:where] = data.draw(st.binary(max_size=20))
            case "repeat":
                content += content[where:]
    path = written(folder, bytes(content))
    try:
        array = read_idx(path, kind="images")
    except UserError as error:
        message = str(error)
    else:
        message = None
    if message is not None:
        assert "\n" not in message
        assert str(path) in message
    else:
        # gzip's checksum detects every change of the elements, but not of the time in its header, for example.
        assert idx_bytes(array) == (idx_bytes(IMAGES) if compress is gzip.compress else content)


@pytest.mark.parametrize("compress", [bytes, gzip.compress], ids=["plain", "gzip"])
def test_a_file_cut_anywhere_is_damaged(tmp_path, compress):
    content = compress(idx_bytes(IMAGES))
    for length in range(len(content)):
        assert_names_the_damage(written(tmp_path, content[:length]), "images")


def test_a_bit_flipped_anywhere_in_a_plain_header_is_damage(tmp_path):
    content = idx_bytes(IMAGES)
    for bit in range(8 * 16):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        assert_names_the_damage(written(tmp_path, flipped), "images")


DAMAGED = {
    "empty": (b"", "images", ["it is empty"]),
    "empty, gzipped": (gzip.compress(b""), "images", ["it is empty"]),
    "text": (b"<!DOCTYPE html><p>404 not found", "images", ["3c 21 44 4f", "00 00 08 03"]),
    "labels for images": (idx_bytes(LABELS), "images", ["00 00 08 01", "00 00 08 03"]),
    "images for labels": (idx_bytes(IMAGES), "labels", ["00 00 08 03", "00 00 08 01"]),
    "floats": (b"\0\0\x0d\x03" + idx_bytes(IMAGES)[4:], "images", ["00 00 0d 03", "00 00 08 03"]),
    "cut header": (idx_bytes(IMAGES)[:10], "images", ["ends after 10 bytes", "16"]),
    "no images": (idx_bytes(np.zeros((0, 4, 5))), "images", ["(0, 4, 5)"]),
    "no width": (idx_bytes(np.zeros((3, 4, 0))), "images", ["(3, 4, 0)"]),
    "no labels": (idx_bytes(np.zeros(0)), "labels", ["(0,)"]),
    "one byte too few": (idx_bytes(IMAGES)[:-1], "images", ["75 bytes", "76"]),
    "one byte too many": (idx_bytes(IMAGES) + b"\0", "images", ["77 bytes", "76"]),
    "one byte too few, gzipped": (gzip.compress(idx_bytes(IMAGES)[:-1]), "images", ["59 elements", "60"]),
    "one byte too many, gzipped": (gzip.compress(idx_bytes(IMAGES) + b"\0"), "images", ["continues", "60"]),
    "a second member": (gzip.compress(idx_bytes(IMAGES)) * 2, "images", ["continues"]),
    "rubbish after gzip": (gzip.compress(idx_bytes(IMAGES)) + b"rubbish", "images", ["gzip"]),
    "wrong checksum": (gzip.compress(idx_bytes(IMAGES))[:-8] + bytes(8), "images", ["gzip", "CRC"]),
    "cut gzip": (gzip.compress(idx_bytes(IMAGES))[:-9], "images", ["gzip"]),
    "2**96 elements": (idx_bytes(IMAGES, (2**32 - 1,) * 3), "images", ["its header declares"]),
    "2**96 elements, gzipped": (
        gzip.compress(idx_bytes(IMAGES, (2**32 - 1,) * 3)),
        "images",
        ["its header declares"],
    ),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damage_is_named(tmp_path, case):
    content, kind, words = DAMAGED[case]
    path = written(tmp_path, content)
    assert_names_the_damage(path, kind, *words)

    def read():
        with pytest.raises(DamagedFileError):
            read_idx(path, kind=kind)

    assert peak_bytes(read) < SMALL


def gzip_of(path, head, block, blocks):
    with gzip.open(path, "wb", compresslevel=1) as file:
        file.write(head)
        for _ in range(blocks):
            file.write(block)


def test_a_gzip_bomb_costs_one_block(tmp_path):
    path = tmp_path / "bomb.gz"
    gzip_of(path, idx_bytes(IMAGES), bytes(2**20), 256)
    assert peak_bytes(lambda: assert_names_the_damage(path, "images", "continues after its last element")) < SMALL


def test_a_header_that_declares_a_gigabyte_costs_what_the_file_holds(tmp_path):
    path = tmp_path / "lie.gz"
    pixels = np.random.default_rng(0).bytes(2**20 + 2**18)
    gzip_of(path, idx_bytes(np.zeros(0), declared=(2**20, 2**5, 2**5)), pixels, 1)
    assert peak_bytes(lambda: assert_names_the_damage(path, "images", "1310720 elements")) < 2 * SMALL


def test_more_than_the_memory_are_refused_before_they_are_read(tmp_path):
    path = written(tmp_path, idx_bytes(np.zeros(0), declared=(2**31, 2**5, 2**5)))
    os.truncate(path, 16 + 2**41)  # a hole: it takes no space on the disk

    def read():
        with pytest.raises(UserError, match=r"2199.02 GB of memory are needed, but .* GB are available") as caught:
            read_idx(path, kind="images")
        assert not isinstance(caught.value, DamagedFileError)

    assert peak_bytes(read) < SMALL


def unreadable(tmp_path, what):
    path = tmp_path / "train-images-idx3-ubyte"
    match what:
        case "a folder":
            path.mkdir()
        case "a pipe":
            os.mkfifo(path)
        case "a link to nowhere":
            path.symlink_to(tmp_path / "nowhere")
    return path


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("a folder", "not a regular file"),
        ("a pipe", "not a regular file"),
        ("a link to nowhere", "No such file"),
        ("nothing", "No such file"),
    ],
)
def test_a_path_without_a_file_is_a_user_error(tmp_path, what, words):
    path = unreadable(tmp_path, what)
    with pytest.raises(UserError, match=words) as caught:
        read_idx(path, kind="images")
    assert not isinstance(caught.value, DamagedFileError)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_without_permission_is_a_user_error(tmp_path, monkeypatch):
    path = written(tmp_path, idx_bytes(IMAGES))

    def refuse(*_args, **_how):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(idx, "open_regular", refuse)  # root may read every file, so the refusal is simulated
    with pytest.raises(UserError, match="cannot be read: Permission denied") as caught:
        read_idx(path, kind="images")
    assert not isinstance(caught.value, DamagedFileError)


def test_a_line_break_in_a_path_stays_out_of_the_message(tmp_path):
    (tmp_path / "a\nb").mkdir()
    with pytest.raises(DamagedFileError) as caught:
        read_idx(written(tmp_path / "a\nb", b"x"), kind="images")
    assert "\n" not in str(caught.value)
