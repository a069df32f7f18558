"""The layouts that can be written, and the plan of a conversion: the status of every tensor of the source."""

from __future__ import annotations

import inspect
import pickle
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from crossmae import __version__
from crossmae.checkpoints.formats.facts import Facts, ModelFact, assumed, encoder_facts, with_marks
from crossmae.checkpoints.formats.huggingface import PREPROCESSOR, hf_config, hf_preprocessor_config
from crossmae.checkpoints.formats.keys import SEVERAL_CLASS_TOKENS, encoder_home, from_plain, oddities
from crossmae.checkpoints.formats.recognition import USE_PLAIN
from crossmae.checkpoints.formats.timm_folder import POOL, timm_config
from crossmae.checkpoints.load_report import LoadReport, TensorEntry
from crossmae.checkpoints.loading import OUTSIDE, left_out
from crossmae.checkpoints.metadata import (
    CLASSES,
    NORM_EPS,
    NORM_EPS_OF_PLAIN,
    PICKLED_METADATA,
    PIXEL_MEAN,
    PIXEL_STD,
    recorded_arguments,
    recorded_names,
    recorded_numbers,
    signed,
)
from crossmae.checkpoints.pretrained import arguments_of, ask
from crossmae.checkpoints.reading.files import HUB_CONFIG
from crossmae.checkpoints.resample import RELATIVE
from crossmae.checkpoints.run_checkpoint import MODEL
from crossmae.checkpoints.weights import (
    Weights,
    encoder_part,
    encoder_tensors,
    plain_size,
    plain_tensors,
    write_safetensors,
)
from crossmae.errors import UserError, shorten
from crossmae.files import write_json
from crossmae.models.crossmae import MODEL_DEFAULTS, CrossMAE
from crossmae.models.encoder import ENCODER_PREFIXES, ViTEncoder, patch_grid
from crossmae.models.sizes import OFF_BY_DEFAULT

TargetHead = Literal["avg", "cls", "batchnorm", "other"]

DETECTRON2_PREFIX = "backbone.net."
NO_SUFFIX = ""  # suffix of a destination that is a folder
NO_PLACE_KNOWN = "no place is known for it"
ASKED_TO_DROP = "dropped as asked with --drop"  # reason of an entry in the report
_ENCODER_ARGUMENTS = set(inspect.signature(ViTEncoder).parameters)
_ANY_MODEL = ("norm.", "fc_norm.", "head.")  # further tensors that a file of this toolkit may have


@dataclass(frozen=True)
class ConversionPlan:
    """The model to write, and the status of every tensor of the source.

    Attributes:
        to: name of the target, see `TARGETS`.
        tensors: tensors to write, under plain names.
        report: the status of every tensor of the source and of every new tensor of the target.
        arguments: constructor arguments of `ViTEncoder` (for an encoder or a classifier) or of `CrossMAE` (for a whole
            pretraining model). `plan` leaves them empty, like the metadata.
        metadata: strings, see `crossmae.checkpoints.metadata`.
        assumed: values of the source model that its file does not tell.
    """

    to: str
    tensors: dict[str, Tensor]
    report: LoadReport
    arguments: dict[str, Any] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)
    assumed: Facts = field(default_factory=dict)

    @property
    def refused(self) -> tuple[str, ...]:
        """Plain names of encoder tensors that the target has no place for."""
        return tuple(entry.plain for entry in self.report.entries if not entry.accepted)

    @property
    def whole(self) -> bool:
        """True if a decoder is converted as well."""
        return any(name.startswith("decoder_") for name in self.tensors)

    @property
    def norm_eps(self) -> float:
        """Epsilon of the layer norms."""
        return float(self.metadata.get(NORM_EPS, NORM_EPS_OF_PLAIN))


Names = dict[str, tuple[str, ...]]  # plain name -> names in the written file


