"""Whatever is wrong with a data set in COCO format is told in one line before training; the config is fitted to it."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("detectron2", reason="detectron2 is not installed: python tools/install_detectron2.py")

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json
from detectron2.data.detection_utils import get_fed_loss_cls_weights
from detectron2.modeling import build_model

from crossmae.errors import UserError
from det.data.coco import (
    check_classes,
    ground_truth,
    read_categories,
    read_coco,
    read_registered,
    register_coco,
    use_own_data,
)
from tests.det.coco_files import annotation, save, write_coco


def test_a_sound_data_set_is_registered_with_classes_by_category_id(tmp_path):
    path, images, _ = write_coco(tmp_path)
    summary = register_coco("test_set", path, images, for_evaluation=True, masks=True)
    assert summary.categories == ("a", "b")
    assert (summary.num_images, summary.num_trainable, summary.mask_kinds) == (5, 5, {"rle"})
    assert len(DatasetCatalog.get("test_set")) == 5
    assert MetadataCatalog.get("test_set").thing_classes == ["a", "b"]
    register_coco("test_set", path, images, masks=True)  # again: a second run in one process


def test_the_summary_counts_objects_and_images_as_a_plain_loop_does(tmp_path):
    path, images, content = write_coco(tmp_path, kind="polygon")
    rng = np.random.default_rng(0)
    content["categories"].append({"id": 2, "name": "unused"})
    content["annotations"] = [
        annotation(number, int(rng.integers(2, 5)), 3 if number < 4 else 1, kind=rng.choice(["polygon", "rle"]))
        | {"iscrowd": int(number % 4 == 0)}
        for number in range(1, 60)
    ]
    path.write_text(json.dumps(content))
    summary = register_coco("test_set", path, images, for_evaluation=True, masks=True)
    objects = [entry for entry in content["annotations"] if not entry["iscrowd"]]
    pairs = [(entry["image_id"], entry["category_id"]) for entry in objects]
    of_image = [image for image, _ in pairs]
    assert (summary.num_images, summary.num_trainable) == (5, len(set(of_image)))
    assert summary.most_objects == max(map(of_image.count, of_image))
    assert summary.most_of_class == max(map(pairs.count, pairs))
    assert summary.mask_kinds == {"polygon", "rle"}
    both = {(entry["image_id"], entry["category_id"]) for entry in content["annotations"]}
    assert MetadataCatalog.get("test_set").class_image_count == [
        {"id": number, "image_count": sum(number == of for _, of in both)} for number in (3, 1, 2)
    ]


def drop(key):
    return lambda content: content.pop(key)


def change(where, index, **values):
    return lambda content: content[where][index].update(values)


def remove(where, index, key):
    return lambda content: content[where][index].pop(key)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda content: content.update(annotations={}), "has no list 'annotations'. Name a file in COCO format"),
        (drop("images"), "no list 'images'"),
        (lambda content: content.update(categories={}), "no list 'categories'"),
        (remove("images", 2, "id"), r"bad-image in 1 of 5 images \(id None\); unknown-image in 2 of"),
        (change("annotations", 1, image_id=99), r"annotations\[1\] \(id 3\): image_id 99: image_id is not in 'images'"),
        (
            change("annotations", 1, category_id=2),
            r"annotations\[1\] \(id 3\): category_id 2: category_id is not in 'categories'",
        ),
        (change("annotations", 1, ignore=1), r"annotations\[1\] \(id 3\): ignore 1: 'ignore' is not supported"),
        (change("images", 0, id="x"), r"unknown-image in 2 of 10 annotations: annotations\[0\] \(id 2\): image_id 1"),
        (
            change("annotations", 0, image_id="x"),
            r"annotations\[0\] \(id 2\): image_id 'x': image_id is not in 'images'",
        ),
        (change("images", 0, file_name="/etc/passwd"), r"images\[0\] \(id 1\): file_name '/etc/passwd' leads out"),
        (
            change("images", 0, file_name="no.png"),
            r"missing-image in 1 of 5 images: images\[0\] \(id 1\): no.png: not in the image folder",
        ),
        (change("images", 0, file_name=300 * "x"), r"missing-image in 1 of 5 images: .*xxx: not in the image folder"),
        (change("images", 0, file_name="a\ud800\n.png"), r"missing-image in 1 of .*: a\\ud800\\n.png: not in the"),
        (
            change("annotations", 0, area=-5),
            r"bad-annotation in 1 of 10 .*area must be from 0 to 1e\+10 pixels, got -5",
        ),
    ],
)
def test_damage_is_named(tmp_path, damage, message):
    _, images, content = write_coco(tmp_path)
    damage(content)
    with pytest.raises(UserError, match=message) as error:
        register_coco("test_set", save(tmp_path, content), images, for_evaluation=True, masks=True)
    assert str(tmp_path / "coco.json") in str(error.value)
    assert str(error.value).isprintable()


def test_many_missing_images_are_counted_and_five_named(tmp_path):
    path, images, _ = write_coco(tmp_path, images=8)
    for number in range(1, 8):
        (images / f"{number}.png").unlink()
    with pytest.raises(UserError, match=r"missing-image in 7 of 8 images: .*\(id 1\): 1.png; .*5.png; \.\.\.:"):
        register_coco("test_set", path, images, masks=True)


def test_files_that_are_not_json_name_line_and_column(tmp_path):
    path, images, _ = write_coco(tmp_path)
    path.write_text('{"images": [],\n "annotations": [}')
    with pytest.raises(UserError, match=r"coco.json: not valid JSON: .*: line 2 column 18"):
        register_coco("test_set", path, images, masks=True)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="is UTF-16 text, not UTF-8"):
        register_coco("test_set", path, images, masks=True)
    path.write_text('{"images": [' + "9" * 5000 + "]}")
    with pytest.raises(UserError, match=r"coco.json: not valid JSON: a number has 5,000 digits"):
        register_coco("test_set", path, images, masks=True)
    path.write_text('{"images": ["1.png"], "annotations": [], "categories": []}')
    with pytest.raises(UserError, match=r"coco.json: images\[0\] is '1.png'. Use dictionaries"):
        register_coco("test_set", path, images, masks=True)
    with pytest.raises(UserError, match=r"no.json: no such file"):
        register_coco("test_set", tmp_path / "no.json", images, masks=True)
    with pytest.raises(UserError, match=r"image folder .* does not exist"):
        register_coco("test_set", write_coco(tmp_path / "b")[0], tmp_path / "nowhere", masks=True)


def test_a_truncated_image_is_found_before_training(tmp_path):
    path, images, _ = write_coco(tmp_path)
    whole = (images / "3.png").read_bytes()
    (images / "3.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"3.png: cannot be read as an image"):
        register_coco("test_set", path, images, masks=True)
    (images / "3.png").write_bytes(whole + b"trailing bytes that some cameras append")
    register_coco("test_set", path, images, masks=True)


def test_own_data_fit_the_config_to_themselves(tmp_path, cfg, caplog):
    caplog.set_level("INFO")
    path, images, _ = write_coco(tmp_path / "a")
    cfg.INPUT.MASK_FORMAT = "polygon"
    use_own_data(cfg, (str(path), str(images)), (str(path), str(images)))
    assert (cfg.MODEL.ROI_HEADS.NUM_CLASSES, cfg.INPUT.MASK_FORMAT) == (2, "bitmask")
    assert cfg.DATASETS.TRAIN == ("own_coco_train",)
    assert cfg.DATASETS.TEST == ("own_coco_val",)
    assert "MODEL.ROI_HEADS.NUM_CLASSES is 2" in caplog.text
    assert "INPUT.MASK_FORMAT is bitmask" in caplog.text


def test_polygons_keep_their_format(tmp_path, cfg):
    path, images, _ = write_coco(tmp_path / "a", kind="polygon")
    cfg.INPUT.MASK_FORMAT = "polygon"
    use_own_data(cfg, (str(path), str(images)), None)
    assert cfg.INPUT.MASK_FORMAT == "polygon"
    assert cfg.DATASETS.TEST == ()


@pytest.mark.parametrize("count", [1, 10])
def test_mask_training_needs_masks(tmp_path, cfg, count):
    _, images, content = write_coco(tmp_path)
    for entry in content["annotations"][:count]:
        del entry["segmentation"]
    path = save(tmp_path, content)
    with pytest.raises(UserError, match=f"missing-mask in {count} of 10 .*set MODEL.MASK_ON False") as error:
        use_own_data(cfg, (str(path), str(images)), None)
    assert "DATASETS.DROP" not in str(error.value)  # they are objects
    with pytest.raises(UserError, match=f"missing-mask in {count}"):
        use_own_data(cfg, None, (str(path), str(images)))
    cfg.MODEL.MASK_ON = False
    use_own_data(cfg, (str(path), str(images)), None)


def test_crowd_regions_count_neither_as_masks_nor_as_training_images(tmp_path):
    _, images, content = write_coco(tmp_path, kind="polygon")
    content["annotations"][0].update(annotation(2, 1, 1), iscrowd=1)
    content["annotations"][1].update(iscrowd=1)
    summary = register_coco("test_set", save(tmp_path, content), images, masks=True)
    assert (summary.mask_kinds, summary.num_trainable) == ({"polygon"}, 4)


def test_crowd_regions_alone_are_nothing_to_train_on_but_can_be_evaluated(tmp_path, cfg):
    path, images, content = write_coco(tmp_path)
    for entry in content["annotations"]:
        entry["iscrowd"] = 1
    save(tmp_path, content)
    with pytest.raises(UserError, match=r"coco.json: all annotations are crowd regions \(iscrowd 1\)"):
        use_own_data(cfg, (str(path), str(images)), None)
    use_own_data(cfg, None, (str(path), str(images)))


def test_crowd_flags_on_most_annotations_are_a_warning_of_their_own(tmp_path, cfg, caplog):
    _, images, content = write_coco(tmp_path)
    for entry in content["annotations"][1:]:
        entry["iscrowd"] = 1
    use_own_data(cfg, (str(save(tmp_path, content)), str(images)), None)
    (line,) = (one.message for one in caplog.records if one.levelname == "WARNING")
    assert "mostly-crowd in 9 of 10 annotations" in line
    assert "set iscrowd 0 for single objects" in line


def test_images_with_more_objects_than_count_are_a_warning_with_the_keys(tmp_path, cfg, caplog):
    _, images, content = write_coco(tmp_path)
    content["annotations"] += [{**content["annotations"][0], "id": 100 + number} for number in range(119)]
    path = str(save(tmp_path, content))
    use_own_data(cfg, None, (path, str(images)))
    lines = [one.message for one in caplog.records if one.levelname == "WARNING"]
    assert "an image has 121 objects, and the detector returns only 5, " in lines[0]
    assert "Set TEST.DETECTIONS_PER_IMAGE=121 or more." in lines[0]
    assert "an image has 120 objects of a class, and AP counts only 100, " in lines[1]
    assert "Set TEST.MAX_DETS=120 or more." in lines[1]
    caplog.clear()
    cfg.TEST.DETECTIONS_PER_IMAGE, cfg.TEST.MAX_DETS = 121, 120
    use_own_data(cfg, None, (path, str(images)))
    assert not [one for one in caplog.records if one.levelname == "WARNING"]


def damage_four(content):
    """A missing image, a box outside, an annotation of nothing, and half a polygon beside a whole one."""
    content["images"][0]["file_name"] = "no.png"
    content["annotations"][2]["bbox"] = [93, 4, 5, 5]
    content["annotations"][4]["image_id"] = 99
    content["annotations"][6]["segmentation"].append([1, 1, 2, 2])


FOUR = ("missing-image", "box-outside", "unknown-image", "degenerate-polygon")


def test_what_the_config_allows_is_left_out_of_training_and_evaluation(tmp_path, caplog):
    _, images, content = write_coco(tmp_path, kind="polygon")
    damage_four(content)
    path = save(tmp_path, content)
    before = path.read_bytes()
    summary = register_coco("test_set", path, images, for_evaluation=True, masks=True, drop=FOUR)
    assert (summary.num_images, summary.num_trainable) == (4, 4)
    assert "DATASETS.DROP leaves out 1 image and 4 annotations, polygons of 1 more: missing-image 1" in caplog.text

    truth = ground_truth("test_set")
    assert [image["id"] for image in truth["images"]] == [2, 3, 4, 5]
    # Of 2..11: 2 and 3 belong to the missing image, 4 has the box outside, 6 the unknown image.
    assert [annotation["id"] for annotation in truth["annotations"]] == [5, 7, 8, 9, 10, 11]
    assert len(truth["annotations"][2]["segmentation"]) == 1

    records = DatasetCatalog.get("test_set")
    assert [(record["image_id"], len(record["annotations"])) for record in records] == [(2, 1), (3, 1), (4, 2), (5, 2)]
    assert records[0]["file_name"] == str(images / "2.png")
    assert MetadataCatalog.get("test_set").thing_classes == ["a", "b"]
    assert MetadataCatalog.get("test_set").json_file == str(path)
    assert path.read_bytes() == before


@pytest.mark.parametrize("left", range(4))
def test_one_kind_that_is_not_allowed_stops_everything(tmp_path, left):
    _, images, content = write_coco(tmp_path, kind="polygon")
    damage_four(content)
    drop = tuple(name for name in FOUR if name != FOUR[left])
    with pytest.raises(UserError, match=f"coco.json: {FOUR[left]} in 1 of") as error:
        register_coco("test_set", save(tmp_path, content), images, drop=drop, masks=True)
    assert f'"DATASETS.DROP={(*drop, FOUR[left])}"' in str(error.value)  # to paste: with what is allowed already


def test_several_kinds_are_told_in_one_line_with_the_command_that_shows_all(tmp_path):
    _, images, content = write_coco(tmp_path, kind="polygon")
    damage_four(content)
    with pytest.raises(UserError) as error:
        register_coco("test_set", save(tmp_path, content), images, masks=True)
    assert str(error.value) == (
        f"{tmp_path}/coco.json: missing-image in 1 of 5 images (id 1); unknown-image in 1 of 10 annotations (id 6); "
        "box-outside in 1 of 10 annotations (id 4); degenerate-polygon in 1 of 10 annotations (id 8). To leave useless "
        "entries out and keep 4 of 5 images and 6 of 10 annotations: "
        "\"DATASETS.DROP=('missing-image', 'unknown-image', 'box-outside', 'degenerate-polygon')\". "
        f"For the whole table: python tools/check_coco.py {tmp_path}/coco.json {images}"
    )


@pytest.mark.parametrize("where", ["images", "categories"])
def test_nothing_is_proposed_to_be_dropped_while_another_repair_gives_it_a_meaning(tmp_path, where):
    _, images, content = write_coco(tmp_path)
    content[where][1]["id"] = content[where][0]["id"]  # the entries of the lost id are unknown
    with pytest.raises(UserError, match=r"duplicate-\w+-id in 1 of .*; unknown-\w+ in ") as error:
        register_coco("test_set", save(tmp_path, content), images, masks=True, drop=["missing-image"])
    assert "DATASETS.DROP" not in str(error.value)


@pytest.mark.parametrize("as_written", [int, str])
@pytest.mark.parametrize(("step", "named"), [(-1, r"\+ 1"), (1, "- 1")])
def test_classes_that_count_from_another_number_are_told_with_the_step(tmp_path, as_written, step, named):
    _, images, content = write_coco(tmp_path)
    content["categories"] = [{"id": number, "name": name} for number, name in enumerate("abc", 1)]
    for entry, number in zip(content["annotations"], 4 * (1, 2, 3), strict=False):
        entry["category_id"] = as_written(number + step)
    text = f"shifted-category-id in 10 of 10 .*category_id '?[012]'?, all fit with ids {named}"
    with pytest.raises(UserError, match=text) as error:
        register_coco("test_set", save(tmp_path, content), images, masks=True)
    assert "DATASETS.DROP" not in str(error.value)


def test_the_last_polygon_takes_the_annotation_with_it(tmp_path):
    _, images, content = write_coco(tmp_path, kind="polygon")
    content["annotations"][0]["segmentation"] = [[1, 1, 9, 9], [2, 2, 4, 4, 8, 8]]
    register_coco("test_set", save(tmp_path, content), images, drop=["degenerate-polygon"], masks=True)
    assert [annotation["id"] for annotation in ground_truth("test_set")["annotations"]] == list(range(3, 12))


@pytest.mark.parametrize(
    ("drop", "message"),
    [
        (("empty-bbox",), r"DATASETS.DROP: 'empty-bbox' is no kind of fault. .*empty-box"),
        (("unsafe-path",), r"'unsafe-path' cannot be left out. Use a tuple"),
        ("empty-box", r"DATASETS.DROP: 'empty-box' is no tuple. Use a tuple with some of"),
        ((3,), r"DATASETS.DROP: 3 is no kind"),
    ],
)
def test_drop_takes_names_of_droppable_kinds_alone(tmp_path, drop, message):
    path, images, _ = write_coco(tmp_path)
    with pytest.raises(UserError, match=message):
        register_coco("test_set", path, images, drop=drop, masks=True)


def test_dropping_everything_is_an_error(tmp_path):
    path, images, _ = write_coco(tmp_path, images=2)
    for image in images.iterdir():
        image.unlink()
    with pytest.raises(UserError, match="missing-image in 2 of 2") as error:
        register_coco("test_set", path, images, masks=True)
    assert "DATASETS.DROP" not in str(error.value)
    with pytest.raises(UserError, match=r"coco.json: DATASETS.DROP \('missing-image',\) leaves no images"):
        register_coco("test_set", path, images, drop=("missing-image",), masks=True)


def test_the_config_names_what_may_be_dropped(tmp_path, cfg):
    _, images, content = write_coco(tmp_path)
    content["annotations"][0].update(bbox=[3, 4, 0, 5], segmentation=[])
    cfg.MODEL.MASK_ON = False
    paths = (str(save(tmp_path, content)), str(images))
    with pytest.raises(UserError, match="empty-box in 1 of 10"):
        use_own_data(cfg, paths, paths)
    cfg.DATASETS.DROP = ("empty-box",)
    use_own_data(cfg, paths, paths)
    for name in ("own_coco_train", "own_coco_val"):
        assert len(ground_truth(name)["annotations"]) == 9


def test_ground_truth_is_the_file_where_nothing_is_dropped(tmp_path):
    path, images, content = write_coco(tmp_path)
    register_coco("test_set", path, images, masks=True)
    assert ground_truth("test_set") == content
    DatasetCatalog.register("foreign_set", list)
    with pytest.raises(UserError, match="foreign_set: this data set has no file in COCO format"):
        ground_truth("foreign_set")
    DatasetCatalog.remove("foreign_set")


def test_zero_ids_work(tmp_path):
    """Category and image 0 are what they are; annotation 0 gets another id for evaluation, where 0 means no match."""
    _, images, content = write_coco(tmp_path, images=1)
    content["images"][0]["id"] = content["annotations"][0]["id"] = 0
    content["annotations"][1]["id"] = 1
    content["categories"] = [{"id": 0, "name": "a"}, {"id": 7, "name": "b"}]
    for number, entry in enumerate(content["annotations"]):
        entry.update(image_id=0, category_id=7 * number)
    path = save(tmp_path, content)
    assert register_coco("test_set", path, images, for_evaluation=True, masks=True).categories == ("a", "b")
    (record,) = DatasetCatalog.get("test_set")
    assert record["image_id"] == 0
    assert [entry["category_id"] for entry in record["annotations"]] == [0, 1]
    assert [entry["id"] for entry in ground_truth("test_set")["annotations"]] == [2, 1]
    assert json.loads(path.read_text()) == content


def test_a_file_of_lvis_trains_with_names_from_its_urls(tmp_path):
    _, images, content = write_coco(tmp_path, kind="polygon")
    (tmp_path / "val2017").symlink_to(images)
    for image in content["images"]:
        url = f"http://images.cocodataset.org/val2017/{image.pop('file_name')}"
        image.update(coco_url=url, neg_category_ids=[3], not_exhaustive_category_ids=[])
    for entry in content["annotations"]:
        del entry["iscrowd"]
    register_coco("test_set", save(tmp_path, content), tmp_path, masks=True)  # training knows no frequency
    with pytest.raises(UserError, match="missing-frequency in 2 of 2 categories"):
        register_coco("test_set", save(tmp_path, content), tmp_path, for_evaluation=True, masks=True)
    for entry in content["categories"]:
        entry["frequency"] = "f"
    register_coco("test_set", save(tmp_path, content), tmp_path, for_evaluation=True, masks=True)
    records = DatasetCatalog.get("test_set")
    assert records[0]["file_name"] == f"{tmp_path}/val2017/1.png"
    assert [len(record["annotations"]) for record in records] == [2] * 5
    assert MetadataCatalog.get("test_set").evaluator_type == "lvis"
    assert ground_truth("test_set")["images"][0]["neg_category_ids"] == [3]


def test_urls_alone_name_images_of_any_file(tmp_path):
    _, images, content = write_coco(tmp_path)
    for image in content["images"][1:]:
        image["coco_url"] = f"http://host/images/{image.pop('file_name')}"
    content["images"][0]["file_name"] = "images/1.png"
    register_coco("test_set", save(tmp_path, content), tmp_path, for_evaluation=True, masks=True)
    records = DatasetCatalog.get("test_set")
    assert [record["file_name"] for record in records] == [f"{images}/{number}.png" for number in range(1, 6)]
    assert MetadataCatalog.get("test_set").evaluator_type == "coco"


@pytest.mark.parametrize("whole", [True, False])
def test_categories_are_read_by_rising_id_with_or_without_the_rest(tmp_path, whole):
    path, _, content = write_coco(tmp_path)
    if not whole:
        path.write_text(json.dumps({"categories": content["categories"]}))
    assert read_categories(path) == [(1, "a"), (3, "b")]


@pytest.mark.parametrize(
    ("categories", "message"),
    [
        ([{"id": 1}], r"bad-category in 1 of 1 categories: categories\[0\] \(id 1\): has no 'name'"),
        ([{"id": None, "name": "a"}], r"categories\[0\] \(id None\): id must be a whole number, got None"),
        ([{"id": 1, "name": ["a"]}], r"\(id 1\): name must be text, got \['a'\]"),
        ([{"id": 1, "name": "a"}, {"id": 1, "name": "b"}], r"duplicate-category-id in 1 of 2 .*give each another id"),
        ([{"id": 1, "name": "a"}, {"id": 2, "name": "a"}], r"duplicate-category-name in 1 of 2 categories: .*'a'"),
        ([], "'categories' is empty"),
        (["a"], r"categories\[0\] is 'a'. Use dictionaries"),
        (None, "no list 'categories'"),
    ],
)
def test_categories_that_name_no_classes_are_one_line(tmp_path, categories, message):
    (tmp_path / "classes.json").write_text(json.dumps({"categories": categories}))
    with pytest.raises(UserError, match=f"classes.json: .*{message}") as error:
        read_categories(tmp_path / "classes.json")
    assert "\n" not in str(error.value)


def as_lvis(content):
    for image in content["images"]:
        image["coco_url"] = f"http://host/images/{image.pop('file_name')}"
        image.update(neg_category_ids=[3], not_exhaustive_category_ids=[])
    for entry in content["annotations"]:
        del entry["iscrowd"]
    for entry in content["categories"]:
        entry["frequency"] = "c"


def uncompress(content):
    content["images"].reverse()
    for entry in content["annotations"][::2]:
        x, y, w, h = entry["bbox"]
        runs = [64 * x + y, *(w - 1) * [h, 64 - h], h]
        entry["segmentation"] = {"size": [64, 64], "counts": [*runs, 64 * 64 - sum(runs)]}


@pytest.mark.parametrize("kind", ["polygon", "rle"])
@pytest.mark.parametrize("change", [lambda content: None, as_lvis, uncompress])
def test_records_are_those_of_detectron2(tmp_path, kind, change):
    _, images, content = write_coco(tmp_path, kind=kind)
    change(content)
    named = copy.deepcopy(content)
    for image in named["images"]:
        image.setdefault("file_name", "/".join(image.get("coco_url", "").split("/")[-2:]))
    root = tmp_path if change is as_lvis else images
    (tmp_path / "named.json").write_text(json.dumps(named))
    register_coco("test_set", save(tmp_path, content), root, for_evaluation=True, masks=True)
    MetadataCatalog.pop("theirs", None)
    assert DatasetCatalog.get("test_set") == load_coco_json(str(tmp_path / "named.json"), str(root), "theirs")
    ours, theirs = (MetadataCatalog.get(name) for name in ("test_set", "theirs"))
    for key in ("thing_classes", "thing_dataset_id_to_contiguous_id"):
        assert getattr(ours, key) == getattr(theirs, key)


def test_repaired_files_make_the_records_of_sound_files(tmp_path):
    _, images, content = write_coco(tmp_path, kind="polygon")
    register_coco("test_set", save(tmp_path, content), images, masks=True)
    sound = DatasetCatalog.get("test_set")
    for image in content["images"]:
        image.update(width=0, height=None)
    for entry in content["annotations"]:
        entry.update(id=0, bbox=[], area=None, iscrowd=None, keypoints="1,2,2", image_id=str(entry["image_id"]))
        entry["segmentation"] = entry["segmentation"][0]
    register_coco("test_set", save(tmp_path, content), images, masks=True, for_evaluation=True)
    assert DatasetCatalog.get("test_set") == sound
    assert len({entry["id"] for entry in ground_truth("test_set")["annotations"]}) == 10


def test_ids_that_are_text_are_known_by_their_numbers(tmp_path):
    _, images, content = write_coco(tmp_path)
    for entry in [*content["images"], *content["annotations"]]:
        key = "id" if "file_name" in entry else "image_id"
        entry[key] = f"img{entry[key]}"
    register_coco("test_set", save(tmp_path, content), images, masks=True, for_evaluation=True)
    assert [record["image_id"] for record in DatasetCatalog.get("test_set")] == [1, 2, 3, 4, 5]
    _, written = read_registered("test_set")
    assert written == {"images": {number: f"img{number}" for number in range(1, 6)}, "categories": {}}


def test_a_root_is_no_class_unless_the_training_data_has_it(tmp_path, cfg):
    _, images, content = write_coco(tmp_path / "a")
    for entry in content["categories"]:
        entry["supercategory"] = "root"
    content["categories"].append({"id": 0, "name": "root", "supercategory": "none"})
    without = (str(save(tmp_path, content)), str(images))
    assert [name for _, name in read_categories(without[0])] == ["a", "b"]
    use_own_data(cfg, without, without)
    assert cfg.MODEL.ROI_HEADS.NUM_CLASSES == 2
    assert len(ground_truth("own_coco_val")["categories"]) == 2
    content["annotations"][0]["category_id"] = 0
    with_root = (str(save(tmp_path / "a", content)), str(images))
    use_own_data(cfg, with_root, without)
    assert cfg.MODEL.ROI_HEADS.NUM_CLASSES == 3
    assert len(ground_truth("own_coco_val")["categories"]) == 3


def test_no_annotations_are_nothing_to_train_on_but_can_be_evaluated(tmp_path, cfg):
    path, images, content = write_coco(tmp_path)
    del content["annotations"]
    for values in ({}, {"annotations": []}):
        save(tmp_path, content | values)
        with pytest.raises(UserError, match=r"coco.json: 'annotations' is empty\. Name a file with objects"):
            use_own_data(cfg, (str(path), str(images)), None)
        use_own_data(cfg, None, (str(path), str(images)))
        assert [record["annotations"] for record in DatasetCatalog.get("own_coco_val")] == [[]] * 5


def test_the_federated_loss_gets_the_images_of_each_class_and_no_more_classes_than_there_are(tmp_path, cfg):
    path, images, content = write_coco(tmp_path)
    content["annotations"] = [one for one in content["annotations"] if one["category_id"] == 1 or one["image_id"] < 3]
    content["annotations"].append({**content["annotations"][0], "id": 99})  # a second object in one image
    save(tmp_path, content)
    cfg.MODEL.ROI_BOX_HEAD.USE_FED_LOSS = cfg.MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE = True
    use_own_data(cfg, (str(path), str(images)), None)
    assert cfg.MODEL.ROI_BOX_HEAD.FED_LOSS_NUM_CLASSES == 2
    assert get_fed_loss_cls_weights(cfg.DATASETS.TRAIN).tolist() == [5.0, 2.0]  # of categories 1 and 3
    build_model(cfg)


def test_a_number_of_classes_that_is_not_that_of_the_data_is_refused(tmp_path):
    path, images, _ = write_coco(tmp_path)
    register_coco("test_set", path, images, masks=True)
    DatasetCatalog.get("test_set")
    check_classes(["test_set"], 2)
    with pytest.raises(UserError, match="NUM_CLASSES: test_set has 2 classes, not 3"):
        check_classes(["test_set"], 3)


def test_images_of_the_same_base_name_alone_are_a_warning(tmp_path, caplog):
    path, images, content = write_coco(tmp_path)
    for folder, level in (("old", "WARNING"), (images.name, "INFO")):
        for entry in content["images"]:
            entry["file_name"] = f"{folder}/{Path(entry['file_name']).name}"
        path.write_text(json.dumps(content))
        if folder == "old":
            (images / "new").mkdir()
            for file in list(images.glob("*.*")):
                file.rename(images / "new" / file.name)
        else:
            for file in list((images / "new").iterdir()):
                file.rename(images / file.name)
        caplog.clear()
        with caplog.at_level("INFO"):
            register_coco("moved_set", path, images, masks=True)
        assert [record.levelname for record in caplog.records if "are there as" in record.getMessage()] == [level]


@pytest.mark.parametrize(
    ("content", "looks"),
    [
        ({"version": "5", "shapes": [], "imagePath": "1.png"}, "a file of labelme"),
        ({"_via_settings": {}, "_via_img_metadata": {}}, "a project of VIA"),
        ({"1.png123": {"filename": "1.png", "regions": []}}, "a file of VIA"),
        ([{"id": 1, "data": {"image": "1.png"}, "annotations": []}], "an export of Label Studio in its own format"),
        ([{"image_id": 1, "category_id": 1, "score": 0.5, "bbox": []}], "results of a detector"),
        ({"type": "FeatureCollection", "features": []}, "GeoJSON"),
        ({"size": {"height": 1, "width": 1}, "objects": []}, "a file of Supervisely"),
    ],
)
def test_files_of_other_tools_are_called_what_they_are(tmp_path, content, looks):
    path = save(tmp_path, content)
    with pytest.raises(
        UserError, match=rf"has no list 'images', and looks like {looks}\. Export the annotations in COCO"
    ):
        read_coco(path)


@pytest.mark.parametrize("content", [[], {}, 3, [1], {"a": 1}])
def test_other_json_is_no_coco_file(tmp_path, content):
    with pytest.raises(UserError, match=r"coco\.json: has no list 'images'\. Name a file in COCO format\."):
        read_coco(save(tmp_path, content))


def test_a_run_parses_its_file_once(tmp_path, monkeypatch):
    path, images, content = write_coco(tmp_path)
    content["annotations"][0]["id"] = 0
    save(path.parent, content)
    register_coco("test_set", path, images, for_evaluation=True, masks=True)
    kept = copy.deepcopy((DatasetCatalog.get("test_set"), read_registered("test_set")))
    monkeypatch.setattr("det.data.coco._PARSED", {})
    again = DatasetCatalog.get("test_set"), read_registered("test_set")
    assert again == kept  # as if the file was parsed each time
    for for_evaluation, reads in ((True, 3), (False, 1)):
        register_coco("test_set", path, images, for_evaluation=for_evaluation, masks=True)
        with monkeypatch.context() as patch:
            patch.setattr("det.data.coco.read_coco", lambda path: pytest.fail(f"{path} is parsed again"))
            for _ in range(reads):
                assert DatasetCatalog.get("test_set") == kept[0]
    register_coco("test_set", path, images, for_evaluation=True, masks=True)
    content["images"][0]["license"] = 7
    save(path.parent, content)
    assert ground_truth("test_set")["images"][0]["license"] == 7  # a file that changed is parsed again
