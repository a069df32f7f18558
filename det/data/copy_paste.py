"""Simple copy-paste augmentation (Ghiasi et al., arXiv 2012.07177)."""

from __future__ import annotations

from typing import Any

import torch
from detectron2.structures import BitMasks, Instances
from torch import Tensor
from torch.nn import functional as F

from det.data.masks import any_along, tight_boxes


def paste_objects(
    sample: dict[str, Any], other: dict[str, Any], chosen: Tensor, fill: tuple[int, ...]
) -> dict[str, Any]:
    """Paste objects of one image onto another, without blending.

    Both images are aligned at their top left corners. The paper (arXiv 2012.07177, section 3) first pads both images to
    one square. Here, `sample` grows only as far as pasted objects extend over its right or lower edge. New pixels have
    the value `fill`. `chosen` (N,) selects the instances of `other`, whose `gt_masks` are bitmasks.

    Returns a copy of `sample` with a new `image` (C, H, W) and new `instances`: first its objects without the pixels
    that are now covered, unless nothing is left, then the pasted objects. Boxes are computed from the masks.
    """
    objects = other["instances"][chosen]
    if not len(objects):
        return sample
    covered = torch.from_numpy(any_along(objects.gt_masks.tensor, 0))
    reach = tight_boxes(BitMasks(covered[None])).tensor[0, 2:].int().tolist()  # x, y
    size = tuple(max(pair) for pair in zip(sample["image"].shape[1:], reversed(reach), strict=True))
    covered, pasted = _fit(covered, size), _fit(objects.gt_masks.tensor, size)
    below = sample["instances"]
    instances = Instances(size)
    instances.gt_masks = BitMasks(torch.cat([_fit(below.gt_masks.tensor, size) & ~covered, pasted]))
    instances.gt_boxes = tight_boxes(instances.gt_masks)
    instances.gt_classes = torch.cat([below.gt_classes, objects.gt_classes])
    layers = zip(_fit(other["image"], size), sample["image"], fill, strict=True)
    image = torch.stack([torch.where(covered, over, _fit(under, size, value)) for over, under, value in layers])
    return {**sample, "image": image, "instances": instances[instances.gt_boxes.nonempty()]}


def _fit(layer: Tensor, size: tuple[int, ...], fill: int = 0) -> Tensor:
    """Crop or pad a layer (..., h, w) at right and bottom."""
    height, width = size
    return F.pad(layer, (0, width - layer.shape[-1], 0, height - layer.shape[-2]), value=fill)
