"""Proves the proofs: models that each library built and saved equal timm's ViT, and no changed number passes.

The one number that cannot be seen is a bias of the keys: it adds the same to all scores of a query, which softmax
takes away.
"""

from __future__ import annotations

import json
import pickle
import re
import socket
import sys
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from crossmae.checkpoints.conversion.proof import (
    Encoder,
    MissingLibrary,
    Proof,
    detectron2_encoder,
    file_encoder,
    image_size,
    plain_encoder,
    prove,
    source_encoder,
)
from crossmae.errors import UserError
from crossmae.models.encoder import ViTEncoder

TINY: dict[str, Any] = {"img_size": 32, "patch_size": 8, "in_chans": 3, "embed_dim": 24, "depth": 2, "num_heads": 3}
TINY |= {"mlp_ratio": 2.0}
OBLONG_GREY = TINY | {"img_size": (16, 24), "in_chans": 1}
HF_NAMES = {
    "attn.proj": "attention.output.dense", "mlp.fc1": "intermediate.dense", "mlp.fc2": "output.dense",
    "norm1": "layernorm_before", "norm2": "layernorm_after",
}  # fmt: skip


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Libraries initialise their models from the global generator."""
    torch.manual_seed(0)


def randomised(model: nn.Module) -> Any:
    """The model with no tensor left at zeros or ones, from a generator of its own."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def encoder_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(("norm.", "head."))}


def timm_model(arguments: dict[str, Any], **options: Any) -> VisionTransformer:
    return randomised(VisionTransformer(**arguments, **{"num_classes": 0} | options))


def save_ours(path: Path, arguments: dict[str, Any]) -> tuple[Path, dict[str, Tensor]]:
    tensors = encoder_of(randomised(ViTEncoder(**arguments)))
    if path.suffix == ".pth":
        torch.save({"model": tensors}, path)
    else:
        save_file(tensors, path)
    return path, tensors


def save_timm(path: Path, arguments: dict[str, Any]) -> tuple[Path, dict[str, Tensor]]:
    model = timm_model(arguments, num_classes=5)
    if path.suffix == ".pth":
        torch.save(model.state_dict(), path)
        return path, encoder_of(model)
    if path.suffix == ".safetensors":
        save_file(model.state_dict(), path)
        return path, encoder_of(model)
    if timm.__version__ in {f"1.0.{patch}" for patch in range(9, 26)}:
        pytest.skip("this timm does not read folders of safetensors")
    path.mkdir()
    save_file(model.state_dict(), path / "model.safetensors")
    settings = {"architecture": "vit_base_patch16_224", "num_classes": 5, "model_args": arguments}
    C, size = arguments["in_chans"], arguments["img_size"]
    sides = (size, size) if isinstance(size, int) else size
    settings["pretrained_cfg"] = {"input_size": (C, *sides), "fixed_input_size": True, "first_conv": "patch_embed.proj"}
    (path / "config.json").write_text(json.dumps(settings))
    return path, encoder_of(model)


def save_hf(path: Path, arguments: dict[str, Any], kind: str, **options: Any) -> tuple[Path, dict[str, Tensor]]:
    """A folder as `save_pretrained` writes it, and the same tensors under plain names."""
    transformers = pytest.importorskip("transformers", reason='transformers is not installed: pip install -e ".[hf]"')
    config = transformers.ViTMAEConfig if "MAE" in kind else transformers.ViTConfig
    E = arguments["embed_dim"]
    settings = {
        "hidden_size": E, "num_hidden_layers": arguments["depth"], "num_attention_heads": arguments["num_heads"],
        "intermediate_size": int(E * arguments["mlp_ratio"]), "image_size": arguments["img_size"],
        "patch_size": arguments["patch_size"], "num_channels": arguments["in_chans"], "layer_norm_eps": 1e-6,
    }  # fmt: skip
    if "MAE" in kind:
        settings |= {"decoder_hidden_size": 16, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2}
    model = randomised(getattr(transformers, kind)(config(**settings | options)))
    transformers.utils.logging.disable_progress_bar()
    model.save_pretrained(path)
    return path, plain_names(load_file(path / "model.safetensors"), arguments["depth"])


