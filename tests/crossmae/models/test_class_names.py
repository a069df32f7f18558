"""Names are paired one to one: equal names first, then the only name that differs in spaces, case or Unicode form."""

from __future__ import annotations

import pytest

from crossmae.models.class_names import describe_difference, pair_names


@pytest.mark.parametrize(
    "found, known, places",
    [
        ((), ("a",), ()),
        (("a", "b"), ("a", "b"), (0, 1)),
        (("b", "a"), ("a", "b"), (1, 0)),
        (("b",), ("a", "b", "c"), (1,)),
        (("a", "x"), ("a", "b"), (0, None)),
        ((" Traffic  light", "caf\u00e9"), ("cafe\u0301", "traffic_light"), (1, 0)),
        (("\u200bcat\ufeff", "\uff24\uff2f\uff27"), ("dog", "cat"), (1, 0)),
        (("STRASSE",), ("stra\u00dfe",), (0,)),
        (("12", "1 2"), ("1 2", "12"), (1, 0)),  # a space inside a name counts
        (("Cat", "cat"), ("cat",), (None, 0)),  # a class is never named twice
        (("cat",), ("Cat", "CAT"), (None,)),  # nor guessed
        (("A", "a"), ("a", "A"), (1, 0)),
        (("a", "a"), ("a", "a"), (0, 1)),  # equal lists, whatever is in them
        (("a", "a"), ("b", "a"), (None, None)),
    ],
)
def test_names_are_paired_one_to_one(
    found: tuple[str, ...], known: tuple[str, ...], places: tuple[int | None, ...]
) -> None:
    pairs = pair_names(found, known)
    assert pairs.places == places
    assert pairs.unknown == [name for name, place in zip(found, places, strict=True) if place is None]
    assert pairs.absent == [name for place, name in enumerate(known) if place not in places]


def test_differences_are_described() -> None:
    assert pair_names(("a", "b"), ("a", "b")).notes() == []
    assert pair_names(("b",), ("a", "b")).notes() == []
    spelling, order = pair_names(("B ", "a"), ("a", "b")).notes()
    assert spelling.endswith("'B ' is 'b'")
    assert order == "the order differs, so classes are matched by name"
    partly = describe_difference(pair_names(("a", "x"), ("a", "b")))
    assert partly == "'x' (it has the classes 'a', 'b', the data list 'a', 'x')"
    assert describe_difference(pair_names(("x",), ("a",))).startswith("any of them (")
