"""The keys that this package adds to a detectron2 config, and a reader of configs: safe YAML, then overrides.

detectron2's own reader evaluates Python tags and opens URLs. This reader does neither. Its errors name file and key.
"""

from __future__ import annotations

import difflib
import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import numpy as np
from pydantic import Field, ValidationError
from pydantic.fields import FieldInfo
from yacs.config import CfgNode

import det
from crossmae.checkpoints.metadata import recorded_config, safetensors_metadata
from crossmae.checkpoints.reading import DETECTOR_BEST, DETECTOR_FINAL, DETECTOR_LAST
from crossmae.data.images import MAX_PIXELS, ImageLimits
from crossmae.errors import UserError
from crossmae.files import expand_path, load_literal
from crossmae.training.config import DETECT, abbreviate, check_tool, find_tool, read_yaml, resolve_config_path
from det.detectron2_keys import (
    AnchorKeys,
    AtLeast0,
    AtLeast1,
    BoxHeadKeys,
    CascadeKeys,
    ClippingKeys,
    ConfigKeys,
    CropKeys,
    MaskHeadKeys,
    MoreThan0,
    NotNegative,
    ProposalKeys,
    Rate,
    RoiHeadsKeys,
    RpnKeys,
    Shares,
    Steps,
    ZeroToOne,
    detectron2_defaults,
)

log = logging.getLogger(__name__)

# Files in the folder of a run.
RECORD, CONFIG, LOG = "run.json", "config.yaml", "log.txt"
BEST, BEST_RECORD, FINAL, LAST = DETECTOR_BEST, "model_best.json", DETECTOR_FINAL, DETECTOR_LAST
RESULTS, PREDICTIONS, PICTURES = "results.json", "inference/coco_instances_results.json", "pictures"

BASE_KEY, SIZE = "_BASE_", "INPUT.SIZE"
_KEY = re.compile(r"[A-Z_][A-Z0-9_]*(\.[A-Z0-9_]+)*")
# Keys in steps, and their equivalents in epochs or fractions of the run. The key that was set last is used.
BY_EPOCHS = {
    "SOLVER.MAX_ITER": "SOLVER.EPOCHS",
    "SOLVER.STEPS": "SOLVER.DECAY_AT",
    "TEST.EVAL_PERIOD": "TEST.EVAL_EPOCHS",
}


PosEmbed = Literal["resize", "tiled", "absolute_win"]
RelPosAttention = Literal["auto", "blocks", "folded", "materialized"]


class _Vit(ConfigKeys):  # the encoder and its simple feature pyramid
    IMG_SIZE: AtLeast1 = 1024  # pixels; decides the size of the relative positions of global blocks
    PRETRAIN_IMG_SIZE: AtLeast1 = 224  # pixels of pretraining; decides the size of the position embeddings
    PATCH_SIZE: AtLeast1 = 16
    EMBED_DIM: AtLeast1 = 768
    DEPTH: AtLeast1 = 12
    NUM_HEADS: AtLeast1 = 12
    MLP_RATIO: MoreThan0 = 4.0
    DROP_PATH: Rate = 0.1  # rate of the last block; grows linearly from 0 in the first block
    WINDOW_SIZE: AtLeast0 = 14  # patches; 0: every block is global
    GLOBAL_BLOCKS: list[int] = Field([2, 5, 8, 11], description="numbers of blocks")
    REL_POS: bool = True
    POS_EMBED: PosEmbed = "resize"  # fit of position embeddings to the image
    # equal except for rounding, see det/backbone/attention.py
    ATTENTION: RelPosAttention = "auto"
    ACTIVATION_CHECKPOINTING: bool = False  # recompute blocks in the backward pass instead of storing activations
    # 0 freezes patch embedding and positions; n also freezes the first n blocks
    FROZEN_STAGES: int = Field(-1, ge=-1, description="at least -1")
    OUT_CHANNELS: AtLeast1 = 256
    # p2, p3, p4, p5 with patches of 16 pixels
    SCALE_FACTORS: list[MoreThan0] = Field([4.0, 2.0, 1.0, 0.5], description="numbers greater than 0")
    NORM: str = "LN"
    MAX_POOL_LEVEL: bool = True  # p6
    SQUARE_PAD: AtLeast0 = 0  # pixels, in training; 0: pad to the largest image of the batch
    SQUARE_PAD_TEST: AtLeast0 = 0  # the same for evaluation and prediction


