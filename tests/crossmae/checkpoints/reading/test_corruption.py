"""Proves what becomes of damaged weight files: 200 seeded corruptions of every container end in an error that names the
file, or in what was written, in bounded time and memory.

Containers without a checksum that others write (old torch files, pickled arrays, plain safetensors) cannot tell
changed values from true ones, nor a changed letter of a name. There the promise is less: no other error, no
endless work, finite tensors that are no larger than the file. Loading is strict about names and shapes anyhow."""

from __future__ import annotations

import argparse
import json
import pickle
import random
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from crossmae.checkpoints.metadata import DIGEST, FORMAT, PICKLED_METADATA, PIXEL_MEAN, digest
from crossmae.checkpoints.weights import Weights, read_weights, save_weights
from crossmae.errors import UserError

CORRUPTIONS = 200
METADATA = {FORMAT: "crossmae", PIXEL_MEAN: "[0.5, 0.5, 0.5]"}


def tensors(*, numpy: bool = False) -> dict[str, Tensor]:
    """A few small ones of several types; without bfloat16 for numpy."""
    generator = torch.Generator().manual_seed(0)
    found = {
        "patch_embed.proj.weight": torch.randn(8, 3, 4, 4, generator=generator),
        "cls_token": torch.randn(1, 1, 8, generator=generator),
        "blocks.0.attn.qkv.weight": torch.randn(24, 8, generator=generator).half(),
        "head.0.num_batches_tracked": torch.tensor(7),
        "empty": torch.empty(0, 3),
    }
    return found if numpy else found | {"blocks.0.norm1.weight": torch.randn(8, generator=generator).bfloat16()}


def with_ballast(**more: Any) -> dict[str, Any]:
    """What training programs write beside the weights."""
    args = argparse.Namespace(model="mae_vit_base_patch16", betas=(0.9, 0.95), seed=0)
    return {"model": tensors(), "optimizer": {"state": {0: {"step": torch.tensor(3.0)}}}, "args": args, **more}


def pickled(folder: Path, protocol: int, **more: Any) -> None:
    content = {"model": {name: tensor.numpy() for name, tensor in tensors(numpy=True).items()}, **more}
    (folder / "a.pkl").write_bytes(pickle.dumps(content, protocol))


def noted(values: dict[str, Tensor]) -> dict[str, dict[str, str]]:
    return {PICKLED_METADATA: METADATA | {DIGEST: digest(values, METADATA)}}


def sharded(folder: Path) -> None:
    names = list(tensors())
    shards = {name: f"model-0000{1 + index % 2}-of-00002.safetensors" for index, name in enumerate(names)}
    for shard in set(shards.values()):
        save_file({name: tensors()[name] for name in names if shards[name] == shard}, folder / shard, {"format": "pt"})
    index = {"metadata": {"total_size": 1}, "weight_map": shards}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


PROTECTED: dict[str, Callable[[Path], object]] = {
    "ours safetensors": lambda folder: save_weights(folder / "a.safetensors", tensors(), METADATA),
    "ours pth": lambda folder: torch.save({"model": tensors(), **noted(tensors())}, folder / "a.pth"),
    "ours pkl": lambda folder: pickled(folder, 4, **noted(tensors(numpy=True))),
    "torch archive": lambda folder: torch.save(with_ballast(), folder / "a.pth"),
}
WITHOUT_CHECKSUM: dict[str, Callable[[Path], object]] = {
    "torch legacy": lambda folder: torch.save(with_ballast(), folder / "a.pt", _use_new_zipfile_serialization=False),
    "pickle 2": lambda folder: pickled(folder, 2),
    "pickle 4": lambda folder: pickled(folder, 4),
    "pickle 5": lambda folder: pickled(folder, 5),
    "hub folder": lambda folder: save_file(tensors(), folder / "model.safetensors", {"format": "pt"}),
    "hub shards": sharded,
}


def corrupt(data: bytes, random: random.Random) -> bytes:
    """One of ten kinds of damage, at random places."""
    size = len(data)
    start = random.randrange(size)
    end = min(size, start + random.choice((1, 4, 16, 64, 512)))
    other = random.randrange(size)
    garbage = random.randbytes(random.choice((1, 7, 64)))

    def flipped(count: int) -> bytes:
        changed = bytearray(data)
        for place in random.sample(range(size), count):
            changed[place] ^= 1 << random.randrange(8)
        return bytes(changed)

    kinds: tuple[Callable[[], bytes], ...] = (
        lambda: data[:start],
        lambda: flipped(1),
        lambda: flipped(min(size, 20)),
        lambda: data[:start] + bytes(end - start) + data[end:],
        lambda: data[:end] + data[start:],
        lambda: data[:start] + data[end:],
        lambda: data[:start] + data[other : other + end - start] + data[end:],
        lambda: data[:start] + garbage + data[start:],
        lambda: data + garbage,
        lambda: random.randrange(1 << random.randrange(1, 64)).to_bytes(8, "little") + data[8:],
    )
    return random.choice(kinds)()


def read_in_time(path: Path, limit: Callable[[], AbstractContextManager[None]]) -> Weights | UserError:
    try:
        with limit():
            return read_weights(path)
    except UserError as error:
        return error


def same(found: Weights, original: Weights) -> bool:
    return (
        found.metadata == original.metadata
        and found.tensors.keys() == original.tensors.keys()
        and all(
            tensor.dtype == original.tensors[name].dtype and torch.equal(tensor, original.tensors[name])
            for name, tensor in found.tensors.items()
        )
    )


@pytest.mark.parametrize("container", [*PROTECTED, *WITHOUT_CHECKSUM])
def test_corruptions(tmp_path: Path, bounded: Any, container: str) -> None:
    (PROTECTED | WITHOUT_CHECKSUM)[container](tmp_path)
    files = sorted(tmp_path.iterdir())
    path = files[0] if len(files) == 1 and "hub" not in container else tmp_path
    original = read_weights(path)
    assert (
        original.tensors.keys()
        == tensors(numpy=("p" in container and "pickle" in container) or "pkl" in container).keys()
    )
    errors = 0
    for seed in range(CORRUPTIONS):
        chance = random.Random(seed)
        file = chance.choice(files)
        data = file.read_bytes()
        file.write_bytes(corrupt(data, chance))
        found = read_in_time(path, bounded)
        if isinstance(found, UserError):
            errors += 1
            assert str(tmp_path) in str(found), found
        elif not same(found, original):
            assert container in WITHOUT_CHECKSUM, f"seed {seed} was not noticed"
            size = sum(file.stat().st_size for file in files)
            assert sum(tensor.nbytes for tensor in found.tensors.values()) <= 2 * size
        file.write_bytes(data)
    assert errors > CORRUPTIONS / 2
