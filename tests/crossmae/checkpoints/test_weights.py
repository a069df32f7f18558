"""Proves that weight files of every layout are read bit-exactly, and that loading is strict both ways."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from crossmae.checkpoints import load
from crossmae.checkpoints.metadata import MODEL_ARGUMENTS, PUBLISHED_ARGUMENTS
from crossmae.checkpoints.weights import (
    Weights,
    detect_format,
    encoder_arguments,
    encoder_tensors,
    non_finite,
    read_weights,
    save_weights,
)
from crossmae.errors import UserError
from crossmae.models.crossmae import CrossMAE
from crossmae.models.encoder import ViTEncoder

OFFICIAL = Path(__file__).parents[4] / "shared/golden"
ENCODER = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 3}
DECODER = {"decoder_embed_dim": 16, "decoder_depth": 2, "decoder_num_heads": 2}


def build(**overrides: Any) -> CrossMAE:
    """A tiny model; every call gives other weights."""
    return CrossMAE(**ENCODER | DECODER | overrides)


def state(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in actual.items():
        assert tensor.dtype == expected[name].dtype, name
        assert torch.equal(tensor, expected[name]), name


def published(path: Path, model: CrossMAE) -> None:
    """The layout of the published training scripts, optimizer state and Namespace included."""
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(1, 3, 32, 32)).loss.backward()
    optimizer.step()
    args = argparse.Namespace(model="mae_vit_base_patch16", input_size=32, norm_pix_loss=True, use_fm=[-1])
    content = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "epoch": 3,
        "scaler": {},
        "args": args,
    }
    torch.save(content, path)


@pytest.fixture
def tensors() -> dict[str, Tensor]:
    return state(build())


# What is read


def test_published_layout(tmp_path: Path) -> None:
    model = build()
    published(tmp_path / "published.pth", model)
    weights = read_weights(tmp_path / "published.pth")
    assert weights.format == "crossmae"
    assert json.loads(weights.metadata[PUBLISHED_ARGUMENTS])["model"] == "mae_vit_base_patch16"
    assert_same(weights.tensors, state(model))
    other = build()
    report = load(other, weights)
    assert_same(state(other), state(model))
    assert report.ok
    assert report.count("used") == len(model.state_dict()) == len(report.entries)
    assert weights.beside == ("optimizer", "epoch", "scaler", "args")


@pytest.mark.parametrize(
    ("name", "decoder", "depth"), [("crossmae", "cross", 4), ("mae", "self", 2)], ids=["crossmae", "mae"]
)
def test_official_files(name: str, decoder: str, depth: int) -> None:
    path = OFFICIAL / f"{name}_official_layout.pth"
    if not path.is_file():
        pytest.skip(f"{path.name} is not here")
    weights = read_weights(path)
    assert weights.format == name
    model = build(decoder=decoder, decoder_depth=depth)
    load(model, weights)
    assert_same(state(model), weights.tensors)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["patch_embed.proj.weight", "wfm.linear.weight"], "crossmae"),
        (["patch_embed.proj.weight", "norm.weight", "decoder_blocks.0.cross_attn.q.weight"], "crossmae"),
        (["patch_embed.proj.weight", "norm.weight", "decoder_embed.weight"], "mae"),
        (["patch_embed.proj.weight", "cls_token", "norm.weight"], "encoder"),
        (["encoder.patch_embed.proj.weight", "encoder.cls_token"], "encoder"),
        (["patch_embed.proj.weight", "fc_norm.weight", "head.weight"], "finetuned"),
        (["patch_embed.proj.weight", "norm.weight", "head.weight"], "finetuned"),
        (["patch_embed.proj.weight", "head.0.running_mean", "head.1.weight"], "linear_probe"),
        (["backbone.net.patch_embed.proj.weight", "backbone.net.pos_embed"], "detectron2"),
        (["backbone.net.patch_embed.proj.weight", "backbone.simfp_2.0.weight"], "detector"),
        (["conv1.weight"], "unknown"),
        (["patch_embed.proj.weight", "something.else"], "unknown"),
    ],
)
def test_formats(names: list[str], expected: str) -> None:
    assert detect_format(dict.fromkeys(names)) == expected


# What is refused


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_tensors_are_named(tmp_path: Path, tensors: dict[str, Tensor], value: float) -> None:
    tensors["blocks.1.mlp.fc1.bias"][3] = value
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=rf"a\.safetensors: 1 of {len(tensors)} tensors.*: blocks\.1\.mlp\.fc1\.bias"):
        read_weights(tmp_path / "a.safetensors")


def test_finite_tensors_whose_sum_overflows() -> None:
    """Nor do infinities of both signs, or an infinity among such numbers, cancel out."""
    large = {
        str(dtype): torch.full((9,), torch.finfo(dtype).max, dtype=dtype) for dtype in (torch.float16, torch.float32)
    }
    large |= {"integers": torch.full((9,), 2**62), "none": torch.zeros(0), "mask": torch.ones(9, dtype=torch.bool)}
    assert non_finite(large) == ()
    infinities = torch.tensor([torch.inf, -torch.inf, 1.0])
    assert non_finite(large | {"a": infinities, "b": torch.cat([large["torch.float32"], infinities])}) == ("a", "b")


def test_finite_8_bit_floats() -> None:
    """`inspect` and `load` refuse them, but detectors are checked before they are written."""
    assert non_finite({"a": torch.ones(3).to(torch.float8_e4m3fn)}) == ()


# The encoder


@pytest.mark.parametrize("prefix", ["", "module.", "encoder.", "backbone.", "backbone.net.", "module.backbone.net."])
def test_encoder_is_found_under_any_known_prefix(tmp_path: Path, prefix: str) -> None:
    encoder = state(ViTEncoder(**ENCODER))
    torch.save({prefix + name: tensor for name, tensor in encoder.items()}, tmp_path / "a.pth")
    assert_same(encoder_tensors(read_weights(tmp_path / "a.pth")), encoder)


@pytest.mark.parametrize("decoder", ["cross", "cross_self", "self"])
def test_encoder_of_a_pretraining_model(decoder: str) -> None:
    model = build(decoder=decoder)
    weights = Weights(Path("x"), "crossmae", state(model), {})
    encoder = ViTEncoder(**ENCODER)
    report = load(encoder, weights, part="encoder")
    assert_same(state(encoder), encoder_tensors(weights))
    assert report.count("used") + report.count("dropped") == len(weights.tensors) == len(report.entries)
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(encoder.features(encoder.embed(images), [2])[0], model.features(model.embed(images), [2])[0])


def test_no_encoder(tmp_path: Path) -> None:
    torch.save({"conv1.weight": torch.zeros(2)}, tmp_path / "a.pth")
    with pytest.raises(UserError, match=r"no ViT encoder\. Its tensors are conv1\.weight.*'backbone\.net\.patch_embed"):
        encoder_tensors(read_weights(tmp_path / "a.pth"))


@pytest.mark.parametrize("img_size", [32, (16, 64)])
def test_encoder_arguments_rebuild_the_encoder(img_size: Any) -> None:
    made = ENCODER | {"img_size": img_size, "in_chans": 2, "mlp_ratio": 2.0}
    metadata = {MODEL_ARGUMENTS: json.dumps(made)}
    assert encoder_arguments(ViTEncoder(**made).state_dict(), metadata) == made
    if img_size == 32:
        without = {key: value for key, value in made.items() if key != "num_heads"}
        assert encoder_arguments(ViTEncoder(**made).state_dict()) == without


# Strict loading


def weights_of(model: torch.nn.Module, metadata: dict[str, str] | None = None) -> Weights:
    tensors = state(model)
    return Weights(Path("source.pth"), detect_format(tensors), tensors, metadata or {})


def check_refusal(model: torch.nn.Module, weights: Weights, *told: str, **allowed: tuple[str, ...]) -> str:
    before = state(model)
    with pytest.raises(UserError) as caught:
        load(model, weights, **allowed, part="encoder")
    assert_same(state(model), before)
    for text in ("source.pth", "Nothing was loaded", *told):
        assert text in str(caught.value)
    return str(caught.value)


def test_missing_and_unexpected_tensors() -> None:
    weights = weights_of(ViTEncoder(**ENCODER))
    del weights.tensors["blocks.1.norm1.bias"]
    message = check_refusal(ViTEncoder(**ENCODER), weights, "missing from the file: norm1.bias")
    assert "! new" in message
    weights = weights_of(ViTEncoder(**ENCODER))
    weights.tensors["blocks.1.ls1.gamma"] = torch.ones(24)
    message = check_refusal(ViTEncoder(**ENCODER), weights, "unexpected, the model has no such tensor: ls1.gamma")
    assert "! dropped" in message
    report = load(ViTEncoder(**ENCODER), weights, dropped=(r"blocks\.\d+\.ls1\.",), part="encoder")
    assert report.names("dropped") == ["blocks.1.ls1.gamma"]
    # A pattern is matched from the start of the key, not anywhere in it.
    check_refusal(ViTEncoder(**ENCODER), weights, "ls1.gamma", dropped=("ls1",))


def test_allowed_new_tensors_keep_their_values() -> None:
    model, weights = build(), weights_of(ViTEncoder(**ENCODER))
    check_refusal(model, weights, "decoder_blocks.0-1")
    before = state(model)
    report = load(model, weights, new=("decoder_", "dec_norms", "wfm", "mask_token"), part="encoder")
    assert_same(
        {name: tensor for name, tensor in state(model).items() if name not in weights.tensors},
        {name: before[name] for name in report.names("new")},
    )
    assert_same({name: state(model)[name] for name in report.names("used")}, weights.tensors)


@pytest.mark.parametrize(
    ("other", "told"),
    [
        ({"embed_dim": 12}, "has a ViT with embed_dim 12, but the model expects embed_dim 24"),
        ({"depth": 5}, "depth 5, but the model expects depth 3"),
        ({"patch_size": 4}, "patch_size 4, but the model expects patch_size 8"),
        ({"img_size": 64}, "img_size 64, but the model expects img_size 32"),
        ({"in_chans": 1}, "in_chans 1, but the model expects in_chans 3"),
        ({"mlp_ratio": 2.0}, "mlp_ratio 2.0, but the model expects mlp_ratio 4.0"),
    ],
)
def test_other_architectures(other: dict[str, Any], told: str) -> None:
    check_refusal(ViTEncoder(**ENCODER), weights_of(ViTEncoder(**ENCODER | other)), told, "\n! ")


@pytest.mark.parametrize("other", [{"num_heads": 6}, {"img_size": (16, 64)}])
def test_differences_that_no_shape_shows(other: dict[str, Any]) -> None:
    made = ENCODER | other
    weights = weights_of(ViTEncoder(**made), {MODEL_ARGUMENTS: json.dumps(made)})
    key, value = next(iter(other.items()))
    check_refusal(ViTEncoder(**ENCODER), weights, f"{key} {value}, but the model expects {key} {ENCODER[key]}")


def test_mismatches_are_never_allowed() -> None:
    weights = weights_of(ViTEncoder(**ENCODER | {"img_size": 64}))
    told = "file (1, 65, 24), model (1, 17, 24)"
    check_refusal(ViTEncoder(**ENCODER), weights, told, new=(".",), dropped=(".",))


def test_nothing_in_common_is_an_error() -> None:
    with pytest.raises(UserError, match="no tensor is in both"):
        load(build(), weights_of(torch.nn.Linear(2, 2)), new=(".",), dropped=(".",))


def test_half_precision_is_reported() -> None:
    weights = weights_of(ViTEncoder(**ENCODER).half())
    model = ViTEncoder(**ENCODER)
    assert "float16 to float32" in load(model, weights, part="encoder").table()
    assert torch.equal(model.cls_token, weights.tensors["cls_token"].float())


# Writing


def test_save_refuses_to_overwrite(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    path = tmp_path / "new folder/a.safetensors"
    save_weights(path, tensors, {})
    before = path.read_bytes()
    with pytest.raises(UserError, match=r"a\.safetensors: exists already"):
        save_weights(path, {"a": torch.zeros(1)}, {})
    assert path.read_bytes() == before
    save_weights(path, {"a": torch.zeros(1)}, {}, force=True)
    assert list(read_weights(path).tensors) == ["a"]
    with pytest.raises(UserError, match=r"is a folder\. Name the file"):
        save_weights(path.parent, tensors, {}, force=True)


def test_failed_save_leaves_the_old_file_and_no_other(
    tmp_path: Path, tensors: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.safetensors"
    save_weights(path, tensors, {})
    before = path.read_bytes()

    def full_disk(tensors: dict[str, Tensor], file: Path, metadata: dict[str, str]) -> None:
        file.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("crossmae.checkpoints.weights.save_file", full_disk)
    with pytest.raises(UserError, match=r"a\.safetensors: cannot be written: No space left"):
        save_weights(path, {"a": torch.zeros(1)}, {}, force=True)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_an_encoder_under_another_beginning_is_read(tmp_path: Path) -> None:
    tensors = {f"visual.trunk.{name}": tensor for name, tensor in ViTEncoder(**ENCODER).state_dict().items()}
    torch.save(tensors | {"text.weight": torch.ones(2)}, tmp_path / "a.pth")
    weights = read_weights(tmp_path / "a.pth")
    assert encoder_tensors(weights).keys() == {name.removeprefix("visual.trunk.") for name in tensors}
    assert weights.beside == ("text (1 tensor)",)
