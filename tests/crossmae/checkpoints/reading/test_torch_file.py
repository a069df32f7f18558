"""Proves that what torch.save writes, now and before version 1.6, is read as torch.load reads it, bit for bit, and that
damage, programs and other archives have errors of their own."""

from __future__ import annotations

import io
import re
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from crossmae.checkpoints.reading.torch_file import read_torch_file
from crossmae.checkpoints.weights import read_weights
from crossmae.errors import UserError

DTYPES = (
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.bool),
)


def zoo() -> dict[str, Any]:
    """Tensors in every form that a checkpoint may have them in."""
    flat = torch.arange(24.0)
    attributed = torch.ones(2)
    attributed.note = "x"  # type: ignore[attr-defined]
    return {
        **{str(dtype): torch.tensor([0.5, 2.0, 1.0]).to(dtype) for dtype in DTYPES},
        "parameter": nn.Parameter(torch.ones(2, 3)),
        "scalar": torch.tensor(3),
        "empty": torch.empty(0, 4),
        "transposed": flat.view(4, 6).t(),
        "slice": flat[6:12],
        "stepped": flat[1::5],
        "channels last": torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
        "repeated": torch.ones(1).expand(3),
        "attributed": attributed,
        "attributed parameter": nn.Parameter(attributed),
    }


def assert_same(actual: Any, expected: Any) -> None:
    assert type(actual) is type(expected) or isinstance(expected, Tensor)
    if isinstance(expected, dict):
        assert list(actual) == list(expected)
        for key, value in expected.items():
            assert_same(actual[key], value)
    elif isinstance(expected, Tensor):
        assert actual.dtype == expected.dtype
        assert actual.shape == expected.shape
        assert actual.stride() == expected.stride()
        assert (
            actual.contiguous().reshape(-1).view(torch.uint8).equal(expected.contiguous().reshape(-1).view(torch.uint8))
        )
    else:
        assert actual == expected


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("archive", [True, False])
def test_it_is_what_torch_loads(tmp_path: Path, archive: bool, protocol: int) -> None:
    tensors = zoo()
    if not archive:
        del tensors["torch.uint16"], tensors["torch.float8_e4m3fn"]  # torch writes them and cannot read them
    content = {"model": tensors, "epoch": 3, "lr": np.float64(0.1), "rng": torch.get_rng_state()}
    path = tmp_path / "a.pth"
    torch.save(content, path, pickle_protocol=protocol, _use_new_zipfile_serialization=archive)
    assert_same(read_torch_file(path), torch.load(path, weights_only=False))


def test_views_of_one_storage_stay_views(tmp_path: Path) -> None:
    torch.save({"a": (whole := torch.zeros(6)), "b": whole[2:4]}, tmp_path / "a.pth")
    found = read_torch_file(tmp_path / "a.pth")
    found["b"] += 1
    assert found["a"].tolist() == [0, 0, 1, 1, 0, 0]


def test_without_checksums(tmp_path: Path) -> None:
    """torch can leave them out, which the zip format has no way to say but zeros."""
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"a": torch.ones(3)}, tmp_path / "a.pth")
    finally:
        torch.serialization.set_crc32_options(True)
    assert read_weights(tmp_path / "a.pth").tensors["a"].tolist() == [1, 1, 1]


@pytest.mark.parametrize("part", ["data/0", "data/1", "data.pkl", "version"])
def test_a_flipped_bit_in_any_part(tmp_path: Path, part: str) -> None:
    path = tmp_path / "a.pth"
    torch.save({"model": {"a": torch.ones(64)}, "optimizer": torch.ones(64)}, path)
    with zipfile.ZipFile(path) as archive:
        content, data = archive.read(f"a/{part}"), bytearray(path.read_bytes())
    place = data.index(content) + len(content) // 2 if part != "data/1" else data.rindex(content) + 8
    data[place] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match=rf"damaged.*Bad CRC-32 for file 'a/{part}'"):
        read_weights(path)


