"""Proves what of a shard is read, that its shards are groups, and that shards which changed are refused."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path

import fsspec
import pytest

from crossmae.data.sources import shard_files, tar_index
from crossmae.data.sources.shard_files import RangeReader
from crossmae.data.sources.tar_index import FolderIndex, scan_shard, shard_entry
from crossmae.data.sources.tar_shards import open_shards
from crossmae.errors import UserError
from tests.crossmae.data.sources.source_files import write_shards, write_tree
from tests.crossmae.data.sources.test_tar_index import stored, tar_bytes


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def shards(tmp_path: Path) -> list[Path]:
    return write_shards(tmp_path / "shards", write_tree(tmp_path / "tree"))


def write_index(shards: list[Path], classes: tuple[str, ...]) -> None:
    """As make_shards would."""
    entries = {}
    for shard in shards:
        index = scan_shard(stored(shard))
        labels = [classes.index(str(label)) for label in index.labels]
        entries[shard.name] = shard_entry(shard.name, shard.stat().st_size, "", index, labels)
    (shards[0].parent / "index.json").write_text(FolderIndex({}, classes, entries).to_json())


def test_groups_are_the_shards(shards: list[Path]) -> None:
    source = open_shards(str(shards[0].parent), "data.train")
    assert source.groups is not None
    assert source.groups.tolist() == [0, 4, 8]
    names = [source.name(index) for index in range(9)]
    assert [Path(name).parents[1].name for name in names] == ["s-000.tar"] * 4 + ["s-001.tar"] * 4 + ["s-002.tar"]


def test_a_shard_without_images_is_no_group(shards: list[Path]) -> None:
    shards[1].write_bytes(tar_bytes({"notes.txt": b""}))
    source = open_shards(str(shards[0].parent), "data.train")
    assert source.groups is not None
    assert source.groups.tolist() == [0, 4]
    assert [source.name(index).split("/set/")[0] for index in (3, 4)] == [str(shards[0]), str(shards[2])]


def test_only_the_bytes_of_the_image_are_read(shards: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_shards(str(shards[0].parent), "data.train")
    ranges = []
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda file, size, start: ranges.append(size) or pread(file, size, start))
    assert len(source.read(5)) == ranges[0]
    assert len(ranges) == 1


def test_an_index_beside_the_shards_saves_the_search(shards: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    searched = open_shards(str(shards[0].parent), "data.train")
    classes = ("cat", "bee", "unseen", "ant")  # in an order of their own
    write_index(shards, classes)
    monkeypatch.setattr(tar_index, "scan_shard", lambda shard: pytest.fail("searched"))
    monkeypatch.setattr(tar_index, "cache_folder", lambda: pytest.fail("looked up"))
    for value in (shards[0].parent, shards[0].parent / "*.tar"):
        source = open_shards(str(value), "data.train")
        assert source.classes == classes
        for index in range(9):
            assert source.read(index) == searched.read(index)
            assert source.classes[source.label(index)] == searched.classes[searched.label(index)]


def test_a_shard_unlike_its_index_is_refused(shards: list[Path]) -> None:
    write_index(shards, ("ant", "bee", "cat"))
    whole = shards[1].read_bytes()
    shards[1].write_bytes(whole[:-512])
    with pytest.raises(UserError, match=rf"s-001\.tar: has {len(whole) - 512} bytes, the index.* says {len(whole)}"):
        open_shards(str(shards[0].parent), "data.train")
    shards[1].unlink()
    with pytest.raises(UserError, match=r"data.train: 1 of 3 shards are not there: .*s-001\.tar"):
        open_shards(str(shards[0].parent), "data.train")


def test_a_shard_that_shrinks_later_is_named(shards: list[Path]) -> None:
    source = open_shards(str(shards[0].parent), "data.train")
    source.read(3)
    os.truncate(shards[0], 100)
    with pytest.raises(UserError, match=r"s-000\.tar/set/.*\.png: the shard ends in it"):
        source.read(3)
    shards[2].unlink()
    with pytest.raises(UserError, match=r"s-002\.tar/set/.*\.png: cannot be read: No such file"):
        source.read(8)


def test_compressed_shards_and_shards_without_images_are_refused(tmp_path: Path) -> None:
    (tmp_path / "x.tar.gz").write_bytes(b"")
    with pytest.raises(UserError, match=r"data.train: .*x\.tar\.gz: expected a plain \.tar file"):
        open_shards(str(tmp_path / "x.tar.gz"), "data.train")
    (tmp_path / "x.tar").write_bytes(tar_bytes({"1.txt": b""}))
    with pytest.raises(UserError, match=r"data.train: no image in the 1 shard of .*x\.tar: 1 \.txt are not read"):
        open_shards(str(tmp_path / "x.tar"), "data.train")


def test_members_that_are_not_read_are_counted_and_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    members = {f"{number}.{kind}": b"x" for number in range(3) for kind in ("jfif", "txt", "cls", "seg.npy")}
    (tmp_path / "x.tar").write_bytes(tar_bytes(members))
    with caplog.at_level(logging.INFO):
        assert len(open_shards(str(tmp_path / "x.tar"), "data.train")) == 3
    (record,) = caplog.records
    assert record.levelno == logging.INFO
    assert "3 .txt, 3 .npy are not read by this tool" in record.message
    (tmp_path / "y.tar").write_bytes(tar_bytes({"4.jpg": b"x", "5.heic": b"x", "6.heic": b"x", "6.json": b"{}"}))
    caplog.clear()
    assert len(open_shards(str(tmp_path / "y.tar"), "data.train")) == 1
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "2 .heic, 1 .json are not read by this tool, more files than images. Convert them" in record.message


def test_the_most_usual_format_of_a_sample_is_its_image(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A mask may be an image, too, such as a PGM or a GIF."""
    members = {"1.pgm": b"mask", "1.jpg": b"1", "2.gif": b"mask", "2.left.jpg": b"no", "2.png": b"2", "3.gif": b"3"}
    (tmp_path / "x.tar").write_bytes(tar_bytes(members))
    source = open_shards(str(tmp_path / "x.tar"), "data.train")
    assert [source.read(index) for index in range(3)] == [b"1", b"2", b"3"]
    assert "unused, as their sample has another image: 1 .pgm, 1 .gif, 1 .left.jpg" in caplog.text