class _Model(ConfigKeys):
    DEVICE: str = Field(pattern=r"^(cpu|mps|cuda(:\d+)?)$", description="cpu, cuda, cuda:N or mps")
    MASK_ON: bool
    KEYPOINT_ON: bool
    LOAD_PROPOSALS: Literal[False] = Field(description="False: proposals come from the detector itself")
    PIXEL_MEAN: list[float] = Field(min_length=3, max_length=3, description="three numbers")
    PIXEL_STD: list[MoreThan0] = Field(min_length=3, max_length=3, description="three numbers greater than 0")
    ANCHOR_GENERATOR: AnchorKeys
    PROPOSAL_GENERATOR: ProposalKeys
    RPN: RpnKeys
    ROI_HEADS: RoiHeadsKeys
    ROI_BOX_HEAD: BoxHeadKeys
    ROI_BOX_CASCADE_HEAD: CascadeKeys
    ROI_MASK_HEAD: MaskHeadKeys
    VIT: _Vit


class _Jitter(ConfigKeys):  # scale into a square of SIZE times a random factor, then crop to SIZE
    ENABLED: bool = False
    SIZE: AtLeast1 = 1024
    MIN_SCALE: MoreThan0 = 0.1
    MAX_SCALE: MoreThan0 = 2.0


class _CopyPaste(ConfigKeys):  # paste objects of another image (arXiv 2012.07177) with probability PROB
    ENABLED: bool = False
    PROB: ZeroToOne = 0.5


class InputKeys(ConfigKeys):
    """`INPUT`: reading and augmentation of images."""

    SIZE: AtLeast0 = 0  # pixels; sets all keys that depend on the size of images, see `set_image_size`. 0: none
    FORMAT: Literal["RGB", "BGR"]
    MASK_FORMAT: Literal["polygon", "bitmask"]
    MIN_SIZE_TRAIN: AtLeast1 | Annotated[tuple[AtLeast1, ...], Field(min_length=1)] = Field(
        description="pixels, at least 1, or several such numbers"
    )
    MIN_SIZE_TRAIN_SAMPLING: Literal["choice", "range"]
    MAX_SIZE_TRAIN: AtLeast1
    MIN_SIZE_TEST: AtLeast0  # 0: images keep their size
    MAX_SIZE_TEST: AtLeast1
    MAX_PIXELS: AtLeast1 = MAX_PIXELS  # largest image that is read, as width * height
    RANDOM_FLIP: Literal["none", "horizontal", "vertical"]
    CROP: CropKeys
    LSJ: _Jitter
    COPY_PASTE: _CopyPaste


class _Datasets(ConfigKeys):
    TEST: tuple[str, ...] = Field(max_length=1, description="at most one data set")
    DROP: tuple[str, ...] = ()  # kinds of faults to leave out, with the names of tools/check_coco.py


class _DataLoader(ConfigKeys):
    NUM_WORKERS: AtLeast0
    ASPECT_RATIO_GROUPING: Literal[False] = Field(
        False, description="False: the order of the images depends only on SEED"
    )
    SAMPLER_TRAIN: Literal["TrainingSampler"]


class _MovingAverage(ConfigKeys):  # moving average of the weights, which is evaluated
    ENABLED: bool = False
    DECAY: Rate = 0.9999


class _MixedPrecision(ConfigKeys):
    ENABLED: bool
    PRECISION: Literal["bf16", "fp16"] = "bf16"


