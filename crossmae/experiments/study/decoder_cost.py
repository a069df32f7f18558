"""Arithmetic and seconds of decoders, as ratios to the decoder of MAE.

    python -m crossmae.experiments.study.decoder_cost --output OUT/decoder.json

Arithmetic is counted by fvcore on the real models: matrix products, those of attention included, as two operations per
multiply-add. Seconds are of forward and backward pass of the decoder alone. Both decoders of a pair are timed in turn,
A-B-A-B, so that other work on the machine slows both. One thread computes.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from fvcore.nn import FlopCountAnalysis
from torch import Tensor, nn

from crossmae.errors import run_cli, set_up_log
from crossmae.experiments.study.arms import FASHION_MODEL, MASK_RATIO
from crossmae.files import make_folder, write_json
from crossmae.models.crossmae import MODEL_DEFAULTS, CrossMAE
from crossmae.models.masking import split_patches
from crossmae.models.sizes import model_arguments
from crossmae.training.devices import open_autocast

log = logging.getLogger(__name__)

PRODUCTS = ("linear", "conv", "matmul", "bmm", "addmm", "einsum", "scaled_dot_product_attention")
ROUNDS = 5  # repetitions of A-B
IMAGES = {"fashion_mnist": 128, "small": 8, "base": 4, "large": 4}  # of a timed batch
NAMED = {"small": "vit_small_patch16", "base": "vit_base_patch16", "large": "vit_large_patch16"}


class _Whole(nn.Module):
    """The forward pass with fixed ratios, as fvcore traces it."""

    def __init__(self, model: CrossMAE, predict_ratio: float) -> None:
        super().__init__()
        self.model, self.predict_ratio = model, predict_ratio

    def forward(self, images: Tensor, noise: Tensor) -> Tensor:
        return self.model(images, MASK_RATIO, self.predict_ratio, noise).loss


def count_products(model: CrossMAE, predict_ratio: float) -> dict[str, float]:
    """Count the operations of one image's forward pass, by "encoder" and "decoder".

    The decoder is everything behind the last encoder block: fusion of maps, decoder blocks and pixel head.
    Normalisation and activations are not counted.
    """
    shape = (1, model.in_chans, *model.img_size)
    analysis = FlopCountAnalysis(_Whole(model.eval(), predict_ratio), (torch.zeros(shape), _noise(model, 1)))
    analysis.set_op_handle("aten::scaled_dot_product_attention", _attention_products)
    analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    total = _products(analysis.by_operator())
    by_module = analysis.by_module_and_operator()
    encoder = sum(_products(by_module[f"model.{name}"]) for name in ("patch_embed", "blocks"))
    return {"encoder": 2.0 * encoder, "decoder": 2.0 * (total - encoder)}


def _products(by_operator: Mapping[str, float]) -> float:
    return float(sum(by_operator.get(name, 0) for name in PRODUCTS))


def _attention_products(inputs: Sequence[Any], _: Sequence[Any]) -> float:
    q, k, v = (value.type().sizes() for value in inputs[:3])
    return float(math.prod(q[:-1]) * k[-2] * (q[-1] + v[-1]))


def _noise(model: CrossMAE, images: int) -> Tensor:
    return torch.rand(images, model.num_patches, generator=torch.Generator().manual_seed(0))


def decoder_formula(arguments: Mapping[str, Any], predict_ratio: float, *, attention: bool = True) -> float:
    """Compute the operations of a decoder for one image by formula.

    Args:
        arguments: arguments of `CrossMAE`.
        attention: count the products of queries, keys and values, and not only the linear layers.
    """
    a = MODEL_DEFAULTS | dict(arguments)
    patches = (a["img_size"] // a["patch_size"]) ** 2
    n = int(patches * (1 - MASK_RATIO)) + 1  # visible tokens with the class token
    width, d, depth = a["embed_dim"], a["decoder_embed_dim"], a["decoder_depth"]
    pixels = a["patch_size"] ** 2 * a["in_chans"]
    if a["decoder"] == "self":
        tokens = patches + 1
        blocks = 24 * tokens * d**2 + attention * 4 * tokens**2 * d
        rest = 2 * n * width * d + 2 * tokens * d * pixels
    else:
        m = patches - int(patches * (1 - MASK_RATIO)) - int(patches * (MASK_RATIO - predict_ratio))
        blocks = 20 * m * d**2 + 4 * n * width * d + attention * 4 * m * n * d
        maps = a["depth"] + 1 if a["fuse_blocks"] is None else 0
        rest = 2 * n * width * maps * depth + 2 * m * d * pixels
    return float(depth * blocks + rest)


def training_operations(arguments: Mapping[str, Any], predict_ratio: float) -> float:
    """Count the operations of a training step per image.

    A step costs three times the forward pass.
    """
    return 3.0 * sum(count_products(CrossMAE(**arguments), predict_ratio).values())


def time_decoders(models: Sequence[tuple[CrossMAE, float]], images: int, rounds: int = ROUNDS) -> list[float]:
    """Measure the median seconds of both passes of some decoders, in turn.

    Args:
        models: models of the same image size, each with its share of predicted patches.
    """
    runs = [decoder_passes(model, predict_ratio, images) for model, predict_ratio in models]
    seconds: list[list[float]] = [[] for _ in runs]
    for number in range(rounds + 1):  # the first round warms up
        for run, found in zip(runs, seconds, strict=True):
            before = time.perf_counter()
            run()
            if number:
                found.append(time.perf_counter() - before)
    return [statistics.median(found) for found in seconds]


def decoder_passes(model: CrossMAE, predict_ratio: float, images: int, precision: str = "fp32") -> Callable[[], None]:
    """Prepare the decoder's input, and return a function that runs both passes."""
    device = model.pos_embed.device
    pixels = torch.rand(images, model.in_chans, *model.img_size, generator=torch.Generator().manual_seed(1)).to(device)
    counts = model.patch_counts(MASK_RATIO, predict_ratio)
    visible, predicted = split_patches(_noise(model, images).to(device), counts)
    tokens = model.embed(pixels, visible).detach()
    maps = [torch.randn_like(tokens).requires_grad_() for _ in range(max(len(model.fused_blocks), 1))]

    def run() -> None:
        with open_autocast(precision, device):
            if not model.fused_blocks:
                contexts = [model.norm(maps[0])] * len(model.decoder_blocks)
            else:
                contexts = list(model.wfm([tokens, *maps] if model.fuse_input else maps))
            loss = model.reconstruct(pixels, contexts, visible, predicted).loss
        loss.backward()

    return run


