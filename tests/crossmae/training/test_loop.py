"""Proves that a run resumes to the bit, uses every batch, replaces broken images and stops at a signal."""

from __future__ import annotations

import json
import shutil
import signal
import tarfile
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from crossmae.checkpoints import run_checkpoint
from crossmae.checkpoints.run_checkpoint import CheckpointWriter, complete_checkpoints, step_of
from crossmae.errors import UserError
from crossmae.pretraining.train import Judges, pretrain
from crossmae.training import log as log_module
from crossmae.training import state as run_module
from crossmae.training.log import TimeAhead
from tests.crossmae.pretraining.runs import assert_same, build, digest, log_lines, make_config


@pytest.mark.parametrize(("stop", "workers", "accumulate"), [(1, 0, 1), (3, 0, 1), (5, 2, 1), (4, 0, 2)])
def test_resume_is_exact_to_the_bit(images: Path, tmp_path: Path, stop: int, workers: int, accumulate: int) -> None:
    """A run of 3 steps per epoch (1.5 with accumulation), stopped at `stop`, equals one never stopped."""
    settings: dict[str, Any] = {"optim": {"accumulate": accumulate}, "data": {"workers": workers}}
    pretrain(make_config(images, tmp_path / "whole", **settings | {"data": {"workers": 0}}))
    pretrain(make_config(images, tmp_path / "parts", **settings, schedule={"max_steps": stop}))
    torch.manual_seed(1234)
    pretrain(make_config(images, tmp_path / "parts", **settings), resume=True)
    assert_same(digest(tmp_path / "whole"), digest(tmp_path / "parts"))


