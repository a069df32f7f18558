"""Proves what the command line that makes shards prints, refuses and leaves alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from crossmae.data.images import decode_image
from crossmae.data.sources import open_source
from crossmae.errors import USER_ERROR_EXIT_CODE
from tests.crossmae.data.sources.source_files import write_tree
from tests.tools.command_line import exit_code
from tools.make_shards import main


def run(*arguments: str) -> int:
    """Exit code of the command."""
    return exit_code(main, *arguments)


@pytest.fixture(autouse=True)
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_tree(Path("tree"))


def test_output_and_second_run(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("tree", "shards", "--short-side", "8", "--images-per-shard", "4", "--workers", "2")
    assert run(*words) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "9 images of 3 classes in the folder tree"
    assert lines[1].startswith("9 images in 3 shards (0 were there already), 0.0 MB became ")
    assert lines[2] == "paste: data.train=shards"
    assert len(open_source("shards", "data.train")) == 9
    assert run(*words) == 0
    assert "(3 were there already)" in capsys.readouterr().out


def test_verify(capsys: pytest.CaptureFixture[str]) -> None:
    run("tree", "shards")
    capsys.readouterr()
    assert run("--verify", "shards") == 0
    assert capsys.readouterr().out == "shards: 1 shard, all unchanged\n"
    Path("shards/shard-000000.tar").write_bytes(b"other")
    assert run("--verify", "shards") == USER_ERROR_EXIT_CODE
    assert "error: shards: 1 of 1 shards are missing or changed" in capsys.readouterr().err


def test_uncompressed_shards_have_the_pixels_of_the_files() -> None:
    assert run("tree", "shards", "--uncompressed", "--short-side", "1000") == 0
    files, shards = (open_source(path, "data.train") for path in ("tree", "shards"))
    assert len(shards) == len(files)
    for index in range(len(files)):
        one, two = (decode_image(source.read(index), source.name(index)) for source in (files, shards))
        assert one.tobytes() == two.tobytes()


def test_a_list_with_root_and_broken_images(capsys: pytest.CaptureFixture[str]) -> None:
    Path("lists").mkdir()
    Path("lists/list.txt").write_text("ant/000.png\nant/001.png\n")
    Path("tree/ant/001.png").write_bytes(b"broken")
    assert run("lists/list.txt", "shards", "--root", "tree", "--skip-broken") == 0
    out = capsys.readouterr().out
    assert "1 image in 1 shard" in out
    assert "1 broken image left out, listed in shards/broken.txt" in out


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("shards",), "SRC: is missing. Give two paths"),
        (("nowhere", "shards"), "SRC: nowhere does not exist"),
        (("tree", "tree"), "DST: tree holds something else"),
        (("tree", "s3://bucket/x"), "is an address. Give a local folder"),
        (("tree", "shards", "--quality", "0"), "--quality 0: out of range. Give a number from 1 to 100."),
        (("tree", "shards", "--uncompressed", "--keep-original"), "--uncompressed: --keep-original packs"),
        (("tree", "shards", "--workers", "0"), "--workers: 0 is too small"),
        (("list.txt", "shards"), "2 of 2 images are not there: list-a.png, list-b.png. "),
        (("--verify", "tree"), "tree: no index.json by make_shards.py"),
    ],
)
def test_errors_are_one_line_and_write_nothing(
    words: tuple[str, ...], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("list.txt").write_text("list-a.png\nlist-b.png")
    before = sorted(Path().rglob("*"))
    assert run(*words) == USER_ERROR_EXIT_CODE
    error = capsys.readouterr().err.rpartition("\r")[2].strip()  # after the bars
    assert error.startswith("error: ")
    assert told in error
    assert "\n" not in error
    assert sorted(Path().rglob("*")) == before
