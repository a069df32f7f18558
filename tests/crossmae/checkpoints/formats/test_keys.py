"""Proves that names of other libraries become plain names and back without losing a tensor or a bit, that models
built by those libraries compute the same after it, and that what a plain ViT cannot hold is named."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from timm.layers import SwiGLUPacked
from timm.models.vision_transformer import ParallelScalingBlock, VisionTransformer
from torch import Tensor, nn

from crossmae.checkpoints.formats.keys import Translated, from_plain, not_plain, to_plain
from crossmae.errors import UserError
from crossmae.models.crossmae import CrossMAE

SIZES = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}
DECODER = {"decoder_embed_dim": 16, "decoder_depth": 2, "decoder_num_heads": 2}
HF_SIZES = {"image_size": 32, "patch_size": 8, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3}
HF_SIZES |= {"intermediate_size": 96, "layer_norm_eps": 1e-6}
HF_DECODER = {"decoder_hidden_size": 16, "decoder_num_hidden_layers": 2, "decoder_num_attention_heads": 2}
HF_DECODER |= {"decoder_intermediate_size": 64, "norm_pix_loss": True}

# What transformers 5 has in memory, and what its hub's files, and versions 4, have instead.
OLDER = {
    r"(^|\.)layers\.(\d)": r"\1encoder.layer.\2",
    r"attention\.q_proj": "attention.attention.query",
    r"attention\.k_proj": "attention.attention.key",
    r"attention\.v_proj": "attention.attention.value",
    r"attention\.o_proj": "attention.output.dense",
    r"mlp\.fc1": "intermediate.dense",
    r"mlp\.fc2": "output.dense",
}
# mmpretrain: its documentation, its converters of published weights, and what it logs on loading them.
MM_BLOCK = {
    "ln1": "norm1",
    "attn.qkv": "attn.qkv",
    "attn.proj": "attn.proj",
    "ln2": "norm2",
    "ffn.layers.0.0": "mlp.fc1",
    "ffn.layers.1": "mlp.fc2",
}
MM_MODULES = {
    "backbone.patch_embed.projection": "patch_embed.proj",
    "backbone.ln1": "norm",
    "neck.decoder_embed": "decoder_embed",
    "neck.ln1": "decoder_norm",
    "neck.decoder_pred": "decoder_pred",
}
MM_TENSORS = {
    "backbone.cls_token": "cls_token",
    "backbone.pos_embed": "pos_embed",
    "neck.mask_token": "mask_token",
    "neck.decoder_pos_embed": "decoder_pos_embed",
}


def randomize(model: nn.Module, dtype: torch.dtype = torch.float32) -> nn.Module:
    """No parameter is left at a value, 0 or 1, that would hide where it went."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    return model.to(dtype).eval()


def state(model: nn.Module) -> dict[str, Tensor]:
    return dict(model.state_dict())


def timm_vit(**overrides: Any) -> VisionTransformer:
    norm = partial(nn.LayerNorm, eps=1e-6)
    return randomize(VisionTransformer(**SIZES | {"num_classes": 5, "norm_layer": norm} | overrides))


def images() -> Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in actual.items():
        assert tensor.dtype == expected[name].dtype, name
        assert torch.equal(tensor, expected[name]), name


def assert_complete(tensors: dict[str, Tensor], found: Translated) -> None:
    """Every name of the file is a source of a plain name, or kept; no tensor came from nowhere."""
    sources = {name for names in found.sources.values() for name in names}
    kept = found.tensors.keys() - found.sources.keys()
    assert sources | kept == tensors.keys()
    assert sources.isdisjoint(kept)


def older_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    def older(name: str) -> str:
        for pattern, replacement in OLDER.items():
            name = re.sub(pattern, replacement, name)
        return name

    return {older(name): tensor for name, tensor in tensors.items()}


def saved_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """transformers 5.23 saves the decoder's blocks so, too."""
    return {
        name.replace("decoder.decoder_layers", "decoder.decoder_encoder.layer"): tensor
        for name, tensor in older_names(tensors).items()
    }


