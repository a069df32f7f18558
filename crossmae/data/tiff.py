"""Read TIFF files by the axes of their images: which axis is channels, and which counts several images.

| axes                                         | result                                                        |
| -------------------------------------------- | ------------------------------------------------------------- |
| axes as written by tifffile                  | win over colours that the file declares                       |
| several images of different sizes            | the largest; previews, smaller levels and masks are left out   |
| S (samples), C (channels)                    | channels, stored first or last                                |
| pages without a name, as many as channels    | channels, which the log says                                  |
| Z, T, other pages                            | the first image, which the log says                           |
| two axes without a name that could be either | an error                                                      |
"""

from __future__ import annotations

import io
import logging
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, TiffImagePlugin

from crossmae.errors import import_extra

# Files that Pillow cannot read correctly have deep colour, many channels, pages, signed or floating-point samples.
DEEP = "an image of several pages, of more than 8 bits a channel, or of other than 1 or 3 channels,"
MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
DESCRIPTION, BITS, PHOTOMETRIC, SAMPLES, SAMPLE_FORMAT, DEPTH = 270, 258, 262, 277, 339, 32997  # TIFF tags
WHITE_IS_ZERO, UNSIGNED, OPACITY = 0, 1, (1, 2)  # values of TIFF tags
SAMPLES_OF_MODE = {"1": 1, "L": 1, "P": 1, "LA": 2, "PA": 2, "RGB": 3, "YCbCr": 3, "LAB": 3, "RGBA": 4, "CMYK": 4}
AXES = {"Z": "slices", "T": "times", "C": "channels", "S": "samples", "P": "images"}  # other axes are pages
NAMELESS = "QI"
NARROW = 17  # pixels: narrower pages than rows and pages are rows of pixels

log = logging.getLogger(__name__)
_said: set[str] = set()


@dataclass(frozen=True)
class Layout:
    """The axes of a file that become one image (Y, X, channels).

    Attributes:
        rows, columns: positions of the axes.
        channels: positions of the axes of channels.
        text: what the file holds and what is read of it, "" if there is nothing to say.
        advice: what to do if that is wrong.
        is_colour: three channels are red, green and blue.
    """

    rows: int
    columns: int
    channels: tuple[int, ...]
    text: str = ""
    advice: str = ""
    is_colour: bool = True


def plan_layout(axes: str, shape: tuple[int, ...], channels: int, channels_key: str) -> Layout:
    """Decide by names and sizes which axes are channels.

    `channels_key` is the config key of `channels`, or "" without one.

    Raises ValueError if two axes without a name have as many entries as `channels`.
    """
    rows, columns = axes.index("Y"), axes.index("X")
    others = [position for position in range(len(axes)) if position not in (rows, columns) and shape[position] > 1]
    named = [position for position in others if axes[position] in "CS"]
    nameless = [position for position in others if axes[position] in NAMELESS]
    if not named and channels > 1:
        named = [position for position in nameless if shape[position] == channels]
        if len(named) > 1:
            sizes = " x ".join(map(str, shape))
            raise ValueError(
                f"two of its axes {axes} ({sizes}) have no name and could be the {channels} channels. Save it with "
                "named axes, such as tifffile.imwrite(..., metadata={'axes': 'ZCYX'})"
            )
        if not named and others == nameless == [0] and shape[columns] == channels < min(shape[0], shape[rows]):
            # An array (H, W, C) that was saved as H pages of W x C.
            text = (
                f"its {shape[0]} pages of {shape[rows]} x {channels} pixels are read as rows with {channels} channels"
            )
            return Layout(0, rows, (columns,), text, is_colour=False)
    if not named and others == nameless == [0] and 1 < shape[columns] < min(shape[0], shape[rows], NARROW):
        # Such an array that does not fit: no image, which `channels` refuse.
        text = f"holds {shape[0]} rows of {shape[rows]} pixels with {shape[columns]} channels as pages"
        return Layout(0, rows, (columns,), text, is_colour=False)
    samples = [position for position in named if axes[position] == "S"]
    if len(named) > 1 and samples and math.prod(shape[position] for position in named) != channels:
        named = samples
    is_colour = all(axes[position] == "S" for position in named)
    left = [position for position in others if position not in named]
    if left:
        counts = ", ".join(f"{shape[position]} {AXES.get(axes[position], 'pages')}" for position in left)
        held = math.prod(shape[position] for position in named)
        text = f"holds {counts} of {held} channel{'s'[: held != 1]} (axes {axes}), of which the first is read"
        letter, advice = axes[left[0]], ""
        if channels_key and left == nameless and not named:
            advice = f"If the pages are channels, set {channels_key}={shape[left[0]]}"
        elif not named and letter != "P":
            advice = f"If the {AXES.get(letter, 'pages')} are channels, save the file with C in place of {letter}"
        return Layout(rows, columns, tuple(named), text, advice, is_colour)
    pages = f"its {channels} pages are read as channels" if named and axes[named[0]] in NAMELESS else ""
    return Layout(rows, columns, tuple(named), pages, is_colour=is_colour)


