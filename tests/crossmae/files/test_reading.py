"""Proves that reading names the file and its trouble, and that no content of a side file ends in an error."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crossmae.errors import UserError
from crossmae.files import read_json, read_json_lines, read_side_file, reading, sha256
from crossmae.files.reading import is_number


def test_sha256(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"abc" * 1000)
    assert sha256(tmp_path / "x") == hashlib.sha256(b"abc" * 1000).hexdigest()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file"),
        (b'{"a": ', "not valid JSON.*line 1"),
        (b"\xff\xfe", "is UTF-16 text"),
        (b"", "not valid JSON but empty"),
        (b"<html>", "not valid JSON but a web page"),
        (b"version https://git-lfs.github.com/spec/v1", "git lfs pull"),
        (b"[\xff\0\1\2\3\4\5\6\7]", "is a binary file, not text"),
        (b"\x89PNG\r\n", "is an image, not text"),
    ],
)
def test_wrong_json_names_the_file(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "results.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=f"{re.escape(str(path))}.*{message}"):
        read_json(path)


ODD_TEXTS = {"苹果": "gb18030", "Größe é": "windows-1252", "Яблоко": "windows-1251", "りんご": "shift_jis"}


@settings(max_examples=60, deadline=None)
@given(st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(), st.lists, max_leaves=8))
def test_a_file_has_the_value_of_its_text_with_or_without_a_mark(value: Any) -> None:
    with TemporaryDirectory() as folder:
        path = Path(folder, "a.json")
        for encoding in ("utf-8", "utf-8-sig"):
            path.write_text(json.dumps(value), encoding=encoding)
            assert repr(read_json(path)) == repr(value)


def test_a_plain_json_file_is_read_without_decoding_it_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("orjson")
    path = tmp_path / "a.json"
    path.write_text('{"é": [1, 0.5]}', encoding="utf-8")
    monkeypatch.setattr(reading, "decode_text", None)
    assert read_json(path) == {"é": [1, 0.5]}


@pytest.mark.parametrize(("text", "encoding"), ODD_TEXTS.items())
def test_json_in_another_encoding_names_the_command(tmp_path: Path, text: str, encoding: str) -> None:
    path = tmp_path / "a b.json"
    content = json.dumps({"name": text}, ensure_ascii=False)
    for name in ("utf-8", "utf-8-sig"):
        path.write_bytes(content.encode(name))
        assert read_json(path) == {"name": text}
    for name in ("UTF-16", "UTF-16LE", "UTF-16BE", "UTF-32"):
        path.write_bytes(content.encode(name))
        with pytest.raises(UserError, match=rf"iconv -f {name} -t UTF-8 'a b.json' > 'a b.utf8.json'$"):
            read_json(path)
    path.write_bytes(content.encode(encoding))
    with pytest.raises(UserError, match=rf"line 1 is not UTF-8: .*'{text.split()[0]}' in {encoding.upper()}"):
        read_json(path)


NESTED = b"[" * 10_000
DIGITS = b'{"step": ' + b"9" * 5000 + b"}"
ODD_LINES = [b"", b"\0", b"\xff\xfe", b"null", b"7", b'"text"', b"[]", b'{"a": 1', NESTED, DIGITS, b'{"step": 1e999}']
JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(), st.lists, max_leaves=5)
OBJECTS = st.dictionaries(st.sampled_from(["step", "name", "loss"]), JSON).map(lambda row: json.dumps(row).encode())


ANY_LINE = st.sampled_from(ODD_LINES) | st.binary() | OBJECTS | JSON.map(lambda value: json.dumps(value).encode())


@settings(max_examples=40)
@given(st.lists(ANY_LINE, max_size=20))
def test_any_bytes_in_a_file_of_lines_are_rows_or_skipped(tmp_path_factory: Any, lines: list[bytes]) -> None:
    path = tmp_path_factory.getbasetemp() / "log.jsonl"
    path.write_bytes(b"\n".join([b'{"step": 1, "name": "a"}', *lines, b'{"step": 2, "name": "b"}']))
    rows = read_json_lines(path)
    assert all(isinstance(row, dict) for row in rows)
    assert (rows[0]["step"], rows[-1]["step"]) == (1, 2)  # what is between does not hide rows before or after
    for row in read_json_lines(path, step=float, name=str):
        assert is_number(row["step"])
        assert isinstance(row["name"], str)
        assert row["step"] <= float("inf")


def test_skipped_lines_are_logged_with_the_first_reason(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "log.jsonl"
    path.write_bytes(b'{"step": 1}\n[2]\n\xff\n{"step": "3"}\n\n{"st')
    assert read_json_lines(path, step=float) == [{"step": 1}]
    assert caplog.messages == [f"{path}: skipping 4 of 5 lines: line 2 is not a JSON object"]


@pytest.mark.parametrize("kind", ["folder", "pipe", "link"])
def test_what_is_no_file_has_no_rows(tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "log.jsonl"
    {"folder": path.mkdir, "pipe": lambda: os.mkfifo(path), "link": lambda: path.symlink_to(path)}[kind]()
    with caplog.at_level(logging.WARNING):
        assert read_json_lines(path) == []
    assert "cannot be read" in caplog.text
    with pytest.raises(UserError, match=re.escape(str(path))):
        read_side_file(path)


def test_a_file_that_does_not_exist_has_no_rows(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert read_json_lines(tmp_path / "log.jsonl") == []
    assert not caplog.messages


@settings(max_examples=40)
@given(st.sampled_from(ODD_LINES) | st.binary() | OBJECTS)
def test_a_side_file_is_an_object_or_an_error_that_names_it(tmp_path_factory: Any, data: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "run.json"
    path.write_bytes(data)
    content: object = None
    with suppress(UserError):
        content = read_side_file(path)
    if content is None:
        with pytest.raises(UserError, match=f"^{re.escape(str(path))}: "):
            read_side_file(path)
    else:
        assert isinstance(content, dict)


def test_a_side_file_is_bounded(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text('{"a": 1}' + " " * 100)
    assert read_side_file(tmp_path / "run.json") == {"a": 1}
    with pytest.raises(UserError, match="more than 100 bytes"):
        read_side_file(tmp_path / "run.json", most_bytes=100)