def plain_names(raw: dict[str, Tensor], depth: int) -> dict[str, Tensor]:
    raw = {name.removeprefix("vit."): tensor for name, tensor in raw.items()}
    plain = {"cls_token": raw["embeddings.cls_token"], "pos_embed": raw["embeddings.position_embeddings"]}
    for kind in ("weight", "bias"):
        plain[f"patch_embed.proj.{kind}"] = raw[f"embeddings.patch_embeddings.projection.{kind}"]
        for i in range(depth):
            layer = f"encoder.layer.{i}."
            parts = [raw[f"{layer}attention.attention.{part}.{kind}"] for part in ("query", "key", "value")]
            plain[f"blocks.{i}.attn.qkv.{kind}"] = torch.cat(parts)
            for ours, theirs in HF_NAMES.items():
                plain[f"blocks.{i}.{ours}.{kind}"] = raw[f"{layer}{theirs}.{kind}"]
    return plain


def save_detectron2(path: Path, arguments: dict[str, Any], **options: Any) -> tuple[Path, dict[str, Tensor]]:
    vit = pytest.importorskip("detectron2.modeling.backbone.vit", reason="needs detectron2")
    pretrained = {"pretrain_img_size": arguments["img_size"]}
    eps = {"norm_layer": partial(nn.LayerNorm, eps=1e-6)}
    model = randomised(vit.ViT(**arguments | pretrained | eps | options))
    tensors = model.state_dict()
    named = {f"backbone.net.{name}": tensor for name, tensor in tensors.items()}
    if path.suffix == ".safetensors":
        save_file(named, path)
    elif path.suffix == ".pth":
        torch.save({"model": named}, path)
    else:
        path.write_bytes(pickle.dumps({"model": {name: tensor.numpy() for name, tensor in named.items()}}))
    return path, tensors


CASES: dict[str, tuple[str, Callable[..., tuple[Path, dict[str, Tensor]]], str, str]] = {
    "crossmae.safetensors": ("crossmae", save_ours, "our ViTEncoder", "square oblong"),
    "mae.pth": ("mae", save_ours, "our ViTEncoder", "square oblong"),
    "timm.safetensors": ("timm", save_timm, "timm's VisionTransformer", "square oblong"),
    "timm.pth": ("timm", save_timm, "timm's VisionTransformer", "square oblong"),
    "timm": ("timm", save_timm, "timm's VisionTransformer", "square oblong"),
    "vit": ("hf-vit", partial(save_hf, kind="ViTModel"), "transformers' ViTModel", "square oblong"),
    "classifier": ("hf-vit", partial(save_hf, kind="ViTForImageClassification"), "transformers' ViTModel", "square"),
    "vitmae": ("hf-vitmae", partial(save_hf, kind="ViTMAEModel"), "transformers' ViTMAEModel", "square"),
    "mae": ("hf-vitmae", partial(save_hf, kind="ViTMAEForPreTraining"), "transformers' ViTMAEModel", "square"),
    "d2.pth": ("detectron2", save_detectron2, "detectron2's ViT", "square"),
    "d2.pkl": ("detectron2", save_detectron2, "detectron2's ViT", "square"),
    "d2.safetensors": ("detectron2", save_detectron2, "detectron2's ViT", "square"),
}
SHAPES = {"square": TINY, "oblong": OBLONG_GREY}
EVERY_CASE = [(name, shape) for name, case in CASES.items() for shape in case[3].split()]


def saved(name: str, shape: str, folder: Path) -> tuple[Callable[[], Any], Callable[[], Any], dict[str, Any]]:
    """Factories of the plain and the file's encoder, and what `prove` wants to know."""
    to, save, _, _ = CASES[name]
    path, tensors = save(folder / name, SHAPES[shape])
    source = partial(plain_encoder, tensors, SHAPES[shape])
    sizes = image_size(tensors, SHAPES[shape])
    return (
        source,
        partial(file_encoder, path, to, SHAPES[shape]),
        {"size": sizes, "in_chans": SHAPES[shape]["in_chans"]},
    )


def proof_between(source: dict[str, Tensor], target: dict[str, Tensor], arguments: dict[str, Any] = TINY) -> Proof:
    encoders = [partial(plain_encoder, tensors, arguments) for tensors in (source, target)]
    return prove(*encoders, size=image_size(source, arguments), in_chans=arguments["in_chans"])