def pillow_reads(data: bytes, page: int, channels: int) -> bool:
    """Check whether Pillow reads a page of a TIFF file correctly."""
    if channels not in (1, 3):
        return False
    try:
        with Image.open(io.BytesIO(data)) as image:
            image.seek(page)
            assert isinstance(image, TiffImagePlugin.TiffImageFile)
            mode, tags = image.mode, image.tag_v2
            bits, formats, samples = (_values(tags.get(tag, 1)) for tag in (BITS, SAMPLE_FORMAT, SAMPLES))
            inverted = tags.get(PHOTOMETRIC) == WHITE_IS_ZERO
    except Exception:  # Pillow raises many kinds of errors; tifffile reports the problem
        return False
    if set(formats) != {UNSIGNED}:
        return False
    if max(bits) > 8:
        return samples[0] == 1 and not inverted and mode.startswith("I;16")
    return SAMPLES_OF_MODE.get(mode) == samples[0]


def _is_stack(data: bytes) -> bool:
    """Check whether a file has several pages, or pixels of several."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            assert isinstance(image, TiffImagePlugin.TiffImageFile)
            text, depth = str(image.tag_v2.get(DESCRIPTION, "")), image.tag_v2.get(DEPTH, 1)
            axes = re.search(r'^{.*"axes": "([A-Z]+)"', text)
            named = axes is not None and bool(set(axes[1]) - set("YXSC" + NAMELESS))
            return named or image.n_frames > 1 or depth != 1 or "images=" in text or '"truncated": true' in text
    except Exception:  # as above
        return True


def read_tiff(
    data: bytes, channels: int, channels_key: str, check_size: Callable[[int, int], None]
) -> tuple[NDArray[Any] | int, Layout | None]:
    """Read the first image, upright (H, W, C), over white.

    Args:
        channels: requested number of channels, which decides between axes without a name.
        channels_key: the config key of `channels`, "" without one.
        check_size: is called with width and height before the pixels are read, and may raise.

    Returns:
        Pixels, or the number of the page if Pillow reads it. And the layout of the axes, None for a single image.

    Raises:
        ValueError: If the file has CMYK, YCbCr, LAB or palette colours of more than 8 bits, or ambiguous axes.
    """
    if pillow_reads(data, 0, channels) and not _is_stack(data):
        return 0, None
    tifffile = import_extra("tifffile", DEEP)
    logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # what it reports is raised here, with the file's name
    file = tifffile.TiffFile(io.BytesIO(data))
    check_size(file.pages[0].imagewidth, file.pages[0].imagelength)
    stack = _Stack(file)
    if None in stack.pages:  # OME: the others are in other files
        stack = _Stack(tifffile.TiffFile(io.BytesIO(data), is_ome=False))
    page, number = stack.keyframe, stack.pages[0].index
    check_size(page.imagewidth, page.imagelength)
    kind = tifffile.PHOTOMETRIC(page.photometric).name
    if kind not in ("MINISBLACK", "MINISWHITE") or page.bitspersample == 1:  # pages of documents are no channels
        if stack.shape == page.shape and set(stack.axes) <= set("YX" + NAMELESS):
            stack.axes = page.axes
        stack.axes = stack.axes.translate(str.maketrans(NAMELESS, "PP"))
    layout = plan_layout(stack.axes, stack.shape, channels, channels_key)
    check_size(stack.shape[layout.columns], stack.shape[layout.rows])
    held = math.prod(stack.shape[position] for position in layout.channels)
    fits = layout.is_colour and held == page.samplesperpixel  # else samples of a page are other images
    if fits and isinstance(number, int) and pillow_reads(data, number, channels):
        return number, layout
    if kind not in ("MINISBLACK", "MINISWHITE", "RGB"):
        raise ValueError(f"a TIFF file of {kind} colours with {page.dtype} samples has no rule. Convert it to RGB.")
    pixels = stack.read(layout)
    if pixels.dtype == np.uint8 and page.bitspersample < 8:
        pixels = pixels * np.uint8(255 // (2**page.bitspersample - 1))
    pixels = upright(pixels, int(page.tags["Orientation"].value) if "Orientation" in page.tags else 1)
    if kind == "MINISWHITE":
        pixels = top_value(pixels) - pixels
    has_opacity = bool(page.extrasamples) and int(page.extrasamples[-1]) in OPACITY and held not in (1, channels)
    return over_white(pixels) if has_opacity else pixels, layout


class _Stack:
    """The largest images of a file, as one array. Several series of one kind are along a first axis."""

    def __init__(self, file: Any) -> None:
        whole = [series for series in file.series if not (series.keyframe.is_reduced or series.keyframe.is_mask)]
        largest = max(whole or file.series, key=lambda series: series.keyframe.imagewidth * series.keyframe.imagelength)
        kind = (largest.axes, largest.shape, largest.dtype, largest.keyframe.photometric)
        same = [one for one in whole if (one.axes, one.shape, one.dtype, one.keyframe.photometric) == kind]
        self.series = same or [largest]
        self.keyframe, self.pages = largest.keyframe, [page for series in self.series for page in series.pages]
        self.axes, self.shape = largest.axes, tuple(largest.shape)
        if len(self.series) > 1:  # images with a name in OME, else pages
            self.axes = ("P" if largest.kind == "ome" else "Q") + self.axes
            self.shape = (len(self.series), *self.shape)

    def read(self, layout: Layout) -> NDArray[Any]:
        """Read (Y, X, channels), and only the pages that hold them."""
        chosen = (layout.rows, layout.columns, *layout.channels)
        index: list[Any] = [slice(None) if position in chosen else 0 for position in range(len(self.axes))]
        paged = len(self.axes) - len(self.keyframe.axes)
        leading = self.shape[:paged]
        if self.axes.endswith(self.keyframe.axes) and len(self.pages) == math.prod(leading):
            numbers = np.arange(len(self.pages)).reshape(leading)[tuple(index[:paged])]
            pages = [self.pages[int(number)].asarray() for number in np.ravel(numbers)]
            pixels = np.stack(pages).reshape(*np.shape(numbers), *self.shape[paged:])
            pixels = pixels[(*(slice(None) for _ in np.shape(numbers)), *index[paged:])]
        else:
            arrays = [series.asarray() for series in self.series]
            pixels = (np.stack(arrays) if len(arrays) > 1 else arrays[0])[tuple(index)]
        remaining = sorted(chosen)
        pixels = pixels.transpose([remaining.index(position) for position in chosen])
        return pixels.reshape(*pixels.shape[:2], -1)


def say_once(name: str, text: str, advice: str = "") -> None:
    """Log what is read of the first such file."""
    if text and text not in _said:
        _said.add(text)
        log.warning("%s: %s, as in all files like it%s", name, text, f". {advice}" if advice else "")


def has_deep_samples(image: Image.Image) -> bool:
    """Check whether an image is a TIFF with over 8 bits/channel."""
    return isinstance(image, TiffImagePlugin.TiffImageFile) and max(_values(image.tag_v2.get(BITS, 1))) > 8


def upright(pixels: NDArray[Any], orientation: int) -> NDArray[Any]:
    """Undo an EXIF orientation 1 .. 8 of pixels (H, W, C)."""
    if orientation in (5, 6, 7, 8):
        pixels = pixels.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return pixels[:, ::-1] if orientation in (2, 3, 6, 7) else pixels


def over_white(pixels: NDArray[Any]) -> NDArray[Any]:
    """Blend samples with white. The last channel is the opacity."""
    top = top_value(pixels)
    opacity = pixels[..., -1:] / top
    return np.asarray(pixels[..., :-1] * opacity + top * (1 - opacity)).astype(pixels.dtype)


def top_value(pixels: NDArray[Any]) -> Any:
    """Return the value of white."""
    return 1.0 if np.issubdtype(pixels.dtype, np.floating) else np.iinfo(pixels.dtype).max


def _values(value: Any) -> tuple[int, ...]:
    return tuple(value) if isinstance(value, tuple) else (value,)
