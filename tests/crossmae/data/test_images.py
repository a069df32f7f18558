"""Proves how images are found, how every kind is read, and that a bad one is named."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image, ImageOps

from crossmae.data.images import (
    ImageLimits,
    TooManyPixels,
    decode_image,
    header_is_sound,
    open_image,
    plain_jpeg_size,
    read_header,
    read_image,
)
from crossmae.errors import UserError


def save(path: Path, value: int = 128) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (6, 4), (value, 0, 0)).save(path)
    return path


@pytest.mark.parametrize("content", [b"", b"not an image", "truncated"])
def test_a_broken_image_is_named(tmp_path: Path, content: bytes | str) -> None:
    path = save(tmp_path / "image.png")
    path.write_bytes(path.read_bytes()[:50] if isinstance(content, str) else content)
    with pytest.raises(UserError, match=r"image\.png: cannot be read"):
        read_image(path)


NOISE = np.random.default_rng(1).integers(0, 256, (200, 200, 3), np.uint8)


@pytest.mark.parametrize("progressive", [False, True])
def test_a_jpeg_with_zeros_in_place_of_its_end_is_named(progressive: bool) -> None:
    thumbnail = encoded(NOISE[:16, :16], "jpeg")
    data = encoded(NOISE, "jpeg", quality=90, progressive=progressive, comment=thumbnail)
    half = len(data) // 2
    with pytest.raises(UserError, match=r"x\.jpg: cannot be read as an image"):
        decode_image(data[:half] + bytes(half), "x.jpg")
    padded = decode_image(data + bytes(5000), "x.jpg")
    assert np.array_equal(np.asarray(padded), np.asarray(decode_image(data, "x.jpg")))


def test_zeros_that_are_samples_are_read() -> None:
    flat = encoded(np.zeros((800, 800), np.uint8), "jpeg", optimize=True)
    assert bytes(64) in flat
    assert not np.asarray(decode_image(flat, "x.jpg")).any()


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "is a Git LFS pointer. Run git lfs pull"),
        (b"<!DOCTYPE html><html>", "is a web page or XML. Get"),
        (b"\0\0\0\x18ftypheic" + bytes(90), "is a HEIC image. Convert it"),
        (bytes(128) + b"DICM" + bytes(90), "is a DICOM file. Convert it"),
        (b"\x1f\x8b\x08" + bytes(90), "is compressed with gzip. Unpack it"),
        (b"", "is empty. Get it again"),
        (b"\x89PNG and more", "not an image of a kind"),
    ],
)
def test_what_a_file_named_as_an_image_is_instead_is_said(content: bytes, kind: str) -> None:
    with pytest.raises(UserError, match=rf"x\.jpg: cannot be read as an image: {kind}"):
        decode_image(content, "x.jpg")


def test_an_image_that_is_transparent_everywhere_is_warned_of_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("crossmae.data.tiff._said", set())
    decode_image(encoded(PIXELS, "png"), "seen.png")
    assert not caplog.messages
    for _ in range(2):
        image = decode_image(encoded(PIXELS * np.array([1, 1, 1, 0], np.uint8), "png"), "clear.png")
        assert (np.asarray(image) == 255).all()
    (line,) = caplog.messages
    assert line.startswith("clear.png: is transparent everywhere and read as white")


def pixel(path: Path) -> tuple[int, ...]:
    image = read_image(path)
    assert image.mode == "RGB"
    return tuple(np.asarray(image)[0, 0])


def test_modes_become_rgb_by_the_stated_rules(tmp_path: Path) -> None:
    path = tmp_path / "x.png"
    Image.fromarray(np.full((2, 2), 0xABCD, np.uint16)).save(path)
    assert pixel(path) == (0xAB, 0xAB, 0xAB)  # 16 bits scaled, not cut off
    Image.new("RGB", (2, 2), (10, 20, 30)).quantize(4).save(path)
    assert pixel(path) == (10, 20, 30)
    tiff = tmp_path / "x.tiff"
    Image.new("CMYK", (2, 2), (0, 255, 255, 0)).save(tiff)
    assert pixel(tiff) == (255, 0, 0)


def encoded(pixels: np.ndarray | Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image = Image.fromarray(pixels) if isinstance(pixels, np.ndarray) else pixels
    image.save(file, kind, **options)
    return file.getvalue()


def tiff(pixels: np.ndarray, **options: object) -> bytes:
    """A TIFF file of a kind that Pillow cannot write."""
    file = io.BytesIO()
    pytest.importorskip("tifffile").imwrite(file, pixels, **options)
    return file.getvalue()


PIXELS = np.random.default_rng(0).integers(0, 256, (6, 5, 4), np.uint8)
LUMA = np.array([0.299, 0.587, 0.114])


def test_eight_bit_files_become_the_channels_that_are_asked_for() -> None:
    grey, colour, alpha = (encoded(PIXELS[..., :n].squeeze(), "png") for n in (1, 3, 4))
    assert np.array_equal(np.asarray(decode_image(grey, "x", 1)), PIXELS[..., 0])
    assert np.array_equal(np.asarray(decode_image(grey, "x", 3)), np.repeat(PIXELS[..., :1], 3, -1))
    assert np.array_equal(np.asarray(decode_image(colour, "x", 3)), PIXELS[..., :3])
    assert np.abs(np.asarray(decode_image(colour, "x", 1)) - PIXELS[..., :3] @ LUMA).max() <= 1
    assert np.array_equal(decode_image(alpha, "x", 4), PIXELS)
    opacity = PIXELS[..., 3:] / 255
    assert (
        np.abs(np.asarray(decode_image(alpha, "x", 3)) - (PIXELS[..., :3] * opacity + 255 * (1 - opacity))).max() <= 1
    )
    for data, channels, held in ((colour, 4, 3), (grey, 2, 1), (colour, 5, 3)):
        with pytest.raises(UserError, match=f"x: has {held} channels?, model.in_chans is {channels}"):
            decode_image(data, "x", channels)


def test_sixteen_bits_are_kept_or_scaled() -> None:
    deep = np.random.default_rng(1).integers(0, 65536, (6, 5), np.uint16)
    data = encoded(deep, "png")
    kept = decode_image(data, "x", 1, 16)
    assert kept.dtype == np.float32
    np.testing.assert_allclose(kept[..., 0], deep / 65535, atol=1e-6)
    assert kept.shape == (6, 5, 1)
    np.testing.assert_allclose(decode_image(data, "x", 3, 16), np.repeat(kept, 3, -1))
    assert np.array_equal(np.asarray(decode_image(data, "x", 1)), deep >> 8)
    eight = decode_image(encoded(PIXELS[..., :3], "png"), "x", 3, 16)
    np.testing.assert_allclose(eight, PIXELS[..., :3] / 255, atol=1e-6)


def test_tiff_files_of_any_channels_depth_and_order() -> None:
    rng = np.random.default_rng(2)
    five = rng.integers(0, 65536, (7, 6, 5), np.uint16)
    for data in (
        tiff(five, photometric="minisblack", planarconfig="contig"),
        tiff(np.moveaxis(five, -1, 0), photometric="minisblack"),
    ):
        np.testing.assert_allclose(decode_image(data, "x", 5, 16), five / 65535, atol=1e-6)
        assert np.abs(decode_image(data, "x", 5, 8) - np.rint(five / 257)).max() == 0
    colour = rng.integers(0, 65536, (7, 6, 3), np.uint16)
    np.testing.assert_allclose(decode_image(tiff(colour, photometric="rgb"), "x", 3, 16), colour / 65535, atol=1e-6)
    np.testing.assert_allclose(decode_image(tiff(colour, photometric="rgb"), "x", 3), np.rint(colour / 257), atol=1)
    floats = rng.random((7, 6), np.float32)
    np.testing.assert_allclose(decode_image(tiff(floats), "x", 1, 16)[..., 0], floats, atol=1e-6)
    with pytest.raises(UserError, match=r"x: floating-point samples from .*\. Rescale them to 0-1"):
        decode_image(tiff(floats * 7), "x", 1, 16)
    with pytest.raises(UserError, match="x: holds int32 samples"):
        decode_image(tiff(floats.astype(np.int32), photometric="minisblack"), "x", 2, 16)


def test_tiff_colours_are_read_alike_at_both_depths() -> None:
    """Pillow's reading is the reference where it is right; what has no rule is refused, never guessed."""
    colour = Image.fromarray(PIXELS[..., :3])
    for mode in ("CMYK", "YCbCr", "LAB", "P", "1", "RGBA", "LA"):
        data = encoded(colour.convert(mode), "tiff")
        try:
            Image.open(io.BytesIO(data)).load()
        except OSError:
            continue  # Pillow 12 can not read the YCbCr file that it writes
        eight, deep = (np.asarray(decode_image(data, "x", 3, depth), np.float64) for depth in (8, 16))
        assert np.abs(eight / 255 - deep).max() < 1 / 250, mode
    inverted = tiff(PIXELS[..., 0], photometric="miniswhite")
    for depth, top in ((8, 255), (16, 1)):
        found = np.asarray(decode_image(inverted, "x", 1, depth), np.float64).squeeze()
        np.testing.assert_allclose(found / top, 1 - PIXELS[..., 0] / 255, atol=1e-6)
    deep = np.random.default_rng(3).integers(0, 65536, (6, 5, 3), np.uint16)
    planar = tiff(np.moveaxis(deep, -1, 0), photometric="rgb", planarconfig="separate")
    np.testing.assert_allclose(decode_image(planar, "x", 3, 8), np.rint(deep / 257), atol=1)
    assert isinstance(decode_image(planar, "x", 3), Image.Image)
    infrared = tiff(PIXELS, photometric="rgb", extrasamples=["unspecified"])
    signed = tiff(deep[..., 0].astype(np.int16), photometric="minisblack")
    for depth in (8, 16):
        with pytest.raises(UserError, match=r"x: has 4 channels, model\.in_chans is 3"):
            decode_image(infrared, "x", 3, depth)
        with pytest.raises(UserError, match="x: holds int16 samples"):
            decode_image(signed, "x", 1, depth)


