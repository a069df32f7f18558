"""Classifiers in files: weights with a record of classes and pixels."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError
from torch import nn

import crossmae
from crossmae.checkpoints.formats.facts import MODEL_KEYS, ModelFact, assumed_lines
from crossmae.checkpoints.formats.keys import encoder_home
from crossmae.checkpoints.formats.model_folder import save_folder, source_metadata
from crossmae.checkpoints.formats.recognition import mix_up
from crossmae.checkpoints.loading import load
from crossmae.checkpoints.metadata import (
    BIT_DEPTH,
    CLASSES,
    FORMAT,
    MODEL_ARGUMENTS,
    PIXEL_MEAN,
    PIXEL_STD,
    PUBLISHED_ARGUMENTS,
    STEP,
    UNKNOWN,
    VERSION,
    recorded_value,
)
from crossmae.checkpoints.pretrained import IMAGENET_MEAN, IMAGENET_STD, pixel_facts
from crossmae.checkpoints.weights import Weights, read_weights
from crossmae.classification.vit import Architecture, HeadKind, architecture_of, build_vit
from crossmae.data.pixels import published_crop_pct
from crossmae.errors import UserError, counted
from crossmae.files import load_json
from crossmae.models.sizes import OFF_BY_DEFAULT
from crossmae.pretraining.config import Pool

CLASSIFIER = "classifier"  # the format in the metadata
PLAIN = ("pool", "head")  # values of the metadata that are text, not JSON
REPAIR = "Write the metadata again, or use another file."
BEST = "model_best.safetensors"  # best weights of a run, next to its last weights, model.safetensors


@dataclass(frozen=True, kw_only=True)
class ClassifierRecord:
    """Record in the file of a classifier: classes and pixels, which weights and architecture do not tell.

    Attributes:
        classes: N names, in the order of the outputs.
        class_names: N names to show; equal to `classes` unless others were given.
        multi_label: True if an image can have several classes. The scores are then sigmoids, not a softmax.
        mean, std: mean and deviation per channel, of pixels in 0-1. The file records them as pixel_mean and pixel_std.
        crop_pct: an evaluation resizes the shorter side, and its centre crop keeps this share of it.
    """

    pool: Pool
    head: HeadKind
    classes: tuple[str, ...]
    class_names: tuple[str, ...]
    multi_label: bool
    mean: Annotated[tuple[float, ...], Field(alias=PIXEL_MEAN)]
    std: Annotated[tuple[float, ...], Field(alias=PIXEL_STD)]
    bit_depth: int
    crop_pct: float


@dataclass(frozen=True, kw_only=True)
class Classifier(ClassifierRecord):
    """A model in evaluation mode, with the record of its file.

    The model maps normalised pixels (B, C, H, W) to logits (B, N). `assumed` has a sentence for each value that neither
    the file nor the shapes give. `names_known` is False if the classes of the file have no names. `metadata` are those
    of the file, see `source_metadata`.
    """

    path: Path
    model: nn.Module
    architecture: Architecture
    assumed: tuple[str, ...]
    names_known: bool = True
    metadata: dict[str, str] = field(default_factory=dict)

    @classmethod
    def from_pretrained(cls, path: str | Path, img_size: int | Sequence[int] | None = None) -> Classifier:
        """Load a classifier: a file, a run's folder, or a saved folder."""
        return load_classifier(path, img_size)

    def save_pretrained(
        self, folder: str | Path, *, licence: str = "", base_model: str = "", force: bool = False
    ) -> Path:
        """Save `model.safetensors` and a model card `README.md`.

        `save_folder` documents the arguments, result and errors.
        """
        record = ClassifierRecord(**{each.name: getattr(self, each.name) for each in fields(ClassifierRecord)})
        step = self.metadata.get(STEP, "0")
        about = classifier_metadata(self.architecture, record, int(step) if step.isdecimal() else 0)
        options = {"licence": licence, "base_model": base_model}
        return save_folder(folder, self.model.state_dict(), self.metadata | about, **options, force=force)

    def only(self, classes: Sequence[str]) -> Classifier:
        """Return a classifier that chooses among some of the classes only."""
        places = [self.classes.index(name) for name in classes]
        model = copy.deepcopy(self.model)
        linear: Any = model.head if self.head == "linear" else model.head[1]  # type: ignore[index]
        linear.weight, linear.bias = (nn.Parameter(tensor.detach()[places]) for tensor in (linear.weight, linear.bias))
        linear.out_features = len(places)
        names = tuple(self.class_names[at] for at in places)
        return replace(self, model=model, classes=tuple(classes), class_names=names)


def classifier_metadata(architecture: Architecture, record: ClassifierRecord, step: int) -> dict[str, str]:
    """Build the safetensors metadata of a classifier, read by `load_classifier`.

    The tensors have timm's names. The architecture has the same key as in a pretraining file. Fine-tuning and detection
    read the number of heads and the grid size from it. `step` is the number of optimizer steps done.
    """
    height, width = architecture.img_size
    size = height if height == width else [height, width]
    values = TypeAdapter(ClassifierRecord).dump_python(record, by_alias=True)
    sizes = {key: value for key, value in asdict(architecture).items() if OFF_BY_DEFAULT.get(key) != value}
    return {
        FORMAT: CLASSIFIER,
        MODEL_ARGUMENTS: json.dumps(sizes | {"img_size": size}),
        **{key: value if key in PLAIN else json.dumps(value, ensure_ascii=False) for key, value in values.items()},
        VERSION: crossmae.__version__,
        STEP: str(step),
    }


