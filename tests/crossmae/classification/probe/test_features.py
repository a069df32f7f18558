"""Proves which features are taken: those of the online probe for our own models, the file's norm where it has one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from crossmae.checkpoints.metadata import MODEL_ARGUMENTS, PUBLISHED_ARGUMENTS
from crossmae.checkpoints.weights import Weights, detect_format
from crossmae.classification.data import Views
from crossmae.classification.probe.features import (
    extract,
    last_trained_block,
    open_encoder,
    random_weights,
)
from crossmae.classification.vit import Architecture, build_vit
from crossmae.data.pixels import Normalize, centre_view, read_pixels
from crossmae.data.sources import open_source
from crossmae.errors import UserError
from crossmae.models.crossmae import CrossMAE
from crossmae.models.sizes import model_arguments
from crossmae.pretraining.config import load_config
from crossmae.pretraining.initial_weights import build_model
from crossmae.pretraining.neighbours import encode_images, encode_tokens, pool_tokens
from tests.crossmae.classification.labelled import write_classes

TINY: dict[str, Any] = {"img_size": (16, 24), "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 2}
DECODER: dict[str, Any] = {"decoder_embed_dim": 16, "decoder_depth": 1, "decoder_num_heads": 2}
IMGS = torch.randn(5, 3, 16, 24, generator=torch.Generator().manual_seed(0))
VIEWS = Views((16, 24), 0.8, (0.4, 0.5, 0.6), (0.2, 0.3, 0.4), 8)


def weights_of(model: nn.Module, record: dict[str, Any], **metadata: str) -> Weights:
    tensors = dict(model.state_dict())
    return Weights(Path("some.pth"), detect_format(tensors), tensors, {MODEL_ARGUMENTS: json.dumps(record)} | metadata)


def lively(model: nn.Module) -> nn.Module:
    """With norms that do something: else one could be left out unnoticed."""
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            nn.init.normal_(module.weight, 1.0, 0.5)
            nn.init.normal_(module.bias, 0.0, 0.5)
    return model


def blocks_of(vit: nn.Module, imgs: Tensor, blocks: int) -> Tensor:
    """Tokens after so many blocks of timm's model, by hand."""
    model: Any = vit
    tokens = model._pos_embed(model.patch_embed(imgs))
    for block in model.blocks[:blocks]:
        tokens = block(tokens)
    return tokens


@pytest.mark.parametrize("pool", ["avg", "cls"])
@pytest.mark.parametrize(
    ("arguments", "block", "normed"),
    [
        ({}, 2, False),
        ({"fuse_blocks": (-2, 0)}, 1, False),
        ({"fuse_blocks": (0,), "decoder": "cross_self"}, 0, False),
        ({"fuse_blocks": ()}, 2, True),
        ({"decoder": "self"}, 2, True),
    ],
)
def test_features_are_those_of_the_online_probe(arguments: dict[str, Any], block: int, normed: bool, pool: Any) -> None:
    torch.manual_seed(0)
    given = TINY | DECODER | arguments
    model = CrossMAE(**given)
    lively(model)
    opened = open_encoder(weights_of(model, given), pool, None)
    assert (opened.block, opened.norm) == (block, normed)
    torch.testing.assert_close(opened(IMGS), encode_images(model, [IMGS], pool), rtol=1e-4, atol=1e-5)
    assert any(f"block {block} of 0 .. 2" in note for note in opened.notes)


@pytest.mark.parametrize("pool", ["avg", "cls"])
def test_fine_tuned_files(pool: Any) -> None:
    """The norm of the class-token mode is used; fc_norm and head of the average mode are not, and it is said."""
    torch.manual_seed(0)
    vit = lively(build_vit(Architecture((16, 24), 8, 3, 24, 3, 2, 4.0), 7, pool)).eval()
    opened = open_encoder(weights_of(vit, TINY), pool, None)
    tokens = blocks_of(vit, IMGS, 3)
    tokens = vit.get_submodule("norm")(tokens) if pool == "cls" else tokens
    torch.testing.assert_close(opened(IMGS), pool_tokens(tokens, pool))
    left_out = "fc_norm and head" if pool == "avg" else "head"
    assert f"not used: {left_out} of the fine-tuned model" in opened.notes


def test_an_earlier_block_has_no_final_norm() -> None:
    torch.manual_seed(0)
    vit = lively(build_vit(Architecture((16, 24), 8, 3, 24, 3, 2, 4.0), 7, "cls")).eval()
    weights = weights_of(vit, TINY)
    for block in (1, -2):
        opened = open_encoder(weights, "avg", block)
        assert (opened.block, opened.norm) == (1, False)
        torch.testing.assert_close(opened(IMGS), blocks_of(vit, IMGS, 2)[:, 1:].mean(1))
    assert open_encoder(weights, "avg", 2).norm
    for block in (3, -4):
        with pytest.raises(UserError, match=rf"features.block: some.pth has no block {block}. Choose from -3 to 2"):
            open_encoder(weights, "avg", block)


def test_class_token_and_mean_side_by_side() -> None:
    model = CrossMAE(**TINY, **DECODER)
    weights = weights_of(model, TINY)
    both = open_encoder(weights, "cls_avg", None)
    parts = [open_encoder(weights, pool, None)(IMGS) for pool in ("cls", "avg")]  # type: ignore[arg-type]
    assert both.width == 48
    assert torch.equal(both(IMGS), torch.cat(parts, dim=1))


