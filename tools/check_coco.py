"""Check a data set in COCO, LVIS or another format before training or evaluation.

    python tools/check_coco.py instances.json IMAGES
    python tools/check_coco.py instances.json IMAGES --evaluation --json report.json
    python tools/check_coco.py instances.json --skip-images
    python tools/check_coco.py data.yaml
    python tools/check_coco.py LABELS IMAGES

LABELS are a data.yaml of YOLO, or a folder with labels of YOLO, Pascal VOC, LabelMe, Roboflow, CVAT, or masks as PNG
files. The format is recognised, and each split is checked. Labels are never changed.

For each kind of fault, the table shows the number of entries, the first entries, and what to do. Training and
evaluation reject labels with errors. Entries with droppable errors can be left out by kind:
DATASETS.DROP="('empty-box',)".

Exit code: 0 no faults (only information), 1 faults, 2 wrong command line or unreadable JSON file.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from crossmae.data.annotations.read import is_coco_path, read_annotations
from crossmae.data.annotations.records import UNSPLIT
from crossmae.data.images import ImageLimits, add_max_pixels
from crossmae.errors import UserError, counted, printable, run_cli
from crossmae.files import check_destination, check_writable, make_folder, write_json
from det.data.coco import describe_moved_images, drop_advice, mask_kind, read_coco, tidy_with_images
from det.data.coco_checks import Finding, find_faults
from det.data.coco_kinds import Rank
from det.data.loose_forms import is_empty
from det.data.tidy import Tidy

FAULTY_EXIT_CODE = 1


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("coco", metavar="JSON | LABELS", type=Path, help="annotations in COCO or another format")
    parser.add_argument("images", metavar="IMAGES", type=Path, nargs="?", help="folder that file names are relative to")
    parser.add_argument(
        "--evaluation", action="store_true", help="also check the keys that AP needs: area, iscrowd, LVIS's keys"
    )
    parser.add_argument("--no-masks", action="store_true", help="do not look at masks, as with MODEL.MASK_ON=False")
    parser.add_argument("--skip-images", action="store_true", help="do not look at the image files")
    add_max_pixels(parser)
    parser.add_argument("--json", metavar="REPORT.json", type=Path, help="also write the findings as JSON")
    return parser


def count(content: dict[str, Any]) -> dict[str, int]:
    """Count images, annotations, categories and mask types."""
    masks = Counter(mask_kind(annotation.get("segmentation")) for annotation in content["annotations"])
    return {
        **{key: len(content[key]) for key in ("images", "annotations", "categories")},
        "crowd regions": sum(annotation.get("iscrowd") == 1 for annotation in content["annotations"]),
        "polygon masks": masks["polygon"],
        "run-length masks": masks["rle"],
        "without mask": masks["none"],
    }


def table(findings: Sequence[Finding]) -> str:
    """Format one block per kind: counts, explanation, first entries."""
    lines = []
    for one in findings:
        lines.append(f"{one.kind.name:24} {one.rank.value:16} {one.counted()}, id {one.ids()}")
        lines.append(f"    {one.kind.meaning}")
        if one.first(1)[0]["note"]:
            lines += [f"      {text}" for text in one.places()]
    return "\n".join(lines)


def advice(tidied: Tidy, findings: Sequence[Finding]) -> str:
    """Summarise the table in one line."""
    faults = [one for one in findings if one.rank is not Rank.INFORMATION]
    if not faults:
        return "no faults"
    droppable = sum(one.rank is Rank.DROPPABLE for one in faults)
    kinds = counted(len(faults), "kind of faults", "kinds of faults")
    return f"{kinds}, {droppable} of them droppable{drop_advice(tidied, findings)}"


def report(labels: Path, images: Path | None, counts: dict[str, int], findings: Sequence[Finding]) -> dict[str, Any]:
    """Convert the findings to JSON values."""
    listed = [
        {
            "kind": one.kind.name,
            "rank": one.rank.value,
            "where": one.kind.where,
            "count": len(one.positions),
            "first": one.first(),
            "meaning": one.kind.meaning,
        }
        for one in findings
    ]
    return {
        "json": str(labels),
        "images": None if images is None else str(images),
        "counts": counts,
        "findings": listed,
    }


def check_arguments(arguments: argparse.Namespace) -> None:
    """Reject contradictory arguments and paths that cannot be read or written."""
    if arguments.skip_images and arguments.images:
        raise UserError(f"--skip-images: {arguments.images} would be ignored. Leave out one of the two.")
    needed = is_coco_path(arguments.coco) and not arguments.skip_images
    if (needed or arguments.images) and not (arguments.images and arguments.images.is_dir()):
        named = f"{arguments.images} is no folder" if arguments.images else "no folder is named"
        raise UserError(f"IMAGES: {named}. Name the folder that the file names are relative to, or pass --skip-images.")
    if arguments.json is not None:
        if arguments.json.resolve() == arguments.coco.resolve():
            raise UserError(f"--json: {arguments.json} is the file to be checked. Name another file for the report.")
        check_destination(arguments.json, force=True)
        check_writable(arguments.json.parent, "--json")


def main(argv: list[str] | None = None) -> None:
    """Check, print, and exit with code 1 if there are faults."""
    arguments = build_parser().parse_args(argv)
    check_arguments(arguments)
    reports: dict[str, dict[str, Any]] = {}
    faults = 0
    for split, (images, content) in read_parts(arguments.coco, arguments.images, arguments.skip_images).items():
        if not content["annotations"] and not arguments.evaluation:
            raise UserError(f"{arguments.coco}: 'annotations' is empty, so it is no training data. Pass --evaluation.")
        # A data set without any masks needs none.
        masks = not arguments.no_masks and not all(is_empty(one.get("segmentation")) for one in content["annotations"])
        tidied = tidy_with_images(content, images, masks)
        counts = count(tidied.content)
        limits = ImageLimits(arguments.max_pixels, "INPUT.MAX_PIXELS, here --max-pixels,", "")
        findings = find_faults(tidied, images, for_evaluation=arguments.evaluation, masks=masks, limits=limits)
        print(f"{split}: " * bool(split) + ", ".join(f"{value} {name}" for name, value in counts.items()))
        moved = describe_moved_images(tidied, images) if images else ""
        print("\n".join(filter(None, (table(findings), moved, advice(tidied, findings)))))
        reports[split] = report(arguments.coco, images, counts, findings)
        faults += sum(one.rank is not Rank.INFORMATION for one in findings)
    if arguments.json is not None:
        make_folder(arguments.json.parent, "--json")
        write_json(arguments.json, reports.get("", reports))
    if faults:
        raise SystemExit(FAULTY_EXIT_CODE)


def read_parts(labels: Path, images: Path | None, skip_images: bool) -> dict[str, tuple[Path | None, dict[str, Any]]]:
    """Read image folder and content of each split.

    Labels without splits have the split "".
    """
    if is_coco_path(labels):
        return {"": (images, read_coco(labels))}
    found = read_annotations(labels, images)
    print("\n".join([f"read as {found.format}", *map(printable, found.remarks)]))
    return {
        "" if name == UNSPLIT else name: (None if skip_images else split.images, split.content)
        for name, split in found.splits.items()
    }


if __name__ == "__main__":
    run_cli(main)
