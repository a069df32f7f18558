"""Proves that features come from the cache for the very same key and whole files alone."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from crossmae.classification.probe import cache as feature_cache
from crossmae.classification.probe.cache import CachedFeatures, cached, data_digest, is_cached, tensors_digest
from crossmae.data.sources import open_source
from crossmae.data.sources.source import ImageFiles
from tests.crossmae.classification.labelled import write_classes

KEY = {"weights": "abc", "block": 3}


class Extraction:
    """Features that are new in every call, which are counted."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self) -> CachedFeatures:
        self.calls += 1
        return CachedFeatures(torch.full((4, 3), self.calls, dtype=torch.bfloat16), torch.arange(4))


def same(one: CachedFeatures, two: CachedFeatures) -> bool:
    return torch.equal(one.features, two.features) and torch.equal(one.labels, two.labels)


def test_a_second_call_reads(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    extract, folder = Extraction(), tmp_path / "features"
    assert not is_cached(folder, "train", KEY)
    first = cached(folder, "train", KEY, extract)
    assert is_cached(folder, "train", KEY)
    with caplog.at_level(logging.INFO):
        assert same(cached(folder, "train", dict(reversed(KEY.items())), extract), first)
    (path,) = folder.iterdir()
    assert caplog.messages == [f"features of train: from {path}"]
    assert extract.calls == 1
    assert load_file(path)["features"].dtype == torch.bfloat16


def test_another_key_or_layout_is_a_miss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    extract = Extraction()
    for key in (KEY, KEY | {"block": 2}, KEY | {"weights": "abd"}, KEY | {"pool": "avg"}):
        cached(tmp_path, "train", key, extract)
    cached(tmp_path, "val", KEY, extract)
    monkeypatch.setattr(feature_cache, "LAYOUT", feature_cache.LAYOUT + 1)
    cached(tmp_path, "train", KEY, extract)
    assert extract.calls == 6
    assert len(list(tmp_path.iterdir())) == 6


def flip_last(data: bytes) -> bytes:
    return data[:-1] + bytes([data[-1] ^ 1])


def flip_feature(data: bytes) -> bytes:
    return data[:-40] + bytes([data[-40] ^ 1]) + data[-39:]


@pytest.mark.parametrize(
    "damage", [flip_last, flip_feature, lambda data: data[:-8], lambda data: b"", lambda data: b"x" * 99]
)
def test_damaged_files_are_not_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: Callable[[bytes], bytes]
) -> None:
    extract = Extraction()
    cached(tmp_path, "train", KEY, extract)
    (path,) = tmp_path.iterdir()
    path.write_bytes(damage(path.read_bytes()))
    second = cached(tmp_path, "train", KEY, extract)
    assert extract.calls == 2
    assert caplog.messages == [f"{path}: damaged and ignored; features are extracted again"]
    assert same(cached(tmp_path, "train", KEY, extract), second)
    assert extract.calls == 2


def test_a_file_of_another_key_is_not_used(tmp_path: Path) -> None:
    """Names hold a part of the digest alone; what was digested decides."""
    extract = Extraction()
    cached(tmp_path, "train", KEY, extract)
    (path,) = tmp_path.iterdir()
    other = CachedFeatures(torch.zeros(4, 3), torch.arange(4))
    cached(tmp_path, "train", KEY | {"block": 1}, lambda: other)
    (second,) = set(tmp_path.iterdir()) - {path}
    os.replace(second, path)
    assert not same(cached(tmp_path, "train", KEY, extract), other)
    assert extract.calls == 2


def test_an_interrupted_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(tensors: object, path: Path, metadata: object) -> None:
        Path(path).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(feature_cache, "save_file", stopped)
    with pytest.raises(KeyboardInterrupt):
        cached(tmp_path, "train", KEY, Extraction())
    assert not list(tmp_path.iterdir())


def test_digest_of_tensors() -> None:
    tensors = {"a": torch.arange(6.0).view(2, 3), "b": torch.zeros(2)}
    digest = tensors_digest(tensors)
    assert digest == tensors_digest(dict(reversed(tensors.items())))
    others = [
        {"a": tensors["a"].view(3, 2)},
        {"a": tensors["a"].view(torch.int32)},
        {"a": tensors["a"].T.contiguous().T + 1},
    ]
    digests = {digest, *(tensors_digest(tensors | other) for other in others)}
    assert len(digests) == 4
    assert tensors_digest(tensors | {"a": tensors["a"].T.contiguous().T}) == digest


def test_digest_of_data(tmp_path: Path) -> None:
    folder = write_classes(tmp_path, per_class=2)

    def digest() -> str:
        return data_digest(open_source(folder, "data.train"))

    seen = [digest()]
    assert digest() == seen[0]
    path = folder / "red" / "0.png"
    os.utime(path, ns=(0, 0))  # changed
    seen.append(digest())
    path.rename(folder / "red" / "7.png")  # another name
    seen.append(digest())
    (folder / "red" / "7.png").rename(folder / "green" / "7.png")  # another class
    seen.append(digest())
    (folder / "green" / "7.png").unlink()
    seen.append(digest())
    assert len(set(seen)) == 5


def test_digest_depends_on_labels(tmp_path: Path) -> None:
    paths = sorted(write_classes(tmp_path, per_class=1).rglob("*.png"))
    digests = {data_digest(ImageFiles(paths, "three", labels)) for labels in (list("aab"), list("aba"), list("aac"))}
    assert len(digests) == 3
