"""The config of `tools/probe.py`."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field, PositiveInt, field_validator, model_validator

from crossmae.data.images import MAX_PIXELS, ImageLimits
from crossmae.models.sizes import model_arguments
from crossmae.pretraining.config import FeaturePool
from crossmae.training.config import PROBE, ConfigSection, NonNegative, Positive, Ratio

Method = Literal["knn", "linear", "logistic", "few_shot"]
Seeds = tuple[int, ...]
Pixels = PositiveInt | tuple[PositiveInt, PositiveInt]  # one side, or height and width


class LabelledConfig(ConfigSection):
    """Labelled images, and how they are cropped and normalised."""

    train: str = Field(description="labelled images to learn from, of any kind that data.train of pretraining takes")
    root: Path | None = Field(None, description="where the relative paths of a list start; default: its own folder")
    val: str = Field(description="labelled images to be classified")
    val_root: Path | None = Field(None, description="root for data.val")
    separator: None = Field(None, description="of several labels per image; there is no probe for those")
    check: bool = Field(True, description="look at every file first; false for millions of known good ones")
    workers: int = Field(4, ge=0, description="processes that read images; 0 reads in the main process")
    crop_pct: Ratio | Literal[1] | None = Field(
        None, description="share of the side; null: 224/256 up to 224 px, else 1"
    )
    mean: tuple[float, ...] | None = Field(None, description="per channel, pixels in 0-1; null: as the weights record")
    std: tuple[Positive, ...] | None = Field(None, description="as mean")
    bit_depth: Literal[8, 16] | None = Field(None, description="null: as the weights record, else 8")
    max_pixels: PositiveInt = Field(MAX_PIXELS, description="largest image that is read, as width * height")

    @property
    def limits(self) -> ImageLimits:
        """The limits of one image."""
        return ImageLimits(self.max_pixels)

    @field_validator("separator", mode="before")
    @classmethod
    def _one_label(cls, separator: str | None) -> None:
        if separator is not None:
            raise ValueError("expected none, because only tools/finetune.py takes several labels per image")


class EncoderSizes(ConfigSection):
    """Sizes of an encoder, by default from the weights or the named size."""

    img_size: Pixels | None = Field(None, description="null: as the weights; positions are resampled")
    patch_size: PositiveInt | None = Field(None, description="null: as the weights; filters are resampled")
    embed_dim: PositiveInt | None = None
    depth: PositiveInt | None = None
    num_heads: PositiveInt | None = None
    mlp_ratio: Positive | None = None


class EncoderConfig(EncoderSizes):
    """Sizes of the encoder to probe."""

    name: str | None = Field(None, description="a name of crossmae.list_models(), only for weights=null")
    in_chans: PositiveInt | None = None

    @field_validator("name")
    @classmethod
    def _known(cls, name: str | None) -> str | None:
        if name is not None:
            model_arguments(name)
        return name


class FeaturesConfig(ConfigSection):
    """Choice of features, and their cache."""

    pool: FeaturePool = Field("avg", description="mean of the patch tokens, class token, or both side by side")
    block: int | None = Field(None, description="negative from the end; null: the last that pretraining trained")
    dtype: Literal["bf16", "fp32"] = Field("bf16", description="in which they are kept, also for the methods")
    batch_size: PositiveInt = 256
    cache_dir: Path | None = Field(None, description="folder of features for later calls; null: output_dir/features")


class KnnConfig(ConfigSection):
    """Values of k and temperature. All pairs are tried."""

    k: tuple[PositiveInt, ...] = Field((1, 5, 10, 20, 50, 100, 200), min_length=1, description="neighbours")
    temperature: tuple[Positive, ...] = Field((0.02, 0.07, 0.2), min_length=1, description="of their votes")


class LinearConfig(ConfigSection):
    """Settings of the linear probe."""

    epochs: PositiveInt = 90
    warmup_epochs: NonNegative = 10
    batch_size: int = Field(512, ge=2, description="images per step; of fewer training images all")
    base_lr: Positive = Field(0.1, description="learning rate per 256 images of a step")
    seeds: Seeds = Field((0, 1, 2), min_length=1)


class LogisticConfig(ConfigSection):
    """Settings of the logistic regression."""

    strengths: tuple[Positive, ...] = Field((1e-4, 1e-3, 1e-2, 0.1, 1.0, 10.0), min_length=1, description="C to try")
    max_iterations: PositiveInt = 1000


class FewShotConfig(ConfigSection):
    """Settings of the logistic regression on few images per class."""

    shots: tuple[PositiveInt, ...] = Field((1, 5, 10), min_length=1, description="images per class")
    seeds: Seeds = Field((0, 1, 2, 3, 4), min_length=1, description="other seed, other images")
    strength: Positive = Field(1.0, description="C, the same for all")
    max_iterations: PositiveInt = 1000


class ComputeConfig(ConfigSection):
    """Device, precision and randomness."""

    device: str = Field("auto", description="auto, cpu, cuda or cuda:N")
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field("auto", description="auto: bf16 on GPUs that have it")
    seed: int = Field(0, ge=0, description="of random weights, and of what the logistic regression holds out")


class ProbeRunConfig(ConfigSection):
    """Settings of a probe of frozen features."""

    tool: ClassVar[str] = PROBE
    output_dir: Path = Field(description="folder of the results")
    weights: Path | None = Field(description="weight file, or folder of a run; null: random ones, as a baseline")
    methods: tuple[Method, ...] = Field(("knn", "linear", "logistic", "few_shot"), min_length=1)
    data: LabelledConfig
    model: EncoderConfig = EncoderConfig()
    features: FeaturesConfig = FeaturesConfig()
    knn: KnnConfig = KnnConfig()
    linear: LinearConfig = LinearConfig()
    logistic: LogisticConfig = LogisticConfig()
    few_shot: FewShotConfig = FewShotConfig()
    runtime: ComputeConfig = ComputeConfig()

    @model_validator(mode="after")
    def _consistent(self) -> ProbeRunConfig:
        if self.weights is None and self.model.name is None:
            raise ValueError("model.name: missing, with weights=null. Name the size of the random encoder.")
        if self.linear.warmup_epochs > self.linear.epochs:
            longer = f"{self.linear.warmup_epochs:g} exceeds epochs {self.linear.epochs}"
            raise ValueError(f"linear.warmup_epochs: {longer}. Lower it.")
        for key, seeds in (("linear.seeds", self.linear.seeds), ("few_shot.seeds", self.few_shot.seeds)):
            if min(seeds) < 0 or len(set(seeds)) < len(seeds):
                raise ValueError(f"{key}: {list(seeds)} has doubled or negative numbers. Give different ones from 0.")
        return self
