"""Proves that no test is skipped silently: a run ends with all skipped tests by reason, and without a reason they fail.

The property is one of tests/conftest.py, which is copied next to small tests and run, in one process and in two.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = """
import pytest
@pytest.mark.slow
def test_slow(): ...
@pytest.mark.parametrize("n", range(5))
def test_lacking(n): pytest.skip("no such device")
@pytest.mark.skipif(True, reason="no such library")
def test_marked(): ...
def test_passing(): ...
@pytest.mark.xfail(reason="known")
def test_expected(): assert False
"""
SILENT = """
import pytest
@pytest.mark.skip
def test_mark(): ...
def test_call(): pytest.skip()
@pytest.mark.skipif(1, reason="")
def test_empty(): ...
"""


def run(folder: Path, *options: str) -> tuple[int, str]:
    shutil.copy(Path(__file__).parent / "conftest.py", folder)
    (folder / "pytest.ini").write_text("[pytest]\nmarkers = slow: takes long\n")
    words = [sys.executable, "-m", "pytest", "-q", "-rfE", "-p", "no:cacheprovider", *options, str(folder)]
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, timeout=120)
    return done.returncode, done.stdout


@pytest.mark.parametrize("options", [(), ("-n", "2")])
def test_a_run_ends_with_the_skipped_tests_by_reason(tmp_path: Path, options: tuple[str, ...]) -> None:
    (tmp_path / "test_some.py").write_text(TESTS)
    (tmp_path / "test_module.py").write_text("import pytest\npytest.importorskip('no_such_module')\n")
    code, shown = run(tmp_path, *options)
    assert code == 0
    end = shown[shown.index("skipped, and why") :].splitlines()
    assert "8 skipped, and why" in shown
    assert [line.split()[0] for line in end[1:5]] == ["5", "1", "1", "1"]
    assert "no such device: test_some.py::test_lacking[0], " in end[1]
    assert end[1].endswith(" and 2 more")
    for words in ("takes minutes: pytest --slow: ", "no such library: ", "could not import 'no_such_module'"):
        assert any(words in line for line in end[2:5])


def test_a_skip_without_a_reason_fails(tmp_path: Path) -> None:
    (tmp_path / "test_silent.py").write_text(SILENT)
    (tmp_path / "test_module.py").write_text("import pytest\npytest.skip(allow_module_level=True)\n")
    code, shown = run(tmp_path, "--continue-on-collection-errors")
    assert code == 1
    for name in (
        "test_silent.py::test_mark",
        "test_silent.py::test_call",
        "test_silent.py::test_empty",
        "test_module.py",
    ):
        assert f"{name}: skipped without a reason" in shown
    assert "skipped, and why" not in shown
