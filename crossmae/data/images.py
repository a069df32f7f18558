"""Decode image files of any kind to a given number of channels.

All rules (`bit_depth` is 8 by default; 16 keeps the precision of files with more than 8 bits, as float32):

    | file                          | result                                                               |
    | ----------------------------- | -------------------------------------------------------------------- |
    | EXIF or TIFF orientation      | applied                                                              |
    | other metadata, whole or not  | no matter                                                            |
    | several frames                | the first frame                                                      |
    | several pages of a TIFF       | by their axes, see crossmae/data/tiff.py                             |
    | palette                       | converted to colours                                                 |
    | transparency                  | laid over white; kept as the 4th channel if 4 channels are requested |
    | transparent everywhere        | white, with a warning                                                |
    | grayscale, 3 channels wanted  | channel repeated                                                     |
    | colour, 1 channel wanted      | luma, 0.299 R + 0.587 G + 0.114 B                                    |
    | CMYK, YCbCr, LAB, HSV         | converted to RGB by Pillow                                           |
    | 16-bit                        | scaled from 0-65535, also if only 12 bits are used: measure mean and std |
    | floating point                | read as 0-1; other values, and NaN, are an error                     |
    | signed, or 32-bit integers    | an error: rescale the values                                         |
    | other numbers of channels     | TIFF only, channels first or last, and exactly the requested number  |
    | more pixels than the limit    | an error before the pixels are read                                  |
    | no pixels, or cut off         | an error                                                             |
    | anything else                 | an error that names the file and its content                         |
"""

from __future__ import annotations

import argparse
import io
import os
import re
import struct
import warnings
import zlib
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, UnidentifiedImageError

from crossmae.data.tiff import DEEP, MAGIC, Layout, has_deep_samples, over_white, read_tiff, say_once, upright
from crossmae.errors import UserError, import_extra, printable
from crossmae.files import read_end, read_file, recognize

MAX_PIXELS = 178_956_970  # where Pillow stops, too; 0.5 GB as RGB
# Pillow warns of metadata that it skips, which decide nothing. `ImageLimits` takes the place of its limit of pixels,
# which warns from half of it.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")
Image.MAX_IMAGE_PIXELS = None

PNG = b"\x89PNG\r\n\x1a\n"
PNG_PIXELS = (b"tRNS", b"eXIf")  # optional chunks that decide about pixels
PNG_ORIENTATION = (b"Raw profile type exif", b"XML:com.adobe.xmp")  # keywords of text that may hold an orientation
LONGEST_ORIENTATION = 1 << 16  # bytes of such a text
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
QUARTER_TURNS = (5, 6, 7, 8)  # orientations that swap width and height

ANIMATIONS = ("GIF", "PNG", "WEBP", "AVIF")  # MPO and TIFF hold other pictures than frames

LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)

# Last bytes of complete JPEG and PNG files. Files of other kinds must be decoded to find out if they are complete.
LAST_BYTES = (b"\xff\xd9", b"IEND\xaeB`\x82")
LONGEST_END = 8  # bytes of them
LATE_EXIF = re.compile(rb"eXIf|Raw profile type exif|adobe:ns:meta")
LATE_EXIF_WITHIN = 1 << 16  # bytes at the end of a PNG that are searched for an orientation
PLAIN_HEAD = 4096  # bytes that hold the header of a JPEG without metadata
FILLED = bytes(64)  # after samples, such a run of zeros stands in place of the end of a JPEG
FILL_VALUES, LOWEST = (-9999, -32768), -3.39e38  # missing data of GeoTIFF files, and all below
UNREAD, JUNK = 128, b"\x55\xaa\x13" * 256  # grey of missing JPEG data; bytes that would be decoded to something else


class TooManyPixels(UserError):
    """An image that has more pixels than its limit."""


class ImageLimits(NamedTuple):
    """Largest number of pixels of an image, the key or flag that sets it, and the key of the channels, or ""."""

    pixels: int = MAX_PIXELS
    key: str = "data.max_pixels"
    channels_key: str = "model.in_chans"

    def check(self, name: str, width: int, height: int) -> None:
        """Raise a UserError if an image has no pixels, or too many."""
        if width * height == 0:
            raise UserError(f"{name}: has {width} x {height} pixels. An image without pixels cannot be used.")
        if width * height > self.pixels:
            raise TooManyPixels(
                f"{name}: has {width} x {height} = {width * height:,} pixels, {self.key} is {self.pixels:,}. Raise "
                f"{self.key} if there is enough memory, or cut or shrink the image."
            )


