"""Proves when a run may continue, and that a complete run stays as it is."""

from __future__ import annotations

import json
import math
import os
import shutil
import socket
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from crossmae.data.batches import BatchPlan
from crossmae.errors import UserError
from crossmae.pretraining.train import pretrain
from crossmae.training.resume import find_start, is_complete, shorten_schedule
from crossmae.training.schedule import make_schedule
from tests.crossmae.pretraining.runs import assert_same, digest, log_lines, make_config


def test_a_used_folder_needs_resume_and_the_same_settings(images: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    pretrain(make_config(images, run, schedule={"max_steps": 1}))
    with pytest.raises(UserError, match=r"already holds a run .* --resume"):
        pretrain(make_config(images, run))
    with pytest.raises(UserError, match=r"other settings: .*optim\.base_lr was 0\.1, is 0\.2"):
        pretrain(make_config(images, run, optim={"base_lr": 0.2}), resume=True)


def test_another_kind_is_named_before_any_advice_to_resume(images: Path, tmp_path: Path) -> None:
    """With and without --resume, for every kind of run."""
    run = tmp_path / "run"
    pretrain(make_config(images, run, schedule={"max_steps": 1}))
    for kind, key in (("fine-tuning", "output_dir"), ("detection", "OUTPUT_DIR")):
        for resume in (False, True):
            with pytest.raises(UserError) as caught:
                find_start(run, resume, kind, key)
            message = f"{key}: {run} is the folder of a pretraining run, not of {kind}. Name another folder."
            assert str(caught.value) == message


def test_a_folder_in_use_is_not_to_be_resumed(images: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    config = make_config(images, run, schedule={"max_steps": 1})
    pretrain(config)
    started = {"kind": "pretraining", "host": socket.gethostname(), "process": os.getppid(), "started": "now"}
    (run / ".claim.json").write_text(json.dumps(started))
    with pytest.raises(UserError, match=r"^output_dir: .* is in use by a pretraining run: process"):
        pretrain(config)


def test_many_changed_settings_are_counted(tmp_path: Path) -> None:
    start = tmp_path / "step-00000003"
    start.mkdir()
    (start / "run.json").write_text("{}")
    with pytest.raises(UserError, match=r"settings: k0 was None, is 0, .*k4 was None, is 4 and 95 more\. Repeat"):
        is_complete(start, 9, {f"k{number}": str(number) for number in range(100)})


def test_a_complete_run_only_gets_its_weights_back(images: Path, tmp_path: Path) -> None:
    config = make_config(images, tmp_path / "run", optim={"ema": 0.9}, schedule={"max_steps": 3})
    weights = pretrain(config)
    before = {name: (tmp_path / "run" / name).read_bytes() for name in ("model.safetensors", "log.jsonl")}
    averaged = load_file(tmp_path / "run" / "model_ema.safetensors")
    for name in ("model.safetensors", "model_ema.safetensors"):
        (tmp_path / "run" / name).unlink()
    assert pretrain(config, resume=True) == weights
    assert {name: (tmp_path / "run" / name).read_bytes() for name in before} == before
    again = load_file(tmp_path / "run" / "model_ema.safetensors")
    assert all(torch.equal(averaged[name], again[name]) for name in averaged)


def test_runs_of_versions_without_an_option_continue_while_it_is_off(images: Path, tmp_path: Path) -> None:
    start = tmp_path / "step-00000003"
    start.mkdir()
    old = make_config(images, tmp_path).fingerprint(13, "fp32", 1)
    for key in ("model.mask_block", "model.class_tokens", "optim.name"):
        del old[key]
    (start / "run.json").write_text(json.dumps({"fingerprint": old}))
    assert not is_complete(start, 9, make_config(images, tmp_path).fingerprint(13, "fp32", 1))
    for section, key, value in (("model", "mask_block", 2), ("model", "class_tokens", 4), ("optim", "name", "muon")):
        changed = make_config(images, tmp_path, **{section: {key: value}}).fingerprint(13, "fp32", 1)
        with pytest.raises(UserError, match=rf"other settings: {section}.{key} was \S+, is"):
            is_complete(start, 9, changed)


def test_a_run_continues_with_its_images_alone(images: Path, tmp_path: Path) -> None:
    """Wherever they are now. As many others are refused, also after the last step."""
    moved, others, run = tmp_path / "moved", tmp_path / "others", tmp_path / "run"
    shutil.copytree(images, moved)
    shutil.copytree(images, others)
    first = min(path for path in others.rglob("*") if path.is_file())
    first.rename(first.with_name(f"new_{first.name}"))
    pretrain(make_config(images, run, schedule={"max_steps": 2}))
    pretrain(make_config(moved, run, schedule={"max_steps": 3}), resume=True)
    before = sorted((path, path.stat().st_mtime_ns) for path in run.rglob("*"))
    for steps in (3, 4):
        with pytest.raises(UserError, match=r"--resume: .* other settings: names of the images was .*Repeat those"):
            pretrain(make_config(others, run, schedule={"max_steps": steps}), resume=True)
    with pytest.raises(UserError, match=r"other settings: optim\.base_lr was"):  # a complete run was not made so
        pretrain(make_config(moved, run, schedule={"max_steps": 3}, optim={"base_lr": 0.7}), resume=True)
    assert sorted((path, path.stat().st_mtime_ns) for path in run.rglob("*")) == before


def test_a_run_is_shortened_and_continues_exactly(
    images: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """4 epochs of 3 steps end after 3; whether it is stopped again or not, and is told its length again or not."""
    caplog.set_level("INFO")
    pretrain(make_config(images, tmp_path / "whole", schedule={"max_steps": 5}))
    for name, start, schedule in (
        ("told", "whole", {"shorten_to": 3, "max_steps": 7}),
        ("silent", "told", {}),
        ("told", "told", {"shorten_to": 3}),
        ("twice", "whole", {"shorten_to": 3.5, "max_steps": 7}),
        ("twice", "twice", {"shorten_to": 3}),
        ("whole", "whole", {"shorten_to": 3}),
    ):
        if name != start:
            shutil.copytree(tmp_path / start, tmp_path / name)
        pretrain(make_config(images, tmp_path / name, schedule=schedule), resume=True)
    whole = digest(tmp_path / "whole")
    assert [step for step, _, _ in whole["curve"]] == list(range(1, 10))
    assert_same(whole, digest(tmp_path / "silent"))
    assert_same(whole, digest(tmp_path / "told"))
    # Peak 0.1 * 4 / 256 / 3, warm-up 3 steps, then a cosine over 9: 4 steps in place of 7.
    places = [5 + step * 7 / 4 for step in range(4)]
    expected = [0.1 * 4 / 256 / 3 * (1 + math.cos(math.pi * (place - 3) / 9)) / 2 for place in places]
    assert [lr for _, _, lr in whole["curve"]][5:] == pytest.approx(expected, rel=1e-4)
    record = json.loads((tmp_path / "twice/checkpoints/step-00000009/run.json").read_text())
    assert record["plan"]["cuts"] == [[5, 12, 10], [7, 10, 9]]
    assert log_lines(tmp_path / "twice", "lr")[-1][0] == 9
    assert "schedule.shorten_to: the run ends after step 9, not 12. From step 5 on, the rest of" in caplog.text


@pytest.mark.parametrize(
    ("length", "message"),
    [
        (1, r"1 would end the run at step 3, but it has done 5 of .* than 1\.667 and fewer than 4 epochs\."),
        (1.6667, r"1.6667 would end the run at step 5, but"),
        (5, r"5 would end the run at step 15, but"),
    ],
)
def test_a_length_that_is_not_shorter_is_refused(images: Path, tmp_path: Path, length: float, message: str) -> None:
    run = tmp_path / "run"
    pretrain(make_config(images, run, schedule={"max_steps": 5}))
    before = sorted((path, path.stat().st_mtime_ns) for path in run.rglob("*"))
    with pytest.raises(UserError, match=rf"^schedule\.shorten_to: {message}"):
        pretrain(make_config(images, run, schedule={"shorten_to": length}), resume=True)
    assert sorted((path, path.stat().st_mtime_ns) for path in run.rglob("*")) == before


def test_only_a_run_can_be_shortened(images: Path, tmp_path: Path) -> None:
    """A new run has its length from the start; a changed record is named."""
    run = tmp_path / "run"
    with pytest.raises(UserError, match=r"^schedule\.shorten_to: there is no run to shorten\. Pass --resume in the"):
        pretrain(make_config(images, run, schedule={"shorten_to": 3}), resume=True)
    assert not run.exists()
    start = tmp_path / "step-00000003"
    start.mkdir()
    config = make_config(images, run)
    schedule = make_schedule(BatchPlan(13, 4, 0), config.optim, config.schedule)
    for cuts in ([[1, 12, 13]], [[1, 12]], [[True, 12, 9]], "no", [["1", 12, 9]], [[-1, 12, 9]]):
        (start / "run.json").write_text(json.dumps({"plan": {"cuts": cuts}}))
        with pytest.raises(UserError, match="step-00000003: its record of a shortened schedule is damaged"):
            shorten_schedule(schedule, start, None, "schedule.shorten_to")
    (start / "run.json").write_text(json.dumps({"plan": {"cuts": [[2, 30, 9]]}}))
    with pytest.raises(UserError, match=r"a run of 30 steps that was shortened, and the settings are for 12\. Repeat"):
        shorten_schedule(schedule, start, None, "schedule.shorten_to")
