"""A question whose runs take seconds: tiny configs on noise, for the tests of worth."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from crossmae.experiments.worth.grid import Preset, Question
from crossmae.experiments.worth.inputs import LabelledPart, prepare_labels

PRETRAIN: dict[str, Any] = {
    "data": {"train": "IMAGES", "workers": 0},
    "model": {
        "name": "crossmae_vit_tiny_patch16",
        "img_size": 32,
        "patch_size": 8,
        "embed_dim": 24,
        "depth": 2,
        "num_heads": 2,
        "decoder_embed_dim": 16,
        "decoder_depth": 1,
        "decoder_num_heads": 2,
    },
    "optim": {"batch_size": 4},
    "schedule": {"epochs": 2, "warmup_epochs": 1},
    "runtime": {"device": "cpu"},
}
CLASSIFY = {"data": {"workers": 0, "auto_augment": None}, "model": {"drop_path": 0.0}, "runtime": {"device": "cpu"}}


def tiny_preset(folder: Path, detect: str = "{}") -> Preset:
    """Write the configs of a tiny model."""
    folder.mkdir(exist_ok=True)
    for name, values in (("pretrain", PRETRAIN), ("classify", CLASSIFY)):
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(values))
    (folder / "detect.yaml").write_text(detect)
    names = [str(folder / f"{name}.yaml") for name in ("pretrain", "detect", "classify")]
    return Preset(*names, 2, (4, 4), (3, 3))


def ask(
    folder: Path,
    images: Path,
    labels: LabelledPart,
    preset: Preset,
    arms: tuple[str, ...],
    shares: tuple[float, ...] = (50.0, 100.0),
    seeds: tuple[int, ...] = (0,),
    val: LabelledPart | None = None,
) -> Question:
    """Prepare a question in a folder."""
    found = prepare_labels(labels, val, images, shares, seeds, folder / "labels")
    return Question(images, 20, found, folder, preset, arms, shares, seeds)
