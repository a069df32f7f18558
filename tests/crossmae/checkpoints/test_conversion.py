"""Proves that conversion is bit-exact, carries its provenance, and is loaded by detectron2 itself."""

from __future__ import annotations

import hashlib
import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from crossmae.checkpoints.conversion import LICENCE, NON_COMMERCIAL, TARGETS, convert_to_crossmae, convert_to_detectron2
from crossmae.checkpoints.weights import (
    FORMAT,
    PIXEL_MEAN,
    PIXEL_STD,
    VERSION,
    Weights,
    encoder_tensors,
    load_model,
    read_weights,
    save_weights,
)
from crossmae.errors import UserError
from crossmae.model import CrossMAE

TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 3}
TINY |= {"decoder_embed_dim": 16, "decoder_depth": 2, "decoder_num_heads": 2}
MEAN, STD = json.dumps([0.5, 0.4, 0.3]), json.dumps([0.2, 0.2, 0.2])


def source(path: Path, metadata: dict[str, str] | None = None, **overrides: Any) -> Weights:
    """A pretraining model's file: ours with metadata, else in the published layout."""
    tensors = CrossMAE(**TINY | overrides).state_dict()
    if metadata is None:
        torch.save({"model": tensors}, path)
    else:
        save_weights(path, tensors, metadata)
    return read_weights(path)


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in actual.items():
        assert tensor.dtype == expected[name].dtype, name
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize("suffix", TARGETS["detectron2"].suffixes)
@pytest.mark.parametrize("decoder", ["cross", "self"])
def test_detectron2_is_the_bit_equal_encoder(tmp_path: Path, suffix: str, decoder: str) -> None:
    weights = source(tmp_path / "a.pth", decoder=decoder)
    destination = tmp_path / f"b{suffix}"
    report = convert_to_detectron2(weights, destination)
    converted = read_weights(destination)
    assert converted.format == converted.metadata[FORMAT] == "detectron2"
    expected = encoder_tensors(weights)
    assert all(name.startswith("backbone.net.") for name in converted.tensors)
    assert "cls_token" not in encoder_tensors(converted)
    assert converted.tensors["backbone.net.pos_embed"].shape == (1, 17, 24)
    expected.pop("cls_token")
    assert_same(encoder_tensors(converted), expected)
    assert set(report.names("used")) == set(expected)
    assert len(report.entries) == len(weights.tensors)


def test_a_converted_file_converts_again(tmp_path: Path) -> None:
    weights = source(tmp_path / "a.pth")
    convert_to_detectron2(weights, tmp_path / "b.pkl")
    convert_to_detectron2(read_weights(tmp_path / "b.pkl"), tmp_path / "c.safetensors")
    first, second = read_weights(tmp_path / "b.pkl"), read_weights(tmp_path / "c.safetensors")
    assert_same(second.tensors, first.tensors)
    assert second.metadata == first.metadata  # the first source and its licence stay on record


def test_bfloat16_becomes_float32_where_numpy_has_none(tmp_path: Path) -> None:
    weights = source(tmp_path / "a.pth")
    half = Weights(weights.path, weights.format, {k: v.bfloat16() for k, v in weights.tensors.items()}, {})
    convert_to_detectron2(half, tmp_path / "b.pkl")
    converted = read_weights(tmp_path / "b.pkl").tensors["backbone.net.patch_embed.proj.weight"]
    assert torch.equal(converted, half.tensors["patch_embed.proj.weight"].float())


def test_crossmae_is_the_whole_model(tmp_path: Path) -> None:
    weights = source(tmp_path / "a.pth")
    convert_to_crossmae(weights, tmp_path / "b.safetensors")
    assert_same(read_weights(tmp_path / "b.safetensors").tensors, weights.tensors)
    load_model(CrossMAE(**TINY), tmp_path / "b.safetensors")
    convert_to_detectron2(weights, tmp_path / "c.pth")
    with pytest.raises(UserError, match="format detectron2; only whole pretraining models"):
        convert_to_crossmae(read_weights(tmp_path / "c.pth"), tmp_path / "d.safetensors")


