"""transformers' config.json and preprocessor_config.json, to the metadata of a weight file and back.

What a key means where a file lacks it is documented by transformers: ViTConfig, ViTMAEConfig, ViTImageProcessor.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from crossmae.checkpoints.metadata import CLASSES, MODEL_ARGUMENTS, NORM_EPS, PIXEL_MEAN, PIXEL_STD
from crossmae.checkpoints.reading.files import HUB_CONFIG as CONFIG
from crossmae.errors import UserError
from crossmae.models.encoder import patch_grid

PREPROCESSOR = "preprocessor_config.json"
MODEL_TYPES = {"hf-vit": "vit", "hf-vitmae": "vit_mae"}
MAX_BYTES = 1 << 24  # a config of 21,000 classes has a megabyte

# ViTConfig and ViTMAEConfig agree in these.
_DEFAULTS = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "image_size": 224,
    "patch_size": 16,
    "num_channels": 3,
    "decoder_hidden_size": 512,
    "decoder_num_hidden_layers": 8,
    "decoder_num_attention_heads": 16,
    "decoder_intermediate_size": 2048,
}
_LARGE = 1 << 31  # no size, mean or deviation is; neither are infinity and NaN
_DEFAULT_NORM_EPS = 1e-12
_DEFAULT_STATISTIC = 0.5  # mean and deviation of each channel in ViTImageProcessor


def read_config(folder: Path, tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """What the two JSON files of a transformers folder say, as the metadata of our own weight files.

    | key                       | value                                                                             |
    | ------------------------- | --------------------------------------------------------------------------------- |
    | `model`                   | JSON: arguments of `ViTEncoder`; with an MAE decoder, of `CrossMAE`               |
    | `norm_eps`                | of every LayerNorm; transformers' default is 1e-12, timm's and ours 1e-6          |
    | `classes`                 | JSON: names in the order of `id2label`, where there are both a head and names     |
    | `pixel_mean`, `pixel_std` | JSON: for pixels in 0-1, where there is a preprocessor_config.json                |

    A decoder whose MLPs have another ratio than the encoder's is none of `CrossMAE`'s: then the arguments are those of
    the encoder.

    Args:
        folder: with config.json and, if pixel statistics are known, preprocessor_config.json.
        tensors: of its weights under plain names, on any device, meta too; sizes must be those of the config.

    Raises:
        UserError: a file is missing, no JSON, or not of a plain ViT; a value of the wrong type, or that contradicts
            another value or the tensors.
    """
    config = _read(folder / CONFIG)
    _check_plain(config)
    encoder = _encoder_arguments(config)
    _check_sizes(config, encoder, tensors)
    arguments = encoder | _decoder_arguments(config, encoder, tensors)
    metadata = {MODEL_ARGUMENTS: json.dumps(arguments), NORM_EPS: json.dumps(_norm_eps(config))}
    names = _class_names(config, tensors.get("head.weight"))
    if names:
        metadata[CLASSES] = json.dumps(names, ensure_ascii=False)
    if (folder / PREPROCESSOR).is_file():
        metadata |= _pixel_statistics(_read(folder / PREPROCESSOR), encoder["in_chans"])
    return metadata


def hf_config(
    layout: str, arguments: Mapping[str, Any], *, norm_eps: float = 1e-6, classes: Sequence[str] = ()
) -> dict[str, Any]:
    """The config.json with which `from_pretrained` builds the model of `keys.from_plain`.

    Args:
        layout: "hf-vit" or "hf-vitmae".
        arguments: of `ViTEncoder`; for hf-vitmae with a decoder those of `CrossMAE`.
        norm_eps: of every LayerNorm; that of timm and ours is 1e-6.
        classes: names of the head's outputs; empty where there is no head.

    Raises:
        UserError: another layout, arguments that are missing, a decoder that is not plain MAE's, or an MAE of images
            that are not square, which transformers can not build.
    """
    if layout not in MODEL_TYPES:
        raise UserError(f"{layout}: not a layout of transformers; one of {', '.join(MODEL_TYPES)}")
    decoder = "decoder_embed_dim" in arguments and layout == "hf-vitmae"
    if decoder and arguments.get("decoder", "cross") != "self":
        raise UserError(
            "hf-vitmae holds a plain MAE, whose decoder is 'self'; of CrossMAE convert the encoder, to hf-vit"
        )
    if layout == "hf-vitmae" and len(set(_pair(arguments.get("img_size", 0)))) > 1:
        raise UserError(f"img_size {arguments['img_size']}: transformers builds an MAE for squares alone; take hf-vit")
    try:
        config = _encoder_config(arguments) | (_decoder_config(arguments) if decoder else {})
    except KeyError as missing:
        raise UserError(f"{missing.args[0]} of the model is not known, which {CONFIG} needs") from None
    kinds = {"hf-vit": ("ViTForImageClassification" if classes else "ViTModel")}
    kinds["hf-vitmae"] = "ViTMAEForPreTraining" if decoder else "ViTMAEModel"
    config |= {"model_type": MODEL_TYPES[layout], "architectures": [kinds[layout]], "layer_norm_eps": norm_eps}
    if classes:
        config["id2label"] = {str(index): name for index, name in enumerate(classes)}
        config["label2id"] = {name: index for index, name in enumerate(classes)}
    return config


def hf_preprocessor_config(arguments: Mapping[str, Any], mean: Sequence[float], std: Sequence[float]) -> dict[str, Any]:
    """The preprocessor_config.json of ViTImageProcessor: resize to the model's size, scale to 0-1, normalise.

    Args:
        arguments: of `ViTEncoder`; only `img_size` matters.
        mean, std: per channel, for pixels in 0-1.
    """
    height, width = _pair(arguments["img_size"])
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


@dataclass(frozen=True)
class _Json:
    """The object in a JSON file; values are checked as they are taken out, null counts as missing."""

    path: Path
    values: dict[str, Any]

    def get(self, key: str, default: Any) -> Any:
        value = self.values.get(key)
        return default if value is None else value

    def size(self, key: str) -> int:
        """A positive integer."""
        value = self.get(key, _DEFAULTS[key])
        if not _is_size(value):
            raise self.wrong(key, "a positive whole number")
        return value

    def sides(self, key: str) -> tuple[int, int]:
        """Height and width, given as one number or as two."""
        value = self.get(key, _DEFAULTS[key])
        sides = value if isinstance(value, list) else [value, value]
        if len(sides) != 2 or not all(_is_size(side) for side in sides):
            raise self.wrong(key, "a positive whole number, or height and width")
        return sides[0], sides[1]

    def flag(self, key: str, default: bool) -> bool:
        """True or false."""
        value = self.get(key, default)
        if not isinstance(value, bool):
            raise self.wrong(key, "true or false")
        return value

    def number(self, key: str, default: float) -> float:
        """A number above 0."""
        value = self.get(key, default)
        if not _is_number(value) or value <= 0:
            raise self.wrong(key, "a number above 0")
        return float(value)

    def wrong(self, key: str, expected: str) -> UserError:
        """What to raise for a value that is not as expected."""
        return UserError(f"{self.path}: {key} must be {expected}, got {json.dumps(self.values.get(key))[:80]}")


def _read(path: Path) -> _Json:
    try:
        if path.stat().st_size > MAX_BYTES:
            raise UserError(f"{path}: {path.stat().st_size:,} bytes are too many for a file of settings")
        values = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path}: can not be read ({error.strerror}); a transformers folder has it") from None
    except (ValueError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: not JSON, copy or download it again: {str(error)[:80]}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected a JSON object, got {type(values).__name__}")
    return _Json(path, values)


def _check_plain(config: _Json) -> None:
    """Refuse what no tensor shows and a plain ViT does not do."""
    kinds = tuple(MODEL_TYPES.values())
    if config.get("model_type", "") not in kinds:
        raise config.wrong("model_type", f"one of {', '.join(kinds)}: other models of transformers are not read")
    if config.get("hidden_act", "gelu") != "gelu":
        raise config.wrong("hidden_act", "gelu, the activation of a plain ViT")
    if not config.flag("qkv_bias", True):
        raise config.wrong("qkv_bias", "true: the attention of a plain ViT has a bias")


def _encoder_arguments(config: _Json) -> dict[str, Any]:
    height, width = config.sides("image_size")
    patch = config.sides("patch_size")
    if patch[0] != patch[1]:
        raise config.wrong("patch_size", "one number, or the same twice: patches of a plain ViT are square")
    E, heads = config.size("hidden_size"), config.size("num_attention_heads")
    _check_heads(config, "hidden_size", E, "num_attention_heads", heads)
    try:
        patch_grid((height, width), patch[0])
    except ValueError as error:
        raise UserError(f"{config.path}: {error}") from None
    return {
        "img_size": height if height == width else [height, width],
        "patch_size": patch[0],
        "in_chans": config.size("num_channels"),
        "embed_dim": E,
        "depth": config.size("num_hidden_layers"),
        "num_heads": heads,
        "mlp_ratio": mlp_ratio(E, config.size("intermediate_size")),
    }


def _decoder_arguments(config: _Json, encoder: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """{} where the tensors hold no decoder, or one that `CrossMAE` can not have."""
    if "decoder_embed.weight" not in tensors or config.get("model_type", "") != MODEL_TYPES["hf-vitmae"]:
        return {}
    D, heads = config.size("decoder_hidden_size"), config.size("decoder_num_attention_heads")
    _check_heads(config, "decoder_hidden_size", D, "decoder_num_attention_heads", heads)
    depth, hidden = config.size("decoder_num_hidden_layers"), config.size("decoder_intermediate_size")
    said = {"decoder_hidden_size": (D, _shape(tensors, "decoder_embed.weight", 0))}
    said["decoder_num_hidden_layers"] = (depth, _depth(tensors, "decoder_blocks"))
    said["decoder_intermediate_size"] = (hidden, _shape(tensors, "decoder_blocks.0.mlp.fc1.weight", 0))
    _check_said(config, said)
    if int(D * encoder["mlp_ratio"]) != hidden:
        return {}
    return {
        "decoder_embed_dim": D,
        "decoder_depth": depth,
        "decoder_num_heads": heads,
        "decoder": "self",
        "norm_pix_loss": config.flag("norm_pix_loss", False),
    }


def _check_sizes(config: _Json, encoder: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """The config's sizes against those of the tensors."""
    rows, columns = patch_grid(_pair(encoder["img_size"]), encoder["patch_size"])
    hidden = int(encoder["embed_dim"] * encoder["mlp_ratio"])
    _check_said(
        config,
        {
            "hidden_size": (encoder["embed_dim"], _shape(tensors, "patch_embed.proj.weight", 0)),
            "num_channels": (encoder["in_chans"], _shape(tensors, "patch_embed.proj.weight", 1)),
            "patch_size": (encoder["patch_size"], _shape(tensors, "patch_embed.proj.weight", 2)),
            "num_hidden_layers": (encoder["depth"], _depth(tensors, "blocks")),
            "intermediate_size": (hidden, _shape(tensors, "blocks.0.mlp.fc1.weight", 0)),
            "image_size": (1 + rows * columns, _shape(tensors, "pos_embed", 1), "rows of the position table"),
        },
    )


