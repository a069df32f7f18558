"""Keys of the metadata of weight files, and the recorded model arguments."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from crossmae.errors import UserError

# Keys of the metadata in safetensors files of this toolkit. All values are strings.
FORMAT = "format"  # "crossmae": a pretraining model of this toolkit; "detectron2": a converted encoder
MODEL_ARGUMENTS = "model"  # JSON: CrossMAE(**arguments)
BIT_DEPTH = "bit_depth"  # bits per channel of the training images, 8 or 16
PIXEL_MEAN, PIXEL_STD = "pixel_mean", "pixel_std"  # JSON lists, RGB, for pixels scaled to 0 .. 1
NORM_EPS = "norm_eps"  # epsilon of the layer norms, recorded where it differs from NORM_EPS_OF_PLAIN
NORM_EPS_OF_PLAIN = 1e-6  # epsilon in timm, the published files, detectron2's ViTDet and this toolkit
CLASSES = "classes"  # JSON list of names, in the order of the head's outputs
VERSION, STEP = "version", "step"
UNKNOWN = "unknown"  # value in a converted file whose source did not record the value
# Key of the metadata in .pth and .pkl files of this toolkit, next to the tensors.
PICKLED_METADATA = "crossmae_metadata"
# Key of the settings in a published file's `args` namespace, as JSON.
PUBLISHED_ARGUMENTS = "published_args"


def recorded_arguments(metadata: Mapping[str, str]) -> dict[str, Any]:
    """Return the recorded constructor arguments of `CrossMAE`, {} without a record.

    Raises UserError if the record is not a JSON object.
    """
    text = metadata.get(MODEL_ARGUMENTS, "{}")
    with suppress(json.JSONDecodeError):
        if isinstance(arguments := json.loads(text), dict):
            return arguments
    raise UserError(f"metadata {MODEL_ARGUMENTS!r} of a weight file: expected a JSON object, got {text[:80]!r}")
