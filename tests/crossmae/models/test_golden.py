"""Proves that forward, loss and every gradient equal the published implementation's (tests/golden)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from crossmae.models.crossmae import CrossMAE
from crossmae.models.masking import gather_tokens

GOLDEN = Path(__file__).parents[2] / "golden"
VECTORS = sorted(path.stem for path in GOLDEN.glob("*.safetensors"))


def load_golden(name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    with safe_open(GOLDEN / f"{name}.safetensors", "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - no iterator
        return json.loads(file.metadata()["config"]), tensors


def build(config: dict[str, Any], tensors: dict[str, Tensor]) -> CrossMAE:
    plain = config["kind"] == "mae"
    model = CrossMAE(
        **{key: config[key] for key in ("img_size", "patch_size", "in_chans", "embed_dim", "depth", "num_heads")},
        **{key: config[key] for key in ("decoder_embed_dim", "decoder_depth", "decoder_num_heads", "norm_pix_loss")},
        decoder="self" if plain else "cross_self" if config.get("self_attn") else "cross",
        fuse_blocks=tuple(config["use_fm"]) if "use_fm" in config else None,
        fuse_input=config.get("use_input", True),
    )
    parameters = {key.removeprefix("param."): value for key, value in tensors.items() if key.startswith("param.")}
    model.load_state_dict(parameters, strict=True)
    return model


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_vectors_are_present() -> None:
    assert len(VECTORS) == 4


@pytest.mark.parametrize("name", VECTORS)
def test_outputs_loss_and_gradients(name: str) -> None:
    config, golden = load_golden(name)
    model = build(config, golden)
    imgs, noise = golden["input.imgs"], golden["input.noise"]
    plain = config["kind"] == "mae"
    predict_ratio = config["mask_ratio"] if plain else config["kept_mask_ratio"]
    out = model(imgs, config["mask_ratio"], predict_ratio, noise)

    rank = golden["out.ids_restore"]  # rank of each patch in the order of the noise
    V = out.visible_idx.shape[1]
    expected_rank = torch.arange(V).expand(len(imgs), -1)
    assert torch.equal(rank.gather(1, out.visible_idx), expected_rank)
    masked = golden["out.mask"].bool()
    if plain:
        assert torch.equal(~masked, torch.zeros_like(masked).scatter(1, out.visible_idx, True))
        assert torch.equal(out.predict_idx, torch.arange(masked.shape[1]).expand(len(imgs), -1))
    else:
        expected_idx = masked.nonzero()[:, 1].view(len(imgs), -1)
        assert torch.equal(out.predict_idx, expected_idx)
        close(model.targets(imgs, out.predict_idx), golden["out.target"])
    close(out.pred, golden["out.pred"])
    close(out.loss.view(1), golden["out.loss"])

    out.loss.backward()
    gradients = {key.removeprefix("grad."): value for key, value in golden.items() if key.startswith("grad.")}
    assert gradients.keys() == {name for name, p in model.named_parameters() if p.requires_grad}
    for key, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, key
            close(parameter.grad, gradients[key])


@pytest.mark.parametrize("name", VECTORS)
def test_encoder_features(name: str) -> None:
    config, golden = load_golden(name)
    model = build(config, golden)
    out = model(
        golden["input.imgs"],
        config["mask_ratio"],
        config.get("kept_mask_ratio") or 0.75,
        golden["input.noise"],
    )
    tokens = model.embed(golden["input.imgs"], out.visible_idx)
    if config["kind"] == "mae":
        close(model.encode(golden["input.imgs"], out.visible_idx)[0], golden["out.latent"])
        return
    maps = model.features(tokens, model.fused_blocks)
    maps = [tokens, *maps] if model.fuse_input else maps
    assert len(maps) == sum(key.startswith("out.feat.") for key in golden)
    for index, actual in enumerate(maps):
        close(actual, golden[f"out.feat.{index}"])


def test_gather_matches_indexing() -> None:
    tokens, idx = torch.randn(2, 5, 3), torch.tensor([[4, 0], [1, 1]])
    assert torch.equal(gather_tokens(tokens, idx), torch.stack([tokens[b][idx[b]] for b in range(2)]))
