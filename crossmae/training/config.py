"""Typed experiment configs: one YAML file and `key=value` overrides, checked before any data is read.

pydantic checks the values. Unknown keys, wrong types and values out of range are all reported together, by key.
"""

from __future__ import annotations

import argparse
import difflib
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar, get_args

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

from crossmae.data.images import MAX_PIXELS, ImageLimits
from crossmae.errors import PROGRAMS, UserError, counted, shorten
from crossmae.files import decode_text, load_yaml, read_file, why_unexpanded

CONFIG_ROOT = PROGRAMS / "configs"

# Config sections, and keys of the data section, that may change when a run is resumed.
NOT_DECISIVE = {"output_dir", "log", "validation", "probe", "health", "evaluation", "checkpoint"}
NOT_DECISIVE_DATA = {
    "train",
    "root",
    "val",
    "val_root",
    "check",
    "broken_budget",
    "workers",
    "class_names",
    "max_pixels",
}

# Tools, with a config of each, and the sections and keys that only their configs have. Keys of detection are in upper
# case.
PRETRAIN, FINETUNE, PROBE, DETECT = "tools/pretrain.py", "tools/finetune.py", "tools/probe.py", "tools/train_net.py"
EXAMPLES = {
    PRETRAIN: "pretrain/small.yaml",
    FINETUNE: "finetune/small.yaml",
    PROBE: "probe.yaml",
    DETECT: "small_mask_rcnn.yaml",
}
KEYS_OF_ONE_TOOL = {
    PRETRAIN: """health probe validation data.crop_on log.pictures log.pictures_every_steps model.class_tokens
        model.decoder model.decoder_depth model.decoder_embed_dim model.decoder_num_heads model.fuse_blocks
        model.fuse_input model.mask_block model.mask_ratio model.norm_pix_loss model.predict_ratio optim.lr_rule""",
    FINETUNE: """evaluation loss data.auto_augment data.class_names data.color_jitter data.erase data.erase_count
        data.erase_mode data.per_class model.drop_path model.freeze model.head model.pool optim.layer_decay""",
    PROBE: "features few_shot knn linear logistic methods weights data.crop_pct",
}

MOST_SHOWN = 200  # characters of a value in an error message

Ratio = Annotated[float, Field(gt=0, lt=1)]
Share = Annotated[float, Field(ge=0, le=1)]
NonNegative = Annotated[float, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]


class ConfigSection(BaseModel):
    """Base of all sections. Unknown keys are errors, and values cannot change after the check.

    Attributes:
        tool: the tool that reads such configs, for a whole config.
    """

    tool: ClassVar[str] = ""

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=(), coerce_numbers_to_str=True
    )

    @field_validator("*", mode="before")
    @classmethod
    def _expanded(cls, value: Any, info: ValidationInfo) -> Any:
        annotation = cls.model_fields[info.field_name or ""].annotation
        if not isinstance(value, str) or Path not in (annotation, *get_args(annotation)):
            return value
        if not value.strip():
            raise ValueError("an empty path. Name a file or folder")
        if why := why_unexpanded(value):
            raise ValueError(why.rstrip("."))
        return Path(os.path.expanduser(value))

    @field_validator("*", mode="before")
    @classmethod
    def _truth_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        # By default, pydantic converts true to 1.
        annotation = cls.model_fields[info.field_name or ""].annotation
        if isinstance(value, bool) and annotation is not bool and value not in get_args(annotation):
            raise ValueError("input should not be true or false")
        return value


