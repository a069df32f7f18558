"""The same pictures in every layout that data.train takes, for the tests of sources."""

from __future__ import annotations

import io
import json
import random
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = ("ant", "bee", "cat")


def encoded(index: int, kind: str = "PNG") -> bytes:
    """Picture number `index`, of a size of its own."""
    pixels = np.random.default_rng(index).integers(0, 256, (10 + index, 20, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def write_tree(folder: Path, count: int = 9) -> list[Path]:
    """`count` pictures in one subfolder per class; the paths in their order."""
    paths = []
    for index in range(count):
        path = folder / CLASSES[index * len(CLASSES) // count] / f"{index:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(index))
        paths.append(path)
    return paths


def tar_bytes(members: Mapping[str, bytes], shuffle: int | None = None) -> bytes:
    """A tar file as any program would write it; `shuffle`: seed of another order of members."""
    names = list(members)
    if shuffle is not None:
        random.Random(shuffle).shuffle(names)
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name in names:
            member = tarfile.TarInfo(name)
            member.size = len(members[name])
            tar.addfile(member, io.BytesIO(members[name]))
    return buffer.getvalue()


def members_of(paths: Sequence[Path]) -> dict[str, bytes]:
    """Pictures with their classes, as members in WebDataset layout."""
    members: dict[str, bytes] = {}
    for path in paths:
        members[f"set/{path.stem}.png"] = path.read_bytes()
        members[f"set/{path.stem}.cls"] = path.parent.name.encode()
        members[f"set/{path.stem}.json"] = json.dumps({"width": 20}).encode()
    return members


def write_shards(folder: Path, paths: Sequence[Path], per_shard: int = 4) -> list[Path]:
    """Pictures in shards, members in an order of no meaning."""
    folder.mkdir(parents=True, exist_ok=True)
    shards = []
    for number, start in enumerate(range(0, len(paths), per_shard)):
        shard = folder / f"s-{number:03d}.tar"
        shard.write_bytes(tar_bytes(members_of(paths[start : start + per_shard]), shuffle=number))
        shards.append(shard)
    return shards
