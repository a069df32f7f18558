"""Facts about the model in a weight file: recorded, seen in shapes, given, or assumed.

Tensors do not show everything that a model computes. The number of attention heads, the sides of the grid, the
activation and the epsilon change no shape. This module is the only place that assumes such values, and it types every
value by its source.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, Literal

import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from crossmae.checkpoints.formats.huggingface import mlp_ratio
from crossmae.checkpoints.metadata import (
    ACTIVATION,
    MODEL_ARGUMENTS,
    NORM_EPS,
    NORM_EPS_OF_PLAIN,
    PUBLISHED_ARGUMENTS,
    TRAINER_SETTINGS,
    assumed_names,
    recorded_arguments,
    recorded_value,
)
from crossmae.checkpoints.resample import is_sincos, table_grid
from crossmae.errors import UserError, advise
from crossmae.models.encoder import patch_grid
from crossmae.models.sizes import SIZES

FactSource = Literal["recorded", "shapes", "given", "assumed"]

_BLOCK = re.compile(r"blocks\.(\d+)\.")
# Tensors whose shape shows the heads: the number of heads, or the width of a head.
_HEADS = {
    r"blocks\.\d+\.attn\.(.+\.)?relative_position_bias_table": lambda shape, width: shape[-1],
    r"blocks\.\d+\.attn\.(logit_scale|temperature|proj_[lw]\.weight)": lambda shape, width: shape[0],
    r"blocks\.\d+\.attn\.rel_pos_[hw]": lambda shape, width: width // shape[-1],
    r"blocks\.\d+\.attn\.[qk]_norm\.weight": lambda shape, width: width // shape[-1],
}
# Numbers of heads by the name that a trainer gives to a size, where other trainers mean another model by it.
_HEADS_OF_FAMILY = {
    "moco-v3": {"vit_small": 12, "vit_base": 12},
    "dino": {"vit_tiny": 3, "vit_small": 6, "deit_tiny": 3, "deit_small": 6, "vit_base": 12, "vit_large": 16},
}
_PLAIN_NAMES = ("vit_", "deit", "flexivit")  # of timm's plain ViTs
_OURS_OR_PUBLISHED = re.compile(r"(?:(?:cross)?mae_)?vit_(\w+?)(?:_dec\w+)?")
# Examples of other values, for advice. The heads have one that depends on the width.
_EXAMPLES = {"img_size": "[HEIGHT,WIDTH]", "norm_eps": "1e-12", "norm_pix_loss": "false", "fuse_input": "true"}
_EXAMPLES |= {"pixel_mean": "[0.5,0.5,0.5]", "pixel_std": "[0.5,0.5,0.5]", "bit_depth": "16", "pool": "avg"}
SETTABLE = tuple(key for key in ("num_heads", "decoder_num_heads", *_EXAMPLES))
SET_OPTION = {name: f"--set {name}" for name in SETTABLE}
ENCODER_FACTS = ("num_heads", "img_size", "norm_eps", "activation")  # what an encoder computes depends on them
# Keys of the trainers' configs. The img_size there is the size of the new model, not of the file.
MODEL_KEYS = {
    name: f"model.{name}" for name in ("num_heads", "decoder_num_heads", "norm_pix_loss", "fuse_blocks", "fuse_input")
}


@dataclass(frozen=True)
class ModelFact:
    """A value, and the source that it comes from.

    Attributes:
        why: origin of the value, for people: of an assumed value to follow "is assumed".
        example: another usual value of an assumed value.
    """

    value: Any
    source: FactSource
    why: str = ""
    example: str = ""


Facts = dict[str, ModelFact]


def encoder_facts(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> Facts:
    """Find the facts about an encoder.

    Args:
        tensors: encoder tensors under plain names.
        metadata: metadata of the file.

    Returns:
        `embed_dim`, `depth`, `patch_size`, `in_chans`, `mlp_ratio`, `norm_eps`, `activation`, and where a value can be
        found or assumed, `num_heads` and `img_size` (an int for a square, else (height, width)). `class_tokens` if
        there are several.

    Raises:
        UserError: the tensors have no `patch_embed.proj.weight` of shape (E, C, p, p).
    """
    patches, metadata = tensors.get("patch_embed.proj.weight"), metadata or {}
    if patches is None or patches.ndim != 4:
        raise UserError("patch_embed.proj.weight: missing, or not of shape (E, C, p, p). Use weights of a plain ViT.")
    E, C, p, _ = patches.shape
    depth = 1 + max((int(found[1]) for name in tensors if (found := _BLOCK.match(name))), default=-1)
    shown: dict[str, Any] = {"embed_dim": E, "depth": depth, "patch_size": p, "in_chans": C}
    if "blocks.0.mlp.fc1.weight" in tensors:
        shown["mlp_ratio"] = mlp_ratio(E, tensors["blocks.0.mlp.fc1.weight"].shape[0])
    if (tokens := tensors.get("cls_token")) is not None and tokens.ndim == 3 and tokens.shape[1] > 1:
        shown["class_tokens"] = tokens.shape[1]
    facts = {key: ModelFact(value, "shapes") for key, value in shown.items()}
    model, told = recorded_arguments(metadata), recorded_value(metadata, TRAINER_SETTINGS, dict)
    heads, size = _heads(tensors, E, told, metadata), _img_size(tensors.get("pos_embed"), p, told)
    facts |= {key: fact for key, fact in (("num_heads", heads), ("img_size", size)) if fact}
    for key in ("num_heads", "img_size"):
        if key in model:
            if key == "img_size":
                _check_img_size(model[key], tensors.get("pos_embed"), p)
            facts[key] = ModelFact(_plain(model[key]), "recorded")
    ours = MODEL_ARGUMENTS in metadata
    eps = recorded_value(metadata, NORM_EPS, float) or NORM_EPS_OF_PLAIN
    if not 0 < eps < 1:
        raise UserError(f"metadata {NORM_EPS!r} of a weight file: {eps} is not between 0 and 1. Copy the file again.")
    facts["norm_eps"] = ModelFact(eps, "recorded" if ours or NORM_EPS in metadata else "assumed", "as in timm")
    # A config of transformers or timm is read only if the activation is GELU.
    told_activation = ours or ACTIVATION in metadata
    facts["activation"] = ModelFact("gelu", "recorded" if told_activation else "assumed", "as in timm")
    return with_marks(facts, metadata)


def _check_img_size(size: Any, table: Tensor | None, patch_size: int) -> None:
    """Reject recorded sides that do not give the stored positions."""
    if table is None or table.ndim != 3:
        return
    try:
        h, w = patch_grid(size if isinstance(size, int) else tuple(size), patch_size)
    except ValueError as error:
        raise UserError(f"metadata {MODEL_ARGUMENTS!r} of a weight file: {error}. Copy the file again.") from None
    if not 0 <= table.shape[1] - h * w < max(2, table.shape[1] // 2):  # the rest: class tokens
        raise UserError(
            f"metadata {MODEL_ARGUMENTS!r} of a weight file: img_size {size} has {h * w} patches, the file "
            f"{table.shape[1]} positions. Copy the file again."
        )


def with_marks(facts: Mapping[str, ModelFact], metadata: Mapping[str, str]) -> Facts:
    """Turn values that the file marks as assumed into assumed facts."""
    marks = assumed_names(metadata)

    def weakened(name: str, fact: ModelFact) -> ModelFact:
        if name not in marks or fact.source == "assumed":
            return fact
        return replace(fact, source="assumed", why=fact.why or "since the file was written")

    return {name: weakened(name, fact) for name, fact in facts.items()}


def with_given(facts: Mapping[str, ModelFact], given: Mapping[str, Any], place: str) -> Facts:
    """Replace assumed facts by given values.

    Raises UserError if a given value contradicts a fact. `place` starts the message.
    """
    known = {key: fact.value for key, fact in facts.items() if fact.source != "assumed"}
    wrong = [key for key in given if key in known and not _equal(known[key], given[key])]
    if wrong:
        shows = " and ".join(f"{key} {_plain(known[key])}, not {_plain(given[key])}" for key in wrong)
        raise UserError(f"{place}: its model has {shows}. Leave that out, or name another file.")
    return dict(facts) | {key: ModelFact(value, "given") for key, value in given.items() if key not in known}


def assumed(facts: Mapping[str, ModelFact], given: Collection[str] = ()) -> Facts:
    """Select the assumed facts that were not given."""
    return {name: fact for name, fact in facts.items() if fact.source == "assumed" and name not in given}


def assumed_lines(
    facts: Mapping[str, ModelFact], keys: Mapping[str, str] | None = None, word: str = "Set"
) -> list[str]:
    """Describe each assumed fact and its key in one line.

    `keys` has the key of the tool by the name of the fact. Without a key, the advice is the converter. `word` says what
    to do with a key of a config.
    """
    lines = []
    for name, fact in assumed(facts).items():
        key = (keys or {}).get(name)
        setting = f"{key or f'--set {name}'}={fact.example or _EXAMPLES.get(name, 'N')}"
        if "[" in setting:
            setting = f"'{setting}'" if not setting.startswith("--set ") else f"--set '{setting[6:]}'"
        if name == "activation":
            advice = "The toolkit has no other, so do not use weights of another activation"
        elif key is None:
            advice = advise(f"Record it by tools/convert_checkpoint.py {setting} if it differs")
        else:
            advice = f"{'Add' if key.startswith('--') else word} {setting} if it differs"
        lines.append(f"{name}: {_shown(fact.value)} is assumed {fact.why}, the file does not tell. {advice}")
    return lines


def condition(facts: Mapping[str, ModelFact]) -> str:
    """Name the assumed facts that an equality check relies on."""
    taken = [f"{name}={_shown(fact.value)}" for name, fact in assumed(facts).items()]
    return f"given the assumed {' and '.join(filter(None, (', '.join(taken[:-1]), taken[-1])))}" if taken else ""


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


def _heads(
    tensors: Mapping[str, Tensor], width: int, told: Mapping[str, Any], metadata: Mapping[str, str]
) -> ModelFact | None:
    for pattern, count in _HEADS.items():
        shape = next((tuple(t.shape) for name, t in tensors.items() if t.ndim and re.fullmatch(pattern, name)), None)
        heads = count(shape, width) if shape and 0 < shape[-1] < width else 0
        if heads and width % heads == 0:
            return ModelFact(heads, "shapes")
    published = recorded_value(metadata, PUBLISHED_ARGUMENTS, dict)
    numbers = [heads for heads in told.get("num_heads", []) if width % heads == 0]
    why, family = "in the settings of its trainer", told.get("family", "")
    names = [*told.get("name", []), *(published.get(key) for key in ("model", "arch"))]
    for name in names if not numbers else ():
        if isinstance(name, str) and (heads := _heads_of_name(name, width, family)):
            numbers.append(heads)
            why = f"by the name {name} of its trainer's model{f', as in {family}' if family else ''}"
    if len(set(numbers)) == 1:
        return ModelFact(numbers[0], "recorded", why)
    usual = heads_of_width(width)
    if usual is None:
        return None
    return ModelFact(usual, "assumed", f"from the width {width}", other_heads(width, usual))


def heads_of_width(width: int) -> int | None:
    """Return the usual number of heads of a width, or None."""
    return {size.embed_dim: size.num_heads for size in SIZES.values()}.get(width)


def other_heads(width: int, heads: int) -> str:
    """Return another usual number of heads, for advice."""
    usual = next((width // side for side in (64, 32, 80, 16) if width % side == 0 and width // side != heads), None)
    return str(usual or "N")


def _heads_of_name(name: str, width: int, family: str) -> int | None:
    """Return the number of heads of a named model, or None."""
    if name in (of_family := _HEADS_OF_FAMILY.get(family, {})):
        return of_family[name] if width % of_family[name] == 0 else None
    found = _OURS_OR_PUBLISHED.fullmatch(name)
    if found and (size := SIZES.get(found[1])) and size.embed_dim == width:
        return size.num_heads
    if not (name.startswith(_PLAIN_NAMES) and timm.is_model(name)):
        return None
    with suppress(Exception), warnings.catch_warnings(), torch.random.fork_rng(devices=[]), torch.device("meta"):
        warnings.simplefilter("ignore")  # about old names
        model: Any = timm.create_model(name, pretrained=False, depth=1)
        if isinstance(model, VisionTransformer) and model.embed_dim == width:
            attention: Any = model.blocks[0].attn
            return int(attention.num_heads)
    return None


def _img_size(table: Tensor | None, patch_size: int, told: Mapping[str, Any]) -> ModelFact | None:
    """Find the image size of position embeddings.

    A setting or sine-cosine values show it. Otherwise, a square is assumed.
    """
    if table is None or table.ndim != 3:
        return None
    rows = table.shape[1]
    for size in told.get("img_size", []):
        with suppress(UserError, ValueError):
            h, w = patch_grid(size if isinstance(size, int) else tuple(size), patch_size)
            if rows - h * w in (0, 1):
                return ModelFact(_plain((h * patch_size, w * patch_size)), "recorded")
    with suppress(UserError):  # no shape shows the sides of a grid that is not square
        (h, w), _ = table_grid(rows, None, patch_size)
        if is_sincos(table, (h, w)):
            return ModelFact(h * patch_size, "shapes")
        return ModelFact(h * patch_size, "assumed", f"for a square of {h} x {w} patches")
    return None


def _plain(value: Any) -> Any:
    if isinstance(value, tuple | list) and len(value) == 2:
        return value[0] if value[0] == value[1] else tuple(value)
    return value


def _equal(one: Any, other: Any) -> bool:
    one, other = (tuple(value) if isinstance(value, list) else value for value in (_plain(one), _plain(other)))
    return bool(one == other)