class DataConfig(ConfigSection):
    """Image sources, reading and cropping."""

    train: str = Field(
        description="training images: a folder tree, a .txt/.csv/.parquet list, a COCO .json, tar shards (path, "
        "pattern or URL), or a Hugging Face data set on disk"
    )
    root: Path | None = Field(None, description="where the relative paths of a list start; default: its own folder")
    val: str | None = Field(None, description="held-out images, from any such source: validation loss and pictures")
    val_root: Path | None = Field(None, description="root for data.val")
    check: bool = Field(True, description="look at every file first; false for millions of known good ones")
    broken: Literal["error", "substitute"] = Field(
        "error", description="an image that cannot be read stops the run, or the next readable one takes its place"
    )
    broken_budget: Share = Field(0.01, description="substitute: share of broken images that stops the run after all")
    bit_depth: Literal[8, 16] = Field(8, description="16 keeps 16-bit and floating-point images as they are")
    max_pixels: PositiveInt = Field(MAX_PIXELS, description="largest image that is read, as width * height")
    shuffle_shards: PositiveInt | None = Field(
        None, description="shuffle among so many tar shards at a time, for slow storage; null: among all images"
    )
    workers: int = Field(4, ge=0, description="processes that read images; 0 reads in the training process")
    crop_scale: tuple[Share, Share] = Field((0.2, 1.0), description="area of the random crop, as shares of the image")
    flip: Share = Field(0.5, description="probability of a horizontal flip")
    mean: tuple[float, ...] = Field((0.485, 0.456, 0.406), description="per channel, of pixels scaled to 0-1, RGB")
    std: tuple[Positive, ...] = Field((0.229, 0.224, 0.225), description="per channel, of pixels scaled to 0-1, RGB")

    @property
    def limits(self) -> ImageLimits:
        """The limits of one image."""
        return ImageLimits(self.max_pixels)

    @model_validator(mode="after")
    def _consistent(self) -> DataConfig:
        if not 0 < self.crop_scale[0] <= self.crop_scale[1]:
            raise ValueError(f"crop_scale must be two shares, 0 < low <= high, got {self.crop_scale}")
        return self


class StepConfig(ConfigSection):
    """Optimizer settings, the size of a step, and the moving average of the weights (EMA)."""

    batch_size: PositiveInt = Field(64, description="images per process and micro-batch")
    accumulate: PositiveInt = Field(1, description="micro-batches per optimizer step")
    base_lr: Positive = Field(1.5e-4, description="learning rate per 256 images of a step, all processes counted")
    lr: Positive | None = Field(None, description="learning rate itself, instead of base_lr * images / 256")
    weight_decay: NonNegative = 0.05
    betas: tuple[Ratio, Ratio] = (0.9, 0.95)
    clip_grad: Positive | None = Field(None, description="largest gradient norm; null: no clipping")
    ema: Ratio | None = Field(None, description="decay per step of the averaged weights, approached from 0; null: none")

    @property
    def images_per_process(self) -> int:
        """Images of an optimizer step in each process."""
        return self.batch_size * self.accumulate


class ScheduleConfig(ConfigSection):
    """Length of training, and the learning rate over time: linear warm-up, then half a cosine."""

    epochs: PositiveInt = 800
    warmup_epochs: NonNegative = 40
    min_lr: NonNegative = 0.0
    max_steps: int | None = Field(
        None, ge=0, description="stop after so many steps; the schedule stays as it is; 0 writes the initial weights"
    )
    shorten_to: Positive | None = Field(
        None, description="with --resume: end after so many epochs in all; the learning rate falls to its end by then"
    )


class RuntimeConfig(ConfigSection):
    """Device, precision, trade-offs between speed and memory, and randomness."""

    device: str = Field("auto", description="auto, cpu, cuda, cuda:N or mps")
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "auto", description="auto: bf16 autocast where it is faster; fp16 comes with a loss scaler"
    )
    compile: Literal["auto", True, False] = Field(
        "auto", description="compile the blocks: a slow first step, faster ones after it; auto: on a GPU"
    )
    activation_checkpointing: bool = Field(False, description="compute blocks twice instead of keeping what they made")
    seed: int = Field(0, ge=0, le=2**63 - 1)
    timeout_minutes: Positive = Field(30, description="several processes: longest time that they wait for each other")


class LogConfig(ConfigSection):
    """Logs of a run."""

    every_steps: PositiveInt = Field(20, description="steps between two lines of log.jsonl")
    wandb: str | None = Field(None, description="project of Weights & Biases to log to as well; null: none")


