"""Proves that timm's VisionTransformer computes what our encoder computes, from every kind of file; that no tensor of
a file is lost without a word; that resampling is timm's; and that sizes, initial values and parameter groups are those
of the method specification, section 1.10."""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.layers import resample_patch_embed
from timm.models import adapt_input_conv
from timm.models.vision_transformer import VisionTransformer
from timm.optim import param_groups_layer_decay
from torch import Tensor, nn

from crossmae.checkpoints import convert, load
from crossmae.checkpoints.load_report import split_name
from crossmae.checkpoints.metadata import FORMAT, MODEL_ARGUMENTS
from crossmae.checkpoints.resample import resample_positions
from crossmae.checkpoints.weights import Weights, read_weights, save_weights
from crossmae.classification.vit import (
    Architecture,
    architecture_of,
    build_vit,
    load_encoder_weights,
    parameter_groups,
)
from crossmae.errors import UserError
from crossmae.models.crossmae import CrossMAE
from crossmae.models.encoder import ViTEncoder

OFFICIAL = Path(__file__).parents[4] / "shared/golden"
SMALL = Architecture(img_size=(32, 32), patch_size=8, in_chans=3, embed_dim=24, depth=3, num_heads=3, mlp_ratio=4.0)
DECODER = {"decoder_embed_dim": 16, "decoder_depth": 2, "decoder_num_heads": 2}


def change(**fields: Any) -> Architecture:
    return dataclasses.replace(SMALL, **fields)


def randomise(module: nn.Module) -> None:
    """Values with which every tensor counts: nothing is zero, no norm is trivial, no table regular."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2 + (parameter == 1))


def pretrained(architecture: Architecture = SMALL, decoder: str = "cross") -> CrossMAE:
    model = CrossMAE(**vars(architecture), **DECODER, decoder=decoder)
    randomise(model)
    return model


def held(tensors: dict[str, Tensor], path: str = "a.pth", **recorded: Any) -> Weights:
    """Weights as if read from a file, which records the given arguments of its model."""
    return Weights(Path(path), "crossmae", tensors, {MODEL_ARGUMENTS: json.dumps(recorded)} if recorded else {})


def build(architecture: Architecture = SMALL, pool: Any = "avg") -> VisionTransformer:
    return build_vit(architecture, 5, pool).eval()


def assert_same_features(model: VisionTransformer, path: Path, norm: bool = False) -> None:
    """The tokens of timm's model are those of our encoder with the file's weights, in double precision to 1e-10."""
    size, channels = model.patch_embed.img_size, model.patch_embed.proj.in_channels
    own = ViTEncoder(**vars(SMALL) | {"img_size": size, "in_chans": channels})
    load(own, path, part="encoder")
    own.double()
    imgs = torch.randn(2, channels, *size, dtype=torch.float64)
    with torch.no_grad():
        tokens = own.features(own.embed(imgs), [own.depth - 1])[0]
        if norm:
            scale, shift = (read_weights(path).tensors[f"norm.{name}"].double() for name in ("weight", "bias"))
            tokens = nn.functional.layer_norm(tokens, (24,), scale, shift, 1e-6)
        torch.testing.assert_close(model.double().forward_features(imgs), tokens, atol=1e-10, rtol=0)


# Architecture


@pytest.mark.parametrize("pool", ["avg", "cls"])
@pytest.mark.parametrize("head", ["linear", "batchnorm"])
def test_pooling_and_head(pool: Any, head: Any) -> None:
    model = build_vit(SMALL, 5, pool, head=head).eval()
    randomise(model)
    imgs = torch.randn(2, 3, 32, 32)
    tokens = imgs
    with torch.no_grad():
        tokens = torch.cat([model.cls_token.expand(2, -1, -1), model.patch_embed(imgs)], dim=1) + model.pos_embed
        tokens = model.blocks(tokens)
        pooled = tokens[:, 1:].mean(1) if pool == "avg" else tokens[:, 0]
        norms = {name: module for name, module in model.named_modules() if name in ("norm", "fc_norm")}
        present = [name for name, module in norms.items() if isinstance(module, nn.LayerNorm)]
        assert present == {"avg": ["fc_norm"], "cls": ["norm"]}[pool]
        if present:
            assert norms[present[0]].eps == 1e-6
            pooled = norms[present[0]](pooled)
        weight, bias = (parameter for name, parameter in model.named_parameters() if name.startswith("head."))
        if head == "batchnorm":
            assert set(model.head.state_dict()) == {
                "0.running_mean", "0.running_var", "0.num_batches_tracked", "1.weight", "1.bias"
            }  # fmt: skip
            pooled = pooled / math.sqrt(1 + 1e-6)
        torch.testing.assert_close(model(imgs), pooled @ weight.T + bias)


@pytest.mark.parametrize(("head", "std"), [("linear", 2e-5), ("batchnorm", 0.01)])
def test_initial_head(head: Any, std: float) -> None:
    model = build_vit(change(embed_dim=240), 500, head=head)
    weight, bias = (parameter for name, parameter in model.named_parameters() if name.startswith("head."))
    assert float(weight.detach().std()) == pytest.approx(std, rel=0.02)
    assert not bias.any()


@pytest.mark.parametrize(("head", "std"), [("linear", 2e-5), ("batchnorm", 0.01)])
def test_no_weight_of_a_head_is_far_out(head: Any, std: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before torch 2.14, one random number in 2 ** 24 is the lowest possible: the weight would be -2 by torch."""
    monkeypatch.setattr(torch.Tensor, "uniform_", lambda self, a=0.0, b=1.0, generator=None: self.fill_(a))
    weight = next(parameter for name, parameter in build_vit(SMALL, 5, head=head).named_parameters() if "head" in name)
    assert 2 * std < float(weight.detach().abs().max()) <= 4.04 * std


