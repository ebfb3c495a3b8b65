"""Every usual image file becomes the pixels that a viewer shows; a file that cannot be used says why."""

import io
import logging
import os
from contextlib import suppress

import numpy as np
import pytest

from distdl.data.sources.images import _resized, read_image
from distdl.errors import DamagedFileError, UserError
from distdl.image_options import Resize

Image = pytest.importorskip("PIL.Image", reason="Pillow is not installed: pip install 'distdl-mpi[images]'")

RNG = np.random.default_rng(0)
GRAY = RNG.integers(0, 256, (6, 4), np.uint8)
COLORED = RNG.integers(0, 256, (6, 4, 3), np.uint8)
DEEP = RNG.integers(0, 65536, (6, 4)).astype(np.uint16)
ALPHA = RNG.integers(0, 256, (6, 4), np.uint8)


def stream_of(pixels, kind, mode=None, **settings):
    """Return a file of the format `kind` with these pixels."""
    stream = io.BytesIO()
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    (image if mode is None else image.convert(mode)).save(stream, kind, **settings)
    stream.seek(0)
    return stream


def over_white(pixels, alpha):
    """Return the definition of compositing: each pixel's share of its own color and of white."""
    share = alpha[..., None] / 255
    return pixels.reshape(6, 4, -1) * share + 255 * (1 - share)


@pytest.mark.parametrize("kind", ["PNG", "BMP", "PPM", "TIFF", "GIF", "WEBP"])
@pytest.mark.parametrize("pixels", [GRAY, COLORED], ids=["gray", "colored"])
def test_formats_without_loss_give_the_pixels_that_were_saved(kind, pixels):
    if kind == "GIF" and pixels is COLORED:
        pixels = np.repeat(GRAY[..., None], 3, axis=-1)  # GIF has at most 256 colors
    settings = {"lossless": True} if kind == "WEBP" else {}
    channels = pixels.shape[-1] if pixels.ndim == 3 else 1
    found = read_image(stream_of(pixels, kind, **settings), channels=channels)
    assert np.array_equal(found, pixels.reshape(6, 4, channels))
    assert found.dtype == np.uint8


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("1", np.where(GRAY > 127, 255, 0)),
        ("L", GRAY),
        ("P", GRAY),
    ],
)
def test_other_kinds_of_gray_are_converted(mode, expected):
    image = Image.fromarray(GRAY)
    image = image.point(lambda value: 255 * (value > 127)).convert("1") if mode == "1" else image.convert(mode)
    assert np.array_equal(read_image(stream_of(image, "PNG"), channels=1)[..., 0], expected)


def test_inks_become_light():
    inks = Image.fromarray(np.full((6, 4, 4), (0, 255, 255, 0), np.uint8), "CMYK")
    red = read_image(stream_of(inks, "TIFF"), channels=3)
    assert np.array_equal(red, np.broadcast_to((255, 0, 0), (6, 4, 3)))


