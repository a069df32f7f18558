"""Proves that every layout becomes every other and comes back bit for bit, with models that the other libraries build,
save and load themselves, and that these models compute the same tokens."""

from __future__ import annotations

import json
import logging
import re
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

from crossmae.checkpoints import convert, load
from crossmae.checkpoints.metadata import FORMAT, MODEL_ARGUMENTS, PIXEL_MEAN, PIXEL_STD, VERSION
from crossmae.checkpoints.weights import encoder_tensors, read_weights, save_weights
from crossmae.classification.classifier import load_classifier
from crossmae.models.crossmae import CrossMAE
from crossmae.models.encoder import ViTEncoder

ENCODER: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}
DECODER: dict[str, Any] = {"decoder_embed_dim": 16, "decoder_depth": 1, "decoder_num_heads": 2}
HF: dict[str, Any] = {
    "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 96, "image_size": 32,
    "patch_size": 8, "layer_norm_eps": 1e-6,
}  # fmt: skip
HF_DECODER: dict[str, Any] = {
    "decoder_hidden_size": 16, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2,
    "decoder_intermediate_size": 64,
}  # fmt: skip
DESTINATIONS = {
    "crossmae": ("a.safetensors", "a.pth"),
    "mae": ("a.safetensors", "a.pth"),
    "timm": ("folder", "a.safetensors", "a.pth"),
    "hf-vit": ("folder",),
    "hf-vitmae": ("folder",),
    "detectron2": ("a.pth", "a.pkl", "a.safetensors"),
}
IMAGE = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    caplog.set_level(logging.ERROR, logger="transformers")


