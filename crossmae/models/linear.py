"""Linear layers that multiply by oneDNN on AMD processors.

torch multiplies float32 matrices with MKL. On AMD processors with AVX-512, oneDNN, which torch also contains, needs up
to 20 % less time for the same products. Its sums have another order, so results differ by rounding.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Smaller products are slower, because a call from Python takes longer.
LEAST_MULTIPLICATIONS = 2**25
_only_torch = ContextVar("_only_torch", default=False)


class Linear(nn.Linear):
    """torch's linear layer, with `linear` as its function."""

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens (..., in) to (..., out)."""
        return linear(x, self.weight, self.bias)


def use_linear(model: nn.Module) -> None:
    """Make every linear layer of a model a `Linear`, in place.

    Weights, names and subclasses of torch's layer do not change.
    """
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = Linear


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Apply a linear layer to x (..., I), as `torch.nn.functional.linear` does.

    The weight is (O, I), the bias (O,), and the result (..., O). oneDNN multiplies if all tensors are float32 on a CPU
    where oneDNN is faster, and the product is large. Traced, compiled and exported graphs have torch's own operator.
    """
    if not (
        # First, because the size of an exported graph may depend on what a detector finds.
        not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and x.dtype == weight.dtype == torch.float32
        and x.numel() * weight.shape[0] >= LEAST_MULTIPLICATIONS
        and x.device.type == weight.device.type == "cpu"
        and not torch.is_autocast_enabled("cpu")
        and not _only_torch.get()
        and onednn_is_faster()
    ):
        return F.linear(x, weight, bias)
    out: Tensor = _Product.apply(x.reshape(-1, x.shape[-1]), weight, bias)
    return out.view(*x.shape[:-1], -1)


@contextmanager
def torch_products() -> Iterator[None]:
    """Multiply as torch does by default, to compare with other libraries."""
    token = _only_torch.set(True)
    try:
        yield
    finally:
        _only_torch.reset(token)


@lru_cache
def onednn_is_faster() -> bool:
    """Check for an AMD processor with AVX-512, and for torch's operator.

    False if torch cannot tell.
    """
    found: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    suits = "AMD" in str(found.get("cpu_name")) and bool(found.get("avx512_f"))
    return suits and torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


class _Product(torch.autograd.Function):
    """Product of x (N, I) and a transposed weight (O, I), plus a bias."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        for_x, for_weight, for_bias = ctx.needs_input_grad
        grad = grad.contiguous()
        of_x: Tensor | None = _Product.apply(grad, weight.t(), None) if for_x else None
        of_weight: Tensor | None = _Product.apply(grad.t(), x.t(), None) if for_weight else None
        return of_x, of_weight, grad.sum(0) if for_bias else None
