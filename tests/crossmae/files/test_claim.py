"""Proves that a folder has one run at a time and one kind for ever, and that a claim ends with its process."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crossmae.errors import UserError
from crossmae.files import claim as claims
from crossmae.files.claim import (
    CLAIM_LOCK,
    CLAIM_RECORD,
    check_folder,
    check_unused,
    claim,
    keep_kind,
    lock_now,
    locked,
)

ROOT = Path(__file__).parents[3]
HOLDER = """
import os, sys, time
from pathlib import Path
from typing import IO
from crossmae.files.claim import claim

with claim(Path(sys.argv[1]), "pretraining"):
    if sys.argv[2] == "alone" or not os.fork():
        print(os.getpid(), flush=True)
    time.sleep(60)
"""


@contextmanager
def holder(folder: Path, *words: str) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """Run another process that has claimed the folder; yields it and the number of its worker."""
    command = [sys.executable, "-c", HOLDER, str(folder), *(words or ("alone",))]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        yield process, int(process.stdout.readline())
        process.kill()


def record(folder: Path) -> dict[str, object]:
    return dict(json.loads((folder / CLAIM_RECORD).read_text()))


def write_record(folder: Path, **values: object) -> None:
    folder.mkdir(exist_ok=True)
    (folder / CLAIM_RECORD).write_text(json.dumps({"kind": "pretraining"} | values))


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims, "HEARTBEAT_SECONDS", 0.02)
    monkeypatch.setattr(claims, "WATCH_SECONDS", 0.5)


@pytest.fixture
def no_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system without locks."""

    def fail(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", fail)


def test_a_claim_ends_with_its_run_and_the_kind_stays(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "new" / "run"
    for _ in range(2):
        with claim(folder, "pretraining"):
            assert record(folder)["process"] == os.getpid()
        assert record(folder) == {"kind": "pretraining"}
    assert not caplog.messages
    with pytest.raises(UserError) as caught, claim(folder, "detection", "OUTPUT_DIR"):
        pass
    message = f"OUTPUT_DIR: {folder} is the folder of a pretraining run, not of detection. Name another folder."
    assert str(caught.value) == message
    assert record(folder) == {"kind": "pretraining"}


def test_a_shared_folder_keeps_its_kind(tmp_path: Path) -> None:
    folder = tmp_path / "new"
    for _ in range(2):
        keep_kind(folder, "comparison", "--output")
        assert record(folder) == {"kind": "comparison"}
    with pytest.raises(UserError, match=r"output_dir: .*new is the folder of a comparison run, not of pretraining"):
        claim(folder, "pretraining").__enter__()
    with claim(tmp_path / "run", "pretraining"):
        before = record(tmp_path / "run")
        with pytest.raises(UserError, match=r"--output: .*run is the folder of a pretraining run, not of comparison"):
            keep_kind(tmp_path / "run", "comparison", "--output")
        assert record(tmp_path / "run") == before


def test_a_claim_without_a_kind_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A claim that opened the file before its holder removed it locks the new file."""
    for kind in ("shards", "others"):
        with claim(tmp_path, kind, keeps_kind=False), pytest.raises(UserError), claim(tmp_path, kind):
            pass
        assert list(tmp_path.iterdir()) == []

    others: list[IO[bytes]] = []

    def remove_first(file: IO[bytes]) -> bool | None:
        """Let the holder remove its file, and another process lock a new one."""
        monkeypatch.setattr(claims, "lock_now", lock_now)
        (tmp_path / CLAIM_LOCK).unlink()
        others.append(open(tmp_path / CLAIM_LOCK, "ab"))  # noqa: SIM115
        assert lock_now(others[0])
        return lock_now(file)

    monkeypatch.setattr(claims, "lock_now", remove_first)
    with pytest.raises(UserError, match="is in use by another process"), claim(tmp_path, "shards"):
        pass
    others[0].close()


def find_trouble(folder: Path, kind: str) -> None:
    check_folder(folder, kind, "KEY")
    check_unused(folder, "KEY")


def test_kind_and_use_are_seen_without_a_claim(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The errors are those of a claim, nothing is written, and other records say nothing."""
    check_folder(tmp_path, "detection")
    check_unused(tmp_path)
    assert list(tmp_path.iterdir()) == []
    with holder(tmp_path):
        before = (tmp_path / CLAIM_RECORD).read_bytes()
        check_folder(tmp_path, "pretraining")
        for kind in ("detection", "pretraining"):
            with pytest.raises(UserError) as claimed, claim(tmp_path, kind, "KEY"):
                pass
            with pytest.raises(UserError) as checked:
                find_trouble(tmp_path, kind)
            assert str(checked.value) == str(claimed.value)
        assert (tmp_path / CLAIM_RECORD).read_bytes() == before
    check_unused(tmp_path)  # it was killed
    write_record(tmp_path, host="elsewhere", process=1, started="now")
    with pytest.raises(UserError, match="in use by a pretraining run: process 1 on elsewhere"):
        check_unused(tmp_path)
    os.utime(tmp_path / CLAIM_RECORD, (0, 0))
    check_unused(tmp_path)
    (tmp_path / CLAIM_RECORD).write_bytes(b"\xff{")
    check_folder(tmp_path, "detection")
    check_unused(tmp_path)
    assert not caplog.messages


def test_an_error_ends_a_claim(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), claim(tmp_path, "pretraining"):
        raise KeyboardInterrupt
    assert record(tmp_path) == {"kind": "pretraining"}
    with claim(tmp_path, "pretraining"):
        pass


def test_a_second_run_is_refused_at_once_by_name(tmp_path: Path) -> None:
    with holder(tmp_path) as (process, _):
        begin = time.monotonic()
        with pytest.raises(UserError) as caught, claim(tmp_path, "pretraining"):
            pass
        assert time.monotonic() - begin < 2
        about = record(tmp_path)
        assert about["process"] == process.pid
        assert str(caught.value) == (
            f"output_dir: {tmp_path} is in use by a pretraining run: process {process.pid} on {os.uname().nodename}, "
            f"since {about['started']}. Wait for its end or stop it, or name another folder."
        )


def test_a_second_claim_in_the_same_process_is_refused(tmp_path: Path) -> None:
    with claim(tmp_path, "pretraining"):
        with pytest.raises(UserError, match=f"process {os.getpid()} on"), claim(tmp_path, "pretraining"):
            pass
        assert record(tmp_path)["process"] == os.getpid()


@pytest.mark.parametrize("content", [None, "damaged"])
def test_a_lock_counts_without_its_record(tmp_path: Path, content: str | None) -> None:
    with holder(tmp_path):
        (tmp_path / CLAIM_RECORD).unlink()
        if content:
            (tmp_path / CLAIM_RECORD).write_text(content)
        with pytest.raises(UserError, match="is in use by another process"), claim(tmp_path, "pretraining"):
            pass


def test_a_killed_holder_is_named_and_its_folder_taken_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Also while a worker of the killed run still lives: it has no part in the lock."""
    with holder(tmp_path, "with a worker") as (process, worker):
        process.kill()
        process.wait()
        os.kill(worker, 0)
        with claim(tmp_path, "pretraining"):
            assert record(tmp_path)["process"] == os.getpid()
        os.kill(worker, signal.SIGKILL)
    assert f"process {process.pid} on {os.uname().nodename}" in caplog.text
    assert "ended without notice; its folder is taken over" in caplog.text


def test_a_copied_folder_is_free(tmp_path: Path) -> None:
    """The record names a process that runs, but that process has the lock of the original."""
    write_record(tmp_path, host=os.uname().nodename, process=os.getppid(), started="x")
    with claim(tmp_path, "pretraining"):
        pass


@pytest.mark.usefixtures("quick")
def test_a_run_on_another_machine_is_known_by_its_heartbeat(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_record(tmp_path, host="elsewhere", process=7, started="x")
    ended = threading.Event()

    def beat() -> None:
        while not ended.wait(0.02):
            os.utime(tmp_path / CLAIM_RECORD)

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    with (
        pytest.raises(UserError, match="in use by a pretraining run: process 7 on elsewhere"),
        claim(tmp_path, "pretraining"),
    ):
        pass
    ended.set()
    thread.join()
    begin = time.monotonic()
    with claim(tmp_path, "pretraining"):
        assert 0.4 < time.monotonic() - begin < 5
    assert "process 7 on elsewhere, since x ended without notice" in caplog.text


def test_a_run_on_another_machine_that_is_long_silent_is_not_watched(tmp_path: Path) -> None:
    write_record(tmp_path, host="elsewhere", process=7, started="x")
    os.utime(tmp_path / CLAIM_RECORD, (time.time() - 100, time.time() - 100))
    begin = time.monotonic()
    with claim(tmp_path, "pretraining"):
        assert time.monotonic() - begin < 2


@pytest.mark.usefixtures("quick")
def test_a_claim_has_a_heartbeat(tmp_path: Path) -> None:
    with claim(tmp_path, "pretraining"):
        before = (tmp_path / CLAIM_RECORD).stat().st_mtime_ns
        time.sleep(0.3)
        assert (tmp_path / CLAIM_RECORD).stat().st_mtime_ns > before
    before = (tmp_path / CLAIM_RECORD).stat().st_mtime_ns
    time.sleep(0.1)
    assert (tmp_path / CLAIM_RECORD).stat().st_mtime_ns == before


@pytest.mark.usefixtures("quick", "no_locks")
def test_without_locks_the_record_decides(tmp_path: Path) -> None:
    with claim(tmp_path, "pretraining"):
        with pytest.raises(UserError, match=f"process {os.getpid()} on"), claim(tmp_path, "pretraining"):
            pass
        write_record(tmp_path, host="elsewhere", process=7, started="x")  # with this claim's heartbeat
        with pytest.raises(UserError, match="process 7 on elsewhere"), claim(tmp_path, "pretraining"):
            pass
    write_record(tmp_path, host=os.uname().nodename, process=2**31 - 1, started="x")
    with claim(tmp_path, "pretraining"):
        pass


RECORDS = [b"", b"\0", b"\xff", b"[]", b"7", b"[" * 10_000, b'{"process": ' + b"9" * 5000 + b"}", b'{"kind": ["x"]}']
VALUES = st.none() | st.integers() | st.text(max_size=9) | st.lists(st.none(), max_size=2)
SHAPED = st.fixed_dictionaries({}, optional={"host": VALUES, "process": VALUES, "started": VALUES, "kind": st.none()})


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(RECORDS) | st.binary(max_size=20) | SHAPED.map(lambda record: json.dumps(record).encode()),
    st.binary(max_size=20),
)
def test_any_bytes_in_record_and_lock_are_tolerated(
    tmp_path_factory: pytest.TempPathFactory, data: bytes, lock: bytes
) -> None:
    folder = tmp_path_factory.getbasetemp() / "claimed"
    folder.mkdir(exist_ok=True)
    (folder / CLAIM_RECORD).write_bytes(data)
    os.utime(folder / CLAIM_RECORD, (1e9, 1e9))  # long silent
    (folder / CLAIM_LOCK).write_bytes(lock)
    with claim(folder, "pretraining"):
        assert record(folder)["process"] == os.getpid()
    assert (folder / CLAIM_LOCK).read_bytes() == lock


@pytest.mark.parametrize("name", [CLAIM_LOCK, CLAIM_RECORD])
@pytest.mark.parametrize("kind", ["folder", "pipe"])
def test_what_is_no_file_is_one_line(tmp_path: Path, name: str, kind: str) -> None:
    (tmp_path / name).mkdir() if kind == "folder" else os.mkfifo(tmp_path / name)
    if (name, kind) == (CLAIM_RECORD, "pipe"):  # is replaced
        with claim(tmp_path, "pretraining"):
            assert record(tmp_path)["process"] == os.getpid()
        return
    with pytest.raises(UserError, match=rf"^{tmp_path}/{name}: "), claim(tmp_path, "pretraining"):
        pass


def test_a_vanished_folder_does_not_hide_the_runs_own_error(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with pytest.raises(ZeroDivisionError), claim(folder, "pretraining"):  # noqa: PT012
        for path in folder.iterdir():
            path.unlink()
        folder.rmdir()
        raise ZeroDivisionError


def test_a_lock_is_of_one_open_file(tmp_path: Path) -> None:
    with open(tmp_path / "x", "ab") as first, open(tmp_path / "x", "ab") as second:
        assert lock_now(first) is True
        assert lock_now(second) is False
        first.close()
        assert lock_now(second) is True
    with open(tmp_path / "x", "ab") as first, open(tmp_path / "x", "ab") as second:
        with locked(first):
            assert lock_now(second) is False
        assert lock_now(second) is True
