"""The plan of a conversion: for every tensor of the source a place in the target or a reason why not, and the arguments
of its model that no tensor tells."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from crossmae.checkpoints.conversion.targets import TARGETS, Head, missing_norm, refusal
from crossmae.checkpoints.formats.keys import oddities
from crossmae.checkpoints.formats.timm_folder import POOL
from crossmae.checkpoints.loading import OUTSIDE
from crossmae.checkpoints.metadata import recorded_arguments
from crossmae.checkpoints.pretrained import arguments_of
from crossmae.checkpoints.report import Entry, LoadReport
from crossmae.checkpoints.weights import (
    Weights,
    encoder_arguments,
    encoder_home,
    encoder_part,
    encoder_tensors,
    plain_size,
    plain_tensors,
)
from crossmae.errors import UserError, shorten
from crossmae.models.crossmae import MODEL_DEFAULTS, CrossMAE
from crossmae.models.encoder import ViTEncoder, patch_grid

ENCODER_ARGUMENTS = set(inspect.signature(ViTEncoder).parameters)
ASKED_TO_DROP = "left behind as asked with --drop"  # a reason
_ANY_MODEL = ("norm.", "fc_norm.", "head.")  # what a file of ours may hold beside the tensors of its model


@dataclass(frozen=True)
class Plan:
    """Where every tensor of a source goes.

    Attributes:
        tensors: what the target holds, under plain names.
        report: every tensor of the source, and what the target gets beside them.
        refused: plain names of tensors without a place, without which the encoder would compute something else.
        whole: a whole pretraining model goes over, its decoder included.
    """

    tensors: dict[str, Tensor]
    report: LoadReport
    refused: tuple[str, ...]
    whole: bool


def plan(weights: Weights, to: str, *, encoder_only: bool = False, drop: tuple[str, ...] = ()) -> Plan:
    """Decide what becomes of every tensor; works on meta tensors, that is from the header of a file.

    Raises:
        UserError: no encoder in the file, or one without what the target needs.
    """
    encoder_tensors(weights)  # raises where there is none
    target, home = TARGETS[to], encoder_home(weights.tensors) or ""
    plain = plain_tensors(weights)
    if target.class_token == "required" and "cls_token" not in plain:
        raise UserError(f"{weights.path}: holds no class token, and {to} has none of its own to put there")
    content, head = "encoder" if encoder_only else weights.format, _head(plain, weights.metadata)
    odd = {name: kind for kind, names in oddities(weights.tensors).items() for name in names}
    kept: dict[str, Tensor] = {}
    report, refused = LoadReport(str(weights.path), to), []
    for name, tensor in weights.tensors.items():
        inside = name.removeprefix(home)
        reason, harmless = (OUTSIDE, True) if not name.startswith(home) else refusal(target, inside, content, head)
        if name in odd:
            reason, harmless = f"{odd[name]}: no plain ViT has that", False
        if not reason and encoder_only and inside.startswith(("fc_norm.", "head.")):
            reason = "a head, where the encoder alone was asked for"
        if not harmless and any(re.match(pattern, inside) for pattern in drop):
            reason, harmless = ASKED_TO_DROP, True
        if reason:
            refused += [] if harmless else [inside]
        else:
            kept[inside] = tensor
        report.entries.append(_entry(weights, name, inside, tensor, reason, harmless))
    _check_drop(weights, report, drop)
    if to == "timm":
        _as_timm(kept, report)
    new = missing_norm(target, kept)
    for name, tensor in new.items():
        shape = tuple(tensor.shape)
        entry = Entry(name, "new", "the source has no final norm: scale 1, shift 0", model_shape=shape, plain=name)
        report.entries.append(entry)
    return Plan(kept | new, report, tuple(refused), any(name.startswith("decoder_") for name in kept))


def _check_drop(weights: Weights, report: LoadReport, drop: tuple[str, ...]) -> None:
    """--drop is for what has no place: nothing else may vanish by it."""
    for pattern in drop:
        try:
            found = [entry.name for entry in report.entries if re.match(pattern, entry.plain)]
        except re.error as error:
            raise UserError(f"--drop {pattern}: no regular expression: {error}") from None
        left = [entry for entry in report.entries if entry.name in found and entry.reason == ASKED_TO_DROP]
        if not left:
            why = "it has its place" if found else "there is no tensor of such a name"
            raise UserError(f"--drop {pattern}: nothing of {weights.path} needs it: {why}")


def _entry(weights: Weights, name: str, plain: str, tensor: Tensor, reason: str, harmless: bool) -> Entry:
    shape, sources = tuple(tensor.shape), weights.sources.get(name, (name,))
    if reason:
        return Entry(name, "dropped", reason, shape, None, harmless, plain, sources)
    return Entry(name, "used", weights.notes.get(name, ""), shape, shape, True, plain, sources)


def _as_timm(kept: dict[str, Tensor], report: LoadReport) -> None:
    """timm's model with `fc_norm` has no `norm`; the one without class token has no row for it."""
    for index, entry in enumerate(report.entries):
        if entry.status != "used":
            continue
        if entry.plain in ("norm.weight", "norm.bias") and "fc_norm.weight" in kept:
            del kept[entry.plain]
            report.entries[index] = replace(entry, status="dropped", reason="average pooling has no norm before it")
        if entry.plain == "pos_embed" and "cls_token" not in kept:
            report.entries[index] = replace(entry, reason="without the row of the class token, which is not there")


