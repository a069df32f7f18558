"""Precision of predictions, `TEST.PRECISION`. Boxes, scores and masks are float32 in every precision."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from detectron2.modeling import GeneralizedRCNN
from detectron2.structures import Instances
from torch import Tensor

from crossmae.errors import UserError
from crossmae.training.devices import choose_precision, open_autocast

PRECISION_KEY = "TEST.PRECISION"
TF32_CAPABILITY = (8, 0)  # of the first GPUs with TF32


def check_precision(precision: str, device: torch.device) -> None:
    """Reject a precision that the device does not have.

    Raises UserError.
    """
    if precision != "tf32":
        choose_precision(precision, device, PRECISION_KEY)
    elif device.type != "cuda" or torch.cuda.get_device_capability(device) < TF32_CAPABILITY:
        raise UserError(
            f"{PRECISION_KEY}: tf32 needs a GPU from Ampere on, and this is {device}. Set TEST.PRECISION=fp32 or bf16."
        )


@contextmanager
def inference_precision(precision: str, device: torch.device) -> Iterator[None]:
    """Compute in "fp32", in "bf16" by autocast, or in "tf32".

    "fp32" changes no setting of torch. "tf32" allows TF32 in matrix products and convolutions, and restores torch's
    settings. Raises UserError if the device does not have the precision.
    """
    check_precision(precision, device)
    if precision == "tf32":
        with tf32_allowed():
            yield
    elif precision == "bf16":
        with open_autocast(precision, device):
            yield
    else:
        yield


@contextmanager
def tf32_allowed() -> Iterator[None]:
    """Allow TF32 in matrix products and convolutions on GPUs."""
    products, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = getattr(products, "fp32_precision", None)  # torch 2.8 does not have it
    allowed, in_cudnn = products.allow_tf32, cudnn.allow_tf32
    products.allow_tf32 = cudnn.allow_tf32 = True
    try:
        yield
    finally:
        products.allow_tf32, cudnn.allow_tf32 = allowed, in_cudnn
        if before is not None:
            products.fp32_precision = before  # the older switch replaces "none", torch's default


def detect(model: GeneralizedRCNN, inputs: list[dict[str, Any]], precision: str) -> list[Instances]:
    """Find objects with small masks, in float32.

    Boxes are in pixels of the model's input. Takes detectron2's inputs, and a model in evaluation mode. Call it without
    gradients.
    """
    with inference_precision(precision, model.device):
        found: list[Instances] = model.inference(inputs, do_postprocess=False)
    for instances in found:
        for name, value in instances.get_fields().items():
            if isinstance(value, Tensor) and value.dtype in (torch.bfloat16, torch.float16):
                instances.set(name, value.float())
    return found
