"""Batches of detection depend on the seed and their number alone; targets are right; what can not be used is named."""

import json

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("detectron2", reason="detectron2 is not installed: python tools/install_detectron2.py")

from detectron2.data import DatasetCatalog
from detectron2.structures import BoxMode

from crossmae.data.broken import Unreadable
from crossmae.errors import UserError
from det.config import load_det_config
from det.data.coco import register_coco
from det.data.loader import NamingMapper, refuse_unreadable
from tests.det.batches import train_batches
from tests.det.coco_files import TINY, annotation, write_coco


@pytest.fixture
def cfg(tmp_path):
    (tmp_path / "tiny.yaml").write_text(TINY)
    return load_det_config(str(tmp_path / "tiny.yaml"))


def samples(cfg, first, workers, rank=0, world_size=1):
    loader = train_batches(cfg, DatasetCatalog.get("test_set"), first, workers, rank, world_size)
    return [[(s["image_id"], s["image"].numpy(), s["instances"].gt_boxes.tensor.numpy()) for s in b] for b in loader]


def assert_same(a, b):
    assert len(a) == len(b)
    for batch_a, batch_b in zip(a, b, strict=True):
        for (id_a, image_a, boxes_a), (id_b, image_b, boxes_b) in zip(batch_a, batch_b, strict=True):
            assert id_a == id_b
            np.testing.assert_array_equal(image_a, image_b)
            np.testing.assert_array_equal(boxes_a, boxes_b)


def test_batches_depend_on_the_seed_and_their_number_alone(tmp_path, cfg):
    """Whatever the workers, wherever a run starts; random flip and scale included, and bitmasks cropped with boxes."""
    path, images, _ = write_coco(tmp_path / "a")
    register_coco("test_set", path, images)
    cfg.INPUT.LSJ.ENABLED, cfg.INPUT.LSJ.SIZE = True, 64
    whole = samples(cfg, 0, workers=0)
    assert len(whole) == cfg.SOLVER.MAX_ITER
    assert_same(whole, samples(cfg, 0, workers=2))
    assert_same(whole[2:], samples(cfg, 2, workers=0))
    cfg.SEED = 1
    with pytest.raises(AssertionError):
        assert_same(whole, samples(cfg, 0, workers=0))


def test_ranks_share_a_batch(tmp_path, cfg):
    path, images, _ = write_coco(tmp_path / "a")
    register_coco("test_set", path, images)
    whole = samples(cfg, 0, workers=0)
    halves = [samples(cfg, 0, workers=0, rank=rank, world_size=2) for rank in (0, 1)]
    for number, batch in enumerate(whole):
        assert [sample[0] for sample in batch] == [half[number][0][0] for half in halves]


@pytest.mark.parametrize(
    ("batch", "world_size", "message"),
    [(6, 1, "SOLVER.IMS_PER_BATCH: 6 is more than the 5 training images"), (3, 2, "cannot be divided over 2")],
)
def test_batches_that_can_not_be_filled_are_refused(tmp_path, cfg, batch, world_size, message):
    path, images, _ = write_coco(tmp_path / "a")
    register_coco("test_set", path, images)
    cfg.SOLVER.IMS_PER_BATCH = batch
    with pytest.raises(UserError, match=message):
        train_batches(cfg, DatasetCatalog.get("test_set"), world_size=world_size)


def test_an_image_of_another_size_than_annotated_is_named(tmp_path, cfg):
    """The file has changed since it was checked."""
    _, images, _ = write_coco(tmp_path)
    record = {"file_name": str(images / "1.png"), "height": 64, "width": 60, "annotations": []}
    sample = NamingMapper(cfg, True)(record)
    assert isinstance(sample, Unreadable)
    assert str(images / "1.png") in sample.message
    assert json.dumps(sample.message).count("\\n") == 0


def mapped(cfg, annotations, folder):
    """What the mapper makes of one image of 64 x 64 pixels."""
    _, images, _ = write_coco(folder / "mapped", images=1)
    for entry in annotations:
        entry["bbox_mode"] = BoxMode.XYWH_ABS
    return NamingMapper(cfg, True)({"file_name": str(images / "1.png"), "annotations": annotations})


