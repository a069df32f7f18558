"""Proves that the script of docs/detection.md runs as written: plain detectron2, its trainer and its predictor."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

pytest.importorskip("detectron2", reason="detectron2 is not installed: python tools/install_detectron2.py")

from crossmae.checkpoints.metadata import MODEL_ARGUMENTS
from crossmae.checkpoints.weights import save_weights
from crossmae.models.crossmae import CrossMAE
from crossmae.training.config import CONFIG_ROOT
from tests.det.coco_files import write_coco
from tools import convert_checkpoint

ROOT = Path(__file__).parents[2]
SIZE = {"img_size": 64, "patch_size": 16, "embed_dim": 32, "depth": 2, "num_heads": 2}
DECODER = {"decoder_embed_dim": 32, "decoder_depth": 1, "decoder_num_heads": 2}
# A config of the recipe's name, with the recipe as its base, so that detectron2 also reads the base.
TINY = {
    "_BASE_": str(CONFIG_ROOT / "coco_mask_rcnn.yaml"),
    "INPUT": {"LSJ": {"SIZE": 64}, "MIN_SIZE_TEST": 64, "MAX_SIZE_TEST": 64},
    "MODEL": {
        "VIT": {
            **{"IMG_SIZE": 64, "PRETRAIN_IMG_SIZE": 64, "EMBED_DIM": 32, "DEPTH": 2, "NUM_HEADS": 2},
            **{"WINDOW_SIZE": 2, "GLOBAL_BLOCKS": [1], "OUT_CHANNELS": 16, "SQUARE_PAD": 64, "SQUARE_PAD_TEST": 64},
        },
        "ROI_HEADS": {"SCORE_THRESH_TEST": 0.0},
        "ROI_BOX_HEAD": {"CONV_DIM": 16, "FC_DIM": 32},
        "ROI_MASK_HEAD": {"CONV_DIM": 16},
    },
    "DATALOADER": {"NUM_WORKERS": 0},
    "TEST": {"DETECTIONS_PER_IMAGE": 5},
}
# After the script: what it trained, and what this toolkit makes of the same weights.
RESULTS = """
import json, numpy as np
encoder, trained = torch.load("encoder.pth", weights_only=True), trainer.model.state_dict()
encoder = {name: tensor for name, tensor in encoder.get("model", encoder).items() if name in trained}
pixels = read_image("IMAGES/1.png", "BGR")
theirs = DefaultPredictor(cfg)(pixels)["instances"]
ours = det.Predictor(cfg, cfg.MODEL.WEIGHTS)(np.ascontiguousarray(pixels[:, :, ::-1]))
print("RESULTS " + json.dumps({
    "iterations": trainer.iter,
    "moved": {name: float((tensor - trained[name]).abs().max()) for name, tensor in encoder.items()},
    "rates": sorted({group["initial_lr"] for group in trainer.optimizer.param_groups}),
    "scores": [theirs.scores.tolist(), ours.scores.tolist()],
    "boxes": [theirs.pred_boxes.tensor.tolist(), ours.pred_boxes.tensor.tolist()],
    "masks": bool((theirs.pred_masks == ours.pred_masks).all()),
}))
"""


def script() -> str:
    page = (ROOT / "docs" / "detection.md").read_text(encoding="utf-8")
    found = re.search(r"<!-- test: detectron2 -->\n```python\n(.*?)```", page, re.DOTALL)
    assert found
    return found[1]


def test_the_script_of_the_docs_trains_and_predicts(tmp_path: Path) -> None:
    coco, images, _ = write_coco(tmp_path / "data", kind="polygon")
    coco.rename(tmp_path / "TRAIN.json")
    images.rename(tmp_path / "IMAGES")
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "coco_mask_rcnn.yaml").write_text(yaml.safe_dump(TINY))
    model = CrossMAE(**SIZE, **DECODER)
    torch.nn.init.normal_(model.blocks[0].mlp.fc1.weight)
    save_weights(tmp_path / "mine.pth", model.state_dict(), {MODEL_ARGUMENTS: json.dumps(SIZE | DECODER)})
    convert_checkpoint.main([str(tmp_path / "mine.pth"), str(tmp_path / "encoder.pth"), "--to", "detectron2"])

    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-c", script() + RESULTS]
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    line = next(line for line in done.stdout.splitlines() if line.startswith("RESULTS "))
    results = json.loads(line.removeprefix("RESULTS "))
    assert results["iterations"] == 2
    assert "backbone.net.blocks.0.mlp.fc1.weight" in results["moved"]
    assert max(results["moved"].values()) < 1e-3, "two small steps from the weights of the encoder"
    assert results["rates"] == pytest.approx([1e-4 * 0.7**power for power in (3, 2, 1, 0)])
    for theirs, ours in (results["scores"], results["boxes"]):
        assert len(theirs) == len(ours) == 5
        torch.testing.assert_close(torch.tensor(theirs), torch.tensor(ours), rtol=1e-4, atol=1e-3)
    assert results["masks"]
