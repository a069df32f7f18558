"""Small data sets in COCO format and a tiny config, for the tests of `det`."""

import json

import numpy as np
from PIL import Image
from pycocotools import mask as rle

TINY = """
INPUT:
  {FORMAT: RGB, MASK_FORMAT: bitmask, MIN_SIZE_TRAIN: [64], MAX_SIZE_TRAIN: 64, MIN_SIZE_TEST: 64, MAX_SIZE_TEST: 64}
DATALOADER: {NUM_WORKERS: 0}
MODEL:
  DEVICE: cpu
  PIXEL_MEAN: [123.675, 116.28, 103.53]
  PIXEL_STD: [58.395, 57.12, 57.375]
  MASK_ON: true
  BACKBONE: {NAME: build_crossmae_vitdet_backbone}
  VIT: {IMG_SIZE: 64, PRETRAIN_IMG_SIZE: 32, PATCH_SIZE: 8, EMBED_DIM: 24, DEPTH: 2, NUM_HEADS: 2, WINDOW_SIZE: 3,
        GLOBAL_BLOCKS: [1], OUT_CHANNELS: 8, SCALE_FACTORS: [2.0, 1.0], MAX_POOL_LEVEL: false, DROP_PATH: 0.2}
  ANCHOR_GENERATOR: {SIZES: [[16], [32]], ASPECT_RATIOS: [[1.0]]}
  RPN: {IN_FEATURES: [p2, p3], POST_NMS_TOPK_TRAIN: 20, POST_NMS_TOPK_TEST: 20, BATCH_SIZE_PER_IMAGE: 16}
  ROI_HEADS:
    {NAME: StandardROIHeads, IN_FEATURES: [p2], BATCH_SIZE_PER_IMAGE: 8, SCORE_THRESH_TEST: 0.0, NUM_CLASSES: 3}
  ROI_BOX_HEAD: {NAME: FastRCNNConvFCHead, POOLER_RESOLUTION: 3, NUM_FC: 1, FC_DIM: 16}
  ROI_MASK_HEAD: {NAME: MaskRCNNConvUpsampleHead, POOLER_RESOLUTION: 4, NUM_CONV: 1, CONV_DIM: 8}
SOLVER: {IMS_PER_BATCH: 2, BASE_LR: 0.001, MAX_ITER: 4, STEPS: [], WARMUP_ITERS: 1, CHECKPOINT_PERIOD: 2}
TEST: {DETECTIONS_PER_IMAGE: 5}
"""


def annotation(index, image_id, category_id, box=(8, 8, 24, 16), kind="rle"):
    """One rectangle."""
    x, y, w, h = box
    mask = np.zeros((64, 64), np.uint8, order="F")
    mask[y : y + h, x : x + w] = 1
    encoded = rle.encode(mask)
    encoded["counts"] = encoded["counts"].decode()
    polygon = [[x, y, x + w, y, x + w, y + h, x, y + h]]
    return {
        "id": index, "image_id": image_id, "category_id": category_id, "bbox": list(box), "area": w * h, "iscrowd": 0,
        "segmentation": encoded if kind == "rle" else polygon,
    }  # fmt: skip


def write_coco(folder, images=5, kind="rle"):
    """Write `images` noise images and `coco.json`; category ids have a gap. Returns (json, image folder, content)."""
    root = folder / "images"
    root.mkdir(parents=True)
    rng = np.random.default_rng(0)
    content = {"images": [], "annotations": [], "categories": [{"id": 3, "name": "b"}, {"id": 1, "name": "a"}]}
    for number in range(1, images + 1):
        name = f"{number}.png"
        Image.fromarray(rng.integers(0, 255, (64, 64, 3), np.uint8)).save(root / name)
        content["images"].append({"id": number, "file_name": name, "height": 64, "width": 64})
        content["annotations"].append(annotation(2 * number, number, 1, kind=kind))
        content["annotations"].append(annotation(2 * number + 1, number, 3, (30, 20, 20, 30), kind))
    return save(folder, content), root, content


def save(folder, content):
    """Write coco.json."""
    path = folder / "coco.json"
    path.write_text(json.dumps(content))
    return path
