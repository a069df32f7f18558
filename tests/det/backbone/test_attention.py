"""Fast attention equals the materialized one and detectron2's in double precision, and keeps no N x N matrix."""

import pytest
import torch

pytest.importorskip("detectron2", reason="detectron2 is not installed: python tools/install_detectron2.py")

from detectron2.modeling.backbone.utils import window_partition, window_unpartition
from detectron2.modeling.backbone.vit import Attention as ReferenceAttention

from det.backbone import blocked_attention as blocked
from det.backbone.attention import SpatialAttention, folded_attention, materialized_attention

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


@pytest.mark.parametrize("scores", [2**20, 100, 1], ids=["whole windows", "part of a window", "one query"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_double_precision_outputs_and_all_gradients_equal_both_references(case, scores, monkeypatch):
    monkeypatch.setattr(blocked, "BLOCK_SCORES", scores)
    dim, heads, window, size, grid = case
    torch.manual_seed(0)
    reference = Windowed(dim, heads, window, size).double()
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.normal_()
    x = torch.randn(2, *grid, dim, dtype=torch.float64)
    expected = run(reference, x)
    assert all(value.abs().max() > 1e-3 for value in expected.values())
    for kind in ("auto", "blocks", "folded", "materialized"):
        ours = SpatialAttention(dim, heads, window, size, kind).double()
        ours.load_state_dict(reference.attn.state_dict(), strict=True)
        found = run(ours, x)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, atol=1e-10, rtol=1e-10, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("shape", [(1, 24), (7, 24), (3, 5), (2, 4), (5, 1000)])
@pytest.mark.parametrize("scores", [1, 24, 100, 2**20])
def test_a_block_has_as_many_scores_as_are_allowed(shape, scores, monkeypatch):
    monkeypatch.setattr(blocked, "BLOCK_SCORES", scores)
    members, tokens = shape
    g, queries = blocked.block_shape(*shape)
    assert 1 <= g <= members
    assert 1 <= queries <= tokens
    assert g * queries * tokens <= max(scores, tokens)
    assert g == 1 or queries == tokens  # blocks are contiguous
    assert (g, queries) == shape or 2 * g * queries * tokens > scores


def test_autograd_agrees_with_finite_differences(monkeypatch):
    monkeypatch.setattr(blocked, "BLOCK_SCORES", 40)
    torch.manual_seed(0)
    tensors = [torch.randn(2, 1, 6, size, dtype=torch.float64, requires_grad=True) for size in (3, 3, 3, 2, 3)]
    assert torch.autograd.gradcheck(blocked.blocked_attention, tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_equal_the_matrix_in_the_precision_of_their_input(dtype, monkeypatch):
    monkeypatch.setattr(blocked, "BLOCK_SCORES", 3000)
    torch.manual_seed(0)
    exact = [torch.randn(2, 3, 7 * 11, size, dtype=torch.float64) for size in (16, 16, 16, 7, 11)]
    weight = torch.randn(2, 3, 7 * 11, 16, dtype=torch.float64)
    found = {}
    for attend, kind in ((materialized_attention, torch.float64), (blocked.blocked_attention, dtype)):
        tensors = [value.to(dtype).to(kind).requires_grad_() for value in exact]
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == kind):
            out = attend(*tensors)
        assert out.dtype == kind
        (out * weight.to(kind)).sum().backward()
        found[kind] = [out.detach(), *(tensor.grad for tensor in tensors)]
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for value, expected in zip(found[dtype], found[torch.float64], strict=True):
        assert (value.double() - expected).norm() <= tolerance * expected.norm()


@pytest.mark.parametrize(("kind", "expected"), [("blocks", False), ("folded", False), ("materialized", True)])
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


def test_an_exported_graph_has_one_plain_attention_in_place_of_blocks():
    program = torch.export.export(SpatialAttention(16, 2, 0, 4), (torch.randn(1, 4, 4, 16),))
    called = [str(node.target) for node in program.graph.nodes]
    assert called.count("aten.scaled_dot_product_attention.default") == 1
