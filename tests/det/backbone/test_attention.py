"""Folded attention equals the materialized one and detectron2's in double precision, and keeps no N x N matrix."""

import pytest
import torch

pytest.importorskip("detectron2", reason="detectron2 is not installed: python tools/install_detectron2.py")

from detectron2.modeling.backbone.utils import window_partition, window_unpartition
from detectron2.modeling.backbone.vit import Attention as ReferenceAttention

from det.backbone.attention import (
    SpatialAttention,
    folded_attention,
    materialized_attention,
)

# dim, heads, window (0: global), size the tables are made for, grid
CASES = {
    "global": (32, 2, 0, 6, (6, 6)),
    "not square, tables resized": (32, 2, 0, 6, (5, 9)),
    "heads of 5, width padded to 16": (15, 3, 0, 3, (3, 7)),
    "whole windows": (32, 2, 3, 3, (6, 9)),
    "padded windows": (32, 2, 4, 4, (6, 9)),
    "one window larger than the grid": (32, 2, 14, 14, (5, 3)),
}


class Windowed(torch.nn.Module):
    """detectron2's attention in windows of tokens that are zero where padded, as its block does it."""

    def __init__(self, dim, heads, window, size):
        super().__init__()
        self.window, self.attn = window, ReferenceAttention(dim, heads, use_rel_pos=True, input_size=(size, size))

    def forward(self, x):
        if not self.window:
            return self.attn(x)
        windows, padded = window_partition(x, self.window)
        return window_unpartition(self.attn(windows), self.window, padded, x.shape[1:3])


def run(module, x):
    """Output and all gradients, by name."""
    x = x.clone().requires_grad_()
    out = module(x)
    weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    (out * weight).sum().backward()
    gradients = {name.removeprefix("attn."): parameter.grad for name, parameter in module.named_parameters()}
    return {"out": out.detach(), "x": x.grad} | gradients


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_double_precision_outputs_and_all_gradients_equal_both_references(case):
    dim, heads, window, size, grid = case
    torch.manual_seed(0)
    reference = Windowed(dim, heads, window, size).double()
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.normal_()
    x = torch.randn(2, *grid, dim, dtype=torch.float64)
    expected = run(reference, x)
    assert all(value.abs().max() > 1e-3 for value in expected.values())
    for kind in ("folded", "materialized"):
        ours = SpatialAttention(dim, heads, window, size, kind).double()
        ours.load_state_dict(reference.attn.state_dict(), strict=True)
        found = run(ours, x)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, atol=1e-10, rtol=1e-10, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize(("kind", "expected"), [("folded", False), ("materialized", True)])
def test_only_the_reference_keeps_a_matrix_of_all_pairs(kind, expected):
    attention = SpatialAttention(16, 2, 0, 24, kind)
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
        attention(torch.randn(1, 24, 24, 16))
    assert (max(sizes) >= 2 * 24**4) is expected


def test_in_bfloat16_folding_is_no_less_exact_than_the_matrix():
    torch.manual_seed(0)
    H = W = 16
    q, k, v = torch.randn(3, 1, 4, H * W, 32, dtype=torch.float64)
    rows, columns = torch.randn(2, 1, 4, H * W, H, dtype=torch.float64)
    exact = materialized_attention(q, k, v, rows, columns)
    errors = {}
    for attend in (folded_attention, materialized_attention):
        out = attend(*(value.bfloat16() for value in (q, k, v, rows, columns)))
        errors[attend.__name__] = ((out.double() - exact).norm() / exact.norm()).item()
    assert errors["folded_attention"] <= 1.1 * errors["materialized_attention"]
