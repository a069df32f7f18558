"""Every kind of fault is found where it is, with its count and ids, and nowhere else; what is cleaned is clean."""

import copy
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

pytest.importorskip("detectron2", reason="detectron2 is not installed: python tools/install_detectron2.py")

from det.data.coco import clean, dataset_records, describe_faults, plan_drop, remaining_faults
from det.data.coco_checks import find_faults, leaves_folder
from det.data.coco_kinds import DROPPABLE, KINDS, Rank
from det.data.tidy import Tidy, tidy
from tests.crossmae.data.test_images import claiming, encoded
from tests.det.coco_files import write_coco

SAMPLE = Path(__file__).parents[4] / "shared/coco_sample/instances_val2014_100.json"
NAN = math.nan
PNG = encoded(np.zeros((64, 64), np.uint8), "png")


@pytest.fixture
def data(tmp_path):
    """Five images of 64 x 64 with two annotations each: ids 2 and 3, 4 and 5, ... of categories 1 and 2."""
    _, images, content = write_coco(tmp_path, kind="polygon")
    content["categories"] = [{"id": 2, "name": "b"}, {"id": 1, "name": "a"}]
    for entry in content["annotations"]:
        entry["category_id"] = {1: 1, 3: 2}[entry["category_id"]]
    return content, images


def as_it_is(content):
    """The content without repairs: what the checks say of oddities that nobody repaired."""
    return Tidy(content, content, {}, frozenset(), {}, {}, {}, columns=None)


def find(content, images=None, **options):
    """Count and ids by kind."""
    options = {"for_evaluation": True, "masks": True, **options}
    found = find_faults(as_it_is(content), images, **options)
    return {one.kind.name: [entry["id"] for entry in one.first(len(one.positions))] for one in found}


@pytest.mark.parametrize("kind", ["polygon", "rle"])
def test_a_sound_data_set_has_no_faults(tmp_path, kind):
    _, images, content = write_coco(tmp_path, kind=kind)
    before = copy.deepcopy(content)
    assert find(content, images) == {"category-id-gaps": [3]}  # ids are 1 and 3
    assert content == before


def set_(where, index, **values):
    return lambda content, images: content[where][index].update(values)


def remove(where, index, key):
    return lambda content, images: content[where][index].pop(key)


def turn(orientation, size=(48, 64), annotated=None):
    """Image 2 as a JPEG of another stored size (width, height) and an EXIF orientation."""

    def damage(content, images):
        exif = Image.Exif()
        exif[0x0112] = orientation
        Image.new("RGB", size).save(images / "turned.jpg", exif=exif)
        width, height = annotated or size
        content["images"][1].update(file_name="turned.jpg", width=width, height=height)

    return damage


def resize(*size, annotated):
    def damage(content, images):
        Image.new("RGB", size).save(images / "2.png")
        content["images"][1].update(width=annotated[0], height=annotated[1])

    return damage


def write(name, data):
    return lambda content, images: (images / name).write_bytes(data)


def spoil(index, **values):
    return set_("annotations", index, **values)


def in_corners(content, images):
    for entry in content["annotations"]:
        x, y, w, h = entry["bbox"]
        entry["bbox"] = [x, y, x + w, y + h]


def in_corners_without_masks(content, images):
    in_corners(content, images)
    for entry in content["annotations"]:
        entry["segmentation"] = []


def rle(size, counts):
    return {"segmentation": {"size": size, "counts": counts}}


def add(where, **entry):
    return lambda content, images: content[where].append(entry)


def first_image_is_zero(content, images):
    content["images"][0]["id"] = 0
    for entry in content["annotations"][:2]:
        entry["image_id"] = 0


def both(*damages):
    """Several faults at once."""

    def damage(content, images):
        for one in damages:
            one(content, images)

    return damage


def as_lvis(*but):
    """The keys of LVIS for all, then other values for some."""

    def damage(content, images):
        for image in content["images"]:
            image.update(neg_category_ids=[2], not_exhaustive_category_ids=[])
        for category in content["categories"]:
            category["frequency"] = "c"
        both(*but)(content, images)

    return damage


def every(change):
    def damage(content, images):
        for entry in content["annotations"]:
            entry.update(change(entry))

    return damage


def crowds(content, images):
    for entry in content["annotations"][1:]:
        entry["iscrowd"] = 1


