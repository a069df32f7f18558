"""Proves that intervals equal those of scipy, and that no verdict claims more than its interval."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy import stats

from crossmae.experiments.rows import Row
from crossmae.experiments.statistics import (
    describe_comparisons,
    describe_difference,
    describe_differences,
    describe_scope,
    describe_width,
    difference_of,
    equal_scores,
    missing_runs,
    one_decimal,
    percent_mean,
    scores_of,
)

percentages = st.floats(0, 100)


def by_seed(*values: float) -> dict[int, float]:
    return dict(enumerate(values))


@given(st.lists(st.tuples(percentages, percentages), min_size=2, max_size=8))
def test_interval_of_a_difference_equals_scipys(pairs: list[tuple[float, float]]) -> None:
    own, control = zip(*pairs, strict=True)
    differences = np.subtract(own, control)
    assume(differences.std() > 1e-6)
    found = difference_of(by_seed(*own), by_seed(*control)).mean
    assert found is not None
    expected = stats.ttest_rel(own, control).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=1e-6)
    assert found.mean == pytest.approx(differences.mean(), abs=1e-9)


@given(st.lists(percentages, min_size=2, max_size=8))
def test_interval_of_a_mean_is_students_and_stays_a_percentage(values: list[float]) -> None:
    found = percent_mean(by_seed(*values))
    half = stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / math.sqrt(len(values))
    assert found.mean == pytest.approx(np.mean(values))
    assert found.low == pytest.approx(max(np.mean(values) - half, 0), abs=1e-9)
    assert found.high == pytest.approx(min(np.mean(values) + half, 100), abs=1e-9)


@given(
    st.dictionaries(st.integers(0, 5), percentages, max_size=6),
    st.dictionaries(st.integers(0, 5), percentages, max_size=6),
)
def test_a_claim_follows_from_the_interval(own: dict[int, float], control: dict[int, float]) -> None:
    found = difference_of(own, control)
    text = describe_difference(found, "it", "AP")
    common = own.keys() & control.keys()
    assert found.values == {seed: own[seed] - control[seed] for seed in common}
    assert set(found.unpaired) == (own.keys() | control.keys()) - common
    values = list(found.values.values())
    spread = np.std(values, ddof=1) if len(values) > 1 else 0
    half = stats.t.ppf(0.975, max(len(values) - 1, 1)) * spread / math.sqrt(max(len(values), 1))
    assume(not 0 < half < 1e-6)
    assume(half == 0 or abs(abs(np.mean(values)) - half) > 1e-6)
    assert (" adds " in text) == bool(half and np.mean(values) > half)
    assert (" loses " in text) == bool(half and -np.mean(values) > half)
    assert ("nothing" in text) == (half == 0)
    mirrored = difference_of(control, own).claim
    assert (found.claim, mirrored) in {("gain", "loss"), ("loss", "gain")} or found.claim == mirrored


@pytest.mark.parametrize(
    "own, control, text",
    [
        ((36.0, 37.0, 35.5), (30.0, 30.5, 29.8), "it adds 6.1 AP (5.1 to 7.1, 3 seeds)"),
        ((30.0, 30.5, 29.8), (36.0, 37.0, 35.5), "it loses 6.1 AP (5.1 to 7.1, 3 seeds)"),
        (
            (40.0, 41.0, 39.0),
            (39.5, 40.0, 40.0),
            "no difference is shown (-2.4 to 2.8, 3 seeds). Over these 3 seeds, on these 12 validation images, the "
            "interval excludes a gain above 2.8 AP and a loss above 2.4 AP",
        ),
        ((50.0,), (10.0,), "one seed shows nothing"),
        ((), (10.0,), "no seed has runs of both, so nothing is shown"),
        ((5.0, 5.0), (5.0, 5.0), "all pairs of runs (2) are equal, and without a spread over seeds nothing is shown"),
        (
            (8.0, 8.0, 8.0),
            (5.0, 5.0, 5.0),
            "all pairs of runs (3) differ by the same 3.0 AP, and without a spread over seeds nothing is shown",
        ),
    ],
)
def test_words_of_a_verdict(own: tuple[float, ...], control: tuple[float, ...], text: str) -> None:
    assert describe_difference(difference_of(by_seed(*own), by_seed(*control)), "it", "AP", 12) == text


@given(st.lists(st.sampled_from([0.0, 50.0, 50.1]), max_size=4))
def test_scores_are_equal_if_all_of_several_seeds_agree(values: list[float]) -> None:
    scores = {("own", 10.0): by_seed(*values), ("own", 30.0): by_seed(1, 1), ("other", 10.0): by_seed(1, 2)}
    expected = [10.0, 30.0] if len(values) > 1 and len(set(values)) == 1 else [30.0]
    assert equal_scores(scores, ["own", "other", "weights"], [10.0, 30.0]) == {"own": expected}


def test_scopes_name_seeds_and_images() -> None:
    assert describe_scope(3, 1200) == "over these 3 seeds, on these 1,200 validation images"
    assert describe_scope(1, 1) == "over one seed, on this one validation image"
    assert describe_scope(2, None) == "over these 2 seeds, on these validation images"


def test_a_sentence_for_each_point() -> None:
    gain, nothing = difference_of(by_seed(6, 7, 5), by_seed(0, 0, 0)), difference_of(by_seed(6), by_seed(0))
    texts = describe_differences({"at 40 images": gain, "at 400 images": nothing}, "own pretraining", "AP")
    assert texts == [
        "At 40 images, own pretraining adds 6.0 AP (3.5 to 8.5, 3 seeds).",
        "At 400 images, one seed shows nothing.",
    ]


def test_arms_that_are_equal_seldom_differ() -> None:
    """2,000 simulated grids without any effect: a gain is claimed in 2.5 % of the comparisons, a loss in 2.5 %."""
    rng = np.random.default_rng(0)
    claims = []
    for _ in range(2000):
        runs = 30 + rng.normal(0, 2, 3) + rng.normal(0, 3, (2, 3))  # seeds share labels, and runs differ
        claims.append(difference_of(by_seed(*runs[0]), by_seed(*runs[1])).claim)
    for claim in ("gain", "loss"):
        low, high = stats.binom.interval(0.999, 2000, 0.025)
        assert low <= claims.count(claim) <= high


def row(facts: Mapping[str, str | int | float | None], **numbers: float) -> Row:
    return Row("cell", facts, numbers, {})


def test_scores_are_sorted_by_arm_point_and_seed() -> None:
    facts = {"kind": "detect", "arm": "own", "share": 10, "seed": 0}
    rows = [
        row(facts, mask_AP=1.0),
        row(facts | {"seed": 1}, mask_AP=2.0),
        row(facts | {"share": 30.0}, mask_AP=3.0),
        row(facts | {"seed": 2}, mask_AP=math.nan),
        row(facts | {"seed": 3}, box_AP=4.0),
        row(facts | {"kind": "pretrain", "share": None}, mask_AP=5.0),
    ]
    scores = scores_of(rows, "mask_AP", {"detect"})
    assert scores == {("own", 10): {0: 1.0, 1: 2.0}, ("own", 30): {0: 3.0}}
    expected = [("own", 30, 1), ("weights", 10, 0), ("weights", 10, 1), ("weights", 30, 0), ("weights", 30, 1)]
    assert missing_runs(scores, ["own", "weights"], [10, 30], [0, 1]) == expected


def test_width_and_number_of_comparisons_are_explained() -> None:
    assert "With 3 seeds, intervals are wide: they reach 2.5 standard deviations" in describe_width(3)
    assert "With 6 seeds, they would reach 1.0" in describe_width(3)
    assert "With 5 seeds, intervals reach 1.2 standard deviations" in describe_width(5)
    assert "One seed has no interval" in describe_width(1)
    assert "makes 12 comparisons" in describe_comparisons(12)
    assert "of 12, expect 0.6 to miss" in describe_comparisons(12)
    assert "This page" not in describe_comparisons(1)


@given(st.floats(-100, 100).filter(lambda value: value == 0 or abs(value) > 1e-3))
def test_numbers_keep_their_sign(value: float) -> None:
    text = one_decimal(value)
    assert float(text) == pytest.approx(value, abs=0.0501)
    assert np.sign(float(text)) == np.sign(value)
    assert not re.fullmatch(r"-0\.?0*", text)
