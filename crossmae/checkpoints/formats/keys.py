"""Translation between the tensor names of other libraries' ViTs and plain names.

Plain names are the names in timm's VisionTransformer and in the published files (method specification, section 1.3).

| layout       | files                                                                                             |
| ------------ | ------------------------------------------------------------------------------------------------- |
| `plain`      | timm, the published files, this toolkit, detectron2's ViTDet; also with layer scale or chunks     |
| `hf-vit`     | transformers' ViTModel with its heads, ViTMAEModel, ViTMSNModel, IJepaModel                        |
| `hf-vitmae`  | transformers' ViTMAEForPreTraining                                                                |
| `hf-dinov2`  | transformers' Dinov2Model; read, not written                                                      |
| `mmpretrain` | OpenMMLab's mmpretrain, mmcls, mmselfsup: VisionTransformer and MAE; read, not written            |

All functions accept meta tensors. A tensor without a plain name keeps the name in the file.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

import torch
from torch import Tensor

from crossmae.errors import UserError, counted, shorten

# Prefixes of an encoder's names: in this toolkit and detectron2's ViTDet, in other frameworks, or no prefix.
ENCODER_HOMES = ("backbone.net.", "backbone.", "encoder.", "")
ENCODER_MASK_TOKEN = "encoder_mask_token"  # in DINOv2 and SimMIM; the `mask_token` of MAE is the decoder's

# Names inside and outside of blocks in files of the Hugging Face hub. transformers 4 and 5 both load these names.
_HF_BLOCK = {
    "norm1": "layernorm_before",
    "attn.q": "attention.attention.query",
    "attn.k": "attention.attention.key",
    "attn.v": "attention.attention.value",
    "attn.proj": "attention.output.dense",
    "norm2": "layernorm_after",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}
_HF_ENCODER = {
    "cls_token": "embeddings.cls_token",
    ENCODER_MASK_TOKEN: "embeddings.mask_token",
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj": "embeddings.patch_embeddings.projection",
    "norm": "layernorm",
    "pooler.dense": "pooler.dense",  # exists only in transformers, no plain name
}
_DECODER = ("mask_token", "decoder_pos_embed", "decoder_embed", "decoder_norm", "decoder_pred")
_HF_BESIDE = {
    "hf-vit": {"head": "classifier", "decoder.0": "decoder.0"},  # decoder.0 is in ViTForMaskedImageModeling
    "hf-vitmae": {name: f"decoder.{name}" for name in _DECODER},
}
# Names of transformers 5 in memory, and names of decoder blocks in the files of its save_pretrained.
_HF5_BLOCK = {
    **{f"attention.{letter}_proj": f"attn.{letter}" for letter in "qkv"},
    "attention.o_proj": "attn.proj",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
# Names in blocks of DINOv2 in transformers that differ from those of ViT.
_HF_DINOV2_BLOCK = {
    **{f"norm{number}": f"norm{number}" for number in "12"},
    **{f"mlp.fc{number}": f"mlp.fc{number}" for number in "12"},
    **{f"layer_scale{number}.lambda1": f"ls{number}.gamma" for number in "12"},
}
_HF_DECODER_BLOCKS = ("decoder.decoder_layers", "decoder.decoder_encoder.layer")

_MM_BLOCK = {
    **dict.fromkeys(("ln1", "norm1"), "norm1"),
    **dict.fromkeys(("ln2", "norm2"), "norm2"),
    "attn.qkv": "attn.qkv",
    "attn.proj": "attn.proj",
    "attn.attn.in_proj_weight": "attn.qkv.weight",  # versions that use torch's MultiheadAttention
    "attn.attn.in_proj_bias": "attn.qkv.bias",
    "attn.attn.out_proj": "attn.proj",
    "ffn.layers.0.0": "mlp.fc1",
    "ffn.layers.1": "mlp.fc2",
    "attn.gamma1.weight": "ls1.gamma",
    "ffn.gamma2.weight": "ls2.gamma",
}
_MM_ENCODER = {
    "cls_token": "cls_token",
    "pos_embed": "pos_embed",
    "patch_embed.projection": "patch_embed.proj",
    **dict.fromkeys(("ln1", "norm1"), "norm"),
    **dict.fromkeys(("ln2", "norm2"), "fc_norm"),  # the norm after average pooling
}
_MM_NECK = {f"neck.{name}": name for name in _DECODER} | dict.fromkeys(("neck.ln1", "neck.norm1"), "decoder_norm")
_MM_HEAD = {"head.layers.head": "head", "head.fc": "head"}

CLASS_ROW_ADDED = "a row of zeros for the class token put first"  # entry of `Translated.notes`
_IN_BLOCK = re.compile(r"(.+?)\.(\d+)\.(.+)")
_CHUNKED = re.compile(r"blocks\.\d+\.(\d+\..+)")  # DINOv2: blocks.<chunk>.<block>, blocks counted over all chunks
_QKV_PART = re.compile(r"(.+\.attn)\.([qkv])\.(weight|bias)")
_QKV = re.compile(r"(.+\.attn)\.qkv\.(weight|bias)")
_LAYER_SCALE = re.compile(r"(.*blocks\.\d+)\.(?:ls([12])\.gamma|gamma_([12]))")  # timm and DINOv2; DeiT III
_SCALED = {"1": "attn.proj", "2": "mlp.fc2"}

_MORE_IN_BLOCK, _NO_PLAIN_NAME = (
    "more in a block than two norms, attention and an MLP",
    "something without a plain name",
)
SEVERAL_CLASS_TOKENS = "several class tokens"
WITHOUT_BIAS, GATED = "a layer without bias", "a gated MLP (fc1 and fc2 differ in hidden width)"
UNKNOWN_KINDS = (_MORE_IN_BLOCK, _NO_PLAIN_NAME)  # kinds of `oddities` that do not tell which model it is
_PLAIN_BLOCK = ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
# Kinds of tensors that a plain ViT has no place for, by patterns of names without the prefix. The first match is used.
_NOT_PLAIN = {
    r"layers\.\d+\.blocks\..+": "a hierarchical transformer (Swin)",
    r"reg_token|register_tokens|storage_tokens": "register tokens",
    r"rope(_embed)?\..+": "rotary positions",
    r"dist_token": "DeiT's distillation token",
    r"(norm_pre|pre_norm)\..+": "a norm before the first block",
    r"attn_pool\..+": "attention pooling",
    r"patch_embed\.(?!proj\.(weight|bias)$).+": "a patch embedding of more than one convolution",
    r".*(relative_position|rel_pos_bias).*|blocks\.\d+\.attn\.[qkv]_bias": "BEiT's attention: relative position bias, "
    "or queries, keys and values with biases of their own",
    r"blocks\.\d+\.attn\.[qk]_norm\..+": "norms of queries and keys",
    r"blocks\.\d+\.mlp\.(w1|w2|w3|w12|fc1_g|fc1_x)\..+": "a gated MLP (SwiGLU)",
    r"blocks\.\d+\.(attns|ffns|in_proj|in_norm|out_proj|attn_out_proj|mlp_out_proj)\..+": "parallel blocks",
    r"blocks\.\d+\.(post_norm|norm\d?_post|post_norm\d)\..+": "norms after attention or MLP",
    r"blocks\.\d+\.(?!(" + "|".join(_PLAIN_BLOCK) + r")\.(weight|bias)$|attn\.rel_pos_[hw]$).+": _MORE_IN_BLOCK,
    r"(vit\.)?(embeddings\.|encoder\.layer\.|layers\.\d).*|backbone\.layers\.\d.*": _NO_PLAIN_NAME,
}


@dataclass(frozen=True)
class Translated:
    """The tensors of a file under plain names.

    Attributes:
        layout: "plain", "hf-vit", "hf-vitmae", "hf-dinov2" or "mmpretrain".
        tensors: tensors under plain names. A tensor without a plain name keeps the name in the file. A plain encoder
            keeps its prefix, such as `backbone.net.`.
        sources: for each changed name, the names in the file: one name for a renamed tensor, three for joined q, k, v,
            and weight and gamma for folded layer scale.
        notes: other changes to a tensor, by its plain name.
    """

    layout: str
    tensors: dict[str, Tensor]
    sources: dict[str, tuple[str, ...]] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)


def encoder_home(tensors: Iterable[str]) -> str | None:
    """Return the prefix of an encoder's plain names, None without an encoder."""
    names = set(tensors)
    return next((home for home in ENCODER_HOMES if f"{home}patch_embed.proj.weight" in names), None)


