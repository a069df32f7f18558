"""Whatever is wrong with a data set in COCO format is told in one line before training; the config is fitted to it."""

import pytest

pytest.importorskip("detectron2", reason="detectron2 is not installed: python tools/install_detectron2.py")

from detectron2.data import DatasetCatalog, MetadataCatalog

from crossmae.errors import UserError
from det.coco import register_coco, use_own_data
from det.config import load_det_config
from tests.det.coco_files import TINY, annotation, save, write_coco


@pytest.fixture
def cfg(tmp_path):
    (tmp_path / "tiny.yaml").write_text(TINY)
    return load_det_config(str(tmp_path / "tiny.yaml"))


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
        (drop("annotations"), "no list 'annotations'; a COCO file has images, annotations and categories"),
        (drop("images"), "no list 'images'"),
        (lambda content: content.update(categories={}), "no list 'categories'"),
        (lambda content: content["annotations"].clear(), "'annotations' is empty"),
        (remove("images", 2, "width"), r"images\[2\] has no 'width'"),
        (remove("annotations", 1, "area"), r"annotations\[1\] has no 'area'"),
        (change("annotations", 1, image_id=99), r"annotations\[1\] \(id 3\): unknown image_id 99"),
        (change("annotations", 1, category_id=2), r"annotations\[1\] \(id 3\): unknown category_id 2"),
        (change("annotations", 1, bbox=[1, 2, 3]), r"annotations\[1\] \(id 3\): bbox must be"),
        (
            change("annotations", 1, image_id=[1]),
            r"annotations\[1\] \(id 3\): image_id must be a whole number, got \[1\]",
        ),
        (change("annotations", 1, category_id="1"), r"\(id 3\): category_id must be a whole number, got '1'"),
        (change("annotations", 1, ignore=1), r"annotations\[1\] \(id 3\): 'ignore' is not supported"),
        (
            change("annotations", 1, segmentation=[1, 1, 9, 1, 9, 9]),
            r"\(id 3\): segmentation must be a list of polygons",
        ),
        (
            change("annotations", 1, segmentation=[[1, 1, 9, 9]]),
            r"\(id 3\): segmentation\[0\] must be .* 3 points, got 4",
        ),
        (
            change("annotations", 1, segmentation=[[1, 1, 9, 1, 9, 9, 5]]),
            r"segmentation\[0\] must be .* 3 points, got 7",
        ),
        (
            change("annotations", 1, segmentation={"size": [64, 64]}),
            r"\(id 3\): segmentation: .* needs counts and size",
        ),
        (change("annotations", 1, id=2), r"annotations\[1\]: id 2 is used twice"),
        (change("images", 0, id="x"), r"images\[0\]: id must be a whole number, got 'x'"),
        (change("images", 0, file_name="/etc/passwd"), r"images\[0\]: file_name '/etc/passwd' leads out"),
        (change("images", 0, file_name="a/../../b.png"), r"images\[0\]: file_name 'a/../../b.png' leads out"),
        (change("images", 0, file_name="C:\\b.png"), r"leads out of the image folder"),
        (change("images", 0, file_name=None), r"images\[0\]: file_name must be text, got None"),
        (change("images", 0, file_name="no.png"), r"1 of 5 images are not in .*images: no.png"),
    ],
)
def test_damage_is_named(tmp_path, damage, message):
    _, images, content = write_coco(tmp_path)
    damage(content)
    with pytest.raises(UserError, match=message) as error:
        register_coco("test_set", save(tmp_path, content), images, for_evaluation=True)
    assert str(tmp_path / "coco.json") in str(error.value)
    assert "\n" not in str(error.value)


def test_many_missing_images_are_counted_and_five_named(tmp_path):
    path, images, _ = write_coco(tmp_path, images=8)
    for number in range(1, 8):
        (images / f"{number}.png").unlink()
    with pytest.raises(UserError, match=r"7 of 8 images are not in .*: 1.png, 2.png, 3.png, 4.png, 5.png, \.\.\."):
        register_coco("test_set", path, images)


def test_files_that_are_not_json_name_line_and_column(tmp_path):
    path, images, _ = write_coco(tmp_path)
    path.write_text('{"images": [],\n "annotations": [}')
    with pytest.raises(UserError, match=r"coco.json: not valid JSON: .* in line 2, column 18"):
        register_coco("test_set", path, images)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="not UTF-8"):
        register_coco("test_set", path, images)
    with pytest.raises(UserError, match=r"no.json: No such file or directory"):
        register_coco("test_set", tmp_path / "no.json", images)
    with pytest.raises(UserError, match=r"image folder .* does not exist"):
        register_coco("test_set", write_coco(tmp_path / "b")[0], tmp_path / "nowhere")


def test_a_truncated_image_is_found_before_training(tmp_path):
    path, images, _ = write_coco(tmp_path)
    whole = (images / "3.png").read_bytes()
    (images / "3.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"3.png: can not be read as an image"):
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


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ({3: "b", 1: "c"}, r"different categories; only in the first: \['a'\], only in the second: \['c'\]"),
        ({3: "a", 1: "b"}, "different categories; the same names, but in another order of ids"),
    ],
)
def test_train_and_val_must_agree_on_categories(tmp_path, cfg, names, message):
    train, images, content = write_coco(tmp_path / "a")
    content["categories"] = [{"id": key, "name": name} for key, name in names.items()]
    val = save(tmp_path, content)
    with pytest.raises(UserError, match=message):
        use_own_data(cfg, (str(train), str(images)), (str(val), str(images)))


@pytest.mark.parametrize(("count", "message"), [(1, "some annotations have no"), (10, "no annotation has a mask")])
def test_mask_training_needs_masks(tmp_path, cfg, count, message):
    _, images, content = write_coco(tmp_path)
    for entry in content["annotations"][:count]:
        del entry["segmentation"]
    path = save(tmp_path, content)
    with pytest.raises(UserError, match=message + ".*set MODEL.MASK_ON False"):
        use_own_data(cfg, (str(path), str(images)), None)
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
    with pytest.raises(
        UserError, match=r"coco.json: nothing to train on: every entry of 'annotations' is a crowd region"
    ):
        use_own_data(cfg, (str(path), str(images)), None)
    use_own_data(cfg, None, (str(path), str(images)))
