"""timm's VisionTransformer around a pretrained encoder: architecture, weights, parameter groups.

Shapes: L patches, E width, N classes.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, Literal, cast, get_args

import timm.layers
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from crossmae.checkpoints.formats.facts import assumed, encoder_facts
from crossmae.checkpoints.load_report import LoadReport
from crossmae.checkpoints.loading import check_plain, load
from crossmae.checkpoints.weights import Weights, encoder_home, encoder_tensors
from crossmae.errors import UserError
from crossmae.models.encoder import patch_grid
from crossmae.models.layers import DropPath, LayerNorm
from crossmae.models.linear import use_linear
from crossmae.pretraining.config import Pool

log = logging.getLogger(__name__)

HeadKind = Literal["linear", "batchnorm"]


@dataclass(frozen=True)
class Architecture:
    """Sizes of a plain ViT, with the names of the arguments of `ViTEncoder`.

    Attributes:
        img_size: height and width in pixels, multiples of `patch_size`.
        mlp_ratio: hidden width of the MLP divided by E.
        class_tokens: number of class tokens, K.

    Raises:
        ValueError: the sizes do not fit together.
    """

    img_size: tuple[int, int]
    patch_size: int
    in_chans: int
    embed_dim: int
    depth: int
    num_heads: int
    mlp_ratio: float
    class_tokens: int = 1

    def __post_init__(self) -> None:
        patch_grid(self.img_size, self.patch_size)
        if self.embed_dim % self.num_heads:
            raise ValueError(f"embed_dim {self.embed_dim} is not a multiple of num_heads {self.num_heads}")


def architecture_of(weights: Weights, **given: Any) -> Architecture:
    """Infer the architecture of a file's encoder. Given values complete it.

    Args:
        weights: any file with a ViT encoder.
        given: fields of `Architecture`; None counts as not given. `img_size` (one number, or height and width),
            `patch_size` and `in_chans` may differ from the file, because `load_encoder_weights` resamples the weights.

    Raises:
        UserError: the file has no encoder, a given value contradicts the file, the file does not tell a needed value,
            or the sizes do not fit together.
    """
    check_plain(weights)
    facts = encoder_facts(encoder_tensors(weights), weights.metadata)
    found = {key: fact.value for key, fact in facts.items() if key not in ("norm_eps", "activation")}
    given = {key: value for key, value in given.items() if value is not None}
    fixed = ["embed_dim", "depth", "mlp_ratio"]
    fixed += ["num_heads"] if "num_heads" not in assumed(facts) else []
    wrong = [key for key in fixed if key in found and given.get(key, found[key]) != found[key]]
    if wrong:
        has = " and ".join(f"{key} {found[key]}, not {given[key]}" for key in wrong)
        raise UserError(f"{weights.path}: its encoder has {has}. Leave that out, or name another file.")
    arguments = {"class_tokens": 1} | found | given
    missing = [field.name for field in fields(Architecture) if field.name not in arguments]
    if missing:
        what, keys = " and ".join(missing), " ".join(f"model.{name}=..." for name in missing)
        raise UserError(f"{weights.path}: does not record {what} of its encoder. In a config, add {keys}.")
    size = arguments["img_size"]
    arguments["img_size"] = (size, size) if isinstance(size, int) else tuple(size)
    try:
        return Architecture(**arguments)
    except ValueError as error:
        raise UserError(f"{weights.path}: {error}") from None


class SeveralTokensViT(VisionTransformer):
    """timm's model with several class tokens, as in `ViTEncoder`. Pooling takes their mean.

    Args:
        class_tokens: K.
        arguments: arguments of timm's model.
    """

    def __init__(self, class_tokens: int, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.num_prefix_tokens = class_tokens
        self.cls_token = nn.Parameter(0.02 * torch.randn(1, class_tokens, self.embed_dim))

    def _pos_embed(self, x: Tensor) -> Tensor:
        """Add positions to patches (B, L, E), and put class tokens first."""
        tokens, positions = cast(Tensor, self.cls_token), cast(Tensor, self.pos_embed)
        tokens = (tokens + positions[:, :1]).expand(x.shape[0], -1, -1)
        return self.pos_drop(torch.cat([tokens, x + positions[:, 1:]], dim=1))

    def pool(self, x: Tensor, pool_type: str | None = None) -> Tensor:
        """Pool tokens (B, K + L, E) to (B, E)."""
        if (pool_type or self.global_pool) == "token":
            return x[:, : self.num_prefix_tokens].mean(dim=1)
        return super().pool(x, pool_type)


def build_vit(
    architecture: Architecture, num_classes: int, pool: Pool = "avg", drop_path: float = 0.0, head: HeadKind = "linear"
) -> VisionTransformer:
    """Build a classifier with random weights and timm's tensor names.

    Source: method specification, sections 1.10-1.11.

    | pool  | before the head                           |
    | ----- | ----------------------------------------- |
    | `avg` | mean of the patch tokens, then `fc_norm`  |
    | `cls` | `norm`, then the (mean of) class tokens   |

    Args:
        num_classes: N. 0 builds no head.
        drop_path: drop rate of the last block. It grows linearly from 0 in the first block.

    Raises:
        ValueError: the pool or the head is unknown.
    """
    if pool not in get_args(Pool) or head not in get_args(HeadKind):
        known = f"Choose pool from {get_args(Pool)}, head from {get_args(HeadKind)}."
        raise ValueError(f"pool={pool!r}, head={head!r}: unknown. {known}")
    sizes = dict(vars(architecture))
    tokens = sizes.pop("class_tokens")
    model = (VisionTransformer if tokens == 1 else partial(SeveralTokensViT, tokens))(
        **sizes,
        num_classes=num_classes,
        global_pool="token" if pool == "cls" else "avg",
        drop_path_rate=drop_path,
        norm_layer=LayerNorm,
    )
    for block in model.blocks:
        for name in ("drop_path1", "drop_path2"):
            if isinstance(getattr(block, name), timm.layers.DropPath):
                setattr(block, name, DropPath(getattr(block, name).drop_prob))  # the same, but compiled only once
    if num_classes:
        model.add_module("head", build_head(architecture.embed_dim, num_classes, head))
    use_linear(model)
    return model


def build_head(width: int, num_classes: int, head: HeadKind) -> nn.Module:
    """Build a random head for `build_vit`, (B, E) to (B, N).

    The batchnorm head has BatchNorm, without scale and shift, before its linear layer. Weights are truncated normal.
    """
    linear = nn.Linear(width, num_classes)
    std = 2e-5 if head == "linear" else 0.01
    # With the usual bounds of -2 and 2, which are many deviations away, rounding sets one weight in 2 ** 24 to exactly
    # -2. This would happen in one of twenty heads of a ViT-B with 1000 classes.
    nn.init.trunc_normal_(linear.weight, std=std, a=-4 * std, b=4 * std)
    nn.init.zeros_(linear.bias)
    if head == "linear":
        return linear
    return nn.Sequential(nn.BatchNorm1d(width, affine=False, eps=1e-6), linear)


def load_encoder_weights(model: VisionTransformer, weights: Weights) -> LoadReport:
    """Load the encoder weights of any file.

    Heads, the decoder and, with average pooling, the final norm are left out. Position embeddings and patch filters are
    resampled in float32 to the model's grid, patch size and channels; the report lists them. With class-token pooling,
    the final norm keeps its initial weights if the file has no final norm. CrossMAE files have none (method
    specification, section 1.3). With average pooling, the class token keeps its initial weights if the file has no
    class token. Files converted for detection have none.

    Raises:
        UserError: the file has no encoder, another architecture, or no class token to pool; or a tensor is missing or
            unknown to a plain ViT. Nothing was loaded then.
    """
    cls = model.global_pool == "token"
    new = [r"head\.", r"fc_norm\."]
    home = encoder_home(weights.tensors) or ""
    if f"{home}cls_token" not in weights.tensors:
        encoder_tensors(weights)  # raises UserError if there is no encoder
        if cls:
            raise UserError(f"{weights.path}: has no class token to pool. Use average pooling.")
        new.append("cls_token$")
    if f"{home}norm.weight" not in weights.tensors:
        new.append(r"norm\.")
    report = load(model, weights, part="encoder", also=("norm.",) if cls else (), new=tuple(new), resample=True)
    for entry in report.entries:
        if entry.status == "resampled":
            log.info("%s of %s: %s", entry.name, weights.path, entry.reason)
    fresh = report.names("new")
    if "norm.weight" in fresh:
        log.info("%s has no final norm: the norm of class-token pooling starts with scale 1, shift 0", weights.path)
    if "cls_token" in fresh:
        log.info("%s has no class token: it starts from random numbers", weights.path)
    return report


def parameter_groups(model: VisionTransformer, weight_decay: float, layer_decay: float) -> list[dict[str, Any]]:
    """Group trainable parameters by layer and weight decay.

    Source: method specification, section 1.10.

    For n blocks, layer 0 has the class token, positions and patch embedding. Layer i + 1 is block i. Layer n + 1 has
    all other parameters. The `lr_scale` of a group is layer_decay ** (n + 1 - layer), and the schedule multiplies the
    learning rate by it. One-dimensional tensors, the class token and positions have no weight decay.

    Returns:
        Groups with `params`, `weight_decay`, `lr_scale` and `name`. ViT-B has 28 groups.
    """
    last = len(model.blocks) + 1
    groups: dict[str, dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            layer = _layer(name, last)
            decays = parameter.ndim > 1 and name not in ("cls_token", "pos_embed")
            key = f"layer_{layer}_{'decay' if decays else 'no_decay'}"
            rates = {"weight_decay": weight_decay if decays else 0.0, "lr_scale": layer_decay ** (last - layer)}
            groups.setdefault(key, {"params": [], **rates, "name": key})["params"].append(parameter)
    return list(groups.values())


def _layer(name: str, last: int) -> int:
    if name.startswith(("cls_token", "pos_embed", "patch_embed.")):
        return 0
    return int(name.split(".")[1]) + 1 if name.startswith("blocks.") else last