def _check_said(config: _Json, said: Mapping[str, tuple[Any, ...]]) -> None:
    """Values are what the config says, what the tensors have or None, and of what, where it is not the key's."""
    for key, (wanted, found, *what) in said.items():
        if found is not None and found != wanted:
            meaning = f" ({what[0]})" if what else ""
            raise UserError(f"{config.path}: {key} makes {wanted}{meaning}, but the weights beside it have {found}")


def _class_names(config: _Json, head: Tensor | None) -> list[str]:
    """The names of `id2label` by their numbers; [] without a head or without names."""
    labels = config.get("id2label", {})
    if head is None or not labels:
        return []
    named = isinstance(labels, dict) and all(isinstance(name, str) for name in labels.values())
    if not named or sorted(labels) != sorted(str(index) for index in range(len(labels))):
        raise config.wrong("id2label", "a name for each of the numbers from 0 on")
    if head.ndim == 0 or len(labels) != head.shape[0]:
        raise UserError(f"{config.path}: id2label has {len(labels)} names, classifier.weight is {tuple(head.shape)}")
    return [labels[str(index)] for index in range(len(labels))]


def _pixel_statistics(config: _Json, channels: int) -> dict[str, str]:
    """Mean and deviation for pixels in 0-1, whichever scale the file's are for."""
    if not config.flag("do_normalize", True):
        mean, std = [0.0] * channels, [1.0] * channels
    else:
        mean = _statistics(config, "image_mean", channels)
        std = _statistics(config, "image_std", channels)
    if not all(value > 0 for value in std):
        raise config.wrong("image_std", "above 0")
    factor = config.number("rescale_factor", 1 / 255) if config.flag("do_rescale", True) else 1.0
    if not math.isclose(255 * factor, 1):
        mean, std = ([value / (255 * factor) for value in values] for values in (mean, std))
    return {PIXEL_MEAN: json.dumps(mean), PIXEL_STD: json.dumps(std)}


