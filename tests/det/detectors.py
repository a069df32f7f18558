"""Runs with a tiny untrained detector, for the tests of what is done with a trained one."""

from pathlib import Path

import torch
from detectron2.modeling import build_model

from det.config import load_det_config
from tests.det.coco_files import TINY


def write_run(folder: Path, *overrides: str) -> Path:
    """Write `config.yaml` and `model_final.pth` of a random detector of three classes; returns the folder."""
    folder.mkdir(parents=True)
    (folder / "tiny.yaml").write_text(TINY)
    cfg = load_det_config(str(folder / "tiny.yaml"), overrides)
    (folder / "tiny.yaml").unlink()
    (folder / "config.yaml").write_text(cfg.dump())
    torch.manual_seed(1)
    model = build_model(cfg)
    torch.save({"model": model.state_dict()}, folder / "model_final.pth")
    return folder
