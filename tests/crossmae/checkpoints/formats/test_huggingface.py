"""Proves that transformers' folders are described in our metadata as the models in them are, that the files written for
transformers are loaded by it without a missing or unexpected tensor, and that each wrong config has its own error."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from crossmae.checkpoints.formats.huggingface import hf_config, hf_preprocessor_config, read_config
from crossmae.checkpoints.formats.keys import from_plain, to_plain
from crossmae.errors import UserError
from crossmae.models.crossmae import CrossMAE
from crossmae.models.encoder import ViTEncoder

ENCODER = {
    "img_size": 32,
    "patch_size": 8,
    "in_chans": 3,
    "embed_dim": 24,
    "depth": 2,
    "num_heads": 3,
    "mlp_ratio": 4.0,
}
DECODER = {"decoder_embed_dim": 16, "decoder_depth": 2, "decoder_num_heads": 2, "decoder": "self"}
DECODER |= {"norm_pix_loss": True}
VIT = {"model_type": "vit", "image_size": 32, "patch_size": 8, "hidden_size": 24, "num_hidden_layers": 2}
VIT |= {"num_attention_heads": 3, "intermediate_size": 96}
MAE = VIT | {"model_type": "vit_mae", "decoder_hidden_size": 16, "decoder_num_hidden_layers": 2}
MAE |= {"decoder_num_attention_heads": 2, "decoder_intermediate_size": 64, "norm_pix_loss": True}
NAMES = ["cat", "dog", "Käfer"]


@pytest.fixture
def transformers(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    library = pytest.importorskip("transformers")
    library.utils.logging.disable_progress_bar()
    library.utils.logging.set_verbosity_error()
    return library


def write(folder: Path, config: Any, preprocessor: Any = None) -> Path:
    folder.mkdir(exist_ok=True)
    for name, content in (("config.json", config), ("preprocessor_config.json", preprocessor)):
        if content is not None:
            (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


def encoder(head: int = 0, **overrides: Any) -> dict[str, Tensor]:
    """Plain tensors with a final norm."""
    tensors = dict(ViTEncoder(**ENCODER | overrides).state_dict())
    tensors |= {"norm.weight": torch.ones(24), "norm.bias": torch.zeros(24)}
    return tensors | ({"head.weight": torch.randn(head, 24), "head.bias": torch.randn(head)} if head else {})


def mae() -> dict[str, Tensor]:
    return dict(CrossMAE(**ENCODER | DECODER).state_dict())


def read(folder: Path, tensors: dict[str, Tensor]) -> dict[str, Any]:
    return {key: json.loads(value) for key, value in read_config(folder, tensors).items()}


@pytest.mark.parametrize(
    "kind, image_size",
    [
        ("ViTModel", 32),
        ("ViTModel", (16, 32)),  # 9 rows of positions, a square: with the one of the class token
        ("ViTForImageClassification", 32),
        ("ViTMAEForPreTraining", 32),
    ],
)
def test_what_transformers_saves(tmp_path: Path, transformers: Any, kind: str, image_size: Any) -> None:
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    if kind.startswith("ViTMAE"):
        config = transformers.ViTMAEConfig(**{key: value for key, value in MAE.items() if key != "model_type"})
    else:
        values = {key: value for key, value in VIT.items() if key != "model_type"} | {"image_size": image_size}
        config = transformers.ViTConfig(**values, id2label=dict(enumerate(NAMES)), layer_norm_eps=1e-6)
    model = getattr(transformers, kind)(config)
    model.save_pretrained(tmp_path)
    transformers.ViTImageProcessor(size={"height": 32, "width": 32}, image_mean=[0.1, 0.2, 0.3]).save_pretrained(
        tmp_path
    )
    found = read(tmp_path, to_plain(model.state_dict()).tensors)
    expected = ENCODER | {"img_size": 32 if height == width else [height, width]}
    assert found.pop("model") == expected | (DECODER if kind.startswith("ViTMAE") else {})
    assert found.pop("norm_eps") == config.layer_norm_eps == (1e-12 if kind.startswith("ViTMAE") else 1e-6)
    assert found.pop("classes", None) == (NAMES if kind == "ViTForImageClassification" else None)
    assert found == {"pixel_mean": [0.1, 0.2, 0.3], "pixel_std": [0.5, 0.5, 0.5]}


def load(transformers: Any, kind: str, folder: Path, **arguments: Any) -> nn.Module:
    """The model, after transformers' own account of the loading: nothing missing, unexpected or of another shape."""
    model, info = getattr(transformers, kind).from_pretrained(folder, output_loading_info=True, **arguments)
    assert {key: list(value) for key, value in info.items() if value} == {}
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("norm_eps", [1e-6, 1e-12])
@pytest.mark.parametrize(
    "layout, kind",
    [
        ("hf-vit", "ViTModel"),
        ("hf-vit", "ViTForImageClassification"),
        ("hf-vitmae", "ViTMAEModel"),
        ("hf-vitmae", "ViTMAEForPreTraining"),
    ],
)
def test_transformers_loads_what_is_written(
    tmp_path: Path, transformers: Any, layout: str, kind: str, norm_eps: float, dtype: torch.dtype
) -> None:
    classes = NAMES if kind == "ViTForImageClassification" else []
    pretraining = kind == "ViTMAEForPreTraining"
    tensors = mae() if pretraining else encoder(len(classes))
    tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    arguments = ENCODER | (DECODER if pretraining else {})
    config = hf_config(layout, arguments, norm_eps=norm_eps, classes=classes)
    assert config["architectures"] == [kind]
    save_file(from_plain(tensors, layout), write(tmp_path, config) / "model.safetensors", {"format": "pt"})
    model = load(transformers, kind, tmp_path, **{"add_pooling_layer": False} if kind == "ViTModel" else {})
    loaded = to_plain(model.state_dict()).tensors
    assert loaded.keys() == tensors.keys()
    for name, tensor in loaded.items():
        assert tensor.dtype == dtype
        assert torch.equal(tensor, tensors[name]), name
    assert {module.eps for module in model.modules() if isinstance(module, nn.LayerNorm)} == {norm_eps}
    assert model.config.id2label == dict(enumerate(NAMES)) or not classes
    found = read(tmp_path, tensors)
    assert found == {"model": arguments, "norm_eps": norm_eps} | ({"classes": NAMES} if classes else {})


