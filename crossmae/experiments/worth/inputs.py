"""The data of the question: unlabelled images, labels, held-out labels, and weights, checked before anything runs."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from crossmae.data.annotations.read import coco_file, has_annotations, read_annotations
from crossmae.data.sources import open_source
from crossmae.data.sources.source import Source
from crossmae.errors import UserError, named_by, shorten
from crossmae.experiments.labels import SmallShare, list_class_subsets, write_coco_subsets
from crossmae.files import make_folder, read_json, sha256, write_json, write_text

log = logging.getLogger(__name__)

DEFAULT_SHARES = (10.0, 30.0, 100.0)  # of the labelled images, in percent
HELD_OUT_SHARE = 0.2
FEWEST_HELD_OUT = 20  # unless this is more than half
FEWEST_LEFT = 2  # labelled images for training, after held-out images were taken away
SPLIT_SEED = 0
NAME_OTHERS = "name validation labels with --val-labels"

Task = Literal["detect", "classify"]


@dataclass(frozen=True)
class LabelledPart:
    """Labelled images of one split.

    Attributes:
        labels: COCO json, or labels of another tool, for a detector. For a classifier, a folder per class or a list.
        images: folder of the images that a json names.
    """

    labels: Path
    images: Path | None = None


@dataclass(frozen=True)
class Labels:
    """Labelled images for all runs.

    Attributes:
        train: subset of the labelled images by (seed, share in percent).
        counts: labelled images by share.
        all_images: labelled images for training at 100 %.
        has_masks: every annotation has a mask.
        remarks: heading and text of what a reader of the results must know.
    """

    task: Task
    train: Mapping[tuple[int, float], LabelledPart]
    val: LabelledPart
    counts: Mapping[float, int]
    all_images: int
    val_images: int
    has_masks: bool
    remarks: tuple[tuple[str, str], ...]


def prepare_labels(
    labels: LabelledPart,
    val: LabelledPart | None,
    unlabelled: Path,
    shares: Sequence[float] | None,
    seeds: Sequence[int],
    folder: Path,
) -> Labels:
    """Check the labels, split them if needed, and write the subsets.

    Args:
        labels: as given by the user. Folders of images may be unknown.
        val: labels to evaluate on. None: a fifth of the labelled images, at least 20, but at most half.
        unlabelled: images of pretraining. Their folder may have the labelled images, too.
        shares: percentages. None: `DEFAULT_SHARES` without those that have no image of some class.
        folder: folder for subsets. Its names depend on the content of the labels.

    Raises:
        UserError: files are missing, labels are missing or too few, or training and validation images are the same.
    """
    for key, part in (("LABELS", labels), ("--val-labels", val)):
        if part and not part.labels.exists():
            raise UserError(f"{key}: {part.labels} does not exist. Name a COCO json or a folder per class.")
    labels, val = _convert(labels, val, folder)
    if labels.labels.suffix.lower() == ".json":
        return _prepare_coco(labels, val, unlabelled, shares, seeds, folder)
    for flag, part in (("--label-images", labels), ("--val-images", val)):
        if part and part.images:
            raise UserError(f"{flag}: only a COCO json needs it. Leave it out: {part.labels} is no json.")
    return _prepare_classes(labels.labels, val.labels if val else None, unlabelled, shares, seeds, folder)


def _convert(labels: LabelledPart, val: LabelledPart | None, folder: Path) -> tuple[LabelledPart, LabelledPart | None]:
    """Convert labels of other tools to COCO files.

    Without labels to evaluate on, the validation split of the labels is taken.
    """
    parts = {"train": labels, "val": val}
    if val is None and has_annotations(labels.labels) and read_annotations(labels.labels, labels.images).has_splits:
        parts["val"] = labels
    for split, part in parts.items():
        if part is not None and has_annotations(part.labels):
            target = folder / f"{split}.json"
            parts[split] = LabelledPart(*coco_file(part.labels, part.images, split, target, shared=False, log=log.info))
    return parts["train"] or labels, parts["val"]


def _prepare_coco(
    labels: LabelledPart,
    val: LabelledPart | None,
    unlabelled: Path,
    shares: Sequence[float] | None,
    seeds: Sequence[int],
    folder: Path,
) -> Labels:
    content = annotated = _read_annotations(labels.labels, "LABELS")
    images = labels.images or _find_images(labels.labels, content, unlabelled, "--label-images")
    _check_images(content, images, "LABELS")
    folder = folder / _digest(labels.labels.read_bytes())
    make_folder(folder, "--output")
    remarks: list[tuple[str, str]] = []
    if val is None:
        train_json, val_json = _split_coco(labels.labels, content, folder)
        content, held_out = read_json(train_json), read_json(val_json)
        val_part = LabelledPart(val_json, images)
        remarks.append(held_out_remark(len(held_out["images"]), len(annotated["images"])))
    else:
        train_json, held_out = labels.labels, _read_annotations(val.labels, "--val-labels")
        val_images = val.images or _find_images(val.labels, held_out, unlabelled, "--val-images")
        _check_images(held_out, val_images, "--val-labels")
        _check_overlap(_paths(content, images), _paths(held_out, val_images))
        val_part = LabelledPart(val.labels, val_images)
    remarks += _remark_seen(unlabelled, _paths(held_out, val_part.images or images))
    write = partial(write_coco_subsets, train_json, folder=folder)
    held = "" if val else _describe_held_out(len(held_out["images"]), len(annotated["images"]))
    subsets, dropped = _write_subsets(write, labels.labels, shares, seeds, held)
    remarks += dropped
    train = {key: LabelledPart(path, images) for key, path in subsets.items()}
    counts = {share: len(read_json(part.labels)["images"]) for (seed, share), part in train.items() if seed == seeds[0]}
    annotations = [*content["annotations"], *held_out["annotations"]]
    has_masks = all(annotation.get("segmentation") for annotation in annotations)
    if not has_masks:
        remarks.append(("Masks", "Some annotations have no mask, so the detector learns and measures boxes only."))
    sizes = (len(content["images"]), len(held_out["images"]))
    return Labels("detect", train, val_part, counts, *sizes, has_masks, tuple(remarks))


def _write_subsets(
    write: Callable[..., Mapping[float, Path]],
    labels: Path,
    shares: Sequence[float] | None,
    seeds: Sequence[int],
    held_out: str,
) -> tuple[dict[tuple[int, float], Path], list[tuple[str, str]]]:
    """Write the subsets, and remark on usual shares that are too small.

    Args:
        write: writes subsets, given `shares` and `seed`.
        labels: as given by the user.
        held_out: the numbers of `_describe_held_out`, "" if no labelled image is held out.

    Raises UserError if a share of the user, or every share, is too small.
    """
    chosen, dropped = tuple(shares or DEFAULT_SHARES), list[tuple[str, str]]()
    while True:
        try:
            written = {(seed, share): path for seed in seeds for share, path in write(shares=chosen, seed=seed).items()}
        except SmallShare as error:
            fitting = tuple(share for share in chosen if share >= error.advised)
            if shares or not fitting:
                held, advice = (f"{held_out}, and ", f", or {NAME_OTHERS}") if held_out else ("", "")
                raise UserError(
                    f"LABELS: {labels}: {held}{error.why}. Give --shares of {error.advised:g} % or more{advice}."
                ) from None
            chosen, left_out = fitting, " and ".join(f"{share:g} %" for share in chosen if share not in fitting)
            dropped.append(("Shares left out", f"{left_out} of the labels are left out: {error.why}."))
        else:
            return written, dropped


def _read_annotations(path: Path, key: str) -> dict[str, Any]:
    content = read_json(path)
    for name in ("images", "annotations", "categories"):
        if not isinstance(content, dict) or not isinstance(content.get(name), list) or not content[name]:
            raise UserError(f"{key}: {path}: has no {name}. Name annotations in COCO format.")
    named = all(isinstance(image, dict) and isinstance(image.get("file_name"), str) for image in content["images"])
    if not named or not all(isinstance(annotation, dict) for annotation in content["annotations"]):
        raise UserError(f"{key}: {path}: an image has no file_name. Check it: python tools/check_coco.py {path} IMAGES")
    return content


def _find_images(path: Path, content: Mapping[str, Any], unlabelled: Path, flag: str) -> Path:
    """Find the folder in which the first image of a json is."""
    first = content["images"][0]["file_name"]
    here = path.absolute().parent
    places = [here, here / "images", here / path.stem, here.parent / path.stem, here.parent / "images", here.parent]
    found = next((place for place in [*places, unlabelled] if (place / first).is_file()), None)
    if found is None:
        raise UserError(
            f"{path}: its image {first} is in none of {shorten(sorted({str(p) for p in places}))}. Add {flag}."
        )
    return found


def _check_images(content: Mapping[str, Any], images: Path, key: str) -> None:
    missing = [image["file_name"] for image in content["images"] if not (images / image["file_name"]).is_file()]
    if missing:
        total = len(content["images"])
        raise UserError(
            f"{key}: {len(missing)} of {total} images are not in {images}, such as {missing[0]}. Name their folder "
            "with --label-images or --val-images, or remove them from the json."
        )


def _paths(content: Mapping[str, Any], images: Path) -> list[str]:
    return [os.path.realpath(images / image["file_name"]) for image in content["images"]]


def _check_overlap(train: Sequence[str], val: Sequence[str]) -> None:
    both = set(train) & set(val)
    if both:
        raise UserError(
            f"--val-labels: {len(both)} of {len(set(val))} validation images are labelled training images, too, such "
            f"as {min(both)}. Name other validation images, or leave --val-labels out."
        )


def _describe_held_out(count: int, total: int) -> str:
    return f"{count} of {total} labelled images are held out for validation"


def held_out_remark(count: int, total: int) -> tuple[str, str]:
    """Remark that validation images were taken from the labelled images."""
    return (
        "Validation images of your choice",
        f"No validation labels were given, so {count} of the {total} labelled images are held out. If several images "
        "show the same object or place, the scores are too good: name other images with --val-labels.",
    )


def _remark_seen(unlabelled: Path, val: Sequence[str]) -> list[tuple[str, str]]:
    """Remark that pretraining sees validation images, if it does."""
    source = open_source(unlabelled, "IMAGES")
    seen = {os.path.realpath(source.name(index)) for index in range(len(source))}
    both = len(seen & set(val))
    if not both:
        return []
    text = (
        f"Pretraining sees {both} of the {len(val)} validation images, without labels. On new images it may gain less."
    )
    return [("Validation images in IMAGES", text)]


def _split_coco(path: Path, content: dict[str, Any], folder: Path) -> tuple[Path, Path]:
    """Write the labels of training and of held-out images."""
    total = len(content["images"])
    part = _draw_training(partial(write_coco_subsets, path, folder=folder), path, total)
    train = read_json(part)
    part.unlink()
    kept = {image["id"] for image in train["images"]}
    val = content | {
        "images": [image for image in content["images"] if image["id"] not in kept],
        "annotations": [one for one in content["annotations"] if one.get("image_id") not in kept],
    }
    for name, values in (("train", train), ("val", val)):
        write_json(folder / f"{name}.json", values)
    if not val["annotations"]:
        raise UserError("LABELS: the held-out images have no annotations. Name validation labels with --val-labels.")
    return folder / "train.json", folder / "val.json"


def _draw_training(write: Callable[..., Mapping[float, Path]], labels: Path, total: int) -> Path:
    """Write the labelled images that are not held out.

    Args:
        write: writes subsets, given `shares` and `seed`.
        total: number of labelled images.

    Raises UserError if too few are left.
    """
    held_out = max(round(HELD_OUT_SHARE * total), min(FEWEST_HELD_OUT, total // 2))
    left = total - held_out
    if left < FEWEST_LEFT:
        raise UserError(
            f"LABELS: {labels}: {total} labelled images are too few to hold some out. Label at least {FEWEST_LEFT + 1} "
            f"images, or {NAME_OTHERS}."
        )
    try:
        return next(iter(write(shares=[100 * left / total], seed=SPLIT_SEED).values()))
    except SmallShare as error:
        raise UserError(
            f"LABELS: {labels}: {_describe_held_out(held_out, total)}, and the other {left} are too few for an image "
            f"of each of the {error.categories} categories. Label more images, or {NAME_OTHERS}."
        ) from None


def _prepare_classes(
    labels: Path, val: Path | None, unlabelled: Path, shares: Sequence[float] | None, seeds: Sequence[int], folder: Path
) -> Labels:
    source = _open_classes(labels, "LABELS")
    names = [source.name(index) for index in range(len(source))]
    folder = folder / _digest(json.dumps([names, source.labels().tolist()]).encode())
    make_folder(folder, "--output")
    remarks, held = list[tuple[str, str]](), ""
    if val is None:
        train, val = _split_classes(labels, source, folder)
        held_out = _open_classes(val, "LABELS")
        held = _describe_held_out(len(held_out), len(source))
        remarks.append(held_out_remark(len(held_out), len(source)))
    else:
        train, held_out = labels, _open_classes(val, "--val-labels")
        _check_overlap(*([os.path.realpath(one.name(i)) for i in range(len(one))] for one in (source, held_out)))
        if unknown := sorted(set(held_out.classes) - set(source.classes)):
            raise UserError(f"--val-labels: LABELS has no class {shorten(unknown)}. Name labels of the same classes.")
    remarks += _remark_seen(unlabelled, [os.path.realpath(held_out.name(i)) for i in range(len(held_out))])
    paths, dropped = _write_subsets(partial(list_class_subsets, train, out=folder), labels, shares, seeds, held)
    remarks += dropped
    subsets = {key: LabelledPart(path) for key, path in paths.items()}
    counts = {share: len(open_source(path, "LABELS")) for (seed, share), path in paths.items() if seed == seeds[0]}
    all_images = len(open_source(train, "LABELS"))
    return Labels(
        "classify", subsets, LabelledPart(val.absolute()), counts, all_images, len(held_out), False, tuple(remarks)
    )


def _open_classes(path: Path, key: str) -> Source:
    source = open_source(path, key)
    if len(source.classes) < 2:
        raise UserError(
            f"{key}: {path}: has fewer than two classes. Name a folder per class, a list with labels, or a COCO json."
        )
    return source


def _split_classes(labels: Path, source: Source, folder: Path) -> tuple[Path, Path]:
    """Write lists of training and of held-out images."""
    total = len(source)
    part = _draw_training(partial(list_class_subsets, labels, out=folder), labels, total)
    with open(part, encoding="utf-8", newline="") as file:
        head, *kept = list(csv.reader(file))
    part.unlink()
    names = {row[0] for row in kept}
    classes, targets = source.classes, source.labels()
    rows = [(str(Path(source.name(i)).absolute()), classes[targets[i]]) for i in range(total) if targets[i] >= 0]
    held_out = [row for row in rows if row[0] not in names]
    for name, lines in (("train", kept), ("val", held_out)):
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([head, *lines])
        write_text(folder / f"{name}.csv", text.getvalue())
    return folder / "train.csv", folder / "val.csv"


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:12]


def count_images(images: Path) -> int:
    """Count the unlabelled images. Raises UserError if there are none."""
    return len(open_source(images, "IMAGES"))


def check_unchanged(output: Path, results: Path, contents: Mapping[str, Path | int]) -> None:
    """Check that inputs are those of the results, and record them.

    Commands name inputs by their paths, so a changed input does not change a command.

    Args:
        output: folder of the record.
        results: rows of finished runs. Without this file, nothing is checked.
        contents: a file, or the number of images, by the words for the input.

    Raises UserError if an input has changed.
    """
    record = output / "inputs.json"
    known = read_json(record) if record.is_file() and results.exists() else {}
    found = {words: sha256(one) if isinstance(one, Path) else one for words, one in contents.items()}
    if changed := [words for words, one in found.items() if known.get(words, one) != one]:
        raise UserError(f"{changed[0]}: has changed since the runs in {output}. Name another --output, or restore it.")
    write_json(record, known | found)


def check_weights(path: Path, sizes: Mapping[str, Any], presets: Mapping[str, Mapping[str, Any]]) -> None:
    """Check that weights fit the model.

    Args:
        sizes: arguments of the encoder that is pretrained.
        presets: the same arguments by name of a size, for the advice.

    Raises UserError if they do not fit. The message names the size that fits.
    """
    from crossmae.checkpoints.weights import encoder_arguments, encoder_tensors, read_weights  # slow import

    with named_by("--weights", path):
        weights = read_weights(path)
    theirs = encoder_arguments(encoder_tensors(weights), weights.metadata)
    keys = ("embed_dim", "depth", "num_heads")
    differing = [f"{key} {theirs.get(key)}, not {sizes[key]}" for key in keys if theirs.get(key) != sizes[key]]
    if differing:
        fitting = [name for name, known in presets.items() if all(theirs.get(key) == known[key] for key in keys)]
        advice = f"Use --size {fitting[0]}" if fitting else "Name other weights, or set the sizes with --pretrain-set"
        raise UserError(f"--weights: {path} has {', '.join(differing)}. {advice}.")
