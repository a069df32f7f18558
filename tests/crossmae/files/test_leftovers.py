"""Proves that a sweep removes what killed processes of this toolkit left, and nothing else."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from crossmae.errors import printable
from crossmae.files.leftovers import MOST_LETTERS, SHARED_SECONDS, is_leftover, probe_name, sweep, temporary_name

ROOT = Path(__file__).parents[3]
NEVER = 2**31 - 1  # no process has this number
KILLED = """
import os, signal, sys
from pathlib import Path
from crossmae.files import write_atomically

def write(path):
    path.write_bytes(b"a part")
    path.with_name(".tmpx3k9ab").write_bytes(b"of the library")
    os.kill(os.getpid(), signal.SIGKILL)

write_atomically(Path(sys.argv[1]), write)
"""


def of_a_dead_process(name: str) -> str:
    return temporary_name(name).replace(f".{os.getpid()}.", f".{NEVER}.")


def tree(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


@pytest.mark.parametrize(
    "name",
    ["model.safetensors", "x" * 250, "\U0001f600" * 62, "caf\udce9.png", "a\nb"],
    ids=["plain", "long", "wide", "not-utf-8", "two-lines"],
)
def test_what_a_killed_writer_left_is_removed_and_named(
    tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "keep").write_text("mine")
    command = [sys.executable, "-c", KILLED, os.fsencode(tmp_path / name)]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=False)
    assert done.returncode == -signal.SIGKILL
    (left,) = tree(tmp_path) - {"keep"} - {str(path) for path in tree(tmp_path) if "/" in path}
    with caplog.at_level(logging.INFO):
        assert sweep(tmp_path) == [left]
    assert tree(tmp_path) == {"keep"}
    assert caplog.messages == [f"{tmp_path}: removed what a killed process left: {printable(left)}"]
    caplog.clear()
    assert sweep(tmp_path) == []
    assert not caplog.messages


def test_leftovers_are_found_in_folders_but_not_behind_links(tmp_path: Path) -> None:
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    name = of_a_dead_process("model.safetensors")
    for folder in (run, run / "checkpoints", run / "checkpoints" / "step-00000001", elsewhere):
        folder.mkdir()
        (folder / name).mkdir()
        (folder / name / "model.safetensors").write_text("a part")
    (run / ".write-test.2147483647").touch()
    (run / "link").symlink_to(elsewhere)
    links = [of_a_dead_process(name) for name in ("to a folder", "to a file")]
    (run / links[0]).symlink_to(elsewhere)
    (run / links[1]).symlink_to(elsewhere / name / "model.safetensors")
    assert len(sweep(run)) == 4
    assert tree(run) == {"checkpoints", "checkpoints/step-00000001", "link", *links}
    assert (elsewhere / name).exists()


def test_files_of_running_processes_stay(tmp_path: Path) -> None:
    for name in (temporary_name("mine"), temporary_name("another").replace(f".{os.getpid()}.", f".{os.getppid()}.")):
        (tmp_path / name).touch()
    (tmp_path / probe_name()).touch()
    assert sweep(tmp_path) == []
    # A file that is older than the process with its number belongs to an earlier process of this number.
    for path in tmp_path.iterdir():
        os.utime(path, (1e9, 1e9))
    assert len(sweep(tmp_path)) == 3


ZOO = [
    ".tmp",
    ".a.tmp",
    ".a.12345678.9.tmp",  # another digest
    ".a.12345678.tmp",
    "a.12345678.9.tmp",
    ".tmpx3k9ab",
    ".write-test.x",
    ".write-test",
    "model.tmp",
    ".nfs000000001",
    ".model.safetensors.swp",
    of_a_dead_process("a")[1:],
    of_a_dead_process("a") + "x",
    of_a_dead_process("a").replace(".a.", ".b."),
    of_a_dead_process("a").replace(str(NEVER), ""),
    of_a_dead_process("a").replace(str(NEVER), "9" * 40),
    of_a_dead_process("x" * 99).replace("~", "x"),
]


def test_a_zoo_of_other_files_stays(tmp_path: Path) -> None:
    for number, name in enumerate(ZOO[:-3] + ZOO[-1:]):
        (tmp_path / name).touch() if number % 2 else (tmp_path / name).mkdir()
    (tmp_path / f".write-test.{NEVER}").write_text("has content")
    (tmp_path / ".write-test.2147483646").mkdir()
    before = tree(tmp_path)
    assert sweep(tmp_path) == []
    assert tree(tmp_path) == before


LETTERS = st.sampled_from([*"ab.~-0123456789", ".tmp", ".12345678.", of_a_dead_process("a"), ".write-test.", "é", "\n"])
NAMES = st.lists(LETTERS, min_size=1, max_size=12).map("".join)


@settings(max_examples=200)
@given(NAMES)
def test_only_names_with_their_own_digest_are_removed(tmp_path_factory: Any, name: str) -> None:
    path = tmp_path_factory.getbasetemp() / name
    assume(name.strip("."))
    path.write_text("content")
    try:
        assert not is_leftover(path) or name == of_a_dead_process(name[1:].removesuffix(f".{NEVER}.tmp")[:-9])
    finally:
        path.unlink()


@given(st.text(st.characters(exclude_characters="/\0", codec="utf-8"), min_size=1, max_size=255))
def test_every_temporary_name_fits_a_file_system_and_is_ours(tmp_path_factory: Any, name: str) -> None:
    path = tmp_path_factory.getbasetemp() / of_a_dead_process(name)
    assert len(os.fsencode(path.name)) <= 255
    path.touch()
    assert is_leftover(path)
    path.unlink()
    longer = name + "a" * MOST_LETTERS
    assert len({temporary_name(longer + end) for end in "ab"}) == 2


def test_in_a_shared_folder_only_old_leftovers_are_removed(tmp_path: Path) -> None:
    """Another machine may have a process that writes there."""
    new, old = (tmp_path / of_a_dead_process(name) for name in ("new", "old"))
    new.mkdir()
    old.mkdir()
    os.utime(old, (1e9, 1e9))
    assert sweep(tmp_path, min_age=SHARED_SECONDS) == [old.name]
    (tmp_path / "folder").mkdir()
    new.rename(tmp_path / "folder" / new.name)
    assert sweep(tmp_path, depth=0) == []
    assert len(sweep(tmp_path, depth=1)) == 1


def test_a_folder_that_does_not_exist_has_nothing(tmp_path: Path) -> None:
    assert sweep(tmp_path / "none") == []
