"""Proves the kNN probe: votes equal a slow reference, features come from trained blocks only, scales do not matter."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from crossmae.models.crossmae import CrossMAE
from crossmae.models.encoder import ViTEncoder
from crossmae.pretraining import neighbours
from crossmae.pretraining.neighbours import encode_images, knn_accuracy, pool_tokens, standardize

TINY = {"img_size": (8, 12), "patch_size": 4, "embed_dim": 16, "depth": 3, "num_heads": 2}
DECODER = {"decoder_embed_dim": 16, "decoder_depth": 2, "decoder_num_heads": 2}


def reference_accuracy(
    train: list[list[float]],
    train_labels: Sequence[int],
    val: list[list[float]],
    val_labels: Sequence[int],
    num_classes: int,
    k: int,
    temperature: float,
) -> float:
    """Loops over numbers, in double precision."""

    def cosine(a: list[float], b: list[float]) -> float:
        return sum(x * y for x, y in zip(a, b, strict=True)) / (math.hypot(*a) * math.hypot(*b))

    right = 0
    for row, label in zip(val, val_labels, strict=True):
        similarity = [cosine(row, other) for other in train]
        nearest = sorted(range(len(train)), key=lambda j: -similarity[j])[:k]
        votes = [0.0] * num_classes
        for j in nearest:
            votes[train_labels[j]] += math.exp(similarity[j] / temperature)
        right += votes.index(max(votes)) == label
    return right / len(val)


def noisy_classes(seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """60 training and 40 validation images of 5 overlapping classes."""
    generator = torch.Generator().manual_seed(seed)
    centers = torch.randn(5, 6, generator=generator)
    labels = torch.randint(5, (100,), generator=generator)
    features = centers[labels] + 1.5 * torch.randn(100, 6, generator=generator)
    return features[:60], labels[:60], features[60:], labels[60:]


@pytest.mark.parametrize("k", [1, 3, 20, 60])
@pytest.mark.parametrize("temperature", [0.01, 0.07, 1.0])
def test_accuracy_equals_the_reference(k: int, temperature: float) -> None:
    train, train_labels, val, val_labels = noisy_classes()
    accuracy = knn_accuracy(train, train_labels, val, val_labels, 5, k, temperature)
    lists = train.tolist(), train_labels.tolist(), val.tolist(), val_labels.tolist()
    assert accuracy == reference_accuracy(*lists, 5, k, temperature)
    assert 0.2 < accuracy < 1


def test_a_case_with_a_known_answer() -> None:
    """Angles on a circle: two neighbours of class 1 outvote one of class 0 that is nearer, unless only it counts."""
    angles = torch.tensor([0.0, 0.3, 0.3, 3.0])
    train, labels = torch.stack([angles.cos(), angles.sin()], 1), torch.tensor([0, 1, 1, 2])
    val, truth = torch.tensor([[1.0, 0.1]]), torch.tensor([1])
    assert knn_accuracy(train, labels, val, truth, 3, k=1) == 0
    assert knn_accuracy(train, labels, val, truth, 3, k=3, temperature=1.0) == 1
    assert knn_accuracy(train, labels, val, truth, 3, k=3, temperature=0.01) == 0
    assert knn_accuracy(100 * train, labels, 0.01 * val, truth, 3, k=3, temperature=1.0) == 1  # cosine: no length


def test_equal_votes_go_to_the_lowest_class() -> None:
    train, val = torch.ones(4, 2), torch.ones(1, 2)
    labels = torch.tensor([3, 1, 2, 1])
    assert knn_accuracy(train, labels, val, torch.tensor([1]), 4, k=4) == 1
    assert knn_accuracy(train[:3], labels[:3], val, torch.tensor([1]), 4, k=3) == 1


def test_accuracy_does_not_depend_on_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    data = noisy_classes()
    whole = knn_accuracy(*data, 5, k=7)
    for values in (1, 7 * 60, 1000 * 60):
        monkeypatch.setattr(neighbours, "VALUES", values)
        assert knn_accuracy(*data, 5, k=7) == whole


def test_standardized_features_do_not_see_scale_and_shift() -> None:
    train, _, val, _ = noisy_classes()
    scale = torch.tensor([1e-3, 1.0, 5.0, 700.0, 2.0, 0.1])
    shift = torch.tensor([3.0, -4.0, 0.0, 1e3, 1e-3, 8.0])
    ours = standardize(train, val)
    for one, other in zip(ours, standardize(train * scale + shift, val * scale + shift), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(ours[0].mean(0), torch.zeros(6), rtol=0, atol=1e-5)
    torch.testing.assert_close(ours[0].std(0, correction=0), torch.ones(6))


def test_dimensions_that_do_not_vary_become_zero() -> None:
    train, val = standardize(torch.full((7, 2), 1000.1), torch.tensor([[1000.1, 5.0]]))
    assert not train.any()
    assert not val.any()


def test_pooling() -> None:
    tokens = torch.randn(2, 7, 4)
    torch.testing.assert_close(pool_tokens(tokens, "avg"), sum(tokens[:, i] for i in range(1, 7)) / 6)
    assert torch.equal(pool_tokens(tokens, "cls"), tokens[:, 0])
    with pytest.raises(ValueError, match=r"pool: 'max' is unknown\. Choose one of avg, cls"):
        pool_tokens(tokens, "max")  # type: ignore[arg-type]


def features_after(model: ViTEncoder, imgs: Tensor, block: int, norm: nn.Module) -> Tensor:
    tokens = model.embed(imgs)
    for layer in model.blocks[: block + 1]:
        tokens = layer(tokens)
    return norm(tokens)[:, 1:].mean(1).detach()


@pytest.mark.parametrize(
    ("arguments", "block"),
    [
        ({}, 2),
        ({"fuse_blocks": (0, 1)}, 1),
        ({"fuse_blocks": (0,), "decoder": "cross_self"}, 0),
        ({"fuse_blocks": ()}, 2),
        ({"decoder": "self"}, 2),
    ],
)
def test_features_come_from_the_last_trained_block(arguments: dict[str, object], block: int) -> None:
    model = CrossMAE(**TINY, **DECODER, **arguments)  # type: ignore[arg-type]
    if not model.fused_blocks:
        nn.init.normal_(model.norm.weight)  # else it could be left out unnoticed
    for untrained in model.blocks[block + 1 :]:
        for parameter in untrained.parameters():
            parameter.data.fill_(torch.nan)  # must not be touched
    imgs = torch.randn(5, 3, 8, 12)
    expected = features_after(model, imgs, block, getattr(model, "norm", nn.Identity()))
    assert torch.isfinite(expected).all()
    torch.testing.assert_close(encode_images(model, imgs.split(2)), expected)


def test_a_bare_encoder_and_its_mode() -> None:
    encoder = ViTEncoder(**TINY)  # type: ignore[arg-type]
    imgs = torch.randn(3, 3, 8, 12)
    for training in (True, False):
        encoder.train(training)
        features = encode_images(encoder, [imgs], "cls")
        assert encoder.training is training
    assert features.dtype == torch.float32
    assert not features.requires_grad