def test_a_hiccup_of_the_network_is_outlasted(
    shards: list[Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    memory = fsspec.filesystem("memory")
    memory.pipe_file("/hiccup/s.tar", shards[0].read_bytes())
    source = open_shards("memory://hiccup/s.tar", "data.train")
    expected = source.read(1)
    failures = [OSError("reset by peer"), TimeoutError()]
    cat_file = type(memory).cat_file

    def flaky(*args: object, **kwargs: object) -> bytes:
        if failures:
            raise failures.pop()
        return bytes(cat_file(*args, **kwargs))

    monkeypatch.setattr(shard_files, "PAUSES", (0.0, 0.0))
    monkeypatch.setattr(type(memory), "cat_file", flaky)
    assert source.read(1) == expected
    assert caplog.text.count("trying again") == 2
    failures += [OSError("down")] * 9
    with pytest.raises(UserError, match=r"s\.tar/set/.*: cannot be read: down"):
        source.read(1)


def test_open_files_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_files, "MAX_OPEN", 3)
    reader = RangeReader()
    before = len(os.listdir("/proc/self/fd"))
    for number in range(10):
        file = stored(tmp_path / f"{number}", bytes([number] * 9))
        assert reader.read(file, 2, 5) == bytes([number] * 5)
    assert len(os.listdir("/proc/self/fd")) <= before + 3


def test_the_index_of_a_folder_is_plain_json(shards: list[Path]) -> None:
    write_index(shards, ("ant", "bee", "cat"))
    content = json.loads((shards[0].parent / "index.json").read_text())
    assert content["format"] == "crossmae-shards-1"
    assert [entry["file"] for entry in content["shards"]] == [shard.name for shard in shards]
