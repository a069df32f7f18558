"""What `python -m crossmae.doctor` promises.

- Exit code 0 where all that is needed imports; 1 where something does not, and the command that mends it.
- It reports and does not crash: with no library at all, with a broken pair of torch and torchvision, with a
  torch outside the supported range.
- The requirements it names are those of setup.py and requirements-tested.txt.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from crossmae import doctor

ROOT = Path(__file__).parents[2]
LIBRARIES = {library.name: library for library in (*doctor.PRETRAINING, *doctor.DETECTION)}


def test_a_complete_environment_passes(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main([]) == 0
    out = capsys.readouterr().out
    assert "everything needed is there" in out
    assert "MISSING" not in out
    for name in ("python", "crossmae", "CPU", "GPU", "disk", "on cpu", "compiled operators", *LIBRARIES):
        assert f"\n  {name} " in out


@pytest.mark.parametrize(
    "name, fix", [("detectron2", "tools/install_detectron2.py"), ("shapely", "-m pip install 'shapely>=2'")]
)
def test_a_missing_library_fails_with_its_command(
    name: str, fix: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, name, None)  # makes the import fail
    monkeypatch.setitem(sys.modules, LIBRARIES[name].module, None)
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
    assert "-m pip install 'torch>=2.6,<2.12'" in result.stdout
    assert "tools/install_detectron2.py" in result.stdout
    assert "make venv" in result.stdout


def test_a_broken_pair_is_named_and_both_are_replaced() -> None:
    row = doctor.broken_row(LIBRARIES["torchvision"], RuntimeError("operator torchvision::nms does not exist"))
    assert row.needed
    assert "operator torchvision::nms does not exist" in row.value
    assert row.fix.endswith("--force-reinstall torch==2.11.0 torchvision==0.26.0")


def test_a_library_that_lacks_another_names_that_one() -> None:
    error = ModuleNotFoundError("No module named 'torch'", name="torch")
    row = doctor.broken_row(LIBRARIES["timm"], error)
    assert (row.value, row.needed) == ("needs torch", True)
    assert row.fix.endswith("pip install 'torch>=2.6,<2.12'")


def test_a_broken_binary_is_installed_again() -> None:
    row = doctor.broken_row(LIBRARIES["opencv"], ImportError("libGL.so.1: cannot open shared object file"))
    assert "libGL.so.1" in row.value
    assert row.fix.endswith("--force-reinstall --no-deps 'opencv-python-headless>=4.8'")


@pytest.mark.parametrize("version, word", [("2.5.1+cu121", "older"), ("2.12.0", "newer"), ("3.0", "newer")])
def test_torch_outside_the_range_is_needed(version: str, word: str) -> None:
    row = doctor.torch_row(version)
    assert row.needed
    assert f"{version} is {word} than supported" in row.value
    assert row.fix.endswith("torch==2.11.0 torchvision==0.26.0")


@pytest.mark.parametrize("version", ["2.6.0", "2.11.0+cu130", "2.11.0+cpu"])
def test_torch_inside_the_range_is_fine(version: str) -> None:
    assert doctor.torch_row(version) == doctor.Row("torch", version)


def test_math_attention_runs_everywhere() -> None:
    assert "math" in doctor.attention_backends("cpu")


def test_requirements_are_those_of_the_package() -> None:
    lists = {
        node.targets[0].id: ast.literal_eval(node.value)
        for node in ast.parse((ROOT / "setup.py").read_text("utf-8")).body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and isinstance(node.value, ast.List)
    }
    assert [library.requirement for library in doctor.PRETRAINING] == lists["CORE"]
    assert {library.requirement for library in doctor.DETECTION} - {""} <= set(lists["DET"])
    lowest, above = doctor.TORCH_RANGE
    assert f"torch>={doctor.dotted(lowest)},<{doctor.dotted(above)}" in lists["CORE"]
    pins = (ROOT / "requirements-tested.txt").read_text("utf-8").splitlines()
    assert set(doctor.TESTED_PAIR) <= set(pins)


def test_an_option_that_does_not_exist_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        doctor.main(["--fix"])
    assert "unrecognized arguments: --fix" in capsys.readouterr().err
