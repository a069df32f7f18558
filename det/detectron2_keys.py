"""detectron2's own keys: defaults, ranges of those that its modules read, and the kinds of values that all keys use."""

from __future__ import annotations

from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from yacs.config import CfgNode


def _rising(values: tuple[float, ...]) -> tuple[float, ...]:
    if list(values) != sorted(values):
        raise ValueError
    return values


AtLeast0 = Annotated[int, Field(ge=0, description="at least 0")]
AtLeast1 = Annotated[int, Field(ge=1, description="at least 1")]
NotNegative = Annotated[float, Field(ge=0, description="at least 0")]
MoreThan0 = Annotated[float, Field(gt=0, description="greater than 0")]
Rate = Annotated[float, Field(ge=0, lt=1, description="at least 0 and less than 1")]
ZeroToOne = Annotated[float, Field(ge=0, le=1, description="from 0 to 1")]
Steps = Annotated[tuple[AtLeast1, ...], AfterValidator(_rising), Field(description="rising, each at least 1")]
_Share = Annotated[float, Field(gt=0, lt=1, strict=True)]
Shares = Annotated[tuple[_Share, ...], AfterValidator(_rising), Field(description="rising shares of 1")]
Levels = Annotated[list[str], Field(min_length=1, description="names of at least one level")]
_Overlaps = Annotated[list[_Share], AfterValidator(_rising), Field(min_length=1, description="rising shares of 1")]
_MatchLabels = Annotated[list[Literal[-1, 0, 1]], Field(min_length=2, description="labels -1, 0 or 1, two at least")]
_FourWeights = Annotated[tuple[MoreThan0, MoreThan0, MoreThan0, MoreThan0], Field(description="four numbers above 0")]
_Sizes = Annotated[list[Annotated[list[MoreThan0], Field(min_length=1)]], Field(min_length=1)]
_BoxLoss = Literal["smooth_l1", "giou", "diou", "ciou"]
_Pooler = Literal["ROIAlign", "ROIAlignV2", "ROIPool"]


class ConfigKeys(BaseModel):
    """Base of the sections.

    Keys with a default are added to detectron2's keys. Keys without a default are detectron2's own.
    """

    model_config = ConfigDict(frozen=True, allow_inf_nan=False)


class AnchorKeys(ConfigKeys):
    """`MODEL.ANCHOR_GENERATOR`."""

    SIZES: _Sizes = Field(description="lists of sizes in pixels, greater than 0, one per level")
    ASPECT_RATIOS: _Sizes = Field(description="lists of height / width, greater than 0")
    OFFSET: Rate


class CropKeys(ConfigKeys):
    """`INPUT.CROP`."""

    ENABLED: bool
    TYPE: Literal["relative_range", "relative", "absolute", "absolute_range"]
    SIZE: list[MoreThan0] = Field(min_length=2, max_length=2, description="two numbers greater than 0")


class ProposalKeys(ConfigKeys):
    """`MODEL.PROPOSAL_GENERATOR`."""

    MIN_SIZE: NotNegative


class RpnKeys(ConfigKeys):
    """`MODEL.RPN`."""

    IN_FEATURES: Levels
    BOUNDARY_THRESH: int = Field(ge=-1, description="at least -1")
    IOU_THRESHOLDS: _Overlaps
    IOU_LABELS: _MatchLabels
    BATCH_SIZE_PER_IMAGE: AtLeast1
    POSITIVE_FRACTION: ZeroToOne
    BBOX_REG_LOSS_TYPE: _BoxLoss
    BBOX_REG_LOSS_WEIGHT: NotNegative
    BBOX_REG_WEIGHTS: _FourWeights
    SMOOTH_L1_BETA: NotNegative
    LOSS_WEIGHT: NotNegative
    PRE_NMS_TOPK_TRAIN: AtLeast1
    PRE_NMS_TOPK_TEST: AtLeast1
    POST_NMS_TOPK_TRAIN: AtLeast1
    POST_NMS_TOPK_TEST: AtLeast1
    NMS_THRESH: ZeroToOne
    CONV_DIMS: list[Literal[-1] | AtLeast1] = Field(min_length=1, description="channels per layer, or -1 for no change")


class RoiHeadsKeys(ConfigKeys):
    """`MODEL.ROI_HEADS`."""

    NUM_CLASSES: AtLeast1
    IN_FEATURES: Levels
    IOU_THRESHOLDS: _Overlaps
    IOU_LABELS: _MatchLabels
    BATCH_SIZE_PER_IMAGE: AtLeast1
    POSITIVE_FRACTION: ZeroToOne
    SCORE_THRESH_TEST: ZeroToOne
    NMS_THRESH_TEST: ZeroToOne


class BoxHeadKeys(ConfigKeys):
    """`MODEL.ROI_BOX_HEAD`."""

    BBOX_REG_LOSS_TYPE: _BoxLoss
    BBOX_REG_LOSS_WEIGHT: NotNegative
    BBOX_REG_WEIGHTS: _FourWeights
    SMOOTH_L1_BETA: NotNegative
    POOLER_RESOLUTION: AtLeast1
    POOLER_SAMPLING_RATIO: AtLeast0
    POOLER_TYPE: _Pooler
    NUM_FC: AtLeast0
    FC_DIM: AtLeast1
    NUM_CONV: AtLeast0
    CONV_DIM: AtLeast1
    FED_LOSS_FREQ_WEIGHT_POWER: NotNegative
    FED_LOSS_NUM_CLASSES: AtLeast1


class CascadeKeys(ConfigKeys):
    """`MODEL.ROI_BOX_CASCADE_HEAD`."""

    BBOX_REG_WEIGHTS: tuple[_FourWeights, ...] = Field(min_length=1, description="four numbers above 0 per stage")
    IOUS: Shares


class MaskHeadKeys(ConfigKeys):
    """`MODEL.ROI_MASK_HEAD`."""

    POOLER_RESOLUTION: AtLeast1
    POOLER_SAMPLING_RATIO: AtLeast0
    POOLER_TYPE: _Pooler
    NUM_CONV: AtLeast0
    CONV_DIM: AtLeast1


class ClippingKeys(ConfigKeys):
    """`SOLVER.CLIP_GRADIENTS`."""

    CLIP_TYPE: Literal["value", "norm", "full_model"]
    CLIP_VALUE: MoreThan0
    NORM_TYPE: MoreThan0


def detectron2_defaults() -> CfgNode:
    """Read detectron2's default settings from its file, without importing detectron2.

    The import would take seconds before the first error in a setting. As a module of `det`, the file finds the CfgNode
    that it imports in `det.config`.
    """
    (folder,) = find_spec("detectron2").submodule_search_locations  # type: ignore[union-attr,misc]  # a package
    spec = spec_from_file_location("det.detectron2_defaults", Path(folder, "config", "defaults.py"))
    assert spec is not None  # the file exists
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module._C
