"""Reading pickled weight files without running anything that is in them.

Two kinds of file: torch's (`.pth`, `.pt`), read by torch's weights-only unpickler plus `argparse.Namespace`,
which the published training scripts save; and detectron2's `.pkl` of numpy arrays, read by the unpickler
below. There is no way round either: a file that refers to anything else is refused, and the error names what
it refers to.
"""

from __future__ import annotations

import argparse
import pickle
import re
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from crossmae.errors import UserError

_REFUSED = re.compile(r"GLOBAL ([\w.]+)")
_ADVICE = (
    "Nothing in the file was run. If you trust whoever made it, save its tensors alone, as safetensors, "
    "from the program that wrote it, and give that file instead"
)


def read_torch_file(path: Path) -> Any:
    """What `torch.save` wrote: containers, numbers, strings, tensors (on the CPU) and argparse namespaces.

    Raises:
        UserError: damaged, or refers to anything else.
    """
    if zipfile.is_zipfile(path):
        _check_sums(path)
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # bytes that are not what they should be surface as almost any exception
        refused = _REFUSED.search(str(error))
        if refused:
            raise refusal(path, refused[1]) from None
        raise damaged(path, error) from None


def read_numpy_pickle(path: Path) -> Any:
    """What detectron2's converters and model zoo write: nested containers of numpy arrays, strings and
    numbers.

    Raises:
        UserError: damaged, or refers to anything else.
    """
    try:
        with open(path, "rb") as file:
            return _NumpyUnpickler(file, path).load()
    except UserError:
        raise
    except Exception as error:  # as above
        raise damaged(path, error) from None


def refusal(path: Path, name: str) -> UserError:
    """The error for a file that refers to a global outside the allow-list."""
    return UserError(
        f"{path}: refused, because it refers to {name}; only tensors, arrays, plain containers and "
        f"argparse.Namespace are read from a pickle. {_ADVICE}"
    )


def damaged(path: Path, error: Exception) -> UserError:
    """The error for a file that starts like a weight file and can not be read to its end."""
    return UserError(
        f"{path}: truncated or damaged ({path.stat().st_size:,} bytes): {type(error).__name__}: "
        f"{' '.join(str(error).split())[:200]}. Copy or download it again"
    )


def _check_sums(path: Path) -> None:
    """torch itself does not compare the checksums in its archive, and would load flipped bits as weights."""
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
    except Exception as error:  # a damaged directory of the archive
        raise damaged(path, error) from None
    if broken is not None:
        raise damaged(path, ValueError(f"the checksum of its part {broken} is wrong"))


class _NumpyUnpickler(pickle.Unpickler):
    """Finds numpy's way to rebuild arrays and OrderedDict; every other global is an error."""

    def __init__(self, file: Any, path: Path) -> None:
        # latin1: arrays in pickles of Python 2, as in detectron2's older files.
        super().__init__(file, encoding="latin1")
        self._path = path

    def find_class(self, module: str, name: str) -> Any:
        # numpy 2 renamed numpy.core; either name is in files.
        known = _ALLOWED.get((module.replace("numpy._core", "numpy.core"), name))
        if known is None:
            raise refusal(self._path, f"{module}.{name}")
        return known


def _empty_array(subtype: type, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """What numpy pickles as the start of an array; its state follows. Ignored arguments bound the memory."""
    return np.empty(0, np.int8)


def _array_from_buffer(buffer: Any, dtype: np.dtype, shape: tuple[int, ...], order: str) -> np.ndarray:
    """How pickle protocol 5 holds an array."""
    if order not in ("C", "F"):
        raise ValueError(f"array order {order!r}")
    flat: np.ndarray = np.frombuffer(buffer, dtype)
    return flat.reshape(shape, order="C" if order == "C" else "F")


def _latin1_bytes(text: str, encoding: str = "latin1") -> bytes:
    """How pickle protocols below 3 hold bytes."""
    if encoding != "latin1":
        raise ValueError(f"bytes in encoding {encoding!r}")
    return text.encode("latin1")


_ALLOWED: dict[tuple[str, str], Callable[..., Any]] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("numpy", "dtype"): np.dtype,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy.core.multiarray", "_reconstruct"): _empty_array,
    ("numpy.core.numeric", "_frombuffer"): _array_from_buffer,
    ("_codecs", "encode"): _latin1_bytes,
}