def changed(tensors: dict[str, Tensor], name: str, index: int) -> dict[str, Tensor]:
    """Copies, one number of which is other."""
    tensors = {key: tensor.clone() for key, tensor in tensors.items()}
    tensors[name].view(-1)[index] += 0.05
    return tensors


@pytest.mark.parametrize("name, shape", EVERY_CASE)
def test_what_a_library_saved_is_equal(name: str, shape: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("reached for the network"))
    source, target, given = saved(name, shape, tmp_path)
    state = torch.get_rng_state()
    proof = prove(source, target, **given)
    assert torch.equal(torch.get_rng_state(), state)
    assert proof.ran
    assert proof.equal, proof.sentence()
    assert (proof.source, proof.target) == ("timm's VisionTransformer", CASES[name][2])
    assert proof.largest is not None
    assert proof.largest > 1
    # Not by rounding alone: with twice the digits, the difference is a billionth of that.
    image = torch.randn(2, given["in_chans"], *given["size"][0], generator=torch.Generator().manual_seed(2)).double()
    torch.testing.assert_close(target()(image), source()(image), atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("name", ["vit", "mae", "d2.safetensors", "timm.pth", "crossmae.safetensors"])
def test_only_one_encoder_is_in_memory(name: str, tmp_path: Path) -> None:
    source, target, given = saved(name, "square", tmp_path)
    alive = []

    def watched() -> Any:
        encoder = target()
        alive.append(weakref.ref(encoder.model))
        return encoder

    def after() -> Any:
        assert alive[0]() is None
        return source()

    assert prove(after, watched, **given).equal


def kinds_of_tensors() -> list[str]:
    return list(encoder_of(VisionTransformer(**TINY, num_classes=0)))


@pytest.mark.parametrize("name", kinds_of_tensors())
def test_one_changed_number_fails(name: str) -> None:
    tensors = encoder_of(timm_model(TINY))
    for index in (0, tensors[name].numel() - 1):
        proof = proof_between(tensors, changed(tensors, name, index))
        assert not proof.equal, proof.sentence()
        assert proof.max_difference is not None
        assert proof.max_difference > 1e-4  # ten times more than rounding in other kernels may make
        assert proof.sentence().endswith("NOT EQUAL")


def test_query_key_and_value_of_the_last_block_count() -> None:
    tensors = encoder_of(timm_model(TINY))
    E = TINY["embed_dim"]
    for part in range(3):
        assert not proof_between(tensors, changed(tensors, "blocks.1.attn.qkv.weight", part * E * E + 7)).equal
    assert not proof_between(tensors, changed(tensors, "blocks.1.attn.qkv.bias", 2 * E)).equal
    assert proof_between(tensors, changed(tensors, "blocks.1.attn.qkv.bias", E)).equal  # the keys': see above


@pytest.mark.parametrize("name", ["vit", "vitmae"])
def test_a_changed_number_in_a_folder_of_transformers_fails(name: str, tmp_path: Path) -> None:
    source, target, given = saved(name, "square", tmp_path)
    file = tmp_path / name / "model.safetensors"
    tensors = load_file(file)
    save_file(changed(tensors, "encoder.layer.1.attention.attention.query.weight", 3), file, {"format": "pt"})
    assert not prove(source, target, **given).equal
    del tensors["encoder.layer.1.output.dense.bias"]
    save_file(tensors, file, {"format": "pt"})
    proof = prove(source, target, **given)
    assert proof.ran
    assert not proof.equal
    # The library's own name of it, which is another in version 4.
    assert re.search(
        r"ViT\w*Model needs (layers\.1\.mlp\.fc2|encoder\.layer\.1\.output\.dense)\.bias, which the folder lacks",
        proof.reason,
    )


def test_a_folder_without_the_final_norm_is_fine(tmp_path: Path) -> None:
    source, target, given = saved("vit", "square", tmp_path)
    file = tmp_path / "vit" / "model.safetensors"
    kept = {name: tensor for name, tensor in load_file(file).items() if not name.startswith("layernorm.")}
    save_file(kept, file, {"format": "pt"})
    assert prove(source, target, **given).equal


def test_transformers_is_quiet_and_left_as_it_was(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    source, target, given = saved("classifier", "square", tmp_path)  # whose head transformers would report as left over
    from transformers.utils import logging

    logging.enable_progress_bar()
    before = logging.get_verbosity()
    capfd.readouterr()
    assert prove(source, target, **given).equal
    assert capfd.readouterr() == ("", "")
    assert logging.is_progress_bar_enabled()
    assert logging.get_verbosity() == before


@pytest.mark.parametrize("heads", [1, 2, 5])
def test_wrong_number_of_heads_fails(heads: int) -> None:
    tensors = encoder_of(timm_model(TINY))
    source, target = (partial(plain_encoder, tensors, TINY | {"num_heads": n}) for n in (3, heads))
    proof = prove(source, target, size=[(32, 32)], in_chans=3)
    assert proof.ran
    assert not proof.equal
    assert "the encoder of the file cannot be run" in proof.reason if heads == 5 else proof.max_difference > 1e-4


@pytest.mark.parametrize("eps", [1e-12, 1e-6])
def test_epsilon_of_the_folder_counts(eps: float, tmp_path: Path) -> None:
    path, _ = save_hf(tmp_path / "vit", TINY, "ViTModel", layer_norm_eps=eps)
    loud = load_file(path / "model.safetensors")
    faint = {name: tensor / 100 if name.startswith("embeddings.") else tensor for name, tensor in loud.items()}
    save_file(faint, path / "model.safetensors", {"format": "pt"})  # tokens so small that epsilon is felt
    tensors = plain_names(faint, TINY["depth"])
    for assumed in (1e-12, 1e-6):
        source = partial(plain_encoder, tensors, TINY, norm_eps=assumed)
        proof = prove(source, partial(file_encoder, path, "hf-vit", TINY), size=[(32, 32)], in_chans=3)
        assert proof.equal == (assumed == eps), proof.sentence()


@pytest.mark.parametrize("name", ["crossmae.safetensors", "timm.pth", "timm", "d2.pth"])
def test_epsilon_is_1e_6_where_the_file_has_none(name: str, tmp_path: Path) -> None:
    to, save, _, _ = CASES[name]
    path, tensors = save(tmp_path / name, TINY)
    given = {"size": [(32, 32)], "in_chans": 3}
    source = partial(plain_encoder, tensors, TINY, norm_eps=1e-3)
    assert not prove(source, partial(file_encoder, path, to, TINY), **given).equal
    assert prove(source, partial(file_encoder, path, to, TINY, norm_eps=1e-3), **given).equal


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_computes_in_float32_whatever_the_file_has(dtype: torch.dtype) -> None:
    tensors = {name: tensor.to(dtype) for name, tensor in encoder_of(timm_model(TINY)).items()}
    whole = {name: tensor.float() for name, tensor in tensors.items()}
    proof = proof_between(tensors, whole)
    assert proof.max_difference == 0
    assert all(tensor.dtype == dtype for tensor in tensors.values())  # the caller's stay as they are


@pytest.mark.parametrize("rows", [16, 17])
def test_without_class_token(rows: int) -> None:
    model = timm_model(TINY, class_token=False, global_pool="")
    tensors = encoder_of(model)
    assert tensors["pos_embed"].shape == (1, 16, 24)
    given = dict(tensors)
    if rows == 17:
        given |= {"pos_embed": torch.cat([torch.ones(1, 1, 24), tensors["pos_embed"]], dim=1)}
    image = torch.randn(1, 3, 32, 32)
    tokens = plain_encoder(given, TINY)(image)
    model.norm = nn.Identity()
    with torch.no_grad():
        torch.testing.assert_close(tokens, model.eval().forward_features(image), atol=0, rtol=0)


@pytest.mark.parametrize("to, name", [("hf-vit", "vit"), ("hf-vitmae", "mae"), ("detectron2", "d2.pth")])
def test_a_missing_library_leaves_it_not_run(
    to: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target, given = saved(name, "square", tmp_path)
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.setitem(sys.modules, "detectron2", None)
    with pytest.raises(MissingLibrary) as caught:
        target()
    proof = prove(source, target, **given)
    assert not proof.ran
    assert not proof.equal
    remedy = {"transformers": 'pip install -e ".[hf]"', "detectron2": "python tools/install_detectron2.py"}
    assert remedy[caught.value.library] in proof.sentence()
    assert proof.sentence().startswith(f"proof        not run: {caught.value.library} is not installed (pip install")


def test_a_timm_that_reads_no_folders_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timm, "__version__", "1.0.25")
    (tmp_path / "vit").mkdir()
    with pytest.raises(MissingLibrary, match=r'timm 1\.0\.25 does not read folders.*pip install "timm>=1\.0\.26"'):
        file_encoder(tmp_path / "vit", "timm", TINY)


def test_the_source_goes_through_its_own_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, tensors = save_hf(tmp_path / "vit", TINY, "ViTModel")
    file, patches = path / "model.safetensors", {name: tensors[name] for name in tensors if name != "cls_token"}
    make = partial(source_encoder, file, "hf-vit", tensors, TINY)
    assert make().name == "transformers' ViTModel"
    assert source_encoder(file, "hf-vit", patches, TINY).name == "timm's VisionTransformer"
    assert prove(make, partial(plain_encoder, tensors, TINY), size=[(32, 32)], in_chans=3).equal
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert make().name == "timm's VisionTransformer"
    assert source_encoder(tmp_path / "a.pth", "plain", tensors, TINY).name == "timm's VisionTransformer"


def with_relative_positions(folder: Path) -> tuple[Path, dict[str, Tensor]]:
    windows = {"use_rel_pos": True, "window_size": 3, "window_block_indexes": (0,), "img_size": 64}
    return save_detectron2(folder / "windows.pth", TINY, **windows)


def test_relative_positions_and_windows_come_from_the_tables(tmp_path: Path) -> None:
    path, tensors = with_relative_positions(tmp_path)
    encoder = file_encoder(path, "detectron2", TINY)
    assert [block.window_size for block in encoder.model.blocks] == [3, 0]
    assert [tensors[f"blocks.{i}.attn.rel_pos_w"].shape[0] for i in range(2)] == [5, 15]
    assert image_size(tensors, TINY) == [(64, 32), (32, 64)]
    source = partial(source_encoder, path, "plain", tensors, TINY)
    proof = prove(source, lambda: encoder, size=image_size(tensors, TINY), in_chans=3)
    assert proof.equal
    assert proof.source == "detectron2's ViT"
    assert proof.what == "all tokens of one random image of 64 x 32 and one random image of 32 x 64"
    # What the library computes from its own constructor's arguments, for one image of each size.
    from detectron2.modeling.backbone.vit import ViT

    model = ViT(
        **TINY | {"img_size": 64}, pretrain_img_size=32, use_rel_pos=True, window_size=3, window_block_indexes=(0,),
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
    )  # fmt: skip
    model.load_state_dict(tensors)
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(encoder(image), model(image)["last_feat"].flatten(2).transpose(1, 2))


@pytest.mark.parametrize("axis", ["h", "w"])
@pytest.mark.parametrize("block", [0, 1])
def test_relative_positions_count_from_end_to_end(block: int, axis: str, tmp_path: Path) -> None:
    _, tensors = with_relative_positions(tmp_path)
    name = f"blocks.{block}.attn.rel_pos_{axis}"
    for index in (0, tensors[name].numel() - 1):
        encoders = [partial(detectron2_encoder, each, TINY) for each in (tensors, changed(tensors, name, index))]
        assert not prove(*encoders, size=image_size(tensors, TINY), in_chans=3).equal, index


def test_detectron2_has_no_place_for_these(tmp_path: Path) -> None:
    pytest.importorskip("detectron2")
    _, tensors = with_relative_positions(tmp_path)
    with pytest.raises(UserError, match="detectron2's ViT needs a square, not 2 x 3 patches"):
        detectron2_encoder(tensors, OBLONG_GREY)
    with pytest.raises(UserError, match=r"detectron2's ViT does not take these tensors: .*cls_token"):
        detectron2_encoder(tensors | {"cls_token": torch.zeros(1, 1, 24)}, TINY)
    third = {f"blocks.2.attn.rel_pos_{axis}": torch.zeros(3, 8) for axis in "hw"}
    with pytest.raises(UserError, match=r"windows of \[2, 3\], but detectron2's ViT has one size"):
        detectron2_encoder(tensors | third, TINY)


def test_images_reach_every_table() -> None:
    def sizes(*sides: int, img_size: int | tuple[int, int] = 32) -> list[tuple[int, int]]:
        tables = {f"blocks.{i}.attn.rel_pos_h": torch.zeros(2 * side - 1, 8) for i, side in enumerate(sides)}
        return image_size(tables, {"img_size": img_size, "patch_size": 8})

    assert sizes() == [(32, 32)]
    assert sizes(img_size=(16, 32)) == [(16, 32)]
    assert sizes(6, 8, 6) == [(64, 48), (48, 64)]
    assert sizes(8, 8) == [(64, 32), (32, 64)]
    assert sizes(4, 4) == [(32, 32)]
    assert sizes(2, 4) == [(32, 32)]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("side", ["source", "file"])
def test_not_a_number_fails(value: float, side: str) -> None:
    tensors = encoder_of(timm_model(TINY))
    broken = tensors | {"cls_token": tensors["cls_token"] + value}
    proof = proof_between(*((broken, tensors) if side == "source" else (tensors, broken)))
    assert not proof.equal
    assert proof.reason == f"NaN or infinity in the tokens of timm's VisionTransformer ({side})"
    assert json.loads(json.dumps(proof.record(), allow_nan=False))["max_difference"] is None


def test_numbers_of_tokens_are_compared() -> None:
    tensors = encoder_of(timm_model(TINY))
    patches = {name: tensor for name, tensor in tensors.items() if name != "cls_token"}
    source, target = (partial(plain_encoder, each, TINY) for each in (tensors, patches))
    proof = prove(source, target, size=[(32, 32)], in_chans=3)
    assert not proof.equal
    assert "tokens of shape (1, 17, 24) and (1, 16, 24)" in proof.sentence()


@pytest.mark.parametrize("name", ["crossmae.safetensors", "timm.pth", "timm", "vit"])
def test_a_file_that_its_library_does_not_load_fails(name: str, tmp_path: Path) -> None:
    source, target, given = saved(name, "square", tmp_path)
    path = tmp_path / name
    file = path / "model.safetensors" if path.is_dir() else path
    file.write_bytes(file.read_bytes()[:-500])
    proof = prove(source, target, **given)
    assert proof.ran
    assert not proof.equal
    assert proof.sentence().startswith("proof        FAILED: the encoder of the file cannot be run: ")
    assert "\n" not in proof.sentence()
    assert name in proof.reason


def test_the_tensors_must_be_those_of_the_architecture() -> None:
    tensors = encoder_of(timm_model(TINY))
    with pytest.raises(UserError, match=r"blocks\.2\."):
        plain_encoder(tensors, TINY | {"depth": 3})
    with pytest.raises(UserError, match=r"blocks\.1\."):
        plain_encoder(tensors, TINY | {"depth": 1})


def test_sentence_and_record() -> None:
    proof = Proof(True, "A", "B", "all tokens of one random image of 224 x 224", 2.4e-7, 3.1)
    assert proof.sentence() == (
        "proof        max difference 2.4e-07 of values up to 3.1 between A (source) and B (file), all tokens of one "
        "random image of 224 x 224, tolerance 1e-05 of the largest value (at least of 1): equal"
    )
    assert json.loads(json.dumps(proof.record())) == {
        "ran": True, "source": "A", "target": "B", "what": "all tokens of one random image of 224 x 224",
        "max_difference": 2.4e-7, "largest": 3.1, "tolerance": 1e-5, "reason": "", "equal": True,
    }  # fmt: skip
    assert "outputs bit-equal, values up to 3.1, between A (source)" in Proof(True, "A", "B", "", 0.0, 3.1).sentence()
    # Relative to the largest value, but never to less than 1.
    assert Proof(True, "A", "B", "", 9e-4, 100.0).equal
    assert not Proof(True, "A", "B", "", 1.1e-3, 100.0).equal
    assert Proof(True, "A", "B", "", 9e-6, 0.01).equal
    assert not Proof(True, "A", "B", "", 1.1e-5, 0.01).equal


def test_the_image_is_the_same_for_both_and_every_time() -> None:
    seen: list[Tensor] = []

    def tokens(_: nn.Module, imgs: Tensor) -> Tensor:
        seen.append(imgs)
        return imgs.flatten(2)

    encoder = Encoder("a model", nn.Identity(), tokens)
    for _ in range(2):
        torch.rand(1)
        assert prove(lambda: encoder, lambda: encoder, size=[(16, 24)], in_chans=2).equal
    assert all(image.shape == (1, 2, 16, 24) and image.dtype == torch.float32 for image in seen)
    assert all(torch.equal(image, seen[0]) for image in seen)
