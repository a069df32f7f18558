"""Small classifiers in files, for tests."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from crossmae.checkpoints.weights import save_weights
from crossmae.classification.classifier import BEST, ClassifierRecord, classifier_metadata
from crossmae.classification.vit import Architecture, build_vit

NAMES = ("blau", "grün", "rot")  # for people


def write_classifier(
    folder: Path, classes: Sequence[str], multi_label: bool = False, names: Sequence[str] = (), seed: int = 0
) -> Path:
    """The folder of a run, with a random network of 16 x 24 pixels whose answers differ from image to image."""
    torch.manual_seed(seed)
    architecture = Architecture((16, 24), 8, 3, 24, 2, 2, 2.0)
    model = build_vit(architecture, len(classes))
    torch.nn.init.normal_(model.head.weight)
    record = ClassifierRecord(
        pool="avg",
        head="linear",
        classes=tuple(classes),
        class_names=tuple(names or classes),
        multi_label=multi_label,
        mean=(0.4, 0.5, 0.6),
        std=(0.2, 0.2, 0.3),
        bit_depth=8,
        crop_pct=0.8,
    )
    metadata = classifier_metadata(architecture, record, step=7)
    folder.mkdir(parents=True, exist_ok=True)
    save_weights(folder / BEST, model.state_dict(), metadata)
    return folder
