"""Batches of detection depend on the seed and their number alone; what can not be used is named."""

import json

import numpy as np
import pytest

pytest.importorskip("detectron2", reason="detectron2 is not installed: python tools/install_detectron2.py")

from detectron2.data import DatasetCatalog

from crossmae.data import Unreadable
from crossmae.errors import UserError
from det.coco import register_coco
from det.config import load_det_config
from det.data import NamingMapper, build_train_loader
from tests.det.coco_files import TINY, save, write_coco


@pytest.fixture
def cfg(tmp_path):
    (tmp_path / "tiny.yaml").write_text(TINY)
    return load_det_config(str(tmp_path / "tiny.yaml"))


def samples(cfg, first, workers, rank=0, world_size=1):
    cfg.DATALOADER.NUM_WORKERS = workers
    loader = build_train_loader(cfg, DatasetCatalog.get("test_set"), first, rank, world_size)
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
    [(6, 1, "SOLVER.IMS_PER_BATCH is 6, but the training set has only 5 images"), (3, 2, "can not be divided over 2")],
)
def test_batches_that_can_not_be_filled_are_refused(tmp_path, cfg, batch, world_size, message):
    path, images, _ = write_coco(tmp_path / "a")
    register_coco("test_set", path, images)
    cfg.SOLVER.IMS_PER_BATCH = batch
    with pytest.raises(UserError, match=message):
        build_train_loader(cfg, DatasetCatalog.get("test_set"), 0, 0, world_size)


def test_an_image_of_another_size_than_annotated_is_named(tmp_path, cfg):
    _, images, content = write_coco(tmp_path)
    content["images"][0]["width"] = 60
    register_coco("test_set", save(tmp_path, content), images)
    sample = NamingMapper(cfg, True)(DatasetCatalog.get("test_set")[0])
    assert isinstance(sample, Unreadable)
    assert str(images / "1.png") in sample.message
    assert json.dumps(sample.message).count("\\n") == 0
