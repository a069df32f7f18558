"""Proves that files which are no plain ViT are called what they are before anything is read from them, and that plain
ViTs of every kind are not mistaken for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from crossmae.checkpoints.conversion.inspection import inspect
from crossmae.checkpoints.formats.recognition import CONTENTS, mix_up, model_type_refusal, recognise
from crossmae.checkpoints.loading import check_plain, load
from crossmae.checkpoints.weights import read_weights
from crossmae.classification.vit import architecture_of
from crossmae.errors import UserError
from crossmae.models.encoder import ViTEncoder
from tests.crossmae.checkpoints.reading.test_candidates import SIZES, encoder


def pruned() -> dict[str, Tensor]:
    model = ViTEncoder(**SIZES)
    prune.l1_unstructured(model.blocks[0].attn.qkv, "weight", 0.5)
    return model.state_dict()


def parametrized(norm: Any) -> dict[str, Tensor]:
    model = ViTEncoder(**SIZES)
    norm(model.blocks[0].attn.qkv)
    return model.state_dict()


def changed(**tensors: Tensor) -> dict[str, Tensor]:
    return encoder() | {name.replace("__", "."): tensor for name, tensor in tensors.items()}


KINDS: dict[str, tuple[dict[str, Tensor], str]] = {
    "ZeRO-3": ({name: torch.empty(0) for name in encoder()}, "28 of 28 tensors are empty.*zero_to_fp32"),
    "ZeRO-3, some": (changed(patch_embed__proj__weight=torch.empty(0)), "1 of 28 tensors are empty"),
    "FSDP": ({"_fsdp_wrapped_module.flat_param": torch.ones(9)}, "FSDP made flat"),
    "FSDP, a part": ({"blocks.0._flat_param_3": torch.ones(9)}, "FSDP made flat"),
    "LoRA": (changed(blocks__0__attn__qkv__lora_A__default__weight=torch.ones(2, 24)), "not merged.*merge_and_unload"),
    "LoRA of timm's names": (changed(blocks__0__attn__qkv__lora_down__weight=torch.ones(2, 24)), "not merged"),
    "adapter alone": ({"blocks.0.attn.qkv.lora_B.weight": torch.ones(2, 2)}, "without its model"),
    "pruned": (pruned(), r"pruned weights.*prune\.remove"),
    "weight norm": (parametrized(parametrizations.weight_norm), "remove_parametrizations"),
    "spectral norm": (parametrized(parametrizations.spectral_norm), "remove_parametrizations"),
    "old spectral norm": (parametrized(nn.utils.spectral_norm), "remove_parametrizations"),
    "video": (changed(patch_embed__proj__weight=torch.ones(24, 3, 2, 8, 8)), "patches of 2 x 8 x 8: time or depth"),
    "signals": (changed(patch_embed__proj__weight=torch.ones(24, 3, 8)), "a model of signals"),
    "flattened": (changed(patch_embed__proj__weight=torch.ones(24, 192)), "a model of flattened patches"),
    "long patches": (changed(patch_embed__proj__weight=torch.ones(24, 3, 8, 4)), "its patches have 8 x 4 pixels"),
    "SAM": (changed(pos_embed=torch.ones(1, 4, 4, 24)), "positions as a map of shape"),
    "groups": ({"patch_embed.0.proj.weight": torch.ones(1), "blocks.0.norm1.bias": torch.ones(1)}, "SatMAE"),
    "CLIP": (
        {f"visual.{name}": torch.ones(2) for name in ("conv1.weight", "class_embedding")}
        | {"visual.transformer.resblocks.0.ln_1.bias": torch.ones(2)},
        "the image tower of CLIP",
    ),
    "ResNet": ({"backbone.layer1.0.conv1.weight": torch.ones(1)}, "a ResNet"),
    "ConvNeXt": ({"stages.0.blocks.0.norm.weight": torch.ones(1)}, "a hierarchical network"),
    "BERT": ({"bert.embeddings.word_embeddings.weight": torch.ones(1)}, "a language model"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_kinds(tmp_path: Path, kind: str) -> None:
    tensors, told = KINDS[kind]
    torch.save({"state_dict": {f"model.{name}": tensor for name, tensor in tensors.items()}}, tmp_path / "a.pth")
    for read in (read_weights, inspect):
        with pytest.raises(UserError, match=rf"a\.pth: .*{told}.*\.$") as caught:
            read(tmp_path / "a.pth")
        assert "\n" not in str(caught.value)
        assert "--drop" not in str(caught.value)


PLAIN = ("vit_tiny_patch16_224", "deit3_small_patch16_224", "vit_small_patch14_dinov2", "vit_base_patch16_224.mae")


@pytest.mark.parametrize("name", PLAIN)
def test_plain_vits_are_none_of_them(name: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name, depth=2, embed_dim=48, num_heads=2, img_size=56)
    assert recognise(model.state_dict()) == ""


# Models of timm with the names of a ViT, and the word that tells the kind.
OTHERS = {
    "eva02_tiny_patch14_224": "BEiT's attention",
    "beit_base_patch16_224": "BEiT's attention",
    "vit_small_patch16_dinov3": "a layer without bias",
    "vit_base_patch32_clip_quickgelu_224": "a norm before the first block",
    "vit_small_patch14_reg4_dinov2": "register tokens",
    "deit_tiny_distilled_patch16_224": "DeiT's distillation token",
    "vit_base_patch16_siglip_224": "attention pooling",
    "vit_giant_patch14_dinov2": "a gated MLP",
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_vits_are_refused_before_anything_else(tmp_path: Path, name: str) -> None:
    """Not after questions about heads and image size that would not help."""
    torch.save(timm.create_model(name, depth=1, embed_dim=48, num_heads=2).state_dict(), tmp_path / "a.pth")
    weights = read_weights(tmp_path / "a.pth")
    for check in (check_plain, architecture_of, lambda each: load(ViTEncoder(**SIZES), each, part="encoder")):
        with pytest.raises(UserError, match=r"a\.pth: not a plain ViT, it has .*\. Use weights of a plain") as caught:
            check(weights)
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=OTHERS[name]):
        check_plain(weights)
    becomes = inspect(tmp_path / "a.pth").becomes.values()
    assert not any(outcome.possible or "--drop" in outcome.text for outcome in becomes)


def test_relative_positions_of_a_detector_are_refused_in_one_line() -> None:
    tensors = encoder() | {"blocks.0.attn.rel_pos_h": torch.ones(3, 12)}
    weights = read_weights_of(tensors)
    with pytest.raises(UserError, match=r"relative positions, of a detector \(blocks\.0\.attn\.rel_pos_h\)"):
        load(ViTEncoder(**SIZES), weights, part="encoder")
    check_plain(weights, tensors)


def read_weights_of(tensors: dict[str, Tensor]) -> Any:
    from crossmae.checkpoints.weights import translated

    return translated(Path("a.pth"), tensors, {})


def test_mix_ups_name_the_right_tool() -> None:
    for content in CONTENTS:
        message = str(mix_up(Path("x"), content, {"version": "1"}, "a tree"))
        assert message.startswith("x: ")
        assert ", not a tree. " in message
        assert "tools/" in message.partition("a tree")[2]
    assert "a classifier of this toolkit, not" in str(mix_up(Path("x"), "finetuned", {"version": "1"}, "a tree"))
    assert "x: a classifier, not" in str(mix_up(Path("x"), "finetuned", {}, "a tree"))


def test_types_that_are_read_or_unknown_are_not_refused() -> None:
    for name in ("vit", "vit_mae", "vit_msn", "ijepa", "dinov2", "mine", None, 3):
        assert model_type_refusal(name) == ""
