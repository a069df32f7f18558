"""Proves the verdicts on predictions: rows that hold confirm, rows that do not refute, and noise decides nothing."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from crossmae.classification.evaluation.metrics import Mean
from crossmae.errors import PROGRAMS
from crossmae.experiments.statistics import Difference
from crossmae.experiments.study.predictions import (
    FASHION_MEASURES,
    MASK_AP,
    PREDICTIONS,
    judge,
    judge_all,
    unwelcome_first,
)
from tests.crossmae.experiments.study.made_rows import make_rows


def verdicts(**changes: object) -> dict[str, str]:
    return {one.name: one.verdict for one in judge_all(make_rows(**changes))}  # type: ignore[arg-type]


def interval(low: float, high: float) -> Difference:
    return Difference({0: low, 1: high, 2: (low + high) / 2}, Mean((low + high) / 2, low, high, 3))


def test_rows_that_hold_confirm() -> None:
    assert verdicts(top1={"cross25_d6_nofusion": 75.2}) == dict.fromkeys(
        ["i", "ii", "iii", "iv-a", "iv-b", "v"], "confirmed"
    )


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"formula": 2.9}, "i"),
        ({"top1": {"cross25_d6": 70.0}}, "ii"),
        ({"top1": {"cross25_d6": 82.0}}, "ii"),
        ({"top1": {"cross25_d4_equal": 70.0}}, "iii"),
        ({"top1": {"cross25_d6_nofusion": 76.0}}, "iv-a"),
        ({"top1": {"cross25_d6_nofusion": 70.0}}, "iv-b"),
        ({"ap": {"cross25": 10.1}}, "v"),
        ({"ap": {"cross25": 5.0}}, "v"),
    ],
)
def test_rows_that_do_not_hold_refute(changes: dict[str, object], name: str) -> None:
    assert verdicts(**changes)[name] == "refuted"


def test_noise_decides_nothing() -> None:
    found = verdicts(spread=6.0, top1={"cross25_d6": 75.0, "cross25_d6_nofusion": 75.0}, ap={"cross25": 12.0})
    assert {found[name] for name in ("ii", "iii", "iv-a", "v")} == {"undecided"}


def test_runs_with_many_labels_say_nothing_about_few() -> None:
    rows = [row for row in make_rows() if row.facts.get("share") != 10]
    assert {one.name: one.verdict for one in judge_all(rows)}["v"] == "not measured"


def test_missing_runs_are_not_measured() -> None:
    assert {one.verdict for one in judge_all([])} == {"not measured"}
    two_seeds = [row for row in make_rows() if row.facts.get("seed") != 2]
    assert {one.verdict for one in judge_all(two_seeds)[1:]} == {"undecided"}


@pytest.mark.parametrize(
    ("rule", "low", "high", "expected"),
    [
        ("equal", -1.9, 1.9, "confirmed"),
        ("equal", 0.5, 1.5, "confirmed"),
        ("equal", -2.1, 1.0, "undecided"),
        ("equal", 0.5, 2.5, "refuted"),
        ("not worse", -1.9, 9.0, "confirmed"),
        ("not worse", -2.1, 0.5, "undecided"),
        ("not worse", -2.5, -0.1, "refuted"),
        ("not worse", -1.5, -0.1, "confirmed"),
        ("helps", 0.1, 0.3, "confirmed"),
        ("helps", -0.1, 1.9, "refuted"),
        ("helps", -0.1, 2.1, "undecided"),
    ],
)
def test_the_rules(rule: str, low: float, high: float, expected: str) -> None:
    assert judge(interval(low, high), rule, margin=2.0) == expected  # type: ignore[arg-type]


def test_the_unwelcome_comes_first() -> None:
    found = unwelcome_first(judge_all(make_rows(top1={"cross25_d6": 70.0}, spread=0.1)))
    assert found[0].verdict == "refuted"
    assert found[-1].verdict == "confirmed"


def test_other_measures_do_not_change_a_verdict() -> None:
    rows = make_rows()
    for row in rows:
        if row.facts.get("kind") == "probe" and row.facts["arm"] == "cross25_d6":
            row.numbers["knn"] -= 20  # type: ignore[index]
    found = {one.name: one for one in judge_all(rows)}["ii"]
    assert found.verdict == "confirmed"
    assert "refuted" in {one.verdict for one in found.also}


def test_the_document_states_predictions_rules_and_margins() -> None:
    text = (Path(PROGRAMS) / "docs" / "results.md").read_text("utf-8")
    for one in PREDICTIONS:
        line = next(line for line in text.splitlines() if line.startswith(f"| {one.name} |"))
        assert one.text in line
        assert one.rule in line
        assert all(arm in line for pair in one.pairs for arm in pair)
    margins = {float(value) for value in re.findall(r"\| (\d\.\d) (?:points|AP) \|", text)}
    assert margins == {one.margin for one in (*FASHION_MEASURES, MASK_AP)}
