"""What a weight file is, and what it can become, from as little of it as its container allows to read."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from crossmae.checkpoints.conversion.planning import check_square, plan
from crossmae.checkpoints.conversion.targets import TARGETS
from crossmae.checkpoints.formats.keys import not_plain
from crossmae.checkpoints.metadata import (
    CLASSES,
    NORM_EPS,
    PIXEL_MEAN,
    PIXEL_STD,
    STEP,
    UNKNOWN,
    VERSION,
    recorded_arguments,
)
from crossmae.checkpoints.pretrained import arguments_of
from crossmae.checkpoints.provenance import licence_notice
from crossmae.checkpoints.reading.digest import check_digest
from crossmae.checkpoints.reading.files import file_kind, find_file
from crossmae.checkpoints.reading.unpickle import damaged
from crossmae.checkpoints.reading.wrappers import one_model
from crossmae.checkpoints.report import split_name
from crossmae.checkpoints.resample import RELATIVE, is_sincos, table_grid, window_of
from crossmae.checkpoints.weights import (
    Weights,
    encoder_arguments,
    encoder_home,
    encoder_tensors,
    non_finite,
    read_weights,
    translated,
)
from crossmae.errors import UserError, shorten
from crossmae.models.crossmae import MODEL_DEFAULTS

LAYOUTS = {
    "plain": "plain: those of timm, of the published files, ours and detectron2's",
    "hf-vit": "hf-vit: transformers' ViT",
    "hf-vitmae": "hf-vitmae: transformers' ViTMAE",
    "mmpretrain": "mmpretrain: OpenMMLab's",
}
MAX_NAMES = 5
_TYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
CONTENTS = {
    "crossmae": "a CrossMAE pretraining model, encoder and decoder",
    "mae": "an MAE pretraining model, encoder and decoder",
    "encoder": "an encoder",
    "finetuned": "a classifier",
    "linear_probe": "a linear probe",
    "detectron2": "the encoder of a detection backbone, without class token",
    "detector": "a detector",
    "unknown": "no kind of model that is known, or more than one",
}


@dataclass(frozen=True)
class Outcome:
    """What would become of a file in a target: `possible`, and what stays behind or what keeps it from being done."""

    possible: bool
    text: str


@dataclass(frozen=True)
class Inspection:
    """What a weight file is.

    Attributes:
        path: the file itself, also where a folder was given.
        file_bytes: its size.
        layout: whose names it has, see `Weights.layout`.
        content: what kind of model, see `Weights.format`.
        tensors, values: how many.
        dtypes: values of each type.
        encoder: constructor arguments as far as they are known; {} without an encoder.
        facts: what else is known, by a short name, for people.
        beside: what the file holds beside the weights.
        not_plain: sentences, what of the encoder a plain ViT has no place for.
        non_finite: names of tensors with NaN or infinity; None where values were not read.
        becomes: target -> outcome.
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
    beside: tuple[str, ...]
    not_plain: tuple[str, ...]
    non_finite: tuple[str, ...] | None
    becomes: dict[str, Outcome]

    def record(self) -> dict[str, Any]:
        """The same for a JSON file."""
        return asdict(self) | {"path": str(self.path)}

    def lines(self) -> list[str]:
        """The same for people."""
        types = ", ".join(f"{name} {count:,}" if len(self.dtypes) > 1 else name for name, count in self.dtypes.items())
        rows = {
            "file": f"{self.path} ({self.file_bytes / 1e6:,.1f} MB)",
            "names": LAYOUTS.get(self.layout, self.layout),
            "content": CONTENTS.get(self.content, self.content),
            "tensors": f"{self.tensors:,} with {self.values:,} values, {types}",
        }
        if self.encoder:
            rows["encoder"] = ", ".join(f"{key} {_short(value)}" for key, value in self.encoder.items())
        rows |= self.facts
        if self.beside:
            rows["beside"] = ", ".join(self.beside)
        rows["finite"] = self._finite()
        width = max(map(len, [*rows, *self.becomes])) + 2
        text = [f"{name:{width}}{value}" for name, value in rows.items()]
        text += [f"{'NOT PLAIN':{width}}{sentence}" for sentence in self.not_plain]
        text += ["", "can become"]
        said = {outcome.text for outcome in self.becomes.values()}
        if len(said) == 1 and not any(outcome.possible for outcome in self.becomes.values()):
            return [*text, f"{'nothing':{width}}{said.pop()}"]
        for name, outcome in self.becomes.items():
            text.append(f"{name:{width}}{'yes' if outcome.possible else 'no '}  {outcome.text}".rstrip())
        return text

    def _finite(self) -> str:
        if self.non_finite is None:
            return "values were not read"
        if not self.non_finite:
            return "every value"
        names = ", ".join(self.non_finite[:MAX_NAMES]) + (", ..." if self.non_finite[MAX_NAMES:] else "")
        return f"NO: NaN or infinity in {len(self.non_finite)} tensors: {names}"


