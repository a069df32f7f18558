"""Cut a class-balanced subset out of an MNIST-like data set, as idx files of their own.

    python -m crossmae.experiments.study.idx_subset --source /usr/share/datasets/fashion-mnist --output OUT \\
        --per-class 1280

The subset has the first pictures of each class, in the order of the source. It needs no random numbers.
"""

from __future__ import annotations

import argparse
import gzip
import logging
import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from crossmae.data.sources.idx import IMAGES, LABELS, UBYTE, read_array
from crossmae.errors import UserError, run_cli, set_up_log
from crossmae.files import make_folder, write_atomically

log = logging.getLogger(__name__)

IMAGE_FILE, LABEL_FILE = f"train-{IMAGES}.gz", f"train-{LABELS}.gz"


def first_of_each_class(labels: NDArray[np.uint8], per_class: int) -> NDArray[np.int64]:
    """Find the first `per_class` indices of each class, in ascending order.

    Raises UserError if a class has fewer images.
    """
    chosen = []
    for label in np.unique(labels):
        found = np.flatnonzero(labels == label)
        if len(found) < per_class:
            raise UserError(f"--per-class: class {label} has {len(found)} of {per_class} images. Lower the number.")
        chosen.append(found[:per_class])
    return np.sort(np.concatenate(chosen))


def write_idx(path: Path, values: NDArray[np.uint8]) -> None:
    """Write a packed idx file, always with the same bytes."""
    head = struct.pack(f">HBB{values.ndim}I", 0, UBYTE, values.ndim, *values.shape)
    packed = gzip.compress(head + values.tobytes(), compresslevel=6, mtime=0)
    write_atomically(path, lambda part: part.write_bytes(packed))


def main(argv: Sequence[str] | None = None) -> None:
    """Write the subset, the images last."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, required=True, help="folder with the train-* files")
    parser.add_argument("--output", type=Path, required=True, help="folder of the subset")
    parser.add_argument("--per-class", type=int, required=True, help="images of each class")
    args = parser.parse_args(argv)
    set_up_log()
    images = read_array(args.source / IMAGE_FILE, "--source", axes=3)
    labels = read_array(args.source / LABEL_FILE, "--source", axes=1)
    chosen = first_of_each_class(labels, args.per_class)
    make_folder(args.output, "--output")
    write_idx(args.output / LABEL_FILE, labels[chosen])
    write_idx(args.output / IMAGE_FILE, images[chosen])
    log.info("%d of %d images in %s", len(chosen), len(images), args.output)


if __name__ == "__main__":
    run_cli(main)
