"""Proves that the lower bounds in setup.py, the floor file and the tested versions belong together."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from crossmae.doctor import read_lists

ROOT = Path(__file__).parents[1]
# The first versions without a hole that a file or a server of others could use; why is written in setup.py.
SOUND = {
    "torch": "2.6",
    "pillow": "11.3",
    "pyyaml": "5.4",
    "tqdm": "4.66.3",
    "jinja2": "3.1.6",
    "scikit-learn": "1.5",
    "opencv-python-headless": "4.8.1.78",
    "pyarrow": "14.0.1",
    "imagecodecs": "2023.9.18",
    "aiohttp": "3.13.3",
    "transformers": "4.48",
    "onnx": "1.17",
    "pydantic": "2.4",
}


def pins(name: str) -> dict[str, str]:
    """Versions by library, the newest where Python versions differ."""
    found: dict[str, str] = {}
    for line in (ROOT / name).read_text("utf-8").splitlines():
        if match := re.match(r"([A-Za-z0-9_.-]+)==([^;\s]+)", line):
            found.setdefault(match[1].lower(), match[2])
    return found


RANGES = [Requirement(text) for name, texts in read_lists().items() if name != "DEV" for text in texts]


@pytest.mark.parametrize("wanted", RANGES, ids=str)
def test_the_floor_file_has_every_lower_bound(wanted: Requirement) -> None:
    lowest = [Version(part.version) for part in wanted.specifier if part.operator == ">="]
    assert lowest, "without a lower bound, any old version is taken"
    assert lowest == [Version(pins("requirements-floor.txt")[wanted.name.lower()])]
    assert wanted.specifier.contains(str(lowest[0]), prereleases=True)
    assert Version(SOUND.get(wanted.name.lower(), "0")) <= lowest[0]


@pytest.mark.parametrize("wanted", RANGES, ids=str)
def test_the_tested_version_is_in_the_range(wanted: Requirement) -> None:
    tested = pins("requirements-tested.txt").get(wanted.name.lower())
    assert tested is None or wanted.specifier.contains(tested, prereleases=True)


def test_no_library_is_pinned_for_nothing() -> None:
    assert pins("requirements-floor.txt").keys() == {wanted.name.lower() for wanted in RANGES}
