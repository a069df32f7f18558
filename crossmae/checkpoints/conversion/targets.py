"""The layouts that can be written: the tensors that each layout holds, and the function that writes it."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from crossmae import __version__
from crossmae.checkpoints.formats.huggingface import PREPROCESSOR, hf_config, hf_preprocessor_config
from crossmae.checkpoints.formats.keys import from_plain
from crossmae.checkpoints.formats.timm_folder import timm_config
from crossmae.checkpoints.loading import left_out
from crossmae.checkpoints.metadata import CLASSES, PICKLED_METADATA, PIXEL_MEAN, PIXEL_STD, UNKNOWN
from crossmae.checkpoints.reading.digest import signed
from crossmae.checkpoints.reading.files import HUB_CONFIG
from crossmae.checkpoints.resample import RELATIVE
from crossmae.checkpoints.run_checkpoint import MODEL
from crossmae.checkpoints.weights import write_safetensors
from crossmae.files import write_json
from crossmae.models.encoder import ENCODER_PREFIXES

TargetHead = Literal["avg", "cls", "batchnorm", "other"]

DETECTRON2_PREFIX = "backbone.net."
NO_SUFFIX = ""  # suffix of a destination that is a folder


@dataclass(frozen=True)
class ConvertedModel:
    """A model to write, under plain names.

    Attributes:
        arguments: constructor arguments of `ViTEncoder` (for an encoder or a classifier) or of `CrossMAE` (for a whole
            pretraining model).
        metadata: strings, see `crossmae.checkpoints.metadata`.
        norm_eps: epsilon of the layer norms.
    """

    tensors: dict[str, Tensor]
    arguments: dict[str, Any]
    metadata: dict[str, str]
    norm_eps: float


Names = dict[str, tuple[str, ...]]  # plain name -> names in the written file


@dataclass(frozen=True)
class Target:
    """A layout that can be written.

    Attributes:
        what: description in one line.
        suffixes: allowed suffixes of the destination; `NO_SUFFIX` means a folder.
        write: function that writes a file, or the files of an empty folder.
        decoder: pretraining model whose decoder has a place in the layout.
        heads: kinds of classification heads that have a place, see `TargetHead`.
        class_token, norm: whether the layout has a class token or a final norm.
        relative: true if the layout has relative positions.
        square: true if the layout allows only square images.
    """

    what: str
    suffixes: tuple[str, ...]
    write: Callable[[Path, ConvertedModel], Names]
    decoder: Literal["crossmae", "mae"] | None = None
    heads: tuple[TargetHead, ...] = ()
    class_token: Literal["required", "optional", "none"] = "optional"
    norm: Literal["required", "optional", "none"] = "optional"
    relative: bool = False
    square: bool = False


def refusal(target: Target, name: str, content: str, head: TargetHead | None) -> tuple[str, bool]:
    """Explain why a tensor has no place in a target.

    Args:
        name: plain name of the tensor.
        content: content of the source, see `Weights.format`.
        head: kind of classification head of the source.

    Returns:
        The reason, or "" if the tensor has a place; and true if the encoder computes the same without the tensor.
    """
    if name == "cls_token":
        return ("a dense backbone has no class token" if target.class_token == "none" else ""), True
    if RELATIVE.fullmatch(name):
        return ("", True) if target.relative else ("relative positions have no place in a plain ViT", False)
    if name.startswith(ENCODER_PREFIXES):
        return "", True
    reason = left_out(name)
    if reason is None:
        return "no place is known for it", False
    if name.startswith("norm."):
        return ("the final norm has no place in it" if target.norm == "none" else ""), True
    if name.startswith(("fc_norm.", "head.")):
        held = head in target.heads or (head is None and "avg" in target.heads)
        return ("" if held else "a head of this kind has no place in it"), True
    return ("" if content == target.decoder else reason), True


def _write_own(path: Path, model: ConvertedModel) -> Names:
    _write_file(path, "model", model.tensors, model.metadata)
    return {name: (name,) for name in model.tensors}


def _write_timm(path: Path, model: ConvertedModel) -> Names:
    """Write a file for timm's `checkpoint_path=`, or a folder for "local-dir:..."."""
    tensors = dict(model.tensors)
    if "cls_token" not in tensors:
        tensors["pos_embed"] = tensors["pos_embed"][:, 1:]  # timm has no row for an absent class token
    if path.suffix:
        _write_file(path, "state_dict", tensors, model.metadata)
    else:
        write_safetensors(path / MODEL, tensors, model.metadata)
        write_json(path / HUB_CONFIG, timm_config(model.tensors, model.arguments, model.metadata))
    return {name: (name,) for name in tensors}


