"""Metadata of a detector's file: config, classes, pixels and the run, so that the file alone is a detector."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import crossmae
from crossmae.checkpoints.formats.training_record import DataRecord, TrainingRecord
from crossmae.checkpoints.metadata import (
    DETECTOR_CONFIG,
    FORMAT,
    MODEL_ARGUMENTS,
    PIXEL_MEAN,
    PIXEL_STD,
    TRAINING_SIZE,
    VERSION,
)
from crossmae.errors import counted, printable
from crossmae.files import load_json
from det.classes import Classes

DETECTOR = "detector"  # the format in the metadata
OUR_BACKBONE = "build_crossmae_vitdet_backbone"
# Settings of one machine or one data set, which a file does not take along.
_LOCAL = ("DATASETS.", "DATALOADER.", "OUTPUT_DIR", "MODEL.WEIGHTS", "MODEL.DEVICE", "TIMEOUT_MINUTES")
LEAST_SCALE = 0.5  # scale of a picture, as a share of the scale in training, below which objects are lost
_RECIPE = (
    "MODEL.META_ARCHITECTURE", "MODEL.ROI_HEADS.NAME", "MODEL.MASK_ON", "MODEL.VIT.EMBED_DIM", "MODEL.VIT.DEPTH",
    "MODEL.VIT.NUM_HEADS", "MODEL.VIT.PATCH_SIZE", "MODEL.VIT.IMG_SIZE", "MODEL.VIT.WINDOW_SIZE",
    "MODEL.VIT.DROP_PATH", "MODEL.VIT.FROZEN_STAGES", "INPUT.LSJ.ENABLED", "INPUT.LSJ.SIZE",
    "INPUT.COPY_PASTE.ENABLED", "INPUT.MIN_SIZE_TRAIN", "INPUT.MIN_SIZE_TEST", "INPUT.MAX_SIZE_TEST",
    "SOLVER.MAX_ITER", "SOLVER.EPOCHS", "SOLVER.IMS_PER_BATCH", "SOLVER.ACCUMULATE", "SOLVER.BASE_LR",
    "SOLVER.REFERENCE_BATCH", "SOLVER.LAYER_DECAY", "SOLVER.WEIGHT_DECAY", "SOLVER.WARMUP_ITERS",
    "SOLVER.EMA.ENABLED", "SOLVER.AMP.ENABLED", "SEED",
)  # fmt: skip


def detector_metadata(settings: Mapping[str, Any], classes: Classes | None) -> dict[str, str]:
    """Build the metadata from which a detector can be rebuilt.

    `settings` has the values of its config by dotted key.
    """
    values = {key: value for key, value in settings.items() if not key.startswith(_LOCAL)}
    in_rgb = slice(None) if values["INPUT.FORMAT"] == "RGB" else slice(None, None, -1)
    pixels = {PIXEL_MEAN: values["MODEL.PIXEL_MEAN"], PIXEL_STD: values["MODEL.PIXEL_STD"]}
    scaled = {key: json.dumps([round(value / 255, 9) for value in pixels[key][in_rgb]]) for key in pixels}
    about = {FORMAT: DETECTOR, VERSION: crossmae.__version__, DETECTOR_CONFIG: json.dumps(values)}
    if values["MODEL.BACKBONE.NAME"] == OUR_BACKBONE:
        encoder = {"num_heads": values["MODEL.VIT.NUM_HEADS"], "img_size": values["MODEL.VIT.PRETRAIN_IMG_SIZE"]}
        about[MODEL_ARGUMENTS] = json.dumps(encoder)
    return about | scaled | (classes.metadata() if classes else {})


def training_metadata(settings: Mapping[str, Any], data: Mapping[str, str], num_images: int | None) -> dict[str, str]:
    """Build the metadata that describe a run.

    `data` has the name or the file of each split, "train" and "val". `num_images` counts the training images.
    """
    numbers = {"train": num_images}
    sets = {split: DataRecord(name=Path(name).name, images=numbers.get(split)) for split, name in data.items()}
    chosen = {key: settings[key] for key in _RECIPE if key in settings}
    recipe = {key: list(value) if isinstance(value, tuple) else value for key, value in chosen.items()}
    return TrainingRecord(data=sets, recipe=recipe).metadata()


def size_metadata(sizes: Sequence[tuple[int, int]]) -> dict[str, str]:
    """Build the metadata with the median size of training images.

    `sizes` has height and width of each image.
    """
    return {TRAINING_SIZE: json.dumps([median(size[axis] for size in sizes) for axis in (0, 1)])} if sizes else {}


def describe_shrunk(
    metadata: Mapping[str, str], sizes: Mapping[str, tuple[int, int]], shortest: int, longest: int
) -> str:
    """Describe pictures that are shrunk much more than the training images were.

    Args:
        metadata: of the detector. Without the size of the training images, the result is empty.
        sizes: height and width of pictures by name.
        shortest, longest: `INPUT.MIN_SIZE_TEST`, 0 for no resizing, and `INPUT.MAX_SIZE_TEST`.
    """
    try:
        height, width = (float(side) for side in load_json(metadata[TRAINING_SIZE]))
        usual = _scale(height, width, shortest, longest)
    except (KeyError, TypeError, ValueError, ZeroDivisionError):
        return ""
    least = LEAST_SCALE * usual
    shrunk = [name for name, size in sizes.items() if _scale(*size, shortest, longest) < least]
    if not shrunk:
        return ""
    high, wide = sizes[shrunk[0]]
    scale, number = _scale(high, wide, shortest, longest), len(shrunk)
    which = f"{number:,} of {counted(len(sizes), 'picture')}, such as " if len(sizes) > 1 else ""
    return (
        f"{which}{printable(shrunk[0])}: {wide:,} x {high:,} pixels are shrunk to {round(scale * wide):,} x "
        f"{round(scale * high):,}. The detector was trained on pictures of about {width:,.0f} x {height:,.0f} pixels, "
        "so small objects are lost. Cut large pictures into tiles of about that size first."
    )


def _scale(height: float, width: float, shortest: int, longest: int) -> float:
    """Return the factor of detectron2's resizing of the shortest edge."""
    return min(shortest / min(height, width), longest / max(height, width)) if shortest else 1.0
