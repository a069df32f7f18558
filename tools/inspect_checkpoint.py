"""Inspect a weight file: its content and its possible conversions.

    python tools/inspect_checkpoint.py outputs/run
    python tools/inspect_checkpoint.py weights.pth --json weights.json
    python tools/inspect_checkpoint.py huge.safetensors --no-values     # reads only the header

Code in the file is not run, and the file is never changed.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from crossmae.errors import named_by, printable, run_cli
from crossmae.files import check_destination, write_json


def build_parser() -> argparse.ArgumentParser:
    """Build the command-line parser."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", metavar="FILE", type=Path, help="weight file, or a folder with weights")
    parser.add_argument("--no-values", action="store_true", help="do not search for NaN and infinity, which is faster")
    parser.add_argument("--json", type=Path, metavar="OUT.json", help="also write the inspection as JSON")
    parser.add_argument("--force", action="store_true", help="overwrite OUT.json")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Run the command line."""
    args = build_parser().parse_args(argv)
    if args.json:
        check_destination(args.json, force=args.force)

    # Imported after the arguments, because these imports take seconds.
    from crossmae.checkpoints.conversion.inspection import inspect

    with named_by("FILE", args.file):
        found = inspect(args.file, values=not args.no_values)
    print("\n".join(map(printable, found.lines())))
    if args.json:
        write_json(args.json, found.record())


if __name__ == "__main__":
    run_cli(main)
