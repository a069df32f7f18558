"""Runs every policy, interpolation, codec and metric that a recipe or a page names on seeded inputs, with the installed
versions of the libraries: a library that changes under us fails here, not in hour ten of a training.

`make test` draws a hundred inputs for each, `pytest --slow tests/test_libraries.py` 5,000.
"""

from __future__ import annotations

import io
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.structures import BoxMode
from PIL import Image
from pycocotools import mask as coco_mask

from crossmae.classification.data import LabelledImages
from crossmae.classification.evaluation.metrics import Predictions, score
from crossmae.classification.train.augment import keyed_everywhere, train_view
from crossmae.classification.train.config import FinetuneConfig, LabelledDataConfig, LossConfig
from crossmae.classification.train.objective import Objective
from crossmae.data.images import decode_image
from crossmae.data.pixels import centre_view
from crossmae.pretraining.images import PretrainImages
from crossmae.training.config import CONFIG_ROOT, load_typed_config
from det.config import load_det_config
from det.data.loader import NamingMapper, keyed_numpy_randomness
from det.evaluation.scoring import score_results
from tests.det.coco_files import TINY

RECIPES = sorted((CONFIG_ROOT / "finetune").glob("*.yaml"))
NEEDED = ["data.train=IMAGES", "output_dir=OUT", "model.init=WEIGHTS"]
# The policies that documentation and error messages name, next to those of the recipes.
NAMED = (
    "rand-m9-mstd0.5-inc1",
    "rand-m15-n3-mstd1.0",
    "augmix-m3-w3",
    "augmix-m5-w4-d2",
    "original",
    "originalr",
    "v0",
)
GREY = (0.5, 0.5, 0.5)


@pytest.fixture
def count(request: pytest.FixtureRequest) -> int:
    """Number of seeded inputs of a test."""
    return 5000 if request.config.getoption("--slow") else 100


def picture(rng: np.random.Generator, most: int = 48, mode: str = "RGB") -> Image.Image:
    """A picture of random size, 1 x 1 included: noise, one colour, or a ramp."""
    height, width = rng.integers(1, most, 2)
    kind = rng.integers(3)
    if kind == 0:
        pixels = rng.integers(0, 256, (height, width, 3), np.uint8)
    elif kind == 1:
        pixels = np.full((height, width, 3), rng.integers(0, 256, 3), np.uint8)
    else:
        pixels = np.linspace(0, 255, height * width * 3).reshape(height, width, 3).astype(np.uint8)
    return Image.fromarray(pixels).convert(mode)


def recipe_policies() -> list[str]:
    configs = [load_typed_config(FinetuneConfig, str(path), NEEDED) for path in RECIPES]
    return sorted({config.data.auto_augment for config in configs if config.data.auto_augment} | set(NAMED))


@pytest.mark.parametrize("policy", [*recipe_policies(), None])
def test_classification_views(policy: str | None, count: int) -> None:
    view = train_view((16, 24), (0.08, 1.0), 0.5, policy, 0.4, GREY)
    for seed in range(count):
        with keyed_everywhere(seed):
            found = view(picture(np.random.default_rng(seed), mode=random.choice(["RGB", "RGB", "L"])))
        assert found.shape[1:] == (16, 24), seed
        assert found.dtype == torch.uint8


def test_pretraining_crops_and_evaluation_views(count: int) -> None:
    images = PretrainImages([], (16, 24), 6, (0.2, 1.0), 0.5, 0)  # type: ignore[arg-type]
    for seed in range(count):
        rng = np.random.default_rng(seed)
        height, width = rng.integers(1, 300, 2) if seed % 2 else (1, int(rng.integers(1, 3000)))
        pixels = Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))
        crop, noise = images.sample(pixels, 0, (0, 0, seed))
        assert (crop.shape, crop.dtype, noise.shape) == ((3, 16, 24), torch.uint8, (6,)), seed
        deep = torch.from_numpy(rng.random((2, height, width), np.float32))
        crop, _ = images.sample(deep, 0, (0, 0, seed))
        assert crop.shape == (2, 16, 24), seed
        assert 0 <= crop.min() <= crop.max() <= 1, seed
        assert centre_view(pixels, (16, 24), 0.875).shape == (3, 16, 24), seed


