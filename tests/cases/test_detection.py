"""Proves that every detection case of ../shared/cases ends as the table says: a right result, or one clear line."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("detectron2", reason="detectron2 is not installed: python tools/install_detectron2.py")

from detectron2.data import DatasetCatalog

from crossmae.errors import UserError
from det.data.coco import ground_truth, register_coco
from tests.cases.conftest import Tool, Written
from tools import check_coco

# The case, check_coco's exit code, and a pattern that its output contains.
CHECKED: dict[str, tuple[int, str]] = {
    "sound": (0, "no faults"),
    "iscrowd_float": (0, "no faults"),
    "chinese_names": (0, "no faults"),
    "odd_file_names": (0, "no faults"),
    "jfif_names": (0, "no faults"),
    "polygon_rows_first": (
        1,
        r"misfit-masks +error +8 of 8 annotations[^$]*its mask fits its box with x and y swapped",
    ),
    "polygon_far_away": (1, "mask-outside +droppable error +1 of 8 annotations, id 3\n"),
    "polygon_far_20k": (1, "mask-outside +droppable error +1 of 8 annotations, id 3\n"),
    "nearly_all_crowd": (0, "mostly-crowd .* 7 of 8 annotations.*\n.* set iscrowd 0 for single objects"),
    "crowded_image": (0, "many-objects .*\n.*raise TEST.MAX_DETS and TEST.DETECTIONS_PER_IMAGE\n.*150 objects"),
    # keys that nothing uses, and values with one meaning
    "all_ids_zero": (0, "mended-annotation-id +information +7 of 8"),
    "ids_per_image": (0, "mended-annotation-id +information +6 of 8"),
    "keypoints_pairs": (0, "no faults"),
    "keypoints_text": (0, "no faults"),
    "area_null": (0, "mended-area +information +8 of 8"),
    "iscrowd_null": (0, "mended-flag +information +8 of 8"),
    "iscrowd_false": (0, "mended-flag +information +8 of 8"),
    "size_zero": (0, "size-from-file +information +4 of 4"),
    "size_float": (0, "mended-size +information +4 of 4"),
    "image_ids_text": (0, r"mended-image-id +information +4 of 4 images, id 'img1'"),
    "rle_in_list": (0, "mended-mask +information +8 of 8"),
    "counts_repr_bytes": (0, "mended-mask +information +8 of 8"),
    "points_as_pairs": (0, "mended-mask +information +8 of 8"),
    "box_only_with_flat_segmentation": (0, "mended-mask +information +8 of 8"),
    "empty_polygon_box_only": (0, "8 without mask(.|\n)*no faults"),
    "boxes_without_bbox": (0, "box-from-mask +information +8 of 8"),
    "root_category": (0, "root-category +information +1 of 3"),
    "root_category_same_name": (0, "root-category +information +1 of 2"),
    "empty_val": (0, "0 annotations(.|\n)*no faults"),
    # names
    "backslashes": (0, r"4 of 4 are there as set1/1\.png: separators of Windows"),
    "other_case": (0, r"4 of 4 are there as 1\.jpg: upper and lower case"),
    "folder_twice": (0, r"4 of 4 are there as 1\.png: the folder images is named again"),
    "url_quoted": (0, r"4 of 4 are there as my photo 1\.png: quoted as in a URL"),
    "names_decomposed": (0, "composed or decomposed letters"),
    # encodings
    "bom": (0, "no faults"),
    "utf16": (
        2,
        r"coco\.json: is UTF-16 text, not UTF-8\. Convert it: iconv -f UTF-16 -t UTF-8 coco\.json > \S+\.json",
    ),
    "gz": (2, r"coco\.json: is compressed with gzip, not text\. Unpack it: gunzip -k coco\.json"),
    "gbk": (
        2,
        r"coco\.json: line 1 is not UTF-8: '苹果' in GB18030 .* Convert it: iconv -f GB18030 -t UTF-8 coco\.json",
    ),
}
# Cases whose training records are those of the sound file, and with MODEL.MASK_ON False.
SAME_RECORDS = (
    "all_ids_zero", "ids_per_image", "keypoints_pairs", "keypoints_text", "area_null", "iscrowd_null", "iscrowd_float",
    "size_zero", "size_float", "image_ids_text", "points_as_pairs", "boxes_without_bbox", "root_category", "bom",
    "box_only_with_flat_segmentation",
)  # fmt: skip
SAME_BOXES = ("rle_in_list", "counts_repr_bytes", "empty_polygon_box_only", *SAME_RECORDS)


@pytest.mark.parametrize("case", CHECKED)
def test_what_the_checker_says(case: str, written: Written, tool: Tool) -> None:
    code, pattern = CHECKED[case]
    folder: Path = written("detection/generate.py", *CHECKED) / case
    found, output = tool(check_coco.main, folder / "coco.json", folder / "images", "--evaluation")
    assert found == code, output
    assert re.search(pattern, output), output


def records(folder: Path, masks: bool) -> list[dict[str, Any]]:
    """Register a case for training and for evaluation, and return its records without the folder."""
    for for_evaluation in (False, True):
        register_coco("case", folder / "coco.json", folder / "images", masks=masks, for_evaluation=for_evaluation)
    found = DatasetCatalog.get("case")
    return [{**record, "file_name": Path(record["file_name"]).name} for record in found]


@pytest.mark.parametrize(
    ("case", "masks"), [*((case, True) for case in SAME_RECORDS), *((case, False) for case in SAME_BOXES)]
)
def test_a_repaired_file_trains_like_the_sound_one(case: str, masks: bool, written: Written) -> None:
    folder = written("detection/generate.py", *CHECKED)
    assert records(folder / case, masks) == records(folder / "sound", masks)


def test_a_file_without_annotations_is_for_evaluation_only(written: Written) -> None:
    folder = written("detection/generate.py", *CHECKED) / "empty_val"
    with pytest.raises(UserError, match="'annotations' is empty"):
        register_coco("case", folder / "coco.json", folder / "images", masks=True)
    register_coco("case", folder / "coco.json", folder / "images", masks=True, for_evaluation=True)
    assert ground_truth("case")["annotations"] == []
