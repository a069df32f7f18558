"""Proves that TIFF files are read by their axes, and that what is left out is said."""

from __future__ import annotations

import io
import logging

import numpy as np
import pytest
from PIL import Image

from crossmae.data import tiff
from crossmae.data.images import ImageLimits, decode_image
from crossmae.data.tiff import plan_layout
from crossmae.errors import UserError

tifffile = pytest.importorskip("tifffile")

RNG = np.random.default_rng(0)
H, W = 12, 10


def stack(*shape: int, dtype: str = "uint16") -> np.ndarray:
    if dtype == "float32":
        return RNG.random(shape, np.float32)
    return RNG.integers(0, np.iinfo(dtype).max, shape, dtype)


def write(*arrays: np.ndarray, **options: object) -> bytes:
    file = io.BytesIO()
    with tifffile.TiffWriter(file, imagej=bool(options.pop("imagej", False)), ome=options.pop("ome", None)) as writer:
        for array in arrays:
            writer.write(array, **{"photometric": "minisblack", **options})
    return file.getvalue()


def read(data: bytes, channels: int) -> np.ndarray:
    return decode_image(data, "x.tif", channels, 16)


def scaled(pixels: np.ndarray) -> np.ndarray:
    return pixels / (1 if pixels.dtype == np.float32 else np.iinfo(pixels.dtype).max)


@pytest.fixture(autouse=True)
def nothing_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiff, "_said", set())


@pytest.mark.parametrize(
    ("axes", "shape", "channels", "chosen", "text"),
    [
        ("YX", (9, 8), 3, (), ""),
        ("YXS", (9, 8, 3), 3, (2,), ""),
        ("SYX", (5, 9, 8), 5, (0,), ""),
        ("CYX", (5, 9, 8), 3, (0,), ""),
        ("ZCYX", (4, 2, 9, 8), 2, (1,), "4 slices of 2 channels"),
        ("TZCYX", (6, 4, 2, 9, 8), 8, (2,), "6 times, 4 slices of 2 channels"),
        ("ZYX", (3, 9, 8), 3, (), "3 slices of 1 channel "),
        ("ZCYX", (1, 2, 9, 8), 2, (1,), ""),
        ("QYX", (3, 9, 8), 3, (0,), "its 3 pages are read as channels"),
        ("IYX", (2, 9, 8), 3, (), "2 pages of 1 channel "),
        ("QYXS", (3, 9, 8, 3), 3, (3,), "3 pages of 3 channels"),
        ("QQYX", (2, 3, 9, 8), 3, (1,), "2 pages of 3 channels"),
        ("CYXS", (2, 9, 8, 3), 6, (0, 3), ""),
        ("CYXS", (2, 9, 8, 3), 3, (3,), "2 channels of 3 channels"),
        ("QYX", (9, 8, 5), 5, (2,), "its 9 pages of 8 x 5 pixels are read as rows with 5 channels"),
    ],
)
def test_axes_are_channels_by_name_then_by_number(
    axes: str, shape: tuple[int, ...], channels: int, chosen: tuple[int, ...], text: str
) -> None:
    layout = plan_layout(axes, shape, channels, "model.in_chans")
    assert layout.channels == chosen
    assert text in layout.text
    assert bool(layout.text) == bool(text)


def test_two_axes_that_could_be_the_channels_are_an_error() -> None:
    with pytest.raises(UserError, match=r"x\.tif: .*two of its axes QQYX \(3 x 3 x 12 x 10\) have no name"):
        read(write(stack(3, 3, H, W)), 3)


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
@pytest.mark.parametrize("channels", [1, 2, 3, 4, 6])
def test_pages_and_samples_of_any_number_and_depth_are_channels(channels: int, dtype: str) -> None:
    pages = stack(channels, H, W, dtype=dtype)
    last = np.moveaxis(pages, 0, -1)
    named = {"metadata": {"axes": "CYX"}}
    files = {
        "pages": write(*pages),
        "named": write(pages, **named),
        "ome": write(pages, ome=True, **named),
        "first": write(pages, planarconfig="separate") if channels > 1 else write(pages[0]),
        "volume": write(pages, volumetric=True, tile=(16, 16, 16)) if channels == 1 else write(pages),
        "last": write(last, planarconfig="contig") if channels > 1 else write(pages[0]),
    }
    if dtype != "float32" or channels > 1:
        files["imagej"] = write(pages, imagej=True, **named)
    for kind, data in files.items():
        np.testing.assert_allclose(read(data, channels), scaled(last), atol=1e-6, err_msg=kind)


