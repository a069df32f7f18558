"""Suite of detectors: a training step and inference against the same detector on detectron2's own modules."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from detectron2.modeling import build_model
from detectron2.modeling.backbone.fpn import LastLevelMaxPool
from detectron2.modeling.backbone.vit import SimpleFeaturePyramid
from detectron2.modeling.backbone.vit import ViT as TheirViT
from detectron2.solver.build import get_default_optimizer_params
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils.events import EventStorage
from torch import Tensor, nn

from crossmae.models.layers import LayerNorm
from crossmae.training.config import RunSettings
from crossmae.training.devices import choose_precision
from crossmae.training.loop import steps_unread
from crossmae.training.processes import Ranks
from crossmae.training.state import TrainingState
from det.backbone.weights import build_detector
from det.config import load_det_config, read_keys
from det.inference.paste import coco_results
from det.training.optimizer import parameter_groups
from det.training.steps import DetectorLoss
from tools.benchmarks.measuring import Comparison, Gate, Row, largest_difference

Build = Callable[[], Comparison | Row]
LR = 1e-4
# Config, side of the images in pixels, images of a training step, images of a prediction, and goals.
DETECTORS = {
    "cpu": (("demo_mask_rcnn.yaml", 128, 8, (8,), {"cpu": 1.3}, {"cpu": 1.6}, {}),),
    "cuda": (("coco_mask_rcnn.yaml", 1024, 4, (1, 8), {"cuda": 2.5}, {"cuda": 2.5}, {"cuda": 0.5}),),
}


def detector(
    device: torch.device,
    detectors: Sequence[
        tuple[str, int, int, Sequence[int], Mapping[str, float], Mapping[str, float], Mapping[str, float]]
    ]
    | None = None,
    overrides: Sequence[str] = (),
) -> list[Build]:
    """List training steps and inference of detectors.

    Args:
        detectors: as DETECTORS has them.
        overrides: settings that replace those of the configs.
    """
    found: list[Build] = []
    for config, side, images, predicted, goals, inference_goals, memory in detectors or DETECTORS[device.type]:
        settings = [*overrides, f"MODEL.DEVICE={device.type}", "SOLVER.AMP.ENABLED=False"]
        found.append(partial(compare_training, config, settings, side, images, device, goals, memory))
        found += [
            partial(compare_inference, config, settings, side, count, device, inference_goals) for count in predicted
        ]
    return found


def make_detectors(config_file: str, settings: Sequence[str]) -> tuple[nn.Module, nn.Module, CfgNode]:
    """Build our detector, and the same detector of detectron2 alone."""
    loaded = load_det_config(config_file, settings)
    torch.manual_seed(0)
    ours = build_detector(loaded)
    other: Any = build_model(loaded)
    other.backbone = their_backbone(loaded.MODEL.VIT).to(other.device)
    other.load_state_dict(ours.state_dict(), strict=True)
    return ours, other, loaded


def their_backbone(vit: Mapping[str, Any]) -> SimpleFeaturePyramid:
    """Build detectron2's ViT and pyramid from the keys of `MODEL.VIT`."""
    outside = [index for index in range(vit["DEPTH"]) if index not in vit["GLOBAL_BLOCKS"]]
    net = TheirViT(
        vit["IMG_SIZE"],
        vit["PATCH_SIZE"],
        embed_dim=vit["EMBED_DIM"],
        depth=vit["DEPTH"],
        num_heads=vit["NUM_HEADS"],
        mlp_ratio=vit["MLP_RATIO"],
        drop_path_rate=vit["DROP_PATH"],
        norm_layer=LayerNorm,
        use_rel_pos=vit["REL_POS"],
        window_size=vit["WINDOW_SIZE"],
        window_block_indexes=outside if vit["WINDOW_SIZE"] else (),
        pretrain_img_size=vit["PRETRAIN_IMG_SIZE"],
        out_feature="last_feat",
    )
    top = LastLevelMaxPool() if vit["MAX_POOL_LEVEL"] else None
    scales = tuple(vit["SCALE_FACTORS"])
    if top is not None and scales[-1] != 0.5:
        top.in_feature = f"p{int(torch.log2(torch.tensor(vit['PATCH_SIZE'] / scales[-1])))}"
    return SimpleFeaturePyramid(net, "last_feat", vit["OUT_CHANNELS"], scales, top, vit["NORM"], vit["SQUARE_PAD"])


def make_samples(images: int, side: int, classes: int, objects: int = 6) -> list[dict[str, Any]]:
    """Draw images with boxes and rectangular masks, as a loader gives them."""
    draw = torch.Generator().manual_seed(0)
    samples = []
    for number in range(images):
        sizes = side * (0.1 + 0.3 * torch.rand(objects, 2, generator=draw))
        corners = torch.rand(objects, 2, generator=draw) * (side - sizes)
        boxes = torch.cat([corners, corners + sizes], dim=1).round()
        masks = torch.zeros(objects, side, side, dtype=torch.bool)
        for mask, (x0, y0, x1, y1) in zip(masks, boxes.int().tolist(), strict=True):
            mask[y0:y1, x0:x1] = True
        known = Instances((side, side))
        known.gt_boxes, known.gt_masks = Boxes(boxes), BitMasks(masks)
        known.gt_classes = torch.randint(0, classes, (objects,), generator=draw)
        pixels = torch.randint(0, 256, (3, side, side), dtype=torch.uint8, generator=draw)
        samples.append({"image": pixels, "instances": known, "height": side, "width": side, "image_id": number})
    return samples