class SolverKeys(ConfigKeys):
    """`SOLVER`: AdamW, the schedule, and checkpoints."""

    BASE_LR: MoreThan0
    BASE_LR_END: NotNegative
    BETAS: tuple[Rate, Rate] = Field((0.9, 0.999), description="two numbers from 0 to below 1")
    WEIGHT_DECAY: NotNegative
    WEIGHT_DECAY_NORM: NotNegative
    WEIGHT_DECAY_POS: NotNegative = 0.0  # for absolute and relative positions
    LAYER_DECAY: float = Field(1.0, gt=0, le=1, description="greater than 0 and at most 1")  # 1: no layer decay
    IMS_PER_BATCH: AtLeast1
    ACCUMULATE: AtLeast1 = 1  # number of parts in which a step's IMS_PER_BATCH images are computed
    REFERENCE_BATCH: AtLeast0 = 0  # images per step that fit BASE_LR; 0: BASE_LR is not scaled
    REFERENCE_WORLD_SIZE: int = Field(ge=0, le=0, description="0: automatic scaling would change the batch unseen")
    MAX_ITER: AtLeast1
    EPOCHS: NotNegative = 0.0  # passes over the training images, instead of MAX_ITER; 0: MAX_ITER is used
    SHORTEN_TO: NotNegative = 0.0  # with --resume: end after so many epochs in all, the rates compressed; 0: as planned
    LR_SCHEDULER_NAME: Literal["WarmupMultiStepLR", "WarmupCosineLR"]
    STEPS: Steps
    DECAY_AT: Shares = ()  # instead of STEPS: fractions of the run after which GAMMA lowers the rate
    GAMMA: float = Field(gt=0, le=1, description="greater than 0 and at most 1")
    WARMUP_ITERS: AtLeast0
    WARMUP_FACTOR: ZeroToOne
    WARMUP_METHOD: Literal["constant", "linear"]
    RESCALE_INTERVAL: bool
    BIAS_LR_FACTOR: float = Field(ge=1, le=1, description="1: biases learn at the rate of their layer")
    WEIGHT_DECAY_BIAS: None = Field(description="None: biases decay like their weights")
    CLIP_GRADIENTS: ClippingKeys
    EMA: _MovingAverage
    AMP: _MixedPrecision
    CHECKPOINT_PERIOD: AtLeast1
    CHECKPOINTS_KEPT: AtLeast0 = 2  # in addition to the best and the final checkpoint; 0: keep all


class _Off(ConfigKeys):
    ENABLED: Literal[False] = Field(description="False: evaluation has no such step")


class EvaluationKeys(ConfigKeys):
    """`TEST`: settings of evaluation."""

    EVAL_PERIOD: AtLeast0
    EVAL_EPOCHS: NotNegative = 0.0  # with SOLVER.EPOCHS: evaluate and save after every so many epochs
    EVALUATOR: Literal["auto", "hotcoco", "pycocotools"] = "auto"  # auto: hotcoco if it is installed
    PRECISION: Literal["fp32", "bf16", "tf32"] = "fp32"  # of evaluation and prediction; tf32: on a GPU
    # Detections that AP counts per image and class, best first. COCO's AP counts 100.
    DETECTIONS_PER_IMAGE: AtLeast1
    MAX_DETS: int = Field(100, ge=100, description="at least 100")
    AUG: _Off
    PRECISE_BN: _Off
    EXPECTED_RESULTS: list[Any] = Field(max_length=0, description="empty: results are not compared with any")


def image_limits(max_pixels: int = MAX_PIXELS) -> ImageLimits:
    """Return the limits of a detector's images."""
    return ImageLimits(max_pixels, "INPUT.MAX_PIXELS", "")


class DetectorKeys(ConfigKeys):
    """The keys that this package adds to a detectron2 config, reads or restricts.

    Two of detectron2's defaults change. `SEED` is 0, so that runs are repeatable. `DATALOADER.ASPECT_RATIO_GROUPING` is
    off, so that the order of images depends only on the seed.
    """

    SEED: int = Field(0, ge=0, lt=2**32, description="at least 0 and less than 2**32: it orders the images")
    OUTPUT_DIR: str = Field(min_length=1, description="a folder with a name in UTF-8")
    # Several processes: longest time that they wait for each other.
    TIMEOUT_MINUTES: float = Field(30.0, gt=0, description="greater than 0")
    WANDB: str = ""  # project of Weights & Biases to log to as well; "": none
    MODEL: _Model
    INPUT: InputKeys
    DATASETS: _Datasets
    DATALOADER: _DataLoader
    SOLVER: SolverKeys
    TEST: EvaluationKeys


