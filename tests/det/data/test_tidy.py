"""Proves that odd COCO content becomes the same as sound content where it has one meaning, and is left alone elsewhere.

Every odd spelling must give exactly the content of the file without oddities, and a note of its kind at its position.
"""

from __future__ import annotations

import copy
import json
from typing import Any

import numpy as np
import pytest

pytest.importorskip("detectron2", reason="detectron2 is not installed: python tools/install_detectron2.py")

from det.data.tidy import READ_KEYS, Tidy, tidy
from tests.det.coco_files import annotation

Content = dict[str, Any]
POLYGON = [8, 8, 32, 8, 32, 24, 8, 24]
PAIRS = [[8, 8], [32, 8], [32, 24], [8, 24]]
RLE = annotation(1, 1, 1)["segmentation"]


def content(kind: str = "polygon") -> Content:
    """Two images with two objects each; the first object of the first image has the polygon `POLYGON`, or `RLE`."""
    return {
        "images": [{"id": n, "file_name": f"{n}.png", "width": 64, "height": 64} for n in (1, 2)],
        "annotations": [
            annotation(index, 1 + index // 3, category, kind=kind) for index, category in enumerate((1, 3, 1, 3), 1)
        ],
        "categories": [{"id": 1, "name": "a"}, {"id": 3, "name": "b"}],
    }


def mend(odd: Content, masks: bool = True, **options: Any) -> Tidy:
    before = copy.deepcopy(odd)
    found = tidy(odd, masks=masks, **options)
    assert odd == before  # what was given is never changed
    return found


def assert_same(found: Tidy, wanted: Content) -> None:
    for where, keys in READ_KEYS.items():
        listed = [{key: entry[key] for key in entry if key in keys} for entry in found.content[where]]
        assert listed == wanted[where], where
        types = [{key: type(value) for key, value in entry.items() if key in ("id", "iscrowd")} for entry in listed]
        assert all(kinds == dict.fromkeys(kinds, int) for kinds in types)


@pytest.mark.parametrize("kind", ["polygon", "rle"])
def test_sound_content_passes_untouched(kind: str) -> None:
    sound = content(kind)
    sound["annotations"][0] |= {"keypoints": "10,12,2", "attributes": {"a": [[]]}, "ignore": 0}
    found = mend(sound)
    assert found.content == sound
    assert all(found.content[where] is sound[where] for where in ("images", "annotations"))
    assert (found.mended, found.sound, found.left_out) == ({}, True, frozenset())
    assert not any(found.written.values())


def test_masks_that_are_not_read_are_gone_and_not_judged() -> None:
    odd = content()
    odd["annotations"][0]["segmentation"] = "mask.png"
    found = mend(odd, masks=False)
    assert found.sound
    assert not any("segmentation" in entry for entry in found.content["annotations"])
    assert not mend(odd).sound


AREAS: list[Any] = [None, "384", "384.0", 0, float("nan"), "", []]
ODD_VALUES: list[tuple[str, dict[str, Any], str]] = [
    *(
        ("annotations", {"iscrowd": flag}, "mended-flag")
        for flag in (None, False, 0.0, "0", "false", "", "None", float("nan"), "0.0", [])
    ),
    *(("annotations", {"iscrowd": 0, "ignore": flag}, "mended-flag") for flag in (None, "0", "false", "")),
    *(("annotations", {"area": size}, "mended-area") for size in AREAS),
    *(
        ("annotations", {"bbox": box}, "mended-box")
        for box in (
            ["8", "8.0", 24, "16"],
            "[8, 8, 24, 16]",
            "8,8,24,16",
            "8 8 24 16",
            "(8, 8, 24, 16)",
            "array([ 8.,  8., 24., 16.], dtype=float32)",
            "[np.float64(8.0), np.float64(8.0), np.float64(24.0), np.float64(16.0)]",
            ["np.float64(8.0)", 8, 24, 16],
            [[8, 8, 24, 16]],
            {"x": 8, "y": 8, "width": 24, "height": 16},
            {"X": "8", "Y": 8, "W": 24, "H": 16},
            {"xmin": 8, "ymin": 8, "xmax": 32, "ymax": 24},
            {"x1": 8, "y1": 8, "x2": 32, "y2": 24},
            {"left": 8, "top": 8, "width": 24, "height": 16},
        )
    ),
    *(
        ("annotations", {"bbox": box}, "box-from-mask")
        for box in ([], None, "", "[]", [None] * 4, [0, 0, 0, 0], [8, 8, 0, 16], [float("nan")] * 4)
    ),
    *(
        ("annotations", {"segmentation": mask}, "mended-mask")
        for mask in (
            POLYGON,
            [[POLYGON]],
            PAIRS,
            [PAIRS],
            [[PAIRS]],
            [[[pair] for pair in PAIRS]],  # OpenCV's contours
            [[pair] for pair in PAIRS],
            [{"x": x, "y": y} for x, y in PAIRS],
            [[{"x": x, "y": y} for x, y in PAIRS]],
            [[str(number) for number in POLYGON]],
            [POLYGON, []],
            [POLYGON, None],
            json.dumps([POLYGON]),
            str([tuple(POLYGON)]),
            [json.dumps(POLYGON)],
            "8,8 32,8 32,24 8,24",
            [["8,8", "32,8", "32,24", "8,24"]],
            [f"array({POLYGON})"],
            "POLYGON((8 8, 32 8, 32 24, 8 24))",
            ["SRID=4326;multipolygon ( ( (8 8, 32 8, 32 24, 8 24) ) )"],
            "8 8; 32 8; 32 24; 8 24",
            "[[ 8  8]\n [32  8]\n [32 24]\n [ 8 24]]",
            [POLYGON[::2], POLYGON[1::2]],  # all x, then all y
        )
    ),
    *(("annotations", {"image_id": value}, "mended-reference") for value in ("1", 1.0, "1.0", "1.png")),
    *(("annotations", {"category_id": value}, "mended-reference") for value in ("1", 1.0, "a")),
    *(("images", {"width": side}, "mended-size") for side in (64.0, "64", "64.0")),
    ("categories", {"id": "1"}, "mended-category-id"),
    ("categories", {"id": 1.0}, "mended-category-id"),
    ("images", {"id": "1"}, "mended-image-id"),
    ("images", {"id": 1.0}, "mended-image-id"),
]


@pytest.mark.parametrize(("where", "values", "kind"), ODD_VALUES, ids=str)
def test_an_odd_value_is_read_as_the_sound_one(where: str, values: dict[str, Any], kind: str) -> None:
    odd = content()
    odd[where][0] |= values
    if where == "annotations":
        odd[where][1] |= {"extra": [{}]}
    found, wanted = mend(odd), content()
    found.content["annotations"][0].pop("ignore", None)
    assert_same(found, wanted)
    assert {name: list(notes) for name, notes in found.mended.items()} == {kind: [0]}
    assert found.sound


@pytest.mark.parametrize(
    "mask",
    [
        [RLE],
        {**RLE, "counts": str(RLE["counts"].encode())},
        {**RLE, "counts": json.dumps(RLE["counts"].encode().decode()).replace('"', "'").join(["b", ""])},
        {**RLE, "size": [64.0, "64"]},
        {**RLE, "size": "(64, 64)"},
        json.dumps(RLE),
        str(RLE),
        str({**RLE, "counts": RLE["counts"].encode()}),
        [json.dumps(RLE)],
    ],
    ids=str,
)
def test_run_lengths_in_other_clothes_are_run_lengths(mask: Any) -> None:
    odd = content("rle")
    odd["annotations"][0]["segmentation"] = mask
    found = mend(odd)
    assert_same(found, content("rle"))
    assert {name: list(notes) for name, notes in found.mended.items()} == {"mended-mask": [0]}


def test_run_lengths_of_several_parts_are_united() -> None:
    odd = content("rle")
    other = annotation(1, 1, 1, box=(40, 8, 8, 16))["segmentation"]
    odd["annotations"][0] |= {"segmentation": [RLE, other], "bbox": [], "area": None}
    entry = mend(odd).content["annotations"][0]
    assert entry["bbox"] == [8, 8, 40, 16]
    assert entry["area"] == 24 * 16 + 8 * 16
    uncompressed = {"size": [2, 3], "counts": ["1", 2.0, 3]}
    odd["annotations"][0]["segmentation"] = uncompressed
    assert mend(odd).content["annotations"][0]["segmentation"] == {"size": [2, 3], "counts": [1, 2, 3]}


TRIANGLES = [[8, 8, 32, 8, 32, 24], [8, 8, 32, 24, 8, 24]]


@pytest.mark.parametrize(
    "mask",
    [
        "MULTIPOLYGON(((8 8, 32 8, 32 24)),((8 8, 32 24, 8 24)))",
        "MULTIPOLYGON (((8 8, 32 8, 32 24)), ((8 8, 32 24, 8 24)))",
        "8,8 32,8 32,24; 8,8 32,24 8,24",
        TRIANGLES,
    ],
    ids=str,
)
def test_parts_of_a_text_are_polygons_of_their_own(mask: Any) -> None:
    odd = content()
    odd["annotations"][0]["segmentation"] = mask
    assert mend(odd).content["annotations"][0]["segmentation"] == TRIANGLES


@pytest.mark.parametrize(
    ("x", "y", "box"),
    [
        ([9, 11, 11, 9], [9, 9, 11, 11], [9, 9, 2, 2]),  # both ways fit
        ([8, 8, 40, 8], [8, 24, 40, 24], [8, 8, 24, 16]),  # neither
        ([8, 32, 32, 8], [8, 8, 24, 24], None),  # nothing to compare with
    ],
)
def test_two_lists_that_may_be_two_polygons_are_left(x: list[int], y: list[int], box: Any) -> None:
    odd = content()
    odd["annotations"][0] |= {"segmentation": [x, y], "bbox": box}
    assert mend(odd).content["annotations"][0]["segmentation"] == [x, y]


@pytest.mark.parametrize("box", [[32, 24, -24, -16], [32, 8, -24, 16], [8, "24", 24, -16]])
def test_a_box_from_another_corner_is_turned(box: list[Any]) -> None:
    odd = content()
    odd["annotations"][0] |= {"bbox": box, "segmentation": []}
    found = mend(odd, masks=False)
    assert found.content["annotations"][0]["bbox"] == [8, 8, 24, 16]
    assert list(found.mended) == ["mended-box"]
    odd["annotations"][0]["bbox"] = [0, 0, -1, -1]  # stands for no box
    assert mend(odd, masks=False).content["annotations"][0]["bbox"] == [0, 0, -1, -1]


def test_a_turn_next_to_a_box_is_not_lost() -> None:
    odd = content()
    box = {"x": 8, "y": 8, "width": 24, "height": 16}
    odd["annotations"][0] |= {"bbox": box, "rotation": 0}
    assert mend(odd).content["annotations"][0]["bbox"] == [8, 8, 24, 16]
    odd["annotations"][0]["rotation"] = 30
    assert mend(odd).content["annotations"][0]["bbox"] == {"rotation": 30, **box}


@pytest.mark.parametrize("key", ["bbox", "segmentation", "iscrowd", "area"])
def test_lists_of_great_depth_are_left_for_the_checks(key: str) -> None:
    deep: list[Any] = ["x"]
    for _ in range(900):
        deep = [deep]
    odd = content()
    odd["annotations"][0][key] = deep
    assert not tidy(odd, masks=True).sound


@pytest.mark.parametrize("mask", [[], [[]], None, {}, "", [None], "[]", "null", [[], []], "nan"], ids=str)
def test_a_mask_of_nothing_is_none(mask: Any) -> None:
    odd = content()
    odd["annotations"][0]["segmentation"] = mask
    found = mend(odd)
    assert "segmentation" not in found.content["annotations"][0]
    assert not found.sound  # with masks it is a fault
    assert mend(odd, masks=False).sound


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"bbox": [8, 8, 24]}, "three numbers"),
        ({"bbox": [[8, 8], [32, 24]]}, "corners, or a corner and a size"),
        ({"bbox": {"x": 1, "y": 2}}, "no size"),
        ({"bbox": "nothing"}, "words"),
        ({"bbox": {"x": 8, "y": 8, "width": 24, "height": 16, "Rotation": 30}}, "a turned box"),
        ({"bbox": [True, 8, 24, 16]}, "a flag"),
        ({"iscrowd": 2}, "no flag"),
        ({"iscrowd": "perhaps"}, "no flag"),
        ({"ignore": 1}, "not supported"),
        ({"area": -5}, "below 0"),
        ({"area": "large"}, "words"),
        ({"segmentation": "mask.png"}, "a file"),
        ({"segmentation": "POLYGON((8 8, 32 8, 32 24, 8 24),(9 9, 12 9, 12 12))"}, "a hole"),
        ({"segmentation": ["MULTIPOLYGON (((8 8, 32 8, 32 24), (9 9, 12 9, 12 12)))"]}, "a hole"),
        ({"segmentation": "8,8 32,8; 32,24 8,24"}, "one polygon, or two lines"),
        ({"segmentation": [POLYGON, RLE]}, "two kinds"),
        ({"segmentation": [RLE, {"size": [64, 64], "counts": [9]}]}, "run lengths that end too early"),
        ({"segmentation": [RLE, {"size": [32, 128], "counts": [4096]}]}, "two sizes"),
        ({"segmentation": "mask.png", "bbox": [0, 0, 0, 0]}, "no mask to measure"),
        ({"segmentation": [[8, 8, "x", 8, 32, 24]]}, "words"),
        ({"segmentation": {"counts": "b'", "size": [64, 64]}}, "no run lengths"),
        ({"image_id": None}, "nothing"),
        ({"category_id": True}, "a flag"),
        ({"image_id": 1.5}, "no whole number"),
    ],
    ids=str,
)
def test_what_has_no_single_meaning_is_left_for_the_checks(values: dict[str, Any], message: str) -> None:
    odd = content()
    odd["annotations"][0] |= values
    found = mend(odd)
    assert not found.sound, message
    assert found.content["annotations"][0] == odd["annotations"][0]


