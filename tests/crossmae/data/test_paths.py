"""Proves that images are found in folders, in one order, each once."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from crossmae.data.paths import find_images, find_inputs, is_system_name
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


SYSTEM = ["@eaDir", "#recycle", "$RECYCLE.BIN", "System Volume Information", "lost+found", "__MACOSX", ".Trash-1000"]
SYSTEM += [".ipynb_checkpoints", ".thumbnails", "@Recently-Snapshot", ".git", ".AppleDouble", "~snapshot", "@GMT-2024"]


def test_what_the_system_put_there_is_left_out_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    expected = [save(tmp_path / "a/1.png"), save(tmp_path / "recycled" / "lost.png")]
    for name in SYSTEM:
        save(tmp_path / "a" / name / "1.png")
    for name in ("._1.png", "._2.png", "Thumbs.db", "AlbumArtSmall.jpg"):
        (tmp_path / "a" / name).write_bytes(b"x")
    with caplog.at_level(logging.INFO):
        assert find_images(tmp_path, "data.train") == list(map(str, expected))
        assert find_inputs([str(tmp_path / "**/*.png")]) == expected
    assert "left out what is hidden or of the system: 2 ._*, " in caplog.text
    assert "/**/*.png: left out what is hidden or of the system: 1 " in caplog.text
    save(tmp_path / "@eaDir/1.png")
    assert find_images(tmp_path / "@eaDir", "data.train") == find_images(tmp_path / "@eaDir", "")  # asked for by name
    assert find_inputs([str(tmp_path / "@eaDir/*.png")]) == [tmp_path / "@eaDir/1.png"]
    assert find_inputs([str(path) for path in (tmp_path / "a").glob("*") if path.name[0] != "."]) == expected[:1]
    assert find_inputs([str(tmp_path / "@eaDir")]) == [tmp_path / "@eaDir/1.png"]


@pytest.mark.parametrize("name", ["cat", "tmp", "snapshot", "Recycle", "thumbs", "test", "@home", "#1", "~a", "icon"])
def test_ordinary_names_are_kept(name: str) -> None:
    assert not is_system_name(name)
