"""Metadata of a detector's file: config, classes, pixels and the run, so that the file alone is a detector."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import crossmae
from crossmae.checkpoints.formats.training_record import DataRecord, TrainingRecord
from crossmae.checkpoints.metadata import (
    DETECTOR_CONFIG,
    FORMAT,
    MODEL_ARGUMENTS,
    PIXEL_MEAN,
    PIXEL_STD,
    VERSION,
)
from det.classes import Classes

DETECTOR = "detector"  # the format in the metadata
OUR_BACKBONE = "build_crossmae_vitdet_backbone"
# Settings of one machine or one data set, which a file does not take along.
_LOCAL = ("DATASETS.", "DATALOADER.", "OUTPUT_DIR", "MODEL.WEIGHTS", "MODEL.DEVICE", "TIMEOUT_MINUTES")
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
