"""Proves that crops are chosen alike for CPU and device, and that a run trains on the device's crops."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data._utils.pin_memory import pin_memory
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as VF

from crossmae.data.batches import BatchPlan, build_loader
from crossmae.data.broken import Unreadable
from crossmae.data.sources import open_source
from crossmae.errors import UserError
from crossmae.pretraining.images import (
    Batch,
    DecodedCrops,
    PackedBatch,
    PretrainImages,
    collate_decoded,
    collate_pretraining,
    images_on,
)
from crossmae.pretraining.train import pretrain
from crossmae.training.resume import is_complete
from tests.crossmae.pretraining.runs import assert_same, digest, judged, log_lines, make_config

SIZE = (24, 40)
CPU = torch.device("cpu")
ON_DEVICE = {"crop_on": "device"}


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """JPEG and PNG files of different sizes."""
    folder = tmp_path_factory.mktemp("mixed")
    draw = np.random.default_rng(3)
    for number, shape in enumerate([(60, 80), (75, 50), (200, 30), (3, 4), (1, 90), (30, 30), (33, 120), (90, 91)]):
        pixels = Image.fromarray(draw.integers(0, 256, (*shape, 3), np.uint8))
        pixels.save(folder / f"{number}.{'jpg' if number % 2 else 'png'}")
    return folder


def images_of(
    kind: type[PretrainImages], folder: Path, bit_depth: int = 8, broken: Literal["error", "substitute"] = "error"
) -> PretrainImages:
    return kind(open_source(folder, "data.train"), SIZE, 15, (0.2, 1.0), 0.5, 7, 3, bit_depth, broken)


@pytest.mark.parametrize("bit_depth", [8, 16])
def test_boxes_flips_and_noise_are_those_of_the_cpu(mixed: Path, bit_depth: int) -> None:
    """Resized by torchvision, the crops are the views of the CPU to the bit."""
    whole, cut = (images_of(kind, mixed, bit_depth) for kind in (PretrainImages, DecodedCrops))
    flips = set()
    for epoch in range(3):
        for index in range(len(whole)):
            (view, noise, *about), (part, *others) = whole[epoch, index], cut[epoch, index]
            assert isinstance(view, Tensor)
            pixels = part.pixels.permute(2, 0, 1)
            bicubic = InterpolationMode.BICUBIC
            resized = VF.resize(pixels, list(SIZE), interpolation=bicubic, antialias=True)
            resized = resized.clamp(0, 1) if bit_depth == 16 else resized
            assert torch.equal(VF.horizontal_flip(resized) if part.is_flipped else resized, view)
            assert torch.equal(others[0], noise)
            assert others[1:] == about
            flips.add(part.is_flipped)
    assert flips == {False, True}


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_those_of_the_cpu_to_two_grey_levels(mixed: Path, workers: int) -> None:
    plan = BatchPlan(8, 4, 7)

    def read(kind: type[PretrainImages], collate: Any) -> list[Any]:
        return list(build_loader(images_of(kind, mixed), plan, 1, 4, workers, False, collate))

    expected = read(PretrainImages, collate_pretraining)
    found = read(DecodedCrops, lambda samples: collate_decoded(SIZE, samples))
    for batch, packed in zip(expected, found, strict=True):
        assert isinstance(batch, Batch)
        assert isinstance(packed, PackedBatch)
        views = images_on(CPU, packed.images)
        assert (views.int() - images_on(CPU, batch.images).int()).abs().max() <= 2
        assert torch.equal(packed.noise, batch.noise)
        assert torch.equal(packed.indices, batch.indices)


def test_a_spawned_worker_reads_the_batches_of_a_forked_one(mixed: Path, start_method: Callable[[str], None]) -> None:
    """As on macOS and Windows. What crops on the device need is sent, too."""
    plan = BatchPlan(8, 4, 7)
    found = []
    for method in ("fork", "spawn"):
        start_method(method)
        loader = build_loader(images_of(PretrainImages, mixed), plan, 0, 3, 1, False, collate_pretraining)
        found.append([[part.numpy() for part in batch[:3]] for batch in loader])
    assert len(found[0]) == 3
    np.testing.assert_equal(found[1], found[0])
    sent, collate = pickle.loads(pickle.dumps((images_of(DecodedCrops, mixed), partial(collate_decoded, SIZE))))
    packed = [collate([images[0, index] for index in range(4)]) for images in (sent, images_of(DecodedCrops, mixed))]
    assert torch.equal(packed[0].images.pixels, packed[1].images.pixels)
    assert torch.equal(packed[0].noise, packed[1].noise)


def test_a_batch_keeps_its_parts_when_its_memory_is_pinned(mixed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    samples = [images_of(DecodedCrops, mixed)[0, index] for index in range(4)]
    batch = collate_decoded(SIZE, samples)
    assert isinstance(batch, PackedBatch)
    pinned: list[Tensor] = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor, *_: pinned.append(tensor) or tensor.clone())
    copy = pin_memory(batch)
    assert len(pinned) == 4  # pixels, table, noise, indices
    assert torch.equal(images_on(CPU, copy.images), images_on(CPU, batch.images))
    assert torch.equal(copy.indices, batch.indices)


def test_broken_images_are_named_or_replaced_as_on_the_cpu(mixed: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(mixed, tmp_path / "images")
    (folder / "2.png").write_bytes(b"\x89PNG nothing")
    unreadable = images_of(DecodedCrops, folder)[0, 2]
    assert isinstance(unreadable, Unreadable)
    assert collate_decoded(SIZE, [images_of(DecodedCrops, folder)[0, 1], unreadable]) is unreadable
    part, noise, position, broken = images_of(DecodedCrops, folder, broken="substitute")[0, 2]  # type: ignore[misc]
    assert (position, [one.index for one in broken]) == (3, [2])
    assert torch.equal(noise, images_of(PretrainImages, folder, broken="substitute")[0, 2][1])  # type: ignore[index]
    assert part.pixels.shape[2] == 3


def test_a_run_trains_as_on_the_cpu_and_resumes_to_the_bit(images: Path, labelled: Path, tmp_path: Path) -> None:
    """Held-out loss and neighbours of the first step do not depend on the place of cropping."""
    settings = judged(labelled)

    def config(run: str, crop_on: str, **more: Any) -> Any:
        return make_config(
            images, tmp_path / run, **settings | {"data": settings["data"] | {"crop_on": crop_on}} | more
        )

    pretrain(config("cpu", "cpu"))
    pretrain(config("whole", "device"))
    pretrain(config("parts", "device", schedule={"max_steps": 7}))
    pretrain(config("parts", "device"), resume=True)
    assert_same(digest(tmp_path / "whole"), digest(tmp_path / "parts"))
    losses = [np.array([loss for _, loss in log_lines(tmp_path / run, "loss")]) for run in ("cpu", "whole")]
    assert not np.array_equal(*losses)
    np.testing.assert_allclose(*losses, rtol=0.02)
    for key in ("val_loss", "knn_accuracy"):
        assert log_lines(tmp_path / "cpu", key)[0] == log_lines(tmp_path / "whole", key)[0]


def test_broken_images_are_counted_and_workers_change_nothing(images: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(images, tmp_path / "images")
    (folder / "3.png").write_bytes(b"\x89PNG nothing")
    data = ON_DEVICE | {"broken": "substitute", "broken_budget": 0.2, "check": False}
    for name, workers in (("one", 0), ("two", 1)):
        pretrain(make_config(folder, tmp_path / name, data=data | {"workers": workers}))
        (row,) = map(json.loads, (tmp_path / name / "broken.jsonl").read_text().splitlines())
        assert Path(row["name"]).name == "3.png"
    assert_same(digest(tmp_path / "one"), digest(tmp_path / "two"))
    with pytest.raises(UserError, match=r"3\.png: cannot be read.* data\.broken=substitute"):
        pretrain(make_config(folder, tmp_path / "three", data=ON_DEVICE | {"check": False}))


@pytest.mark.parametrize(("channels", "bit_depth"), [(1, 8), (1, 16), (4, 16)])
def test_other_channels_and_bit_depths_train(tmp_path: Path, channels: int, bit_depth: int) -> None:
    (tmp_path / "images").mkdir()
    draw = np.random.default_rng(0)
    for index in range(8):
        pixels = draw.integers(0, 256, (40, 24, channels), np.uint8)
        Image.fromarray(pixels.squeeze()).save(tmp_path / f"images/{index}.png")
    data = {"mean": [0.5] * channels, "std": [0.3] * channels, "bit_depth": bit_depth}
    losses = []
    for crop_on in ("cpu", "device"):
        more: dict[str, Any] = {"model": {"in_chans": channels, "img_size": [40, 24]}, "schedule": {"max_steps": 2}}
        pretrain(make_config(tmp_path / "images", tmp_path / crop_on, data=data | {"crop_on": crop_on}, **more))
        losses.append([loss for _, loss in log_lines(tmp_path / crop_on, "loss")])
    assert losses[0] == pytest.approx(losses[1], rel=0.01 if bit_depth == 8 else 1e-3)


def test_the_place_of_cropping_does_not_change_within_a_run(tmp_path: Path) -> None:
    """Checkpoints of versions without the key were cropped on the CPU."""
    start = tmp_path / "checkpoints" / "step-00000003"
    start.mkdir(parents=True)
    (start / "run.json").write_text('{"fingerprint": {}}')
    assert not is_complete(start, 9, {"data.crop_on": '"cpu"'})
    with pytest.raises(UserError, match=r'data\.crop_on was "cpu", is "device"'):
        is_complete(start, 9, {"data.crop_on": '"device"'})
