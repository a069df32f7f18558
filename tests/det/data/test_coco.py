"""Whatever is wrong with a data set in COCO format is told in one line before training; the config is fitted to it."""

import json

import pytest

pytest.importorskip("detectron2", reason="detectron2 is not installed: python tools/install_detectron2.py")

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.detection_utils import get_fed_loss_cls_weights
from detectron2.modeling import build_model

from crossmae.errors import UserError
from det.data.coco import check_classes, ground_truth, read_categories, register_coco, use_own_data
from tests.det.coco_files import annotation, save, write_coco


def test_a_sound_data_set_is_registered_with_classes_by_category_id(tmp_path):
    path, images, _ = write_coco(tmp_path)
    summary = register_coco("test_set", path, images, for_evaluation=True)
    assert summary.categories == ("a", "b")
    assert (summary.num_images, summary.num_trainable, summary.mask_kinds) == (5, 5, {"rle"})
    assert len(DatasetCatalog.get("test_set")) == 5
    assert MetadataCatalog.get("test_set").thing_classes == ["a", "b"]
    register_coco("test_set", path, images)  # again: a second run in one process


def drop(key):
    return lambda content: content.pop(key)


def change(where, index, **values):
    return lambda content: content[where][index].update(values)


def remove(where, index, key):
    return lambda content: content[where][index].pop(key)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (drop("annotations"), "has no list 'annotations'. Name a file in COCO format"),
        (drop("images"), "no list 'images'"),
        (lambda content: content.update(categories={}), "no list 'categories'"),
        (lambda content: content["annotations"].clear(), "'annotations' is empty"),
        (remove("images", 2, "width"), r"bad-image in 1 of 5 images: images\[2\] \(id 3\): has no 'width'"),
        (remove("annotations", 1, "area"), r"missing-area in 1 of 10 annotations: annotations\[1\] \(id 3\): .*add it"),
        (change("annotations", 1, image_id=99), r"annotations\[1\] \(id 3\): image_id 99: image_id is not in 'images'"),
        (
            change("annotations", 1, category_id=2),
            r"annotations\[1\] \(id 3\): category_id 2: category_id is not in 'categories'",
        ),
        (change("annotations", 1, ignore=1), r"annotations\[1\] \(id 3\): ignore 1: 'ignore' is not supported"),
        (change("images", 0, id="x"), r"bad-image in 1 of 5 images \(id 'x'\); unknown-image in 2 of"),
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
        register_coco("test_set", save(tmp_path, content), images, for_evaluation=True)
    assert str(tmp_path / "coco.json") in str(error.value)
    assert str(error.value).isprintable()


def test_many_missing_images_are_counted_and_five_named(tmp_path):
    path, images, _ = write_coco(tmp_path, images=8)
    for number in range(1, 8):
        (images / f"{number}.png").unlink()
    with pytest.raises(UserError, match=r"missing-image in 7 of 8 images: .*\(id 1\): 1.png; .*5.png; \.\.\.:"):
        register_coco("test_set", path, images)


def test_files_that_are_not_json_name_line_and_column(tmp_path):
    path, images, _ = write_coco(tmp_path)
    path.write_text('{"images": [],\n "annotations": [}')
    with pytest.raises(UserError, match=r"coco.json: not valid JSON: .*: line 2 column 18"):
        register_coco("test_set", path, images)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="not valid JSON: 'utf-8' codec"):
        register_coco("test_set", path, images)
    path.write_text('{"images": [' + "9" * 5000 + "]}")
    with pytest.raises(UserError, match=r"coco.json: not valid JSON: Exceeds the limit"):
        register_coco("test_set", path, images)
    path.write_text('{"images": ["1.png"], "annotations": [], "categories": []}')
    with pytest.raises(UserError, match=r"coco.json: images\[0\] is '1.png'. Use dictionaries"):
        register_coco("test_set", path, images)
    with pytest.raises(UserError, match=r"no.json: no such file"):
        register_coco("test_set", tmp_path / "no.json", images)
    with pytest.raises(UserError, match=r"image folder .* does not exist"):
        register_coco("test_set", write_coco(tmp_path / "b")[0], tmp_path / "nowhere")


