"""Inspection of a weight file: its content and its possible conversions, from as few bytes as possible."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from crossmae.checkpoints.conversion.targets import TARGETS, check_square, plan, why_refused
from crossmae.checkpoints.formats.facts import Facts, FactSource, assumed_lines, encoder_facts
from crossmae.checkpoints.formats.keys import encoder_home, not_plain
from crossmae.checkpoints.formats.recognition import CONTENTS
from crossmae.checkpoints.load_report import split_name
from crossmae.checkpoints.metadata import (
    CLASSES,
    NORM_EPS,
    PIXEL_MEAN,
    PIXEL_STD,
    STEP,
    UNKNOWN,
    VERSION,
    check_digest,
    recorded_names,
)
from crossmae.checkpoints.pretrained import arguments_of, pixel_facts, whole_facts
from crossmae.checkpoints.provenance import licence_notice
from crossmae.checkpoints.reading.candidates import split_choice
from crossmae.checkpoints.reading.files import file_kind, find_file, read_safetensors
from crossmae.checkpoints.reading.wrappers import one_model
from crossmae.checkpoints.resample import RELATIVE, is_sincos, table_grid, window_of
from crossmae.checkpoints.weights import (
    Weights,
    encoder_arguments,
    encoder_tensors,
    non_finite,
    plain_tensors,
    read_weights,
    translated,
)
from crossmae.errors import UserError, counted, shorten
from crossmae.models.crossmae import MODEL_DEFAULTS


@dataclass(frozen=True)
class Outcome:
    """The expected outcome of a conversion. The text lists dropped tensors, or the obstacle."""

    possible: bool
    text: str


@dataclass(frozen=True)
class Inspection:
    """The content of a weight file.

    Attributes:
        layout, content: see `Weights.layout` and `Weights.format`.
        tensors, values: number of tensors and of values.
        dtypes: number of values of each dtype.
        encoder: known constructor arguments of the encoder; {} without an encoder.
        facts: further facts for people, by a short name.
        sources: source of each value of the model: recorded, shapes or assumed.
        assumed: one line for each assumed value.
        not_plain: one sentence for each kind of tensor that a plain ViT does not have.
        non_finite: names of tensors with NaN or infinity; None if values were not read.
        becomes: outcome of a conversion, by the name of the target.
    """

    path: Path
    file_bytes: int
    layout: str
    content: str
    tensors: int
    values: int
    dtypes: dict[str, int]
    encoder: dict[str, Any]
    facts: dict[str, str]
    sources: dict[str, FactSource]
    assumed: tuple[str, ...]
    beside: tuple[str, ...]
    not_plain: tuple[str, ...]
    non_finite: tuple[str, ...] | None
    becomes: dict[str, Outcome]

    def record(self) -> dict[str, Any]:
        """Return the inspection as JSON values."""
        return asdict(self) | {"path": str(self.path)}

    def lines(self) -> list[str]:
        """Return the lines of a description for people."""
        types = ", ".join(f"{name} {count:,}" if len(self.dtypes) > 1 else name for name, count in self.dtypes.items())
        finite = "values were not read" if self.non_finite is None else "every value"
        if self.non_finite:
            finite = f"NO: NaN or infinity in {counted(len(self.non_finite), 'tensor')}: {shorten(self.non_finite)}"
        rows = {
            "file": f"{self.path} ({self.file_bytes / 1e6:,.1f} MB)",
            "names": self.layout,
            "content": CONTENTS[self.content],
            "tensors": f"{self.tensors:,} with {self.values:,} values, {types}",
            "encoder": ", ".join(f"{key} {value}" for key, value in self.encoder.items()),
            **self.facts,
            "beside": ", ".join(self.beside),
            "finite": finite,
        }
        width = max(map(len, [*rows, *self.becomes])) + 2
        text = [f"{name:{width}}{value}" for name, value in rows.items() if value]
        text += [f"{'assumed':{width}}{line}" for line in self.assumed]
        text += [f"{'NOT PLAIN':{width}}{sentence}" for sentence in self.not_plain]
        text += ["", "can become"]
        outcomes = set(self.becomes.values())
        if len(outcomes) == 1 and not (outcome := outcomes.pop()).possible:
            return [*text, f"{'nothing':{width}}{outcome.text}"]
        for name, outcome in self.becomes.items():
            text.append(f"{name:{width}}{'yes' if outcome.possible else 'no '}  {outcome.text}".rstrip())
        return text


def inspect(path: str | Path, *, values: bool = True) -> Inspection:
    """Inspect a weight file.

    Args:
        path: see `read_weights`.
        values: search for NaN and infinity. If false, little more than the header of a safetensors file is read.

    Raises:
        UserError: see `read_weights`. NaN and infinity are reported, not raised.
    """
    file = find_file(Path(path))
    if file_kind(file) == "safetensors":
        stored, metadata = read_safetensors(file)
        if values:
            check_digest(stored, metadata, file)
        # Positions keep their values, which show the grid if they are sine-cosine.
        held = {name: each if "pos" in name and each.ndim == 3 else each.to("meta") for name, each in stored.items()}
        _, choice = split_choice(Path(path))
        shapes, beside = one_model(held, file, choice=choice)
        weights = replace(translated(file, shapes, metadata), beside=beside)
    else:
        weights = read_weights(path, finite=False)
        stored = weights.tensors
    dtypes: Counter[str] = Counter()
    for tensor in weights.tensors.values():
        dtypes[str(tensor.dtype).removeprefix("torch.")] += tensor.numel()
    encoder: dict[str, Any] = {}
    facts, typed = _recorded(weights), Facts()
    if encoder_home(weights.tensors) is not None:
        typed = _typed(weights)
        encoder = encoder_arguments(encoder_tensors(weights), weights.metadata)
        facts = _facts(weights, stored, encoder) | facts | {"licence": licence_notice(weights) or ""}
    return Inspection(
        path=weights.path,
        file_bytes=weights.path.stat().st_size,
        layout=weights.layout,
        content=weights.format,
        tensors=len(weights.tensors),
        values=sum(dtypes.values()),
        dtypes=dict(dtypes.most_common()),
        encoder=encoder,
        facts={key: value for key, value in facts.items() if value},
        sources={key: fact.source for key, fact in typed.items()},
        assumed=tuple(assumed_lines(typed)),
        beside=weights.beside,
        not_plain=tuple(not_plain(weights.tensors)) if encoder else (),
        non_finite=non_finite(stored) if values else None,
        becomes={to: _outcome(weights, to, encoder) for to in TARGETS},
    )


def _facts(weights: Weights, stored: Mapping[str, Tensor], arguments: Mapping[str, Any]) -> dict[str, str]:
    plain = plain_tensors(weights)
    heads, fusion = "", ""
    if "num_heads" not in arguments:
        heads = "unknown, the file does not show them. Conversions need --set num_heads=N"
    elif told := encoder_facts(encoder_tensors(weights), weights.metadata)["num_heads"]:
        heads = told.why if told.source == "recorded" else ""
    if (mixed := plain.get("wfm.linear.weight")) is not None:
        fusion = f"{mixed.shape[1]} maps of the encoder for each of {mixed.shape[0]} decoder blocks"
    head = plain.get("head.weight", plain.get("head.1.weight"))
    tables = sorted({window_of(table) for name, table in plain.items() if RELATIVE.fullmatch(name)})
    return {
        "heads": heads,
        "read as": weights.notes.get(f"{encoder_home(weights.tensors)}pos_embed", ""),
        "class token": "" if "cls_token" in plain else "none",
        "final norm": "norm" if "norm.weight" in plain else "fc_norm" if "fc_norm.weight" in plain else "none",
        "decoder": _decoder(weights) if weights.format in ("crossmae", "mae") else "",
        "fusion": fusion,
        "head": "" if head is None else counted(len(head), "class"),
        "relative": f"tables for sides of {tables}" if tables else "",
        "positions": _positions(weights, stored, arguments),
    }


def _decoder(weights: Weights) -> str:
    try:
        arguments, _ = arguments_of(weights, {})
    except UserError as error:
        return str(error).removeprefix(f"{weights.path}: ")
    keys = ("decoder", "decoder_embed_dim", "decoder_depth", "decoder_num_heads", "norm_pix_loss")
    return ", ".join(f"{key} {(MODEL_DEFAULTS | arguments)[key]}" for key in keys)


def _typed(weights: Weights) -> Facts:
    """Find the facts about the model and its pixels."""
    facts = encoder_facts(encoder_tensors(weights), weights.metadata)
    if weights.format in ("crossmae", "mae"):
        with suppress(UserError):
            facts |= whole_facts(weights, {})
    return facts | pixel_facts(weights, facts["in_chans"].value)


def _recorded(weights: Weights) -> dict[str, str]:
    metadata = weights.metadata
    mean, std = (metadata.get(key, UNKNOWN) for key in (PIXEL_MEAN, PIXEL_STD))
    writer = [f"crossmae {metadata[VERSION]}"] if VERSION in metadata else []
    writer += [f"step {metadata[STEP]}"] if STEP in metadata else []
    return {
        "pixels": "" if mean == std == UNKNOWN else f"mean {mean}, std {std}",
        "norm eps": metadata.get(NORM_EPS, ""),
        "classes": shorten(recorded_names(metadata, CLASSES)),
        "written by": " ".join(writer),
        "converted": f"from {metadata['source_file']}" if metadata.get("source_file") else "",
    }


def _outcome(weights: Weights, to: str, arguments: Mapping[str, Any]) -> Outcome:
    try:
        planned = plan(weights, to)
        check_square(to, arguments)
    except UserError as error:
        return Outcome(False, str(error).removeprefix(f"{weights.path}: "))
    if planned.refused:
        return Outcome(False, why_refused(planned))
    lost: dict[str, dict[str, None]] = {}
    for entry in planned.report.entries:
        if entry.status == "dropped":
            lost.setdefault(entry.reason, {})[split_name(entry.name)[0]] = None
    dropped = "; ".join(f"{shorten(list(names))}: {reason}" for reason, names in lost.items())
    parts = [f"without {dropped}"] if dropped else []
    parts += [f"with a new {', '.join(new)}"] if (new := planned.report.names("new")) else []
    return Outcome(True, "; ".join(parts))


def _positions(weights: Weights, stored: Mapping[str, Tensor], arguments: Mapping[str, Any]) -> str:
    name = f"{encoder_home(weights.tensors)}pos_embed"
    table = weights.tensors.get(name)
    if table is None:
        return "none"
    try:
        grid, rows = table_grid(table.shape[1], arguments.get("img_size"), arguments["patch_size"])
    except UserError as error:
        return str(error)
    source = weights.sources.get(name, (name,))[0]
    found = next((tensor for key, tensor in stored.items() if key == source or key.endswith(f".{source}")), None)
    kind = "sine-cosine" if found is not None and is_sincos(found, grid) else "learned"
    return f"{kind}, {grid[0]} x {grid[1]} patches{'' if rows else ', no row for a class token'}"