def test_a_transparent_grey_is_white_at_both_depths() -> None:
    for pixels, key in ((PIXELS[..., 0], 7), (PIXELS[..., 0].astype(np.uint16) * 200, 1400)):
        pixels = np.where(pixels == pixels.max(), key, pixels).astype(pixels.dtype)
        data = encoded(pixels, "png", transparency=key)
        for depth, top in ((8, 255), (16, 1)):
            found = np.asarray(decode_image(data, "x", 1, depth), np.float64).squeeze() / top
            assert (found[pixels == key] == 1).all()
            assert found[pixels != key].max() < 1


def test_damage_of_any_kind_is_one_error_that_names_the_file() -> None:
    """Bytes of files of every kind, cut off and changed at random: decoded, or refused by name."""
    pytest.importorskip("tifffile")
    rng = np.random.default_rng(0)
    deep = np.random.default_rng(4).integers(0, 65536, (16, 16), np.uint16)
    files = [encoded(PIXELS[..., :3], kind) for kind in ("png", "jpeg", "webp", "bmp", "tiff", "gif")]
    files += [encoded(deep, kind) for kind in ("png", "tiff")] + [
        encoded(PIXELS[..., :3], "tiff", compression="tiff_lzw")
    ]
    refused = []
    for trial in range(400):
        data = bytearray(files[trial % len(files)])
        for _ in range(int(rng.integers(1, 6))):
            data[int(rng.integers(len(data)))] = int(rng.integers(256))
        data = data[: int(rng.integers(len(data)))] if trial % 3 == 0 else data
        try:
            decode_image(bytes(data), "the file", 3, (8, 16)[trial % 2])
        except UserError as error:
            refused.append(str(error))
    assert len(refused) > 100
    assert all(message.startswith("the file: ") for message in refused)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("bit_depth", [8, 16])
