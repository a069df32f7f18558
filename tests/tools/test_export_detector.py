"""The command that exports a detector: what it prints, writes, refuses and leaves alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("detectron2", reason="detectron2 is not installed: python tools/install_detectron2.py")

from detectron2.modeling import build_model

from crossmae.errors import USER_ERROR_EXIT_CODE
from det.config import load_det_config
from det.inference.predict import Predictor
from tests.det.coco_files import TINY
from tests.tools.command_line import exit_code
from tools.export_detector import main


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The folder of a run with a tiny detector."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.yaml").write_text(TINY)
    torch.manual_seed(0)
    model = build_model(load_det_config(str(folder / "config.yaml")))
    torch.save({"model": model.state_dict()}, folder / "model_final.pth")
    (folder / "run.json").write_text(json.dumps({"classes": ["a", "b", "c"], "category_ids": [1, 3, 4]}))
    return folder


def test_output(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = run.parent / "backbone.pt2"
    words = ["--weights", str(run), "--output", str(target), "--img-size", "64x96", "--backbone-only"]
    assert exit_code(main, *words, "MODEL.VIT.ATTENTION=materialized") == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first == f"{target}: {target.stat().st_size / 1e6:.1f} MB, input (1, 3, 64, 96)"
    assert second == "largest differences to the detector in 2 feature maps: features 0 (limit 0.0001)"
    extra = {"metadata.json": ""}
    program = torch.export.load(target, extra_files=extra)
    assert json.loads(json.loads(extra["metadata.json"])["class_names"]) == ["a", "b", "c"]
    pixels = 255 * torch.rand(1, 3, 64, 96)
    model = Predictor(run / "config.yaml", run, device="cpu").model
    with torch.no_grad():
        features = program.module()(pixels, torch.tensor([64, 96]))
        expected = model.backbone((pixels - model.pixel_mean) / model.pixel_std)
    assert list(features) == ["p2", "p3"]
    assert all(torch.allclose(features[name], expected[name], atol=1e-5) for name in expected)


@pytest.mark.parametrize(
    "words, message",
    [
        (["--img-size", "64x"], "error: --img-size 64x: expected pixels, such as"),
        (["--img-size", "large"], "error: --img-size large: expected"),
        (["--img-size", "60"], "error: image size: 60 x 60 does not fit. Use multiples of 8 pixels"),
        (["--image", "no.jpg"], "error: no.jpg: cannot be read"),
        (["--image", "no.jpg", "--no-check"], "error: --image has no effect with --no-check"),
        (["MODEL.VIT.DEPTH"], "error: command line: MODEL.VIT.DEPTH has no value"),
        (["MODEL.VIT.DEPTH=3"], "error: MODEL.WEIGHTS: "),
    ],
)
def test_mistakes(run: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str) -> None:
    target = run.parent / "detector.onnx"
    assert exit_code(main, "--weights", str(run), "--output", str(target), *words) == USER_ERROR_EXIT_CODE
    assert message in capsys.readouterr().err
    assert not target.exists()
