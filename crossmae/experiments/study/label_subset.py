"""Write the label subsets of one seed: nested, stratified parts of a COCO file.

    python -m crossmae.experiments.study.label_subset --json DATA/annotations/train.json --shares 10 100 --seed 0 \\
        --val-json DATA/annotations/val.json --one-class --output OUT

The subsets are stratified by category, also if the categories become one class afterwards.
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

COUNTS, VAL = "counts.json", "val.json"


def merge_classes(path: Path) -> None:
    """Turn the categories of a COCO file into one class, "thing"."""
    content = read_json(path)
    annotations = [one | {"category_id": 1} for one in content["annotations"]]
    write_json(path, content | {"categories": [{"id": 1, "name": "thing"}], "annotations": annotations})


def main(argv: Sequence[str] | None = None) -> None:
    """Write the subsets, then the numbers of their images."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True, help="COCO file")
    parser.add_argument("--val-json", type=Path, required=True, help="COCO file of the held-out images")
    parser.add_argument("--one-class", action="store_true", help="all categories become one class")
    parser.add_argument("--shares", type=float, nargs="+", required=True, help="percentages of the images")
    parser.add_argument("--seed", type=int, required=True, help="decides which images are chosen")
    parser.add_argument("--output", type=Path, required=True, help="folder of the subsets")
    args = parser.parse_args(argv)
    set_up_log()
    make_folder(args.output, "--output")
    paths = write_coco_subsets(args.json, args.shares, args.seed, args.output)
    write_json(args.output / VAL, read_json(args.val_json))
    if args.one_class:
        for path in (*paths.values(), args.output / VAL):
            merge_classes(path)
    counts = {path.name: len(read_json(path)["images"]) for path in paths.values()}
    write_json(args.output / COUNTS, counts)
    log.info("%s", counts)


if __name__ == "__main__":
    run_cli(main)