def test_a_truncated_image_is_found_before_training(tmp_path):
    path, images, _ = write_coco(tmp_path)
    whole = (images / "3.png").read_bytes()
    (images / "3.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"3.png: cannot be read as an image"):
        register_coco("test_set", path, images)
    (images / "3.png").write_bytes(whole + b"trailing bytes that some cameras append")
    register_coco("test_set", path, images)


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
    assert ("DATASETS.DROP=('missing-mask',)" in str(error.value)) == (count < 10)  # dropping all is no way out
    with pytest.raises(UserError, match=f"missing-mask in {count}"):
        use_own_data(cfg, None, (str(path), str(images)))
    cfg.MODEL.MASK_ON = False
    use_own_data(cfg, (str(path), str(images)), None)


def test_crowd_regions_count_neither_as_masks_nor_as_training_images(tmp_path):
    _, images, content = write_coco(tmp_path, kind="polygon")
    content["annotations"][0].update(annotation(2, 1, 1), iscrowd=1)
    content["annotations"][1].update(iscrowd=1)
    summary = register_coco("test_set", save(tmp_path, content), images)
    assert (summary.mask_kinds, summary.num_trainable) == ({"polygon"}, 4)


def test_crowd_regions_alone_are_nothing_to_train_on_but_can_be_evaluated(tmp_path, cfg):
    path, images, content = write_coco(tmp_path)
    for entry in content["annotations"]:
        entry["iscrowd"] = 1
    save(tmp_path, content)
    with pytest.raises(UserError, match=r"coco.json: all annotations are crowd regions \(iscrowd 1\)"):
        use_own_data(cfg, (str(path), str(images)), None)
    use_own_data(cfg, None, (str(path), str(images)))


def damage_four(content):
    """An image that is not there, an empty box, an annotation of nothing, and half a polygon beside a whole one."""
    content["images"][0]["file_name"] = "no.png"
    content["annotations"][2]["bbox"] = [3, 4, 0, 5]
    content["annotations"][4]["image_id"] = 99
    content["annotations"][6]["segmentation"].append([1, 1, 2, 2])


FOUR = ("missing-image", "empty-box", "unknown-image", "degenerate-polygon")


def test_what_the_config_allows_is_left_out_of_training_and_evaluation(tmp_path, caplog):
    _, images, content = write_coco(tmp_path, kind="polygon")
    damage_four(content)
    path = save(tmp_path, content)
    before = path.read_bytes()
    summary = register_coco("test_set", path, images, for_evaluation=True, masks=True, drop=FOUR)
    assert (summary.num_images, summary.num_trainable) == (4, 4)
    assert "DATASETS.DROP leaves out 1 images and 4 annotations, polygons of 1 more: missing-image 1" in caplog.text

    truth = ground_truth("test_set")
    assert [image["id"] for image in truth["images"]] == [2, 3, 4, 5]
    # Of 2..11: 2 and 3 belong to the missing image, 4 has the empty box, 6 the unknown image.
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
        register_coco("test_set", save(tmp_path, content), images, drop=drop)
    assert f'"DATASETS.DROP={(*drop, FOUR[left])}"' in str(error.value)  # to paste: with what is allowed already


def test_several_kinds_are_told_in_one_line_with_the_command_that_shows_all(tmp_path):
    _, images, content = write_coco(tmp_path, kind="polygon")
    damage_four(content)
    with pytest.raises(UserError) as error:
        register_coco("test_set", save(tmp_path, content), images)
    assert str(error.value) == (
        f"{tmp_path}/coco.json: missing-image in 1 of 5 images (id 1); unknown-image in 1 of 10 annotations (id 6); "
        "empty-box in 1 of 10 annotations (id 4); degenerate-polygon in 1 of 10 annotations (id 8). To leave them out: "
        "\"DATASETS.DROP=('missing-image', 'unknown-image', 'empty-box', 'degenerate-polygon')\". For the whole table: "
        f"python tools/check_coco.py {tmp_path}/coco.json {images}"
    )


def test_the_last_polygon_takes_the_annotation_with_it(tmp_path):
    _, images, content = write_coco(tmp_path, kind="polygon")
    content["annotations"][0]["segmentation"] = [[1, 1, 9, 9], [2, 2, 4, 4, 8, 8]]
    register_coco("test_set", save(tmp_path, content), images, drop=["degenerate-polygon"])
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
        register_coco("test_set", path, images, drop=drop)


def test_dropping_everything_is_an_error(tmp_path):
    path, images, _ = write_coco(tmp_path, images=2)
    for image in images.iterdir():
        image.unlink()
    with pytest.raises(UserError, match=r"coco.json: DATASETS.DROP \('missing-image',\) leaves no images"):
        register_coco("test_set", path, images, drop=("missing-image",))


def test_the_config_names_what_may_be_dropped(tmp_path, cfg):
    _, images, content = write_coco(tmp_path)
    content["annotations"][0]["bbox"] = [3, 4, 0, 5]
    paths = (str(save(tmp_path, content)), str(images))
    with pytest.raises(UserError, match="empty-box in 1 of 10"):
        use_own_data(cfg, paths, paths)
    cfg.DATASETS.DROP = ("empty-box",)
    use_own_data(cfg, paths, paths)
    for name in ("own_coco_train", "own_coco_val"):
        assert len(ground_truth(name)["annotations"]) == 9


def test_ground_truth_is_the_file_where_nothing_is_dropped(tmp_path):
    path, images, content = write_coco(tmp_path)
    register_coco("test_set", path, images)
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
        ([{"id": "1", "name": "a"}], r"categories\[0\] \(id '1'\): id must be a whole number, got '1'"),
        ([{"id": 1, "name": ["a"]}], r"\(id 1\): name must be text, got \['a'\]"),
        ([{"id": 1, "name": "a"}, {"id": 1, "name": "b"}], r"duplicate-category-id in 1 of 2 .*give each another id"),
        ([{"id": 1, "name": "a"}, {"id": 2, "name": "a"}], r"duplicate-category-name in 1 of 2 categories: .*'a'"),
        ([{"id": -1, "name": "a"}], r"\(id -1\): id must be from 0 to 2\*\*63 - 1, got -1"),
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
    register_coco("test_set", path, images)
    DatasetCatalog.get("test_set")
    check_classes(["test_set"], 2)
    with pytest.raises(UserError, match="NUM_CLASSES: test_set has 2 classes, not 3"):
        check_classes(["test_set"], 3)
