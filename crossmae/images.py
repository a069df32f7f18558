"""Finding image files, and decoding any of them to a given number of channels.

The rules, stated once (`bit_depth` 8 is the default; 16 keeps what a file has beyond 8 bits, as float32):

    | file                          | becomes                                                              |
    | ----------------------------- | -------------------------------------------------------------------- |
    | EXIF or TIFF orientation      | applied                                                              |
    | several frames or pages       | the first                                                            |
    | palette                       | looked up                                                            |
    | transparency                  | laid over white; kept as the 4th channel where 4 are asked for       |
    | grey, 3 channels asked for    | repeated                                                             |
    | colour, 1 channel asked for   | luma, 0.299 R + 0.587 G + 0.114 B                                    |
    | CMYK, YCbCr, LAB, HSV         | RGB by Pillow                                                        |
    | 16-bit                        | scaled from 0-65535, also where only 12 bits are used: measure mean and std |
    | floating point                | taken as 0-1; other values are an error                              |
    | 2 or more than 4 channels     | TIFF only, channels first or last                                    |
    | any other number of channels  | an error that names it                                               |
"""

from __future__ import annotations

import importlib
import io
import logging
import os
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from tqdm import tqdm

from crossmae.errors import UserError

IMAGE_SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"})

LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)

# Of whole JPEG and PNG files. Other files may be whole, too: they have to be decoded to be sure.
LAST_BYTES = (b"\xff\xd9", b"IEND\xaeB`\x82")

MAX_NAMES = 5

log = logging.getLogger(__name__)


def find_images(folder: str | Path, key: str) -> list[Path]:
    """All images in a folder and its subfolders, sorted by path; other files are counted in the log.

    Links to folders are followed, each real folder once. Hidden files and folders are left out.

    Args:
        folder: root of the search; `~` is expanded.
        key: the config key or flag that named it, for the error.

    Raises:
        UserError: not a folder, or no image in it.
    """
    root = Path(folder).expanduser()
    if not root.is_dir():
        parent = next(p for p in [root, *root.resolve().parents] if p.exists())
        kind = (
            "is a file, not a folder" if root.is_file() else f"does not exist (the nearest folder that does: {parent})"
        )
        raise UserError(f"{key}: {root} {kind}")
    images: list[Path] = []
    others: Counter[str] = Counter()
    visited: set[str] = set()
    for parent_name, folders, files in os.walk(root, onerror=_refuse, followlinks=True):
        visited.add(os.path.realpath(parent_name))
        folders[:] = sorted(
            name
            for name in folders
            if not name.startswith(".") and os.path.realpath(os.path.join(parent_name, name)) not in visited
        )
        for name in files:
            path = Path(parent_name, name)
            if not name.startswith(".") and path.suffix.lower() in IMAGE_SUFFIXES:
                images.append(path)
            else:
                others[path.suffix.lower() or name] += 1
    kinds = ", ".join(f"{count} {kind}" for kind, count in others.most_common(5))
    if others:
        log.info("%s: left out %d files that are no images: %s", root, sum(others.values()), kinds)
    if not images:
        found = f"; other files there: {kinds}" if others else ""
        suffixes = ", ".join(sorted(IMAGE_SUFFIXES))
        raise UserError(f"{key}: no image in {root} or its subfolders (looked for {suffixes}){found}")
    return sorted(images)


def _refuse(error: OSError) -> None:
    raise UserError(f"{error.filename}: can not be searched: {error.strerror}")


