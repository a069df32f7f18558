"""Show the reconstructions of a pretrained model: pictures, animations over mask ratios, PSNR.

    python tools/reconstruct.py outputs/run photo.jpg                        # grid, animation, PSNR
    python tools/reconstruct.py outputs/run photos/ --no-gif --output look   # every image of a folder
    python tools/reconstruct.py published.pth 'photos/**/*.jpg' --mask-ratio 0.9

CKPT is the folder of a pretraining run, the folder of a checkpoint, a model.safetensors file, or a published CrossMAE
or MAE file of a whole model. Pictures are written to --output: see `crossmae/pretraining/gallery.py`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from crossmae.data.images import ImageLimits, add_max_pixels
from crossmae.data.paths import find_inputs
from crossmae.errors import UserError, named_by, printable, run_cli

if TYPE_CHECKING:
    from crossmae.checkpoints.pretrained import Pretrained
    from crossmae.pretraining.gallery import Result


def build_parser() -> argparse.ArgumentParser:
    """Build the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", metavar="CKPT", type=Path, help="weight file, or folder of a run or checkpoint")
    parser.add_argument("images", metavar="IMAGES", nargs="+", help="image files, folders of them, or patterns")
    parser.add_argument("--output", type=Path, default=Path("reconstructions"), help="folder to write (%(default)s)")
    parser.add_argument("--mask-ratio", type=float, default=0.75, help="share of patches to mask (%(default)s)")
    parser.add_argument(
        "--gif-ratios",
        type=float,
        nargs="+",
        metavar="RATIO",
        help="mask ratios of the animation (0.1 0.2 ... 0.9 0.95, as far as the model's patches allow)",
    )
    parser.add_argument("--no-gif", action="store_true", help="write no animations")
    parser.add_argument("--seed", type=int, default=0, help="another seed draws other masks (%(default)s)")
    add_max_pixels(parser)
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1 ...; auto takes a GPU where there is one")
    parser.add_argument(
        "--set",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="arguments of CrossMAE that a file without metadata lacks, such as num_heads=6",
    )
    parser.add_argument("--force", action="store_true", help="overwrite pictures of an earlier call")
    return parser


def describe(pretrained: Pretrained) -> str:
    """Describe the model and the assumptions about it."""
    model = pretrained.model
    size = " x ".join(str(side * model.patch_size) for side in model.grid)
    shape = f"width {model.embed_dim}, depth {model.depth}, decoder {model.decoder!r}, image {size}"
    lines = [f"weights  {pretrained.path}", f"model    {shape}, channels {model.in_chans}, patches {model.num_patches}"]
    return "\n".join([*lines, *(f"assumed  {assumption}" for assumption in pretrained.assumed)])


def table(results: Sequence[Result]) -> str:
    """Format the PSNR of every image, and the mean values."""
    from crossmae.pretraining.gallery import mean_psnr

    names = [printable(result.image) for result in results]
    width = max(len("image"), *map(len, names))
    lines = [f"{'image':<{width}}  {'masked':>8}  {'pasted':>8}   PSNR, dB"]
    rows = zip(names, results, strict=True)
    lines += [f"{name:<{width}}  {row.psnr_masked:8.2f}  {row.psnr_pasted:8.2f}" for name, row in rows]
    means = (mean_psnr([result.psnr_masked for result in results]), mean_psnr([r.psnr_pasted for r in results]))
    shown = "  ".join(f"{'inf' if mean is None else f'{mean:.2f}':>8}" for mean in means)
    return "\n".join([*lines, f"{'mean':<{width}}  {shown}"])


def main(argv: list[str] | None = None) -> None:
    """Reconstruct images and print their PSNR."""
    args = build_parser().parse_args(argv)
    if args.no_gif and args.gif_ratios:
        raise UserError("--gif-ratios: --no-gif draws no animation. Give only one of them.")
    if args.seed < 0:
        raise UserError(f"--seed: {args.seed} is negative. Give a number from 0.")
    paths = find_inputs(args.images)

    # Imported after the arguments, because these imports take seconds.
    from crossmae.checkpoints.pretrained import load_pretrained, parse_settings
    from crossmae.pretraining.gallery import NUMBERS, possible_ratios, write_gallery
    from crossmae.training.devices import open_device

    device = open_device(args.device, "--device")
    with named_by("CKPT", args.checkpoint):
        pretrained = load_pretrained(args.checkpoint, parse_settings(args.set))
    pretrained.model.to(device)
    print(describe(pretrained), end="\n\n")
    ratios = [] if args.no_gif else args.gif_ratios or possible_ratios(pretrained.model)
    limits = ImageLimits(args.max_pixels, "--max-pixels", "")
    results = write_gallery(
        pretrained, paths, args.output, args.mask_ratio, sorted(ratios), args.seed, args.force, limits
    )
    print(table(results))
    print(f"\npictures in {printable(args.output)}, numbers in {printable(args.output / NUMBERS)}")


if __name__ == "__main__":
    run_cli(main)