def test_orientation_is_applied_to_every_kind_of_file(orientation: int, bit_depth: int) -> None:
    """Pillow's own reading of the tag is the reference."""
    exif = Image.Exif()
    exif[274] = orientation
    png = encoded(PIXELS[..., :3], "png", exif=exif)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(png)))) / 255
    deep = pytest.importorskip("imagecodecs").png_encode(PIXELS[..., :3].astype(np.uint16) * 257)
    deep = with_chunks(deep, chunk(b"eXIf", exif.tobytes()[6:]), LONG_TEXT)
    for data in (png, deep, tiff(PIXELS[..., :3], photometric="rgb", extratags=[(274, "H", 1, orientation, True)])):
        found = np.asarray(decode_image(data, "x", 3, bit_depth), dtype=np.float64) / (255 if bit_depth == 8 else 1)
        np.testing.assert_allclose(found, expected, atol=1e-6)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def with_chunks(png: bytes, *chunks: bytes, last: bool = False) -> bytes:
    """Put chunks behind the header of a PNG, or before its end."""
    place = len(png) - 12 if last else 33
    return png[:place] + b"".join(chunks) + png[place:]


def claiming(png: bytes, width: int, height: int) -> bytes:
    """A PNG whose header claims another size."""
    return png[:8] + chunk(b"IHDR", struct.pack(">II", width, height) + png[24:29]) + png[33:]