def crowded(content, images):
    some = content["annotations"][0]
    content["annotations"] += [{**some, "id": 100 + number} for number in range(100)]


def in_corner(content, images):
    some = content["annotations"][0]
    content["images"] = [{**IMAGE, "id": at, "file_name": f"{at}.png"} for at in range(1, 11)]
    places = [(number, at) for number in (1, 2) for at in range(1, 11)]
    content["annotations"] = [
        {**some, "id": 10 * x + y, "image_id": y, "bbox": [x, y, 9, 9], "segmentation": [square(x, y)], "area": 81}
        for x, y in places
    ]


def square(x, y):
    return [x, y, x + 9, y, x + 9, y + 9, x, y + 9]


ALL, EVEN = list(range(2, 12)), list(range(2, 12, 2))
IMAGE = {"id": 1, "file_name": "new.png", "height": 64, "width": 64}
CASES = [
    # kind, damage, ids; then other kinds that are bound to be found with it
    ("bad-category", remove("categories", 1, "name"), [1]),
    ("bad-category", set_("categories", 1, name=7), [1]),
    ("bad-category", set_("categories", 0, id="2"), ["'2'"], {"unknown-category": [3, 5, 7, 9, 11]}),
    ("bad-category", set_("categories", 1, id=True), ["True"], {"unknown-category": EVEN, "category-id-gaps": [2]}),
    ("bad-category", set_("categories", 1, id=-1), [-1], {"unknown-category": EVEN, "category-id-gaps": [-1]}
     | {"unused-category": [-1]}),
    ("bad-category", set_("categories", 0, id=2**63), [2**63], {"unknown-category": [3, 5, 7, 9, 11]}
     | {"category-id-gaps": [2**63], "unused-category": [2**63]}),
    ("bad-category", set_("categories", 1, name="a\ud800"), [1]),
    ("bad-category", add("categories", id=3), [3], {"unused-category": [3]}),
    ("untidy-category-name", set_("categories", 1, name=" b"), [1]),
    ("untidy-category-name", set_("categories", 1, name="a\nb"), [1]),
    ("missing-frequency", as_lvis(remove("categories", 0, "frequency")), [2]),
    ("missing-frequency", as_lvis(set_("categories", 0, frequency=["c"])), [2]),
    ("missing-frequency", as_lvis(set_("categories", 0, frequency="rcf")), [2]),
    ("duplicate-category-id", add("categories", id=1, name="c"), [1]),
    ("duplicate-category-name", set_("categories", 1, name="b"), [1]),
    ("category-id-gaps", add("categories", id=9, name="c"), [9], {"unused-category": [9]}),
    (
        "zero-category-id",
        add("categories", id=0, name="c"),
        [0],
        {"unused-category": [0], "category-id-gaps": [2, 1, 0]},
    ),
    ("unused-category", add("categories", id=3, name="c"), [3]),
    ("bad-image", remove("images", 1, "height"), [2]),
    ("bad-image", set_("images", 1, width=64.0), [2]),
    ("bad-image", set_("images", 1, width=0), [2]),
    ("bad-image", set_("images", 1, file_name=""), [2]),
    ("bad-image", set_("images", 1, id=None), ["None"], {"unknown-image": [4, 5]}),
    ("bad-image", set_("images", 1, id=-2), [-2], {"unknown-image": [4, 5], "image-without-annotations": [-2]}),
    ("bad-image", set_("images", 1, id=2**63), [2**63], {"unknown-image": [4, 5]}
     | {"image-without-annotations": [2**63]}),
    ("bad-image", both(remove("images", 0, "width"), spoil(0, bbox=[-9, 0, 20, 20])), [1]),
    ("missing-lvis-key", as_lvis(remove("images", 1, "neg_category_ids")), [2]),
    ("missing-lvis-key", as_lvis(set_("images", 1, not_exhaustive_category_ids=3)), [2]),
    ("duplicate-image-id", add("images", **IMAGE | {"file_name": "2.png"}), [1], {"duplicate-file-name": [1]}),
    ("duplicate-file-name", set_("images", 1, file_name="4.png"), [4]),
    ("unsafe-path", set_("images", 1, file_name="../images/2.png"), [2]),
    ("unsafe-path", set_("images", 1, file_name="/etc/passwd"), [2]),
    ("missing-image", set_("images", 1, file_name="no.png"), [2]),
    ("missing-image", set_("images", 1, file_name="."), [2]),  # a folder
    ("missing-image", set_("images", 1, file_name=300 * "x"), [2]),
    ("missing-image", set_("images", 1, file_name="\ud800.png"), [2]),
    ("broken-image", write("2.png", b"\x89PNG\r\n\x1a\n"), [2]),
    ("broken-image", write("2.png", b""), [2]),
    ("broken-image", write("2.png", b"no image, but it ends like one\xff\xd9"), [2]),
    ("too-large-image", write("2.png", claiming(PNG, 20_000, 10_000)), [2]),
    ("swapped-size", resize(64, 96, annotated=(96, 64)), [2]),
    ("size-mismatch", resize(96, 96, annotated=(64, 64)), [2]),
    ("size-mismatch", turn(6, (96, 64), annotated=(96, 96)), [2]),
    *[("exif-orientation", turn(how, (96, 64)), [2]) for how in (5, 6, 7, 8)],
    *[("exif-turned", turn(how, (96, 64), annotated=(64, 96)), [2]) for how in (5, 6, 7, 8)],
    *[("exif-turned", turn(how, (64, 64)), [2]) for how in (2, 3, 4, 6)],
    ("zero-image-id", first_image_is_zero, [0]),
    ("image-without-annotations", add("images", **IMAGE | {"id": 9}), [9], {"missing-image": [9]}),
    ("bad-annotation", remove("annotations", 1, "image_id"), [3]),
    ("bad-annotation", remove("annotations", 1, "id"), ["None"]),
    ("bad-annotation", spoil(1, category_id="1"), [3]),
    ("bad-annotation", spoil(1, bbox=[1, 2, 3]), [3]),
    ("bad-annotation", spoil(1, bbox=[1, 2, 3, None]), [3]),
    ("bad-annotation", spoil(1, bbox=[1, 2, 3, True]), [3]),
    ("bad-annotation", spoil(1, iscrowd=2), [3]),
    ("bad-annotation", spoil(1, area="600"), [3]),
    ("bad-annotation", spoil(1, area=-5), [3]),
    ("bad-annotation", spoil(1, area=2e10), [3]),
    ("bad-annotation", spoil(1, id=-3), [-3]),
    ("bad-annotation", spoil(1, id=2**63), [2**63]),
    ("unknown-image", spoil(1, image_id=99), [3]),
    ("unknown-image", spoil(1, image_id=99, bbox=[-9, 0, 20, 20]), [3]),
    ("unknown-category", spoil(1, category_id=99), [3]),
    ("shifted-category-id", every(lambda entry: {"category_id": entry["category_id"] - 1}), ALL,
     {"unused-category": [2]}),
    ("ignore-flag", spoil(1, ignore=1), [3]),
    ("not-finite", spoil(1, bbox=[1, NAN, 3, 4]), [3]),
    ("not-finite", spoil(1, bbox=[1, 2, math.inf, 4]), [3]),
    ("not-finite", spoil(1, bbox=[1, 2, 10**400, 4]), [3]),
    ("not-finite", spoil(1, area=NAN), [3]),
    ("not-finite", spoil(1, segmentation=[[1, 1, 9, -math.inf, 3, 3]]), [3]),
    ("empty-box", spoil(1, bbox=[30, 20, 0, 30]), [3]),
    ("empty-box", spoil(1, bbox=[30, 20, 20, -1]), [3]),
    ("box-outside", spoil(1, bbox=[64, 20, 5, 5]), [3]),
    ("box-outside", spoil(1, bbox=[5, -9, 5, 9]), [3]),
    ("box-over-edge", spoil(1, bbox=[30, 20, 36, 30]), [3]),
    ("box-over-edge", spoil(1, bbox=[30, -2, 20, 52]), [3]),
    ("box-over-edge", spoil(1, bbox=[30, -2, 20, 30]), [3], {"mask-off-box": [3]}),
    ("corner-boxes", in_corners, ALL),
    ("corner-boxes", both(in_corners, remove("images", 0, "width")), ALL[2:], {"bad-image": [1]}),
    ("corner-boxes", in_corners_without_masks, [3, 5, 7, 9, 11], {"missing-mask": ALL}),  # those that leave the image
    ("misfit-masks", every(lambda entry: {"segmentation": [entry["segmentation"][0][::-1]]}), ALL),
    ("misfit-masks", every(lambda entry: {"segmentation": [[value / 64 for value in entry["segmentation"][0]]]}), ALL,
     {"area-mismatch": ALL}),
    ("misfit-boxes", every(lambda entry: {"bbox": [value / 64 for value in entry["bbox"]]}), ALL),
    ("misfit-boxes", every(lambda entry: {"bbox": [2 * value for value in entry["bbox"]]}), ALL),
    ("mask-outside", spoil(1, segmentation=[[30, 20, 50, 20, 2e8, 3e8, 30, 50]]), [3], {"area-mismatch": [3]}),
    ("mask-outside", spoil(1, segmentation=[[70, 20, 90, 20, 90, 50, 70, 50]]), [3]),
    ("mask-off-box", spoil(1, bbox=[1, 1, 8, 8]), [3]),
    ("mostly-crowd", crowds, ALL[1:], {"crowd": ALL[1:]}),
    ("many-objects", crowded, [1]),
    ("boxes-in-corner", in_corner, [11], {"missing-image": list(range(6, 11)), "unused-category": [2]}),
    ("missing-mask", remove("annotations", 1, "segmentation"), [3]),
    ("missing-mask", spoil(1, segmentation=[]), [3]),
    ("bad-mask", spoil(1, segmentation=[1, 1, 9, 1, 9, 9]), [3]),
    ("degenerate-polygon", spoil(1, segmentation=[[30, 20, 50, 20]]), [3]),
    ("empty-mask", spoil(1, **rle([64, 64], [64 * 64])), [3]),
    ("rle-size", spoil(1, **rle([64, 32], [1000, 600, 448])), [3]),
    ("rle-counts", spoil(1, **rle([64, 64], [1000, 600])), [3]),
    ("crowd", spoil(1, iscrowd=1), [3]),
    ("area-mismatch", spoil(1, area=900), [3]),
    ("area-mismatch", spoil(1, area=0), [3]),
    ("zero-annotation-id", spoil(1, id=0), [0]),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=[f"{number}-{case[0]}" for number, case in enumerate(CASES)])
