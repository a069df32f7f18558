"""Curves and tables of scores: arms by points and seeds, their differences, and their costs.

Arms are given as words by arm, in the order of the page. Points, such as shares of the labels, are given as words by
point. See `crossmae.experiments.statistics` for both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean

from crossmae.classification.evaluation.metrics import Mean
from crossmae.experiments.rows import Row
from crossmae.experiments.statistics import Claim, Difference, Metric, Scores, one_decimal, percent_mean
from crossmae.reports import page
from crossmae.reports.figures import MeanCurve, mean_plot
from crossmae.reports.page import Plot, Table, TableRow

CLAIM_WORDS: Mapping[Claim, str] = {
    "gain": "gain:",
    "loss": "loss:",
    "nothing shown": "not shown:",
    "no spread": "no spread:",
    "one seed": "one seed:",
    "no pair": "no pair",
}
COST_KEYS = {"CPU time": "cpu_seconds", "GPU time": "gpu_seconds", "energy": "energy_joules"}


def score_curve(
    scores: Scores, arms: Mapping[str, str], places: Mapping[float, float], metric: Metric, controls: Sequence[str]
) -> Plot:
    """Draw each arm: means with intervals, and single runs as dots.

    Args:
        places: number of labelled images by point.
        controls: arms with a dashed line.
    """
    curves = {}
    for arm, words in arms.items():
        points = [point for point in sorted(places) if scores.get((arm, point))]
        means = [percent_mean(scores[arm, point]) for point in points]
        values = [(places[point], value) for point in points for value in scores[arm, point].values()]
        if points:
            x, intervals = [places[point] for point in points], [_interval(mean) for mean in means]
            curves[words] = MeanCurve(x, [mean.mean for mean in means], intervals, values, arm in controls)
    name = metric.name[0].upper() + metric.name[1:]
    return mean_plot(
        curves,
        title=f"{name} over labelled images",
        x_label="labelled images (logarithmic)",
        y_label=f"{metric.name} in %",
        caption=f"{name} on the validation images. {_describe_marks(curves, 'runs')} Curves are a little apart, "
        "to show all lines.",
    )


def _describe_marks(curves: Mapping[str, MeanCurve], runs: str) -> str:
    """Explain the marks of curves, by whether a mean has an interval."""
    if not any(interval for curve in curves.values() for interval in curve.intervals):
        several = any(len(curve.values) > len(curve.means) for curve in curves.values())
        return f"Marks are {'means over' if several else 'single'} {runs}. There are no intervals."
    return (
        f"Large marks are means over seeds, vertical lines their 95{page.PERCENT} intervals, small dots single {runs}."
    )


def _interval(mean: Mean) -> tuple[float, float] | None:
    return None if mean.low is None or mean.high is None else (mean.low, mean.high)


def bounds(mean: Mean | None) -> str:
    """Format an interval as "3.0 to 9.2", or as a dash."""
    if mean is None or mean.low is None or mean.high is None:
        return "-"
    return f"{one_decimal(mean.low)} to {one_decimal(mean.high)}"


def score_table(
    scores: Scores, arms: Mapping[str, str], points: Mapping[float, str], seeds: Sequence[int], metric: Metric
) -> Table:
    """List mean, interval and single runs of each arm at each point."""
    rows: list[TableRow] = []
    for point, heading in points.items():
        for arm, words in arms.items():
            values = scores.get((arm, point), {})
            mean = percent_mean(values) if values else None
            shown = [one_decimal(values[seed]) if seed in values else "missing" for seed in seeds]
            rows.append([words, heading, one_decimal(mean.mean) if mean else "-", bounds(mean), *shown])
    interval = f"95{page.PERCENT} interval"
    columns = [
        "start of the encoder",
        "labelled images",
        f"mean {metric.name}",
        interval,
        *(f"seed {one}" for one in seeds),
    ]
    name = metric.name[0].upper() + metric.name[1:]
    caption = f"{name} in percent: mean over seeds with Student's interval, and each run."
    return Table(columns, rows, caption, wrap=True)


def difference_table(
    differences: Mapping[str, Mapping[float, Difference]], points: Mapping[float, str], metric: Metric
) -> Table:
    """List paired differences at each point.

    Args:
        differences: by the words for arm and control, and by point.
    """
    rows: list[TableRow] = []
    for words, own in differences.items():
        cells = [words]
        for found in (own[point] for point in points):
            amount = f" {one_decimal(found.mean.mean)}" if found.mean else ""
            interval = f" ({bounds(found.mean)})" if found.has_interval else ""
            cells.append(f"{CLAIM_WORDS[found.claim]}{amount}{interval}")
        rows.append(cells)
    caption = (
        f"Differences of {metric.name} between runs with the same seed: mean, and Student's 95{page.PERCENT} interval. "
        "A gain or a loss is shown if the interval does not contain 0."
    )
    return Table([f"difference in {metric.name}, by labelled images", *points.values()], rows, caption, wrap=True)


def difference_curve(
    differences: Mapping[str, Mapping[float, Difference]], places: Mapping[float, float], metric: Metric
) -> Plot:
    """Draw paired differences with their intervals.

    Args:
        differences: by the words for arm and control, and by point.
        places: number of labelled images by point.
    """
    curves = {}
    for words, own in differences.items():
        means = {point: own[point].mean for point in sorted(places)}
        known = {point: mean for point, mean in means.items() if mean}
        values = [(places[point], value) for point in means for value in own[point].values.values()]
        if known:
            x = [places[point] for point in known]
            intervals = [_interval(mean) if own[point].has_interval else None for point, mean in known.items()]
            curves[words] = MeanCurve(x, [mean.mean for mean in known.values()], intervals, values)
    return mean_plot(
        curves,
        title=f"Differences of {metric.name}",
        x_label="labelled images (logarithmic)",
        y_label=f"difference in {metric.unit}",
        caption="Above 0, the first of the two is better. A difference is shown only where a vertical line does not "
        f"cross 0. {_describe_marks(curves, 'pairs of runs with the same seed')}",
        zero=True,
    )


def mean_costs(rows: Sequence[Row], kinds: Sequence[str], arm: str, point: float | None = None) -> dict[str, float]:
    """Average the costs of an arm's cells, by key of the cost.

    Args:
        kinds: kinds of cells that count.
        point: share of the labels. None: any.

    Returns:
        Costs without those that a cell has not measured. {} without cells.
    """
    costs = [
        row.cost
        for row in rows
        if row.facts.get("kind") in kinds and row.facts.get("arm") == arm
        if point is None or row.facts.get("share") == point
    ]
    found = {}
    for key in COST_KEYS.values():
        values = [cost[key] for cost in costs if cost.get(key) is not None]
        if costs and len(values) == len(costs):
            found[key] = fmean(value for value in values if value is not None)
    return found


def cost_table(
    rows: Sequence[Row],
    scores: Scores,
    arms: Mapping[str, str],
    points: Mapping[float, str],
    kinds: Sequence[str],
    metric: Metric,
    given: Sequence[str],
    pretrained: Sequence[str] = (),
) -> Table:
    """List the mean cost of a run, with and without its pretraining.

    Args:
        kinds: kinds of the cells that fine-tune.
        given: arms that start from weights whose own pretraining was not measured.
        pretrained: other arms with a pretraining. Without its row, the total is unknown.
    """
    fine_tuning = {(arm, point): mean_costs(rows, kinds, arm, point) for arm in arms for point in points}
    measured = {heading: key for heading, key in COST_KEYS.items() if any(key in own for own in fine_tuning.values())}
    columns = ["start of the encoder", "labelled images", metric.name]
    columns += [f"{heading}{end}" for heading in measured for end in ("", " with pretraining")]
    table: list[TableRow] = []
    for point, heading in points.items():
        for arm, words in arms.items():
            values, before = scores.get((arm, point), {}), mean_costs(rows, ["pretrain"], arm)
            cells = [words, heading, one_decimal(percent_mean(values).mean) if values else "-"]
            for key in measured.values():
                own = fine_tuning[arm, point].get(key)
                cells.append("-" if own is None else _amount(key, own))
                unknown = own is None or ((arm in (*given, *pretrained) or before) and key not in before)
                total = "-" if unknown or own is None else _amount(key, own + before.get(key, 0.0))
                cells.append(f"{total} + given" if arm in given and total != "-" else total)
            table.append(cells)
    caption = "Mean of the runs, one fine-tuning each. The pretraining is counted in full at every number of images."
    if set(given) & arms.keys():
        caption += " What it cost to make the given weights is not known."
    if "energy" in measured:
        caption += " Energy is what processors and GPUs used during the run, other programs included."
    return Table(columns, table, caption, wrap=True)


def _amount(key: str, value: float) -> str:
    return f"{value / 1000:,.1f} kJ" if key == COST_KEYS["energy"] else page.format_seconds(value)


def run_table(rows: Sequence[Row], metrics: Sequence[Metric]) -> Table:
    """List all runs with their numbers and costs."""
    names = {metric.key: metric.name for metric in metrics} | {"val_loss": "held-out loss"}
    keys = [key for key in names if any(key in row.numbers for row in rows)]
    table: list[TableRow] = []
    for row in rows:
        shown = {key: f"{value:.3f}" if key == "val_loss" else one_decimal(value) for key, value in row.numbers.items()}
        numbers = [shown.get(key, "-") for key in keys]
        seconds, memory = row.cost.get("cpu_seconds"), row.cost.get("peak_memory_bytes")
        costs = [
            "-" if seconds is None else page.format_seconds(seconds),
            "-" if memory is None else page.format_bytes(memory),
        ]
        table.append([row.cell, *numbers, *costs, row.finished.replace("T", " ")[:16]])
    columns = ["run", *(names[key] for key in keys), "CPU time", "peak memory", "finished (UTC)"]
    return Table(columns, table, "APs and accuracies are in percent.", wrap=True)
