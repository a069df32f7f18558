"""Draw the training images of a detector, as the model receives them, on one sheet.

    python tools/visualize_data.py --config-file coco_mask_rcnn.yaml --train-json TRAIN.json --train-images IMAGES
    python tools/visualize_data.py --config-file coco_mask_rcnn.yaml --num-images 36 INPUT.COPY_PASTE.ENABLED=True

Boxes, masks and classes are drawn. The images come from the loader of tools/train_net.py. With the same config, data
and SEED, they are the first images of the run, for any number of GPUs. The grey-brown area around an image is the
padding of the batch: the mean pixel.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from yacs.config import CfgNode

from crossmae.checkpoints.metadata import safetensors_metadata
from crossmae.checkpoints.reading import weights_file
from crossmae.errors import UserError, counted, printable, run_cli
from crossmae.files import check_writable, make_folder, write_atomically
from crossmae.models.class_names import pair_names, start_notes
from det.classes import recorded_classes
from det.config import load_det_config
from det.data.coco import check_registered, use_own_data
from det.training.console import set_up_console

log = logging.getLogger("det.visualize_data")

CELL = 448  # pixels of an image's longer side on the sheet
LETTERS = 0.035  # height of label letters divided by the longer side
FORMATS = {".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg"}
JPEG_QUALITY = 92


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config-file", required=True, metavar="NAME", help="a YAML file, or its name under configs/")
    parser.add_argument("--train-json", metavar="FILE", help="train annotations in COCO format")
    parser.add_argument("--train-images", metavar="DIR", help="folder of the images that --train-json names")
    parser.add_argument("--num-images", type=int, default=16, metavar="N", help="number of images (%(default)s)")
    parser.add_argument(
        "--output", type=Path, default=Path("outputs/training_data.png"), metavar="FILE", help=".png or .jpg to write"
    )
    parser.add_argument("overrides", nargs="*", metavar="KEY VALUE | KEY=VALUE", help="replace settings of the file")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Load the images, and draw them on one contact sheet."""
    args = build_parser().parse_intermixed_args(argv)
    set_up_console()
    if args.num_images < 1:
        raise UserError(f"--num-images {args.num_images} is too small. Use a number from 1.")
    if (args.train_json is None) != (args.train_images is None):
        raise UserError("--train-json and --train-images belong together. Give both or none.")
    if args.output.suffix.lower() not in FORMATS:
        raise UserError(f"--output {args.output} is no picture. Use a name that ends in {', '.join(FORMATS)}.")
    if args.output.is_dir():
        raise UserError(f"--output {args.output}: is a folder. Name a file in it.")
    check_writable(args.output.parent, "--output")
    cfg = load_det_config(args.config_file, args.overrides)

    # Imported after the arguments, because these imports take seconds.
    from detectron2.data import MetadataCatalog

    from det.inference.draw import draw_sheet

    use_own_data(cfg, (args.train_json, args.train_images) if args.train_json else None, None)
    check_registered(cfg.DATASETS.TRAIN, "DATASETS.TRAIN", "training data")
    samples = list(islice(padded_samples(cfg), args.num_images))
    names = MetadataCatalog.get(cfg.DATASETS.TRAIN[0]).thing_classes
    compare_with_start(cfg.MODEL.WEIGHTS, names)
    pictures = [draw_sample(pixels, sample, names) for pixels, sample in samples]
    captions = [caption(sample, pixels) for pixels, sample in samples]
    make_folder(args.output.parent, "--output")
    sheet = Image.fromarray(draw_sheet(pictures, captions))
    form = FORMATS[args.output.suffix.lower()]
    write_atomically(args.output, lambda temporary: sheet.save(temporary, format=form, quality=JPEG_QUALITY))
    print(f"the first {counted(len(samples), 'training image')}: {printable(args.output)}")


def compare_with_start(weights: str, names: Sequence[str]) -> None:
    """Log how the classes differ from a detector that training starts from."""
    file = weights_file(Path(weights)) if weights else None
    if file and (recorded := recorded_classes(file, safetensors_metadata(file))) is not None:
        for note in start_notes(pair_names(names, recorded.names)):
            log.warning("MODEL.WEIGHTS: %s: %s", weights, note)


def padded_samples(cfg: CfgNode) -> Iterator[tuple[NDArray[np.uint8], dict[str, Any]]]:
    """Yield padded images (H, W, 3) and their samples in training order."""
    import torch
    from detectron2.modeling import build_backbone
    from detectron2.structures import ImageList

    from det.data.loader import build_train_loader, refuse_unreadable, training_records, training_samples

    with torch.device("meta"):  # build the model without memory for weights
        backbone = build_backbone(cfg)
    mean = torch.tensor(cfg.MODEL.PIXEL_MEAN).view(-1, 1, 1)
    records, _ = training_records(cfg)
    solver, samples, workers = cfg.SOLVER, training_samples(cfg, records), cfg.DATALOADER.NUM_WORKERS
    steps = range(solver.MAX_ITER)
    for batch in build_train_loader(samples, solver.IMS_PER_BATCH, steps, parts=solver.ACCUMULATE, workers=workers):
        # Equal to the model's padding: it subtracts the mean and pads with 0, so padding is the mean.
        images = [sample["image"] - mean for sample in refuse_unreadable(batch)]
        padded = ImageList.from_tensors(images, backbone.size_divisibility, 0.0, backbone.padding_constraints)
        for image, sample in zip((padded.tensor + mean).round().byte(), batch, strict=True):
            pixels = image.permute(1, 2, 0).numpy()
            yield np.ascontiguousarray(pixels if cfg.INPUT.FORMAT == "RGB" else pixels[:, :, ::-1]), sample


def draw_sample(pixels: NDArray[np.uint8], sample: dict[str, Any], names: Sequence[str]) -> NDArray[np.uint8]:
    """Draw a sample's objects on its padded image (H, W, 3)."""
    from det.inference.draw import draw_instances, instances_from_detectron2

    padding = [(0, padded - side) for padded, side in zip(pixels.shape, sample["image"].shape[1:], strict=False)]
    instances = [
        instance if instance.mask is None else replace(instance, mask=np.pad(instance.mask, padding))
        for instance in instances_from_detectron2(sample["instances"], names)
    ]
    return draw_instances(pixels, instances, longest_side=CELL, letters=LETTERS)


def caption(sample: dict[str, Any], pixels: NDArray[np.uint8]) -> str:
    """Format the file's name, the number of objects, and the three sizes."""
    sizes = [(sample["width"], sample["height"]), sample["image"].shape[:0:-1], pixels.shape[1::-1]]
    given, augmented, padded = (f"{width} x {height}" for width, height in sizes)
    counted = f"{printable(Path(sample['file_name']).name)}, objects: {len(sample['instances'])}"
    return f"{counted}\n{given}, augmented {augmented}, padded {padded}"


if __name__ == "__main__":
    run_cli(main)