def test_a_fault_is_found_with_its_ids_and_nothing_else(data, case):
    kind, damage, ids, *others = case
    content, images = data
    damage(content, images)
    assert find(content, images) == {kind: ids, **dict(*others)}


@pytest.mark.parametrize("case", CASES, ids=[f"{number}-{case[0]}" for number, case in enumerate(CASES)])
@pytest.mark.parametrize("masks", [False, True])
def test_columns_have_the_findings_of_single_entries(data, case, masks):
    content, _ = data
    case[1](content, data[1])
    tidied = tidy(content, masks=masks)
    found, wanted = (find_faults(one, None, masks=masks) for one in (tidied, replace(tidied, columns=None)))
    assert [(one.kind, one.first(), one.positions) for one in found] == [
        (one.kind, one.first(), one.positions) for one in wanted
    ]


def test_every_kind_has_a_case():
    repairs = {"root-category", "moved-image", "size-from-file", "box-from-mask"}
    repairs |= {name for name in KINDS if name.startswith("mended-")}
    assert {case[0] for case in CASES} == set(KINDS) - repairs


def test_many_are_counted_and_the_first_are_named(data):
    content, _ = data
    for entry in content["annotations"][1:]:
        entry["bbox"][2] = 0
    (found,) = find_faults(as_it_is(content), None)
    assert len(found.positions) == 9
    assert found.first(2) == [
        {"position": 1, "id": 3, "note": "bbox [30, 20, 0, 30]"},
        {"position": 2, "id": 4, "note": "bbox [8, 8, 0, 16]"},
    ]


