"""Simple copy-paste (Ghiasi et al., arXiv 2012.07177): objects of one training image are pasted onto another."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.structures import BitMasks, Instances
from torch import Tensor
from torch.nn import functional as F

from crossmae.data.broken import Unreadable
from crossmae.errors import UserError
from det.data.masks import any_along, tight_boxes

Sample = dict[str, Any]


@dataclass(frozen=True)
class CopyPaste:
    """Pastes a random subset of the objects of another sample, all subsets being equally likely.

    Attributes:
        prob: how often anything is pasted; the paper always does, so 1.
        fill: value of each channel where the image has to grow, see `paste_objects`.
    """

    prob: float
    fill: tuple[int, ...]

    def __call__(self, sample: Sample, draw_other: Callable[[], Sample | Unreadable]) -> Sample | Unreadable:
        """`sample` with or without pasted objects; draws from numpy's global generator.

        Args:
            sample: as `det.data.loader.NamingMapper` makes it, with bitmasks.
            draw_other: another sample, augmented independently; what is `Unreadable` is handed on.
        """
        if np.random.uniform() >= self.prob:
            return sample
        other = draw_other()
        if isinstance(other, Unreadable):
            return other
        chosen = np.random.uniform(size=len(other["instances"])) < 0.5
        return paste_objects(sample, other, torch.from_numpy(chosen), self.fill)


def build_copy_paste(cfg: CfgNode) -> CopyPaste | None:
    """What `INPUT.COPY_PASTE` asks for; None where it is off."""
    if not cfg.INPUT.COPY_PASTE.ENABLED:
        return None
    # Images grow by what the model pads with: zero, once the mean is subtracted.
    return CopyPaste(cfg.INPUT.COPY_PASTE.PROB, tuple(round(mean) for mean in cfg.MODEL.PIXEL_MEAN))


def check_copy_paste(cfg: CfgNode) -> None:
    """Check what `INPUT.COPY_PASTE.ENABLED` needs.

    Raises:
        UserError: large-scale jitter or masks are off; keypoints or given proposals are on, which it does not change.
    """
    if not cfg.INPUT.COPY_PASTE.ENABLED:
        return
    for key, value, needed in (
        ("INPUT.LSJ.ENABLED", cfg.INPUT.LSJ.ENABLED, True),
        ("MODEL.MASK_ON", cfg.MODEL.MASK_ON, True),
        ("MODEL.KEYPOINT_ON", cfg.MODEL.KEYPOINT_ON, False),
        ("MODEL.LOAD_PROPOSALS", cfg.MODEL.LOAD_PROPOSALS, False),
    ):
        if value != needed:
            raise UserError(f"INPUT.COPY_PASTE.ENABLED needs {key} {needed}, got {value}")


def paste_objects(sample: Sample, other: Sample, chosen: Tensor, fill: tuple[int, ...]) -> Sample:
    """Compose two images, aligned at their top left corners (arXiv 2012.07177, section 3, without blending).

    The paper pads both images to one square first. Here `sample` keeps its size unless a pasted object reaches over its
    right or lower edge; then it grows, filled with `fill`, just as far as that object reaches.

    Args:
        sample: pasted onto; `image` (C, H, W) and `instances` with `gt_masks` as bitmasks. Not changed.
        other: where objects come from, of any size.
        chosen: (N,) bool, which of the instances of `other` are pasted.
        fill: C values.

    Returns:
        `sample` with the new `image` and `instances`: first those of `sample`, whose masks lose the pixels that are
        covered now, without those that lose all; then the pasted ones. Boxes are those of the masks.
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
    """(..., h, w) cut or filled at its right and lower edge to (..., H, W)."""
    height, width = size
    return F.pad(layer, (0, width - layer.shape[-1], 0, height - layer.shape[-2]), value=fill)