def test_no_head_gives_features_and_drop_path_grows() -> None:
    model = build_vit(change(depth=4), 0, drop_path=0.3)
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 24)
    rates = [getattr(block.drop_path1, "drop_prob", 0.0) for block in model.blocks]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3])


def test_unknown_pool_and_sizes_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="pool='max', head='linear': unknown"):
        build_vit(SMALL, 5, "max")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="embed_dim 24 is not a multiple of num_heads 5"):
        change(num_heads=5)
    with pytest.raises(ValueError, match="nearest valid sizes are 24 and 32"):
        change(img_size=(32, 30))


def test_architecture_of_a_file(tmp_path: Path) -> None:
    oblong = change(img_size=(16, 48))
    weights = held(pretrained(oblong).state_dict(), **dataclasses.asdict(oblong))
    assert architecture_of(weights) == oblong
    assert json.loads(json.dumps(dataclasses.asdict(oblong)))["img_size"] == [16, 48]
    assert architecture_of(weights, img_size=64, in_chans=1, patch_size=None) == change(img_size=(64, 64), in_chans=1)
    assert architecture_of(weights, img_size=[16, 32], depth=3).img_size == (16, 32)


def test_architecture_that_no_shape_tells() -> None:
    weights = held(pretrained(change(img_size=(16, 48))).state_dict())
    with pytest.raises(UserError, match=r"a\.pth: does not record img_size and num_heads of its encoder"):
        architecture_of(weights)
    assert architecture_of(weights, img_size=(16, 48), num_heads=3) == change(img_size=(16, 48))
    wide = held(
        {name: torch.empty_like(value) for name, value in pretrained(change(embed_dim=192)).state_dict().items()}
    )
    assert architecture_of(wide).num_heads == 3  # of ViT-Ti, which is 192 wide
    assert architecture_of(wide, num_heads=6).num_heads == 6


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"embed_dim": 32, "depth": 2}, r"has embed_dim 24, not 32 and depth 3, not 2"),
        ({"mlp_ratio": 2}, r"has mlp_ratio 4\.0, not 2"),
        ({"num_heads": 6}, r"has num_heads 3, not 6"),
        ({"img_size": 36}, r"a\.pth: img_size \(36, 36\) is not a multiple of patch_size 8"),
    ],
)
def test_contradictions(given: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        architecture_of(held(pretrained().state_dict(), num_heads=3), **given)


# Equality with our encoder, from every kind of file


@pytest.mark.parametrize("img_size", [(32, 32), (16, 48)], ids=["square", "oblong"])
@pytest.mark.parametrize("in_chans", [1, 3])
def test_own_file(tmp_path: Path, img_size: tuple[int, int], in_chans: int) -> None:
    architecture = change(img_size=img_size, in_chans=in_chans)
    record = {FORMAT: "crossmae", MODEL_ARGUMENTS: json.dumps(dataclasses.asdict(architecture))}
    save_weights(tmp_path / "model.safetensors", pretrained(architecture).state_dict(), record)
    weights = read_weights(tmp_path / "model.safetensors")
    model = build(architecture_of(weights))
    report = load_encoder_weights(model, weights)
    assert {entry.name for entry in report.entries} == weights.tensors.keys() | model.state_dict().keys()
    assert report.names("new") == ["fc_norm.weight", "fc_norm.bias", "head.weight", "head.bias"]
    for name in report.names("used"):
        assert torch.equal(model.state_dict()[name], weights.tensors[name]), name
    assert_same_features(model, tmp_path / "model.safetensors")


def write_published(path: Path, decoder: str, prefix: str = "") -> None:
    """As the published scripts save: the settings in a namespace, and the optimizer."""
    tensors = {prefix + name: tensor for name, tensor in pretrained(decoder=decoder).state_dict().items()}
    settings = argparse.Namespace(model="mae_vit_base_patch16", input_size=32)
    torch.save({"model": tensors, "optimizer": {"state": {}}, "epoch": 3, "args": settings}, path)


@pytest.mark.parametrize("decoder", ["cross", "self"], ids=["crossmae", "mae"])
@pytest.mark.parametrize("prefix", ["", "module."], ids=["plain", "ddp"])
def test_published_layout(tmp_path: Path, decoder: str, prefix: str) -> None:
    write_published(tmp_path / "a.pth", decoder, prefix)
    weights = read_weights(tmp_path / "a.pth")
    model = build(architecture_of(weights, num_heads=3))
    report = load_encoder_weights(model, weights)
    assert_same_features(model, tmp_path / "a.pth")
    reasons = {entry.name: entry.reason for entry in report.entries if entry.status == "dropped"}
    assert reasons["decoder_pred.weight"] == "of pretraining only"
    assert reasons.keys() == {name for name in weights.tensors if name not in report.names("used")}
    assert ("norm.weight" in reasons) == (decoder == "self")


@pytest.mark.parametrize("name", ["crossmae", "mae"])
def test_official_files(name: str) -> None:
    path = OFFICIAL / f"{name}_official_layout.pth"
    if not path.is_file():
        pytest.skip(f"{path.name} is not here")
    weights = read_weights(path)
    assert architecture_of(weights, num_heads=3) == SMALL
    model = build()
    load_encoder_weights(model, weights)
    assert_same_features(model, path)


def test_final_norm_with_class_token(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    write_published(tmp_path / "mae.pth", "self")
    model = build(pool="cls")
    report = load_encoder_weights(model, read_weights(tmp_path / "mae.pth"))
    assert {"norm.weight", "norm.bias"} <= set(report.names("used"))
    assert "final norm" not in caplog.text
    assert_same_features(model, tmp_path / "mae.pth", norm=True)
    write_published(tmp_path / "cross.pth", "cross")
    model = build(pool="cls")
    report = load_encoder_weights(model, read_weights(tmp_path / "cross.pth"))
    assert report.names("new") == ["norm.weight", "norm.bias", "head.weight", "head.bias"]
    assert "cross.pth has no final norm" in caplog.text


def test_half_a_final_norm_is_an_error() -> None:
    tensors = dict(pretrained(decoder="self").state_dict())
    del tensors["norm.bias"]
    with pytest.raises(UserError, match=r"new +norm +1 +missing from the file: bias"):
        load_encoder_weights(build(pool="cls"), held(tensors))


@pytest.mark.parametrize("suffix", [".pth", ".pkl", ".safetensors"])
def test_encoder_converted_for_detection(tmp_path: Path, suffix: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    encoder = pretrained()
    save_weights(tmp_path / "a.safetensors", encoder.state_dict(), {MODEL_ARGUMENTS: json.dumps({"num_heads": 3})})
    convert(tmp_path / "a.safetensors", tmp_path / f"b{suffix}", "detectron2")
    weights = read_weights(tmp_path / f"b{suffix}")
    with pytest.raises(UserError, match=r"has no class token to pool\. Use average pooling"):
        load_encoder_weights(build(pool="cls"), weights)
    model = build()
    report = load_encoder_weights(model, weights)
    assert "cls_token" in report.names("new")
    assert "has no class token: it starts from random numbers" in caplog.text
    with torch.no_grad():
        model.cls_token.copy_(encoder.cls_token)
    assert_same_features(model, tmp_path / "a.safetensors")


@pytest.mark.parametrize("pool", ["avg", "cls"])
def test_timm_and_fine_tuned_files(tmp_path: Path, pool: str) -> None:
    theirs = build_vit(SMALL, 7, pool)  # type: ignore[arg-type]
    randomise(theirs)
    torch.save({"state_dict": theirs.state_dict()}, tmp_path / "a.pth")
    model = build()
    before = model.head.weight.clone()
    report = load_encoder_weights(model, read_weights(tmp_path / "a.pth"))
    reasons = {entry.name: entry.reason for entry in report.entries if entry.status == "dropped"}
    assert set(reasons) == {
        "head.weight",
        "head.bias",
        *(f"{'fc_' * (pool == 'avg')}norm.{x}" for x in ("weight", "bias")),
    }
    assert "another task's head" in reasons["head.weight"]
    assert torch.equal(model.head.weight, before)
    assert_same_features(model, tmp_path / "a.pth")


def test_head_of_the_same_classes_is_left_out_too() -> None:
    theirs, model = build(), build()
    randomise(theirs)
    load_encoder_weights(model, held(theirs.state_dict()))
    assert not torch.equal(model.head.weight, theirs.head.weight)
    assert torch.equal(model.fc_norm.weight, torch.ones(24))


# Nothing is lost without a word


@pytest.mark.parametrize(
    "name",
    ["blocks.1.ls1.gamma", "blocks.0.attn.q_norm.weight", "blocks.0.attn.rel_pos_h", "reg_token", "norm_pre.weight",
     "dist_token", "head_dist.weight", "patch_embed.norm.weight", "cls_token_2"],
)  # fmt: skip
@pytest.mark.parametrize("home", ["", "encoder."])
def test_unknown_tensors_are_errors(name: str, home: str) -> None:
    tensors = {home + key: tensor for key, tensor in (*pretrained().state_dict().items(), (name, torch.zeros(24)))}
    model = build()
    before = model.patch_embed.proj.weight.clone()
    with pytest.raises(UserError) as error:
        load_encoder_weights(model, held(tensors))
    if "not a plain ViT" in str(error.value):
        assert f"({home}{name})" in str(error.value)
        assert torch.equal(model.patch_embed.proj.weight, before)
        return
    row = next(line for line in str(error.value).splitlines() if "unexpected, the model has no such tensor" in line)
    module, index, tensor = split_name(name)
    assert row.startswith("!")
    assert all(part in row for part in (module, index, tensor))
    assert torch.equal(model.patch_embed.proj.weight, before)


def test_missing_and_mismatched_tensors_are_errors() -> None:
    tensors = dict(pretrained().state_dict())
    with pytest.raises(
        UserError, match="the file has a ViT with embed_dim 24, depth 3, but the model expects embed_dim 48"
    ):
        load_encoder_weights(build(change(embed_dim=48, depth=2)), held(tensors))
    del tensors["blocks.1.attn.qkv.bias"]
    with pytest.raises(UserError, match=r"new +blocks.1 +1 +missing from the file: attn.qkv.bias"):
        load_encoder_weights(build(), held(tensors))
    with pytest.raises(UserError, match="num_heads 3, but the model expects num_heads 6"):
        load_encoder_weights(build(change(num_heads=6)), held(pretrained().state_dict(), num_heads=3))
    with pytest.raises(UserError, match="no ViT encoder"):
        load_encoder_weights(build(), held({"conv.weight": torch.zeros(2)}))
    with pytest.raises(UserError, match=r"mismatched +pos_embed"):
        load_encoder_weights(build(), held(pretrained().state_dict() | {"pos_embed": torch.randn(1, 16, 24)}))


def test_what_lies_outside_of_an_encoder_is_reported() -> None:
    tensors = {f"backbone.net.{name}": tensor for name, tensor in pretrained().state_dict().items()}
    report = load_encoder_weights(build(), held(tensors | {"roi_heads.weight": torch.zeros(2)}))
    outside = next(entry for entry in report.entries if entry.name == "roi_heads.weight")
    assert (outside.status, outside.reason) == ("dropped", "outside the encoder")


# Resampling


def test_other_sizes_are_resampled_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    """As timm does it; tests/crossmae/checkpoints/test_resample.py has each step by itself."""
    caplog.set_level(logging.INFO)
    tensors = pretrained(change(img_size=(28, 28), patch_size=14)).state_dict()
    weights = held(tensors)
    model = build(architecture_of(weights, patch_size=16, img_size=(48, 32), in_chans=1, num_heads=3))
    load_encoder_weights(model, weights)
    filters = adapt_input_conv(1, resample_patch_embed(tensors["patch_embed.proj.weight"], [16, 16]))
    torch.testing.assert_close(model.patch_embed.proj.weight, filters)
    assert torch.equal(model.pos_embed, resample_positions(tensors["pos_embed"], (2, 2), (3, 2)))
    assert "pos_embed of a.pth: resampled 2 x 2 to 3 x 2" in caplog.text
    assert "patch_embed.proj.weight of a.pth: resampled 14 x 14 to 16 x 16 pixels, 3 channels to 1" in caplog.text


def test_positions_of_as_many_patches_in_another_shape() -> None:
    """16 rows are 4 x 4 or 2 x 8: equal shapes, other meaning."""
    tensors = pretrained().state_dict()
    model = build(change(img_size=(16, 64)))
    load_encoder_weights(model, held(tensors))
    assert torch.equal(model.pos_embed, resample_positions(tensors["pos_embed"], (4, 4), (2, 8)))
    tensors = pretrained(change(img_size=(16, 64))).state_dict()
    model = build()
    load_encoder_weights(model, held(tensors, img_size=[16, 64]))
    assert torch.equal(model.pos_embed, resample_positions(tensors["pos_embed"], (2, 8), (4, 4)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("side", [32, 48])
def test_other_precisions_become_float32(dtype: torch.dtype, side: int) -> None:
    tensors = {name: tensor.to(dtype) for name, tensor in pretrained().state_dict().items()}
    model = build(change(img_size=(side, side), in_chans=1))
    load_encoder_weights(model, held(tensors))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert torch.equal(model.cls_token, tensors["cls_token"].float())
    summed = tensors["patch_embed.proj.weight"].float().sum(dim=1, keepdim=True)
    assert torch.equal(model.patch_embed.proj.weight, summed.to(dtype).float())
    table = tensors["pos_embed"]
    wanted = table if side == 32 else resample_positions(table, (4, 4), (6, 6))
    assert torch.equal(model.pos_embed, wanted.float())


# Parameter groups


def test_groups_of_vit_base() -> None:
    with torch.device("meta"):
        model = build_vit(Architecture((224, 224), 16, 3, 768, 12, 12, 4.0), 1000)
    assert len(model.state_dict()) == 152
    groups = parameter_groups(model, 0.05, 0.65)
    scales = {group["name"]: group["lr_scale"] for group in groups}
    assert scales["layer_0_decay"] == pytest.approx(0.0037, abs=5e-5)
    assert scales["layer_12_no_decay"] == 0.65
    assert scales["layer_13_decay"] == scales["layer_13_no_decay"] == 1.0


def described(groups: list[dict[str, Any]], model: nn.Module) -> dict[str, tuple[float, float]]:
    names = {parameter: name for name, parameter in model.named_parameters()}
    found = [(names[p], (group["lr_scale"], group["weight_decay"])) for group in groups for p in group["params"]]
    assert len(found) == len(dict(found)), "a parameter is in two groups"
    return dict(found)


@pytest.mark.parametrize("freeze", [lambda name: False, lambda name: "blocks.0" in name or name == "pos_embed"])
def test_groups_are_those_of_timm(freeze: Callable[[str], bool]) -> None:
    model = build_vit(change(depth=4), 5)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not freeze(name))
    ours = described(parameter_groups(model, 0.05, 0.75), model)
    assert ours.keys() == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    theirs = described(
        param_groups_layer_decay(model, 0.05, no_weight_decay_list=model.no_weight_decay(), layer_decay=0.75), model
    )
    assert ours == {name: pytest.approx(values) for name, values in theirs.items()}


def test_final_norm_is_not_a_block() -> None:
    model = build_vit(SMALL, 5, "cls", head="batchnorm")
    groups = described(parameter_groups(model, 0.05, 0.5), model)
    assert groups["norm.weight"] == (1.0, 0.0)
    assert groups["head.1.weight"] == (1.0, 0.05)
    assert groups["cls_token"] == (0.5**4, 0.0)
    assert groups["blocks.2.mlp.fc1.weight"] == (0.5, 0.05)


@pytest.mark.parametrize("pool", ["avg", "cls"])
def test_an_encoder_with_several_class_tokens_loads_whole(pool: Any) -> None:
    """timm's blocks compute the tokens of pretraining; a classifier with one class token refuses the file."""
    encoder = pretrained(change(class_tokens=4))
    weights = held(dict(encoder.state_dict()), num_heads=3, img_size=32)
    architecture = architecture_of(weights)
    assert architecture == change(class_tokens=4)
    model = build(architecture, pool)
    load_encoder_weights(model, weights)
    model.norm = nn.Identity()
    imgs = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = encoder.features(encoder.embed(imgs), [2])[0]
        assert expected.shape == (2, 4 + 16, 24)
        torch.testing.assert_close(model.forward_features(imgs), expected)
    groups = parameter_groups(model, 0.05, 0.5)
    assert any(model.cls_token is p for p in groups[0]["params"])
    with pytest.raises(UserError, match="has 4 class tokens, but the model does not"):
        load_encoder_weights(build(SMALL, pool), weights)