def compare(name: str, arguments: Mapping[str, Any], mae: Mapping[str, Any], rounds: int) -> dict[str, Any]:
    """Compare the decoders of a size with the decoder of MAE.

    Args:
        name: key of IMAGES.
        arguments: arguments of the CrossMAE model, without a depth of the decoder.
        mae: arguments of the MAE model.

    Returns a row for each depth and share, with ratios of MAE to CrossMAE.
    """
    other = CrossMAE(**mae)
    mae_counted = count_products(other, MASK_RATIO)["decoder"]
    depths = (2, 4, 6) if name == "fashion_mnist" else (8, 12)
    rows = []
    for depth in depths:
        for share in (0.25, 0.75):
            own = dict(arguments) | {"decoder_depth": depth}
            model = CrossMAE(**own)
            counted = count_products(model, share)["decoder"]
            seconds, mae_seconds = time_decoders([(model, share), (other, MASK_RATIO)], IMAGES[name], rounds)
            rows.append(
                {
                    "depth": depth,
                    "predicted": share,
                    "operations": counted,
                    "mae_operations": mae_counted,
                    "ratio": mae_counted / counted,
                    "formula": decoder_formula(mae, MASK_RATIO) / decoder_formula(own, share),
                    "linear_only": decoder_formula(mae, MASK_RATIO, attention=False)
                    / decoder_formula(own, share, attention=False),
                    "seconds": seconds,
                    "mae_seconds": mae_seconds,
                    "seconds_ratio": mae_seconds / seconds,
                }
            )
            log.info("%s", json.dumps({"size": name} | rows[-1]))
    return {"size": name, "rows": rows}


def sizes_to_compare(names: Sequence[str]) -> list[tuple[str, dict[str, Any], dict[str, Any]]]:
    """List name, arguments of CrossMAE and arguments of MAE."""
    found = []
    for name in names:
        if name == "fashion_mnist":
            found.append((name, dict(FASHION_MODEL), dict(FASHION_MODEL) | {"decoder": "self", "decoder_depth": 4}))
        else:
            found.append((name, model_arguments(f"crossmae_{NAMED[name]}"), model_arguments(f"mae_{NAMED[name]}")))
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """Count and time the decoders, and write a json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="json to write")
    parser.add_argument("--sizes", nargs="+", choices=list(IMAGES), default=list(IMAGES), help="models to compare")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="repetitions (default: %(default)s)")
    args = parser.parse_args(argv)
    set_up_log()
    torch.set_num_threads(1)  # the seconds are those of one thread on every machine
    make_folder(args.output.parent, "--output")
    write_json(args.output, [compare(*size, args.rounds) for size in sizes_to_compare(args.sizes)])


if __name__ == "__main__":
    run_cli(main)
