"""A request is described by the words that a user typed."""

from __future__ import annotations

import shlex
from dataclasses import fields
from pathlib import Path

import pytest

from crossmae.experiments.pipeline.pipeline import Request
from crossmae.experiments.pipeline.plan import parse_duration
from crossmae.experiments.pipeline.typed import as_typed, describe_changes, format_duration, name_of
from tools.run import build_parser


@pytest.mark.parametrize("seconds", [0.5, 1, 45, 59.25, 60, 61.5, 1800, 3599, 3600, 5400, 86400, 90061.125])
def test_a_duration_is_read_as_it_was(seconds: float) -> None:
    assert parse_duration(format_duration(seconds), "--budget") == seconds


@pytest.mark.parametrize(("seconds", "text"), [(1800.0, "30m"), (7200.0, "2h"), (5400.0, "1h30m"), (45.0, "45s")])
def test_a_duration_is_short(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


def test_every_field_of_a_request_is_an_argument_of_the_tool() -> None:
    known = {word for action in build_parser()._actions for word in (*action.option_strings, action.metavar)}
    assert {name_of(field.name) for field in fields(Request)} <= known


@pytest.mark.parametrize(
    ("field", "value", "destination", "parsed"),
    [
        ("budget", 5400.0, "budget", "1h30m"),
        ("pretrain_share", 40.0, "pretrain_share", 40.0),
        ("val_share", 0.15, "val", 0.15),
        ("by_folder", True, "by_folder", True),
        ("size", 320, "size", 320),
        ("weights", str(Path("/a b/c.pth")), "weights", Path("/a b/c.pth")),
        ("labels", str(Path.cwd() / "x.json"), "labels", Path("x.json")),
        ("pretrain_settings", ["a=1", "b=[1, 2]"], "pretrain_set", ["a=1", "b=[1, 2]"]),
    ],
)
def test_the_tool_reads_what_is_shown(field: str, value: object, destination: str, parsed: object) -> None:
    given = build_parser().parse_args(["IMAGES", *shlex.split(as_typed(field, value))])
    assert getattr(given, destination) == parsed


def test_what_was_not_given_is_said_and_all_changes_are_named() -> None:
    before = {"budget": 1800.0, "weights": None, "compare": False, "seed": 0, "digest of labels": "a"}
    now = {"budget": 1800.0, "weights": "/w.pth", "compare": True, "seed": 0, "digest of labels": "b"}
    assert describe_changes(before, now) == "no --weights, not --weights /w.pth; no --compare, not --compare"
    assert describe_changes(now, now) == ""
