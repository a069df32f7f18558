"""Animated pictures of an image that vanishes behind a growing mask."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import matplotlib
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from crossmae.pretraining.figures import panel_rows, whole_scale
from crossmae.pretraining.reconstruction import Panels

PANEL = 244  # pixels that the longer side of a panel should have, about: two and their margins make 512
MARGIN, TEXT = 12, 15  # pixels
FRAME_MS, END_MS = 240, 1000  # how long a frame, and the first and the last one, stay


def animation_frame(panels: Panels, mask_ratio: float, psnr: float) -> Image.Image:
    """What the encoder saw of the one image of `panels`, beside the pasted reconstruction; below, the ratio and the
    PSNR.

    Args:
        psnr: of masked patches, in dB.
    """
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
    draw.text((width - MARGIN, base), f"PSNR {psnr:.1f} dB", "black", font, anchor="rs")
    bar = frame.height - 12
    draw.rectangle((MARGIN, bar, width - MARGIN, bar + 3), "#e3e3e3")
    draw.rectangle((MARGIN, bar, MARGIN + round((width - 2 * MARGIN) * mask_ratio), bar + 3), "#3b6fb6")
    return frame


def save_gif(frames: Sequence[Image.Image], path: Path) -> None:
    """Write frames as a GIF that plays forth and back, for ever, and rests at both ends.

    All frames share one palette, made of all of them, and are not dithered: still parts of the picture stay still.
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
    """(3, H, W) pixels in 0-1 as an image of about `PANEL` pixels."""
    array = (pixels * 255).round().byte().permute(1, 2, 0).cpu().numpy()
    height, width, _ = array.shape
    scale = whole_scale(height, width, PANEL)
    size = round(width * scale), round(height * scale)
    return Image.fromarray(array).resize(size, Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.LANCZOS)


@cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    """The font of the other figures, which travels with matplotlib."""
    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf", size)
