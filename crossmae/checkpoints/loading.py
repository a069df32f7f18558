"""Strict loading: every tensor of the file and of the model is accounted for. All models are loaded by this module."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from torch import Tensor, nn

from crossmae.checkpoints.formats.facts import Facts, ModelFact, assumed, encoder_facts, other_heads
from crossmae.checkpoints.formats.keys import (
    CLASS_ROW_ADDED,
    GATED,
    SEVERAL_CLASS_TOKENS,
    UNKNOWN_KINDS,
    WITHOUT_BIAS,
    encoder_home,
    oddities,
)
from crossmae.checkpoints.formats.recognition import USE_PLAIN
from crossmae.checkpoints.load_report import LoadReport, TensorEntry
from crossmae.checkpoints.metadata import (
    MODEL_ARGUMENTS,
    NORM_EPS,
    NORM_EPS_OF_PLAIN,
    assumed_names,
    marked,
    recorded_arguments,
)
from crossmae.checkpoints.provenance import licence_notice
from crossmae.checkpoints.resample import RELATIVE, fit
from crossmae.checkpoints.weights import (
    Weights,
    encoder_arguments,
    encoder_tensors,
    plain_size,
    plain_tensors,
    read_weights,
)
from crossmae.errors import UserError

log = logging.getLogger(__name__)

Part = Literal["all", "encoder"]

# Tensors outside an encoder, and the reason why they are dropped when only the encoder is loaded.
_LEFT_OUT = {
    r"mask_token$|encoder_mask_token$|masked_embed$|decoder[._]|wfm\.|dec_norms\.|neck\.": "of pretraining only",
    r"fc_norm\.|head\.|classifier\.": "another task's head",
    r"norm\.": "the final norm has no place in this model",
    r"pooler\.": "the pooler of transformers is no part of the encoder",
    r"data_preprocessor\.": "not a weight of the encoder",
}
OUTSIDE = "outside the encoder"


def load(
    model: nn.Module,
    source: Weights | str | Path,
    *,
    part: Part = "all",
    also: tuple[str, ...] = (),
    new: tuple[str, ...] = (),
    dropped: tuple[str, ...] = (),
    resample: bool = False,
) -> LoadReport:
    """Load a weight file into a model, completely or not at all.

    Args:
        model: a model with plain names or with the names of the file.
        source: weights, or the path of a weight file.
        part: "all" loads every tensor of the file. "encoder" loads only the encoder, under any prefix; the final norm,
            decoder and heads are reported as dropped.
        also: prefixes of further plain names that part="encoder" loads, such as "norm.".
        new: regular expressions, matched from the start of a name, for tensors of the model that the file may lack.
        dropped: regular expressions, matched likewise, for tensors of the file that the model may lack.
        resample: resample position embeddings, patch filters and input channels to the model's sizes, see `fitted`.

    Returns:
        The status of every tensor, and the values of the model that the file does not tell.

    Raises:
        UserError: a tensor is missing, unexpected or does not fit; the message contains the table. Nothing was loaded.
    """
    weights = source if isinstance(source, Weights) else read_weights(source)
    check_plain(weights, model.state_dict())
    assumed = assumed_facts(weights, model)
    weights, left = _encoder(weights, also) if part == "encoder" else (weights, [])
    if resample:
        weights = fitted(weights, model)
    report = _compare(model, weights, new, dropped)
    report.entries += left
    report.assumed = assumed
    _fill(model, weights, report)
    return report


def fitted(weights: Weights, model: nn.Module) -> Weights:
    """Resample weights to a model's sizes, see `resample.fit`.

    Sine-cosine position embeddings that the model does not train (in pretraining) are computed again.

    Args:
        model: a model with `patch_embed.proj`. Positions are resampled if it also has `grid` or
            `patch_embed.grid_size`.
    """
    state = dict(model.named_parameters())
    filters, home = state.get("patch_embed.proj.weight"), encoder_home(weights.tensors)
    if filters is None or home is None or filters.ndim != 4:
        return weights
    wanted: dict[str, Any] = {"patch_size": filters.shape[-1], "in_chans": filters.shape[1]}
    plain = plain_tensors(weights)
    arguments = encoder_arguments(encoder_tensors(weights), weights.metadata)
    if (grid := _grid(model)) is not None and "pos_embed" in plain:
        wanted["img_size"] = tuple(side * wanted["patch_size"] for side in grid)
    fixed = "pos_embed" in state and not state["pos_embed"].requires_grad
    try:
        changed, notes, arguments = fit(plain, arguments, wanted, fixed=fixed)
    except UserError as error:
        raise UserError(f"{weights.path}: {error}") from None
    if not notes:
        return weights
    return resampled(weights, {home + name: tensor for name, tensor in changed.items()}, notes, arguments)


def resampled(
    weights: Weights, tensors: Mapping[str, Tensor], notes: Mapping[str, str], arguments: Mapping[str, Any]
) -> Weights:
    """Return weights with resampled tensors, new recorded sizes and notes."""
    sizes = {key: arguments[key] for key in ("img_size", "patch_size", "in_chans") if key in arguments}
    facts = encoder_facts(encoder_tensors(weights), weights.metadata)
    marks = assumed_names(weights.metadata) | assumed(facts).keys()
    record = json.dumps(recorded_arguments(weights.metadata) | sizes)
    joined = {name: "; ".join(filter(None, (weights.notes.get(name), note))) for name, note in notes.items()}
    return replace(
        weights,
        tensors=weights.tensors | dict(tensors),
        metadata=weights.metadata | {MODEL_ARGUMENTS: record} | (marked(marks) if marks else {}),
        notes=weights.notes | joined,
        resampled=weights.resampled | notes.keys(),
    )


def assumed_facts(weights: Weights, model: nn.Module) -> Facts:
    """Find the values of a model that its file does not tell."""
    if encoder_home(weights.tensors) is None or "patch_embed.proj.weight" not in model.state_dict():
        return {}
    facts = encoder_facts(encoder_tensors(weights), weights.metadata)
    heads, width = _heads(model), model.state_dict()["patch_embed.proj.weight"].shape[0]
    found = facts.get("num_heads", ModelFact(None, "assumed"))
    if heads and found.source == "assumed" and found.value != heads:
        facts["num_heads"] = ModelFact(heads, "assumed", "from the model's settings", other_heads(width, heads))
    return assumed(facts)


def left_out(name: str) -> str | None:
    """Explain why a plain name is outside the encoder, or return None."""
    return next((reason for pattern, reason in _LEFT_OUT.items() if re.match(pattern, name)), None)


def check_plain(weights: Weights, target: Mapping[str, Tensor] = MappingProxyType({})) -> None:
    """Raise UserError if the file is another kind of ViT.

    Tensors that do not tell the kind are left to the table of `load`.

    Args:
        target: the tensors of the model.
    """
    home = encoder_home(weights.tensors) or ""
    kinds = oddities(weights.tensors)
    blocks = {match[1] for name in weights.tensors if (match := re.match(r"blocks\.(\d+)\.", name.removeprefix(home)))}
    if len(kinds.get(WITHOUT_BIAS, [])) < len(blocks):  # a bias of one block is missing, which no kind of ViT explains
        kinds.pop(WITHOUT_BIAS, None)
    kinds["relative positions, of a detector"] = [
        name for name in weights.tensors if RELATIVE.fullmatch(name.removeprefix(home))
    ]
    found = {
        kind: names[0]
        for kind, names in kinds.items()
        if kind not in UNKNOWN_KINDS and names and not _has(target, weights.tensors, names[0], home, kind)
    }
    if SEVERAL_CLASS_TOKENS in found:
        number = weights.tensors[found[SEVERAL_CLASS_TOKENS]].shape[1]
        raise UserError(
            f"{weights.path}: has {number} class tokens, but the model does not. Build it with class_tokens={number}."
        )
    if found:
        what = " and ".join(f"{kind} ({name})" for kind, name in found.items())
        raise UserError(f"{weights.path}: not a plain ViT, it has {what}. {USE_PLAIN}")


def _has(target: Mapping[str, Tensor], held: Mapping[str, Tensor], name: str, home: str, kind: str) -> bool:
    """Check whether a model has a tensor that tells a kind."""
    mine = name if name in target else name.removeprefix(home)
    if kind == WITHOUT_BIAS:
        return mine in target and f"{mine.removesuffix('weight')}bias" not in target
    if kind == SEVERAL_CLASS_TOKENS:  # a model without any, such as a dense backbone, drops them all
        return mine not in target or target[mine].shape == held[name].shape
    return mine in target and (kind != GATED or target[mine].shape == held[name].shape)


def _encoder(weights: Weights, also: tuple[str, ...]) -> tuple[Weights, list[TensorEntry]]:
    encoder_tensors(weights)  # raises without an encoder
    home = encoder_home(weights.tensors) or ""
    kept: dict[str, Tensor] = {}
    left: list[TensorEntry] = []
    for name, tensor in weights.tensors.items():
        plain = name.removeprefix(home)
        inside = name.startswith(home)
        reason = (None if plain.startswith(also) else left_out(plain)) if inside else OUTSIDE
        if reason:
            left.append(TensorEntry(name, "dropped", reason, file_shape=tuple(tensor.shape)))
        else:
            kept[plain] = tensor
    return replace(weights, tensors=kept), left


def _compare(model: nn.Module, weights: Weights, new: tuple[str, ...], dropped: tuple[str, ...]) -> LoadReport:
    report = LoadReport(str(weights.path), type(model).__name__, licence=licence_notice(weights))
    home = encoder_home(weights.tensors) or ""
    target = model.state_dict()
    for name, tensor in target.items():
        entry = _compare_one(name, weights.tensors.get(name), tensor, new)
        note = weights.notes.get(plain := name.removeprefix(home))
        if entry.status == "used" and note:
            status: Any = "resampled" if plain in weights.resampled else "used"
            entry = replace(entry, status=status, reason="; ".join(filter(None, (note, entry.reason))))
        report.entries.append(entry)
    for name in (each for each in weights.tensors if each not in target):
        accepted = _matches(name, dropped)
        reason = "not wanted by the model" if accepted else "unexpected, the model has no such tensor"
        shape = tuple(weights.tensors[name].shape)
        report.entries.append(TensorEntry(name, "dropped", reason, shape, accepted=accepted))
    return report


def _compare_one(name: str, found: Tensor | None, wanted: Tensor, new: tuple[str, ...]) -> TensorEntry:
    shape = tuple(wanted.shape)
    if found is None:
        accepted = _matches(name, new)
        reason = "keeps its initial value" if accepted else "missing from the file"
        return TensorEntry(name, "new", reason, model_shape=shape, accepted=accepted)
    if found.shape != wanted.shape:
        return TensorEntry(name, "mismatched", "", tuple(found.shape), shape, accepted=False)
    reason = "" if found.dtype == wanted.dtype else f"{found.dtype} to {wanted.dtype}".replace("torch.", "")
    return TensorEntry(name, "used", reason, shape, shape)


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(re.match(pattern, name) for pattern in patterns)


def _fill(model: nn.Module, weights: Weights, report: LoadReport) -> None:
    problem = _different_architecture(model, weights)
    if problem or not report.ok:
        problem = problem or ("see the tensors marked !" if report.loaded else "no tensor is in both")
        headline = f"{weights.path} ({weights.format}) does not fit {report.target}: {problem}"
        raise UserError(f"{headline}. Nothing was loaded.", report.table())
    model.load_state_dict({name: weights.tensors[name] for name in report.loaded}, strict=False)
    _warn(model, weights, report)


def _warn(model: nn.Module, weights: Weights, report: LoadReport) -> None:
    for name in report.loaded:
        if CLASS_ROW_ADDED in weights.notes.get(name, ""):
            rows = weights.tensors[name].shape[1] - 1
            log.warning("%s: %d positions are read as a square without a class token", weights.path, rows)
    theirs = float(weights.metadata.get(NORM_EPS, NORM_EPS_OF_PLAIN))
    mine = next((module.eps for module in model.modules() if isinstance(module, nn.LayerNorm)), theirs)
    if mine != theirs:
        what = "its layer norms have an epsilon of %g, but the model's have %g. Outputs differ slightly"
        log.warning(f"%s: {what}", weights.path, theirs, mine)


def _different_architecture(model: nn.Module, weights: Weights) -> str:
    target = model.state_dict()
    if encoder_home(weights.tensors) is None or "patch_embed.proj.weight" not in target:
        return ""
    facts = encoder_facts(encoder_tensors(weights), weights.metadata)
    held = encoder_arguments(encoder_tensors(weights), weights.metadata)
    expected = encoder_arguments(target)
    if grid := _grid(model):
        expected["img_size"] = [side * expected["patch_size"] for side in grid]
    heads = _heads(model)  # compared only if the file tells its number
    if heads is None or "num_heads" in assumed(facts):
        held.pop("num_heads", None)
    expected["num_heads"] = heads
    held, expected = ({key: plain_size(value) for key, value in side.items()} for side in (held, expected))
    differing = [key for key in held if held[key] != expected.get(key, held[key])]
    theirs, ours = (", ".join(f"{key} {side[key]}" for key in differing) for side in (held, expected))
    return f"the file has a ViT with {theirs}, but the model expects {ours}" if differing else ""


def _heads(model: nn.Module) -> int | None:
    return getattr(dict(model.named_modules()).get("blocks.0.attn"), "num_heads", None)


def _grid(model: nn.Module) -> tuple[int, int] | None:
    grid = getattr(model, "grid", None) or getattr(getattr(model, "patch_embed", None), "grid_size", None)
    return grid if isinstance(grid, tuple) else None
