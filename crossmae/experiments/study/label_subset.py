"""Write the label subsets of one seed: nested, stratified parts of a COCO file.

    python -m crossmae.experiments.study.label_subset --json DATA/annotations/train.json --shares 10 100 --seed 0 \\
        --output OUT
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path

from crossmae.errors import run_cli, set_up_log
from crossmae.experiments.labels import write_coco_subsets
from crossmae.files import make_folder, read_json, write_json

log = logging.getLogger(__name__)

COUNTS = "counts.json"


def main(argv: Sequence[str] | None = None) -> None:
    """Write the subsets, then the numbers of their images."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True, help="COCO file")
    parser.add_argument("--shares", type=float, nargs="+", required=True, help="percentages of the images")
    parser.add_argument("--seed", type=int, required=True, help="decides which images are chosen")
    parser.add_argument("--output", type=Path, required=True, help="folder of the subsets")
    args = parser.parse_args(argv)
    set_up_log()
    make_folder(args.output, "--output")
    paths = write_coco_subsets(args.json, args.shares, args.seed, args.output)
    counts = {path.name: len(read_json(path)["images"]) for path in paths.values()}
    write_json(args.output / COUNTS, counts)
    log.info("%s", counts)


if __name__ == "__main__":
    run_cli(main)
