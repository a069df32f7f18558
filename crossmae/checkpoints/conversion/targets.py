"""The layouts that can be written: what each has a place for, and how it is put on disk."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass
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
from crossmae.checkpoints.reading.files import HUB_CONFIG as CONFIG
from crossmae.checkpoints.resample import RELATIVE
from crossmae.checkpoints.run_checkpoint import MODEL as TENSORS
from crossmae.checkpoints.weights import write_safetensors
from crossmae.models.encoder import ENCODER_PREFIXES

Head = Literal["avg", "cls", "batchnorm", "other"]

DETECTRON2_PREFIX = "backbone.net."
FOLDER = ""  # the suffix of a destination that is a folder


@dataclass(frozen=True)
class Content:
    """What is to be written: tensors under plain names, and what no tensor says.

    Attributes:
        arguments: of `ViTEncoder` for an encoder or a classifier, of `CrossMAE` for a whole pretraining model.
        metadata: strings that travel with the tensors; see `crossmae.checkpoints.weights`.
        norm_eps: epsilon of the layer norms.
    """

    tensors: dict[str, Tensor]
    arguments: dict[str, Any]
    metadata: dict[str, str]
    norm_eps: float = 1e-6


@dataclass(frozen=True)
class Target:
    """A layout.

    Attributes:
        what: one line for people.
        suffixes: of a destination; `FOLDER` is a folder.
        decoder: of which pretraining model it holds the decoder, if any.
        heads: classification heads that it holds, by the norm that comes before.
        class_token: whether its encoder must have, may have or can not have one.
        norm: whether a final norm must be there, may be there or has no place.
        relative: whether it holds relative positions.
        square: whether its models take square images alone.
        write: writes a file, or into an empty folder; returns plain name -> names in the file.
    """

    what: str
    suffixes: tuple[str, ...]
    write: Callable[[Path, Content], dict[str, tuple[str, ...]]]
    decoder: Literal["crossmae", "mae"] | None = None
    heads: tuple[Head, ...] = ()
    class_token: Literal["required", "optional", "none"] = "optional"
    norm: Literal["required", "optional", "none"] = "optional"
    relative: bool = False
    square: bool = False


def refusal(target: Target, name: str, content: str, head: Head | None) -> tuple[str, bool]:
    """Why a layout has no place for a tensor, or "", and whether the encoder computes the same without it.

    Args:
        name: plain.
        content: "crossmae" and "mae" are whole pretraining models, see `Weights.format`.
        head: which classification head the source has.
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
    if content == target.decoder:
        return "", True
    return reason, True


