"""Draw COCO-style instances on images, true and predicted ones: masks, boxes, class names and scores.

Drawn with Pillow rather than detectron2's `Visualizer`, for two reasons: a class has the same colour in the
ground truth and in the predictions, so that two pictures can be compared at a glance, and lines and letters
are drawn after a small image is enlarged, so that they are sharp.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from pycocotools import mask as coco_mask

Color = tuple[int, int, int]

# Bright enough for dark photographs, and told apart side by side; more classes than colours begin again.
_PALETTE: tuple[Color, ...] = (
    (255, 84, 84),
    (64, 200, 255),
    (255, 225, 64),
    (178, 128, 255),
    (112, 224, 80),
    (255, 150, 40),
    (255, 112, 214),
    (32, 214, 176),
    (122, 150, 255),
    (246, 232, 208),
)
_FILL_OPACITY = 0.35


@dataclass(frozen=True)
class Instance:
    """One object.

    Attributes:
        box: x, y, width, height, in pixels.
        class_index: chooses the colour.
        name: of the class.
        mask: (H, W), true on the object; drawn if there.
        score: of a prediction; drawn if there.
    """

    box: tuple[float, float, float, float]
    class_index: int
    name: str
    mask: NDArray[np.bool_] | None = None
    score: float | None = None


def class_color(index: int) -> Color:
    """The RGB colour of a class."""
    return _PALETTE[index % len(_PALETTE)]


def decode_segmentation(segmentation: Any, height: int, width: int) -> NDArray[np.bool_]:
    """The mask (height, width) of a COCO `segmentation`: polygons, compressed or uncompressed RLE.

    Raises:
        ValueError: it is none of the three, or is an RLE of another size.
    """
    if isinstance(segmentation, list) and segmentation:
        rle = coco_mask.merge(coco_mask.frPyObjects(segmentation, height, width))
    elif isinstance(segmentation, dict) and {"counts", "size"} <= segmentation.keys():
        if list(segmentation["size"]) != [height, width]:
            raise ValueError(f"segmentation: RLE of size {segmentation['size']} on an image of {[height, width]}")
        uncompressed = isinstance(segmentation["counts"], list)
        rle = coco_mask.frPyObjects(segmentation, height, width) if uncompressed else segmentation
    else:
        raise ValueError(f"segmentation: expected polygons or an RLE, received {type(segmentation).__name__}")
    return coco_mask.decode(rle).astype(bool)


def instances_from_coco(
    annotations: Sequence[Mapping[str, Any]], categories: Mapping[int, str], height: int, width: int
) -> list[Instance]:
    """COCO annotations, or entries of a COCO results file, of one image as instances.

    Args:
        annotations: each with `category_id` and `bbox` (x, y, width, height); `segmentation`, `score` if any.
        categories: names by category id; their order numbers the classes.

    Raises:
        ValueError: an annotation lacks a key or has a category that is not in `categories`.
    """
    order = {category: index for index, category in enumerate(categories)}
    instances = []
    for annotation in annotations:
        absent = {"category_id", "bbox"} - annotation.keys()
        if absent:
            raise ValueError(f"annotation: no {sorted(absent)}, only {sorted(annotation)}")
        category = annotation["category_id"]
        if category not in order:
            raise ValueError(f"annotation: category_id {category!r} is none of {sorted(order)}")
        encoded = annotation.get("segmentation")
        mask = decode_segmentation(encoded, height, width) if encoded else None
        x, y, box_width, box_height = (float(value) for value in annotation["bbox"])
        box = (x, y, box_width, box_height)
        instances.append(Instance(box, order[category], categories[category], mask, annotation.get("score")))
    return instances


def draw_instances(
    image: NDArray[np.uint8], instances: Sequence[Instance], *, longest_side: int | None = None
) -> NDArray[np.uint8]:
    """The image with its instances drawn over it.

    Large objects are drawn first, so that small ones stay visible; of labels the surest come on top.

    Args:
        image: (H, W, 3) uint8 RGB; it is not changed.
        longest_side: enlarge or shrink to this many pixels before drawing.

    Returns:
        (H', W', 3) uint8 RGB.

    Raises:
        ValueError: the image is not (H, W, 3) uint8, or a mask has another size.
    """
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise ValueError(f"image: expected (H, W, 3) uint8, received {image.shape} {image.dtype}")
    scale = 1.0 if longest_side is None else longest_side / max(image.shape[:2])
    size = (round(image.shape[1] * scale), round(image.shape[0] * scale))
    canvas = Image.fromarray(image).resize(size, Image.Resampling.BICUBIC)
    unit = max(size) / 480  # lines and letters grow with the picture
    for instance in sorted(instances, key=lambda item: -item.box[2] * item.box[3]):
        if instance.mask is not None:
            if instance.mask.shape != image.shape[:2]:
                raise ValueError(f"mask of {instance.mask.shape} on an image of {image.shape[:2]}")
            _draw_mask(canvas, instance.mask, class_color(instance.class_index), scale, unit)
        _draw_box(canvas, instance, scale, unit)
    for instance in sorted(instances, key=lambda item: item.score or 0.0):
        _draw_label(canvas, instance, scale, unit)
    return np.asarray(canvas)


def _draw_mask(canvas: Image.Image, mask: NDArray[np.bool_], color: Color, scale: float, unit: float) -> None:
    """Tint the mask's area and draw its outline."""
    soft = Image.fromarray(mask.astype(np.uint8) * 255).resize(canvas.size, Image.Resampling.BICUBIC)
    if scale > 1:
        soft = soft.filter(ImageFilter.GaussianBlur(0.5 * scale))  # no steps where one pixel became many
    inside = soft.point(lambda value: 255 if value >= 128 else 0)
    inner = inside.filter(ImageFilter.MinFilter(2 * max(1, round(1.5 * unit)) + 1))
    edge = np.asarray(inside) > np.asarray(inner)
    opacity = np.where(edge, 1.0, _FILL_OPACITY) * (np.asarray(inside) > 0)
    canvas.paste(Image.new("RGB", canvas.size, color), mask=Image.fromarray((opacity * 255).astype(np.uint8)))


