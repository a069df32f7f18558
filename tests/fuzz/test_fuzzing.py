"""Proves for every reader of files and settings: a changed input is read, or is refused in one line.

No module of the packages is mirrored here, on purpose: one harness serves the readers of all of them. Each attempt
has its own seed. No attempt may end in another error, take seconds or much memory, run code that is in the
input, or open a file outside the input's folder.
"""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("detectron2", reason="detectron2 is not installed: python tools/install_detectron2.py")

from tests.crossmae.reports.pages import draw_no_plots
from tests.fuzz.attempts import run_attempts
from tests.fuzz.detector_targets import DETECTOR_TARGETS
from tests.fuzz.targets import TARGETS, Target

ALL = TARGETS | DETECTOR_TARGETS
FEW, MANY = -(-500 // len(ALL)), -(-20_000 // len(ALL))


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    draw_no_plots(monkeypatch)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("UNSET", raising=False)


@pytest.mark.parametrize("name", ALL)
def test_some_changed_inputs(name: str, tmp_path: Path) -> None:
    assert run_attempts(name, ALL[name], range(FEW), tmp_path / "home") == []


@pytest.mark.slow
@pytest.mark.parametrize("name", ALL)
def test_many_changed_inputs(name: str, tmp_path: Path) -> None:
    assert run_attempts(name, ALL[name], range(FEW, FEW + MANY), tmp_path / "home") == []


@pytest.mark.parametrize("name", ALL)
def test_the_sound_input_is_read(name: str, tmp_path: Path) -> None:
    """Otherwise every changed input would be refused for the same reason."""
    target: Target = ALL[name]
    target.make(tmp_path)
    changed = [str(path.relative_to(tmp_path)) for path in sorted(tmp_path.rglob("*")) if path.is_file()]
    target.read(tmp_path, [] if target.keys else changed)
