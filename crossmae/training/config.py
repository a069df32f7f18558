"""Typed experiment configs: one YAML file, `key=value` overrides, everything checked before any data is touched.

pydantic does the checking: unknown keys, wrong types and values out of range are all reported together, by key.
"""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

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
from crossmae.models.sizes import DECODERS, Decoder, model_arguments

CONFIG_ROOT = Path(__file__).resolve().parents[2] / "configs"

Ratio = Annotated[float, Field(gt=0, lt=1)]
Share = Annotated[float, Field(ge=0, le=1)]
NonNegative = Annotated[float, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]


class Section(BaseModel):
    """Base of all sections: no unknown keys, no change after the check."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=(), coerce_numbers_to_str=True
    )

    @field_validator("*", mode="before")
    @classmethod
    def _truth_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        # pydantic would read true as 1.
        if isinstance(value, bool) and cls.model_fields[info.field_name or ""].annotation is not bool:
            raise ValueError("input should not be true or false")
        return value


class DataConfig(Section):
    """Where images come from, how they are read, and how they are cropped."""

    train: str = Field(
        description="training images: a folder tree, a .txt/.csv/.parquet list, a COCO .json, tar shards (path, "
        "pattern or URL), or a Hugging Face data set on disk"
    )
    root: Path | None = Field(
        None, description="where the relative paths of a list or a COCO json start; default: the file's own folder"
    )
    val: str | None = Field(None, description="held-out images, from any such source: validation loss and pictures")
    val_root: Path | None = Field(None, description="root for data.val")
    check: bool = Field(True, description="look at every file first; false for millions of known good ones")
    broken: Literal["error", "substitute"] = Field(
        "error", description="an image that can not be read stops the run, or the next readable one takes its place"
    )
    broken_budget: Share = Field(0.01, description="substitute: share of broken images that stops the run after all")
    bit_depth: Literal[8, 16] = Field(8, description="16 keeps 16-bit and floating-point images as they are")
    shuffle_shards: PositiveInt | None = Field(
        None, description="shuffle among so many tar shards at a time, for slow storage; null: among all images"
    )
    workers: int = Field(4, ge=0, description="processes that read images; 0 reads in the training process")
    crop_scale: tuple[Share, Share] = Field((0.2, 1.0), description="area of the random crop, as shares of the image")
    flip: Share = Field(0.5, description="probability of a horizontal flip")
    mean: tuple[float, ...] = Field((0.485, 0.456, 0.406), description="per channel, of pixels scaled to 0-1, RGB")
    std: tuple[Positive, ...] = Field((0.229, 0.224, 0.225), description="per channel, of pixels scaled to 0-1, RGB")

    @model_validator(mode="after")
    def _consistent(self) -> DataConfig:
        if not 0 < self.crop_scale[0] <= self.crop_scale[1]:
            raise ValueError(f"crop_scale must be two shares, 0 < low <= high, got {self.crop_scale}")
        return self


class ModelConfig(Section):
    """A named size, what differs from it, the masking, and the weights to start from."""

    name: str = Field(description="a name of crossmae.list_models()")
    img_size: PositiveInt | tuple[PositiveInt, PositiveInt] = Field(
        224, description="pixels; one side or (height, width)"
    )
    patch_size: PositiveInt | None = None
    in_chans: PositiveInt = Field(3, description="image channels: 1 grey, 3 RGB, others from multi-channel TIFF files")
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
    init: Path | None = Field(None, description="weights to start from: a whole model or an encoder; null: random ones")

    @field_validator("name")
    @classmethod
    def _known(cls, name: str) -> str:
        model_arguments(name)
        return name

    def arguments(self) -> dict[str, Any]:
        """Everything that `create_model` takes besides the name; None is the size's own value."""
        others = {"name", "mask_ratio", "predict_ratio", "init"}
        return {key: value for key, value in self if key not in others and (value is not None or key == "fuse_blocks")}


class StepConfig(Section):
    """AdamW, the size of a step, and the averaged copy of the weights."""

    batch_size: PositiveInt = Field(64, description="images per process and micro-batch")
    accumulate: PositiveInt = Field(1, description="micro-batches per optimizer step")
    base_lr: Positive = Field(1.5e-4, description="learning rate per 256 images of a step, all processes counted")
    lr: Positive | None = Field(None, description="learning rate itself, instead of base_lr * images / 256")
    weight_decay: NonNegative = 0.05
    betas: tuple[Ratio, Ratio] = (0.9, 0.95)
    clip_grad: Positive | None = Field(None, description="largest gradient norm; null: no clipping")
    ema: Ratio | None = Field(None, description="decay per step of the averaged weights, approached from 0; null: none")


