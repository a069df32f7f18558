"""Proves that equal labels are one class, whatever their spaces and case, and that every decision is said."""

from __future__ import annotations

import pytest

from crossmae.data.sources.labels import alike_labels, doubt_labels, unify_labels

UNIFIED: list[tuple[list[str | None], list[str | None], str]] = [
    (
        ["cat ", "cat", "\tcat", "dog"],
        ["cat", "cat", "cat", "dog"],
        "'\\\\tcat' (1) and 'cat' (1) and",
    ),
    (["Cat", "cat", "cat"], ["cat"] * 3, "'Cat' (1) and 'cat' (2) are one class, 'cat'"),
    (["DOG", "DOG", "dog"], ["DOG"] * 3, "'DOG' (2) and 'dog' (1) are one class, 'DOG'"),
    (["polar  bear", "Polar bear", "polar\xa0bear"], ["polar bear"] * 3, "are one class, 'polar bear'"),
    (["caf\xe9", "cafe\u0301"], ["caf\xe9"] * 2, "are one class"),
    (["a", "A", "Co", "CO"], ["a", "A", "Co", "CO"], ""),
    (["0.0", "1.0", "nan", None], ["0", "1", None, None], ""),
    (["0", "1.0", "1", ""], ["0", "1", "1", None], ""),
    (["0.5", "1.0"], ["0.5", "1.0"], ""),
    (["NA", "None", "nan", "null"], ["NA", "None", "nan", "null"], ""),
    ([" ", None, "x"], [None, None, "x"], ""),
    (["007", "7 up"], ["007", "7 up"], ""),
    (["cat "], ["cat"], ""),
]


@pytest.mark.parametrize(("texts", "labels", "note"), UNIFIED)
def test_labels_are_unified(texts: list[str | None], labels: list[str | None], note: str) -> None:
    found, notes = unify_labels(texts)
    assert found == labels
    assert note.replace("\\\\", "\\") in "".join(notes)
    assert bool(notes) == bool(note)


def test_classes_that_stay_apart_are_listed() -> None:
    assert alike_labels(["a", "A", "b", "Co", "CO", "d "]) == ["A", "CO", "Co", "a"]


def test_labels_that_may_be_no_classes_are_named() -> None:
    assert "the label -1 of 7 images is a class like the others" in doubt_labels({"-1": 7, "0": 1, "1": 2})[0]
    assert """the labels "['cat']" are the text of a list""" in doubt_labels({"['cat']": 1, "dog": 2})[0]
    for sound in (
        ["-1", "1"],
        ["-2", "-1", "0", "1"],
        ["-10", "-1", "0", "1"],
        ["0", "1"],
        ["[unknown]", "-1"],
        ["[1]"],
    ):
        assert doubt_labels(dict.fromkeys(sound, 1)) == []