def _statistics(config: _Json, key: str, channels: int) -> list[float]:
    values = config.get(key, [_DEFAULT_STATISTIC] * channels)
    if not isinstance(values, list) or len(values) != channels or not all(_is_number(value) for value in values):
        raise config.wrong(key, f"a list of {channels} numbers, one for each channel")
    return [float(value) for value in values]


def _norm_eps(config: _Json) -> float:
    return config.number("layer_norm_eps", _DEFAULT_NORM_EPS)


def _encoder_config(arguments: Mapping[str, Any]) -> dict[str, Any]:
    height, width = _pair(arguments["img_size"])
    return {
        "image_size": height if height == width else [height, width],
        "patch_size": arguments["patch_size"],
        "num_channels": arguments["in_chans"],
        "hidden_size": arguments["embed_dim"],
        "num_hidden_layers": arguments["depth"],
        "num_attention_heads": arguments["num_heads"],
        "intermediate_size": int(arguments["embed_dim"] * arguments["mlp_ratio"]),
        "hidden_act": "gelu",
        "qkv_bias": True,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }


def _decoder_config(arguments: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "decoder_hidden_size": arguments["decoder_embed_dim"],
        "decoder_num_hidden_layers": arguments["decoder_depth"],
        "decoder_num_attention_heads": arguments["decoder_num_heads"],
        "decoder_intermediate_size": int(arguments["decoder_embed_dim"] * arguments["mlp_ratio"]),
        "norm_pix_loss": arguments["norm_pix_loss"],
    }


def _check_heads(config: _Json, width_key: str, width: int, heads_key: str, heads: int) -> None:
    if width % heads:
        raise UserError(f"{config.path}: {width_key} {width} can not be split over {heads_key} {heads}")


def mlp_ratio(width: int, hidden: int) -> float:
    """The ratio of which timm and we make `hidden` again, int(width * ratio): a quotient may come out just below."""
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else math.nextafter(ratio, math.inf)


def _shape(tensors: Mapping[str, Tensor], name: str, axis: int) -> int | None:
    tensor = tensors.get(name)
    return tensor.shape[axis] if tensor is not None and tensor.ndim > axis else None


def _depth(tensors: Mapping[str, Tensor], stack: str) -> int:
    return len({found[1] for name in tensors if (found := re.match(rf"{stack}\.(\d+)\.", name))})


def _pair(size: Any) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < _LARGE


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < _LARGE