@dataclass(frozen=True)
class Target:
    """A layout that can be written.

    Attributes:
        suffixes: allowed suffixes of the destination; `NO_SUFFIX` means a folder.
        write: function that writes a file, or the files of an empty folder.
        decoder: pretraining model whose decoder has a place in the layout.
        heads: kinds of classification heads that have a place, see `TargetHead`.
        class_token, norm: whether the layout has a class token (or several) or a final norm.
        relative: true if the layout has relative positions.
        square: true if the layout allows only square images.
    """

    suffixes: tuple[str, ...]
    write: Callable[[Path, ConversionPlan], Names]
    decoder: Literal["crossmae", "mae"] | None = None
    heads: tuple[TargetHead, ...] = ()
    class_token: Literal["required", "optional", "several", "none"] = "optional"
    norm: Literal["required", "optional", "none"] = "optional"
    relative: bool = False
    square: bool = False


def refusal(target: Target, name: str, content: str, head: TargetHead | None) -> tuple[str, bool]:
    """Explain why a tensor has no place in a target.

    Args:
        name: plain name of the tensor.
        content: content of the source, see `Weights.format`.
        head: kind of classification head of the source.

    Returns:
        The reason, or "" if the tensor has a place; and true if the encoder computes the same without the tensor.
    """
    if name == "cls_token":
        return ("a dense backbone has no class token" if target.class_token == "none" else ""), True
    if RELATIVE.fullmatch(name):
        return ("", True) if target.relative else ("relative positions have no place in a plain ViT", False)
    if name.startswith(ENCODER_PREFIXES):
        return "", True
    reason = left_out(name)
    if reason is None:
        return NO_PLACE_KNOWN, False
    if name.startswith("norm."):
        return ("the final norm has no place in it" if target.norm == "none" else ""), True
    if name.startswith(("fc_norm.", "head.")):
        held = head in target.heads or (head is None and "avg" in target.heads)
        return ("" if held else "a head of this kind has no place in it"), True
    return ("" if content == target.decoder else reason), True


def _write_own(path: Path, model: ConversionPlan) -> Names:
    _write_file(path, "model", model.tensors, model.metadata)
    return {name: (name,) for name in model.tensors}


def _write_timm(path: Path, model: ConversionPlan) -> Names:
    """Write a file for timm's `checkpoint_path=`, or a folder for "local-dir:..."."""
    tensors = dict(model.tensors)
    if "cls_token" not in tensors:
        tensors["pos_embed"] = tensors["pos_embed"][:, 1:]  # timm has no row for an absent class token
    if path.suffix:
        _write_file(path, "state_dict", tensors, model.metadata)
    else:
        write_safetensors(path / MODEL, tensors, model.metadata)
        write_json(path / HUB_CONFIG, timm_config(model.tensors, model.arguments, model.metadata))
    return {name: (name,) for name in tensors}


def _write_transformers(path: Path, model: ConversionPlan, layout: str) -> Names:
    """Write a folder for `from_pretrained`."""
    tensors = from_plain(model.tensors, layout)
    write_safetensors(path / MODEL, tensors, model.metadata)
    classes = _class_names(model)
    write_json(path / HUB_CONFIG, hf_config(layout, model.arguments, norm_eps=model.norm_eps, classes=classes))
    statistics = [recorded_numbers(model.metadata, key) for key in (PIXEL_MEAN, PIXEL_STD)]
    if all(statistics):
        settings = hf_preprocessor_config(model.arguments["img_size"], *statistics)
        write_json(path / PREPROCESSOR, settings)
    written = iter(tensors)  # in the order of model.tensors; each qkv tensor became three
    return {name: tuple(next(written) for _ in range(3 if ".attn.qkv." in name else 1)) for name in model.tensors}


def _write_detectron2(path: Path, model: ConversionPlan) -> Names:
    """Write `backbone.net.*`, without detectron2's matching by suffix (issue 4566)."""
    kept = {f"{DETECTRON2_PREFIX}{name}": tensor for name, tensor in model.tensors.items()}
    extras = {"__author__": f"crossmae {__version__}", "matching_heuristics": False}
    if path.suffix == ".pkl":
        exact = {name: tensor.float() if tensor.dtype == torch.bfloat16 else tensor for name, tensor in kept.items()}
        arrays = {name: tensor.numpy() for name, tensor in exact.items()}  # numpy has no bfloat16
        content = {"model": arrays, **extras, PICKLED_METADATA: signed(exact, model.metadata)}
        with open(path, "wb") as file:
            pickle.dump(content, file, protocol=4)
    else:
        _write_file(path, "model", kept, model.metadata, extras)
    return {name: (f"{DETECTRON2_PREFIX}{name}",) for name in model.tensors}