def test_provenance_of_the_published_layout(tmp_path: Path) -> None:
    weights = source(tmp_path / "a.pth")
    convert_to_detectron2(weights, tmp_path / "b.pth")
    metadata = read_weights(tmp_path / "b.pth").metadata
    assert metadata["source_file"] == "a.pth"
    assert metadata["source_sha256"] == hashlib.sha256((tmp_path / "a.pth").read_bytes()).hexdigest()
    assert metadata["source_format"] == "crossmae"
    assert metadata[PIXEL_MEAN] == metadata[PIXEL_STD] == "unknown"
    assert metadata[LICENCE] == NON_COMMERCIAL
    assert "CC BY-NC 4.0" in NON_COMMERCIAL


def test_provenance_of_our_own_file(tmp_path: Path) -> None:
    recorded = {FORMAT: "crossmae", PIXEL_MEAN: MEAN, PIXEL_STD: STD, VERSION: "0.1.0"}
    convert_to_detectron2(source(tmp_path / "a.safetensors", recorded), tmp_path / "b.pkl")
    metadata = read_weights(tmp_path / "b.pkl").metadata
    assert (metadata[PIXEL_MEAN], metadata[PIXEL_STD]) == (MEAN, STD)
    assert LICENCE not in metadata


def test_refusals_touch_nothing(tmp_path: Path) -> None:
    weights = source(tmp_path / "a.pth")
    before = weights.path.read_bytes()
    with pytest.raises(UserError, match=r"b\.bin: the suffix.*one of \.pth, \.pkl, \.safetensors"):
        convert_to_detectron2(weights, tmp_path / "b.bin")
    with pytest.raises(UserError, match="same file; the source is never touched"):
        convert_to_detectron2(weights, tmp_path / "a.pth", force=True)
    (tmp_path / "old.pth").write_bytes(b"old")
    with pytest.raises(UserError, match="exists already"):
        convert_to_detectron2(weights, tmp_path / "old.pth")
    assert (tmp_path / "old.pth").read_bytes() == b"old"
    assert weights.path.read_bytes() == before
    assert {path.name for path in tmp_path.iterdir()} == {"a.pth", "old.pth"}


# detectron2's ViT imports a module that timm has moved.
@pytest.mark.parametrize("suffix", [".pth", ".pkl"])
def test_detectron2_loads_it(tmp_path: Path, suffix: str) -> None:
    pytest.importorskip("detectron2")
    from detectron2.checkpoint import DetectionCheckpointer
    from detectron2.modeling.backbone.vit import ViT

    class Detector(nn.Module):
        """The nesting of detectron2's detectors over its ViTDet."""

        def __init__(self) -> None:
            super().__init__()
            self.backbone = nn.Module()
            self.backbone.net = ViT(
                img_size=64, patch_size=8, embed_dim=24, depth=3, num_heads=3, window_size=4,
                norm_layer=partial(nn.LayerNorm, eps=1e-6), pretrain_img_size=32, use_rel_pos=True,
            )  # fmt: skip

    weights = source(tmp_path / "a.pth")
    convert_to_detectron2(weights, tmp_path / f"b{suffix}")
    detector = Detector()
    checkpointer = DetectionCheckpointer(detector)
    incompatible = []
    original = checkpointer._load_model
    checkpointer._load_model = lambda checkpoint: incompatible.append(original(checkpoint)) or incompatible[0]
    rest = checkpointer.load(str(tmp_path / f"b{suffix}"))
    assert incompatible[0].unexpected_keys == []
    assert incompatible[0].incorrect_shapes == []
    assert all(".attn.rel_pos_" in name for name in incompatible[0].missing_keys)
    assert rest["matching_heuristics"] is False
    expected = encoder_tensors(weights)
    expected.pop("cls_token")
    loaded = detector.backbone.net.state_dict()
    assert_same({name: loaded[name] for name in expected}, expected)