def test_no_class_token_to_pool() -> None:
    model = CrossMAE(**TINY, **DECODER)
    weights = weights_of(model, TINY)
    del weights.tensors["cls_token"]
    with pytest.raises(UserError, match=r"features.pool: some.pth has no class token. Use features.pool=avg"):
        open_encoder(weights, "cls_avg", None)


def test_last_trained_block_of_published_files() -> None:
    """They record the mixed maps in their settings (-1: all); without settings the number of columns tells, or not."""
    model = CrossMAE(**TINY, **DECODER, fuse_blocks=(0, 1))
    weights = weights_of(model, {}, **{PUBLISHED_ARGUMENTS: json.dumps({"use_fm": [0, 1]})})
    assert last_trained_block(weights, 3) == 1
    assert last_trained_block(weights_of(model, {}), 3) == 2  # 3 columns may be all blocks without the input
    few = CrossMAE(**TINY, **DECODER, fuse_blocks=(0,))
    with pytest.raises(UserError, match=r"2 of 4 maps are mixed, .* not record which. Set features.block"):
        last_trained_block(weights_of(few, {}), 3)
    full = CrossMAE(**TINY, **DECODER)
    assert last_trained_block(weights_of(full, {}, **{PUBLISHED_ARGUMENTS: json.dumps({"use_fm": [-1]})}), 3) == 2


def test_random_weights_are_where_pretraining_starts() -> None:
    words = ["data.train=X", "output_dir=X", "runtime.seed=3", "model.depth=2", "model.img_size=32"]
    config = load_config("pretrain/small", words)
    model = build_model(model_arguments(config.model.name) | config.model.arguments(), 3, 0.75, 0.25)
    given = {"img_size": 32, "depth": 2, "patch_size": None, "decoder_depth": 4}
    weights = random_weights("crossmae_vit_small_patch16", seed=3, **given)
    for name, tensor in model.state_dict().items():
        assert torch.equal(weights.tensors[name], tensor)
    opened = open_encoder(weights, "avg", None, img_size=32, depth=2)
    imgs = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(opened(imgs), encode_images(model, [imgs]), rtol=1e-4, atol=1e-5)
    with pytest.raises(UserError, match=r"model: .*heads"):
        random_weights("crossmae_vit_small_patch16", 0, num_heads=7)


def test_extraction(tmp_path: Path) -> None:
    """Every image once, in order, through the evaluation view; whatever the batches and workers."""
    source = open_source(write_classes(tmp_path, per_class=3), "data.train")
    labels = torch.arange(9) // 3
    encoder = open_encoder(weights_of(CrossMAE(**TINY, **DECODER), TINY), "avg", None)
    cpu = torch.device("cpu")
    expected = []
    for index in range(9):
        view = centre_view(read_pixels(source, index), (16, 24), 0.8)
        expected.append(encoder(Normalize(VIEWS.mean, VIEWS.std, cpu)(view[None])))
    for batch_size, workers in ((2, 0), (9, 0), (4, 1)):
        found = extract(encoder, source, labels, VIEWS, cpu, "fp32", torch.float32, batch_size, workers)
        torch.testing.assert_close(found, torch.cat(expected), rtol=1e-4, atol=1e-5)
        again = extract(encoder, source, labels, VIEWS, cpu, "fp32", torch.bfloat16, batch_size, workers)
        assert torch.equal(again, found.bfloat16())


def test_unreadable_images_and_numbers(tmp_path: Path) -> None:
    source = open_source(write_classes(tmp_path, per_class=2), "data.train")
    labels, cpu = torch.arange(6) // 2, torch.device("cpu")
    encoder = open_encoder(weights_of(CrossMAE(**TINY, **DECODER), TINY), "avg", None)
    encoder.vit.blocks[0].attn.proj.bias.data.fill_(torch.inf)
    with pytest.raises(UserError, match=r"data.train: features are not finite. Try runtime.precision=fp32"):
        extract(encoder, source, labels, VIEWS, cpu, batch_size=2, name="data.train")
    path = tmp_path / "green" / "1.png"
    path.write_bytes(path.read_bytes()[:300])
    encoder.vit.blocks[0].attn.proj.bias.data.fill_(0)
    with pytest.raises(UserError, match=r"data.train: .*green/1.png.*never replaced"):
        extract(encoder, source, labels, VIEWS, cpu, batch_size=2, name="data.train")


@pytest.mark.parametrize("decoder", ["cross", "self"])
def test_several_class_tokens_are_pooled_by_their_mean(decoder: Any) -> None:
    arguments = TINY | {"class_tokens": 4}
    model = CrossMAE(**arguments, **DECODER, decoder=decoder).eval()
    lively(model)
    weights = weights_of(model, arguments | {"decoder": decoder})
    tokens = encode_tokens(model, IMGS)
    assert tokens.shape[1] == 4 + model.num_patches
    with torch.no_grad():
        torch.testing.assert_close(open_encoder(weights, "avg", None)(IMGS), tokens[:, 4:].mean(1))
        torch.testing.assert_close(open_encoder(weights, "cls", None)(IMGS), tokens[:, :4].mean(1))
        both = torch.cat([tokens[:, :4].mean(1), tokens[:, 4:].mean(1)], dim=1)
        torch.testing.assert_close(open_encoder(weights, "cls_avg", None)(IMGS), both)
        torch.testing.assert_close(encode_images(model, [IMGS], "cls"), tokens[:, :4].mean(1))
