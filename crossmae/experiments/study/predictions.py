"""Predictions of the study, and their verdicts from the rows.

`docs/results.md` states the same predictions, rules and margins. They were written before the first run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from crossmae.experiments.rows import Row
from crossmae.experiments.statistics import Difference, difference_of, one_decimal, scores_of
from crossmae.experiments.study.arms import DETECTION_CPU, SEEDS

Verdict = Literal["refuted", "undecided", "not measured", "confirmed"]
Rule = Literal["equal", "not worse", "helps"]
VERDICTS: tuple[Verdict, ...] = ("refuted", "undecided", "not measured", "confirmed")  # the unwelcome ones first
RATIO_TOLERANCE = 0.05  # of a ratio, prediction i


@dataclass(frozen=True)
class Measure:
    """A number of a cell, in percent.

    Attributes:
        part, kind: facts of the cell.
        key: key of the number.
        margin: difference that would not matter, chosen before the first run.
    """

    part: str
    kind: str
    key: str
    name: str
    unit: str
    margin: float


TOP1 = Measure("fashion_mnist", "finetune", "top1", "fine-tuned top-1", "points", 2.0)
KNN = Measure("fashion_mnist", "probe", "knn", "kNN", "points", 1.0)
LINEAR = Measure("fashion_mnist", "probe", "linear", "linear probe", "points", 1.0)
MASK_AP = Measure("detection", "detect", "mask_AP", "mask AP", "AP", 2.0)
BOX_AP = Measure("detection", "detect", "box_AP", "box AP", "AP", 2.0)
FASHION_MEASURES = (TOP1, KNN, LINEAR)


@dataclass(frozen=True)
class Prediction:
    """A claim about differences of arms.

    Attributes:
        pairs: (arm, control). The claim must hold for all.
        measure: measure that decides.
    """

    name: str
    text: str
    rule: Rule
    pairs: tuple[tuple[str, str], ...]
    measure: Measure = TOP1


PREDICTIONS = (
    Prediction(
        "ii",
        "At equal epochs, CrossMAE with 25 % predicted patches equals MAE.",
        "equal",
        (("cross25_d6", "mae_d4"),),
    ),
    Prediction(
        "iii",
        "At equal compute, CrossMAE is not worse than MAE.",
        "not worse",
        (("cross25_d6_equal", "mae_d4"), ("cross25_d4_equal", "mae_d4")),
    ),
    Prediction("iv-a", "Fusing feature maps helps.", "helps", (("cross25_d6", "cross25_d6_nofusion"),)),
    Prediction(
        "iv-b",
        "Cross-attention without fusion does not hurt.",
        "not worse",
        (("cross25_d6_nofusion", "mae_d4"),),
    ),
    Prediction(
        "v",
        "Pretraining on own pictures helps detection at few labels.",
        "helps",
        (("cross25", "random"),),
        MASK_AP,
    ),
)
RATIOS_TEXT = "The decoder's arithmetic, as a ratio to MAE's, is the formula's within 5 %."


@dataclass(frozen=True)
class ArmComparison:
    """A difference and the verdict that follows from it.

    Attributes:
        share: percent of the labels. None: all that the measure has.
    """

    arm: str
    control: str
    measure: Measure
    rule: Rule
    difference: Difference
    verdict: Verdict
    share: float | None = None


@dataclass(frozen=True)
class Judgement:
    """Verdict on a prediction, and the findings behind it.

    Attributes:
        detail: what was found, in words.
        also: findings by other measures, which do not change the verdict.
    """

    name: str
    text: str
    verdict: Verdict
    detail: str
    findings: tuple[ArmComparison, ...] = ()
    also: tuple[ArmComparison, ...] = ()


def judge(difference: Difference, rule: Rule, margin: float) -> Verdict:
    """Turn an interval into a verdict. Fewer than three pairs decide nothing."""
    mean = difference.mean
    if mean is None:
        return "not measured"
    if mean.low is None or mean.high is None or mean.runs < len(SEEDS):
        return "undecided"
    low, high = mean.low, mean.high
    if rule == "equal":
        confirmed, refuted = -margin < low and high < margin, low > 0 or high < 0
    elif rule == "not worse":
        confirmed, refuted = low > -margin, high < 0
    else:
        confirmed, refuted = low > 0, high < margin
    return "confirmed" if confirmed else "refuted" if refuted else "undecided"


def worst(verdicts: Sequence[Verdict]) -> Verdict:
    """Return the verdict on a claim that must hold everywhere."""
    found = [verdict for verdict in ("refuted", "not measured", "undecided") if verdict in verdicts]
    return found[0] if found else "confirmed"  # type: ignore[return-value]


def values_of(rows: Sequence[Row], measure: Measure, arm: str, share: float | None = None) -> Mapping[int, float]:
    """Find the values of an arm by seed."""
    own = [row for row in rows if row.facts.get("part") == measure.part]
    point = "labelled" if share is None else "share"
    scores = scores_of(own, measure.key, [measure.kind], point)
    return next((values for (name, at), values in scores.items() if name == arm and share in (None, at)), {})


def in_part(measure: Measure, part: str) -> Measure:
    """Return the same measure of another part."""
    return replace(measure, part=part)


def shares_of(rows: Sequence[Row], measure: Measure) -> list[float]:
    """List the label shares of a measure, in rising order."""
    own = [row for row in rows if (row.facts.get("part"), row.facts.get("kind")) == (measure.part, measure.kind)]
    return sorted({float(row.facts["share"] or 0) for row in own if row.facts.get("share") is not None})


def find(
    rows: Sequence[Row], pair: tuple[str, str], measure: Measure, rule: Rule, share: float | None
) -> ArmComparison:
    """Compare two arms."""
    arm, control = pair
    difference = difference_of(values_of(rows, measure, arm, share), values_of(rows, measure, control, share))
    return ArmComparison(arm, control, measure, rule, difference, judge(difference, rule, measure.margin), share)


def judge_prediction(rows: Sequence[Row], prediction: Prediction) -> Judgement:
    """Judge a prediction by its measure, and compare the other measures."""
    measure = prediction.measure
    shares: list[float | None] = [*sorted(DETECTION_CPU.shares)] if measure == MASK_AP else [None]
    share = shares[0]  # the smaller one, also while it has no rows
    findings = tuple(find(rows, pair, measure, prediction.rule, share) for pair in prediction.pairs)
    others = FASHION_MEASURES if measure == TOP1 else (BOX_AP,)
    also = [find(rows, pair, one, prediction.rule, share) for pair in prediction.pairs for one in others]
    also += [find(rows, pair, measure, prediction.rule, other) for pair in prediction.pairs for other in shares[1:]]
    verdict = worst([finding.verdict for finding in findings])
    detail = "; ".join(describe(finding) for finding in findings)
    rest = tuple(finding for finding in also if finding.measure != measure or finding.share != share)
    return Judgement(prediction.name, prediction.text, verdict, detail, findings, rest)


def judge_ratios(rows: Sequence[Row]) -> Judgement:
    """Judge prediction i by the row of the decoders."""
    numbers = next((row.numbers for row in rows if row.facts.get("kind") == "decoder"), {})
    errors = {
        key.removesuffix("_ratio"): numbers[key] / numbers[key.removesuffix("ratio") + "formula"] - 1
        for key in numbers
        if key.endswith("_ratio") and not key.endswith("seconds_ratio")
    }
    if not errors:
        return Judgement("i", RATIOS_TEXT, "not measured", "not measured")
    name = max(errors, key=lambda key: abs(errors[key]))
    verdict: Verdict = "confirmed" if abs(errors[name]) <= RATIO_TOLERANCE else "refuted"
    return Judgement("i", RATIOS_TEXT, verdict, f"{len(errors)} ratios, at most {abs(errors[name]):.1%} off")


def judge_all(rows: Sequence[Row]) -> list[Judgement]:
    """Judge all predictions, in their order."""
    return [judge_ratios(rows), *(judge_prediction(rows, prediction) for prediction in PREDICTIONS)]


def unwelcome_first(judgements: Sequence[Judgement]) -> list[Judgement]:
    """Sort judgements: refuted, undecided, not measured, confirmed."""
    return sorted(judgements, key=lambda one: VERDICTS.index(one.verdict))


def describe(finding: ArmComparison) -> str:
    """Write a difference with its interval, as on the page."""
    mean, head = finding.difference.mean, f"{finding.arm} - {finding.control}"
    if mean is None:
        return f"{head}: no pair of runs"
    amount = f"{head}: {'+' if mean.mean >= 0 else ''}{one_decimal(mean.mean)} {finding.measure.unit}"
    if mean.low is None or mean.high is None:
        return f"{amount} (one pair of runs)"
    return f"{amount} ({one_decimal(mean.low)} to {one_decimal(mean.high)}, {mean.runs} seeds)"