def test_a_grid_that_is_not_square(tmp_path: Path, transformers: Any) -> None:
    arguments = ENCODER | {"img_size": (16, 32)}
    tensors = encoder(img_size=(16, 32))
    config = hf_config("hf-vit", arguments)
    save_file(from_plain(tensors, "hf-vit"), write(tmp_path, config) / "model.safetensors", {"format": "pt"})
    model = load(transformers, "ViTModel", tmp_path, add_pooling_layer=False)
    assert model(torch.zeros(1, 3, 16, 32)).last_hidden_state.shape == (1, 9, 24)
    assert read(tmp_path, tensors)["model"] == arguments | {"img_size": [16, 32]}


def test_the_preprocessor_normalises_as_we_do(tmp_path: Path, transformers: Any) -> None:
    mean, std = [0.1, 0.2, 0.3], [0.4, 0.5, 0.6]
    write(tmp_path, VIT, hf_preprocessor_config(32, mean, std))
    found = read(tmp_path, encoder())
    assert (found["pixel_mean"], found["pixel_std"]) == (mean, std)
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path)
    image = torch.randint(256, (3, 32, 32), dtype=torch.uint8)
    pixels = processor(image, return_tensors="pt")["pixel_values"][0]
    channels = torch.tensor([mean, std]).view(2, 3, 1, 1)
    torch.testing.assert_close(pixels, (image / 255 - channels[0]) / channels[1])


