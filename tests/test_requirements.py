"""Proves that the ranges in pyproject.toml and the three files of pinned versions belong together."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from crossmae.doctor import read_lists

ROOT = Path(__file__).parents[1]
# The first versions without a hole that a file or a server of others could use; why is written in pyproject.toml.
SOUND = {
    "torch": "2.6",
    "pillow": "12.3",
    "pyyaml": "5.4",
    "tqdm": "4.66.3",
    "jinja2": "3.1.6",
    "scikit-learn": "1.5",
    "opencv-python-headless": "4.8.1.78",
    "pyarrow": "14.0.1",
    "imagecodecs": "2023.9.18",
    "aiohttp": "3.14.4",
    "orjson": "3.11.6",
    "transformers": "4.48",
    "onnx": "1.17",
    "pydantic": "2.4",
}


def pins(name: str, python: str) -> dict[str, Version]:
    """Versions by library, for a version of Python."""
    lines = (
        line.partition("#")[0].strip() for line in (ROOT / f"requirements-{name}.txt").read_text("utf-8").splitlines()
    )
    pinned = [Requirement(line) for line in lines if line]
    return {one.name.lower(): Version(next(iter(one.specifier)).version) for one in pinned if is_for(one, python)}


def is_for(requirement: Requirement, python: str) -> bool:
    """Whether a requirement applies to a version of Python."""
    return requirement.marker is None or requirement.marker.evaluate({"python_version": python})


def ranges(python: str) -> list[Requirement]:
    """All requirements with a range, for a version of Python. Checkers are pinned in pyproject.toml itself."""
    wanted = [Requirement(text) for texts in read_lists().values() for text in texts if "==" not in text]
    return [one for one in wanted if is_for(one, python)]


PYTHONS = ["3.10", "3.11", "3.12", "3.13", "3.14"]
OLD_PYTHONS = PYTHONS[:3]  # those that the oldest versions have builds for
LOWEST = [(wanted, python) for python in OLD_PYTHONS for wanted in ranges(python)]


@pytest.mark.parametrize("wanted, python", LOWEST, ids=str)
def test_the_oldest_versions_are_the_lower_bounds(wanted: Requirement, python: str) -> None:
    lowest = [Version(part.version) for part in wanted.specifier if part.operator == ">="]
    assert lowest, "without a lower bound, any old version is taken"
    assert lowest == [pins("oldest", python)[wanted.name.lower()]]
    assert wanted.specifier.contains(lowest[0], prereleases=True)
    assert Version(SOUND.get(wanted.name.lower(), "0")) <= lowest[0]


@pytest.mark.parametrize("name", ["tested", "newest"])
@pytest.mark.parametrize("python", PYTHONS)
def test_pinned_versions_are_in_the_ranges(python: str, name: str) -> None:
    pinned = {one: pins(name, python).get(one.name.lower()) for one in ranges(python)}
    outside = [one for one, version in pinned.items() if version and not one.specifier.contains(version, True)]
    assert outside == []
    assert len([version for version in pinned.values() if version]) > len(pinned) / 2


@pytest.mark.parametrize("python", PYTHONS)
def test_the_newest_versions_are_the_tested_ones_or_newer(python: str) -> None:
    tested, newest = pins("tested", python), pins("newest", python)
    assert tested.keys() == newest.keys()
    assert [name for name in tested if newest[name] < tested[name]] == []


@pytest.mark.parametrize("python", OLD_PYTHONS)
def test_no_library_is_pinned_for_nothing(python: str) -> None:
    assert pins("oldest", python).keys() == {one.name.lower() for one in ranges(python)}


def test_an_upper_bound_has_a_reason_next_to_it() -> None:
    lines = (ROOT / "pyproject.toml").read_text("utf-8").splitlines()
    bounded = [line for line in lines if re.match(r' *"[^";]*<', line) or line.startswith("requires-python")]
    assert any("fvcore" in line for line in bounded)
    assert [line for line in bounded if "<" in line and not re.search(r"#.*\w", line)] == []
