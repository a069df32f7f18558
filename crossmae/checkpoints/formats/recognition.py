"""Recognition of what is in a weight file, and of files that cannot be read as a plain ViT.

Each kind has one sentence on what it is, and one on what to do. Nothing here needs the values of tensors.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from crossmae.checkpoints.metadata import VERSION
from crossmae.errors import UserError, shorten

USE_PLAIN = "Use weights of a plain ViT, such as MAE, DINO, DINOv2 without registers or a supervised ViT."
READ_TYPES = "vit, vit_mae, vit_msn, ijepa or dinov2"
_SAVE_WHOLE = "save the whole model there, and name that file"
# Types of transformers' models that are not a plain ViT, although some have its names.
_MODEL_TYPES = {
    r"beit|data2vec-vision": "BEiT, whose attention has relative positions",
    r"(chinese_|alt)?clip(_vision_model)?": "CLIP, which has a norm before the first block and another activation",
    r"siglip2?(_vision_model)?": "SigLIP, which has no class token and pools by attention",
    r"sam(2|3|_hq)?(_vision_model|_hiera_det_model)?": "SAM, whose attention has windows and relative positions",
    r"deit": "DeiT, which has a distillation token",
    r"vitdet": "ViTDet, whose attention has windows",
    r"videomae|vivit|timesformer|vjepa2": "a video model, whose patches span several frames",
    r"dinov2_with_registers": "DINOv2 with register tokens",
    r"dinov3_vit": "DINOv3, which has register tokens and rotary positions",
    r"swin(v2|2sr)?|donut-swin|hiera|pvt(_v2)?|segformer|levit|efficientformer|mobilevit(v2)?": "a hierarchical model",
    r"(dinov3_)?convnext(v2)?|resnet|regnet|bit|efficientnet|mobilenet_v\d": "a convolutional network",
    r"yolos|vit_hybrid|dpt|vilt|blip(-2)?(_vision_model)?|aimv2(_vision_model)?|intern_?vit.*|eva.*": "no plain ViT",
}


CONTENTS = {
    "crossmae": "a CrossMAE pretraining model, encoder and decoder",
    "mae": "an MAE pretraining model, encoder and decoder",
    "encoder": "an encoder",
    "finetuned": "a classifier",
    "linear_probe": "a linear probe",
    "detectron2": "the encoder of a detection backbone, without class token",
    "detector": "a detector",
    "unknown": "no kind of model that is known, or more than one",
}
_START = "Start from it: model.init={0} of tools/finetune.py, or MODEL.WEIGHTS={0} of tools/train_net.py."
_CLASSES = "Its tool is tools/predict_classes.py --weights {0}, or tools/finetune.py --eval-only {0}."
_USES = {
    **dict.fromkeys(("crossmae", "mae", "encoder"), _START),
    **dict.fromkeys(("finetuned", "linear_probe"), _CLASSES),
    "detectron2": "Start from it: MODEL.WEIGHTS={0} of tools/train_net.py.",
    "detector": "Its tool is tools/predict.py --weights {0}.",
}


@dataclass(frozen=True)
class _Kind:
    """A kind of file: every pattern matches the name of a tensor, or the end of a name after a dot."""

    patterns: tuple[str, ...]
    what: str
    remedy: str = USE_PLAIN


_MERGE = "Merge the adapter with peft (model.merge_and_unload()), and save model.state_dict()."
_CLIP = "the image tower of CLIP, which has a norm before the first block and may have another activation"
_KINDS = (
    _Kind(
        (r"_?flat_params?(_\d+)?",),
        "parameters that FSDP made flat, one vector for each module, often one part of several",
        "In the program that wrote it, collect them by torch.distributed.checkpoint.state_dict.get_model_state_dict("
        f"model, options=StateDictOptions(full_state_dict=True)), {_SAVE_WHOLE}.",
    ),
    _Kind(
        (r"(lora|vera|hada|oft|ia3|boft)_\w+(\..*)?", r"patch_embed.*\.weight|embeddings\.patch_embeddings.*"),
        "a model with an adapter (LoRA) that is not merged",
        _MERGE,
    ),
    _Kind((r"(lora|vera|hada|oft|ia3|boft)_\w+(\..*)?",), "an adapter (LoRA) without its model", _MERGE),
    _Kind(
        (r"(weight|bias)_mask", r"(weight|bias)_orig"),
        "pruned weights, as values (weight_orig) and masks (weight_mask)",
        "Call torch.nn.utils.prune.remove(module, 'weight') for each pruned layer, and save model.state_dict().",
    ),
    _Kind(
        (r"parametrizations\..*\.original\d*|(weight|bias)_orig|blocks\..*\.weight_[gv]",),
        "weights that torch computes from other tensors (weight norm, spectral norm or another parametrization)",
        "Call torch.nn.utils.parametrize.remove_parametrizations for each such layer, and save model.state_dict().",
    ),
    _Kind(
        (r"patch_embed\.\d+\.proj\.weight|channel_embed|channel_cls_embed", r"blocks\.\d+\..*"),
        "patches of groups of channels with an embedding for each group, as in SatMAE",
    ),
    _Kind((r"conv1\.weight", r"transformer\.resblocks\.\d+\..*", r"class_embedding"), _CLIP),
    _Kind((r"embeddings\.patch_embedding\.weight", r"layers\.\d+\.self_attn\..*"), f"{_CLIP}, or that of SigLIP"),
    _Kind((r"embeddings\.register_tokens", r"layers?\.\d+\..*"), "DINOv2 or DINOv3 with register tokens"),
    _Kind((r"embeddings\.projection\.weight", r"layer\.\d+\.attention\.qkv\.weight"), "transformers' ViTDet"),
    _Kind((r"layers\.\d+\.blocks\.\d+\..*",), "a hierarchical transformer (Swin)"),
    _Kind((r"layer1\.0\.conv1\.weight",), "a ResNet"),
    _Kind((r"stages\.\d+\..*",), "a hierarchical network (ConvNeXt, Hiera or another)"),
    _Kind((r"word_embeddings\.weight|embed_tokens\.weight|wte\.weight|token_embedding\.weight",), "a language model"),
)
_ZERO = (
    "In its folder, the one with the file `latest`, run `python zero_to_fp32.py . OUT`, and name the file in OUT. The "
    "script lies there, and is a part of deepspeed"
)
_PATCHES = re.compile(r"(.*\.)?(patch_embed\.proj|patch_embed\.projection|patch_embeddings(\.projection)?)\.weight")


def recognise(tensors: Mapping[str, Tensor]) -> str:
    """Describe a file that is no plain ViT, or return "".

    Meta tensors are accepted. Models with a whole encoder and more in it are left to `keys.oddities`.
    """
    empty = [name for name, tensor in tensors.items() if tensor.numel() == 0]
    if len(empty) * 2 > len(tensors) or any(_PATCHES.fullmatch(name) for name in empty):
        return (
            f"{len(empty)} of {len(tensors)} tensors are empty, such as {shorten(empty, 2)}: DeepSpeed ZeRO-3 left "
            f"placeholders, and each process saved its part of the weights. {_ZERO}."
        )
    filters = next((each for name, each in tensors.items() if _PATCHES.fullmatch(name)), None)
    kind = next((kind for kind in _KINDS if all(_any(pattern, tensors) for pattern in kind.patterns)), None)
    if kind and (filters is None or kind in _KINDS[:6]):
        return f"{kind.what}. {kind.remedy}"
    return _by_shape(filters, next((each for name, each in tensors.items() if _named(name, "pos_embed")), None))


def mix_up(path: Path, content: str, metadata: Mapping[str, str], wanted: str) -> UserError:
    """Return the error for a file of the wrong kind.

    Args:
        content: see `Weights.format`.
        wanted: what the tool wants, such as "a classifier".
    """
    what, comma, more = CONTENTS[content].partition(",")
    ours = " of this toolkit" if VERSION in metadata and content != "unknown" else ""
    use = _USES.get(content, f"See what it is by tools/inspect_checkpoint.py {path}.").format(path)
    return UserError(f"{path}: {what}{ours}{comma}{more}, not {wanted}. {use}")


def model_type_refusal(model_type: object) -> str:
    """Describe a type of model that is not read, or return ""."""
    for pattern, what in _MODEL_TYPES.items():
        if isinstance(model_type, str) and re.fullmatch(pattern, model_type):
            return f"{what}. model_type must be {READ_TYPES}. {USE_PLAIN}"
    return ""


def _by_shape(filters: Tensor | None, positions: Tensor | None) -> str:
    if filters is not None:
        shape = tuple(filters.shape)
        if len(shape) == 5:
            frames = f"patches of {shape[2]} x {shape[3]} x {shape[4]}: time or depth, height and width"
            return f"a video, multi-date or volume model, with {frames}, as in VideoMAE and Prithvi. {USE_PLAIN}"
        if len(shape) != 4:
            what = {3: "a model of signals (1-D patches)", 2: "a model of flattened patches"}
            return f"{what.get(len(shape), 'no model of images')}, its patch filters are of shape {shape}. {USE_PLAIN}"
        if shape[2] != shape[3]:
            return f"its patches have {shape[2]} x {shape[3]} pixels, and only square patches are read. {USE_PLAIN}"
    if positions is not None and positions.ndim == 4:
        shape = tuple(positions.shape)
        return f"positions as a map of shape {shape}, as in SAM, whose attention also has windows. {USE_PLAIN}"
    return ""


def _any(pattern: str, names: Iterable[str]) -> bool:
    return any(_named(name, pattern) for name in names)


def _named(name: str, pattern: str) -> bool:
    return re.fullmatch(rf"(?:.*\.)?(?:{pattern})", name) is not None
