"""Reconstructions of image files, as pictures, animations and numbers in one folder.

    OUTPUT/overview-1.png ...       eight images a sheet
    OUTPUT/grids/NAME.png           input, masked, reconstruction, pasted
    OUTPUT/animations/NAME.gif      masked and pasted over growing mask ratios
    OUTPUT/psnr.json                written last, so that its presence says that the rest is complete

The mask of an image depends on the seed and on the bytes of its file, not on its name nor on the other images.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import chain, count
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as VF
from tqdm import tqdm

from crossmae.checkpoints.pretrained import Pretrained
from crossmae.data.training_images import centre_view, decode_pixels, to_unit_range
from crossmae.errors import UserError
from crossmae.files import make_folder, printable, write_atomically, write_json
from crossmae.models.crossmae import CrossMAE
from crossmae.pretraining.animation import animation_frame, save_gif
from crossmae.pretraining.figures import image_figure, reconstruction_figure
from crossmae.pretraining.reconstruction import Panels, psnr, reconstruct
from crossmae.reports.figures import save_figure

SHEET = 8  # images on one overview, and in one batch
GIF_RATIOS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
OVERVIEW, GRIDS, ANIMATIONS, NUMBERS = "overview-{}.png", "grids", "animations", "psnr.json"


@dataclass(frozen=True)
class Result:
    """PSNR in dB of one image, over its masked patches and over the pasted whole; infinite for a perfect match."""

    image: str
    name: str
    psnr_masked: float
    psnr_pasted: float


def output_names(paths: Sequence[Path]) -> list[str]:
    """A name for each image: its stem, where that is taken with its folder's name before it, else numbered."""
    names: list[str] = []
    taken: set[str] = set()
    for path in paths:
        numbered = (f"{path.stem}-{number}" for number in count(2))
        candidates = chain([path.stem, f"{path.absolute().parent.name}-{path.stem}"], numbered)
        names.append(next(name for name in candidates if name.casefold() not in taken))
        taken.add(names[-1].casefold())  # some file systems do not tell cases apart
    return names


def possible_ratios(model: CrossMAE) -> list[float]:
    """Those of `GIF_RATIOS` that leave at least one patch of the model's grid visible and one masked."""
    return [ratio for ratio in GIF_RATIOS if min(_masked_counts(model, ratio)) > 0]


def load_images(paths: Sequence[Path], pretrained: Pretrained, seed: int) -> tuple[Tensor, Tensor]:
    """Pixels (B, C, H, W) in 0-1, resized and cropped to the model's size, and noise (B, L) for their masks.

    Raises:
        UserError: a file that can not be read, see `decode_image`.
    """
    model = pretrained.model
    size = (model.grid[0] * model.patch_size, model.grid[1] * model.patch_size)
    pixels, noise = [], []
    for path in paths:
        try:
            data = path.read_bytes()
        except OSError as error:
            raise UserError(f"{printable(path)}: can not be read: {error.strerror}") from None
        image = decode_pixels(data, str(path), model.in_chans, pretrained.bit_depth)
        pixels.append(to_unit_range(centre_view(image, size)))
        key = int.from_bytes(hashlib.sha256(data).digest()[:8], "big")
        noise.append(np.random.default_rng([seed, key]).random(model.num_patches, dtype=np.float32))
    return torch.stack(pixels), torch.from_numpy(np.stack(noise))


