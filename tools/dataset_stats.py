"""Measure the mean and standard deviation of the pixels of a data set, for data.mean and data.std.

    python tools/dataset_stats.py --config-file pretrain/demo.yaml data.train=IMAGES
    python tools/dataset_stats.py --config-file pretrain/demo.yaml data.train=IMAGES --images 5000 --output stats.json

Images are decoded as in training: model.in_chans channels, data.bit_depth bits. Every image has the same weight,
regardless of its size. Only model.in_chans and data.train, root, bit_depth and max_pixels are used.
"""

from __future__ import annotations

import argparse
import os
from dataclasses import asdict
from pathlib import Path

from crossmae.data.sources import open_source
from crossmae.data.sources.source import evenly_spaced
from crossmae.errors import UserError, printable, run_cli, set_up_log
from crossmae.files import make_folder, write_json
from crossmae.pretraining.config import PretrainConfig, load_config
from crossmae.pretraining.pixel_stats import LOW_RANGE, PixelStats, check_usable, measure
from crossmae.training.config import add_config_arguments, read_yaml, resolve_config_path, set_override


def build_parser() -> argparse.ArgumentParser:
    """Build the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_config_arguments(parser)
    parser.add_argument("--images", type=int, metavar="N", help="measure N evenly spaced images; default: all")
    parser.add_argument("--output", type=Path, metavar="FILE", help="also write the numbers as JSON")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="threads that read (default: cores)")
    return parser


def load(config_file: str, overrides: list[str]) -> PretrainConfig:
    """Load the config, with any values for data.mean and data.std."""
    values = read_yaml(resolve_config_path(config_file))
    for word in overrides:
        set_override(values, word)
    channels = (values.get("model") or {}).get("in_chans", 3)
    unused = [f"data.{key}={[0.5] * channels}" for key in ("mean", "std")] if isinstance(channels, int) else []
    return load_config(config_file, ["output_dir=.", *overrides, *unused])


def describe(stats: PixelStats, bit_depth: int) -> str:
    """Describe the statistics in a few lines."""
    lines = [
        f"images      {stats.images:,}",
        f"short side  {stats.short_side[0]} / {stats.short_side[1]:g} / {stats.short_side[2]} (min / median / max)",
        f"long side   {stats.long_side[0]} / {stats.long_side[1]:g} / {stats.long_side[2]}",
    ]
    for channel, (mean, std) in enumerate(zip(stats.mean, stats.std, strict=True)):
        lines.append(f"channel {channel}   mean {mean:.4f}  std {std:.4f}")
    if bit_depth == 16 and stats.largest < LOW_RANGE:
        lines.append(
            f"warning: the largest value is {stats.largest * 65535:.0f} of 65535. The files use only the low part of "
            "16 bits. Use the mean and std below, not those of other data."
        )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    """Measure a data set and print overrides for data.mean and data.std."""
    args = build_parser().parse_intermixed_args(argv)
    set_up_log()
    for name in ("images", "threads"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise UserError(f"--{name}: {getattr(args, name)} is too small. Give a number from 1.")
    config = load(args.config_file, args.overrides)
    if args.output is not None:
        make_folder(args.output.parent, "--output")
    source = open_source(config.data.train, "data.train", config.data.root, config.data.limits)
    print(printable(source.description))
    indices = evenly_spaced(len(source), args.images or len(source))
    stats = measure(source, indices, config.model.in_chans, config.data.bit_depth, args.threads)
    print(describe(stats, config.data.bit_depth))
    check_usable(stats)
    print(f"paste: {stats.overrides}")
    if args.output is not None:
        write_json(args.output, {"source": source.description, **asdict(stats)})
        print(f"wrote {printable(args.output)}")


if __name__ == "__main__":
    run_cli(main)
