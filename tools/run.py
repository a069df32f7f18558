"""Pretrain on images and train a detector from labels, within a budget of time.

    python tools/run.py IMAGES --labels LABELS                      # 30 minutes, results in outputs/run
    python tools/run.py IMAGES --labels LABELS --dry-run            # looks, measures, and prints the plan
    python tools/run.py IMAGES --labels LABELS --budget 2h --output outputs/birds
    python tools/run.py IMAGES --budget 1h                          # pretraining only, without labels
    python tools/run.py IMAGES --labels LABELS --compare            # also the same detector from random weights

IMAGES is a folder of images. LABELS are a COCO json, or a folder or file of YOLO, Pascal VOC, LabelMe, CVAT, Roboflow
or PNG masks. A mask has the name of its image and a value per object: masks/a.png, or masks/CLASS/a.png. A folder that
the images have, too, is no class (docs/data.md). Labelled images are split, unless the labels have a split. The program
looks at images and labels, measures this machine, chooses size and length of the trainings for the budget, and prints
the plan. It pretrains, checks if features improve, trains a detector, evaluates it, and writes OUTPUT/report.html with
the command of every stage. The same command continues after an interruption.
"""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from crossmae.errors import UserError, run_cli, set_up_log

if TYPE_CHECKING:
    from crossmae.experiments.pipeline.pipeline import Request

BY_FOLDER = "hold out whole folders: frames of a video, tiles of a picture, pictures of a patient, site or plate"


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("images", type=Path, metavar="IMAGES", help="folder or list of images to pretrain on")
    add("--labels", type=Path, metavar="FILE_OR_FOLDER", help="labels for a detector (default: pretraining only)")
    add("--budget", default="30m", metavar="TIME", help="time for everything, such as 30m or 2h (default: %(default)s)")
    add("--output", type=Path, default=Path("outputs/run"), metavar="OUT", help="folder (default: %(default)s)")
    add("--dry-run", action="store_true", help="print the plan, and stop")
    add("--weights", type=Path, metavar="FILE", help="continue pretraining from these weights")
    add("--compare", action="store_true", help="train the same detector from random weights, too")
    add("--val", type=float, metavar="SHARE", help="share of held-out labelled images (default: 0.2)")
    add("--by-folder", action="store_true", help=BY_FOLDER)
    add("--pretrain-share", type=float, default=40, metavar="P", help="percent of the training time (default: 40)")
    add(
        "--size",
        type=int,
        metavar="PIXELS",
        help="longer side of the images that the detector sees",
    )
    add("--seed", type=int, default=0, help="of the split and of all trainings (default: 0)")
    add("--pretrain-set", nargs="+", default=[], metavar="KEY=VALUE", help="settings of pretraining")
    add("--detect-set", nargs="+", default=[], metavar="KEY=VALUE", help="settings of the detector")
    add("--fresh", action="store_true", help="decide and run everything again")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the arguments, and run the pipeline."""
    arguments = build_parser().parse_args(argv)
    set_up_log()
    check_arguments(arguments)
    from crossmae.experiments.pipeline import pipeline  # slow import
    from crossmae.experiments.pipeline.plan import parse_duration

    request = pipeline.Request(
        images=plain_path(arguments.images),
        labels=arguments.labels and plain_path(arguments.labels),
        output=plain_path(arguments.output),
        budget=parse_duration(arguments.budget, "--budget"),
        weights=arguments.weights and plain_path(arguments.weights),
        pretrain_share=arguments.pretrain_share,
        val_share=arguments.val,
        by_folder=arguments.by_folder,
        compare=arguments.compare,
        size=arguments.size,
        seed=arguments.seed,
        pretrain_settings=tuple(arguments.pretrain_set),
        detect_settings=tuple(arguments.detect_set),
    )
    check_settings(request)
    pipeline.run_pipeline(request, dry_run=arguments.dry_run, fresh=arguments.fresh)
    if not arguments.dry_run:
        print(f"\n{(arguments.output / 'summary.txt').read_text('utf-8')}")
        print(f"Open this page in a browser: {arguments.output / pipeline.PAGE}")


def plain_path(path: Path) -> Path:
    """Make a path absolute, without "..".

    Links are resolved only where a link comes before "..".
    """
    plain = Path(os.path.abspath(path))
    return plain if plain.resolve() == path.resolve() else path.resolve()


def check_settings(request: Request) -> None:
    """Raise UserError for settings that the configs do not take.

    Nothing is written.
    """
    if not request.pretrain_settings and not request.detect_settings:
        return
    from crossmae.experiments.pipeline.pipeline import choose_recipe  # slow imports
    from crossmae.experiments.pipeline.trainings import settings_of_weights

    recipe, _ = choose_recipe()
    fitting = settings_of_weights(request.weights, recipe) if request.weights else ((), ())
    with blamed_on("--pretrain-set"):
        recipe.config((*fitting[0], *request.pretrain_settings))
    if request.detect_settings:
        from det.config import load_det_config

        logging.getLogger(load_det_config.__module__).setLevel(logging.WARNING)  # the detector tells the rest
        words = ["SOLVER.MAX_ITER=1", "TEST.EVAL_PERIOD=0", *fitting[1]]  # the pipeline gives them
        words += [f"INPUT.SIZE={request.size}"] if request.size else []
        with blamed_on("--detect-set"):
            load_det_config(recipe.detect, (*words, *request.detect_settings))


@contextmanager
def blamed_on(flag: str) -> Iterator[None]:
    """Name a flag in the errors about its settings."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{flag}: {str(error.args[0]).removeprefix('command line: ')}", *error.args[1:]) from None


def check_arguments(arguments: argparse.Namespace) -> None:
    """Raise UserError for arguments that are out of range or missing."""
    for flag in ("images", "labels", "weights"):
        path = getattr(arguments, flag)
        if path is not None and not path.exists():
            name = "IMAGES" if flag == "images" else f"--{flag}"
            raise UserError(f"{name}: {path} does not exist. Correct the path.")
    if arguments.labels is not None and not arguments.images.is_dir():
        raise UserError(f"IMAGES: {arguments.images} is no folder. With --labels, name the folder of the images.")
    ranges = {"val": (0, 0.9), "pretrain_share": (0, 100), "size": (31, 4097), "seed": (-1, 2**32)}
    for flag, (low, high) in ranges.items():
        value = getattr(arguments, flag)
        if value is not None and not low < value < high:
            raise UserError(
                f"--{flag.replace('_', '-')}: {value} is out of range. Give a number between {low} and {high}."
            )
    if arguments.labels is None:
        for flag in ("compare", "size", "detect_set", "by_folder"):
            if getattr(arguments, flag):
                raise UserError(f"--{flag.replace('_', '-')}: only a detector uses it. Add --labels.")


if __name__ == "__main__":
    run_cli(main)
