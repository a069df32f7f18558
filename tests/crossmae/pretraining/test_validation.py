"""Proves the held-out loss, the online probe, and when the health check warns."""

from __future__ import annotations

import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from crossmae.data.sources import open_source
from crossmae.errors import UserError
from crossmae.pretraining import train as train_module
from crossmae.pretraining.train import pretrain
from crossmae.pretraining.validation import LEAST_STEPS, Health, load_views
from tests.crossmae.pretraining.runs import build, judged, log_lines, make_config

BAND = ((0.2, 0.6, 0.8), (1.0, 0.3, 0.5))


def test_above_the_band_is_told_once_until_it_is_over() -> None:
    health = Health(BAND, "the demo's data", normalised=True, warmup=0.1, steps=1000)
    assert health.warnings(0.1, 1.5, 1.5) == []  # before the first row nothing is expected
    (text,) = health.warnings(0.2, 0.81, 1.5)
    assert "0.810 at 20% of the schedule, is above the band 0.600 to 0.800" in text
    assert "the demo's data" in text
    assert health.warnings(0.3, 0.9, 1.5) == []
    assert health.warnings(0.6, 0.6, 1.5) == []
    assert len(health.warnings(0.6, 0.66, 1.5)) == 1
    assert health.warnings(0.6, 0.1, 1.5) == []  # below is no trouble


def test_limits_are_interpolated_between_rows() -> None:
    health = Health(BAND, "", normalised=True, warmup=0.0, steps=1000)
    assert health.limits(0.1) is None
    for share, low, high in ((0.2, 0.6, 0.8), (0.6, 0.45, 0.65), (1.0, 0.3, 0.5)):
        found = health.limits(share)
        assert found is not None
        assert abs(found[0] - low) + abs(found[1] - high) < 1e-9


def test_a_loss_that_does_not_move_is_told_after_the_warm_up() -> None:
    normalised = Health((), "", normalised=True, warmup=0.1, steps=1000)
    assert normalised.warnings(0.01, 1.8, 1.8) == []
    assert normalised.warnings(0.15, 1.0, 1.8) == []  # still warming up
    (text,) = normalised.warnings(0.25, 0.99, 1.8)  # fell from 1.8, but predicts no more than the mean
    assert "did not move" in text
    assert normalised.warnings(0.3, 0.99, 1.8) == []
    assert normalised.warnings(0.4, 0.9, 1.8) == []
    pixels = Health((), "", normalised=False, warmup=0.0, steps=1000)
    assert pixels.warnings(0.01, 0.2, 0.2) == []
    assert len(pixels.warnings(0.1, 0.199, 0.2)) == 1
    assert pixels.warnings(0.2, 0.15, 0.2) == []


@pytest.mark.parametrize("warmup", [0, 30, 300])
@pytest.mark.parametrize("steps", [1, 12, 100, 129, 400, 10_000])
def test_a_loss_that_stays_is_told_only_after_enough_steps_at_the_full_rate(steps: int, warmup: int) -> None:
    """A loss that never moves, in every step of runs of different lengths: at most one warning, and never too early."""
    warmup = min(warmup, steps)
    health = Health(((0.0, 0.6, 0.8),), "", normalised=True, warmup=warmup / steps, steps=steps)
    told = {step: health.warnings(step / steps, 1.2, 1.3) for step in range(1, steps + 1)}
    stuck = [step for step, texts in told.items() if any("did not move" in text for text in texts)]
    above = [step for step, texts in told.items() if any("above the band" in text for text in texts)]
    first = max(warmup + LEAST_STEPS, 2 * warmup, steps / 10)
    assert stuck == ([math.ceil(first)] if first <= steps else [])
    assert above == ([LEAST_STEPS] if steps >= LEAST_STEPS else [])


