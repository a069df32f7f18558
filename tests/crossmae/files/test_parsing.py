"""Proves that JSON is read with the same values and errors whether or not the fast library reads it."""

from __future__ import annotations

import gc
import json
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crossmae.files import load_json, parsing, paused_garbage_collection
from crossmae.files.parsing import MAX_DEPTH

TOO_DEEP = f"more than {MAX_DEPTH} lists or mappings in each other"
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=20,
)
ODD_NUMBERS = [
    "-0",
    "[-0, -0.0]",
    "1e999",
    "-1e999",
    "NaN",
    "[-Infinity]",
    "1e-400",
    "4.9e-324",
    "01",
    "1.",
    ".5",
    "+1",
]
ODD_NUMBERS += [*("9" * count for count in (18, 19, 300, 301, 5000)), f"-{2**63 + 1}", str(2**64), f"1.{'1' * 400}"]
ODD_TEXTS = [
    '{"a": 1, "b": 2, "a": 3}',
    '"\\ud800"',
    "\ufeff[]",
    "",
    " ",
    "[1,]",
    "[1] 2",
    '"\t"',
    '"\x7f"',
    '{"a": \n }',
]
ODD_TEXTS += [*("[" * depth + "]" * depth for depth in (100, 101, 1500)), "[" * 5000, "\ud800", '"\ud800"']
ODD_TEXTS += ["'a'", "{a: 1}", "nul", "[1, 2\n, }", *ODD_NUMBERS]


def read(text: str | bytes) -> tuple[str, str]:
    """Return the value as text, where NaN equals NaN, or the error."""
    try:
        return repr(load_json(text)), ""
    except ValueError as error:
        return "", str(error)


def read_by_json(text: str | bytes) -> tuple[str, str]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parsing, "_load_strictly", None)
        return read(text)


def refuse(text: Any) -> None:
    raise AssertionError(f"json was asked for {text!r}")


@pytest.mark.parametrize("text", ODD_TEXTS, ids=range(len(ODD_TEXTS)))
def test_odd_texts_have_one_meaning(text: str) -> None:
    pytest.importorskip("orjson")
    assert read(text) == read_by_json(text)


@settings(max_examples=60, deadline=None)
@given(VALUES, st.booleans(), st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-32-be"]))
def test_values_have_one_meaning_in_every_encoding(value: Any, ascii_only: bool, encoding: str) -> None:
    pytest.importorskip("orjson")
    text = json.dumps(value, ensure_ascii=ascii_only)
    data = text.encode(encoding, errors="replace")
    assert read(text) == read_by_json(text) == (repr(json.loads(text)), "")
    assert read(data) == read_by_json(data)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.sampled_from(["{", "["]), min_size=97, max_size=103),
    st.lists(st.text(st.sampled_from('[]{}"\\n\u00e9'), max_size=5), min_size=1, max_size=4),
)
def test_brackets_count_as_depth_unless_they_are_in_a_text(kinds: list[str], texts: list[str]) -> None:
    pytest.importorskip("orjson")
    value: Any = texts
    for at, kind in enumerate(kinds):
        name = texts[at % len(texts)]
        value = {f"0{name}": at, name: value} if kind == "{" else [name, value, []]
    text = json.dumps(value)
    wanted = (repr(value), "") if len(kinds) < MAX_DEPTH else ("", TOO_DEEP)
    with pytest.MonkeyPatch.context() as patch:
        if wanted[0]:
            patch.setattr(parsing, "_check_bounds", refuse)
        assert read(text) == wanted
    assert read_by_json(text) == wanted


@pytest.fixture
def nothing_frozen() -> Iterator[None]:
    """Nothing that a caller froze, as in a tool: tests/conftest.py freezes the libraries."""
    gc.unfreeze()
    yield
    gc.collect()
    gc.freeze()


@pytest.mark.usefixtures("nothing_frozen")
def test_after_a_pause_the_next_collection_is_short_and_a_later_one_finds_cycles() -> None:
    class Cycle:
        def __init__(self) -> None:
            self.me = self

    gc.collect()
    with paused_garbage_collection():
        lists = [[] for _ in range(10_000)]  # type: ignore[var-annotated]
        gone = weakref.ref(Cycle())
        assert not gc.isenabled()
    assert gc.isenabled()
    assert len(gc.get_objects(0)) + len(gc.get_objects(1)) < len(lists)
    gc.collect()
    assert gone() is None


@pytest.mark.usefixtures("nothing_frozen")
def test_a_pause_leaves_frozen_objects_frozen() -> None:
    gc.freeze()
    before = gc.get_freeze_count()
    with paused_garbage_collection():
        pass
    assert gc.get_freeze_count() > before / 2  # a few may end by themselves


def test_only_the_last_value_of_a_key_counts() -> None:
    deep = "[" * 2 * MAX_DEPTH + "]" * 2 * MAX_DEPTH
    assert load_json(f'{{"a": {deep}, "a": 1}}') == {"a": 1}


def test_plain_text_is_read_by_the_fast_library(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("orjson")
    monkeypatch.setattr(json, "loads", refuse)
    assert load_json('{"id": 123456789012345678, "box": [0.5, 1e3, -2], "é": null}')["id"] == 123456789012345678
