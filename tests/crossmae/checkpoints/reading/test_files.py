"""Proves that a path finds its weights, whether a file, a run, a transformers or timm folder, and that everything else
that a path can lead to has an error of its own."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import pickle
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from crossmae.checkpoints.reading.files import HUB_FILES, find_file
from crossmae.checkpoints.run_checkpoint import save_checkpoint
from crossmae.checkpoints.weights import read_weights
from crossmae.errors import UserError

INDEX = "model.safetensors.index.json"


@pytest.fixture
def tensors() -> dict[str, Tensor]:
    return {name: torch.randn(2, 3) for name in ("cls_token", "norm.bias", "norm.weight", "pos_embed")}


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


# Files


def test_contents_decide_not_the_suffix(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    torch.save(tensors, tmp_path / "a.safetensors")
    save_file(tensors, tmp_path / "b.pth")
    (tmp_path / "c.json").write_bytes(pickle.dumps({name: tensor.numpy() for name, tensor in tensors.items()}))
    for path in tmp_path.iterdir():
        assert_same(read_weights(path).tensors, tensors)


def tarred() -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("weights.pth"))
    return file.getvalue()


def numpy_file() -> bytes:
    file = io.BytesIO()
    np.save(file, np.ones(3))
    return file.getvalue()


NOT_WEIGHTS = {
    "empty": (b"", r"the file is empty \(0 bytes\)"),
    "HTML": (b"\n<!DOCTYPE html><html>", "a web page"),
    "short HTML": (b"<html>", "a web page"),
    "XML": (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "a web page"),
    "git-lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "git-lfs pointer.*git lfs pull"),
    "text": (b"just text", r"not a weight file \(9 bytes, starting with b'just text'\)"),
    "gzip": (gzip.compress(b"x"), "a compressed file. Unpack it"),
    "bzip2": (bz2.compress(b"x"), "a compressed file. Unpack it"),
    "xz": (lzma.compress(b"x"), "a compressed file. Unpack it"),
    "zstd": (b"\x28\xb5\x2f\xfd\x04\x00", "a compressed file. Unpack it"),
    "tar": (tarred(), "a tar archive. Unpack it"),
    "npy": (numpy_file(), "one NumPy array"),
    "TensorFlow": (b"\x89HDF\r\n\x1a\n" + bytes(20), "an HDF5 file, as TensorFlow and Keras write. Use the PyTorch"),
    "Flax": (b"\x81\xa6params\x81\xa3vit", "msgpack, as Flax"),
    "large Flax": (b"\xde\x01\x00\xa6params", "msgpack, as Flax"),
    "ONNX": (b"\x08\x08\x12\x07pytorch\x1a\x052.6.0", "an ONNX model"),
    "GGUF": (b"GGUF\x03\x00\x00\x00", "a GGUF file"),
    "config": (b'{"model_type": "vit"}', "JSON, but not an index of weights"),
    "broken JSON": (b'{"weight_map": {"a', "truncated or damaged"),
    "deep JSON": (b'{"a":' * 100_000, "truncated or damaged"),
    "truncated pickle": (pickle.dumps({"a": np.zeros(100)})[:-40], r"truncated or damaged \(\d+ bytes\)"),
    "long pickle": (pickle.dumps({"a": np.zeros(2)}) + b"more", "4 bytes after its end"),
    "header of safetensors alone": (b"\x10\x00\x00\x00\x00\x00\x00\x00{", "truncated or damaged"),
    "long header": (b"\xff\xff\xff\xff\xff\xff\xff\x7f{}", "truncated or damaged"),
}


@pytest.mark.parametrize("what", NOT_WEIGHTS)
def test_what_is_not_weights_has_its_own_error(tmp_path: Path, bounded: Any, what: str) -> None:
    content, told = NOT_WEIGHTS[what]
    path = tmp_path / "a.pth"
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"{path}: .*{told}"), bounded():
        read_weights(path)


@pytest.mark.parametrize("share", [0.02, 0.5, 0.99])
def test_truncated_safetensors(tmp_path: Path, tensors: dict[str, Tensor], share: float) -> None:
    path = tmp_path / "a.safetensors"
    save_file(tensors, path)
    path.write_bytes(path.read_bytes()[: max(9, int(path.stat().st_size * share))])
    with pytest.raises(UserError, match=r"a\.safetensors: truncated or damaged \([\d,]+ bytes\)"):
        read_weights(path)


def test_missing_paths(tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    with pytest.raises(
        UserError, match=rf"gone/x\.pth: no such file.*nearest folder that exists is {tmp_path}/here\.$"
    ):
        read_weights(tmp_path / "here/gone/x.pth")
    with pytest.raises(UserError, match=r"here: a folder without weights, without model\.safetensors"):
        read_weights(tmp_path / "here")


# Folders


def test_run_folder(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = tmp_path / "run"
    for step in (9, 10, 200):
        save_checkpoint(run, step, {"step": torch.tensor([step])}, {}, {}, {}, keep=5)
    (run / "checkpoints/step-00000200/manifest.json").unlink()
    assert read_weights(run).path == run / "checkpoints/step-00000010/model.safetensors"
    assert "step-00000200" in caplog.text
    assert read_weights(run / "checkpoints/step-00000009").tensors["step"] == 9
    with pytest.raises(UserError, match=r"step-00000200: not a complete checkpoint: no manifest\.json"):
        read_weights(run / "checkpoints/step-00000200")
    save_file({"final": torch.zeros(1)}, run / "model.safetensors")
    assert read_weights(run).path == run / "model.safetensors"


def sharded(folder: Path, tensors: dict[str, Tensor], suffix: str = "safetensors") -> Path:
    """Three shards and their index."""
    weight_map = {name: f"model-{1 + number % 3:05}-of-00003.{suffix}" for number, name in enumerate(tensors)}
    for shard in set(weight_map.values()):
        content = {name: tensor for name, tensor in tensors.items() if weight_map[name] == shard}
        if suffix == "bin":
            torch.save({f"model.{name}": tensor for name, tensor in content.items()}, folder / shard)
        else:
            save_file(content, folder / shard, {"format": "pt"})
    index = folder / (INDEX if suffix == "safetensors" else "pytorch_model.bin.index.json")
    if suffix == "bin":
        weight_map = {f"model.{name}": shard for name, shard in weight_map.items()}
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    return index


@pytest.mark.parametrize("name", HUB_FILES)
def test_hub_folders(tmp_path: Path, tensors: dict[str, Tensor], name: str) -> None:
    if name.endswith(".json"):
        sharded(tmp_path, tensors, "bin" if "bin" in name else "safetensors")
    elif name.endswith(".bin"):
        torch.save(tensors, tmp_path / name)
    else:
        save_file(tensors, tmp_path / name)
    weights = read_weights(tmp_path)
    assert weights.path == tmp_path / name
    assert_same(weights.tensors, tensors)


def test_safetensors_are_taken_before_pickles(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    torch.save({}, tmp_path / "pytorch_model.bin")
    save_file(tensors, tmp_path / "model.safetensors")
    assert find_file(tmp_path) == tmp_path / "model.safetensors"


def test_shards_may_be_links_as_in_the_cache_of_the_hub(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshot"
    blobs.mkdir()
    snapshot.mkdir()
    sharded(blobs, tensors)
    for blob in blobs.iterdir():
        (snapshot / blob.name).symlink_to(blob)
    assert_same(read_weights(snapshot).tensors, tensors)


def test_a_folder_without_weights_says_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"with config\.json, but none of model\.safetensors, .*\. Name a weight file"):
        read_weights(tmp_path)
    (tmp_path / "checkpoint-500").mkdir()
    (tmp_path / "flax_model.msgpack").touch()
    (tmp_path / "checkpoint-500/model.safetensors").touch()
    told = r"Name one of its files: checkpoint-500/model\.safetensors, flax_model\.msgpack"
    with pytest.raises(UserError, match=told):
        read_weights(tmp_path)


@pytest.mark.parametrize(
    ("shard", "told"),
    [
        ("../secret.safetensors", r"names '\.\./secret\.safetensors', a file outside its folder"),
        ("/etc/passwd", "a file outside its folder"),
        ("sub/model.safetensors", "a file outside its folder"),
        ("", "1 of 4 shards are missing"),
        ("gone.safetensors", r"1 of 4 shards are missing: gone\.safetensors"),
        ("model-00002-of-00003.safetensors", "lists other tensors, they differ in cls_token"),
        (None, "JSON, but not an index"),
        ([], "JSON, but not an index"),
    ],
)
def test_wrong_indices(tmp_path: Path, tensors: dict[str, Tensor], shard: Any, told: str) -> None:
    index = sharded(tmp_path, tensors | {"cls_token": torch.zeros(1)})
    content = json.loads(index.read_text())
    content["weight_map"]["cls_token"] = shard
    index.write_text(json.dumps(content))
    with pytest.raises(UserError, match=told):
        read_weights(tmp_path)


def test_a_tensor_that_the_index_does_not_name(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    index = sharded(tmp_path, tensors)
    content = json.loads(index.read_text())
    del content["weight_map"]["pos_embed"]
    index.write_text(json.dumps(content))
    with pytest.raises(UserError, match="lists other tensors, they differ in pos_embed"):
        read_weights(tmp_path)


def test_a_shard_that_is_no_weight_file(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    sharded(tmp_path, tensors)
    (tmp_path / "model-00003-of-00003.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(UserError, match=r"model-00003-of-00003\.safetensors: a git-lfs pointer"):
        read_weights(tmp_path)


def test_an_index_that_names_itself(tmp_path: Path, bounded: Any) -> None:
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": INDEX}}))
    with pytest.raises(UserError, match="names an index as a shard"), bounded():
        read_weights(tmp_path)


def test_a_path_that_safetensors_cannot_open_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "caf\udce9"
    folder.mkdir()
    save_file({"a": torch.zeros(1)}, tmp_path / "a.safetensors")
    (tmp_path / "a.safetensors").rename(folder / "a.safetensors")
    with pytest.raises(UserError, match=r"caf\\udce9/a\.safetensors: safetensors opens paths in UTF-8 only\. Rename"):
        read_weights(folder / "a.safetensors")


def test_one_part_of_a_model_is_no_model(tmp_path: Path) -> None:
    part = tmp_path / "model-00001-of-00002.safetensors"
    save_file({"cls_token": torch.zeros(1, 1, 4)}, part)
    for path in (part, tmp_path):
        with pytest.raises(UserError, match=rf"{part.name}: one of 2 parts of a model\. Put all parts and their index"):
            read_weights(path)
    (tmp_path / "x.index.json").write_text("{}")
    with pytest.raises(UserError, match=r"one of 2 parts of a model\. Name the index x\.index\.json\."):
        read_weights(part)


def test_a_second_model_in_a_folder_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("model.safetensors", "model_1.safetensors"):
        save_file({"cls_token": torch.zeros(1, 1, 4)}, tmp_path / name)
    assert find_file(tmp_path) == tmp_path / "model.safetensors"
    assert "model.safetensors is read, not model_1.safetensors" in caplog.text
