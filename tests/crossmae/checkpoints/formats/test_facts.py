"""Proves that a value is a fact only where the file tells it, that assumed values are named with the key that sets
them, and that they stay assumed in every file that is written from them."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from crossmae.checkpoints import convert, inspect, load
from crossmae.checkpoints.formats.facts import SET_OPTION, assumed, assumed_lines, condition, encoder_facts
from crossmae.checkpoints.pretrained import parse_settings
from crossmae.checkpoints.weights import encoder_tensors, read_weights
from crossmae.errors import UserError
from crossmae.models.encoder import ViTEncoder

SMALL = {"img_size": 32, "patch_size": 16, "embed_dim": 384, "depth": 1, "num_heads": 12}
WIDE = "num_heads: 6 is assumed from the width 384, the file does not tell. "


def learned(**changes: Any) -> dict[str, Tensor]:
    """Tensors of timm's ViT, whose positions are no sines."""
    torch.manual_seed(0)
    state = VisionTransformer(**SMALL | changes, num_classes=0).state_dict()
    return {name: torch.randn_like(tensor) * 0.02 for name, tensor in state.items()}


def written(path: Path, content: Any) -> Path:
    torch.save(content, path)
    return path


def sources(path: Path) -> dict[str, str]:
    weights = read_weights(path)
    return {key: fact.source for key, fact in encoder_facts(encoder_tensors(weights), weights.metadata).items()}


def heads(content: Any, tmp_path: Path) -> tuple[Any, str]:
    weights = read_weights(written(tmp_path / "a.pth", content))
    fact = encoder_facts(encoder_tensors(weights), weights.metadata)["num_heads"]
    return fact.value, fact.source


def test_without_any_evidence_the_width_decides_and_that_is_typed(tmp_path: Path) -> None:
    path = written(tmp_path / "a.pth", learned())
    found = sources(path)
    shown = ("embed_dim", "depth", "patch_size", "in_chans", "mlp_ratio")
    assert {found[key] for key in shown} == {"shapes"}
    assert {key for key, source in found.items() if source == "assumed"} == {
        "num_heads", "img_size", "norm_eps", "activation",
    }  # fmt: skip
    lines = inspect(path).assumed
    assert f"{WIDE}Record it by tools/convert_checkpoint.py --set num_heads=12 if it differs" in lines
    assert [line.partition(":")[0] for line in lines[-3:]] == ["pixel_mean", "pixel_std", "bit_depth"]
    assert inspect(path).sources["num_heads"] == "assumed"


@pytest.mark.parametrize(
    ("beside", "expected"),
    [
        ({"args": argparse.Namespace(num_heads=12)}, (12, "recorded")),
        ({"hyper_parameters": {"encoder": {"num_heads": 12}}}, (12, "recorded")),
        ({"hyper_parameters": {"encoder": {"num_heads": 7}}}, (6, "assumed")),  # does not divide the width
        ({"config": {"a": {"num_heads": 12}, "b": {"num_heads": 6}}}, (6, "assumed")),  # contradicts itself
        ({"arch": "vit_small_patch16_224"}, (6, "recorded")),
        ({"arch": "vit_base_patch16_224"}, (6, "assumed")),  # of another width
        ({"arch": "vit_small"}, (6, "assumed")),  # DINO has 6, MoCo v3 has 12
        ({"arch": "hf-hub:someone/something"}, (6, "assumed")),
        ({"args": argparse.Namespace(model="mae_vit_small_patch16")}, (6, "recorded")),
    ],
)
def test_heads_in_the_settings_of_a_trainer(tmp_path: Path, beside: dict[str, Any], expected: tuple[int, str]) -> None:
    assert heads({"model": learned(), **beside}, tmp_path) == expected


def test_heads_by_the_names_of_moco_and_dino(tmp_path: Path) -> None:
    moco = {
        f"module.{branch}.{name}": t for branch in ("base_encoder", "momentum_encoder") for name, t in learned().items()
    }
    assert heads({"arch": "vit_small", "state_dict": moco}, tmp_path) == (12, "recorded")
    dino = {"teacher": learned(), "args": argparse.Namespace(arch="vit_small")}
    assert heads(dino, tmp_path) == (6, "recorded")


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("attn.rel_pos_h", (3, 32)),
        ("attn.q_norm.weight", (32,)),
        ("attn.relative_position_bias_table", (9, 12)),
        ("attn.logit_scale", (12, 1, 1)),
    ],
)
def test_heads_in_shapes(tmp_path: Path, name: str, shape: tuple[int, ...]) -> None:
    assert heads(learned() | {f"blocks.0.{name}": torch.ones(shape)}, tmp_path) == (12, "shapes")


