"""Proves that only complete checkpoints count, and that the last good one is never lost."""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch.torch_version import TorchVersion

from crossmae.checkpoints import run_checkpoint
from crossmae.checkpoints.run_checkpoint import (
    CHECKPOINT_FILES,
    FOLDER,
    MANIFEST,
    MODEL,
    RECORD,
    STATE,
    CheckpointWriter,
    check_checkpoint_space,
    checkpoint_bytes,
    complete_checkpoints,
    defect,
    latest_checkpoint,
    read_record,
    read_state,
    save_checkpoint,
    sweep_run,
)
from crossmae.errors import UserError
from crossmae.files import writing


def save(run: Path, step: int, keep: int = 2) -> Path:
    tensors = {"weight": torch.full((3,), float(step))}
    return save_checkpoint(run, step, tensors, {"step": str(step)}, {"step": step}, {"config": {}}, keep)


def steps(run: Path) -> list[int]:
    return [int(folder.name.removeprefix("step-")) for folder in complete_checkpoints(run)]


def test_round_trip_and_retention(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        folder = save(tmp_path, step)
    assert steps(tmp_path) == [2, 3]
    assert latest_checkpoint(tmp_path) == folder
    assert torch.equal(load_file(folder / MODEL)["weight"], torch.full((3,), 3.0))
    assert read_state(folder) == {"step": 3}
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_later_damaged_checkpoint_does_not_cost_the_new_one(tmp_path: Path) -> None:
    """A run continued before the damage, so its newest good checkpoint is not the last by name."""
    for step in (1, 2, 9):
        folder = save(tmp_path, step, keep=9)
    torn = bytearray((folder / STATE).read_bytes())
    torn[-1] ^= 1
    (folder / STATE).write_bytes(torn)
    new = save(tmp_path, 3, keep=1)
    assert latest_checkpoint(tmp_path) == new
    assert steps(tmp_path) == [3, 9]


def test_latest_complete_wins_over_a_zoo_of_bad_entries(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    good = save(tmp_path, 1, keep=9)
    (save(tmp_path, 2, keep=9) / MANIFEST).unlink()
    (save(tmp_path, 3, keep=9) / STATE).unlink()
    torn = save(tmp_path, 4, keep=9) / MODEL
    torn.write_bytes(torn.read_bytes()[:-1])
    flipped = save(tmp_path, 5, keep=9) / MODEL
    content = bytearray(flipped.read_bytes())
    content[-1] ^= 1
    flipped.write_bytes(content)
    (save(tmp_path, 6, keep=9) / MANIFEST).write_text("{")
    (tmp_path / "checkpoints" / "step-latest").mkdir()
    before = sorted(tmp_path.rglob("*"))
    with caplog.at_level(logging.WARNING):
        assert latest_checkpoint(tmp_path) == good
    for name, reason in [
        ("step-00000002", "never completed"),
        ("step-00000003", "no bytes"),
        ("step-00000004", "bytes instead of"),
        ("step-00000005", "SHA-256"),
        ("step-00000006", "damaged"),
        ("step-latest", "its name"),
    ]:
        assert any(name in line and reason in line for line in caplog.messages), name
    assert sorted(tmp_path.rglob("*")) == before  # looking deletes nothing


def test_a_crash_at_any_rename_leaves_the_previous_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1, keep=1)
    replace, renames = os.replace, 4  # model, state, record, manifest
    for crash_at in range(renames):
        calls = 0

        def crash(source: Path, target: Path, crash_at: int = crash_at) -> None:
            nonlocal calls
            if calls == crash_at:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            calls += 1
            replace(source, target)

        monkeypatch.setattr(writing.os, "replace", crash)
        with pytest.raises(UserError, match=r"step-00000002: cannot be written: No space left .* GB free in "):
            save(tmp_path, 2, keep=1)
        assert steps(tmp_path) == [1]
    monkeypatch.setattr(writing.os, "replace", replace)
    save(tmp_path, 2, keep=1)
    assert steps(tmp_path) == [2]


def test_state_is_read_without_running_code(tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (os.system, (f"touch {tmp_path}/sentinel",))

    folder = save(tmp_path, 1)
    torch.save({"step": Payload()}, folder / STATE)
    with pytest.raises(UserError, match=r"state\.pt"):
        read_state(folder)
    assert not (tmp_path / "sentinel").exists()


def test_an_old_torch_is_warned_about(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = save(tmp_path, 1)
    for version, warned in ((TorchVersion("2.9.1"), True), (TorchVersion("2.10.0+cu130"), False)):
        caplog.clear()
        monkeypatch.setattr(torch, "__version__", version)
        read_state(folder)
        assert ("CVE-2026-24747" in caplog.text) is warned


def test_no_checkpoint_is_none(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path) is None


def tree(folder: Path) -> dict[str, bytes | None]:
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def spoil(folder: Path, kind: str) -> None:
    """Make of a checkpoint's folder something that is none."""
    manifest = json.loads((folder / MANIFEST).read_text())
    if kind == "file":
        shutil.rmtree(folder)
        folder.write_text("a file")
    elif kind == "link":
        folder.rename(folder.parent / "elsewhere")
        folder.symlink_to(folder.parent / "elsewhere")
    elif kind == "folder as manifest":
        (folder / MANIFEST).unlink()
        (folder / MANIFEST).mkdir()
    elif kind == "pipe as manifest":
        (folder / MANIFEST).unlink()
        os.mkfifo(folder / MANIFEST)
    elif kind == "pipe as state":
        (folder / STATE).unlink()
        os.mkfifo(folder / STATE)
    elif kind == "foreign name":
        (folder.parent.parent / "outside").write_text("x")
        manifest["files"]["../../outside"] = {"bytes": 1, "sha256": "0" * 64}
        (folder / MANIFEST).write_text(json.dumps(manifest))
    elif kind == "missing name":
        del manifest["files"][STATE]
        (folder / MANIFEST).write_text(json.dumps(manifest))
    elif kind == "another step":
        (folder / MANIFEST).write_text(json.dumps(manifest | {"step": 1}))
    else:
        raise AssertionError(kind)


KINDS = {
    "file": "not a folder",
    "link": "a link",
    "folder as manifest": "damaged",
    "pipe as manifest": "damaged",
    "pipe as state": "no bytes",
    "foreign name": "other files",
    "missing name": "damaged",
    "another step": "another step",
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_checkpoint_is_skipped_with_a_reason(
    tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    good = save(tmp_path, 1, keep=9)
    spoil(save(tmp_path, 2, keep=9), kind)
    assert latest_checkpoint(tmp_path) == good
    assert any("step-00000002" in line and KINDS[kind] in line for line in caplog.messages)
    for step in (3, 4):
        save(tmp_path, step, keep=1)  # retention leaves what is no checkpoint
    assert steps(tmp_path) == [4]
    assert (tmp_path / FOLDER / "step-00000002").exists()


MANIFESTS = [b"", b"\0", b"\xff\xfe", b"[]", b"null", b"[" * 10_000, b"9" * 5000, b'{"files": []}', b'{"files": {}}']
VALUES = (
    st.none() | st.integers() | st.floats() | st.text() | st.lists(st.none()) | st.dictionaries(st.text(), st.none())
)
ENTRIES = VALUES | st.fixed_dictionaries({"bytes": VALUES, "sha256": VALUES})
NAMES = st.sampled_from([*CHECKPOINT_FILES, "../x", "/etc/passwd", "a\0", "x" * 300])
SHAPED = st.fixed_dictionaries({"step": VALUES | st.just(2), "files": VALUES | st.dictionaries(NAMES, ENTRIES)})


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(MANIFESTS) | st.binary() | SHAPED.map(lambda content: json.dumps(content).encode()))
def test_any_bytes_in_a_manifest_are_a_reason(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    run = tmp_path_factory.getbasetemp() / "run"
    if not run.exists():
        save(run, 1, keep=9)
        save(run, 2, keep=9)
    (run / FOLDER / "step-00000002" / MANIFEST).write_bytes(data)
    assert defect(run / FOLDER / "step-00000002", contents=True)
    assert steps(run) == [1]


def test_a_reading_error_is_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good, bad = save(tmp_path, 1), save(tmp_path, 2)
    digest = run_checkpoint.sha256

    def fail(path: Path) -> str:
        if path.parent == bad:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return digest(path)

    monkeypatch.setattr(run_checkpoint, "sha256", fail)
    assert latest_checkpoint(tmp_path) == good


@pytest.mark.parametrize("name", CHECKPOINT_FILES)
def test_older_checkpoints_are_deleted_only_after_the_new_one_was_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """The disk returns other bytes than were written."""
    good, write = save(tmp_path, 1, keep=1), run_checkpoint.write_json

    def write_then_spoil(path: Path, value: object) -> None:
        write(path, value)
        if path.name == MANIFEST:
            path.with_name(name).write_bytes(bytes(path.with_name(name).stat().st_size))

    monkeypatch.setattr(run_checkpoint, "write_json", write_then_spoil)
    with pytest.raises(UserError, match=rf"step-00000002: cannot be read after it was written: {name}"):
        save(tmp_path, 2, keep=1)
    assert list((tmp_path / FOLDER).iterdir()) == [good]
    assert latest_checkpoint(tmp_path) == good


def test_an_earlier_checkpoint_of_the_same_step_stays_until_the_new_one_is_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that was resumed, and is stopped before its next step, saves the same step again."""
    folder = save(tmp_path, 1, keep=1)
    (folder / "notes.txt").write_text("mine")
    before, flush = tree(tmp_path), os.fsync
    left = 0

    def fail(descriptor: int) -> None:
        nonlocal left
        if not left:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        left -= 1
        flush(descriptor)

    monkeypatch.setattr(writing.os, "fsync", fail)
    for flushed in range(8):  # files and their folder: nothing has been renamed yet
        left = flushed
        with pytest.raises(UserError, match="step-00000001: cannot be written: No space left"):
            save(tmp_path, 1, keep=1)
        assert tree(tmp_path) == before
        assert steps(tmp_path) == [1]
    monkeypatch.undo()
    (folder / RECORD).write_text("damaged")
    assert save(tmp_path, 1, keep=1) == folder
    assert tree(tmp_path) == before


@pytest.mark.parametrize("has_exchange", [True, False])
def test_a_folder_is_put_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_exchange: bool) -> None:
    if not has_exchange:
        monkeypatch.setattr(writing, "_exchange", lambda *_: False)
    for content in ("first", "second"):
        new = tmp_path / "temporary"
        new.mkdir()
        (new / content).touch()
        writing.put_in_place(new, tmp_path / "place")
        assert [path.name for path in (tmp_path / "place").iterdir()] == [content]
        if content == "second":
            assert [path.name for path in new.iterdir()] == ["first"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["place", "temporary"]


def test_a_new_checkpoint_that_does_not_open_is_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = save(tmp_path, 1, keep=1)
    monkeypatch.setattr(run_checkpoint, "save_file", lambda tensors, path, metadata: path.write_bytes(b"nothing"))
    with pytest.raises(UserError, match="step-00000002: cannot be read after it was written"):
        save(tmp_path, 2, keep=1)
    assert latest_checkpoint(tmp_path) == good


def test_the_names_of_a_new_checkpoint_are_on_disk_before_older_ones_are_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 1, keep=1)
    flushed: list[Path] = []

    def note(folder: Path) -> None:
        assert (tmp_path / FOLDER / "step-00000001" / MANIFEST).exists()
        flushed.append(folder)

    monkeypatch.setattr(run_checkpoint, "sync_folder", note)
    monkeypatch.setattr(writing, "sync_folder", note)
    save(tmp_path, 2, keep=1)
    assert flushed[-2:] == [tmp_path / FOLDER, tmp_path]
    assert steps(tmp_path) == [2]


def test_retention_deletes_our_files_alone(tmp_path: Path) -> None:
    old = save(tmp_path, 1, keep=1)
    (old / "notes.txt").write_text("mine")
    (tmp_path / FOLDER / "step-00000000-mine").mkdir()
    save(tmp_path, 2, keep=1)
    assert [path.name for path in old.iterdir()] == ["notes.txt"]
    assert (tmp_path / FOLDER / "step-00000000-mine").exists()


def test_a_file_in_the_place_of_the_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / FOLDER).mkdir()
    (tmp_path / FOLDER / "step-00000001").write_text("mine")
    with pytest.raises(UserError, match="step-00000001: cannot be written: there is a file or link of this name"):
        save(tmp_path, 1)


def save_by(writer: CheckpointWriter, run: Path, step: int, weight: torch.Tensor, state: object = None) -> None:
    writer.save(run, step, {"weight": weight}, {"step": str(step)}, state or {"step": step}, {"config": {}}, keep=2)


def test_a_checkpoint_has_the_values_of_its_step_although_training_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Writing begins only after the values have changed, and takes as long as it likes."""
    changed, plain = threading.Event(), save_checkpoint

    def late(*arguments: Any) -> Path:
        assert changed.wait(60)
        return plain(*arguments)

    monkeypatch.setattr(run_checkpoint, "save_checkpoint", late)
    weight, moment = torch.arange(6.0).view(2, 3).T, torch.ones(3, dtype=torch.float64)
    state = {"step": 1, "optimizer": {"state": {0: {"moment": moment}}, "groups": [{"betas": (0.9, 0.95)}]}}
    expected = {"step": 1, "optimizer": {"state": {0: {"moment": moment.clone()}}, "groups": [{"betas": (0.9, 0.95)}]}}
    with CheckpointWriter() as writer:
        save_by(writer, tmp_path, 1, weight, state)
        assert not steps(tmp_path)
        weight.zero_(), moment.zero_(), state["optimizer"].clear()  # type: ignore[attr-defined]
        changed.set()
    folder = tmp_path / FOLDER / "step-00000001"
    assert latest_checkpoint(tmp_path) == folder
    assert torch.equal(load_file(folder / MODEL)["weight"], torch.arange(6.0).view(2, 3).T)
    found = read_state(folder)
    assert torch.equal(found["optimizer"]["state"][0].pop("moment"), expected["optimizer"]["state"][0].pop("moment"))
    assert found == expected


def test_the_next_checkpoint_waits_for_the_one_before_and_reuses_its_copies(tmp_path: Path) -> None:
    weight, places = torch.zeros(3), set()
    with CheckpointWriter() as writer:
        for step in range(1, 6):
            save_by(writer, tmp_path, step, weight.fill_(step))
            places.add(writer.copies["model.weight"].data_ptr())
            assert step == 1 or step - 1 in steps(tmp_path)
        assert len(places) == 1
        save_by(writer, tmp_path, 6, torch.full((2, 2), 6.0))  # another shape has another copy
    assert steps(tmp_path) == [5, 6]
    for step, shape in ((5, (3,)), (6, (2, 2))):
        assert torch.equal(load_file(tmp_path / FOLDER / f"step-{step:08d}" / MODEL)["weight"], torch.full(shape, step))


@pytest.mark.parametrize("way", ["check", "wait", "save", "end", "other"])
def test_an_error_of_the_thread_reaches_training_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, way: str
) -> None:
    def fail(*_: Any) -> Path:
        raise UserError("disk: full. Free some space.")

    writer, weight = CheckpointWriter(), torch.zeros(3)
    save_by(writer, tmp_path, 1, weight)
    writer.wait()
    monkeypatch.setattr(run_checkpoint, "save_checkpoint", fail)
    save_by(writer, tmp_path, 2, weight)
    assert writer.writing is not None
    assert writer.writing.exception(timeout=60) is not None
    if way == "other":  # the error that ends the run stays the one that is raised
        with pytest.raises(ArithmeticError), writer:
            raise ArithmeticError
        assert "disk: full" in caplog.text
    else:
        call = {"check": writer.check, "wait": writer.wait, "end": lambda: writer.__exit__(None)}
        with pytest.raises(UserError, match="disk: full"):
            call.get(way, lambda: save_by(writer, tmp_path, 3, weight))()
    writer.check()
    writer.wait()
    assert steps(tmp_path) == [1]


def test_a_sweep_removes_half_made_checkpoints_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    good = save(tmp_path, 1, keep=9)
    (save(tmp_path, 2, keep=9) / MANIFEST).unlink()
    (tmp_path / FOLDER / "step-00000003").mkdir()
    (tmp_path / FOLDER / "step-00000003" / ".tmpx3k9ab").write_text("of safetensors")
    (tmp_path / FOLDER / "step-00000004").mkdir()
    stays = save(tmp_path, 5, keep=9)  # someone's notes
    (stays / MANIFEST).unlink()
    (stays / "notes.txt").write_text("mine")
    (save(tmp_path, 6, keep=9) / MANIFEST).write_text("damaged")
    links = tmp_path / FOLDER / "step-00000007"
    links.mkdir()
    (links / STATE).symlink_to(good / STATE)
    (tmp_path / FOLDER / "step-00000008").symlink_to(stays)
    (tmp_path / FOLDER / "step-00000009").write_text("a file")
    (tmp_path / FOLDER / "step-latest").mkdir()
    (tmp_path / FOLDER / "step-000000010").mkdir()
    (tmp_path / FOLDER / "step-00000011" / MODEL).mkdir(parents=True)
    before = tree(tmp_path)
    caplog.clear()
    with caplog.at_level(logging.INFO):
        removed = sweep_run(tmp_path)
    assert removed == [f"{FOLDER}/step-0000000{step}" for step in (2, 3, 4)]
    assert caplog.messages == [
        f"{tmp_path}: removed half-made checkpoints: step-00000002, step-00000003, step-00000004"
    ]
    gone = {name for name in before if any(name.startswith(folder) for folder in removed)}
    assert tree(tmp_path) == {name: content for name, content in before.items() if name not in gone}
    assert sweep_run(tmp_path) == []
    assert sweep_run(tmp_path / "none") == []


def test_space_for_the_checkpoints_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert checkpoint_bytes(100, optimizer_copies=2, averaged=True) == 400
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=int(3.1e9)))
    check_checkpoint_space(tmp_path, int(1e9), int(0.1e9), keep=2, key="output_dir")
    with pytest.raises(UserError, match=r"^output_dir: .* needs 3\.2 GB, but only 3\.1 GB are free"):
        check_checkpoint_space(tmp_path, int(1e9), int(0.2e9), keep=2, key="output_dir")
    save(tmp_path, 1)  # its place is used again
    check_checkpoint_space(tmp_path, int(1e9), int(0.2e9), keep=2, key="output_dir")


def test_a_record_is_an_object_or_an_error(tmp_path: Path) -> None:
    folder = save(tmp_path, 1)
    assert read_record(folder) == {"config": {}}
    (folder / RECORD).write_bytes(b"[\xff")
    with pytest.raises(UserError, match=r"run\.json: is not JSON"):
        read_record(folder)
