"""Proves that a file is written whole or not at all, and that an unwritable folder is named early."""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from crossmae.errors import UserError
from crossmae.files import make_folder, read_json, sha256, write_atomically, write_json


def test_a_failed_write_leaves_the_old_file_and_no_rest(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_atomically(path, lambda temporary: temporary.write_text("old"))

    def fail(temporary: Path) -> None:
        temporary.write_text("ne")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, fail)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_name_may_be_as_long_as_a_name_can_be(tmp_path: Path) -> None:
    """Also in letters of four bytes; two files that begin alike have temporary files of their own."""
    temporaries = []
    for name in ("x" * 251 + ".png", "x" * 251 + ".jpg", "\U0001f600" * 62 + ".png"):
        write_atomically(tmp_path / name, lambda temporary: (temporaries.append(temporary.name), temporary.touch()))
        assert (tmp_path / name).exists()
    assert len(set(temporaries)) == len(list(tmp_path.iterdir())) == 3


def test_others_may_read_what_the_umask_lets_them(tmp_path: Path) -> None:
    path = tmp_path / "file"
    old = os.umask(0o027)
    try:
        write_atomically(path, lambda temporary: save_file({"x": torch.zeros(1)}, temporary))
    finally:
        os.umask(old)
    assert path.stat().st_mode & 0o777 == 0o640


def test_json_round_trip_and_no_nan(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    write_json(path, {"é": [1, None]})
    assert json.loads(path.read_text(encoding="utf-8")) == {"é": [1, None]}
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, float("nan"))
    assert json.loads(path.read_text(encoding="utf-8")) == {"é": [1, None]}


def test_sha256(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"abc" * 1000)
    assert sha256(tmp_path / "x") == hashlib.sha256(b"abc" * 1000).hexdigest()


def test_a_folder_that_can_not_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"output_dir: cannot write in .*file/run: Not a directory"):
        make_folder(tmp_path / "file" / "run", "output_dir")
    make_folder(tmp_path / "a" / "b", "output_dir")
    assert list((tmp_path / "a" / "b").iterdir()) == []


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