TARGETS = {
    "crossmae": Target(
        (".safetensors", ".pth"), _write_own, decoder="crossmae", heads=("avg", "cls", "batchnorm"),
        class_token="several",
    ),
    "mae": Target(
        (".safetensors", ".pth"), _write_own, decoder="mae", heads=("avg", "cls", "batchnorm"), class_token="several",
    ),
    "timm": Target(
        (NO_SUFFIX, ".safetensors", ".pth"), _write_timm, heads=("avg", "cls"), norm="required",
    ),
    "hf-vit": Target(
        (NO_SUFFIX,), partial(_write_transformers, layout="hf-vit"), heads=("cls",), class_token="required",
        norm="required",
    ),
    "hf-vitmae": Target(
        (NO_SUFFIX,), partial(_write_transformers, layout="hf-vitmae"), decoder="mae", class_token="required",
        norm="required", square=True,
    ),
    "detectron2": Target(
        (".pth", ".pkl", ".safetensors"), _write_detectron2, class_token="none", norm="none", relative=True,
        square=True,
    ),
}  # fmt: skip


def _class_names(model: ConversionPlan) -> list[str]:
    if "head.weight" not in model.tensors:
        return []
    number = len(model.tensors["head.weight"])
    names = recorded_names(model.metadata, "class_names" if "class_names" in model.metadata else CLASSES)
    return names if len(set(names)) == number else [f"LABEL_{index}" for index in range(number)]


def _write_file(
    path: Path, key: str, tensors: dict[str, Tensor], metadata: dict[str, str], extras: Mapping[str, Any] | None = None
) -> None:
    if path.suffix == ".safetensors":
        write_safetensors(path, tensors, metadata)
    else:
        torch.save({key: tensors, **(extras or {}), PICKLED_METADATA: signed(tensors, metadata)}, path)


def plan(weights: Weights, to: str, *, encoder_only: bool = False, drop: tuple[str, ...] = ()) -> ConversionPlan:
    """Decide for every tensor whether it is converted. Accepts meta tensors.

    Args:
        to: name of the target, see `TARGETS`.
        encoder_only, drop: see `ConversionRequest`.

    Raises:
        UserError: the file has no encoder, or no class token where the target requires one; or a pattern of `drop` is
            invalid or matches nothing that needs it.
    """
    encoder_tensors(weights)  # raises without an encoder
    target, home, plain = TARGETS[to], encoder_home(weights.tensors) or "", plain_tensors(weights)
    content, head = "encoder" if encoder_only else weights.format, _head(plain, weights.metadata)
    odd = {name: kind for kind, names in oddities(weights.tensors).items() for name in names}
    kept: dict[str, Tensor] = {}
    report = LoadReport(str(weights.path), to)
    for name, tensor in weights.tensors.items():
        inside = name.removeprefix(home)
        reason, harmless = (OUTSIDE, True) if not name.startswith(home) else refusal(target, inside, content, head)
        takes_several = target.class_token in ("several", "none")
        if name in odd and not (odd[name] == SEVERAL_CLASS_TOKENS and takes_several):
            reason, harmless = f"{odd[name]}, not in a plain ViT", False
        if not reason and encoder_only and inside.startswith(("fc_norm.", "head.")):
            reason = "a head, and only the encoder was requested"
        if not harmless and any(re.match(pattern, inside) for pattern in drop):
            reason, harmless = ASKED_TO_DROP, True
        shape, sources = tuple(tensor.shape), weights.sources.get(name, (name,))
        if reason:
            entry = TensorEntry(name, "dropped", reason, shape, None, harmless, inside, sources)
        else:
            kept[inside] = tensor
            entry = TensorEntry(name, "used", weights.notes.get(name, ""), shape, shape, True, inside, sources)
        report.entries.append(entry)
    is_dropped = any(entry.plain == "cls_token" and entry.reason == ASKED_TO_DROP for entry in report.entries)
    if target.class_token == "required" and ("cls_token" not in plain or is_dropped):
        raise UserError(
            f"{weights.path}: has no class token, but {to} requires one. Use a source with a class token, "
            "or another --to."
        )
    _check_drop(weights, report, drop)
    if to == "timm":
        _fit_timm(kept, report)
    if target.norm == "required" and "norm.weight" not in kept and "fc_norm.weight" not in kept:
        like = kept["patch_embed.proj.bias"]
        reason = "the source has no final norm: scale 1, shift 0"
        for name, tensor in (("norm.weight", torch.ones_like(like)), ("norm.bias", torch.zeros_like(like))):
            kept[name] = tensor
            report.entries.append(TensorEntry(name, "new", reason, model_shape=tuple(tensor.shape), plain=name))
    return ConversionPlan(to, kept, report)


