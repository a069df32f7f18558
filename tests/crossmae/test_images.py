"""Proves how images are found, how every kind is read, and that a bad one is named."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from crossmae.errors import UserError
from crossmae.images import check_images, find_images, read_image


def save(path: Path, value: int = 128) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (6, 4), (value, 0, 0)).save(path)
    return path


def test_finds_images_in_all_subfolders_sorted_and_ignores_the_rest(tmp_path: Path) -> None:
    expected = [save(tmp_path / name) for name in ("a/1.PNG", "a/b/2.jpg", "é ü/3.Jpeg")]
    save(tmp_path / ".hidden" / "4.png")
    save(tmp_path / "a" / ".5.png")
    (tmp_path / "a" / "notes.txt").write_text("no image")
    assert find_images(tmp_path, "data.train") == sorted(expected)


def test_links_to_folders_are_followed_once(tmp_path: Path) -> None:
    save(tmp_path / "real" / "1.png")
    root = tmp_path / "root"
    save(root / "2.png")
    (root / "link").symlink_to(tmp_path / "real")
    (root / "loop").symlink_to(root)
    assert [path.name for path in find_images(root, "data.train")] == ["2.png", "1.png"]


def test_a_folder_without_images_is_an_error_with_key_and_path(tmp_path: Path) -> None:
    (tmp_path / "a file").write_text("")
    (tmp_path / "empty" / "sub").mkdir(parents=True)
    (tmp_path / "empty" / "sub" / "labels.csv").write_text("")
    for name, message in [
        ("missing", f"data.train: {tmp_path}/missing does not exist .*: {tmp_path}"),
        ("a file", f"data.train: {tmp_path}/a file is a file, not a folder"),
        ("empty", f"data.train: no image in {tmp_path}/empty .*{{'.csv': 1}}"),
    ]:
        with pytest.raises(UserError, match=message):
            find_images(tmp_path / name, "data.train")


@pytest.mark.parametrize("content", [b"", b"not an image", "truncated"])
def test_a_broken_image_is_named(tmp_path: Path, content: bytes | str) -> None:
    path = save(tmp_path / "image.png")
    path.write_bytes(path.read_bytes()[:50] if isinstance(content, str) else content)
    with pytest.raises(UserError, match=r"image\.png: can not be read"):
        read_image(path)


@pytest.mark.filterwarnings("ignore:Truncated File Read:UserWarning")  # Pillow's, beside its error, of a TIFF file
def test_one_truncated_file_among_many_is_found(tmp_path: Path) -> None:
    names = ("1.png", "2.jpg", "3.bmp", "4.tif", "5.webp")
    paths = [save(tmp_path / name) for name in names]
    check_images(paths)
    for path in paths:
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
        with pytest.raises(UserError, match=path.name):
            check_images(paths)
        path.write_bytes(whole)
    padded = save(tmp_path / "6.jpg")
    padded.write_bytes(padded.read_bytes() + bytes(20))  # whole, though it does not end as it should
    check_images([padded])


def pixel(path: Path) -> tuple[int, ...]:
    image = read_image(path)
    assert image.mode == "RGB"
    return tuple(np.asarray(image)[0, 0])


def test_modes_become_rgb_by_the_stated_rules(tmp_path: Path) -> None:
    path = tmp_path / "x.png"
    Image.new("L", (2, 2), 77).save(path)
    assert pixel(path) == (77, 77, 77)
    Image.fromarray(np.full((2, 2), 0xABCD, np.uint16)).save(path)
    assert pixel(path) == (0xAB, 0xAB, 0xAB)  # 16 bits scaled, not cut off
    Image.new("RGBA", (2, 2), (10, 20, 30, 0)).save(path)
    assert pixel(path) == (255, 255, 255)  # transparent shows white
    Image.new("RGB", (2, 2), (10, 20, 30)).quantize(4).save(path)
    assert pixel(path) == (10, 20, 30)
    tiff = tmp_path / "x.tiff"
    Image.new("CMYK", (2, 2), (0, 255, 255, 0)).save(tiff)
    assert pixel(tiff) == (255, 0, 0)


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    path = tmp_path / "x.jpg"
    image = Image.new("RGB", (6, 4))
    exif = image.getexif()
    exif[0x0112] = 6  # the camera was turned
    image.save(path, exif=exif)
    assert read_image(path).size == (4, 6)
