"""Proves that figures show the pixels and weights they were given, pixel by pixel, and that no text leaves the page."""

from __future__ import annotations

import io

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image
from torch import Tensor

from crossmae.models.crossmae import CrossMAE
from crossmae.pretraining.figures import (
    BLANK,
    fused_map_names,
    fusion_figure,
    image_figure,
    panel_rows,
    reconstruction_figure,
    to_display,
    whole_scale,
)
from crossmae.pretraining.reconstruction import Panels
from crossmae.reports.figures import DPI

LONG = "a_file_name_of_$many$_letters_" * 4 + ".jpg"
ROWS = ["input", "masked", "reconstruction", "pasted"]


def make_panels(images: int, channels: int, height: int, width: int) -> Panels:
    torch.manual_seed(0)
    given, predicted = torch.rand(2, images, channels, height, width)
    hidden = torch.rand(images, 1, height // 8, width // 8) < 0.75
    hidden = hidden.repeat_interleave(8, 2).repeat_interleave(8, 3)
    return Panels(given, torch.where(hidden, predicted, given), hidden, norm_pix_loss=True)


def labels(figure: Figure) -> list[Text]:
    """Every visible text of a drawn figure."""
    found = figure.findobj(Text)
    return [text for text in found if text.get_text() and text.get_visible()]  # type: ignore[attr-defined]


def check_layout(figure: Figure) -> None:
    """No text leaves the page or lies over another."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    boxes = [(text.get_text(), text.get_window_extent()) for text in labels(figure)]
    page = figure.bbox
    for text, box in boxes:
        assert box.x0 >= page.x0, text
        assert box.x1 <= page.x1, text
        assert box.y0 >= page.y0, text
        assert box.y1 <= page.y1, text
    for index, (text, box) in enumerate(boxes):
        for other, its_box in boxes[index + 1 :]:
            assert not box.overlaps(its_box), (text, other)


def test_display_of_channels() -> None:
    pixels = torch.rand(2, 6, 3, 5)
    assert torch.equal(to_display(pixels[:, :1]), pixels[:, :1].repeat(1, 3, 1, 1))
    two = to_display(pixels[:, :2])
    assert torch.equal(two[:, :2], pixels[:, :2])
    assert not two[:, 2].any()
    assert torch.equal(to_display(pixels[:, :3]), pixels[:, :3])
    assert torch.equal(to_display(pixels), pixels[:, :3])


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_masked_and_reconstruction_are_the_two_parts_of_pasted(channels: int) -> None:
    panels = make_panels(2, channels, 16, 24)
    rows = panel_rows(panels)
    assert list(rows) == ROWS
    hidden = panels.hidden.expand(-1, 3, -1, -1)
    assert torch.equal(rows["masked"][~hidden], rows["input"][~hidden])
    assert torch.equal(rows["reconstruction"][hidden], rows["pasted"][hidden])
    assert (rows["masked"][hidden] == BLANK).all()
    assert (rows["reconstruction"][~hidden] == BLANK).all()


def drawn_panels(figure: Figure) -> list[np.ndarray]:
    """The pixels (height, width, 3) of every panel of a figure as saved, without the hairline around it."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=DPI)
    page = np.asarray(Image.open(file).convert("RGB")).astype(int)
    boxes = [axis.get_window_extent().extents.round().astype(int) for axis in figure.axes]
    return [page[len(page) - y1 + 2 : len(page) - y0 - 2, x0 + 2 : x1 - 2] for x0, y0, x1, y1 in boxes]


def enlarged(pixels: Tensor, scale: int) -> np.ndarray:
    """(3, H, W) pixels as `drawn_panels` should give them."""
    array = (pixels * 255).round().byte().permute(1, 2, 0).numpy().astype(int)
    return array.repeat(scale, 0).repeat(scale, 1)[2:-2, 2:-2]


@pytest.mark.skipif(matplotlib.__version_info__ < (3, 11), reason="matplotlib 3.10 shifts some panels by a pixel")
def test_pictures_are_drawn_pixel_by_pixel() -> None:
    panels = make_panels(3, 3, 48, 80)
    rows = panel_rows(panels).values()
    sheet = drawn_panels(reconstruction_figure(panels, "title", ["a", "b", "c"]))
    for panel, picture in zip(sheet, [picture for row in rows for picture in row], strict=True):
        np.testing.assert_allclose(panel, enlarged(picture, 2), atol=1)
    single = drawn_panels(image_figure(panels.one(1), "title", "text"))
    for panel, row in zip(single, rows, strict=True):
        np.testing.assert_allclose(panel, enlarged(row[1], 4), atol=1)


@pytest.mark.parametrize(
    ("images", "channels", "height", "width"),
    [(1, 3, 32, 32), (8, 3, 128, 128), (3, 1, 64, 224), (4, 2, 256, 64), (2, 5, 448, 448)],
)
def test_text_stays_on_the_page(images: int, channels: int, height: int, width: int) -> None:
    panels = make_panels(images, channels, height, width)
    sheet = reconstruction_figure(panels, "step 123456, 75% of the patches masked", ["PSNR 12.3 dB"] * images)
    check_layout(sheet)
    texts = [text.get_text() for text in labels(sheet)]
    assert [text for text in texts if text in ROWS] == ROWS
    single = image_figure(panels.one(0), LONG, "75% of the patches masked. PSNR 12.3 dB on them, 13.5 dB on the whole.")
    check_layout(single)
    words = " ".join(text.get_text() for text in labels(single))
    assert "norm_pix_loss" in words
    assert ("channels 1-3 of 5" in words) is (channels == 5)
    assert LONG in words.replace(" ", "")


def test_scales_are_whole_or_shrink() -> None:
    assert whole_scale(32, 32, 256) == 8
    assert whole_scale(224, 64, 256) == 1
    assert whole_scale(300, 300, 256) == 1
    assert whole_scale(512, 1024, 256) == 0.25


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        ({}, ["input", "0", "1", "2"]),
        ({"fuse_input": False}, ["0", "1", "2"]),
        ({"fuse_blocks": (-1, 0)}, ["input", "0", "2"]),
        ({"fuse_blocks": ()}, []),
        ({"decoder": "self"}, []),
    ],
)
def test_names_of_fused_maps(arguments: dict[str, object], names: list[str]) -> None:
    model = CrossMAE(16, 4, 3, 16, 3, 2, 16, 2, 2, **arguments)  # type: ignore[arg-type]
    assert fused_map_names(model) == names
    assert not names or model.wfm.linear.weight.shape == (2, len(names))


