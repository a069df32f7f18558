"""A slow CrossMAE of loops over images, patches, heads and numbers, from the method specification alone.

It shares no code with the package: parameters come as a flat dict, noise decides the masking. Only for tests.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def reference_loss(
    params: dict[str, Tensor],
    imgs: Tensor,
    noise: Tensor,
    patch_size: int,
    heads: int,
    decoder_heads: int,
    num_visible: int,
    num_dropped: int,
    fused: list[int],
    fuse_input: bool,
    norm_pix: bool,
) -> tuple[Tensor, list[Tensor]]:
    """Loss and, per image, the predictions (M, P) in raster order, of decoder="cross" with fusion."""
    errors, predictions = [], []
    depth = 1 + max(int(key.split(".")[1]) for key in params if key.startswith("blocks."))
    decoder_depth = 1 + max(int(key.split(".")[1]) for key in params if key.startswith("decoder_blocks."))
    for image, row_noise in zip(imgs, noise, strict=True):
        order = sorted(range(len(row_noise)), key=lambda i: float(row_noise[i]))
        visible = order[:num_visible]
        predicted = sorted(order[num_visible + num_dropped :])
        patches = cut_patches(image, patch_size)

        tokens = list(params["cls_token"][0])
        for index in visible:
            flat = patches[index].permute(2, 0, 1).reshape(-1)  # the convolution's weight is channel-first
            weight = params["patch_embed.proj.weight"].reshape(len(params["patch_embed.proj.bias"]), -1)
            embedded = weight @ flat + params["patch_embed.proj.bias"]
            tokens.append(embedded + params["pos_embed"][0, index + 1])
        x = torch.stack(tokens)
        maps = [x] if fuse_input else []
        for index in range(depth):
            name = f"blocks.{index}"
            normed = layer_norm(params, f"{name}.norm1", x)
            qkv = linear(params, f"{name}.attn.qkv", normed)
            q, k, v = qkv.split(x.shape[1], dim=1)
            x = x + linear(params, f"{name}.attn.proj", attend(q, k, v, heads))
            x = x + mlp(params, f"{name}.mlp", layer_norm(params, f"{name}.norm2", x))
            if index in fused:
                maps.append(x)

        queries = [params["decoder_pos_embed"][0, i + 1] + params["mask_token"][0, 0] for i in predicted]
        y = torch.stack(queries)
        for index in range(decoder_depth):
            name = f"decoder_blocks.{index}"
            weights = params["wfm.linear.weight"][index]
            mixed = sum(weights[i] * maps[i] for i in range(len(maps)))
            context = layer_norm(params, f"dec_norms.{index}", mixed)
            q = linear(params, f"{name}.cross_attn.q", layer_norm(params, f"{name}.norm1", y))
            k, v = linear(params, f"{name}.cross_attn.kv", context).split(y.shape[1], dim=1)
            y = y + linear(params, f"{name}.cross_attn.proj", attend(q, k, v, decoder_heads))
            y = y + mlp(params, f"{name}.mlp", layer_norm(params, f"{name}.norm2", y))
        pred = linear(params, "decoder_pred", layer_norm(params, "decoder_norm", y))
        predictions.append(pred)
        for row, index in zip(pred, predicted, strict=True):
            target = patches[index].reshape(-1)
            if norm_pix:
                mean = target.sum() / len(target)
                variance = ((target - mean) ** 2).sum() / (len(target) - 1)
                target = (target - mean) / torch.sqrt(variance + 1e-6)
            errors.extend((row - target) ** 2)
    return sum(errors) / len(errors), predictions


def cut_patches(image: Tensor, size: int) -> list[Tensor]:
    """(C, H, W) to patches (size, size, C), row by row."""
    _, height, width = image.shape
    corners = [(top, left) for top in range(0, height, size) for left in range(0, width, size)]
    return [image[:, top : top + size, left : left + size].permute(1, 2, 0) for top, left in corners]


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    width = q.shape[1] // heads
    rows = []
    for query in q:
        parts = []
        for head in range(heads):
            span = slice(head * width, (head + 1) * width)
            scores = torch.stack([(query[span] * key[span]).sum() / math.sqrt(width) for key in k])
            weights = scores.exp() / scores.exp().sum()
            parts.append(sum(weight * value[span] for weight, value in zip(weights, v, strict=True)))
        rows.append(torch.cat(parts))
    return torch.stack(rows)


def layer_norm(params: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    normed = centred / torch.sqrt((centred**2).mean(-1, keepdim=True) + 1e-6)
    return normed * params[f"{name}.weight"] + params[f"{name}.bias"]


def linear(params: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    return x @ params[f"{name}.weight"].T + params[f"{name}.bias"]


def mlp(params: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    hidden = linear(params, f"{name}.fc1", x)
    hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
    return linear(params, f"{name}.fc2", hidden)