def test_sine_cosine_positions_and_settings_show_the_grid(tmp_path: Path) -> None:
    assert sources(written(tmp_path / "a.pth", ViTEncoder(**SMALL).state_dict()))["img_size"] == "shapes"
    told = {"model": learned(), "args": argparse.Namespace(input_size=32)}
    assert sources(written(tmp_path / "b.pth", told))["img_size"] == "recorded"
    other = {"model": learned(), "args": argparse.Namespace(input_size=224)}  # not the size of these positions
    assert sources(written(tmp_path / "c.pth", other))["img_size"] == "assumed"


def test_what_was_assumed_stays_assumed_in_a_converted_file(tmp_path: Path) -> None:
    source = written(tmp_path / "a.pth", learned())
    first = convert(source, tmp_path / "b.safetensors", "timm")
    assert f"{WIDE}Add --set num_heads=12 if it differs" in first.assumed
    assert "given the assumed num_heads=6, img_size=32, norm_eps=1e-06 and activation=gelu" in first.proof.sentence()
    assert sources(tmp_path / "b.safetensors")["num_heads"] == "assumed"
    second = convert(tmp_path / "b.safetensors", tmp_path / "c.pth", "detectron2")
    assert "num_heads: 6 is assumed since the file was written" in " ".join(second.assumed)
    assert sources(tmp_path / "c.pth")["img_size"] == "assumed"
    third = convert(tmp_path / "c.pth", tmp_path / "d.pth", "detectron2", given={"num_heads": 12})
    assert sources(tmp_path / "d.pth")["num_heads"] == "recorded"
    assert "num_heads" not in third.proof.sentence()
    with pytest.raises(UserError, match=r"--set num_heads: .* shows num_heads 12"):
        convert(tmp_path / "d.pth", tmp_path / "e.pth", "detectron2", given={"num_heads": 6})


def test_everything_can_be_recorded(tmp_path: Path) -> None:
    source = written(tmp_path / "a.pth", learned())
    settings = ["num_heads=12", "img_size=32", "norm_eps=1e-5", "activation=gelu", "bit_depth=8"]
    given = parse_settings([*settings, "pixel_mean=[0.5,0.5,0.5]", "pixel_std=[0.5,0.5,0.5]"])
    done = convert(source, tmp_path / "b.safetensors", "crossmae", given=given)
    assert all("epsilon of 1e-05" in line for line in done.assumed)  # the target's own is another
    assert "assumed" not in done.proof.sentence()
    assert inspect(tmp_path / "b.safetensors").assumed == ()
    with pytest.raises(UserError, match=r"--set norm_eps: .* shows norm_eps 1e-05"):
        convert(tmp_path / "b.safetensors", tmp_path / "c.safetensors", "crossmae", given={"norm_eps": 1e-6})


@pytest.mark.parametrize(
    "setting",
    ["norm_eps=0", "norm_eps=x", "activation=relu", "bit_depth=12", "pool=max", "pixel_std=[0.0]", "pixel_mean=[]"],
)
def test_values_that_cannot_be(tmp_path: Path, setting: str) -> None:
    source = written(tmp_path / "a.pth", learned())
    with pytest.raises(UserError, match=rf"--set {setting.partition('=')[0]}: .* is not .*Correct it"):
        convert(source, tmp_path / "b.pth", "crossmae", given=parse_settings([setting]))
    assert not (tmp_path / "b.pth").exists()


def test_a_load_reports_the_heads_of_the_model(tmp_path: Path) -> None:
    path = written(tmp_path / "a.pth", {name: t for name, t in learned().items() if not name.startswith("norm.")})
    report = load(ViTEncoder(**SMALL), path)
    assert report.assumed["num_heads"].value == 12
    assert "from the model's settings" in assumed_lines(report.assumed)[0]
    recorded = written(tmp_path / "b.pth", {"model": torch.load(path), "args": argparse.Namespace(num_heads=6)})
    with pytest.raises(UserError, match="has a ViT with num_heads 6, but the model expects num_heads 12"):
        load(ViTEncoder(**SMALL), recorded)


def test_lines_and_conditions() -> None:
    facts = encoder_facts({name: tensor.to("meta") for name, tensor in learned().items()}, {})
    assert assumed_lines(facts, {"num_heads": "model.num_heads"})[0] == f"{WIDE}Set model.num_heads=12 if it differs"
    assert assumed_lines(facts, SET_OPTION)[1].endswith("Add --set 'img_size=[HEIGHT,WIDTH]' if it differs")
    assert condition({"num_heads": facts["num_heads"]}) == "given the assumed num_heads=6"
    assert condition({"depth": facts["depth"]}) == ""
    assert "num_heads" not in assumed(facts, ["num_heads"])


@pytest.mark.parametrize("text", ["x", "{}", "[1]"])
def test_damaged_marks_are_errors(text: str) -> None:
    with pytest.raises(UserError, match="is not a JSON list of names"):
        encoder_facts(learned(), {"assumed": text, "model": json.dumps({"num_heads": 6})})