LONG_TEXT = chunk(b"zTXt", b"prompt\0\0" + zlib.compress(bytes(3 << 20)))
METADATA = {
    "long text": [LONG_TEXT],
    "many texts": [chunk(b"zTXt", b"x\0\0" + zlib.compress(bytes(1 << 20)))] * 66,
    "long profile": [chunk(b"iCCP", b"icc\0\0" + zlib.compress(bytes(3 << 20)))],
    "broken profile": [chunk(b"iCCP", b"icc\0\0junk")],
    "broken checksum": [chunk(b"tEXt", b"a\0b")[:-1] + b"?"],
    "short chunks": [
        chunk(kind, b"") for kind in (b"tEXt", b"zTXt", b"iTXt", b"iCCP", b"pHYs", b"gAMA", b"sRGB", b"eXIf")
    ],
}


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("kind", METADATA)
def test_metadata_never_refuses_pixels(kind: str, last: bool) -> None:
    for pixels in (PIXELS[..., 0], PIXELS[..., :3], PIXELS):
        png = encoded(pixels, "png")
        damaged = with_chunks(png, *METADATA[kind], last=last)
        assert np.array_equal(np.asarray(decode_image(damaged, "x")), np.asarray(decode_image(png, "x")))
        assert open_image(damaged).size == (5, 6)


@pytest.mark.parametrize("where", ["exif", "raw profile", "xmp"])
def test_the_orientation_beside_long_text_is_applied(where: str) -> None:
    exif = Image.Exif()
    exif[274] = 6
    raw = f"\nexif\n{len(exif.tobytes()):8}\n{exif.tobytes().hex()}\n".encode()
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><a tiff:Orientation="6"/></x:xmpmeta>'
    chunks = {
        "exif": chunk(b"eXIf", exif.tobytes()[6:]),
        "raw profile": chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(raw)),
        "xmp": chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + xmp),
    }
    png = encoded(PIXELS[..., :3], "png")
    for data in (with_chunks(png, chunks[where]), with_chunks(png, chunks[where], LONG_TEXT)):
        assert np.array_equal(np.asarray(decode_image(data, "x")), np.rot90(PIXELS[..., :3], -1))


