"""Proves that idx files give the pixels and labels that they hold, tell their splits, and that damage is named."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest

from crossmae.data.pixels import read_pixels
from crossmae.data.sources import open_source
from crossmae.errors import UserError

IMAGES = np.random.default_rng(0).integers(0, 256, (5, 6, 7), dtype=np.uint8)
LABELS = np.array([9, 0, 10, 0, 9], dtype=np.uint8)


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


def write(folder: Path, split: str, count: int = 5, compressed: bool = True) -> Path:
    folder.mkdir(exist_ok=True)
    suffix, pack = (".gz", gzip.compress) if compressed else ("", bytes)
    (folder / f"{split}-labels-idx1-ubyte{suffix}").write_bytes(pack(idx(LABELS[:count])))
    path = folder / f"{split}-images-idx3-ubyte{suffix}"
    path.write_bytes(pack(idx(IMAGES[:count])))
    return path


@pytest.mark.parametrize("compressed", [True, False])
def test_pixels_and_labels_are_those_of_the_file(tmp_path: Path, compressed: bool) -> None:
    path = write(tmp_path, "train", compressed=compressed)
    source = open_source(path, "SRC")
    assert len(source) == 5
    assert source.classes == ("0", "9", "10")  # by value, not by letter
    assert [source.classes[source.label(index)] for index in range(5)] == ["9", "0", "10", "0", "9"]
    for index in range(5):
        assert np.array_equal(np.asarray(read_pixels(source, index, channels=1)), IMAGES[index])
    assert source.name(3) == f"{path}[3]"
    assert source.tail(3) == source.read(3)[-16:][-len(source.tail(3)) :]


def test_the_key_tells_the_split(tmp_path: Path) -> None:
    write(tmp_path, "train")
    write(tmp_path, "t10k", count=3)
    assert len(open_source(tmp_path, "data.train")) == 5
    assert len(open_source(tmp_path, "probe.val")) == 3
    with pytest.raises(UserError, match=r"SRC: .* several splits. Name the file of one: t10k-images.*, train-images"):
        open_source(tmp_path, "SRC")


def test_one_split_needs_no_key_and_labels_may_be_missing(tmp_path: Path) -> None:
    write(tmp_path, "emnist-letters-train")
    (tmp_path / "emnist-letters-train-labels-idx1-ubyte.gz").unlink()
    source = open_source(tmp_path, "SRC")
    assert len(source) == 5
    with pytest.raises(UserError, match="have no labels"):
        source.label(0)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[:-9], "cannot be read: Compressed file ended"),
        (lambda data: gzip.compress(gzip.decompress(data)[:-9]), r"201 bytes of values, its header says \(5, 6, 7\)"),
        (lambda data: gzip.compress(b"\0\0\x0d" + gzip.decompress(data)[3:]), "not an idx file of unsigned bytes"),
        (lambda data: b"", "not an idx file"),
    ],
)
def test_damage_is_named(tmp_path: Path, damage: object, message: str) -> None:
    path = write(tmp_path, "train")
    path.write_bytes(damage(path.read_bytes()))  # type: ignore[operator]
    with pytest.raises(UserError, match=message):
        open_source(path, "SRC")


def test_one_label_per_image(tmp_path: Path) -> None:
    path = write(tmp_path, "train")
    (tmp_path / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(LABELS[:4])))
    with pytest.raises(UserError, match="has 4 labels for 5 images"):
        open_source(path, "SRC")
