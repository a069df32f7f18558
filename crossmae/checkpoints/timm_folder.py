"""timm's folders, config.json beside the weights: to the metadata of a weight file, and back."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from crossmae.checkpoints.metadata import CLASSES, MODEL_ARGUMENTS, PIXEL_MEAN, PIXEL_STD
from crossmae.errors import UserError

CONFIG = "config.json"
ARCHITECTURE = "vit_base_patch16_224"  # of which timm is given every argument, so that any size can be said
_GIVEN = ("embed_dim", "depth", "num_heads", "patch_size", "in_chans", "mlp_ratio")


def timm_metadata(folder: Path) -> dict[str, str]:
    """What timm's config.json says, as the metadata of our own weight files; {} where there is none of timm's.

    The number of heads is that of timm's own model of that name, which is built without memory.

    Raises:
        UserError: an architecture that timm does not know, or values of the wrong type.
    """
    try:
        config = json.loads((folder / CONFIG).read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}  # of other libraries, or nobody's
    if not isinstance(config, dict) or not isinstance(config.get("architecture"), str):
        return {}
    pretrained = config.get("pretrained_cfg")
    pretrained = pretrained if isinstance(pretrained, dict) else {}
    metadata = {MODEL_ARGUMENTS: json.dumps(_recorded(folder / CONFIG, config))}
    for key, name in ((PIXEL_MEAN, "mean"), (PIXEL_STD, "std")):
        values = pretrained.get(name)
        if isinstance(values, list) and all(isinstance(value, float | int) for value in values):
            metadata[key] = json.dumps(values)
    names = config.get("label_names", pretrained.get("label_names"))
    if isinstance(names, list) and all(isinstance(name, str) for name in names):
        metadata[CLASSES] = json.dumps(names, ensure_ascii=False)
    return metadata


def timm_config(
    tensors: Mapping[str, Tensor], arguments: Mapping[str, Any], metadata: Mapping[str, str]
) -> dict[str, Any]:
    """The config.json with which `timm.create_model("local-dir:FOLDER", pretrained=True)` builds the model.

    Args:
        tensors: of the file, under plain names.
        arguments: of `ViTEncoder`.
        metadata: pixel statistics and names of classes go over where they are known.
    """
    size = arguments["img_size"]
    sides = [size, size] if isinstance(size, int) else list(size)
    classes = len(tensors["head.weight"]) if "head.weight" in tensors else 0
    average = "fc_norm.weight" in tensors or "cls_token" not in tensors
    given = {key: arguments[key] for key in _GIVEN} | {"img_size": sides, "class_token": "cls_token" in tensors}
    given |= {"fc_norm": "fc_norm.weight" in tensors, "global_pool": "avg" if average else "token"}
    pretrained: dict[str, Any] = {"input_size": [arguments["in_chans"], *sides], "fixed_input_size": True}
    pretrained |= {"num_classes": classes, "first_conv": "patch_embed.proj", "classifier": "head"}
    for key, name in ((PIXEL_MEAN, "mean"), (PIXEL_STD, "std")):
        if metadata.get(key, "").startswith("["):
            pretrained[name] = json.loads(metadata[key])
    if classes and CLASSES in metadata:
        pretrained["label_names"] = json.loads(metadata[CLASSES])
    return {
        "architecture": ARCHITECTURE,
        "num_classes": classes,
        "global_pool": "avg" if average else "token",
        "model_args": given,
        "pretrained_cfg": pretrained,
    }


def _recorded(path: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    import timm

    given = config.get("model_args")
    given = dict(given) if isinstance(given, dict) else {}
    try:
        with torch.device("meta"):
            model = timm.create_model(config["architecture"], pretrained=False, num_classes=0, **given)
        encoder: Any = model
        heads, sides = encoder.blocks[0].attn.num_heads, list(encoder.patch_embed.img_size)
    except Exception as error:  # whatever its constructors raise for names and arguments that are wrong
        name = config["architecture"]
        raise UserError(f"{path}: {name} with {given} is no plain ViT of timm's: {str(error)[:200]}") from None
    return {"num_heads": heads, "img_size": sides[0] if sides[0] == sides[1] else sides}