@pytest.mark.parametrize("archive", [True, False])
@pytest.mark.parametrize("share", [0.02, 0.5, 0.99])
def test_truncated_files(tmp_path: Path, archive: bool, share: float) -> None:
    path = tmp_path / "a.pth"
    torch.save({"model": zoo()}, path, _use_new_zipfile_serialization=archive)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    with pytest.raises(UserError, match=r"a\.pth: truncated or damaged \([\d,]+ bytes\)"):
        read_weights(path)


def test_bytes_after_the_end_of_a_legacy_file(tmp_path: Path) -> None:
    """They may be values that were shifted."""
    torch.save({"a": torch.ones(3)}, tmp_path / "a.pth", _use_new_zipfile_serialization=False)
    with open(tmp_path / "a.pth", "ab") as file:
        file.write(bytes(8))
    with pytest.raises(UserError, match="8 bytes after its end"):
        read_weights(tmp_path / "a.pth")


def test_a_wrong_count_in_a_legacy_file(tmp_path: Path) -> None:
    """Nothing but this count would tell that values before it are missing."""
    path = tmp_path / "a.pth"
    torch.save({"a": torch.ones(3)}, path, _use_new_zipfile_serialization=False)
    count = (3).to_bytes(8, "little")
    path.write_bytes(path.read_bytes().replace(count, (4).to_bytes(8, "little")))
    with pytest.raises(UserError, match=r"storage \d+ has 4 values where 3 belong"):
        read_weights(path)


def zipped(path: Path, *names: str, data: bytes = b"x") -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            archive.writestr(name, data)


def test_other_archives(tmp_path: Path) -> None:
    np.savez(tmp_path / "npz", a=np.ones(3))
    zipped(tmp_path / "zip", "model/weights.pth", "model/README.md")
    zipped(tmp_path / "two", "a/data.pkl", "b/data.pkl")
    zipped(tmp_path / "script.pt", "a/data.pkl", "a/code/__torch__.py", "a/constants.pkl")
    told = {
        "npz.npz": "a NumPy .npz archive",
        "zip": "a zip archive of other files than torch.save's .model/weights.pth, model/README.md",
        "two": "two entries of its archive have one name",
        "script.pt": "a TorchScript archive, which has a program. Nothing in the file was run",
    }
    for name, message in told.items():
        with pytest.raises(UserError, match=f"{name}: .*{message}"):
            read_weights(tmp_path / name)


@pytest.mark.parametrize("archive", [True, False])
def test_big_endian_files_are_an_error(tmp_path: Path, archive: bool) -> None:
    path = tmp_path / "a.pth"
    torch.save({"a": torch.ones(3)}, path, _use_new_zipfile_serialization=archive)
    if archive:
        copy = io.BytesIO()
        with zipfile.ZipFile(path) as source, zipfile.ZipFile(copy, "w") as changed:
            for info in source.infolist():
                changed.writestr(info.filename, b"big" if info.filename.endswith("byteorder") else source.read(info))
        path.write_bytes(copy.getvalue())
    else:
        data = path.read_bytes()
        path.write_bytes(re.sub(rb"(?<=little_endianq.)\x88", b"\x89", data))
        assert path.read_bytes() != data
    with pytest.raises(UserError, match="written on a big-endian machine"):
        read_weights(path)


@pytest.mark.parametrize(
    "value", [torch.ones(2).to_sparse(), torch.quantize_per_tensor(torch.ones(2), 1, 0, torch.qint8)]
)
def test_other_tensors_are_refused_by_name(tmp_path: Path, value: Tensor) -> None:
    torch.save({"a": value}, tmp_path / "a.pth")
    with pytest.raises(
        UserError,
        match=r"special \(torch\.(_utils\._rebuild_sparse_tensor|_utils\._rebuild_qtensor|QInt8).*Save it dense",
    ):
        read_weights(tmp_path / "a.pth")


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
@pytest.mark.parametrize("archive", [True, False])
def test_complex_numbers(tmp_path: Path, dtype: torch.dtype, archive: bool) -> None:
    """Rotary tables have them; such a buffer must not keep a checkpoint from being read."""
    value = torch.randn(3, 2, dtype=dtype)
    torch.save({"a": value}, tmp_path / "a.pth", _use_new_zipfile_serialization=archive)
    assert torch.equal(read_weights(tmp_path / "a.pth").tensors["a"], value)
