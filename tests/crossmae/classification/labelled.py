"""Labelled images for tests: one folder per class, classes that a tiny network can tell apart by their colour."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = ("blue", "green", "red")  # sorted, as sources sort them


def write_classes(folder: Path, per_class: int = 8, side: int = 40, seed: int = 0) -> Path:
    """`folder`/<class>/<number>.png: noise, brighter in the channel of the class."""
    rng = np.random.default_rng(seed)
    for channel, name in zip((2, 1, 0), CLASSES, strict=True):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for number in range(per_class):
            pixels = rng.integers(0, 120, (side, side + 8, 3))
            pixels[..., channel] += 120
            Image.fromarray(pixels.astype(np.uint8)).save(folder / name / f"{number}.png")
    return folder
