"""Proves that every detection recipe is what its header says: it builds whole, its encoder is the published one, its
launch commands parse and make the steps that it states, its comments count right, and it repeats nothing of its base.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from functools import cache
from math import ceil
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("detectron2", reason="detectron2 is not installed: python tools/install_detectron2.py")

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from crossmae.models.sizes import SIZES
from crossmae.training.config import CONFIG_ROOT, read_yaml, resolve_config_path
from det.config import BASE_KEY, EvaluationKeys, SolverKeys, flatten, load_det_config, lookup
from det.training.optimizer import StepSchedule, resolve_schedule
from tools.train_net import build_parser

UNPUBLISHED = {"demo_mask_rcnn", "things_mask_rcnn", "laptop_mask_rcnn"}  # for CPUs, see test_laptop.py
RECIPES = sorted(p for p in CONFIG_ROOT.glob("*.yaml") if p.stem not in UNPUBLISHED and "probe" not in p.stem)
BASE = CONFIG_ROOT / "coco_mask_rcnn.yaml"
TABLE = CONFIG_ROOT.parent / "docs" / "detection_recipes.md"
COCO = 117_266  # images of COCO train2017 that have objects
PUBLISHED_STEPS = 184_375


@dataclass(frozen=True)
class Recipe:
    """Size; published box and mask AP where there are (detectron2's model zoo); epochs; images of a step.

    heads: GB per image that autograd keeps of pyramid, RPN and heads, counted on a CPU; for LVIS with what detectron2
    publishes more than for COCO.
    """

    size: str
    epochs: int
    batch: int = 64
    published: str = ""
    heads: float = 1.1


RECIPE = {
    "coco_mask_rcnn": Recipe("base_patch16", 100, published="51.6 / 45.9"),
    "coco_mask_rcnn_vits": Recipe("small_patch16", 100),
    "coco_mask_rcnn_vitl": Recipe("large_patch16", 100, published="55.5 / 49.2"),
    "coco_mask_rcnn_vith": Recipe("huge_patch14", 75, published="56.7 / 50.2"),
    "coco_cascade_mask_rcnn_vitb": Recipe("base_patch16", 100, published="54.0 / 46.7", heads=1.8),
    "coco_cascade_mask_rcnn_vitl": Recipe("large_patch16", 100, published="57.6 / 50.0", heads=1.8),
    "coco_cascade_mask_rcnn_vith": Recipe("huge_patch14", 75, published="58.7 / 51.0", heads=1.8),
    "lvis_mask_rcnn_vitb": Recipe("base_patch16", 100, published="40.2 / 38.2", heads=1.1 + 3.5),
    "coco_mask_rcnn_1gpu_12ep": Recipe("base_patch16", 12, 16),
    "coco_mask_rcnn_1gpu_25ep": Recipe("base_patch16", 25, 16),
    "coco_mask_rcnn_1gpu_50ep": Recipe("base_patch16", 50, 16),
    "coco_mask_rcnn_vitl_1gpu_25ep": Recipe("large_patch16", 25, 16),
    "own_mask_rcnn": Recipe("base_patch16", 50, 8),
    "small_mask_rcnn": Recipe("small_patch16", 50, 8, heads=0.3),
}
OWN = ("own_mask_rcnn", "small_mask_rcnn")
# Size: parameters for classification with 1000 classes (method specification, section 6); global blocks; layer decay;
# drop path (section 3.1; none of the last two is published for S).
ENCODERS = {
    "small_patch16": (22_050_664, [2, 5, 8, 11], 0.7, 0.1),
    "base_patch16": (86_567_656, [2, 5, 8, 11], 0.7, 0.1),
    "large_patch16": (304_326_632, [5, 11, 17, 23], 0.8, 0.4),
    "huge_patch14": (632_045_800, [7, 15, 23, 31], 0.9, 0.5),
}


def header(path: Path) -> str:
    """The comment that a file opens with, without its signs."""
    lines = path.read_text(encoding="utf-8").splitlines()
    end = next(number for number, line in enumerate(lines) if not line.startswith("#"))
    return "\n".join(line.removeprefix("#").removeprefix(" ") for line in lines[:end])


def flat(path: Path) -> str:
    """The header in one line."""
    return " ".join(header(path).split())


def row(path: Path) -> str:
    """The line of a file in the table of all recipes."""
    return next(line for line in TABLE.read_text().splitlines() if line.startswith(f"| `{path.name}` |"))


@dataclass(frozen=True)
class Launch:
    """One command of a header."""

    label: str
    arguments: Any
    cfg: CfgNode

    @property
    def images_at_once(self) -> float:
        """Images that one process computes together."""
        return self.cfg.SOLVER.IMS_PER_BATCH / self.cfg.SOLVER.ACCUMULATE / self.arguments.num_gpus


@cache
def launches(path: Path) -> tuple[Launch, ...]:
    """Every command of a header. A label ends in a colon, the command is the whole next line: it can be copied."""
    found = re.findall(r"^  ([^:(,\n]+)[^:\n]*:\n    (crossmae .*)$", header(path), re.MULTILINE)
    return tuple(parse_launch(label.strip(), command) for label, command in found)


def parse_launch(label: str, command: str) -> Launch:
    program, name, *words = shlex.split(command)
    assert (program, name) == ("crossmae", "detect")
    arguments = build_parser().parse_intermixed_args(words)
    return Launch(label, arguments, load_det_config(arguments.config_file, [*arguments.overrides, "MODEL.DEVICE=cpu"]))


@cache
def build(path: Path) -> tuple[CfgNode, nn.Module]:
    """The whole detector, without memory."""
    cfg = load_det_config(str(path), ["MODEL.DEVICE=cpu"])
    cfg.MODEL.DEVICE = "meta"
    with torch.device("meta"):
        return cfg, build_model(cfg)


def schedule(cfg: CfgNode) -> StepSchedule:
    return resolve_schedule(SolverKeys.model_validate(cfg.SOLVER), EvaluationKeys.model_validate(cfg.TEST), COCO)


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def nested_orders(tree: dict[str, Any], prefix: str = "") -> dict[str, list[str]]:
    """Section -> its keys in the order of the file."""
    orders = {prefix: list(tree)}
    for key, value in tree.items():
        if isinstance(value, dict):
            orders |= nested_orders(value, f"{prefix}{key}.")
    return orders


def attended(cfg: CfgNode) -> list[tuple[int, int, int]]:
    """For every block: tokens with those that pad windows, tokens and side of what a token attends to."""
    vit, side = cfg.MODEL.VIT, cfg.MODEL.VIT.IMG_SIZE // cfg.MODEL.VIT.PATCH_SIZE
    padded = ceil(side / vit.WINDOW_SIZE) * vit.WINDOW_SIZE
    whole, window = (side**2, side**2, side), (padded**2, vit.WINDOW_SIZE**2, vit.WINDOW_SIZE)
    return [whole if block in vit.GLOBAL_BLOCKS else window for block in range(vit.DEPTH)]


def encoder_flop(cfg: CfgNode) -> float:
    """Forward of the encoder on one image, 2 per multiply and add (performance specification, section 2.1)."""
    E, T = cfg.MODEL.VIT.EMBED_DIM, (cfg.MODEL.VIT.IMG_SIZE // cfg.MODEL.VIT.PATCH_SIZE) ** 2
    linear = 24 * T * E**2 * cfg.MODEL.VIT.DEPTH
    blocks = attended(cfg)
    padding = sum(8 * (tokens - T) * E**2 for tokens, _, _ in blocks)
    return linear + padding + sum(4 * tokens * (seen + side) * E for tokens, seen, side in blocks)


class Levels(nn.Module):
    """Stands for the encoder where the pyramid is counted."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.shape, self.patch_size = shape, 16

    def forward(self, imgs: Tensor) -> dict[str, Tensor]:
        return {"last_feat": torch.empty(self.shape, device="meta")}


@cache
def step_tflop(path: Path) -> float:
    """Forward and backward of one image: three times the forward with all regions that are sampled, a quarter masks."""
    cfg, model = build(path)
    side, regions = cfg.MODEL.VIT.IMG_SIZE // 16, cfg.MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE
    net, model.backbone.net = model.backbone.net, Levels((1, cfg.MODEL.VIT.EMBED_DIM, side, side))
    heads = model.roi_heads.box_head
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        features = model.backbone(torch.empty(1, 3, 16 * side, 16 * side))
        model.proposal_generator.rpn_head(list(features.values()))
        for head in heads if isinstance(heads, nn.ModuleList) else [heads]:
            head(torch.empty(regions, 256, 7, 7))
        model.roi_heads.mask_head.layers(torch.empty(regions // 4, 256, 14, 14))
    model.backbone.net = net
    return 3 * (encoder_flop(cfg) + counter.get_total_flops()) / 1e12


def memory_gb(path: Path, launch: Launch) -> float:
    """What training holds on a GPU, by the formula in docs: a count of what autograd keeps, not a measurement."""
    vit, solver = launch.cfg.MODEL.VIT, launch.cfg.SOLVER
    E, T = vit.EMBED_DIM, (vit.IMG_SIZE // vit.PATCH_SIZE) ** 2
    head = E // vit.NUM_HEADS
    blocks = []
    for tokens, _, side in attended(launch.cfg):
        folded = ceil((head + 2 * side) / 8) * 8
        blocks.append(30 * E * T + 4 * 2 * vit.NUM_HEADS * folded * tokens)
    kept = 4 * E * T * vit.DEPTH + 2 * max(blocks) if vit.ACTIVATION_CHECKPOINTING else sum(blocks)
    fixed = (18 + 4 * solver.EMA.ENABLED) * count(build(path)[1])
    return (fixed + launch.images_at_once * (kept + RECIPE[path.stem].heads * 1e9)) / 1e9


def test_the_recipes_are_all_there() -> None:
    assert {path.stem for path in RECIPES} == RECIPE.keys()


def test_the_arithmetic_is_that_of_the_specification() -> None:
    """Performance specification, section 2.1."""
    for name, tflop in (("coco_mask_rcnn", 4.75), ("coco_mask_rcnn_vitl", 10.9), ("coco_mask_rcnn_vith", 19.9)):
        assert step_tflop(CONFIG_ROOT / f"{name}.yaml") == pytest.approx(tflop, rel=0.01)


def test_shares_of_the_run_are_the_published_steps() -> None:
    cfg, _ = build(BASE)
    assert [round(share * PUBLISHED_STEPS) for share in cfg.SOLVER.DECAY_AT] == [163_889, 177_546]
    assert [round(share * 156_250) for share in cfg.SOLVER.DECAY_AT] == [138_889, 150_463], "LVIS"
    assert [int(share * 138_281) for share in cfg.SOLVER.DECAY_AT] == [122_916, 133_159], "ViT-H, 3/4, rounded down"


def test_an_epoch_is_the_images_with_objects_in_published_steps() -> None:
    solver = build(BASE)[0].SOLVER
    assert (solver.BASE_LR, solver.REFERENCE_BATCH, solver.IMS_PER_BATCH) == (1e-4, 64, 64)
    resolved = schedule(build(BASE)[0])
    assert f"{resolved.last_step:,} steps" in BASE.read_text()
    assert f"{resolved.eval_period:,} steps; saves, too" in BASE.read_text()
    assert f"{100 * 118_000 // 64:,}" == f"{PUBLISHED_STEPS:,}"


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
class TestEveryRecipe:
    def test_the_encoder_is_the_published_one(self, path: Path) -> None:
        cfg, model = build(path)
        vit, size = cfg.MODEL.VIT, SIZES[RECIPE[path.stem].size]
        E = size.embed_dim
        parameters, blocks, layer_decay, drop_path = ENCODERS[RECIPE[path.stem].size]
        assert (E, size.depth, size.num_heads) == (vit.EMBED_DIM, vit.DEPTH, vit.NUM_HEADS)
        assert (blocks, drop_path, layer_decay) == (vit.GLOBAL_BLOCKS, vit.DROP_PATH, cfg.SOLVER.LAYER_DECAY)
        relative = sum(2 * (2 * side - 1) * E // size.num_heads for _, _, side in attended(cfg))
        parameters += 3 * (16**2 - size.patch_size**2) * E  # filters of patch 14 are resized to 16
        parameters -= 1000 * E + 1000 + 3 * E  # classifier, class token, last norm
        rows = (vit.PRETRAIN_IMG_SIZE // vit.PATCH_SIZE) ** 2 + 1
        parameters += (rows - (224 // size.patch_size) ** 2 - 1) * E  # the totals are those of 224 pixels
        assert count(model.backbone.net) == parameters + relative
        assert model.backbone.net.pos_embed.shape[1] == rows

    def test_it_is_built_whole(self, path: Path) -> None:
        cfg, model = build(path)
        stages = 3 if "cascade" in path.stem else 1
        heads = model.roi_heads.box_head
        assert (len(heads) if isinstance(heads, nn.ModuleList) else 1) == stages
        assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
        classes = 1203 if "lvis" in path.stem else 80
        assert classes == cfg.MODEL.ROI_HEADS.NUM_CLASSES

    def test_it_repeats_nothing_of_its_base(self, path: Path) -> None:
        tree = read_yaml(path)
        base = tree.pop(BASE_KEY, None)
        if path == BASE:
            assert base is None
            return
        below, above = (load_det_config(str(p), ["MODEL.DEVICE=cpu"]) for p in (path.parent / base, path))
        assert not [key for key, _ in flatten(tree) if lookup(below, key) == lookup(above, key)]
        assert f"outputs/{path.stem}" == above.OUTPUT_DIR

    def test_its_keys_are_in_the_order_of_the_base(self, path: Path) -> None:
        reference = nested_orders(read_yaml(BASE))
        tree = read_yaml(path)
        tree.pop(BASE_KEY, None)
        for section, keys in nested_orders(tree).items():
            shared = [key for key in keys if key in reference.get(section, [])]
            assert shared == sorted(shared, key=reference[section].index if shared else None), section
        assert set(tree) <= set(reference[""])

    def test_its_header_says_what_it_is_and_how_to_start_it(self, path: Path) -> None:
        text = path.read_text(encoding="utf-8")
        assert text.startswith("# ")
        for word in ("Reproduces", "Published", "Cost", "Memory", "Commands"):
            assert re.search(rf"^{word}: ", header(path), re.MULTILINE), word
        assert "No figure of our own yet" in flat(path)
        assert all(resolve_config_path(launch.arguments.config_file) == path for launch in launches(path))
        labels = [launch.label for launch in launches(path)]
        assert labels[:2] == ["CPU", "One GPU"]
        smoke = launches(path)[0].cfg
        assert (smoke.SOLVER.MAX_ITER, smoke.SOLVER.IMS_PER_BATCH, smoke.SOLVER.ACCUMULATE) == (2, 1, 1)

    def test_every_setting_that_its_comments_name_exists(self, path: Path) -> None:
        words = re.findall(r"\b[A-Z]+(?:\.[A-Z_]+)+=[^\s,;:)]+", header(path))
        assert words
        assert load_det_config(str(path), [*(word.rstrip(".") for word in words), "MODEL.DEVICE=cpu"])

    def test_every_launch_makes_the_step_of_the_recipe(self, path: Path) -> None:
        expected = RECIPE[path.stem]
        for launch in launches(path)[1:]:
            solver = launch.cfg.SOLVER
            assert (expected.batch, expected.epochs) == (solver.IMS_PER_BATCH, solver.EPOCHS), launch.label
            assert launch.images_at_once == int(launch.images_at_once) >= 1, launch.label
            assert (launch.arguments.train_json is not None) == (path.stem in OWN)

    def test_its_published_figures_are_those_of_the_table(self, path: Path) -> None:
        published = RECIPE[path.stem].published
        if published:
            box, mask = published.split(" / ")
            assert f"box AP {box}, mask AP {mask}" in flat(path)
            assert f"| {published} |" in row(path)
        else:
            assert re.search(r"^Published: +nothing", header(path), re.MULTILINE)
            assert "| none |" in row(path)

    def test_its_cost_follows_from_the_arithmetic(self, path: Path) -> None:
        match = re.search(
            r"([\d.]+) TFLOP per image and step \* (\d+) epochs \* ([\d,]+) images: at least ([\d.]+) (hours|minutes)",
            flat(path),
        )
        assert match
        tflop, epochs, images = float(match[1]), int(match[2]), int(match[3].replace(",", ""))
        assert tflop == pytest.approx(step_tflop(path), rel=0.01)
        assert epochs == RECIPE[path.stem].epochs
        seconds = tflop * 1e12 * epochs * images / 790e12
        assert float(match[4]) == pytest.approx(seconds / (3600 if match[5] == "hours" else 60), abs=0.051)
        assert f"| {match[1]} TFLOP, {match[4]} {match[5][0]}" in row(path)
        published = re.search(r"([\d,]+) steps \* ([\d.]+) s = ([\d.]+) hours on 64 A100", flat(path))
        assert bool(published) == bool(RECIPE[path.stem].published)
        if published:
            steps, seconds = int(published[1].replace(",", "")), float(published[2])
            assert float(published[3]) == pytest.approx(steps * seconds / 3600, abs=0.06)

    def test_its_memory_is_what_the_formula_says(self, path: Path) -> None:
        counted = [(launch.images_at_once, memory_gb(path, launch)) for launch in launches(path)[1:]]
        said = re.findall(r"([\d.]+) GB for (\d+) images? at once", flat(path))
        assert [int(images) for _, images in said] == [images for images, _ in counted]
        for (gigabytes, _), (_, expected) in zip(said, counted, strict=True):
            assert float(gigabytes) == pytest.approx(expected, abs=0.51)
        assert "computed" in flat(path)
        assert f"{said[0][0]} GB for {said[0][1]}" in row(path)

    def test_its_comments_count_right(self, path: Path) -> None:
        """Learning rates, and steps of a run."""
        text, cfg = path.read_text(encoding="utf-8"), build(path)[0]
        resolved = schedule(cfg)
        for base, batch, reference, rate in re.findall(r"([\d.e-]+) \* (\d+) / (\d+) = ([\d.]+e-\d)", text):
            assert float(rate) == pytest.approx(float(base) * int(batch) / int(reference))
            assert path.stem in OWN or float(rate) == pytest.approx(resolved.peak_lr)
        for epochs, batch, steps in re.findall(r"(?<![\d.])(\d+) \* 117,266 / (\d+) = ([\d,]+) steps", text):
            assert (int(epochs), int(batch)) == (cfg.SOLVER.EPOCHS, cfg.SOLVER.IMS_PER_BATCH)
            assert int(steps.replace(",", "")) == resolved.last_step
        if path.stem not in OWN and "lvis" not in path.stem:
            assert f" / {cfg.SOLVER.IMS_PER_BATCH} = " in text


def test_the_laptop_config_has_the_form_of_the_recipes() -> None:
    """Its cost is the time on a CPU, so it has no arithmetic for GPUs. For the rest, see test_laptop.py."""
    path, form = CONFIG_ROOT / "laptop_mask_rcnn.yaml", TestEveryRecipe()
    form.test_it_repeats_nothing_of_its_base(path)
    form.test_its_keys_are_in_the_order_of_the_base(path)
    form.test_every_setting_that_its_comments_name_exists(path)


def test_vit_h_decays_norms_and_positions_as_published() -> None:
    solver = build(CONFIG_ROOT / "coco_mask_rcnn_vith.yaml")[0].SOLVER
    assert solver.WEIGHT_DECAY_NORM == solver.WEIGHT_DECAY_POS == solver.WEIGHT_DECAY == 0.1
    solver = build(CONFIG_ROOT / "coco_mask_rcnn_vitl.yaml")[0].SOLVER
    assert solver.WEIGHT_DECAY_NORM == solver.WEIGHT_DECAY_POS == 0.0


def test_vit_l_fits_a_24_gb_card_one_image_at_a_time() -> None:
    path = CONFIG_ROOT / "coco_mask_rcnn_vitl_1gpu_25ep.yaml"
    launch = launches(path)[1]
    assert launch.cfg.MODEL.VIT.ACTIVATION_CHECKPOINTING
    assert launch.images_at_once == 1
    parts = re.search(r"([\d.]+) \+ ([\d.]+) \+ ([\d.]+) \+ ([\d.]+) = ([\d.]+) GB", flat(path))
    assert parts
    *terms, total = map(float, parts.groups())
    assert terms[0] == pytest.approx(18 * count(build(path)[1]) / 1e9, abs=0.006)
    assert total == pytest.approx(sum(terms), abs=0.051)
    assert total == pytest.approx(memory_gb(path, launch), abs=0.051)
    assert total < 0.5 * 24


def test_lvis_is_the_published_recipe_but_for_its_sampler() -> None:
    cfg, model = build(CONFIG_ROOT / "lvis_mask_rcnn_vitb.yaml")
    head = cfg.MODEL.ROI_BOX_HEAD
    assert (head.USE_FED_LOSS, head.USE_SIGMOID_CE) == (True, True)
    assert (head.FED_LOSS_FREQ_WEIGHT_POWER, head.FED_LOSS_NUM_CLASSES) == (0.5, 50)
    assert (cfg.TEST.DETECTIONS_PER_IMAGE, cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST) == (300, 0.02)
    assert cfg.SOLVER.BASE_LR == 2e-4
    assert len(model.roi_heads.box_predictor.fed_loss_cls_weights) == 1203
    assert "RepeatFactorTrainingSampler" in header(CONFIG_ROOT / "lvis_mask_rcnn_vitb.yaml")


@pytest.mark.parametrize("name", OWN)
def test_recipes_for_own_data_train_on_nothing_by_default(name: str) -> None:
    cfg, _ = build(CONFIG_ROOT / f"{name}.yaml")
    assert cfg.DATASETS.TRAIN == cfg.DATASETS.TEST == ()
    assert cfg.SOLVER.EMA.ENABLED
    assert cfg.MODEL.VIT.SQUARE_PAD_TEST == 0
