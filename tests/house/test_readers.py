"""Proves that text of others is parsed in one place only, within the bounds of `crossmae/files/parsing.py`."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.house.tree import ROOT

UNBOUNDED = {"json.load", "json.loads", "yaml.safe_load", "yaml.load", "ast.literal_eval", "yaml.full_load"}
# Files that may call an unbounded parser, with the reason.
ALLOWED = {
    "crossmae/files/parsing.py": "the bounded readers",
    "crossmae/doctor.py": "our own pyproject.toml, before any library is known to be installed",
    "det/evaluation/report.py": "what json.dumps has just written",
    "det/training/checkpoint.py": "what json.dumps has just written",
    "det/training/train.py": "what json.dumps has just written",
}


def calls(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            yield f"{node.value.id}.{node.attr}"


@pytest.mark.parametrize("folder", ["crossmae", "det", "tools"])
def test_text_is_parsed_within_bounds(folder: str) -> None:
    found = {str(path.relative_to(ROOT)) for path in (ROOT / folder).rglob("*.py") if UNBOUNDED & set(calls(path))}
    assert found == {name for name in ALLOWED if name.startswith(folder)}
