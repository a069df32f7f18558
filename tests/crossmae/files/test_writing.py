"""Proves that a file is written whole or not at all, and that an unwritable folder is named early."""

from __future__ import annotations

import csv
import errno
import gc
import json
import os
import pickle
import resource
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from crossmae.checkpoints.run_checkpoint import save_checkpoint
from crossmae.checkpoints.weights import save_weights
from crossmae.errors import UserError
from crossmae.files import WriteError, check_space, make_folder, write_atomically, write_json, writing
from crossmae.files.writing import name_write_errors


def test_a_failed_write_leaves_the_old_file_and_no_rest(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_atomically(path, lambda temporary: temporary.write_text("old"))

    def fail(temporary: Path) -> None:
        temporary.write_text("ne")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(WriteError, match="No space left"):
        write_atomically(path, fail)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_name_may_be_as_long_as_a_name_can_be(tmp_path: Path) -> None:
    """Also in letters of four bytes; two files that begin alike have temporary files of their own."""
    temporaries = []
    for name in ("x" * 251 + ".png", "x" * 251 + ".jpg", "\U0001f600" * 62 + ".png"):
        write_atomically(tmp_path / name, lambda temporary: (temporaries.append(temporary.parent), temporary.touch()))
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


def test_a_folder_that_can_not_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"output_dir: cannot write in .*file/run: Not a directory"):
        make_folder(tmp_path / "file" / "run", "output_dir")
    make_folder(tmp_path / "a" / "b", "output_dir")
    assert list((tmp_path / "a" / "b").iterdir()) == []


ROOT = Path(__file__).parents[3]
PIXELS = np.random.default_rng(0).integers(0, 256, (400, 400, 3), np.uint8)
TENSORS = {"weight": torch.zeros(200_000)}


def write_rows(path: Path) -> None:
    with open(path, "w") as file:
        csv.writer(file).writerows([["word"] * 10] * 10_000)


LIBRARIES: dict[str, Callable[[Path], object]] = {
    "bytes": lambda path: path.write_bytes(bytes(800_000)),
    "csv": write_rows,
    "torch": lambda path: torch.save(TENSORS, path),
    "safetensors": lambda path: save_file(TENSORS, path),
    "png": lambda path: Image.fromarray(PIXELS).save(path, format="png"),
    "gif": lambda path: Image.fromarray(PIXELS).save(path, format="gif"),
    "numpy": lambda path: np.save(path, np.zeros(100_000)),
}


@pytest.fixture
def small_files() -> Iterator[None]:
    """No file of this process may have more than 100 kB."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def check_failure(path: Path, number: int, write: Callable[[], object]) -> None:
    """A write fails with one line that has path, reason, free space and remedy, and the old file stays alone."""
    path.write_text("old")
    with pytest.raises(WriteError) as caught:
        write()
    line, folder = str(caught.value), path.parent
    assert line.startswith(f"{path}: cannot be written: {os.strerror(number)} (")
    assert f" GB free in {folder}). " in line
    assert line.endswith(".")
    assert "\n" not in line
    assert caught.value.errno == number
    assert path.read_text() == "old"
    assert list(folder.iterdir()) == [path]


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.usefixtures("small_files")
def test_a_limit_of_file_sizes_is_one_line_from_any_library(tmp_path: Path, library: str) -> None:
    path = tmp_path / "a"
    check_failure(path, errno.EFBIG, lambda: write_atomically(path, LIBRARIES[library]))


@pytest.mark.usefixtures("small_files")
def test_torch_has_another_writer_for_names_outside_ascii(tmp_path: Path) -> None:
    path = tmp_path / "\xe9"
    check_failure(path, errno.EFBIG, lambda: write_atomically(path, LIBRARIES["torch"]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # after an error, this writer leaves its file open
        gc.collect()


ON_A_SMALL_DISK = """
import errno, sys
from pathlib import Path
from crossmae.files import write_atomically
from tests.crossmae.files.test_writing import LIBRARIES, check_failure

path = Path(sys.argv[1], "a")
for write in LIBRARIES.values():
    check_failure(path, errno.ENOSPC, lambda: write_atomically(path, write))
    path.unlink()
