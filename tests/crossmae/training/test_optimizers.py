"""Proves which parameters Muon updates, that both parts step as torch's own, and that a run resumes to the bit."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from timm.models.vision_transformer import VisionTransformer

from crossmae.classification import vit
from crossmae.classification.train.config import FinetuneConfig
from crossmae.classification.train.train import finetune
from crossmae.errors import UserError
from crossmae.models.crossmae import CrossMAE
from crossmae.pretraining.train import parameter_groups, pretrain
from crossmae.training.optimizers import MuonWithAdamW, make_optimizer
from tests.crossmae.pretraining.runs import assert_same, build, digest, log_lines, make_config

pytestmark = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch is older than 2.9")


def tiny(tmp_path: Path, **model: Any) -> CrossMAE:
    return build(make_config(tmp_path, tmp_path, model=model))


def muon_of(model: CrossMAE) -> MuonWithAdamW:
    optimizer = make_optimizer("muon", model, parameter_groups(model, 0.05), 0.01, (0.9, 0.95))
    assert isinstance(optimizer, MuonWithAdamW)
    return optimizer


@pytest.mark.parametrize("decoder", ["cross", "cross_self", "self"])
def test_muon_has_the_matrices_of_the_blocks_and_adamw_everything_else(tmp_path: Path, decoder: str) -> None:
    model = tiny(tmp_path, decoder=decoder, fuse_blocks=[0])
    optimizer = muon_of(model)
    by_muon = {id(p) for group in optimizer.muon.param_groups for p in group["params"]}
    by_adamw = {id(p) for group in optimizer.adamw.param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        is_hidden = "blocks." in name and name.endswith(
            ("qkv.weight", "q.weight", "kv.weight", "proj.weight", "fc1.weight", "fc2.weight")
        )
        assert (id(parameter) in by_muon) == (is_hidden and parameter.requires_grad), name
        assert (id(parameter) in by_adamw) == (not is_hidden and parameter.requires_grad), name
    decays = [(len(group["params"]), group["weight_decay"]) for group in optimizer.param_groups]
    assert decays == [(len(by_muon), 0.05), *((n, w) for n, w in decays[1:])]
    assert [w for _, w in decays[1:]] == [0.0, 0.05]


def test_both_parts_step_as_torchs_own_optimizers(tmp_path: Path) -> None:
    model = tiny(tmp_path)
    other = copy.deepcopy(model)
    optimizer = muon_of(model)
    matrices = [p for n, p in other.named_parameters() if "blocks." in n and p.ndim == 2]
    rest = [p for p in other.parameters() if p.requires_grad and all(p is not each for each in matrices)]
    muon = torch.optim.Muon(matrices, 0.01, weight_decay=0.05, adjust_lr_fn="match_rms_adamw")
    groups: list[dict[str, Any]] = [
        {"params": [p for p in rest if p.ndim == 1], "weight_decay": 0.0},
        {"params": [p for p in rest if p.ndim > 1], "weight_decay": 0.05},
    ]
    adamw = torch.optim.AdamW(groups, 0.01, betas=(0.9, 0.95), fused=True)
    imgs, noise = torch.randn(2, 3, 32, 32), torch.rand(2, 16)
    for step in range(3):
        if step == 2:  # as on a restart
            state = copy.deepcopy(optimizer.state_dict())
            optimizer = muon_of(model)
            optimizer.load_state_dict(state)
        for each, parts in ((model, [optimizer]), (other, [muon, adamw])):
            each(imgs, 0.75, 0.25, noise).loss.backward()
            for part in parts:
                for group in part.param_groups:
                    group["lr"] = 0.01 / (step + 1)
                part.step()
            each.zero_grad()
    for (name, mine), theirs in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, theirs), name


def test_a_step_of_muon_is_as_large_as_one_of_adamw(tmp_path: Path) -> None:
    """The same learning rate fits: each matrix moves by about 0.2 of it per value (root mean square)."""
    model = tiny(tmp_path, embed_dim=64)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = make_optimizer("muon", model, parameter_groups(model, 0.0), 0.01, (0.9, 0.95))
    model(torch.randn(2, 3, 32, 32)).loss.backward()
    optimizer.step()
    for name, parameter in model.named_parameters():
        if name.startswith("blocks.") and parameter.ndim == 2:
            moved = (parameter - before[name]).square().mean().sqrt().item()
            assert 0.3 < moved / (0.2 * 0.01) < 1.5, name


@pytest.mark.parametrize("stop", [1, 4])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_run_with_muon_resumes_to_the_bit(images: Path, tmp_path: Path, stop: int, precision: str) -> None:
    settings = {
        "optim": {"name": "muon", "lr": 0.01, "ema": 0.9, "clip_grad": 0.5, "accumulate": 2, "batch_size": 3},
        "runtime": {"precision": precision},
    }
    pretrain(make_config(images, tmp_path / "whole", **settings))
    pretrain(make_config(images, tmp_path / "parts", **settings, schedule={"max_steps": stop}))
    pretrain(make_config(images, tmp_path / "parts", **settings), resume=True)
    whole = digest(tmp_path / "whole")
    assert {frozenset(state) for state in whole["moments"].values()} == {
        frozenset({"momentum_buffer"}),
        frozenset({"step", "exp_avg", "exp_avg_sq"}),
    }
    assert_same(whole, digest(tmp_path / "parts"))
    other = make_config(images, tmp_path / "parts", optim=settings["optim"] | {"name": "adamw"}, schedule={"epochs": 9})
    with pytest.raises(UserError, match=r'optim.name was "muon", is "adamw"'):
        pretrain(other, resume=True)


def test_the_loss_falls_with_muon(images: Path, tmp_path: Path) -> None:
    optim = {"name": "muon", "lr": 0.01}
    pretrain(make_config(images, tmp_path / "run", optim=optim, schedule={"epochs": 30, "warmup_epochs": 2}))
    losses = [loss for _, loss in log_lines(tmp_path / "run", "loss")]
    assert np.mean(losses[-6:]) < 0.8 * np.mean(losses[:6])


def test_layer_decay_holds_for_both_parts() -> None:
    model = VisionTransformer(img_size=16, patch_size=8, embed_dim=16, depth=2, num_heads=2, num_classes=3)
    groups = vit.parameter_groups(model, 0.05, 0.5)
    optimizer = make_optimizer("muon", model, groups, 0.01, (0.9, 0.999))
    found, expected = (
        {id(p): (group["lr_scale"], group["weight_decay"]) for group in of for p in group["params"]}
        for of in (optimizer.param_groups, groups)
    )
    assert found == expected
    assert isinstance(optimizer, MuonWithAdamW)
    assert [group["lr_scale"] for group in optimizer.muon.param_groups] == [0.25, 0.5]


def test_muon_without_a_place_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny(tmp_path)
    for block in (*model.blocks, *model.decoder_blocks):
        block.requires_grad_(False)
    with pytest.raises(UserError, match="all blocks are frozen"):
        muon_of(model)
    monkeypatch.delattr(torch.optim, "Muon")
    with pytest.raises(UserError, match=r"optim.name: torch .* has no Muon. Install torch 2.9"):
        muon_of(model)


def test_fine_tuning_with_muon_resumes_to_the_bit(labelled: Path, tmp_path: Path) -> None:
    size = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}
    values: dict[str, Any] = {
        "data": {"train": str(labelled / "train"), "workers": 0},
        "model": {"name": "vit_tiny_patch16", **size},
        "optim": {"name": "muon", "batch_size": 6, "lr": 0.01, "ema": 0.9},
        "schedule": {"epochs": 3, "warmup_epochs": 1},
        "runtime": {"device": "cpu"},
    }
    for run, stop, resume in (("whole", None, False), ("parts", 5, False), ("parts", None, True)):
        changes = {"output_dir": tmp_path / run, "schedule": values["schedule"] | {"max_steps": stop}}
        finetune(FinetuneConfig.model_validate(values | changes), resume)
    whole, parts = (load_file(tmp_path / run / "model.safetensors") for run in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
