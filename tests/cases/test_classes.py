"""Proves that a detector trained on `sound` meets other classes of ../shared/cases by name, or with one clear line."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

pytest.importorskip("detectron2", reason="detectron2 is not installed: python tools/install_detectron2.py")

from detectron2.modeling import build_model

from det.classes import Classes, classes_of, remember_classes
from det.config import load_det_config
from det.training.checkpoint import write_detector
from tests.cases.conftest import Tool, Written
from tools import predict, train_net

# The case, the exit code of train_net --eval-only, and a pattern that its output contains.
OTHERS = (
    r"does not know any of them \(it has the classes 'a', 'b', the data list {}\)\. Give classes that mean the same"
)
EVALUATED: dict[str, tuple[int, str]] = {
    "one_class_less": (0, r"lists 1 of the detector's 2 classes\. Only these are scored\. .* left out: 'b'"),
    "other_names": (2, OTHERS.format("'ship', 'plane'")),
    "chinese_names": (2, OTHERS.format("'苹果', 'Яблоко é'")),
}


@pytest.fixture(autouse=True)
def quiet_root_logger() -> Iterator[None]:
    """The tools add a console handler to the root logger; take it away again."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    root.handlers, root.level = handlers, level


@pytest.fixture
def detector(written: Written, tmp_path: Path) -> Path:
    """A detector of the classes of `sound`, with random weights."""
    folder = written("detection/generate.py", "sound") / "sound"
    cfg = load_det_config(str(folder / "tiny.yaml"), ["MODEL.ROI_HEADS.NUM_CLASSES=2"])
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text(cfg.dump())
    torch.manual_seed(0)
    model = build_model(cfg)
    categories = json.loads((folder / "coco.json").read_text())["categories"]
    remember_classes(model, Classes(*zip(*((one["name"], one["id"]) for one in categories), strict=True)))
    write_detector(run / "model_final.safetensors", model.state_dict(), classes_of(model).metadata(), 1)
    return run


@pytest.mark.parametrize("case", EVALUATED)
def test_evaluation_on_other_classes(case: str, detector: Path, written: Written, tool: Tool, tmp_path: Path) -> None:
    code, pattern = EVALUATED[case]
    folder = written("detection/generate.py", case) / case
    data = ["--val-json", folder / "coco.json", "--val-images", folder / "images"]
    weights = [f"MODEL.WEIGHTS={detector / 'model_final.safetensors'}", f"OUTPUT_DIR={tmp_path / 'out'}"]
    config = ["--config-file", folder / "tiny.yaml"]
    found, output = tool(train_net.main, *config, "--eval-only", *data, *weights)
    assert found == code, output
    assert re.search(pattern, output), output
    assert "mismatched" not in output
    assert (tmp_path / "out").exists() == (code == 0)


@pytest.mark.parametrize("case", ["one_class_less", "other_names"])
def test_prediction_with_the_ids_of_other_classes(
    case: str, detector: Path, written: Written, tool: Tool, tmp_path: Path
) -> None:
    folder = written("detection/generate.py", case) / case
    words = ["--weights", detector, folder / "images", "--classes", folder / "coco.json", "--output", tmp_path / "out"]
    code, output = tool(predict.main, *words, "--score-threshold", "0", "--no-pictures")
    if case == "other_names":
        assert code == 2
        assert re.search(r"does not know any of them .*'ship', 'plane'\)\. Leave out --classes", output), output
        assert not (tmp_path / "out").exists()
        return
    assert code == 0, output
    content = json.loads((tmp_path / "out/predictions.json").read_text())
    assert content["categories"] == [{"id": 1, "name": "a"}]
    assert {one["category_id"] for one in content["annotations"]} <= {1}
