"""Metadata of weight files: its keys, the recorded model arguments, and a digest of all tensors.

safetensors, plain pickles and old torch files have no checksum, so the metadata have one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import safe_open

from crossmae.errors import UserError
from crossmae.files import load_json

if TYPE_CHECKING:
    from torch import Tensor

# Keys of the metadata in safetensors files of this toolkit. All values are strings.
FORMAT = "format"  # "crossmae": a pretraining model of this toolkit; "detectron2": a converted encoder
MODEL_ARGUMENTS = "model"  # JSON: CrossMAE(**arguments)
BIT_DEPTH = "bit_depth"  # bits per channel of the training images, 8 or 16
PIXEL_MEAN, PIXEL_STD = "pixel_mean", "pixel_std"  # JSON lists, RGB, for pixels scaled to 0 .. 1
NORM_EPS = "norm_eps"  # epsilon of the layer norms, recorded where it differs from NORM_EPS_OF_PLAIN
ACTIVATION = "activation"  # "gelu", the only one of this toolkit; recorded where --set gave it
NORM_EPS_OF_PLAIN = 1e-6  # epsilon in timm, the published files, detectron2's ViTDet and this toolkit
CLASSES = "classes"  # JSON list of names, in the order of the head's outputs
VERSION, STEP = "version", "step"
DETECTOR_CONFIG = "config"  # JSON: config of a detector, without paths
TRAINING_SIZE = "training_size"  # JSON: median height and width of a detector's training images, in pixels
TRAINING = "training"  # JSON: data, recipe and figures of the run, see `formats.training_record`
STARTED_FROM = "started_from"  # name of the file or folder of the initial weights, or RANDOM_WEIGHTS
RANDOM_WEIGHTS = "random weights"
UNKNOWN = "unknown"  # value in a converted file whose source did not record the value
# Key of the metadata in .pth and .pkl files of this toolkit, next to the tensors.
PICKLED_METADATA = "crossmae_metadata"
# Key of the settings in a published file's `args` namespace, as JSON.
PUBLISHED_ARGUMENTS = "published_args"
TRAINER_SETTINGS = "trainer_settings"  # JSON: settings of the model in another trainer's file, see `reading.settings`
ASSUMED = "assumed"  # JSON list of facts whose recorded value was assumed when the file was written
DIGEST = "digest"  # key of the digest in the metadata
MOST_NUMBER = 1e30  # larger numbers, infinity and NaN describe no pixels
T = TypeVar("T")
_KIND = "sha256:"  # prefix of the digest; no other value in our metadata has this prefix


_Count = Annotated[int, Field(ge=1, le=1000, strict=True)]
_Width = Annotated[int, Field(ge=1, le=1 << 17, strict=True)]
_Ratio = Annotated[float, Field(gt=0, le=1000)]


class _ModelRecord(BaseModel):
    """Kinds and ranges of recorded arguments. Sizes without bounds would ask for any amount of memory."""

    model_config = ConfigDict(extra="ignore", allow_inf_nan=False)

    img_size: _Width | tuple[_Width, _Width] = 1
    patch_size: _Count = 1
    in_chans: _Width = 1
    embed_dim: _Width = 1
    depth: _Count = 1
    num_heads: _Width = 1
    mlp_ratio: _Ratio = 1.0
    decoder_embed_dim: _Width = 1
    decoder_depth: _Count = 1
    decoder_num_heads: _Width = 1
    decoder: str = ""
    fuse_blocks: list[int] | None = None
    fuse_input: bool = False
    norm_pix_loss: bool = False
    mask_block: _Width = 1
    class_tokens: Annotated[int, Field(ge=0, le=1000, strict=True)] = 1


def recorded_arguments(metadata: Mapping[str, str]) -> dict[str, Any]:
    """Return the recorded constructor arguments of `CrossMAE`, {} without a record.

    Raises UserError if the record is not a JSON object, or a size is out of range.
    """
    arguments = recorded_value(metadata, MODEL_ARGUMENTS, dict)
    try:
        _ModelRecord.model_validate(arguments)
    except ValidationError as error:
        key = error.errors()[0]["loc"][0]
        raise UserError(
            f"metadata {MODEL_ARGUMENTS!r} of a weight file: {key} {str(arguments[str(key)])[:80]} is out of range. "
            "Copy the file again."
        ) from None
    return arguments


def assumed_names(metadata: Mapping[str, str]) -> frozenset[str]:
    """Return the names of the facts that the file marks as assumed.

    Raises UserError if the mark is not a JSON list of names.
    """
    return frozenset(recorded_names(metadata, ASSUMED))


def recorded_value(metadata: Mapping[str, str], key: str, kind: type[T], expected: str = "") -> T:
    """Parse a JSON value of the metadata, empty without a record.

    Raises UserError if the value is not JSON of this kind. The message calls it `expected`, if given.
    """
    if (text := metadata.get(key, UNKNOWN)) == UNKNOWN:
        return kind()
    with suppress(ValueError):
        if isinstance(value := load_json(text), kind):
            return value
    raise _unlike(key, text, expected or ("object" if kind is dict else kind.__name__))


def recorded_names(metadata: Mapping[str, str], key: str) -> list[str]:
    """Parse a JSON list of names, [] without a record.

    Raises UserError if the value is anything else.
    """
    names = recorded_value(metadata, key, list, kind := "list of names")
    if not all(isinstance(name, str) for name in names):
        raise _unlike(key, metadata[key], kind)
    return names


def recorded_numbers(metadata: Mapping[str, str], key: str) -> list[float]:
    """Parse a JSON list of finite numbers, [] without a record.

    Raises UserError if the value is anything else.
    """
    numbers = recorded_value(metadata, key, list, kind := "list of finite numbers")
    if not all(type(number) in (int, float) and abs(number) < MOST_NUMBER for number in numbers):
        raise _unlike(key, metadata[key], kind)
    return numbers


def recorded_bit_depth(metadata: Mapping[str, str]) -> int:
    """Parse the bits per channel, 8 without a record.

    Raises UserError if the value is neither 8 nor 16.
    """
    depth = recorded_value(metadata, BIT_DEPTH, int, kind := "number, 8 or 16") or 8
    if depth not in (8, 16):
        raise _unlike(BIT_DEPTH, metadata[BIT_DEPTH], kind)
    return depth


def _unlike(key: str, text: str, expected: str) -> UserError:
    return UserError(f"metadata {key!r} of a weight file: {text[:80]!r} is not a JSON {expected}. Copy the file again.")


def marked(names: Iterable[str]) -> dict[str, str]:
    """Build the metadata that mark facts as assumed."""
    return {ASSUMED: json.dumps(sorted(names))}


def recorded_config(metadata: Mapping[str, str]) -> dict[str, Any]:
    """Read the config of a detector by dotted key, {} without one.

    Raises UserError if the record is not a JSON object.
    """
    return recorded_value(metadata, DETECTOR_CONFIG, dict)


def safetensors_metadata(path: Path) -> dict[str, str]:
    """Read the metadata of a safetensors file, {} for any other file.

    Nothing is checked, because whoever reads the tensors checks the digest. torch is not imported.
    """
    try:
        with safe_open(path, "np") as file:
            return file.metadata() or {}
    except MemoryError:
        raise
    except Exception:  # `reading.files` explains files that cannot be read
        return {}


def digest(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """Compute SHA-256 over names, types, shapes, values and metadata without the digest."""
    import torch  # slow import

    names = sorted(tensors)
    described = [[name, str(tensors[name].dtype), list(tensors[name].shape)] for name in names]
    rest = sorted((key, value) for key, value in metadata.items() if key != DIGEST)
    found = hashlib.sha256(json.dumps([described, rest]).encode())
    for name in names:
        values = tensors[name].detach().cpu().contiguous().reshape(-1)  # copies only tensors that are not contiguous
        found.update(values.view(torch.uint8).numpy().data)
    return _KIND + found.hexdigest()


def signed(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, str]:
    """Compute the digest of the tensors, and add it to the metadata."""
    return {**metadata, DIGEST: digest(tensors, metadata)}


def check_digest(tensors: Mapping[str, Tensor], metadata: Mapping[str, str], path: Path) -> dict[str, str]:
    """Return the metadata without the digest, after comparing the digest.

    Raises UserError if the recorded digest differs from the digest of the tensors. Without a recorded digest, nothing
    is compared.
    """
    recorded = {key: value for key, value in metadata.items() if key == DIGEST or value.startswith(_KIND)}
    rest = {key: value for key, value in metadata.items() if key not in recorded}
    if recorded:
        found = digest(tensors, rest)
        if recorded != {DIGEST: found}:  # under another key, the key itself was damaged
            raise UserError(
                f"{path}: changed or damaged (recorded {min(recorded.values())[:23]}..., found {found[:23]}...). "
                f"Copy or download it again, or after a change on purpose remove {DIGEST!r} from its metadata."
            )
    return rest
