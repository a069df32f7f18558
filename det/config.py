"""The keys that this package adds to a detectron2 config, and how a config is read: safe YAML, then overrides.

detectron2's own reader evaluates Python tags and opens URLs; this one does neither, and its errors name file and key.
"""

from __future__ import annotations

import ast
import difflib
import logging
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode, get_cfg

from crossmae.errors import UserError
from crossmae.training.config import read_yaml, resolve_config_path
from det.data.copy_paste import check_copy_paste

log = logging.getLogger(__name__)

BASE_KEY = "_BASE_"
_KEY = re.compile(r"[A-Z_][A-Z0-9_]*(\.[A-Z0-9_]+)*")


# In steps, and what says the same in epochs or shares of the run: the later of file and command line counts.
BY_EPOCHS = {
    "SOLVER.MAX_ITER": "SOLVER.EPOCHS",
    "SOLVER.STEPS": "SOLVER.DECAY_AT",
    "TEST.EVAL_PERIOD": "TEST.EVAL_EPOCHS",
}


def add_crossmae_config(cfg: CfgNode) -> None:
    """Add the keys of the backbone, its recipe and its data to a detectron2 config, in place.

    Two of detectron2's defaults change: `SEED` is 0, so that runs repeat, and `DATALOADER.ASPECT_RATIO_GROUPING` is
    off, so that the order of images depends on the seed alone.
    """
    cfg.SEED = 0
    cfg.DATALOADER.ASPECT_RATIO_GROUPING = False

    vit = cfg.MODEL.VIT = CfgNode()
    vit.IMG_SIZE = 1024  # pixels; sizes the relative positions of global blocks
    vit.PRETRAIN_IMG_SIZE = 224  # pixels; sizes the position table, so it must be that of pretraining
    vit.PATCH_SIZE = 16
    vit.EMBED_DIM = 768
    vit.DEPTH = 12
    vit.NUM_HEADS = 12
    vit.MLP_RATIO = 4.0
    vit.DROP_PATH = 0.1  # of the last block; grows linearly from 0 in the first
    vit.WINDOW_SIZE = 14  # patches; 0: every block is global
    vit.GLOBAL_BLOCKS = [2, 5, 8, 11]
    vit.REL_POS = True
    vit.POS_EMBED = "resize"  # or tiled, absolute_win: how the position table of pretraining covers the image
    vit.ATTENTION = (
        "folded"  # or materialized: equal but for rounding, with an N x N matrix; see det/backbone/attention.py
    )
    vit.ACTIVATION_CHECKPOINTING = False  # compute blocks again in backward instead of keeping them
    vit.FROZEN_STAGES = -1  # 0: patch embedding and positions are not trained; n: nor are the first n blocks
    # Simple feature pyramid
    vit.OUT_CHANNELS = 256
    vit.SCALE_FACTORS = [4.0, 2.0, 1.0, 0.5]  # p2, p3, p4, p5 with patches of 16 pixels
    vit.NORM = "LN"
    vit.MAX_POOL_LEVEL = True  # p6
    vit.SQUARE_PAD = 0  # pixels, in training; 0: pad to the largest image of the batch
    vit.SQUARE_PAD_TEST = 0  # the same for evaluation and prediction

    # Large-scale jitter: scale into a square of SIZE times a random factor, then crop to SIZE.
    cfg.INPUT.LSJ = CfgNode({"ENABLED": False, "SIZE": 1024, "MIN_SCALE": 0.1, "MAX_SCALE": 2.0})

    # Simple copy-paste (arXiv 2012.07177): objects of another training image are pasted with probability PROB.
    cfg.INPUT.COPY_PASTE = CfgNode({"ENABLED": False, "PROB": 0.5})
    cfg.DATASETS.DROP = ()  # names of faults whose entries may be left out, as tools/check_coco.py calls them

    cfg.SOLVER.BETAS = (0.9, 0.999)  # of AdamW
    cfg.SOLVER.WEIGHT_DECAY_POS = 0.0  # of absolute and relative positions
    cfg.SOLVER.ACCUMULATE = 1  # parts that the IMS_PER_BATCH images of a step are computed in
    cfg.SOLVER.REFERENCE_BATCH = 0  # images a step that BASE_LR is for; 0: BASE_LR is used as it is
    cfg.SOLVER.EPOCHS = 0.0  # passes over the training images, instead of MAX_ITER; 0: MAX_ITER counts
    cfg.SOLVER.DECAY_AT = ()  # shares of the run after which the rate falls by GAMMA, instead of STEPS
    cfg.SOLVER.EMA = CfgNode({"ENABLED": False, "DECAY": 0.9999})  # moving average of the weights, which is evaluated
    cfg.SOLVER.LAYER_DECAY = 1.0  # learning rate of each encoder layer over that of the next; 1: none
    cfg.SOLVER.AMP.PRECISION = "bf16"  # bf16 or fp16, where SOLVER.AMP.ENABLED
    cfg.SOLVER.CHECKPOINTS_KEPT = 2  # besides the best and the final one; 0: all
    cfg.TEST.EVAL_EPOCHS = 0.0  # evaluate and save every so many epochs, where SOLVER.EPOCHS is used
    cfg.TEST.EVALUATOR = "auto"  # hotcoco, pycocotools, or auto: hotcoco where it is installed


