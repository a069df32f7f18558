"""Find objects in images and videos, draw them, and write one COCO file.

    python tools/predict.py --weights outputs/run photo.jpg
    python tools/predict.py --weights outputs/run photos/ 'more/**/*.jpg' clip.mp4 --output found --score-threshold 0.3
    python tools/predict.py --weights model_best.safetensors photo.jpg MODEL.DEVICE=cpu

INPUT is any number of images, videos, folders (what is in them and in their subfolders) and quoted patterns. Words
like MODEL.DEVICE=cpu replace settings of the config, unless a file has that name. Written into --output:
    NAME.png, NAME.mp4     images and videos with their objects; small images are enlarged, videos have no sound
    labels/                with --save-labels, a file per image for a labelling tool or for training; not for videos
    predictions.json       COCO annotations with scores, masks as RLE; the frames of a video are images with "frame" and
                           "time" in seconds
Objects with a score above --score-threshold are drawn and listed. Files that cannot be read are skipped. They are
listed at the end, together with pictures that cannot be written, and the exit code is then 1.
"""

from __future__ import annotations

import argparse
import os
import re
from pathlib import Path

from crossmae.errors import UserError, counted, exit_if_any, named_by, printable, run_cli
from det.inference.arguments import COCO_FILE, LABEL_FORMATS, add_detector_arguments, read_config
from det.training.console import set_up_console

FEW = 0.1  # objects per image; fewer may come from the threshold
SETTING = re.compile(r"[A-Z][A-Z0-9_]*(\.[A-Z0-9_]+)*=.*")


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="+", metavar="INPUT | KEY=VALUE", help="what to predict; settings to replace")
    add_detector_arguments(parser)
    parser.add_argument(
        "--output", type=Path, default=Path("outputs/predictions"), metavar="DIR", help="folder to write (%(default)s)"
    )
    parser.add_argument("--score-threshold", type=float, default=0.5, metavar="S", help="from 0 to 1 (%(default)s)")
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="images at once (%(default)s)")
    parser.add_argument("--no-masks", action="store_true", help="boxes only")
    parser.add_argument("--no-pictures", action="store_true", help=f"write {COCO_FILE} only")
    parser.add_argument("--save-labels", choices=list(LABEL_FORMATS), help="also write labels of this format")
    parser.add_argument("--force", action="store_true", help="overwrite what an earlier call wrote")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Parse the command line, predict, write and summarise."""
    args = build_parser().parse_intermixed_args(argv)
    set_up_console()
    settings = [word for word in args.words if SETTING.fullmatch(word) and not os.path.exists(word)]
    inputs = [word for word in args.words if word not in settings]
    if not 0 <= args.score_threshold < 1:
        raise UserError(
            f"--score-threshold {args.score_threshold} is no threshold. Use a number from 0 to less than 1."
        )
    if args.batch_size < 1:
        raise UserError(f"--batch-size {args.batch_size} is too small. Use a number from 1.")
    if not inputs:
        raise UserError("INPUT: nothing to predict. Name images, folders, patterns or videos.")
    # Set in the config, because masks are computed only for kept objects. Later settings override it.
    settings.insert(0, f"MODEL.ROI_HEADS.SCORE_THRESH_TEST={args.score_threshold}")
    config = read_config(args.config_file, args.weights, settings, "--weights")

    # Imported after the arguments, because these imports take seconds.
    import torch

    from crossmae.checkpoints.metadata import safetensors_metadata
    from det.backbone.record import describe_shrunk
    from det.inference.label_files import LABEL_FOLDER, LabelWriter, label_paths
    from det.inference.ordered_threads import host_threads
    from det.inference.predict import Predictor, find_classes, threshold_below
    from det.inference.predict_files import FilePredictions, check_output, find_media
    from det.inference.video import is_video

    root, media = find_media(inputs)
    names = [one.name for one in media if not is_video(one.name)]
    labels = label_paths(args.save_labels, args.output / LABEL_FOLDER, names) if args.save_labels else {}
    check_output(args.output, media, inputs, args.force, list(labels.values()))
    with named_by("--weights", args.weights):
        predictor = Predictor(config, args.weights, masks=not args.no_masks)
    classes = find_classes(predictor, args.classes)
    threads = host_threads(predictor.model.device)
    writer = LabelWriter(args.save_labels, labels, root, classes) if args.save_labels else None
    job = FilePredictions(predictor, classes, args.output, args.batch_size, not args.no_pictures, threads, writer)
    info = {"image_folder": str(root), "weights": str(predictor.weights), "score_threshold": predictor.score_threshold}
    try:
        job.write(media, info)
    except torch.OutOfMemoryError:
        raise UserError(
            f"--batch-size {args.batch_size}: too many images for the memory of the GPU. Lower it."
        ) from None
    print(f"{counted(job.objects, 'object')} in {counted(job.images, 'image')}: {printable(args.output / COCO_FILE)}")
    inputs_of = predictor.cfg.INPUT
    metadata = safetensors_metadata(predictor.weights)
    if line := describe_shrunk(metadata, job.sizes, inputs_of.MIN_SIZE_TEST, inputs_of.MAX_SIZE_TEST):
        print(f"warning: {line}")
    if job.images and job.objects < FEW * job.images:
        highest, number = job.highest_score(media)
        seen = f"the best score in {counted(number, 'file')} is {highest:.2g}"
        first = "few objects" if job.objects else f"nothing above {predictor.score_threshold:g}"
        lower = threshold_below(min(highest, predictor.score_threshold))
        print(f"{first}: {seen}. To see more: --score-threshold {lower:g}")
    exit_if_any(job.failures, f"of {counted(len(media), 'file')}, these could not be read or written:")


if __name__ == "__main__":
    run_cli(main)