def to_plain(tensors: Mapping[str, Tensor], grid: tuple[int, int] | None = None) -> Translated:
    """Translate tensors of any layout to plain names.

    | in the file                                 | becomes                                                    |
    | ------------------------------------------- | ---------------------------------------------------------- |
    | q, k, v of transformers                     | `attn.qkv`, bit-identical                                  |
    | layer scale                                 | multiplied into `attn.proj`, `mlp.fc2`, rounded to dtype   |
    | DINOv2's `blocks.<chunk>.<block>.*`         | `blocks.<block>.*`                                         |
    | a mask token of the encoder                 | `encoder_mask_token`                                       |
    | positions without a row for the class token | a row of zeros is put first                                |

    Args:
        grid: rows and columns of patches, if known. The grid shows whether the position embeddings have a row for the
            class token. Without it, a square number of rows means that there is no such row.

    Raises:
        UserError: a set of names is incomplete (a query without its key), or two names have one plain name.
    """
    layout, names = _plain_names(tensors)
    found = Translated(layout, {})
    for name, tensor in tensors.items():
        if names[name] in found.tensors:
            earlier = next(iter(found.sources.get(names[name], (names[name],))))
            raise UserError(f"{earlier} and {name} are both {names[name]} in the layout {layout}. Remove one of them.")
        found.tensors[names[name]] = tensor
        if names[name] != name:
            found.sources[names[name]] = (name,)
    if layout.startswith("hf-"):
        found = _join_qkv(found)
    _fold_layer_scale(found)
    home = encoder_home(found.tensors) or ""
    _name_mask_token(found, home)
    # In transformers and mmpretrain, every class token has a row.
    if layout == "plain" or f"{home}cls_token" not in found.tensors:
        _add_class_row(found, home, grid)
    return found


