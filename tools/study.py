"""Run the study of docs/results.md: CrossMAE, MAE and random weights, on Fashion-MNIST and on a detection set.

    python tools/study.py --plan                              # cells and their expected minutes
    python tools/study.py --minutes 60                        # unfinished cells that end within an hour
    python tools/study.py --only fashion_mnist --jobs 2       # one part, two cells at a time
    python tools/study.py --preset gpu15                      # 15 minutes of one large GPU
    python tools/study.py --page                              # the page and docs/results.md, from the rows

Every cell takes at most 20 minutes on one core and is a row of docs/results/study.jsonl at its end. The same command
continues after anything. Set OMP_NUM_THREADS=1 if other programs run.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from crossmae.errors import run_cli, set_up_log
from crossmae.experiments.commands import REPOSITORY
from crossmae.experiments.rows import read_rows
from crossmae.experiments.study.grid import (
    GPU15,
    GPU_MINUTES,
    KEPT_ROWS,
    PARTS,
    from_root,
    link_sources,
    publish,
    run_study,
    show_plan,
    study_cells,
)
from crossmae.experiments.study.page import write_study_page
from crossmae.experiments.study.results_text import update_document
from crossmae.files import make_folder

DOCUMENT = REPOSITORY / "docs" / "results.md"
FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("outputs/study"), help="folder (default: %(default)s)")
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
        help="folders with extracted packages for the detection set (default: the installed ones)",
    )
    parser.add_argument(
        "--rows",
        type=Path,
        default=KEPT_ROWS,
        metavar="FILE",
        help="rows that are kept (default: docs/results/study.jsonl)",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run or show what is missing, then publish the rows."""
    args = build_parser().parse_args(argv)
    set_up_log()
    folder = from_root(args.output)
    results = REPOSITORY / folder / "results.jsonl"
    if args.page:
        rows = publish(results, args.rows)
        make_folder(REPOSITORY / folder, "--output")
        write_study_page(rows, REPOSITORY / folder / "report.html")
        if args.rows == KEPT_ROWS:
            update_document(DOCUMENT, rows)
        print(f"Open this page in a browser: {folder / 'report.html'}")
        return
    parts = [args.preset] if args.preset else args.only
    if args.plan:
        rows = read_rows(results)
        print(show_plan(study_cells(folder, parts, rows), rows))
        return
    sources = {"fashion-mnist": args.fashion_mnist} if "fashion_mnist" in parts else {}
    sources |= {f"packages-{number}": path for number, path in enumerate(args.packages)}
    link_sources(REPOSITORY / folder, sources)
    minutes = GPU_MINUTES if args.preset and args.minutes is None else args.minutes
    packages = [folder / "sources" / f"packages-{number}" for number in range(len(args.packages))]
    try:
        run_study(folder, parts, packages, args.jobs, minutes)
    finally:
        publish(results, args.rows)


if __name__ == "__main__":
    run_cli(main)