def _check_drop(weights: Weights, report: LoadReport, drop: tuple[str, ...]) -> None:
    for pattern in drop:
        try:
            found = [entry for entry in report.entries if re.match(pattern, entry.plain)]
        except re.error as error:
            raise UserError(f"--drop {pattern}: not a regular expression ({error}). Correct it.") from None
        if not any(entry.reason == ASKED_TO_DROP for entry in found):
            why = "matches only tensors that the target has a place for" if found else "matches no tensor"
            raise UserError(f"--drop {pattern}: {why} in {weights.path}. Leave it out.")


def _fit_timm(kept: dict[str, Tensor], report: LoadReport) -> None:
    """Drop `norm` if there is `fc_norm`, and note a missing class row."""
    for index, entry in enumerate(report.entries):
        if entry.status == "used" and entry.plain in ("norm.weight", "norm.bias") and "fc_norm.weight" in kept:
            del kept[entry.plain]
            report.entries[index] = replace(entry, status="dropped", reason="average pooling has no norm before it")
        if entry.status == "used" and entry.plain == "pos_embed" and "cls_token" not in kept:
            report.entries[index] = replace(entry, reason="without the row of the class token, which is not there")


def _head(plain: Mapping[str, Tensor], metadata: Mapping[str, str]) -> TargetHead | None:
    if "head.1.weight" in plain:
        return "batchnorm"
    if "head.weight" not in plain:
        return None
    if "fc_norm.weight" in plain:
        return "avg"
    return "cls" if metadata.get(POOL, "cls") in ("cls", "token") else "other"


def describe_refusal(weights: Weights, planned: ConversionPlan) -> str:
    """Explain why a plan is refused, with the table.

    Only tensors that may be useless come with the `--drop` option. Dropping others would destroy the encoder.
    """
    headline = f"{weights.path}: cannot become {planned.to}, because {why_refused(planned)}."
    if all(entry.accepted or entry.reason == NO_PLACE_KNOWN for entry in planned.report.entries):
        patterns = sorted({re.sub(r"\d+", r"\\d+", name.replace(".", r"\.")) for name in planned.refused})
        quoted = " ".join(f"'{each}'" for each in patterns)
        left = len(planned.report.entries) - len(planned.refused)
        headline += (
            f" If the encoder does not use them, add --drop {quoted}, which leaves {left} of "
            f"{len(planned.report.entries)} tensors."
        )
    else:
        headline += f" {USE_PLAIN}"
    return f"{headline}\n{planned.report.table()}"


def why_refused(planned: ConversionPlan) -> str:
    """List the tensors without which the encoder computes something else, with reasons."""
    kinds: dict[str, list[str]] = {}
    for entry in planned.report.entries:
        if not entry.accepted:
            kinds.setdefault(entry.reason, []).append(entry.plain)
    what = ", ".join(f"{shorten(names)} ({reason})" for reason, names in kinds.items())
    return f"the encoder computes something else without {what}"