def randomised(model: nn.Module) -> Any:
    """Values with which every tensor counts: no bias is zero, no norm trivial, no position regular."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                scale = 1.0 if "norm" in name and name.endswith("weight") else 0.0
                tensor.copy_(0.2 * torch.randn(tensor.shape, generator=generator) + scale)
    return model.eval()


# Models of every library, saved as its users save them. Each gives the file and (B, N, E) tokens before the final norm.

Tokens = Callable[[Tensor], Tensor]


def own(folder: Path, decoder: str) -> tuple[Path, Tokens]:
    model = randomised(CrossMAE(**ENCODER, **DECODER, decoder=decoder))  # type: ignore[arg-type]
    arguments = json.dumps(ENCODER | DECODER | {"decoder": decoder})
    record = {MODEL_ARGUMENTS: arguments, FORMAT: "crossmae", VERSION: "0.1.0"}
    pixels = {PIXEL_MEAN: "[0.5, 0.4, 0.3]", PIXEL_STD: "[0.2, 0.25, 0.3]"}
    save_weights(folder / "source.safetensors", model.state_dict(), record | pixels)
    return folder / "source.safetensors", partial(own_tokens, model)


def own_tokens(model: ViTEncoder, imgs: Tensor) -> Tensor:
    return model.features(model.embed(imgs), [model.depth - 1])[0]


def timm_model(folder: Path, **given: Any) -> tuple[Path, Tokens]:
    model = randomised(VisionTransformer(**ENCODER, num_classes=5, **given))
    save_file(model.state_dict(), folder / "source.safetensors", {"format": "pt"})
    return folder / "source.safetensors", partial(timm_tokens, model)


def timm_tokens(model: VisionTransformer, imgs: Tensor) -> Tensor:
    tokens: Tensor = model.blocks(model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(imgs)))))
    return tokens


def transformers_model(folder: Path, name: str, **given: Any) -> tuple[Path, Tokens]:
    transformers = pytest.importorskip("transformers")
    config = (transformers.ViTMAEConfig if "MAE" in name else transformers.ViTConfig)(**HF | given)
    model = randomised(getattr(transformers, name)(config))
    model.save_pretrained(folder / "source")
    return folder / "source", partial(transformers_tokens, model)


def transformers_tokens(model: Any, imgs: Tensor) -> Tensor:
    if "MAE" not in type(model).__name__:
        return model(imgs, output_hidden_states=True).hidden_states[-1]
    encoder = getattr(model, "vit", model)
    encoder.config.mask_ratio = 0.0
    noise = torch.arange(16.0).expand(len(imgs), -1)
    return encoder(imgs, noise=noise, output_hidden_states=True).hidden_states[-1]


def detectron2_model(folder: Path, **given: Any) -> tuple[Path, Tokens]:
    vit = pytest.importorskip("detectron2.modeling.backbone.vit")
    arguments = ENCODER | {"window_size": 0, "pretrain_img_size": 32, "norm_layer": partial(nn.LayerNorm, eps=1e-6)}
    model = randomised(vit.ViT(**arguments | given))
    torch.save({"model": {f"backbone.net.{key}": value for key, value in model.state_dict().items()}}, folder / "a.pth")
    return folder / "a.pth", partial(detectron2_tokens, model)


def detectron2_tokens(model: nn.Module, imgs: Tensor) -> Tensor:
    return model(imgs)["last_feat"].flatten(2).transpose(1, 2)


def mmpretrain_model(folder: Path) -> tuple[Path, Tokens]:
    """Names as OpenMMLab documents them; the library itself asks for a compiler."""
    model = randomised(VisionTransformer(**ENCODER, num_classes=5))
    renamed = {"mlp.fc1": "ffn.layers.0.0", "mlp.fc2": "ffn.layers.1", "norm1": "ln1", "norm2": "ln2", "norm": "ln1"}
    renamed |= {"blocks": "layers", "patch_embed.proj": "patch_embed.projection"}
    pattern = re.compile("|".join(renamed))
    named = {}
    for name, tensor in model.state_dict().items():
        home = "head.layers." if name.startswith("head.") else "backbone."
        named[home + pattern.sub(lambda found: renamed[found[0]], name)] = tensor
    torch.save({"meta": {"epoch": 3}, "state_dict": named}, folder / "source.pth")
    return folder / "source.pth", partial(timm_tokens, model)


SOURCES: dict[str, Callable[[Path], tuple[Path, Tokens]]] = {
    "crossmae": partial(own, decoder="cross"),
    "mae": partial(own, decoder="self"),
    "timm": partial(timm_model, global_pool="token"),
    "timm-avg": partial(timm_model, global_pool="avg"),
    "hf-vit": partial(transformers_model, name="ViTForImageClassification", num_labels=5),
    "hf-vit-base": partial(transformers_model, name="ViTModel"),
    "hf-vitmae": partial(transformers_model, name="ViTMAEForPreTraining", **HF_DECODER),
    "hf-vitmae-base": partial(transformers_model, name="ViTMAEModel", **HF_DECODER),
    "detectron2": detectron2_model,
    "mmpretrain": mmpretrain_model,
}


def reopened(path: Path, to: str) -> Tokens:
    """The written file as the users of its library open it, without anything of ours where it is not ours."""
    if to in ("crossmae", "mae"):
        model = ViTEncoder(**ENCODER)
        load(model, path, part="encoder", new=("cls_token$",))
        return partial(own_tokens, model)
    if to == "timm" and path.is_dir():
        return partial(timm_tokens, timm.create_model(f"local-dir:{path}", pretrained=True).eval())
    if to == "timm":
        held = load_file(path) if path.suffix == ".safetensors" else torch.load(path)["state_dict"]
        pool = "avg" if "fc_norm.weight" in held else "token" if "cls_token" in held else ""
        size = {"num_classes": len(held["head.bias"]) if "head.bias" in held else 0, "class_token": "cls_token" in held}
        vit = VisionTransformer(**ENCODER, global_pool=pool, **size)
        timm.models.load_checkpoint(vit, str(path))
        return partial(timm_tokens, vit.eval())
    if to == "detectron2":
        vit = pytest.importorskip("detectron2.modeling.backbone.vit").ViT(
            **ENCODER, window_size=0, pretrain_img_size=32, norm_layer=partial(nn.LayerNorm, eps=1e-6)
        )
        net = nn.Module()
        net.backbone = nn.Module()
        net.backbone.net = vit
        held = load_file(path) if path.suffix == ".safetensors" else None
        if held is not None:
            net.load_state_dict(held)
        else:
            found = pytest.importorskip("detectron2.checkpoint").DetectionCheckpointer(net).load(str(path))
            assert "model" not in found
        return partial(detectron2_tokens, vit)
    transformers = pytest.importorskip("transformers")
    name = json.loads((path / "config.json").read_text())["architectures"][0]
    options = {"add_pooling_layer": False} if name == "ViTModel" else {}
    model, report = getattr(transformers, name).from_pretrained(path, output_loading_info=True, **options)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    return partial(transformers_tokens, model.eval())


def holds(source: str, to: str) -> bool:
    """Whether a target can hold a source's encoder: transformers' models cannot do without a class token."""
    return to in DESTINATIONS and not (source == "detectron2" and to.startswith("hf-"))


def without_class_token(tensors: dict[str, Tensor]) -> Tokens:
    """What a dense backbone computes, by timm."""
    model = VisionTransformer(**ENCODER, num_classes=0, global_pool="", class_token=False)
    held = {name: tensor for name, tensor in tensors.items() if name != "cls_token"}
    found = model.load_state_dict(held | {"pos_embed": held["pos_embed"][:, 1:]}, strict=False)
    assert found.unexpected_keys == []
    assert set(found.missing_keys) == {"norm.weight", "norm.bias"}
    return partial(timm_tokens, model.eval())


@pytest.mark.parametrize(
    ("source", "to"), [(source, to) for source in SOURCES for to in DESTINATIONS if holds(source, to)]
)
@torch.no_grad()
def test_there_and_back(tmp_path: Path, source: str, to: str) -> None:
    path, tokens = SOURCES[source](tmp_path)
    before = read_weights(path)
    dense = "cls_token" not in before.tensors or to == "detectron2"
    expected = (without_class_token(encoder_tensors(before)) if dense else tokens)(IMAGE)
    for name in DESTINATIONS[to]:
        folder = tmp_path / name.replace(".", "-")
        there = convert(path, folder / "there" / name, to, given={"num_heads": 3})
        assert there.proof.equal
        found: Tensor | None = reopened(there.destination, to)(IMAGE)
        if to in ("crossmae", "mae") and dense:
            found = None  # our encoder makes a new class token
        if found is not None:
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
        layout = source.removesuffix("-avg").removesuffix("-base")
        if not holds(to, layout):
            continue
        back = convert(there.destination, folder / "back" / DESTINATIONS[layout][0], layout)
        assert back.proof.equal
        after = read_weights(back.destination)
        lost = set(before.tensors) - set(after.tensors)
        entries = [*there.report.entries, *back.report.entries]
        dropped = {entry.plain for entry in entries if entry.status == "dropped"}
        made = {entry.plain for entry in entries if entry.status == "new"}  # a final norm that had been left behind
        dropped -= made
        assert lost == {key for key in before.tensors if plain(key) in dropped}
        rows = 1 if any("without the row" in entry.reason for entry in entries) else 0
        for key in set(before.tensors) & set(after.tensors):
            first, last = before.tensors[key], after.tensors[key]
            if plain(key) in made:
                continue
            if plain(key) == "pos_embed":
                first, last = first[:, rows:], last[:, rows:]
            assert torch.equal(first, last), key
        encoder, kept = encoder_tensors(before), encoder_tensors(after)
        assert set(encoder) - set(kept) <= {"cls_token"}  # which a detection backbone has no place for


def plain(name: str) -> str:
    return name.removeprefix("backbone.net.")


@torch.no_grad()
def test_a_whole_mae_reconstructs_the_same_in_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    path, _ = own(tmp_path, "self")
    ours = CrossMAE(**ENCODER, **DECODER, decoder="self")
    load(ours, path)
    convert(path, tmp_path / "b", "hf-vitmae")
    theirs = transformers.ViTMAEForPreTraining.from_pretrained(tmp_path / "b").eval()
    noise = torch.rand(2, 16)
    expected, found = ours(IMAGE, mask_ratio=0.75, noise=noise), theirs(IMAGE, noise=noise)
    torch.testing.assert_close(found.logits, expected.pred, atol=1e-5, rtol=0)
    torch.testing.assert_close(found.loss, expected.loss, atol=1e-5, rtol=0)


@torch.no_grad()
def test_classifiers_give_the_same_answers(tmp_path: Path) -> None:
    """transformers to timm and back, and timm's average pooling through our own classifier."""
    transformers = pytest.importorskip("transformers")
    names = {"id2label": {0: "cat", 1: "dog", 2: "owl"}, "label2id": {"cat": 0, "dog": 1, "owl": 2}}
    config = transformers.ViTConfig(**HF, **names)
    first = randomised(transformers.ViTForImageClassification(config))
    first.save_pretrained(tmp_path / "a")
    convert(tmp_path / "a", tmp_path / "b", "timm")
    model = timm.create_model(f"local-dir:{tmp_path / 'b'}", pretrained=True).eval()
    torch.testing.assert_close(model(IMAGE), first(IMAGE).logits, atol=1e-5, rtol=0)
    assert model.pretrained_cfg["label_names"] == ["cat", "dog", "owl"]
    convert(tmp_path / "b", tmp_path / "c", "hf-vit")
    again = transformers.ViTForImageClassification.from_pretrained(tmp_path / "c").eval()
    torch.testing.assert_close(again(IMAGE).logits, first(IMAGE).logits, atol=1e-5, rtol=0)
    assert again.config.id2label == {0: "cat", 1: "dog", 2: "owl"}
    opened = load_classifier(tmp_path / "a")
    assert opened.classes == ("cat", "dog", "owl")
    convert(tmp_path / "a", tmp_path / "d.safetensors", "crossmae")
    ours = load_classifier(tmp_path / "d.safetensors")
    torch.testing.assert_close(ours.model(IMAGE), first(IMAGE).logits, atol=1e-5, rtol=0)
    assert ours.classes == ("cat", "dog", "owl")
