"""Pictures of a pretraining model's input, reconstructions and fusion weights.

Images are enlarged by integer factors, so that patch borders stay sharp. Save figures with their own resolution, `DPI`.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from torch import Tensor

from crossmae.models.crossmae import CrossMAE
from crossmae.pretraining.reconstruction import Panels
from crossmae.reports.figures import DPI

DARK = 0.25  # pictures are brightened if their brightest pixel is below this
BLANK = 0.88  # grey value of patches that are not shown
SHEET_CELL, IMAGE_CELL = 176, 288  # approximate longer side of a panel, in pixels
MARGIN, GAP = 18, 8  # pixels around and between panels
LINE, LABEL = 22, 118  # pixels: height of a text line, length of the longest label
TEXT, SMALL = 9.0, 7.5  # points
VALUES_UP_TO = 26  # largest number of columns for which numbers fit into the cells of a heat map
NORM_PIX_NOTE = "Each predicted patch is given the true patch's mean and deviation (norm_pix_loss)."


def to_display(pixels: Tensor) -> Tensor:
    """Convert pixels (B, C, H, W) to RGB (B, 3, H, W).

    One channel is shown as grayscale, two channels as red and green. Of more channels, the first three are shown.
    """
    B, C, H, W = pixels.shape
    if C == 1:
        return pixels.expand(B, 3, H, W)
    if C == 2:
        return torch.cat([pixels, pixels.new_zeros(B, 1, H, W)], dim=1)
    return pixels[:, :3]


def shown_channels(channels: int) -> str:
    """Describe the channels that `to_display` shows, "" if obvious."""
    if channels == 2:
        return "channels 1 and 2 as red and green"
    return f"channels 1-3 of {channels}" if channels > 3 else ""


def panel_rows(panels: Panels) -> dict[str, Tensor]:
    """Compose the four pictures (B, 3, H, W) of each image.

    "masked" shows the visible patches, and "reconstruction" shows the predicted patches. "pasted" shows both.
    """
    factor = brightening(panels)
    given, pasted = (to_display((pixels * factor).clamp(0, 1)) for pixels in (panels.input, panels.pasted))
    return {
        "input": given,
        "masked": given.masked_fill(panels.hidden, BLANK),
        "reconstruction": pasted.masked_fill(~panels.hidden, BLANK),
        "pasted": pasted,
    }


def brightening(panels: Panels) -> float:
    """Return the brightness factor, above 1 for dark (12-bit) images."""
    brightest = float(panels.input.max())
    return 1 / brightest if 0 < brightest < DARK else 1.0


def reconstruction_figure(panels: Panels, title: str, captions: Sequence[str] = ()) -> Figure:
    """Draw one column per image: input, masked, reconstruction, pasted."""
    rows = panel_rows(panels)
    pictures = list(rows.values())
    figure, axes = _grid(pictures, title, _notes(panels), SHEET_CELL, row_labels=True, captions=bool(captions))
    upright = axes[0][0].bbox.height >= LABEL
    for row, label in zip(axes, rows, strict=True):
        side: dict[str, Any] = {} if upright else {"rotation": 0, "ha": "right", "va": "center"}
        row[0].set_ylabel(label, fontsize=TEXT, **side)
    for axis, caption in zip(axes[-1], captions, strict=False):
        axis.set_xlabel(caption, fontsize=SMALL)
    return figure


def image_figure(panels: Panels, title: str, caption: str) -> Figure:
    """Draw a single image as one row: input, masked, reconstruction, pasted."""
    rows = panel_rows(panels)
    pictures = [torch.cat(list(rows.values()))]
    notes = [caption, *_notes(panels)]
    figure, axes = _grid(pictures, title, notes, IMAGE_CELL, column_labels=True)
    for axis, label in zip(axes[0], rows, strict=True):
        axis.set_title(label, fontsize=TEXT, pad=4)
    return figure


def fusion_figure(weights: Tensor, map_names: Sequence[str], title: str) -> Figure:
    """Draw the learned mixing weights: negative blue, positive red.

    Args:
        weights: (N, K), one row per decoder block: `model.wfm.linear.weight`.
    """
    values = weights.detach().float().cpu().numpy()
    N, K = values.shape
    cell_w = 50 if K <= VALUES_UP_TO else 30
    cell_h = max(cell_w, LABEL // N)
    width, height = max(cell_w * K + 150, 420), cell_h * N + 130
    left, bottom = (width - cell_w * K - 10) // 2, 70
    figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI)
    axis = figure.add_axes((left / width, bottom / height, cell_w * K / width, cell_h * N / height))
    top = float(np.abs(values).max()) or 1.0
    image = axis.imshow(values, cmap="RdBu_r", norm=Normalize(-top, top), aspect="auto")
    axis.set_xlabel("encoder map", fontsize=TEXT)
    axis.set_ylabel("decoder block", fontsize=TEXT)
    axis.set_yticks(range(N))
    axis.set_xticks(range(K), map_names, rotation=90 if K > VALUES_UP_TO else 0)
    if K <= VALUES_UP_TO:
        for (row, column), value in np.ndenumerate(values):
            color = "white" if abs(value) > 0.6 * top else "black"
            shown = f"{round(float(value), 2) + 0.0:.2f}"  # + 0.0 avoids "-0.00"
            axis.text(column, row, shown, ha="center", va="center", fontsize=6.5, color=color)
    scale = figure.add_axes(((left + cell_w * K + 14) / width, bottom / height, 12 / width, cell_h * N / height))
    figure.colorbar(image, cax=scale)
    for part in (axis, scale):
        part.spines[:].set_visible(False)
        part.tick_params(labelsize=SMALL, length=0)
    _lines(figure, _wrap(title, width, TEXT + 1), height - MARGIN + 4, TEXT + 1, 20)
    return figure


def fused_map_names(model: CrossMAE) -> list[str]:
    """Name the encoder maps that are mixed: "input" and block indices."""
    return [*(["input"] if model.fuse_input else []), *map(str, model.fused_blocks)]


def whole_scale(height: int, width: int, target: int) -> float:
    """Compute a scale to about `target` pixels, an integer if enlarging."""
    side = max(height, width)
    return target / side if side > 1.5 * target else max(round(target / side), 1)


def _notes(panels: Panels) -> list[str]:
    shown = shown_channels(panels.input.shape[1])
    factor = brightening(panels)
    bright = [f"Shown {factor:.3g} times as bright; PSNR is of pixels as they are, peak 1."] if factor != 1 else []
    return [*([f"Shown: {shown}."] if shown else []), *bright, *([NORM_PIX_NOTE] if panels.norm_pix_loss else [])]


def _grid(
    pictures: list[Tensor],
    title: str,
    notes: Sequence[str],
    target: int,
    row_labels: bool = False,
    column_labels: bool = False,
    captions: bool = False,
) -> tuple[Figure, list[list[Axes]]]:
    """Arrange rows of pictures (columns, 3, H, W) at whole pixels."""
    columns, _, H, W = pictures[0].shape
    scale = whole_scale(H, W, target)
    cell_w, cell_h = round(W * scale), round(H * scale)
    pitch = max(cell_w, LABEL if column_labels or captions else 0) + GAP
    left = MARGIN + (0 if not row_labels else LINE if cell_h >= LABEL else LABEL)
    width = max(left + columns * pitch - GAP + MARGIN, 420)
    heading, below = _wrap(title, width, TEXT + 1), [line for note in notes for line in _wrap(note, width, SMALL)]
    top = MARGIN + LINE * len(heading) + (24 if column_labels else 8)
    bottom = MARGIN + 17 * len(below) + (24 if captions else 0) + (6 if below else 0)
    height = top + len(pictures) * (cell_h + GAP) - GAP + bottom

    figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI)
    start = left + (width - left - MARGIN - columns * pitch + GAP) // 2 + (pitch - GAP - cell_w) // 2
    axes: list[list[Axes]] = []
    for index, row in enumerate(pictures):
        y = (height - top - index * (cell_h + GAP) - cell_h) / height
        places = [((start + column * pitch) / width, y) for column in range(columns)]
        axes.append([figure.add_axes((*place, cell_w / width, cell_h / height)) for place in places])
        for axis, picture in zip(axes[-1], row, strict=True):
            _show(axis, picture, enlarged=scale >= 1)
    _lines(figure, heading, height - MARGIN + 4, TEXT + 1, LINE)
    _lines(figure, below, MARGIN - 6 + 17 * len(below), SMALL, 17, color="0.35")
    return figure, axes


def _show(axis: Axes, picture: Tensor, enlarged: bool) -> None:
    # Without this setting, matplotlib would smooth panels with a width such as 159.99999999 pixels.
    interpolation = "nearest" if enlarged else "hanning"
    axis.imshow(picture.permute(1, 2, 0).cpu().numpy(), interpolation=interpolation, aspect="auto")
    axis.set(xticks=[], yticks=[])
    axis.spines[:].set(linewidth=0.5, color="0.6")


def _wrap(text: str, width: int, points: float) -> list[str]:
    # The width of a character is about 0.56 of the font size.
    return textwrap.wrap(text, int((width - 2 * MARGIN) / (points * DPI / 72 * 0.56)))


def _lines(figure: Figure, lines: Sequence[str], top: int, points: float, step: int, color: str = "black") -> None:
    height = figure.get_figheight() * DPI
    for index, line in enumerate(lines):
        y = (top - index * step) / height
        figure.text(0.5, y, line, ha="center", va="top", fontsize=points, color=color, parse_math=False)
