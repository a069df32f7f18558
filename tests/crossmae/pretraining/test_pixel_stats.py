"""Proves the statistics against NumPy on all pixels at once, for every depth and number of channels."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from crossmae.data.images import decode_image
from crossmae.data.sources import open_source
from crossmae.data.sources.source import ImageFiles
from crossmae.errors import UserError
from crossmae.pretraining.pixel_stats import check_usable, measure
from tests.crossmae.data.sources.source_files import write_tree


def write_grey16(folder: Path, low: int, high: int, count: int = 4) -> ImageFiles:
    paths = []
    for index in range(count):
        pixels = np.random.default_rng(index).integers(low, high, (12, 12 + index)).astype(np.uint16)
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "PNG")
        path = folder / f"{index}.png"
        path.write_bytes(buffer.getvalue())
        paths.append(path)
    return ImageFiles(paths, "images")


@pytest.mark.parametrize("channels", [1, 3])
def test_equal_to_numpy_with_every_image_counting_the_same(channels: int, tmp_path: Path) -> None:
    source = open_source(write_tree(tmp_path)[0].parents[1], "data.train")
    stats = measure(source, range(9), channels, 8, threads=3)
    images = [np.asarray(decode_image(source.read(index), "x", channels)) / 255 for index in range(9)]
    means = np.stack([image.reshape(-1, channels).mean(0) for image in images])
    squares = np.stack([(image.reshape(-1, channels) ** 2).mean(0) for image in images])
    np.testing.assert_allclose(stats.mean, means.mean(0), rtol=1e-12)
    np.testing.assert_allclose(stats.std, np.sqrt(squares.mean(0) - means.mean(0) ** 2), rtol=1e-10)
    assert stats.largest == max(image.max() for image in images)
    # The heights are 10 .. 18, so weighting by pixels would differ.
    assert not np.allclose(stats.mean, np.concatenate([image.reshape(-1, channels) for image in images]).mean(0))
    assert (stats.short_side, stats.long_side) == ((10, 14.0, 18), (20, 20.0, 20))


def test_16_bits_are_measured_in_full(tmp_path: Path) -> None:
    source = write_grey16(tmp_path, 1000, 1010)
    stats = measure(source, range(4), 1, 16, threads=2)
    pixels = [np.asarray(Image.open(source.name(index))) / 65535 for index in range(4)]
    np.testing.assert_allclose(stats.mean, np.mean([image.mean() for image in pixels]), rtol=1e-6)
    np.testing.assert_allclose(stats.largest, max(image.max() for image in pixels), rtol=1e-6)


def test_a_constant_channel_is_unusable(tmp_path: Path) -> None:
    Image.new("RGB", (9, 9), (10, 20, 30)).save(tmp_path / "0.png")
    pixels = np.zeros((9, 9, 3), np.uint8)
    pixels[..., 1] = np.arange(9)
    Image.fromarray(pixels).save(tmp_path / "1.png")
    check_usable(measure(open_source(tmp_path, "k"), [0, 1], 3, 8, threads=1))
    with pytest.raises(UserError, match="channel 0, 2 has the same value everywhere"):
        check_usable(measure(open_source(tmp_path, "k"), [1], 3, 8, threads=1))


def test_the_words_to_paste(tmp_path: Path) -> None:
    stats = measure(write_grey16(tmp_path, 0, 65536), range(4), 1, 16, threads=1)
    assert stats.overrides == f"'data.mean=[{stats.mean[0]:.4f}]' 'data.std=[{stats.std[0]:.4f}]'"
