"""Proves that the files around the project fit it: workflows, forms, citation, hooks.

Nothing here is run on GitHub. Every command of a workflow names a make target, a program or a test that exists, every
version is one that pyproject.toml allows or pins, and the citation has the version and the paper of the README.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from packaging.specifiers import SpecifierSet

import crossmae
from crossmae.errors import COMMANDS
from crossmae.files import load_yaml

ROOT = Path(__file__).parents[1]
YAML = (
    "CITATION.cff",
    ".pre-commit-config.yaml",
    ".github/dependabot.yml",
    ".github/workflows/ci.yml",
    ".github/ISSUE_TEMPLATE/bug.yml",
    ".github/ISSUE_TEMPLATE/feature.yml",
    ".github/ISSUE_TEMPLATE/config.yml",
)
PROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")  # tomllib is of Python 3.11
TARGETS = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
PINS = {path.stem.removeprefix("requirements-") for path in ROOT.glob("requirements-*.txt")}


def read(name: str) -> Any:
    return load_yaml((ROOT / name).read_text(encoding="utf-8"))


def steps(job: dict[str, Any]) -> Iterator[str]:
    """Commands of a job, once for each row of its matrix."""
    matrix = job.get("strategy", {}).get("matrix", {})
    rows = matrix.get("include") or [{key: value} for key, values in matrix.items() for value in values] or [{}]
    for row in rows:
        for step in job["steps"]:
            setup = str(step.get("with", {}).get("python-version", ""))
            for command in (step.get("run"), setup and f"setup-python {setup}"):
                if command:
                    yield re.sub(r"\$\{\{ matrix\.(\w+) \}\}", lambda found: str(row[found[1]]), command)  # noqa: B023


JOBS = read(".github/workflows/ci.yml")["jobs"]
RUNS = [(name, command) for name, job in JOBS.items() for command in steps(job)]


@pytest.mark.parametrize("name", YAML)
def test_yaml_is_read(name: str) -> None:
    assert isinstance(read(name), dict)


@pytest.mark.parametrize("job, command", RUNS)
def test_commands_of_workflows_exist(job: str, command: str) -> None:
    assert "${{" not in command
    program, *words = shlex.split(command)
    if program == "make":
        settings = dict(word.split("=") for word in words if "=" in word)
        assert {word for word in words if "=" not in word} <= set(TARGETS)
        assert settings.get("PINS", "tested") in PINS
        assert f"setup-python {settings['PYTHON'].removeprefix('python')}" in [text for own, text in RUNS if own == job]
    elif program == ".venv/bin/crossmae":
        assert words[0] == "install-detectron2"
        from tools.install_detectron2 import build_parser

        build_parser().parse_args(words[1:])
        assert words[0] in COMMANDS
    elif program == ".venv/bin/python":
        assert words[:2] in (["-m", "pytest"], ["-m", "pip"])
        assert all((ROOT / word).exists() for word in words if word.startswith("tests"))
    else:
        assert program == "setup-python"
        assert words[0] in SpecifierSet(re.findall(r'^requires-python = "(.*)"', PROJECT, re.MULTILINE)[0])


def test_the_oldest_python_and_all_pins_are_tested() -> None:
    rows = JOBS["test"]["strategy"]["matrix"]["include"]
    assert {row["pins"] for row in rows} == PINS
    oldest = re.findall(r'^requires-python = ">=([\d.]+)', PROJECT, re.MULTILINE)[0]
    assert {"python": oldest, "pins": "oldest"} in rows
    versions = [tuple(map(int, row["python"].split("."))) for row in rows if row["pins"] == "newest"]
    assert versions == [max(tuple(map(int, row["python"].split("."))) for row in rows)]


def test_every_source_of_detectron2_is_checked_weekly() -> None:
    text = (ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8")
    assert re.search(r"^  schedule:\n    - cron: \"\d+ \d+ \* \* \d\"", text, re.MULTILINE)
    assert JOBS["detectron2"]["strategy"]["matrix"]["source"] == ["--from index", "--from git", "--compile"]


def test_hooks_have_the_pinned_ruff() -> None:
    remote, local = read(".pre-commit-config.yaml")["repos"]
    assert re.findall(r'"ruff==(.+?)"', PROJECT) == [remote["rev"].removeprefix("v")]
    assert local["hooks"][0]["entry"].split()[1] in TARGETS


def test_the_citation_is_of_this_version_and_its_paper() -> None:
    citation = read("CITATION.cff")
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()  # required by the format
    assert citation["version"] == crossmae.__version__
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    newest = re.findall(r"^## (\S+) \((.+)\)$", changelog, re.MULTILINE)[0]
    assert newest == (citation["version"], str(citation["date-released"]))
    assert f'license = "{citation["license"]}"' in PROJECT
    (paper,) = citation["references"]
    bibtex = (ROOT / "README.md").read_text(encoding="utf-8").partition("@article")[2]
    authors = " ".join(re.findall(r"author=\{(.*?)\}", bibtex, re.DOTALL)[0].split()).split(" and ")
    assert [f"{one['given-names']} {one['family-names']}" for one in paper["authors"]] == authors
    for key in ("title", "journal", "year"):
        assert f"{key}={{{paper[key]}}}" in bibtex


@pytest.mark.parametrize("name", ["bug", "feature"])
def test_forms_have_what_github_requires(name: str) -> None:
    form = read(f".github/ISSUE_TEMPLATE/{name}.yml")
    assert {"name", "description", "body"} <= form.keys()
    fields = [field for field in form["body"] if field["type"] != "markdown"]
    assert all(field["type"] == "textarea" and field["attributes"]["label"] for field in fields)
    assert len({field["id"] for field in fields}) == len(fields)
    assert (name == "bug") == any("crossmae doctor" in field["attributes"]["label"] for field in fields)


def test_links_of_the_pages_lead_somewhere() -> None:
    for name in ("SECURITY.md", "CODE_OF_CONDUCT.md"):
        for target in re.findall(r"\]\((?!http)([^)#]+)", (ROOT / name).read_text(encoding="utf-8")):
            assert (ROOT / target).exists(), f"{name}: {target}"