def compare_training(
    config_file: str,
    settings: Sequence[str],
    side: int,
    images: int,
    device: torch.device,
    goals: Mapping[str, float],
    memory_goals: Mapping[str, float],
) -> Comparison:
    """Compare training steps from the same weights on the same samples.

    On a GPU, the other side computes in fp16 with a scaler, as detectron2 does.
    """
    ours, other, loaded = make_detectors(config_file, settings)
    samples = make_samples(images, side, loaded.MODEL.ROI_HEADS.NUM_CLASSES)
    loss = DetectorLoss(0, 1, 0, lambda steps: steps % RunSettings.log_every == 0)
    precision = choose_precision("auto", device)

    def gate() -> Gate:
        """Compare losses in fp32, with the same random proposals."""
        found = []
        for model in (ours.train(), other.train()):
            with torch.no_grad():
                losses = loss(model, samples, 0)
            found.append([losses[name] for name in sorted(losses)])
        return Gate(largest_difference(*found), 1e-4)

    groups = parameter_groups(ours, read_keys(loaded).SOLVER, loaded.MODEL.VIT.DEPTH)
    made, unread = torch.optim.AdamW(groups, lr=LR, fused=True), steps_unread(device)
    state = TrainingState(ours, made, Ranks(), precision, None, None, False, None, check_every=unread)

    def step() -> None:
        state.forward_backward(loss, samples, state.step, 1, True)
        state.update(LR)

    return Comparison(
        what=f"training step of {config_file}, batch {images}, {side} pixels, {precision}",
        against="the same on detectron2's backbone and optimizer",
        ours=step,
        other=their_step(other, samples, device),
        goals=goals,
        memory_goals=memory_goals,
        gate=gate,
    )


def their_step(model: nn.Module, samples: list[dict[str, Any]], device: torch.device) -> Callable[[], None]:
    """Return a step as detectron2's trainer makes it."""
    optimizer = torch.optim.AdamW(get_default_optimizer_params(model), lr=LR)
    is_half = device.type == "cuda"
    scaler = torch.amp.GradScaler(device.type, enabled=is_half)

    def step() -> None:
        torch.manual_seed(0)
        with EventStorage(0), torch.autocast(device.type, torch.float16, enabled=is_half):
            total = sum(model(samples).values())
        optimizer.zero_grad()
        assert isinstance(total, Tensor)
        scaler.scale(total).backward()
        scaler.step(optimizer)
        scaler.update()

    return step


def compare_inference(
    config_file: str, settings: Sequence[str], side: int, images: int, device: torch.device, goals: Mapping[str, float]
) -> Comparison:
    """Compare predictions of images, up to encoded masks."""
    ours, other, loaded = make_detectors(config_file, [*settings, "MODEL.ROI_HEADS.SCORE_THRESH_TEST=0.0"])
    own, their = ours.eval(), other.eval()
    for model in (own, their):
        sharpen(model)
    samples = make_samples(images, side, loaded.MODEL.ROI_HEADS.NUM_CLASSES)
    inputs = [{key: value for key, value in sample.items() if key != "instances"} for sample in samples]
    ids = list(range(loaded.MODEL.ROI_HEADS.NUM_CLASSES))
    precision = choose_precision("auto", device)

    @torch.no_grad()
    def predict(half: bool = True) -> list[dict[str, Any]]:
        with torch.autocast(device.type, torch.bfloat16, enabled=half and precision != "fp32"):
            outputs = own.inference(inputs, do_postprocess=False)  # type: ignore[operator]
        pairs = zip(inputs, outputs, strict=True)
        return [one for sample, found in pairs for one in coco_results(found, sample["image_id"], side, side, ids)]

    @torch.no_grad()
    def predict_theirs() -> list[dict[str, Any]]:
        outputs = their.inference(inputs)  # type: ignore[operator]
        pairs = zip(inputs, outputs, strict=True)
        return [
            one
            for sample, found in pairs
            for one in instances_to_coco_json(found["instances"].to("cpu"), sample["image_id"])
        ]

    def gate() -> Gate:
        """Compare boxes and scores in fp32. Boxes are in pixels."""
        one, two = ([[*row["bbox"], row["score"]] for row in rows] for rows in (predict(False), predict_theirs()))
        return Gate(largest_difference([torch.tensor(one)], [torch.tensor(two)]), 1e-4)

    return Comparison(
        what=f"inference of {config_file}, batch {images}, {side} pixels, {precision}",
        against="the same on detectron2's backbone and postprocessing",
        ours=predict,
        other=predict_theirs,
        goals=goals,
        gate=gate,
    )


def sharpen(model: nn.Module) -> None:
    """Make the class scores of a random detector differ."""
    draw = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if name.endswith("cls_score.weight"):
            parameter.data.copy_(torch.randn(parameter.shape, generator=draw))
