"""Draw true and predicted instances on images: masks, boxes, class names and scores.

Pillow is used instead of detectron2's `Visualizer` for two reasons. A class has the same colour in ground truth and
predictions. Lines and letters stay sharp, because small images are enlarged first.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from detectron2.structures import BitMasks, Instances, PolygonMasks, polygons_to_bitmask
from matplotlib import get_data_path
from matplotlib.ft2font import FT2Font
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from det.data.masks import decode_segmentation

log = logging.getLogger(__name__)

Color = tuple[int, int, int]
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
Corners = tuple[float, float, float, float]  # left, top, right, bottom

# Bright enough for dark photographs, and easy to distinguish. If there are more classes than colours, colours repeat.
_PALETTE = (0xFF5454, 0x40C8FF, 0xFFE140, 0xB280FF, 0x70E050, 0xFF9628, 0xFF70D6, 0x20D6B0, 0x7A96FF, 0xF6E8D0)
_FILL_OPACITY = 0.35
LETTER_SIZE = 0.05  # divided by the longest side; for pictures that are shown small
SMALLEST_LETTERS = 9.0  # pixels
ENLARGED_BELOW = 512  # pixels: images are drawn enlarged, by an integer scale, if both sides are shorter
LABEL_SIZE = 0.03  # like LETTER_SIZE, for pictures that are shown large
MOST_HIDDEN, MOST_HIDDEN_LABEL = 0.2, 0.05  # shares of an object, and of another label, that a label may cover
_DEJAVU = Path(get_data_path(), "fonts/ttf/DejaVuSans.ttf")


@dataclass(frozen=True)
class DrawnInstance:
    """One object to draw.

    The box is x, y, width, height in pixels. The mask is one of three: (H, W), True on the object; a COCO
    `segmentation`, which is decoded only while it is drawn, to save memory; or None. The name "" is not written.
    """

    box: tuple[float, float, float, float]
    class_index: int
    name: str
    mask: Any = None
    score: float | None = None


def class_color(index: int) -> Color:
    """Return the RGB colour of a class."""
    color = _PALETTE[index % len(_PALETTE)]
    return color >> 16, color >> 8 & 255, color & 255


def instances_from_coco(annotations: Sequence[Mapping[str, Any]], categories: Mapping[int, str]) -> list[DrawnInstance]:
    """Convert COCO annotations or results of one image.

    The order of `categories` (names by id) numbers the classes. The name of an only class is left out.
    """
    order, names = dict(zip(categories, range(len(categories)), strict=True)), shown_names([*categories.values()])
    instances = []
    for annotation in annotations:
        category = annotation["category_id"]
        x, y, width, height = map(float, annotation["bbox"])
        mask, score = annotation.get("segmentation") or None, annotation.get("score")
        index = order[category]
        instances.append(DrawnInstance((x, y, width, height), index, names[index], mask, score))
    return instances


def shown_names(names: Sequence[str]) -> Sequence[str]:
    """Leave out the name of an only class, because it distinguishes nothing."""
    return [""] if len(names) == 1 else names


def instances_from_detectron2(objects: Instances, names: Sequence[str]) -> list[DrawnInstance]:
    """Convert the training targets of one image.

    The name of an only class is left out.
    """
    names = shown_names(names)
    masks: Any = objects.gt_masks if objects.has("gt_masks") else None
    if isinstance(masks, PolygonMasks):
        masks = [polygons_to_bitmask(polygons, *objects.image_size) for polygons in masks.polygons]
    elif isinstance(masks, BitMasks):
        masks = masks.tensor.numpy()
    return [
        DrawnInstance((x0, y0, x1 - x0, y1 - y0), number, names[number], None if masks is None else masks[index])
        for index, ((x0, y0, x1, y1), number) in enumerate(
            zip(objects.gt_boxes.tensor.tolist(), objects.gt_classes.tolist(), strict=True)
        )
    ]


def instances_from_predictions(found: Instances, names: Sequence[str]) -> list[DrawnInstance]:
    """Convert the predictions for one image.

    The name of an only class is left out.
    """
    names = shown_names(names)
    masks = found.pred_masks.numpy() if found.has("pred_masks") else [None] * len(found)
    rows = zip(found.pred_boxes.tensor.tolist(), found.pred_classes.tolist(), masks, found.scores.tolist(), strict=True)
    return [
        DrawnInstance((x0, y0, x1 - x0, y1 - y0), number, names[number], mask, score)
        for (x0, y0, x1, y1), number, mask, score in rows
    ]


def draw_large(image: NDArray[np.uint8], instances: Sequence[DrawnInstance]) -> NDArray[np.uint8]:
    """Draw instances on an image, enlarged if it is small."""
    side = max(image.shape[:2])
    side *= -(-ENLARGED_BELOW // side)
    return draw_instances(image, instances, longest_side=side, letters=LABEL_SIZE)


def draw_instances(
    image: NDArray[np.uint8],
    instances: Sequence[DrawnInstance],
    longest_side: int | None = None,
    letters: float = LETTER_SIZE,
) -> NDArray[np.uint8]:
    """Draw instances over a copy of an RGB image (H, W, 3).

    The image is first scaled to a longest side of `longest_side` pixels. The height of letters is `letters` times that
    side. Large objects are drawn first, so that small objects stay visible. A label is above or below its box, next to
    it, or in it, where it covers least of all objects and of labels with higher scores. It is left out if it would
    cover more of one of them than `MOST_HIDDEN` and `MOST_HIDDEN_LABEL`.
    """
    scale = 1.0 if longest_side is None else longest_side / max(image.shape[:2])
    size = (max(round(image.shape[1] * scale), 1), max(round(image.shape[0] * scale), 1))
    canvas = Image.fromarray(image).resize(size, Image.Resampling.BICUBIC)
    unit = max(size) / 480  # unit of lines and letters, in proportion to the picture
    for instance in sorted(instances, key=lambda item: -item.box[2] * item.box[3]):
        color = class_color(instance.class_index)
        if instance.mask is not None:
            _draw_mask(canvas, decode_segmentation(instance.mask, *image.shape[:2]), color, scale, unit)
        x, y, width, height = (value * scale for value in instance.box)
        corners = (x, y, max(x + width, x + 1), max(y + height, y + 1))
        ImageDraw.Draw(canvas).rectangle(corners, outline=color, width=max(1, round(2 * unit)))
    _draw_labels(canvas, instances, scale, max(SMALLEST_LETTERS, letters * max(size)))
    return np.asarray(canvas)


def _draw_mask(canvas: Image.Image, mask: NDArray[np.bool_], color: Color, scale: float, unit: float) -> None:
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not rows.size:
        return
    width = max(1, round(1.5 * unit))  # of the outline, in pixels
    # Draw only in the neighbourhood of the object, because photographs are large.
    reach = 2 * scale + width + 1
    left, top = (max(0, math.floor(first * scale - reach)) for first in (columns[0], rows[0]))
    right = min(canvas.width, math.ceil((columns[-1] + 1) * scale + reach))
    bottom = min(canvas.height, math.ceil((rows[-1] + 1) * scale + reach))
    across, down = mask.shape[1] / canvas.width, mask.shape[0] / canvas.height
    x, y = math.floor(left * across), math.floor(top * down)
    part = mask[y : math.ceil(bottom * down), x : math.ceil(right * across)]
    source = Image.fromarray(part.astype(np.uint8) * 255)
    box = (left * across - x, top * down - y, right * across - x, bottom * down - y)
    soft = source.resize((right - left, bottom - top), Image.Resampling.BICUBIC, box)
    if scale > 1:
        soft = soft.filter(ImageFilter.GaussianBlur(0.5 * scale))  # smooth the steps at enlarged pixels
    inside = np.asarray(soft) >= 128
    inner = cv2.erode(inside.astype(np.uint8), np.ones((2 * width + 1, 2 * width + 1), np.uint8)) > 0
    opacity = np.where(inside & ~inner, 1.0, _FILL_OPACITY) * inside
    canvas.paste(color, (left, top, right, bottom), Image.fromarray((opacity * 255).astype(np.uint8)))


def _draw_labels(canvas: Image.Image, instances: Sequence[DrawnInstance], scale: float, letters: float) -> None:
    draw, pad = ImageDraw.Draw(canvas), round(letters / 6)
    boxes = [tuple(value * scale for value in instance.box) for instance in instances]
    limits = [MOST_HIDDEN] * len(boxes)
    taken = [(x, y, x + max(width, 1), y + max(height, 1)) for x, y, width, height in boxes]  # objects, then labels
    drawn: list[tuple[Corners, str, Font, Color, float, float]] = []
    ranked = sorted(zip(instances, boxes, strict=True), key=lambda pair: pair[0].score or 0.0, reverse=True)
    for instance, box in ranked:
        score = "" if instance.score is None else f"{instance.score:.2f}"
        text = " ".join(filter(None, (instance.name, score)))
        font = label_font(text, letters)
        left, top, right, bottom = draw.textbbox((0, 0), text, font=font, anchor="la")
        tag = (right - left + 2 * pad, bottom - top + 2 * pad)
        spots = [_at(x, y, tag, canvas.size) for x, y in _spots(box, tag)]
        hidden = [_hidden(spot, taken, limits) for spot in spots] if text else []
        if not text or min(hidden)[0] > 1:
            continue
        corners = spots[hidden.index(min(hidden))]
        taken.append(corners)
        limits.append(MOST_HIDDEN_LABEL)
        drawn.append((corners, text, font, class_color(instance.class_index), pad - left, pad - top))
    for corners, text, font, color, right, down in reversed(drawn):  # the highest score is on top
        draw.rectangle(corners, fill=color)
        luma = 0.299 * color[0] + 0.587 * color[1] + 0.114 * color[2]  # ITU-R BT.601
        fill = (0, 0, 0) if luma > 140 else (255, 255, 255)
        draw.text((corners[0] + right, corners[1] + down), text, font=font, fill=fill, anchor="la")


@cache
def _font(is_ascii: bool, size: float) -> Font:
    return ImageFont.load_default(size) if is_ascii else ImageFont.truetype(str(_DEJAVU), size)


@cache
def _dejavu_letters() -> frozenset[int]:
    return frozenset(FT2Font(str(_DEJAVU)).get_charmap())


@cache
def _warn_of_boxes() -> None:
    log.warning("letters that DejaVu Sans lacks, as those of Chinese, Japanese and Korean, are drawn as boxes")


def label_font(text: str, size: float) -> Font:
    """Choose Pillow's font for ASCII, else DejaVu Sans of matplotlib.

    DejaVu Sans has Latin, Greek, Cyrillic and other letters. Chinese, Japanese and Korean letters and most emoji become
    boxes; this is logged once. `size` is the size of the letters in pixels.
    """
    if not text.isascii() and any(letter.isprintable() and ord(letter) not in _dejavu_letters() for letter in text):
        _warn_of_boxes()
    return _font(text.isascii(), size)


def _spots(box: tuple[float, ...], tag: tuple[float, float]) -> list[tuple[float, float]]:
    """List possible upper left corners for a tag, best first.

    The tag is above its box, below, next to it, or in it.
    """
    (x, y, width, height), (tag_width, tag_height) = box, tag
    columns, rows = (x, x + width - tag_width), (y, y + height - tag_height)
    outside = [(column, row) for row in (y - tag_height, y + height) for column in columns]
    beside = [(column, row) for column in (x + width, x - tag_width) for row in rows]
    return outside + beside + [(column, row) for row in rows for column in columns]


def _at(x: float, y: float, tag: tuple[float, float], size: tuple[int, int]) -> Corners:
    """Move a tag into the picture. Return its corners."""
    x, y = (max(0.0, min(value, side - length)) for value, side, length in zip((x, y), size, tag, strict=True))
    return x, y, x + tag[0], y + tag[1]


def _hidden(corners: Corners, others: Sequence[Corners], limits: Sequence[float]) -> tuple[float, float]:
    """Compute which shares of other areas a tag would cover.

    Returns the largest and the sum of the shares, each divided by its limit.
    """
    areas, own = np.asarray(others), np.asarray(corners)
    sides = np.minimum(areas[:, 2:], own[2:]) - np.maximum(areas[:, :2], own[:2])
    shares = sides.clip(0).prod(1) / (areas[:, 2:] - areas[:, :2]).prod(1) / limits
    return float(shares.max()), float(shares.sum())


def draw_sheet(
    pictures: Sequence[NDArray[np.uint8]], captions: Sequence[str], letters: int = 14, columns: int | None = None
) -> NDArray[np.uint8]:
    """Arrange pictures in a grid, with captions below them.

    Pictures are (H, W, 3) uint8 RGB of any size. Captions may have several lines, and are cut off at the column width.

    Args:
        letters: size of the letters in pixels.
        columns: pictures side by side. None: as many as make the grid nearly square.
    """
    gap, line = 16, round(letters * 10 / 7)
    columns = columns or math.ceil(math.sqrt(len(pictures)))
    width = max(picture.shape[1] for picture in pictures)
    text = line * max(caption.count("\n") + 1 for caption in captions)
    rows = [range(start, min(start + columns, len(pictures))) for start in range(0, len(pictures), columns)]
    heights = [max(pictures[index].shape[0] for index in row) + text + gap for row in rows]
    sheet = Image.new("RGB", (gap + columns * (width + gap), gap + sum(heights)), "white")
    for number, row in enumerate(rows):
        for column, index in enumerate(row):
            x, y = gap + column * (width + gap), gap + sum(heights[:number])
            sheet.paste(Image.fromarray(pictures[index]), (x, y))
            label = Image.new("RGB", (width, text), "white")
            font = label_font(captions[index], letters)
            place, fill, spacing = (0, 2), (64, 64, 64), line - letters - 2
            ImageDraw.Draw(label).multiline_text(place, captions[index], font=font, fill=fill, spacing=spacing)
            sheet.paste(label, (x, y + pictures[index].shape[0]))
    return np.asarray(sheet)
