"""Predict the classes of images with a fine-tuned classifier, as JSON or CSV.

    python tools/predict_classes.py --weights outputs/run photo.jpg
    python tools/predict_classes.py --weights outputs/run photos/ 'more/**/*.jpg' --output found.csv --top-k 3
    python tools/predict_classes.py --weights model.safetensors shards/x-{000..012}.tar --output found.json

INPUT is any number of images, folders (the images in them and in their subfolders), quoted patterns, and other sources
that training reads: lists, tar shards, idx files. Without --output, or with -, JSON is written to the terminal. Images
that cannot be read are skipped and listed at the end, and the exit code is then 1. crossmae/classification/predict.py
describes the formats.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from crossmae.classification import BATCH_SIZE, LABEL_THRESHOLD, STDOUT, TOP_K
from crossmae.data.images import ImageLimits, add_max_pixels, parse_size
from crossmae.errors import UserError, counted, exit_if_any, named_by, printable, run_cli


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("inputs", nargs="+", metavar="INPUT", help="what to predict")
    parser.add_argument(
        "--weights", type=Path, required=True, metavar="PATH", help="a classifier's file, or the folder of its run"
    )
    parser.add_argument(
        "--output", default=STDOUT, metavar="FILE", help="file to write, .json or .csv; - is the terminal (%(default)s)"
    )
    parser.add_argument("--top-k", type=int, metavar="K", help=f"classes per image, at most ({TOP_K})")
    parser.add_argument(
        "--threshold", type=float, metavar="P", help=f"multi-label: smallest probability of a class ({LABEL_THRESHOLD})"
    )
    parser.add_argument("--batch-size", type=int, default=BATCH_SIZE, metavar="N", help="images at once (%(default)s)")
    parser.add_argument("--img-size", metavar="N|HxW", help="pixels, such as 224 or 192x256 (the classifier's own)")
    add_max_pixels(parser)
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1 ...; auto takes a GPU where there is one")
    parser.add_argument("--force", action="store_true", help="overwrite what an earlier call wrote")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Parse the command line, predict, write and summarise."""
    args = build_parser().parse_intermixed_args(argv)
    for name, value in (("--top-k", args.top_k), ("--batch-size", args.batch_size), ("--max-pixels", args.max_pixels)):
        if value is not None and value < 1:
            raise UserError(f"{name} {value}: too small. Give a number from 1.")
    if args.threshold is not None and not 0 <= args.threshold <= 1:
        raise UserError(f"--threshold {args.threshold}: no probability. Give a number from 0 to 1.")

    # Imported after the arguments, because these imports take seconds.
    import torch

    from crossmae.classification.classifier import load_classifier
    from crossmae.classification.predict import Selection, check_output, expand_inputs, open_inputs, write_answers
    from crossmae.training.devices import open_device

    device = open_device(args.device, "--device")
    inputs = expand_inputs(args.inputs)
    check_output(args.output, inputs, args.force)
    sources = open_inputs(inputs, ImageLimits(args.max_pixels, "--max-pixels", ""))
    img_size = parse_size(args.img_size, "--img-size") if args.img_size else None
    with named_by("--weights", args.weights):
        classifier = load_classifier(args.weights, img_size)
    if classifier.multi_label and args.top_k is not None:
        raise UserError("--top-k: this classifier can find several classes in an image. Limit them by --threshold.")
    if not classifier.multi_label and args.threshold is not None:
        raise UserError("--threshold: this classifier finds one class per image. Choose the listed number by --top-k.")
    selection = Selection(args.top_k or TOP_K, LABEL_THRESHOLD if args.threshold is None else args.threshold)
    for assumption in classifier.assumed:
        print(f"assumed: {assumption}", file=sys.stderr)
    classifier.model.to(device)
    try:
        failures = write_answers(classifier, sources, selection, args.output, args.batch_size)
    except torch.OutOfMemoryError:
        raise UserError(f"--batch-size {args.batch_size}: the GPU's memory is full. Lower it.") from None
    total = sum(map(len, sources))
    if args.output != STDOUT:
        print(f"classes of {counted(total - len(failures), 'image')}: {printable(args.output)}")
    exit_if_any(failures, f"of {counted(total, 'image')}, these could not be read:")


if __name__ == "__main__":
    run_cli(main)
