"""The backbone alone: shapes of every level, weights of any format, patches of 14 pixels."""

import json

import pytest
import torch

pytest.importorskip("detectron2", reason="detectron2 is not installed: python tools/install_detectron2.py")

from safetensors.torch import save_file

from crossmae import create_model
from crossmae.errors import UserError
from det import build_backbone

TINY = {"depth": 2, "global_blocks": (1,)}


def write(path, model, **arguments):
    save_file(
        {name: tensor.contiguous() for name, tensor in model.state_dict().items()},
        path,
        {"model": json.dumps(arguments)} if arguments else {},
    )
    return path


def test_a_dict_of_feature_maps(tmp_path):
    model = create_model("crossmae_vit_tiny_patch16", img_size=64, depth=2, decoder_depth=1)
    path = write(tmp_path / "model.safetensors", model)
    backbone = build_backbone("crossmae_vit_tiny_patch16", weights=path, img_size=128, out_channels=8, **TINY)
    features = backbone(torch.randn(2, 3, 64, 160))
    assert {name: tuple(level.shape) for name, level in features.items()} == {
        "p2": (2, 8, 16, 40), "p3": (2, 8, 8, 20), "p4": (2, 8, 4, 10), "p5": (2, 8, 2, 5), "p6": (2, 8, 1, 3),
    }  # fmt: skip
    loaded = backbone.net.state_dict()
    for name, tensor in model.state_dict().items():
        if name.startswith(("pos_embed", "patch_embed.", "blocks.")):
            assert torch.equal(loaded[name], tensor), name


def test_patches_of_14_see_an_enlarged_image_as_before(tmp_path):
    """The tokens of an image enlarged from 56 to 64 pixels by the resized filters are those of the original."""
    torch.manual_seed(0)
    model = create_model("crossmae_vit_tiny_patch16", img_size=56, patch_size=14, depth=2, decoder_depth=1)
    with torch.no_grad():
        model.pos_embed.normal_()
    for arguments in ({}, {"img_size": 56, "patch_size": 14, "num_heads": 3}):
        path = write(tmp_path / "p14.safetensors", model, **arguments)
        net = build_backbone("crossmae_vit_tiny_patch16", path, 64, **TINY).net
        assert (net.patch_size, net.pretrain_img_size) == (16, 64)
        assert torch.equal(net.pos_embed, model.pos_embed)
        image = torch.randn(1, 3, 14, 14)
        larger = torch.nn.functional.interpolate(image, (16, 16), mode="bicubic", antialias=True)
        torch.testing.assert_close(net.patch_embed(larger), model.patch_embed(image), atol=1e-4, rtol=1e-4)


def test_what_does_not_fit_is_refused(tmp_path):
    model = create_model("crossmae_vit_tiny_patch16", img_size=64, depth=2, decoder_depth=1)
    path = write(tmp_path / "model.safetensors", model)
    with pytest.raises(UserError, match=r"the file has a ViT with .*depth 2, but the model expects .*depth 12"):
        build_backbone("crossmae_vit_small_patch16", weights=path)
    with pytest.raises(ValueError, match="unknown model 'vit_b'; known: crossmae_vit_tiny_patch16"):
        build_backbone("vit_b")
    oblong = create_model("crossmae_vit_tiny_patch16", img_size=(64, 96), depth=2, decoder_depth=1)
    path = write(tmp_path / "oblong.safetensors", oblong, img_size=[64, 96])
    with pytest.raises(UserError, match=r"the position embeddings are for images of size 64 x 96, not for square ones"):
        build_backbone("crossmae_vit_tiny_patch16", weights=path, **TINY)


def test_global_blocks_of_the_published_sizes():
    published = {12: [2, 5, 8, 11], 24: [5, 11, 17, 23], 32: [7, 15, 23, 31]}
    for size, depth in (("base_patch16", 12), ("large_patch16", 24), ("huge_patch14", 32)):
        with torch.device("meta"):
            blocks = build_backbone(f"crossmae_vit_{size}").net.blocks
        assert [index for index, block in enumerate(blocks) if not block.attn.window_size] == published[depth]
