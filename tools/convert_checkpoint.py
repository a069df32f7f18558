"""Convert a weight file into the layout of another program, and check that it computes the same.

    python tools/convert_checkpoint.py outputs/run backbone.pth --to detectron2       # for MODEL.WEIGHTS
    python tools/convert_checkpoint.py published.pth model.safetensors --to crossmae
    python tools/convert_checkpoint.py outputs/run vit --to hf-vit                    # a folder for from_pretrained
    python tools/convert_checkpoint.py vit-huge.pth huge.pth --to detectron2 --patch-size 16

SRC is any weight file, the folder of a pretraining run, or a folder of transformers or timm. Code in SRC is not run,
and SRC is never changed. docs/checkpoints.md lists a command for every format.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from crossmae.checkpoints.conversion import LAYOUTS, TOLERANCE
from crossmae.errors import named_by, printable, run_cli

if TYPE_CHECKING:
    from crossmae.checkpoints.conversion.convert import Conversion


def build_parser() -> argparse.ArgumentParser:
    """Build the command-line parser."""
    formats = "\n".join(f"  {name:11} {what}" for name, what in LAYOUTS.items())
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=f"formats:\n{formats}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", metavar="SRC", type=Path, help="weight file, or a folder with weights")
    parser.add_argument("destination", metavar="DST", type=Path, help="file or folder to write, by its suffix")
    parser.add_argument("--to", required=True, metavar="FORMAT", help=f"layout to write: {', '.join(LAYOUTS)}")
    size = parser.add_argument_group("other sizes, resampled in float32")
    size.add_argument("--img-size", nargs="+", type=int, metavar="PIXELS", help="H W, or one number, for positions")
    size.add_argument("--patch-size", type=int, metavar="P", help="pixels. The grid stays without --img-size")
    size.add_argument("--in-chans", type=int, metavar="C", help="channels of the input")
    size.add_argument("--channels", choices=("repeat", "mean", "pad"), help="method of --in-chans (default: repeat)")
    size.add_argument("--window", type=int, metavar="N", help="side of the windows of relative positions, in patches")
    parser.add_argument("--encoder-only", action="store_true", help="drop decoder and heads")
    parser.add_argument("--ema", action="store_true", help="use the averaged weights in the file")
    several: dict[str, Any] = {"nargs": "+", "action": "extend", "default": []}
    parser.add_argument("--drop", metavar="REGEX", help="drop tensors that FORMAT has no place for", **several)
    parser.add_argument(
        "--set",
        metavar="KEY=VALUE",
        help="arguments, norm_eps, pixel_mean ... of the source that it does not tell",
        **several,
    )
    parser.add_argument("--tolerance", type=float, default=TOLERANCE, help="of the proof, relative to the maximum")
    parser.add_argument("--report", type=Path, metavar="R.json", help="default: DST.conversion.json")
    parser.add_argument("--force", action="store_true", help="overwrite DST")
    parser.add_argument(
        "--trust", action="store_true", help="unpickle everything in SRC, which can run any code. Use a sandbox"
    )
    return parser


def describe(done: Conversion) -> str:
    """Return the text that is printed after a conversion."""
    from crossmae.checkpoints.conversion.inspection import CONTENTS
    from crossmae.checkpoints.provenance import LICENCE

    layout, _, content = done.metadata["source_format"].rpartition(": ")
    lines = [
        f"source       {printable(done.source)} ({done.source.stat().st_size / 1e6:,.1f} MB)",
        f"sha256       {done.metadata['source_sha256']}",
        f"content      {CONTENTS.get(content, content)}{f', as {layout}' if layout else ''}",
        *([f"also in it   {', '.join(done.beside)}"] if done.beside else []),
        "",
        done.report.table(),
        "",
        *(f"assumed      {sentence}" for sentence in done.assumed),
        done.proof.sentence(),
        f"destination  {printable(done.destination)} ({_megabytes(done.destination):,.1f} MB)",
        f"report       {printable(done.report_path)}",
    ]
    if LICENCE in done.metadata:
        lines.append(f"licence      {done.metadata[LICENCE]}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    """Run the command line."""
    args = build_parser().parse_args(argv)

    # Imported after the arguments, because these imports take seconds.
    from crossmae.checkpoints.conversion.convert import Sizes, convert
    from crossmae.checkpoints.pretrained import parse_settings

    image = tuple(args.img_size) if args.img_size and len(args.img_size) > 1 else args.img_size and args.img_size[0]
    sizes = Sizes(image, args.patch_size, args.in_chans, args.channels, args.window)
    options = {key: getattr(args, key) for key in ("encoder_only", "tolerance", "report", "ema", "trust", "force")}
    options |= {"sizes": sizes, "given": parse_settings(args.set), "drop": tuple(args.drop)}
    with named_by("SRC", args.source):
        done = convert(args.source, args.destination, args.to, **options)
    print(describe(done))


def _megabytes(path: Path) -> float:
    files = path.iterdir() if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files) / 1e6


if __name__ == "__main__":
    run_cli(main)
