"""The whole grid of the study: its parts, its plan, and the rows that the repository keeps."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from crossmae.errors import PROGRAMS, UserError, shorten
from crossmae.experiments.cells import Cell, Step, run_cells
from crossmae.experiments.commands import find_gpus
from crossmae.experiments.rows import Row, read_rows
from crossmae.experiments.study.arms import DETECTION_CPU, DETECTION_GPU15
from crossmae.experiments.study.detection import detection_cells
from crossmae.experiments.study.fashion_mnist import arm_cells, choose_rates, rate_cells
from crossmae.files import expand_path, make_folder, read_json, write_text
from crossmae.reports.page import format_seconds

log = logging.getLogger(__name__)

PARTS = ("decoder", "fashion_mnist", "detection")
GPU15, GPU_MINUTES = DETECTION_GPU15.part, 15.0  # a preset, and the minutes that it may take
PACKAGES = "packages-"  # start of the names of links to folders with extracted packages
KEPT_ROWS = PROGRAMS / "docs" / "results" / "study.jsonl"


def first_cells(folder: Path, parts: Sequence[str] = PARTS, packages: Sequence[Path] = ()) -> list[Cell]:
    """List the cells that must be finished before others are known.

    Args:
        folder: folder of the study, relative to the root of the repository where possible.
        packages: folders with extracted packages, from which the detection set is composed.
    """
    cells = [decoder_cell(folder)] if "decoder" in parts else []
    cells += rate_cells(folder) if "fashion_mnist" in parts else []
    return cells + (detection_cells(folder, DETECTION_GPU15, packages)[:1] if GPU15 in parts else [])


def study_cells(
    folder: Path, parts: Sequence[str] = PARTS, rows: Sequence[Row] = (), packages: Sequence[Path] = ()
) -> list[Cell]:
    """List all cells of some parts.

    Args:
        folder, packages: see `first_cells`.
        rows: rows of `first_cells`, by which learning rates are chosen.
    """
    cells = first_cells(folder, parts, packages)
    cells += arm_cells(folder, choose_rates(rows)) if "fashion_mnist" in parts else []
    cells += detection_cells(folder, DETECTION_CPU, packages) if "detection" in parts else []
    return cells + (detection_cells(folder, DETECTION_GPU15, packages)[1:] if GPU15 in parts else [])


def run_study(
    folder: Path, parts: Sequence[str], packages: Sequence[Path] = (), jobs: int = 1, minutes: float | None = None
) -> None:
    """Run the unfinished cells of some parts.

    On GPUs, each cell has one. The pictures of the preset are composed first, on the CPU, and do not count as minutes.

    Args:
        folder, packages: see `first_cells`.
        jobs: cells at the same time, without a GPU.
        minutes: start no cell that would end later.
    """
    results, gpus, started = PROGRAMS / folder / "results.jsonl", list(find_gpus()), time.monotonic()
    first = first_cells(folder, parts, packages)
    rows = run_cells(first, results, jobs=jobs, gpus=gpus, minutes=None if GPU15 in parts else minutes)
    if len(rows) < len(first):
        return
    spent = 0.0 if GPU15 in parts else (time.monotonic() - started) / 60
    left = None if minutes is None else max(minutes - spent, 0.0)
    run_cells(study_cells(folder, parts, rows, packages), results, jobs=jobs, gpus=gpus, minutes=left)


def decoder_cell(folder: Path) -> Cell:
    """Count and time the decoders of four models."""
    output = folder / "decoder" / "decoder.json"
    step = Step(("-m", "crossmae.experiments.study.decoder_cost", "--output", str(output)), output)
    facts = {"part": "decoder", "kind": "decoder"}
    return Cell("decoder-cost", facts, (step,), lambda: decoder_numbers(PROGRAMS / output), estimate=420)


def decoder_numbers(path: Path) -> dict[str, float]:
    """Read the ratios of MAE's decoder to CrossMAE's, named like `base_d12_25_ratio`."""
    numbers = {}
    for size in read_json(path):
        for row in size["rows"]:
            name = f"{size['size']}_d{row['depth']}_{row['predicted']:.0%}".removesuffix("%")
            for key in ("ratio", "formula", "linear_only", "seconds_ratio", "seconds", "mae_seconds"):
                numbers[f"{name}_{key}"] = float(row[key])
    return numbers


def link_sources(folder: Path, sources: Mapping[str, Path]) -> None:
    """Link the data sets into the folder of the study.

    So no command names a place outside this folder.

    Raises UserError if a data set does not exist.
    """
    make_folder(folder / "sources", "--output")
    for name, source in sources.items():
        if not source.is_dir():
            option = "packages" if name.startswith(PACKAGES) else name
            raise UserError(f"--{option}: {source} is no folder. Name the folder of the data set, see docs/results.md.")
        link = folder / "sources" / name
        if not link.exists() or link.resolve() != source.resolve():
            link.unlink(missing_ok=True)
            os.symlink(source.resolve(), link)


def link_packages(folder: Path, given: Sequence[Path]) -> None:
    """Link folders with extracted packages, and remove earlier links.

    Without folders, the links of the last call stay.

    Raises UserError if a folder does not exist.
    """
    link_sources(folder, {f"{PACKAGES}{number}": path for number, path in enumerate(given)})
    for link in linked_packages(folder)[len(given) :] if given else []:
        link.unlink()
    if lost := [link for link in linked_packages(folder) if not link.is_dir()]:
        raise UserError(f"--packages: {os.readlink(lost[0])} is gone. Name the folders again.")


def linked_packages(folder: Path) -> list[Path]:
    """List the links to folders with extracted packages."""
    links = [path for path in (folder / "sources").glob(f"{PACKAGES}*") if path.is_symlink()]
    return sorted(links, key=lambda path: int(path.name.removeprefix(PACKAGES)))


def from_root(path: Path) -> Path:
    """Write a path relative to the root of the repository where possible."""
    absolute = expand_path(path, "path").absolute()
    return absolute.relative_to(PROGRAMS) if absolute.is_relative_to(PROGRAMS) else absolute


def show_plan(cells: Sequence[Cell], rows: Sequence[Row]) -> str:
    """List the cells with their state, expected and spent CPU minutes.

    Args:
        rows: rows of finished cells.
    """
    spent = {row.cell: float(row.cost["cpu_seconds"] or 0.0) for row in rows}
    lines = [f"{'cell':46} expected   spent   (CPU minutes)"]
    for cell in cells:
        minutes = f"{spent[cell.name] / 60:7.1f}" if cell.name in spent else "missing"
        lines.append(f"{cell.name:46} {cell.estimate / 60:8.1f} {minutes}")
    missing = [cell.estimate for cell in cells if cell.name not in spent]
    total = format_seconds(sum(cell.estimate for cell in cells))
    lines.append(
        f"{len(cells)} cells, {total} of CPU time in all; {len(missing)} missing, {format_seconds(sum(missing))}"
    )
    return "\n".join(lines)


def publish(results: Path, kept: Path = KEPT_ROWS) -> list[Row]:
    """Merge the rows of a run into the kept rows.

    The newest row of a cell wins. A warning tells if rows of the run are older than the kept ones.
    """
    older = []
    by_cell = {row.cell: row for row in read_rows(kept)}
    for row in read_rows(results):
        if row.cell not in by_cell or row.finished >= by_cell[row.cell].finished:
            by_cell[row.cell] = row
        else:
            older.append(row.cell)
    if older:
        log.warning(
            "%s: the rows of %s are older than the rows in %s, which stay. Check the clock, or write to another file "
            "with --rows",
            results,
            shorten(older),
            kept,
        )
    rows = sorted(by_cell.values(), key=lambda row: (row.finished, row.cell))
    if rows:
        make_folder(kept.parent, "docs/results")
        write_text(kept, "".join(json.dumps(asdict(row), ensure_ascii=False) + "\n" for row in rows))
    return rows
