"""Proves that timm's folders are read with what their config.json says, and that ours are what timm builds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file

from crossmae.checkpoints import convert
from crossmae.checkpoints.metadata import CLASSES, MODEL_ARGUMENTS, PIXEL_MEAN, PIXEL_STD
from crossmae.checkpoints.timm_folder import timm_metadata
from crossmae.checkpoints.weights import read_weights
from crossmae.errors import UserError

SMALL: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}


def folder(path: Path, **config: Any) -> Path:
    """As timm's own save_for_hf writes it, as far as it is read."""
    path.mkdir()
    model = timm.create_model("vit_small_patch16_224", num_classes=5, **SMALL)
    save_file(model.state_dict(), path / "model.safetensors", {"format": "pt"})
    pretrained = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4], "label_names": list("abcde")}
    content = {
        "architecture": "vit_small_patch16_224",
        "num_classes": 5,
        "model_args": SMALL,
        "pretrained_cfg": pretrained,
    }
    (path / "config.json").write_text(json.dumps(content | config))
    return path


def test_what_the_config_says(tmp_path: Path) -> None:
    weights = read_weights(folder(tmp_path / "a"))
    assert weights.format == "finetuned"
    assert json.loads(weights.metadata[MODEL_ARGUMENTS]) == {"num_heads": 3, "img_size": 32}
    assert json.loads(weights.metadata[PIXEL_MEAN]) == [0.5, 0.4, 0.3]
    assert json.loads(weights.metadata[PIXEL_STD]) == [0.2, 0.3, 0.4]
    assert json.loads(weights.metadata[CLASSES]) == list("abcde")


def test_heads_are_those_of_the_named_architecture(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "vit_so150m_patch16_reg4_gap_256"}))
    expected = timm.create_model("vit_so150m_patch16_reg4_gap_256").blocks[0].attn.num_heads
    assert json.loads(timm_metadata(tmp_path)[MODEL_ARGUMENTS])["num_heads"] == expected


@pytest.mark.parametrize(
    "config", [{"architecture": "resnet50"}, {"architecture": "no_such_model"}, {"model_args": {"colour": 1}}]
)
def test_another_architecture_is_refused(tmp_path: Path, config: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"config\.json: .* is no plain ViT of timm's"):
        read_weights(folder(tmp_path / "a", **config))


@pytest.mark.parametrize("text", ["", "[]", "{", '{"model_type": "bert"}', '{"architecture": 3}', "[" * 100000])
def test_a_config_of_somebody_else_says_nothing(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    assert timm_metadata(tmp_path) == {}


def test_timm_builds_the_classifier_again(tmp_path: Path) -> None:
    source = folder(tmp_path / "a")
    convert(source, tmp_path / "b", "timm")
    first = timm.create_model("vit_small_patch16_224", num_classes=5, **SMALL)
    timm.models.load_checkpoint(first, str(source / "model.safetensors"))
    second = timm.create_model(f"local-dir:{tmp_path / 'b'}", pretrained=True)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(first.eval()(images), second.eval()(images))
    assert second.pretrained_cfg["mean"] == [0.5, 0.4, 0.3]
    assert second.pretrained_cfg["label_names"] == list("abcde")
