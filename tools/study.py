"""Run the study of docs/results.md: CrossMAE, MAE and random weights, on Fashion-MNIST and on a detection set.

    python tools/study.py --plan                              # cells and their expected minutes
    python tools/study.py --minutes 60                        # unfinished cells that end within an hour
    python tools/study.py --only fashion_mnist --jobs 2       # one part, two cells at a time
    python tools/study.py --preset gpu15                      # 15 minutes of one large GPU
    python tools/study.py --page                              # the page and docs/results.md, from the rows

Every cell is planned for at most 20 minutes on one core and is a row of docs/results/study.jsonl at its end. The same
command continues after anything. Cells that only docs/results/study.jsonl has run again on a new machine. Set
OMP_NUM_THREADS=1 if other programs run.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from crossmae.errors import PROGRAMS, run_cli, set_up_log
from crossmae.experiments.cells import finished_rows
from crossmae.experiments.study.grid import (
    GPU15,
    GPU_MINUTES,
    KEPT_ROWS,
    PARTS,
    first_cells,
    from_root,
    link_packages,
    link_sources,
    linked_packages,
    publish,
    run_study,
    show_plan,
    study_cells,
)
from crossmae.files.claim import keep_kind

DOCUMENT = PROGRAMS / "docs" / "results.md"
OUTPUT = Path("outputs/study")
FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=OUTPUT, help="folder (default: %(default)s)")
    parser.add_argument("--only", choices=PARTS, nargs="+", default=list(PARTS), help="parts (default: all)")
    parser.add_argument("--plan", action="store_true", help="show the cells and their cost, run nothing")
    parser.add_argument("--page", action="store_true", help="write report.html and docs/results.md from the rows")
    parser.add_argument("--preset", choices=[GPU15], help="ViT-S on composed pictures of 224 px instead of the grid")
    parser.add_argument("--minutes", type=float, help="start no cell that would end later (gpu15: 15)")
    parser.add_argument("--jobs", type=int, default=1, help="cells at the same time (default: %(default)s)")
    parser.add_argument(
        "--fashion-mnist", type=Path, default=FASHION_MNIST, metavar="DIR", help="Fashion-MNIST (default: %(default)s)"
    )
    parser.add_argument(
        "--packages",
        type=Path,
        nargs="+",
        default=[],
        metavar="FOLDER",
        help="folders with extracted packages for the detection set (default: as before, or the installed ones)",
    )
    parser.add_argument(
        "--rows",
        type=Path,
        metavar="FILE",
        help="rows that are kept (default: docs/results/study.jsonl, or OUTPUT/study.jsonl with --output)",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run or show what is missing, then publish the rows."""
    args = build_parser().parse_args(argv)
    set_up_log()
    folder = from_root(args.output)
    results = PROGRAMS / folder / "results.jsonl"
    kept = args.rows or (KEPT_ROWS if folder == OUTPUT else PROGRAMS / folder / "study.jsonl")
    if args.page:
        # Imported after the arguments, because these imports take seconds.
        from crossmae.experiments.study.page import write_study_page
        from crossmae.experiments.study.results_text import update_document

        keep_kind(PROGRAMS / folder, "study", "--output")
        rows = publish(results, kept)
        write_study_page(rows, PROGRAMS / folder / "report.html")
        if kept.resolve() == KEPT_ROWS:
            update_document(DOCUMENT, rows)
        print(f"Open this page in a browser: {folder / 'report.html'}")
        return
    parts = [args.preset] if args.preset else args.only
    if args.plan:
        packages = [folder / "sources" / f"packages-{number}" for number in range(len(args.packages))]
        packages = packages or [from_root(link) for link in linked_packages(PROGRAMS / folder)]
        first = finished_rows(first_cells(folder, parts, packages), results)
        cells = study_cells(folder, parts, list(first.values()), packages)
        print(show_plan(cells, list(finished_rows(cells, results).values())))
        return
    keep_kind(PROGRAMS / folder, "study", "--output")
    sources = {"fashion-mnist": args.fashion_mnist} if "fashion_mnist" in parts else {}
    link_sources(PROGRAMS / folder, sources)
    if {"detection", GPU15} & set(parts):
        link_packages(PROGRAMS / folder, args.packages)
    minutes = GPU_MINUTES if args.preset and args.minutes is None else args.minutes
    packages = [from_root(link) for link in linked_packages(PROGRAMS / folder)]
    try:
        run_study(folder, parts, packages, args.jobs, minutes)
    finally:
        publish(results, kept)


if __name__ == "__main__":
    run_cli(main)