def add_crossmae_config(cfg: CfgNode, keys: type[ConfigKeys] = DetectorKeys) -> None:
    """Add the keys of `DetectorKeys` to a detectron2 config, in place."""
    for name, field in keys.model_fields.items():
        if _is_section(field):
            add_crossmae_config(cfg.setdefault(name, type(cfg)()), field.annotation)  # type: ignore[arg-type]
        elif not field.is_required():
            cfg[name] = field.get_default()


def _is_section(field: FieldInfo) -> bool:
    return hasattr(field.annotation, "model_fields")


def load_det_config(name: str, overrides: Sequence[str] = ()) -> CfgNode:
    """Read and check a detection config.

    `name` is a path, a name under configs/, or a detector's safetensors file. `overrides` are `KEY VALUE` and
    `KEY=VALUE` words, in any mix, whose values are Python literals or plain text. Raises UserError, which names file
    and key, if the file does not exist or is not YAML, a key is unknown, or a value has a wrong type or range.
    """
    if Path(name).suffix == ".safetensors":
        if not (values := recorded_config(safetensors_metadata(Path(name)))):
            raise UserError(f"{name}: records no config. Name the config of its training.")
        return build_det_config([(name, values)], overrides)
    trees = list(_read_with_base(resolve_config_path(name)))
    for path, tree in trees:
        check_tool(find_tool(tree), DETECT, path)
    return build_det_config([(str(path), dict(flatten(tree))) for path, tree in trees], overrides)


def build_det_config(sources: Sequence[tuple[str, dict[str, Any]]], overrides: Sequence[str] = ()) -> CfgNode:
    """Build and check a detection config.

    `sources` are values by dotted key with the name of their file; later values replace earlier ones. `overrides` and
    errors are those of `load_det_config`.
    """
    cfg = detectron2_defaults()
    add_crossmae_config(cfg)
    for source, values in sources:
        _merge(cfg, values, source)
    given = dict(split_overrides(overrides))
    for by_steps, by_epochs in BY_EPOCHS.items():
        if by_steps in given and by_epochs in given:
            raise UserError(f"command line: {by_steps} and {by_epochs} contradict each other. Give only one of them.")
        if by_steps in given and lookup(cfg, by_epochs):
            log.info("%s on the command line replaces %s of the config", by_steps, by_epochs)
    _merge(cfg, given, "command line")
    check_config(cfg)
    if (folder := expand_path(cfg.OUTPUT_DIR, "OUTPUT_DIR")) != Path(cfg.OUTPUT_DIR):
        cfg.OUTPUT_DIR = str(folder)

    # Imported after the checks, because this import takes seconds.
    from detectron2.config import CfgNode as DetectronConfig

    det.register_backbone()
    checked = DetectronConfig(cfg)
    choose_device(checked, asked="MODEL.DEVICE" in given)
    return checked


def set_image_size(cfg: CfgNode, size: int) -> None:
    """Set all keys that depend on the size of images, in place.

    Images are scaled into a square of `size` pixels, in training and in evaluation. Anchors scale with the images. A
    grid of patches that fits into one attention window needs no windows. Key `INPUT.SIZE` calls this. 0 sets nothing.
    Raises UserError if the size does not fit the patches.
    """
    vit, anchors = cfg.MODEL.VIT, cfg.MODEL.ANCHOR_GENERATOR
    patch, before = max(vit.PATCH_SIZE, 1), max(vit.IMG_SIZE, 1)
    cfg.INPUT.SIZE = size
    if not size:
        return
    if size < patch or size % patch:
        raise UserError(f"{SIZE}: {size} does not fit the patches. Use a multiple of MODEL.VIT.PATCH_SIZE {patch}.")
    vit.IMG_SIZE = cfg.INPUT.LSJ.SIZE = size
    for split in ("TRAIN", "TEST"):
        cfg.INPUT[f"MIN_SIZE_{split}"] = (size,) if split == "TRAIN" else size
        cfg.INPUT[f"MAX_SIZE_{split}"] = size
    for key in ("SQUARE_PAD", "SQUARE_PAD_TEST"):
        vit[key] = size if vit[key] else 0  # 0 keeps rectangles
    if size // patch <= vit.WINDOW_SIZE:
        vit.WINDOW_SIZE = 0
    scaled = [[side * size / before for side in level] for level in anchors.SIZES]
    anchors.SIZES = [[int(side) if side == int(side) else side for side in level] for level in scaled]


