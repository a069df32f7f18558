"""The idx files of MNIST and similar data sets: one array of all images of a split, and one array of all labels."""

from __future__ import annotations

import gzip
import io
import math
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from crossmae.data.sources.source import Source
from crossmae.errors import UserError, counted
from crossmae.files import read_file

IMAGES, LABELS = "images-idx3-ubyte", "labels-idx1-ubyte"
IDX_SUFFIXES = (IMAGES, f"{IMAGES}.gz")
SPLITS = {"train": "train", "val": "t10k"}  # prefix of the MNIST file, by the last part of the config key
UBYTE = 8  # type code for unsigned bytes, the only supported type
GZIP = b"\x1f\x8b"


def find_idx_files(folder: Path) -> list[Path]:
    """Find image files, sorted, preferring uncompressed copies."""
    names = {path.name for path in folder.iterdir() if path.name.endswith(IDX_SUFFIXES)}
    return sorted(folder / name for name in names if name.removesuffix(".gz") == name or name[:-3] not in names)


def open_idx(path: Path, key: str) -> IdxImages:
    """Open one split.

    Args:
        path: file of images (`train-images-idx3-ubyte.gz`), or a folder of such files. If a folder contains both MNIST
            files, data.train reads `train-*` and data.val reads `t10k-*`.

    Raises:
        UserError: If the folder contains several splits and the key does not choose one, or a file is damaged.
    """
    if path.is_file():
        return IdxImages(path, key)
    files = find_idx_files(path)
    split = SPLITS.get(key.rpartition(".")[2])
    chosen = files if len(files) == 1 else [file for file in files if split and file.name.startswith(split)]
    if len(chosen) != 1:
        names = ", ".join(file.name for file in files)
        raise UserError(f"{key}: {path} holds the images of several splits. Name the file of one: {names}.")
    return IdxImages(chosen[0], key)


class IdxImages(Source):
    """The grayscale images of one idx file, encoded as PNG when read. A label file is read from the same folder."""

    def __init__(self, path: Path, key: str) -> None:
        self._path = path
        self._images = read_array(path, key, axes=3)
        self.description = f"{counted(len(self._images), 'image')} in {path}"
        labels_path = path.with_name(path.name.replace(IMAGES, LABELS))
        if labels_path.is_file():
            labels = read_array(labels_path, key, axes=1)
            if len(labels) != len(self._images):
                raise UserError(
                    f"{key}: {labels_path} has {len(labels)} labels for {len(self._images)} images. Get both again."
                )
            self.use_labels([str(label) for label in labels.tolist()])

    def __len__(self) -> int:
        return len(self._images)

    def name(self, index: int) -> str:
        return f"{self._path}[{index}]"

    def read(self, index: int) -> bytes:
        buffer = io.BytesIO()
        Image.fromarray(self._images[index]).save(buffer, format="PNG", compress_level=1)
        return buffer.getvalue()


def read_array(path: Path, key: str, axes: int) -> NDArray[np.uint8]:
    """Read an array of bytes, packed or not.

    Raises UserError if the file does not exist, is damaged, or has another number of axes.
    """
    # File format: two zero bytes, type, number of axes, sizes (big-endian), values.
    data = read_file(path, f"{key}: {path}")
    try:
        data = gzip.decompress(data) if data.startswith(GZIP) else data
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{key}: {path}: cannot be read: {error}. Get it again.") from error
    begin = 4 + 4 * axes
    if len(data) < begin or data[:4] != bytes([0, 0, UBYTE, axes]):
        raise UserError(f"{key}: {path}: not an idx file of unsigned bytes with {axes} axes. Get it again.")
    shape: tuple[Any, ...] = tuple(np.frombuffer(data[4:begin], dtype=">u4").tolist())
    if len(data) - begin != math.prod(shape) or not len(data) - begin:
        raise UserError(f"{key}: {path}: {len(data) - begin:,} bytes of values, its header says {shape}. Get it again.")
    return np.frombuffer(data, dtype=np.uint8, offset=begin).reshape(shape)
