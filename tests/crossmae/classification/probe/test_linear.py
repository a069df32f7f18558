"""Proves the linear probe: LARS by an independent reference, the published schedule, the same bits by seed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from crossmae.classification.probe import linear
from crossmae.classification.probe.config import LinearConfig
from crossmae.classification.probe.linear import classify, lars, reach, train_linear


class ReferenceLars:
    """The published rule (method specification, section 1.11), written from its words, parameter by parameter."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self.parameters, self.moments = parameters, [torch.zeros_like(p) for p in parameters]

    def step(self, lr: float) -> None:
        for parameter, moment in zip(self.parameters, self.moments, strict=True):
            assert parameter.grad is not None
            move = parameter.grad.clone()
            if parameter.ndim > 1 and parameter.norm() > 0 and move.norm() > 0:
                move *= 0.001 * parameter.data.norm() / move.norm()
            moment.mul_(0.9).add_(move)
            parameter.data.sub_(lr * moment)


def test_lars_equals_the_reference_over_many_steps() -> None:
    torch.manual_seed(0)
    ours, theirs = nn.Linear(6, 4).double(), nn.Linear(6, 4).double()
    theirs.load_state_dict(ours.state_dict())
    optimizer, reference = lars(ours, 1.0), ReferenceLars(list(theirs.parameters()))
    start = ours.weight.detach().clone()
    for step in range(20):
        x, y = torch.randn(8, 6).double(), torch.randint(4, (8,))
        lr = 1.0 + step
        for group in optimizer.param_groups:
            group["lr"] = lr
        for module in (ours, theirs):
            module.zero_grad()
            nn.functional.cross_entropy(module(x), y).backward()
        optimizer.step()
        reference.step(lr)
        for mine, expected in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(mine, expected, rtol=1e-9, atol=1e-9)
    assert (ours.weight - start).norm() > 0.1 * start.norm()


def test_weight_decay_is_for_matrices_alone() -> None:
    module = nn.Linear(3, 2)
    matrices, vectors = lars(module, 1.0, weight_decay=0.1).param_groups
    assert [p is module.weight for p in matrices["params"]] == [True]
    assert [p is module.bias for p in vectors["params"]] == [True]
    assert (matrices["weight_decay"], vectors["weight_decay"]) == (0.1, 0.0)


def clusters(count: int = 200) -> tuple[Tensor, Tensor]:
    """Two overlapping classes, in dimensions of very different size."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % 2
    features = torch.randn(count, 5, generator=generator) + labels[:, None] * torch.tensor([3.0, 0, 0, 0, 0])
    return features * torch.tensor([0.01, 1.0, 50.0, 1.0, 1.0]), labels


LONG = LinearConfig(epochs=30, warmup_epochs=3, batch_size=20, base_lr=30.0)


def test_a_head_learns_and_has_the_same_bits_for_a_seed() -> None:
    features, labels = clusters()
    heads = []
    for _ in range(2):
        torch.rand(3)  # what was drawn before has no influence
        heads.append(train_linear(features, labels, 2, LONG, seed=1))
    assert all(torch.equal(one, two) for one, two in zip(*(head.state_dict().values() for head in heads), strict=True))
    other = train_linear(features, labels, 2, LONG, seed=2)
    assert not torch.equal(other[1].weight, heads[0][1].weight)
    assert float((classify(heads[0], features, chunk=7) == labels).float().mean()) > 0.9
    assert not heads[0].training


def test_the_global_generator_is_left_alone() -> None:
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    train_linear(*clusters(), 2, LinearConfig(epochs=1, batch_size=50), seed=5)
    assert torch.equal(torch.rand(1), expected)


def test_learning_rate_is_that_of_the_schedule(monkeypatch: pytest.MonkeyPatch) -> None:
    """Warm-up from 0, peak of base_lr * batch / 256, half a cosine towards 0, one value for every step."""
    rates: list[float] = []

    class Recording(linear.Lars):  # type: ignore[misc]
        def step(self, closure: object = None) -> None:
            rates.extend({group["lr"] for group in self.param_groups})
            super().step(closure)

    monkeypatch.setattr(linear, "Lars", Recording)
    settings = LinearConfig(epochs=4, warmup_epochs=1, batch_size=64, base_lr=0.1)
    train_linear(*clusters(), 2, settings, seed=0)  # 3 batches in an epoch, 8 images are left out
    peak = 0.1 * 64 / 256
    assert len(rates) == 12
    assert rates[:4] == pytest.approx([0, peak / 3, 2 * peak / 3, peak])
    assert rates[3:] == sorted(rates[3:], reverse=True)
    assert 0 < rates[-1] < 0.1 * peak


def test_reach() -> None:
    assert reach(LinearConfig(), 1_281_167) == pytest.approx(225, abs=1)
    assert reach(LinearConfig(batch_size=16384), 1_281_167) == pytest.approx(225, abs=1)
    assert reach(LinearConfig(batch_size=48), 48) < 0.01
