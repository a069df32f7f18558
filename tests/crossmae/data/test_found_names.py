"""Proves that a missing name is given the one file that it means, and no other."""

from __future__ import annotations

import os
import time
from pathlib import Path
from unicodedata import normalize

import pytest

from crossmae.data import found_names
from crossmae.data.found_names import describe_moved, find_moved


def touch(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


UMLAUTS = "Größe é.png"
MEANT = [  # name as written, files in the folder `images`, the file that is meant, why
    ("set1\\1.png", ["set1/1.png", "set2/1.png"], "set1/1.png", "separators of Windows"),
    ("..\\..\\media\\upload\\4\\ab-1.png", ["ab-1.png"], "ab-1.png", "folders .* and separators of Windows"),
    ("set1/1.png", ["set1\\1.png"], "set1\\1.png", "separators of Windows"),
    ("SET1/1.PNG", ["set1/1.png", "set2/1.png"], "set1/1.png", "upper and lower case"),
    ("1.PNG", ["1.png", "sub/images/1.png"], "1.png", "upper and lower case"),
    ("X\\A.PNG", ["x/a.png"], "x/a.png", "separators of Windows and upper and lower case"),
    (UMLAUTS, [normalize("NFD", UMLAUTS)], normalize("NFD", UMLAUTS), "composed or decomposed letters"),
    (normalize("NFD", UMLAUTS), [UMLAUTS, UMLAUTS.upper()], UMLAUTS, "composed or decomposed letters"),
    ("\uff11.png", ["1.png"], "1.png", "composed or decomposed letters"),
    ("a%20b.png", ["a b.png"], "a b.png", "quoted as in a URL"),
    ("a b.png", ["a%20b.png"], "a%20b.png", "quoted as in a URL"),
    ("a%2520b.png", ["a b.png"], "a b.png", "quoted as in a URL"),
    ("set1%5C1.png", ["set1/1.png"], "set1/1.png", "quoted as in a URL and separators of Windows"),
    ("a &amp; b.png", ["a & b.png"], "a & b.png", "quoted as in a URL"),
    ("/data/local-files/?d=set1/1.png", ["set1/1.png"], "set1/1.png", "absolute paths and quoted"),
    ("https://host/p/q%20r.jpg", ["q r.jpg"], "q r.jpg", "absolute paths and quoted"),
    ("images/1.png", ["1.png", "sub/1.png"], "1.png", "the folder images is named again"),
    ("1.png", ["images/1.png", "masks/1.png"], "images/1.png", "in a subfolder"),
    ("1.png", ["a/b/1.png"], "a/b/1.png", "in a subfolder"),
    ("b/1.png", ["a/b/1.png", "a/c/1.png"], "a/b/1.png", "in a subfolder"),
    ("data/a/1.png", ["a/1.png", "b/1.png"], "a/1.png", "folders that are not there"),
    ("old/1.png", ["new/1.png"], "new/1.png", "other folders, the same base name"),
    ("/home/me/images/a/1.png", ["a/1.png", "b/1.png"], "a/1.png", "absolute paths"),
    ("C:\\Users\\me\\1.png", ["1.png"], "1.png", "absolute paths and separators of Windows"),
    ("1.jpeg", ["1.jpg", "1.png"], "1.jpg", "another suffix"),
    ("1.jpg", ["1.JPG"], "1.JPG", "upper and lower case"),
    ("1.TIF", ["1.tiff"], "1.tiff", "upper and lower case and another suffix"),
    ("1", ["1.png"], "1.png", "another suffix"),
    ("scan.v2", ["scan.v2.jpg"], "scan.v2.jpg", "another suffix"),
    (" 1.png ", ["1.png"], "1.png", "spaces or quotes at the ends"),
    ('"D:\\a\\1.png"', ["a/1.png"], "a/1.png", "absolute paths and separators of Windows and sp"),
    ("1.png?X-Amz-Signature=a%2Fb.c", ["1.png", "1.jpg"], "1.png", "quoted as in a URL"),
    ("https://host/p/1.PNG?sig=x", ["a/1.png"], "a/1.png", "absolute paths and other folders, .* and quoted"),
    ("\u202aC:\\d\\a\\1.png", ["a/1.png"], "a/1.png", "absolute paths and separators of Windows"),
    ("\u202a1.png\u202c", ["1.png"], "1.png", "spaces or quotes at the ends"),
    ("depth/1.png", ["kinect/depth/1.png"], "kinect/depth/1.png", "in a subfolder"),
    ("1.png", ["masks/1.png"], "masks/1.png", "in a subfolder"),
    ("1.png\r", ["1.png"], "1.png", "spaces or quotes at the ends"),
]


@pytest.mark.parametrize(("name", "files", "path", "why"), MEANT, ids=[repr(name) for name, *_ in MEANT])
def test_a_name_with_one_meaning_is_accepted(name: str, files: list[str], path: str, why: str, tmp_path: Path) -> None:
    folder = touch(tmp_path / "images", *files)
    assert find_moved(folder, [name]) == ({name: path}, {})
    with pytest.raises(AssertionError, match=rf"1 of 3 are there as .*: {why}"):
        raise AssertionError(describe_moved(folder, {name: path}, 3))


UNCLEAR = [  # name as written, files in the folder `images`, names that exist as written, reason
    ("1.png", ["a/1.png", "b/1.png"], [], "2 files fit: a/1.png, b/1.png"),
    ("A.PNG", ["a.png", "A.png"], [], "2 files fit: "),
    ("1.jpg", ["1.jpeg", "1.JPG"], [], "2 files fit: "),
    ("1", ["1.jpg", "1.png"], [], "2 files fit: "),
    ("1.png", ["1.jpg"], [], "only 1.jpg is there, of another format"),
    ("1.png?X=1", ["1.jpg"], [], "only 1.jpg is there, of another format"),
    ("1.png", ["2.png"], [], "no file has a name like it"),
    ("A.png", ["a.png"], ["a.png"], "the only file like it, a.png, also fits the entry a.png"),
    ("b/1.png", ["a/1.png"], ["a/1.png"], "the only file like it, a/1.png, also fits the entry a/1.png"),
    ("b/1.png", ["a/1.png", "b/2.png"], [], "only a/1.png has its name, in another folder"),
    ("val/1.png", ["train/1.png"], [], "only train/1.png has its name, in another folder"),
    *(
        (name, [path], [], f"only {path} has its name, in another folder")
        for name, path in (
            ("rgb/1.png", "masks/1.png"),
            ("photos/1.png", "thumbnails/1.png"),
            ("photos/1.png", "SegmentationClass/a/1.png"),
            ("left/1.png", "right/1.png"),
            ("cam_left/1.png", "cam_right/1.png"),
        )
    ),
    ("set2\\1.png", ["set1/1.png"], [], "only set1/1.png has its name, in another folder"),
]


@pytest.mark.parametrize(("name", "files", "present", "reason"), UNCLEAR, ids=[repr(name) for name, *_ in UNCLEAR])
def test_any_other_name_is_given_a_reason(
    name: str, files: list[str], present: list[str], reason: str, tmp_path: Path
) -> None:
    accepted, reasons = find_moved(touch(tmp_path / "images", *files), [name], present)
    assert (accepted, list(reasons)) == ({}, [name])
    assert reason in reasons[name]


def test_no_two_images_are_given_the_same_file(tmp_path: Path) -> None:
    folder = touch(tmp_path, "1.png", "2.png")
    accepted, reasons = find_moved(folder, ["a/1.png", "b/1.png", "c\\2.png", "c/2.png", "c/./2.png"])
    assert accepted == dict.fromkeys(["c\\2.png", "c/2.png", "c/./2.png"], "2.png")  # one image, written three times
    assert reasons["a/1.png"] == "the only file like it, 1.png, also fits the entry b/1.png"
    assert reasons["b/1.png"] == "the only file like it, 1.png, also fits the entry a/1.png"


def test_the_image_folder_of_another_split_is_not_used(tmp_path: Path) -> None:
    folder = touch(tmp_path / "train2017", "1.png")
    assert find_moved(folder, ["val2017/1.png"])[0] == {}
    assert find_moved(folder, ["train2017/1.png"])[0] == {"train2017/1.png": "1.png"}


def test_files_outside_the_folder_are_never_used(tmp_path: Path) -> None:
    folder = touch(tmp_path, "outside/1.png", "images/2.png") / "images"
    names = [str(tmp_path / "outside/1.png"), "../outside/1.png", "..\\outside\\1.png"]
    assert find_moved(folder, names) == ({}, dict.fromkeys(names, "no file has a name like it"))
    written = str(folder / "2.png").upper()
    assert find_moved(folder, [written])[0] == {written: "2.png"}


def test_a_link_to_nothing_is_named_and_never_used(tmp_path: Path) -> None:
    (tmp_path / "1.png").symlink_to("gone.png")
    (tmp_path / "loop").symlink_to(tmp_path)
    reasons = find_moved(tmp_path, ["1.png", "1.PNG"])[1]
    assert reasons == {"1.png": "is a link to gone.png, which is not there", "1.PNG": "no file has a name like it"}


def test_odd_names_are_shown_escaped(tmp_path: Path) -> None:
    odd = os.fsdecode(b"caf\xe9\n.png")
    folder = touch(tmp_path, f"a/{odd}", f"b/{odd}")
    assert "a/caf\\udce9\\n.png" in find_moved(folder, [odd])[1][odd]
    assert "caf\\udce9\\n.png" in describe_moved(folder, {f"a\\{odd}": f"a/{odd}"}, 1)
    assert find_moved(folder, ["", "\0", "/", "."])[0] == {}


def test_nothing_is_searched_if_nothing_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(found_names, "_Files", lambda *_: pytest.fail("searched"))
    assert find_moved(tmp_path, [], ["1.png"]) == ({}, {})


def test_many_equal_base_names_take_seconds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # 100 folders with the same 100 base names: a comparison of all pairs would take a minute.
    files = [f"s{a}/{b:03d}.png" for a in range(100) for b in range(100)]
    monkeypatch.setattr(found_names, "walk_files", lambda *_: (str(tmp_path / name) for name in files))
    monkeypatch.setattr("os.path.isfile", lambda path: True)
    names = [name.replace("/", "\\") for name in files]
    start = time.process_time()
    accepted, reasons = find_moved(tmp_path, names)
    shown = describe_moved(tmp_path, accepted, len(names))
    assert shown == "10,000 of 10,000 are there as s0/000.png: separators of Windows"
    assert time.process_time() - start < 5
    assert reasons == {}