def with_arguments(weights: Weights, planned: ConversionPlan, given: Mapping[str, Any]) -> ConversionPlan:
    """Add the arguments and the assumed facts of the source model.

    Args:
        given: arguments that neither the file nor its shapes show.

    Raises:
        UserError: a given argument is unknown, has no effect or contradicts the file; or an argument is missing.
    """
    encoder = encoder_part(planned.tensors)
    facts = encoder_facts(encoder, weights.metadata)
    _check_given(weights, planned.whole, facts, given)
    found = {key: fact.value for key, fact in facts.items() if key in _ENCODER_ARGUMENTS} | dict(given)
    if planned.whole:
        arguments, whole = arguments_of(weights, given)
        defaults = {key: value for key, value in MODEL_DEFAULTS.items() if key not in OFF_BY_DEFAULT}
        found, facts = defaults | found | arguments, facts | whole
        _check_model(weights, found, planned.tensors)
    if missing := [key for key in ("img_size", "num_heads", "mlp_ratio") if key not in found]:
        raise UserError(f"{weights.path}: {ask(missing)}")
    _check_sizes(weights, found, encoder["pos_embed"])
    return replace(planned, arguments=found, assumed=assumed(facts, given))


def check_square(to: str, arguments: Mapping[str, Any]) -> None:
    """Raise UserError if the target needs square images and these are not."""
    size = plain_size(arguments.get("img_size", 0))
    if TARGETS[to].square and not isinstance(size, int):
        raise UserError(
            f"--to {to}: takes square images only, and the positions are for {size[0]} x {size[1]} pixels. Resample "
            "the positions with --img-size."
        )


def _check_given(weights: Weights, whole: bool, facts: Facts, given: Mapping[str, Any]) -> None:
    """Raise UserError for `--set` arguments that are unknown, unused or contradictory."""
    if unknown := sorted(given.keys() - MODEL_DEFAULTS.keys()):
        raise UserError(f"--set {', '.join(unknown)}: unknown model argument. Use one of {', '.join(MODEL_DEFAULTS)}.")
    unused = [] if whole else sorted(given.keys() - _ENCODER_ARGUMENTS)
    if unused:
        raise UserError(f"--set {', '.join(unused)}: has no effect, only the encoder is converted. Leave it out.")
    held = {key: ModelFact(value, "recorded") for key, value in recorded_arguments(weights.metadata).items()}
    facts = facts | with_marks(held, weights.metadata)
    sure = {key: fact.value for key, fact in facts.items() if fact.source != "assumed"}
    wrong = [key for key in given if key in sure and plain_size(sure[key]) != plain_size(given[key])]
    if wrong:
        known = ", ".join(f"{key} {plain_size(sure[key])}" for key in wrong)
        raise UserError(f"--set {', '.join(wrong)}: {weights.path} shows {known}. Set only what the file lacks.")


def _check_model(weights: Weights, arguments: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    try:
        with torch.device("meta"):
            model = CrossMAE(**arguments)
    except (ValueError, TypeError, ZeroDivisionError) as error:
        raise UserError(f"{weights.path}: no model has its arguments: {error}") from None
    expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
    held = {
        name: tensor.shape for name, tensor in tensors.items() if name in expected or not name.startswith(_ANY_MODEL)
    }
    odd = [name for name in sorted(expected | held) if held.get(name) != expected.get(name)]
    if odd:
        raise UserError(
            f"{weights.path}: these tensors do not fit the arguments of its model: {shorten(odd)}. Give other "
            "arguments with --set, or drop the decoder with --encoder-only."
        )


def _check_sizes(weights: Weights, arguments: Mapping[str, Any], table: Tensor) -> None:
    width, heads, size = arguments["embed_dim"], arguments["num_heads"], plain_size(arguments["img_size"])
    if not isinstance(heads, int) or heads < 1 or width % heads:
        raise UserError(
            f"{weights.path}: a width of {width} is not divisible by {heads} attention heads. Correct it with --set "
            "num_heads."
        )
    try:
        rows, columns = patch_grid(size, arguments["patch_size"])
    except (ValueError, TypeError) as error:
        raise UserError(f"{weights.path}: {error}") from None
    if table.shape[1] != 1 + rows * columns:
        raise UserError(
            f"{weights.path}: the position table has {table.shape[1]} rows, but {1 + rows * columns} belong to images "
            f"of {size} pixels. Give the img_size of pretraining with --set."
        )
