"""Proves that training resumes to the bit, learns, writes what it promises, and refuses bad input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from crossmae import train as train_module
from crossmae.checkpoint import complete_checkpoints, read_state
from crossmae.config import PretrainConfig
from crossmae.errors import UserError
from crossmae.train import pretrain
from crossmae.variants import create_model


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for index in range(13):
        slope, phase = rng.uniform(-6, 6, (2, 3)), rng.uniform(0, 6, 3)
        waves = np.sin(np.einsum("kyx,kc->yxc", np.mgrid[0:1:32j, 0:1:32j], slope) + phase)
        Image.fromarray((127.5 + 127.5 * waves).astype(np.uint8)).save(folder / f"{index}.png")
    return folder


def make_config(images: Path, output: Path, **sections: Any) -> PretrainConfig:
    values: dict[str, Any] = {
        "output_dir": output,
        "data": {"train": images, "workers": 0},
        "model": {
            "name": "crossmae_vit_tiny_patch16",
            "img_size": 32,
            "patch_size": 8,
            "embed_dim": 16,
            "depth": 2,
            "num_heads": 2,
            "decoder_embed_dim": 16,
            "decoder_depth": 2,
            "decoder_num_heads": 2,
        },
        "optim": {"batch_size": 4, "base_lr": 0.1},
        "schedule": {"epochs": 4, "warmup_epochs": 1},
        "runtime": {"device": "cpu"},
        "log": {"every_steps": 1, "reconstruct_every_epochs": 100, "reconstruct_images": 2},
        "checkpoint": {"every_epochs": 1},
    }
    for section, changes in sections.items():
        values[section] = values[section] | changes if isinstance(changes, dict) else changes
    return PretrainConfig.model_validate(values)


def digest(run: Path) -> dict[str, Any]:
    """Everything that an exact resume must reproduce."""
    folder = complete_checkpoints(run)[-1]
    state = read_state(folder)
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return {
        "weights": load_file(folder / "model.safetensors"),
        "moments": state["optimizer"]["state"],
        "curve": [(line["step"], line["loss"], line["lr"]) for line in lines],
    }


def assert_same(first: dict[str, Any], second: dict[str, Any]) -> None:
    assert first["curve"] == second["curve"]
    assert first["weights"].keys() == second["weights"].keys()
    assert all(torch.equal(first["weights"][key], second["weights"][key]) for key in first["weights"])
    for index, moments in first["moments"].items():
        assert all(torch.equal(value, second["moments"][index][key]) for key, value in moments.items())


@pytest.mark.parametrize(("stop", "workers", "accumulate"), [(1, 0, 1), (3, 0, 1), (5, 2, 1), (4, 0, 2)])
def test_resume_is_exact_to_the_bit(images: Path, tmp_path: Path, stop: int, workers: int, accumulate: int) -> None:
    """A run of 3 steps per epoch (1.5 with accumulation), stopped at `stop`, equals one never stopped."""
    settings: dict[str, Any] = {"optim": {"accumulate": accumulate}, "data": {"workers": workers}}
    pretrain(make_config(images, tmp_path / "whole", **settings | {"data": {"workers": 0}}))
    pretrain(make_config(images, tmp_path / "parts", **settings, schedule={"max_steps": stop}))
    torch.manual_seed(1234)
    pretrain(make_config(images, tmp_path / "parts", **settings), resume=True)
    assert_same(digest(tmp_path / "whole"), digest(tmp_path / "parts"))


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


def test_the_loss_falls_and_everything_promised_is_written(images: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    config = make_config(
        images,
        run,
        optim={"base_lr": 1.0},
        schedule={"epochs": 30, "warmup_epochs": 2},
        checkpoint={"every_epochs": 10, "keep": 2},
    )
    weights = pretrain(config)
    losses = [json.loads(line)["loss"] for line in (run / "log.jsonl").read_text().splitlines()]
    assert len(losses) == 90
    assert np.mean(losses[-6:]) < 0.8 * np.mean(losses[:6])
    assert [folder.name for folder in complete_checkpoints(run)] == ["step-00000060", "step-00000090"]
    assert (run / "config.yaml").is_file()
    assert list((run / "tensorboard").iterdir())
    with Image.open(run / "reconstructions" / "step-00000090.png") as picture:
        assert picture.width > 300
    record = json.loads((run / "checkpoints" / "step-00000090" / "run.json").read_text())
    assert record["batches_consumed"] == 90
    assert record["config"]["optim"]["batch_size"] == 4
    assert record["versions"]["torch"] == torch.__version__
    with safe_open(weights, "pt") as file:
        metadata = file.metadata()
    assert json.loads(metadata["pixel_mean"]) == list(config.data.mean)
    rebuilt = create_model(config.model.name, **config.model.arguments())
    rebuilt.load_state_dict(load_file(weights), strict=True)
    assert json.loads(metadata["model"])["embed_dim"] == rebuilt.embed_dim


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": {"train": "nowhere"}}, "data.train: nowhere does not exist"),
        ({"data": {"val": "nowhere"}}, "data.val: nowhere does not exist"),
        ({"optim": {"batch_size": 14}}, "needs 14 images, the data set has 13"),
        ({"optim": {"accumulate": 4}}, "optim.accumulate: a step needs 4 batches"),
        ({"model": {"img_size": 30}}, "model: img_size 30 .* 24 and 32"),
        ({"model": {"predict_ratio": 0.8}}, "model: predict_ratio 0.8 exceeds mask_ratio"),
        ({"model": {"mask_ratio": 0.99}}, "model: .*0 visible"),
        ({"runtime": {"device": "cuda:99"}}, "runtime.device: 'cuda:99'"),
        ({"schedule": {"warmup_epochs": 9}}, "schedule.warmup_epochs: 9"),
    ],
)
def test_bad_input_is_named_and_nothing_is_written(
    images: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        pretrain(make_config(images, tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


def test_a_truncated_image_stops_the_run_by_name(images: Path, tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for path in images.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "7.png").write_bytes((images / "7.png").read_bytes()[:60])
    with pytest.raises(UserError, match=r"7\.png: can not be read"):
        pretrain(make_config(folder, tmp_path / "run"))
    assert not (tmp_path / "run").exists()
    with pytest.raises(UserError, match=r"7\.png: can not be read"):  # found when its turn comes
        pretrain(make_config(folder, tmp_path / "run", data={"train": folder, "check": False}))
    assert complete_checkpoints(tmp_path / "run") == []


def test_a_loss_that_is_not_finite_stops_before_anything_is_saved(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = train_module.Run.forward_backward
    nan = float("nan")
    monkeypatch.setattr(train_module.Run, "forward_backward", lambda run, batch: forward(run, batch) * nan)
    with pytest.raises(UserError, match="the loss is nan at step 1"):
        pretrain(make_config(images, tmp_path / "run"))
    assert complete_checkpoints(tmp_path / "run") == []


def test_a_used_folder_needs_resume_and_the_same_settings(images: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    pretrain(make_config(images, run, schedule={"max_steps": 1}))
    with pytest.raises(UserError, match=r"already holds a run .* --resume"):
        pretrain(make_config(images, run))
    with pytest.raises(UserError, match=r"other settings: .*optim\.base_lr was 0\.1, is 0\.2"):
        pretrain(make_config(images, run, optim={"base_lr": 0.2}), resume=True)


def test_several_processes_are_refused_for_now(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="one process"):
        pretrain(make_config(images, tmp_path / "run"))
