"""Proves that a classifier comes back from its file bit by bit, with names and pixels; that timm's users can read the
file strictly; that published files work, with every guess on record; and what is no classifier is told."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from crossmae.checkpoints import convert
from crossmae.checkpoints.metadata import FORMAT
from crossmae.checkpoints.resample import resample_positions
from crossmae.checkpoints.run_checkpoint import save_checkpoint
from crossmae.checkpoints.weights import read_weights, save_weights
from crossmae.classification.classifier import ClassifierRecord, classifier_metadata, load_classifier
from crossmae.classification.vit import Architecture, architecture_of, build_vit, load_encoder_weights
from crossmae.errors import UserError

# As wide as ViT-Ti, so that a published file tells the number of heads.
TINY = Architecture(img_size=(32, 32), patch_size=8, in_chans=3, embed_dim=192, depth=2, num_heads=3, mlp_ratio=2.0)
CLASSES = ("n01", "n02", "n03", "n04")
RECORD: dict[str, Any] = {
    "classes": CLASSES,
    "class_names": ("cat", "naïve dog", "猫", "x"),
    "multi_label": True,
    "mean": (0.5, 0.4, 0.3),
    "std": (0.2, 0.25, 0.3),
    "bit_depth": 16,
    "crop_pct": 0.9,
}


def trained(architecture: Architecture = TINY, pool: Any = "avg", head: Any = "linear") -> VisionTransformer:
    """Every tensor, those of the batch norm included, counts."""
    model = build_vit(architecture, len(CLASSES), pool, head=head)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                tensor.copy_(torch.rand_like(tensor) * 0.2 + ("norm" in name or "running_var" in name))
    return model.eval()


def metadata(
    architecture: Architecture = TINY, pool: Any = "avg", head: Any = "linear", **changes: Any
) -> dict[str, str]:
    return classifier_metadata(architecture, ClassifierRecord(pool=pool, head=head, **RECORD | changes), step=7)


def write(path: Path, model: VisionTransformer, **changes: Any) -> Path:
    save_weights(path, model.state_dict(), metadata(**changes))
    return path


def published(path: Path, model: VisionTransformer, **settings: Any) -> Path:
    torch.save({"model": model.state_dict(), "epoch": 3, "args": argparse.Namespace(nb_classes=4, **settings)}, path)
    return path


@pytest.mark.parametrize("pool", ["avg", "cls"])
@pytest.mark.parametrize("head", ["linear", "batchnorm"])
@pytest.mark.parametrize("img_size", [(32, 32), (16, 48)], ids=["square", "oblong"])
def test_round_trip(tmp_path: Path, pool: str, head: str, img_size: tuple[int, int]) -> None:
    architecture = dataclasses.replace(TINY, img_size=img_size, num_heads=6)
    model = trained(architecture, pool, head)
    path = write(tmp_path / "a.safetensors", model, architecture=architecture, pool=pool, head=head)
    assert read_weights(path).format == {"linear": "finetuned", "batchnorm": "linear_probe"}[head]
    loaded = load_classifier(path)
    imgs = torch.randn(2, 3, *img_size)
    with torch.no_grad():
        assert torch.equal(loaded.model(imgs), model(imgs))
    assert not loaded.model.training
    facts = {name: getattr(loaded, name) for name in RECORD if name != "step"}
    assert facts == {name: value for name, value in RECORD.items() if name != "step"}
    assert (loaded.path, loaded.architecture, loaded.pool, loaded.assumed) == (path, architecture, pool, ())


def test_record_in_words(tmp_path: Path) -> None:
    record = read_weights(write(tmp_path / "a.safetensors", trained())).metadata
    assert record[FORMAT] == "classifier"
    assert record["class_names"] == '["cat", "naïve dog", "猫", "x"]'
    assert (record["multi_label"], record["crop_pct"], record["step"]) == ("true", "0.9", "7")


@pytest.mark.parametrize("pool", ["avg", "cls"])
def test_timm_reads_the_file_strictly(tmp_path: Path, pool: str) -> None:
    model = trained(pool=pool)
    path = write(tmp_path / "a.safetensors", model, pool=pool)
    theirs = timm.create_model(
        "vit_base_patch16_224",
        num_classes=len(CLASSES),
        global_pool={"avg": "avg", "cls": "token"}[pool],
        class_token=True,
        img_size=32,
        patch_size=8,
        embed_dim=192,
        depth=2,
        num_heads=3,
        mlp_ratio=2.0,
    )
    theirs.load_state_dict(load_file(path))
    imgs = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(theirs.eval()(imgs), model(imgs))


def test_folder_of_a_run(tmp_path: Path) -> None:
    models = {name: trained() for name in ("checkpoint", "model", "model_best")}
    checkpoint = save_checkpoint(tmp_path, 7, models["checkpoint"].state_dict(), metadata(), {}, {}, 1)
    assert torch.equal(load_classifier(tmp_path).model.head.weight, models["checkpoint"].head.weight)  # type: ignore[arg-type, union-attr]
    for name in ("model", "model_best"):
        write(tmp_path / f"{name}.safetensors", models[name])
        assert load_classifier(tmp_path).path == tmp_path / f"{name}.safetensors"
    assert load_classifier(checkpoint).path == checkpoint / "model.safetensors"


@pytest.mark.parametrize("img_size", [48, (24, 64)])
def test_another_size_is_resampled(tmp_path: Path, img_size: Any) -> None:
    model = trained()
    loaded = load_classifier(write(tmp_path / "a.safetensors", model), img_size)
    height, width = (48, 48) if img_size == 48 else img_size
    assert loaded.architecture == dataclasses.replace(TINY, img_size=(height, width))
    wanted = resample_positions(model.pos_embed, (4, 4), (height // 8, width // 8))
    assert torch.equal(loaded.model.pos_embed, wanted)  # type: ignore[arg-type]
    assert loaded.model(torch.randn(1, 3, height, width)).shape == (1, 4)
    with pytest.raises(UserError, match=r"a\.safetensors: img_size \(36, 36\) is not a multiple of patch_size 8"):
        load_classifier(tmp_path / "a.safetensors", 36)


# Published files


@pytest.mark.parametrize("pool", ["avg", "cls"])
@pytest.mark.parametrize("head", ["linear", "batchnorm"])
def test_published_layout(tmp_path: Path, pool: str, head: str) -> None:
    model = trained(pool=pool, head=head)
    if pool == "avg":
        nn.init.normal_(model.fc_norm.weight)
    loaded = load_classifier(published(tmp_path / "a.pth", model, global_pool=pool == "avg"))
    imgs = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(loaded.model(imgs), model(imgs))
    assert loaded.classes == loaded.class_names == ("0", "1", "2", "3")
    assert (loaded.pool, loaded.multi_label, loaded.bit_depth, loaded.crop_pct) == (pool, False, 8, 0.875)
    assert loaded.mean == (0.485, 0.456, 0.406)
    text = "; ".join(loaded.assumed)
    for word in ("0 to 3", "ImageNet", "0.875", "num_heads: 3 is assumed", "exactly one class"):
        assert word in text
    assert "pool:" not in text  # its settings tell


def test_published_file_without_settings(tmp_path: Path) -> None:
    model = trained(dataclasses.replace(TINY, img_size=(256, 256)), "cls")
    torch.save({f"module.{name}": tensor for name, tensor in model.state_dict().items()}, tmp_path / "a.pth")
    loaded = load_classifier(tmp_path / "a.pth")
    assert loaded.crop_pct == 1.0  # larger than 224 pixels
    assert any(line.startswith("pool: cls is assumed from its final norm") for line in loaded.assumed)
    assert load_classifier(tmp_path / "a.pth", 224).crop_pct == 0.875


def test_settings_that_contradict_the_tensors(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="settings have global_pool=True, but its final norm belongs to pooling 'cls'"):
        load_classifier(published(tmp_path / "a.pth", trained(pool="cls"), global_pool=True))


def test_metadata_settles_what_would_be_assumed(tmp_path: Path) -> None:
    """How pixels of other channels are told."""
    model = trained(dataclasses.replace(TINY, in_chans=2))
    save_weights(tmp_path / "a.safetensors", model.state_dict(), {})
    with pytest.raises(UserError, match="pixel_mean: Field required, pixel_std: Field required"):
        load_classifier(tmp_path / "a.safetensors")
    told = {"pixel_mean": "[0.1, 0.2]", "pixel_std": "[1, 1]", "classes": '["a", "b", "c", "d"]', "crop_pct": "0.5"}
    save_weights(tmp_path / "b.safetensors", model.state_dict(), told)
    loaded = load_classifier(tmp_path / "b.safetensors")
    assert loaded.classes == loaded.class_names == ("a", "b", "c", "d")
    assert (loaded.mean, loaded.crop_pct) == ((0.1, 0.2), 0.5)
    assert not any("names" in sentence or "ImageNet" in sentence for sentence in loaded.assumed)


# What is wrong


def test_an_encoder_is_no_classifier(tmp_path: Path) -> None:
    save_weights(tmp_path / "a.safetensors", build_vit(TINY, 0, "cls").state_dict(), {})
    with pytest.raises(UserError, match=r"a\.safetensors: an encoder.*, not a classifier\. Start from it: "):
        load_classifier(tmp_path / "a.safetensors")
    with pytest.raises(UserError, match="no such file"):
        load_classifier(tmp_path / "b.safetensors")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"classes": "[1"}, "classes: Input should be a valid tuple"),
        ({"pool": "max"}, "pool: Input should be 'avg' or 'cls'"),
        ({"class_names": '["a"]'}, "class_names has 1 value for 4 classes"),
        ({"pixel_std": "[1]"}, "pixel_std has 1 value for 3 channels"),
        ({"head": "batchnorm"}, r"unexpected, the model has no such tensor"),
        ({"classes": '["a", "b"]', "class_names": '["a", "b"]'}, r"weight: file \(4, 192\), model \(2, 192\)"),
    ],
)
def test_wrong_records(tmp_path: Path, changes: dict[str, str], message: str) -> None:
    save_weights(tmp_path / "a.safetensors", trained().state_dict(), metadata() | changes)
    with pytest.raises(UserError, match=message) as error:
        load_classifier(tmp_path / "a.safetensors")
    assert "a.safetensors" in str(error.value)


def test_missing_record_and_lost_tensor(tmp_path: Path) -> None:
    record = metadata()
    del record["crop_pct"]
    save_weights(tmp_path / "a.safetensors", trained().state_dict(), record)
    with pytest.raises(UserError, match="crop_pct: Field required"):
        load_classifier(tmp_path / "a.safetensors")
    tensors = trained().state_dict()
    del tensors["fc_norm.bias"]
    save_weights(tmp_path / "b.safetensors", tensors, metadata())
    with pytest.raises(UserError, match=r"fc_norm +1 +missing from the file: bias"):
        load_classifier(tmp_path / "b.safetensors")


# A classifier as a start


def test_heads_and_sides_are_known_to_whatever_starts_from_it(tmp_path: Path) -> None:
    """Neither shows in a shape: 6 heads where the width suggests 3, 2 x 6 patches."""
    architecture = dataclasses.replace(TINY, img_size=(16, 48), num_heads=6)
    path = write(tmp_path / "a.safetensors", trained(architecture), architecture=architecture)
    assert architecture_of(read_weights(path)) == architecture
    load_encoder_weights(build_vit(architecture, 9), read_weights(path))
    with pytest.raises(UserError, match="num_heads 6, but the model expects num_heads 3"):
        load_encoder_weights(build_vit(dataclasses.replace(architecture, num_heads=3), 9), read_weights(path))
    convert(path, tmp_path / "b.pth", "crossmae", encoder_only=True)
    assert architecture_of(read_weights(tmp_path / "b.pth")) == architecture
    with pytest.raises(UserError, match=r"an encoder.*, not a classifier"):
        load_classifier(tmp_path / "b.pth")


@pytest.mark.parametrize(("pool", "head"), [("avg", "linear"), ("cls", "linear"), ("cls", "batchnorm")])
def test_a_classifier_with_several_class_tokens_comes_back(tmp_path: Path, pool: Any, head: Any) -> None:
    architecture = dataclasses.replace(TINY, class_tokens=3)
    model = trained(architecture, pool, head)
    imgs = torch.randn(2, 3, 32, 32)
    path = write(tmp_path / "a.safetensors", model, architecture=architecture, pool=pool, head=head)
    found = load_classifier(path)
    assert found.architecture == architecture
    assert torch.equal(found.model(imgs), model(imgs))
    tokens = model.forward_features(imgs)
    assert tokens.shape == (2, 3 + 16, 192)
    pooled = tokens[:, :3].mean(1) if pool == "cls" else tokens[:, 3:].mean(1)
    torch.testing.assert_close(model(imgs), model.head(model.fc_norm(pooled)))
    with pytest.raises(UserError, match="cannot become timm"):
        convert(path, tmp_path / "b.pth", "timm")
    assert convert(path, tmp_path / "c.safetensors", "crossmae").proof.equal
    assert torch.equal(load_classifier(tmp_path / "c.safetensors").model(imgs), model(imgs))


def test_one_class_token_is_not_recorded() -> None:
    assert "class_tokens" not in metadata()["model"]
