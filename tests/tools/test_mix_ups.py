"""Proves that a tool says what it was given in place of its weights, and names the right tool."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from timm.models.vision_transformer import VisionTransformer

from crossmae.checkpoints.metadata import FORMAT, MODEL_ARGUMENTS, VERSION
from crossmae.checkpoints.weights import save_weights
from crossmae.errors import USER_ERROR_EXIT_CODE, UserError
from crossmae.experiments.worth.inputs import check_weights
from crossmae.models.crossmae import CrossMAE
from tests.tools.command_line import exit_code
from tools import (
    convert_checkpoint,
    export_detector,
    finetune,
    inspect_checkpoint,
    predict,
    predict_classes,
    pretrain,
    probe,
    reconstruct,
)

SIZES: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}
DECODER = {"decoder_embed_dim": 8, "decoder_depth": 1, "decoder_num_heads": 1}
PRETRAIN = f"""
output_dir: OUT
data: {{train: photos, workers: 0}}
schedule: {{epochs: 1, warmup_epochs: 0}}
optim: {{batch_size: 1}}
runtime: {{device: cpu}}
model: {json.dumps({"name": "crossmae_vit_tiny_patch16"} | SIZES | DECODER)}
"""


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """One of each kind: a pretraining run, a classifier, an encoder, a detector, images and a json."""
    monkeypatch.chdir(tmp_path)
    ours = {MODEL_ARGUMENTS: json.dumps(SIZES | DECODER), VERSION: "1"}
    save_weights("run/model.safetensors", CrossMAE(**SIZES, **DECODER).state_dict(), ours | {FORMAT: "crossmae"})
    Path("run/config.yaml").write_text(PRETRAIN)
    encoder = VisionTransformer(**SIZES, num_classes=0).state_dict()
    save_weights("encoder.safetensors", encoder, {})
    save_weights("classes/model.safetensors", VisionTransformer(**SIZES, num_classes=2).state_dict(), ours)
    backbone = {f"backbone.net.{name}": tensor for name, tensor in encoder.items() if name != "cls_token"}
    Path("detector").mkdir()
    torch.save({"model": backbone | {"roi_heads.x.weight": torch.zeros(1)}}, "detector/model_final.pth")
    Path("photos").mkdir()
    Image.new("RGB", (32, 32)).save("photos/a.png")
    for name in ("red", "blue"):
        Path("labelled", name).mkdir(parents=True)
        for number in range(12):
            Image.new("RGB", (32, 32), name).save(f"labelled/{name}/{number}.png")
    Path("metrics.json").write_text('{"loss": 1}\n{"loss": 2}\n')
    return tmp_path


def weights_for(main: Callable[..., None], *words: str) -> Callable[[str], tuple[Any, list[str]]]:
    return lambda path: (main, [word.replace("WEIGHTS", path) for word in words])


FINETUNE = [
    "--config-file",
    "finetune/small.yaml",
    "optim.batch_size=4",
    "output_dir=OUT",
    "runtime.device=cpu",
    "data.workers=0",
]
PROBE = ["--config-file", "probe.yaml", "output_dir=OUT", "runtime.device=cpu", "data.workers=0"]
TOOLS = {
    "predict": weights_for(predict.main, "--weights", "WEIGHTS", "photos/a.png", "--output", "OUT"),
    "export": weights_for(export_detector.main, "--weights", "WEIGHTS", "--output", "OUT.onnx"),
    "classes": weights_for(predict_classes.main, "--weights", "WEIGHTS", "photos", "--output", "OUT.json"),
    "reconstruct": weights_for(reconstruct.main, "WEIGHTS", "photos/a.png", "--output", "OUT"),
    "pretrain": weights_for(pretrain.main, "--config-file", "run/config.yaml", "model.init=WEIGHTS"),
}
KEYS = {
    "predict": "--weights",
    "export": "--weights",
    "classes": "--weights",
    "reconstruct": "CKPT",
    "pretrain": "model.init",
    "finetune": "model.init",
    "evaluation": "--eval-only",
    "probe": "weights",
    "convert": "SRC",
    "inspect": "FILE",
}
OTHER_TOOLS = {
    "finetune": weights_for(finetune.main, *FINETUNE, "data.train=labelled", "model.init=WEIGHTS"),
    "evaluation": weights_for(finetune.main, *FINETUNE, "data.val=labelled", "--eval-only", "WEIGHTS"),
    "probe": weights_for(probe.main, *PROBE, "data.train=labelled", "data.val=labelled", "weights=WEIGHTS"),
    "convert": weights_for(convert_checkpoint.main, "WEIGHTS", "OUT.pth", "--to", "detectron2"),
    "inspect": weights_for(inspect_checkpoint.main, "WEIGHTS"),
}
CASES = [
    ("predict", "run", "run: a CrossMAE pretraining model of this toolkit, encoder and decoder, not a detector"),
    ("predict", "run/model.safetensors", "MODEL.WEIGHTS=run/model.safetensors of tools/train_net.py"),
    (
        "predict",
        "classes",
        "classes: a classifier of this toolkit, not a detector. Its tool is tools/predict_classes.py",
    ),
    ("predict", "encoder.safetensors", "encoder.safetensors: an encoder, not a detector"),
    ("predict", "metrics.json", "metrics.json: a log of JSON lines, not weights"),
    ("predict", "photos", "photos: a folder of data (1 image), not weights"),
    ("export", "run", "run: a CrossMAE pretraining model of this toolkit, encoder and decoder, not a detector"),
    (
        "classes",
        "run",
        "run/model.safetensors: a CrossMAE pretraining model of this toolkit, encoder and decoder, not a",
    ),
    ("classes", "detector", "model_final.pth: a detector, not a classifier. Its tool is tools/predict.py --weights"),
    ("classes", "encoder.safetensors", "encoder.safetensors: an encoder, not a classifier. Start from it: model.init="),
    ("classes", "run/config.yaml", "run/config.yaml: a YAML file, such as the config of a run, not weights"),
    (
        "reconstruct",
        "detector",
        "a detector, not a whole pretraining model with its decoder. Its tool is tools/predict.py",
    ),
    ("reconstruct", "classes", "a classifier of this toolkit, not a whole pretraining model with its decoder"),
    ("reconstruct", "photos/a.png", "photos/a.png: an image, not weights"),
    ("pretrain", "detector", "a detector, not weights with the class token that pretraining needs"),
    ("pretrain", "photos", "photos: a folder of data (1 image), not weights"),
]


@pytest.mark.parametrize(("tool", "path", "told"), CASES)
def test_mix_ups(files: Path, capsys: pytest.CaptureFixture[str], tool: str, path: str, told: str) -> None:
    before = sorted(files.rglob("*"))
    main, words = TOOLS[tool](path)
    assert exit_code(main, *words) == USER_ERROR_EXIT_CODE
    (line,) = capsys.readouterr().err.strip().split("error: ")[1].splitlines()
    assert told in line
    assert sorted(files.rglob("*")) == before


@pytest.mark.parametrize("path", ["nofile.pth", "outputs/lpa", "photos", "photos/a.png"])
@pytest.mark.parametrize("tool", KEYS)
def test_the_key_of_the_weights_is_named(files: Path, capsys: pytest.CaptureFixture[str], tool: str, path: str) -> None:
    """The line is `<key>: <path>: <what is wrong>. <What to do.>`, for missing paths and for other content."""
    main, words = (TOOLS | OTHER_TOOLS)[tool](path)
    assert exit_code(main, *words) == USER_ERROR_EXIT_CODE
    (line,) = capsys.readouterr().err.strip().split("error: ")[1].splitlines()
    assert line.startswith(f"{KEYS[tool]}: {path}: "), line
    assert re.search(r"\. [A-Z][^.]+", line), line
    if not Path(path).exists():
        assert "no such file or folder" in line


def test_weights_of_worth_are_named(files: Path) -> None:
    for path in ("nofile.pth", "photos"):
        with pytest.raises(UserError, match=rf"^--weights: {files / path}: "):
            check_weights(files / path, {}, {})