def _draw_box(canvas: Image.Image, instance: Instance, scale: float, unit: float) -> None:
    x, y, width, height = (value * scale for value in instance.box)
    right, bottom = max(x + width, x + 1), max(y + height, y + 1)
    outline = class_color(instance.class_index)
    ImageDraw.Draw(canvas).rectangle((x, y, right, bottom), outline=outline, width=max(1, round(2 * unit)))


def _draw_label(canvas: Image.Image, instance: Instance, scale: float, unit: float) -> None:
    """The class name and the score, if any, on a tag above the box, but always inside the picture."""
    text = instance.name if instance.score is None else f"{instance.name} {instance.score:.2f}"
    font = ImageFont.load_default(size=max(9.0, 24 * unit))
    draw = ImageDraw.Draw(canvas)
    pad = round(4 * unit)
    left, top, right, bottom = draw.textbbox((0, 0), text, font=font, anchor="la")
    width, height = right - left + 2 * pad, bottom - top + 2 * pad
    x = min(max(0.0, instance.box[0] * scale), canvas.width - width)
    y = max(0.0, instance.box[1] * scale - height)
    color = class_color(instance.class_index)
    draw.rectangle((x, y, x + width, y + height), fill=color)
    draw.text((x + pad - left, y + pad - top), text, font=font, fill=_readable_on(color), anchor="la")


def _readable_on(color: Color) -> Color:
    """Black or white, whichever is easier to read on the colour (luma of ITU-R BT.601)."""
    red, green, blue = color
    return (0, 0, 0) if 0.299 * red + 0.587 * green + 0.114 * blue > 140 else (255, 255, 255)
