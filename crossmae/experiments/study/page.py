"""The page of the study: verdicts, tables and curves from its rows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from crossmae.errors import counted
from crossmae.experiments.rows import Row
from crossmae.experiments.statistics import describe_comparisons, describe_width, percent_mean
from crossmae.experiments.study.arms import FASHION_ARMS, SEEDS
from crossmae.experiments.study.predictions import (
    FASHION_MEASURES,
    MASK_AP,
    TOP1,
    Measure,
    judge_all,
    shares_of,
    unwelcome_first,
    values_of,
)
from crossmae.experiments.study.results_text import summary
from crossmae.experiments.study.tables import (
    DETECTION_WORDS,
    TextTable,
    count_intervals,
    decoder_table,
    detection_differences,
    detection_table,
    fashion_differences,
    fashion_table,
    prediction_table,
    rate_table,
    rows_of,
    single_runs,
)
from crossmae.experiments.worth_page import environment_of
from crossmae.reports import page
from crossmae.reports.figures import MeanCurve, line_plot, mean_plot
from crossmae.reports.page import Commands, Fact, PageBlock, Plot, Report, Section, Table, Words

TITLE = "Is pretraining worth it?"
LEAD = (
    "CrossMAE, MAE and random weights, compared on Fashion-MNIST and on a detection set. The predictions were written "
    "before the first run. docs/results.md states them with their rules."
)


def write_study_page(rows: Sequence[Row], target: Path) -> None:
    """Write the page into an existing folder."""
    judgements = unwelcome_first(judge_all(rows))
    facts = [Fact(f"Prediction {one.name}", one.verdict, one.text) for one in judgements]
    sure = Words([("How sure this is", f"{describe_width(len(SEEDS))} {describe_comparisons(count_intervals(rows))}")])
    sections = [
        Section("Predictions", "The unwelcome verdicts first.", [as_block(prediction_table(judgements)), sure]),
        fashion_section(rows),
        detection_section(rows),
        Section("ViT-S on a GPU", "", blocks_of([detection_table(rows, "gpu15")])),
        Section("Decoders", "", blocks_of([decoder_table(rows)])),
        Section("Learning rates", "", blocks_of([rate_table(rows)])),
    ]
    if rows:
        commands = [(row.cell, page.folded(command)) for row in rows for command in row.commands]
        folded = Commands(commands, folded=f"Commands of all {counted(len(rows), 'cell')}")
        sections.append(Section("Commands", f"{summary(rows)} Commands run in the root of the repository.", [folded]))
    Report(TITLE, LEAD, facts, sections, environment_of(rows)).write(target)


def as_block(table: TextTable) -> Table:
    """Show a table on the page."""
    rows = [[cell.replace("`", "") for cell in row] for row in table.rows]
    return Table(table.columns, rows, table.caption, wrap=True, prose="verdict" in table.columns)


def blocks_of(tables: Sequence[TextTable]) -> list[PageBlock]:
    """Show the tables that have rows."""
    shown: list[PageBlock] = [as_block(table) for table in tables if table.rows]
    return shown or [Words([("", "Not measured yet.")])]


def fashion_section(rows: Sequence[Row]) -> Section:
    """Show accuracies over compute, losses over compute, and tables."""
    plots = [plot for measure in FASHION_MEASURES if (plot := accuracy_plot(rows, measure))]
    loss = loss_plot(rows)
    arms = [arm.name for arm in FASHION_ARMS]
    tables = [fashion_table(rows), fashion_differences(rows), single_runs(rows, TOP1, arms, [None])]
    return Section("Fashion-MNIST", "", [*plots, *([loss] if loss else []), *blocks_of(tables)])


def accuracy_plot(rows: Sequence[Row], measure: Measure) -> Plot | None:
    """Draw accuracies over the operations of pretraining, None without values."""
    curves, places = {}, []
    for arm in FASHION_ARMS:
        values, pretrained = values_of(rows, measure, arm.name), rows_of(rows, "pretrain", arm.name)
        if arm.epochs and values and pretrained:
            x, mean = pretrained[0].numbers["pretraining_tflop"], percent_mean(values)
            interval = None if mean.low is None or mean.high is None else (mean.low, mean.high)
            curves[arm.name] = MeanCurve([x], [mean.mean], [interval], [(x, value) for value in values.values()])
            places.append(x)
    random = values_of(rows, measure, "random")
    if not curves:
        return None
    if random:
        ends, level = [min(places), max(places)], percent_mean(random).mean
        curves["random"] = MeanCurve(ends, [level, level], [None, None], dashed=True)
    return mean_plot(
        curves,
        title=f"{measure.name} over compute",
        x_label="operations of pretraining in TFLOP (logarithmic)",
        y_label=f"{measure.name} in %",
        caption="Large marks are means over seeds, vertical lines their 95 % intervals, small dots single runs.",
    )


def loss_plot(rows: Sequence[Row]) -> Plot | None:
    """Draw held-out losses at equal epochs, None without values."""
    curves = {}
    for arm in FASHION_ARMS:
        pretrained = rows_of(rows, "pretrain", arm.name)
        if not arm.epochs or not pretrained or arm.name.endswith("_equal"):
            continue
        per_epoch = pretrained[0].numbers["pretraining_tflop"] / arm.epochs
        keys = [key for key in pretrained[0].numbers if key.startswith("val_loss_epoch")]
        epochs = sorted({int(key.removeprefix("val_loss_epoch")) for key in keys} - {0})  # the first one would hide all
        losses = [[row.numbers.get(f"val_loss_epoch{epoch}", float("nan")) for row in pretrained] for epoch in epochs]
        curves[arm.name] = ([per_epoch * epoch for epoch in epochs], [sum(one) / len(one) for one in losses])
    if not curves:
        return None
    return line_plot(
        curves,
        title="Held-out loss over compute",
        x_label="operations of pretraining in TFLOP",
        y_label="held-out loss",
        caption="Mean over seeds. All masked patches are predicted, in all arms.",
    )


def detection_section(rows: Sequence[Row]) -> Section:
    """Show the detection scores by label share."""
    runs = single_runs(rows, MASK_AP, list(DETECTION_WORDS), shares_of(rows, MASK_AP))
    return Section("Detection", "", blocks_of([detection_table(rows), detection_differences(rows), runs]))