def hf(kind: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    if kind.startswith("ViTMAE"):
        config = transformers.ViTMAEConfig(**HF_SIZES | HF_DECODER)
    else:
        config = transformers.ViTConfig(**HF_SIZES, num_labels=5, encoder_stride=8)
    return randomize(getattr(transformers, kind)(config), dtype)


@pytest.mark.parametrize("names", [dict, older_names, saved_names])
@pytest.mark.parametrize("prefix", ["vit.", ""])
def test_transformers_classifier_is_timms(names: Callable[..., dict[str, Tensor]], prefix: str) -> None:
    model = hf("ViTForImageClassification")
    tensors = {name.replace("vit.", prefix, 1): tensor for name, tensor in names(state(model)).items()}
    found = to_plain(tensors)
    assert found.layout == "hf-vit"
    assert_complete(tensors, found)
    assert len(found.sources["blocks.1.attn.qkv.bias"]) == 3
    assert found.notes["blocks.1.attn.qkv.bias"] == "q, k, v joined"
    assert not_plain(found.tensors) == []
    ours = timm_vit()
    ours.load_state_dict(found.tensors)
    with torch.no_grad():
        torch.testing.assert_close(ours(images()), model(images()).logits, rtol=0, atol=1e-6)
        features = model.vit(images()).last_hidden_state
        torch.testing.assert_close(ours.forward_features(images()), features, rtol=0, atol=1e-6)


@pytest.mark.parametrize("names", [dict, older_names, saved_names])
def test_transformers_mae_is_ours(names: Callable[..., dict[str, Tensor]]) -> None:
    model = hf("ViTMAEForPreTraining")
    tensors = names(state(model))
    found = to_plain(tensors)
    assert found.layout == "hf-vitmae"
    assert_complete(tensors, found)
    assert not_plain(found.tensors) == []
    ours = CrossMAE(**SIZES, **DECODER, decoder="self").eval()
    ours.load_state_dict(found.tensors)
    noise = torch.rand(2, 16, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected, actual = model(images(), noise=noise), ours(images(), noise=noise)
    torch.testing.assert_close(actual.pred, expected.logits, rtol=0, atol=1e-6)
    torch.testing.assert_close(actual.loss, expected.loss, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "kind",
    ["ViTModel", "ViTForImageClassification", "ViTForMaskedImageModeling", "ViTMAEModel", "ViTMAEForPreTraining"],
)
def test_round_trip_of_transformers(kind: str, dtype: torch.dtype) -> None:
    original = older_names(state(hf(kind, dtype)))
    plain = to_plain(original)
    assert not any(name.startswith(("vit.", "embeddings.", "encoder.", "layers.")) for name in plain.tensors)
    back = from_plain(plain.tensors, plain.layout)
    assert_same(back, original)
    pointers = [tensor.data_ptr() for name, tensor in back.items() if "attention.attention" in name]
    assert len(set(pointers)) == len(pointers) == 3 * 2 * (4 if kind == "ViTMAEForPreTraining" else 2)
    assert all(tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in back.values())
    assert_same(to_plain(back).tensors, plain.tensors)


def mm_names(prefix: str = "backbone.") -> dict[str, str]:
    """mmpretrain's name -> plain name of every tensor of a tiny MAE."""
    names = dict(MM_TENSORS)
    modules = dict(MM_MODULES)
    for index in range(2):
        for theirs, ours in MM_BLOCK.items():
            modules[f"backbone.layers.{index}.{theirs}"] = f"blocks.{index}.{ours}"
            modules[f"neck.decoder_blocks.{index}.{theirs}"] = f"decoder_blocks.{index}.{ours}"
    for leaf in ("weight", "bias"):
        names |= {f"{theirs}.{leaf}": f"{ours}.{leaf}" for theirs, ours in modules.items()}
    return {name.replace("backbone.", prefix): plain for name, plain in names.items()}


@pytest.mark.parametrize("prefix", ["backbone.", ""])
def test_mmpretrain_mae(prefix: str) -> None:
    plain = state(randomize(CrossMAE(**SIZES, **DECODER, decoder="self")))
    table = mm_names(prefix)
    assert set(table.values()) == plain.keys()
    tensors = {theirs: plain[ours] for theirs, ours in table.items()}
    tensors["data_preprocessor.mean"] = torch.zeros(3, 1, 1)
    found = to_plain(tensors)
    assert found.layout == "mmpretrain"
    assert_complete(tensors, found)
    assert_same(found.tensors, plain | {"data_preprocessor.mean": tensors["data_preprocessor.mean"]})
    assert found.sources["blocks.1.mlp.fc2.bias"] == (f"{prefix}layers.1.ffn.layers.1.bias",)


def mm_classifier(model: VisionTransformer, head: str) -> dict[str, Tensor]:
    names = {plain: theirs for theirs, plain in mm_names().items()}
    names |= {
        f"{module}.{leaf}": f"{theirs}.{leaf}"
        for leaf in ("weight", "bias")
        for module, theirs in {"fc_norm": "backbone.ln2", "head": head}.items()
    }
    names |= {f"blocks.{i}.ls1.gamma": f"backbone.layers.{i}.attn.gamma1.weight" for i in range(2)}
    names |= {f"blocks.{i}.ls2.gamma": f"backbone.layers.{i}.ffn.gamma2.weight" for i in range(2)}
    return {names[name]: tensor for name, tensor in state(model).items()}


@pytest.mark.parametrize("head", ["head.fc", "head.layers.head"])
@pytest.mark.parametrize("arguments", [{"global_pool": "avg"}, {"init_values": 0.1}])
def test_mmpretrain_classifier(head: str, arguments: dict[str, Any]) -> None:
    model = timm_vit(**arguments)
    tensors = mm_classifier(model, head)
    found = to_plain(tensors)
    assert_complete(tensors, found)
    assert not_plain(found.tensors) == []
    ours = timm_vit(**arguments | {"init_values": None})
    ours.load_state_dict(found.tensors)
    with torch.no_grad():
        torch.testing.assert_close(ours(images()), model(images()), rtol=0, atol=1e-6)


def test_older_names_of_mmpretrain() -> None:
    tensors = mm_classifier(timm_vit(), "head.fc")
    older = {"attn.qkv.weight": "attn.attn.in_proj_weight", "attn.qkv.bias": "attn.attn.in_proj_bias"}
    older |= {"attn.proj.": "attn.attn.out_proj.", ".ln1.": ".norm1.", ".ln2.": ".norm2."}

    def rename(name: str) -> str:
        for new, old in older.items():
            name = name.replace(new, old)
        return name

    assert_same(to_plain({rename(name): tensor for name, tensor in tensors.items()}).tensors, to_plain(tensors).tensors)


def test_a_head_behind_a_hidden_layer_is_no_plain_head() -> None:
    tensors = mm_classifier(timm_vit(), "head.layers.head") | {"head.layers.pre_logits.weight": torch.zeros(24, 24)}
    assert "head.weight" not in to_plain(tensors).tensors
    assert "head.layers.head.weight" in to_plain(tensors).tensors


@pytest.mark.parametrize("home", ["", "backbone.", "backbone.net.", "encoder."])
def test_plain_names_stay(home: str) -> None:
    tensors = {f"{home}{name}": tensor for name, tensor in state(timm_vit()).items()}
    found = to_plain(tensors)
    assert found.layout == "plain"
    assert not found.sources
    assert not found.notes
    assert all(found.tensors[name] is tensor for name, tensor in tensors.items())
    assert found.tensors.keys() == tensors.keys()
    assert not_plain(found.tensors) == []


@pytest.mark.parametrize("home", ["", "backbone."])
@pytest.mark.parametrize("written", ["timm", "chunked", "deit3"])
def test_layer_scale_is_folded_in(home: str, written: str) -> None:
    model = timm_vit(init_values=0.1, num_classes=0)
    tensors = {f"{home}{name}": tensor for name, tensor in state(model).items()}
    if written == "chunked":  # DINOv2's own files: the block counts over all chunks
        tensors = {re.sub(r"blocks\.(\d)", r"blocks.0.\1", name): tensor for name, tensor in tensors.items()}
        tensors[f"{home}mask_token"] = torch.ones(1, 24)
    if written == "deit3":
        tensors = {re.sub(r"ls(\d)\.gamma", r"gamma_\1", name): tensor for name, tensor in tensors.items()}
    found = to_plain(tensors)
    assert_complete(tensors, found)
    assert not_plain(found.tensors) == []
    assert found.notes[f"{home}blocks.1.mlp.fc2.weight"] == "layer scale folded in"
    assert len(found.sources[f"{home}blocks.1.mlp.fc2.weight"]) == 2
    plain = {name.removeprefix(home): tensor for name, tensor in found.tensors.items()}
    assert ("encoder_mask_token" in plain) == (written == "chunked")
    plain.pop("encoder_mask_token", None)
    ours = timm_vit(num_classes=0)
    ours.load_state_dict(plain)
    with torch.no_grad():
        torch.testing.assert_close(ours(images()), model(images()), rtol=0, atol=1e-6)


def test_layer_scale_of_halves_is_multiplied_in_float32() -> None:
    tensors = {name: tensor.bfloat16() for name, tensor in state(timm_vit(init_values=0.1)).items()}
    tensors["blocks.0.ls1.gamma"] = tensors["blocks.0.ls1.gamma"].float() * 1.001  # as no bfloat16 is
    weight = to_plain(tensors).tensors["blocks.0.attn.proj.weight"]
    assert weight.dtype == torch.bfloat16
    factors = tensors["blocks.0.ls1.gamma"][:, None]
    assert torch.equal(weight, (tensors["blocks.0.attn.proj.weight"].float() * factors).bfloat16())


def test_positions_without_a_class_row() -> None:
    model = timm_vit(no_embed_class=True)
    assert model.pos_embed.shape[1] == 16
    found = to_plain(state(model))
    assert found.notes == {"pos_embed": "a row of zeros for the class token put first"}
    ours = timm_vit()
    ours.load_state_dict(found.tensors)
    with torch.no_grad():
        torch.testing.assert_close(ours(images()), model(images()), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "rows, grid, added",
    [(16, None, True), (17, None, False), (16, (3, 5), False), (15, (3, 5), True), (15, None, False), (1, None, True)],
)
def test_the_grid_tells_whether_there_is_a_class_row(rows: int, grid: tuple[int, int] | None, added: bool) -> None:
    tensors = state(timm_vit()) | {"pos_embed": torch.ones(1, rows, 24)}
    found = to_plain(tensors, grid)
    assert found.tensors["pos_embed"].shape == (1, rows + added, 24)
    assert ("pos_embed" in found.notes) == added
    del tensors["cls_token"]  # a dense backbone: plain tables have the row nevertheless, as detectron2's do
    assert to_plain(tensors, grid).tensors["pos_embed"].shape == (1, rows + added, 24)


def test_both_tables_of_mae_have_the_class_row() -> None:
    tensors = state(CrossMAE(**SIZES | {"img_size": (24, 40)}, **DECODER))  # 3 * 5 + 1 rows are a square
    assert not to_plain(tensors).notes


@pytest.mark.parametrize(
    "shape, decoder, renamed",
    [
        ((1, 1, 16), True, False),
        ((1, 16), True, True),
        ((1, 1, 24), False, True),
        ((1, 24), False, True),
    ],
)
def test_the_mask_token_of_an_encoder_is_not_maes(shape: tuple[int, ...], decoder: bool, renamed: bool) -> None:
    tensors = state(timm_vit()) | {"mask_token": torch.ones(shape)}
    if decoder:
        tensors["decoder_pred.weight"] = torch.ones(192, 16)
    found = to_plain(tensors)
    assert ("mask_token" in found.tensors) != renamed
    assert found.sources.get("encoder_mask_token") == (("mask_token",) if renamed else None)
    assert_complete(tensors, found)


def test_meta_tensors() -> None:
    models = [
        hf("ViTForMaskedImageModeling"),
        hf("ViTMAEForPreTraining"),
        timm_vit(init_values=0.1, no_embed_class=True),
    ]
    files = [state(model) for model in models] + [mm_classifier(timm_vit(init_values=0.1), "head.fc")]
    for tensors in files:
        real = to_plain(tensors)
        found = to_plain({name: tensor.to("meta") for name, tensor in tensors.items()})
        assert (found.layout, found.sources, found.notes) == (real.layout, real.sources, real.notes)
        assert list(found.tensors) == list(real.tensors)
        for name, tensor in found.tensors.items():
            assert tensor.is_meta, name
            assert (tensor.shape, tensor.dtype) == (real.tensors[name].shape, real.tensors[name].dtype), name
        if found.layout.startswith("hf-"):
            assert all(tensor.is_meta for tensor in from_plain(found.tensors, found.layout).values())


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        ({"reg_tokens": 4}, "reg_token: register tokens, which a plain ViT does not have$"),
        ({"pre_norm": True}, "norm_pre.weight, norm_pre.bias: a norm before the first block"),
        ({"qk_norm": True}, "blocks.0.attn.q_norm.weight, .* and 3 more: norms of queries and keys"),
        ({"qkv_bias": False}, "blocks.0.attn.qkv.weight, blocks.1.attn.qkv.weight: a layer without bias"),
        ({"global_pool": "map"}, "attn_pool.latent, .*: attention pooling"),
        ({"block_fn": ParallelScalingBlock}, "blocks.0.in_norm.weight.*: parallel blocks"),
        ({"mlp_layer": SwiGLUPacked}, "blocks.0.mlp.fc1.weight, blocks.1.mlp.fc1.weight: a gated MLP"),
    ],
)
def test_not_plain_of_timm(arguments: dict[str, Any], sentence: str) -> None:
    found = not_plain(to_plain(state(timm_vit(**arguments))).tensors)
    assert any(re.match(sentence, line) for line in found), found


