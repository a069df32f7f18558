"""Convert a weight file into the layout of another program.

    python tools/convert_checkpoint.py outputs/run backbone.pth --to detectron2    # for MODEL.WEIGHTS
    python tools/convert_checkpoint.py published.pth backbone.pkl --to detectron2  # or .safetensors
    python tools/convert_checkpoint.py published.pth model.safetensors --to crossmae

SRC is any weight file, or the folder of a pretraining run. Nothing in it is run, and it is never changed.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from crossmae.checkpoints.conversion import TARGETS, check_conversion, licence_notice
from crossmae.checkpoints.weights import (
    PIXEL_MEAN,
    PIXEL_STD,
    Weights,
    encoder_arguments,
    encoder_home,
    encoder_tensors,
    read_weights,
    recorded_arguments,
)
from crossmae.errors import run_cli
from crossmae.files import sha256


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description="Convert a weight file into the layout of another program.")
    parser.add_argument("source", metavar="SRC", type=Path, help="weight file, or the folder of a pretraining run")
    parser.add_argument("destination", metavar="DST", type=Path, help="file to write; its suffix says which kind")
    parser.add_argument("--to", required=True, help=f"layout to write: {', '.join(TARGETS)}")
    parser.add_argument("--force", action="store_true", help="overwrite DST")
    return parser


def describe(weights: Weights) -> str:
    """What a weight file is, in a few lines."""
    values = sum(tensor.numel() for tensor in weights.tensors.values())
    dtypes = ", ".join(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in weights.tensors.values()}))
    lines = [
        f"source       {weights.path} ({weights.path.stat().st_size / 1e6:,.1f} MB)",
        f"sha256       {sha256(weights.path)}",
        f"format       {weights.format}: {len(weights.tensors)} tensors, {values:,} values, {dtypes}",
    ]
    if encoder_home(weights.tensors) is not None:
        arguments = encoder_arguments(encoder_tensors(weights), weights.metadata)
        sure = "num_heads" in recorded_arguments(weights.metadata)
        shown = [f"{key} {value}" for key, value in arguments.items() if key != "num_heads" or sure]
        lines.append(f"encoder      {', '.join(shown)}")
    mean, std = (weights.metadata.get(key, "unknown") for key in (PIXEL_MEAN, PIXEL_STD))
    return "\n".join([*lines, f"pixels       mean {mean}, std {std}"])


def main(argv: list[str] | None = None) -> None:
    """Parse, read, convert, say what was done."""
    args = build_parser().parse_args(argv)
    check_conversion(args.source, args.destination, args.to, force=args.force)
    weights = read_weights(args.source)
    print(describe(weights), end="\n\n")
    report = TARGETS[args.to].convert(weights, args.destination, force=args.force)
    print(report.table(), end="\n\n")
    print(f"destination  {args.destination} ({args.destination.stat().st_size / 1e6:,.1f} MB)")
    notice = licence_notice(weights)
    if notice:
        print(f"licence      {notice}")


if __name__ == "__main__":
    run_cli(main)
