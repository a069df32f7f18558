"""Typed experiment configs: one YAML file, `key=value` overrides, everything checked before any data is touched.

pydantic does the checking: unknown keys, wrong types and values out of range are all reported together, by key.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PositiveInt,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from crossmae.errors import UserError
from crossmae.model import DECODERS, Decoder
from crossmae.variants import model_arguments

CONFIG_ROOT = Path(__file__).resolve().parents[1] / "configs"

Ratio = Annotated[float, Field(gt=0, lt=1)]
Share = Annotated[float, Field(ge=0, le=1)]
NonNegative = Annotated[float, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]


class Section(BaseModel):
    """Base of all sections: no unknown keys, no change after the check."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())

    @field_validator("*", mode="before")
    @classmethod
    def _truth_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        # pydantic would read true as 1.
        if isinstance(value, bool) and cls.model_fields[info.field_name or ""].annotation is not bool:
            raise ValueError("input should not be true or false")
        return value


class DataConfig(Section):
    """Where images come from and how they are cropped."""

    train: Path = Field(description="folder of training images, searched with all its subfolders")
    val: Path | None = Field(
        None, description="folder of held-out images for the reconstructions; default: training images"
    )
    check: bool = Field(True, description="look at every file first; false for millions of known good ones")
    workers: int = Field(4, ge=0, description="processes that read images; 0 reads in the training process")
    crop_scale: tuple[Share, Share] = Field((0.2, 1.0), description="area of the random crop, as shares of the image")
    flip: Share = Field(0.5, description="probability of a horizontal flip")
    mean: tuple[float, ...] = Field((0.485, 0.456, 0.406), description="per channel, of pixels scaled to 0-1, RGB")
    std: tuple[Positive, ...] = Field((0.229, 0.224, 0.225), description="per channel, of pixels scaled to 0-1, RGB")

    @model_validator(mode="after")
    def _consistent(self) -> DataConfig:
        if not 0 < self.crop_scale[0] <= self.crop_scale[1]:
            raise ValueError(f"crop_scale must be two shares, 0 < low <= high, got {self.crop_scale}")
        if len(self.mean) != 3 or len(self.std) != 3:
            raise ValueError("mean and std need three values each, for red, green and blue")
        return self


class ModelConfig(Section):
    """A named size, what differs from it, and the masking."""

    name: str = Field(description="a name of crossmae.list_models()")
    img_size: PositiveInt | tuple[PositiveInt, PositiveInt] = Field(
        224, description="pixels; one side or (height, width)"
    )
    patch_size: PositiveInt | None = None
    embed_dim: PositiveInt | None = None
    depth: PositiveInt | None = None
    num_heads: PositiveInt | None = None
    decoder_embed_dim: PositiveInt | None = None
    decoder_depth: PositiveInt | None = None
    decoder_num_heads: PositiveInt | None = None
    mlp_ratio: Positive | None = None
    decoder: Decoder | None = Field(None, description=f"one of {', '.join(DECODERS)}; default: the size's own")
    fuse_blocks: tuple[int, ...] | None = Field(None, description="encoder blocks to mix; null: all, []: no fusion")
    fuse_input: bool = Field(True, description="mix the encoder's input, too")
    norm_pix_loss: bool = Field(True, description="standardise each target patch")
    mask_ratio: Ratio = Field(0.75, description="share of all patches that the encoder does not see")
    predict_ratio: Ratio = Field(0.25, description="share of all patches that is decoded")

    @field_validator("name")
    @classmethod
    def _known(cls, name: str) -> str:
        model_arguments(name)
        return name

    def arguments(self) -> dict[str, Any]:
        """Everything that `create_model` takes besides the name; None is the size's own value."""
        masking = {"name", "mask_ratio", "predict_ratio"}
        return {key: value for key, value in self if key not in masking and (value is not None or key == "fuse_blocks")}


class OptimConfig(Section):
    """AdamW and the size of a step."""

    batch_size: PositiveInt = Field(64, description="images per process and micro-batch")
    accumulate: PositiveInt = Field(1, description="micro-batches per optimizer step")
    base_lr: Positive = Field(1.5e-4, description="learning rate per 256 images of a step")
    lr: Positive | None = Field(None, description="learning rate itself, instead of base_lr and lr_rule")
    lr_rule: Literal["published", "none", "inverse"] = Field(
        "published", description="factor on the lr: predict/mask ratio, 1, or mask/predict ratio"
    )
    weight_decay: NonNegative = 0.05
    betas: tuple[Ratio, Ratio] = (0.9, 0.95)
    clip_grad: Positive | None = Field(None, description="largest gradient norm; null: no clipping")


class ScheduleConfig(Section):
    """How long, and the learning rate over time: linear warm-up, then half a cosine."""

    epochs: PositiveInt = 800
    warmup_epochs: NonNegative = 40
    min_lr: NonNegative = 0.0
    max_steps: PositiveInt | None = Field(
        None, description="stop after so many optimizer steps; the schedule stays as it is"
    )


