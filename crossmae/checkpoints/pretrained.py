"""Rebuild a whole pretraining model, encoder and decoder, from its weight file."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import crossmae
from crossmae.checkpoints.formats.facts import (
    SET_OPTION,
    Facts,
    ModelFact,
    assumed,
    assumed_lines,
    encoder_facts,
    other_heads,
    with_given,
    with_marks,
)
from crossmae.checkpoints.formats.model_folder import save_folder, source_metadata
from crossmae.checkpoints.formats.recognition import mix_up
from crossmae.checkpoints.loading import load
from crossmae.checkpoints.metadata import (
    ACTIVATION,
    ASSUMED,
    BIT_DEPTH,
    FORMAT,
    MODEL_ARGUMENTS,
    NORM_EPS,
    PIXEL_MEAN,
    PIXEL_STD,
    PUBLISHED_ARGUMENTS,
    UNKNOWN,
    VERSION,
    assumed_names,
    marked,
    recorded_arguments,
    recorded_bit_depth,
    recorded_value,
)
from crossmae.checkpoints.weights import Weights, encoder_tensors, read_weights
from crossmae.errors import UserError
from crossmae.files import load_json, load_yaml
from crossmae.models.crossmae import MODEL_DEFAULTS, CrossMAE
from crossmae.models.sizes import OFF_BY_DEFAULT, SIZES


def _numbers(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(each, int | float) for each in value)


# Values that are not arguments of a model but metadata: their check, and its words.
RECORDED: dict[str, tuple[Callable[[Any], bool], str]] = {
    NORM_EPS: (lambda value: isinstance(value, float) and 0 < value < 1, "a number between 0 and 1, such as 1.0e-6"),
    ACTIVATION: (lambda value: value == "gelu", "gelu, the only activation here"),
    PIXEL_MEAN: (_numbers, "a list of numbers, one per channel"),
    PIXEL_STD: (lambda value: _numbers(value) and min(value) > 0, "a list of numbers above 0, one per channel"),
    BIT_DEPTH: (lambda value: value in (8, 16), "8 or 16"),
    "pool": (lambda value: value in ("avg", "cls"), "avg or cls"),
}
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Pretrained:
    """A pretraining model in evaluation mode, with its pixel normalisation.

    Attributes:
        mean, std: statistics of each channel, for pixels in 0-1.
        bit_depth: 8 or 16, see `crossmae.data.images`.
        assumed: one line for each value that neither the file nor the shapes show, with the option that sets it.
        metadata: of the file, completed by the licence, the source and the run, see `source_metadata`.
    """

    path: Path
    model: CrossMAE
    mean: tuple[float, ...]
    std: tuple[float, ...]
    bit_depth: int
    assumed: tuple[str, ...]
    metadata: dict[str, str]


def load_pretrained(path: str | Path, given: Mapping[str, Any] | None = None) -> Pretrained:
    """Build the model of a file and load all its tensors.

    Args:
        path: see `read_weights`.
        given: arguments of `CrossMAE` and `RECORDED` values, where the file does not tell them.

    Raises:
        UserError: the file has no decoder; an argument is unknown, contradicts the file, cannot be deduced or does not
            fit the tensors; or the pixel statistics are unknown.
    """
    weights = read_weights(path)
    if weights.format not in ("crossmae", "mae"):
        raise mix_up(weights.path, weights.format, weights.metadata, "a whole pretraining model with its decoder")
    given = dict(given or {})
    weights = with_metadata(weights, {key: given.pop(key) for key in RECORDED if key in given})
    arguments, facts = arguments_of(weights, given)
    try:
        model = CrossMAE(**arguments)
    except (ValueError, TypeError) as error:
        listed = ", ".join(f"{key}={value}" for key, value in arguments.items())
        raise UserError(f"{weights.path}: no model with {listed}: {error}") from None
    # The record gives arguments that no shape shows, such as the sides of a grid. All shapes are compared nevertheless.
    load(model, replace(weights, metadata=weights.metadata | {MODEL_ARGUMENTS: json.dumps(arguments)}))
    mean, std = _pixel_statistics(weights, model.in_chans)
    bit_depth = recorded_bit_depth(weights.metadata)
    lines = assumed_lines(facts | pixel_facts(weights, model.in_chans), SET_OPTION)
    metadata = source_metadata(weights) | (marked(names) if (names := assumed(facts).keys()) else {})
    return Pretrained(weights.path, model.eval(), mean, std, bit_depth, tuple(lines), metadata)


def load_model(path: str | Path) -> CrossMAE:
    """Load a pretraining model, which keeps the metadata of its file.

    Raises the errors of `load_pretrained`.
    """
    found = load_pretrained(path)
    found.model.metadata = found.metadata
    return found.model


def save_model(model: CrossMAE, folder: str | Path, **options: Any) -> Path:
    """Save a pretraining model as a folder, see `save_folder` for the options."""
    arguments = {key: value for key, value in model.arguments.items() if OFF_BY_DEFAULT.get(key) != value}
    about = {FORMAT: "crossmae", MODEL_ARGUMENTS: json.dumps(arguments), VERSION: crossmae.__version__}
    return save_folder(folder, model.state_dict(), model.metadata | about, **options)


def arguments_of(weights: Weights, given: Mapping[str, Any]) -> tuple[dict[str, Any], Facts]:
    """Find the arguments of a whole pretraining model, and their facts.

    Args:
        weights: weights of the format "crossmae" or "mae".
        given: arguments of `CrossMAE` that the file does not show.

    Raises UserError if a given argument is unknown or contradicts the file.
    """
    given = dict(given)
    unknown = sorted(given.keys() - MODEL_DEFAULTS.keys())
    if unknown:
        raise UserError(f"{', '.join(unknown)}: unknown model argument. Use one of {', '.join(MODEL_DEFAULTS)}.")
    facts = with_given(whole_facts(weights, given), given, str(weights.path))
    needed = () if recorded_arguments(weights.metadata) else ("img_size", "num_heads", "decoder_num_heads")
    if missing := [key for key in needed if key not in facts]:
        raise UserError(f"{weights.path}: {ask(missing)}")
    arguments = {key: fact.value for key, fact in facts.items() if key not in ("norm_eps", "activation")}
    for key in ("img_size", "fuse_blocks"):
        if isinstance(arguments.get(key), list):
            arguments[key] = tuple(arguments[key])
    return arguments, facts


def whole_facts(weights: Weights, given: Mapping[str, Any]) -> Facts:
    """Find the facts about a whole pretraining model, see `arguments_of`."""
    facts, recorded = encoder_facts(encoder_tensors(weights), weights.metadata), recorded_arguments(weights.metadata)
    if not recorded:
        return facts | _decoder_facts(weights, facts["depth"].value, given)
    _check_recorded_sizes(weights, facts, recorded)
    held = with_marks({key: ModelFact(value, "recorded") for key, value in recorded.items()}, weights.metadata)
    return {key: facts[key] for key in ("norm_eps", "activation")} | held


def _check_recorded_sizes(weights: Weights, facts: Facts, recorded: Mapping[str, Any]) -> None:
    """Reject recorded sizes that the tensors contradict."""
    tensors = weights.tensors
    shown = {key: fact.value for key, fact in facts.items() if fact.source == "shapes" and key != "mlp_ratio"}
    if "mask_token" in tensors:
        shown["decoder_embed_dim"] = tensors["mask_token"].shape[-1]
    shown["decoder_depth"] = len({name.split(".")[1] for name in tensors if name.startswith("decoder_blocks.")})
    wrong = [key for key in shown if key in recorded and recorded[key] != shown[key]]
    if "mlp_ratio" in facts and abs(recorded.get("mlp_ratio", facts["mlp_ratio"].value) - facts["mlp_ratio"].value) > 1:
        wrong.append("mlp_ratio")
    if wrong:
        raise UserError(
            f"{weights.path}: its metadata {MODEL_ARGUMENTS!r} has {wrong[0]} {recorded[wrong[0]]}, which its tensors "
            "contradict. Copy the file again."
        )


def with_metadata(weights: Weights, given: Mapping[str, Any]) -> Weights:
    """Add given values to metadata that do not record them.

    Raises UserError if a value contradicts the file.
    """
    marks = assumed_names(weights.metadata)
    for key, value in given.items():
        allowed, words = RECORDED[key]
        if not allowed(value):
            raise UserError(f"--set {key}: {value} is not {words}. Correct it.")
    added = {key: value if isinstance(value, str) else json.dumps(value) for key, value in given.items()}
    for key, value in added.items():
        known = weights.metadata.get(key, UNKNOWN)
        if known not in (UNKNOWN, value) and key not in marks:
            raise UserError(f"--set {key}: {weights.path} shows {key} {known}. Set only what the file lacks.")
    left = marked(marks - added.keys()) if ASSUMED in weights.metadata else {}
    return replace(weights, metadata=weights.metadata | added | left)


def pixel_facts(weights: Weights, channels: int) -> Facts:
    """Find the facts about the pixels that a model was trained on."""
    usual = {PIXEL_MEAN: list(IMAGENET_MEAN), PIXEL_STD: list(IMAGENET_STD)} if channels == len(IMAGENET_MEAN) else {}
    facts = {key: ModelFact(value, "assumed", "as in ImageNet") for key, value in usual.items()}
    facts[BIT_DEPTH] = ModelFact(8, "assumed", "as in most pictures")
    if weights.metadata.get(PIXEL_MEAN, UNKNOWN) != UNKNOWN:  # a record of pixels leaves out only the usual depth
        facts[BIT_DEPTH] = ModelFact(8, "recorded")
    for key in (PIXEL_MEAN, PIXEL_STD, BIT_DEPTH):
        with suppress(ValueError):
            facts[key] = ModelFact(load_json(weights.metadata.get(key, UNKNOWN)), "recorded")
    return with_marks(facts, weights.metadata)


def parse_settings(settings: Sequence[str]) -> dict[str, Any]:
    """Parse KEY=VALUE pairs with YAML values."""
    parsed = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        try:
            parsed[key] = load_yaml(value)
            if isinstance(parsed[key], str):  # YAML reads 1e-6 as text
                with suppress(ValueError):
                    parsed[key] = float(value)
        except ValueError:
            equals = ""
        if not equals:
            raise UserError(f"--set {setting}: not KEY=VALUE. Write for example num_heads=6 or 'fuse_blocks=[0,11]'.")
    return parsed


def _decoder_facts(weights: Weights, depth: int, given: Mapping[str, Any]) -> Facts:
    """Find the facts about the decoder (specification, section 1.3)."""
    tensors = weights.tensors
    published = recorded_value(weights.metadata, PUBLISHED_ARGUMENTS, dict)
    width = tensors["mask_token"].shape[-1]
    cross = "cross_self" if "decoder_blocks.0.self_attn.qkv.weight" in tensors else "cross"
    shown = {
        "decoder_embed_dim": width,
        "decoder_depth": len({name.split(".")[1] for name in tensors if name.startswith("decoder_blocks.")}),
        "decoder": "self" if weights.format == "mae" else cross,
    }
    facts = {key: ModelFact(value, "shapes") for key, value in shown.items()}
    if heads := {size.decoder_embed_dim: size.decoder_num_heads for size in SIZES.values()}.get(width):
        facts["decoder_num_heads"] = ModelFact(heads, "assumed", f"from the width {width}", other_heads(width, heads))
    if "wfm.linear.weight" in tensors:
        facts |= _fusion(weights, depth, published, given)
    elif weights.format == "crossmae":
        facts["fuse_blocks"] = ModelFact((), "shapes")
    facts["norm_pix_loss"] = ModelFact(True, "assumed", "as in every published model")
    if "norm_pix_loss" in published:
        facts["norm_pix_loss"] = ModelFact(bool(published["norm_pix_loss"]), "recorded")
    return facts


def _fusion(weights: Weights, depth: int, published: Mapping[str, Any], given: Mapping[str, Any]) -> Facts:
    columns = weights.tensors["wfm.linear.weight"].shape[1]
    if "fuse_blocks" in given:
        blocks = given["fuse_blocks"]
        return {"fuse_input": ModelFact(columns > (depth if blocks is None else len(blocks)), "shapes")}
    chosen, fuse_input = published.get("use_fm"), given.get("fuse_input", published.get("use_input"))
    every = ModelFact(None, "shapes")
    if chosen is not None and fuse_input is not None:
        blocks = None if chosen == [-1] else chosen
        return {"fuse_blocks": ModelFact(blocks, "recorded"), "fuse_input": ModelFact(bool(fuse_input), "recorded")}
    if columns == depth + 1:
        return {"fuse_blocks": every, "fuse_input": ModelFact(True, "shapes")}
    if columns == depth and not fuse_input:
        return {"fuse_blocks": every, "fuse_input": ModelFact(False, "assumed", "for as many maps as blocks")}
    raise UserError(
        f"{weights.path}: {columns} of {depth + 1} encoder maps are mixed for the decoder, and "
        f"{ask(['fuse_blocks', 'fuse_input'])}"
    )


def _pixel_statistics(weights: Weights, channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    facts = pixel_facts(weights, channels)
    found = [fact.value for key in (PIXEL_MEAN, PIXEL_STD) if (fact := facts.get(key))]
    if len(found) == 2 and all(isinstance(value, list) and len(value) == channels for value in found):
        return tuple(map(float, found[0])), tuple(map(float, found[1]))
    raise UserError(
        f"{weights.path}: the metadata {PIXEL_MEAN!r} and {PIXEL_STD!r} do not have one number for each of the "
        f"{channels} channels. Add them with --set {PIXEL_MEAN}=[...] {PIXEL_STD}=[...]."
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
