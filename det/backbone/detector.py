"""detectron2's R-CNN with fewer copies to the device, and channels-last heads. Not run on a GPU yet."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from detectron2.layers import ROIAlign
from detectron2.layers.batch_norm import LayerNorm as ChannelFirstLayerNorm
from detectron2.modeling import Backbone, GeneralizedRCNN
from detectron2.structures import BitMasks, Boxes, ImageList, Instances
from torch import Tensor, nn

from det.backbone import vit
from det.backbone.pooling import RegionAlign

# Layers of detectron2, and layers with equal results except for rounding.
_FASTER: dict[type, type] = {ChannelFirstLayerNorm: vit.ChannelLayerNorm, ROIAlign: RegionAlign}


class Detector(GeneralizedRCNN):
    """detectron2's detector, with one copy of pixels per batch and one normalisation on the device.

    Tensors have the same names, and results are the same.
    """

    def forward(self, batched_inputs: list[dict[str, Any]]) -> Any:
        """Compute losses in training, and detections otherwise, as detectron2 does."""
        if self.training and self.device.type != "cpu":
            batched_inputs = [
                sample | {"instances": to_device(sample["instances"], self.device)} if "instances" in sample else sample
                for sample in batched_inputs
            ]
        return super().forward(batched_inputs)

    def preprocess_image(self, batched_inputs: list[dict[str, Any]]) -> ImageList:
        """Pad, copy and normalise images (C, h, w). The padding is zero."""
        images = [sample["image"] for sample in batched_inputs]
        sizes = [(image.shape[-2], image.shape[-1]) for image in images]
        height, width = padded_size(sizes, self.backbone)
        # detectron2 crops an image that is larger than the square, or fails.
        fits = all(h <= height and w <= width for h, w in sizes)
        if not fits or len({(image.shape[:-2], image.dtype, image.device) for image in images}) > 1:
            return super().preprocess_image(batched_inputs)
        batch = pad_images(images, (height, width), pin_memory=self.device.type == "cuda")
        pixels = (batch.to(self.device, non_blocking=True) - self.pixel_mean).div_(self.pixel_std)
        for one, (h, w) in zip(pixels, sizes, strict=True):
            if h < height:
                one[:, h:].zero_()
            if w < width:
                one[:, :h, w:].zero_()
        return ImageList(pixels, sizes)


def padded_size(sizes: Sequence[Sequence[int]], backbone: Backbone) -> tuple[int, int]:
    """Compute the size of a padded batch, as `ImageList.from_tensors` does.

    `sizes` are (h, w) of the images. Returns height and width.
    """
    constraints = backbone.padding_constraints
    height, width = (max(sides) for sides in zip(*sizes, strict=True))
    if (square := constraints.get("square_size", 0)) > 0:
        height = width = square
    divisor = max(constraints.get("size_divisibility", backbone.size_divisibility), 1)
    return -(-height // divisor) * divisor, -(-width // divisor) * divisor


def pad_images(images: Sequence[Tensor], size: tuple[int, int], pin_memory: bool = False) -> Tensor:
    """Copy images to the top left corners of a batch.

    Images (C, h, w) of one type become (B, C, H, W). The rest of the batch is not initialised.
    """
    first = images[0]
    shape = (len(images), *first.shape[:-2], *size)
    batch = torch.empty(shape, dtype=first.dtype, device=first.device, pin_memory=pin_memory and not first.is_cuda)
    for place, image in zip(batch, images, strict=True):
        place[..., : image.shape[-2], : image.shape[-1]].copy_(image)
    return batch


def to_device(instances: Instances, device: torch.device) -> Instances:
    """Copy ground truth to a device.

    Copies of pinned memory do not wait for the device.
    """
    moved = Instances(instances.image_size)
    for name, value in instances.get_fields().items():
        if type(value) is Boxes:  # its `to` has no `non_blocking`
            moved.set(name, Boxes(value.tensor.to(device, non_blocking=True)))
        elif isinstance(value, (Tensor, BitMasks)):
            moved.set(name, value.to(device, non_blocking=True))
        else:
            moved.set(name, value.to(device) if hasattr(value, "to") else value)
    return moved


def use_channels_last(model: GeneralizedRCNN) -> None:
    """Give the convolutions of the heads channels-last inputs, on devices in `CHANNELS_LAST`.

    Pyramid and proposals have such inputs already: the encoder's output is a channels-last view. Weights stay
    contiguous, and so do checkpoints. cuDNN converts the weights in each call, which is cheap.
    """
    for name in ("box_head", "mask_head"):
        head = getattr(model.roi_heads, name, None)
        for one in head if isinstance(head, nn.ModuleList) else [head]:
            if isinstance(one, nn.Module) and any(isinstance(layer, nn.Conv2d) for layer in one.modules()):
                one.register_forward_pre_hook(to_channels_last)


def use_fast_layers(model: nn.Module) -> None:
    """Exchange norms and RoIAlign of detectron2 for faster layers, in place.

    In the heads, detectron2 computes a norm in eight calls, and its gradient in more. Weights and names do not change.
    """
    for module in model.modules():
        if faster := _FASTER.get(type(module)):
            module.__class__ = faster


def to_channels_last(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Convert features of boxes (R, C, h, w)."""
    features, *rest = inputs
    if isinstance(features, Tensor) and features.dim() == 4 and features.device.type in vit.CHANNELS_LAST:
        features = features.contiguous(memory_format=torch.channels_last)
    return (features, *rest)
