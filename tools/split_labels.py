"""Split labels of any tool into training and validation, as COCO files.

    python tools/split_labels.py LABELS --images IMAGES --output OUT
    python tools/split_labels.py data.yaml --output OUT
    python tools/split_labels.py LABELS --images IMAGES --output OUT --val 0.1 --by-folder --seed 1

LABELS are a COCO json, a data.yaml of YOLO, or a folder with labels of YOLO, Pascal VOC, LabelMe, Roboflow, CVAT, or
masks as PNG files. A mask has the name of its image and a value per object: masks/a.png, or masks/CLASS/a.png. A folder
that the images have, too, is no class (docs/data.md). The format is recognised. An image without a label file is
unlabelled, and on no side (for YOLO, see docs/data.md). Every class keeps its share on both sides, and images with the
same bytes stay on one side. Labels that already have splits keep them. Written into --output:
    train.json, val.json    COCO files with names relative to the image folder; test.json if LABELS have it
    split.json              the format, the image folder of each file, counts, classes and the seed;
                            with --by-folder also the held-out folders
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from crossmae.data.annotations.read import read_annotations
from crossmae.data.annotations.records import UNSPLIT, AnnotationSet, common_folder, write_content
from crossmae.data.annotations.split import (
    HELD_OUT_FOLDERS,
    folder_of,
    id_key,
    image_key,
    join,
    rebase,
    split_images,
)
from crossmae.errors import UserError, advise, counted, printable, run_cli, set_up_log, shorten
from crossmae.files import check_writable, make_folder, write_json

RECORD = "split.json"
BY_FOLDER = "keep each folder on one side: frames of a video, tiles of a picture, pictures of a patient, site or plate"
DEFAULT_VAL = 0.2
Contents = dict[str, tuple[Path, dict[str, Any]]]


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("labels", type=Path, metavar="LABELS", help="labels of any known format")
    add("--images", type=Path, help="folder of the images (default: where LABELS say, or near LABELS)")
    add("--output", type=Path, required=True, metavar="OUT", help="folder to write")
    add("--val", type=float, metavar="SHARE", help=f"share of the images for validation (default: {DEFAULT_VAL:g})")
    add("--by-folder", action="store_true", help=BY_FOLDER)
    add("--seed", type=int, default=0, metavar="N", help="another seed gives another split (default: 0)")
    add("--again", action="store_true", help="split again if LABELS have splits; a test split stays")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Read the labels, split them, write and summarise."""
    arguments = build_parser().parse_args(argv)
    set_up_log()
    val = DEFAULT_VAL if arguments.val is None else arguments.val
    if not 0 < val < 1:
        raise UserError(f"--val: {val:g} is no share. Give a number between 0 and 1, such as {DEFAULT_VAL:g}.")
    if arguments.seed < 0:
        raise UserError(f"--seed: {arguments.seed} is negative. Give a number from 0.")
    check_output(arguments.output, arguments.labels)
    found = read_annotations(arguments.labels, arguments.images)
    folders: list[str] = []
    for remark in found.remarks:
        print(f"{printable(arguments.labels)}: {printable(remark)}")
    if found.has_splits and not arguments.again:
        kept = keep_splits(found, arguments.images)
        ignored = [f"--val {val:g}"] * (arguments.val is not None) + ["--by-folder"] * arguments.by_folder
        effect = f", and {' and '.join(ignored)} has no effect" if ignored else ""
        again = "To split again: python tools/split_labels.py LABELS --again --output OUT, and name OUT as the labels."
        print(advise(f"{found.format}: the labels have splits, which are kept{effect}. {again}"))
    else:
        try:
            kept = split_again(found, arguments.images, val, arguments.seed, arguments.by_folder)
        except UserError as error:
            raise UserError(f"{arguments.labels}: {error.args[0]}") from None
        if arguments.by_folder:
            folders = sorted({folder_of(image_key(entry)[0]) or "." for entry in kept["val"][1]["images"]})
    held_out = {HELD_OUT_FOLDERS: folders} if folders else {}
    write(arguments.output, found, kept, {"seed": arguments.seed} | held_out)
    if folders:
        print(f"held out: {shorten([printable(name) for name in folders])}")


def check_output(output: Path, labels: Path) -> None:
    """Reject an output folder with other files, or in the labels."""
    if labels.is_dir() and output.resolve().is_relative_to(labels.resolve()):
        raise UserError(f"--output: {output} is in {labels}, so the next call would read it. Name another folder.")
    names = [name for name in ("train.json", "val.json", "test.json") if (output / name).exists()]
    if names and not (output / RECORD).is_file():
        raise UserError(f"--output: {output / names[0]} exists, and is of no earlier split. Name another folder.")
    if output.is_dir():
        check_writable(output, "--output")


def keep_splits(found: AnnotationSet, images: Path | None) -> Contents:
    """Return image folder and content of each split of the labels."""
    return {
        name: (images, rebase(split, images)) if images else (split.images, split.content)
        for name, split in found.splits.items()
    }


def split_again(found: AnnotationSet, images: Path | None, val: float, seed: int, by_folder: bool) -> Contents:
    """Split the images of train and validation. A test split stays."""
    parts = {name: split for name, split in found.splits.items() if name != "test"}
    folder = images or common_folder([str(split.images / "x") for split in parts.values()])
    contents = [rebase(split, folder) for split in parts.values()]
    whole = contents[0] if UNSPLIT in parts else join(contents)
    sides: Contents = {
        side: (folder, content) for side, content in split_images(whole, folder, val, seed, by_folder).items()
    }
    if "test" in found.splits:
        sides |= keep_splits(AnnotationSet(found.format, {"test": found.splits["test"]}, []), images)
    return sides


def write(output: Path, found: AnnotationSet, contents: Contents, choices: Mapping[str, Any]) -> None:
    """Write COCO files and record, and print a line per split.

    Args:
        choices: seed and held-out folders, for the record.
    """
    make_folder(output, "--output")
    counts = {name: count(content) for name, (_, content) in contents.items()}
    categories = [one for _, content in contents.values() for one in content["categories"]]
    classes = list(dict.fromkeys(str(one.get("name")) for one in categories))
    for name in ("train", "val", "test"):
        if name not in contents:
            (output / f"{name}.json").unlink(missing_ok=True)  # of an earlier split
            continue
        folder, content = contents[name]
        path = output / f"{name}.json"
        write_content(path, content)
        own = counts[name]
        numbers = f"{counted(own['images'], 'image')} ({own['empty']:,} without objects)"
        kinds = f"{own['classes']:,} of {counted(len(classes), 'class')}"
        print(f"{name:5} {numbers}, {counted(own['objects'], 'object')}, {kinds}: {path}, images in {folder}")
    record = {
        "format": found.format,
        "images": {name: str(folder.absolute()) for name, (folder, _) in contents.items()},
        "counts": counts,
        "classes": classes,
        **choices,
    }
    write_json(output / RECORD, record)


def count(content: Mapping[str, Any]) -> dict[str, int]:
    """Count images, images without objects, objects, and classes with objects."""
    objects = Counter(id_key(annotation.get("image_id")) for annotation in content["annotations"])
    return {
        "images": len(content["images"]),
        "empty": sum(id_key(entry.get("id")) not in objects for entry in content["images"]),
        "objects": objects.total(),
        "classes": len({id_key(annotation.get("category_id")) for annotation in content["annotations"]}),
    }


if __name__ == "__main__":
    run_cli(main)
