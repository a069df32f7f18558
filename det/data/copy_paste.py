"""Simple copy-paste (Ghiasi et al., arXiv 2012.07177): objects of one training image are pasted onto another."""

from __future__ import annotations

from typing import Any

import torch
from detectron2.structures import BitMasks, Instances
from torch import Tensor
from torch.nn import functional as F

from det.data.masks import any_along, tight_boxes

DetectionSample = dict[str, Any]


def paste_objects(
    sample: DetectionSample, other: DetectionSample, chosen: Tensor, fill: tuple[int, ...]
) -> DetectionSample:
    """Compose two images, aligned at their top left corners, without blending.

    The paper (arXiv 2012.07177, section 3) pads both images to one square first. Here `sample` grows only as far as a
    pasted object reaches over its right or lower edge, and the new pixels are `fill`.

    Args:
        sample: pasted onto; `image` (C, H, W) and `instances` with `gt_masks` as bitmasks. Not changed.
        chosen: (N,) bool, the instances of `other` to paste.

    Returns:
        `sample` with a new `image` and new `instances`: first those of `sample`, less the pixels that are covered now
        and the objects that are covered whole, then the pasted ones. Boxes are those of the masks.
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
    """Cut or fill a layer (..., h, w) at right and bottom."""
    height, width = size
    return F.pad(layer, (0, width - layer.shape[-1], 0, height - layer.shape[-2]), value=fill)
