"""Proves that several class tokens survive in files of ours, are dropped by dense backbones, else refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from crossmae.checkpoints import Sizes, convert, load
from crossmae.checkpoints.conversion.inspection import inspect
from crossmae.checkpoints.metadata import FORMAT, MODEL_ARGUMENTS
from crossmae.checkpoints.pretrained import load_pretrained
from crossmae.checkpoints.weights import encoder_tensors, read_weights, save_weights
from crossmae.errors import UserError
from crossmae.models.crossmae import CrossMAE
from crossmae.models.encoder import ViTEncoder

ENCODER: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 3}
DECODER: dict[str, Any] = {"decoder_embed_dim": 16, "decoder_depth": 2, "decoder_num_heads": 2}


def write(path: Path, **overrides: Any) -> Path:
    """A file of ours in which every tensor counts."""
    arguments = ENCODER | DECODER | overrides
    model = CrossMAE(**arguments)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn_like(parameter))
    save_weights(path, model.state_dict(), {FORMAT: "crossmae", MODEL_ARGUMENTS: json.dumps(arguments)})
    return path


def same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in actual.items())


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("decoder", ["cross", "self"])
def test_several_class_tokens_and_mask_blocks_stay_in_files_of_ours(tmp_path: Path, suffix: str, decoder: str) -> None:
    to = "mae" if decoder == "self" else "crossmae"
    on = {"class_tokens": 4, "mask_block": 2}
    source = write(tmp_path / "a.safetensors", decoder=decoder, **on)
    done = convert(source, tmp_path / f"b{suffix}", to)
    assert done.proof.equal
    same(read_weights(done.destination).tensors, read_weights(source).tensors)
    model = load_pretrained(done.destination).model
    assert (model.class_tokens, model.mask_block) == (4, 2)
    encoder = convert(source, tmp_path / f"c{suffix}", to, encoder_only=True)
    assert encoder.proof.equal
    loaded = ViTEncoder(**ENCODER, class_tokens=4)
    load(loaded, encoder.destination, part="encoder")
    assert torch.equal(loaded.cls_token, model.cls_token)
    larger = convert(source, tmp_path / f"d{suffix}", to, sizes=Sizes(img_size=64))
    assert larger.proof.equal
    with pytest.raises(UserError, match=r"has 4 class tokens, but the model does not\. .* class_tokens=4"):
        load(ViTEncoder(**ENCODER), encoder.destination, part="encoder")
    shown = "\n".join(inspect(encoder.destination).lines())
    assert "class_tokens 4" in shown
    assert "cls_token: several class tokens, which a plain ViT does not have" in shown


@pytest.mark.parametrize("to", ["timm", "hf-vit", "hf-vitmae"])
@pytest.mark.parametrize("options", [{}, {"encoder_only": True}])
def test_several_class_tokens_have_no_place_in_other_libraries(
    tmp_path: Path, to: str, options: dict[str, Any]
) -> None:
    source = write(tmp_path / "a.safetensors", decoder="self", class_tokens=4)
    with pytest.raises(UserError, match=rf"cannot become {to}, because .* cls_token \(several class tokens"):
        convert(source, tmp_path / "b", to, **options)
    if to != "timm":
        with pytest.raises(UserError, match=rf"has no class token, but {to} requires one"):
            convert(source, tmp_path / "b", to, drop=("cls_token",), **options)
    assert not (tmp_path / "b").exists()


def test_a_dense_backbone_drops_several_class_tokens_like_one(tmp_path: Path) -> None:
    pytest.importorskip("detectron2.modeling.backbone.vit")
    source = write(tmp_path / "a.safetensors", class_tokens=4)
    done = convert(source, tmp_path / "b.pth", "detectron2")
    assert done.proof.equal
    tensors = encoder_tensors(read_weights(done.destination))
    expected = encoder_tensors(read_weights(source))
    del expected["cls_token"]
    same(tensors, expected)
    assert "class_tokens" not in json.loads(read_weights(done.destination).metadata[MODEL_ARGUMENTS])