def test_ids_of_annotations_do_not_matter() -> None:
    odd = content()
    for entry, number in zip(odd["annotations"], (0, 0, "x", None), strict=True):
        entry["id"] = number
    found = mend(odd)
    assert [entry["id"] for entry in found.content["annotations"]] == [0, 1, 2, 3]
    assert list(found.mended) == ["mended-annotation-id"]
    assert list(found.mended["mended-annotation-id"]) == [1, 2, 3]
    odd["annotations"][2] |= {"id": "7"}
    del odd["annotations"][3]["id"]
    assert [entry["id"] for entry in mend(odd).content["annotations"]] == [0, 1, 7, 2]


@pytest.mark.parametrize(
    ("ids", "numbers"),
    [
        (("b", "a"), (2, 1)),  # in the order of the texts, so that two files with the same ids agree
        (("000000000139", "000000000140"), (139, 140)),
        (("7", "007"), (2, 1)),
        ((-5, 2**64), (1, 2)),
        ((12345678901234567890, 12345678901234567891), (1, 2)),
        (("x", 1), (2, 1)),
        (("2", 2.0), (2, 2)),  # the same twice: a fault that the checks find
    ],
)
def test_ids_of_any_form_become_numbers_that_lead_back(ids: tuple[Any, Any], numbers: tuple[int, int]) -> None:
    odd = content()
    for where, key in (("images", "image_id"), ("categories", "category_id")):
        of = {entry["id"]: new for entry, new in zip(odd[where], ids, strict=True)}
        for entry in odd[where]:
            entry["id"] = of[entry["id"]]
        for entry in odd["annotations"]:
            entry[key] = of[entry[key]]
    found = mend(odd)
    for where, key in (("images", "image_id"), ("categories", "category_id")):
        assert tuple(entry["id"] for entry in found.content[where]) == numbers
        back = [found.written[where].get(entry[key], entry[key]) for entry in found.content["annotations"]]
        if len(set(numbers)) == 2:
            assert back == [entry[key] for entry in odd["annotations"]]
    assert found.sound


