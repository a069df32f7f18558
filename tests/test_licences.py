"""Proves that THIRD_PARTY.md has every library of pyproject.toml, with the licence that the library states."""

from __future__ import annotations

import re
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from crossmae.doctor import read_lists

ROOT = Path(__file__).parents[1]
ROWS = re.findall(r"^\| ([\w-]+) \| (.+) \| ([\w, ]+) \|$", (ROOT / "THIRD_PARTY.md").read_text("utf-8"), re.M)[1:]
# Words in the metadata of libraries, and the kinds of licences that they mean.
KINDS = {
    "Apache": r"apache",
    "BSD": r"\b(free)?bsd",
    "MIT": r"\bmit\b",
    "MPL": r"\bmpl|mozilla",
    "PSF": r"\bpsf\b|python software foundation",
    "GPL": r"gpl|gnu",
}


def kinds(text: str) -> set[str]:
    """Kinds of licences in a text."""
    return {kind for kind, pattern in KINDS.items() if re.search(pattern, text, re.IGNORECASE)}


def stated(library: str) -> str:
    """What the metadata of an installed library says about its licence; "" if there is nothing."""
    try:
        fields = metadata.metadata(library)
    except metadata.PackageNotFoundError:
        pytest.skip(f"{library} is not installed")
    if expression := fields.get("License-Expression"):
        return str(expression)
    classifiers = [one for one in fields.get_all("Classifier") or [] if one.startswith("License")]
    whole = (fields.get("License") or "").strip()
    return " ".join(classifiers) or ("" if whole == "UNKNOWN" else whole.partition("\n")[0])


def test_every_requirement_is_listed_with_its_extras() -> None:
    wanted: dict[str, list[str]] = {}
    for extra, texts in read_lists().items():
        for name in dict.fromkeys(Requirement(text).name.lower() for text in texts):
            wanted.setdefault(name, []).append(extra)
    assert {library: extras.split(", ") for library, _, extras in ROWS} == wanted
    assert len(ROWS) == len(wanted)


@pytest.mark.parametrize("library, licence", [row[:2] for row in ROWS])
def test_the_licence_is_the_stated_one(library: str, licence: str) -> None:
    text = stated(library)
    assert bool(text) == (licence != "not stated"), text
    pinned = re.search(rf"^{library}==(\S+)", (ROOT / "requirements-tested.txt").read_text("utf-8"), re.I | re.M)
    if pinned and pinned[1] != metadata.version(library).partition("+")[0]:
        assert not text or kinds(text) & kinds(licence)  # other versions may list more licences of what they contain
        return
    assert kinds(text) <= kinds(licence)
    assert kinds(text) or not text
    if metadata.metadata(library).get("License-Expression"):
        assert licence == text
