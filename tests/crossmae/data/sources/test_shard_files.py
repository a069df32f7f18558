"""Proves how patterns expand and which names are local."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import fsspec
import pytest

from crossmae.data.sources.shard_files import RangeReader, StoredFile, change_marks, expand_braces, find_files, is_url
from crossmae.errors import UserError


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("x.tar", ["x.tar"]),
        ("x-{8..11}.tar", ["x-8.tar", "x-9.tar", "x-10.tar", "x-11.tar"]),
        ("x-{008..010}.tar", ["x-008.tar", "x-009.tar", "x-010.tar"]),
        ("{a,b}-{0..1}", ["a-0", "a-1", "b-0", "b-1"]),
        ("{train/{0..1},val}.tar", ["train/0.tar", "val.tar", "train/1.tar", "val.tar"]),
        ("{b,a}{2..3}", ["b2", "b3", "a2", "a3"]),
        ("x-{3..1}.tar", []),
    ],
)
def test_braces(pattern: str, expected: list[str]) -> None:
    assert expand_braces(pattern) == expected


def test_a_name_that_exists_is_no_pattern(tmp_path: Path) -> None:
    for name in ("x{0..1}.tar", "y[0].tar"):
        (tmp_path / name).touch()
        assert [file.path for file in find_files(str(tmp_path / name), "k")] == [str(tmp_path / name)]


def test_globs_are_sorted_and_search_below(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("b/2.tar", "a/1.tar", "3.tar"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.setenv("HOME", str(tmp_path))
    expected = [str(tmp_path / name) for name in ("3.tar", "a/1.tar", "b/2.tar")]
    assert [file.path for file in find_files("~/**/*.tar", "k")] == expected


def test_an_empty_range_is_an_error() -> None:
    with pytest.raises(UserError, match=r"k: x-\{3\.\.1\}\.tar names no file"):
        find_files("x-{3..1}.tar", "k")


def test_what_counts_as_a_url() -> None:
    assert all(map(is_url, ("s3://a/b", "simplecache::s3://a")))
    assert not any(map(is_url, ("a/b.tar", "C:/x")))


def test_siblings_and_contents_keep_the_file_system() -> None:
    file = StoredFile("memory:///a/b.tar", "/a/b.tar", "memory://a/*.tar")
    assert file.sibling("index.json") == StoredFile("memory:///a/index.json", "/a/index.json", "memory://a/*.tar")
    assert StoredFile("x", "x").sibling("y") == StoredFile("y", "y")
    assert StoredFile("d/", "d/").inside("y") == StoredFile("d/y", "d/y")


def test_marks_change_with_a_remote_file() -> None:
    memory = fsspec.filesystem("memory")
    file = find_files("memory://marks/x.tar", "k")[0]
    memory.pipe_file("/marks/x.tar", b"abc")
    first = change_marks(file)
    assert first["bytes"] == "3"
    memory.pipe_file("/marks/x.tar", b"xyz")
    assert change_marks(file) != first


def test_open_files_are_closed_with_the_reader_and_without_a_word_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "shard.tar"
    path.write_bytes(b"abcdef")
    reader = RangeReader()
    assert reader.read(StoredFile("", str(path)), 2, 3) == b"cde"
    (number,) = (one.number for one in reader._open.values())
    os.fstat(number)
    del reader
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(number)
    # A reader that an early module holds lives until Python has taken its own module apart.
    program = f"""
import sys
import json.tool
from crossmae.data.sources import shard_files
from crossmae.data.sources.shard_files import RangeReader, StoredFile
reader = RangeReader()
reader.read(StoredFile("", {str(path)!r}), 0, 1)
json.tool.kept, json.tool.module = reader, shard_files
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stderr == ""