class OptimConfig(StepConfig):
    """What `StepConfig` says, and the published rule for the learning rate."""

    lr_rule: Literal["published", "none", "inverse"] = Field(
        "published", description="factor on base_lr * images / 256: predict/mask ratio, 1, or mask/predict ratio"
    )


class ScheduleConfig(Section):
    """How long, and the learning rate over time: linear warm-up, then half a cosine."""

    epochs: PositiveInt = 800
    warmup_epochs: NonNegative = 40
    min_lr: NonNegative = 0.0
    max_steps: PositiveInt | None = Field(
        None, description="stop after so many optimizer steps; the schedule stays as it is"
    )


class RuntimeConfig(Section):
    """Device, precision, speed against memory, randomness."""

    device: str = Field("auto", description="auto, cpu, cuda or cuda:N")
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "auto", description="auto: bf16 autocast on GPUs that have it; fp16 comes with a loss scaler"
    )
    compile: bool = Field(False, description="torch.compile: a slow first step, faster ones after it")
    activation_checkpointing: bool = Field(False, description="compute blocks twice instead of keeping what they made")
    seed: int = Field(0, ge=0)


class LogConfig(Section):
    """What is written while training."""

    every_steps: PositiveInt = Field(20, description="steps between two lines of log.jsonl")
    wandb: str | None = Field(None, description="project of Weights & Biases to log to as well; null: none")


class PretrainLogConfig(LogConfig):
    """What `LogConfig` says, and pictures."""

    pictures_every_steps: PositiveInt = Field(
        1000, description="steps between two pictures of reconstructions and of the fusion weights"
    )
    pictures: int = Field(8, ge=0, le=64, description="images in a picture of reconstructions; 0: no pictures")


class ValidationConfig(Section):
    """Reconstruction loss of data.val: all masked patches of fixed crops, with fixed masks."""

    every_epochs: PositiveInt = 10
    images: PositiveInt = Field(2048, description="at most so many images, evenly spaced")


class ProbeConfig(Section):
    """Accuracy of k nearest neighbours on the encoder's pooled features while it trains."""

    train: str | None = Field(None, description="labelled images to look neighbours up in; null: no probe")
    val: str | None = Field(None, description="labelled images to classify")
    every_epochs: PositiveInt = 10
    images: PositiveInt = Field(4000, description="at most so many images of each, evenly spaced")
    k: PositiveInt = Field(20, description="neighbours")
    temperature: Positive = Field(0.07, description="of their weights, exp(similarity / temperature)")
    pool: Literal["avg", "cls"] = Field("avg", description="mean of the patch tokens, or the class token")

    @model_validator(mode="after")
    def _both(self) -> ProbeConfig:
        if (self.train is None) != (self.val is None):
            raise ValueError("the probe needs both, probe.train and probe.val")
        return self


class HealthConfig(Section):
    """The losses that this recipe is expected to show; leaving them is a warning, never a stop."""

    measured_on: str = Field("", description="data and machine that the band was measured on")
    band: tuple[tuple[Share, NonNegative, NonNegative], ...] = Field(
        (), description="rows of [share of the schedule, lowest, highest expected loss]"
    )

    @field_validator("band")
    @classmethod
    def _rising(cls, band: tuple[tuple[float, float, float], ...]) -> tuple[tuple[float, float, float], ...]:
        shares = [share for share, _, _ in band]
        if shares != sorted(set(shares)) or any(low > high for _, low, high in band):
            raise ValueError("rows must be [share, low, high] with rising shares and low <= high")
        return band

    @model_validator(mode="after")
    def _named(self) -> HealthConfig:
        if self.band and not self.measured_on:
            raise ValueError("a band needs measured_on, what it was measured on")
        return self


class CheckpointConfig(Section):
    """When the state is saved, and how much of it is kept."""

    every_epochs: PositiveInt = 20
    every_steps: PositiveInt | None = Field(None, description="and after so many steps, where epochs are long")
    keep: int = Field(2, ge=1, description="checkpoints kept; older ones are deleted after a newer one is complete")


class RunConfig(Section):
    """What every kind of training run depends on."""

    output_dir: Path = Field(description="folder of the run: logs, pictures, checkpoints, weights")
    data: DataConfig
    model: Section
    optim: StepConfig = StepConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    runtime: RuntimeConfig = RuntimeConfig()
    log: LogConfig = LogConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()

    @field_validator("output_dir")
    @classmethod
    def _expand(cls, path: Path) -> Path:
        return path.expanduser()

    def check_channels(self, channels: int) -> None:
        """Make sure that there is one mean and one deviation per image channel.

        Raises:
            ValueError: there is not.
        """
        for key in ("mean", "std"):
            values = getattr(self.data, key)
            if len(values) != channels:
                raise ValueError(
                    f"data.{key} has {len(values)} values for model.in_chans {channels}; tools/dataset_stats.py "
                    "measures them"
                )


