"""Labelled images: class names, training batches and evaluation views."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from crossmae.classification.train.augment import keyed_everywhere
from crossmae.data.batches import KeyedImages, KeyedSample, collate_as
from crossmae.data.broken import NEVER_REPLACED, Broken, Unreadable
from crossmae.data.parallel import Progress
from crossmae.data.pixels import centre_view, read_pixels
from crossmae.data.sources import Source
from crossmae.data.sources.labels import alike_labels, doubt_labels, unify_labels
from crossmae.data.workers import Loader, usable_workers
from crossmae.errors import UserError, counted, shorten
from crossmae.files import decode_text, read_file
from crossmae.models.class_names import LISTED, pair_names

SEPARATORS = "|;,"

log = logging.getLogger(__name__)


class LabelledBatch(NamedTuple):
    """Images and targets of one micro-batch.

    Attributes:
        images: (B, C, H, W), uint8, or float32 in 0-1.
        targets: (B,) int64 classes. If an image can have several labels: (B, N) float32 of zeros and ones.
        indices: (B,) int64 positions in the source.
        broken: names of unreadable images. Other images, with their own labels, replace them in the batch.
    """

    images: Tensor
    targets: Tensor
    indices: Tensor
    broken: tuple[Broken, ...] = ()


@dataclass(frozen=True)
class LabelledImages:
    """Training and validation images with the same classes."""

    train: Source
    targets: Tensor
    classes: tuple[str, ...]
    class_names: tuple[str, ...]
    val: Source | None
    val_targets: Tensor | None


def find_classes(source: Source, key: str, separator: str | None = None) -> tuple[str, ...]:
    """List the classes of a source: its labels, split by a `separator`.

    Raises:
        UserError: the source has no labels, or fewer than two classes.
    """
    try:
        source.label(0)
    except UserError as error:
        raise UserError(f"{key}: {error}") from None
    classes = source.classes
    counts = np.bincount(source.labels(), minlength=len(classes)).tolist()
    for note in (*source.doubts, *doubt_labels(dict(zip(classes, counts, strict=True)))):
        log.warning("%s: %s", key, note)
    if separator is None and (several := find_several(classes)):
        log.warning("%s: the class %r reads like several labels. If so, set 'data.separator=\"%s\"'", key, *several)
    if separator is not None:
        words, notes = unify_labels([word for text in source.classes for word in split_labels(text, separator)])
        classes = tuple(sorted({word for word in words if word}))
        for note in notes:
            log.warning("%s: %s", key, note)
    if alike := alike_labels(classes):
        log.warning("%s: %s differ in spaces or case only, but are classes of their own", key, shorten(alike))
    for name in classes:
        if not name.isprintable() or name.encode("utf-8", "replace").decode() != name:
            raise UserError(f"{key}: the class {name!r} is not valid text. Rename it.")
    if len(classes) < (2 if separator is None else 1):
        raise UserError(f"{key}: {source.description}: {counted(len(classes), 'class')}. Name images of at least two.")
    return classes


def find_several(classes: Sequence[str]) -> tuple[str, str] | None:
    """Find a class whose name joins other classes, and the separator."""
    known = set(classes)
    for name in classes:
        for separator in SEPARATORS:
            if separator in name and set(split_labels(name, separator)) <= known:
                return name, separator
    return None


def split_labels(text: str, separator: str) -> list[str]:
    """Split the labels of one image. An empty text has no labels."""
    return [word for part in text.split(separator) if (word := part.strip())]


def label_targets(source: Source, key: str, classes: Sequence[str], separator: str | None = None) -> Tensor:
    """Convert the labels of all images to positions in `classes`.

    Returns:
        (N,) int64. With a separator: (N, C) float32 of zeros and ones.

    Raises:
        UserError: the source has no labels, or has labels that are not in `classes`. The error names them.
    """
    labels = torch.from_numpy(np.array(source.labels()))
    words = [[text] if separator is None else split_labels(text, separator) for text in source.classes]
    if separator is not None:
        every = [word for of_one in words for word in of_one]
        unified = dict(zip(every, unify_labels(every)[0], strict=True))
        words = [[unified[word] or word for word in of_one] for of_one in words]
    pairs = pair_names(tuple(dict.fromkeys(word for of_one in words for word in of_one)), classes)
    positions = {word: place for word, place in zip(pairs.found, pairs.places, strict=True) if place is not None}
    if any(word != classes[place] for word, place in positions.items()):
        log.warning("%s: %s", key, pairs.notes()[0])
    if unknown := sorted(pairs.unknown):
        several = find_several([*unknown, *classes]) if separator is None else None
        hint = f" Several labels per image need 'data.separator=\"{several[1]}\"'." if several else ""
        raise UserError(
            f"{key}: {source.description}: no classes of the model: {shorten(unknown, LISTED)}. Its {len(classes)} "
            f"classes are {shorten(classes, LISTED)}, compared by name. The data have "
            f"{shorten(source.classes, LISTED)}. Give classes that mean the same the same name.{hint}"
        )
    if separator is None:
        return torch.tensor([positions[word] for (word,) in words])[labels]
    table = torch.zeros(len(words), len(classes))
    for row, of_one in enumerate(words):
        table[row, [positions[word] for word in of_one]] = 1.0
    return table[labels]


def warn_of_absent(targets: Tensor, key: str, classes: Sequence[str]) -> None:
    """Warn about classes that have no images."""
    counts = targets.sum(dim=0) if targets.ndim == 2 else torch.bincount(targets, minlength=len(classes))
    if absent := [classes[index] for index in (counts == 0).nonzero()[:, 0].tolist()]:
        log.warning("%s: no image of the class %s", key, shorten(absent))


def read_class_names(names: Sequence[str] | Path | None, classes: Sequence[str]) -> tuple[str, ...]:
    """Return the given names to show, or read them from a file.

    Raises:
        UserError: the number of names differs from the number of classes, or the file cannot be read.
    """
    if names is None:
        return tuple(classes)
    where = "data.class_names"
    if isinstance(names, Path):
        where = f"data.class_names: {names}"
        names = decode_text(read_file(names, where), names, where).splitlines()
    if doubled := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"{where}: {shorten(doubled)} twice. Give every class its own name.")
    if len(names) != len(classes):
        found = f"{counted(len(names), 'name')} for {counted(len(classes), 'class')}"
        raise UserError(f"{where}: {found}. Name all of {shorten(classes)}.")
    return tuple(names)


class TrainImages(KeyedImages):
    """Augmented images (C, H, W) from `view`, each with its row of the targets (N, ...)."""

    def __init__(
        self,
        source: Source,
        targets: Tensor,
        view: Callable[[Image.Image | Tensor], Tensor],
        seed: int,
        channels: int,
        bit_depth: int,
        broken: Literal["error", "substitute"],
    ) -> None:
        super().__init__(source, seed, channels, bit_depth, broken)
        self.targets, self.view = targets, view

    def sample(self, pixels: Tensor, position: int, key: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
        """Return an augmented image and its target."""
        with keyed_everywhere(*key):
            return self.view(pixels), self.targets[position]


@dataclass(frozen=True)
class Views:
    """Evaluation views: size (height, width), and mean and std per channel of pixels in 0-1.

    The centre crop keeps the share `crop_pct` of the shorter side.
    """

    size: tuple[int, int]
    crop_pct: float
    mean: tuple[float, ...]
    std: tuple[float, ...]
    bit_depth: int


class CentreViews(Dataset[Any]):
    """Centre crops of images, not normalised, with their targets."""

    def __init__(self, source: Source, targets: Tensor, views: Views) -> None:
        self.source, self.targets, self.views = source, targets, views

    def __len__(self) -> int:
        return len(self.source)

    def read(self, index: int) -> Image.Image | Tensor:
        """Read an image without cropping it."""
        return read_pixels(self.source, index, len(self.views.mean), self.views.bit_depth)

    def __getitem__(self, index: int) -> KeyedSample | Unreadable:
        try:
            pixels = centre_view(self.read(index), self.views.size, self.views.crop_pct)
            return pixels, self.targets[index], index, ()
        except UserError as error:
            return Unreadable(str(error))


collate_labelled = partial(collate_as, LabelledBatch)


def evaluation_batches(
    views: CentreViews,
    indices: Sequence[int],
    batch_size: int,
    workers: int,
    pin_memory: bool,
    title: str,
    key: str,
    show: bool = True,
) -> Iterator[LabelledBatch]:
    """Yield batches of the given samples, in order, with a progress bar.

    Raises:
        UserError: an image cannot be read. The error names the image and `key`, the config key of the source.
    """
    workers = usable_workers(workers) if len(indices) > batch_size else 0
    how: dict[str, Any] = {"sampler": indices, "collate_fn": collate_labelled, "pin_memory": pin_memory}
    loader = Loader(views, workers, batch_size=batch_size, **how)
    for batch in Progress(loader, title, leave=False, unit="batch", shown=show):
        if isinstance(batch, Unreadable):
            raise UserError(f"{key}: {batch.message}. {NEVER_REPLACED}")
        yield batch
