"""Detectors as modules that exporters can trace: one image of fixed size in, tensors out.

This module repeats detectron2's inference, but with plain tensors in place of `Instances` and `Boxes`. It uses the
detector's own modules and weights. Shapes: H, W of the input, R proposals, K classes, N detections, M side of a mask.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from detectron2.layers import ROIAlign
from detectron2.modeling import GeneralizedRCNN
from detectron2.modeling.poolers import ROIPooler
from detectron2.modeling.proposal_generator import RPN
from detectron2.modeling.roi_heads import CascadeROIHeads, StandardROIHeads
from detectron2.modeling.roi_heads.fast_rcnn import FastRCNNOutputLayers
from detectron2.modeling.roi_heads.mask_head import BaseMaskRCNNHead
from torch import Tensor, nn
from torchvision.ops import nms

from det.backbone.detector import Detector
from det.backbone.pooling import RegionAlign


def obstacle(model: nn.Module) -> str | None:
    """Name a part that cannot be exported, or return None."""
    heads = getattr(model, "roi_heads", None)
    poolers = [module for module in model.modules() if isinstance(module, ROIPooler)]
    parts: list[tuple[str, Any, tuple[type, ...]]] = [
        ("MODEL.META_ARCHITECTURE", model, (GeneralizedRCNN, Detector)),
        ("MODEL.PROPOSAL_GENERATOR.NAME", getattr(model, "proposal_generator", None), (RPN,)),
        ("MODEL.ROI_HEADS.NAME", heads, (StandardROIHeads, CascadeROIHeads)),
        *[("a box predictor", layer, (FastRCNNOutputLayers,)) for layer in _predictors(heads)],
        *[("a POOLER_TYPE", layer, (ROIAlign, RegionAlign)) for pooler in poolers for layer in pooler.level_poolers],
    ]
    for name, part, known in parts:
        if type(part) not in known:
            names = [cls.__name__ for cls in known if cls not in (Detector, RegionAlign)]  # ours are no values of keys
            return f"{name} is {type(part).__name__}, known: {', '.join(names)}"
    if getattr(heads, "keypoint_on", False):
        return "MODEL.KEYPOINT_ON is True"
    mask_head = getattr(heads, "mask_head", None)
    if mask_head is not None and type(mask_head).forward is not BaseMaskRCNNHead.forward:
        return f"MODEL.ROI_MASK_HEAD.NAME is {type(mask_head).__name__}"
    return None


def _predictors(heads: Any) -> list[Any]:
    """List the box predictors: one, or one per stage of a cascade."""
    predictor = getattr(heads, "box_predictor", None)
    return list(predictor) if isinstance(predictor, nn.ModuleList) else [predictor]


class ExportableBackbone(nn.Module):
    """Backbone and feature pyramid for one image of fixed `size` (H, W)."""

    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(self, model: GeneralizedRCNN, size: tuple[int, int]) -> None:
        super().__init__()
        self.backbone, self.size, self.input_format = model.backbone, size, model.input_format
        self.register_buffer("pixel_mean", model.pixel_mean)
        self.register_buffer("pixel_std", model.pixel_std)

    def forward(self, image: Tensor, image_size: Tensor) -> dict[str, Tensor]:
        """Map pixels (1, 3, H, W) to feature maps.

        `image_size` (2,) is the height and width of the picture at the top left of the image.
        """
        if self.input_format == "BGR":
            image = image.flip(1)
        rows = torch.arange(self.size[0])[:, None] < image_size[0]
        columns = torch.arange(self.size[1]) < image_size[1]
        pixels = (image - self.pixel_mean) / self.pixel_std
        features: dict[str, Tensor] = self.backbone(torch.where(rows & columns, pixels, 0.0))
        return features


class ExportableDetector(ExportableBackbone):
    """Complete detector without an `obstacle`, for one image of fixed `size` (H, W)."""

    def __init__(self, model: GeneralizedRCNN, size: tuple[int, int]) -> None:
        super().__init__(model, size)
        self.rpn: Any = model.proposal_generator
        self.heads: Any = model.roi_heads

    def forward(self, image: Tensor, image_size: Tensor) -> dict[str, Tensor]:
        """Map pixels (1, 3, H, W) to detections.

        `image_size` (2,) is the height and width of the picture at the top left of the image.
        """
        features = super().forward(image, image_size)
        height, width = image_size.float().unbind()
        limit = torch.stack([width, height, width, height])
        boxes, scores = self._classify(features, self._propose(features, limit), limit)
        boxes, scores, classes = self._select(boxes, scores)
        found = {"boxes": boxes, "scores": scores, "classes": classes}
        return found | {"masks": self._masks(features, boxes, classes)} if self.heads.mask_on else found

    def _propose(self, features: dict[str, Tensor], limit: Tensor) -> Tensor:
        """Choose (R, 4) proposals as `find_top_rpn_proposals` does."""
        levels = [features[name] for name in self.rpn.in_features]
        chosen = [
            self._propose_level(anchors.tensor, logits, deltas, limit)
            for anchors, logits, deltas in zip(
                self.rpn.anchor_generator(levels), *self.rpn.rpn_head(levels), strict=True
            )
        ]
        boxes, scores = (torch.cat(parts) for parts in zip(*chosen, strict=True))
        most = self.rpn.post_nms_topk[False]
        best = scores.argsort(descending=True)[:most]
        torch._check(best.shape[0] <= most)  # needed as in `suppress`
        return boxes[best]

    def _propose_level(self, anchors: Tensor, logits: Tensor, deltas: Tensor, limit: Tensor) -> tuple[Tensor, Tensor]:
        """Choose (r, 4) boxes and (r,) logits of one pyramid level."""
        logits = logits[0].permute(1, 2, 0).flatten()
        deltas = deltas[0].unflatten(0, (-1, 4)).permute(2, 3, 0, 1).flatten(0, 2)
        scores, rows = logits.topk(min(self.rpn.pre_nms_topk[False], len(logits)))
        boxes = clip(self.rpn.box2box_transform.apply_deltas(deltas[rows], anchors[rows]), limit)
        rows = (boxes[:, 2:] - boxes[:, :2] > self.rpn.min_box_size).all(dim=1).nonzero()[:, 0]
        boxes, scores = boxes[rows], scores[rows]
        kept = suppress(boxes, scores, self.rpn.nms_thresh)
        return boxes[kept], scores[kept]

    def _classify(self, features: dict[str, Tensor], boxes: Tensor, limit: Tensor) -> tuple[Tensor, Tensor]:
        """Compute boxes (R, K or 1, 4) and scores (R, K)."""
        levels = [features[name] for name in self.heads.box_in_features]
        predictors = _predictors(self.heads)
        stages = self.heads.box_head if isinstance(self.heads, CascadeROIHeads) else [self.heads.box_head]
        total = None
        for head, predictor in zip(stages, predictors, strict=True):
            logits, deltas = predictor(head(pool(self.heads.box_pooler, levels, boxes)))
            scores = logits.sigmoid() if predictor.use_sigmoid_ce else logits.softmax(dim=-1)
            total = scores if total is None else total + scores
            boxes = predictor.box2box_transform.apply_deltas(deltas, boxes)
            boxes = clip(boxes.unflatten(1, (-1, 4)), limit).flatten(1)
        assert total is not None
        return boxes.unflatten(1, (-1, 4)), (total * (1.0 / len(predictors)))[:, :-1]

    def _select(self, boxes: Tensor, scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Select N boxes, scores and classes as `fast_rcnn_inference` does."""
        last = _predictors(self.heads)[-1]
        rows, classes = (scores > last.test_score_thresh).nonzero().unbind(1)
        own = classes if boxes.shape[1] > 1 else torch.zeros_like(classes)
        boxes, scores = boxes[rows, own], scores[rows, classes]
        # Classes are shifted by the same distance as in torchvision's batched_nms, so that coordinates round equally.
        step = torch.cat([boxes.flatten(), boxes.new_zeros(1)]).max() + 1
        kept = suppress(boxes + (classes.to(boxes) * step)[:, None], scores, last.test_nms_thresh)
        if last.test_topk_per_image >= 0:
            kept = kept[: last.test_topk_per_image]
        return boxes[kept], scores[kept], classes[kept]

    def _masks(self, features: dict[str, Tensor], boxes: Tensor, classes: Tensor) -> Tensor:
        """Compute (N, M, M) probabilities inside the boxes."""
        levels = [features[name] for name in self.heads.mask_in_features]
        logits = self.heads.mask_head.layers(pool(self.heads.mask_pooler, levels, boxes))
        channels = classes if logits.shape[1] > 1 else torch.zeros_like(classes)
        return logits[torch.arange(logits.shape[0]), channels].sigmoid()


