"""Read files of `torch.save`: zip archives, and the older format (pickles, then bytes) of torch before version 1.6.

`torch.load` is not used. It does not compare the checksums of the archive. It unpacks compressed entries of any size,
and reserves as much memory as the pickle requests. `crossmae.checkpoints.reading.unpickle` reads the pickles.
"""

from __future__ import annotations

import io
import math
import mmap
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from crossmae.checkpoints.reading.unpickle import (
    GLOBALS,
    MAX_DIMENSIONS,
    Global,
    Unpickler,
    damaged,
    expect,
    read_mapped,
)
from crossmae.errors import UserError, shorten

LEGACY_MAGIC, LEGACY_PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
ZIP = b"PK\x03\x04"
_MAX_VALUES = 1 << 40  # most values of one tensor; torch's count of values overflows only above this number


def read_torch_file(path: Path) -> Any:
    """Read containers, numbers, strings, CPU tensors and argparse namespaces.

    Every byte is read once. Checksums are compared where the file has them. Raises UserError if the file is damaged, is
    another kind of zip archive, or refers to any other type.
    """
    with open(path, "rb") as file:
        legacy = file.read(len(ZIP)) != ZIP
    if legacy:
        return read_mapped(path, lambda mapped: _read_legacy(path, mapped))
    try:
        with zipfile.ZipFile(path) as archive:
            return _read_archive(path, archive)
    except (UserError, MemoryError):
        raise
    except Exception as error:  # wrong bytes can raise almost any exception
        raise damaged(path, error) from None


def _read_archive(path: Path, archive: zipfile.ZipFile) -> Any:
    entries = _entries(path, archive)
    storages: dict[str, Tensor] = {}

    def storage(saved: Any) -> Tensor:
        dtype, key, numel = _storage_id(saved)
        if key not in storages:
            storages[key] = _bytes_tensor(archive.read(entries.pop(f"data/{key}")))
        return _typed(storages[key], dtype, numel)

    if "byteorder" in entries and archive.read(entries["byteorder"]) != b"little":
        raise UserError(f"{path}: written on a big-endian machine. Save it again on a little-endian one.")
    content = Unpickler(path, TORCH_GLOBALS, storage).load(io.BytesIO(archive.read(entries.pop("data.pkl"))))
    for entry in entries.values():  # reading an unused entry compares its checksum
        archive.read(entry)
    return content