@pytest.mark.parametrize("kind", ["png", "jpeg"])
@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_a_header_tells_sizes_orientation_and_whether_the_file_ends(
    tmp_path: Path, kind: str, orientation: int
) -> None:
    exif = Image.Exif()
    exif[274] = orientation
    whole = encoded(PIXELS[..., :3], kind, exif=exif)
    sizes = (5, 6), (6, 5) if orientation == 6 else (5, 6)
    path = tmp_path / "image"
    for data, is_whole in ((whole, True), (whole[:-1], False), (whole + b"?", False)):
        path.write_bytes(data)
        assert read_header(path) == (*sizes, orientation, is_whole)
    with pytest.raises(TooManyPixels, match="image"):
        read_header(path, ImageLimits(29, "KEY"))


def test_only_decoding_tells_whether_an_image_with_damaged_metadata_is_whole(tmp_path: Path) -> None:
    png = encoded(PIXELS[..., :3], "png")
    (tmp_path / "image").write_bytes(with_chunks(png, *METADATA["broken checksum"]))
    assert read_header(tmp_path / "image") == ((5, 6), (5, 6), 1, False)
    late = with_chunks(png, chunk(b"eXIf", b"II*\0" + struct.pack("<IHHHIHHI", 8, 1, 274, 3, 1, 6, 0, 0)), last=True)
    (tmp_path / "image").write_bytes(late)
    assert read_header(tmp_path / "image") == ((5, 6), (6, 5), 6, True)


