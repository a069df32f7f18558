"""Pack a data set into tar shards of smaller images, which are quick to read from any disk or bucket.

    python tools/make_shards.py IMAGES SHARDS                  # then: python tools/pretrain.py ... data.train=SHARDS
    python tools/make_shards.py --verify SHARDS                # compare the shards with their checksums

SRC is a data set of any kind that data.train accepts: a folder, a list, a COCO json, shards, a Hugging Face data set.
After an interruption, the same command continues. It also repairs damaged shards.

Packing changes the data. Training crops are cut from images with 256 pixels on the short side instead of the originals,
so small crops are less sharp. Photographs are compressed as JPEG a second time. --uncompressed packs their pixels: ten
times the space, and no time to decode. --keep-original packs the files unchanged. The rules for each kind of file are
in crossmae/data/sources/shrink.py.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from crossmae.data.images import MAX_PIXELS, ImageLimits
from crossmae.data.sources import open_source
from crossmae.data.sources.shard_files import is_url
from crossmae.data.sources.shard_writer import ShardSettings, make_shards, verify_shards
from crossmae.errors import UserError, counted, printable, run_cli, set_up_log
from crossmae.files import expand_path


def build_parser() -> argparse.ArgumentParser:
    """Build the command line, with the defaults of `ShardSettings`."""
    default = ShardSettings()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", metavar="SRC", nargs="?", help="the images; not needed with --verify")
    parser.add_argument("folder", metavar="DST", help="folder of the shards, new or to continue")
    parser.add_argument("--root", type=Path, metavar="DIR", help="where the relative paths of a list start")
    for name, value, what in (
        ("--short-side", default.short_side, "short side of packed images in pixels"),
        ("--quality", default.quality, "quality of JPEG files, 1 to 100"),
        ("--images-per-shard", default.images_per_shard, "images in a shard"),
        ("--max-pixels", MAX_PIXELS, "width * height of the largest image"),
        ("--workers", os.cpu_count() or 1, "threads, as many as cores by default"),
    ):
        parser.add_argument(name, type=int, default=value, metavar="N", help=f"{what} (default %(default)s)")
    parser.add_argument(
        "--uncompressed", action="store_true", help="do not compress the pixels: larger, and quicker to read"
    )
    parser.add_argument("--keep-original", action="store_true", help="pack the files unchanged, whatever their size")
    parser.add_argument(
        "--skip-broken", action="store_true", help="leave broken images out and list them in broken.txt"
    )
    parser.add_argument("--verify", action="store_true", help="only compare the shards in DST with their checksums")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Make or verify shards and print their counts."""
    args = build_parser().parse_args(argv)
    set_up_log()
    if is_url(args.folder):
        raise UserError(f"DST: {args.folder} is an address. Give a local folder, and copy the shards afterwards.")
    folder = expand_path(args.folder, "DST")
    if args.verify:
        print(f"{printable(folder)}: {counted(verify_shards(folder), 'shard')}, all unchanged")
        return
    if args.source is None:
        raise UserError("SRC: is missing. Give two paths: the images, and the folder of the shards.")
    if args.workers < 1:
        raise UserError(f"--workers: {args.workers} is too small. Give a number from 1.")
    if args.uncompressed and args.keep_original:
        raise UserError("--uncompressed: --keep-original packs the files as they are. Give one of the two.")
    quality = None if args.uncompressed else args.quality
    settings = ShardSettings(args.short_side, quality, args.images_per_shard, args.keep_original, args.skip_broken)
    source = open_source(args.source, "SRC", args.root, ImageLimits(args.max_pixels, "--max-pixels", ""))
    print(source.description)
    index, kept = make_shards(source, folder, settings, args.workers)
    print(
        f"{counted(index.total('names'), 'image')} in {counted(len(index.shards), 'shard')} "
        f"({kept:,} were there already), "
        f"{index.total('source_bytes') / 1e6:,.1f} MB became {index.total('bytes') / 1e6:,.1f} MB"
    )
    if broken := index.total("broken"):
        print(f"{counted(broken, 'broken image')} left out, listed in {printable(folder / 'broken.txt')}")
    print(f"paste: data.train={printable(folder)}")


if __name__ == "__main__":
    run_cli(main)