def test_notes_say_which_size_is_whose(data):
    content, images = data
    turn(6, (96, 64))(content, images)
    (found,) = find_faults(as_it_is(content), images)
    assert found.first(1)[0]["note"] == (
        "turned.jpg: the json has 96x64 (width x height), the file 96x64 and 64x96 once turned by its EXIF "
        "orientation 6"
    )


def test_notes_on_boxes_name_the_size_of_their_image(data):
    content, _ = data
    content["annotations"][0]["area"] = -1  # left out of the arrays
    content["images"][2].update(width=40, height=60)
    (found,) = (one for one in find_faults(as_it_is(content), None, masks=True) if one.kind.name == "box-over-edge")
    assert found.first(9) == [{"position": 5, "id": 7, "note": "bbox [30, 20, 20, 30] in an image of 40x60"}]


@pytest.mark.parametrize(
    ("annotated", "kind"), [((64, 96), "exif-turned"), ((96, 64), "exif-orientation"), ((96, 96), "size-mismatch")]
)
def test_an_orientation_behind_the_pixels_of_a_png_is_seen(data, annotated, kind):
    content, images = data
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (96, 64)).save(images / "2.png", exif=exif)
    png = (images / "2.png").read_bytes()
    start = png.index(b"eXIf") - 4
    length = 12 + int.from_bytes(png[start : start + 4], "big")
    chunk, rest = png[start : start + length], png[:start] + png[start + length :]
    (images / "2.png").write_bytes(rest[:-12] + chunk + rest[-12:])
    content["images"][1].update(width=annotated[0], height=annotated[1])
    assert find(content, images) == {kind: [2]}


