"""Proves that packed names come back, and that a part of a source keeps names, contents and classes."""

from __future__ import annotations

import pickle
from collections import Counter
from pathlib import Path

import pytest

from crossmae.data.sources import open_source
from crossmae.data.sources.source import PackedStrings, choose_per_class, evenly_spaced
from crossmae.errors import UserError
from tests.crossmae.classification.labelled import CLASSES, write_classes


@pytest.mark.parametrize("strings", [[], ["", "a", "", "bc"], ["é ü/図.png", "not \udcff utf-8"]])
def test_packed_strings_come_back(strings: list[str]) -> None:
    packed = pickle.loads(pickle.dumps(PackedStrings(strings)))
    assert [packed[index] for index in range(len(packed))] == strings


def test_so_many_per_class_drawn_by_the_seed(tmp_path: Path) -> None:
    whole = open_source(write_classes(tmp_path, per_class=6), "SRC")
    part = choose_per_class(whole, 4, 0, "key")
    assert Counter(part.classes[part.label(index)] for index in range(len(part))) == dict.fromkeys(CLASSES, 4)
    positions = {whole.name(index): index for index in range(len(whole))}
    for index in range(len(part)):
        origin = positions[part.name(index)]
        assert part.read(index) == whole.read(origin)
        assert part.tail(index) == whole.tail(origin)
        assert part.stamp(index) == whole.stamp(origin)
        assert part.label(index) == whole.label(origin)
    names = [[choose_per_class(whole, 4, seed, "key").name(i) for i in range(12)] for seed in (0, 0, 1)]
    assert names[0] == names[1] != names[2]
    with pytest.raises(UserError, match=r"key: fewer than 7 images of blue \(6\), green \(6\)"):
        choose_per_class(whole, 7, 0, "key")


def test_evenly_spaced_indices_reach_over_everything() -> None:
    assert evenly_spaced(10, 4) == [0, 2, 5, 7]
    assert evenly_spaced(3, 10) == [0, 1, 2]
    assert evenly_spaced(0, 4) == []
