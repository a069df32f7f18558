"""Run the demo: `crossmae run` on composed pictures, with fixed lengths. `make demo` runs this.

    python tools/demo/run.py                       # runs unfinished stages, in outputs/demo
    python tools/demo/run.py --output outputs/big  # writes to another folder
    python tools/demo/run.py --fresh               # runs every stage again

The first stage composes handwritten digits over photographs. The others are the stages of tools/run.py --compare. The
lengths are fixed, so that runs on different machines can be compared. After a failure, the next run continues with the
failed stage. stages.json in the output folder records time and memory.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # a tool is run as a file, and tools/ is not installed

from crossmae.errors import PROGRAMS, run_cli
from crossmae.experiments.stages import RESUME, Stage, run_stages
from crossmae.files import make_folder, write_json
from crossmae.reports.page import format_seconds

# Do not import torch or matplotlib here: they would slow down a `make demo` that has nothing to do.

RECORD = "pipeline.json"  # tools/report.py reads it
# The comparison: training images with labels, and training steps, of each of the two detectors.
LABELLED, DETECTOR_STEPS = 160, 200
PRETRAIN = "--config-file pretrain/demo.yaml data.train=@/data/pretrain"
DETECT = (
    "--config-file demo_mask_rcnn.yaml --train-json @/data/annotations/few.json --train-images @/data/train "
    f"--val-json @/data/annotations/val.json --val-images @/data/val SOLVER.MAX_ITER={DETECTOR_STEPS}"
)
# Name; title; tool; its arguments (@ is the output folder); outputs in that folder; file that decides the outcome.
STAGES = (
    (
        "data",
        "Compose handwritten digits over photographs",
        "tools/make_demo_data.py",
        f"--few {LABELLED} --output @/data",
        "data",
        "tools/make_demo_data.py",
    ),
    (
        "pretrain",
        "Pretrain CrossMAE on the training images, without their labels",
        "tools/pretrain.py",
        f"{PRETRAIN} data.val=@/data/val probe.train=@/data/scenes/train probe.val=@/data/scenes/val "
        f"output_dir=@/pretrain {RESUME}",
        "pretrain",
        "configs/pretrain/demo.yaml",
    ),
    (
        "start",
        "Write the random weights that pretraining starts from",
        "tools/pretrain.py",
        f"{PRETRAIN} data.val=null probe.train=null probe.val=null log.pictures=0 schedule.max_steps=0 "
        "output_dir=@/start",
        "start",
        "configs/pretrain/demo.yaml",
    ),
    (
        "detect-random",
        "Train Mask R-CNN on few labelled images, from random weights, and evaluate it on held-out images",
        "tools/train_net.py",
        f"{DETECT} MODEL.WEIGHTS=@/start OUTPUT_DIR=@/detect-random {RESUME}",
        "detect-random",
        "configs/demo_mask_rcnn.yaml",
    ),
    (
        "detect-own",
        "Train and evaluate the same Mask R-CNN, from the pretrained encoder",
        "tools/train_net.py",
        f"{DETECT} MODEL.WEIGHTS=@/pretrain OUTPUT_DIR=@/detect-own {RESUME}",
        "detect-own",
        "configs/demo_mask_rcnn.yaml",
    ),
    ("report", "Put it all on one page", "tools/report.py", "@", "report.html summary.txt", ""),
)
PAGE = {
    "title": "CrossMAE demo: digits in photos",
    "lead": "A masked autoencoder, CrossMAE, learned to reconstruct hidden patches of unlabelled images. Then the same "
    "Mask R-CNN was trained twice on a few of these images with labels: once from the pretrained encoder, and once "
    "from the random weights that pretraining had started from. It outlines handwritten digits in photographs. Digits "
    "and photographs are real. The held-out images share none of them with the training images. Every number was "
    "measured by the commands shown, on the machine described at the end.",
    "arms": {"detect-random": "random weights", "detect-own": "own pretraining"},
    "train": {"json": "data/annotations/few.json", "images": "data/train"},
    "val": {"json": "data/annotations/val.json", "images": "data/val"},
    "worth": {"images": "data/pretrain", "json": "data/annotations/train.json"},
    "neighbours": "the share of grayscale crops whose photograph is found by the encoder's features",
}


def demo_stages(output: Path) -> list[Stage]:
    """List the demo's stages. All stages write only under `output`."""
    stages = []
    for name, title, tool, arguments, outputs, config in STAGES:
        # @ is replaced after the split, because the folder's name may have spaces.
        words = tuple(word.replace("@", str(output)) for word in arguments.split())
        stages.append(Stage(name, title, tool, words, tuple(outputs.split()), PROGRAMS / config if config else None))
    return stages


def main(argv: Sequence[str] | None = None) -> None:
    """Run unfinished stages, then print the table and the page's path."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("outputs/demo"), help="folder (default: %(default)s)")
    parser.add_argument("--fresh", action="store_true", help="run every stage again")
    args = parser.parse_args(argv)
    make_folder(args.output, "--output")
    write_json(args.output / RECORD, {"page": PAGE})
    stages = demo_stages(args.output)
    seconds = run_stages(stages, args.output, total=len(stages), fresh=args.fresh)
    print(f"\n{(args.output / 'summary.txt').read_text('utf-8')}\nAll stages took {format_seconds(seconds)}.")
    print(f"Open this page in a browser: {args.output / 'report.html'}")


if __name__ == "__main__":
    run_cli(main)