@pytest.mark.parametrize(
    "settings, mean, std",
    [
        ({}, 0.5, 0.5),
        ({"image_mean": None}, 0.5, 0.5),
        ({"do_normalize": False, "image_mean": [9]}, 0.0, 1.0),
        ({"image_mean": [127.5] * 3, "image_std": [51.0] * 3, "do_rescale": False}, 0.5, 0.2),
        ({"image_mean": [1.0] * 3, "image_std": [1.0] * 3, "rescale_factor": 1 / 127.5}, 0.5, 0.5),
    ],
)
def test_pixel_statistics_are_for_pixels_in_0_1(tmp_path: Path, settings: Any, mean: float, std: float) -> None:
    found = read(write(tmp_path, VIT, settings), encoder())
    assert found["pixel_mean"] == pytest.approx([mean] * 3)
    assert found["pixel_std"] == pytest.approx([std] * 3)


@pytest.mark.parametrize("model_type", ["vit", "vit_mae"])
def test_defaults_are_those_of_transformers(tmp_path: Path, transformers: Any, model_type: str) -> None:
    base = {"img_size": 224, "patch_size": 16, "embed_dim": 768, "depth": 12, "num_heads": 12}
    with torch.device("meta"):
        model = CrossMAE(**base, decoder_depth=8, decoder="self")
    found = read(write(tmp_path, {"model_type": model_type}), dict(model.state_dict()))
    config = {"vit": transformers.ViTConfig, "vit_mae": transformers.ViTMAEConfig}[model_type]().to_dict()
    assert found["norm_eps"] == config["layer_norm_eps"]
    arguments = found["model"]
    if model_type == "vit_mae":
        assert arguments["norm_pix_loss"] is config["norm_pix_loss"] is False
    again = hf_config("hf-vitmae" if model_type == "vit_mae" else "hf-vit", arguments, norm_eps=found["norm_eps"])
    for key in again.keys() - {"architectures"}:
        assert again[key] == config[key], key


def test_another_mlp_ratio_in_the_decoder_leaves_the_encoder(tmp_path: Path) -> None:
    tensors = mae() | {"decoder_blocks.0.mlp.fc1.weight": torch.ones(48, 16)}
    assert read(write(tmp_path, MAE | {"decoder_intermediate_size": 48}), tensors)["model"] == ENCODER


@pytest.mark.parametrize("hidden", range(1, 200, 7))
def test_the_mlp_has_the_width_of_the_config(tmp_path: Path, hidden: int) -> None:
    for heads in (3, 7, 49):
        config = VIT | {"hidden_size": heads, "num_attention_heads": heads, "intermediate_size": hidden}
        tensors = {f"blocks.{i}.norm1.weight": torch.ones(heads) for i in range(2)}
        arguments = read(write(tmp_path, config), tensors)["model"]
        assert int(arguments["embed_dim"] * arguments["mlp_ratio"]) == hidden
        assert hf_config("hf-vit", arguments)["intermediate_size"] == hidden