@pytest.mark.filterwarnings("ignore:.*are stored as RGB:DeprecationWarning")
@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
@pytest.mark.parametrize("count", [3, 4])
def test_written_axes_win_over_the_colours_that_tifffile_declares(
    count: int, dtype: str, caplog: pytest.LogCaptureFixture
) -> None:
    pixels = stack(count, H, W, dtype=dtype)
    for axes, text in (("TYX", "times"), ("ZYX", "slices")):
        file = io.BytesIO()
        tifffile.imwrite(file, pixels, metadata={"axes": axes})
        for channels in (1, 3):
            found = read(file.getvalue(), channels)
            np.testing.assert_allclose(found, np.repeat(scaled(pixels[0])[..., None], channels, -1), atol=1e-6)
        assert f"holds {count} {text} of 1 channel (axes {axes}), of which the first is read" in caplog.text
    for axes in ("ZCYX", "CYX", "QYX")[: 3 if count == 3 else 2]:
        chosen = pixels if len(axes) == 3 else np.stack([pixels, pixels[::-1]])
        file = io.BytesIO()
        tifffile.imwrite(file, chosen, metadata={"axes": axes})
        np.testing.assert_allclose(read(file.getvalue(), count), scaled(np.moveaxis(pixels, 0, -1)), atol=1e-6)


def test_rows_saved_as_pages_are_refused_with_their_channels() -> None:
    pixels = stack(H, W, 4, dtype="uint8")
    np.testing.assert_allclose(read(write(pixels), 4), scaled(pixels), atol=1e-6)
    for channels in (1, 3):
        match = rf"has 4 channels, model\.in_chans is {channels}: it holds 12 rows .* or set model\.in_chans=4\.$"
        with pytest.raises(UserError, match=match):
            read(write(pixels), channels)


@pytest.mark.parametrize("value", [-9999, -32768, -3.4e38, np.finfo(np.float32).min])
def test_fill_values_are_named_as_missing_data(value: float) -> None:
    holes = stack(H, W, dtype="float32")
    holes[:3] = value
    with pytest.raises(UserError, match=r"x\.tif: 25\.00% of its samples are -\d.*, which marks missing data\. Fill"):
        read(write(holes), 1)


@pytest.mark.parametrize("kind", ["ome", "imagej", "plain"])
@pytest.mark.parametrize("axes", ["ZCYX", "TCYX"])
def test_the_first_of_a_named_stack_is_read_and_said_once(
    kind: str, axes: str, caplog: pytest.LogCaptureFixture
) -> None:
    pixels = stack(4, 2, H, W)
    data = write(pixels, metadata={"axes": axes}, **({kind: True} if kind != "plain" else {}))
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            np.testing.assert_allclose(read(data, 2), scaled(np.moveaxis(pixels[0], 0, -1)), atol=1e-6)
    (line,) = caplog.messages
    assert line.startswith(f"x.tif: holds 4 {'slices' if axes[0] == 'Z' else 'times'} of 2 channels (axes {axes}), ")
    with pytest.raises(
        UserError, match=rf"has 2 channels, model\.in_chans is 3: .*\(axes {axes}\).* model\.in_chans=2"
    ):
        read(data, 3)


def test_slices_are_no_channels_even_if_their_number_fits(caplog: pytest.LogCaptureFixture) -> None:
    pixels = stack(4, H, W)
    data = write(pixels, ome=True, metadata={"axes": "ZYX"})
    with pytest.raises(UserError, match=r"has 1 channel, .*4 slices .* If the slices are channels, save .* C in place"):
        read(data, 4)
    np.testing.assert_allclose(read(data, 1)[..., 0], scaled(pixels[0]), atol=1e-6)
    assert "4 slices of 1 channel" in caplog.text