def missing_norm(target: Target, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The final norm that a layout asks for and the source does not have: scale 1, shift 0."""
    if target.norm != "required" or "norm.weight" in tensors or "fc_norm.weight" in tensors:
        return {}
    like = tensors["patch_embed.proj.bias"]
    return {"norm.weight": torch.ones_like(like), "norm.bias": torch.zeros_like(like)}


def _write_own(path: Path, content: Content) -> dict[str, tuple[str, ...]]:
    """Ours as safetensors, or the layout of the published .pth files, which our readers take as well."""
    if path.suffix == ".safetensors":
        write_safetensors(path, content.tensors, content.metadata)
    else:
        _torch_save(path, "model", content.tensors, content.metadata)
    return {name: (name,) for name in content.tensors}


def _write_timm(path: Path, content: Content) -> dict[str, tuple[str, ...]]:
    """What `timm.create_model(..., checkpoint_path=)` loads, or a folder for `timm.create_model("local-dir:...")`."""
    tensors = dict(content.tensors)
    if "cls_token" not in tensors:
        tensors["pos_embed"] = tensors["pos_embed"][:, 1:]  # timm has no row for a class token that is not there
    if path.suffix == ".pth":
        _torch_save(path, "state_dict", tensors, content.metadata)
    elif path.suffix == ".safetensors":
        write_safetensors(path, tensors, content.metadata)
    else:
        write_safetensors(path / TENSORS, tensors, content.metadata)
        _write_json(path / CONFIG, timm_config(content.tensors, content.arguments, content.metadata))
    return {name: (name,) for name in tensors}


def _write_transformers(layout: str) -> Callable[[Path, Content], dict[str, tuple[str, ...]]]:
    def write(path: Path, content: Content) -> dict[str, tuple[str, ...]]:
        """What `from_pretrained` loads."""
        tensors = from_plain(content.tensors, layout)
        write_safetensors(path / TENSORS, tensors, content.metadata)
        classes = _class_names(content)
        _write_json(path / CONFIG, hf_config(layout, content.arguments, norm_eps=content.norm_eps, classes=classes))
        mean, std = (content.metadata.get(key, UNKNOWN) for key in (PIXEL_MEAN, PIXEL_STD))
        if UNKNOWN not in (mean, std):
            preprocessor = hf_preprocessor_config(content.arguments, json.loads(mean), json.loads(std))
            _write_json(path / PREPROCESSOR, preprocessor)
        names, left = {}, list(tensors)
        for name in content.tensors:  # in the same order; of qkv there are three
            count = 3 if ".attn.qkv." in name else 1
            names[name], left = tuple(left[:count]), left[count:]
        return names

    return write


def _write_detectron2(path: Path, content: Content) -> dict[str, tuple[str, ...]]:
    """`backbone.net.*`, with explicit names, so that nothing is matched by suffix (detectron2's issue 4566)."""
    kept = {f"{DETECTRON2_PREFIX}{name}": tensor for name, tensor in content.tensors.items()}
    extras = {"__author__": f"crossmae {__version__}", "matching_heuristics": False}
    if path.suffix == ".safetensors":
        write_safetensors(path, kept, content.metadata)
    elif path.suffix == ".pth":
        _torch_save(path, "model", kept, content.metadata, extras)
    else:
        exact = {name: tensor.float() if tensor.dtype == torch.bfloat16 else tensor for name, tensor in kept.items()}
        arrays = {name: tensor.numpy() for name, tensor in exact.items()}  # numpy has no bfloat16
        with open(path, "wb") as file:
            pickle.dump(
                {"model": arrays} | extras | {PICKLED_METADATA: signed(exact, content.metadata)}, file, protocol=4
            )
    return {name: (f"{DETECTRON2_PREFIX}{name}",) for name in content.tensors}


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
        (FOLDER, ".safetensors", ".pth"), _write_timm, heads=("avg", "cls"), norm="required",
    ),
    "hf-vit": Target(
        "transformers' ViTModel or ViTForImageClassification: a folder for from_pretrained",
        (FOLDER,), _write_transformers("hf-vit"), heads=("cls",), class_token="required", norm="required",
    ),
    "hf-vitmae": Target(
        "transformers' ViTMAEModel or ViTMAEForPreTraining: a folder for from_pretrained",
        (FOLDER,), _write_transformers("hf-vitmae"), decoder="mae", class_token="required", norm="required",
        square=True,
    ),
    "detectron2": Target(
        "the backbone of detectron2's ViTDet, for MODEL.WEIGHTS",
        (".pth", ".pkl", ".safetensors"), _write_detectron2, class_token="none", norm="none", relative=True,
        square=True,
    ),
}  # fmt: skip


def _class_names(content: Content) -> list[str]:
    """Of the head's outputs, as transformers calls them where nobody named them; [] without a head."""
    if "head.weight" not in content.tensors:
        return []
    number = len(content.tensors["head.weight"])
    names = json.loads(content.metadata.get("class_names", content.metadata.get(CLASSES, "[]")))
    return names if len(set(names)) == number else [f"LABEL_{index}" for index in range(number)]


def _torch_save(
    path: Path,
    key: str,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    extras: Mapping[str, Any] | None = None,
) -> None:
    content = {key: dict(tensors), **(extras or {}), PICKLED_METADATA: signed(tensors, metadata)}
    torch.save(content, path)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf-8")