def write_gallery(
    pretrained: Pretrained,
    paths: Sequence[Path],
    output: Path,
    mask_ratio: float = 0.75,
    gif_ratios: Sequence[float] = (),
    seed: int = 0,
    force: bool = False,
) -> list[Result]:
    """Reconstruct every image and write all pictures; see the head of this module.

    Args:
        pretrained: its model stays on the device where it is.
        gif_ratios: mask ratios of the animation, ascending; none, no animations.
        force: overwrite what an earlier call wrote.

    Raises:
        UserError: an impossible ratio, an unreadable image, something to overwrite without `force`; nothing is written
            then.
    """
    for ratio in (mask_ratio, *gif_ratios):
        if min(_masked_counts(pretrained.model, ratio)) < 1:
            raise UserError(
                f"mask ratio {ratio}: leaves no patch of {pretrained.model.num_patches} to see or none to predict; "
                "it must be between 0 and 1"
            )
    names = output_names(paths)
    _refuse_to_overwrite(output, names, bool(gif_ratios), force)
    for path in tqdm(paths, "read images", leave=False, unit="img"):
        load_images([path], pretrained, seed)
    for folder in (output, output / GRIDS, *([output / ANIMATIONS] if gif_ratios else [])):
        make_folder(folder, "--output")
    results: list[Result] = []
    with tqdm(total=len(paths), desc="reconstruct", unit="img") as bar:
        for start in range(0, len(paths), SHEET):
            batch = Batch(pretrained, paths[start : start + SHEET], names[start : start + SHEET], seed)
            results += batch.write(output, start // SHEET + 1, mask_ratio)
            if gif_ratios:
                batch.animate(output / ANIMATIONS, gif_ratios)
            bar.update(len(batch.names))
    _write_numbers(output / NUMBERS, pretrained, results, mask_ratio, seed)
    return results


class Batch:
    """The images of one overview, reconstructed together."""

    def __init__(self, pretrained: Pretrained, paths: Sequence[Path], names: Sequence[str], seed: int) -> None:
        self.pretrained, self.paths, self.names = pretrained, paths, names
        pixels, noise = load_images(paths, pretrained, seed)
        device = pretrained.model.cls_token.device
        self.imgs = VF.normalize(pixels, list(pretrained.mean), list(pretrained.std)).to(device)
        self.noise = noise.to(device)

    def reconstruct(self, mask_ratio: float) -> tuple[Panels, list[float], list[float]]:
        """Panels on the CPU, and PSNR of masked patches and of the whole, per image."""
        model, mean, std = self.pretrained.model, self.pretrained.mean, self.pretrained.std
        panels = reconstruct(model, self.imgs, mask_ratio, self.noise, mean, std).cpu()
        quality = psnr(panels)
        return panels, quality.masked.tolist(), quality.pasted.tolist()

    def write(self, output: Path, sheet: int, mask_ratio: float) -> list[Result]:
        """Write the overview and one grid per image."""
        panels, masked, pasted = self.reconstruct(mask_ratio)
        share = f"{100 * mask_ratio:g}% of the patches masked"
        captions = [f"PSNR {value:.1f} dB" for value in masked]
        title = f"{share}; PSNR of masked patches"
        save_figure(reconstruction_figure(panels, title, captions), output / OVERVIEW.format(sheet))
        for index, name in enumerate(self.names):
            caption = f"{share}. PSNR {masked[index]:.1f} dB on them, {pasted[index]:.1f} dB on the whole pasted image."
            figure = image_figure(panels.one(index), printable(self.paths[index].name), caption)
            save_figure(figure, output / GRIDS / f"{name}.png")
        rows = zip(map(str, self.paths), self.names, masked, pasted, strict=True)
        return [Result(*row) for row in rows]

    def animate(self, folder: Path, ratios: Sequence[float]) -> None:
        """Write one animation per image; with the same noise at every ratio, what is visible only ever shrinks."""
        frames: list[list[Image.Image]] = [[] for _ in self.names]
        for ratio in ratios:
            panels, masked, _ = self.reconstruct(ratio)
            for index, own in enumerate(frames):
                own.append(animation_frame(panels.one(index), ratio, masked[index]))
        for name, own in zip(self.names, frames, strict=True):
            write_atomically(folder / f"{name}.gif", partial(save_gif, own))


def mean_psnr(values: Sequence[float]) -> float | None:
    """Mean in dB of the finite ones, None where there is none: one perfect match would hide all others."""
    finite = [value for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else None


def _masked_counts(model: CrossMAE, ratio: float) -> tuple[int, int]:
    """Patches that are visible and masked; (0, 0) where there is no such split."""
    try:
        counts = model.patch_counts(ratio, ratio)
    except ValueError:
        return 0, 0
    return counts.visible, counts.predicted


def _refuse_to_overwrite(output: Path, names: Sequence[str], animated: bool, force: bool) -> None:
    sheets = range(1, math.ceil(len(names) / SHEET) + 1)
    planned = [output / OVERVIEW.format(sheet) for sheet in sheets] + [output / NUMBERS]
    planned += [output / GRIDS / f"{name}.png" for name in names]
    planned += [output / ANIMATIONS / f"{name}.gif" for name in names if animated]
    there = [path for path in planned if path.exists()]
    if there and not force:
        raise UserError(
            f"--output: {there[0]} exists already ({len(there)} of {len(planned)} files to write do); "
            "name another folder, or overwrite with --force"
        )


def _write_numbers(path: Path, pretrained: Pretrained, results: Sequence[Result], mask_ratio: float, seed: int) -> None:
    model = pretrained.model
    mean = {key: mean_psnr([getattr(result, key) for result in results]) for key in ("psnr_masked", "psnr_pasted")}
    record = {
        "weights": str(pretrained.path),
        "img_size": [side * model.patch_size for side in model.grid],
        "norm_pix_loss": model.norm_pix_loss,
        "assumed": list(pretrained.assumed),
        "mask_ratio": mask_ratio,
        "seed": seed,
        "mean": mean,
        "images": [
            {key: None if value in (math.inf, -math.inf) else value for key, value in asdict(result).items()}
            for result in results
        ],
    }
    write_json(path, record)