@pytest.mark.parametrize("mode", ["batch", "pair", "elem"])
@pytest.mark.parametrize("several", [False, True])
def test_mixing_erasing_and_the_loss(mode: Any, several: bool, count: int) -> None:
    data = LabelledDataConfig(train="X", erase=0.5, separator="," if several else None)
    names = tuple("abcde")
    images = LabelledImages([], torch.arange(5), names, names, None, None)  # type: ignore[arg-type]
    loss_config = LossConfig(mixup=0.8, cutmix=1.0, mixup_mode=mode)
    objective = Objective(loss_config, data, images, 4, torch.device("cpu"))
    for seed in range(count):
        with keyed_everywhere(seed):
            labels = torch.randint(0, 2, (4, 5)).float() if several else torch.randint(0, 5, (4,))
            images, targets = objective.augment(torch.randn(4, 3, 16, 16), labels)
            loss = objective.loss(torch.randn(4, 5), targets)
        assert images.shape == (4, 3, 16, 16)
        assert bool(images.isfinite().all() and loss.isfinite()), seed
        assert bool((targets >= 0).all() and (targets <= 1).all()), seed


def saved(image: Image.Image, kind: str, **settings: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **settings)
    return file.getvalue()


CODECS: dict[str, Callable[[Image.Image, int], bytes]] = {
    "JPEG": lambda image, seed: saved(image, "JPEG", quality=1 + seed % 100, subsampling=seed % 3),
    "progressive JPEG": lambda image, seed: saved(image, "JPEG", progressive=True, optimize=True),
    "CMYK JPEG": lambda image, seed: saved(image.convert("CMYK"), "JPEG"),
    "PNG": lambda image, seed: saved(image, "PNG", compress_level=seed % 10),
    "palette PNG": lambda image, seed: saved(image.quantize(1 + seed % 256), "PNG"),
    "grey PNG with transparency": lambda image, seed: saved(image.convert("L"), "PNG", transparency=seed % 256),
    "WebP": lambda image, seed: saved(image, "WEBP", quality=seed % 101, lossless=bool(seed % 2)),
    "GIF": lambda image, seed: saved(image, "GIF"),
    "BMP": lambda image, seed: saved(image, "BMP"),
    "PPM": lambda image, seed: saved(image, "PPM"),
    "AVIF": lambda image, seed: saved(image, "AVIF", quality=seed % 101, speed=10),
    "JPEG 2000": lambda image, seed: saved(image, "JPEG2000"),
    **{
        f"TIFF, {name}": lambda image, seed, name=name: saved(image, "TIFF", compression=name)
        for name in ("raw", "tiff_lzw", "tiff_deflate", "packbits", "jpeg")
    },
}
LOSSLESS = {"PNG", "BMP", "PPM", "TIFF, raw", "TIFF, tiff_lzw", "TIFF, tiff_deflate", "TIFF, packbits"}


