"""Comparison of classes by their names: a number means nothing outside the list that it counts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING
from unicodedata import normalize

from crossmae.errors import shorten

if TYPE_CHECKING:
    from torch import Tensor

LISTED = 20  # names in a message, at most


@dataclass(frozen=True)
class NamePairs:
    """Names in `found`, such as a data set's, and their `places` in `known`, such as a model's.

    A place is None for a name that `known` lacks. No place occurs twice.
    """

    found: tuple[str, ...]
    known: tuple[str, ...]
    places: tuple[int | None, ...]

    @property
    def unknown(self) -> list[str]:
        """Names in `found` that `known` lacks."""
        return [name for name, place in zip(self.found, self.places, strict=True) if place is None]

    @property
    def absent(self) -> list[str]:
        """Names in `known` that `found` lacks."""
        present = set(self.places)
        return [name for place, name in enumerate(self.known) if place not in present]

    def notes(self) -> list[str]:
        """Describe differences in order and spelling."""
        pairs = [(name, self.known[at]) for name, at in zip(self.found, self.places, strict=True) if at is not None]
        respelled = [f"{name!r} is {known!r}" for name, known in pairs if name != known]
        notes = [f"names differ in spaces, case or Unicode form: {shorten(respelled)}"] if respelled else []
        order = [place for place in self.places if place is not None]
        return notes + ["the order differs, so classes are matched by name"] * (order != sorted(order))


def pair_names(found: Sequence[str], known: Sequence[str]) -> NamePairs:
    """Find each name in `known`.

    A name without an equal name is paired with the only name that is equal after `fold_name`.
    """
    found, known = tuple(found), tuple(known)
    if found == known:
        return NamePairs(found, known, tuple(range(len(known))))
    places = _unique_places(found, known)
    folded = _unique_places([fold_name(name) for name in found], [fold_name(name) for name in known])
    exact = {place for place in places if place is not None}
    pairs = zip(places, folded, strict=True)
    return NamePairs(found, known, tuple(loose if at is None and loose not in exact else at for at, loose in pairs))


def _unique_places(found: Sequence[str], known: Sequence[str]) -> list[int | None]:
    counts = Counter(found), Counter(known)
    place_of = {name: place for place, name in enumerate(known) if counts[1][name] == 1}
    return [place_of.get(name) if counts[0][name] == 1 else None for name in found]


def rows_by_name(own: Tensor, found: Tensor, pairs: NamePairs, parts: int = 1) -> Tensor:
    """Copy the rows of a last layer by class name.

    Args:
        parts: number of rows per class.
        own: rows of the classes `pairs.found`. Their values stay for classes that `pairs.known` lacks.
        found: rows of the classes `pairs.known`.
    """
    rows = own.detach().cpu().clone()
    for mine, theirs in enumerate(pairs.places):
        if theirs is not None:
            rows[parts * mine : parts * (mine + 1)] = found[parts * theirs : parts * (theirs + 1)]
    return rows


def start_notes(pairs: NamePairs) -> list[str]:
    """Describe how a training on other classes uses a trained head."""
    notes = pairs.notes()
    if pairs.unknown or pairs.absent:
        kept = [name for name, place in zip(pairs.found, pairs.places, strict=True) if place is not None]
        kept_names, new, left = (list_names(names) or "none" for names in (kept, pairs.unknown, pairs.absent))
        notes.append(f"the head keeps the classes {kept_names}. New, from random weights: {new}. Left out: {left}")
    return notes


def fold_name(name: str) -> str:
    """Remove differences in spaces, underscores, case and Unicode form."""
    plain = normalize("NFKC", normalize("NFKC", name).casefold()).replace("_", " ")
    visible = "".join(letter for letter in plain if letter.isspace() or letter.isprintable())
    return " ".join(visible.split())


def list_names(names: Sequence[str]) -> str:
    """List names for a message, each in quotation marks."""
    return shorten([repr(name) for name in names], most=LISTED)


def describe_difference(pairs: NamePairs) -> str:
    """Name the classes that `known` lacks, and both lists."""
    unknown = "any of them" if len(pairs.unknown) == len(pairs.found) else list_names(pairs.unknown)
    return f"{unknown} (it has the classes {list_names(pairs.known)}, the data list {list_names(pairs.found)})"