def jpeg_with_exif(kind: int, count: int, value: bytes, *others: bytes, prefix: bytes = b"Exif\0\0") -> bytes:
    """A JPEG with an entry for its orientation, and other entries of 12 bytes."""
    entries = [struct.pack("<HHI", 0x112, kind, count) + value.ljust(4, b"\0"), *others]
    exif = prefix + b"II*\0" + struct.pack("<IH", 8, len(entries)) + b"".join(entries) + bytes(4)
    jpeg = encoded(PIXELS[..., :3], "jpeg", quality=95)
    return jpeg[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + jpeg[2:]


FAR_AWAY = struct.pack("<HHII", 0x10F, 2, 5000, 9000)
IMPOSSIBLE = struct.pack("<HHII", 0x11A, 10, 1, 60)


@pytest.mark.parametrize(
    ("data", "turns"),
    [
        (jpeg_with_exif(3, 1, b"\x06"), -1),
        (jpeg_with_exif(4, 1, b"\x06"), -1),
        (jpeg_with_exif(1, 1, b"\x06"), -1),
        (jpeg_with_exif(2, 2, b"6\0"), -1),
        (jpeg_with_exif(3, 2, b"\x06\0\x01"), -1),
        (jpeg_with_exif(3, 1, b"\x06", FAR_AWAY, IMPOSSIBLE), -1),
        (jpeg_with_exif(3, 1, b"\x06", prefix=b"Exif\0\0Exif\0\0"), -1),
        (jpeg_with_exif(3, 1, b"\x09"), 0),
        (jpeg_with_exif(3, 1, b"\0"), 0),
        (jpeg_with_exif(2, 2, b"x\0"), 0),
        (jpeg_with_exif(3, 1, b"\x06").replace(b"II*", b"?!*"), 0),
    ],
)
def test_odd_exif_is_read_as_far_as_it_can_be(data: bytes, turns: int) -> None:
    plain = np.asarray(decode_image(encoded(PIXELS[..., :3], "jpeg", quality=95), "x"))
    assert np.array_equal(np.asarray(decode_image(data, "x")), np.rot90(plain, turns))


def test_one_limit_of_pixels_for_all_kinds_of_files(recwarn: pytest.WarningsRecorder) -> None:
    limits = ImageLimits(29, "SOME.KEY")
    for kind in ("png", "jpeg", "webp", "bmp", "gif", "tiff", "ppm"):
        data = encoded(PIXELS[..., :3], kind)
        with pytest.raises(UserError, match=r"x: has 5 x 6 = 30 pixels, SOME\.KEY is 29\. Raise SOME\.KEY"):
            decode_image(data, "x", limits=limits)
        decode_image(data, "x", limits=limits._replace(pixels=30))
    grey = encoded(PIXELS[..., 0], "png")
    with pytest.raises(UserError, match=r"has 14000 x 14000 = 196,000,000 pixels, data\.max_pixels is 178,956,970"):
        decode_image(claiming(grey, 14_000, 14_000), "x")
    assert not header_is_sound(claiming(grey, 14_000, 14_000), "x", 3, ImageLimits())
    assert header_is_sound(claiming(grey, 10_000, 10_000), "x", 3, ImageLimits())  # where Pillow would warn
    assert not recwarn.list


def test_images_without_rows_or_columns_are_errors() -> None:
    for size in ((0, 6), (5, 0)):
        with pytest.raises(UserError, match=r"^x: "):
            decode_image(claiming(encoded(PIXELS[..., 0], "png"), *size), "x")
    with pytest.raises(UserError, match=r"^x: "):
        decode_image(b"P5\n0 5\n255\n", "x")


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}])
def test_a_jpeg_cut_in_its_data_is_named_even_if_it_ends_as_it_should(options: dict[str, object]) -> None:
    noise = np.random.default_rng(5).integers(0, 256, (80, 64, 3), np.uint8)
    for pixels in (noise, noise[..., 0]):
        data = encoded(pixels, "jpeg", **options)
        for end in (b"", b"\xff\xd9"):
            with pytest.raises(UserError, match="x: cannot be read as an image: "):
                decode_image(data[: len(data) // 3] + end, "x")
        assert np.array_equal(np.asarray(decode_image(data + bytes(99), "x")), np.asarray(decode_image(data, "x")))
    grey = encoded(np.full((64, 64), 128, np.uint8), "jpeg", **options)
    assert (np.asarray(decode_image(grey, "x")) == 128).all()  # whole, though it looks like missing data


@pytest.mark.parametrize(
    "change", ["none", "progressive", "grey", "exif", "cmyk", "comment", "icc", "cut", "png", "empty"]
)
def test_the_size_of_a_plain_jpeg_is_pillows(change: str, tmp_path: Path) -> None:
    mode = {"grey": "L", "cmyk": "CMYK"}.get(change, "RGB")
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    extra: dict[str, Any] = {"progressive": {"progressive": True}, "exif": {"exif": exif}, "comment": {"comment": b"x"}}
    extra["icc"] = {"icc_profile": b"x" * 9}
    file = io.BytesIO()
    Image.new(mode, (31, 17)).save(file, "PNG" if change == "png" else "JPEG", **extra.get(change, {}))
    data = {"cut": file.getvalue()[:-2], "empty": b""}.get(change, file.getvalue())
    (tmp_path / "x").write_bytes(data)
    is_plain = change in ("none", "progressive", "grey")
    assert plain_jpeg_size(str(tmp_path / "x")) == ((31, 17) if is_plain else None)
    for length in range(0, len(data) - 2, 7):
        (tmp_path / "x").write_bytes(data[:length])
        assert plain_jpeg_size(str(tmp_path / "x")) is None


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 620), st.integers(0, 255))
def test_no_changed_byte_gives_a_size_that_pillow_refuses(at: int, value: int) -> None:
    file = io.BytesIO()
    Image.new("RGB", (31, 17)).save(file, "JPEG")
    data = bytearray(file.getvalue())
    data[at] = value
    with NamedTemporaryFile() as changed:
        changed.write(data)
        changed.flush()
        size = plain_jpeg_size(changed.name)
        if size is not None and 0 not in size:
            with Image.open(changed.name) as image:
                assert (image.size, image.getexif().get(ExifTags.Base.Orientation, 1)) == (size, 1)
