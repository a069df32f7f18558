"""The part of docs/results.md that is made from the rows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from crossmae.errors import UserError
from crossmae.experiments.rows import Row
from crossmae.experiments.statistics import describe_comparisons, describe_width
from crossmae.experiments.study.arms import SEEDS
from crossmae.experiments.study.predictions import judge_all
from crossmae.experiments.study.tables import (
    TextTable,
    count_intervals,
    decoder_table,
    detection_differences,
    detection_table,
    example_commands,
    fashion_differences,
    fashion_table,
    prediction_table,
    rate_table,
)
from crossmae.files import write_text
from crossmae.reports.page import format_seconds

NOT_YET = "Not measured yet."
ALL_COMMANDS = "The rows in `docs/results/study.jsonl` have the command of every number."
BEGIN, END = "<!-- made by tools/study.py --page: begin -->", "<!-- made by tools/study.py --page: end -->"


def results_text(rows: Sequence[Row]) -> str:
    """Write the results as Markdown."""
    if not rows:
        return "No cell of the study has run yet."
    parts = [summary(rows), markdown(prediction_table(judge_all(rows)))]
    sections = (
        ("Fashion-MNIST", (fashion_table(rows), fashion_differences(rows))),
        ("Detection", (detection_table(rows), detection_differences(rows))),
        ("ViT-S on a GPU", (detection_table(rows, "gpu15"),)),
        ("Decoders", (decoder_table(rows),)),
        ("Learning rates", (rate_table(rows),)),
    )
    for title, tables in sections:
        parts.append(f"### {title}")
        full = [markdown(table) for table in tables if table.rows]
        parts += full or [NOT_YET]
    parts += ["### How sure this is", f"{describe_width(len(SEEDS))} {describe_comparisons(count_intervals(rows))}"]
    parts += [
        "### Commands of the first seed",
        ALL_COMMANDS,
    ]
    parts.append("\n".join(f"    {command}" for command in example_commands(rows)))
    return "\n\n".join(parts)


def summary(rows: Sequence[Row]) -> str:
    """Count rows and CPU time, and name the machines."""
    seconds = sum(float(row.cost.get("cpu_seconds") or 0) for row in rows)
    machines = dict.fromkeys(
        f"{row.machine.get('processor')}, {row.machine.get('cores')} cores, {row.machine.get('gpu') or 'no GPU'}, "
        f"torch {row.machine.get('torch')}"
        for row in rows
    )
    return f"{len(rows)} cells, {format_seconds(seconds)} of CPU time. Machines: {'; '.join(machines)}."


def markdown(table: TextTable) -> str:
    """Write a table as Markdown, with its caption above."""
    lines = [table.columns, ["---"] * len(table.columns), *table.rows]
    text = "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines)
    return f"{table.caption}\n\n{text}" if table.caption else text


def update_document(path: Path, rows: Sequence[Row]) -> None:
    """Replace the text between the markers of a document.

    Raises UserError if the markers are missing.
    """
    text = path.read_text("utf-8")
    head, begin, rest = text.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise UserError(f"{path}: has no markers for results. Add two lines: {BEGIN} and {END}")
    write_text(path, f"{head}{BEGIN}\n\n{results_text(rows)}\n\n{END}{tail}")