def test_references_find_ids_in_another_spelling_but_never_guess() -> None:
    odd = content()
    for entry, number in zip(odd["images"], ("001", "002"), strict=True):
        entry["id"] = number
    for entry, reference in zip(odd["annotations"], (1, "1", "002", "img2"), strict=True):
        entry["image_id"] = reference
    found = mend(odd)
    assert [entry["image_id"] for entry in found.content["annotations"]] == [1, 1, 2, -1]
    for entry, label in zip(odd["images"], ("x", "y"), strict=True):
        entry["id"] = label
    assert [entry["image_id"] for entry in mend(odd).content["annotations"]] == [-1, -1, -1, -1]  # 1 stands for "x"


def test_lists_of_lvis_follow_the_ids_of_categories() -> None:
    odd = content()
    odd["categories"][0]["id"], odd["categories"][1]["id"] = "x", "y"
    odd["images"] = [
        {**entry, "neg_category_ids": ["x"], "not_exhaustive_category_ids": ["y"]} for entry in odd["images"]
    ]
    assert {tuple(entry["neg_category_ids"]) for entry in mend(odd).content["images"]} == {(1,)}
    lvis = content()
    lvis["images"] = [{**entry, "neg_category_ids": [], "not_exhaustive_category_ids": []} for entry in lvis["images"]]
    for entry in lvis["annotations"]:
        del entry["iscrowd"]  # as LVIS has it
    assert mend(lvis).mended == {}


