"""The config.json in a timm folder: read as the metadata of a weight file, and built for a written folder.

config.json is not trusted, because it can make timm's `create_model` open URLs, other folders and pickles. Only names
of timm's models and arguments of a plain ViT are passed to timm. timm's own writer (`save_for_hf`) is not used, because
it needs a model.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from crossmae.checkpoints.metadata import (
    CLASSES,
    MODEL_ARGUMENTS,
    NORM_EPS,
    PIXEL_MEAN,
    PIXEL_STD,
    recorded_names,
    recorded_numbers,
)
from crossmae.checkpoints.reading.files import HUB_CONFIG, HUB_FILES
from crossmae.errors import UserError
from crossmae.files import read_json

POOL = "pool"  # metadata key of the pooling before the head; the values are timm's
_ARCHITECTURE = "vit_base_patch16_224"  # used for every size, because all its arguments are given
_MOST_BLOCKS = 100
_EXPECTED = "Use weights of a plain ViT with GELU."
_SIZES = ("embed_dim", "depth", "num_heads", "patch_size", "in_chans", "mlp_ratio")
# Allowed arguments of timm's VisionTransformer. Dropout rates are allowed, because they have no effect on evaluation.
_KNOWN = {
    *_SIZES, "img_size", "num_classes", "global_pool", "fc_norm", "class_token", "no_embed_class", "init_values",
    "reg_tokens", "dynamic_img_size", "final_norm", "drop_rate", "pos_drop_rate", "patch_drop_rate", "proj_drop_rate",
    "attn_drop_rate", "drop_path_rate",
}  # fmt: skip


def timm_metadata(folder: Path) -> dict[str, str]:
    """Return the content of timm's config.json as metadata, {} without the file.

    Raises UserError if config.json does not describe a plain ViT.
    """
    settings = _read(folder)
    if settings is None:
        return {}
    pretrained = settings.get("pretrained_cfg")
    pretrained = pretrained if isinstance(pretrained, dict) else {}
    model = timm_model(folder, depth=1)
    sides = list(model.patch_embed.img_size)
    recorded = {"num_heads": model.blocks[0].attn.num_heads, "img_size": sides[0] if sides[0] == sides[1] else sides}
    metadata = {MODEL_ARGUMENTS: json.dumps(recorded), POOL: model.global_pool or "none"}
    metadata[NORM_EPS] = str(model.blocks[0].norm1.eps)
    for key, name in ((PIXEL_MEAN, "mean"), (PIXEL_STD, "std")):
        values = pretrained.get(name)
        if isinstance(values, list) and all(isinstance(value, float | int) for value in values):
            metadata[key] = json.dumps(values)
    names = settings.get("label_names", pretrained.get("label_names"))
    if isinstance(names, list) and all(isinstance(name, str) for name in names):
        metadata[CLASSES] = json.dumps(names, ensure_ascii=False)
    return metadata


def timm_model(folder: Path, depth: int | None = None) -> Any:
    """Build the plain ViT that a timm folder names, with random weights.

    Args:
        folder: folder with timm's config.json.
        depth: number of blocks to build; None builds all blocks.

    Raises:
        UserError: config.json does not describe a plain ViT.
    """
    path, settings = folder / HUB_CONFIG, _read(folder) or {}
    name, given = settings.get("architecture"), settings.get("model_args") or {}
    if not isinstance(name, str) or not timm.is_model(name):
        raise UserError(f"{path}: the architecture {name!r} is not a model of timm. {_EXPECTED}")
    if not isinstance(given, dict) or (unknown := sorted(given.keys() - _KNOWN)):
        found = ", ".join(f"{key}={given[key]}"[:80] for key in unknown) if isinstance(given, dict) else str(given)[:80]
        raise UserError(f"{path}: model_args has {found}, which a plain ViT does not have. {_EXPECTED}")
    arguments = {key: value for key, value in given.items() if key != "num_classes"}
    arguments |= {"depth": depth} if depth else {}
    wanted = arguments.get("depth", 1)
    if not (isinstance(wanted, int) and 0 < wanted <= _MOST_BLOCKS):
        raise UserError(f"{path}: depth is {wanted}. Give a number of blocks from 1 to {_MOST_BLOCKS}.")
    try:
        with torch.random.fork_rng(devices=[]):
            classes = settings.get("num_classes", 0)
            model: Any = timm.create_model(name, pretrained=False, num_classes=classes, **arguments)
    except Exception as error:  # timm's constructors raise various types for wrong arguments
        raise UserError(f"{path}: {name} cannot be built ({str(error)[:200]}). {_EXPECTED}") from None
    plain = isinstance(model, VisionTransformer) and all(type(block) is Block for block in model.blocks)
    if not plain or type(model.blocks[0].mlp.act) is not nn.GELU:
        raise UserError(f"{path}: {name} has other blocks or another activation. {_EXPECTED}")
    return model


def timm_config(
    tensors: Mapping[str, Tensor], arguments: Mapping[str, Any], metadata: Mapping[str, str]
) -> dict[str, Any]:
    """Build the config.json for `timm.create_model("local-dir:FOLDER", pretrained=True)`.

    Args:
        tensors: tensors of the file, under plain names.
        arguments: constructor arguments of `ViTEncoder`.
        metadata: metadata of the file. Pixel statistics and class names are copied if they are known.
    """
    size = arguments["img_size"]
    sides = [size, size] if isinstance(size, int) else list(size)
    classes = len(tensors["head.weight"]) if "head.weight" in tensors else 0
    pool = "avg" if "fc_norm.weight" in tensors or "cls_token" not in tensors else "token"
    given = {key: arguments[key] for key in _SIZES} | {"img_size": sides, "class_token": "cls_token" in tensors}
    given |= {"fc_norm": "fc_norm.weight" in tensors, "global_pool": pool}
    pretrained: dict[str, Any] = {"input_size": [arguments["in_chans"], *sides], "fixed_input_size": True}
    pretrained |= {"num_classes": classes, "first_conv": "patch_embed.proj", "classifier": "head"}
    for key, name in ((PIXEL_MEAN, "mean"), (PIXEL_STD, "std")):
        if metadata.get(key, "").startswith("["):
            pretrained[name] = recorded_numbers(metadata, key)
    if classes and CLASSES in metadata:
        pretrained["label_names"] = recorded_names(metadata, CLASSES)
    return {
        "architecture": _ARCHITECTURE,
        "num_classes": classes,
        "global_pool": pool,  # only for people; timm reads model_args
        "model_args": given,
        "pretrained_cfg": pretrained,
    }


def is_timm_folder(file: Path) -> bool:
    """Check whether a weight file is in a timm folder."""
    return file.name in HUB_FILES and _read(file.parent) is not None


def _read(folder: Path) -> dict[str, Any] | None:
    with suppress(UserError):
        settings = read_json(folder / HUB_CONFIG)
        if isinstance(settings, dict) and isinstance(settings.get("architecture"), str):
            return settings
    return None
