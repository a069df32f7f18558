"""Proves that a batch is a function of (seed, number): workers, prefetching and restarts do not change it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from crossmae.data.batches import BatchPlan, build_loader, keyed_randomness
from crossmae.data.broken import Unreadable
from crossmae.data.sources.source import ImageFiles
from crossmae.errors import UserError
from crossmae.pretraining.images import Batch, PretrainImages, collate_pretraining


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("images")
    pixels = np.random.default_rng(0).integers(0, 256, (10, 24, 20, 3), np.uint8)
    for index, image in enumerate(pixels):
        Image.fromarray(image).save(folder / f"{index} é.png")
    return sorted(folder.iterdir())


def dataset(paths: list[Path], seed: int = 0) -> PretrainImages:
    return PretrainImages(ImageFiles(paths, "images"), (8, 12), 6, (0.2, 1.0), 0.5, seed)


def read(paths: list[Path], first: int, last: int, workers: int, seed: int = 0) -> list[Batch]:
    plan = BatchPlan(len(paths), 4, seed)
    batches = list(build_loader(dataset(paths, seed), plan, first, last, workers, False, collate_pretraining))
    assert all(isinstance(batch, Batch) for batch in batches)
    return batches  # type: ignore[return-value]


def same(first: Batch, second: Batch) -> bool:
    pairs = ((first.images, second.images), (first.noise, second.noise), (first.indices, second.indices))
    return all(torch.equal(a, b) for a, b in pairs)


def test_batches_do_not_depend_on_workers_or_on_where_the_run_started(images: list[Path]) -> None:
    whole = read(images, 0, 6, workers=0)
    torch.manual_seed(99)  # global randomness plays no part
    for first, workers in ((0, 2), (3, 0), (5, 1)):
        for expected, actual in zip(whole[first:], read(images, first, 6, workers), strict=True):
            assert same(expected, actual)


def test_batches_hold_what_they_say(images: list[Path]) -> None:
    batch = read(images, 0, 1, workers=0)[0]
    assert batch.images.shape == (4, 3, 8, 12)
    assert batch.images.dtype == torch.uint8
    assert batch.noise.shape == (4, 6)
    assert 0 <= batch.noise.min() < batch.noise.max() < 1


def test_seed_epoch_and_index_each_change_the_sample(images: list[Path]) -> None:
    data = dataset(images)
    samples = [data[0, 1], data[1, 1], data[0, 2], dataset(images, seed=1)[0, 1]]
    noises = [sample[1] for sample in samples]  # type: ignore[index]
    assert len({tuple(noise.tolist()) for noise in noises}) == 4
    again = data[0, 1]
    assert torch.equal(again[0], samples[0][0])  # type: ignore[index]


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_an_epoch_shows_every_image_at_most_once_over_all_ranks(world_size: int) -> None:
    plans = [BatchPlan(25, 4, 7, rank, world_size) for rank in range(world_size)]
    per_epoch = plans[0].batches_per_epoch
    assert per_epoch == 25 // (4 * world_size)
    for epoch in range(2):
        numbers = range(epoch * per_epoch, (epoch + 1) * per_epoch)
        pairs = [pair for plan in plans for number in numbers for pair in plan.batch(number)]
        assert {pair[0] for pair in pairs} == {epoch}
        indices = [pair[1] for pair in pairs]
        assert len(set(indices)) == len(indices) == per_epoch * 4 * world_size
    assert plans[0].batch(0) != plans[0].batch(per_epoch)


def test_more_ranks_share_out_the_same_order() -> None:
    single = BatchPlan(16, 4, 0)
    double = [BatchPlan(16, 2, 0, rank, 2) for rank in range(2)]
    for number in range(4):
        assert single.batch(number) == double[0].batch(number) + double[1].batch(number)


def test_a_batch_larger_than_the_data_is_an_error_with_both_numbers() -> None:
    with pytest.raises(UserError, match=r"optim\.batch_size: a batch of 8 .* needs 8 images, the data set has 5"):
        BatchPlan(5, 8, 0)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_image_reaches_the_training_process_with_its_name(
    images: list[Path], tmp_path: Path, workers: int
) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(images[0].read_bytes()[:40])
    paths = [*images[:3], broken]
    loader = build_loader(dataset(paths), BatchPlan(4, 4, 0), 0, 1, workers, False, collate_pretraining)
    (batch,) = list(loader)
    assert isinstance(batch, Unreadable)
    assert "broken.png" in batch.message


def test_keyed_randomness_leaves_the_generator_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    with keyed_randomness(1, 2, 3):
        inside = torch.rand(3)
    assert torch.equal(torch.rand(3), expected)
    with keyed_randomness(1, 2, 3):
        assert torch.equal(torch.rand(3), inside)


@pytest.mark.parametrize("at_once", [1, 2, 5])
def test_shuffling_among_few_shards_still_shows_every_image_once(at_once: int) -> None:
    """At any time, images come from at most `at_once` shards; over an epoch all of them, in another order each time."""
    starts = np.array([0, 4, 10, 12, 18])
    plan = BatchPlan(20, 2, 3, groups=starts, groups_at_once=at_once)
    orders = [[i for n in range(10 * e, 10 * e + 10) for _, i in plan.batch(n)] for e in range(2)]
    assert orders[0] != orders[1]
    for order in orders:
        assert sorted(order) == list(range(20))
        shards = [int(np.searchsorted(starts, index, side="right")) for index in order]
        first, last = ({s: f(k for k, x in enumerate(shards) if x == s) for s in set(shards)} for f in (min, max))
        for position in range(20):
            assert sum(first[s] <= position <= last[s] for s in first) <= at_once