def from_plain(tensors: Mapping[str, Tensor], layout: str) -> dict[str, Tensor]:
    """Rename tensors for transformers 4 and 5. This inverts `to_plain`.

    qkv is split into three tensors that do not share memory; the values are bit-identical. If there are tensors outside
    the encoder, the encoder's names begin with `vit.`, as in files of transformers.

    Args:
        layout: "hf-vit" or "hf-vitmae".

    Raises:
        UserError: the layout has no place for a tensor.
    """
    beside = _HF_BESIDE[layout]
    prefix = "vit." if any(_look_up(beside, name) for name in tensors) else ""
    stacks = {"blocks": f"{prefix}encoder.layer"}
    if layout == "hf-vitmae":
        stacks["decoder_blocks"] = _HF_DECODER_BLOCKS[0]
    outside = {plain: f"{prefix}{name}" for plain, name in _HF_ENCODER.items()} | beside
    parts = dict(part for item in tensors.items() for part in _split_qkv(*item))
    written = {name: _rename(name, stacks, _HF_BLOCK, outside) for name in parts}
    if homeless := [name for name, new in written.items() if new is None]:
        raise UserError(
            f"{layout}: has no place for {counted(len(homeless), 'tensor')}: {shorten(homeless)}. Drop them."
        )
    return {str(written[name]): tensor for name, tensor in parts.items()}


def not_plain(tensors: Mapping[str, Tensor]) -> list[str]:
    """Describe the `oddities` of an encoder, one sentence for each kind."""
    return [f"{shorten(names)}: {kind}, which a plain ViT does not have" for kind, names in oddities(tensors).items()]