class CheckpointConfig(ConfigSection):
    """Checkpoint intervals, and the number of checkpoints to keep."""

    every_epochs: PositiveInt = 20
    every_steps: PositiveInt | None = Field(None, description="and after so many steps, where epochs are long")
    keep: int = Field(2, ge=1, description="checkpoints kept; older ones are deleted after a newer one is complete")


@dataclass(frozen=True)
class RunSettings:
    """Settings of a run that do not depend on its task, as plain values.

    Attributes:
        folder, folder_key: folder of the run, and the config key that names it. The other keys are for errors, too.
        device: "auto", "cpu", "cuda" or "cuda:N".
        precision: "auto", "fp32", "bf16" or "fp16".
        width: width of the encoder, which "auto" depends on; 0: it does not.
        settings: all settings as JSON values, for checkpoints and Weights & Biases.
        config_text: content of config.yaml.
        ema: decay of the averaged weights, None: no average.
        clip_grad: largest norm of the gradients; None: no clipping.
        compiled: compile the blocks; "auto": on a GPU.
        keep: number of checkpoints to keep.
        log_every: steps between two lines of the log.
        timeout_minutes: longest time that the processes wait for each other.
        against_divergence, against_full_memory: advice for errors.
    """

    folder: Path
    folder_key: str
    device: str
    device_key: str
    precision: str
    precision_key: str
    lr_key: str
    workers_key: str
    settings: Mapping[str, Any]
    config_text: str
    against_divergence: str
    against_full_memory: str
    ema: float | None = None
    clip_grad: float | None = None
    compiled: bool | Literal["auto"] = False
    compile_key: str = "runtime.compile"
    keep: int = 2
    log_every: int = 20
    wandb: str | None = None
    wandb_key: str = "log.wandb"
    timeout_minutes: float = 30.0
    width: int = 0


class RunConfig(ConfigSection):
    """Settings of every training run."""

    output_dir: Path = Field(description="folder of the run: logs, pictures, checkpoints, weights")
    data: DataConfig
    model: ConfigSection
    optim: StepConfig = StepConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    runtime: RuntimeConfig = RuntimeConfig()
    log: LogConfig = LogConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()

    @field_validator("output_dir")
    @classmethod
    def _is_utf8(cls, path: Path) -> Path:
        if str(path).encode("utf-8", "replace").decode() != str(path):
            raise ValueError("a name in UTF-8 is needed")
        return path

    def check_channels(self, channels: int) -> None:
        """Check for one mean and one standard deviation per image channel."""
        for key in ("mean", "std"):
            values = getattr(self.data, key)
            if len(values) != channels:
                raise ValueError(
                    f"data.{key} has {counted(len(values), 'value')} for model.in_chans {channels}. Measure them with "
                    "tools/dataset_stats.py"
                )

    def run_settings(self) -> RunSettings:
        """Return the settings that do not depend on the task."""
        settings = self.model_dump(mode="json")
        return RunSettings(
            folder=self.output_dir,
            folder_key="output_dir",
            device=self.runtime.device,
            device_key="runtime.device",
            precision=self.runtime.precision,
            precision_key="runtime.precision",
            lr_key="optim.base_lr",
            workers_key="data.workers",
            settings=settings,
            config_text=yaml.safe_dump(settings, sort_keys=False),
            against_divergence="Lower optim.base_lr, set optim.clip_grad, or use runtime.precision=fp32.",
            against_full_memory="Halve optim.batch_size and double optim.accumulate, or set "
            "runtime.activation_checkpointing=true.",
            ema=self.optim.ema,
            clip_grad=self.optim.clip_grad,
            compiled=self.runtime.compile,
            keep=self.checkpoint.keep,
            log_every=self.log.every_steps,
            wandb=self.log.wandb,
            timeout_minutes=self.runtime.timeout_minutes,
        )

    def saves_after(self, step: int, ends_period: Callable[[int, int], bool]) -> bool:
        """Tell whether a checkpoint is due. `ends_period` is that of the schedule."""
        every_steps = self.checkpoint.every_steps
        return ends_period(step, self.checkpoint.every_epochs) or (every_steps is not None and step % every_steps == 0)

    def fingerprint(self, images: int, precision: str, processes: int) -> dict[str, str]:
        """Collect settings that must not change on resuming, as text by key."""
        sections = set(type(self).model_fields) - NOT_DECISIVE
        values: dict[str, dict[str, Any]] = self.model_dump(mode="json", include=sections)
        values["data"] = {key: value for key, value in values["data"].items() if key not in NOT_DECISIVE_DATA}
        for key in ("max_steps", "shorten_to"):
            values["schedule"].pop(key)
        values["model"].pop("init")
        values["runtime"] = {"seed": values["runtime"]["seed"]}
        flat = {f"{name}.{key}": json.dumps(value) for name, keys in values.items() for key, value in keys.items()}
        return flat | {"images": str(images), "precision": precision, "processes": str(processes)}

    def unused_keys(self, cases: Sequence[tuple[bool, str, str, set[str]]]) -> dict[str, list[str]]:
        """Find keys that were given but have no effect, by reason.

        Args:
            cases: rows of (condition, reason, section, keys). The keys are unused if the condition is true.
        """
        unused: dict[str, list[str]] = {}
        for applies, reason, section, keys in cases:
            values = getattr(self, section)
            given = [key for key in sorted(keys & values.model_fields_set) if getattr(values, key) is not None]
            if applies and given:
                unused.setdefault(reason, []).extend(f"{section}.{key}" for key in given)
        return unused