IMAGE_LIMITS = ImageLimits()


def add_max_pixels(parser: argparse.ArgumentParser) -> None:
    """Add the option of the largest image to a command line."""
    what = "width * height of the largest image (%(default)s)"
    parser.add_argument("--max-pixels", type=int, default=MAX_PIXELS, metavar="N", help=what)


def read_image(path: str | Path, limits: ImageLimits = IMAGE_LIMITS) -> Image.Image:
    """Read one file as 8-bit RGB, by the rules above."""
    return decode_image(read_file(path), str(path), limits=limits)  # type: ignore[return-value]  # 3 channels of 8 bits


def decode_image(
    data: bytes, name: str, channels: int = 3, bit_depth: int = 8, limits: ImageLimits = IMAGE_LIMITS
) -> Image.Image | NDArray[Any]:
    """Decode a whole file to `channels` channels, by the rules above.

    Returns:
        An "L" or "RGB" image for one or three channels of 8 bits. Otherwise an array (H, W, channels), which is uint8
        for a bit depth of 8 and float32 in 0-1 for 16.

    Raises:
        UserError: If the file is empty, truncated, not an image, has more pixels than the limit, or has a number of
            channels that no rule converts to `channels`. The message names the file.
    """
    name, layout = printable(name), None
    try:
        samples: NDArray[Any] | int = 0  # an array, or a page that Pillow reads
        if data.startswith(MAGIC):
            check_size = partial(limits.check, name)
            samples, layout = read_tiff(data, channels, limits.channels_key, check_size)
        if isinstance(samples, int):
            image = open_image(data)
            image.seek(samples)
            limits.check(name, *image.size)
            if _is_deep_colour_png(data) and (bit_depth == 16 or channels not in (1, 3)):
                decode = import_extra("imagecodecs", DEEP).png_decode
                samples = np.atleast_3d(decode(_pixels_of_png(data, ())))
                if samples.shape[-1] in (2, 4) and channels != samples.shape[-1]:
                    samples = over_white(samples)
                if any(word in data for word in (b"eXIf", *PNG_ORIENTATION)):
                    samples = upright(samples, read_orientation(image))
            else:
                turned = _load(image, data)
                _warn_if_invisible(turned, name, channels)
                if bit_depth == 8 and channels in (1, 3) and turned.mode != "F":
                    rgb = to_rgb(turned)
                    if layout is not None:
                        say_once(name, layout.text, layout.advice)
                    return rgb if channels == 3 else rgb.convert("L")
                samples = _samples(turned, channels)
        pixels = _with_channels(_as_unit_range(samples, name), channels, name, limits.channels_key, layout)
        if layout is not None:
            say_once(name, layout.text, layout.advice)
    except UserError:
        raise
    except Exception as error:  # the libraries raise many kinds of errors for damaged files
        raise UserError(f"{name}: cannot be read as an image: {_reason(error, data)}") from error
    if bit_depth == 16:
        return pixels
    cut = np.rint(pixels * 255).astype(np.uint8)
    return Image.fromarray(cut.squeeze(-1) if channels == 1 else cut) if channels in (1, 3) else cut


def _reason(error: Exception, data: bytes) -> str:
    """Say why a file is not read, or what else it is."""
    if not isinstance(error, UnidentifiedImageError):
        return " ".join(str(error).split()) or type(error).__name__
    kind, advice = recognize(data)
    return f"is {kind}. {advice}." if kind else "not an image of a kind that this tool reads"


def _warn_if_invisible(image: Image.Image, name: str, channels: int) -> None:
    if channels != 4 and image.mode in ("RGBA", "LA", "PA") and image.getchannel("A").getbbox() is None:
        say_once(name, "is transparent everywhere and read as white", "Save it without transparency")


def header_is_sound(head: bytes, name: str, channels: int, limits: ImageLimits) -> bool:
    """Check a file by its first bytes, which tell all but damage.

    False if the whole file has to be decoded to find out.
    """
    try:
        with Image.open(io.BytesIO(head)) as image:
            limits.check(name, *image.size)
            return channels in (1, 3) or (channels == 4 and _has_opacity(image))
    except Exception:  # UserError, or one of Pillow's: decoding tells what it is
        return False


