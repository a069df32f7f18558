"""Put runs of any kind side by side on one page: last and best numbers, curves, and the settings that differ.

    python tools/compare.py outputs/a outputs/b
    python tools/compare.py outputs/run outputs/detector-* --output outputs/comparison.html

RUN is the folder of a pretraining, of a classifier, of a detector, or of tools/run.py, whose trainings are compared
then. A running or interrupted run is compared as far as it has come.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from crossmae.errors import UserError, run_cli
from crossmae.files import leaves, make_folder
from crossmae.reports import page
from crossmae.reports.figures import MOST_CURVES, curve_plots
from crossmae.reports.run_folder import LoggedNumbers, read_log
from crossmae.training.config import read_yaml

CONFIG, LOG = "config.yaml", "log.jsonl"
PLACES = {"output_dir", "OUTPUT_DIR"}  # settings that differ in every run


class Quantity(NamedTuple):
    """A logged number: title, factor and format for the page. `better` is 1 if larger is better, -1 if smaller."""

    title: str
    factor: float = 1.0
    form: str = ".4f"
    better: int = 0


QUANTITIES = {
    "loss": Quantity("Training loss"),
    "val_loss": Quantity("Held-out loss", better=-1),
    "knn_accuracy": Quantity("Nearest neighbours (%)", 100, ".1f", 1),
    "top1": Quantity("Top-1 accuracy (%)", 100, ".1f", 1),
    "mean_ap": Quantity("Mean average precision (%)", 100, ".1f", 1),
    "bbox/AP": Quantity("Box AP (%)", 1, ".1f", 1),
    "bbox/AP50": Quantity("Box AP50 (%)", 1, ".1f", 1),
    "segm/AP": Quantity("Mask AP (%)", 1, ".1f", 1),
    "segm/AP50": Quantity("Mask AP50 (%)", 1, ".1f", 1),
    "lr": Quantity("Learning rate", 1, ".3g"),
    "images_per_second": Quantity("Images per second", 1, ".1f"),
    "memory_gb": Quantity("Memory (GB)", 1, ".2f"),
}


@dataclass(frozen=True)
class ComparedRun:
    """A run: its name on the page, its settings by dotted key, and its log."""

    name: str
    path: Path
    settings: Mapping[str, Any]
    log: LoggedNumbers


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folders of runs")
    output = Path("outputs/comparison.html")
    parser.add_argument("--output", type=Path, default=output, metavar="FILE", help="page (default: %(default)s)")
    return parser


def find_runs(paths: Sequence[Path]) -> list[Path]:
    """List the folders of trainings.

    A folder without a log stands for the trainings in it.

    Raises UserError for a folder without a training, and for fewer than two or too many trainings.
    """
    found: list[Path] = []
    for path in paths:
        inner = [path] if (path / LOG).is_file() else sorted(log.parent for log in path.glob(f"*/{LOG}"))
        if not inner:
            raise UserError(f"{path}: there is no {LOG} in it. Name the folder of a run.")
        found += inner
    chosen = list(dict.fromkeys(one.resolve() for one in found))
    if len(chosen) < 2:
        raise UserError(f"{chosen[0]}: is the only run. Name two or more.")
    if len(chosen) > MOST_CURVES:
        raise UserError(f"RUN: {len(chosen)} runs are too many for one page. Name at most {MOST_CURVES}.")
    return chosen


def read_runs(paths: Sequence[Path]) -> list[ComparedRun]:
    """Read the settings and the log of each run.

    Raises UserError if a config is missing or damaged, or a log has no step.
    """
    runs = []
    for name, path in zip(short_names(paths), paths, strict=True):
        log = read_log(path / LOG, "step")
        if not log.rows:
            raise UserError(f"{path / LOG}: has no step yet. Wait for the first, or leave this run out.")
        runs.append(ComparedRun(name, path, leaves(read_yaml(path / CONFIG)), log))
    return runs


def short_names(paths: Sequence[Path]) -> list[str]:
    """Shorten paths to the last parts that tell them apart."""
    length = 1
    while len({path.parts[-length:] for path in paths}) < len(paths):
        length += 1
    return ["/".join(path.parts[-length:]).lstrip("/") for path in paths]


def number_section(runs: Sequence[ComparedRun]) -> page.Section:
    """Show the last and the best value of each logged number."""
    rows: list[page.TableRow] = [["steps", *(f"{max(run.log.values('step')):,.0f}" for run in runs)]]
    for key, (title, factor, form, better) in QUANTITIES.items():
        values = [[factor * value for value in run.log.values(key)] for run in runs]
        if not any(values):
            continue
        rows.append([title, *(f"{one[-1]:{form}}" if one else "-" for one in values)])
        if better and any(len(one) > 1 for one in values):
            best = [(max if better > 0 else min)(one) if one else None for one in values]
            rows.append([f"{title}, best", *("-" if value is None else f"{value:{form}}" for value in best)])
    caption = "The last logged value of each run. A run with one seed is one sample: two seeds differ, too."
    return page.Section("Numbers", "", [page.Table(["", *(run.name for run in runs)], rows, caption)])


def curve_section(runs: Sequence[ComparedRun]) -> page.Section:
    """Plot every number that at least one run has logged."""
    plots: list[page.PageBlock] = []
    for key, (title, factor, _, _) in QUANTITIES.items():
        rows = [
            {"step": row["step"], run.name: factor * row[key]} for run in runs for row in run.log.rows if key in row
        ]
        names = {run.name: run.name for run in runs if run.log.values(key)}
        if names:
            whose = f" of {next(iter(names))}" if len(names) == 1 else ""  # one curve has no legend
            plots += curve_plots(rows, Path(LOG), "step", {title: (f"{title.lower()}{whose}", names)})
    return page.Section("Curves", "", plots)


def settings_section(runs: Sequence[ComparedRun]) -> page.Section:
    """Show the settings in which the runs differ.

    Runs of different kinds have different settings, so only runs that have a setting are compared in it.
    """
    keys = sorted({key for run in runs for key in run.settings} - PLACES)
    rows = []
    for key in keys:
        values = [run.settings[key] for run in runs if key in run.settings]
        if any(value != values[0] for value in values):
            shown = [page.short_value(run.settings[key]) if key in run.settings else "" for run in runs]
            rows.append([key, *shown])
    text = "Settings with different values. Settings that only one run has are left out."
    if not rows:
        return page.Section("Settings", "All common settings are the same.")
    return page.Section("Settings", text, [page.Table(["setting", *(run.name for run in runs)], rows, wrap=True)])


def main(argv: Sequence[str] | None = None) -> None:
    """Write the page."""
    arguments = build_parser().parse_args(argv)
    runs = read_runs(find_runs(arguments.runs))
    shown = [number_section(runs), curve_section(runs), settings_section(runs)]
    lead = "Everything here is from the logs and configs in the folders of the runs."
    folders = [(run.name, str(run.path)) for run in runs]
    make_folder(arguments.output.parent, "--output")
    page.Report(f"{len(runs)} runs compared", lead, (), shown, folders).write(arguments.output)
    print(f"wrote {arguments.output}")


if __name__ == "__main__":
    run_cli(main)
