"""Proves that one loader serves every layout and model: what it fills, resamples, leaves behind and says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from crossmae.checkpoints import load
from crossmae.checkpoints.resample import adapt_channels, resample_patches, resample_positions
from crossmae.errors import UserError
from crossmae.models.crossmae import CrossMAE
from crossmae.models.encoder import ViTEncoder
from crossmae.models.positions import sincos_pos_embed

ROOT = Path(__file__).parents[3]
ENCODER: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}
DECODER: dict[str, Any] = {"decoder_embed_dim": 16, "decoder_depth": 1, "decoder_num_heads": 2}


def randomised(model: nn.Module) -> Any:
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            tensor.copy_(0.2 * torch.randn_like(tensor) + ("norm" in name and name.endswith("weight")))
    return model.eval()


def timm_file(path: Path, **overrides: Any) -> VisionTransformer:
    """A model of timm's, its position table learned and its class token with a position of its own."""
    model: VisionTransformer = randomised(VisionTransformer(**ENCODER | {"num_classes": 5} | overrides))
    save_file(model.state_dict(), path, {"format": "pt"})
    return model


def timm_tokens(model: VisionTransformer, imgs: Tensor) -> Tensor:
    return model.blocks(model._pos_embed(model.patch_embed(imgs)))  # type: ignore[no-any-return]


def test_what_stays_behind_and_why(tmp_path: Path) -> None:
    torch.save(CrossMAE(**ENCODER, **DECODER, decoder="self").state_dict(), tmp_path / "a.pth")
    report = load(ViTEncoder(**ENCODER), tmp_path / "a.pth", part="encoder")
    reasons = {entry.name: entry.reason for entry in report.entries if entry.status == "dropped"}
    assert reasons["decoder_blocks.0.norm1.weight"] == "of pretraining only"
    assert reasons["norm.weight"] == "the final norm has no place in this model"
    timm_file(tmp_path / "b.safetensors")
    model = VisionTransformer(**ENCODER, num_classes=0)
    report = load(model, tmp_path / "b.safetensors", part="encoder", also=("norm.",))
    assert {"norm.weight", "norm.bias"} <= set(report.names("used"))
    assert set(report.names("dropped")) == {"head.weight", "head.bias"}


def test_other_sizes_only_when_asked(tmp_path: Path) -> None:
    theirs = timm_file(tmp_path / "a.safetensors")
    wanted = ENCODER | {"img_size": (48, 96), "patch_size": 16, "in_chans": 1}
    model = ViTEncoder(**wanted)
    with pytest.raises(UserError, match="patch_size 8, in_chans 3"):
        load(model, tmp_path / "a.safetensors", part="encoder")
    report = load(model, tmp_path / "a.safetensors", part="encoder", resample=True)
    assert set(report.names("resampled")) == {"pos_embed", "patch_embed.proj.weight"}
    positions = resample_positions(theirs.pos_embed, (4, 4), (3, 6))
    assert torch.equal(model.pos_embed, positions)
    filters = resample_patches(theirs.patch_embed.proj.weight, 16)
    assert torch.equal(model.patch_embed.proj.weight, adapt_channels(filters, 1))
    assert "resampled" in report.table()
    assert "2 resampled" in report.summary()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fixed_positions_are_computed_again_in_any_precision(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {name: tensor.to(dtype) for name, tensor in CrossMAE(**ENCODER, **DECODER).state_dict().items()}
    torch.save(tensors, tmp_path / "a.pth")
    model = CrossMAE(**ENCODER | {"img_size": 64}, **DECODER)
    report = load(model, tmp_path / "a.pth", resample=True)
    assert set(report.names("resampled")) == {"pos_embed", "decoder_pos_embed"}
    tolerance = 1e-6 if dtype == torch.float32 else 4e-3
    torch.testing.assert_close(model.pos_embed.detach(), sincos_pos_embed(24, (8, 8)), atol=tolerance, rtol=0)
    torch.testing.assert_close(model.decoder_pos_embed.detach(), sincos_pos_embed(16, (8, 8)), atol=tolerance, rtol=0)


def test_notes_of_the_translation_are_in_the_table(tmp_path: Path) -> None:
    model = randomised(VisionTransformer(**ENCODER, num_classes=0, init_values=0.1))
    torch.save(model.state_dict(), tmp_path / "a.pth")
    ours = ViTEncoder(**ENCODER)
    report = load(ours, tmp_path / "a.pth", part="encoder")
    reasons = {entry.name: entry.reason for entry in report.entries}
    assert "layer scale folded in" in reasons["blocks.0.attn.proj.weight"]
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        found = ours.features(ours.embed(images), [1])[0]
        torch.testing.assert_close(found, timm_tokens(model, images), atol=1e-5, rtol=0)


def test_there_is_no_second_loader() -> None:
    """Weights enter a model through `load` alone; the exceptions are states of training, the proof and benchmarks."""
    own = {
        "crossmae/checkpoints/loading.py",
        "crossmae/checkpoints/conversion/proof.py",
    }  # the loader; other libraries' models
    states = {
        "crossmae/training/state.py",
        "det/training/steps.py",
        "det/training/checkpoint.py",
    }  # optimizer, scaler, average of a run that goes on
    found = {
        str(path.relative_to(ROOT))
        for folder in ("crossmae", "det", "tools")
        for path in (ROOT / folder).rglob("*.py")
        if ".load_state_dict(" in path.read_text(encoding="utf-8") and path.parent.name != "benchmarks"
    }
    assert found <= own | states
