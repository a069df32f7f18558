"""Answer if pretraining is worth it, on your own images and labels, with intervals and costs.

    python tools/worth.py IMAGES LABELS --plan                    # what would run, and for how long
    python tools/worth.py IMAGES LABELS                           # runs it, and writes outputs/worth/report.html
    python tools/worth.py IMAGES LABELS --weights FILE            # also from your weights, and continued from them
    python tools/worth.py IMAGES LABELS --shares 20,100 --seeds 0,1,2 --minutes 60
    python tools/worth.py IMAGES LABELS --page                    # the page only, from the results that are there
    python tools/worth.py IMAGES LABELS --plan --fine-tune-set SOLVER.BASE_LR=2e-4    # a setting of the detector
    python tools/worth.py IMAGES LABELS --plan --fine-tune-set optim.lr=2e-4          # a setting of the classifier

IMAGES are unlabelled images: any source on this machine that tools/pretrain.py reads. If validation images are among
them, pretraining sees them without their labels, and the page says so. LABELS are a COCO json, or labels of YOLO,
Pascal VOC, LabelMe or CVAT, for a detector. For a classifier, they are a folder per class. The same model is fine-tuned
with the same number of steps from each start:

    random_pretraining_init   random weights, exactly as pretraining starts
    random_same_rates         the same, with the learning rates of pretrained weights
    random_detector_init      random weights, as the detector or classifier starts by itself
    own                       CrossMAE, pretrained on IMAGES
    weights, continued        your weights, without and with further pretraining on IMAGES
    random_equal_compute      random weights, with the time of pretraining and fine-tuning together

The same command continues after an interruption. Finished runs are not repeated.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

from crossmae.errors import UserError, run_cli, set_up_log
from crossmae.experiments.commands import find_gpus
from crossmae.experiments.worth.grid import EQUAL_COMPUTE, NEEDS_WEIGHTS, PRESETS, USUAL_ARMS
from crossmae.experiments.worth.inputs import DEFAULT_SHARES, LabelledPart
from crossmae.experiments.worth.model_sizes import describe_presets

ARMS_HELP = (
    f"starts to compare, without spaces (default: {', '.join(USUAL_ARMS)}, with --weights also "
    f"{' and '.join(NEEDS_WEIGHTS)}; not by default: {EQUAL_COMPUTE})"
)

SHARES = ",".join(f"{share:g}" for share in DEFAULT_SHARES)
VAL_HELP = "labels to evaluate on (default: a fifth of LABELS, at least 20 images, but at most half)"


def size_help() -> str:
    """Describe the sizes for the help."""
    return f"{describe_presets()} (default: demo without a GPU, small with a GPU)"


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("images", type=Path, metavar="IMAGES", help="images to pretrain on; labels are not used")
    add("labels", type=Path, metavar="LABELS", help="labels of objects, or a folder per class")
    add("--label-images", type=Path, metavar="DIR", help="images that LABELS names (default: near LABELS, or IMAGES)")
    add("--val-labels", type=Path, metavar="FILE", help=VAL_HELP)
    add("--val-images", type=Path, metavar="DIR", help="images that --val-labels names")
    add("--weights", type=Path, metavar="FILE", help="weights to compare with, in any format that the toolkit reads")
    add("--output", type=Path, default=Path("outputs/worth"), help="folder (default: %(default)s)")
    add("--size", choices=list(PRESETS), help=size_help())
    add("--shares", type=_numbers, metavar="P,P", help=f"percentages of LABELS (default: {SHARES}, as far as possible)")
    add("--seeds", type=_seeds, default=[0, 1, 2], metavar="N,N", help="a pretraining each (default: 0,1,2)")
    add("--arms", type=lambda text: text.split(","), metavar="ARM,ARM", help=ARMS_HELP)
    add("--equal-compute", action="store_true", help="also random weights with as much computation as own in all")
    add("--steps", type=int, metavar="N", help="fine-tuning steps (default: 50 passes over all labels, within limits)")
    add("--pretrain-set", nargs="+", default=[], metavar="KEY=VALUE", help="settings of the pretraining")
    add("--fine-tune-set", nargs="+", default=[], metavar="KEY=VALUE", help="settings of the detector or classifier")
    add("--jobs", type=int, metavar="N", help="runs at once on the processor (default: one for two cores)")
    add("--gpus", type=_seeds, metavar="N,N", help="GPUs with a run each (default: all)")
    add("--minutes", type=float, metavar="M", help="start no run that is expected to end later than this")
    add("--plan", action="store_true", help="print the plan, and stop")
    add("--page", action="store_true", help="write the page from the results of these options, and stop")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Plan, run, and write the page."""
    started, arguments = time.monotonic(), build_parser().parse_args(argv)
    set_up_log()
    from crossmae.experiments.worth import plan as worth  # imports torch, which takes seconds

    check_numbers(arguments)
    for flag, settings in (("--pretrain-set", arguments.pretrain_set), ("--fine-tune-set", arguments.fine_tune_set)):
        worth.check_settings(flag, settings)
    jobs, gpus = worth.choose_jobs(arguments.gpus, arguments.jobs)
    val = LabelledPart(arguments.val_labels, arguments.val_images) if arguments.val_labels else None
    question = worth.prepare_question(
        arguments.images.absolute(),
        LabelledPart(arguments.labels.absolute(), arguments.label_images and arguments.label_images.absolute()),
        val and LabelledPart(val.labels.absolute(), val.images and val.images.absolute()),
        arguments.output.absolute(),
        size=arguments.size or ("small" if gpus else "demo"),
        arms=worth.choose_arms(arguments.arms, arguments.weights is not None, arguments.equal_compute),
        shares=arguments.shares,
        seeds=arguments.seeds,
        weights=arguments.weights and arguments.weights.absolute(),
        pretrain_settings=arguments.pretrain_set,
        fine_tune_settings=arguments.fine_tune_set,
    )
    for _, remark in question.labels.remarks:
        print(remark)
    plan = worth.make_plan(question, arguments.steps, gpus, runs=not arguments.page)
    settings = {"Size": arguments.size or ("small" if gpus else "demo")}
    if not arguments.page:
        print(worth.describe_plan(question, plan, jobs, gpus), flush=True)
    if arguments.plan:
        return
    if arguments.page:
        verdict = worth.write_answer(question, plan, settings)
    else:
        minutes = arguments.minutes and max(arguments.minutes - (time.monotonic() - started) / 60, 0.0)
        verdict = worth.answer(question, plan, jobs=jobs, gpus=gpus, minutes=minutes, settings=settings)
    print(f"\n{verdict}\nOpen this page in a browser: {arguments.output / worth.PAGE}")