@pytest.mark.parametrize(
    "text, message",
    [
        (None, "config.json: no such file"),
        ("", "config.json: not valid JSON"),
        ("\udcff", "config.json: line 1 is not UTF-8"),
        ("[" * 100_000, "config.json: not valid JSON"),
        ("[1]", "config.json: not a JSON object but a list"),
        (" " * (1 << 24) + "{}", "has more than 16,777,216 bytes"),
    ],
)
def test_no_config(tmp_path: Path, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text, errors="surrogateescape")
    with pytest.raises(UserError, match=message):
        read_config(tmp_path, encoder())


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model_type": None}, "model_type is null. model_type must be vit, vit_mae, vit_msn, ijepa or dinov2"),
        ({"model_type": "beit"}, 'model_type is "beit"'),
        ({"hidden_act": "quick_gelu"}, 'hidden_act is "quick_gelu". hidden_act must be gelu'),
        ({"qkv_bias": False}, "qkv_bias must be true"),
        ({"qkv_bias": "yes"}, 'qkv_bias is "yes". qkv_bias must be true'),
        ({"hidden_size": "24"}, 'hidden_size is "24". hidden_size must be a positive whole number'),
        ({"hidden_size": 24.0}, "hidden_size is 24.0"),
        ({"num_hidden_layers": True}, "num_hidden_layers is true"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0"),
        ({"intermediate_size": 10**299}, "intermediate_size must be a positive whole number"),
        ({"image_size": [32, 32, 3]}, "image_size must be a positive whole number, or height and width"),
        ({"patch_size": [8, 16]}, "patch_size must be one number"),
        ({"layer_norm_eps": "1e-6"}, "layer_norm_eps must be a number above 0"),
        ({"layer_norm_eps": float("nan")}, "layer_norm_eps must be a number above 0"),
        ({"num_attention_heads": 5}, "hidden_size 24 is not divisible by num_attention_heads 5"),
        ({"image_size": 36}, "img_size .* is not a multiple of patch_size 8"),
        ({"hidden_size": 48}, "hidden_size makes 48, but the weights next to it have 24"),
        ({"num_channels": 4}, "num_channels makes 4, but the weights next to it have 3"),
        ({"patch_size": 16}, "patch_size makes 16, but the weights next to it have 8"),
        ({"num_hidden_layers": 3}, "num_hidden_layers makes 3, but the weights next to it have 2"),
        ({"intermediate_size": 48}, "intermediate_size makes 48, but the weights next to it have 96"),
        ({"image_size": 64}, r"image_size \(rows of the position table\) makes 65, but .* have 17"),
        ({"id2label": ["a", "b", "c"]}, "id2label must be a name for each of the numbers"),
        ({"id2label": {"0": "a", "1": "b", "3": "c"}}, "id2label must be a name for each of the numbers"),
        ({"id2label": {"0": "a", "1": "b", "2": 3}}, "id2label must be a name for each of the numbers"),
        ({"id2label": {"0": "a", "1": "b"}}, r"id2label has 2 names, but classifier.weight has the shape \(3, 24\)"),
    ],
)
def test_a_config_that_is_wrong(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_config(write(tmp_path, VIT | changes), encoder(head=3))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"decoder_hidden_size": 32}, "decoder_hidden_size makes 32, but the weights next to it have 16"),
        ({"decoder_num_hidden_layers": 8}, "decoder_num_hidden_layers makes 8, but the weights next to it have 2"),
        ({"decoder_intermediate_size": 48}, "decoder_intermediate_size makes 48, but the weights next to it have 64"),
        (
            {"decoder_num_attention_heads": 3},
            "decoder_hidden_size 16 is not divisible by decoder_num_attention_heads 3",
        ),
        ({"norm_pix_loss": 1}, "norm_pix_loss is 1. norm_pix_loss must be true or false"),
    ],
)
def test_a_decoder_that_is_wrong(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_config(write(tmp_path, MAE | changes), mae())


@pytest.mark.parametrize(
    "settings, message",
    [
        ("{", "not valid JSON"),
        ({"image_mean": 0.5}, "image_mean is 0.5. image_mean must be a list of numbers, one for each channel"),
        ({"image_mean": [0.5]}, "image_mean must be a list of 3 numbers"),
        ({"image_std": [0.5, "a", 0.5]}, "image_std must be a list of numbers above 0"),
        ({"image_std": [0.5, 0, 0.5]}, "image_std must be a list of numbers above 0"),
        ({"image_mean": [float("inf"), 0, 0]}, "image_mean must be a list of numbers"),
        ({"do_normalize": "no"}, "do_normalize must be true or false"),
        ({"rescale_factor": 0}, "rescale_factor must be a number above 0"),
    ],
)
def test_a_preprocessor_that_is_wrong(tmp_path: Path, settings: Any, message: str) -> None:
    with pytest.raises(UserError, match=f"preprocessor_config.json: .*{message}"):
        read_config(write(tmp_path, VIT, settings), encoder())
