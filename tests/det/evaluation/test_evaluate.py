"""Evaluation predicts what detectron2's own does, image by image and byte by byte, and writes what it says it does;
processes share the images without overlap, and what cannot be evaluated is refused before anything is written."""

import json
import math
import signal
import threading

import pytest
import torch
from detectron2.data import build_detection_test_loader
from detectron2.evaluation import COCOEvaluator, inference_on_dataset
from detectron2.modeling import build_model
from detectron2.utils import comm
from PIL import Image
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from crossmae.errors import UserError
from crossmae.training.signals import StopAsked, StopRequest
from det.data.coco import use_own_data
from det.data.loader import NamingMapper
from det.evaluation.evaluate import evaluate, format_results, predict, write_predictions
from det.evaluation.report import build_report
from tests.det.coco_files import save, write_coco

NUMBERS = {"AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl"}


@pytest.fixture
def cfg(cfg, tmp_path):
    """A tiny detector and three images; the third of its classes has no objects."""
    cfg.OUTPUT_DIR = str(tmp_path / "out")
    path, images, content = write_coco(tmp_path / "data", images=3)
    content["categories"].append({"id": 7, "name": "c"})
    for number in (1, 2):  # not all of one size, nor of that of the model's input
        Image.new("RGB", (100, 48 + 8 * number), (90 * number, 60, 0)).save(images / f"{number}.png")
        content["images"][number - 1] |= {"width": 100, "height": 48 + 8 * number}
        for annotation in content["annotations"][2 * number - 2 : 2 * number]:
            x, y, w, h = annotation["bbox"]
            annotation["segmentation"] = [[x, y, x + w, y, x + w, y + h]]
    use_own_data(cfg, None, (str(save(path.parent, content)), str(images)))
    return cfg


@pytest.fixture
def model(cfg):
    torch.manual_seed(0)
    model = build_model(cfg)
    nn.init.normal_(model.roi_heads.mask_head.predictor.bias, std=2)  # masks that differ
    return model


def test_predictions_and_numbers_are_those_of_detectron2(cfg, model, tmp_path):
    model.train()
    results = evaluate(cfg, model)
    assert model.training
    evaluator = COCOEvaluator(cfg.DATASETS.TEST[0], ("bbox", "segm"), output_dir=str(tmp_path / "theirs"))
    loader = build_detection_test_loader(cfg, cfg.DATASETS.TEST[0], mapper=NamingMapper(cfg, False))
    expected = inference_on_dataset(model, loader, evaluator)

    name = "coco_instances_results.json"
    found = json.loads((tmp_path / "out/inference" / name).read_text())
    assert found == json.loads((tmp_path / "theirs" / name).read_text())
    assert len(found) == 15
    assert any("segmentation" in result and len(result["segmentation"]["counts"]) > 5 for result in found)
    for task in ("bbox", "segm"):
        assert {f"AP-{name}" for name in "abc"} | NUMBERS == set(results[task])
        for key, value in expected[task].items():
            assert results[task][key] == pytest.approx(value, abs=1e-12, nan_ok=True)


def test_what_is_written(cfg, model, tmp_path):
    results = evaluate(cfg, model)
    written = json.loads((tmp_path / "out/results.json").read_text())
    assert set(written) == {"bbox", "segm", "classes"}
    for task in ("bbox", "segm"):
        for key, value in results[task].items():
            assert written[task][key] == (None if math.isnan(value) else round(value, 4))
        with Image.open(tmp_path / f"out/inference/pr_curves_{task}.png") as picture:
            assert picture.size[0] > 2 * picture.size[1] > 600
    assert [(entry["name"], entry["objects"]) for entry in written["classes"]] == [("a", 3), ("b", 3), ("c", 0)]
    assert written["classes"][0]["bbox"]["AP"] == written["bbox"]["AP-a"]
    assert written["classes"][2]["segm"] == {"AP": None, "AP50": None}
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["inference", "pictures", "results.json"]