def load_det_config(name: str, overrides: Sequence[str] = ()) -> CfgNode:
    """Read a detection config.

    Args:
        name: a path, or a name under configs/.
        overrides: `KEY VALUE` and `KEY=VALUE` words, mixed as you like; values are Python literals or plain text.

    Returns:
        The checked config; not frozen.

    Raises:
        UserError: no such file, no YAML, an unknown key, a wrong type, a value out of range; names file and key.
    """
    cfg = get_cfg()
    add_crossmae_config(cfg)
    path = resolve_config_path(name)
    _merge_tree(cfg, _read_with_base(path), "", cfg, str(path))
    pairs = split_overrides(overrides)
    words = {key for key, _ in pairs}
    for by_steps, by_epochs in BY_EPOCHS.items():
        if by_steps in words and by_epochs in words:
            raise UserError(f"command line: {by_steps} and {by_epochs} exclude each other")
        if by_steps in words and lookup(cfg, by_epochs):
            log.info("%s counts, as the command line says, not %s", by_steps, by_epochs)
            _set(cfg, by_epochs, type(lookup(cfg, by_epochs))(), "command line")
    for key, text in pairs:
        _set(cfg, key, text, "command line")
    check_config(cfg)
    choose_device(cfg, asked="MODEL.DEVICE" in dict(pairs))
    return cfg


def choose_device(cfg: CfgNode, asked: bool) -> None:
    """Train on the CPU where there is no GPU, and say so; an error if the command line `asked` for the GPU.

    Raises:
        UserError: also for a GPU of a higher number than there are.
    """
    count = torch.cuda.device_count()
    if cfg.MODEL.DEVICE.startswith("cuda") and not torch.cuda.is_available():
        if asked:
            raise UserError(f"MODEL.DEVICE is {cfg.MODEL.DEVICE}, but torch finds no GPU; use MODEL.DEVICE cpu")
        log.info("no GPU found: MODEL.DEVICE is cpu")
        cfg.MODEL.DEVICE = "cpu"
    elif cfg.MODEL.DEVICE == "cpu" and torch.cuda.is_available() and not asked:
        log.info("MODEL.DEVICE is cpu, as the config says, though there is a GPU: MODEL.DEVICE=cuda takes it")
    _, _, index = cfg.MODEL.DEVICE.partition(":")
    if index and int(index) >= count:
        raise UserError(f"MODEL.DEVICE is {cfg.MODEL.DEVICE}, but the GPUs that torch finds end at cuda:{count - 1}")
    if cfg.MODEL.DEVICE == "cpu" and cfg.SOLVER.AMP.ENABLED:
        log.info("SOLVER.AMP.ENABLED is False: mixed precision is for GPUs")
        cfg.SOLVER.AMP.ENABLED = False


def split_overrides(words: Sequence[str]) -> list[tuple[str, str]]:
    """`["A.B", "1", "C=2"]` to `[("A.B", "1"), ("C", "2")]`.

    Raises:
        UserError: a word where a key is expected is none, or the last key has no value.
    """
    pairs, queue = [], iter(words)
    for word in queue:
        key, separator, value = word.partition("=")
        if not _KEY.fullmatch(key):
            raise UserError(f"command line: expected KEY VALUE or KEY=VALUE, got {word!r}")
        if not separator:
            found = next(queue, None)
            if found is None:
                raise UserError(f"command line: {key} has no value")
            value = found
        pairs.append((key, value))
    return pairs