def test_the_estimate_of_the_time_changes_nothing(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It is logged in the middle of a run, and after a restart for the steps that remain."""
    with monkeypatch.context() as patch:
        patch.setattr(TimeAhead, "count", lambda *_: None)
        pretrain(make_config(images, tmp_path / "without"))
    caplog.set_level("INFO")
    monkeypatch.setattr(log_module, "TIMED_STEPS", 1)
    monkeypatch.setattr(log_module, "TIMED_SECONDS", 0.0)
    pretrain(make_config(images, tmp_path / "with", schedule={"max_steps": 5}))
    assert "for the remaining 3 steps on this machine" in caplog.text
    pretrain(make_config(images, tmp_path / "with"), resume=True)
    assert "for the remaining 5 steps on this machine" in caplog.text
    assert_same(digest(tmp_path / "without"), digest(tmp_path / "with"))


def test_checkpoints_that_a_killed_run_did_not_delete_are_deleted(images: Path, tmp_path: Path) -> None:
    """It was killed after its last save."""
    run, checkpoint = tmp_path / "run", {"keep": 9, "every_steps": 1}
    pretrain(make_config(images, run, checkpoint=checkpoint, schedule={"max_steps": 3}))
    assert [step_of(folder) for folder in complete_checkpoints(run)] == [1, 2, 3]
    (run / "model.safetensors").unlink()
    pretrain(make_config(images, run, checkpoint=checkpoint | {"keep": 1}, schedule={"max_steps": 3}), resume=True)
    assert [step_of(folder) for folder in complete_checkpoints(run)] == [3]


def test_accumulation_equals_one_large_batch(images: Path, tmp_path: Path) -> None:
    """Four images at once or two and two: the same images, so the same first update up to rounding."""
    for name, optim in (("whole", {"batch_size": 4}), ("parts", {"batch_size": 2, "accumulate": 2})):
        schedule = {"max_steps": 1, "warmup_epochs": 0}
        pretrain(make_config(images, tmp_path / name, optim=optim, schedule=schedule))
    whole, parts = digest(tmp_path / "whole"), digest(tmp_path / "parts")
    assert whole["curve"][0][1:] == pytest.approx(parts["curve"][0][1:], rel=1e-5)
    for index, moments in whole["moments"].items():
        expected = parts["moments"][index]["exp_avg"]
        torch.testing.assert_close(moments["exp_avg"], expected, rtol=1e-4, atol=1e-7)


def test_no_micro_batch_is_dropped(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """3 batches per epoch, 3 epochs, 2 in a step: 9 batches in 5 steps, the last of one batch with its whole weight."""
    used: list[int] = []
    forward = run_module.TrainingState.forward_backward

    def spy(run: run_module.TrainingState, loss: Any, batch: Any, number: int, *given: Any) -> torch.Tensor:
        assert number == len(used)
        used.append(given[0])
        return forward(run, loss, batch, number, *given)

    monkeypatch.setattr(run_module.TrainingState, "forward_backward", spy)
    pretrain(make_config(images, tmp_path / "run", optim={"accumulate": 2}, schedule={"epochs": 3}))
    assert used == [2] * 8 + [1]
    record = json.loads((tmp_path / "run/checkpoints/step-00000005/run.json").read_text())
    assert record["batches_consumed"] == 9


@pytest.mark.parametrize("shuffle_shards", [None, 2])
def test_shards_train_like_files_and_resume_to_the_bit(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shuffle_shards: int | None
) -> None:
    """The same images in the same order give the same run; a pool of shards gives another order, resumed as exactly."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    paths = sorted(images.iterdir())
    for number in range(4):
        with tarfile.open(tmp_path / f"s-{number}.tar", "w") as tar:
            for path in paths[4 * number : 4 * number + 4]:
                tar.add(path, path.name)
    data = {"train": str(tmp_path / "s-{0..3}.tar"), "shuffle_shards": shuffle_shards}
    pretrain(make_config(images, tmp_path / "files"))
    pretrain(make_config(images, tmp_path / "whole", data=data))
    pretrain(make_config(images, tmp_path / "parts", data=data, schedule={"max_steps": 5}))
    pretrain(make_config(images, tmp_path / "parts", data=data | {"workers": 2}), resume=True)
    files, whole, parts = (digest(tmp_path / name) for name in ("files", "whole", "parts"))
    assert_same(whole, parts)
    assert (files["curve"] == whole["curve"]) is (shuffle_shards is None)


def test_a_truncated_image_stops_the_run_by_name(images: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(images, tmp_path / "images")
    (folder / "7.png").write_bytes((images / "7.png").read_bytes()[:60])
    with pytest.raises(UserError, match=r"7\.png: cannot be read"):
        pretrain(make_config(folder, tmp_path / "run"))
    assert not (tmp_path / "run").exists()
    with pytest.raises(UserError, match=r"7\.png: cannot be read"):  # found when its turn comes
        pretrain(make_config(folder, tmp_path / "run", data={"check": False}))
    assert complete_checkpoints(tmp_path / "run") == []


def test_broken_images_are_replaced_counted_and_listed_and_the_budget_holds(
    images: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = shutil.copytree(images, tmp_path / "images")
    for name in ("3.png", "7.png"):
        (folder / name).write_bytes(b"\x89PNG nothing")
    data = {"broken": "substitute", "broken_budget": 0.2}
    for name, more in (("checked", {}), ("unchecked", {"check": False}), ("workers", {"check": False, "workers": 1})):
        pretrain(make_config(folder, tmp_path / name, data=data | more))
        rows = [json.loads(line) for line in (tmp_path / name / "broken.jsonl").read_text().splitlines()]
        assert sorted(Path(row["name"]).name for row in rows) == ["3.png", "7.png"]
        assert all("cannot be read" in row["reason"] for row in rows)
    assert_same(digest(tmp_path / "checked"), digest(tmp_path / "unchecked"))
    assert_same(digest(tmp_path / "checked"), digest(tmp_path / "workers"))
    assert "2 so far" in caplog.text
    with pytest.raises(UserError, match=r"data.broken_budget: 2 of 13 images are broken, 1 are allowed\. .* lists"):
        pretrain(make_config(folder, tmp_path / "over", data=data | {"broken_budget": 0.1}))


@pytest.mark.parametrize(
    ("number", "outcome", "workers"), [("SIGINT", KeyboardInterrupt, 1), ("SIGTERM", SystemExit, 0)]
)
def test_a_signal_ends_the_run_after_the_step_and_nothing_is_lost(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: str, outcome: Any, workers: int
) -> None:
    """Also in the middle of a step of two batches, and of the losses of a line of the log."""
    settings: dict[str, Any] = {
        "data": {"workers": workers},
        "log": {"every_steps": 4},
        "optim": {"batch_size": 2, "accumulate": 2, "ema": 0.9},
    }
    pretrain(make_config(images, tmp_path / "whole", **settings))
    forward = run_module.TrainingState.forward_backward

    waiting = ["the first batch of step 5"]

    def interrupted(run: run_module.TrainingState, *given: Any, **named: Any) -> torch.Tensor:
        if run.step == 4 and waiting:
            waiting.clear()
            signal.raise_signal(getattr(signal, number))
        return forward(run, *given, **named)

    config = make_config(images, tmp_path / "parts", **settings, checkpoint={"every_epochs": 4})
    monkeypatch.setattr(run_module.TrainingState, "forward_backward", interrupted)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where tests run in the background
    try:
        with pytest.raises(outcome):
            pretrain(config)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    assert [folder.name for folder in complete_checkpoints(tmp_path / "parts")] == ["step-00000005"]
    pretrain(config, resume=True)
    whole, parts = (digest(tmp_path / name) for name in ("whole", "parts"))
    assert len(whole.pop("curve")) > len(parts["curve"])  # the whole run wrote a line at its own checkpoints, too
    by_step = dict(log_lines(tmp_path / "parts", "loss"))
    assert set(by_step) == {4, 8, 12}
    assert_same(whole | {"curve": parts["curve"]}, parts)


def test_steps_do_not_wait_for_a_checkpoint_but_measurements_do(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checkpoint of a step is written when the next step or the end of the run has begun."""
    run, saved, may_write = tmp_path / "run", run_checkpoint.save_checkpoint, threading.Event()
    forward, wait, judge = run_module.TrainingState.forward_backward, CheckpointWriter.wait, Judges.judge
    trained: list[tuple[int, list[int]]] = []
    measured: list[tuple[int, list[int]]] = []

    def steps() -> list[int]:
        return [step_of(folder) for folder in complete_checkpoints(run)]

    def when_allowed(*arguments: Any) -> Path:
        assert may_write.wait(60)
        return saved(*arguments)

    def train(state: run_module.TrainingState, *given: Any, **named: Any) -> Any:
        trained.append((state.step, steps()))
        return forward(state, *given, **named)

    def allow(writer: CheckpointWriter) -> None:
        may_write.set()
        wait(writer)
        may_write.clear()

    def measure(judges: Judges, state: run_module.TrainingState, records: Any, validate: bool, probe: bool) -> None:
        if validate and state.step:
            measured.append((state.step, steps()))
        judge(judges, state, records, validate, probe)

    monkeypatch.setattr(run_checkpoint, "save_checkpoint", when_allowed)
    monkeypatch.setattr(run_module.TrainingState, "forward_backward", train)
    monkeypatch.setattr(CheckpointWriter, "wait", allow)
    monkeypatch.setattr(Judges, "judge", measure)
    pretrain(
        make_config(
            images,
            run,
            data={"val": str(images)},
            checkpoint={"every_steps": 2, "every_epochs": 9, "keep": 9},
            validation={"every_epochs": 2},
            log={"pictures": 0},
            schedule={"max_steps": 9},
        )
    )
    # Steps are numbered from 0. Step 6 ends an epoch that is measured.
    assert trained == [
        (0, []),
        (1, []),
        (2, []),
        (3, []),
        (4, [2]),
        (5, [2]),
        (6, [2, 4, 6]),
        (7, [2, 4, 6]),
        (8, [2, 4, 6]),
    ]
    assert measured == [(6, [2, 4, 6]), (9, [2, 4, 6, 8, 9])]


def test_a_fresh_start_forgets_an_earlier_try(images: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "log.jsonl").write_text('{"step": 0, "val_loss": 9}\n')
    (run / "broken.jsonl").write_text('{"name": "old.png", "reason": "gone"}\n' * 5)
    pretrain(make_config(images, run, data={"broken": "substitute"}, schedule={"max_steps": 1}))
    assert "val_loss" not in (run / "log.jsonl").read_text()
    assert not (run / "broken.jsonl").exists()


def test_no_steps_write_the_initial_weights(images: Path, tmp_path: Path) -> None:
    """The file has the weights that a run with the same seed starts with, and the run can continue."""
    config = make_config(images, tmp_path / "run", schedule={"max_steps": 0}, runtime={"seed": 5})
    written = load_file(pretrain(config))
    for name, tensor in build(config).state_dict().items():
        assert torch.equal(written[name], tensor), name
    assert pretrain(config, resume=True).exists()  # it is complete
    longer = make_config(images, tmp_path / "run", schedule={"max_steps": 2}, runtime={"seed": 5})
    moved = load_file(pretrain(longer, resume=True))
    assert any(not torch.equal(written[name], moved[name]) for name in written)