class RuntimeConfig(Section):
    """Device, precision, randomness."""

    device: str = Field("auto", description="auto, cpu, cuda or cuda:N")
    precision: Literal["auto", "fp32", "bf16"] = Field("auto", description="auto: bf16 autocast on GPUs that have it")
    seed: int = Field(0, ge=0)


class LogConfig(Section):
    """What is written while training."""

    every_steps: PositiveInt = Field(20, description="steps between two lines of log.jsonl")
    reconstruct_every_epochs: PositiveInt = Field(20, description="epochs between two pictures of reconstructions")
    reconstruct_images: int = Field(8, ge=0, le=64, description="images in such a picture; 0: none")


class CheckpointConfig(Section):
    """When the state is saved, and how much of it is kept."""

    every_epochs: PositiveInt = 20
    keep: int = Field(2, ge=1, description="checkpoints kept; older ones are deleted after a newer one is complete")


class PretrainConfig(Section):
    """Everything that a pretraining run depends on."""

    output_dir: Path = Field(description="folder of the run: logs, pictures, checkpoints, weights")
    data: DataConfig
    model: ModelConfig
    optim: OptimConfig = OptimConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    runtime: RuntimeConfig = RuntimeConfig()
    log: LogConfig = LogConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()

    @field_validator("output_dir")
    @classmethod
    def _expand(cls, path: Path) -> Path:
        return path.expanduser()


def resolve_config_path(name: str) -> Path:
    """Find a config by path, or by its name under configs/, with or without `.yaml`.

    Raises:
        UserError: nothing found; the message lists the configs that exist.
    """
    candidates = [
        Path(name),
        CONFIG_ROOT.parent / name,
        CONFIG_ROOT / name,
        CONFIG_ROOT / f"{name}.yaml",
        CONFIG_ROOT / "pretrain" / name,
    ]
    for path in candidates:
        if path.is_file():
            return path
    known = sorted(str(path.relative_to(CONFIG_ROOT)) for path in CONFIG_ROOT.rglob("*.yaml"))
    raise UserError(f"--config-file {name}: no such file here or in configs/; configs/ has {', '.join(known)}")


def load_config(name: str, overrides: Sequence[str] = ()) -> PretrainConfig:
    """Read a pretraining config.

    Args:
        name: a path, or a name under configs/.
        overrides: `section.key=value` words; values are YAML.

    Raises:
        UserError: no such file, not YAML, unknown keys, wrong types, values out of range; names file and keys.
    """
    path = resolve_config_path(name)
    values = read_yaml(path)
    for word in overrides:
        set_override(values, word)
    try:
        return PretrainConfig.model_validate(values)
    except ValidationError as error:
        raise UserError(describe_errors(error, path, values)) from None


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML mapping with the safe loader.

    Raises:
        UserError: not YAML, or not a mapping; names file and line.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected sections with keys (data:, model:, ...), got {type(values).__name__}")
    return values


def set_override(values: dict[str, Any], word: str) -> None:
    """Apply one `section.key=value` word to nested `values`.

    Raises:
        UserError: no `=`, or the path leads through something that is not a section.
    """
    key, separator, text = word.partition("=")
    if not separator or not key:
        raise UserError(f"expected key=value, got {word!r} (for example optim.batch_size=32)")
    *sections, last = key.split(".")
    for section in sections:
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            raise UserError(f"{word}: {section!r} is not a section")
    try:
        values[last] = yaml.safe_load(text)
    except yaml.YAMLError:
        raise UserError(f"{word}: the value is not valid YAML") from None


def describe_errors(error: ValidationError, path: Path, values: dict[str, Any]) -> str:
    """All problems of a config in one line, each with its key, what was given and what is expected."""
    problems = []
    for item in error.errors(include_url=False):
        location = [
            part for part in item["loc"] if isinstance(part, str) and not part.startswith(("tuple[", "constrained"))
        ]
        key = ".".join(location)
        if item["type"] == "extra_forbidden":
            problems.append(f"unknown key {key!r}{_suggestion(location)}")
        elif item["type"] == "missing":
            problems.append(f"missing key {key!r}: add it to the file or pass {key}=...")
        else:
            message = item["msg"].removeprefix("Value error, ")
            message = message[0].lower() + message[1:]
            given = "" if isinstance(item["input"], dict | BaseModel) else f", got {item['input']!r}"
            problems.append(f"{key}: {message}{given}" if key else message)
    return f"{path}: {'; '.join(dict.fromkeys(problems))}"


def _suggestion(location: list[str]) -> str:
    section: type[BaseModel] = PretrainConfig
    for part in location[:-1]:
        annotation = section.model_fields[part].annotation if part in section.model_fields else None
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return ""
        section = annotation
    known = list(section.model_fields)
    near = difflib.get_close_matches(location[-1], known, n=1)
    return f" (did you mean {near[0]!r}?)" if near else f" (known: {', '.join(known)})"
