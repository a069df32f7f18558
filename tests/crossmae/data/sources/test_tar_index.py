"""Proves that the index of a tar file finds every image and is kept until the file changes; bad files are named."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from pathlib import Path

import pytest

from crossmae.data.sources import tar_index
from crossmae.data.sources.shard_files import StoredFile, change_marks
from crossmae.data.sources.tar_index import cache_folder, index_shard, read_folder_index, scan_shard
from crossmae.errors import UserError
from tests.crossmae.data.sources.source_files import tar_bytes


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def stored(path: Path, content: bytes | None = None) -> StoredFile:
    if content is not None:
        path.write_bytes(content)
    return StoredFile(str(path), str(path))


MEMBERS = {
    "a/1.jpg": b"one",
    "a/1.cls": b"3\n",
    "a/1.json": b'{"label": "not this one"}',
    "a/2.seg.png": b"segments",
    "a/2.PNG": b"two" * 400,
    "a/2.json": b'{"label": 7}',
    "b/1.webp": b"three",  # another folder: another sample
    "b/1.json": b"no json",
    "b/1.txt": b"caption",
    "b/._1.webp": b"notes of a file system",
    "lonely.cls": b"1",
}


@pytest.mark.parametrize("seed", [None, 1, 2, 3])
def test_images_and_labels_are_found_in_any_order_of_members(seed: int | None, tmp_path: Path) -> None:
    shard = stored(tmp_path / "x.tar", tar_bytes(MEMBERS, seed))
    index = scan_shard(shard)
    found = {
        name: (Path(shard.path).read_bytes()[offset : offset + size], label)
        for name, offset, size, label in zip(index.names, index.offsets, index.sizes, index.labels, strict=True)
    }
    assert found == {"a/1.jpg": (b"one", "3"), "a/2.PNG": (b"two" * 400, "7"), "b/1.webp": (b"three", None)}
    assert index.offsets == sorted(index.offsets)


def test_members_that_are_not_used_are_counted(tmp_path: Path) -> None:
    index = scan_shard(stored(tmp_path / "x.tar", tar_bytes(MEMBERS)))
    assert index.left_out == {".seg.png": 1, ".txt": 1, ".cls": 1}
    assert index.system == ["._1.webp"]


def test_the_kept_index_is_used_until_the_file_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shard = stored(tmp_path / "x.tar", tar_bytes({"1.png": b"abc"}))
    first = index_shard(shard, change_marks(shard))
    with monkeypatch.context() as patch:
        patch.setattr(tar_index, "scan_shard", lambda shard: pytest.fail("searched again"))
        assert index_shard(shard, change_marks(shard)) == first
        assert index_shard(stored(Path(tmp_path, ".", "x.tar")), change_marks(shard)) == first
    stored(tmp_path / "x.tar", tar_bytes({"2.png": b"abc"}))  # as long as before
    assert index_shard(shard, change_marks(shard)).names == ["2.png"]


def test_a_damaged_kept_index_is_built_again(tmp_path: Path) -> None:
    shard = stored(tmp_path / "x.tar", tar_bytes({"1.png": b"abc"}))
    first = index_shard(shard, change_marks(shard))
    (kept,) = cache_folder().iterdir()
    for content in ("", "[]", '{"about": 1}', json.dumps({**json.loads(kept.read_text()), "index": {"x": 1}})):
        kept.write_text(content)
        assert index_shard(shard, change_marks(shard)) == first


def test_an_index_that_can_not_be_kept_is_only_logged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    shard = stored(tmp_path / "x.tar", tar_bytes({"1.png": b"abc"}))
    assert index_shard(shard, change_marks(shard)).names == ["1.png"]
    assert "the index is not kept for the next run" in caplog.text


WHOLE = tar_bytes({f"{n}.png": bytes([n]) * 700 for n in range(4)})
HEADER, DATA = 512, 1024


@pytest.mark.parametrize(
    "length",
    [
        pytest.param(2 * (HEADER + DATA), id="between two members"),
        pytest.param(2 * (HEADER + DATA) + 100, id="in a header"),
        pytest.param(2 * (HEADER + DATA) + HEADER + 50, id="in an image"),
        pytest.param(4 * (HEADER + DATA), id="before the end mark"),
        pytest.param(0, id="empty"),
    ],
)
def test_a_shard_that_is_cut_off_is_named(length: int, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cut\.tar: .*cut off"):
        scan_shard(stored(tmp_path / "cut.tar", WHOLE[:length]))


def test_a_damaged_header_in_the_middle_is_not_taken_for_the_end(tmp_path: Path) -> None:
    damaged = bytearray(WHOLE)
    damaged[HEADER + DATA + 150] ^= 0xFF
    with pytest.raises(UserError, match=r"x\.tar: damaged or cut off at byte 1,536"):
        scan_shard(stored(tmp_path / "x.tar", bytes(damaged)))


def link(name: str) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        member = tarfile.TarInfo(name)
        member.type, member.linkname = tarfile.SYMTYPE, "elsewhere.png"
        tar.addfile(member)
    return buffer.getvalue()


def twice() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for _ in range(2):
            tar.addfile(tarfile.TarInfo("1.png"))
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (gzip.compress(WHOLE, mtime=0), r"is compressed \(gzip\), so no image can be read without all before it"),
        (b"x" * 2000, "not a tar file"),
        (link("1.png"), r"1\.png is a link"),
        (twice(), r"holds 1\.png twice"),
    ],
)
def test_what_can_not_be_used_is_named(content: bytes, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"bad\.tar: {message}"):
        scan_shard(stored(tmp_path / "bad.tar", content))


def test_a_foreign_index_beside_shards_is_not_used(tmp_path: Path) -> None:
    for content in ("{", "[]", "{}", '{"format": "other"}'):
        (tmp_path / "index.json").write_text(content)
        assert read_folder_index(stored(tmp_path / "index.json")) is None


def test_keys_may_hold_dots(tmp_path: Path) -> None:
    # Time stamps, as of TUM's cameras: the first dot of a name is within the key.
    members = {
        f"rgb/{number}.{number * 7}.{kind}": f"{number}".encode() for number in range(10, 14) for kind in ("png", "cls")
    }
    index = scan_shard(stored(tmp_path / "x.tar", tar_bytes(members)))
    assert index.names == [name for name in members if name.endswith("png")]
    assert index.labels == ["10", "11", "12", "13"]
    views = {f"{number}.{view}.png": b"x" for number in range(4) for view in ("left", "right")}
    index = scan_shard(stored(tmp_path / "y.tar", tar_bytes(views)))
    assert index.names == [f"{number}.left.png" for number in range(4)]
    assert index.left_out == {".right.png": 4}


def test_members_of_the_system_are_left_out(tmp_path: Path) -> None:
    members = {
        f"{folder}{key}.{kind}": b"7"
        for key in "12"
        for kind in ("PNG", "Cls")
        for folder in ("", "__MACOSX/", "a/@eaDir/")
    }
    index = scan_shard(stored(tmp_path / "x.tar", tar_bytes(members)))
    assert (index.names, index.labels, index.left_out) == (["1.PNG", "2.PNG"], ["7", "7"], {})
    assert sorted(set(index.system)) == ["@eaDir", "__MACOSX"]
