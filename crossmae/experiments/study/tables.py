"""Tables of the study, as plain texts: for the page and for docs/results.md."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from crossmae.classification.evaluation.metrics import Mean
from crossmae.experiments.rows import Row
from crossmae.experiments.score_blocks import bounds
from crossmae.experiments.statistics import one_decimal, percent_mean
from crossmae.experiments.study.arms import (
    DECAYED_RANDOM,
    DETECTION_ARMS,
    DETECTION_CPU,
    DETECTION_GPU15,
    FASHION_ARMS,
    SEEDS,
)
from crossmae.experiments.study.predictions import (
    BOX_AP,
    FASHION_MEASURES,
    MASK_AP,
    ArmComparison,
    Judgement,
    Measure,
    Rule,
    describe,
    find,
    in_part,
    judge_all,
    shares_of,
    unwelcome_first,
    values_of,
)

MISSING = "missing"
FASHION_PAIRS = (  # comparisons in addition to the predictions
    ("cross25_d6", "random"),
    ("mae_d4", "random"),
    ("cross75_d6", "cross25_d6"),
    ("cross25_d4", "cross25_d6"),
    ("cross25_d2", "cross25_d6"),
)
DETECTION_WORDS = {arm.name: arm.text for arm in DETECTION_ARMS}
DETECTION_WORDS[DECAYED_RANDOM] = "random weights, with the layer decay of pretrained ones"
DETECTION_PAIRS = (
    ("cross25", "random"),
    ("mae", "random"),
    ("cross25", "mae"),
    ("cross75", "cross25"),
    ("cross25", DECAYED_RANDOM),
)
SIZE_WORDS = {"fashion_mnist": "the study's model", "small": "ViT-S", "base": "ViT-B", "large": "ViT-L"}


@dataclass(frozen=True)
class TextTable:
    """Columns, rows and a caption."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""


def prediction_table(judgements: Sequence[Judgement]) -> TextTable:
    """List the verdicts, the unwelcome ones first."""
    rows = [[one.verdict, one.name, one.text, one.detail] for one in unwelcome_first(judgements)]
    return TextTable(["verdict", "", "prediction", "found"], rows)


def fashion_table(rows: Sequence[Row]) -> TextTable:
    """List every arm on Fashion-MNIST: cost of pretraining, held-out loss and accuracies."""
    table = []
    for arm in FASHION_ARMS:
        pretrained = rows_of(rows, "pretrain", arm.name)
        scores = [with_interval(values_of(rows, measure, arm.name)) for measure in FASHION_MEASURES]
        losses = [row.numbers["val_loss"] for row in pretrained]
        flops = [row.numbers["pretraining_tflop"] for row in pretrained]
        minutes = [float(row.cost["cpu_seconds"] or 0) / 60 for row in pretrained]
        cells = [
            f"`{arm.name}`: {arm.text}",
            str(arm.epochs),
            f"{fmean(flops):.2f}" if flops else MISSING,
            "0" if not arm.epochs else f"{fmean(minutes):.1f}" if minutes else MISSING,
            f"{fmean(losses):.3f}" if losses else MISSING,
        ]
        table.append([*cells, *scores])
    columns = ["arm", "epochs", "TFLOP", "CPU minutes", "held-out loss", *(one.name for one in FASHION_MEASURES)]
    caption = (
        "Mean over seeds, in brackets Student's 95 % interval. TFLOP and minutes are of pretraining. The held-out "
        "loss is the mean over all masked patches of 2,048 test pictures, the same for all arms."
    )
    return TextTable(columns, table, caption)


def rows_of(rows: Sequence[Row], kind: str, arm: str, part: str = "fashion_mnist") -> list[Row]:
    """Select the rows of an arm."""
    wanted = (part, kind, arm)
    return [row for row in rows if tuple(row.facts.get(key) for key in ("part", "kind", "arm")) == wanted]


def with_interval(values: Mapping[int, float], seeds: int = len(SEEDS)) -> str:
    """Format a mean with its interval, such as "76.9 (75.5 to 78.4)".

    Args:
        seeds: number of planned seeds. If some are missing, the text says so.
    """
    if not values:
        return MISSING
    mean = percent_mean(values)
    missing = "" if len(values) >= seeds else f", {len(values)} of {seeds} seeds"
    return f"{one_decimal(mean.mean)}{_brackets(mean)}{missing}"


def _brackets(mean: Mean) -> str:
    return f" ({bounds(mean)})" if mean.low is not None else ""


def single_runs(
    rows: Sequence[Row], measure: Measure, arms: Sequence[str], shares: Sequence[float | None]
) -> TextTable:
    """List every run of a measure by arm and seed."""
    table = []
    for share in shares:
        for arm in arms:
            values = values_of(rows, measure, arm, share)
            label = f"`{arm}`" if share is None else f"`{arm}`, {share:g} % of the labels"
            table.append([label, *(f"{values[seed]:.2f}" if seed in values else MISSING for seed in SEEDS)])
    return TextTable(["arm", *(f"seed {seed}" for seed in SEEDS)], table, f"{measure.name} in percent, every run.")


def fashion_findings(rows: Sequence[Row]) -> list[ArmComparison]:
    """Compare arms on Fashion-MNIST: for the predictions, then for FASHION_PAIRS."""
    findings = []
    for judgement in judge_all(rows):
        findings += [one for one in (*judgement.findings, *judgement.also) if one.measure in FASHION_MEASURES]
    for pair in FASHION_PAIRS:
        rule: Rule = "helps" if pair[1] == "random" else "equal"
        findings += [find(rows, pair, measure, rule, None) for measure in FASHION_MEASURES]
    return [one for one in findings if one.difference.mean]