def test_a_detector_without_masks_has_boxes_alone(cfg, tmp_path):
    cfg.MODEL.MASK_ON = False
    assert set(evaluate(cfg, build_model(cfg))) == {"bbox"}
    found = json.loads((tmp_path / "out/inference/coco_instances_results.json").read_text())
    assert found
    assert not any("segmentation" in result for result in found)


def test_results_have_the_ids_of_the_file(cfg, tmp_path):
    path, images, content = write_coco(tmp_path / "text", images=2)
    for entry in [*content["images"], *content["annotations"]]:
        key = "id" if "file_name" in entry else "image_id"
        entry[key] = f"img{entry[key]}"
        if key == "image_id":
            entry["category_id"] = f"c{entry['category_id']}"
    for entry in content["categories"]:
        entry["id"] = f"c{entry['id']}"
    use_own_data(cfg, None, (str(save(path.parent, content)), str(images)))
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 2
    torch.manual_seed(0)
    results = evaluate(cfg, build_model(cfg))
    assert not math.isnan(results["bbox"]["AP"])
    found = json.loads((tmp_path / "out/inference/coco_instances_results.json").read_text())
    assert {result["image_id"] for result in found} == {"img1", "img2"}
    assert {result["category_id"] for result in found} <= {"c1", "c3"}


@pytest.mark.parametrize("odd", [7, 2**70, "a name", "half of a character: \ud83d"])
def test_predictions_are_written_with_any_id(tmp_path, odd):
    results = [{"image_id": odd, "category_id": 1, "bbox": [0.1, 1e-7, 2 / 3, 4.0], "score": 0.30000001192092896}]
    write_predictions(tmp_path / "results.json", results)
    assert json.loads((tmp_path / "results.json").read_bytes()) == results


@pytest.mark.parametrize("evaluator", ["pycocotools", "auto"])
def test_without_annotations_false_alarms_are_counted(cfg, tmp_path, caplog, evaluator):
    caplog.set_level("INFO")
    path, images, content = write_coco(tmp_path / "empty", images=2)
    content["annotations"] = []
    use_own_data(cfg, None, (str(save(path.parent, content)), str(images)))
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 2
    cfg.TEST.EVALUATOR = evaluator
    torch.manual_seed(0)
    results = evaluate(cfg, build_model(cfg))
    assert all(math.isnan(value) for task in results.values() for value in task.values())
    found = json.loads((tmp_path / "out/inference/coco_instances_results.json").read_text())
    written = json.loads((tmp_path / "out/results.json").read_text())["false_alarms"]
    assert written[0] == {"score": 0.0, "detections": len(found), "images": 2}
    for row in written:
        assert row["detections"] == sum(result["score"] >= row["score"] for result in found)
    assert f"every detection is a false alarm: {len(found)} with scores from 0, " in caplog.text
    assert "every detection is a false alarm" in build_report(tmp_path / "out").to_html()
    assert len(list((tmp_path / "out/pictures").iterdir())) == 2


def test_both_evaluators_by_the_key_of_the_config(cfg, model):
    pytest.importorskip("hotcoco")
    fast = evaluate(cfg, model)
    cfg.TEST.EVALUATOR = "pycocotools"
    slow = evaluate(cfg, model)
    assert str(fast) == str(slow)  # as text, where NaN equals NaN


def test_a_model_in_data_parallel_is_the_model(cfg, model, tmp_path):
    alone = evaluate(cfg, model)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        assert str(evaluate(cfg, DistributedDataParallel(model))) == str(alone)
    finally:
        torch.distributed.destroy_process_group()


