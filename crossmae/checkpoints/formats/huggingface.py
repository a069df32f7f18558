"""transformers' config.json and preprocessor_config.json: read as metadata, and built for a written folder.

Both files are read and written without transformers, which is an optional package. ViTConfig, ViTMAEConfig and
ViTImageProcessor of transformers document the defaults.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from torch import Tensor

from crossmae.checkpoints.formats.recognition import READ_TYPES, model_type_refusal
from crossmae.checkpoints.metadata import CLASSES, MODEL_ARGUMENTS, NORM_EPS, PIXEL_MEAN, PIXEL_STD
from crossmae.checkpoints.reading.files import HUB_CONFIG
from crossmae.errors import UserError
from crossmae.files import read_json
from crossmae.models.encoder import patch_grid

PREPROCESSOR = "preprocessor_config.json"
MODEL_TYPES = {"hf-vit": "vit", "hf-vitmae": "vit_mae"}
_MAX_BYTES = 1 << 24  # a config of 21,000 classes has a megabyte
_LARGE = 1 << 31  # larger than every valid size, mean and deviation
# Settings of transformers, and the corresponding arguments of `ViTEncoder` and `CrossMAE`.
_ENCODER = {
    "patch_size": "patch_size",
    "num_channels": "in_chans",
    "hidden_size": "embed_dim",
    "num_hidden_layers": "depth",
    "num_attention_heads": "num_heads",
}
_DECODER = {
    "decoder_hidden_size": "decoder_embed_dim",
    "decoder_num_hidden_layers": "decoder_depth",
    "decoder_num_attention_heads": "decoder_num_heads",
    "norm_pix_loss": "norm_pix_loss",
}

# Errors put these descriptions after "KEY is VALUE. KEY must be ".
_Size = Annotated[int, Field(strict=True, gt=0, lt=_LARGE, description="a positive whole number")]
_Sides = _Size | Annotated[list[_Size], Field(min_length=2, max_length=2)]
_Flag = Annotated[bool, Field(strict=True, description="true or false")]
_Positive = Annotated[float, Field(strict=True, gt=0, lt=_LARGE, description="a number above 0")]
_Number = Annotated[float, Field(strict=True, gt=-_LARGE, lt=_LARGE)]


class _ViT(BaseModel):
    """The settings of ViTConfig and its relatives, and of Dinov2Config."""

    model_config = ConfigDict(frozen=True, protected_namespaces=())

    model_type: Literal["vit", "vit_mae", "vit_msn", "ijepa", "dinov2"] = Field(
        description=f"{READ_TYPES}, other models are not read"
    )
    hidden_act: Literal["gelu"] = Field("gelu", description="gelu, the activation of a plain ViT")
    use_swiglu_ffn: Literal[False] = Field(False, description="false, because the MLP of a plain ViT has no gate")
    qkv_bias: Literal[True] = Field(True, description="true, because the attention of a plain ViT has a bias")
    hidden_size: _Size = 768
    num_hidden_layers: _Size = 12
    num_attention_heads: _Size = 12
    intermediate_size: _Size = 3072
    image_size: _Sides = Field(224, description="a positive whole number, or height and width")
    patch_size: _Sides = Field(16, description="one number, or the same number twice")
    num_channels: _Size = 3
    layer_norm_eps: _Positive = 1e-12
    decoder_hidden_size: _Size = 512
    decoder_num_hidden_layers: _Size = 8
    decoder_num_attention_heads: _Size = 16
    decoder_intermediate_size: _Size = 2048
    norm_pix_loss: _Flag = False
    id2label: dict[str, str] = Field({}, description="a name for each of the numbers from 0 on")

    @model_validator(mode="before")
    @classmethod
    def _defaults(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Add the defaults that differ from those of ViTConfig."""
        if values.get("model_type") != "dinov2":
            return values | ({"layer_norm_eps": 1e-6} | values if values.get("model_type") == "vit_msn" else {})
        width, ratio = values.get("hidden_size", 768), values.get("mlp_ratio", 4)
        hidden = {"intermediate_size": int(width * ratio)} if isinstance(width, int) and isinstance(ratio, int) else {}
        return {"layer_norm_eps": 1e-6, "patch_size": 14, **values, **hidden}

    @field_validator("patch_size")
    @classmethod
    def _square(cls, value: int | list[int]) -> int:
        rows, columns = _pair(value)
        assert rows == columns
        return rows

    @field_validator("id2label")
    @classmethod
    def _numbered(cls, value: dict[str, str]) -> dict[str, str]:
        assert sorted(value) == sorted(str(index) for index in range(len(value)))
        return value