@pytest.mark.parametrize("codec", CODECS)
def test_codecs(codec: str, count: int) -> None:
    for seed in range(count // 4):
        image = picture(np.random.default_rng(seed))
        found = decode_image(CODECS[codec](image, seed), "x")
        assert isinstance(found, Image.Image)
        assert (found.size, found.mode) == (image.size, "RGB"), seed
        if codec in LOSSLESS:
            assert np.array_equal(np.asarray(found), np.asarray(image)), seed


def random_predictions(seed: int) -> tuple[Predictions, int]:
    """Few samples, with ties, absent classes and constant scores."""
    rng = torch.Generator().manual_seed(seed)
    samples, classes = int(torch.randint(1, 12, (), generator=rng)), int(torch.randint(2, 8, (), generator=rng))
    logits = torch.randint(-2, 3, (samples, classes), generator=rng).float() * (seed % 3)
    labels = torch.randint(0, classes, (samples,), generator=rng)
    losses = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    scores, best = logits.softmax(dim=1).topk(min(5, classes))
    return Predictions(torch.arange(samples), labels, losses, best, scores), classes


def test_classification_metrics(count: int) -> None:
    for seed in range(count):
        predictions, classes = random_predictions(seed)
        found = score(predictions, classes)
        assert found.top1 == pytest.approx(float(predictions.correct.float().mean())), seed
        confusion = np.zeros((classes, classes), np.int64)
        np.add.at(confusion, (predictions.labels.numpy(), predictions.top_classes[:, 0].numpy()), 1)
        assert np.array_equal(found.confusion, confusion), seed


def random_detections(seed: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A COCO file with crowds and empty images, and detections with ties and shifted boxes."""
    rng = np.random.default_rng(seed)

    def entry(image: int) -> dict[str, Any]:
        x, y, w, h = (int(value) for value in (*rng.integers(0, 40, 2), *rng.integers(1, 24, 2)))
        mask = np.zeros((64, 64), np.uint8, order="F")
        mask[y : y + h, x : x + w] = 1
        encoded = coco_mask.encode(mask)
        segmentation = {"size": [64, 64], "counts": encoded["counts"].decode()}
        category = int(rng.integers(1, 4))
        return {"image_id": image, "category_id": category, "bbox": [x, y, w, h], "segmentation": segmentation}

    truth = [entry(image) for image in range(1, 4) for _ in range(rng.integers(0, 4))]
    truth = [one | {"id": n, "area": n, "iscrowd": int(rng.random() < 0.2)} for n, one in enumerate(truth, 1)]
    copied = [{key: one[key] for key in ("image_id", "category_id", "bbox", "segmentation")} for one in truth]
    results = [one | {"score": float(rng.integers(1, 6) / 5)} for one in [*copied, *(entry(n) for n in (1, 2, 3))]]
    images = [{"id": n, "width": 64, "height": 64, "file_name": f"{n}.png"} for n in range(1, 5)]
    categories = [{"id": n, "name": str(n)} for n in range(1, 4)]
    return {"images": images, "annotations": truth, "categories": categories}, results


@pytest.mark.parametrize("task", ["bbox", "segm"])
def test_detection_metrics(task: str, count: int) -> None:
    """Both scoring libraries agree, whatever the detections are."""
    pytest.importorskip("hotcoco")
    for seed in range(count // 4):
        truth, results = random_detections(seed)
        fast, reference = (score_results(truth, results, task, library) for library in ("hotcoco", "pycocotools"))
        np.testing.assert_allclose(fast.precision, reference.precision, atol=1e-12, err_msg=str(seed))
        np.testing.assert_allclose(fast.recall, reference.recall, atol=1e-12, err_msg=str(seed))


@pytest.mark.parametrize("jitter", [False, True])
@pytest.mark.parametrize("form", ["bitmask", "polygon"])
def test_detection_views(jitter: bool, form: str, count: int, tmp_path: Path) -> None:
    """Boxes, masks and pixels of every augmentation fit each other, on pictures of any shape."""
    (tmp_path / "tiny.yaml").write_text(TINY)
    words = [f"INPUT.MASK_FORMAT={form}", f"INPUT.LSJ.ENABLED={jitter}", "INPUT.LSJ.SIZE=48"]
    cfg = load_det_config(str(tmp_path / "tiny.yaml"), words)
    mapper = NamingMapper(cfg, True)
    for seed in range(count // 4):
        rng = np.random.default_rng(seed)
        height, width = (int(side) for side in rng.integers(2, 120, 2))
        Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)).save(tmp_path / "x.png")
        polygon = [0, 0, width, 0, width, height, 0, height]
        entry = {"bbox": [0, 0, width, height], "bbox_mode": BoxMode.XYWH_ABS, "category_id": 0}
        record = {"file_name": str(tmp_path / "x.png"), "height": height, "width": width, "image_id": 0}
        with keyed_numpy_randomness(seed):
            sample = mapper({**record, "annotations": [entry | {"segmentation": [polygon], "iscrowd": 0}]})
        assert isinstance(sample, dict), sample
        size = tuple(sample["image"].shape[1:])
        instances = sample["instances"]
        assert instances.image_size == size, seed
        assert len(instances) == 1, seed
        box = instances.gt_boxes.tensor[0].round().tolist()
        assert box == [0, 0, size[1], size[0]], seed
        if form == "bitmask":
            assert bool(instances.gt_masks.tensor.all()), seed