def load_classifier(path: str | Path, img_size: int | Sequence[int] | None = None) -> Classifier:
    """Build a classifier and load all its tensors from a file.

    Args:
        path: a file that this toolkit wrote, the folder of a run (its best weights, or its last weights if there are no
            best weights), or a published fine-tuned or linear-probe file. The classes of a published file are named by
            numbers.
        img_size: image size, if it differs from training: one number, or height and width. Positions are resampled to
            it.

    Raises:
        UserError: the file cannot be read, has no head, or its record is incomplete or does not fit the tensors.
    """
    path = Path(os.path.expanduser(path))
    weights = read_weights(path / BEST if os.path.isfile(path / BEST) else path)
    ours = weights.metadata.get(FORMAT) == CLASSIFIER
    if not ours and weights.format not in ("finetuned", "linear_probe"):
        raise mix_up(weights.path, weights.format, weights.metadata, "a classifier")
    architecture = architecture_of(weights, img_size=img_size)
    values, sentences = ({}, {}) if ours else _assume(weights, architecture)
    record = _read_record(weights, values, architecture)
    model = build_vit(architecture, len(record.classes), record.pool, head=record.head)
    facts = load(model, weights, resample=True).assumed
    if not ours:
        facts |= {"pool": _pool(weights)} | pixel_facts(weights, architecture.in_chans)
    crop_pct = record.crop_pct
    if crop_pct == published_crop_pct(architecture_of(weights).img_size):  # depends on the image size
        crop_pct = published_crop_pct(architecture.img_size)
    unknown = tuple(words for key, words in sentences.items() if weights.metadata.get(key, UNKNOWN) == UNKNOWN)
    lines = (*unknown, *(assumed_lines(facts, MODEL_KEYS, "Train it again with") if ours else assumed_lines(facts)))
    found = {"path": weights.path, "model": model.eval(), "architecture": architecture, "assumed": lines}
    found["metadata"] = source_metadata(weights)
    found["names_known"] = ours or weights.metadata.get(CLASSES, UNKNOWN) != UNKNOWN
    return Classifier(**vars(record) | {"crop_pct": crop_pct} | found)


def _read_record(weights: Weights, assumed: Mapping[str, str], architecture: Architecture) -> ClassifierRecord:
    """Read the record in the metadata, and add the assumed values."""
    known = {key: value for key, value in weights.metadata.items() if value != UNKNOWN}
    known |= {"pool": "cls"} if known.get("pool") == "token" else {}  # timm's word
    try:
        record = TypeAdapter(ClassifierRecord).validate_python(
            {key: _decode(key, value) for key, value in {**assumed, **known}.items()}
        )
    except ValidationError as error:
        wrong = ", ".join(f"{item['loc'][0]}: {item['msg']}" for item in error.errors())
        raise UserError(f"{weights.path}: wrong classifier metadata ({wrong}). {REPAIR}") from None
    number, channels = len(record.classes), architecture.in_chans
    for key, values, expected, what in (
        ("class_names", record.class_names, number, "classes"),
        (PIXEL_MEAN, record.mean, channels, "channels"),
        (PIXEL_STD, record.std, channels, "channels"),
    ):
        if len(values) != expected:
            raise UserError(
                f"{weights.path}: {key} has {counted(len(values), 'value')} for {expected} {what}. {REPAIR}"
            )
    return record


def _decode(key: str, value: str) -> Any:
    """Decode a JSON value. Return text that is not JSON unchanged."""
    try:
        return value if key in PLAIN else load_json(value)
    except ValueError:
        return value


def _assume(weights: Weights, architecture: Architecture) -> tuple[dict[str, str], dict[str, str]]:
    """Assume metadata for a published file, with a sentence per guess.

    Source: method specification, section 1.3.
    """
    probe = weights.format == "linear_probe"
    number = len(weights.tensors["head.1.weight" if probe else "head.weight"])
    crop_pct = published_crop_pct(architecture.img_size)
    classes = json.dumps([str(index) for index in range(number)])
    values = {
        "pool": _pool(weights).value,
        "head": "batchnorm" if probe else "linear",
        "classes": classes,
        "class_names": weights.metadata.get("classes", classes),
        "multi_label": "false",
        "crop_pct": json.dumps(crop_pct),
        BIT_DEPTH: "8",
    }
    sentences = {
        "classes": f"the names of the classes are the numbers 0 to {number - 1}",
        "multi_label": "an image is of exactly one class",
        "crop_pct": f"evaluation keeps {crop_pct:g} of the shorter side, as published for this size",
    }
    if architecture.in_chans == len(IMAGENET_MEAN):
        values |= {PIXEL_MEAN: json.dumps(IMAGENET_MEAN), PIXEL_STD: json.dumps(IMAGENET_STD)}
    return values, sentences


def _pool(weights: Weights) -> ModelFact:
    """Find the pooling of a file that this toolkit did not train."""
    named = {"token": "cls"}.get(pool := weights.metadata.get("pool", UNKNOWN), pool)  # timm's word
    if named != UNKNOWN:
        return ModelFact(named, "recorded")
    home = encoder_home(weights.tensors) or ""
    pool, other = ("cls", "avg") if f"{home}norm.weight" in weights.tensors else ("avg", "cls")
    average = recorded_value(weights.metadata, PUBLISHED_ARGUMENTS, dict).get("global_pool")
    if isinstance(average, bool) and average != (pool == "avg"):
        raise UserError(
            f"{weights.path}: its settings have global_pool={average}, but its final norm belongs to pooling {pool!r}. "
            "Use another file."
        )
    if isinstance(average, bool):
        return ModelFact(pool, "recorded")
    if f"{home}fc_norm.weight" in weights.tensors:
        return ModelFact(pool, "shapes")
    return ModelFact(pool, "assumed", "from its final norm" if pool == "cls" else "as it has no final norm", other)
