"""A detector meets data by the names of its classes: in weight files, evaluation, fine-tuning and prediction."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("detectron2", reason="detectron2 is not installed: python tools/install_detectron2.py")

from detectron2.config import CfgNode
from detectron2.modeling import build_model

from crossmae.checkpoints.weights import read_weights
from crossmae.errors import UserError
from det.backbone.weights import build_trained, load_weights
from det.classes import Classes, classes_of, match_categories, recorded_classes, remember_classes, without_spare
from det.data.coco import use_own_data
from det.evaluation.evaluate import evaluate
from det.evaluation.report import write_report
from det.inference.predict import Predictor, find_classes
from det.training.checkpoint import write_detector
from tests.det.coco_files import save, write_coco

TRAINED = Classes(("a", "b", "c"), (1, 3, 7))


@pytest.fixture
def trained(cfg: CfgNode, tmp_path: Path) -> Any:
    """A detector of three classes in tmp_path / "run", whose weight file has their names."""
    torch.manual_seed(0)
    model = build_model(cfg)
    remember_classes(model, TRAINED)
    (tmp_path / "run").mkdir()
    write_detector(tmp_path / "run" / "model_final.safetensors", model.state_dict(), classes_of(model).metadata(), 1)
    cfg.MODEL.WEIGHTS = str(tmp_path / "run/model_final.safetensors")
    return model


def test_every_weight_file_carries_its_classes_and_they_win_over_a_stranger_next_to_it(
    trained: Any, tmp_path: Path
) -> None:
    weights = read_weights(tmp_path / "run/model_final.safetensors")
    (tmp_path / "run/run.json").write_text(json.dumps({"classes": ["x"], "category_ids": [1]}))
    assert recorded_classes(weights.path, weights.metadata, 3) == TRAINED
    with pytest.raises(UserError, match=r"run\.json: has 1 class name. The detector model_final\.safetensors needs 3"):
        recorded_classes(weights.path, {}, 3)
    (tmp_path / "run/run.json").write_text("{")
    assert recorded_classes(weights.path, {}, 3) is None


@pytest.mark.parametrize(
    "names, ids",
    [
        (("a", "b", "c"), (10, 20, 30)),
        (("c", "a", "b"), (20, 30, 10)),
        (("B ",), (None, 10, None)),
        (("c", "b"), (None, 20, 10)),
    ],
)
def test_categories_are_found_by_name(names: tuple[str, ...], ids: tuple[int | None, ...]) -> None:
    assert match_categories(TRAINED, 3, [10, 20, 30][: len(names)], names, "val.json") == ids


def test_a_detector_without_names_is_compared_by_number(caplog: pytest.LogCaptureFixture) -> None:
    assert match_categories(None, 2, [4, 9], ["x", "y"], "val.json") == (4, 9)
    assert "does not record the names" in caplog.text
    with pytest.raises(UserError, match=r"val\.json: has 1 category \('x'\), but the detector has 2 classes, whose"):
        match_categories(None, 2, [4], ["x"], "val.json")


def test_categories_without_objects_that_the_detector_does_not_know_are_left_out(
    caplog: pytest.LogCaptureFixture,
) -> None:
    found = Classes(("_background_", "a", "d"), (0, 1, 2))
    assert without_spare(found, TRAINED, {0, 1}, "x.json") == Classes(("a", "d"), (1, 2))
    assert "x.json: categories without objects that the detector does not know: '_background_'" in caplog.text
    assert without_spare(found, TRAINED, set(), "x.json") == found
    assert without_spare(found, None, {0, 1, 2}, "x.json") == found
    foreign = Classes(("ship",), (1,))
    assert without_spare(foreign, TRAINED, {1}, "x.json") == foreign  # the comparison names it


def test_a_background_category_changes_no_score(trained: Any, cfg: CfgNode, tmp_path: Path) -> None:
    scores = []
    for extra in ([], [{"id": 99, "name": "_background_"}]):
        path, images, content = write_coco(tmp_path / f"data{len(extra)}")
        content["categories"] += extra
        use_own_data(cfg, None, (str(save(path.parent, content)), str(images)))
        scores.append(evaluate(cfg, trained)["bbox"]["AP"])
    assert scores[0] == scores[1]


def test_the_number_of_classes_comes_from_the_file(trained: Any, cfg: CfgNode) -> None:
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 80
    model = build_trained(cfg)
    assert cfg.MODEL.ROI_HEADS.NUM_CLASSES == 3
    assert classes_of(model) == TRAINED


def detections(cfg: CfgNode, folder: Path, names: dict[int, str]) -> list[tuple[str, Any]]:
    """Evaluate on a file with these categories, and return what was found: names and boxes, sorted."""
    path, images, content = write_coco(folder, images=2)
    content["categories"] = [{"id": number, "name": name} for number, name in names.items()]
    content["annotations"] = [one | {"category_id": min(names)} for one in content["annotations"]]
    use_own_data(cfg, None, (str(save(path.parent, content)), str(images)))
    cfg.OUTPUT_DIR = str(folder / "out")
    results = evaluate(cfg, build_trained(cfg))
    assert {key for key in results["bbox"] if key.startswith("AP-")} == {f"AP-{name}" for name in names.values()}
    found = json.loads((folder / "out/inference/coco_instances_results.json").read_text())
    return sorted((names[one["category_id"]].strip().lower(), one["bbox"]) for one in found)


def test_detections_do_not_depend_on_the_order_or_the_number_of_categories(
    trained: Any, cfg: CfgNode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("det.evaluation.evaluate.validation_pictures", lambda *_: [])
    monkeypatch.setattr("det.evaluation.evaluate.save_figure", lambda *_: None)
    whole = detections(cfg, tmp_path / "whole", {1: "a", 3: "b", 7: "c"})
    assert len({name for name, _ in whole}) > 1
    assert detections(cfg, tmp_path / "other", {1: "c", 2: "b", 3: "A "}) == whole
    assert "left_out" not in json.loads((tmp_path / "other/out/results.json").read_text())
    for name in "abc":
        assert detections(cfg, tmp_path / name, {5: name}) == [one for one in whole if one[0] == name]
    assert json.loads((tmp_path / "b/out/results.json").read_text())["left_out"] == ["a", "c"]
    assert "not scored: &#39;a&#39;, &#39;c&#39;." in write_report(tmp_path / "b/out").read_text()
    with pytest.raises(UserError, match=r"not know 'd' \(it has the classes 'a', 'b', 'c', the data list 'd', 'a'\)"):
        detections(cfg, tmp_path / "more", {1: "d", 3: "a"})
    assert not (tmp_path / "more/out").exists()


@pytest.mark.parametrize("agnostic", [False, True])
def test_rows_of_the_heads_follow_their_names(
    trained: Any, cfg: CfgNode, agnostic: bool, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    cfg.MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG = cfg.MODEL.ROI_MASK_HEAD.CLS_AGNOSTIC_MASK = agnostic
    old = build_model(cfg)
    remember_classes(old, TRAINED)
    write_detector(tmp_path / "run" / "model_final.safetensors", old.state_dict(), classes_of(old).metadata(), 1)
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 2
    model = build_model(cfg)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    remember_classes(model, Classes(("new", "b"), (1, 2)))
    load_weights(model, cfg)
    assert "the head keeps the classes 'b'. New, from random weights: 'new'. Left out: 'a', 'c'" in caplog.text
    assert classes_of(model) == Classes(("new", "b"), (1, 2))
    heads, trained_heads = model.roi_heads, old.roi_heads
    scores, trained_scores = heads.box_predictor.cls_score.weight, trained_heads.box_predictor.cls_score.weight
    assert torch.equal(scores[0], before["roi_heads.box_predictor.cls_score.weight"][0])
    assert torch.equal(scores[1:], trained_scores[[1, 3]])  # the class, and the background
    boxes, trained_boxes = heads.box_predictor.bbox_pred.weight, trained_heads.box_predictor.bbox_pred.weight
    masks, trained_masks = heads.mask_head.predictor.bias, trained_heads.mask_head.predictor.bias
    if agnostic:
        assert torch.equal(boxes, trained_boxes)
        assert torch.equal(masks, trained_masks)
    else:
        assert torch.equal(boxes[:4], before["roi_heads.box_predictor.bbox_pred.weight"][:4])
        assert torch.equal(boxes[4:], trained_boxes[4:8])
        assert torch.equal(masks[1], trained_masks[1])


def test_without_a_common_class_the_last_layers_are_new(
    trained: Any, cfg: CfgNode, caplog: pytest.LogCaptureFixture
) -> None:
    model = build_model(cfg)
    remember_classes(model, Classes(("x", "y", "z"), (1, 2, 3)))
    report = load_weights(model, cfg)
    assert "keeps the classes none. New, from random weights: 'x', 'y', 'z'. Left out: 'a', 'b', 'c'" in caplog.text
    assert {name.rpartition(".")[0] for name in report.names("new")} == {
        "roi_heads.box_predictor.cls_score", "roi_heads.box_predictor.bbox_pred", "roi_heads.mask_head.predictor",
    }  # fmt: skip


def test_the_same_classes_load_as_they_are(trained: Any, cfg: CfgNode, caplog: pytest.LogCaptureFixture) -> None:
    model = build_model(cfg)
    remember_classes(model, TRAINED)
    load_weights(model, cfg)
    assert not [record for record in caplog.records if record.levelname == "WARNING"]
    for name, tensor in trained.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name


def test_prediction_maps_the_classes_of_a_file(trained: Any, cfg: CfgNode, tmp_path: Path) -> None:
    predictor = Predictor(cfg, cfg.MODEL.WEIGHTS)
    assert find_classes(predictor) == TRAINED
    assert predictor.class_names == TRAINED.names
    coco = tmp_path / "names.json"
    coco.write_text(json.dumps({"categories": [{"id": 5, "name": "c"}, {"id": 9, "name": "A"}]}))
    found = find_classes(predictor, coco)
    assert found == replace(TRAINED, category_ids=(9, None, 5))
    assert found.by_id() == {9: "a", 5: "c"}
    (tmp_path / "names.txt").write_text("ship\nplane\ncar")
    with pytest.raises(UserError, match=r"names\.txt: its classes differ, the detector does not know any of them"):
        find_classes(predictor, tmp_path / "names.txt")
