"""One safetensors file is a whole detector: every reader takes it as it takes a run's .pth and config, bit for bit."""

from __future__ import annotations

import json
import logging
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("detectron2", reason="detectron2 is not installed: python tools/install_detectron2.py")

from detectron2.checkpoint import DetectionCheckpointer
from detectron2.modeling import build_model

import det
from crossmae import checkpoints
from crossmae.checkpoints.formats.training_record import recorded_training
from crossmae.checkpoints.metadata import DETECTOR_CONFIG, STARTED_FROM
from crossmae.checkpoints.provenance import LICENCE, NON_COMMERCIAL, inherited
from crossmae.checkpoints.weights import read_weights, save_weights
from crossmae.errors import UserError
from det.backbone.record import detector_metadata, training_metadata
from det.backbone.weights import build_detector, load_weights
from det.classes import Classes, classes_of
from det.config import build_det_config, flatten, load_det_config
from det.inference.predict import Predictor, read_config
from det.training.checkpoint import write_detector
from tests.det.coco_files import write_coco
from tests.det.detectors import write_run
from tests.tools.command_line import exit_code
from tools import evaluate, export_detector, predict, train_net

CLASSES = Classes(("red", "green", "blue"), (1, 2, 3))
ROOT = Path(__file__).parents[3]


