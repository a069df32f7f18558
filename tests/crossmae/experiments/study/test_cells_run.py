"""Proves that one cell of each kind runs to its numbers: two steps on tiny made-up pictures."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from crossmae.data.sources.idx import IMAGES, LABELS
from crossmae.experiments.cells import Cell, run_cells
from crossmae.experiments.rows import Row
from crossmae.experiments.study.arms import DETECTION_CPU, DETECTION_GPU15, FASHION_MODEL, DetectionSettings
from crossmae.experiments.study.detection import detection_cells
from crossmae.experiments.study.fashion_mnist import SOURCE
from crossmae.experiments.study.grid import GPU15, study_cells
from crossmae.experiments.study.idx_subset import write_idx
from crossmae.models.crossmae import CrossMAE
from crossmae.models.sizes import model_arguments
from crossmae.pretraining.config import load_config
from det.config import load_det_config

SHORT = {
    "tools/pretrain.py": ("schedule.max_steps=2", "validation.images=8", "data.check=false"),
    "tools/finetune.py": ("schedule.max_steps=2", "data.per_class=10", "data.check=false"),
    "tools/probe.py": (
        "linear.epochs=1",
        "linear.warmup_epochs=0",
        "linear.seeds=[0]",
        "knn.k=[5]",
        "data.check=false",
    ),
    "tools/train_net.py": ("SOLVER.MAX_ITER=2", "SOLVER.WARMUP_ITERS=1", "SOLVER.IMS_PER_BATCH=2"),
    "crossmae.experiments.study.idx_subset": ("--per-class", "13"),
    "crossmae.experiments.study.decoder_cost": ("--rounds", "1", "--sizes", "fashion_mnist"),
}


def shortened(cells: Sequence[Cell], names: Sequence[str]) -> list[Cell]:
    """Choose cells, and shorten their commands. Random weights stay what they are."""
    chosen = []
    for cell in (cell for cell in cells if cell.name in names):
        steps = []
        for step in cell.steps:
            words = SHORT.get(step.arguments[step.arguments[0] == "-m"], ())
            is_random = "schedule.max_steps=0" in step.arguments
            kept = [word for word in words if not (is_random and word.startswith("schedule."))]
            steps.append(replace(step, arguments=(*step.arguments, *kept)))
        chosen.append(replace(cell, steps=tuple(steps)))
    assert [cell.name for cell in chosen] == list(names)
    return chosen


def numbers(rows: Sequence[Row]) -> Mapping[str, Mapping[str, float]]:
    return {row.cell: row.numbers for row in rows}


def write_pictures(folder: Path, per_class: int = 13) -> None:
    """Write a data set like Fashion-MNIST."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for split in ("train", "t10k"):
        labels = np.repeat(np.arange(10, dtype=np.uint8), per_class)
        images = rng.integers(0, 80, (len(labels), 28, 28), dtype=np.uint8) + labels[:, None, None] * 15
        write_idx(folder / f"{split}-{IMAGES}.gz", images.astype(np.uint8))
        write_idx(folder / f"{split}-{LABELS}.gz", labels)


@pytest.mark.slow
def test_fashion_mnist(tmp_path: Path) -> None:
    write_pictures(tmp_path / SOURCE)
    cells = study_cells(tmp_path, ["fashion_mnist"])
    names = ["fashion-subset", "fashion-rate-mae_d4-lr0.001", "fashion-pretrain-random-seed1"]
    names += ["fashion-finetune-random-seed1", "fashion-probe-random-seed1"]
    found = numbers(run_cells(shortened(cells, names), tmp_path / "results.jsonl"))
    rate, start = found["fashion-rate-mae_d4-lr0.001"], found["fashion-pretrain-random-seed1"]
    assert rate.keys() >= {"knn_train", "val_loss"}
    assert start["pretraining_tflop"] == 0
    assert 0 <= found["fashion-finetune-random-seed1"]["top1"] <= 100
    assert found["fashion-probe-random-seed1"].keys() == {"knn", "knn_train", "linear"}
    # Random weights are exactly the weights that a model of this seed starts with.
    torch.manual_seed(1)
    model = CrossMAE(**FASHION_MODEL, decoder_depth=6).state_dict()
    weights = load_file(tmp_path / "fashion_mnist" / "random-1" / "pretrain" / "model.safetensors")
    assert all(torch.equal(weights[name], tensor) for name, tensor in model.items())