def _head(plain: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Head | None:
    """Which classification head there is, by the norm before it (method specification, section 1.3).

    timm can pool in more ways, which its config.json tells.
    """
    if "head.1.weight" in plain:
        return "batchnorm"
    if "head.weight" not in plain:
        return None
    if "fc_norm.weight" in plain:
        return "avg"
    return "cls" if metadata.get(POOL, "cls") in ("cls", "token") else "other"


def refusal_of(weights: Weights, to: str, planned: Plan) -> str:
    """Why a plan can not be carried out, with the words that would convert it nevertheless."""
    reasons = {entry.plain: entry.reason for entry in planned.report.entries}
    kinds: dict[str, list[str]] = {}
    for name in planned.refused:
        kinds.setdefault(reasons[name], []).append(name)
    what = "; ".join(f"{shorten(names)}: {reason}" for reason, names in kinds.items())
    patterns = sorted({re.sub(r"\d+", r"\\d+", name.replace(".", r"\.")) for name in planned.refused})
    quoted = [f"'{pattern}'" for pattern in patterns]
    needed = any(refusal(TARGETS[to], name, "encoder", None) == ("", True) for name in planned.refused)
    words = "" if needed else f"; to leave it behind nevertheless, add --drop {' '.join(quoted)}"
    headline = f"{weights.path}: can not become {to}: {what}. Without that the encoder computes something else{words}"
    return f"{headline}\n{planned.report.table()}"


def source_arguments(
    weights: Weights, planned: Plan, given: Mapping[str, Any]
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The constructor arguments of the source, of the whole model or of its encoder, and sentences: what was assumed.

    Args:
        given: arguments that neither the file nor its shapes tell.

    Raises:
        UserError: unknown, in vain, contradicted by the file; or something is missing.
    """
    encoder = encoder_part(planned.tensors)
    found, recorded = encoder_arguments(encoder, weights.metadata), recorded_arguments(weights.metadata)
    _check_given(weights, planned, found, recorded, given)
    assumed: tuple[str, ...] = ()
    try:
        if planned.whole:
            arguments, sentences = arguments_of(weights, given)
            assumed += tuple(sentences)
            found = MODEL_DEFAULTS | found | arguments
            _check_model(found, planned.tensors)
    except UserError as error:
        raise UserError(f"{weights.path}: {str(error).removeprefix(f'{weights.path}: ')}") from None
    found = found | dict(given)
    missing = [key for key in ("img_size", "num_heads") if key not in found]
    if missing:
        words = {"img_size": "'img_size=[HEIGHT,WIDTH]'", "num_heads": "num_heads=N"}
        raise UserError(
            f"{weights.path}: neither its shapes nor its record tell {' and '.join(missing)} of the encoder; "
            f"add --set {' '.join(words[key] for key in missing)}"
        )
    if "num_heads" not in recorded.keys() | given.keys():
        assumed += (f"{found['num_heads']} attention heads, as in the published models of this width",)
    _check_sizes(weights, found, encoder["pos_embed"])
    return found, assumed


def check_square(to: str, arguments: Mapping[str, Any]) -> None:
    """Refuse a grid of patches that a target's models do not take.

    Raises:
        UserError: it is not square, and has to be.
    """
    size = plain_size(arguments.get("img_size", 0))
    if TARGETS[to].square and not isinstance(size, int):
        raise UserError(f"{to} takes square images alone, and the positions are for {size[0]} x {size[1]} pixels")


def _check_given(
    weights: Weights,
    planned: Plan,
    found: Mapping[str, Any],
    recorded: Mapping[str, Any],
    given: Mapping[str, Any],
) -> None:
    """Nothing given is unknown, in vain, or against the file."""
    if unknown := sorted(given.keys() - MODEL_DEFAULTS.keys()):
        raise UserError(f"--set {', '.join(unknown)}: no argument of the model; known: {', '.join(MODEL_DEFAULTS)}")
    vain = [] if planned.whole else sorted(given.keys() - ENCODER_ARGUMENTS)
    if vain:
        raise UserError(f"--set {', '.join(vain)}: in vain, because only the encoder goes over; leave that out")
    guessed = {"num_heads", "img_size"} - recorded.keys()  # by width, and as a square
    sure = {key: value for key, value in found.items() if key not in guessed} | dict(recorded)
    wrong = [key for key in given if key in sure and plain_size(sure[key]) != plain_size(given[key])]
    if wrong:
        said = ", ".join(f"{key} {plain_size(sure[key])}" for key in wrong)
        raise UserError(f"{weights.path}: its model has {said}; --set is for what a file does not tell")


def _check_model(arguments: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """A whole model of these arguments has exactly these tensors."""
    try:
        pairs = {key: tuple(value) for key, value in arguments.items() if isinstance(value, list)}
        with torch.device("meta"):
            model = CrossMAE(**{**arguments, **pairs})
    except (ValueError, TypeError, ZeroDivisionError) as error:
        raise UserError(f"no model of these arguments: {error}") from None
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    held = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    odd = sorted(name for name in expected if held.get(name) != expected[name])
    odd += sorted(name for name in held.keys() - expected.keys() if not name.startswith(_ANY_MODEL))
    if odd:
        raise UserError(
            f"the tensors are not those of a model of its arguments: {shorten(odd)}; --set says other arguments, "
            "--encoder-only leaves the decoder behind"
        )


def _check_sizes(weights: Weights, arguments: Mapping[str, Any], table: Tensor) -> None:
    """Heads that divide the width, a grid that the position table is for."""
    width, heads = arguments["embed_dim"], arguments["num_heads"]
    if not isinstance(heads, int) or heads < 1 or width % heads:
        raise UserError(f"{weights.path}: a width of {width} can not be split over {heads} attention heads")
    size = plain_size(arguments["img_size"])
    try:
        rows, columns = patch_grid(size, arguments["patch_size"])
    except (ValueError, TypeError) as error:
        raise UserError(f"{weights.path}: {error}") from None
    if table.shape[1] != 1 + rows * columns:
        raise UserError(
            f"{weights.path}: its position table has {table.shape[1]} rows, for images of {size} pixels it would have "
            f"{1 + rows * columns}; img_size is that of pretraining"
        )