def _write_transformers(path: Path, model: ConvertedModel, layout: str) -> Names:
    """Write a folder for `from_pretrained`."""
    tensors = from_plain(model.tensors, layout)
    write_safetensors(path / MODEL, tensors, model.metadata)
    classes = _class_names(model)
    write_json(path / HUB_CONFIG, hf_config(layout, model.arguments, norm_eps=model.norm_eps, classes=classes))
    mean, std = (model.metadata.get(key, UNKNOWN) for key in (PIXEL_MEAN, PIXEL_STD))
    if UNKNOWN not in (mean, std):
        settings = hf_preprocessor_config(model.arguments["img_size"], json.loads(mean), json.loads(std))
        write_json(path / PREPROCESSOR, settings)
    written = iter(tensors)  # in the order of model.tensors; each qkv tensor became three
    return {name: tuple(next(written) for _ in range(3 if ".attn.qkv." in name else 1)) for name in model.tensors}


def _write_detectron2(path: Path, model: ConvertedModel) -> Names:
    """Write `backbone.net.*`, without detectron2's matching by suffix (issue 4566)."""
    kept = {f"{DETECTRON2_PREFIX}{name}": tensor for name, tensor in model.tensors.items()}
    extras = {"__author__": f"crossmae {__version__}", "matching_heuristics": False}
    if path.suffix == ".pkl":
        exact = {name: tensor.float() if tensor.dtype == torch.bfloat16 else tensor for name, tensor in kept.items()}
        arrays = {name: tensor.numpy() for name, tensor in exact.items()}  # numpy has no bfloat16
        content = {"model": arrays, **extras, PICKLED_METADATA: signed(exact, model.metadata)}
        with open(path, "wb") as file:
            pickle.dump(content, file, protocol=4)
    else:
        _write_file(path, "model", kept, model.metadata, extras)
    return {name: (f"{DETECTRON2_PREFIX}{name}",) for name in model.tensors}


TARGETS = {
    "crossmae": Target(
        "this toolkit's: a CrossMAE model, an encoder or a classifier; .pth is the layout of the published files",
        (".safetensors", ".pth"), _write_own, decoder="crossmae", heads=("avg", "cls", "batchnorm"),
    ),
    "mae": Target(
        "the same for MAE models",
        (".safetensors", ".pth"), _write_own, decoder="mae", heads=("avg", "cls", "batchnorm"),
    ),
    "timm": Target(
        "timm's VisionTransformer: a file for checkpoint_path=, or a folder for local-dir:",
        (NO_SUFFIX, ".safetensors", ".pth"), _write_timm, heads=("avg", "cls"), norm="required",
    ),
    "hf-vit": Target(
        "transformers' ViTModel or ViTForImageClassification: a folder for from_pretrained",
        (NO_SUFFIX,), partial(_write_transformers, layout="hf-vit"), heads=("cls",), class_token="required",
        norm="required",
    ),
    "hf-vitmae": Target(
        "transformers' ViTMAEModel or ViTMAEForPreTraining: a folder for from_pretrained",
        (NO_SUFFIX,), partial(_write_transformers, layout="hf-vitmae"), decoder="mae", class_token="required",
        norm="required", square=True,
    ),
    "detectron2": Target(
        "the backbone of detectron2's ViTDet, for MODEL.WEIGHTS",
        (".pth", ".pkl", ".safetensors"), _write_detectron2, class_token="none", norm="none", relative=True,
        square=True,
    ),
}  # fmt: skip


def _class_names(model: ConvertedModel) -> list[str]:
    if "head.weight" not in model.tensors:
        return []
    number = len(model.tensors["head.weight"])
    names = json.loads(model.metadata.get("class_names", model.metadata.get(CLASSES, "[]")))
    return names if len(set(names)) == number else [f"LABEL_{index}" for index in range(number)]


def _write_file(
    path: Path, key: str, tensors: dict[str, Tensor], metadata: dict[str, str], extras: Mapping[str, Any] | None = None
) -> None:
    if path.suffix == ".safetensors":
        write_safetensors(path, tensors, metadata)
    else:
        torch.save({key: tensors, **(extras or {}), PICKLED_METADATA: signed(tensors, metadata)}, path)
