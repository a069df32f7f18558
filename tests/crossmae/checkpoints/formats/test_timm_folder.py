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
from crossmae.checkpoints.formats.timm_folder import timm_metadata
from crossmae.checkpoints.metadata import CLASSES, MODEL_ARGUMENTS, PIXEL_MEAN, PIXEL_STD
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
    ("config", "told"),
    [
        ({"architecture": "resnet50"}, "cannot be built"),
        ({"architecture": "no_such_model"}, "'no_such_model' is not a model of timm"),
        ({"architecture": "hf-hub:some/where"}, "is not a model of timm"),
        ({"architecture": "local-dir:/tmp"}, "is not a model of timm"),
        ({"model_args": {"act_layer": "quick_gelu"}}, "model_args has act_layer"),
        ({"model_args": {"checkpoint_path": "payload.pth"}}, "model_args has checkpoint_path"),
        ({"model_args": {"pretrained": True}}, "model_args has pretrained"),
        ({"model_args": {"depth": 3000}}, None),
        ({"model_args": {"embed_dim": "wide"}}, "cannot be built"),
        (
            {"architecture": "vit_base_patch16_clip_quickgelu_224", "model_args": {}},
            "other blocks or another activation",
        ),
    ],
)
def test_what_a_config_cannot_ask_for(tmp_path: Path, config: dict[str, Any], told: str | None) -> None:
    path = folder(tmp_path / "a", **config)
    if told is None:  # one block is built, whatever it says
        assert read_weights(path).format == "finetuned"
        return
    with pytest.raises(UserError, match=rf"config\.json: .*{told}"):
        read_weights(path)


def test_nothing_that_a_config_names_is_unpickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Payload:
        def __reduce__(self) -> Any:
            return Path.mkdir, (tmp_path / "sentinel",)

    torch.save({"model": Payload()}, tmp_path / "payload.pth")
    path = folder(tmp_path / "a", model_args=SMALL | {"checkpoint_path": str(tmp_path / "payload.pth")})
    with pytest.raises(UserError, match="model_args has checkpoint_path"):
        convert(path, tmp_path / "b", "timm")
    assert not (tmp_path / "sentinel").exists()


def test_the_source_of_a_proof_is_timms_own_model_of_the_folder(tmp_path: Path) -> None:
    """With layer scale, which is folded in; the proof has it on its own on one side."""
    path = tmp_path / "a"
    path.mkdir()
    model = timm.create_model("vit_small_patch16_224", num_classes=0, init_values=0.3, **SMALL)
    save_file(model.state_dict(), path / "model.safetensors", {"format": "pt"})
    config = {"architecture": "vit_small_patch16_224", "num_classes": 0, "model_args": SMALL | {"init_values": 0.3}}
    (path / "config.json").write_text(json.dumps(config))
    done = convert(path, tmp_path / "b.safetensors", "crossmae")
    assert done.proof.equal
    assert (done.proof.max_difference or 0) > 0
    assert "folded in on both sides" not in done.proof.sentence()
    torch.save(model.state_dict(), tmp_path / "c.pth")
    done = convert(tmp_path / "c.pth", tmp_path / "d.safetensors", "crossmae", given={"num_heads": 3})
    assert "layer scale folded in on both sides" in done.proof.sentence()


def test_a_head_over_other_pooling_is_left_behind(tmp_path: Path) -> None:
    model = timm.create_model("vit_small_patch16_224", num_classes=5, global_pool="avg", fc_norm=False, **SMALL)
    (tmp_path / "a").mkdir()
    save_file(model.state_dict(), tmp_path / "a/model.safetensors", {"format": "pt"})
    given = SMALL | {"global_pool": "avg", "fc_norm": False}
    config = {"architecture": "vit_small_patch16_224", "num_classes": 5, "model_args": given}
    (tmp_path / "a/config.json").write_text(json.dumps(config))
    done = convert(tmp_path / "a", tmp_path / "b", "hf-vit")
    assert {"head.weight", "head.bias"} == set(done.report.names("dropped"))


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


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("vit_small_patch16_224", {"img_size": (32, 48)}),  # 4 x 6 patches and a class token: as many rows as 5 x 5
        ("vit_small_patch14_dinov2", {"img_size": 28, "patch_size": 7}),
    ],
)
def test_folders_that_timm_itself_writes(tmp_path: Path, name: str, arguments: dict[str, Any]) -> None:
    """Pickled, for want of timm's name of a hub; what they say of sizes counts before the table is looked at."""
    model = timm.create_model(name, num_classes=0, **SMALL | arguments)
    timm.models.save_for_hf(model, str(tmp_path / "a"), model_args=SMALL | arguments)
    weights = read_weights(tmp_path / "a")
    assert weights.tensors["pos_embed"].shape == model.pos_embed.shape
    done = convert(tmp_path / "a", tmp_path / "b.safetensors", "crossmae")
    assert done.proof.equal
    assert done.assumed == ()