def choose_device(cfg: CfgNode, asked: bool) -> None:
    """Choose the CPU if there is no GPU.

    `MODEL.DEVICE` and `SOLVER.AMP.ENABLED` change in place. Raises UserError if the user `asked` for a missing GPU.
    """
    import torch  # slow import

    from crossmae.training.devices import check_mps

    device, count = cfg.MODEL.DEVICE, torch.cuda.device_count()
    if device.startswith("cuda") and not torch.cuda.is_available():
        if asked:
            raise UserError(f"MODEL.DEVICE: torch finds no GPU for {device}. Use MODEL.DEVICE=cpu.")
        log.info("no GPU found: MODEL.DEVICE is cpu")
        device = cfg.MODEL.DEVICE = "cpu"
    elif device == "cpu" and torch.cuda.is_available() and not asked:
        log.info("MODEL.DEVICE is cpu in the config, although there is a GPU. To use it: MODEL.DEVICE=cuda")
    _, _, index = device.partition(":")
    if index and int(index) >= count:
        raise UserError(f"MODEL.DEVICE: there is no {device}. The last GPU is cuda:{count - 1}.")
    check_mps(device, "MODEL.DEVICE")
    if device in ("cpu", "mps") and cfg.SOLVER.AMP.ENABLED:
        log.info("SOLVER.AMP.ENABLED is False: mixed precision is for CUDA GPUs")
        cfg.SOLVER.AMP.ENABLED = False


def split_overrides(words: Sequence[str]) -> list[tuple[str, str]]:
    """Split `["A.B", "1", "C=2"]` into `[("A.B", "1"), ("C", "2")]`."""
    pairs, queue = [], iter(words)
    for word in queue:
        key, separator, value = word.partition("=")
        if not _KEY.fullmatch(key):
            raise UserError(f"command line: {word!r} is no setting. Write KEY VALUE or KEY=VALUE.")
        following = value if separator else next(queue, None)
        if following is None:
            raise UserError(f"command line: {key} has no value. Write {key}=VALUE.")
        pairs.append((key, following))
    return pairs


def _read_with_base(path: Path, seen: tuple[Path, ...] = ()) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Yield a YAML file after its `_BASE_` file, with their paths."""
    if path.resolve() in seen:
        raise UserError(f"{path}: {BASE_KEY} leads back to the file itself. Name another file.")
    tree = read_yaml(path)
    base = tree.pop(BASE_KEY, None)
    if base is not None:
        if not isinstance(base, str) or not (path.parent / base).is_file():
            raise UserError(f"{path}: {BASE_KEY} {base!r} is no file. Name one existing file.")
        yield from _read_with_base(path.parent / base, (*seen, path.resolve()))
    yield path, tree


def flatten(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield dotted keys and values of nested sections."""
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _merge(cfg: CfgNode, values: dict[str, Any], source: str) -> None:
    for by_steps, by_epochs in BY_EPOCHS.items():
        if by_steps in values and by_epochs not in values:
            _set(cfg, by_epochs, type(lookup(cfg, by_epochs))(), source)
    if SIZE in values:  # sets keys of earlier files. Keys that are given with it win
        for key in ("MODEL.VIT.PATCH_SIZE", SIZE):
            if key in values:
                _set(cfg, key, values[key], source)
        set_image_size(cfg, cfg.INPUT.SIZE)
    for key, value in values.items():
        _set(cfg, key, value, source)


