"""Measure this toolkit next to what you would run otherwise: time, memory, and a check that results are equal.

    python tools/benchmark.py                                  # every suite, about a minute each
    python tools/benchmark.py pretrain attention --minutes 10
    python tools/benchmark.py --minutes 60 --json all.json --plot all.png
    python tools/benchmark.py --device cuda --minutes 8 --json gpu.json --table gpu.md

Both sides run in turn in one process. On a CPU, processor seconds decide, with one thread, so that other work on the
machine slows both sides alike. A row is void if the two sides compute different results. The ratio is the other
side's time divided by ours: above 1, ours is faster. The memory ratio is ours divided by the other's: below 1, ours
needs less. Every row is measured at least three times, so a small number of minutes can be exceeded.

The suites need the libraries that they compare with: detectron2, transformers, torchvision, pycocotools.
The suites on CUDA have not been run on a GPU yet.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from crossmae.errors import UserError, advise, run_cli, set_up_log

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # a tool is run as a file, and tools/ is not installed

NAMES = (
    *("flops", "pretrain", "fusion", "attention", "vitdet", "detector", "loader", "cocoeval", "optimizer"),
    *("checkpoint", "finetune", "start", "growth"),
)


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("suites", nargs="*", metavar="SUITE", help=f"among {', '.join(NAMES)} (default: all of the device)")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="cuda has not been run yet (default: %(default)s)")
    add("--minutes", type=float, metavar="N", help="for all suites together (default: one per suite)")
    add("--threads", type=int, default=1, metavar="N", help="of the CPU (default: %(default)s)")
    add("--json", type=Path, metavar="OUT", help="file for all numbers, with machine and versions")
    add("--table", type=Path, metavar="OUT", help="file for the tables in Markdown")
    add("--plot", type=Path, metavar="OUT", help="picture of the ratios and their goals, such as ratios.png")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run the suites, print the table, and write the files."""
    arguments = build_parser().parse_args(argv)
    check_arguments(arguments)
    set_up_log()
    import torch  # takes seconds

    from crossmae.files import write_text
    from tools.benchmarks import results
    from tools.benchmarks.suites import MINUTES, ON_GPU, describe_failure, open_suite, run_suite

    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device: torch finds no GPU here. Leave the option out.")
    torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    names = arguments.suites or (ON_GPU if arguments.device == "cuda" else NAMES)
    minutes = arguments.minutes or MINUTES * len(names)
    command = advise(shlex.join(["python", "tools/benchmark.py", *(sys.argv[1:] if argv is None else argv)]))
    rows: list[results.Row] = []
    growths: list[results.Growth] = []

    def report(found: results.Row | results.Growth) -> None:
        if isinstance(found, results.Growth):
            growths.append(found)
            print(f"{found.what}: exponent {found.exponent:.2f}", flush=True)
        else:
            rows.append(found)
            print(f"{found.suite}: {found.what}: {results.headline(found)}", flush=True)
        if arguments.json:  # after every row, so that an interruption loses none
            results.write_record(arguments.json, results.build_record(command, device, minutes, rows, growths))

    budget = Budget(minutes * 60, len(names))
    for name in names:
        share = budget.share()
        try:
            builds = open_suite(name, device)
        except ImportError as error:  # of a library that the suite compares with
            report(results.Row(name, "all rows", "", device.type, void=describe_failure(error)))
            continue
        run_suite(name, builds, device, share, report)
    for table in (results.format_rows(rows) if rows else "", results.format_growth(growths) if growths else ""):
        if table:
            print(f"\n{table}")
    if arguments.table:
        write_text(arguments.table, results.format_page(rows, growths, command, device))
    if arguments.plot:
        results.draw(rows, arguments.plot, command)


class Budget:
    """Wall time shared equally by suites. What a suite leaves is for the later ones."""

    def __init__(self, seconds: float, suites: int) -> None:
        self.end, self.left = time.monotonic() + seconds, suites

    def share(self) -> float:
        """Return the seconds of the next suite."""
        seconds = max(self.end - time.monotonic(), 0.0) / max(self.left, 1)
        self.left -= 1
        return seconds


def check_arguments(arguments: argparse.Namespace) -> None:
    """Raise UserError for unknown suites and numbers out of range."""
    if unknown := [name for name in arguments.suites if name not in NAMES]:
        raise UserError(f"SUITE: {unknown[0]!r} is unknown. Choose from {', '.join(NAMES)}.")
    for flag in ("minutes", "threads"):
        value = getattr(arguments, flag)
        if value is not None and not value > 0:
            raise UserError(f"--{flag}: {value:g} is not positive. Give a larger number.")
    for flag in ("json", "table", "plot"):
        path = getattr(arguments, flag)
        if path is not None and not path.absolute().parent.is_dir():
            raise UserError(f"--{flag}: there is no folder {path.parent}. Make it first.")


if __name__ == "__main__":
    run_cli(main)