@pytest.mark.parametrize(
    "name, kind",
    [
        ("register_tokens", "register tokens"),
        ("dist_token", "DeiT's distillation token"),
        ("blocks.0.attn.relative_position_bias_table", "BEiT"),
        ("rel_pos_bias.relative_position_bias_table", "BEiT"),
        ("blocks.0.attn.q_bias", "BEiT"),
        ("blocks.0.mlp.w12.weight", "gated MLP"),
        ("blocks.0.attns.1.attn.proj.weight", "parallel blocks"),
        ("blocks.0.post_norm.weight", "norms after"),
        ("blocks.0.residual.conv1.weight", "more in a block"),
        ("patch_embed.backbone.stem.weight", "more than one convolution"),
    ],
)
@pytest.mark.parametrize("home", ["", "backbone.net."])
def test_not_plain_by_name(name: str, kind: str, home: str) -> None:
    tensors = {f"{home}{plain}": tensor for plain, tensor in state(timm_vit()).items()}
    if home:
        tensors |= {"layers.0.weight": torch.ones(1), "attn_pool.weight": torch.ones(1)}  # not the encoder's
    found = not_plain(to_plain(tensors | {f"{home}{name}": torch.ones(1)}).tensors)
    assert len(found) == 1
    assert found[0].startswith(f"{home}{name}: ")
    assert kind in found[0]