def _set(cfg: CfgNode, key: str, value: Any, source: str) -> None:
    *sections, last = str(key).split(".")
    node: Any = cfg
    for section in sections:
        node = node.get(section) if isinstance(node, CfgNode) else None
    if not isinstance(node, CfgNode) or last not in node:
        near = difflib.get_close_matches(str(key), list(dict(flatten(cfg))), n=1)
        advice = f"Did you mean {near[0]}?" if near else "Remove it."
        raise UserError(f"{source}: unknown key {key}. {advice}")
    default = node[last]
    if isinstance(default, CfgNode):
        raise UserError(f"{source}: {key} is a section, not a key. Set one of its keys: {', '.join(sorted(default))}.")
    try:
        node[last] = _coerce(value, default)
    except TypeError:
        wanted = type(default).__name__
        raise UserError(
            f"{source}: {key} cannot be {abbreviate(repr(value))}. Use a value of type {wanted}, such as {default!r}."
        ) from None


def lookup(cfg: CfgNode, key: str) -> Any:
    """Look up a dotted key."""
    return reduce(getitem, key.split("."), cfg)


def _coerce(value: Any, default: Any) -> Any:
    """Convert a value to the type of `default`, or raise TypeError."""
    if isinstance(value, str) and not isinstance(default, str):
        boolean = value.lower() in ("true", "false")
        with suppress(ValueError):
            value = load_literal(value.capitalize() if boolean else value)
    if default is None or type(value) is type(default):
        return value
    if isinstance(default, float) and type(value) is int:
        return float(value)
    if isinstance(default, (list, tuple)) and isinstance(value, (list, tuple)):
        return type(default)(value)
    raise TypeError


def check_config(cfg: CfgNode) -> None:
    """Check values, and reject settings that contradict each other."""
    keys = read_keys(cfg)
    vit, images, lsj = keys.MODEL.VIT, keys.INPUT, keys.INPUT.LSJ
    _check_heads(keys)
    outside = [index for index in vit.GLOBAL_BLOCKS if index not in range(vit.DEPTH)]
    if outside:
        raise UserError(f"MODEL.VIT.GLOBAL_BLOCKS: there is no block {outside}. The last block is {vit.DEPTH - 1}.")
    if lsj.MIN_SCALE > lsj.MAX_SCALE:
        raise UserError(
            f"INPUT.LSJ.MIN_SCALE: {lsj.MIN_SCALE} is more than INPUT.LSJ.MAX_SCALE {lsj.MAX_SCALE}. Lower it."
        )
    if lsj.ENABLED and images.CROP.ENABLED:
        raise UserError("INPUT.LSJ.ENABLED: large-scale jitter crops already. Set INPUT.CROP.ENABLED=False.")
    for key, needed in (("INPUT.LSJ.ENABLED", True), ("MODEL.MASK_ON", True), ("MODEL.KEYPOINT_ON", False)):
        if images.COPY_PASTE.ENABLED and lookup(cfg, key) != needed:
            raise UserError(f"INPUT.COPY_PASTE.ENABLED: {key} is {lookup(cfg, key)}. Set {key}={needed}.")
    if keys.TEST.MAX_DETS > 100 and cfg.TEST.DETECTIONS_PER_IMAGE < keys.TEST.MAX_DETS:
        words = "TEST.DETECTIONS_PER_IMAGE %d is less than TEST.MAX_DETS %d: AP cannot count more. Raise the first."
        log.warning(words, cfg.TEST.DETECTIONS_PER_IMAGE, keys.TEST.MAX_DETS)
    if lsj.ENABLED and vit.SQUARE_PAD > lsj.SIZE:
        log.info("MODEL.VIT.SQUARE_PAD %d pads images of INPUT.LSJ.SIZE %d", vit.SQUARE_PAD, lsj.SIZE)
    _check_sizes(cfg, keys)


