"""Proves that a file of ours is read only with the names, types, shapes, values and metadata that were written."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from crossmae.checkpoints.metadata import DIGEST, FORMAT, PICKLED_METADATA, PIXEL_MEAN, digest, signed
from crossmae.checkpoints.weights import read_weights, save_weights
from crossmae.errors import UserError

METADATA = {FORMAT: "crossmae", PIXEL_MEAN: "[0.5]"}


def tensors() -> dict[str, Tensor]:
    return {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2, dtype=torch.bfloat16), "c": torch.tensor(True)}


CHANGES: dict[str, dict[str, Tensor]] = {
    "value": {"a": tensors()["a"] + 1e-6},
    "sign of zero": {"a": tensors()["a"] * torch.tensor([[-1.0, 1, 1], [1, 1, 1]])},
    "shape": {"a": tensors()["a"].reshape(3, 2)},
    "type": {"b": tensors()["b"].view(torch.float16)},
    "more": {"d": torch.empty(0)},
}


@pytest.mark.parametrize("change", CHANGES)
def test_every_change_of_a_tensor_changes_it(change: str) -> None:
    assert digest(tensors() | CHANGES[change], METADATA) != digest(tensors(), METADATA)


def test_names_and_metadata_count_but_not_order_or_memory() -> None:
    expected = digest(tensors(), METADATA)
    assert digest({"x" if name == "a" else name: tensor for name, tensor in tensors().items()}, METADATA) != expected
    assert digest(tensors(), METADATA | {PIXEL_MEAN: "[0.6]"}) != expected
    assert digest(tensors(), {}) != expected
    transposed = tensors() | {"a": tensors()["a"].t().contiguous().t()}
    assert digest(dict(reversed(transposed.items())), dict(reversed(METADATA.items()))) == expected
    assert digest(tensors(), signed(tensors(), METADATA)) == expected


def test_what_is_written_has_one_and_readers_do_not_see_it(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_weights(path, tensors(), METADATA)
    with safe_open(path, "pt") as file:
        assert file.metadata() == METADATA | {DIGEST: digest(tensors(), METADATA)}
    assert read_weights(path).metadata == METADATA
    # What is read and written again, with changes, is no error.
    save_weights(path, read_weights(path).tensors | {"a": torch.zeros(1)}, read_weights(path).metadata, force=True)
    assert read_weights(path).tensors["a"] == 0


def test_names_count_as_they_are_in_the_file(tmp_path: Path) -> None:
    save_weights(tmp_path / "a.safetensors", {f"module.{name}": value for name, value in tensors().items()}, {})
    assert read_weights(tmp_path / "a.safetensors").tensors.keys() == tensors().keys()


@pytest.mark.parametrize("container", ["a.safetensors", "a.pth"])
@pytest.mark.parametrize("change", [*CHANGES, "metadata", "name of the digest"])
def test_a_changed_file_is_an_error(tmp_path: Path, container: str, change: str) -> None:
    path = tmp_path / container
    metadata = signed(tensors(), METADATA)
    changed = tensors() | CHANGES.get(change, {})
    if change == "metadata":
        metadata[PIXEL_MEAN] = "[0.6]"
    if change == "name of the digest":
        metadata["digesu"] = metadata.pop(DIGEST)
    if container == "a.pth":
        torch.save({"model": changed, PICKLED_METADATA: metadata}, path)
    else:
        save_file(changed, path, metadata)
    told = r"changed or damaged \(recorded sha256:\w{16}\.\.\., found sha256:\w{16}\.\.\.\)"
    with pytest.raises(UserError, match=f"{path}: {told}"):
        read_weights(path)


def test_without_a_digest_a_file_reads_as_before(tmp_path: Path) -> None:
    save_file(tensors(), tmp_path / "a.safetensors", METADATA)
    assert read_weights(tmp_path / "a.safetensors").metadata == METADATA
