"""COCO run lengths of masks whose values are objects."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray


class ValueRuns(NamedTuple):
    """Run lengths of one value of a mask, as COCO stores them uncompressed, and its box (x, y, width, height)."""

    mask: dict[str, Any]
    box: list[float]


def encode_values(values: NDArray[Any]) -> dict[int, ValueRuns]:
    """Encode each value of an array (H, W) except 0.

    Runs go down the columns, as in COCO. The time grows with the pixels and not with the number of values.
    """
    height, width = values.shape
    flat = values.ravel(order="F")
    if not flat.size:
        return {}
    starts = np.concatenate([[0], np.flatnonzero(flat[1:] != flat[:-1]) + 1])
    ends, owners = np.append(starts[1:], flat.size), flat[starts]
    order = np.argsort(owners, kind="stable")
    found, firsts = np.unique(owners[order], return_index=True)
    runs = {}
    for value, positions in zip(found.tolist(), np.split(order, firsts[1:]), strict=True):
        if value:
            begin, end = starts[positions], ends[positions]
            counts = np.stack([begin - np.append(0, end[:-1]), end - begin], axis=1).ravel().tolist()
            rest = [int(flat.size - end[-1])] if end[-1] < flat.size else []
            mask = {"size": [height, width], "counts": counts + rest}
            runs[int(value)] = ValueRuns(mask, _box(begin, end - 1, height))
    return runs


def _box(first: NDArray[np.int64], last: NDArray[np.int64], height: int) -> list[float]:
    """Return the box of runs, given their first and last positions."""
    left, right = first // height, last // height
    whole = bool((left != right).any())  # from one column into the next: the lowest and the highest row
    top, bottom = (0, height - 1) if whole else (int((first % height).min()), int((last % height).max()))
    x = int(left.min())
    return [float(x), float(top), float(int(right.max()) - x + 1), float(bottom - top + 1)]
