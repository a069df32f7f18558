"""The laptop's configs fit each other, and both train: pretraining, then the detector from the folder of that run."""

from __future__ import annotations

import json
import math
import shlex
from pathlib import Path

import pytest

pytest.importorskip("detectron2", reason="detectron2 is not installed: python tools/install_detectron2.py")

import torch
from safetensors.torch import load_file

from crossmae.pretraining.config import load_config
from crossmae.pretraining.train import pretrain
from crossmae.training.config import CONFIG_ROOT
from det.backbone.weights import build_detector, load_weights
from det.config import load_det_config
from det.data.coco import use_own_data
from det.training.train import train
from tests.det.coco_files import write_coco


def losses(run: Path) -> list[float]:
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def smoke(name: str) -> list[str]:
    """The settings of the first command in the header of a config, without the names of files."""
    text = (CONFIG_ROOT / name).read_text(encoding="utf-8")
    command = next(line for line in text.splitlines() if line.startswith("#     crossmae"))
    named = ("data.train=", "output_dir=", "OUTPUT_DIR=", "MODEL.WEIGHTS=")
    return [word for word in shlex.split(command) if "=" in word and not word.startswith(named)]


def test_both_configs_train_and_the_encoder_fits_without_arguments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("det.training.train.write_report", lambda folder: folder / "report.html")
    coco, images, _ = write_coco(tmp_path / "data")
    words = [*smoke("pretrain/laptop.yaml"), "log.every_steps=1", "log.pictures=0"]
    encoder = pretrain(
        load_config("pretrain/laptop.yaml", [*words, f"data.train={images}", f"output_dir={tmp_path}/mine"])
    )
    assert len(losses(tmp_path / "mine")) == 2
    assert all(map(math.isfinite, losses(tmp_path / "mine")))

    given = [f"MODEL.WEIGHTS={tmp_path / 'mine'}", f"OUTPUT_DIR={tmp_path / 'detector'}"]
    cfg = load_det_config("laptop_mask_rcnn.yaml", [*smoke("laptop_mask_rcnn.yaml"), *given])
    source, model = load_file(encoder), build_detector(cfg)
    load_weights(model, cfg)
    own = model.backbone.net.state_dict()
    assert own.keys() == {name for name in source if name in own}, "every tensor of the encoder comes from the file"
    assert all(torch.equal(tensor, source[name]) for name, tensor in own.items())

    use_own_data(cfg, (str(coco), str(images)), None)
    train(cfg)
    assert (tmp_path / "detector" / "model_final.safetensors").is_file()


def test_their_sizes_are_those_of_one_encoder() -> None:
    encoder = load_config("pretrain/laptop.yaml", ["data.train=IMAGES", "output_dir=OUT"]).model
    cfg = load_det_config("laptop_mask_rcnn.yaml")
    assert (encoder.name, encoder.img_size) == ("crossmae_vit_tiny_patch16", cfg.MODEL.VIT.PRETRAIN_IMG_SIZE)
    assert cfg.INPUT.LSJ.SIZE == cfg.INPUT.MAX_SIZE_TEST == cfg.MODEL.VIT.IMG_SIZE == cfg.MODEL.VIT.SQUARE_PAD == 256
