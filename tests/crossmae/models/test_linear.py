"""The product by oneDNN equals torch's in outputs and in all gradients, and is used only where it may be."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crossmae.models import linear as module
from crossmae.models.crossmae import CrossMAE
from crossmae.models.linear import Linear, linear, torch_products, use_linear

pytestmark = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"),
    reason="this torch has no oneDNN",
)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Use oneDNN on every processor and for every size, and return the shapes of its products."""
    found: list[tuple[int, ...]] = []
    product = module._Product.forward

    def forward(ctx: object, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        found.append((*x.shape, len(weight)))
        return product(ctx, x, weight, bias)

    monkeypatch.setattr(module._Product, "forward", staticmethod(forward))
    monkeypatch.setattr(module, "onednn_is_faster", lambda: True)
    monkeypatch.setattr(module, "LEAST_MULTIPLICATIONS", 0)
    return found


def results(function: Callable[..., Tensor], dtype: torch.dtype, has_bias: bool) -> list[Tensor]:
    """Output, gradients, and gradients of a gradient, for strided inputs."""
    torch.manual_seed(0)
    x = torch.randn(3, 11, 5, dtype=torch.float64).to(dtype).transpose(0, 1)[::2].requires_grad_()
    weight, bias = (torch.randn(size, dtype=torch.float64).to(dtype).requires_grad_() for size in ((7, 5), (7,)))
    inputs = (x, weight, bias) if has_bias else (x, weight)
    out = function(*inputs)
    first = torch.autograd.grad((out**2).sum(), inputs, create_graph=True)
    second = torch.autograd.grad((first[0] ** 3).sum(), inputs, allow_unused=True)
    spread = torch.autograd.grad(function(*inputs).sum(), inputs)  # a gradient with strides of 0
    return [one.double() for one in (out, *first, *second, *spread) if one is not None]


@pytest.mark.parametrize("has_bias", [True, False])
def test_outputs_and_gradients_equal_torch_in_double_precision(has_bias: bool, calls: list[tuple[int, ...]]) -> None:
    found = results(linear, torch.float32, has_bias)
    assert (18, 5, 7) in calls
    assert {(18, 7, 5), (7, 18, 5)} <= set(calls)  # both gradients, too
    expected = results(F.linear, torch.float64, has_bias)
    assert len(found) == len(expected)
    for one, two in zip(found, expected, strict=True):
        assert (one - two).abs().max() <= 1e-5 * two.abs().max()


def test_frozen_tensors_have_no_product(calls: list[tuple[int, ...]]) -> None:
    layer = Linear(5, 7).requires_grad_(False)
    layer(torch.randn(4, 5, requires_grad=True)).sum().backward()
    assert calls == [(4, 5, 7), (4, 7, 5)]
    calls.clear()
    layer.weight.requires_grad_()
    layer(torch.randn(4, 5)).sum().backward()
    assert calls == [(4, 5, 7), (7, 4, 5)]


def test_other_cases_have_torchs_operator(calls: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = Linear(5, 7), torch.randn(4, 5)
    layer.double()(x.double())
    layer.float().bfloat16()(x.bfloat16())
    layer.float()
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    layer.to("meta")(x.to("meta"))
    layer = Linear(5, 7)
    torch.compile(layer, backend="eager", fullgraph=True)(x)
    torch.export.export(layer, (x,))
    with torch_products():
        layer(x)
    monkeypatch.setattr(module, "LEAST_MULTIPLICATIONS", 4 * 5 * 7 + 1)
    layer(x)
    monkeypatch.setattr(module, "LEAST_MULTIPLICATIONS", 0)
    monkeypatch.setattr(module, "onednn_is_faster", lambda: False)
    layer(x)
    assert not calls


def test_every_large_layer_of_the_model_is_fast(calls: list[tuple[int, ...]]) -> None:
    sizes: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}
    model = CrossMAE(**sizes, decoder_embed_dim=12, decoder_depth=3, decoder_num_heads=2)
    plain = [name for name, part in model.named_modules() if type(part) is nn.Linear]
    assert plain == ["wfm.linear"]
    model(torch.randn(2, 3, 32, 32), 0.75, 0.25, torch.rand(2, 16)).loss.backward()
    # Patches; qkv, proj, fc1, fc2 of 2 blocks; q, kv, proj, fc1, fc2 of 3 blocks; decoder_pred: each three times, but
    # the gradient of the pixels.
    assert len(calls) == 3 * (1 + 2 * 4 + 3 * 5 + 1) - 1


def test_layers_of_other_libraries_become_fast_in_place(calls: list[tuple[int, ...]]) -> None:
    class Special(nn.Linear):
        pass

    model = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), Special(7, 5))
    names, x = list(model.state_dict()), torch.randn(4, 5)
    expected = model(x)
    use_linear(model)
    torch.testing.assert_close(model(x), expected)
    assert calls == [(4, 5, 7)]
    assert list(model.state_dict()) == names
    assert type(model[2]) is Special
    torch.testing.assert_close(copy.deepcopy(model)(x), expected)
    assert len(calls) == 2
