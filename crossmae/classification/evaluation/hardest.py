"""Pictures of the wrongly classified images with the highest loss, written while the data set is at hand.

FOLDER/hardest/01.jpg ...        the hardest first; .png where small images are enlarged, so that pixels stay sharp
FOLDER/hardest/hardest.json      their true and predicted classes; written last, as the sign that all is complete
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from crossmae.classification.evaluation.metrics import LABEL_THRESHOLD, Predictions
from crossmae.data.pixels import to_tensor, to_unit_range
from crossmae.errors import UserError
from crossmae.files import make_folder, write_atomically, write_json
from crossmae.pretraining.figures import DARK, to_display, whole_scale

HARDEST, RECORD = "hardest", "hardest.json"
PICTURE_SIDE = 224  # pixels of the longer side of a picture, about


def write_hardest(
    folder: Path,
    predictions: Predictions,
    read: Callable[[int], Image.Image | Tensor],
    class_names: Sequence[str],
    sample_names: Callable[[int], str],
    most: int = 24,
) -> None:
    """Write pictures of the hardest images, in place of earlier pictures.

    Args:
        folder, predictions, class_names, sample_names: see `write_evaluation`.
        read: an image by its index, as `crossmae.data.pixels.read_pixels` returns it.
        most: pictures.
    """
    target = folder / HARDEST
    make_folder(target, "hardest images")
    for old in [target / RECORD, *target.glob("[0-9]*.jpg"), *target.glob("[0-9]*.png")]:
        old.unlink(missing_ok=True)
    wrong = (~predictions.correct).nonzero()[:, 0]
    order = predictions.losses[wrong].argsort(descending=True, stable=True)[:most]
    entries = []
    for number, row in enumerate(wrong[order].tolist(), start=1):
        index = int(predictions.indices[row])
        entry = {"name": sample_names(index), "index": index, **_verdict(predictions, row, class_names)}
        try:
            entry["picture"] = _write_picture(target, f"{number:02d}", read(index))
        except UserError as error:
            entry |= {"picture": None, "fault": str(error)}
        entries.append(entry)
    write_json(target / RECORD, {"wrong": len(wrong), "images": entries})


def _verdict(predictions: Predictions, row: int, class_names: Sequence[str]) -> dict[str, Any]:
    loss = float(predictions.losses[row])
    if predictions.scores is None:
        best = int(predictions.top_classes[row, 0])
        # Cross entropy is the negative logarithm of the true class's probability.
        true = [[class_names[int(predictions.labels[row])], math.exp(-loss)]]
        return {"loss": loss, "true": true, "predicted": [[class_names[best], float(predictions.top_scores[row, 0])]]}
    scores = predictions.scores[row]
    order = scores.argsort(descending=True, stable=True).tolist()
    named = [[class_names[at], float(scores[at])] for at in order]
    true = [one for at, one in zip(order, named, strict=True) if predictions.labels[row, at]]
    return {"loss": loss, "true": true, "predicted": [one for one in named if one[1] >= LABEL_THRESHOLD]}


def _write_picture(folder: Path, stem: str, pixels: Image.Image | Tensor) -> str:
    picture, enlarged = display_picture(pixels)
    name = f"{stem}.png" if enlarged else f"{stem}.jpg"
    options: dict[str, Any] = {"optimize": True} if enlarged else {"quality": 88, "subsampling": 0}
    kind = "PNG" if enlarged else "JPEG"
    write_atomically(folder / name, lambda temporary: picture.save(temporary, kind, **options))
    return name


def display_picture(pixels: Image.Image | Tensor) -> tuple[Image.Image, bool]:
    """Convert any image to RGB near PICTURE_SIDE pixels.

    Images of 16 bits that use little of their range, as 12-bit data do, are brightened.

    Returns:
        The picture, and True where it is enlarged, always by a whole number.
    """
    tensor = to_tensor(pixels)
    values = to_display(to_unit_range(tensor)[None])[0]  # (3, H, W)
    brightest = float(values.max())
    if tensor.is_floating_point() and 0 < brightest < DARK:
        values = values / brightest
    picture = Image.fromarray(torch.round(values * 255).byte().permute(1, 2, 0).contiguous().numpy())
    scale = whole_scale(picture.height, picture.width, PICTURE_SIDE)
    size = (max(round(picture.width * scale), 1), max(round(picture.height * scale), 1))
    how = Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.LANCZOS
    return picture.resize(size, how), scale > 1