def open_image(data: bytes, load: bool = False) -> Image.Image:
    """Open an image with Pillow, a PNG without metadata that Pillow refuses."""
    try:
        return _open(data, load)
    except Exception:  # of many kinds
        for keywords in (PNG_ORIENTATION, ()) if data.startswith(PNG) else ():
            with suppress(Exception):
                return _open(_pixels_of_png(data, keywords), load)
        raise


def _open(data: bytes, load: bool) -> Image.Image:
    image = Image.open(io.BytesIO(data))
    if load:
        image.load()
    return image


def _load(image: Image.Image, data: bytes) -> Image.Image:
    """Load the pixels, upright."""
    try:
        image.load()
    except Exception:
        if image.format != "PNG":
            raise
        image = open_image(data, load=True)  # metadata can follow the pixels
    if image.format in ("JPEG", "MPO"):
        if _ends_in_zeros(data):
            raise OSError("its data end early, and the rest is zeros. Get a whole copy of the file")
        if _ends_early(image, data):
            raise OSError("its data end early, and the rest would be grey. Get a whole copy of the file")
    turn = TURNS.get(read_orientation(image))
    return image if turn is None else image.transpose(turn)


def read_orientation(image: Image.Image, load: bool = True) -> int:
    """Read the orientation of EXIF or XMP data, default 1.

    With `load`, Pillow decodes a PNG if its EXIF data may follow the pixels.
    """
    try:
        value = (image.getexif() if load else Image.Image.getexif(image)).get(ExifTags.Base.Orientation, 1)
        value = value[0] if isinstance(value, (tuple, bytes)) else value
        return int(value) if int(value) in TURNS else 1
    except Exception:  # Pillow raises many kinds of errors for damaged EXIF data
        return 1


def _pixels_of_png(data: bytes, keywords: Sequence[bytes]) -> bytes:
    """Copy a PNG without metadata, except short texts with one of `keywords`."""
    kept, start = [PNG], len(PNG)
    while start + 12 <= len(data):
        (length,), kind = struct.unpack(">I", data[start : start + 4]), data[start + 4 : start + 8]
        chunk = data[start : start + length + 12]
        is_whole_chunk = chunk[-4:] == struct.pack(">I", zlib.crc32(chunk[4:-4]))
        is_orientation = length <= LONGEST_ORIENTATION and chunk[8:].startswith(
            tuple(word + b"\0" for word in keywords)
        )
        if kind[:1].isupper() or (is_whole_chunk and (kind in PNG_PIXELS or is_orientation)):
            kept.append(chunk)
        start += len(chunk)
    return b"".join(kept)


def _lacks_scans(image: Image.Image, data: bytes) -> bool:
    """Check whether a progressive JPEG lacks the last scan of a channel."""
    if "progressive" not in image.info:
        return False
    complete: set[int] = set()
    for match in re.finditer(rb"\xff\xda..([\x01-\x04])", data[:-16], re.DOTALL):
        ends = match.end() + 2 * match[1][0]
        last_frequency, bits_left = data[ends + 1 : ends + 3]
        if last_frequency == 63 and bits_left & 15 == 0:
            complete |= set(data[match.end() : ends : 2])
    return len(complete) < len(image.getbands())


def _ends_early(image: Image.Image, data: bytes) -> bool:
    """Check whether a JPEG with an end has too few data.

    The decoder fills the rest with grey. Bytes put before the end change the pixels only if they are needed.
    """
    corner = image.crop((max(image.width - 8, 0), image.height - 1, image.width, image.height))
    if set(corner.tobytes()) - {UNREAD, UNREAD - 1} and not _lacks_scans(image, data):
        return False
    end = data.rfind(LAST_BYTES[0])
    with Image.open(io.BytesIO(data[:end] + JUNK + data[end:])) as longer:
        return longer.tobytes() != image.tobytes()