def test_relative_positions_of_a_detector_are_plain() -> None:
    tensors = {f"backbone.net.{name}": tensor for name, tensor in state(timm_vit(num_classes=0)).items()}
    assert not_plain(tensors | {"backbone.net.blocks.0.attn.rel_pos_h": torch.ones(7, 8)}) == []


def test_names_that_transformers_has_for_more_than_a_vit() -> None:
    tensors = older_names(state(hf("ViTModel")))
    tensors |= {"encoder.layer.0.layer_scale1.lambda1": torch.ones(24), "embeddings.distillation_token": torch.ones(1)}
    found = to_plain(tensors)
    assert_complete(tensors, found)
    assert not_plain(found.tensors) == [
        "encoder.layer.0.layer_scale1.lambda1, embeddings.distillation_token: something without a plain name, "
        "which a plain ViT does not have"
    ]


QUERY = "vit.encoder.layer.0.attention.attention.query.weight"
KEY = QUERY.replace("query", "key")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({KEY: None}, f"{QUERY}: without key"),
        ({QUERY: None, KEY: None}, "value.weight: without query and key"),
        ({KEY: torch.ones(23, 24)}, r"do not fit: \(24, 24\) float32, \(23, 24\) float32"),
        ({KEY: torch.ones(24, 24).half()}, r"do not fit: .*float16"),
        ({"norm.weight": torch.ones(24)}, "vit.layernorm.weight and norm.weight are both norm.weight"),
        ({"vit.layers.0.attention.q_proj.weight": torch.ones(24, 24)}, "Remove one of them"),
    ],
)
def test_transformers_names_that_are_incomplete_or_ambiguous(changes: dict[str, Any], message: str) -> None:
    tensors = older_names(state(hf("ViTForImageClassification"))) | changes
    with pytest.raises(UserError, match=message):
        to_plain({name: tensor for name, tensor in tensors.items() if tensor is not None})


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"blocks.0.attn.proj.weight": None}, "blocks.0.ls1.gamma: layer scale without its layer"),
        ({"blocks.0.ls1.gamma": torch.ones(23)}, r"\(23,\) float32 does not fit \(24, 24\) float32"),
        ({"blocks.0.attn.proj.bias": torch.ones(())}, "does not fit"),
        ({"blocks.0.0.norm1.weight": torch.ones(24)}, "blocks.0.norm1.weight and blocks.0.0.norm1.weight are both"),
        ({"mask_token": torch.ones(1, 24), "encoder_mask_token": torch.ones(1, 24)}, "both mask tokens of the enc"),
    ],
)
def test_plain_names_that_are_incomplete_or_ambiguous(changes: dict[str, Any], message: str) -> None:
    tensors = state(timm_vit(init_values=0.1)) | changes
    with pytest.raises(UserError, match=message):
        to_plain({name: tensor for name, tensor in tensors.items() if tensor is not None})


@pytest.mark.parametrize(
    "layout, changes, message",
    [
        ("hf-vitmae", {}, "hf-vitmae: has no place for 2 tensors: head.weight, head.bias"),
        ("hf-vit", {"mask_token": torch.ones(1, 1, 16)}, "hf-vit: has no place for 1 tensor: mask_token"),
        ("hf-vit", {"fc_norm.weight": torch.ones(24)}, "fc_norm.weight"),
        ("hf-vit", {"wfm.linear.weight": torch.ones(2, 2)}, "wfm.linear.weight"),
        ("hf-vit", {"decoder_blocks.0.norm1.weight": torch.ones(16)}, "decoder_blocks.0.norm1.weight"),
        ("hf-vit", {"blocks.0.cls_token": torch.ones(16)}, "blocks.0.cls_token"),
        (
            "hf-vit",
            {"blocks.0.attn.qkv.weight": torch.ones(71, 24)},
            r"blocks.0.attn.qkv.weight: \(71, 24\) float32 is",
        ),
    ],
)
def test_from_plain_refuses_what_has_no_place(layout: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        from_plain(state(timm_vit()) | changes, layout)