class PretrainConfig(RunConfig):
    """Everything that a pretraining run depends on."""

    model: ModelConfig
    optim: OptimConfig = OptimConfig()
    log: PretrainLogConfig = PretrainLogConfig()
    validation: ValidationConfig = ValidationConfig()
    probe: ProbeConfig = ProbeConfig()
    health: HealthConfig = HealthConfig()

    @model_validator(mode="after")
    def _channels(self) -> PretrainConfig:
        self.check_channels(self.model.in_chans)
        return self


Schema = TypeVar("Schema", bound=Section)


def resolve_config_path(name: str) -> Path:
    """Find a config by path, by the folder of the run that wrote it, or by its name under configs/.

    Raises:
        UserError: nothing found; the message lists the configs that exist.
    """
    candidates = [
        Path(name),
        Path(name) / "config.yaml",
        CONFIG_ROOT.parent / name,
        CONFIG_ROOT / name,
        CONFIG_ROOT / f"{name}.yaml",
        *(CONFIG_ROOT / folder / name for folder in ("pretrain", "finetune")),
    ]
    for path in candidates:
        if path.is_file():
            return path
    known = sorted(str(path.relative_to(CONFIG_ROOT)) for path in CONFIG_ROOT.rglob("*.yaml"))
    raise UserError(f"--config-file {name}: no such file here or in configs/; configs/ has {', '.join(known)}")


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """`--config-file NAME [section.key=value ...]`, the convention of every tool that takes such a config."""
    parser.add_argument("--config-file", required=True, metavar="NAME", help="a YAML file, or its name under configs/")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="replace values of the file")


def load_config(name: str, overrides: Sequence[str] = ()) -> PretrainConfig:
    """Read a pretraining config; see `load_typed_config`."""
    return load_typed_config(PretrainConfig, name, overrides)


def load_typed_config(schema: type[Schema], name: str, overrides: Sequence[str] = ()) -> Schema:
    """Read a config of any kind.

    Args:
        schema: what it must be.
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
        return schema.model_validate(values)
    except ValidationError as error:
        words = {word.partition("=")[0] for word in overrides}
        raise UserError(describe_errors(error, path, words, schema)) from None


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
    if not text.strip():
        raise UserError(f"{word}: no value; for none at all write {key}=null")
    try:
        values[last] = yaml.safe_load(text)
    except yaml.YAMLError:
        raise UserError(f"{word}: the value is not valid YAML") from None


def describe_errors(error: ValidationError, path: Path, words: set[str], schema: type[Section]) -> str:
    """All problems of a config in one line, each with its key, what was given and what is expected.

    Args:
        error: what the check found.
        path: of the file.
        words: keys that were given on the command line, which is blamed for them instead of the file.
        schema: what it was checked against, whose keys are suggested for unknown ones.
    """
    problems: dict[str, list[str]] = {"command line": []}
    for item in error.errors(include_url=False):
        location = [
            part for part in item["loc"] if isinstance(part, str) and not part.startswith(("tuple[", "constrained"))
        ]
        key = ".".join(location)
        typed = key in words or ("." in key and any(word.startswith(f"{key}.") for word in words))
        of_section = "." not in key and any(word.startswith(f"{key}.") for word in words)
        place = "command line" if typed else f"command line and {path}" if of_section else str(path)
        found = problems.setdefault(place, [])
        if item["type"] == "extra_forbidden":
            found.append(f"unknown key {key!r}{_suggestion(location, schema)}")
        elif item["type"] == "missing":
            found.append(f"missing key {key!r}: add it to the file or pass {key}=...")
        else:
            message = item["msg"].removeprefix("Value error, ")
            message = message[0].lower() + message[1:]
            given = "" if isinstance(item["input"], dict | BaseModel) else f", got {item['input']!r}"
            found.append(f"{key}: {message}{given}" if key else message)
    return "; ".join(f"{place}: {'; '.join(dict.fromkeys(found))}" for place, found in problems.items() if found)


def _suggestion(location: list[str], schema: type[Section]) -> str:
    section: type[BaseModel] = schema
    for part in location[:-1]:
        annotation = section.model_fields[part].annotation if part in section.model_fields else None
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return ""
        section = annotation
    sections = [name for name, field in schema.model_fields.items() if location[-1] in _fields(field.annotation)]
    if len(location) == 1 and sections:
        return f" (did you mean {sections[0] + '.' + location[-1]!r}?)"
    known = list(section.model_fields)
    near = difflib.get_close_matches(location[-1], known, n=1)
    return f" (did you mean {'.'.join([*location[:-1], near[0]])!r}?)" if near else f" (known: {', '.join(known)})"


def _fields(annotation: Any) -> Iterable[str]:
    return annotation.model_fields if isinstance(annotation, type) and issubclass(annotation, BaseModel) else ()