@pytest.mark.usefixtures("in_process")
def test_decoders(tmp_path: Path) -> None:
    found = numbers(
        run_cells(shortened(study_cells(tmp_path, ["decoder"]), ["decoder-cost"]), tmp_path / "results.jsonl")
    )
    assert found["decoder-cost"]["fashion_mnist_d6_25_ratio"] == pytest.approx(2.405, abs=0.001)


def write_things(folder: Path, size: int = 128) -> None:
    """Write a detection data set like the one of tools/make_study_data.py."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 20), ("val", 3), ("pretrain", 70)):
        (folder / split).mkdir(parents=True)
        images, annotations = [], []
        for index in range(count):
            pixels = rng.integers(0, 255, (size, size, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / split / f"{index:06}.jpg")
            images.append({"id": index + 1, "file_name": f"{index:06}.jpg", "width": size, "height": size})
            box = [20, 30, 40, 50]
            polygon = [20, 30, 60, 30, 60, 80, 20, 80]
            about = {"id": index + 1, "image_id": index + 1, "category_id": index % 2 + 1, "iscrowd": 0, "area": 2000}
            annotations.append(about | {"bbox": box, "segmentation": [polygon]})
        categories = [{"id": 1, "name": "bird"}, {"id": 2, "name": "coin"}]
        content = {"images": images, "annotations": annotations, "categories": categories}
        (folder / "annotations").mkdir(exist_ok=True)
        (folder / "annotations" / f"{split}.json").write_text(json.dumps(content))
    settings = {"train": 20, "val": 3, "pretrain": 70, "size": size}
    (folder / "manifest.json").write_text(json.dumps({"settings": settings}))


def run_detection(folder: Path, settings: DetectionSettings, arm: str) -> Mapping[str, Mapping[str, float]]:
    write_things(folder / settings.part / "things")
    part, seed = settings.part, settings.seeds[0]
    names = [f"{part}-data", f"{part}-labels-seed{seed}", f"{part}-pretrain-{arm}-seed{seed}"]
    names.append(f"{part}-detect-{arm}-share{settings.shares[0]:g}-seed{seed}")
    data, *cells = shortened(detection_cells(folder, settings), names)
    cells = [replace(data, steps=()), *cells]  # the pictures are there
    return numbers(run_cells(cells, folder / "results.jsonl"))


@pytest.mark.usefixtures("in_process")
def test_detection(tmp_path: Path) -> None:
    found = run_detection(tmp_path, DETECTION_CPU, "mae")
    assert found["detection-labels-seed0"] == {"train-share10-seed0.json": 2, "train-share100-seed0.json": 20}
    assert found["detection-pretrain-mae-seed0"]["pretraining_tflop"] > 0
    assert found["detection-detect-mae-share10-seed0"].keys() >= {"mask_AP", "box_AP"}


def test_the_commands_of_the_preset_are_valid(tmp_path: Path) -> None:
    cells = [cell for cell in study_cells(tmp_path, [GPU15]) if cell.facts["kind"] in ("detection_pretrain", "detect")]
    for words in (cell.steps[0].arguments for cell in cells):
        config, settings = words[2], [word for word in words[3:] if "=" in word]
        if words[0] == "tools/pretrain.py":
            model = load_config(config, settings).model
            built = model_arguments(model.name) | model.arguments()
            assert {key: built[key] for key in DETECTION_GPU15.model} == dict(DETECTION_GPU15.model)
        else:
            cfg = load_det_config(config, settings)
            sizes = (cfg.MODEL.VIT.EMBED_DIM, cfg.MODEL.VIT.DEPTH, cfg.MODEL.VIT.PATCH_SIZE, cfg.MODEL.VIT.IMG_SIZE)
            assert sizes == (384, 12, 16, 224)


@pytest.mark.slow
def test_the_preset_in_two_steps(tmp_path: Path) -> None:
    words = (*DETECTION_GPU15.pretrain_words, "data.workers=0", "optim.batch_size=2", "schedule.warmup_epochs=1")
    settings = replace(DETECTION_GPU15, pretrain_words=words)
    found = run_detection(tmp_path, settings, "cross25")
    assert found["gpu15-detect-cross25-share10-seed0"].keys() >= {"mask_AP", "box_AP"}