def clip(boxes: Tensor, limit: Tensor) -> Tensor:
    """Clip (..., 4) boxes to `limit` (4,): width, height, width, height."""
    return torch.minimum(boxes.clamp(min=0), limit)


def suppress(boxes: Tensor, scores: Tensor, threshold: float) -> Tensor:
    """Return indices of boxes kept by non-maximum suppression, highest score first."""
    # torchvision tells exporters that at least two boxes are kept. Two empty boxes make this true. They overlap no box
    # and come last, and are removed below.
    boxes, scores = F.pad(boxes, (0, 0, 0, 2)), F.pad(scores, (0, 2), value=float("-inf"))
    kept = nms(boxes, scores, threshold)
    # Without this bound, tracing assumes a larger bound, which does not fit ONNX's integers.
    torch._check(kept.shape[0] <= boxes.shape[0])
    return kept[:-2]


def pool(pooler: ROIPooler, levels: list[Tensor], boxes: Tensor) -> Tensor:
    """Pool (R, 4) boxes to (R, C, side, side) like `ROIPooler`."""
    rois = torch.cat([torch.zeros_like(boxes[:, :1]), boxes], dim=1)  # the first column is the image index
    if len(levels) == 1:
        pooled: Tensor = pooler.level_poolers[0](levels[0], rois)
        return pooled
    side = ((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])).sqrt()
    wanted = torch.floor(pooler.canonical_level + torch.log2(side / pooler.canonical_box_size + 1e-8))
    wanted = wanted.clamp(pooler.min_level, pooler.max_level)
    pooled = levels[0].new_zeros(boxes.shape[0], levels[0].shape[1], *pooler.output_size)
    for number, (level, align) in enumerate(zip(levels, pooler.level_poolers, strict=True), pooler.min_level):
        rows = (wanted == number).nonzero()[:, 0]
        pooled = pooled.index_put((rows,), align(level, rois[rows]))
    return pooled
