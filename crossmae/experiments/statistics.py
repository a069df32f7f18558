"""Means over seeds, paired differences of arms, and verdicts in words that follow from the intervals.

An arm is a way to start the encoder, and a point is a place on the x axis, such as a share of the labels. Runs of two
arms with the same seed are pairs, because they share the labels and the random numbers of the fine-tuning.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from scipy import stats

from crossmae.classification.evaluation.metrics import CONFIDENCE, Mean, mean_of, student_mean
from crossmae.experiments.rows import Row

Scores = Mapping[tuple[str, float], Mapping[int, float]]  # values by arm and point, and by seed
Claim = Literal["gain", "loss", "nothing shown", "no spread", "one seed", "no pair"]

ENOUGH_SEEDS = 5  # from here on, an interval reaches about one standard deviation


@dataclass(frozen=True)
class Metric:
    """A number of a row, in percent. Larger values are better.

    Attributes:
        name: name in words.
        unit: unit of a difference.
        main: differences are compared. Otherwise only values are listed.
    """

    key: str
    name: str
    unit: str
    main: bool = True


METRICS_OF_ROWS = (
    Metric("mask_AP", "mask AP", "AP"),
    Metric("box_AP", "box AP", "AP"),
    Metric("mask_AP50", "mask AP50", "AP50", main=False),
    Metric("box_AP50", "box AP50", "AP50", main=False),
    Metric("top1", "top-1 accuracy", "points"),
)


@dataclass(frozen=True)
class Difference:
    """Paired differences of an arm and its control.

    Attributes:
        values: arm minus control, by seed that both have.
        mean: None without a pair.
        unpaired: seeds that only one of the two has.
    """

    values: Mapping[int, float]
    mean: Mean | None
    unpaired: tuple[int, ...] = ()

    @property
    def has_interval(self) -> bool:
        """True if the pairs are several and differ."""
        return self.claim in ("gain", "loss", "nothing shown")

    @property
    def claim(self) -> Claim:
        """Claim that the interval allows."""
        if self.mean is None:
            return "no pair"
        if self.mean.low is None or self.mean.high is None:
            return "one seed"
        if math.isclose(self.mean.low, self.mean.high, abs_tol=1e-9):
            return "no spread"
        if self.mean.low > 0:
            return "gain"
        return "loss" if self.mean.high < 0 else "nothing shown"


Differences = Mapping[tuple[str, str], Mapping[float, Difference]]  # by arm and control, and by point


def scores_of(rows: Sequence[Row], metric: str, kinds: Collection[str], point: str = "share") -> Scores:
    """Sort the values of a metric by arm, point and seed.

    Args:
        metric: key in the numbers of a row. Rows without it, or with NaN, are left out.
        kinds: kinds of cells that count, such as "detect".
        point: key of the fact that is the point.
    """
    found: dict[tuple[str, float], dict[int, float]] = defaultdict(dict)
    for row in rows:
        facts, value = row.facts, row.numbers.get(metric, math.nan)
        if facts.get("kind") in kinds and None not in (facts.get(point), facts.get("seed")) and math.isfinite(value):
            found[str(facts["arm"]), float(facts[point] or 0)][int(facts["seed"] or 0)] = value
    return found


def missing_runs(
    scores: Scores, arms: Sequence[str], points: Sequence[float], seeds: Sequence[int]
) -> list[tuple[str, float, int]]:
    """List arm, point and seed of all missing runs of a grid."""
    return [
        (arm, point, seed)
        for arm in arms
        for point in points
        for seed in seeds
        if seed not in scores.get((arm, point), {})
    ]


def percent_mean(values: Mapping[int, float]) -> Mean:
    """Average percentages over seeds. The interval is cut at 0 and 100."""
    found = mean_of([value / 100 for value in values.values()])
    low, high = (None if bound is None else 100 * bound for bound in (found.low, found.high))
    return Mean(100 * found.mean, low, high, found.runs)


def difference_of(arm: Mapping[int, float], control: Mapping[int, float]) -> Difference:
    """Subtract the values of the control, seed by seed."""
    values = {seed: arm[seed] - control[seed] for seed in sorted(arm.keys() & control.keys())}
    mean = student_mean(list(values.values())) if values else None
    return Difference(values, mean, tuple(sorted(arm.keys() ^ control.keys())))


def differences_of(
    scores: Scores, pairs: Sequence[tuple[str, str]], points: Collection[float]
) -> dict[tuple[str, str], dict[float, Difference]]:
    """Compare each pair (arm, control) at each point."""
    return {
        (arm, control): {
            point: difference_of(scores.get((arm, point), {}), scores.get((control, point), {})) for point in points
        }
        for arm, control in pairs
    }


def describe_difference(difference: Difference, subject: str, unit: str, images: int | None = None) -> str:
    """Say what a difference shows, as the end of a sentence.

    Args:
        subject: the arm, such as "own pretraining".
        unit: unit of the difference, such as "AP".
        images: validation images. None: unknown.
    """
    mean, claim = difference.mean, difference.claim
    if mean is None:
        return "no seed has runs of both, so nothing is shown"
    if mean.low is None or mean.high is None:
        return "one seed shows nothing"
    if claim == "no spread":
        amount = "are equal" if abs(mean.mean) < 1e-9 else f"differ by the same {one_decimal(mean.mean)} {unit}"
        return f"all pairs of runs ({mean.runs}) {amount}, and without a spread over seeds nothing is shown"
    low, high, seeds = mean.low, mean.high, f"{mean.runs} seeds"
    if claim == "gain":
        return f"{subject} adds {one_decimal(mean.mean)} {unit} ({one_decimal(low)} to {one_decimal(high)}, {seeds})"
    if claim == "loss":
        bounds = f"{one_decimal(-high)} to {one_decimal(-low)}"
        return f"{subject} loses {one_decimal(-mean.mean)} {unit} ({bounds}, {seeds})"
    scope = describe_scope(mean.runs, images)
    return (
        f"no difference is shown ({one_decimal(low)} to {one_decimal(high)}, {seeds}). {scope[0].upper()}{scope[1:]}, "
        f"the interval excludes a gain above {one_decimal(high)} {unit} and a loss above {one_decimal(-low)} {unit}"
    )


def describe_differences(
    differences: Mapping[str, Difference], subject: str, unit: str, images: int | None = None
) -> list[str]:
    """Say what the differences at several points show, one text for each.

    Args:
        differences: by place, such as "at 40 labelled images".
        images: validation images. None: unknown.
    """
    sentences = [f"{place}, {describe_difference(one, subject, unit, images)}." for place, one in differences.items()]
    return [sentence[0].upper() + sentence[1:] for sentence in sentences]


def describe_scope(seeds: int, images: int | None) -> str:
    """Say for which seeds and validation images an interval holds.

    Args:
        images: validation images. None: unknown.
    """
    own = "one seed" if seeds == 1 else f"these {seeds} seeds"
    if images == 1:
        return f"over {own}, on this one validation image"
    return f"over {own}, on these {'' if images is None else f'{images:,} '}validation images"


def points_of_one_image(images: int | None) -> float:
    """Return by how many points one image changes an accuracy. 0: unknown."""
    return 100 / images if images else 0.0


def equal_scores(scores: Scores, arms: Collection[str], points: Collection[float]) -> dict[str, list[float]]:
    """List the points at which all seeds have the same score.

    Returns the points by arm. Arms without such points, and points with one seed, are left out.
    """
    found: dict[str, list[float]] = defaultdict(list)
    for arm in arms:
        for point in points:
            values = list(scores.get((arm, point), {}).values())
            if len(values) > 1 and math.isclose(min(values), max(values), abs_tol=1e-9):
                found[arm].append(point)
    return found


def describe_width(seeds: int) -> str:
    """Explain how wide the intervals of a number of seeds are."""
    if seeds < 2:
        return "One seed has no interval: two runs of the same arm differ as well. Run at least 3 seeds."
    return (
        f"With {seeds} seeds, intervals {'are wide: they ' if seeds < ENOUGH_SEEDS else ''}reach "
        f"{one_decimal(_reach(seeds))} standard deviations of the differences to each side. With {2 * seeds} seeds, "
        f"they would reach {one_decimal(_reach(2 * seeds))}."
    )


def _reach(seeds: int) -> float:
    return float(stats.t.ppf((1 + CONFIDENCE) / 2, seeds - 1)) / math.sqrt(seeds)


def describe_comparisons(count: int) -> str:
    """Warn that some of many intervals miss the true difference."""
    if count < 2:
        return "One in twenty 95 % intervals misses the true difference." if count else "No comparison has an interval."
    return (
        f"This page makes {count} comparisons. One in twenty 95 % intervals misses the true difference: of {count}, "
        f"expect {one_decimal(count * (1 - CONFIDENCE))} to miss it. A single gain among many comparisons is weak "
        "evidence."
    )


def one_decimal(value: float) -> str:
    """Format a number with one decimal, small ones with more."""
    if 1e-4 < abs(value) < 0.05:
        return f"{value:.1g}"
    return f"{round(value, 1) or 0.0:.1f}"
