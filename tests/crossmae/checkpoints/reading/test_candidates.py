"""Proves that the encoder of a file is found wherever a trainer put it, that a stated rule chooses one of several, that
a name after the path chooses another, and that what could be meant equally well is not guessed."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from crossmae.checkpoints.conversion.inspection import inspect
from crossmae.checkpoints.reading.candidates import unwrapped
from crossmae.checkpoints.weights import encoder_tensors, read_weights
from crossmae.errors import UserError
from crossmae.models.encoder import ViTEncoder

SIZES: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}


def encoder(value: float = 1.0) -> dict[str, Tensor]:
    return {name: torch.full_like(tensor, value) for name, tensor in ViTEncoder(**SIZES).state_dict().items()}


def under(prefix: str, value: float = 1.0) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in encoder(value).items()}


def value_of(path: Path | str, **options: Any) -> float:
    (value,) = {tensor.unique().item() for tensor in encoder_tensors(read_weights(path, **options)).values()}
    return value


WRAPPED = [
    "module.",
    "_orig_mod.",
    "module._orig_mod.",
    "_forward_module.module.",
    "model._orig_mod.backbone.",
    "_fsdp_wrapped_module.vit._fsdp_wrapped_module.",
    "_module.",
]


@pytest.mark.parametrize("prefix", WRAPPED)
@pytest.mark.parametrize("block", ["", "_checkpoint_wrapped_module.", "_orig_mod.", "module._fsdp_wrapped_module."])
def test_wrappers_are_removed_at_any_depth(tmp_path: Path, prefix: str, block: str) -> None:
    """Of the whole model, of each block, and of a layer in it."""
    tensors = {
        name.replace("blocks.0.", f"blocks.0.{block}").replace("qkv.", f"qkv.{block}"): tensor
        for name, tensor in under(prefix).items()
    }
    torch.save({"state_dict": tensors}, tmp_path / "a.pth")
    save_file(tensors, tmp_path / "a.safetensors")
    for path in (tmp_path / "a.pth", tmp_path / "a.safetensors"):
        weights = read_weights(path)
        assert encoder_tensors(weights).keys() == encoder().keys()
        assert weights.beside == ()
        assert inspect(path).content == "encoder"


def test_names_that_only_resemble_wrappers_stay() -> None:
    for name in ("conv_module.weight", "modules.0.weight", "x.submodule.y", "my_orig_mod.z"):
        assert unwrapped(name) == name


@pytest.mark.parametrize(
    "keys", [["net"], ["params"], ["model", "state_dict"], ["a", "b", "c", "d"], ["checkpoint", "visual", "module"]]
)
@pytest.mark.parametrize("prefix", ["", "net.", "model.backbone.", "_model.backbone.wrapped_model._model.", "encoder."])
def test_any_key_and_any_prefix(tmp_path: Path, keys: list[str], prefix: str) -> None:
    content: Any = under(prefix) | {"metric_head.weight": torch.zeros(2)}
    for key in reversed(keys):
        content = {key: content, "epoch": 3, "optimizer": {"state": {0: {"exp_avg": torch.zeros(2)}}}}
    torch.save(content, tmp_path / "a.pth")
    weights = read_weights(tmp_path / "a.pth")
    assert encoder_tensors(weights).keys() == encoder().keys()
    assert {"epoch", "optimizer"} <= set(weights.beside)
    listed = {name.partition(" ")[0] for name in weights.beside} | weights.tensors.keys()
    assert {"metric_head", "metric_head.weight"} & listed


# Content with several encoders, the value of the one that is read, and of the averaged one.
SEVERAL: dict[str, tuple[dict[str, Any], float, float]] = {
    "lightning DINO": ({"state_dict": under("student_backbone.", 1) | under("teacher_backbone.", 2)}, 2, 2),
    "MoCo": ({"state_dict": under("encoder_q.", 1) | under("encoder_k.", 2)}, 1, 2),
    "lightly MoCo": ({"state_dict": under("backbone.", 1) | under("backbone_momentum.", 2)}, 1, 2),
    "BYOL": ({"online": encoder(1), "target": encoder(2)}, 1, 2),
    "EMA in a trainer": ({"trainer": {"net": encoder(1), "net_ema": encoder(2)}}, 1, 2),
    "in one dict": (under("model.", 1) | under("ema.module.", 2) | {"n_averaged": torch.tensor(3)}, 1, 2),
}


@pytest.mark.parametrize("case", SEVERAL)
def test_the_rule_for_several(tmp_path: Path, caplog: pytest.LogCaptureFixture, case: str) -> None:
    content, plain, averaged = SEVERAL[case]
    torch.save(content, tmp_path / "a.pth")
    assert value_of(tmp_path / "a.pth") == plain
    (line,) = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    other = line.partition("::")[2].partition(" ")[0]
    assert f"{tmp_path / 'a.pth'}: has several encoders, and " in line
    assert value_of(f"{tmp_path / 'a.pth'}::{other}") == 3 - plain
    assert value_of(tmp_path / "a.pth", ema=True) == averaged


def test_what_is_equally_likely_is_not_guessed(tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    torch.save({"rgb": encoder(1), "depth": under("vit.", 2)}, path)
    with pytest.raises(UserError, match=r"a\.pth: has several encoders: rgb, depth\.vit\. Name .*a\.pth::rgb\.$"):
        read_weights(path)
    assert value_of(f"{path}::rgb") == 1
    assert value_of(f"{path}::depth") == value_of(f"{path}::depth.vit") == 2
    with pytest.raises(UserError, match=r"a\.pth: has no encoder 'dep'\. Its encoders are rgb, depth\.vit"):
        read_weights(f"{path}::dep")


def test_one_encoder_under_two_names_is_one(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Lightning saves a module twice that has two attributes."""
    once = encoder(1)
    twice = {f"a.{name}": tensor for name, tensor in once.items()} | {f"b.{name}": once[name] for name in once}
    torch.save({"state_dict": twice}, tmp_path / "a.pth")
    assert value_of(tmp_path / "a.pth") == 1
    assert not caplog.records


def test_a_model_under_two_wrappers_is_kept_once(tmp_path: Path) -> None:
    torch.save(under("_forward_module.", 1) | under("_original_module.", 1), tmp_path / "a.pth")
    assert value_of(tmp_path / "a.pth") == 1
    torch.save(under("_forward_module.", 1) | under("_original_module.", 2), tmp_path / "a.pth")
    with pytest.raises(
        UserError, match=r"_forward_module\.\S+ and _original_module\.\S+ are both \S+ without wrappers"
    ):
        read_weights(tmp_path / "a.pth")


def test_a_file_with_the_mark_in_its_name(tmp_path: Path) -> None:
    torch.save(encoder(1), tmp_path / "a::b.pth")
    assert value_of(tmp_path / "a::b.pth") == 1


def test_detectors_with_an_average_are_read_without_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    content = {"model": under("backbone.net.", 1), "trained_model": under("backbone.net.", 2)}
    torch.save(content, tmp_path / "a.pth")
    assert value_of(tmp_path / "a.pth") == 1
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
