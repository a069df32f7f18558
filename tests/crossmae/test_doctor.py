"""The report of `python -m crossmae.doctor`.

- Exit code 0 where all that is needed imports; 1 where something does not, and the command that mends it.
- It reports and does not crash: with no library at all, with an old Python, with a broken pair of torch and
  torchvision, with a library outside the supported range.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from crossmae import doctor

ROOT = Path(__file__).parents[2]
CORE, DET = doctor.read_requirements()
LIBRARIES = ["detectron2", *(doctor.library_name(requirement) for requirement in (*CORE, *DET))]
(TORCH,) = [requirement for requirement in CORE if requirement.startswith("torch>")]
PAIR = "torch==2.11.0 torchvision==0.26.0"


def test_a_complete_environment_passes(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main([]) == 0
    out = capsys.readouterr().out
    assert "everything needed is there" in out
    assert "MISSING" not in out
    for name in ("python", "crossmae", "CPU", "GPU", "disk", "on cpu", "compiled operators", *LIBRARIES):
        assert f"\n  {name} " in out


@pytest.mark.parametrize(
    "name, fix", [("detectron2", "tools/install_detectron2.py"), ("shapely", "-m pip install 'shapely>=2.0.5'")]
)
def test_a_missing_library_fails_with_its_command(
    name: str, fix: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, name, None)  # makes the import fail
    monkeypatch.setitem(sys.modules, doctor.MODULES.get(name, name), None)
    assert doctor.main([]) == 1
    out = capsys.readouterr().out
    (row,) = [line for line in out.splitlines() if "MISSING" in line]
    assert row.split()[0] == name
    (command,) = [line for line in out.splitlines() if line.startswith(f"  {name}:")]
    assert command.endswith(fix)
    assert "1 needed but missing" in out


def test_runs_where_nothing_is_installed() -> None:
    command = [sys.executable, "-S", "-m", "crossmae.doctor"]  # -S: without site-packages
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (1, "")
    assert result.stdout.count("MISSING") == len(LIBRARIES)
    assert "-m pip install 'torch>=2.8'" in result.stdout
    assert "tools/install_detectron2.py" in result.stdout
    assert "make venv" in result.stdout


@pytest.mark.parametrize(
    "requirement, error, fix",
    [
        ("torchvision>=0.21", RuntimeError("operator torchvision::nms does not exist"), f"--force-reinstall {PAIR}"),
        ("timm>=1", ModuleNotFoundError("No module named 'torch'"), "pip install 'timm>=1'"),  # with what timm lacks
        ("opencv>=4.8", ImportError("libGL.so.1: not found"), "--force-reinstall --no-deps 'opencv>=4.8'"),
    ],
)
def test_a_broken_library_is_named_with_its_command(requirement: str, error: Exception, fix: str) -> None:
    row = doctor.broken_row(requirement, error)
    assert row.needed
    assert str(error) in row.value
    assert row.fix.endswith(fix)


@pytest.mark.parametrize("version", ["2.5.1+cu121", "2.7.9"])
def test_torch_below_the_range_is_needed(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "installed_version", lambda name: version)
    row = doctor.library_row(TORCH)
    assert row.needed
    assert f"{version} is older than supported ({TORCH})" in row.value
    assert row.fix.endswith(PAIR)


@pytest.mark.parametrize("version", ["0.1.6", "0.2", "1.0"])
def test_a_library_above_its_range_is_needed(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "installed_version", lambda name: version)
    row = doctor.library_row("fvcore>=0.1.5,<0.1.6")
    assert row.needed
    assert f"{version} is newer than supported" in row.value
    assert row.fix.endswith("pip install 'fvcore>=0.1.5,<0.1.6'")


@pytest.mark.parametrize("version", ["2.8", "2.8.0", "2.11.0+cu130", "2.14.1+cpu", "3.0"])
def test_torch_inside_the_range_is_fine(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "installed_version", lambda name: version)
    assert doctor.library_row(TORCH) == doctor.ReportLine("torch", version)


def test_an_old_library_is_upgraded_to_the_range_of_setup(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "installed_version", lambda name: "0.1.5.post20221221")
    assert not doctor.library_row("fvcore>=0.1.5,<0.1.6").needed
    assert doctor.library_row("shapely>=2").fix.endswith("pip install 'shapely>=2'")


def test_an_old_python_gets_one_line() -> None:
    code = "import sys, runpy; sys.version_info = (3, 9); runpy.run_module('crossmae.doctor', run_name='__main__')"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert result.stderr.count("\n") == 1
    assert "expected 3.10 or newer" in result.stderr
    assert "make venv PYTHON=python3.12" in result.stderr


def test_math_attention_runs_everywhere() -> None:
    assert "math" in doctor.attention_backends("cpu")


def test_an_option_that_does_not_exist_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        doctor.main(["--fix"])
    assert "unrecognized arguments: --fix" in capsys.readouterr().err


@pytest.mark.parametrize(
    "requirement, python, expected",
    [
        ("pillow>=13; python_version >= '3.11'", "3.11.7", True),
        ("pillow>=13; python_version >= '3.11'", "3.10.14", False),
        ("pillow>=12.3; python_version < '3.11'", "3.11.7", False),
        ("pillow>=12.3; python_version < '3.11'", "3.10.14", True),
        ("fvcore>=0.1.5,<0.1.6", "3.10.14", True),
    ],
)
def test_only_requirements_for_this_python_are_looked_at(
    requirement: str, python: str, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor.platform, "python_version", lambda: python)
    assert doctor.for_this_python(requirement) is expected
