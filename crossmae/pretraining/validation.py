"""What a run is judged by while it trains: a fixed held-out loss, fixed pictures, and nearest neighbours."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from crossmae.data.parallel import map_in_order
from crossmae.data.sources import Source, evenly_spaced, open_source
from crossmae.data.training_images import Normalize, centre_view, read_or_next
from crossmae.errors import UserError
from crossmae.models.crossmae import CrossMAE
from crossmae.pretraining.config import PretrainConfig
from crossmae.pretraining.neighbours import knn_probe
from crossmae.pretraining.reconstruction import Panels, reconstruct
from crossmae.training.config import RunConfig
from crossmae.training.processes import Ranks

log = logging.getLogger(__name__)

MOST_NAMES = 2_000_000  # that are compared; more would take minutes
READERS = 8  # threads that read and decode
NEVER_REPLACED = "what is evaluated on is never replaced"


class HeldOut:
    """Images with masks that are the same in every run: the middle of each, and noise that depends on its index alone.

    Args:
        config: of the run.
        source: where the images come from.
        model: decides their size.
        most: at most so many of them, evenly spaced.
        ranks: this process keeps and evaluates its share.
        broken: what to do about images that can not be read; others take the place of training images only.
    """

    def __init__(
        self,
        config: PretrainConfig,
        source: Source,
        model: CrossMAE,
        most: int,
        ranks: Ranks,
        broken: Literal["error", "substitute"] = "error",
    ) -> None:
        chosen = evenly_spaced(len(source), most)
        self.count = len(chosen)
        self.indices = chosen[ranks.rank :: ranks.world_size]
        key = "data.val" if broken == "error" else "data.train"
        self.images = load_views(config, source, model, self.indices, key, broken)
        self.noise = torch.stack([fixed_noise(index, model.num_patches) for index in self.indices] or [torch.empty(0)])
        self.config, self.ranks = config, ranks

    @torch.no_grad()
    def loss(self, model: CrossMAE, device: torch.device, autocast: torch.autocast) -> float:
        """Mean loss over all masked patches of all images, whatever the predict ratio, so that runs of one mask ratio
        can be compared.
        """
        ratio, was_training = self.config.model.mask_ratio, model.training
        model.eval()
        total = torch.zeros((), dtype=torch.float64, device=device)
        normalize = Normalize(self.config.data.mean, self.config.data.std, device)
        for images, noise in self._batches(device):
            with autocast:
                loss = model(normalize(images), ratio, ratio, noise).loss
            total += loss.double() * len(images)
        model.train(was_training)
        return float(self.ranks.sum(total)) / self.count

    def panels(self, model: CrossMAE, device: torch.device, count: int) -> Panels:
        """Reconstructions of the first `count` images that this process keeps."""
        images, noise = self.images[:count].to(device), self.noise[:count].to(device)
        data, ratio = self.config.data, self.config.model.mask_ratio
        return reconstruct(model, Normalize(data.mean, data.std, device)(images), ratio, noise, data.mean, data.std)

    def _batches(self, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
        size = self.config.optim.batch_size
        if len(self.indices):
            for images, noise in zip(self.images.split(size), self.noise.split(size), strict=True):
                yield images.to(device), noise.to(device)


class Neighbours:
    """The online probe: k nearest neighbours on features of labelled images (see `crossmae.pretraining.neighbours`).

    Raises:
        UserError: a source without labels, or classes that differ between the two.
    """

    def __init__(self, config: PretrainConfig, model: CrossMAE) -> None:
        self.config = config
        train, val = (open_named(config, key) for key in ("probe.train", "probe.val"))
        if train.classes != val.classes or not train.classes:
            raise UserError(
                f"probe.train has the classes {_named(train.classes)}, probe.val {_named(val.classes)}; "
                "both need the same ones: a folder for each class, or labels in the list"
            )
        self.classes = train.classes
        warn_of_overlap(train, "probe.train", val, "probe.val")
        self.train, self.val = (self._load(source, model) for source in (train, val))
        if config.probe.k > len(self.train[1]):
            raise UserError(f"probe.k: {config.probe.k} neighbours of {len(self.train[1])} images in probe.train")

    def accuracy(self, model: CrossMAE, device: torch.device) -> float:
        """Share of probe.val that is classified rightly."""
        probe = self.config.probe
        train, val = ((self._batches(images, device), labels) for images, labels in (self.train, self.val))
        return knn_probe(model, train, val, len(self.classes), probe.pool, k=probe.k, temperature=probe.temperature)

    def _load(self, source: Source, model: CrossMAE) -> tuple[Tensor, Tensor]:
        indices = evenly_spaced(len(source), self.config.probe.images)
        images = load_views(self.config, source, model, indices, "probe")
        return images, torch.tensor([source.label(index) for index in indices])

    def _batches(self, images: Tensor, device: torch.device) -> Iterator[Tensor]:
        normalize = Normalize(self.config.data.mean, self.config.data.std, device)
        for batch in images.split(self.config.optim.batch_size):
            yield normalize(batch.to(device))


def open_named(config: RunConfig, key: str) -> Source:
    """The source that a key such as "data.val" names.

    Raises:
        UserError: it can not be opened; for optional keys with the words that do without.
    """
    section, name = key.split(".")
    root: Path | None = {"data.train": config.data.root, "data.val": config.data.val_root}.get(key)
    try:
        source = open_source(getattr(getattr(config, section), name), key, root)
        log.info("%s: %s", key, source.description)
        return source
    except UserError as error:
        without = {"data.val": "data.val=null", "probe.train": "probe.train=null probe.val=null"}
        hint = without.get(key.replace("probe.val", "probe.train"))
        raise UserError(f"{error}; to go without: {hint}" if hint else str(error)) from None


def warn_of_overlap(train: Source, train_key: str, val: Source, val_key: str) -> None:
    """Say so where images are evaluated on that were trained on; as far as their names tell."""
    if len(train) > MOST_NAMES:
        return
    names = {train.name(index) for index in range(len(train))}
    both = sum(val.name(index) in names for index in range(len(val)))
    if both:
        log.warning("%d of the %d images of %s are in %s, too: its numbers flatter", both, len(val), val_key, train_key)


def load_views(
    config: PretrainConfig,
    source: Source,
    model: CrossMAE,
    indices: Sequence[int],
    key: str,
    broken: Literal["error", "substitute"] = "error",
) -> Tensor:
    """Central views (N, C, H, W) of some images, uint8 or float32 in 0-1.

    Raises:
        UserError: one of them can not be read.
    """
    size, channels, depth = model_size(model), config.model.in_chans, config.data.bit_depth
    views = map_in_order(
        lambda index: centre_view(read_or_next(source, index, channels, depth, broken)[0], size), indices, READERS
    )
    all_views: Tensor | None = None
    bar = tqdm(views, f"read {key}", len(indices), leave=False, unit="img", dynamic_ncols=True)
    try:
        for index, view in enumerate(bar):
            if all_views is None:  # filled in place: to stack a list would take twice the memory
                all_views = torch.empty(len(indices), *view.shape, dtype=view.dtype)
            all_views[index] = view
    except UserError as error:
        raise UserError(f"{key}: {error}; repair or remove it: {NEVER_REPLACED}") from None
    return torch.empty(0, channels, *size) if all_views is None else all_views


def model_size(model: CrossMAE) -> tuple[int, int]:
    """Height and width of the model's images in pixels."""
    return model.grid[0] * model.patch_size, model.grid[1] * model.patch_size


def fixed_noise(index: int, num_patches: int) -> Tensor:
    """(L,) noise of held-out image `index`, the same in every run."""
    return torch.from_numpy(np.random.default_rng([0, index]).random(num_patches, dtype=np.float32))


def _named(classes: Sequence[str]) -> str:
    return f"{', '.join(classes[:5])}{', ...' if len(classes) > 5 else ''} ({len(classes)})" if classes else "(none)"