def _check_sizes(cfg: CfgNode, keys: DetectorKeys) -> None:
    """Reject sizes of images that do not fit each other."""
    vit, images, lsj = keys.MODEL.VIT, keys.INPUT, keys.INPUT.LSJ
    by_size = f" of {SIZE}" if images.SIZE else ""
    for split in ("TRAIN", "TEST") if images.SIZE else ():
        least, most = (getattr(images, f"{side}_SIZE_{split}") for side in ("MIN", "MAX"))
        if np.max(least) > most and not (split == "TRAIN" and lsj.ENABLED):
            what = f"{np.max(least)} is more than INPUT.MAX_SIZE_{split} {most}{by_size}"
            raise UserError(f"INPUT.MIN_SIZE_{split}: {what}. Set both.")
    for name, key in (
        ("SQUARE_PAD", "INPUT.LSJ.SIZE" if lsj.ENABLED else "INPUT.MAX_SIZE_TRAIN"),
        ("SQUARE_PAD_TEST", "INPUT.MAX_SIZE_TEST"),
    ):
        pad, most, least = getattr(vit, name), lookup(cfg, key), key.replace("MAX_SIZE", "MIN_SIZE")
        if pad % vit.PATCH_SIZE:
            raise UserError(f"MODEL.VIT.{name}: {pad} does not fit the patches. Use a multiple of {vit.PATCH_SIZE}.")
        # Images must fit the square, because detectron2 would crop them without a warning.
        if pad and 0 in np.atleast_1d(lookup(cfg, least)):
            raise UserError(f"MODEL.VIT.{name}: {least} 0 resizes no image, so images may not fit. Set {least}.")
        if pad and pad < most:
            raise UserError(
                f"MODEL.VIT.{name}: images of {key} {most} do not fit into {pad}{by_size}. Raise MODEL.VIT.{name}."
            )


def _check_heads(keys: DetectorKeys) -> None:
    """Reject values of heads and crops that do not fit each other."""
    model, images = keys.MODEL, keys.INPUT
    for name, head in (("RPN", model.RPN), ("ROI_HEADS", model.ROI_HEADS)):
        if len(head.IOU_LABELS) != len(head.IOU_THRESHOLDS) + 1:
            wanted = f"{len(head.IOU_THRESHOLDS) + 1} labels, one more than IOU_THRESHOLDS"
            raise UserError(f"MODEL.{name}.IOU_LABELS: {head.IOU_LABELS} does not fit. Give {wanted}.")
    if model.VIT.EMBED_DIM % model.VIT.NUM_HEADS:
        raise UserError(
            f"MODEL.VIT.NUM_HEADS: {model.VIT.NUM_HEADS} does not divide MODEL.VIT.EMBED_DIM {model.VIT.EMBED_DIM}. "
            "Give another number."
        )
    cascade = model.ROI_BOX_CASCADE_HEAD
    if len(cascade.IOUS) != len(cascade.BBOX_REG_WEIGHTS):
        stages = len(cascade.BBOX_REG_WEIGHTS)
        raise UserError(f"MODEL.ROI_BOX_CASCADE_HEAD.IOUS: {cascade.IOUS} are not {stages}. Give one per stage.")
    if images.MIN_SIZE_TRAIN_SAMPLING == "range" and np.size(images.MIN_SIZE_TRAIN) != 2:
        raise UserError(f"INPUT.MIN_SIZE_TRAIN: {images.MIN_SIZE_TRAIN} is no range. Give the least and the most.")
    if images.CROP.TYPE.startswith("relative") and max(images.CROP.SIZE) > 1:
        raise UserError(f"INPUT.CROP.SIZE: {images.CROP.SIZE} are not shares of the image. Give two of at most 1.")


def read_keys(cfg: CfgNode) -> DetectorKeys:
    """Read the keys of `DetectorKeys` from a detectron2 config.

    Raises UserError for the first value that is not allowed, with its key and the allowed values.
    """
    try:
        return DetectorKeys.model_validate(cfg)
    except ValidationError as error:
        path, keys, field = "", DetectorKeys, None
        for part in error.errors()[0]["loc"]:
            if field is not None and not _is_section(field):
                break
            path, field = f"{path}.{part}".lstrip("."), keys.model_fields[str(part)]
            keys = field.annotation  # type: ignore[assignment]
        assert field is not None
        expected = field.description or " or ".join(", ".join(get_args(field.annotation)).rsplit(", ", 1))
        expected = expected or f"of type {field.annotation}"
        raise UserError(f"{path}: {lookup(cfg, path)!r} is not allowed. It must be {expected}.") from None