@pytest.mark.parametrize(
    ("kind", "settings"), [("PNG", {}), ("TIFF", {}), ("TIFF", {"compression": "tiff_lzw"}), ("PPM", {})]
)
def test_images_of_16_bits_keep_their_upper_8(kind, settings):
    assert np.array_equal(read_image(stream_of(DEEP, kind, **settings), channels=1)[..., 0], DEEP // 256)
    assert np.array_equal(read_image(stream_of(DEEP, kind, **settings), channels=3)[..., 2], DEEP // 256)


@pytest.mark.parametrize(("pixels", "mode"), [(GRAY, "LA"), (COLORED, "RGBA")])
def test_transparent_pixels_lie_over_white(pixels, mode):
    image = Image.fromarray(np.dstack([pixels, ALPHA]), mode)
    found = read_image(stream_of(image, "PNG"), channels=len(mode) - 1)
    assert np.abs(found - over_white(pixels, ALPHA)).max() <= 1


def test_a_shape_that_is_in_the_alpha_channel_alone_becomes_visible():
    glyph = np.zeros((6, 4, 2), np.uint8)
    glyph[2:4, :, 1] = 255
    found = read_image(stream_of(Image.fromarray(glyph, "LA"), "PNG"), channels=1)[..., 0]
    assert np.array_equal(found, 255 - glyph[..., 1])


def test_a_transparent_color_of_a_palette_becomes_white():
    image = Image.fromarray(GRAY).convert("P")
    found = read_image(stream_of(image, "PNG", transparency=int(GRAY[1, 2])), channels=1)[..., 0]
    assert np.array_equal(found, np.where(GRAY[1, 2] == GRAY, 255, GRAY))


#: How a viewer shows an image that is stored with each orientation, by the table of the EXIF standard.
SHOWN = {
    1: lambda stored: stored,
    2: np.fliplr,
    3: lambda stored: np.rot90(stored, 2),
    4: np.flipud,
    5: lambda stored: np.swapaxes(stored, 0, 1),
    6: lambda stored: np.rot90(stored, -1),
    7: lambda stored: np.rot90(np.swapaxes(stored, 0, 1), 2),
    8: np.rot90,
    9: lambda stored: stored,
}


@pytest.mark.parametrize("orientation", SHOWN)
@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
def test_images_are_turned_upright(kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    expected = SHOWN[orientation](COLORED)
    settings = {"lossless": True} if kind == "WEBP" else {}
    found = read_image(
        stream_of(COLORED, kind, exif=exif, **settings), channels=3, size=(expected.shape[0], expected.shape[1])
    )
    assert np.array_equal(found, expected)


def two_halves(height, width):
    """Return an image that is dark at the left and light at the right."""
    return np.repeat([[0, 255]], height, axis=0).repeat(width // 2, axis=1).astype(np.uint8)


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
@pytest.mark.parametrize(
    ("text", "left", "middle", "right"),
    [
        ("16x16:stretch", 0, None, 255),  # the whole width
        ("16x16:crop", 0, None, 255),  # the middle of the width, with both halves
        ("16x64:crop", 0, None, 255),
        ("64x64:crop", 0, None, 255),
        ("32", 0, None, 255),
    ],
)
def test_resize_gives_the_size_and_keeps_the_middle(kind, text, left, middle, right):
    resize = Resize.parse(text)
    found = read_image(stream_of(two_halves(200, 400), kind), resize=resize, channels=1)[..., 0]
    assert found.shape == (resize.height, resize.width)
    half = resize.width // 2
    assert np.abs(found[:, : half - 2].astype(int) - left).max() <= 8
    assert np.abs(found[:, half + 2 :].astype(int) - right).max() <= 8


@pytest.mark.parametrize(("height", "width"), [(200, 400), (400, 200), (20, 40), (3, 400)])
def test_crop_and_stretch_use_all_of_the_new_size_and_pad_fills_with_black(height, width):
    white = np.full((height, width), 255, np.uint8)
    for mode, covered in (("crop", 32 * 48), ("stretch", 32 * 48)):
        found = read_image(stream_of(white, "PNG"), resize=Resize(32, 48, mode), channels=1)
        assert np.count_nonzero(found == 255) == covered
    scale = min(32 / height, 48 / width)
    inner = (max(1, round(height * scale)), max(1, round(width * scale)))
    top, left = (32 - inner[0]) // 2, (48 - inner[1]) // 2
    expected = np.zeros((32, 48))
    expected[top : top + inner[0], left : left + inner[1]] = 255
    found = read_image(stream_of(white, "PNG"), resize=Resize(32, 48, "pad"), channels=1)[..., 0]
    assert np.array_equal(found, expected)


@pytest.mark.parametrize("resize", ["32", "32x48", "224"])
def test_an_image_of_any_size_can_be_cropped(resize):
    wanted = Resize.parse(resize)
    for side in range(30, 400, 7 if wanted.height == 224 else 1):
        image = Image.new("L", (side, side + 15), 255)
        assert np.asarray(_resized(image, wanted)).tobytes() == bytes([255]) * wanted.height * wanted.width


def test_an_image_that_has_the_size_already_is_not_changed():
    for mode in ("crop", "pad", "stretch"):
        assert np.array_equal(read_image(stream_of(COLORED, "PNG"), resize=Resize(6, 4, mode), channels=3), COLORED)


def test_shrinking_averages_over_all_pixels():
    checks = np.indices((64, 64)).sum(axis=0) % 2 * 255
    found = read_image(stream_of(checks.astype(np.uint8), "PNG"), resize=Resize(8, 8), channels=1)
    assert np.abs(found.astype(float) - 127.5).max() < 8


def test_a_large_photo_that_lies_on_its_side_is_turned_before_it_is_cut():
    exif = Image.Exif()
    exif[0x0112] = 6
    photo = two_halves(400, 800)  # shown with the dark half on top
    found = read_image(stream_of(photo, "JPEG", exif=exif), resize=Resize(32, 16), channels=1)[..., 0]
    assert found.shape == (32, 16)
    assert found[:14].max() < 10
    assert found[18:].min() > 245


def frames(count):
    return [Image.fromarray(np.full((6, 4), 10 * number, np.uint8)) for number in range(count)]


def animated(kind):
    first, *others = frames(3)
    return stream_of(first, kind, save_all=True, append_images=others).getvalue()


WHOLE_JPEG = stream_of(RNG.integers(0, 256, (60, 40, 3), np.uint8), "JPEG").getvalue()
WHOLE_PNG = stream_of(COLORED, "PNG").getvalue()


@pytest.mark.parametrize(
    ("content", "kind", "reason"),
    [
        (b"", DamagedFileError, "it is empty"),
        (bytes(300), DamagedFileError, "its first bytes are all zero"),
        (b"\n<!DOCTYPE html><title>404", DamagedFileError, "it is a web page"),
        (b"<svg xmlns=''>", DamagedFileError, "it is a drawing"),
        (b"version https://git-lfs.github.com/spec/v1\n", DamagedFileError, "git lfs pull"),
        (b"\0\0\0\x18ftypheic" + bytes(50), DamagedFileError, "it is HEIC"),
        (b"%PDF-1.4", DamagedFileError, "PDF"),
        (b"hello", DamagedFileError, "its content is not PNG, JPEG, "),
        (WHOLE_JPEG[:-200], DamagedFileError, "truncated"),
        (WHOLE_PNG[:-30], DamagedFileError, "is damaged or not an image: "),
        (animated("GIF"), UserError, "it has 3 pictures, expected one"),
        (animated("PNG"), UserError, "it has 3 pictures, expected one"),
        (animated("TIFF"), UserError, "it has 3 pictures, expected one"),
        (animated("WEBP"), UserError, "it has 3 pictures, expected one"),
        (stream_of(np.ones((6, 4), np.float32), "TIFF").getvalue(), UserError, "of the kind F"),
        (stream_of(np.ones((6, 4), np.int32), "TIFF").getvalue(), UserError, "of the kind I"),
        (b"P5 9000 9000 255\n" + bytes(900), DamagedFileError, "it cannot hold 9000x9000 pixels in 917 bytes"),
        (b"P5 2000000 2000000 255\n", UserError, "more pixels than Pillow accepts"),
    ],
)
def test_a_file_that_cannot_be_used_says_why(content, kind, reason, tmp_path):
    (tmp_path / "x.jpg").write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_image(tmp_path / "x.jpg", channels=3)
    assert type(caught.value) is kind
    assert str(caught.value).startswith(repr(str(tmp_path / "x.jpg")))
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("note.txt", b"hello", "it is not an image: expected only .png"),
        ("note", b"", "it is empty"),
        ("paper.pdf", b"%PDF-1.4", "it is a PDF document"),
    ],
)
def test_a_file_whose_name_promises_no_image_is_not_called_damaged(name, content, reason, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=f"cannot be used: {reason}") as caught:
        read_image(tmp_path / name, channels=3)
    assert type(caught.value) is UserError
    assert "damaged" not in str(caught.value)


def test_the_content_tells_an_image_and_not_its_name(tmp_path):
    (tmp_path / "photo.txt").write_bytes(WHOLE_PNG)
    assert read_image(tmp_path / "photo.txt", channels=3).any()
    (tmp_path / "photo.txt").write_bytes(WHOLE_PNG[:-30])
    with pytest.raises(DamagedFileError):
        read_image(tmp_path / "photo.txt", channels=3)


def test_the_libraries_print_nothing_themselves(tmp_path, capfd):
    content = stream_of(RNG.integers(0, 256, (60, 40, 3), np.uint8), "TIFF", compression="tiff_lzw").getvalue()
    for place in range(20, 400, 7):  # some of these alterations make libtiff print
        (tmp_path / "x.tif").write_bytes(content[:place] + b"\xff\x00" + content[place + 2 :])
        with suppress(UserError):
            read_image(tmp_path / "x.tif", channels=3)
    many_samples = content[:8] + content[8:].replace(
        b"\x15\x01\x03\x00\x01\x00\x00\x00\x03", b"\x15\x01\x03\x00\x01\x00\x00\x00\x63"
    )
    with pytest.raises(UserError):
        read_image(io.BytesIO(many_samples), channels=3)
    assert logging.getLogger("PIL").handlers
    assert capfd.readouterr().err == ""


def test_a_path_that_is_no_file_says_why(tmp_path):
    (tmp_path / "link.png").symlink_to("nowhere.png")
    os.mkfifo(tmp_path / "pipe.png")
    for name, reason in {
        "link.png": "it is a link to a file that does not exist",
        "missing.png": "it does not exist",
        "pipe.png": "it is not a regular file",
    }.items():
        with pytest.raises(UserError, match=reason):
            read_image(tmp_path / name, channels=3)


def test_another_size_is_refused_before_anything_is_decoded():
    torn = stream_of(np.zeros((50, 30), np.uint8), "BMP").getvalue()[:100]
    with pytest.raises(UserError, match=r"has 50x30 pixels \(height x width\), expected 6x4"):
        read_image(io.BytesIO(torn), size=(6, 4), channels=1)
    with pytest.raises(UserError, match=r"has 6x4 pixels \(height x width\), expected 4x6"):
        read_image(stream_of(GRAY, "PNG"), size=(4, 6), channels=1)


def test_a_photo_with_a_second_picture_behind_it_is_accepted():
    first, second = (Image.fromarray(COLORED), Image.fromarray(COLORED[::-1]))
    stream = io.BytesIO()
    first.save(stream, "MPO", save_all=True, append_images=[second])
    plain = stream_of(first, "JPEG")
    stream.seek(0)
    assert np.array_equal(read_image(stream, channels=3), read_image(plain, channels=3))
