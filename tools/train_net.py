"""Train or evaluate a detector with a CrossMAE encoder.

CPU, for a short test (2 iterations of one image):
    python tools/train_net.py --config-file coco_mask_rcnn.yaml --train-json TRAIN.json --train-images IMAGES \\
        MODEL.WEIGHTS=WEIGHTS OUTPUT_DIR=OUT SOLVER.MAX_ITER=2 SOLVER.IMS_PER_BATCH=1
One GPU, your own data in COCO format:
    python tools/train_net.py --config-file coco_mask_rcnn.yaml --train-json TRAIN.json --train-images IMAGES \\
        --val-json VAL.json --val-images IMAGES MODEL.WEIGHTS=WEIGHTS OUTPUT_DIR=OUT SOLVER.IMS_PER_BATCH=4
The same with labels of YOLO, Pascal VOC, LabelMe or CVAT: a data.yaml or a folder, converted into OUT/labels:
    python tools/train_net.py --config-file coco_mask_rcnn.yaml --train-json data.yaml --val-json data.yaml \\
        MODEL.WEIGHTS=WEIGHTS OUTPUT_DIR=OUT
Eight GPUs, COCO 2017 in $DETECTRON2_DATASETS/coco; torchrun does the same, also on several machines:
    python tools/train_net.py --config-file coco_mask_rcnn.yaml --num-gpus 8 MODEL.WEIGHTS=WEIGHTS OUTPUT_DIR=OUT
The same command with --resume continues from the last checkpoint. With --eval-only MODEL.WEIGHTS=OUT,
it evaluates. Settings follow as KEY VALUE or KEY=VALUE.
"""

from __future__ import annotations

import argparse
import logging
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn

from crossmae.data.annotations.read import coco_file, is_coco_path
from crossmae.errors import UserError, named_by, run_cli
from det.config import load_det_config
from det.training.console import set_up_console

log = logging.getLogger("det.train_net")
Labelled = tuple[str, str | None]  # labels, and the folder of their images


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config-file", required=True, metavar="NAME", help="a YAML file, or its name under configs/")
    parser.add_argument("--num-gpus", type=int, default=1, metavar="N", help="processes, one per GPU (default 1)")
    parser.add_argument("--eval-only", action="store_true", help="evaluate MODEL.WEIGHTS, do not train")
    parser.add_argument("--resume", action="store_true", help="continue from the last checkpoint in OUTPUT_DIR")
    for split in ("train", "val"):
        parser.add_argument(f"--{split}-json", metavar="LABELS", help=f"{split} annotations in COCO or another format")
        parser.add_argument(f"--{split}-images", metavar="DIR", help=f"folder of the images that --{split}-json names")
    parser.add_argument("overrides", nargs="*", metavar="KEY VALUE | KEY=VALUE", help="replace settings of the file")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Parse the command line and start one process per GPU."""
    arguments = build_parser().parse_intermixed_args(argv)
    set_up_console()
    own_data = tuple(_pair(arguments, split) for split in ("train", "val"))
    if arguments.eval_only and arguments.resume:
        raise UserError("--eval-only and --resume contradict each other. Evaluate, or continue the training.")
    if arguments.eval_only and own_data[0] is not None:
        log.info("--eval-only: --train-json is ignored")
    cfg = load_det_config(arguments.config_file, arguments.overrides)

    # Imported after the arguments, because these imports take seconds.
    import torch

    from det.data.coco import use_own_data
    from det.evaluation.evaluate import format_results
    from det.training.train import evaluate_only, train

    gpus = torch.cuda.device_count()
    if arguments.num_gpus < 1 or (arguments.num_gpus > 1 and arguments.num_gpus > gpus):
        raise UserError(
            f"--num-gpus {arguments.num_gpus}: this machine has {gpus} GPUs. Use at most so many, or 1 without a GPU."
        )
    if arguments.num_gpus > 1 and "RANK" not in os.environ:
        start_processes(arguments.num_gpus, sys.argv[1:] if argv is None else argv)
    train_data, val_data = own_data
    pairs = {"train": None if arguments.eval_only else train_data, "val": val_data}
    use_own_data(cfg, *read_labels(pairs, Path(cfg.OUTPUT_DIR) / "labels"))
    results = evaluate_only(cfg) if arguments.eval_only else train(cfg, arguments.resume)
    if results:
        print(format_results(results))


def start_processes(number: int, words: list[str]) -> NoReturn:
    """Become torchrun, which starts this tool in so many processes."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={number}"]
    command = [sys.executable, *torchrun, str(Path(__file__).resolve()), *words]
    if os.name == "nt":  # a process of Windows cannot become another one
        raise SystemExit(subprocess.run(command, check=False).returncode)
    os.execv(sys.executable, command)


def _pair(arguments: argparse.Namespace, split: str) -> Labelled | None:
    labels, images = getattr(arguments, f"{split}_json"), getattr(arguments, f"{split}_images")
    if (labels is None and images is not None) or (
        images is None and labels is not None and is_coco_path(Path(labels))
    ):
        raise UserError(f"--{split}-json and --{split}-images belong together. Give both or none.")
    return None if labels is None else (labels, images)


def read_labels(pairs: Mapping[str, Labelled | None], folder: Path) -> list[tuple[str, str] | None]:
    """Return a COCO json and an image folder for each pair.

    Labels in another format are written to `folder` in COCO format.
    """
    shared = len({Path(pair[0]).resolve() for pair in pairs.values() if pair}) < sum(map(bool, pairs.values()))
    found: list[tuple[str, str] | None] = []
    for split, pair in pairs.items():
        if pair is not None and not is_coco_path(Path(pair[0])):
            labels, images = Path(pair[0]), Path(pair[1]) if pair[1] else None
            with named_by(f"--{split}-json", labels):
                paths = coco_file(labels, images, split, folder / f"{split}.json", shared=shared, log=log.info)
            pair = (str(paths[0]), str(paths[1]))
        found.append(pair and (pair[0], str(pair[1])))
    return found


if __name__ == "__main__":
    run_cli(main)
