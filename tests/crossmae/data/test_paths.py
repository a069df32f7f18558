"""Proves that images are found in folders, in one order, each once."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from crossmae.data.images import read_image
from crossmae.data.paths import (
    IMAGE_FORMATS,
    IMAGE_SUFFIXES,
    SCANNED_FROM,
    VIDEO_SUFFIXES,
    are_files,
    find_images,
    find_inputs,
    is_system_name,
    join_names,
    refuse_unread,
)
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
SYSTEM += ["LOST.DIR", "RECYCLED", "FOUND.001", "found.012", "@__thumb", "@sharebin", "@DownloadStation", "@appstore"]
SYSTEM += ["DfsrPrivate", "MSOCache", "Config.Msi", "$WINDOWS.~BT", "$WinREAgent", "$SysReset", "Desktop DB"]
SYSTEM += ["_gsdata_", "GNUSparseFile.0", "eaDir"]
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


ORDINARY = [
    "Trash",
    "Thumbnails",
    "cache",
    "recycled",
    "$5",
    "$x$",
    "$money.jpg",
    "found.png",
    "lost",
    "eadir",
    "masks",
]


@pytest.mark.parametrize(
    "name", ["cat", "tmp", "snapshot", "Recycle", "thumbs", "test", "@home", "#1", "~a", "icon", *ORDINARY]
)
def test_ordinary_names_are_kept(name: str) -> None:
    assert not is_system_name(name)


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


@pytest.mark.parametrize("kind", IMAGE_FORMATS)
def test_every_format_is_pillows_and_read_to_the_pixel(kind: str, tmp_path: Path) -> None:
    known = Image.registered_extensions()
    assert {known[suffix] for suffix in IMAGE_FORMATS[kind]} == {kind}
    y, x = np.mgrid[:32, :48].astype(np.uint8)
    original = Image.fromarray(np.stack([y * 7, x * 5, 200 - y - x], axis=-1))
    tolerance = 12 if kind in ("JPEG", "MPO", "WEBP", "AVIF") else 0
    for suffix in IMAGE_FORMATS[kind]:
        image = original.convert({".pgm": "L", ".pbm": "1", ".pfm": "L"}.get(suffix, "RGB"))
        image = image if kind != "GIF" else image.quantize(8)
        expected = np.asarray(image.convert("RGB"), dtype=np.int64)
        image = Image.fromarray(np.float32(image) / np.float32(255)) if suffix == ".pfm" else image
        image.save(tmp_path / f"x{suffix}")
        found = np.asarray(read_image(tmp_path / f"x{suffix}"))
        assert np.abs(found - expected).max() <= (tolerance or suffix == ".pfm"), suffix
    assert len(find_images(tmp_path, "data.train")) == len(IMAGE_FORMATS[kind])


def test_interpreted_and_ambiguous_suffixes_are_not_read() -> None:
    assert not IMAGE_SUFFIXES & VIDEO_SUFFIXES
    refused = [".eps", ".ps", ".pdf", ".wmf", ".emf", ".svg", ".rgb", ".h5", ".psd", ".ico", ".vst", ".npy", ".heic"]
    assert not IMAGE_SUFFIXES & set(refused)


def test_files_of_other_kinds_are_called_not_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Labels next to images are information; data that outnumber the images, or empty a class, are a warning."""
    for name in ("cats/1.png", "cats/2.png", "cats/3.png", "dogs/1.jpg"):
        save(tmp_path / name)
        for suffix in (".txt", ".xml", ".json"):
            (tmp_path / name).with_suffix(suffix).write_text("label")
    (tmp_path / "cats" / "extra.heic").write_bytes(b"x")
    with caplog.at_level(logging.INFO):
        find_images(tmp_path, "data.train")
    (record,) = caplog.records
    assert record.levelno == logging.INFO
    text = "4 .txt, 4 .xml, 4 .json, 1 .heic are not read by this tool"
    assert all(part in record.message for part in text.replace(" are", ", are").split(", "))
    for name in ("1.HEIC", "2.heic", "scan"):
        (tmp_path / "dogs" / name).write_bytes(b"x")
    caplog.clear()
    find_images(tmp_path, "data.train")
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "3 .heic" in record.message
    assert "1 without a suffix" in record.message
    assert "are not read by this tool, more files than images in dogs. Convert them" in record.message
    for number in range(2, 6):
        (tmp_path / f"{number}.mp4").write_bytes(b"x")
    caplog.clear()
    find_images(tmp_path, "data.train")
    assert "4 .mp4" in caplog.records[0].message