class _Processor(BaseModel):
    """The settings of ViTImageProcessor that concern pixels."""

    do_normalize: _Flag = True
    do_rescale: _Flag = True
    rescale_factor: _Positive = 1 / 255
    image_mean: list[_Number] | None = Field(None, description="a list of numbers, one for each channel")
    image_std: list[_Positive] | None = Field(None, description="a list of numbers above 0, one for each channel")


_Settings = TypeVar("_Settings", bound=BaseModel)


def read_config(folder: Path, tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Return the settings of a transformers folder as metadata.

    | key                       | value                                                                             |
    | ------------------------- | --------------------------------------------------------------------------------- |
    | `model`                   | JSON: arguments of `ViTEncoder`, or of `CrossMAE` if there is an MAE decoder      |
    | `norm_eps`                | epsilon of all layer norms; default 1e-12 in transformers, 1e-6 in timm and here  |
    | `classes`                 | JSON: names in the order of `id2label`, if there are both a head and names        |
    | `pixel_mean`, `pixel_std` | JSON: for pixels in 0-1, if there is a preprocessor_config.json                   |

    `CrossMAE` has one MLP ratio for encoder and decoder. If the two ratios differ, `model` has only the arguments of
    the encoder.

    Args:
        folder: folder with config.json.
        tensors: tensors of the folder under plain names; meta tensors are allowed.

    Raises:
        UserError: a file is missing or damaged, a setting is not supported, or a setting contradicts the tensors.
    """
    path = folder / HUB_CONFIG
    settings = _read(path, _ViT)
    arguments = _arguments(settings, tensors, path)
    metadata = {MODEL_ARGUMENTS: json.dumps(arguments), NORM_EPS: json.dumps(settings.layer_norm_eps)}
    labels, head = settings.id2label, tensors.get("head.weight")
    if head is not None and labels:
        if head.ndim == 0 or len(labels) != head.shape[0]:
            raise UserError(
                f"{path}: id2label has {len(labels)} names, but classifier.weight has the shape {tuple(head.shape)}. "
                "Copy the config.json of these weights next to them."
            )
        metadata[CLASSES] = json.dumps([labels[str(index)] for index in range(len(labels))], ensure_ascii=False)
    if (folder / PREPROCESSOR).is_file():
        metadata |= _pixel_statistics(folder / PREPROCESSOR, settings.num_channels)
    return metadata


def check_model_type(folder: Path) -> None:
    """Raise UserError if config.json names another model than a plain ViT."""
    path, settings = folder / HUB_CONFIG, None
    with suppress(UserError):
        settings = read_json(path)
    kind = settings.get("model_type") if isinstance(settings, dict) else None
    if what := model_type_refusal(kind):
        raise UserError(f'{path}: model_type is "{kind}", {what}')


def hf_config(
    layout: str, arguments: Mapping[str, Any], *, norm_eps: float = 1e-6, classes: Sequence[str] = ()
) -> dict[str, Any]:
    """Build the config.json for the tensors of `keys.from_plain`.

    Args:
        layout: "hf-vit" or "hf-vitmae".
        arguments: constructor arguments of `ViTEncoder`, or of `CrossMAE` for hf-vitmae with a decoder.
        norm_eps: epsilon of the layer norms.
        classes: names of the head's outputs; empty without a head.
    """
    decoder = "decoder_embed_dim" in arguments and layout == "hf-vitmae"
    values = {setting: arguments[key] for setting, key in (_ENCODER | (_DECODER if decoder else {})).items()}
    height, width = _pair(arguments["img_size"])
    values["image_size"] = height if height == width else [height, width]
    for prefix in ("", "decoder_") if decoder else ("",):
        width = values[f"{prefix}hidden_size"]
        values[f"{prefix}intermediate_size"] = int(width * arguments["mlp_ratio"])
    if layout == "hf-vit":
        architecture = "ViTForImageClassification" if classes else "ViTModel"
    else:
        architecture = "ViTMAEForPreTraining" if decoder else "ViTMAEModel"
    values |= {"model_type": MODEL_TYPES[layout], "architectures": [architecture], "layer_norm_eps": norm_eps}
    values |= {"hidden_act": "gelu", "qkv_bias": True}
    values |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    if classes:
        values["id2label"] = {str(index): name for index, name in enumerate(classes)}
        values["label2id"] = {name: index for index, name in enumerate(classes)}
    return values


def hf_preprocessor_config(img_size: Any, mean: Sequence[float], std: Sequence[float]) -> dict[str, Any]:
    """Build a preprocessor_config.json that resizes, scales to 0-1 and normalises."""
    height, width = _pair(img_size)
    return {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": height, "width": width},
        "resample": 3,  # PIL's bicubic, as in the published evaluation
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(mean),
        "image_std": list(std),
    }


def _read(path: Path, kind: type[_Settings]) -> _Settings:
    if path.is_file() and path.stat().st_size > _MAX_BYTES:
        raise UserError(f"{path}: has more than {_MAX_BYTES:,} bytes. Copy or download it again.")
    values = read_json(path)
    if not isinstance(values, dict):
        raise UserError(f"{path}: not a JSON object but a {type(values).__name__}. Copy or download it again.")
    try:
        return kind.model_validate({key: value for key, value in values.items() if value is not None})  # null: unset
    except ValidationError as error:
        key = str(error.errors()[0]["loc"][0])
        expected, given = kind.model_fields[key].description, json.dumps(values.get(key))[:80]
        raise UserError(f"{path}: {key} is {given}. {key} must be {expected}.") from None


def _arguments(settings: _ViT, tensors: Mapping[str, Tensor], path: Path) -> dict[str, Any]:
    height, width = _pair(settings.image_size)
    _check_stack(path, settings, tensors, "", "patch_embed.proj.weight")
    try:
        rows, columns = patch_grid((height, width), settings.patch_size)  # type: ignore[arg-type]  # after `_square`
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None
    rows_key = "image_size (rows of the position table)"
    held = {
        "num_channels": _shape(tensors, "patch_embed.proj.weight", 1),
        "patch_size": _shape(tensors, "patch_embed.proj.weight", 2),
        rows_key: _shape(tensors, "pos_embed", 1),
    }
    _compare(path, dict(settings) | {rows_key: 1 + rows * columns}, held)
    ratio = mlp_ratio(settings.hidden_size, settings.intermediate_size)
    arguments = {key: getattr(settings, setting) for setting, key in _ENCODER.items()}
    arguments |= {"img_size": height if height == width else [height, width], "mlp_ratio": ratio}
    if "decoder_embed.weight" not in tensors or settings.model_type != MODEL_TYPES["hf-vitmae"]:
        return arguments
    _check_stack(path, settings, tensors, "decoder_", "decoder_embed.weight")
    if int(settings.decoder_hidden_size * ratio) == settings.decoder_intermediate_size:
        arguments |= {key: getattr(settings, setting) for setting, key in _DECODER.items()} | {"decoder": "self"}
    return arguments


def _check_stack(path: Path, settings: _ViT, tensors: Mapping[str, Tensor], prefix: str, first: str) -> None:
    """Check the settings of blocks that follow the layer `first`."""
    width, heads = (getattr(settings, f"{prefix}{key}") for key in ("hidden_size", "num_attention_heads"))
    if width % heads:
        raise UserError(
            f"{path}: {prefix}hidden_size {width} is not divisible by {prefix}num_attention_heads {heads}. "
            "Correct the file to the model of the weights."
        )
    held = {
        f"{prefix}hidden_size": _shape(tensors, first, 0),
        f"{prefix}num_hidden_layers": len(
            {name.split(".")[1] for name in tensors if name.startswith(f"{prefix}blocks.")}
        ),
        f"{prefix}intermediate_size": _shape(tensors, f"{prefix}blocks.0.mlp.fc1.weight", 0),
    }
    _compare(path, dict(settings), held)


def _compare(path: Path, settings: Mapping[str, Any], held: Mapping[str, int | None]) -> None:
    """Raise UserError for the first setting that contradicts the tensors."""
    for key, found in held.items():
        if found is not None and found != settings[key]:
            raise UserError(
                f"{path}: {key} makes {settings[key]}, but the weights next to it have {found}. Copy the config.json "
                "of these weights next to them."
            )


def _pixel_statistics(path: Path, channels: int) -> dict[str, str]:
    settings = _read(path, _Processor)
    mean, std = settings.image_mean or [0.5] * channels, settings.image_std or [0.5] * channels
    if not settings.do_normalize:
        mean, std = [0.0] * channels, [1.0] * channels
    for key, numbers in (("image_mean", mean), ("image_std", std)):
        if len(numbers) != channels:
            raise UserError(f"{path}: {key} is {numbers}. {key} must be a list of {channels} numbers, one per channel.")
    factor = 255 * settings.rescale_factor if settings.do_rescale else 255.0
    if not math.isclose(factor, 1):
        mean, std = ([value / factor for value in numbers] for numbers in (mean, std))
    return {PIXEL_MEAN: json.dumps(mean), PIXEL_STD: json.dumps(std)}


def mlp_ratio(width: int, hidden: int) -> float:
    """Return a ratio with int(width * ratio) == hidden, despite rounding."""
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else math.nextafter(ratio, math.inf)


def _shape(tensors: Mapping[str, Tensor], name: str, axis: int) -> int | None:
    tensor = tensors.get(name)
    return tensor.shape[axis] if tensor is not None and tensor.ndim > axis else None


def _pair(size: Any) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])
