"""Proves that packed names come back as they were."""

from __future__ import annotations

import pickle

import pytest

from crossmae.data.sources.source import PackedStrings


@pytest.mark.parametrize("strings", [[], ["", "a", "", "bc"], ["é ü/図.png", "not \udcff utf-8"]])
def test_packed_strings_come_back(strings: list[str]) -> None:
    packed = pickle.loads(pickle.dumps(PackedStrings(strings)))
    assert [packed[index] for index in range(len(packed))] == strings
