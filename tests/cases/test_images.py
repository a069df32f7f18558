"""Proves that the images of ../shared/cases are read right, or refused in one line that says what to do."""

from __future__ import annotations

import os
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from crossmae.data.broken import find_broken
from crossmae.data.images import decode_image
from crossmae.data.sources import open_source
from crossmae.errors import UserError
from tests.cases.conftest import Tool, Written
from tools import check_coco

UPRIGHT, TURNED = (48, 64), (64, 48)

# The case, the number of channels, and the shape of every image, or a pattern of the errors of its bad files.
READ: list[tuple[str, int, tuple[int, int] | str]] = [
    ("png_text", 3, (48, 48)),
    ("exif_rational", 3, TURNED),
    ("exif_two", 3, TURNED),
    ("exif_ascii_as_long", 3, TURNED),
    ("exif_cut", 3, TURNED),
    ("exif_double", 3, TURNED),
    ("exif_orient_bad", 3, UPRIGHT),
    ("exif_garbage", 3, UPRIGHT),
    ("one_pixel", 3, (1, 1)),
    ("huge", 3, r"huge\.png: has 14000 x 14000 = 196,000,000 pixels, data\.max_pixels is .* Raise data\.max_pixels"),
    ("tiff_3pages_8", 3, (48, 48)),
    ("tiff_3pages_8", 1, (48, 48)),
    ("tiff_3pages_16", 3, (48, 48)),
    ("tiff_3pages_f32", 3, (48, 48)),
    ("tiff_2pages_16", 2, (48, 48)),
    ("tiff_2pages_16", 4, r"has 1 channel, model\.in_chans is 4: it holds 2 pages .* set model\.in_chans=2"),
    ("ome_zc", 2, (48, 40)),
    ("ome_zc", 3, r"has 2 channels, model\.in_chans is 3: it holds 4 slices .*\(axes ZCYX\).* set model\.in_chans=2"),
    ("imagej_tc", 2, (48, 40)),
    ("imagej_tc", 40, r"has 2 channels, model\.in_chans is 40: it holds 4 times .*\(axes TCYX\)"),
    ("ome_z_equal", 1, (48, 40)),
    ("ome_z_equal", 4, r"has 1 channel, .* If the slices are channels, save the file with C in place of Z"),
    ("tiff_nan", 1, r"nan\.tif: 6\.25% of its samples are NaN or infinite, which marks missing data\. Fill them"),
    (
        "tiff_reflect",
        6,
        r"samples from .* to 99.*Rescale them to 0-1: they look like reflectance .* divide by 10,000",
    ),
    ("tiff_4sep_16", 4, (48, 48)),
    ("tiff_4sep_16", 3, r"has 4 channels, model\.in_chans is 3\. Convert it, or set model\.in_chans=4"),
    ("tiff_lzw_pred", 1, (48, 48)),
    ("tiff_series", 2, (48, 48)),
    ("cmyk", 3, (48, 48)),
    ("prog", 3, (48, 48)),
    ("pal_trans", 3, (48, 48)),
    ("png16_rgba", 4, (48, 48)),
    ("pgm16", 1, (48, 48)),
    ("bigtiff", 3, (48, 48)),
    ("jpeg_tail", 3, (48, 48)),
    ("jpeg_middle", 3, r"hole\.jpg: cannot be read as an image: its data end early"),
]


@pytest.mark.parametrize(("case", "channels", "expected"), READ)
def test_what_is_read(case: str, channels: int, expected: tuple[int, int] | str, written: Written) -> None:
    folder = written("pretraining/images.py") / case
    bad = [path for path in sorted(folder.iterdir()) if not path.name.startswith("good")]
    assert bad
    for path in bad:
        data = path.read_bytes()
        if isinstance(expected, str) and (case != "tiff_nan" or path.name == "nan.tif"):
            with pytest.raises(UserError) as caught:
                decode_image(data, str(path), channels, 16)
            assert re.search(expected, str(caught.value)), caught.value
        else:
            pixels = np.asarray(decode_image(data, str(path), channels, 16))
            assert expected == pixels.shape[:2] or isinstance(expected, str)
            assert pixels.std() > 0 or pixels.size == 3


def test_three_pages_are_three_channels(written: Written) -> None:
    tifffile = pytest.importorskip("tifffile")
    for case, top in (("tiff_3pages_8", 255), ("tiff_3pages_16", 65535), ("tiff_3pages_f32", 1)):
        path = written("pretraining/images.py") / case / "0.tif"
        pages = np.moveaxis(tifffile.imread(path), 0, -1)
        np.testing.assert_allclose(decode_image(path.read_bytes(), "x", 3, 16), pages / top, atol=1e-6)


@pytest.mark.parametrize(("case", "count"), [("huge", 1), ("png_text", 0), ("jpeg_tail", 0), ("tiff_nan", 1)])
def test_what_the_check_before_a_run_finds(case: str, count: int, written: Written) -> None:
    source = open_source(written("pretraining/images.py") / case, "data.train")
    assert len(find_broken(source, range(len(source)))) == count


@pytest.mark.parametrize(
    ("case", "code", "pattern"),
    [
        ("png_long_text", 0, "no faults"),
        ("png_long_profile", 0, "no faults"),
        pytest.param(
            "bomb",
            1,
            r"too-large-image .*\n.*\n.*1\.png: has 20000 x 10000 = 200,000,000 pixels, INPUT\.MAX_PIXELS",
            marks=pytest.mark.slow,  # writing it takes 10 seconds
        ),
    ],
)
def test_what_the_checker_of_detection_says(case: str, code: int, pattern: str, written: Written, tool: Tool) -> None:
    folder = written("detection/generate.py", case) / case
    found, output = tool(check_coco.main, folder / "coco.json", folder / "images", "--evaluation")
    assert found == code, output
    assert re.search(pattern, output), output


def test_pipes_are_no_images(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "1.png")
    os.mkfifo(tmp_path / "2.png")
    (tmp_path / "3.png").symlink_to("/dev/zero")
    assert len(open_source(tmp_path, "data.train")) == 1
