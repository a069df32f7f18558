"""Proves that the commands of docs/installation.md exist: options of the installer, targets and pins of make, builds
of the image, and the line for Tab in a shell."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tools import command, install_detectron2

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/installation.md").read_text("utf-8")
COMMANDS = [line.strip().partition("  #")[0] for line in re.findall(r"^    (\S.*)$", PAGE.replace("\\\n", ""), re.M)]
CHOICES = re.findall(r"`(--from git|--compile|--wheel FILE|--repository URL)`", PAGE)


def starting(*words: str) -> list[list[str]]:
    """Arguments of the commands that start with some words."""
    found = [shlex.split(line)[len(words) :] for line in COMMANDS if shlex.split(line)[: len(words)] == [*words]]
    assert found
    return found


def test_the_installer_has_the_options() -> None:
    parser = install_detectron2.build_parser()
    called = starting("python", "tools/install_detectron2.py") + starting("crossmae", "install-detectron2")
    for words in [*called, *map(str.split, CHOICES)]:
        parser.parse_args(words)
    assert len(set(CHOICES)) == 4
    snapshot = install_detectron2.SNAPSHOT
    assert f"{snapshot.name.replace('-', '_')}-{snapshot.version}-py3-none-any.whl" in PAGE
    assert install_detectron2.UPSTREAM_COMMIT[:8] in PAGE


@pytest.mark.parametrize("words", starting("make"), ids=" ".join)
def test_make_has_the_targets_and_the_pins(words: list[str]) -> None:
    done = subprocess.run(["make", "--dry-run", *words], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    pins = words[-1].removeprefix("PINS=") if "PINS" in words[-1] else "tested"
    assert f"requirements-{pins}.txt" in done.stdout or ".complete" not in done.stdout


def test_make_names_the_pins_that_exist() -> None:
    done = subprocess.run(["make", "test", "PINS=old"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "there is no requirements-old.txt. Choose one of" in done.stderr
    assert {"newest", "oldest", "tested"} <= set(re.findall(r"\w+", done.stderr))


def test_the_image_is_built_and_run_as_the_dockerfile_says() -> None:
    dockerfile = (ROOT / "Dockerfile").read_text("utf-8")
    for words in starting("docker", "build"):
        assert f"docker {shlex.join(['build', *words])}" in dockerfile
    (run,) = starting("docker", "run")
    assert (ROOT / "configs" / run[run.index("--config-file") + 1]).is_file()


def test_bash_knows_the_command_after_the_line_for_tab() -> None:
    (line,) = [line for line in COMMANDS if line.startswith("eval ")]
    assert f"\n    {line}\n" in (command.__doc__ or "")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    script = f"{line}\ncomplete -p crossmae"
    done = subprocess.run(["bash", "-ec", script], env=os.environ | {"PATH": path}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("-F _python_argcomplete crossmae\n")