def test_masks_that_nobody_reads_are_not_judged(data):
    content, _ = data
    spoil(0, segmentation=[])(content, None)
    spoil(1, segmentation="mask.png")(content, None)
    assert find(content, masks=False) == {}
    assert find(content) == {"missing-mask": [2], "bad-mask": [3]}


def test_crowd_regions_need_a_mask_in_evaluation_alone(data):
    content, _ = data
    content["annotations"][1].update(iscrowd=1, segmentation=[])
    assert find(content, for_evaluation=False) == {"crowd": [3]}
    assert find(content) == {"crowd": [3], "missing-mask": [3]}


def test_lvis_has_neither_iscrowd_nor_file_names(data):
    content, images = data
    for image in content["images"]:
        image["coco_url"] = f"http://host/{images.name}/{image.pop('file_name')}"
    as_lvis()(content, images)
    for entry in content["annotations"]:
        del entry["iscrowd"]
    assert find(content, images.parent) == {}


def test_boxes_over_the_edge_are_not_taken_for_corners(data):
    """Sizes that agree with their masks are sizes, whatever they leave; so are a few sloppy ones without masks."""
    content, _ = data
    for entry in content["annotations"]:
        entry["bbox"][2] += 40
        x, y, w, h = entry["bbox"]
        entry["segmentation"] = [[x, y, x + w, y, x + w, y + h, x, y + h]]
    assert "corner-boxes" not in find(content)
    for entry in content["annotations"]:
        entry.update(segmentation=[], bbox=[1, 1, 64, 64])
    assert set(find(content)) == {"missing-mask"}


def test_masks_decide_for_the_majority(data):
    content, _ = data
    in_corners(content, None)
    for entry in content["annotations"][:6]:
        x1, y1, x2, y2 = entry["bbox"]
        entry["bbox"] = [x1, y1, x2 - x1, y2 - y1]
    assert "corner-boxes" not in find(content)  # 4 of 10
    x1, y1, w, h = content["annotations"][0]["bbox"]
    content["annotations"][0]["bbox"] = [x1, y1, x1 + w, y1 + h]
    assert find(content)["corner-boxes"] == [2, 8, 9, 10, 11]


@pytest.mark.parametrize(
    ("name", "leaves"),
    [
        ("a.jpg", False), ("a/b.jpg", False), ("a..b/..c.jpg", False), ("a:b.jpg", True), ("ab:c.jpg", False),
        ("../a.jpg", True), ("a/../b.jpg", True), ("a/..", True), ("/a.jpg", True), ("\\\\host\\a.jpg", True),
        ("a\\..\\b.jpg", True), ("C:\\a.jpg", True), ("C:a.jpg", True),
    ],
)  # fmt: skip
def test_paths_that_leave_the_folder(name, leaves):
    assert leaves_folder(name) is leaves


@pytest.mark.skipif(not SAMPLE.is_file(), reason=f"{SAMPLE} is not here")
def test_the_sample_of_coco_is_sound():
    content = json.loads(SAMPLE.read_text())
    found = {
        one.kind.name: (len(one.positions), one.rank)
        for one in find_faults(as_it_is(content), None, for_evaluation=True, masks=True)
    }
    assert found == {
        "category-id-gaps": (69, Rank.INFORMATION),
        "unused-category": (10, Rank.INFORMATION),
        "crowd": (9, Rank.INFORMATION),
    }