def check_numbers(arguments: argparse.Namespace) -> None:
    """Raise UserError for numbers out of range."""
    for flag in ("steps", "jobs", "minutes"):
        value = getattr(arguments, flag)
        if value is not None and value <= 0:
            raise UserError(f"--{flag}: {value:g} is not positive. Give a larger number.")
    if unknown := set(arguments.gpus or ()) - set(find_gpus()):
        raise UserError(f"--gpus: there is no GPU {min(unknown)}. This machine has {len(find_gpus())} GPUs.")
    if not all(0 <= seed < 2**32 for seed in arguments.seeds):
        raise UserError(
            f"--seeds: {min(arguments.seeds)} to {max(arguments.seeds)}. Give numbers from 0 to {2**32 - 1}."
        )
    if arguments.val_images and not arguments.val_labels:
        raise UserError("--val-images: there are no --val-labels that name these images. Add them.")
    for flag in ("shares", "seeds"):
        values = getattr(arguments, flag) or ()
        if len(set(values)) < len(values):
            raise UserError(f"--{flag}: a number is there twice. Give different numbers.")


def _numbers(text: str) -> list[float]:
    try:
        return [float(word) for word in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of numbers. Write for example 10,100") from None


def _seeds(text: str) -> list[int]:
    try:
        return [int(word) for word in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of whole numbers. Write for example 0,1") from None


if __name__ == "__main__":
    run_cli(main)