def detection_findings(rows: Sequence[Row]) -> list[ArmComparison]:
    """Compare the arms of detection at every label share."""
    findings = []
    for share in shares_of(rows, MASK_AP):
        for pair in DETECTION_PAIRS:
            rule: Rule = "helps" if pair[1].startswith("random") else "equal"
            findings += [find(rows, pair, measure, rule, share) for measure in (MASK_AP, BOX_AP)]
    return [one for one in findings if one.difference.mean]


def count_intervals(rows: Sequence[Row]) -> int:
    """Count the intervals of differences in all tables."""
    return sum(one.difference.has_interval for one in (*fashion_findings(rows), *detection_findings(rows)))


def difference_table(rows: Sequence[Row], findings: Sequence[ArmComparison]) -> TextTable:
    """List differences with what their rule says about them."""
    names = {
        (one.arm, one.control, one.measure, one.share): judgement.name
        for judgement in judge_all(rows)
        for one in judgement.findings
    }
    table = [
        [
            names.get((one.arm, one.control, one.measure, one.share), "none"),
            *([f"{one.share:g} %"] if one.share is not None else []),
            *(describe(one), one.measure.name, one.rule, one.verdict),
        ]
        for one in findings
    ]
    labels = ["labels"] if any(one.share is not None for one in findings) else []
    caption = (
        "Paired differences with Student's 95 % interval. A prediction was made only for the rows that name it. The "
        "others are judged by the same rules, and are no test of anything that was claimed before."
    )
    return TextTable(["prediction", *labels, "difference", "measure", "rule", "verdict"], table, caption)


def fashion_differences(rows: Sequence[Row]) -> TextTable:
    """List the paired differences on Fashion-MNIST that have a pair of runs."""
    return difference_table(rows, fashion_findings(rows))


def detection_table(rows: Sequence[Row], part: str = "detection") -> TextTable:
    """List the APs of every arm at every label share."""
    table, measures = [], [in_part(measure, part) for measure in (MASK_AP, BOX_AP)]
    seeds = len((DETECTION_GPU15 if part == DETECTION_GPU15.part else DETECTION_CPU).seeds)
    for share in shares_of(rows, measures[0]):
        images = f"{share:g} % of the labels"
        for arm, words in DETECTION_WORDS.items():
            scores = [with_interval(values_of(rows, measure, arm, share), seeds) for measure in measures]
            if scores[0] == MISSING:  # not every arm is measured at every share
                continue
            table.append([f"`{arm}`: {words}", images, *scores])
    columns = ["start of the encoder", "labelled images", MASK_AP.name, BOX_AP.name]
    caption = "One seed, so no interval." if seeds == 1 else "Mean over seeds, in brackets Student's 95 % interval."
    return TextTable(columns, table, caption)


def detection_differences(rows: Sequence[Row]) -> TextTable:
    """List the paired differences of detection that have a pair of runs."""
    return difference_table(rows, detection_findings(rows))


def rate_table(rows: Sequence[Row]) -> TextTable:
    """List the learning rates that were tried, with their accuracies."""
    found, shown = [row for row in rows if row.facts.get("kind") == "rate"], ("knn_train", "val_loss")
    table = [
        [f"`{row.facts['arm']}`", f"{row.facts['lr']:g}", *(f"{row.numbers[key]:.3f}" for key in shown)]
        for row in sorted(found, key=lambda row: (str(row.facts["arm"]), float(row.facts["lr"] or 0)))
    ]
    caption = (
        "kNN leaves one out among the 12,800 training pictures, after a third of the length, one seed. The best "
        "rate of each arm serves all arms with its kind of decoder."
    )
    return TextTable(["arm", "learning rate", "kNN among training pictures, %", "held-out loss"], table, caption)


def decoder_table(rows: Sequence[Row]) -> TextTable:
    """List the ratios of MAE's decoder to CrossMAE's decoders."""
    numbers = next((row.numbers for row in rows if row.facts.get("kind") == "decoder"), {})
    table = []
    for key in (name.removesuffix("_formula") for name in numbers if name.endswith("_formula")):
        size, depth, predicted = key.rsplit("_", 2)
        ratios = [numbers[f"{key}_{name}"] for name in ("ratio", "formula", "linear_only", "seconds_ratio")]
        words = [SIZE_WORDS.get(size, size), depth.removeprefix("d"), f"{predicted} %"]
        table.append([*words, *(f"{ratio:.2f}" for ratio in ratios)])
    columns = ["model", "blocks", "predicted", "counted", "formula", "linear layers only", "seconds"]
    caption = (
        "MAE's decoder divided by CrossMAE's. Above 1, CrossMAE is cheaper. MAE has 8 blocks, 4 in the study's model. "
        "Seconds are the median of forward and backward pass on one CPU thread, measured in turn."
    )
    return TextTable(columns, table, caption)


def example_commands(rows: Sequence[Row]) -> list[str]:
    """List the commands of all cells of the first seed, without repetition."""
    chosen = [row for row in rows if row.facts.get("seed") in (None, 0)]
    return list(dict.fromkeys(command for row in chosen for command in row.commands))
