"""Pooling of boxes whose gradient is computed by matrix products on a CPU.

torchvision computes the gradient of RoIAlign in one thread, number by number. The pooling is linear in the features and
separable: its matrix is the product of a matrix for rows and a matrix for columns. Shapes: B images, C channels, H and
W rows and columns of a map, R boxes, h and w rows and columns of a pooled box.
"""

from __future__ import annotations

from typing import Any

import torch
from detectron2.layers import ROIAlign
from torch import Tensor
from torch.autograd.function import once_differentiable
from torchvision.ops import roi_align

# A product covers the whole map, torchvision's loop only the box. On large maps, the loop is faster.
MOST_CELLS = 64 * 64
CHUNK = 64  # boxes at a time, to bound memory


class RegionAlign(ROIAlign):
    """detectron2's RoIAlign, with a faster gradient on CPUs.

    Features are the same bit by bit. Gradients are equal except for rounding.
    """

    def forward(self, input: Tensor, rois: Tensor) -> Tensor:
        """Pool boxes of feature maps.

        The maps are (B, C, H, W), the boxes (R, 5) with the number of their image first, the result (R, C, h, w).
        """
        if not (
            input.requires_grad
            and torch.is_grad_enabled()
            and input.device.type == "cpu"
            and input.dtype == torch.float32
            and input.shape[-2] * input.shape[-1] <= MOST_CELLS
        ):
            pooled: Tensor = super().forward(input, rois)
            return pooled
        found: Tensor = _Pooled.apply(input, rois.float(), self)
        return found


class _Pooled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, features: Tensor, rois: Tensor, layer: ROIAlign) -> Tensor:
        ctx.save_for_backward(rois)
        ctx.layer, ctx.shape = layer, features.shape
        return roi_align(features, rois, layer.output_size, layer.spatial_scale, layer.sampling_ratio, layer.aligned)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (rois,), layer, (B, C, H, W) = ctx.saved_tensors, ctx.layer, ctx.shape
        found = grad.new_zeros(B, H, W * C)
        if len(rois):
            grad = grad.permute(0, 2, 3, 1)  # (R, h, w, C)
            rows, columns = (axis_weights(rois, axis, (H, W)[axis], layer) for axis in (0, 1))
            for image, of_image in enumerate(found):
                for some in (rois[:, 0] == image).nonzero()[:, 0].split(CHUNK):
                    spread = torch.matmul(columns[some].mT[:, None], grad[some])  # (R, h, W, C)
                    of_image.addmm_(rows[some].flatten(0, 1).t(), spread.view(-1, W * C))
        return found.view(B, H, W, C).permute(0, 3, 1, 2), None, None


def axis_weights(rois: Tensor, axis: int, cells: int, layer: ROIAlign) -> Tensor:
    """Compute the weights of RoIAlign along one axis.

    Source: RoIAlign samples each bin at n points between cells, bilinearly, and averages (arXiv 1703.06870, section 3).
    `axis` is 0 for rows and 1 for columns. The weights of R boxes, h bins and H `cells` are (R, h, H).
    """
    bins = layer.output_size[axis]
    start, end = (rois[:, 2 - axis + corner] * layer.spatial_scale - 0.5 * layer.aligned for corner in (0, 2))
    size = end - start if layer.aligned else (end - start).clamp(min=1)
    step = (size / bins)[:, None, None]
    points = torch.full_like(step, layer.sampling_ratio) if layer.sampling_ratio > 0 else step.ceil()
    point = torch.arange(max(int(points.max()), 1), dtype=rois.dtype)
    edges = start[:, None, None] + torch.arange(bins, dtype=rois.dtype)[:, None] * step
    at = edges + (point + 0.5) * step / points.clamp(min=1)  # (R, h, n)
    is_inside = (point < points) & (at >= -1) & (at <= cells)
    distance = at.clamp(0, cells - 1)[..., None] - torch.arange(cells, dtype=rois.dtype)
    weights = (1 - distance.abs()).clamp_(min=0) * is_inside[..., None]
    return weights.sum(2) / points.clamp(min=1)