def read_image(path: str | Path) -> Image.Image:
    """One file as 8-bit RGB, by the rules above.

    Raises:
        UserError: missing, empty, truncated or not an image, or over Pillow's limit of pixels; names the file.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"{path}: can not be read as an image: {error.strerror}") from error
    return decode_image(data, str(path))  # type: ignore[return-value]  # three channels of 8 bits are an Image


def decode_image(data: bytes, name: str, channels: int = 3, bit_depth: int = 8) -> Image.Image | NDArray[Any]:
    """Decode a whole file to `channels` channels, by the rules above.

    Args:
        data: the file's bytes.
        name: for errors: the file's path.
        channels: how many channels the model takes.
        bit_depth: 8 or 16.

    Returns:
        An "L" or "RGB" image for one or three channels of 8 bits, else an array (H, W, channels): uint8 for a bit depth
        of 8, float32 in 0-1 for 16.

    Raises:
        UserError: empty, truncated or not an image, over Pillow's limit of pixels, or of a number of channels that no
            rule turns into `channels`; names the file.
    """
    try:
        if bit_depth == 8 and channels in (1, 3) and not _needs_tifffile(data):
            with Image.open(io.BytesIO(data)) as image:
                image.load()
                rgb = to_rgb(ImageOps.exif_transpose(image))
                return rgb if channels == 3 else rgb.convert("L")
        pixels = _as_unit_range(_samples(data, channels), name)
    except (OSError, UnidentifiedImageError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        if isinstance(error, UserError):
            raise
        # Pillow reports broken files by any of these, PNG ones by SyntaxError.
        reason = "not an image" if isinstance(error, UnidentifiedImageError) else " ".join(str(error).split())
        raise UserError(f"{name}: can not be read as an image: {reason}") from error
    pixels = _with_channels(pixels, channels, name)
    return pixels if bit_depth == 16 else np.rint(pixels * 255).astype(np.uint8)


_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


def _needs_tifffile(data: bytes) -> bool:
    """Whether Pillow would refuse a TIFF file: more than 8 bits of colour, floating point, or many channels."""
    if not data.startswith(_TIFF):
        return False
    try:
        with Image.open(io.BytesIO(data)) as image:
            return image.mode == "F"
    except UnidentifiedImageError:
        return True


def _samples(data: bytes, channels: int) -> NDArray[Any]:
    """The pixels (H, W, C) of a file in their own type."""
    if data.startswith(_TIFF):
        return _tiff_samples(data, channels)
    if data.startswith(b"\x89PNG") and data[24:25] == b"\x10" and data[25:26] != b"\0":  # 16 bits, not grey
        pixels = np.asarray(_import("imagecodecs").png_decode(data))
        return _over_white(pixels) if pixels.shape[-1] in (2, 4) and channels != pixels.shape[-1] else pixels
    with Image.open(io.BytesIO(data)) as image:
        image.load()
        upright = ImageOps.exif_transpose(image)
    if upright.mode.startswith("I"):
        return np.asarray(upright).clip(0, 65535).astype(np.uint16)[..., None]
    if upright.mode == "F":
        return np.asarray(upright)[..., None]
    if upright.mode == "L":
        return np.asarray(upright)[..., None]
    has_alpha = upright.mode in ("RGBA", "LA", "PA") or "transparency" in upright.info
    return np.asarray(upright.convert("RGBA") if channels == 4 and has_alpha else to_rgb(upright))


def _tiff_samples(data: bytes, channels: int) -> NDArray[Any]:
    """The first series of a TIFF file, channels last and upright."""
    tifffile = _import("tifffile")
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        series, page = file.series[0], file.pages[0]
        if page.photometric == tifffile.PHOTOMETRIC.PALETTE:
            with Image.open(io.BytesIO(data)) as image:
                return np.asarray(to_rgb(ImageOps.exif_transpose(image)))
        pixels, axes = series.asarray(), series.axes
        orientation = int(page.tags["Orientation"].value) if "Orientation" in page.tags else 1
    if pixels.ndim == 3 and axes[-1] != "S":
        # Pages or planes: as many as channels are wanted are the channels, else they are frames.
        pixels = np.moveaxis(pixels, 0, -1) if pixels.shape[0] == channels or axes[0] in "SC" else pixels[0]
    while pixels.ndim > 3:
        pixels = pixels[0]
    return _upright(np.atleast_3d(pixels), orientation)


def _upright(pixels: NDArray[Any], orientation: int) -> NDArray[Any]:
    """Undo an EXIF orientation 1 .. 8 of pixels (H, W, C)."""
    if orientation in (5, 6, 7, 8):
        pixels = pixels.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return pixels[:, ::-1] if orientation in (2, 3, 6, 7) else pixels


def _as_unit_range(pixels: NDArray[Any], name: str) -> NDArray[np.float32]:
    """uint8, uint16, bool or floating-point samples as float32 in 0-1."""
    if pixels.dtype == bool or pixels.dtype in (np.uint8, np.uint16):
        top = 1 if pixels.dtype == bool else np.iinfo(pixels.dtype).max
        return pixels.astype(np.float32) / np.float32(top)
    if not np.issubdtype(pixels.dtype, np.floating):
        raise UserError(f"{name}: holds {pixels.dtype} samples; expected 8 or 16 bits without sign, or floats in 0-1")
    if not (np.isfinite(pixels).all() and pixels.min() >= 0 and pixels.max() <= 1):
        raise UserError(
            f"{name}: floating-point samples from {pixels.min():g} to {pixels.max():g}; expected 0-1: rescale the files"
        )
    return pixels.astype(np.float32)


def _with_channels(pixels: NDArray[np.float32], channels: int, name: str) -> NDArray[np.float32]:
    """Samples (H, W, C) to (H, W, channels) where a rule says how."""
    held = pixels.shape[-1]
    if held == 4 and channels in (1, 3):
        pixels, held = _over_white(pixels), 3
    if held == channels:
        return np.ascontiguousarray(pixels)
    if held == 1 and channels == 3:
        return np.repeat(pixels, 3, axis=-1)
    if held == 3 and channels == 1:
        return (pixels @ LUMA)[..., None]
    raise UserError(f"{name}: has {held} channels, model.in_chans is {channels}")


def _over_white(pixels: NDArray[Any]) -> NDArray[Any]:
    """Lay samples whose last channel is their opacity over white; grey with opacity becomes grey."""
    top = 1.0 if np.issubdtype(pixels.dtype, np.floating) else float(np.iinfo(pixels.dtype).max)
    opacity = pixels[..., -1:] / top
    return np.asarray(pixels[..., :-1] * opacity + top * (1 - opacity)).astype(pixels.dtype)


def _import(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise UserError(
            f'more than 8 bits a channel, or other than 1 or 3 channels, need {name}: pip install -e ".[data]"'
        ) from None


def check_images(paths: Sequence[Path]) -> None:
    """Make sure that every file is whole, before hours are spent: by its last bytes, in doubt by reading it.

    Raises:
        UserError: see `read_image`.
    """
    with ThreadPoolExecutor(max_workers=16) as pool:
        whole = pool.map(_is_whole, paths)
        bar = tqdm(whole, "check images", len(paths), leave=False, unit="img")
        doubtful = [path for path, is_whole in zip(paths, bar, strict=True) if not is_whole]
    broken = []
    for path in doubtful:
        try:
            read_image(path)
        except UserError as error:
            broken.append(str(error))
    if broken:
        more = f" (and {len(broken) - MAX_NAMES} more)" if len(broken) > MAX_NAMES else ""
        raise UserError(f"{'; '.join(broken[:MAX_NAMES])}{more}; repair or remove what is broken")


def _is_whole(path: Path) -> bool:
    try:
        with open(path, "rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(file.tell() - 16, 0))
            return ends_like_an_image(file.read())
    except OSError:
        return False  # reading it will say what is wrong


def ends_like_an_image(tail: bytes) -> bool:
    """Whether the last bytes of a file are those of a whole JPEG or PNG file."""
    return tail.endswith(LAST_BYTES)


def to_rgb(image: Image.Image) -> Image.Image:
    """Any mode of Pillow's to 8-bit RGB, by the rules above."""
    if image.mode.startswith("I"):  # I;16, I;16B and I, as 16-bit PNG and TIFF files open
        return Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")
