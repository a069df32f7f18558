"""Reconstructions of image files: pictures, animations and PSNR in one folder.

    OUTPUT/overview-1.png ...       eight images per sheet
    OUTPUT/grids/NAME.png           input, masked, reconstruction, pasted
    OUTPUT/animations/NAME.gif      masked and pasted with growing mask ratios
    OUTPUT/psnr.json                written last: if this file exists, all other files are complete

The mask of an image depends only on the seed and on the bytes of the image file.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache, partial
from itertools import chain, count
from pathlib import Path

import matplotlib
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from crossmae.checkpoints.pretrained import Pretrained
from crossmae.data.images import IMAGE_LIMITS, ImageLimits
from crossmae.data.parallel import Progress
from crossmae.data.pixels import Normalize, centre_view, decode_pixels, to_unit_range
from crossmae.errors import UserError, printable
from crossmae.files import make_folder, read_file, write_atomically, write_json
from crossmae.models.crossmae import CrossMAE
from crossmae.pretraining.figures import image_figure, panel_rows, reconstruction_figure, whole_scale
from crossmae.pretraining.reconstruction import Panels, psnr, reconstruct
from crossmae.reports.figures import save_figure

SHEET = 8  # images per overview and per batch
GIF_RATIOS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
OVERVIEW, GRIDS, ANIMATIONS, NUMBERS = "overview-{}.png", "grids", "animations", "psnr.json"

PANEL = 244  # approximate longer side of an animated panel, in pixels; two panels and margins make 512
MARGIN, TEXT = 12, 15  # pixels
FRAME_MS, END_MS = 240, 1000  # milliseconds of a frame, and of the first and last frame


@dataclass(frozen=True)
class Result:
    """PSNR of one image in dB, over the masked patches and over the whole pasted image."""

    image: str
    name: str
    psnr_masked: float
    psnr_pasted: float


def output_names(paths: Sequence[Path]) -> list[str]:
    """Name each image uniquely: by stem, by folder and stem, or numbered."""
    names: list[str] = []
    taken: set[str] = set()
    for path in paths:
        numbered = (f"{path.stem}-{number}" for number in count(2))
        candidates = chain([path.stem, f"{path.absolute().parent.name}-{path.stem}"], numbered)
        names.append(next(name for name in candidates if name.casefold() not in taken))
        taken.add(names[-1].casefold())  # some file systems ignore upper and lower case
    return names


def possible_ratios(model: CrossMAE) -> list[float]:
    """List the `GIF_RATIOS` that leave visible and masked patches."""
    return [ratio for ratio in GIF_RATIOS if _is_possible(model, ratio)]


def load_images(
    paths: Sequence[Path], pretrained: Pretrained, seed: int, limits: ImageLimits = IMAGE_LIMITS
) -> tuple[Tensor, Tensor]:
    """Load pixels (B, C, H, W) and mask noise (B, L)."""
    model = pretrained.model
    pixels, noise = [], []
    for path in paths:
        data = read_file(path)
        decoded = decode_pixels(data, str(path), model.in_chans, pretrained.bit_depth, limits)
        pixels.append(to_unit_range(centre_view(decoded, model.img_size)))
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
    limits: ImageLimits = IMAGE_LIMITS,
) -> list[Result]:
    """Reconstruct every image, and write all pictures and numbers.

    Args:
        gif_ratios: mask ratios of the animation, ascending; empty: no animations.

    Raises:
        UserError: If a ratio is impossible, an image is unreadable, or files would be overwritten without `force`.
            Nothing has been written then.
    """
    model = pretrained.model
    for ratio in (mask_ratio, *gif_ratios):
        if not _is_possible(model, ratio):
            raise UserError(
                f"mask ratio {ratio}: leaves no patch of {model.num_patches} to see or none to predict. "
                "Give a number between 0 and 1."
            )
    names = output_names(paths)
    _refuse_to_overwrite(output, names, bool(gif_ratios), force)
    for path in Progress(paths, "read images", leave=False, unit="image"):
        load_images([path], pretrained, seed, limits)
    for folder in (output, output / GRIDS, *([output / ANIMATIONS] if gif_ratios else [])):
        make_folder(folder, "--output")
    device = model.cls_token.device
    normalize = Normalize(pretrained.mean, pretrained.std, device)
    results: list[Result] = []
    for start in Progress(range(0, len(paths), SHEET), "reconstruct", unit="sheet"):
        own = slice(start, start + SHEET)
        pixels, noise = (tensor.to(device) for tensor in load_images(paths[own], pretrained, seed, limits))
        panels = reconstruct(model, pixels, mask_ratio, noise, normalize).cpu()
        results += _write_sheet(output, start // SHEET + 1, panels, paths[own], names[own], mask_ratio)
        frames: list[list[Image.Image]] = [[] for _ in paths[own]]
        for ratio in gif_ratios:  # the noise is the same for every ratio, so visible patches only disappear
            panels = reconstruct(model, pixels, ratio, noise, normalize).cpu()
            for index, (its_frames, value) in enumerate(zip(frames, psnr(panels)[0].tolist(), strict=True)):
                its_frames.append(animation_frame(panels.one(index), ratio, value))
        for name, its_frames in zip(names[own], frames, strict=True):
            if its_frames:
                write_atomically(output / ANIMATIONS / f"{name}.gif", partial(save_gif, its_frames))
    _write_numbers(output / NUMBERS, pretrained, results, mask_ratio, seed)
    return results


def _write_sheet(
    output: Path, sheet: int, panels: Panels, paths: Sequence[Path], names: Sequence[str], mask_ratio: float
) -> list[Result]:
    masked, pasted = (values.tolist() for values in psnr(panels))
    share = f"{100 * mask_ratio:g}% of the patches masked"
    captions = [f"PSNR {value:.1f} dB" for value in masked]
    figure = reconstruction_figure(panels, f"{share}; PSNR of masked patches", captions)
    save_figure(figure, output / OVERVIEW.format(sheet))
    for index, name in enumerate(names):
        caption = f"{share}. PSNR {masked[index]:.1f} dB on them, {pasted[index]:.1f} dB on the whole pasted image."
        figure = image_figure(panels.one(index), printable(paths[index].name), caption)
        save_figure(figure, output / GRIDS / f"{name}.png")
    return [Result(*row) for row in zip(map(str, paths), names, masked, pasted, strict=True)]


def animation_frame(panels: Panels, mask_ratio: float, decibels: float) -> Image.Image:
    """Draw the masked image, its reconstruction, the ratio and the PSNR."""
    rows = panel_rows(panels)
    left, right = (_picture(rows[name][0]) for name in ("masked", "pasted"))
    width = max(2 * left.width + 3 * MARGIN, 2 * PANEL + 2 * MARGIN)
    header, footer = MARGIN + TEXT + 6, TEXT + 26
    frame = Image.new("RGB", (width, header + left.height + footer), "white")
    draw, font = ImageDraw.Draw(frame), _font(TEXT)
    start = (width - 2 * left.width - MARGIN) // 2
    for x, picture, label in ((start, left, "masked"), (start + left.width + MARGIN, right, "pasted")):
        frame.paste(picture, (x, header))
        draw.text((x + picture.width / 2, header - 6), label, "black", font, anchor="ms")
    base = header + left.height + TEXT + 6
    draw.text((MARGIN, base), f"{100 * mask_ratio:g}% of patches masked", "black", font, anchor="ls")
    draw.text((width - MARGIN, base), f"PSNR {decibels:.1f} dB", "black", font, anchor="rs")
    bar = frame.height - 12
    draw.rectangle((MARGIN, bar, width - MARGIN, bar + 3), "#e3e3e3")
    draw.rectangle((MARGIN, bar, MARGIN + round((width - 2 * MARGIN) * mask_ratio), bar + 3), "#3b6fb6")
    return frame


def save_gif(frames: Sequence[Image.Image], path: Path) -> None:
    """Write a GIF that plays forward and backward.

    All frames share one palette and are not dithered, so that parts without motion do not flicker.
    """
    montage = Image.new("RGB", (frames[0].width, frames[0].height * len(frames)))
    for index, frame in enumerate(frames):
        montage.paste(frame, (0, index * frame.height))
    palette = montage.quantize(256, Image.Quantize.MEDIANCUT)
    still = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    loop = [*still, *still[-2:0:-1]]
    durations = [FRAME_MS] * len(loop)
    durations[0] = durations[len(still) - 1] = END_MS
    loop[0].save(path, "GIF", save_all=True, append_images=loop[1:], duration=durations, loop=0, optimize=False)


def _picture(pixels: Tensor) -> Image.Image:
    """Convert pixels (3, H, W) to an image of about `PANEL` pixels."""
    array = (pixels * 255).round().byte().permute(1, 2, 0).cpu().numpy()
    height, width, _ = array.shape
    scale = whole_scale(height, width, PANEL)
    size = round(width * scale), round(height * scale)
    return Image.fromarray(array).resize(size, Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.LANCZOS)


@cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf", size)


def mean_psnr(values: Sequence[float]) -> float | None:
    """Average the finite values in dB, or return None without any."""
    finite = [value for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else None


def _is_possible(model: CrossMAE, ratio: float) -> bool:
    try:
        counts = model.patch_counts(ratio, ratio)
    except ValueError:
        return False
    return min(counts.visible, counts.predicted) > 0


def _refuse_to_overwrite(output: Path, names: Sequence[str], animated: bool, force: bool) -> None:
    sheets = range(1, math.ceil(len(names) / SHEET) + 1)
    planned = [output / OVERVIEW.format(sheet) for sheet in sheets] + [output / NUMBERS]
    planned += [output / GRIDS / f"{name}.png" for name in names]
    planned += [output / ANIMATIONS / f"{name}.gif" for name in names if animated]
    there = [path for path in planned if path.exists()]
    if there and not force:
        raise UserError(
            f"--output: {len(there)} of {len(planned)} output files already exist, for example {there[0]}. "
            "Choose another folder, or pass --force to overwrite."
        )


def _write_numbers(path: Path, pretrained: Pretrained, results: Sequence[Result], mask_ratio: float, seed: int) -> None:
    model = pretrained.model
    infinite = (math.inf, -math.inf)
    rows = [{key: None if value in infinite else value for key, value in asdict(one).items()} for one in results]
    record = {
        "weights": str(pretrained.path),
        "img_size": list(model.img_size),
        "norm_pix_loss": model.norm_pix_loss,
        "assumed": list(pretrained.assumed),
        "mask_ratio": mask_ratio,
        "seed": seed,
        "mean": {key: mean_psnr([getattr(one, key) for one in results]) for key in ("psnr_masked", "psnr_pasted")},
        "images": rows,
    }
    write_json(path, record)