def picture(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (48, 80, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An earlier version's run: .pth, config.yaml and run.json. BGR and odd pixels, so that a lost setting shows."""
    words = ("INPUT.FORMAT=BGR", "MODEL.PIXEL_MEAN=[100.5,110.5,120.5]", "INPUT.MIN_SIZE_TEST=56")
    run = write_run(tmp_path_factory.mktemp("single") / "run", *words, "DATASETS.TEST=('secret',)")
    (run / "run.json").write_text(json.dumps({"classes": CLASSES.names, "category_ids": CLASSES.category_ids}))
    return run


@pytest.fixture(scope="module")
def single(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same detector in one file, alone in its folder."""
    values = dict(flatten(load_det_config(str(run / "config.yaml"))))
    metadata = detector_metadata(values, CLASSES) | training_metadata(values, {"train": "/home/me/t.json"}, 7)
    path = tmp_path_factory.mktemp("alone") / "x.safetensors"
    write_detector(path, read_weights(run).tensors, metadata, 5)
    return path


def same(one: Predictor, other: Predictor) -> bool:
    (first, second) = (detector.predict([picture(0), picture(1)]) for detector in (one, other))
    assert all(len(found) for found in first)
    return all(
        torch.equal(a.pred_boxes.tensor, b.pred_boxes.tensor)
        and torch.equal(a.scores, b.scores)
        and torch.equal(a.pred_masks, b.pred_masks)
        and torch.equal(a.pred_classes, b.pred_classes)
        for a, b in zip(first, second, strict=True)
    )


def test_all_ways_to_name_it_predict_the_same_bits(run: Path, single: Path) -> None:
    earlier = Predictor(None, run)
    assert earlier.weights == run / "model_final.pth"
    for detector in (Predictor(weights=single), Predictor(single), Predictor.from_pretrained(single)):
        assert same(earlier, detector)
        assert detector.class_names == earlier.class_names == CLASSES.names
    cfg = earlier.cfg.clone()
    assert same(earlier, Predictor(cfg))
    assert "cpu" in str(earlier.model.device)


def test_saved_folders_and_runs_load_the_same_bits(run: Path, single: Path, tmp_path: Path) -> None:
    detector = Predictor.from_pretrained(run)
    for number, source in enumerate((run, single, tmp_path / "0", tmp_path / "1")):
        folder = Predictor.from_pretrained(source).save_pretrained(tmp_path / str(number))
        assert sorted(path.name for path in folder.iterdir()) == ["README.md", "model.safetensors"]
        assert same(detector, Predictor.from_pretrained(folder))
    assert read_weights(tmp_path / "3").metadata == read_weights(tmp_path / "1").metadata
    assert checkpoints.inspect(tmp_path / "3").content == "detector"


def test_the_file_has_no_path_and_no_machine_of_its_author(single: Path) -> None:
    metadata = read_weights(single).metadata
    config = json.loads(metadata[DETECTOR_CONFIG])
    assert not [key for key in config if re.match(r"OUTPUT_DIR|DATASETS|MODEL\.WEIGHTS|MODEL\.DEVICE", key)]
    assert "secret" not in str(metadata)
    assert "/home" not in str(metadata)
    assert json.loads(metadata["pixel_mean"]) == pytest.approx([120.5 / 255, 110.5 / 255, 100.5 / 255], abs=1e-8)
    assert recorded_training(metadata).data["train"].model_dump() == {"name": "t.json", "images": 7}
    whole = build_det_config([("x", config)])
    kept = {key: value for key, value in flatten(whole) if key in config}
    assert json.loads(json.dumps(kept)) == config


def test_settings_and_other_configs_still_come_first(run: Path, single: Path, tmp_path: Path) -> None:
    assert read_config(None, single, ["INPUT.MIN_SIZE_TEST=32"]).INPUT.MIN_SIZE_TEST == 32
    other = tmp_path / "config.yaml"
    other.write_text((run / "config.yaml").read_text().replace("MIN_SIZE_TEST: 56", "MIN_SIZE_TEST: 40"))
    shutil.copy(single, tmp_path)  # a stranger next to the file is not asked
    assert read_config(None, tmp_path / "x.safetensors").INPUT.MIN_SIZE_TEST == 56
    assert read_config(other, single).INPUT.MIN_SIZE_TEST == 40


def test_a_config_that_changes_the_meaning_is_warned_of(single: Path, caplog: pytest.LogCaptureFixture) -> None:
    cfg = read_config(None, single, ["INPUT.FORMAT=RGB", f"MODEL.WEIGHTS={single}"])
    load_weights(build_detector(cfg), cfg, detector_only=True)
    assert f"INPUT.FORMAT is RGB, but the detector was trained with BGR ({single})" in caplog.text


def test_every_tool_takes_it(
    single: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Image.fromarray(picture()).save("a.png")
    found = {}
    for name, weights in (("one", single), ("two", run)):
        words = ("--weights", str(weights), "a.png", "--output", name, "--score-threshold", "0.01")
        assert exit_code(predict.main, *words) == 0
        found[name] = json.loads(Path(name, "predictions.json").read_text())
    assert found["one"]["annotations"] == found["two"]["annotations"] != []
    assert [one["name"] for one in found["one"]["categories"]] == list(CLASSES.names)
    words = ("--weights", str(single), "--output", "b.pt2", "--img-size", "64", "--backbone-only", "--no-check")
    assert exit_code(export_detector.main, *words) == 0
    path, images, _ = write_coco(tmp_path / "data", images=2)
    content = json.loads(path.read_text())
    for category, name in zip(content["categories"], CLASSES.names, strict=False):
        category["name"] = name
    path.write_text(json.dumps(content))
    results = []
    for name, weights in (("three", single), ("four", run)):
        data = ["--val-json", str(path), "--val-images", str(images), f"MODEL.WEIGHTS={weights}", f"OUTPUT_DIR={name}"]
        train_net.main(["--config-file", str(run / "config.yaml"), "--eval-only", *data])
        results.append(json.loads(Path(name, "results.json").read_text()))
    words = (str(single), str(path), "--images", str(images), "--output", "five")
    assert exit_code(evaluate.main, *words) == 0
    results.append(json.loads(Path("five/results.json").read_text()))
    assert results[0] == results[1] == results[2]
    cfg = read_config(None, single, [f"MODEL.WEIGHTS={single}"])
    report = load_weights(build_detector(cfg), cfg)
    assert report is not None
    assert not report.names("new")


def test_a_licence_is_carried_from_the_encoder_to_the_detector_and_its_card(run: Path, tmp_path: Path) -> None:
    values = dict(flatten(load_det_config(str(run / "config.yaml"))))
    metadata = inherited(NON_COMMERCIAL, (), "mae_pretrain_vit_base.pth") | detector_metadata(values, CLASSES)
    write_detector(tmp_path / "x.safetensors", read_weights(run).tensors, metadata, 5)
    detector = Predictor(tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=r"licence: the weights inherit cc-by-nc-4\.0, not mit"):
        detector.save_pretrained(tmp_path / "mine", licence="mit")
    assert not (tmp_path / "mine").exists()
    folder = detector.save_pretrained(tmp_path / "mine")
    card = (folder / "README.md").read_text()
    assert "\nlicense: cc-by-nc-4.0\n" in card
    assert "The training started from `mae_pretrain_vit_base.pth`." in card
    assert NON_COMMERCIAL in card.replace("\\", "")
    saved = read_weights(folder).metadata
    assert (saved[LICENCE], saved[STARTED_FROM]) == (NON_COMMERCIAL, "mae_pretrain_vit_base.pth")
    checkpoints.convert(folder, tmp_path / "encoder.pth", "detectron2")
    encoder = read_weights(tmp_path / "encoder.pth").metadata
    assert encoder[LICENCE] == NON_COMMERCIAL
    assert DETECTOR_CONFIG not in encoder


def test_a_damaged_file_is_refused(single: Path, tmp_path: Path) -> None:
    data = bytearray(single.read_bytes())
    data[-3] ^= 1
    (tmp_path / "x.safetensors").write_bytes(data)
    with pytest.raises(UserError, match="changed or damaged"):
        Predictor(tmp_path / "x.safetensors")
    tensors, metadata = read_weights(single).tensors, read_weights(single).metadata
    save_weights(tmp_path / "y.safetensors", tensors, metadata | {DETECTOR_CONFIG: '{"MODEL.VIT.DEPHT": 3}'})
    with pytest.raises(
        UserError, match=r"y\.safetensors: unknown key MODEL\.VIT\.DEPHT. Did you mean MODEL\.VIT\.DEPTH"
    ):
        Predictor(tmp_path / "y.safetensors")
    with pytest.raises(UserError, match=r"no such file.* run `hf download nobody/detector --local-dir d"):
        Predictor("nobody/detector")
    with pytest.raises(UserError, match="no detector is named"):
        Predictor()


def test_the_line_of_the_docs_writes_what_detectron2_loads(
    single: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = (ROOT / "docs/weights.md").read_text("utf-8")
    (code,) = re.findall(r"<!-- test: detectron2 -->\n```python\n(.*?)```", page, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    Path("outputs/detector").mkdir(parents=True)
    shutil.copy(single, "outputs/detector/model_best.safetensors")
    exec(code, {})
    model = build_model(load_det_config(str(run / "config.yaml")))
    logging.getLogger("fvcore").setLevel(logging.ERROR)
    DetectionCheckpointer(model).load("detector.pth")
    assert all(torch.equal(value, read_weights(single).tensors[name]) for name, value in model.state_dict().items())


def test_the_lines_of_the_docs_on_predictions(single: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (ROOT / "docs/detection.md").read_text("utf-8")
    (code,) = re.findall(r"<!-- test: predictor -->\n```python\n(.*?)```", page, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    Path("outputs/detector").mkdir(parents=True)
    shutil.copy(single, "outputs/detector/model_best.safetensors")
    for name in ("photo.jpg", "a.jpg", "b.png"):
        Image.fromarray(picture()).save(name)
    names: dict[str, Any] = {"det": det, "Image": Image, "pixels": picture()}
    exec(code, names)
    assert [len(found) for found in names["several"]] == [5, 5, 5]
    assert set(names["names"]) <= set(CLASSES.names)
    assert Path("found.png").stat().st_size > 1000


def test_classes_stay_with_the_model(single: Path) -> None:
    assert classes_of(Predictor(single).model) == CLASSES