@pytest.mark.parametrize("size", [0, None, "", -1, "wide", 64.5, []], ids=str)
def test_sizes_that_are_none_are_those_of_the_files(size: Any) -> None:
    odd = content()
    odd["images"][0]["width"] = size
    asked = []

    def read(names: Any) -> list[tuple[int, int] | None]:
        asked.extend(names)
        return [(64, 64)]

    found = mend(odd, read_sizes=read)
    assert_same(found, content())
    assert asked == ["1.png"]
    assert list(found.mended) == ["size-from-file"]
    assert mend(odd).content["images"] == odd["images"]  # nobody can look
    assert mend(odd, read_sizes=lambda names: [None]).content["images"] == odd["images"]


def root(*entries: tuple[int, str, str | None]) -> list[dict[str, Any]]:
    return [{"id": number, "name": name, "supercategory": parent} for number, name, parent in entries]


@pytest.mark.parametrize(
    ("categories", "keep", "left_out"),
    [
        (root((0, "things", "none"), (1, "a", "things"), (3, "b", "things")), (), {0}),
        (root((0, "things", None), (1, "a", "things"), (3, "b", "things")), (), {0}),
        (root((0, "things", "things"), (1, "a", "things"), (3, "b", "things")), (), {0}),
        (root((1, "a", "things"), (3, "b", "things"), (7, "things", "none")), (), {2}),
        (root((0, "a", "none"), (1, "a", "a"), (3, "b", "a")), (), {0}),  # the project is called like its class
        (root((0, "a", "none"), (1, "a", "a"), (3, "b", "a")), ("a", "b"), {0}),
        (root((0, "things", "none"), (1, "a", "things"), (3, "b", "things")), ("things", "a"), set()),
        (root((0, "things", "none"), (1, "a", "things"), (3, "b", "others")), (), set()),  # an ordinary hierarchy
        (root((1, "a", "none"), (3, "b", "a")), (), set()),  # it has objects
        (root((1, "a", None), (3, "b", None), (7, "a", None)), (), {2}),  # nothing is of the second "a"
        (root((1, "a", None), (3, "b", None), (1, "a", "x")), (), {2}),  # the same twice
        (root((1, "a", None), (3, "b", None), (1, "b", None)), (), set()),  # two names of one id: a fault
        (root((1, "a", "a"), (3, "b", "b")), (), set()),
        (root((1, "a", "x"), (3, "b", "x"), (7, "c", "x")), (), set()),  # no objects, and no root
    ],
)
def test_a_root_without_objects_is_no_class(
    categories: list[dict[str, Any]], keep: tuple[str, ...], left_out: set[int]
) -> None:
    odd = content() | {"categories": categories}
    found = mend(odd, keep=keep)
    assert found.left_out == left_out
    assert set(found.mended.get("root-category", {})) == left_out
    assert found.content["categories"] == categories  # at their positions


def test_numbers_as_names_are_text_and_nothing_refers_to_a_name_of_two() -> None:
    odd = content()
    odd["categories"][0]["name"] = 7
    assert mend(odd).content["categories"][0]["name"] == "7"
    odd["categories"][0]["name"] = "b"
    odd["annotations"][0]["category_id"] = "b"
    assert mend(odd).content["annotations"][0]["category_id"] == -1


def test_many_forms_at_once_in_a_large_file_equal_the_sound_file() -> None:
    rng, sound = np.random.default_rng(0), content()
    sound["annotations"] = [annotation(n + 1, 1 + n % 2, 1 + 2 * (n % 3 > 0), kind="polygon") for n in range(300)]
    odd, wanted = copy.deepcopy(sound), copy.deepcopy(sound)
    choices = [values for where, values, _ in ODD_VALUES if where == "annotations"]
    for entry in odd["annotations"]:
        values = choices[rng.integers(len(choices))]
        entry |= {key: value for key, value in values.items() if key not in ("image_id", "category_id")}
    found = mend(odd)
    for entry in found.content["annotations"]:
        entry.pop("ignore", None)
    assert_same(found, wanted)
