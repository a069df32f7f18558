"""Kinds of faults of data sets in COCO format: names, ranks and advice.

Reports, `tools/check_coco.py` and `DATASETS.DROP` use these names.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Rank(Enum):
    """Severity of a kind of fault."""

    ERROR = "error"  # training would stop, or give wrong results
    DROPPABLE = "droppable error"  # an error whose entries DATASETS.DROP can leave out
    INFORMATION = "information"  # correct, but worth knowing


@dataclass(frozen=True)
class Kind:
    """A kind of fault in the list `where`, with a short explanation or advice."""

    name: str
    rank: Rank
    where: str
    meaning: str


_TABLE: dict[tuple[str, Rank], dict[str, str]] = {
    ("categories", Rank.ERROR): {
        "bad-category": "a key is missing, of the wrong type or out of range: repair it",
        "duplicate-category-id": "an earlier category has the same id: give each another id",
        "duplicate-category-name": "an earlier category has the same name: merge or rename them",
        "missing-frequency": "evaluation by LVIS's rules needs 'frequency': add 'r' (rare), 'c' (common) or 'f' "
        "(frequent)",
    },
    ("categories", Rank.INFORMATION): {
        "category-id-gaps": "ids are not 1, 2, 3, ... in a row, which is fine: classes are numbered by rising id",
        "zero-category-id": "the id is 0, which is fine: it is an ordinary category, not the background",
        "untidy-category-name": "spaces around the name, or characters that do not print, look like another name",
        "unused-category": "no annotation is of this category",
        "root-category": "it names the group of the others, or repeats another category: it becomes no class",
        "mended-category-id": "the id is no number of COCO's format: another number stands for it, and results have it",
        "mended-category-name": "the name is a number: it is read as text",
    },
    ("images", Rank.ERROR): {
        "bad-image": "a key is missing, of the wrong type or out of range: repair it",
        "duplicate-image-id": "an earlier image has the same id: give each another id",
        "duplicate-file-name": "an earlier image has the same file: merge their annotations",
        "missing-lvis-key": "evaluation by LVIS's rules needs the lists 'neg_category_ids' and "
        "'not_exhaustive_category_ids': add them, or remove both from all images to evaluate by COCO's rules",
        "unsafe-path": "name files relative to the image folder, without '..'",
    },
    ("images", Rank.DROPPABLE): {
        "missing-image": "not in the image folder: add the file, or name the right folder",
        "broken-image": "cannot be read as an image: repair or remove what is broken",
        "too-large-image": "more pixels than INPUT.MAX_PIXELS: raise that key, or make image and annotations smaller",
        "swapped-size": "width and height are swapped against the file: swap them back",
        "exif-orientation": "the size is right only before the turn by the EXIF orientation, which training applies: "
        "annotate the turned image, or remove the orientation from the file",
        "size-mismatch": "the file has another size: annotations may belong to another version of the image",
    },
    ("images", Rank.INFORMATION): {
        "exif-turned": "turned by its EXIF orientation when read: boxes and masks have to fit the turned image",
        "zero-image-id": "the id is 0, which is fine",
        "many-objects": "more objects of a class than COCO's AP counts (100 per image): raise TEST.MAX_DETS and "
        "TEST.DETECTIONS_PER_IMAGE",
        "image-without-annotations": "left out in training unless DATALOADER.FILTER_EMPTY_ANNOTATIONS is False",
        "mended-image-id": "the id is no number of COCO's format: another number stands for it, and results have it",
        "moved-image": "the name is written in another way than the name of the only file that fits",
        "mended-size": "width or height is no whole number, and is read as such",
        "size-from-file": "width or height is 0, missing or no number: the size of the file is used",
    },
    ("annotations", Rank.ERROR): {
        "shifted-category-id": "some category_ids are not in 'categories', but all are when moved by one, so that each "
        "object has a wrong class: correct all of them",
        "corner-boxes": "boxes seem to be [x1, y1, x2, y2]: convert all of them to [x, y, width, height]",
        "misfit-masks": "masks and boxes do not fit: convert all masks as said, or all boxes if the boxes are wrong",
        "misfit-boxes": "boxes do not fit: convert all boxes as said, and masks that were written in the same way; "
        "if nothing fits, find the images that they were written for",
    },
    ("annotations", Rank.DROPPABLE): {
        "bad-annotation": "a key is missing, of the wrong type or out of range: repair it",
        "unknown-image": "image_id is not in 'images': repair or remove it",
        "unknown-category": "category_id is not in 'categories': repair or remove it",
        "ignore-flag": "'ignore' is not supported: remove the annotation, or mark a region of many objects as iscrowd",
        "not-finite": "NaN or infinite numbers in bbox, segmentation or area: repair or remove it",
        "empty-box": "the box has no width or no height: repair or remove it",
        "box-outside": "the whole box is outside the image: repair or remove it",
        "mask-outside": "the mask is outside the image, or one of its points is far away: repair it",
        "mask-off-box": "the mask is not where its box is, as if it were of another object: repair one of them",
        "missing-mask": "no 'segmentation': add masks or set MODEL.MASK_ON False",
        "bad-mask": "segmentation is neither a list of polygons nor run lengths: repair or remove it",
        "degenerate-polygon": "a polygon of fewer than 3 points, of an odd number of numbers or without area: remove "
        "it (DATASETS.DROP leaves out the polygon, and an annotation without another polygon)",
        "rle-size": "the size of the run lengths is not [height, width] of the image: encode the mask again",
        "rle-counts": "impossible run lengths: encode the mask again",
        "empty-mask": "the run lengths cover no pixel: repair or remove it",
    },
    ("annotations", Rank.INFORMATION): {
        "mostly-crowd": "most annotations are crowd regions (iscrowd 1), which training ignores: set iscrowd 0 "
        "for single objects",
        "boxes-in-corner": "all boxes are in the upper left part of their images: check that they are for this size",
        "crowd": "a region of many objects: ignored in training, and in evaluation as COCO does",
        "box-over-edge": "a part of the box is outside the image: training cuts it off",
        "area-mismatch": "'area' is far from the area of the mask: evaluation finds small and large objects by it",
        "zero-annotation-id": "the id is 0: evaluation gives it another id, because pycocotools takes 0 for no object",
        "mended-annotation-id": "the id is missing, no number, or taken: another one, which changes no result, is used",
        "mended-reference": "image_id or category_id is written in another way than the id, or is a name",
        "mended-flag": "iscrowd or ignore is null, missing, true, false or text, and is read as 0 or 1",
        "mended-area": "the area is missing, 0 or text: it is read, or measured on the mask or the box",
        "mended-box": "the box is text, has keys, or a negative width or height: it is read as [x, y, width, height]",
        "box-from-mask": "there is no box, or it has no width or no height: the box of the mask is used",
        "mended-mask": "points, numbers or run lengths in another form, which are read",
    },
}
KINDS = {
    name: Kind(name, rank, where, meaning) for (where, rank), kinds in _TABLE.items() for name, meaning in kinds.items()
}
DROPPABLE = tuple(name for name, kind in KINDS.items() if kind.rank is Rank.DROPPABLE)
WARNINGS = ("mostly-crowd", "boxes-in-corner")  # information with a line of its own in the log
FREQUENCIES = "rcf"  # LVIS: a rare, common or frequent category, by its number of training images
# Only information if nothing is evaluated.
EVALUATION_KINDS = frozenset(("missing-lvis-key", "missing-frequency"))
# Advised to leave out, because such entries are useless. Other entries have objects, which would become background.
USELESS = {"missing-image", "broken-image", "unknown-image", "unknown-category", "empty-box", "box-outside"}
USELESS |= {"degenerate-polygon"}