@pytest.mark.parametrize(("blocks", "maps"), [(1, 1), (4, 7), (12, 13), (12, 33)])
def test_fusion_weights(blocks: int, maps: int) -> None:
    torch.manual_seed(0)
    weights = torch.randn(blocks, maps)
    names = ["input", *map(str, range(maps - 1))]
    figure = fusion_figure(weights, names, "fusion weights, step 123456")
    check_layout(figure)
    axis = figure.axes[0]
    image = axis.images[0]
    np.testing.assert_array_equal(np.asarray(image.get_array()), weights.numpy())
    assert -image.norm.vmin == image.norm.vmax == pytest.approx(weights.abs().max().item())
    assert [label.get_text() for label in axis.get_xticklabels()] == names
    assert (axis.get_xlabel(), axis.get_ylabel()) == ("encoder map", "decoder block")
    if maps <= 26:
        cells = {(int(y), int(x)): float(text.get_text()) for text in axis.texts for x, y in [text.get_position()]}
        assert all(abs(cells[row, column] - weights[row, column]) <= 0.0051 for row, column in np.ndindex(blocks, maps))
    else:
        assert not axis.texts


def test_fusion_weights_of_zero() -> None:
    check_layout(fusion_figure(torch.zeros(2, 3), ["input", "0", "1"], "zero"))
