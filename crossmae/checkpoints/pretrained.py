"""Rebuild a whole pretraining model, encoder and decoder, from its weight file."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from crossmae.checkpoints.formats.recognition import mix_up
from crossmae.checkpoints.loading import load
from crossmae.checkpoints.metadata import (
    BIT_DEPTH,
    MODEL_ARGUMENTS,
    PIXEL_MEAN,
    PIXEL_STD,
    PUBLISHED_ARGUMENTS,
    recorded_arguments,
)
from crossmae.checkpoints.weights import Weights, encoder_arguments, encoder_tensors, read_weights
from crossmae.errors import UserError
from crossmae.models.crossmae import MODEL_DEFAULTS, CrossMAE
from crossmae.models.sizes import SIZES

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Pretrained:
    """A pretraining model in evaluation mode, with its pixel normalisation.

    Attributes:
        mean, std: statistics of each channel, for pixels in 0-1.
        bit_depth: 8 or 16, see `crossmae.data.images`.
        assumed: one sentence for each assumption that neither the file nor the shapes confirm.
    """

    path: Path
    model: CrossMAE
    mean: tuple[float, ...]
    std: tuple[float, ...]
    bit_depth: int
    assumed: tuple[str, ...]


def load_pretrained(path: str | Path, given: Mapping[str, Any] | None = None) -> Pretrained:
    """Build the model of a file and load all its tensors.

    Args:
        path: see `read_weights`.
        given: arguments of `CrossMAE` that replace recorded or deduced values.

    Raises:
        UserError: the file has no decoder; an argument is unknown, cannot be deduced or does not fit the tensors; or
            the pixel statistics are unknown.
    """
    weights = read_weights(path)
    if weights.format not in ("crossmae", "mae"):
        raise mix_up(weights.path, weights.format, weights.metadata, "a whole pretraining model with its decoder")
    arguments, assumed = arguments_of(weights, given or {})
    try:
        model = CrossMAE(**arguments)
    except (ValueError, TypeError) as error:
        listed = ", ".join(f"{key}={value}" for key, value in arguments.items())
        raise UserError(f"{weights.path}: no model with {listed}: {error}") from None
    # The record gives arguments that no shape shows, such as the sides of a grid. All shapes are compared nevertheless.
    load(model, replace(weights, metadata=weights.metadata | {MODEL_ARGUMENTS: json.dumps(arguments)}))
    mean, std, guess = _pixel_statistics(weights, model.in_chans)
    bit_depth = int(weights.metadata.get(BIT_DEPTH, "8"))
    return Pretrained(weights.path, model.eval(), mean, std, bit_depth, (*assumed, *guess))


def arguments_of(weights: Weights, given: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Find the arguments of a whole pretraining model, and list assumptions.

    Args:
        weights: weights of the format "crossmae" or "mae".
        given: arguments of `CrossMAE` that replace recorded or deduced values.
    """
    given = dict(given)
    unknown = sorted(given.keys() - MODEL_DEFAULTS.keys())
    if unknown:
        raise UserError(f"{', '.join(unknown)}: unknown model argument. Use one of {', '.join(MODEL_DEFAULTS)}.")
    assumed: list[str] = []
    recorded = recorded_arguments(weights.metadata)
    arguments = recorded | given if recorded else _deduce(weights, given, assumed)
    for key in ("img_size", "fuse_blocks"):
        if isinstance(arguments.get(key), list):
            arguments[key] = tuple(arguments[key])
    return arguments, assumed


def parse_settings(settings: Sequence[str]) -> dict[str, Any]:
    """Parse KEY=VALUE pairs with YAML values."""
    parsed = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        try:
            parsed[key] = yaml.safe_load(value)
        except yaml.YAMLError:
            equals = ""
        if not equals:
            raise UserError(f"--set {setting}: not KEY=VALUE. Write for example num_heads=6 or 'fuse_blocks=[0,11]'.")
    return parsed