Schema = TypeVar("Schema", bound=ConfigSection)


def resolve_config_path(name: str) -> Path:
    """Find a config by path, by run folder, or under configs/."""
    candidates = [
        Path(name),
        Path(name) / "config.yaml",
        CONFIG_ROOT.parent / name,
        CONFIG_ROOT / name,
        CONFIG_ROOT / f"{name}.yaml",
        *(CONFIG_ROOT / folder / name for folder in ("pretrain", "finetune")),
    ]
    for path in candidates:
        if os.path.isfile(path):
            return path
    known = sorted(str(path.relative_to(CONFIG_ROOT)) for path in CONFIG_ROOT.rglob("*.yaml"))
    raise UserError(f"--config-file {name}: no such file here or in configs/. Choose one of {', '.join(known)}.")


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """Add `--config-file NAME [section.key=value ...]` to a command line."""
    parser.add_argument("--config-file", required=True, metavar="NAME", help="a YAML file, or its name under configs/")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="replace values of the file")


def load_typed_config(schema: type[Schema], name: str, overrides: Sequence[str] = ()) -> Schema:
    """Read a config of any kind.

    Args:
        overrides: `section.key=value` words; values are YAML.

    Raises:
        UserError: If the file does not exist or is not YAML, or a key is unknown, has a wrong type or is out of range.
            The message names the file and the keys.
    """
    path = resolve_config_path(name)
    values = read_yaml(path)
    tool = find_tool(values)
    for word in overrides:
        set_override(values, word)
    try:
        return schema.model_validate(values)
    except ValidationError as error:
        check_tool(tool, schema.tool, path)
        words = {word.partition("=")[0] for word in overrides}
        raise UserError(describe_errors(error, path, words, schema)) from None


def find_tool(values: Mapping[str, Any]) -> str:
    """Find the tool of a config by the keys of KEYS_OF_ONE_TOOL.

    Returns "" if the keys do not decide.
    """
    keys = {str(key) for key in values}
    keys |= {f"{key}.{name}" for key, section in values.items() if isinstance(section, dict) for name in section}
    found = {tool: len(keys & set(marks.split())) for tool, marks in KEYS_OF_ONE_TOOL.items()}
    found[DETECT] = sum(str(key).isupper() for key in values)
    tool, *others = sorted(found, key=lambda tool: found[tool], reverse=True)
    return tool if found[tool] > max(found[others[0]], 1) else ""  # one key may be a mistake


