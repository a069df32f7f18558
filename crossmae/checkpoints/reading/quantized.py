"""Quantized weights: integers and 8-bit floats that are codes, which mean something only with their scales."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from crossmae.errors import UserError, shorten

# Tensors that only quantizers write: GPTQ and AWQ, bitsandbytes, compressed-tensors, FP8, torch, HQQ, Quanto.
_CODES = re.compile(
    r"(?:.*\.)?(?:qweight|qzeros|SCB|weight_scale(?:_inv|_2)?|weight_packed|weight_format|W_q|_packed_params(?:\..+)?"
    r"|weight\.(?:absmax|quant_map|quant_state\..+|nested_absmax|_data|_scale))"
)
# Tensors of weights. Integers in other tensors are counters, indices and masks. No quantizer stores 64 bits.
_WEIGHT = re.compile(
    r"(?:.*[._])?(?:weight|bias|gamma|kernel|(?:cls|mask|dist|reg)_tokens?|pos_embed|position_embeddings?|embedding)"
)
_REMEDY = (
    "Load the model with the library that quantized it, dequantize it there, and save its state_dict in float32, "
    "float16 or bfloat16."
)


def refuse_quantized(tensors: Mapping[Any, Any], path: Path) -> None:
    """Raise UserError for weights that are codes of a quantizer."""
    found = {str(name): kind for name, value in tensors.items() if (kind := _kind(str(name), value))}
    if found:
        kinds = shorten(sorted(set(found.values())))
        raise UserError(
            f"{path}: quantized weights: {shorten(list(found), most=3)} of {len(tensors)} tensors ({kinds}). Their "
            f"numbers are codes without their scales. {_REMEDY}"
        )


def _kind(name: str, value: Any) -> str:
    """Return the dtype of codes, "entries of a quantizer", or ""."""
    if isinstance(value, np.ndarray):
        value = torch.empty(0, dtype=_torch_dtype(value.dtype))
    if isinstance(value, Tensor):
        dtype, words = value.dtype, str(value.dtype).removeprefix("torch.")
        if value.is_quantized or (dtype.is_floating_point and dtype.itemsize == 1) or "float4" in words:
            return words
        whole = not (dtype.is_floating_point or dtype.is_complex) and dtype.itemsize < 8
        if whole and _WEIGHT.fullmatch(name):
            return words
    return "entries of a quantizer" if _CODES.fullmatch(name) else ""


def _torch_dtype(dtype: np.dtype[Any]) -> torch.dtype:
    return torch.int8 if dtype.kind in "iub" and dtype.itemsize < 8 else torch.float32