def _ends_in_zeros(data: bytes) -> bool:
    """Check whether zeros follow a JPEG's data in place of its end."""
    start = 2 if data.endswith(FILLED) else len(data)
    while (marker := data[start : start + 2])[:1] == b"\xff" and len(data) > start + 4:
        if marker == LAST_BYTES[0]:
            return False
        start += 2 + int.from_bytes(data[start + 2 : start + 4], "big")
        if marker == b"\xff\xda":  # samples until the next marker
            following = re.compile(rb"\xff[^\0\xff\xd0-\xd7]").search(data, start)
            if following is None:
                return True
            start = following.start()
    return False


def is_deep(data: bytes) -> bool:
    """Check whether a file's header declares more than 8 bits per channel."""
    try:
        image = open_image(data)
        return image.mode.startswith(("I", "F")) or _is_deep_colour_png(data) or has_deep_samples(image)
    except Exception:  # unknown to Pillow, or broken: reading the file reports the error
        return False


def count_frames(file: Path | io.BytesIO) -> int:
    """Count the frames of an animation, 1 for other files."""
    try:
        with Image.open(file) as image:
            return getattr(image, "n_frames", 1) if image.format in ANIMATIONS else 1
    except Exception:  # reading the file reports the error
        return 1


def _is_deep_colour_png(data: bytes) -> bool:
    # Pillow would cut 16-bit PNG files to 8 bits, except grayscale without transparency.
    return data.startswith(b"\x89PNG") and data[24:25] == b"\x10" and data[25:26] != b"\0"


def _samples(image: Image.Image, channels: int) -> NDArray[Any]:
    if image.mode.startswith("I"):
        return _deep_grey(image)[..., None]
    if image.mode in ("F", "L") and "transparency" not in image.info:
        return np.asarray(image)[..., None]
    return np.asarray(image.convert("RGBA") if channels == 4 and _has_opacity(image) else to_rgb(image))


def _has_opacity(image: Image.Image) -> bool:
    return image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info


def _deep_grey(image: Image.Image) -> NDArray[np.uint16]:
    """Read grayscale pixels (H, W), with the transparent value as white."""
    pixels = np.asarray(image).clip(0, 65535).astype(np.uint16)
    transparent = image.info.get("transparency")
    return np.where(pixels == transparent, 65535, pixels).astype(np.uint16) if transparent is not None else pixels


def _as_unit_range(pixels: NDArray[Any], name: str) -> NDArray[np.float32]:
    if pixels.dtype == bool or pixels.dtype in (np.uint8, np.uint16):
        top = 1 if pixels.dtype == bool else np.iinfo(pixels.dtype).max
        return pixels.astype(np.float32) / np.float32(top)
    if not np.issubdtype(pixels.dtype, np.floating):
        raise UserError(
            f"{name}: holds {pixels.dtype} samples. Convert it to 8 or 16 bits without sign, or to floats in 0-1."
        )
    finite = np.isfinite(pixels)
    if not finite.all():
        share = 1 - finite.mean()
        raise UserError(
            f"{name}: {share:.2%} of its samples are NaN or infinite, which marks missing data. Fill them with values "
            "from 0 to 1, such as the mean of the others."
        )
    low, high = pixels.min(), pixels.max()
    if low in FILL_VALUES or low < LOWEST:
        share = (pixels == low).mean()
        raise UserError(
            f"{name}: {share:.2%} of its samples are {low:g}, which marks missing data. Fill them with values from 0 "
            "to 1, such as the mean of the others."
        )
    if low < 0 or high > 1:
        raise UserError(
            f"{name}: floating-point samples from {low:g} to {high:g}. Rescale them to 0-1{_scale(low, high)}."
        )
    return pixels.astype(np.float32)


def _scale(low: float, high: float) -> str:
    """Say how a range probably becomes 0-1."""
    if low < 0:
        return ""
    for top, what in ((255, "8-bit values"), (20_000, "reflectance times 10,000"), (65_535, "16-bit values")):
        if high <= top:
            return f": they look like {what}, so divide by {min(top, 10_000) if top != 65_535 else top:,}"
    return ""


