"""A classifier in a file: what travels with its weights, and how to get it back."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from pydantic import BaseModel, Json, ValidationError
from torch import nn

import crossmae
from crossmae.checkpoints.loading import load
from crossmae.checkpoints.metadata import (
    FORMAT,
    MODEL_ARGUMENTS,
    PIXEL_MEAN,
    PIXEL_STD,
    PUBLISHED_ARGUMENTS,
    STEP,
    UNKNOWN,
    VERSION,
)
from crossmae.checkpoints.pretrained import BIT_DEPTH, IMAGENET_MEAN, IMAGENET_STD
from crossmae.checkpoints.weights import Weights, read_weights
from crossmae.classification.vit import Architecture, Head, architecture_of, build_vit
from crossmae.data.pixels import published_crop_pct
from crossmae.errors import UserError
from crossmae.pretraining.neighbours import Pool

CLASSIFIER = "classifier"  # the format in the metadata
BEST = "model_best.safetensors"  # in the folder of a run, beside model.safetensors, its last weights


@dataclass(frozen=True)
class Classifier:
    """A model in evaluation mode, the names of its outputs, and how the pixels that it was trained on were made.

    Attributes:
        model: (B, C, H, W) normalised pixels to (B, N) logits; H and W are `architecture.img_size`.
        pool: "avg" or "cls".
        classes: N names, in the order of the outputs.
        class_names: the same for people; `classes` where nothing else was given.
        multi_label: an image may be of several classes: sigmoid, not softmax.
        mean, std: per channel, of pixels in 0-1.
        bit_depth: 8 or 16, see `crossmae.data.images`.
        crop_pct: share of the resized shorter side that the centre crop of an evaluation keeps.
        assumed: sentences; what neither file nor shapes tell, and was taken for granted.
    """

    path: Path
    model: nn.Module
    architecture: Architecture
    pool: Pool
    classes: tuple[str, ...]
    class_names: tuple[str, ...]
    multi_label: bool
    mean: tuple[float, ...]
    std: tuple[float, ...]
    bit_depth: int
    crop_pct: float
    assumed: tuple[str, ...]


class _Record(BaseModel):
    """What the metadata of a file of ours says; of a published one, what is assumed."""

    pool: Pool
    head: Head
    classes: Json[tuple[str, ...]]
    class_names: Json[tuple[str, ...]]
    multi_label: Json[bool]
    pixel_mean: Json[tuple[float, ...]]
    pixel_std: Json[tuple[float, ...]]
    bit_depth: Json[int]
    crop_pct: Json[float]


def classifier_metadata(
    architecture: Architecture,
    pool: Pool,
    head: Head,
    classes: Sequence[str],
    class_names: Sequence[str],
    multi_label: bool,
    mean: Sequence[float],
    std: Sequence[float],
    bit_depth: int,
    crop_pct: float,
    step: int,
) -> dict[str, str]:
    """What travels with the state dict of a classifier in a safetensors file; read by `load_classifier`.

    The tensors' names are timm's. The architecture has the key that a pretraining file has for its model, so that
    whatever starts from an encoder (fine-tuning, detection) knows the number of heads and the sides of the grid.

    Args:
        step: optimizer steps done.
    """
    height, width = architecture.img_size
    size = height if height == width else [height, width]
    return {
        FORMAT: CLASSIFIER,
        MODEL_ARGUMENTS: json.dumps(asdict(architecture) | {"img_size": size}),
        "pool": pool,
        "head": head,
        "classes": json.dumps(list(classes), ensure_ascii=False),
        "class_names": json.dumps(list(class_names), ensure_ascii=False),
        "multi_label": json.dumps(multi_label),
        PIXEL_MEAN: json.dumps(list(mean)),
        PIXEL_STD: json.dumps(list(std)),
        BIT_DEPTH: str(bit_depth),
        "crop_pct": json.dumps(crop_pct),
        VERSION: crossmae.__version__,
        STEP: str(step),
    }


def load_classifier(path: str | Path, img_size: int | Sequence[int] | None = None) -> Classifier:
    """Build the classifier of a file and load every tensor of it.

    Args:
        path: a file of ours, the folder of a run (its best weights, else its last ones) or a published fine-tuned or
            linear-probe file; of the latter the classes have numbers for names, and what else is assumed is listed.
        img_size: another than trained with, one number or height and width; positions are resampled to it.

    Raises:
        UserError: unreadable; an encoder without a head; a record that is incomplete or does not fit the tensors.
    """
    path = Path(path).expanduser()
    weights = read_weights(path / BEST if (path / BEST).is_file() else path)
    ours = weights.metadata.get(FORMAT) == CLASSIFIER
    if not ours and weights.format not in ("finetuned", "linear_probe"):
        raise UserError(
            f"{weights.path}: no classifier (format: {weights.format}); fine-tune its encoder first: tools/finetune.py "
            "writes model_best.safetensors"
        )
    architecture = architecture_of(weights, img_size=img_size)
    values, sentences = ({}, {}) if ours else _assume(weights, architecture)
    record = _read_record(weights, values, architecture)
    model = build_vit(architecture, len(record.classes), record.pool, head=record.head)
    load(model, weights, resample=True)
    return Classifier(
        path=weights.path,
        model=model.eval(),
        architecture=architecture,
        pool=record.pool,
        classes=record.classes,
        class_names=record.class_names,
        multi_label=record.multi_label,
        mean=record.pixel_mean,
        std=record.pixel_std,
        bit_depth=record.bit_depth,
        crop_pct=_crop_pct(record.crop_pct, weights, architecture),
        assumed=tuple(sentence for key, sentence in sentences.items() if weights.metadata.get(key, UNKNOWN) == UNKNOWN),
    )


def _read_record(weights: Weights, assumed: Mapping[str, str], architecture: Architecture) -> _Record:
    """The metadata, and what is assumed where it says nothing."""
    known = {key: value for key, value in weights.metadata.items() if value != UNKNOWN}
    try:
        record = _Record.model_validate({**assumed, **known})
    except ValidationError as error:
        wrong = "; ".join(f"{item['loc'][0]}: {item['msg']}" for item in error.errors())
        raise UserError(f"{weights.path}: the metadata of the classifier is not as it should be: {wrong}") from None
    if len(record.class_names) != len(record.classes):
        raise UserError(f"{weights.path}: {len(record.classes)} classes have {len(record.class_names)} names")
    for key, values in ((PIXEL_MEAN, record.pixel_mean), (PIXEL_STD, record.pixel_std)):
        if len(values) != architecture.in_chans:
            raise UserError(f"{weights.path}: {key} holds {len(values)} values for {architecture.in_chans} channels")
    return record


def _crop_pct(recorded: float, weights: Weights, architecture: Architecture) -> float:
    """What was recorded; where that is the published rule for the size trained with, the rule for this size."""
    trained = architecture_of(weights).img_size
    return published_crop_pct(architecture.img_size) if recorded == published_crop_pct(trained) else recorded


def _assume(weights: Weights, architecture: Architecture) -> tuple[dict[str, str], dict[str, str]]:
    """The record of a published file, by its keys (method specification, section 1.3), and what of it is a guess."""
    probe = weights.format == "linear_probe"
    number = len(weights.tensors["head.1.weight" if probe else "head.weight"])
    crop_pct = published_crop_pct(architecture.img_size)
    classes = json.dumps([str(index) for index in range(number)])
    pool, settled = _pool_by_norm(weights)
    values = {
        "pool": pool,
        "head": "batchnorm" if probe else "linear",
        "classes": classes,
        "class_names": weights.metadata.get("classes", classes),
        "multi_label": "false",
        "crop_pct": json.dumps(crop_pct),
        BIT_DEPTH: "8",
    }
    sentences = {
        "classes": f"classes have the numbers 0 to {number - 1} for names",
        "multi_label": "an image is of exactly one class",
        "crop_pct": f"evaluation keeps {crop_pct:g} of the shorter side, as published for this size",
        "num_heads": f"{architecture.num_heads} attention heads, as published for a width of {architecture.embed_dim}",
    }
    if not settled:
        sentences["pool"] = f"pooling is {pool}, as published for the norm that it has"
    if architecture.in_chans == len(IMAGENET_MEAN):
        values |= {PIXEL_MEAN: json.dumps(IMAGENET_MEAN), PIXEL_STD: json.dumps(IMAGENET_STD)}
        sentences[PIXEL_MEAN] = "pixels of 8 bits were normalised by ImageNet's mean and deviation"
    return values, sentences


def _pool_by_norm(weights: Weights) -> tuple[Pool, bool]:
    """The pooling that goes with a file's final norm, and whether its settings agree or are silent.

    Raises:
        UserError: they disagree.
    """
    pool: Pool = "cls" if "norm.weight" in weights.tensors else "avg"
    average = json.loads(weights.metadata.get(PUBLISHED_ARGUMENTS, "{}")).get("global_pool")
    if isinstance(average, bool) and average != (pool == "avg"):
        raise UserError(
            f"{weights.path}: its settings say global_pool={average}, but its final norm is that of pooling {pool!r}, "
            "which no published model has"
        )
    return pool, isinstance(average, bool)