def test_validation_and_probe_start_before_training_and_are_the_same_in_every_run(
    images: Path, labelled: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Fixed masks and crops: with another batch size, equal weights have an equal held-out loss."""
    for name, optim in (("one", {"batch_size": 4}), ("other", {"batch_size": 3, "accumulate": 2})):
        with caplog.at_level("INFO"):
            pretrain(make_config(images, tmp_path / name, **judged(labelled), optim=optim))
    one, other = (log_lines(tmp_path / name, "val_loss") for name in ("one", "other"))
    assert [step for step, _ in one] == [0, 6, 12]
    assert one[0][1] == pytest.approx(other[0][1], rel=1e-5)
    assert one[-1][1] < one[0][1]
    accuracies = log_lines(tmp_path / "one", "knn_accuracy")
    assert [step for step, _ in accuracies] == [0, 6, 12]
    assert all(0 <= value <= 1 for _, value in accuracies)
    assert "validation loss: " in caplog.text
    assert "kNN accuracy: " in caplog.text
    pictures = {
        f"{folder}/{path.stem}"
        for folder in ("reconstructions", "fusion")
        for path in (tmp_path / "one" / folder).iterdir()
    }
    steps = (0, 5, 10, 12)
    assert pictures == {f"{name}/step-{step:08d}" for name in ("reconstructions", "fusion") for step in steps}


def test_the_default_neighbours_of_a_small_probe_are_all_its_images(
    images: Path, labelled: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A value of the user's that is too large is an error: see the tests of bad input."""
    probe = {"train": str(labelled / "train"), "val": str(labelled / "val"), "images": 4}
    config = make_config(images, tmp_path / "run", probe=probe, schedule={"max_steps": 1})
    assert config.probe.k == 20
    pretrain(config)
    assert "probe.k: 20 neighbours of 4 images in probe.train. The probe uses all" in caplog.messages
    assert len(log_lines(tmp_path / "run", "knn_accuracy")) == 2


def test_a_broken_image_has_whole_advice(images: Path, tmp_path: Path) -> None:
    folder = tmp_path / "broken"
    shutil.copytree(images, folder)
    first = sorted(folder.rglob("*.png"))[0]
    first.write_bytes(first.read_bytes()[:60])
    model = build(make_config(images, tmp_path))
    with pytest.raises(UserError) as caught:
        load_views(open_source(folder, "data.train"), [0], model, 8, "data.train")
    assert re.search(r"\. Repair or remove it, or set data\.broken=substitute\.$", str(caught.value))
    with pytest.raises(UserError, match=r"Repair or remove it: what is evaluated on is never replaced\.$"):
        load_views(open_source(folder, "data.val"), [0], model, 8, "data.val")


def test_the_held_out_loss_is_the_mean_over_all_masked_patches(images: Path, labelled: Path, tmp_path: Path) -> None:
    """Equal to one forward pass over everything, whatever the batches and the predict ratio."""
    config = make_config(images, tmp_path / "run", **judged(labelled), schedule={"max_steps": 1})
    weights = pretrain(config)
    model = build(config)
    model.load_state_dict(load_file(weights))
    paths = sorted((labelled / "val").rglob("*.png"))
    pixels = torch.stack([torch.from_numpy(np.asarray(Image.open(path))).permute(2, 0, 1) for path in paths]) / 255
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (config.data.mean, config.data.std))
    noise = np.stack([np.random.default_rng([0, i]).random(16, dtype=np.float32) for i in range(len(paths))])
    expected = model((pixels - mean) / std, 0.75, 0.75, torch.from_numpy(noise)).loss.item()
    assert log_lines(tmp_path / "run", "val_loss")[-1][1] == pytest.approx(expected, rel=1e-4)


def test_a_resumed_run_knows_its_first_loss(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or the health check would take a loss that fell long ago for one that does not move."""
    firsts: set[float] = set()

    class Spy(train_module.Health):
        def warnings(self, share: float, loss: float, first: float) -> list[str]:
            firsts.add(first)
            return super().warnings(share, loss, first)

    monkeypatch.setattr(train_module, "Health", Spy)
    pretrain(make_config(images, tmp_path / "run", schedule={"max_steps": 6}))
    pretrain(make_config(images, tmp_path / "run"), resume=True)
    assert firsts == {log_lines(tmp_path / "run", "loss")[0][1]}