def _read_with_base(path: Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """A YAML file laid over the file that its `_BASE_` names, relative to its own folder."""
    if path.resolve() in seen:
        raise UserError(f"{path}: {BASE_KEY} leads back to the file itself")
    tree = read_yaml(path)
    base = tree.pop(BASE_KEY, None)
    if base is None:
        return tree
    if not isinstance(base, str) or not (path.parent / base).is_file():
        raise UserError(f"{path}: {BASE_KEY} must name one existing file, got {base!r}")
    below = _read_with_base(path.parent / base, (*seen, path.resolve()))
    for by_steps, by_epochs in BY_EPOCHS.items():
        section, key = by_steps.split(".")
        if key in _section(tree, section) and by_epochs.split(".")[1] not in _section(tree, section):
            _section(below, section).pop(by_epochs.split(".")[1], None)
    return _overlay(below, tree)


def _section(tree: dict[str, Any], name: str) -> dict[str, Any]:
    """A section of a file; empty where the file has none, or something else in its place."""
    found = tree.get(name)
    return found if isinstance(found, dict) else {}


def _overlay(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        merged[key] = _overlay(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def _merge_tree(cfg: CfgNode, tree: dict[str, Any], prefix: str, root: CfgNode, source: str) -> None:
    for key, value in tree.items():
        full = f"{prefix}{key}"
        if isinstance(value, dict) and isinstance(cfg.get(key), CfgNode):
            _merge_tree(cfg[key], value, f"{full}.", root, source)
        else:
            _set(root, full, value, source)


def _set(cfg: CfgNode, key: str, value: Any, source: str) -> None:
    """Set one dotted key to a value of the type that it has now."""
    *sections, last = str(key).split(".")
    node: Any = cfg
    for section in sections:
        node = node.get(section) if isinstance(node, CfgNode) else None
    if not isinstance(node, CfgNode) or last not in node:
        near = difflib.get_close_matches(str(key), list(leaf_keys(cfg)), n=1)
        raise UserError(f"{source}: unknown key {key}" + (f" (did you mean {near[0]}?)" if near else ""))
    default = node[last]
    if isinstance(default, CfgNode):
        raise UserError(f"{source}: {key} is a section, not a key; it has {', '.join(sorted(default))}")
    try:
        node[last] = _coerce(value, default)
    except TypeError:
        wanted = type(default).__name__
        raise UserError(f"{source}: {key} must be of type {wanted}, like {default!r}, got {value!r}") from None


def lookup(cfg: CfgNode, key: str) -> Any:
    """The value of a dotted key."""
    value: Any = cfg
    for part in key.split("."):
        value = value[part]
    return value


def leaf_keys(cfg: CfgNode, prefix: str = "") -> Iterator[str]:
    """Every dotted key that is no section."""
    for key, value in cfg.items():
        if isinstance(value, CfgNode):
            yield from leaf_keys(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


def _coerce(value: Any, default: Any) -> Any:
    """`value`, decoded if it is text, as the type of `default`; TypeError where it is of another kind."""
    if isinstance(value, str) and not isinstance(default, str):
        value = _literal(value)
    if default is None or type(value) is type(default):
        return value
    if isinstance(default, float) and type(value) is int:
        return float(value)
    if isinstance(default, (list, tuple)) and isinstance(value, (list, tuple)):
        return type(default)(value)
    raise TypeError


def _literal(text: str) -> Any:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _are_rising_shares(values: Sequence[Any]) -> bool:
    return all(isinstance(share, float) and 0 < share < 1 for share in values) and list(values) == sorted(values)


# What a value must be beyond its type: key, test, description.
_CHECKS: list[tuple[str, Callable[[Any], bool], str]] = [
    ("SOLVER.IMS_PER_BATCH", lambda v: v >= 1, "at least 1"),
    ("SOLVER.MAX_ITER", lambda v: v >= 1, "at least 1"),
    ("SOLVER.ACCUMULATE", lambda v: v >= 1, "at least 1"),
    ("SOLVER.REFERENCE_BATCH", lambda v: v >= 0, "at least 0"),
    ("SOLVER.CHECKPOINTS_KEPT", lambda v: v >= 0, "at least 0"),
    ("SOLVER.EPOCHS", lambda v: v >= 0, "at least 0"),
    ("SOLVER.DECAY_AT", _are_rising_shares, "rising shares of 1"),
    ("SOLVER.EMA.DECAY", lambda v: 0 <= v < 1, "at least 0 and less than 1"),
    ("SOLVER.CHECKPOINT_PERIOD", lambda v: v >= 1, "at least 1"),
    ("SOLVER.BASE_LR", lambda v: v > 0, "greater than 0"),
    ("SOLVER.LAYER_DECAY", lambda v: 0 < v <= 1, "greater than 0 and at most 1"),
    ("SOLVER.AMP.PRECISION", lambda v: v in ("bf16", "fp16"), "bf16 or fp16"),
    ("SOLVER.LR_SCHEDULER_NAME", lambda v: v in ("WarmupMultiStepLR", "WarmupCosineLR"),
     "WarmupMultiStepLR or WarmupCosineLR"),
    ("SOLVER.REFERENCE_WORLD_SIZE", lambda v: v == 0, "0: automatic scaling would change the batch unseen"),
    ("SOLVER.BIAS_LR_FACTOR", lambda v: v == 1, "1: biases learn at the rate of their layer"),
    ("SOLVER.WEIGHT_DECAY_BIAS", lambda v: v is None, "None: biases decay like their weights"),
    ("OUTPUT_DIR", lambda v: bool(v), "a folder"),
    ("SOLVER.STEPS", lambda v: list(v) == sorted(v), "rising"),
    ("SOLVER.WARMUP_ITERS", lambda v: v >= 0, "at least 0"),
    ("SOLVER.WEIGHT_DECAY", lambda v: v >= 0, "at least 0"),
    ("SOLVER.BETAS", lambda v: len(v) == 2 and all(0 <= beta < 1 for beta in v), "two numbers from 0 to below 1"),
    ("TEST.EVAL_PERIOD", lambda v: v >= 0, "at least 0"),
    ("TEST.AUG.ENABLED", lambda v: not v, "False: evaluation sees every image once"),
    ("TEST.PRECISE_BN.ENABLED", lambda v: not v, "False: there is no such step here"),
    ("TEST.EXPECTED_RESULTS", lambda v: not v, "empty: results are not compared with any"),
    ("MODEL.PIXEL_MEAN", lambda v: len(v) == 3, "three numbers"),
    ("MODEL.PIXEL_STD", lambda v: len(v) == 3 and min(v) > 0, "three numbers greater than 0"),
    ("MODEL.VIT.EMBED_DIM", lambda v: v >= 1, "at least 1"),
    ("MODEL.VIT.OUT_CHANNELS", lambda v: v >= 1, "at least 1"),
    ("DATASETS.TEST", lambda v: len(v) <= 1, "at most one data set"),
    ("SEED", lambda v: v >= 0, "at least 0: the order of the images comes from it"),
    ("DATALOADER.NUM_WORKERS", lambda v: v >= 0, "at least 0"),
    ("DATALOADER.ASPECT_RATIO_GROUPING", lambda v: not v, "False: the order of the images depends on SEED alone"),
    ("DATALOADER.SAMPLER_TRAIN", lambda v: v == "TrainingSampler", "TrainingSampler"),
    ("INPUT.RANDOM_FLIP", lambda v: v in ("none", "horizontal", "vertical"), "none, horizontal or vertical"),
    ("INPUT.FORMAT", lambda v: v in ("RGB", "BGR"), "RGB or BGR"),
    ("MODEL.LOAD_PROPOSALS", lambda v: not v, "False: proposals come from the detector itself"),
    ("INPUT.MASK_FORMAT", lambda v: v in ("polygon", "bitmask"), "polygon or bitmask"),
    ("INPUT.COPY_PASTE.PROB", lambda v: 0 <= v <= 1, "from 0 to 1"),
    ("INPUT.LSJ.SIZE", lambda v: v >= 1, "at least 1"),
    ("INPUT.LSJ.MIN_SCALE", lambda v: v > 0, "greater than 0"),
    ("TEST.EVALUATOR", lambda v: v in ("auto", "hotcoco", "pycocotools"), "auto, hotcoco or pycocotools"),
    ("TEST.EVAL_EPOCHS", lambda v: v >= 0, "at least 0"),
    ("MODEL.DEVICE", lambda v: bool(re.fullmatch(r"cpu|cuda(:\d+)?", v)), "cpu, cuda or cuda:N"),
    ("MODEL.ROI_HEADS.NUM_CLASSES", lambda v: v >= 1, "at least 1"),
    ("MODEL.VIT.PATCH_SIZE", lambda v: v >= 1, "at least 1"),
    ("MODEL.VIT.DEPTH", lambda v: v >= 1, "at least 1"),
    ("MODEL.VIT.DROP_PATH", lambda v: 0 <= v < 1, "at least 0 and less than 1"),
    ("MODEL.VIT.WINDOW_SIZE", lambda v: v >= 0, "at least 0"),
    ("MODEL.VIT.MLP_RATIO", lambda v: v > 0, "greater than 0"),
    ("MODEL.VIT.NUM_HEADS", lambda v: v >= 1, "at least 1"),
    ("MODEL.VIT.SQUARE_PAD", lambda v: v >= 0, "at least 0"),
    ("MODEL.VIT.SQUARE_PAD_TEST", lambda v: v >= 0, "at least 0"),
    ("MODEL.VIT.POS_EMBED", lambda v: v in ("resize", "tiled", "absolute_win"), "resize, tiled or absolute_win"),
    ("MODEL.VIT.ATTENTION", lambda v: v in ("folded", "materialized"), "folded or materialized"),
    ("MODEL.VIT.FROZEN_STAGES", lambda v: v >= -1, "at least -1"),
]  # fmt: skip


def check_config(cfg: CfgNode) -> None:
    """Check values beyond their type, and pairs that contradict each other.

    Raises:
        UserError: names the key, its value and what it must be.
    """
    for key, test, expected in _CHECKS:
        value = lookup(cfg, key)
        if not test(value):
            raise UserError(f"{key} must be {expected}, got {value!r}")
    vit, lsj = cfg.MODEL.VIT, cfg.INPUT.LSJ
    outside = [index for index in vit.GLOBAL_BLOCKS if index not in range(vit.DEPTH)]
    if outside:
        raise UserError(
            f"MODEL.VIT.GLOBAL_BLOCKS has {outside}, but MODEL.VIT.DEPTH {vit.DEPTH} ends at {vit.DEPTH - 1}"
        )
    if lsj.MIN_SCALE > lsj.MAX_SCALE:
        raise UserError(f"INPUT.LSJ.MIN_SCALE {lsj.MIN_SCALE} is greater than INPUT.LSJ.MAX_SCALE {lsj.MAX_SCALE}")
    if lsj.ENABLED and cfg.INPUT.CROP.ENABLED:
        raise UserError("INPUT.LSJ.ENABLED and INPUT.CROP.ENABLED exclude each other: large-scale jitter crops already")
    check_copy_paste(cfg)
    _check_square_pad(cfg)


def _check_square_pad(cfg: CfgNode) -> None:
    """Images must fit the square: detectron2 would crop them without a word."""
    vit, train = cfg.MODEL.VIT, "INPUT.LSJ.SIZE" if cfg.INPUT.LSJ.ENABLED else "INPUT.MAX_SIZE_TRAIN"
    for name, pad, key in (
        ("SQUARE_PAD", vit.SQUARE_PAD, train),
        ("SQUARE_PAD_TEST", vit.SQUARE_PAD_TEST, "INPUT.MAX_SIZE_TEST"),
    ):
        if pad % vit.PATCH_SIZE:
            raise UserError(f"MODEL.VIT.{name} {pad} is no multiple of MODEL.VIT.PATCH_SIZE {vit.PATCH_SIZE}")
        if name == "SQUARE_PAD" and cfg.INPUT.LSJ.ENABLED and pad > cfg.INPUT.LSJ.SIZE:
            log.info("MODEL.VIT.SQUARE_PAD %d is more than INPUT.LSJ.SIZE %d: a part is empty", pad, cfg.INPUT.LSJ.SIZE)
        least = key.replace("MAX_SIZE", "MIN_SIZE")
        if pad and least != key and 0 in np.atleast_1d(lookup(cfg, least)):
            raise UserError(f"MODEL.VIT.{name} {pad} needs images that fit, but {least} 0 resizes none")
        if pad and pad < lookup(cfg, key):
            raise UserError(f"MODEL.VIT.{name} {pad} is smaller than {key} {lookup(cfg, key)}: images would be cropped")