def test_nothing_but_unread_files_is_an_error_that_counts_them(tmp_path: Path) -> None:
    for name in ("a/1.npy", "a/2.npy", "b.dcm", "c.mp4"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(UserError, match=r"^data.train: no image in .*: 2 \.npy, 1 .* are not read by this tool\. Conv"):
        find_images(tmp_path, "data.train")


def test_files_of_a_list_are_judged_by_suffix_or_content(tmp_path: Path) -> None:
    named = save(tmp_path / "1.png")
    odd = tmp_path / "photo.jpg_large"
    odd.write_bytes(named.read_bytes())
    refuse_unread([str(named), str(odd)], "data.train: list.txt")
    for name in ("1.npy", "2.npy", "clip.mp4"):
        (tmp_path / name).write_bytes(b"\0" * 99)
    Image.new("L", (4, 4)).save(tmp_path / "drawing.eps")
    paths = [str(named), str(odd), *(str(tmp_path / name) for name in ("1.npy", "2.npy", "clip.mp4", "drawing.eps"))]
    found = r"^data.train: list.txt: 2 \.npy, 1 \.mp4, 1 \.eps of 6 files are not read by this tool\. Convert"
    with pytest.raises(UserError, match=found):
        refuse_unread(paths, "data.train: list.txt")


ODD_NAMES = [
    "a.png",
    "./a.png",
    "b//a.png",
    "b/./a.png",
    "b/../a.png",
    ".",
    "..",
    "b/",
    "b/.",
    "...",
    ".a",
    "b/.a",
    " ",
]


@pytest.mark.parametrize("folder", ["/", ".", "x", "/x/y", "../x", "/x y/é"])
def test_joined_names_are_those_of_pathlib(folder: str) -> None:
    names = [*ODD_NAMES, *(f"/{name}" for name in ODD_NAMES), *(f"//{name}" for name in ODD_NAMES)]
    assert join_names(Path(folder), names) == [str(Path(folder) / name) for name in names]


def test_many_paths_are_files_as_each_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [f"many/{number}.png" for number in range(SCANNED_FROM)] + ["few/1.png"]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "many/folder.png").mkdir()
    os.mkfifo(tmp_path / "many/pipe.png")
    for link, target in (("link", "0.png"), ("broken", "none"), ("loop", "loop.png"), ("deep", "folder.png")):
        (tmp_path / f"many/{link}.png").symlink_to(target)
    names = sorted(os.listdir(tmp_path / "many"))
    paths = [f"{tmp_path}/{name}" for name in [*(f"many/{name}" for name in names), "few/1.png", "few/2.png", "many"]]
    paths += [path for name in names for path in (f"{tmp_path}/few/../many/{name}", f"{tmp_path}/none/{name}")]
    paths += [f"{tmp_path}/many/\0{name}" for name in names] + [f"{tmp_path}\0/{name}" for name in names]
    assert are_files(paths) == list(map(os.path.isfile, paths))
    asked: list[str] = []
    monkeypatch.setattr(os.path, "isfile", lambda path: asked.append(path) or False)
    assert all(are_files([f"{tmp_path}/many/{number}.png" for number in range(SCANNED_FROM)]))
    assert not asked  # the folder was listed once