def _with_channels(
    pixels: NDArray[np.float32], channels: int, name: str, key: str, layout: Layout | None
) -> NDArray[np.float32]:
    held = pixels.shape[-1]
    if held == channels:
        return np.ascontiguousarray(pixels)
    if held == 1 and channels == 3:
        return np.repeat(pixels, 3, axis=-1)
    if held == 3 and channels == 1 and (layout is None or layout.is_colour):
        return (pixels @ LUMA)[..., None]
    text = f"{name}: has {held} channel{'s'[: held != 1]}, {f'{key} is {channels}' if key else f'{channels} are read'}"
    advice = f"Convert it, or set {key}={held}." if key else "Convert it."
    if layout is not None and layout.text:
        text = f"{text}: it {layout.text.partition(',')[0]}"
        advice += f" {layout.advice}." * bool(layout.advice)
    raise UserError(f"{text}. {advice}")


def is_whole(tail: bytes) -> bool:
    """Check whether the last bytes end a complete JPEG or PNG."""
    return tail.endswith(LAST_BYTES)


def plain_jpeg_size(path: str) -> tuple[int, int] | None:
    """Read (width, height) of a complete JPEG without EXIF data.

    None for every other file, for which Pillow has to tell. This is several times faster than Pillow.
    """
    try:
        with open(path, "rb", buffering=0) as file:
            head = file.read(PLAIN_HEAD)
            file.seek(-2, os.SEEK_END)
            end = file.read(2)
    except OSError:
        return None
    start, size = 2, None
    while len(head) > start + 4 and head[start] == 0xFF:
        kind, stop = head[start + 1], start + 2 + int.from_bytes(head[start + 2 : start + 4], "big")
        body = head[start + 4 : stop]
        if stop > len(head):
            return None
        if kind == 0xDA:  # the samples
            return size if head[:2] == b"\xff\xd8" and end == LAST_BYTES[0] else None
        if kind in (0xC0, 0xC1, 0xC2):
            if size or len(body) < 6 or body[0] != 8 or body[5] not in (1, 3) or len(body) != 6 + 3 * body[5]:
                return None
            size = int.from_bytes(body[3:5], "big"), int.from_bytes(body[1:3], "big")
        elif kind == 0xE0 and body.startswith(b"JFIF\0"):
            if len(body) < 14:
                return None
        elif kind == 0xDB:
            if len(body) % 65 or any(number > 3 for number in body[::65]):
                return None
        elif kind not in (0xC4, 0xDD):  # tables and their intervals; what else there is may turn the image
            return None
        start = stop
    return None


class ImageHeader(NamedTuple):
    """Width and height as stored and once turned, and the EXIF orientation.

    `is_whole` is True if both ends of the file are sound.
    """

    stored: tuple[int, int]
    turned: tuple[int, int]
    orientation: int
    is_whole: bool


def read_header(path: Path, limits: ImageLimits = IMAGE_LIMITS) -> ImageHeader:
    """Read the header of an image, and the end of its file.

    Raises UserError for an image that the limits refuse, and Pillow's errors for a file that is no image.
    """
    is_sound = True
    try:
        image: Image.Image = Image.open(path)
    except Exception:  # the whole file tells whether only its metadata are at fault
        image, is_sound = open_image(read_file(path)), False
    with image:
        stored, is_png = image.size, image.format == "PNG"
        limits.check(printable(path), *stored)
        end = read_end(path, LATE_EXIF_WITHIN if is_png else LONGEST_END)
        # Pillow would decode a PNG file completely to find an orientation that is stored after the pixels.
        late = is_png and LATE_EXIF.search(end)
        orientation = read_orientation(open_image(read_file(path), load=True) if late else image, load=bool(late))
    turned = stored[::-1] if orientation in QUARTER_TURNS else stored
    return ImageHeader(stored, turned, orientation, is_sound and is_whole(end))


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert any Pillow mode to 8-bit RGB, by the rules above."""
    if image.mode.startswith("I"):  # I;16, I;16B and I: modes of 16-bit PNG and TIFF files
        return Image.fromarray((_deep_grey(image) >> 8).astype(np.uint8)).convert("RGB")
    if _has_opacity(image):
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


def parse_size(text: str, key: str) -> tuple[int, int]:
    """Parse pixels such as "224" or "192x256" into (height, width)."""
    match = re.fullmatch(r"([1-9]\d*)(?:x([1-9]\d*))?", text)
    if match is None:
        raise UserError(f"{key} {text}: expected pixels, such as 224, or 192x256 for height and width")
    return int(match[1]), int(match[2] or match[1])
