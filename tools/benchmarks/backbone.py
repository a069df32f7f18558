"""Suites of the detector's backbone: one attention layer, and the whole ViT with its pyramid, against detectron2."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from detectron2.modeling.backbone.fpn import LastLevelMaxPool
from detectron2.modeling.backbone.vit import Attention as TheirAttention
from detectron2.modeling.backbone.vit import SimpleFeaturePyramid
from detectron2.modeling.backbone.vit import ViT as TheirViT
from torch import Tensor, nn

from crossmae.models.layers import LayerNorm
from crossmae.training.devices import choose_precision, open_autocast
from det.backbone.attention import SpatialAttention
from det.backbone.vit import SCALE_FACTORS, ViT, build_pyramid
from det.config import load_det_config
from tools.benchmarks.measuring import Comparison, Gate, Row, largest_difference

Build = Callable[[], Comparison | Row]
# Name, images or windows, side in tokens; goals of time and memory of the forward pass and of both passes.
Goals = Mapping[str, float]
Layer = tuple[str, int, int, Goals, Goals, Goals, Goals]
LAYERS: tuple[Layer, ...] = (
    ("global", 1, 64, {"cpu": 2.5}, {}, {"cpu": 1.1, "cuda": 3.0}, {"cpu": 0.25, "cuda": 0.1}),
    ("window", 25, 14, {"cpu": 1.2}, {}, {"cpu": 1.1}, {}),
)
VIT_B = {"patch_size": 16, "embed_dim": 768, "depth": 12, "num_heads": 12}
ON_CPU = ("SOLVER.AMP.ENABLED=False", "MODEL.DEVICE=cpu")  # only the kind of attention is read
VIT_GOALS = (({"cpu": 2.0}, {"cpu": 0.15}), ({"cpu": 1.3}, {"cpu": 0.5}))


def attention(
    device: torch.device,
    layers: Sequence[Layer] = LAYERS,
    width: int = 768,
    heads: int = 12,
) -> list[Build]:
    """List attention layers, forward and both passes."""
    found: list[Build] = []
    for name, batch, side, goals, memory, both_goals, both_memory in layers:
        label = f"{name} attention {side}x{side}, {batch} at once, {heads} heads"
        found.append(partial(compare_attention, label, batch, side, width, heads, device, False, goals, memory))
        found.append(
            partial(compare_attention, label, batch, side, width, heads, device, True, both_goals, both_memory)
        )
    return found


def compare_attention(
    label: str,
    batch: int,
    side: int,
    width: int,
    heads: int,
    device: torch.device,
    both: bool,
    goals: Mapping[str, float],
    memory_goals: Mapping[str, float],
) -> Comparison:
    """Compare a layer with detectron2's, with the same weights and relative positions."""
    torch.manual_seed(0)
    chosen: Any = load_det_config("coco_mask_rcnn.yaml", ON_CPU).MODEL.VIT.ATTENTION
    ours = SpatialAttention(width, heads, 0, side, chosen)
    for table in (ours.rel_pos_h, ours.rel_pos_w):
        nn.init.normal_(table, std=0.2)
    other = TheirAttention(width, heads, use_rel_pos=True, input_size=(side, side))
    other.load_state_dict(ours.state_dict(), strict=True)
    x = torch.randn(batch, side, side, width, device=device)
    sides = [passes(layer.to(device), x, both) for layer in (ours, other)]
    return Comparison(
        what=f"{label}, {describe_passes(both)}",
        against="detectron2's layer",
        ours=sides[0],
        other=sides[1],
        goals=goals,
        memory_goals=memory_goals,
        gate=lambda: check_passes(ours, other, x, both, 1e-4),
    )


def describe_passes(both: bool) -> str:
    """Name the passes that are measured."""
    return "forward and backward" if both else "forward"


def passes(module: nn.Module, x: Tensor, both: bool) -> Callable[[], None]:
    """Return one or both passes, in the precision of `auto`."""
    precision = choose_precision("auto", x.device)

    def run() -> None:
        with torch.set_grad_enabled(both), open_autocast(precision, x.device):
            outputs = flat(module(x))
        if both:
            torch.autograd.backward([one.float().mean() for one in outputs])
            module.zero_grad(set_to_none=True)

    return run


def flat(outputs: Tensor | dict[str, Tensor]) -> list[Tensor]:
    """List the outputs of a layer or a pyramid."""
    return list(outputs.values()) if isinstance(outputs, dict) else [outputs]


def check_passes(ours: nn.Module, other: nn.Module, x: Tensor, both: bool, limit: float) -> Gate:
    """Compare outputs, and with both passes all gradients, in fp32."""
    found = []
    for module in (ours, other):
        with torch.set_grad_enabled(both):
            outputs = flat(module(x))
        if both:
            # Squares would have no gradient where the last layer is a norm.
            torch.stack([(one * one.detach().roll(1, 1)).mean() for one in outputs]).sum().backward()
        gradients = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
        found.append([*(one.detach() for one in outputs), *(gradients[name] for name in sorted(gradients))])
        module.zero_grad(set_to_none=True)
    return Gate(largest_difference(*found), limit)


def vitdet(
    device: torch.device,
    img_size: int = 1024,
    images: int | None = None,
    size: Mapping[str, Any] = VIT_B,
    window: int = 14,
) -> list[Build]:
    """List the backbone with its pyramid, forward and both passes."""
    count = images or (4 if device.type == "cuda" else 1)
    return [partial(compare_backbones, device, img_size, count, size, window, both) for both in (False, True)]


def make_backbones(
    img_size: int, size: Mapping[str, Any], window: int, pretrain_size: int = 224
) -> tuple[nn.Module, nn.Module]:
    """Build our backbone and detectron2's with the same random weights."""
    torch.manual_seed(0)
    depth = size["depth"]
    last = tuple(depth * quarter // 4 - 1 for quarter in (1, 2, 3, 4))
    net = ViT(img_size, pretrain_size, **size, window_size=window, global_blocks=last)
    for name, parameter in net.named_parameters():
        if "rel_pos" in name:
            nn.init.normal_(parameter, std=0.2)
    ours = build_pyramid(net)
    their_net = TheirViT(
        img_size,
        **size,
        drop_path_rate=0.0,
        norm_layer=LayerNorm,
        use_rel_pos=True,
        window_size=window,
        window_block_indexes=tuple(set(range(depth)) - set(last)),
        pretrain_img_size=pretrain_size,
        out_feature="last_feat",
    )
    other = SimpleFeaturePyramid(their_net, "last_feat", 256, SCALE_FACTORS, LastLevelMaxPool(), "LN")
    other.load_state_dict(ours.state_dict(), strict=True)
    return ours, other


def compare_backbones(
    device: torch.device, img_size: int, images: int, size: Mapping[str, Any], window: int, both: bool
) -> Comparison:
    """Compare two backbones with the same weights."""
    ours, other = (side.to(device) for side in make_backbones(img_size, size, window))
    x = torch.randn(images, 3, img_size, img_size, device=device)
    goals, memory_goals = VIT_GOALS[both]
    return Comparison(
        what=f"backbone of width {size['embed_dim']} at {img_size}, batch {images}, {describe_passes(both)}",
        against="detectron2's ViT and pyramid",
        ours=passes(ours, x, both),
        other=passes(other, x, both),
        goals=goals,
        memory_goals=memory_goals,
        gate=lambda: check_passes(ours, other, x, both, 1e-4),
    )