def oddities(tensors: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """Group the encoder tensors that a plain ViT lacks, by kind.

    Without these tensors the encoder computes something else. Blocks that normalise after attention and MLP have the
    same names as plain blocks, and cannot be detected.
    """
    home = encoder_home(tensors) or ""
    kinds: dict[str, list[str]] = defaultdict(list)
    for name in tensors:
        inside = name.removeprefix(home)
        if name.startswith(home) and not inside.startswith("decoder_"):
            kind = next((kind for pattern, kind in _NOT_PLAIN.items() if re.fullmatch(pattern, inside)), None)
            kinds[kind or _by_shape(tensors, home, inside)].append(name)
    kinds.pop("", None)
    return dict(kinds)


def _plain_names(tensors: Mapping[str, Tensor]) -> tuple[str, dict[str, str]]:
    for prefix in ("vit.", ""):
        # Other models of transformers have the same names except layernorm_before.
        vit = any(".layernorm_before." in name for name in tensors)
        if vit and f"{prefix}embeddings.patch_embeddings.projection.weight" in tensors:
            decoder = any(_look_up(_inverse(_HF_BESIDE["hf-vitmae"]), name) for name in tensors)
            return "hf-vitmae" if decoder else "hf-vit", _hf_names(tensors, prefix)
    if "encoder.layer.0.layer_scale1.lambda1" in tensors and "embeddings.patch_embeddings.projection.weight" in tensors:
        return "hf-dinov2", _hf_names(tensors, "", _HF_DINOV2_BLOCK)
    for prefix in ("backbone.", ""):
        blocks = (f"{prefix}layers.0.ln1.weight", f"{prefix}layers.0.norm1.weight")
        if f"{prefix}patch_embed.projection.weight" in tensors and any(name in tensors for name in blocks):
            return "mmpretrain", _mm_names(tensors, prefix)
    home = encoder_home(tensors) or ""
    chunked = {name: _CHUNKED.fullmatch(name.removeprefix(home)) for name in tensors if name.startswith(home)}
    return "plain", {name: f"{home}blocks.{match[1]}" if (match := chunked.get(name)) else name for name in tensors}


def _hf_names(tensors: Iterable[str], prefix: str, also: Mapping[str, str] = MappingProxyType({})) -> dict[str, str]:
    stacks = dict.fromkeys((f"{prefix}encoder.layer", f"{prefix}layers"), "blocks")
    stacks |= dict.fromkeys(_HF_DECODER_BLOCKS, "decoder_blocks")
    encoder = {f"{prefix}{name}": plain for name, plain in _inverse(_HF_ENCODER).items()}
    outside = encoder | _inverse(_HF_BESIDE["hf-vit"] | _HF_BESIDE["hf-vitmae"])
    block = _inverse(_HF_BLOCK) | _HF5_BLOCK | dict(also)
    return {name: _rename(name, stacks, block, outside) or name for name in tensors}


def _mm_names(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, str]:
    stacks = {f"{prefix}layers": "blocks", "neck.decoder_blocks": "decoder_blocks"}
    outside = {f"{prefix}{name}": plain for name, plain in _MM_ENCODER.items()} | _MM_NECK
    if "head.layers.pre_logits.weight" not in tensors:  # with pre_logits, the head follows that layer, not the encoder
        outside |= _MM_HEAD
    return {name: _rename(name, stacks, _MM_BLOCK, outside) or name for name in tensors}


def _rename(name: str, stacks: Mapping[str, str], block: Mapping[str, str], outside: Mapping[str, str]) -> str | None:
    found = _IN_BLOCK.fullmatch(name)
    if found and found[1] in stacks:
        inside = _look_up(block, found[3])
        return inside and f"{stacks[found[1]]}.{found[2]}.{inside}"
    return _look_up(outside, name)


def _look_up(table: Mapping[str, str], name: str) -> str | None:
    if name in table:
        return table[name]
    module, _, leaf = name.rpartition(".")
    return f"{table[module]}.{leaf}" if module in table and leaf in ("weight", "bias") else None


def _inverse(table: Mapping[str, str]) -> dict[str, str]:
    return {value: key for key, value in table.items()}


def _join_qkv(found: Translated) -> Translated:
    joined = Translated(found.layout, {})
    for name, tensor in found.tensors.items():
        part = _QKV_PART.fullmatch(name)
        whole = f"{part[1]}.qkv.{part[3]}" if part else name
        if part is None:
            joined.tensors[name] = tensor
            joined.sources.update({name: found.sources[name]} if name in found.sources else {})
        elif whole not in joined.tensors:
            three, origin = [f"{part[1]}.{letter}.{part[3]}" for letter in "qkv"], found.sources[name][0]
            names = dict(zip(("query", "key", "value"), three, strict=True))
            if missing := [kind for kind, each in names.items() if each not in found.tensors]:
                raise UserError(f"{origin}: without {' and '.join(missing)}. Use a complete file.")
            tensors = [found.tensors[each] for each in three]
            if tensors[0].ndim == 0 or len({(each.shape, each.dtype) for each in tensors}) > 1:
                described = ", ".join(map(_describe, tensors))
                raise UserError(f"{origin}: query, key and value do not fit: {described}. Use an unchanged file.")
            joined.tensors[whole] = torch.cat(tensors)
            joined.sources[whole] = tuple(source for each in three for source in found.sources[each])
            joined.notes[whole] = "q, k, v joined"
    return joined


def _split_qkv(name: str, tensor: Tensor) -> list[tuple[str, Tensor]]:
    found = _QKV.fullmatch(name)
    if found is None:
        return [(name, tensor)]
    if tensor.ndim == 0 or tensor.shape[0] % 3:
        raise UserError(f"{name}: {_describe(tensor)} is not divisible into query, key and value. Correct its shape.")
    parts = zip("qkv", tensor.chunk(3), strict=True)
    return [(f"{found[1]}.{letter}.{found[2]}", part.clone()) for letter, part in parts]  # safetensors stores no views


def _fold_layer_scale(found: Translated) -> None:
    for name in list(found.tensors):
        scale = _LAYER_SCALE.fullmatch(name)
        if scale is None:
            continue
        gamma, origin = found.tensors.pop(name), found.sources.pop(name, (name,))
        layer = f"{scale[1]}.{_SCALED[scale[2] or scale[3]]}"
        if f"{layer}.weight" not in found.tensors:
            raise UserError(f"{origin[0]}: layer scale without its layer, {layer}.weight. Use a complete file.")
        for target in (f"{layer}.weight", f"{layer}.bias"):
            if target in found.tensors:
                found.tensors[target] = _scaled(found.tensors[target], gamma, f"{origin[0]}: layer scale of {target}")
                found.sources[target] = (*found.sources.get(target, (target,)), *origin)
                found.notes[target] = "layer scale folded in"


def _scaled(tensor: Tensor, gamma: Tensor, what: str) -> Tensor:
    """Multiply each row by its factor, in float64 for float64, else float32."""
    if gamma.ndim != 1 or gamma.shape != tensor.shape[:1]:
        raise UserError(f"{what}: {_describe(gamma)} does not fit {_describe(tensor)}. Use an unchanged file.")
    dtype = torch.float64 if tensor.dtype == torch.float64 else torch.float32
    factors = gamma.to(dtype).view(-1, *(1,) * (tensor.ndim - 1))
    return (tensor.to(dtype) * factors).to(tensor.dtype)


def _name_mask_token(found: Translated, home: str) -> None:
    """Rename a `mask_token` of the encoder to `encoder_mask_token`.

    The `mask_token` of MAE's decoder, of shape (1, 1, D), keeps its name.
    """
    token = found.tensors.get(f"{home}mask_token")
    decoder = any(name.startswith(f"{home}decoder_") for name in found.tensors)
    if token is None or (decoder and token.ndim == 3):
        return
    name = f"{home}{ENCODER_MASK_TOKEN}"
    if name in found.tensors:
        raise UserError(f"{home}mask_token and {name} are both mask tokens of the encoder. Remove one of them.")
    found.tensors[name] = found.tensors.pop(f"{home}mask_token")
    found.sources[name] = found.sources.pop(f"{home}mask_token", (f"{home}mask_token",))
    found.notes[name] = "of the encoder, not of a decoder"


def _add_class_row(found: Translated, home: str, grid: tuple[int, int] | None) -> None:
    """Add a row of zeros to position embeddings without a class row.

    timm's `no_embed_class` makes such models.
    """
    table, name = found.tensors.get(f"{home}pos_embed"), f"{home}pos_embed"
    if table is None or table.ndim != 3:
        return
    rows = table.shape[1]
    decoder = found.tensors.get(f"{home}decoder_pos_embed")
    if decoder is not None and decoder.ndim == 3 and decoder.shape[1] == rows:
        return  # in MAE, the position embeddings of encoder and decoder both have the row
    patches_alone = rows == grid[0] * grid[1] if grid else rows > 0 and math.isqrt(rows) ** 2 == rows
    if patches_alone:
        found.tensors[name] = torch.cat([torch.zeros_like(table[:, :1]), table], dim=1)
        found.notes[name] = CLASS_ROW_ADDED


def _by_shape(tensors: Mapping[str, Tensor], home: str, name: str) -> str:
    """Return the kind of an oddity that only shapes show, or ""."""
    tensor = tensors[f"{home}{name}"]
    if name == "cls_token" and tensor.ndim == 3 and tensor.shape[1] > 1:
        return SEVERAL_CLASS_TOKENS
    module, _, leaf = name.rpartition(".")
    if leaf != "weight" or not (module == "patch_embed.proj" or re.match(r"blocks\.\d+\.", module)):
        return ""
    if f"{home}{module}.bias" not in tensors:
        return WITHOUT_BIAS
    fc2 = tensors.get(f"{home}{module.removesuffix('fc1')}fc2.weight")
    gated = module.endswith(".mlp.fc1") and fc2 is not None and tensor.shape[:1] != fc2.shape[1:]
    return GATED if gated else ""


def _describe(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
