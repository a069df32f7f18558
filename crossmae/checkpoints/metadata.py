"""The metadata of weight files: its keys, and the recorded architecture."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from crossmae.errors import UserError

# Keys of the metadata in our safetensors files; all values are strings.
FORMAT = "format"  # "crossmae": a pretraining model of this toolkit; "detectron2": a converted encoder
MODEL_ARGUMENTS = "model"  # JSON: CrossMAE(**arguments)
BIT_DEPTH = "bit_depth"  # 8, or 16 where images were read with more
PIXEL_MEAN, PIXEL_STD = "pixel_mean", "pixel_std"  # JSON lists, RGB, for pixels scaled to 0 .. 1
NORM_EPS = "norm_eps"  # epsilon of the layer norms, where it is not the next line's
NORM_EPS_OF_PLAIN = 1e-6  # of timm, the published files, detectron2's ViTDet and this toolkit
CLASSES = "classes"  # JSON list of names, in the order of the head's outputs
VERSION, STEP = "version", "step"
UNKNOWN = "unknown"  # in a converted file whose source did not record a value
# Key of the same metadata in our .pth and .pkl files, next to the tensors.
PICKLED_METADATA = "crossmae_metadata"
# JSON of the settings that a published file holds in a namespace.
PUBLISHED_ARGUMENTS = "published_args"


def recorded_arguments(metadata: Mapping[str, str]) -> dict[str, Any]:
    """Read the recorded constructor arguments of `CrossMAE`, if any."""
    text = metadata.get(MODEL_ARGUMENTS, "{}")
    with suppress(json.JSONDecodeError):
        if isinstance(arguments := json.loads(text), dict):
            return arguments
    raise UserError(f"metadata {MODEL_ARGUMENTS!r} of a weight file: expected a JSON object, got {text[:80]!r}")
