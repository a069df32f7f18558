"""Proves that a whole model is rebuilt from its file: by its record, or by shapes alone, and that guesses are told."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from crossmae.checkpoints.metadata import MODEL_ARGUMENTS, PIXEL_MEAN, PIXEL_STD
from crossmae.checkpoints.pretrained import IMAGENET_MEAN, IMAGENET_STD, load_pretrained
from crossmae.checkpoints.weights import save_weights
from crossmae.errors import UserError
from crossmae.models.crossmae import CrossMAE

SHARED = Path(__file__).parents[4] / "shared/golden"
TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 2}
TINY |= {"decoder_embed_dim": 16, "decoder_depth": 2, "decoder_num_heads": 4}
HEADS = {"num_heads": 2, "decoder_num_heads": 4}


def tiny(**arguments: Any) -> CrossMAE:
    torch.manual_seed(0)
    return CrossMAE(**TINY | arguments).eval()


def check_equal(found: CrossMAE, wanted: CrossMAE) -> None:
    """Same tensors, and the same output, which heads, fusion and targets are a part of."""
    assert found.state_dict().keys() == wanted.state_dict().keys()
    imgs = torch.randn(2, wanted.in_chans, *(side * wanted.patch_size for side in wanted.grid))
    noise = torch.rand(2, wanted.num_patches)
    one, other = found(imgs, 0.75, 0.25, noise), wanted(imgs, 0.75, 0.25, noise)
    assert torch.equal(one.pred, other.pred)
    assert torch.equal(one.loss, other.loss)
    assert not found.training


@pytest.mark.parametrize(
    "arguments",
    [
        {"in_chans": 2, "img_size": (16, 32), "norm_pix_loss": False},
        {"in_chans": 1, "fuse_blocks": (0, -1), "decoder": "cross_self"},
        {"in_chans": 4, "fuse_blocks": (), "decoder_num_heads": 2},
        {"decoder": "self"},
    ],
)
def test_our_files_say_everything(tmp_path: Path, arguments: dict[str, Any]) -> None:
    model = tiny(**arguments)
    values = [0.1 * (c + 1) for c in range(model.in_chans)]
    metadata = {MODEL_ARGUMENTS: json.dumps(TINY | arguments)}
    metadata |= {PIXEL_MEAN: json.dumps(values), PIXEL_STD: json.dumps(values), "bit_depth": "16"}
    save_weights(tmp_path / "model.safetensors", model.state_dict(), metadata)
    pretrained = load_pretrained(tmp_path)
    check_equal(pretrained.model, model)
    assert pretrained.mean == pretrained.std == tuple(values)
    assert pretrained.bit_depth == 16
    assert pretrained.assumed == ()


def published(path: Path, model: CrossMAE, **settings: Any) -> Path:
    """A file as the published scripts write it."""
    torch.save({"model": model.state_dict(), "args": argparse.Namespace(**settings)}, path)
    return path


@pytest.mark.parametrize(
    ("arguments", "given", "assumptions"),
    [
        ({}, {}, 6),
        ({"fuse_input": False}, {}, 7),
        ({"decoder": "cross_self"}, {}, 6),
        ({"decoder": "self"}, {}, 6),
        ({"fuse_blocks": ()}, {}, 6),
        ({"fuse_blocks": (0,)}, {"fuse_blocks": [0]}, 6),
        ({"fuse_blocks": (0, 2), "fuse_input": False}, {"fuse_blocks": [0, 2]}, 6),
        ({"norm_pix_loss": False}, {"norm_pix_loss": False}, 5),
        ({"img_size": (16, 32)}, {"img_size": [16, 32]}, 6),
    ],
)
def test_published_files_by_their_shapes(
    tmp_path: Path, arguments: dict[str, Any], given: dict[str, Any], assumptions: int
) -> None:
    model = tiny(**arguments)
    pretrained = load_pretrained(published(tmp_path / "a.pth", model), HEADS | given)
    check_equal(pretrained.model, model)
    assert (pretrained.mean, pretrained.std) == (IMAGENET_MEAN, IMAGENET_STD)
    assert len(pretrained.assumed) == assumptions, pretrained.assumed
    assert any("norm_pix_loss" in line for line in pretrained.assumed) is ("norm_pix_loss" not in given)


def test_published_settings_settle_what_shapes_do_not(tmp_path: Path) -> None:
    model = tiny(fuse_blocks=(0, 2), norm_pix_loss=False)
    path = published(tmp_path / "a.pth", model, norm_pix_loss=False, use_fm=[0, 2], use_input=True)
    pretrained = load_pretrained(path, HEADS)
    check_equal(pretrained.model, model)
    names = [line.partition(":")[0] for line in pretrained.assumed]
    assert names == ["norm_eps", "activation", "pixel_mean", "pixel_std", "bit_depth"]
    every = published(tmp_path / "b.pth", tiny(), norm_pix_loss=True, use_fm=[-1], use_input=True)
    check_equal(load_pretrained(every, HEADS).model, tiny())


def test_heads_of_published_widths_are_known(tmp_path: Path) -> None:
    sizes = {"embed_dim": 192, "num_heads": 3, "decoder_embed_dim": 128, "decoder_num_heads": 4}
    model = tiny(**sizes, depth=1, decoder_depth=1)
    check_equal(load_pretrained(published(tmp_path / "a.pth", model)).model, model)


@pytest.mark.parametrize(("name", "decoder"), [("crossmae", "cross"), ("mae", "self")])
def test_published_layout(name: str, decoder: str) -> None:
    path = SHARED / f"{name}_official_layout.pth"
    if not path.exists():
        pytest.skip(f"{path.name} is not here")
    model = load_pretrained(path, {"num_heads": 2, "decoder_num_heads": 2}).model
    assert (model.decoder, model.fuse_input, model.norm_pix_loss) == (decoder, decoder == "cross", True)


@pytest.mark.parametrize(
    ("arguments", "given", "told"),
    [
        ({}, {}, "does not show num_heads and decoder_num_heads. Add --set num_heads=16 decoder_num_heads=16"),
        (
            {"fuse_blocks": (0,)},
            HEADS,
            "2 of 4 encoder maps are mixed for the decoder, and the file does not show fuse_blocks and fuse_input. ",
        ),
        ({}, HEADS | {"heads": 2}, "heads: unknown model argument. Use one of img_size, patch_size"),
        ({}, HEADS | {"num_heads": 5}, "no model with embed_dim=24, .*: a width of 24 cannot be split over 5"),
        ({"in_chans": 2}, HEADS, "'pixel_mean' and 'pixel_std' do not have one number for each of the 2 channels"),
        ({"img_size": (16, 24)}, HEADS, "does not show img_size. Add --set .img_size=.HEIGHT,WIDTH"),
        ({}, HEADS | {"fuse_blocks": [0]}, "does not fit"),
    ],
)
def test_errors(tmp_path: Path, arguments: dict[str, Any], given: dict[str, Any], told: str) -> None:
    path = published(tmp_path / "a.pth", tiny(**arguments))
    with pytest.raises(UserError, match=told):
        load_pretrained(path, given)


def test_an_encoder_alone_can_not_reconstruct(tmp_path: Path) -> None:
    encoder = {
        name: tensor for name, tensor in tiny().state_dict().items() if not name.startswith(("dec", "wfm", "mask"))
    }
    torch.save(encoder, tmp_path / "encoder.pth")
    with pytest.raises(
        UserError, match=r"encoder\.pth: an encoder, not a whole pretraining model with its decoder\. Start from it: "
    ):
        load_pretrained(tmp_path / "encoder.pth")