def _entries(path: Path, archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    infos = archive.infolist()
    entries = {info.filename.partition("/")[2]: info for info in infos}
    if "data.pkl" not in entries:
        names = [info.filename[:60] for info in infos]
        what = f"a zip archive of other files than torch.save's ({shorten(names)}). Unpack it and name the weight file."
        if names and all(info.filename.endswith(".npy") for info in infos):
            remedy = "Read it by timm.create_model(NAME, checkpoint_path=FILE), and save model.state_dict()."
            what = f"a NumPy .npz archive, as of JAX models (big_vision). {remedy}"
        raise UserError(f"{path}: {what}")
    if "constants.pkl" in entries:
        raise UserError(
            f"{path}: a TorchScript archive, which has a program. Nothing in the file was run. Save "
            "`model.state_dict()` with torch.save in the program that wrote it, and name that file."
        )
    if len(entries) != len(infos):
        raise ValueError("two entries of its archive have one name")
    # torch never compresses. A compressed entry may unpack to any size, and entries may overlap in the file.
    if any(info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size for info in infos):
        raise ValueError("an entry of its archive is compressed, which torch.save never does")
    if sum(info.file_size for info in infos) > path.stat().st_size:
        raise ValueError("the entries of its archive are larger than the file")
    if not any(info.CRC for info in infos):  # torch.serialization.set_crc32_options(False)
        for info in infos:
            info.CRC = None  # type: ignore[assignment]  # zipfile then compares nothing
    return entries


def _read_legacy(path: Path, file: mmap.mmap) -> Any:
    storages: dict[str, Tensor] = {}
    reserved = 0

    def storage(saved: Any) -> Tensor:
        nonlocal reserved
        dtype, key, numel = _storage_id(saved)
        if key not in storages:
            reserved += numel * dtype.itemsize
            if not 0 <= reserved <= len(file):
                raise ValueError("the tensors need more bytes than the file has")
            storages[key] = torch.empty(numel * dtype.itemsize, dtype=torch.uint8)
            types[key] = dtype
        return _typed(storages[key], dtype, numel)

    types: dict[str, torch.dtype] = {}
    plain = Unpickler(path, {})
    if (plain.load(file), plain.load(file)) != (LEGACY_MAGIC, LEGACY_PROTOCOL):
        raise ValueError("another protocol than torch.save's")
    if not plain.load(file)["little_endian"]:
        raise UserError(f"{path}: written on a big-endian machine. Save it again on a little-endian one.")
    content = Unpickler(path, TORCH_GLOBALS, storage).load(file)
    keys = plain.load(file)
    if not all(isinstance(key, str) for key in expect(keys, list)) or sorted(keys) != sorted(storages):
        raise ValueError("the list of its storages does not agree with its content")
    for key in keys:
        values, size = storages[key], int.from_bytes(file.read(8), "little")
        held = values.numel() // types[key].itemsize
        if size != held:
            raise ValueError(f"storage {key} has {size:,} values where {held:,} belong")
        values.copy_(_bytes_tensor(file.read(values.numel())))
    return content


def _storage_id(saved: Any) -> tuple[torch.dtype, str, int]:
    kind, dtype, key, _, numel, *view = expect(saved, tuple)
    known = isinstance(numel, int) and isinstance(dtype, torch.dtype) and isinstance(key, str)
    if not known or not isinstance(kind, str) or kind != "storage" or view not in ([], [None]):
        raise ValueError("a reference to something that is no storage")
    return dtype, key, numel


def _bytes_tensor(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)


def _typed(storage: Tensor, dtype: torch.dtype, numel: int) -> Tensor:
    if numel * dtype.itemsize != storage.numel():
        raise ValueError(f"a storage of {storage.numel():,} bytes where {numel:,} values of {dtype} belong")
    return storage.view(dtype)


# Builders of globals. Each function replaces the torch function that its docstring names.


def _size(sides: Any = ()) -> tuple[int, ...]:
    """Build a tuple of whole numbers, for `torch.Size`."""
    return tuple(expect(side, int) for side in expect(sides, list | tuple))


def _tensor(
    storage: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], grad: Any = None, hooks: Any = None,
    metadata: Any = None,
) -> Tensor:  # fmt: skip
    """Build a view of a storage, for `_rebuild_tensor` and `_rebuild_tensor_v2`."""
    size, stride, (offset,) = _size(size), _size(stride), _size((offset,))
    if metadata or len(size) != len(stride) or len(size) > MAX_DIMENSIONS or min((offset, *size, *stride)) < 0:
        raise ValueError("not a plain tensor")
    last = offset + sum((side - 1) * step for side, step in zip(size, stride, strict=True))
    if 0 not in size and (last >= storage.numel() or math.prod(size) > _MAX_VALUES):
        raise ValueError(f"a tensor of shape {tuple(size)} does not fit its storage of {storage.numel():,} values")
    return torch.as_strided(storage, size, stride, 0 if 0 in size else offset)


def _tensor_of_type(
    storage: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], grad: Any, hooks: Any,
    dtype: torch.dtype, metadata: Any = None,
) -> Tensor:  # fmt: skip
    """Build a view of an untyped storage, for `torch._utils._rebuild_tensor_v3`."""
    return _tensor(storage.view(dtype), offset, size, stride, grad, hooks, metadata)


def _with_attributes(build: Global, subclass: Any, arguments: tuple[Any, ...], state: Any) -> Any:
    """Build a tensor without its Python attributes, for `torch._tensor._rebuild_from_type_v2`."""
    if build.build not in (_tensor, _tensor_of_type):
        raise ValueError(f"a tensor built by {build.name}")
    return build.build(*expect(arguments, tuple))


_STORAGES = {
    "Double": torch.float64, "Float": torch.float32, "Half": torch.float16, "BFloat16": torch.bfloat16,
    "Long": torch.int64, "Int": torch.int32, "Short": torch.int16, "Char": torch.int8, "Byte": torch.uint8,
    "Bool": torch.bool, "ComplexFloat": torch.complex64, "ComplexDouble": torch.complex128,
}  # fmt: skip
TORCH_GLOBALS: dict[str, Any] = {
    **GLOBALS,
    "torch.Size": _size,
    "torch.device": lambda *_: "device",
    "torch.Tensor": None,
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_of_type,
    "torch._utils._rebuild_parameter": lambda data, *_: data,
    "torch._utils._rebuild_parameter_with_state": lambda data, *_: data,
    "torch._tensor._rebuild_from_type_v2": _with_attributes,
    "torch.storage.UntypedStorage": torch.uint8,
    **{f"torch.{name}Storage": dtype for name, dtype in _STORAGES.items()},
    **{f"torch.cuda.{name}Storage": dtype for name, dtype in _STORAGES.items()},
    **{str(value): value for value in vars(torch).values() if isinstance(value, torch.dtype)},
}
