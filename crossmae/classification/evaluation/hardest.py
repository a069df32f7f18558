"""Pictures of the images that a classifier is most wrong about, written while the data set is at hand.

FOLDER/hardest/01.jpg ...        the hardest first; .png where small images are enlarged, so that pixels stay sharp
FOLDER/hardest/hardest.json      what they are and were taken for; written last, so that it says: complete
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from crossmae.classification.evaluation.metrics import THRESHOLD, Predictions
from crossmae.data.pixels import to_tensor, to_unit_range
from crossmae.errors import UserError
from crossmae.files import make_folder, write_atomically, write_json
from crossmae.pretraining.figures import DARK, to_display, whole_scale

HARDEST, RECORD = "hardest", "hardest.json"
SIDE = 224  # pixels that the longer side of a picture has, about


def write_hardest(
    folder: Path,
    predictions: Predictions,
    read: Callable[[int], Image.Image | Tensor],
    class_names: Sequence[str],
    sample_names: Callable[[int], str],
    most: int = 24,
) -> None:
    """Write pictures of the wrongly classified images with the highest loss; those of an earlier call go.

    Args:
        folder: of the evaluation.
        predictions: of the whole data set.
        read: an image by its index, as `crossmae.data.pixels.read_pixels` returns it.
        class_names: C names.
        sample_names: the name of a sample by its index.
        most: pictures.

    Raises:
        UserError: the folder can not be written in.
    """
    target = folder / HARDEST
    make_folder(target, "hardest images")
    for old in [target / RECORD, *target.glob("[0-9]*.jpg"), *target.glob("[0-9]*.png")]:
        old.unlink(missing_ok=True)
    entries = []
    for number, row in enumerate(hardest_rows(predictions, most), start=1):
        index = int(predictions.indices[row])
        entry = {"name": sample_names(index), "index": index, **_verdict(predictions, row, class_names)}
        entries.append(entry | _write_picture(target, f"{number:02d}", index, read))
    write_json(target / RECORD, {"wrong": int((~predictions.correct).sum()), "images": entries})


def hardest_rows(predictions: Predictions, most: int) -> list[int]:
    """Rows of the wrong ones, highest loss first, of equal ones the lower row first; at most `most`."""
    rows = (~predictions.correct).nonzero()[:, 0]
    order = predictions.losses[rows].argsort(descending=True, stable=True)[:most]
    return [int(row) for row in rows[order]]


def _verdict(predictions: Predictions, row: int, class_names: Sequence[str]) -> dict[str, Any]:
    """Loss, and true and predicted classes as [name, probability], best first."""
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
    return {"loss": loss, "true": true, "predicted": [one for one in named if one[1] >= THRESHOLD]}


def _write_picture(
    folder: Path, stem: str, index: int, read: Callable[[int], Image.Image | Tensor]
) -> dict[str, str | None]:
    """The picture's file, or why there is none: a page about 10,000 images does not fail because one is gone."""
    try:
        picture, enlarged = display_picture(read(index))
    except UserError as error:
        return {"picture": None, "fault": str(error)}
    if enlarged:
        path = folder / f"{stem}.png"
        write_atomically(path, lambda temporary: picture.save(temporary, format="PNG", optimize=True))
    else:
        path = folder / f"{stem}.jpg"
        write_atomically(path, lambda temporary: picture.save(temporary, format="JPEG", quality=88, subsampling=0))
    return {"picture": path.name}


def display_picture(pixels: Image.Image | Tensor) -> tuple[Image.Image, bool]:
    """An image of any channels and depth as RGB near SIDE pixels, and whether it is enlarged, by a whole number then.

    Images of 16 bits that use little of their range, as 12-bit data do, are brightened.
    """
    tensor = to_tensor(pixels)
    values = to_display(to_unit_range(tensor)[None])[0]  # (3, H, W)
    brightest = float(values.max())
    if tensor.is_floating_point() and 0 < brightest < DARK:
        values = values / brightest
    picture = Image.fromarray(torch.round(values * 255).byte().permute(1, 2, 0).contiguous().numpy())
    scale = whole_scale(picture.height, picture.width, SIDE)
    size = (max(round(picture.width * scale), 1), max(round(picture.height * scale), 1))
    how = Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.LANCZOS
    return picture.resize(size, how), scale > 1