def inspect(path: str | Path, *, values: bool = True) -> Inspection:
    """Look into a weight file.

    Of safetensors only the header is in memory, and one tensor at a time while values are checked; other containers are
    read whole.

    Args:
        path: see `read_weights`.
        values: look for NaN and infinity, which reads everything.

    Raises:
        UserError: as `read_weights`, but for NaN and infinity, which are reported.
    """
    file = find_file(Path(path))
    if file_kind(file) == "safetensors":
        shapes, metadata = _header(file)
        model, beside = one_model(shapes, file)
        weights = replace(translated(file, model, metadata), beside=beside)
        with safe_open(file, "pt") as opened:
            stored = _Tensors(shapes, opened.get_tensor)
            if values:
                check_digest(stored, metadata, file)
            bad = non_finite(stored) if values else None
            positions = _positions(weights, stored)
    else:
        weights = read_weights(path, finite=False)
        bad = non_finite(weights.tensors) if values else None
        positions = _positions(weights, weights.tensors)
    return _inspection(weights, bad, positions)


class _Tensors(Mapping[str, Tensor]):
    """The tensors of an open file, each read when it is asked for."""

    def __init__(self, names: Iterable[str], get: Callable[[str], Tensor]) -> None:
        self.names, self.get_tensor = list(names), get

    def __getitem__(self, name: str) -> Tensor:
        return self.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def _header(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Names, shapes and types as tensors without memory, and the metadata."""
    try:
        with safe_open(file, "pt") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
            metadata = opened.metadata() or {}
            shapes = {
                name: torch.empty(part.get_shape(), dtype=_TYPES[part.get_dtype()], device="meta")
                for name, part in slices.items()
            }
            return shapes, metadata
    except (SafetensorError, OSError, ValueError) as error:
        raise damaged(file, error) from None
    except KeyError as error:
        raise UserError(f"{file}: holds values of type {error.args[0]}, which torch does not have") from None


def _inspection(weights: Weights, bad: tuple[str, ...] | None, positions: str) -> Inspection:
    home = encoder_home(weights.tensors)
    plain = {name.removeprefix(home or ""): tensor for name, tensor in weights.tensors.items()}
    dtypes: Counter[str] = Counter()
    for tensor in weights.tensors.values():
        dtypes[str(tensor.dtype).removeprefix("torch.")] += tensor.numel()
    facts = {} if home is None else _facts(weights, plain) | {"positions": positions}
    return Inspection(
        path=weights.path,
        file_bytes=weights.path.stat().st_size,
        layout=weights.layout,
        content=weights.format,
        tensors=len(weights.tensors),
        values=sum(dtypes.values()),
        dtypes=dict(dtypes.most_common()),
        encoder={} if home is None else encoder_arguments(encoder_tensors(weights), weights.metadata),
        facts={key: value for key, value in (facts | _recorded(weights)).items() if value},
        beside=weights.beside,
        not_plain=() if home is None else tuple(not_plain(weights.tensors)),
        non_finite=bad,
        becomes={to: _outcome(weights, to) for to in TARGETS},
    )


def _facts(weights: Weights, plain: Mapping[str, Tensor]) -> dict[str, str]:
    """What the names and shapes of tensors tell beside the encoder's arguments."""
    guessed = "num_heads" not in recorded_arguments(weights.metadata)
    head = plain.get("head.weight", plain.get("head.1.weight"))
    tables = [tensor for name, tensor in plain.items() if RELATIVE.fullmatch(name)]
    return {
        "heads": _heads(weights) if guessed else "",
        "read as": weights.notes.get(f"{encoder_home(weights.tensors)}pos_embed", ""),
        "class token": "" if "cls_token" in plain else "none",
        "final norm": "norm" if "norm.weight" in plain else "fc_norm" if "fc_norm.weight" in plain else "none",
        "decoder": _decoder(weights) if weights.format in ("crossmae", "mae") else "",
        "fusion": _fusion(plain),
        "head": "" if head is None else f"{len(head)} classes",
        "relative": f"tables for sides of {sorted({window_of(table) for table in tables})}" if tables else "",
    }


def _heads(weights: Weights) -> str:
    if "num_heads" in encoder_arguments(encoder_tensors(weights), weights.metadata):
        return "num_heads is that of published models of this width; neither shapes nor the file tell it"
    return "not known: no shape tells them, nor does the file; conversions need --set num_heads=N"


def _decoder(weights: Weights) -> str:
    try:
        arguments, assumed = arguments_of(weights, {})
    except UserError as error:
        return str(error).removeprefix(f"{weights.path}: ")
    keys = ("decoder", "decoder_embed_dim", "decoder_depth", "decoder_num_heads", "norm_pix_loss")
    arguments = MODEL_DEFAULTS | arguments
    known = [f"{key} {arguments[key]}" for key in keys]
    return ", ".join([*known, *(f"assumed: {sentence}" for sentence in assumed)])


def _fusion(plain: Mapping[str, Tensor]) -> str:
    mixed = plain.get("wfm.linear.weight")
    return "" if mixed is None else f"{mixed.shape[1]} maps of the encoder for each of {mixed.shape[0]} decoder blocks"


def _recorded(weights: Weights) -> dict[str, str]:
    """What the file says about itself."""
    metadata = weights.metadata
    pixels = [metadata.get(key, UNKNOWN) for key in (PIXEL_MEAN, PIXEL_STD)]
    version, step = metadata.get(VERSION), metadata.get(STEP)
    classes = json.loads(metadata.get(CLASSES, "[]"))
    return {
        "pixels": "" if pixels == [UNKNOWN, UNKNOWN] else f"mean {pixels[0]}, std {pixels[1]}",
        "norm eps": metadata.get(NORM_EPS, ""),
        "classes": ", ".join(classes[:MAX_NAMES]) + (", ..." if classes[MAX_NAMES:] else ""),
        "written by": " ".join(
            filter(None, (f"crossmae {version}" if version else "", f"step {step}" if step else ""))
        ),
        "converted": metadata.get("source_file", "") and f"from {metadata['source_file']}",
        "licence": (encoder_home(weights.tensors) is not None and licence_notice(weights)) or "",
    }


def _outcome(weights: Weights, to: str) -> Outcome:
    try:
        planned = plan(weights, to)
        check_square(to, encoder_arguments(encoder_tensors(weights), weights.metadata))
    except UserError as error:
        return Outcome(False, str(error).removeprefix(f"{weights.path}: "))
    lost: dict[str, list[str]] = {}
    for entry in planned.report.entries:
        if entry.status == "dropped":
            lost.setdefault(entry.reason, []).append(split_name(entry.name)[0])
    text = "; ".join(f"{shorten(list(dict.fromkeys(names)))}: {reason}" for reason, names in lost.items())
    new = ", ".join(planned.report.names("new"))
    parts = [f"without {text}" if text else "", f"with a new {new}" if new else ""]
    if planned.refused:
        return Outcome(False, f"unless --drop leaves them behind: {shorten(list(planned.refused))}")
    return Outcome(True, "; ".join(filter(None, parts)))


def _positions(weights: Weights, stored: Mapping[str, Tensor]) -> str:
    """Whether the position table is the fixed one, and of which grid."""
    home = encoder_home(weights.tensors)
    table = weights.tensors.get(f"{home}pos_embed")
    if home is None or table is None:
        return "none"
    arguments = encoder_arguments(encoder_tensors(weights), weights.metadata)
    try:
        grid, rows = table_grid(table.shape[1], arguments.get("img_size"), arguments["patch_size"])
    except UserError as error:
        return str(error)
    source = weights.sources.get(f"{home}pos_embed", (f"{home}pos_embed",))[0]
    found = next((name for name in stored if name == source or name.endswith(f".{source}")), None)
    kind = "learned"
    if found is not None and is_sincos(stored[found], grid):
        kind = "sine-cosine"
    return f"{kind}, {grid[0]} x {grid[1]} patches{'' if rows else ', no row for a class token'}"


def _short(value: Any) -> str:
    return " x ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