def test_stains_have_no_luma() -> None:
    with pytest.raises(UserError, match=r"has 3 channels, model\.in_chans is 1\. Convert it, or set model\.in_chans=3"):
        read(write(stack(3, H, W), metadata={"axes": "CYX"}), 1)


def test_the_largest_image_is_read_whatever_comes_first() -> None:
    preview, pixels = stack(4, 4, dtype="uint8"), stack(2, H, W)
    np.testing.assert_allclose(read(write(preview, pixels), 2), scaled(np.moveaxis(pixels, 0, -1)), atol=1e-6)
    colour = stack(H, W, 3, dtype="uint8")
    both = [stack(4, 4, 3, dtype="uint8"), colour]
    for options in ({}, {"compression": "zlib"}, {"planarconfig": "separate"}):
        arrays = [np.moveaxis(one, -1, 0) for one in both] if "planarconfig" in options else both
        found = np.asarray(decode_image(write(*arrays, photometric="rgb", **options), "x", 3))
        assert np.array_equal(found, colour)


def test_pages_that_pillow_reads_keep_its_colours(caplog: pytest.LogCaptureFixture) -> None:
    colour = stack(H, W, 3, dtype="uint8")
    data = write(colour, colour[::-1], photometric="rgb")
    assert np.array_equal(np.asarray(decode_image(data, "x", 3)), colour)
    assert "2 images of 3 channels" in caplog.text
    document = [Image.fromarray(one).convert("1") for one in stack(3, H, W, dtype="uint8")]
    file = io.BytesIO()
    document[0].save(file, "TIFF", save_all=True, append_images=document[1:], compression="group4")
    assert np.array_equal(np.asarray(decode_image(file.getvalue(), "x", 3))[..., 2], np.asarray(document[0]) * 255)


def test_few_bits_white_is_zero_and_orientation_are_applied_to_stacks() -> None:
    pages = stack(2, H, W, dtype="uint8")
    inverted = write(pages, photometric="miniswhite", planarconfig="separate")
    np.testing.assert_allclose(read(inverted, 2), 1 - scaled(np.moveaxis(pages, 0, -1)), atol=1e-6)
    turned = write(pages, planarconfig="separate", extratags=[(274, "H", 1, 3, True)])
    np.testing.assert_allclose(read(turned, 2), scaled(np.moveaxis(pages, 0, -1))[::-1, ::-1], atol=1e-6)


def test_limits_and_missing_data_of_stacks_are_named() -> None:
    with pytest.raises(UserError, match=r"x\.tif: has 10 x 12 = 120 pixels, KEY is 100\. Raise KEY"):
        decode_image(write(stack(2, H, W)), "x.tif", 2, 16, ImageLimits(100, "KEY"))
    empty = bytearray(write(stack(H, W, dtype="uint8")))
    tag = empty.index(b"\x01\x01\x03\0") if b"\x01\x01\x03\0" in empty else empty.index(b"\x01\x01\x04\0")
    empty[tag + 8 : tag + 12] = bytes(4)
    with pytest.raises(UserError, match=r"x\.tif: has 10 x 0 pixels\. An image without pixels"):
        read(bytes(empty), 1)
    holes = stack(2, H, W, dtype="float32")
    holes[0, :3] = np.nan
    with pytest.raises(UserError, match=r"x\.tif: 12\.50% of its samples are NaN"):
        read(write(holes), 2)
    for top, advice in ((9000, "reflectance .* divide by 10,000"), (200, "8-bit .* 255"), (60_000, "16-bit .* 65,535")):
        with pytest.raises(
            UserError, match=rf"x\.tif: floating-point samples from .*\. Rescale them to 0-1: .*{advice}"
        ):
            read(write(stack(2, H, W, dtype="float32") * top), 2)