@pytest.mark.parametrize("masks", [True, False])
def test_crowd_regions_are_no_targets(tmp_path, cfg, masks):
    cfg.MODEL.MASK_ON, cfg.INPUT.RANDOM_FLIP = masks, "none"
    crowd = annotation(1, 1, 0, (0, 0, 60, 60)) | {"iscrowd": 1}
    sample = mapped(cfg, [crowd, annotation(2, 1, 1), annotation(3, 1, 2, (30, 20, 20, 30))], tmp_path)
    instances = sample["instances"]
    assert instances.gt_classes.tolist() == [1, 2]
    assert instances.gt_boxes.tensor.tolist() == [[8, 8, 32, 24], [30, 20, 50, 50]]
    assert instances.has("gt_masks") == masks
    if masks:
        assert instances.gt_masks.tensor.flatten(1).sum(1).tolist() == [24 * 16, 20 * 30]


@pytest.mark.parametrize("mask_format", ["polygon", "bitmask"])
@pytest.mark.parametrize("jitter", [True, False])
def test_an_image_without_objects_has_no_targets(tmp_path, cfg, mask_format, jitter):
    """With DATALOADER.FILTER_EMPTY_ANNOTATIONS False, of which detectron2 makes no sample once boxes are recomputed."""
    cfg.INPUT.LSJ.ENABLED, cfg.INPUT.LSJ.SIZE, cfg.INPUT.MASK_FORMAT = jitter, 64, mask_format
    instances = mapped(cfg, [annotation(1, 1, 0) | {"iscrowd": 1}], tmp_path)["instances"]
    assert len(instances) == 0
    assert instances.gt_boxes.tensor.shape == (0, 4)
    assert len(instances.gt_masks) == 0


def test_objects_that_augmentation_leaves_without_a_pixel_are_no_targets(tmp_path, cfg):
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.RANDOM_FLIP = (8,), "none"
    sample = mapped(cfg, [annotation(1, 1, 0), annotation(2, 1, 1, (1, 1, 2, 2))], tmp_path)
    assert sample["instances"].gt_classes.tolist() == [0]


def test_boxes_of_whole_numbers_are_not_rounded(tmp_path, cfg):
    """detectron2's resize would write into an array of integers."""
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.RANDOM_FLIP = (40,), "none"
    sample = mapped(cfg, [annotation(1, 1, 0, (5, 7, 11, 13))], tmp_path)
    np.testing.assert_allclose(sample["instances"].gt_boxes.tensor, np.array([[5, 7, 16, 20]]) * 0.625)


def test_a_mask_that_can_not_be_used_names_its_image(tmp_path, cfg):
    cfg.INPUT.MASK_FORMAT = "polygon"
    sample = mapped(cfg, [annotation(1, 1, 0, kind="polygon"), annotation(2, 1, 1)], tmp_path)
    assert isinstance(sample, Unreadable)
    with pytest.raises(UserError, match=r"1\.png: cannot be used: .*object 1 is no polygon. Set INPUT.MASK_FORMAT"):
        refuse_unreadable([sample])


@pytest.mark.parametrize("is_train", [True, False])
def test_a_strip_keeps_a_pixel(tmp_path, cfg, is_train):
    """detectron2's resize to a longest side would leave it no height."""
    path = tmp_path / "strip.png"
    Image.fromarray(np.zeros((1, 400, 3), np.uint8)).save(path)
    sample = NamingMapper(cfg, is_train)({"file_name": str(path), "height": 1, "width": 400})
    assert tuple(sample["image"].shape) == (3, 1, 64)


def test_files_are_read_as_in_pretraining(tmp_path, cfg):
    """16 bits are scaled, not cut off; transparency lies over white; the order of channels is the config's."""
    cfg.INPUT.RANDOM_FLIP = "none"
    deep, clear, colour = (tmp_path / f"{name}.png" for name in ("deep", "clear", "colour"))
    Image.fromarray(np.full((64, 64), 3000, np.uint16)).save(deep)
    Image.fromarray(np.zeros((64, 64, 4), np.uint8)).save(clear)
    Image.fromarray(np.full((64, 64, 3), (10, 20, 30), np.uint8)).save(colour)
    for file_format, path, expected in [
        ("RGB", deep, [11, 11, 11]),
        ("RGB", clear, [255, 255, 255]),
        ("RGB", colour, [10, 20, 30]),
        ("BGR", colour, [30, 20, 10]),
    ]:
        cfg.INPUT.FORMAT = file_format
        sample = NamingMapper(cfg, False)({"file_name": str(path), "height": 64, "width": 64})
        assert sample["image"][:, 5, 5].tolist() == expected