def check_tool(tool: str, reader: str, path: Path) -> None:
    """Reject a config that is for another tool than its reader."""
    if tool and reader and tool != reader:
        advice = f"Name a config of {reader}, such as {EXAMPLES[reader]}"
        raise UserError(f"{path}: is a config of {tool}, not of {reader}. {advice}.")


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML mapping within the bounds of `load_yaml`."""
    try:
        values = load_yaml(decode_text(read_file(path), path))
    except ValueError as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: not valid YAML: {error}. Correct it.") from None
    if not isinstance(values, dict):
        raise UserError(
            f"{path}: has a {type(values).__name__}, no sections. Write sections with keys (data:, model:, ...)."
        )
    return values


def set_override(values: dict[str, Any], word: str) -> None:
    """Set one `section.key=value` word in nested `values`."""
    key, separator, text = word.partition("=")
    if not separator or not key:
        raise UserError(f"{word}: no key=value. Write for example optim.batch_size=32.")
    *sections, last = key.split(".")
    for section in sections:
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            raise UserError(f"{word}: {section!r} is not a section. Write {section}=VALUE.")
    if not text.strip():
        raise UserError(f"{word}: no value. For none at all write {key}=null.")
    is_path = text.startswith(os.sep) or (os.sep in text and os.path.exists(os.path.expanduser(text)))
    if is_path or not text.isprintable():
        values[last] = text  # a path: YAML would read `/data/set #1` as `/data/set`
        return
    try:
        values[last] = load_yaml(text)
    except ValueError as error:
        why = str(error).partition(' in "')[0]  # without the line and column of a file
        raise UserError(f"{abbreviate(word)}: the value is not valid YAML: {why}. Quote it.") from None


def describe_errors(error: ValidationError, path: Path, words: set[str], schema: type[ConfigSection]) -> str:
    """Describe all problems of a config in one line, by key.

    Args:
        words: keys from the command line. The message blames the file for other keys.
    """
    problems: dict[str, list[str]] = {"command line": []}
    unknown: dict[tuple[str, str], list[str]] = {}  # keys without a suggestion, by place and known keys
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
            near, known = _suggestion(location, schema)
            if near:
                found.append(f"unknown key {key!r} (did you mean {near!r}?)")
            else:
                unknown.setdefault((place, known), []).append(key)
        elif item["type"] == "missing":
            found.append(f"missing key {key!r}: add it to the file or pass {key}=...")
        else:
            message = item["msg"].removeprefix("Value error, ")
            message = message[0].lower() + message[1:]
            message, period, advice = message.removesuffix(".").partition(". ")
            given = "" if isinstance(item["input"], dict | BaseModel) else f", got {abbreviate(repr(item['input']))}"
            message = f"{message}{given}{period}{advice}"
            found.append(f"{key}: {message}" if key else message)
    for (place, known), keys in unknown.items():
        text = f"unknown {'key' if len(keys) == 1 else 'keys'} {shorten([repr(key) for key in keys])}"
        problems[place].append(f"{text} (known: {known})" if known else text)
    return "; ".join(f"{place}: {'; '.join(dict.fromkeys(found))}" for place, found in problems.items() if found) + "."


def abbreviate(text: str) -> str:
    """Cut a text for an error message."""
    return text if len(text) <= MOST_SHOWN else f"{text[:MOST_SHOWN]}..."


def _suggestion(location: list[str], schema: type[ConfigSection]) -> tuple[str, str]:
    """Suggest a known key or "", and list the section's keys."""
    section: Any = schema
    for part in location[:-1]:
        section = section.model_fields[part].annotation if part in section.model_fields else None
        if not _fields(section):
            return "", ""
    sections = [name for name, field in schema.model_fields.items() if location[-1] in _fields(field.annotation)]
    if len(location) == 1 and sections:
        return f"{sections[0]}.{location[-1]}", ""
    known = list(section.model_fields)
    near = difflib.get_close_matches(location[-1], known, n=1)
    return ".".join([*location[:-1], near[0]]) if near else "", ", ".join(known)


def _fields(annotation: Any) -> Iterable[str]:
    return annotation.model_fields if isinstance(annotation, type) and issubclass(annotation, BaseModel) else ()
