"""Proves that broken images are found among whole ones."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from crossmae.data.broken import find_broken, warn_of_depth
from crossmae.data.images import ImageLimits
from crossmae.data.sources.source import ImageFiles
from tests.crossmae.data.test_images import claiming, save


def test_one_truncated_file_among_many_is_found(tmp_path: Path) -> None:
    names = ("1.png", "2.jpg", "3.bmp", "4.tif", "5.webp")
    paths = [tmp_path / name for name in names]
    for path in paths:
        Image.new("RGB", (24, 20), (90, 30, 200)).save(path)

    whole_jpeg = paths[1].read_bytes()

    def broken() -> list[str]:
        return [one.message for one in find_broken(ImageFiles(paths, "images"), range(len(paths)))]

    assert broken() == []
    for path in paths:
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
        (message,) = broken()
        assert path.name in message
        path.write_bytes(whole)
    paths[1].write_bytes(whole_jpeg[:-2] + bytes(200))
    (message,) = broken()
    assert "2.jpg: cannot be read as an image: its data end early, and the rest is zeros" in message
    paths[1].write_bytes(whole_jpeg)
    paths[1].write_bytes(paths[1].read_bytes() + bytes(20))  # whole, though it does not end as it should
    assert broken() == []


def test_what_a_header_tells_is_found_before_pixels_are_read(tmp_path: Path) -> None:
    """Whole files by their last bytes: too large, of no rows, of other channels, no image, a pipe."""
    good = save(tmp_path / "0.png")
    png = good.read_bytes()
    files = {"1.png": claiming(png, 30_000, 30_000), "2.png": claiming(png, 0, 4), "3.jpg": b"none\xff\xd9"}
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    os.mkfifo(tmp_path / "4.png")
    paths = [good, *(tmp_path / name for name in files), tmp_path / "4.png"]
    source = ImageFiles(paths, "images")
    found = {one.index: one.message for one in find_broken(source, range(len(paths)))}
    assert list(found) == [1, 2, 3, 4]
    for index, text in ((1, "30000 x 30000"), (2, ""), (3, "not an image"), (4, "it is a named pipe, not a file")):
        assert paths[index].name in found[index]
        assert text in found[index]
    assert [one.index for one in find_broken(source, [0], channels=4)] == [0]
    source.limits = ImageLimits(23, "data.max_pixels")
    (message,) = (one.message for one in find_broken(source, [0]))
    assert "has 6 x 4 = 24 pixels, data.max_pixels is 23" in message


@pytest.mark.parametrize("name", ["a.gif", "a.png", "a.webp", "a.avif"])
def test_frames_and_bits_that_are_not_read_are_said_once(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    frames = [Image.new("RGB", (16, 16), (80 * number, 9, 9)) for number in range(3)]
    for path in (tmp_path / name, tmp_path / f"b-{name}"):
        frames[0].save(path, save_all=True, append_images=frames[1:])
    Image.new("RGB", (4, 4)).save(tmp_path / "c.png")
    for number in (1, 2):
        Image.fromarray(np.full((4, 4), 999, np.uint16)).save(tmp_path / f"deep{number}.png")
    (tmp_path / "text.png").write_text("text")
    source = ImageFiles(sorted(tmp_path.iterdir()), "images")
    warn_of_depth(source, 8)
    messages = sorted(record.message.partition(" has ")[2] for record in caplog.records)
    assert messages == [
        "3 frames, of which the first is read",
        "more than 8 bits, which are cut; data.bit_depth=16 keeps them",
    ]
    caplog.clear()
    warn_of_depth(source, 16)
    assert [record.message.partition(" has ")[2] for record in caplog.records] == messages[:1]
