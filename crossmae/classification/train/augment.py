"""Augmentations of fine-tuning: timm policies and torchvision crops (method specification, 1.10)."""

from __future__ import annotations

import random
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import chain
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data.auto_augment import (
    AutoAugment,
    augment_and_mix_transform,
    auto_augment_transform,
    posterize,
    rand_augment_transform,
)
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2.functional import to_pil_image

from crossmae.data.batches import keyed_randomness
from crossmae.data.pixels import RandomCrop, to_tensor
from crossmae.errors import UserError

Policy = Callable[[Image.Image], Image.Image]

TRIALS = 4  # images that a policy must augment before it is used
_SETTING = re.compile(r"(?P<key>mstd|mmax|inc|[mnpwdab])(?P<value>\d+(\.\d+)?)|t(3a|weights|3aw)", re.ASCII)
_POSITIVE = ("n", "p", "w", "d", "a")  # number of operations, their probability, width, depth and alpha of augmix
_POLICIES = "Name a policy such as rand-m9-mstd0.5-inc1, augmix-m3-w3, original or v0, or null for none."


def train_view(
    size: tuple[int, int],
    crop_scale: tuple[float, float],
    flip: float,
    auto_augment: str | None,
    color_jitter: float,
    mean: Sequence[float],
) -> v2.Compose:
    """Build the training transform: random crop, flip and policy.

    The transform returns an image (C, H, W) of `size` (height, width). Geometric operations fill new pixels with the
    `mean`. `LabelledDataConfig` describes the other arguments.

    Raises:
        UserError: timm has no such policy.
    """
    steps: list[Callable[[Any], Any]] = [RandomCrop(size, crop_scale, flip)]
    if auto_augment:
        steps.append(partial(_in_colours, build_policy(auto_augment, size, mean)))
    elif color_jitter:
        steps.append(v2.ColorJitter(color_jitter, color_jitter, color_jitter))
    return v2.Compose(steps)


def _in_colours(policy: Policy, pixels: Tensor) -> Tensor:
    """Apply a policy in RGB, and restore the number of channels."""
    image: Image.Image = to_pil_image(pixels)
    return to_tensor(policy(image.convert("RGB")).convert(image.mode))


def build_policy(name: str, size: tuple[int, int], mean: Sequence[float]) -> Policy:
    """Build a timm policy with the settings of timm's `create_transform`."""
    filling = tuple(min(255, round(255 * value)) for value in mean) * (3 // len(mean))
    settings: dict[str, Any] = {"translate_const": int(min(size) * 0.45), "img_mean": filling}
    settings["interpolation"] = Image.Resampling.BICUBIC
    try:
        if name.startswith("rand"):
            policy = rand_augment_transform(name, settings)
        elif name.startswith("augmix"):
            policy = augment_and_mix_transform(name, settings | {"translate_pct": 0.3})
        else:
            policy = auto_augment_transform(name, settings)
        _check_sections(name)
    except (AssertionError, ValueError, KeyError) as error:
        raise UserError(
            f"data.auto_augment: {name!r} is no policy of timm ({str(error) or 'unknown'}). {_POLICIES}"
        ) from None
    for operation in chain.from_iterable(policy.policy) if isinstance(policy, AutoAugment) else policy.ops:
        if operation.aug_fn is posterize:
            operation.aug_fn = _posterize
    _try_policy(policy, name)
    applied: Policy = policy
    return applied


def _check_sections(name: str) -> None:
    """Reject settings that timm ignores, and zeros that leave nothing to apply."""
    for section in name.split("-")[1:]:
        setting = _SETTING.fullmatch(section)
        if setting is None:
            raise ValueError(f"{section!r} is no setting")
        if setting["key"] in _POSITIVE and not float(setting["value"]) > 0:
            raise ValueError(f"{section!r} must be more than 0")


def _try_policy(policy: Policy, name: str) -> None:
    """Reject a policy that fails on a small image."""
    image = Image.fromarray(np.arange(16 * 16 * 3, dtype=np.uint8).reshape(16, 16, 3))
    for trial in range(TRIALS):
        try:
            with keyed_everywhere(trial), warnings.catch_warnings():
                warnings.simplefilter("error", RuntimeWarning)  # such as pixels that are not numbers
                policy(image)
        except Exception as error:  # timm, numpy and Pillow raise many types
            reason = " ".join(str(error).split()) or type(error).__name__
            raise UserError(f"data.auto_augment: {name!r} fails on an image ({reason}). {_POLICIES}") from error


def _posterize(image: Image.Image, bits: int, **settings: Any) -> Image.Image:
    """Keep the highest bits of each channel, but at least one bit.

    At its strongest, timm asks for 0 bits, and with `mmax` for a negative number. Other operations stay in Pillow's
    range at any magnitude.
    """
    posterized: Image.Image = posterize(image, max(bits, 1), **settings)
    return posterized


@contextmanager
def keyed_everywhere(*key: int, device: torch.device | None = None) -> Iterator[None]:
    """Seed the random generators of Python, numpy and torch from `key`.

    The generators of the CPU are restored at the end. If `device` is a GPU, its generator is also seeded, but it is not
    restored.
    """
    python, numbers = random.getstate(), np.random.get_state()
    words = np.random.SeedSequence(key).generate_state(4)
    random.seed(int(words[0]) << 32 | int(words[1]))
    np.random.seed(words[2:])
    if device is not None and device.type == "cuda":
        torch.cuda.manual_seed(int(words[0]))
    try:
        with keyed_randomness(*key):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numbers)