def _deduce(weights: Weights, given: dict[str, Any], assumed: list[str]) -> dict[str, Any]:
    """Deduce arguments from shapes and published settings (specification, section 1.3)."""
    tensors = weights.tensors
    published = json.loads(weights.metadata.get(PUBLISHED_ARGUMENTS, "{}"))
    arguments = encoder_arguments(encoder_tensors(weights))
    width = tensors["mask_token"].shape[-1]
    heads = {size.decoder_embed_dim: size.decoder_num_heads for size in SIZES.values()}.get(width)
    arguments |= {"decoder_num_heads": heads} if heads else {}
    arguments["decoder_embed_dim"] = width
    arguments["decoder_depth"] = len({name.split(".")[1] for name in tensors if name.startswith("decoder_blocks.")})
    cross = "cross_self" if "decoder_blocks.0.self_attn.qkv.weight" in tensors else "cross"
    arguments["decoder"] = "self" if weights.format == "mae" else cross
    if "wfm.linear.weight" in tensors:
        arguments |= _fusion(weights, arguments["depth"], published, given, assumed)
    elif weights.format == "crossmae":
        arguments["fuse_blocks"] = ()
    if "norm_pix_loss" not in given | published:
        assumed.append("predicted patches are standardised (norm_pix_loss=true), as in every published model")
    arguments["norm_pix_loss"] = bool(published.get("norm_pix_loss", True))
    arguments |= given
    missing = [key for key in ("img_size", "num_heads", "decoder_num_heads") if key not in arguments]
    if missing:
        raise UserError(f"{weights.path}: {ask(missing)}")
    return arguments


def _fusion(
    weights: Weights, depth: int, published: Mapping[str, Any], given: Mapping[str, Any], assumed: list[str]
) -> dict[str, Any]:
    columns = weights.tensors["wfm.linear.weight"].shape[1]
    if "fuse_blocks" in given:
        blocks = given["fuse_blocks"]
        return {"fuse_input": columns > (depth if blocks is None else len(blocks))}
    chosen, fuse_input = published.get("use_fm"), given.get("fuse_input", published.get("use_input"))
    if chosen is not None and fuse_input is not None:
        return {"fuse_blocks": None if chosen == [-1] else chosen, "fuse_input": bool(fuse_input)}
    if columns == depth + 1:
        return {"fuse_blocks": None, "fuse_input": True}
    if columns == depth and not fuse_input:
        if fuse_input is None:
            assumed.append("every block's map and not the input is mixed for the decoder (fuse_input=false)")
        return {"fuse_blocks": None, "fuse_input": False}
    raise UserError(
        f"{weights.path}: {columns} of {depth + 1} encoder maps are mixed for the decoder, and "
        f"{ask(['fuse_blocks', 'fuse_input'])}"
    )


def _pixel_statistics(weights: Weights, channels: int) -> tuple[tuple[float, ...], tuple[float, ...], list[str]]:
    try:
        mean, std = (json.loads(weights.metadata[key]) for key in (PIXEL_MEAN, PIXEL_STD))
        if len(mean) == len(std) == channels:
            return tuple(map(float, mean)), tuple(map(float, std)), []
    except (KeyError, json.JSONDecodeError):
        if channels == 3:
            return IMAGENET_MEAN, IMAGENET_STD, ["pixels were normalised by ImageNet's mean and deviation"]
    raise UserError(
        f"{weights.path}: the metadata {PIXEL_MEAN!r} and {PIXEL_STD!r} do not have one number for each of the "
        f"{channels} channels. Write them with crossmae.checkpoints.weights.save_weights."
    )


def ask(keys: list[str]) -> str:
    """Describe missing arguments, and the `--set` option that gives them."""
    examples = {
        "img_size": "'img_size=[HEIGHT,WIDTH]'",
        "mlp_ratio": "mlp_ratio=4",
        "fuse_blocks": "'fuse_blocks=[0,11]'",
        "fuse_input": "fuse_input=true",
    }
    missing = " and ".join(keys)
    return f"the file does not show {missing}. Add --set {' '.join(examples.get(key, f'{key}=16') for key in keys)}"
