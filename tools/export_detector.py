"""Export a trained detector to a file that runs without this package: ONNX or torch.export.

    python tools/export_detector.py --weights outputs/run --output detector.onnx
    python tools/export_detector.py --weights outputs/run --output detector.pt2 --img-size 768x1024 --image photo.jpg
    python tools/export_detector.py --weights model_best.safetensors --output detector.onnx \\
        MODEL.ROI_HEADS.SCORE_THRESH_TEST=0.3

The file has two inputs: `image` (1, 3, H, W), float32 RGB from 0 to 255, and `image_size` (2,), the int64 height and
width of the picture in the top left corner. Its outputs are `boxes` (N, 4) x0, y0, x1, y1, `scores` (N,), `classes`
(N,) and `masks` (N, M, M), which are probabilities inside the boxes. Before the file is kept, it is run on the CPU and
compared with the detector. Words like TEST.DETECTIONS_PER_IMAGE=50 replace settings of the config.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from crossmae.data.images import parse_size
from crossmae.errors import UserError, named_by, printable, run_cli
from det.inference.arguments import add_detector_arguments, read_config
from det.training.console import set_up_console


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_detector_arguments(parser)
    parser.add_argument(
        "--output", type=Path, required=True, metavar="FILE", help="file to write: .onnx, or .pt2 for torch.export.load"
    )
    parser.add_argument("--img-size", metavar="PIXELS | HxW", help="of the input (MODEL.VIT.IMG_SIZE of the config)")
    parser.add_argument("--backbone-only", action="store_true", help="backbone and feature pyramid, without the heads")
    parser.add_argument("--image", type=Path, metavar="FILE", help="picture for the comparison (coloured shapes)")
    parser.add_argument("--no-check", action="store_true", help="keep the file without comparing")
    parser.add_argument("--force", action="store_true", help="overwrite FILE")
    parser.add_argument("overrides", nargs="*", metavar="KEY VALUE | KEY=VALUE", help="replace settings of the config")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Parse the command line, export, and print size and accuracy."""
    args = build_parser().parse_intermixed_args(argv)
    set_up_console()
    if args.image and args.no_check:
        raise UserError("--image has no effect with --no-check. Leave out one of the two.")
    cfg = read_config(args.config_file, args.weights, args.overrides, "--weights")
    size = parse_size(args.img_size or str(cfg.MODEL.VIT.IMG_SIZE), "--img-size")

    # Imported after the arguments, because these imports take seconds.
    from crossmae.checkpoints.metadata import ASSUMED
    from crossmae.checkpoints.provenance import LICENCE, licence_notice
    from crossmae.checkpoints.weights import read_weights
    from det.backbone.weights import find_detector
    from det.inference.export import export_detector
    from det.inference.predict import Predictor, find_classes, read_rgb

    image = None if args.image is None else read_rgb(args.image)
    with named_by("--weights", args.weights):
        predictor = Predictor(cfg, args.weights, device="cpu")
    metadata = {"class_names": json.dumps(find_classes(predictor, args.classes).names)}
    weights = read_weights(find_detector(args.weights))
    licence = licence_notice(weights)
    metadata |= {key: weights.metadata[key] for key in (ASSUMED,) if key in weights.metadata}
    parity = export_detector(
        predictor.model,
        args.output,
        size,
        backbone_only=args.backbone_only,
        check=not args.no_check,
        image=image,
        metadata=metadata | ({LICENCE: licence} if licence else {}),
        force=args.force,
    )
    print(f"{printable(args.output)}: {args.output.stat().st_size / 1e6:.1f} MB, input (1, 3, {size[0]}, {size[1]})")
    if parity is None:
        print("not compared with the detector")
    else:
        what = "feature maps" if args.backbone_only else "detections"
        print(f"largest differences to the detector in {parity.compared} {what}: {parity}")
    if licence:
        print(f"licence: {licence}")


if __name__ == "__main__":
    run_cli(main)
