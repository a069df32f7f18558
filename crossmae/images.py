"""Finding and reading images of any kind as RGB."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from tqdm import tqdm

from crossmae.errors import UserError

IMAGE_SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"})

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
    if others:
        log.info(
            "%s: left out %d files that are no images: %s",
            root,
            sum(others.values()),
            dict(others.most_common(5)),
        )
    if not images:
        found = f"; other files there: {dict(others.most_common(5))}" if others else ""
        suffixes = ", ".join(sorted(IMAGE_SUFFIXES))
        raise UserError(f"{key}: no image in {root} or its subfolders (looked for {suffixes}){found}")
    return sorted(images)


def _refuse(error: OSError) -> None:
    raise UserError(f"{error.filename}: can not be searched: {error.strerror}")


def read_image(path: str | Path) -> Image.Image:
    """Read one image, whole, as 8-bit RGB with its EXIF orientation applied.

    Rules: 16-bit and 32-bit integer grey is scaled from 0-65535; grey is repeated; palettes are looked up; transparency
    is laid over white; CMYK and other colour spaces are converted by Pillow; of several frames the first counts.

    Raises:
        UserError: missing, empty, truncated or not an image, or over Pillow's limit of pixels; names the file.
    """
    try:
        with Image.open(path) as image:
            image.load()
            return to_rgb(ImageOps.exif_transpose(image))
    except (OSError, UnidentifiedImageError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        # Pillow reports broken files by any of these, PNG ones by SyntaxError.
        reason = "not an image" if isinstance(error, UnidentifiedImageError) else " ".join(str(error).split())
        raise UserError(f"{path}: can not be read as an image: {reason}") from error


def check_images(paths: Sequence[Path]) -> None:
    """Make sure that every file is whole, before hours are spent: by its last bytes, in doubt by reading it.

    Raises:
        UserError: see `read_image`.
    """
    with ThreadPoolExecutor(max_workers=16) as pool:
        whole = pool.map(_ends_like_an_image, paths)
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


def _ends_like_an_image(path: Path) -> bool:
    try:
        with open(path, "rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(file.tell() - 16, 0))
            return file.read().endswith(LAST_BYTES)
    except OSError:
        return False  # reading it will say what is wrong


def to_rgb(image: Image.Image) -> Image.Image:
    """Any mode to RGB, by the rules of `read_image`."""
    if image.mode.startswith("I"):  # I;16, I;16B and I, as 16-bit PNG and TIFF files open
        return Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")
