"""Evaluations during training: held-out loss, fixed pictures, nearest neighbours, health of the loss."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from crossmae.data.broken import NEVER_REPLACED, read_or_next
from crossmae.data.parallel import map_in_order
from crossmae.data.pixels import Normalize, centre_view, read_pixels
from crossmae.data.sources import Source
from crossmae.data.sources.source import evenly_spaced
from crossmae.errors import UserError, counted, shorten
from crossmae.models.crossmae import CrossMAE
from crossmae.pretraining.config import ProbeConfig
from crossmae.pretraining.neighbours import encode_images, knn_accuracy, standardize
from crossmae.pretraining.reconstruction import Panels, reconstruct
from crossmae.training.devices import widest_float
from crossmae.training.processes import Ranks
from crossmae.training.signals import until_stop

log = logging.getLogger(__name__)


class HeldOut:
    """Centre views of images with fixed masks. The noise depends only on the index of an image.

    Args:
        most: largest number of images, evenly spaced.
        ranks: each process keeps and evaluates its share.
        broken: "error" for validation images; "substitute" replaces unreadable training images.
    """

    def __init__(
        self,
        source: Source,
        model: CrossMAE,
        most: int,
        ranks: Ranks,
        mask_ratio: float,
        normalize: Normalize,
        bit_depth: int,
        batch_size: int,
        broken: Literal["error", "substitute"] = "error",
        key: str = "data.val",
    ) -> None:
        chosen = evenly_spaced(len(source), most)
        self.count = len(chosen)
        own = chosen[ranks.rank :: ranks.world_size]
        self.images = load_views(source, own, model, bit_depth, key, broken)
        self.noise = torch.stack([fixed_noise(index, model.num_patches) for index in own] or [torch.empty(0)])
        self.ranks, self.mask_ratio, self.normalize, self.batch_size = ranks, mask_ratio, normalize, batch_size

    @torch.no_grad()
    def loss(self, model: CrossMAE, autocast: torch.autocast) -> float:
        """Compute the mean loss over all masked patches of all images.

        All masked patches are predicted, so that runs with different predict ratios can be compared.
        """
        device, was_training = self.normalize.mean.device, model.training
        model.eval()
        wide = widest_float(device)
        total = torch.zeros((), dtype=wide, device=device)
        parts = list(zip(self.images.split(self.batch_size), self.noise.split(self.batch_size), strict=True))
        for images, noise in until_stop(parts, self.ranks, len(parts)):
            if len(images):  # a process may have no images
                with autocast:
                    pixels = self.normalize(images.to(device))
                    loss = model(pixels, self.mask_ratio, self.mask_ratio, noise.to(device)).loss
                total += loss.to(wide) * len(images)
        model.train(was_training)
        return float(self.ranks.sum(total)) / self.count

    def panels(self, model: CrossMAE) -> Panels:
        """Reconstruct all images of this process."""
        device = self.normalize.mean.device
        return reconstruct(model, self.images.to(device), self.mask_ratio, self.noise.to(device), self.normalize)


class Neighbours:
    """The online probe: k-nearest-neighbour accuracy on labelled images (see `crossmae.pretraining.neighbours`)."""

    def __init__(
        self,
        train: Source,
        val: Source,
        model: CrossMAE,
        normalize: Normalize,
        bit_depth: int,
        batch_size: int,
        settings: ProbeConfig,
    ) -> None:
        if train.classes != val.classes or not train.classes:
            raise UserError(
                f"probe.train: the classes are {_named(train.classes)}, but {_named(val.classes)} in probe.val. Give "
                "both the same classes: a folder for each class, or labels in the list."
            )
        self.normalize, self.batch_size, self.settings = normalize, batch_size, settings
        self.num_classes, self.k = len(train.classes), settings.k
        self.views, self.labels = [], []
        for source in (train, val):
            indices = evenly_spaced(len(source), settings.images)
            self.views.append(load_views(source, indices, model, bit_depth, "probe"))
            self.labels.append(torch.tensor([source.label(index) for index in indices]))
        if self.k > (most := len(self.views[0])):
            sentence = f"probe.k: {self.k} neighbours of {counted(most, 'image')} in probe.train"
            if self.k != ProbeConfig().k:
                raise UserError(f"{sentence}. Lower it.")
            log.warning("%s. The probe uses all", sentence)
            self.k = most

    def accuracy(self, model: CrossMAE) -> float:
        """Compute the share of probe.val images that are classified correctly."""
        device, settings, features = self.normalize.mean.device, self.settings, []
        for views in self.views:
            parts = views.split(self.batch_size)
            batches = (self.normalize(batch.to(device)) for batch in until_stop(parts, Ranks(), len(parts)))
            features.append(encode_images(model, batches, settings.pool))
        train, val = standardize(*features)
        about = (self.num_classes, self.k, settings.temperature)
        return knn_accuracy(train, self.labels[0], val, self.labels[1], *about)


def load_views(
    source: Source,
    indices: Sequence[int],
    model: CrossMAE,
    bit_depth: int,
    key: str,
    broken: Literal["error", "substitute"] = "error",
) -> Tensor:
    """Read centre views (N, C, H, W), uint8 or float32 in 0-1."""

    def view(index: int) -> Tensor:
        pixels, *_ = read_or_next(source, index, model.in_chans, bit_depth, broken, read_pixels)
        return centre_view(pixels, model.img_size)

    # Filled in place, because stacking a list would need twice the memory.
    views = torch.empty(
        len(indices), model.in_chans, *model.img_size, dtype=torch.uint8 if bit_depth == 8 else torch.float32
    )
    try:
        for position, one in enumerate(map_in_order(view, indices, bar=f"read {key}")):
            views[position] = one
    except UserError as error:
        advice = "Repair or remove it, or set data.broken=substitute." if key == "data.train" else NEVER_REPLACED
        raise UserError(f"{key}: {str(error).rstrip('.')}. {advice}") from None
    return views


def fixed_noise(index: int, num_patches: int) -> Tensor:
    """Draw noise (L,) for an image, the same in every run."""
    return torch.from_numpy(np.random.default_rng([0, index]).random(num_patches, dtype=np.float32))


def _named(classes: Sequence[str]) -> str:
    return f"{shorten(classes)} ({len(classes)})" if classes else "(none)"


Band = Sequence[tuple[float, float, float]]
SETTLED = 0.1  # share of the schedule after which the loss must have fallen; later for a long warm-up
LEAST_STEPS = 100  # a shorter training is too short to tell; the loss of laptop.yaml falls below 1 in 40 to 60 steps
MOVED = 0.97  # share of the first loss, or of 1 (the loss of predicting the mean of each patch)


class Health:
    """Checks of the training loss of one run.

    Args:
        band: rows of (share of the schedule, lowest, highest expected loss), with rising shares. Limits are
            interpolated between rows. There are no limits before the first row.
        normalised: targets are standardised per patch, so that predicting the mean gives a loss of 1.
        warmup: share of the schedule in which the learning rate rises.
        steps: length of the schedule. Nothing is expected of the first `LEAST_STEPS` steps, nor of so many steps after
            the warm-up, so that runs of a few steps have no warnings.
    """

    def __init__(self, band: Band, measured_on: str, normalised: bool, warmup: float, steps: int) -> None:
        self.band, self.measured_on, self.normalised = band, measured_on, normalised
        self.least = LEAST_STEPS / max(steps, 1)
        self.settled = max(SETTLED, 2 * warmup, warmup + self.least)
        self.is_above = self.is_stuck = False

    def warnings(self, share: float, loss: float, first: float) -> list[str]:
        """Return warnings about a loss, once until the problem is over.

        Args:
            share: completed steps divided by all steps, 0 to 1.
            first: first loss of the run; inf if the initial weights are good and the loss cannot fall much.
        """
        found = []
        limits = self.limits(share)
        was_above, self.is_above = self.is_above, limits is not None and loss > limits[1]
        if self.is_above and not was_above and limits is not None:
            found.append(
                f"health: the loss, {loss:.3f} at {share:.0%} of the schedule, is above the band {limits[0]:.3f} to "
                f"{limits[1]:.3f} that this recipe showed on {self.measured_on}"
            )
        ceiling = MOVED * min(first, 1.0 if self.normalised else first)
        was_stuck, self.is_stuck = self.is_stuck, share >= self.settled and loss > ceiling
        if self.is_stuck and not was_stuck:
            found.append(
                f"health: the loss did not move: {first:.3f} at first, {loss:.3f} at {share:.0%} of the schedule"
                + (" (predicting each patch's mean gives 1)" if self.normalised else "")
                + ". Check the learning rate, and whether the reconstructions show anything"
            )
        return found

    def limits(self, share: float) -> tuple[float, float] | None:
        """Interpolate the limits of the loss.

        None before the first row, and before `LEAST_STEPS`.
        """
        if not self.band or share < max(self.band[0][0], self.least):
            return None
        shares, lows, highs = zip(*self.band, strict=True)
        return float(np.interp(share, shares, lows)), float(np.interp(share, shares, highs))
