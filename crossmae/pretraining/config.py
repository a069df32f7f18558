"""Settings of a pretraining run, with the published values as defaults."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field, PositiveInt, field_validator, model_validator

from crossmae.models.sizes import DECODERS, OFF_BY_DEFAULT, Decoder, model_arguments
from crossmae.training.config import (
    PRETRAIN,
    ConfigSection,
    DataConfig,
    LogConfig,
    NonNegative,
    Positive,
    Ratio,
    RunConfig,
    Share,
    StepConfig,
    load_typed_config,
)

Pool = Literal["avg", "cls"]  # of the tokens of an encoder, see `pool_tokens`
FeaturePool = Literal["avg", "cls", "cls_avg"]


class PretrainDataConfig(DataConfig):
    """Settings of `DataConfig`, and the place of cropping."""

    crop_on: Literal["cpu", "device"] = Field(
        "cpu", description="device: crops are resized on the GPU, and workers only decode; not run on a GPU yet"
    )


class ModelConfig(ConfigSection):
    """A named model size, changes to the size, the masking ratios, and the initial weights."""

    name: str = Field(description="a name of crossmae.list_models()")
    img_size: PositiveInt | tuple[PositiveInt, PositiveInt] = Field(224, description="pixels; side or (height, width)")
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
    mask_block: PositiveInt = Field(1, description="side of the blocks of patches that are masked; divides the grid")
    class_tokens: PositiveInt = Field(1, le=64, description="class tokens; several have no place in other libraries")
    init: Path | None = Field(None, description="weights to start from: a whole model or an encoder; null: random ones")

    @field_validator("name")
    @classmethod
    def _known(cls, name: str) -> str:
        model_arguments(name)
        return name

    def arguments(self) -> dict[str, Any]:
        """Collect the arguments of `create_model` except the name.

        Options that are off are left out, so that earlier versions of this toolkit read the weights.
        """
        off = {key for key, value in OFF_BY_DEFAULT.items() if getattr(self, key) == value}
        others = {"name", "mask_ratio", "predict_ratio", "init"} | off
        return {key: value for key, value in self if key not in others and (value is not None or key == "fuse_blocks")}


class OptimConfig(StepConfig):
    """Settings of `StepConfig`, the optimizer, and the rule for the learning rate."""

    name: Literal["adamw", "muon"] = Field(
        "adamw", description="muon: for the matrices of encoder and decoder blocks, AdamW for the rest; torch >= 2.9"
    )
    lr_rule: Literal["published", "none", "inverse"] = Field(
        "published", description="factor on base_lr * images / 256: predict/mask ratio, 1, or mask/predict ratio"
    )


class PretrainLogConfig(LogConfig):
    """Settings of `LogConfig`, and settings for pictures."""

    pictures_every_steps: PositiveInt = Field(1000, description="steps between pictures of patches and fusion weights")
    pictures: int = Field(8, ge=0, le=64, description="images in a picture of reconstructions; 0: no pictures")


class ValidationConfig(ConfigSection):
    """Settings of the reconstruction loss on data.val, over all masked patches. Crops and masks are fixed."""

    every_epochs: PositiveInt = 10
    images: PositiveInt = Field(2048, description="at most so many images, evenly spaced")


class ProbeConfig(ConfigSection):
    """Settings of the k-nearest-neighbour accuracy on the encoder's pooled features during training."""

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
            raise ValueError("the probe needs both, probe.train and probe.val. Give the other, too")
        return self


class HealthConfig(ConfigSection):
    """Expected losses of the recipe. A loss outside the band gives a warning and does not stop the run."""

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
            raise ValueError("a band needs measured_on. Name the data and the machine that it was measured on")
        return self


class PretrainConfig(RunConfig):
    """All settings of a pretraining run."""

    tool: ClassVar[str] = PRETRAIN
    data: PretrainDataConfig
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

    def ignored(self, is_plain: bool, has_shards: bool) -> dict[str, list[str]]:
        """Find keys that were given but have no effect, by reason."""
        model, data = self.model, self.data
        cases = [
            (is_plain, "decoder is 'self'", "model", {"fuse_blocks", "fuse_input", "predict_ratio"}),
            (not is_plain and model.fuse_blocks == (), "model.fuse_blocks is empty", "model", {"fuse_input"}),
            (self.optim.lr is not None, "optim.lr is given", "optim", {"base_lr", "lr_rule"}),
            (data.val is None, "data.val is not given", "validation", {"every_epochs", "images"}),
            (data.val is None, "data.val is not given", "data", {"val_root"}),
            (data.broken == "error", "data.broken is error", "data", {"broken_budget"}),
            (not has_shards, "data.train has no shards", "data", {"shuffle_shards"}),
            (self.probe.train is None, "probe.train is not given", "probe", set(ProbeConfig.model_fields)),
            (not self.health.band, "health.band is not given", "health", {"measured_on"}),
        ]
        return self.unused_keys(cases)


def load_config(name: str, overrides: Sequence[str] = ()) -> PretrainConfig:
    """Read a pretraining config with `load_typed_config`."""
    return load_typed_config(PretrainConfig, name, overrides)
