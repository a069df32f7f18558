"""A detector predicts for a file what evaluation counts for it, whatever the form of the image and its neighbours."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("detectron2", reason="detectron2 is not installed: python tools/install_detectron2.py")

from detectron2.data import DatasetCatalog, build_detection_test_loader
from detectron2.data.detection_utils import read_image
from detectron2.evaluation.coco_evaluation import instances_to_coco_json

from crossmae.errors import UserError
from det.config import load_det_config
from det.data.coco import register_coco
from det.data.loader import NamingMapper
from det.inference.predict import (
    Classes,
    Predictor,
    coco_annotations,
    find_classes,
    read_config,
    read_rgb,
    threshold_below,
)
from tests.det.coco_files import save, write_coco
from tests.det.detectors import write_run

ORIENTATION = 274


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("predict") / "run")


@pytest.fixture(scope="module")
def predictor(run):
    return Predictor(None, run)


def noise(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def assert_same(one, other, tolerance=0.0):
    assert len(one) == len(other) > 0
    assert one.image_size == other.image_size
    torch.testing.assert_close(one.pred_boxes.tensor, other.pred_boxes.tensor, atol=tolerance, rtol=0)
    torch.testing.assert_close(one.scores, other.scores, atol=tolerance, rtol=0)
    assert torch.equal(one.pred_classes, other.pred_classes)
    assert torch.equal(one.pred_masks, other.pred_masks)


@pytest.mark.parametrize("channels", ["RGB", "BGR"])
def test_a_file_gives_exactly_what_evaluation_counts(tmp_path, channels):
    """Also one that a telephone stored lying on its side, a grey one, and one that is larger than the model sees."""
    _, images, content = write_coco(tmp_path / "data", images=3)
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    Image.fromarray(noise(48, 80)).save(images / "1.png", exif=exif)
    Image.fromarray(noise(150, 90)[..., 0]).save(images / "2.png")
    for entry, (width, height) in zip(content["images"], [(48, 80), (90, 150), (64, 64)], strict=True):
        entry |= {"width": width, "height": height}
    for annotation in content["annotations"]:
        annotation["segmentation"] = [[8, 8, 30, 8, 30, 30]]
    register_coco("predict_test", save(tmp_path / "data", content), images, masks=True)
    run = write_run(tmp_path / "run", f"INPUT.FORMAT={channels}", "DATASETS.TEST=('predict_test',)")
    predictor = Predictor(None, run)
    loader = build_detection_test_loader(predictor.cfg, "predict_test", mapper=NamingMapper(predictor.cfg, False))
    count = 0
    for batch in loader:
        with torch.no_grad():
            (expected,) = predictor.model(batch)
        assert_same(predictor(batch[0]["file_name"]), expected["instances"])
        count += 1
    assert count == len(DatasetCatalog.get("predict_test")) == 3


def test_the_form_of_an_image_does_not_matter(tmp_path, predictor):
    exif = Image.Exif()
    exif[ORIENTATION] = 8
    path = tmp_path / "photo.png"
    Image.fromarray(noise(40, 70)).save(path, exif=exif)
    upright = np.ascontiguousarray(np.rot90(noise(40, 70)))
    expected = predictor(upright)
    assert expected.image_size == (70, 40)
    assert expected.pred_masks.shape == (len(expected), 70, 40)
    assert expected.pred_masks.dtype == torch.bool
    for image in (path, str(path), Image.open(path), upright):
        assert_same(predictor(image), expected)


def test_transparency_is_white_in_a_file_and_in_an_image(tmp_path):
    rgba = np.dstack([noise(4, 6), np.full((4, 6), 0, np.uint8)])
    Image.fromarray(rgba).save(tmp_path / "clear.png")
    for image in (tmp_path / "clear.png", Image.fromarray(rgba)):
        assert (read_rgb(image) == 255).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_all_orientations_are_read_as_in_training(tmp_path, orientation):
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    path = tmp_path / "photo.png"
    Image.fromarray(noise(6, 9)).save(path, exif=exif)
    assert np.array_equal(read_rgb(Image.open(path)), read_image(str(path), "RGB"))


def test_a_batch_gives_what_its_images_give_alone(predictor):
    """Global attention sees padding, so no image may be padded for the sake of another one."""
    images = [noise(64, 64), noise(64, 30, 1), noise(33, 64, 2), noise(64, 64, 3), noise(64, 25, 4)]
    sizes = []
    hook = predictor.model.backbone.register_forward_pre_hook(lambda _, inputs: sizes.append(tuple(inputs[0].shape)))
    found = predictor.predict(images)
    hook.remove()
    assert sizes == [(2, 3, 64, 64), (2, 3, 64, 32), (1, 3, 40, 64)]
    for image, instances in zip(images, found, strict=True):
        assert_same(instances, predictor(image), tolerance=1e-4)
    assert predictor.predict([]) == []


def test_an_image_larger_than_the_pad_is_resized_not_cropped(tmp_path):
    predictor = Predictor(None, write_run(tmp_path / "run", "MODEL.VIT.SQUARE_PAD_TEST=64"))
    seen = []
    predictor.model.backbone.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    large = noise(320, 200)
    found = predictor(large)
    small = np.asarray(Image.fromarray(large).resize((40, 64), Image.Resampling.BILINEAR))
    expected = predictor(small)
    assert [tuple(image.shape) for image in seen] == [(1, 3, 64, 64)] * 2
    assert torch.equal(seen[0], seen[1])
    torch.testing.assert_close(found.pred_boxes.tensor, 5 * expected.pred_boxes.tensor, atol=1e-3, rtol=0)


def test_the_score_threshold_leaves_out_and_changes_nothing_else(run, predictor):
    every = predictor(noise(64, 64))
    limit = float(every.scores[2])
    cfg = read_config(None, run, [f"MODEL.ROI_HEADS.SCORE_THRESH_TEST={limit}"])
    assert_same(Predictor(cfg, run)(noise(64, 64)), every[:2])


def test_without_masks_only_masks_are_missing(run, predictor):
    whole, boxes = predictor(noise(64, 64)), Predictor(None, run, masks=False)(noise(64, 64))
    assert not boxes.has("pred_masks")
    assert torch.equal(boxes.pred_boxes.tensor, whole.pred_boxes.tensor)


def test_config_and_weights_are_found_in_a_run_or_named(run, predictor, tmp_path):
    expected = predictor(noise(64, 64))
    config = load_det_config(str(run / "config.yaml"))
    config.freeze()
    before = config.dump()
    for given, weights in (
        (None, run / "model_final.pth"),
        (str(run), str(run)),
        (run / "config.yaml", run),
        (config, run),
    ):
        assert_same(Predictor(given, weights, "cpu")(noise(64, 64)), expected)
    assert config.dump() == before
    assert str(run / "model_final.pth") == predictor.cfg.MODEL.WEIGHTS
    torch.save({"model": Predictor(None, run).model.state_dict()}, tmp_path / "moved.pth")
    with pytest.raises(UserError, match=r": has no config.yaml. Name the config"):
        Predictor(None, tmp_path / "moved.pth")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"weights": "nowhere"}, "nowhere: no such file or folder. Name a detector's weights"),
        ({"device": "tpu"}, "MODEL.DEVICE: 'tpu' is not allowed. It must be cpu, cuda, cuda:N or mps"),
    ],
)
def test_wrong_arguments_are_named(run, arguments, message):
    with pytest.raises(UserError, match=message):
        Predictor(**{"config": None, "weights": run, **arguments})


def test_files_that_can_not_be_read_are_named(tmp_path, predictor):
    whole = tmp_path / "whole.jpg"
    Image.fromarray(noise(64, 64)).save(whole)
    (tmp_path / "cut.jpg").write_bytes(whole.read_bytes()[:1000])
    (tmp_path / "text.jpg").write_text("no image")
    for name, reason in (
        ("cut.jpg", " as an image: .*truncated"),
        ("text.jpg", " as an image: .*not an image"),
        ("none.jpg", ": .*No such file"),
    ):
        with pytest.raises(UserError, match=rf"{name}: cannot be read{reason}"):
            predictor(tmp_path / name)


@pytest.mark.parametrize("wrong", [noise(8, 8)[..., 0], noise(8, 8).astype(np.float32), noise(0, 8)])
def test_arrays_that_are_no_images_are_refused(predictor, wrong):
    with pytest.raises(ValueError, match=r"expected \(H, W, 3\) uint8 RGB, received"):
        predictor(wrong)


def test_classes_come_from_a_file_or_the_run_or_are_numbers(tmp_path, run, caplog):
    predictor = Predictor(None, run)
    numbered = find_classes(predictor)
    assert numbered == Classes(("class 1", "class 2", "class 3"), (1, 2, 3))
    assert "has no class names" in caplog.text
    (tmp_path / "names.txt").write_text("red\n\n green \nblue")
    assert find_classes(predictor, tmp_path / "names.txt") == Classes(("red", "green", "blue"), (1, 2, 3))
    path, _, content = write_coco(tmp_path / "data")
    content["categories"].append({"id": 90, "name": "c"})
    path = save(tmp_path / "data", content)
    assert find_classes(predictor, path) == Classes(("a", "b", "c"), (1, 3, 90))
    (tmp_path / "names.JSON").write_text(json.dumps({"categories": content["categories"]}))
    assert find_classes(predictor, tmp_path / "names.JSON") == Classes(("a", "b", "c"), (1, 3, 90))
    record = run / "run.json"
    record.write_text(json.dumps({"classes": ["x", "y", "z"], "category_ids": [5, 7, 8]}))
    try:
        recorded = find_classes(Predictor(None, run))
    finally:
        record.unlink()
    assert recorded == Classes(("x", "y", "z"), (5, 7, 8))


def test_wrong_classes_are_named(tmp_path, predictor):
    (tmp_path / "names.txt").write_text("one\ntwo")
    with pytest.raises(UserError, match=r"names.txt: has 2 class names. The detector needs 3"):
        find_classes(predictor, tmp_path / "names.txt")
    with pytest.raises(UserError, match=r"none\.txt: cannot be read: No such file"):
        find_classes(predictor, tmp_path / "none.txt")
    for number, wrong in enumerate(({"id": 3}, {"id": None, "name": "c"})):
        file = tmp_path / f"{number}.json"
        file.write_text(json.dumps({"categories": [{"id": 1, "name": "a"}, {"id": 2, "name": "b"}, wrong]}))
        with pytest.raises(UserError, match=rf"{number}\.json: .*categories\[2\]"):
            find_classes(predictor, file)


def test_other_architectures_are_refused(run):
    cfg = read_config(None, run, ["MODEL.META_ARCHITECTURE=ProposalNetwork"])
    with pytest.raises(UserError, match="ProposalNetwork cannot predict here"):
        Predictor(cfg, run)


@pytest.mark.parametrize("size", [(50, 64), (64, 64), (230, 171), (40, 500)])
def test_annotations_say_what_the_dense_masks_say(predictor, size):
    image, classes = noise(*size), Classes(("a", "b", "c"), (4, 6, 9))
    (raw,), dense = predictor.predict_raw([image]), predictor(image)
    annotations = coco_annotations(raw, 17, *size, classes)
    assert len(annotations) == len(dense) > 0
    assert max(mask.sum() for mask in dense.pred_masks) > 0
    for index, expected in enumerate(instances_to_coco_json(dense, 17)):
        area = int(dense.pred_masks[index].sum())
        assert annotations[index] == {
            "image_id": 17,
            "category_id": classes.category_ids[expected["category_id"]],
            "bbox": [round(value, 3) for value in expected["bbox"]],
            "score": round(expected["score"], 6),
            "segmentation": expected["segmentation"],
            "area": area,
            "iscrowd": 0,
        }
    assert json.loads(json.dumps(annotations)) == annotations
    raw.remove("pred_masks")
    (first, *_) = coco_annotations(raw, 17, *size, classes)
    assert "segmentation" not in first
    assert first["area"] == pytest.approx(first["bbox"][2] * first["bbox"][3], abs=1e-3)


def test_names_pictures_and_lists(run, tmp_path):
    """Names by number, a picture that differs only near objects, and a list like its images one by one."""
    predictor = Predictor(None, run)
    images = [noise(48, 64), Image.fromarray(noise(40, 60, 1)), str(tmp_path / "c.png")]
    Image.fromarray(noise(30, 30, 2)).save(images[2])
    many = predictor(images)
    for image, found in zip(images, many, strict=True):
        assert_same(found, predictor(image))
    found = many[0]
    assert predictor.names(found) == [f"class {number + 1}" for number in found.pred_classes.tolist()]
    predictor.class_names = ("red", "green", "blue")
    assert predictor.names(found) == [predictor.class_names[number] for number in found.pred_classes.tolist()]
    nothing = np.asarray(predictor.draw(images[0], found[:0]))
    one = np.asarray(predictor.draw(images[0], found[:1]))
    changed = np.argwhere((nothing != one).any(axis=2)) / (len(one) / 48)
    assert len(changed) > 0
    x0, y0, _, y1 = found.pred_boxes.tensor[0].tolist()
    label = 48 * 0.1
    assert (changed >= (y0 - label - 1, x0 - 2)).all()
    assert (changed[:, 0] <= y1 + label + 1).all()
    with pytest.raises(ValueError, match=r"of an image of \(48, 64\), not of \(40, 60\)"):
        predictor.draw(images[1], found)


@pytest.mark.parametrize(
    ("score", "threshold"),
    [(0.31, 0.3), (0.3, 0.2), (0.96, 0.9), (1.0, 0.9), (0.1, 0.09), (0.042, 0.04), (0.04, 0.03), (3e-7, 2e-7), (0, 0)],
)
def test_the_next_threshold_is_below_the_score(score, threshold):
    assert threshold_below(score) == pytest.approx(threshold)
    assert threshold_below(score) < score or score == 0


def test_the_best_score_tells_why_there_is_nothing(run):
    predictor = Predictor(load_det_config(str(run / "config.yaml"), ["MODEL.ROI_HEADS.SCORE_THRESH_TEST=0.99"]), run)
    assert len(predictor(noise(48, 64))) == 0
    best = predictor.highest_score(noise(48, 64))
    lower = f"MODEL.ROI_HEADS.SCORE_THRESH_TEST={threshold_below(best)}"
    again = Predictor(load_det_config(str(run / "config.yaml"), [lower]), run)
    assert float(again(noise(48, 64)).scores[0]) == pytest.approx(best)