def test_processes_share_the_images(cfg, model, monkeypatch):
    def part(rank, processes):
        monkeypatch.setattr(comm, "get_rank", lambda: rank)
        monkeypatch.setattr(comm, "get_world_size", lambda: processes)
        loader = build_detection_test_loader(cfg, cfg.DATASETS.TEST[0], mapper=NamingMapper(cfg, False))
        return predict(model, loader, [1, 3, 7])

    whole = part(0, 1)
    assert part(0, 2) + part(1, 2) == whole
    assert {result["image_id"] for result in whole} == {1, 2, 3}

    parts = [part(0, 2), part(1, 2)]
    monkeypatch.setattr(comm, "gather", lambda mine, dst: parts if comm.is_main_process() else [])
    assert evaluate(cfg, model) == {}  # the second process
    monkeypatch.setattr(comm, "get_rank", lambda: 0)
    gathered = evaluate(cfg, model)
    monkeypatch.undo()
    assert str(gathered) == str(evaluate(cfg, model))


def test_a_model_of_another_kind_or_number_of_classes_is_refused(cfg, model, tmp_path):
    with pytest.raises(UserError, match=r"MODEL\.META_ARCHITECTURE: Identity cannot be evaluated"):
        evaluate(cfg, nn.Identity())
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 80
    with pytest.raises(
        UserError, match=r"coco\.json: has 3 categories .* the detector has 80 classes, whose names are"
    ):
        evaluate(cfg, build_model(cfg))
    assert not (tmp_path / "out").exists()


def test_an_image_that_can_not_be_read_is_named(cfg, model, tmp_path):
    (tmp_path / "data/images/2.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"2\.png: cannot be read as an image"):
        evaluate(cfg, model)
    assert not (tmp_path / "out").exists()


def test_threads_find_the_same_results(cfg, model):
    loader = build_detection_test_loader(cfg, cfg.DATASETS.TEST[0], mapper=NamingMapper(cfg, False))
    inline, threaded = (predict(model, loader, (1, 3, None), threads=threads) for threads in (0, 2))
    assert inline == threaded
    assert {result["image_id"] for result in inline} == {1, 2, 3}


def test_a_signal_stops_threads_between_two_images(cfg, model, monkeypatch):
    loader, called = build_detection_test_loader(cfg, cfg.DATASETS.TEST[0], mapper=NamingMapper(cfg, False)), []

    def encode(instances, image_id, *_):
        called.append(image_id)
        request.number = signal.SIGTERM
        return []

    monkeypatch.setattr("det.evaluation.evaluate.coco_results", encode)

    def predict_often():
        for _ in range(100):  # a thread may be slower than all images
            predict(model, loader, (1, 3, None), threads=2)

    before = threading.active_count()
    with StopRequest() as request, pytest.raises(StopAsked):
        predict_often()
    assert called
    assert threading.active_count() == before


@pytest.mark.parametrize("threads", [0, 2])
def test_an_error_in_a_thread_names_the_image(cfg, model, monkeypatch, threads):
    loader = build_detection_test_loader(cfg, cfg.DATASETS.TEST[0], mapper=NamingMapper(cfg, False))
    monkeypatch.setattr("det.evaluation.evaluate.coco_results", lambda *_: [][0])
    with pytest.raises(RuntimeError, match=r"1\.png: the predictions cannot be encoded: list index"):
        predict(model, loader, (1, 3, None), threads=threads)


def test_the_table():
    box = {"AP": 51.64, "AP50": 70.0, "AP75": math.nan, "APs": 1.0, "AR100": 60.06, "AP-cat": math.nan, "AP-a dog": 3.0}
    assert format_results({"bbox": box, "segm": {**box, "AP": 48.0}}).splitlines() == [
        "           AP    AP50    AP75",
        "box      51.6    70.0       -",
        "mask     48.0    70.0       -",
        "",
        "          APs   AR100",
        "box       1.0    60.1",
        "mask      1.0    60.1",
        "",
        "class  box AP mask AP",
        "cat         -       -",
        "a dog     3.0     3.0",
    ]
    many = {"AP": 1.0, "AP50": 1.0, "AP75": 1.0, **{f"AP-{number}": 1.0 for number in range(1203)}}
    assert format_results({"bbox": many}).splitlines()[2:] == ["", "AP of each of the 1203 classes: see results.json"]
