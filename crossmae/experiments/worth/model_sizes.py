"""The sizes of images and encoder that the runs of a question have, for plan, page and help."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crossmae.experiments.worth.grid import PRESETS, Preset
from crossmae.experiments.worth.inputs import Task
from crossmae.files import load_yaml
from crossmae.training.config import read_yaml, resolve_config_path

WIDEST = 1333  # INPUT.MAX_SIZE_TEST, if a config of the detector sets neither this key nor INPUT.SIZE


@dataclass(frozen=True)
class ModelSizes:
    """Sizes of images, in pixels, and of the encoder.

    Attributes:
        crop: images of pretraining, as "64 x 64".
        image: images of fine-tuning. For a detector, the longest side, as "128".
        patch: side of a patch.
        width, depth: of the encoder.
    """

    task: Task
    crop: str
    image: str
    patch: int
    width: int
    depth: int

    @property
    def encoder(self) -> str:
        """Sizes of the encoder in words."""
        return f"width {self.width}, depth {self.depth}, patches of {self.patch} x {self.patch} pixels"

    @property
    def fine_tuning(self) -> str:
        """Images of fine-tuning in words."""
        if self.task == "detect":
            return f"the detector scales images to {self.image} pixels (longest side)"
        return f"the classifier sees {self.image} pixels"

    def limit(self, steps: int) -> tuple[str, str]:
        """Limit the results to these sizes: heading and text for the page."""
        return (
            "Larger images, larger models, longer training",
            f"In fine-tuning, {self.fine_tuning}. The encoder has width {self.width} and depth {self.depth}, and "
            f"{steps:,} steps train it. The results may not hold for full-size training: larger images, a larger "
            "encoder, or more steps.",
        )


def sizes_of(
    preset: Preset, task: Task, pretrain_settings: Sequence[str] = (), fine_tune_settings: Sequence[str] = ()
) -> ModelSizes:
    """Find the sizes of the runs.

    Args:
        pretrain_settings, fine_tune_settings: changes of the configs, as KEY=VALUE.
    """
    encoder = preset.encoder(pretrain_settings)
    crop, given = _by(encoder["img_size"]), dict(word.split("=", 1) for word in fine_tune_settings)
    if task == "detect":
        config = _read_with_bases(resolve_config_path(preset.detect))
        inputs = config.get("INPUT", {})
        image = given.get("INPUT.MAX_SIZE_TEST") or given.get("INPUT.SIZE")
        image = image or str(inputs.get("MAX_SIZE_TEST") or inputs.get("SIZE") or WIDEST)
    else:
        sizes = ("img_size", "patch_size", "embed_dim", "depth")
        encoder |= {key: load_yaml(given[f"model.{key}"]) for key in sizes if f"model.{key}" in given}
        image = _by(encoder["img_size"])
    return ModelSizes(task, crop, image, encoder["patch_size"], encoder["embed_dim"], encoder["depth"])


def describe_presets() -> str:
    """List image sizes and encoders of all presets, for the help."""
    texts = []
    for name, preset in PRESETS.items():
        detect, classify = sizes_of(preset, "detect"), sizes_of(preset, "classify")
        encoder = f"encoder of width {detect.width} and depth {detect.depth}"
        texts.append(f"{name}: images of {classify.image} pixels (classes) or {detect.image} (detection), {encoder}")
    return "; ".join(texts)


def _by(size: int | Sequence[int]) -> str:
    height, width = (size, size) if isinstance(size, int) else size
    return f"{height} x {width}"


def _read_with_bases(path: Path) -> dict[str, Any]:
    """Read a config of the detector, merged over its `_BASE_` files."""
    values = read_yaml(path)
    base = values.pop("_BASE_", None)
    return _merged(_read_with_bases(path.parent / base), values) if base else values


def _merged(base: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    both = {
        key: _merged(base[key], value)
        for key, value in values.items()
        if isinstance(value, dict) and isinstance(base.get(key), dict)
    }
    return base | values | both
