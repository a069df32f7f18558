"""Settings of a fine-tuning run, with the published values as defaults (method specification, 1.10)."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, PositiveInt, field_validator, model_validator

from crossmae.classification.probe.config import EncoderSizes, Pixels
from crossmae.models.sizes import SIZES
from crossmae.training.config import (
    FINETUNE,
    CheckpointConfig,
    ConfigSection,
    DataConfig,
    NonNegative,
    Positive,
    Ratio,
    RunConfig,
    ScheduleConfig,
    Share,
    StepConfig,
)

DropRate = Annotated[float, Field(ge=0, lt=1)]
CropShare = Annotated[float, Field(gt=0, le=1)]


class LabelledDataConfig(DataConfig):
    """Labelled images, how they are read, and how they are augmented (with timm's names)."""

    train: str = Field("", description="labelled images: any source with labels, see crossmae/data/sources")
    val: str | None = Field(None, description="labelled images to evaluate on; null: none, so no best weights either")
    per_class: PositiveInt | None = Field(None, description="images of every class, drawn by runtime.seed; null: all")
    separator: str | None = Field(None, min_length=1, description="between several labels of an image; null: one")
    class_names: tuple[str, ...] | Path | None = Field(None, description="to show, in order, or a file, one a line")
    crop_scale: tuple[Share, Share] = Field((0.08, 1.0), description="area of the random crop, as shares of the image")
    auto_augment: str | None = Field("rand-m9-mstd0.5-inc1", description="timm's policy; null: none")
    color_jitter: NonNegative = Field(0.0, description="strength, where there is no auto_augment")
    erase: Share = Field(0.25, description="probability that a random rectangle is erased")
    erase_mode: Literal["pixel", "rand", "const"] = "pixel"
    erase_count: PositiveInt = Field(1, description="rectangles at most")

    @model_validator(mode="after")
    def _one_augmentation(self) -> LabelledDataConfig:
        if self.auto_augment and self.color_jitter:
            raise ValueError(
                "color_jitter and auto_augment exclude each other. Set auto_augment=null, or color_jitter=0."
            )
        if self.auto_augment and self.bit_depth != 8:
            raise ValueError("auto_augment works on 8 bits only. Set auto_augment=null with bit_depth=16.")
        return self


class ClassifierConfig(EncoderSizes):
    """A plain ViT, the weights of its encoder, and its head."""

    init: Path | None = Field(None, description="weights of the encoder, of any format; null: random ones")
    name: str | None = Field(None, description=f"{', '.join(f'vit_{size}' for size in SIZES)}; null: as model.init is")
    in_chans: PositiveInt = Field(3, description="image channels; the filters of others are summed or repeated")
    pool: Literal["avg", "cls"] = Field("avg", description="mean of the patch tokens, or the class token")
    head: Literal["linear", "batchnorm"] = Field("linear", description="batchnorm: as in published linear probes")
    freeze: bool = Field(False, description="train the head only: a linear probe")
    drop_path: DropRate = Field(0.1, description="of the last block; grows from 0 with depth")

    @field_validator("name")
    @classmethod
    def _known(cls, name: str | None) -> str | None:
        known = [f"vit_{size}" for size in SIZES]
        if name is not None and name not in known:
            raise ValueError(f"expected one of {', '.join(known)}")
        return name

    def given(self) -> dict[str, Any]:
        """Collect the given arguments: the named size and its changes."""
        size = SIZES[self.name.removeprefix("vit_")] if self.name else None
        named = {key: getattr(size, key) for key in ("embed_dim", "depth", "num_heads")} if size else {}
        return named | self.model_dump(include={*EncoderSizes.model_fields, "in_chans"}, exclude_none=True)


class LossConfig(ConfigSection):
    """Parts of the loss function."""

    smoothing: Share = Field(0.1, description="label smoothing")
    mixup: NonNegative = Field(0.0, description="alpha of mixup; 0: none")
    cutmix: NonNegative = Field(0.0, description="alpha of cutmix; 0: none")
    cutmix_minmax: tuple[Share, Share] | None = Field(None, description="sides of the cut, instead of cutmix")
    mixup_prob: Share = Field(1.0, description="probability that a batch is mixed at all")
    mixup_switch_prob: Share = Field(0.5, description="of cutmix, where both are on")
    mixup_mode: Literal["batch", "pair", "elem"] = "batch"
    class_weights: Literal["balanced"] | dict[str, Positive] | None = Field(
        None, description="by class, 1 for others; balanced: inverse to a class's images; null: equal"
    )

    @field_validator("class_weights", mode="before")
    @classmethod
    def _balanced_or_by_class(cls, weights: Any) -> Any:
        if not (weights is None or weights == "balanced" or isinstance(weights, dict)):
            raise ValueError("expected balanced, or weights by class such as {cat: 2.0, dog: 0.5}")
        return weights

    @field_validator("cutmix_minmax")
    @classmethod
    def _rising(cls, sides: tuple[float, float] | None) -> tuple[float, float] | None:
        if sides is not None and not sides[0] < sides[1]:
            raise ValueError("expected two shares, the lower one first")
        return sides

    @property
    def mixes(self) -> bool:
        """True if Mixup or CutMix is enabled."""
        return self.mixup_prob > 0 and bool(self.mixup or self.cutmix or self.cutmix_minmax)


class FinetuneOptimConfig(StepConfig):
    """Learning rates by layer, batch size, and moving average of the weights."""

    name: Literal["adamw", "muon", "lars"] = Field(
        "adamw", description="muon: for the matrices of the blocks; lars: with momentum 0.9, for linear probes"
    )
    batch_size: PositiveInt = Field(64, description="images per process and micro-batch")
    base_lr: Positive = Field(5e-4, description="learning rate per 256 images of a step, all processes counted")
    betas: tuple[Ratio, Ratio] = (0.9, 0.999)
    layer_decay: Share = Field(0.65, description="factor on the learning rate from one block to the one below it")


class FinetuneScheduleConfig(ScheduleConfig):
    """Length of training, and schedule of the learning rate."""

    epochs: PositiveInt = 100
    warmup_epochs: NonNegative = 5
    min_lr: NonNegative = 1e-6


class EvaluationConfig(ConfigSection):
    """Settings of the evaluations on data.val."""

    every_epochs: PositiveInt = 1
    img_size: Pixels | None = Field(None, description="of --eval-only; null: as trained; positions are resampled")
    softmax: Literal["all", "present"] = Field(
        "all", description="of --eval-only, over all classes of the classifier, or only over the classes in data.val"
    )
    batch_size: PositiveInt | None = Field(None, description="images per process; null: as in training")
    crop_pct: CropShare | None = Field(None, description="share of the side; null: 224/256 up to 224 px, else 1")
    hardest: int = Field(24, ge=0, description="images with the highest loss that are kept as pictures")
    features: int = Field(2000, ge=0, description="images whose features are kept for the map of the report")


class FinetuneConfig(RunConfig):
    """All settings of a fine-tuning run."""

    tool: ClassVar[str] = FINETUNE
    data: LabelledDataConfig
    model: ClassifierConfig
    loss: LossConfig = LossConfig()
    optim: FinetuneOptimConfig = FinetuneOptimConfig()
    schedule: FinetuneScheduleConfig = FinetuneScheduleConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig(every_epochs=1, keep=1)

    @model_validator(mode="after")
    def _agree(self) -> FinetuneConfig:
        self.check_channels(self.model.in_chans)
        for key in ("auto_augment", "color_jitter"):
            if getattr(self.data, key) and self.model.in_chans not in (1, 3):
                why = "is for grey and RGB images. Set data.auto_augment=null data.color_jitter=0."
                raise ValueError(f"data.{key}: {why}")
        if self.optim.name == "lars" and not self.model.freeze:
            raise ValueError("optim.name: lars is for linear probes. Set model.freeze=true, or optim.name=adamw.")
        if self.model.head == "batchnorm" and not self.model.freeze:
            raise ValueError("model.head: batchnorm is for linear probes. Set model.freeze=true, or model.head=linear.")
        if self.data.separator is not None and self.data.per_class is not None:
            raise ValueError("data.per_class: needs one label per image. Leave out per_class or separator.")
        if self.data.separator is not None and self.loss.class_weights == "balanced":
            raise ValueError("loss.class_weights: balanced needs one label per image. Give weights by class.")
        if self.model.head == "batchnorm" and self.optim.batch_size < 2:
            raise ValueError("optim.batch_size: too small for model.head=batchnorm. Set at least 2.")
        if self.loss.mixes and self.optim.batch_size % 2:
            raise ValueError(f"optim.batch_size: {self.optim.batch_size} is odd. Mixup and cutmix need an even one.")
        return self

    def ignored(self, has_shards: bool) -> dict[str, list[str]]:
        """Find given keys that have no effect, by reason."""
        data, loss, head_only = self.data, self.loss, "model.freeze trains the head only"
        cases = [
            (self.model.freeze, head_only, "model", {"drop_path"}),
            (self.model.freeze, head_only, "optim", {"layer_decay"}),
            (self.optim.name == "lars", "optim.name is lars", "optim", {"betas"}),
            (self.optim.lr is not None, "optim.lr is given", "optim", {"base_lr"}),
            (loss.cutmix_minmax is not None, "loss.cutmix_minmax is given", "loss", {"cutmix"}),
            (not loss.mixes, "nothing is mixed", "loss", {"mixup_prob", "mixup_switch_prob", "mixup_mode"}),
            (not data.erase, "data.erase is 0", "data", {"erase_mode", "erase_count"}),
            (data.val is None, "data.val is not given", "data", {"val_root"}),
            (data.val is None, "data.val is not given", "evaluation", set(EvaluationConfig.model_fields)),
            (data.broken == "error", "data.broken is error", "data", {"broken_budget"}),
            (not has_shards, "data.train has no shards", "data", {"shuffle_shards"}),
            (True, "it is for --eval-only", "evaluation", {"img_size", "softmax"}),
        ]
        return self.unused_keys(cases)
