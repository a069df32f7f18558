"""Model card of a folder to share: data, recipe, figures, licence. Hubs read its first lines, which are YAML."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import yaml
from torch import Tensor

from crossmae.checkpoints.formats.recognition import CONTENTS
from crossmae.checkpoints.formats.training_record import TrainingRecord, recorded_training
from crossmae.checkpoints.metadata import (
    CLASSES,
    PIXEL_MEAN,
    PIXEL_STD,
    RANDOM_WEIGHTS,
    STARTED_FROM,
    STEP,
    UNKNOWN,
    VERSION,
    recorded_names,
)
from crossmae.checkpoints.provenance import LICENCE, licence_tag
from crossmae.errors import UserError, advise, counted

LICENCE_TAG = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+-]{0,99}")
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
_SHOWN_CLASSES = 100
_LIBRARY = "crossmae"
_PIPELINES = {
    "detector": ("object-detection", ("object-detection", "detectron2", "vitdet")),
    "finetuned": ("image-classification", ("image-classification", "vit")),
    "linear_probe": ("image-classification", ("image-classification", "vit")),
    "crossmae": ("image-feature-extraction", ("crossmae", "masked-autoencoder", "vit")),
    "mae": ("image-feature-extraction", ("mae", "masked-autoencoder", "vit")),
}
_DETECT = 'predictor = det.Predictor.from_pretrained("{folder}")\ninstances = predictor("photo.jpg")'
_CLASSIFY = 'classifier = crossmae.Classifier.from_pretrained("{folder}")\nlogits = classifier.model(pixels)'
_PRETRAINED = 'model = crossmae.CrossMAE.from_pretrained("{folder}")\noutput = model(pixels)'
_NORMALISED = "  # (B, C, H, W), normalised by the statistics below"
_CODE = {
    "detector": f"import det\n\n{_DETECT}",
    "finetuned": f"import crossmae\n\n{_CLASSIFY}{_NORMALISED}",
    "linear_probe": f"import crossmae\n\n{_CLASSIFY}{_NORMALISED}",
    "crossmae": f"import crossmae\n\n{_PRETRAINED}{_NORMALISED}",
    "mae": f"import crossmae\n\n{_PRETRAINED}{_NORMALISED}",
}
_COMMANDS = {
    "detector": "python tools/predict.py --weights {folder} photo.jpg",
    "finetuned": "python tools/predict_classes.py --weights {folder} photo.jpg",
    "linear_probe": "python tools/predict_classes.py --weights {folder} photo.jpg",
    "crossmae": "python tools/reconstruct.py {folder} photo.jpg",
    "mae": "python tools/reconstruct.py {folder} photo.jpg",
}


def model_card(
    name: str, content: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], base_model: str = ""
) -> str:
    """Write the model card of weights in Markdown.

    Args:
        name: name of the folder.
        content: see `Weights.format`.
        base_model: name on a model hub.

    Raises:
        UserError: the metadata are damaged, or `base_model` is no name on a hub.
    """
    if base_model and not _HUB_NAME.fullmatch(base_model):
        raise UserError(f"base_model: {base_model[:200]!r} is no name on a hub. Write OWNER/NAME, or leave it out.")
    training = recorded_training(metadata)
    parts = [
        front_matter(content, metadata, base_model),
        f"# {_plain(name)}\n\n{_summary(content, tensors, metadata)}",
        _usage(name, content),
        _data_section(training, metadata),
        _table("Recipe", "setting", "value", training.recipe.items(), "The settings are not recorded."),
        _figures(training),
        _licence_section(metadata, base_model),
    ]
    return "\n\n".join(parts) + "\n"


def front_matter(content: str, metadata: Mapping[str, str], base_model: str) -> str:
    """Build the YAML that hubs read: licence, library, task, tags, base model."""
    task, tags = _PIPELINES.get(content, ("image-feature-extraction", ("vit",)))
    about: dict[str, Any] = {"license": licence_tag(metadata.get(LICENCE, "")) or "unknown", "library_name": _LIBRARY}
    about |= {"pipeline_tag": task, "tags": list(tags)} | ({"base_model": base_model} if base_model else {})
    return f"---\n{yaml.safe_dump(about, sort_keys=False, allow_unicode=True)}---"


def _summary(content: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    what = CONTENTS.get(content, "weights").split(",")[0]
    size = sum(tensor.numel() for tensor in tensors.values()) / 1e6
    version, step = _plain(metadata.get(VERSION, UNKNOWN)), metadata.get(STEP, "")
    after = f", after {counted(int(step), 'optimizer step')}" if step.isdecimal() and len(step) < 16 else ""
    return f"{what[:1].upper()}{what[1:]} of {size:.3g} million values{after}. Written by crossmae {version}."


def _usage(name: str, content: str) -> str:
    if content not in _CODE:
        return "## Use\n\nThe weights are for `crossmae.checkpoints.load`."
    folder = json.dumps(name, ensure_ascii=False)[1:-1]
    code, command = _CODE[content].format(folder=folder), advise(_COMMANDS[content].format(folder=folder))
    return f"## Use\n\n```python\n{code}\n```\n\n    {command}"


def _data_section(training: TrainingRecord, metadata: Mapping[str, str]) -> str:
    rows = [
        (_plain(split), _code(data.name), "unknown" if data.images is None else f"{data.images:,}")
        for split, data in training.data.items()
    ]
    text = ["## Data"]
    if rows:
        text.append(_rows(("split", "data", "images"), rows))
    else:
        text.append("The data are not recorded.")
    if names := recorded_names(metadata, CLASSES):
        more = f" and {len(names) - _SHOWN_CLASSES} more" if len(names) > _SHOWN_CLASSES else ""
        listed = ", ".join(map(_plain, names[:_SHOWN_CLASSES]))
        text.append(f"{counted(len(names), 'class')}: {listed}{more}.")
    mean, std = (metadata.get(key, UNKNOWN) for key in (PIXEL_MEAN, PIXEL_STD))
    text.append(f"Pixels from 0 to 1 are normalised by mean {_code(mean)} and deviation {_code(std)} per channel.")
    return "\n\n".join(text)


def _figures(training: TrainingRecord) -> str:
    figures = _table("Figures", "metric", "value", training.figures.items(), "No figures are recorded.")
    if training.step is None:
        return figures
    percent = " AP and AR are in percent." if any("/AP" in name for name in training.figures) else ""
    return f"{figures}\n\nThe run logged these numbers after {counted(training.step, 'step')}.{percent}"


def _licence_section(metadata: Mapping[str, str], base_model: str) -> str:
    started, source, note = (metadata.get(key, "") for key in (STARTED_FROM, "source_file", LICENCE))
    parts = [f"Converted from {_code(source)}."] if source else []
    if started:
        parts += [f"The training started from {started if started == RANDOM_WEIGHTS else _code(started)}."]
    parts += [] if parts else ["The file does not record its initial weights."]
    parts += [f"Base model: {base_model}."] if base_model else []
    return f"## Licence\n\n{' '.join(parts)}\n\n{_plain(note) or 'The licence of these weights is not stated.'}"


def _table(title: str, first: str, second: str, items: Iterable[tuple[str, Any]], absent: str) -> str:
    rows = [(_code(key), _code(value if isinstance(value, str) else json.dumps(value))) for key, value in items]
    return f"## {title}\n\n{_rows((first, second), rows) if rows else absent}"


def _rows(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _plain(text: str) -> str:
    """Keep names of others from being Markdown or HTML."""
    return re.sub(r"([\\`*_{}\[\]<>#|])", r"\\\1", " ".join(text.split()))


def _code(text: str) -> str:
    """Show text as it is, in a cell of a table too."""
    return f"`{' '.join(text.split()).replace('`', chr(39)).replace('|', '/')}`" if text.strip() else ""
