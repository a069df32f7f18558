"""Proves that the lower bounds in pyproject.toml, the floor file and the tested versions belong together."""

from __future__ import annotations

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
    lines = [line for line in (ROOT / name).read_text("utf-8").splitlines() if "==" in line and line[0] != "#"]
    pinned = [Requirement(line) for line in lines]
    return {one.name.lower(): Version(next(iter(one.specifier)).version) for one in pinned if is_for(one, python)}


def is_for(requirement: Requirement, python: str) -> bool:
    """Whether a requirement applies to a version of Python."""
    return requirement.marker is None or requirement.marker.evaluate({"python_version": python})


PYTHONS = ["3.10", "3.11", "3.12"]
RANGES = [
    (wanted, python)
    for name, texts in read_lists().items()
    if name != "dev"
    for wanted in map(Requirement, texts)
    for python in PYTHONS
    if is_for(wanted, python)
]
EACH_RANGE = pytest.mark.parametrize("wanted, python", RANGES, ids=str)


@EACH_RANGE
def test_the_floor_file_has_every_lower_bound(wanted: Requirement, python: str) -> None:
    lowest = [Version(part.version) for part in wanted.specifier if part.operator == ">="]
    assert lowest, "without a lower bound, any old version is taken"
    assert lowest == [pins("requirements-floor.txt", python)[wanted.name.lower()]]
    assert wanted.specifier.contains(lowest[0], prereleases=True)
    assert Version(SOUND.get(wanted.name.lower(), "0")) <= lowest[0]


@EACH_RANGE
def test_the_tested_version_is_in_the_range(wanted: Requirement, python: str) -> None:
    tested = pins("requirements-tested.txt", python).get(wanted.name.lower())
    assert tested is None or wanted.specifier.contains(tested, prereleases=True)


@pytest.mark.parametrize("python", PYTHONS)
def test_no_library_is_pinned_for_nothing(python: str) -> None:
    wanted = {one.name.lower() for one, version in RANGES if version == python}
    assert pins("requirements-floor.txt", python).keys() == wanted