"""


def test_a_full_disk_is_one_line_from_any_library(tmp_path: Path) -> None:
    mount = 'mount -t tmpfs -o size=100k tmpfs "$1"'
    in_a_namespace = ["unshare", "--mount", "sh", "-c"]  # the disk ends with the command
    if (
        shutil.which("unshare") is None
        or subprocess.run([*in_a_namespace, mount, "sh", tmp_path], capture_output=True, check=False).returncode
    ):
        pytest.skip("a small disk needs the right to mount one")
    command = [*in_a_namespace, f'{mount} && exec "$2" -c "$3" "$1"', "sh", tmp_path, sys.executable, ON_A_SMALL_DISK]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.usefixtures("small_files")
def test_every_writer_of_weights_is_covered(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    check_failure(path, errno.EFBIG, lambda: save_weights(path, TENSORS, {}, force=True))
    with pytest.raises(WriteError, match=r"step-00000001: cannot be written: File too large .* GB free in "):
        save_checkpoint(tmp_path, 1, {}, {}, TENSORS, {}, keep=1)
    with pytest.raises(WriteError, match=r"json: cannot be written: File too large .* GB free in "):
        write_json(tmp_path / "a.json", list(range(100_000)))


NUMBERS = [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EROFS, errno.EIO, errno.ESTALE, errno.ENXIO]


@pytest.mark.parametrize("number", NUMBERS, ids=errno.errorcode.get)
@pytest.mark.parametrize("call", ["mkdir", "fsync", "replace"])
def test_every_error_of_the_system_in_every_call_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, call: str
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(writing.os, call, fail)
    path = tmp_path / "a"
    check_failure(path, number, lambda: write_atomically(path, lambda temporary: temporary.write_bytes(b"new")))


def test_a_vanished_folder_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    for library, write in LIBRARIES.items():
        with pytest.raises(WriteError) as caught:
            write_atomically(folder / "a", write)
        assert f"a: cannot be written: there is no folder {folder} (" in str(caught.value), library
        folder.mkdir()
        with pytest.raises(WriteError, match="there is no folder"):
            write_atomically(folder / "a", lambda temporary, write=write: (shutil.rmtree(folder), write(temporary)))  # type: ignore[misc]
        assert not folder.exists()


def test_a_name_that_is_too_long_is_named(tmp_path: Path) -> None:
    with pytest.raises(WriteError, match=r"x: cannot be written: File name too long \(.*\)\. Shorten the name\.$"):
        write_json(tmp_path / ("x" * 300), {})
    assert list(tmp_path.iterdir()) == []


def test_a_folder_in_the_place_of_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    with pytest.raises(WriteError, match="a: cannot be written: Is a directory"):
        write_json(tmp_path / "a", {})
    assert list(tmp_path.iterdir()) == [tmp_path / "a"]


@pytest.mark.parametrize(
    "error",
    [
        TypeError("a bug"),
        ValueError("a bug"),
        RuntimeError("a bug"),
        OSError("cannot write mode CMYK as PNG"),
        FileNotFoundError(errno.ENOENT, "No such file", "/other/image.png"),
        OSError(errno.EIO, "Input/output error", "/other/image.png"),
        UserError("image.png: is broken"),
    ],
    ids=repr,
)
def test_other_errors_stay_as_they_are(tmp_path: Path, error: Exception) -> None:
    def fail(temporary: Path) -> None:
        temporary.write_bytes(b"new")
        with suppress(KeyError):
            raise KeyError
        raise error

    with pytest.raises(type(error)) as caught:
        write_atomically(tmp_path / "a", fail)
    assert caught.value is error
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(TypeError):
        write_json(tmp_path / "a", {"a": object()})
    with pytest.raises((AttributeError, pickle.PicklingError)):
        write_atomically(tmp_path / "a", lambda temporary: torch.save(lambda: None, temporary))


def test_what_a_library_leaves_next_to_its_file_goes_with_it(tmp_path: Path) -> None:
    def write(temporary: Path) -> None:
        temporary.with_name(".tmpx3k9ab").write_bytes(b"a part")  # as safetensors does while it writes
        temporary.write_bytes(b"whole")

    write_atomically(tmp_path / "a", write)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_an_error_in_a_file_inside_names_the_file_outside(tmp_path: Path) -> None:
    """A conversion writes a folder and its report in temporary folders."""

    def write(temporary: Path) -> None:
        temporary.mkdir()
        write_json(temporary / ("x" * 300), {})

    with pytest.raises(WriteError, match=rf"^{tmp_path}/a: cannot be written: File name too long"):
        write_atomically(tmp_path / "a", write)


def test_a_file_system_that_cannot_flush_folders_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flush = os.fsync

    def fail(descriptor: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        flush(descriptor)

    monkeypatch.setattr(writing.os, "fsync", fail)
    write_json(tmp_path / "a", 1)
    assert (tmp_path / "a").read_text() == "1\n"


def test_the_error_survives_a_process_boundary(tmp_path: Path) -> None:
    with pytest.raises(WriteError) as caught, name_write_errors(tmp_path / "a"):
        raise OSError(errno.ENOSPC, "No space")
    copy = pickle.loads(pickle.dumps(caught.value))
    assert (str(copy), copy.errno, copy.path) == (str(caught.value), errno.ENOSPC, tmp_path / "a")


def test_too_little_space_is_an_error_with_both_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1_500_000_000))
    check_space(tmp_path / "not" / "there", 1.5e9, "output_dir")
    with pytest.raises(UserError) as caught:
        check_space(tmp_path / "not", 2.5e9, "output_dir")
    expected = f"output_dir: {tmp_path}/not needs 2.5 GB, but only 1.5 GB are free in {tmp_path}. "
    assert str(caught.value) == f"{expected}Free space, or name another folder."
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(total=0, free=0))  # the system does not tell
    check_space(tmp_path, 2.5e9, "output_dir")
