"""Proves that images are found in folders, in one order, each once."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest

from crossmae.data.images import read_image
from crossmae.data.paths import find_images, find_inputs
from crossmae.errors import UserError
from tests.crossmae.data.test_images import save


def test_finds_images_in_all_subfolders_sorted_and_ignores_the_rest(tmp_path: Path) -> None:
    expected = [save(tmp_path / name) for name in ("a/1.PNG", "a/b/2.jpg", "é ü/3.Jpeg")]
    save(tmp_path / ".hidden" / "4.png")
    save(tmp_path / "a" / ".5.png")
    (tmp_path / "a" / "notes.txt").write_text("no image")
    assert find_images(tmp_path, "data.train") == [str(path) for path in sorted(expected)]


def test_links_to_folders_are_followed_once(tmp_path: Path) -> None:
    save(tmp_path / "real" / "1.png")
    root = tmp_path / "root"
    save(root / "2.png")
    (root / "link").symlink_to(tmp_path / "real")
    (root / "loop").symlink_to(root)
    assert find_images(root, "data.train") == [str(root / name) for name in ("2.png", "link/1.png")]


def test_a_folder_without_images_is_an_error_with_key_and_path(tmp_path: Path) -> None:
    (tmp_path / "empty" / "sub").mkdir(parents=True)
    (tmp_path / "empty" / "sub" / "labels.csv").write_text("")
    with pytest.raises(UserError, match=f"data.train: no image in {tmp_path}/empty .*1 .csv"):
        find_images(tmp_path / "empty", "data.train")


def test_inputs_are_files_folders_and_patterns(tmp_path: Path) -> None:
    a, b, c, deep = (save(tmp_path / "images" / name) for name in ("a.png", "b.png", "c.png", "deep/d.png"))
    folder = tmp_path / "images"
    assert find_inputs([str(c), str(folder)]) == [c, a, b, deep]
    assert find_inputs([str(folder / "[ab].png")]) == [a, b]
    assert find_inputs([str(tmp_path / "**/d*.png")]) == [deep]
    with pytest.raises(UserError, match="IMAGES: none: no such file or folder, and no file matches"):
        find_inputs(["none"])


def test_pipes_sockets_and_devices_are_no_images(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    image = save(tmp_path / "1.png")
    os.mkfifo(tmp_path / "2.png")
    for name, target in (("3.png", "/dev/zero"), ("4.png", "2.png"), ("5.png", "1.png"), ("6.png", "6.png")):
        (tmp_path / name).symlink_to(target)
    with caplog.at_level(logging.INFO):
        found = find_images(tmp_path, "data.train")
    assert found == [
        str(image),
        str(tmp_path / "5.png"),
        str(tmp_path / "6.png"),
    ]
    # The last one is a broken link, which is an error when it is read.
    assert "2 a named pipe, 1 a device" in caplog.text
    for name in ("2.png", "3.png", "4.png"):
        with pytest.raises(UserError, match=rf"IMAGES: .*{name}: it is a (named pipe|device), not a file"):
            find_inputs([str(tmp_path / name)])
        with pytest.raises(UserError, match=rf"{name}: cannot be read: it is a (named pipe|device), not a file"):
            read_image(tmp_path / name)
