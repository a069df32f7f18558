"""Compose the demo's data, "digits in photos", from MNIST samples and photographs inside installed packages.

    python tools/make_demo_data.py                             # outputs/demo/data, seconds on one core
    python tools/make_demo_data.py --train 5000 --val 500 --size 256 --output outputs/big

The same settings give the same bytes. Run again, it reuses what is there and unchanged. What it writes, and
the format of the masks: see `crossmae/demo_data.py`. Needs `pip install -e .[demo]`.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from crossmae.demo_data import DemoDataSettings, make_demo_data
from crossmae.errors import run_cli


def build_parser() -> argparse.ArgumentParser:
    """The command line; defaults are those of `DemoDataSettings`."""
    default = DemoDataSettings()
    parser = argparse.ArgumentParser(
        description="Compose handwritten digits over photographs: COCO format, plain images, ImageFolder.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--output", type=Path, default=Path("outputs/demo/data"), help="folder to write")
    parser.add_argument("--train", type=int, default=default.train, help="training images")
    parser.add_argument("--val", type=int, default=default.val, help="held-out images")
    parser.add_argument("--size", type=int, default=default.size, help="side of the images in pixels")
    parser.add_argument("--seed", type=int, default=default.seed, help="other seed, other images")
    parser.add_argument("--force", action="store_true", help="replace demo data of other settings")
    return parser


def main() -> None:
    """Parse, make, say what was done."""
    args = build_parser().parse_args()
    settings = DemoDataSettings(train=args.train, val=args.val, size=args.size, seed=args.seed)
    start = time.perf_counter()
    if make_demo_data(settings, args.output, force=args.force):
        seconds = time.perf_counter() - start
        print(f"{args.output}: made {args.train} train and {args.val} val images in {seconds:.1f} s")
    else:
        print(f"{args.output}: already there, complete and unchanged; reused")


if __name__ == "__main__":
    run_cli(main)