ABSENT = object()
TELLING = {
    ("images", "id"): [1, -1, 2**63, "1", ABSENT],
    ("images", "file_name"): ["no.png", 300 * "x", "\ud800.png", "a\nb.png", "../1.png", "1.png", ABSENT],
    ("images", "width"): [96, 0, "64", ABSENT],
    ("images", "neg_category_ids"): [[]],
    ("annotations", "id"): [2, 0, -1, 2**63, [], ABSENT],
    ("annotations", "image_id"): [99, [1], {}, True, -1, ABSENT],
    ("annotations", "category_id"): [99, [1], -1, ABSENT],
    ("annotations", "bbox"): [[-9, 0, 20, 20], [70, 70, 9, 9], [8, 8, 32, 24], [8, 8, 0, 16], [NAN] * 4, None],
    ("annotations", "area"): [-5, 2e10, NAN, math.inf, 10**400, ABSENT],
    ("annotations", "segmentation"): [
        [], [[1, 1, 2, 2]], [[1, 1, 9, NAN, 3, 3]], {"size": [64, 32], "counts": "0"},
        {"size": [64, 64], "counts": [9]},
    ],
    ("categories", "id"): [1, -1, 2**63, "1", ABSENT],
    ("categories", "name"): ["a", " a", "a\nb", "\ud800", 7, ABSENT],
}  # fmt: skip
FAULTS = st.builds(
    lambda fault, index: (fault[0], index, fault[1]),
    st.sampled_from([(place, value) for place, values in TELLING.items() for value in values]),
    st.integers(0, 2),
)
JUNK = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 99), st.just(10**400), st.floats(), st.text(max_size=3), st.just({}),
    st.lists(st.floats(-9, 99), max_size=8), st.lists(st.lists(st.floats(-9, 99), max_size=8), max_size=2),
    st.builds(dict, size=st.just([64, 64]), counts=st.one_of(st.text("0OPo", max_size=6), st.just([4096]))),
)  # fmt: skip
KEYS = {
    "images": ("id", "file_name", "width", "height"),
    "annotations": ("id", "image_id", "category_id", "bbox", "area", "iscrowd", "segmentation", "ignore"),
    "categories": ("id", "name"),
}
DAMAGE = st.builds(
    lambda place, index, value: (place, index, value),
    st.sampled_from([(where, key) for where in KEYS for key in KEYS[where]]),
    st.integers(0, 9),
    st.one_of(JUNK, st.just(ABSENT)),
)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(damages=st.one_of(st.lists(FAULTS, min_size=2, max_size=8), st.lists(DAMAGE, min_size=1, max_size=4)))
def test_whatever_is_damaged_is_found_or_harmless(data, tmp_path, damages):
    """Each finding names its entries in one printable line, and can be dropped as it says. Cleaned files have no faults
    left, need no repair, lose exactly what was dropped, and make records with finite boxes."""
    content, images = copy.deepcopy(data[0]), data[1]
    for (where, key), index, value in damages:
        entry = content[where][index % len(content[where])]
        entry.pop(key, None)
        if value is not ABSENT:
            entry[key] = value
    before = repr(content)
    tidied = tidy(content, masks=True)
    findings = find_faults(tidied, images, for_evaluation=True, masks=True)
    for one in findings:
        assert [entry["position"] for entry in one.first(len(one.positions))] == list(one.positions)
        assert describe_faults([one]).isprintable()
    dropped = plan_drop(tidied, findings, DROPPABLE)
    assert repr(content) == before
    left = {one.kind.name for one in remaining_faults(findings, dropped)}
    assert left <= {one.kind.name for one in findings if one.rank is Rank.ERROR}  # the others are gone
    if left:
        return
    cleaned = clean(tidied.content, dropped)
    for key, gone in (("images", dropped.images), ("annotations", dropped.annotations)):
        assert len(cleaned[key]) + len(gone) == len(content[key])
    again = find_faults(tidy(cleaned, masks=True), None, for_evaluation=True, masks=True)
    assert all(one.rank is Rank.INFORMATION and not one.kind.name.startswith("mended-") for one in again)
    boxes = [entry["bbox"] for record in dataset_records(cleaned, str(images)) for entry in record["annotations"]]
    assert len(boxes) == len(cleaned["annotations"])
    assert np.isfinite(boxes).all()
