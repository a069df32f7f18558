"""Proves that broken images are found among whole ones."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from crossmae.data.broken import find_broken
from crossmae.data.sources.source import ImageFiles


def test_one_truncated_file_among_many_is_found(tmp_path: Path) -> None:
    names = ("1.png", "2.jpg", "3.bmp", "4.tif", "5.webp")
    paths = [tmp_path / name for name in names]
    for path in paths:
        Image.new("RGB", (24, 20), (90, 30, 200)).save(path)

    def broken() -> list[str]:
        return [one.message for one in find_broken(ImageFiles(paths, "images"), range(len(paths)))]

    assert broken() == []
    for path in paths:
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
        (message,) = broken()
        assert path.name in message
        path.write_bytes(whole)
    paths[1].write_bytes(paths[1].read_bytes() + bytes(20))  # whole, though it does not end as it should
    assert broken() == []
