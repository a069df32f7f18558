"""Proves what a run takes from given weights, and that a licence stays with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from crossmae.checkpoints.metadata import ASSUMED
from crossmae.checkpoints.provenance import LICENCE, NON_COMMERCIAL, recorded_inheritance
from crossmae.errors import UserError
from crossmae.pretraining.initial_weights import start_from
from crossmae.pretraining.train import pretrain
from tests.crossmae.pretraining.runs import arguments, build, make_config


def test_a_run_starts_from_given_weights(images: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """From the same model everything, from another decoder or grid the encoder; a foreign encoder is refused whole."""
    first = pretrain(make_config(images, tmp_path / "first", schedule={"max_steps": 2}))
    source = load_file(first)
    with caplog.at_level("INFO"):
        config = make_config(images, tmp_path / "same", model={"init": first})
        model = build(config)
        start_from(model, first, arguments(config), config.data)
        assert all(torch.equal(tensor, source[name]) for name, tensor in model.state_dict().items())
        assert "the whole model comes from" in caplog.text

        config = make_config(images, tmp_path / "other", model={"decoder_depth": 1, "img_size": [64, 32]})
        model = build(config)
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        start_from(model, first, arguments(config), config.data)
    state = model.state_dict()
    blocks = [name for name in state if name.startswith(("blocks.", "patch_embed.", "cls_token"))]
    assert all(torch.equal(state[name], source[name]) for name in blocks)
    assert all(torch.equal(state[name], before[name]) for name in state if name not in blocks)
    assert "the encoder comes from" in caplog.text
    assert "sine-cosine positions made again, 4 x 4 to 8 x 4" in caplog.text
    config = make_config(images, tmp_path / "wide", model={"embed_dim": 32})
    model = build(config)
    with pytest.raises(UserError, match=r"embed_dim 16, but the model expects embed_dim 32"):
        start_from(model, first, arguments(config), config.data)
    pretrain(make_config(images, tmp_path / "run", model={"init": first}, schedule={"max_steps": 1}))
    # A step at the first step's learning rate, 0: the weights are still those it started from.
    assert all(
        torch.equal(tensor, source[name]) for name, tensor in load_file(tmp_path / "run/model.safetensors").items()
    )
    assert recorded_inheritance(tmp_path / "run/model.safetensors").get(LICENCE) is None


def test_a_decoder_of_another_kind_is_not_taken_over(
    images: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Shapes do not show the number of heads, which maps were fused, or what was predicted."""
    first = pretrain(make_config(images, tmp_path / "first", schedule={"max_steps": 1}))
    for changes in ({"decoder_num_heads": 4}, {"norm_pix_loss": False}):
        config = make_config(images, tmp_path / "other", model=changes)
        model = build(config)
        before = model.mask_token.clone()
        with caplog.at_level("INFO"):
            start_from(model, first, arguments(config), config.data)
        assert torch.equal(model.mask_token, before)
        assert f"the file's model has other {next(iter(changes))}" in caplog.text


def test_the_licence_of_weights_goes_with_what_is_trained_from_them(images: Path, tmp_path: Path) -> None:
    first = pretrain(make_config(images, tmp_path / "first", schedule={"max_steps": 1}))
    torch.save({"model": load_file(first)}, tmp_path / "published.pth")  # without the record of our own training
    settings: dict[str, Any] = {"model": {"init": tmp_path / "published.pth"}}
    pretrain(make_config(images, tmp_path / "run", **settings, schedule={"max_steps": 1}))
    assert recorded_inheritance(tmp_path / "run/model.safetensors").get(LICENCE) == NON_COMMERCIAL
    (tmp_path / "published.pth").unlink()
    pretrain(make_config(images, tmp_path / "run", **settings, schedule={"max_steps": 2}), resume=True)
    assert recorded_inheritance(tmp_path / "run/model.safetensors").get(LICENCE) == NON_COMMERCIAL


def test_assumed_heads_are_logged_with_their_keys_and_stay_assumed(
    images: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    changes = {"embed_dim": 192, "decoder_embed_dim": 128, "depth": 1, "decoder_depth": 1}
    usual: dict[str, Any] = changes | {"num_heads": None, "decoder_num_heads": None}
    first = pretrain(make_config(images, tmp_path / "first", model=usual, schedule={"max_steps": 1}))
    torch.save({"model": load_file(first)}, tmp_path / "bare.pth")
    settings = {"init": tmp_path / "bare.pth"}
    with caplog.at_level("INFO"):
        second = pretrain(make_config(images, tmp_path / "run", model=usual | settings, schedule={"max_steps": 1}))
    for line in (
        "num_heads: 3 is assumed from the width 192, the file does not tell. Set model.num_heads=6 if it differs",
        "decoder_num_heads: 4 is assumed from the width 128, the file does not tell. "
        "Set model.decoder_num_heads=2 if it differs",
        "pixel_mean: [0.485, 0.456, 0.406] is assumed from this run, the file does not tell. "
        "Set 'data.mean=[0.5,0.5,0.5]' if it differs",
    ):
        assert f"model.init: {line}" in caplog.messages
    marks = recorded_inheritance(second)[ASSUMED]
    assert {"decoder_num_heads", "num_heads"} <= set(json.loads(marks))
    assert "img_size" not in json.loads(marks)  # the sines of the positions show the grid
    pretrain(make_config(images, tmp_path / "run", model=usual | settings, schedule={"max_steps": 2}), resume=True)
    assert recorded_inheritance(second)[ASSUMED] == marks
    # Assumed values of the file do not contradict given values. Recorded values do.
    given = make_config(images, tmp_path / "given", model=changes | {"num_heads": 6, "init": second})
    report = start_from(build(given), second, arguments(given), given.data)
    assert report.count("new") == 0
    with pytest.raises(UserError, match="num_heads 3, but the model expects num_heads 6"):
        start_from(build(given), first, arguments(given), given.data)
