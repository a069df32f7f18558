"""Evaluate a trained detector or classifier on labelled images.

    python tools/evaluate.py outputs/detector VAL.json --images IMAGES --output outputs/evaluation
    python tools/evaluate.py outputs/classifier LABELLED --output outputs/evaluation
    python tools/evaluate.py outputs/detector VAL.json --images IMAGES TEST.DETECTIONS_PER_IMAGE=300

RUN is the folder of a training run, or a detector's safetensors file. The settings are those of the run, and KEY=VALUE
replaces some. This is the evaluation of tools/train_net.py and tools/finetune.py (--eval-only), with the same numbers
and the same page.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a tool is run as a file, and tools/ is not installed

from crossmae.checkpoints.metadata import DETECTOR_CONFIG, safetensors_metadata
from crossmae.checkpoints.reading import detector_folder, weights_file
from crossmae.errors import UserError, named_by, run_cli
from crossmae.training.config import read_yaml

CONFIG = "config.yaml"


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", metavar="RUN", type=Path, help="folder of a trained detector or classifier")
    parser.add_argument("labels", metavar="LABELS", help="labels of a detector, or a folder per class for a classifier")
    parser.add_argument("--images", metavar="DIR", help="folder of the images that LABELS names, for a detector")
    parser.add_argument("--output", metavar="OUT", default="outputs/evaluation", help="folder (default: %(default)s)")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="replace settings of the run")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the arguments, and evaluate with the tool that trained."""
    arguments = build_parser().parse_intermixed_args(argv)
    with named_by("RUN", arguments.run):
        run = detector_folder(arguments.run)
    config = weights_file(run)  # a detector's file records its config
    is_detector = config is not None and DETECTOR_CONFIG in safetensors_metadata(config)
    if config is None or not is_detector:
        config = run / CONFIG
        if not config.is_file():
            raise UserError(f"RUN: {run} has no {CONFIG}. Name the folder of a detector or classifier.")
        is_detector = "MODEL" in read_yaml(config)
    if is_detector != (arguments.images is not None):
        is_kind, what = ("detector", "Add --images.") if is_detector else ("classifier", "Leave --images out.")
        raise UserError(f"--images: {run} is a {is_kind}. {what}")
    words = ["--config-file", str(config), "--eval-only"]
    if is_detector:
        words += ["--val-json", arguments.labels, "--val-images", arguments.images]
        words += [f"MODEL.WEIGHTS={run}", f"OUTPUT_DIR={arguments.output}"]
    else:
        words += [str(run), f"data.val={arguments.labels}", f"output_dir={arguments.output}"]
    tool = importlib.import_module("tools.train_net" if is_detector else "tools.finetune")
    tool.main([*words, *arguments.overrides])


if __name__ == "__main__":
    run_cli(main)
