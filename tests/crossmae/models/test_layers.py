"""Proves that MLP and stochastic depth equal timm's to the bit: names, values, gradients and random draws."""

from __future__ import annotations

import pytest
import timm.layers
import torch

from crossmae.models.layers import DropPath, Mlp


def test_the_mlp_is_timms() -> None:
    torch.manual_seed(0)
    ours = Mlp(16, 40)
    torch.manual_seed(0)
    theirs = timm.layers.Mlp(16, hidden_features=40)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    x = torch.randn(3, 5, 16)
    assert torch.equal(ours(x), theirs(x))


@pytest.mark.parametrize("drop_prob", [0.0, 0.1, 0.7])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_stochastic_depth_drops_as_timms(drop_prob: float, training: bool, dtype: torch.dtype) -> None:
    results = []
    for layer in (DropPath(drop_prob), timm.layers.DropPath(drop_prob)):
        torch.manual_seed(3)
        x = torch.randn(64, 5, 4, dtype=dtype, requires_grad=True)
        y = layer.train(training)(x)
        y.square().sum().backward()
        results.append((y.detach(), x.grad, torch.rand(1)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
