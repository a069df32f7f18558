"""A trained detector at work: from images to `Instances`, and from those to COCO's annotations."""

from __future__ import annotations

import json
import logging
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data.transforms import AugmentationList
from detectron2.modeling import GeneralizedRCNN
from detectron2.structures import Instances
from numpy.typing import NDArray
from PIL import Image, ImageOps
from pycocotools import mask as coco_mask

from crossmae.data.images import to_rgb
from crossmae.errors import UserError
from det.backbone.weights import build_detector, find_detector, load_weights
from det.config import check_config, choose_device, load_det_config
from det.data.coco import read_categories
from det.data.loader import augment, build_test_augmentations, read_pixels
from det.evaluation.run_files import CONFIG, RECORD
from det.inference.paste import coco_results

log = logging.getLogger(__name__)

Picture = NDArray[np.uint8] | Image.Image | str | Path


class Predictor:
    """A trained detector; call it with an image.

        predictor = Predictor("outputs/run/config.yaml", "outputs/run/model_best.pth")
        instances = predictor("photo.jpg")
        instances.pred_boxes, instances.scores, instances.pred_classes, instances.pred_masks

    Images are read, resized and padded as in evaluation, so that a file gives what evaluation counts. Objects are left
    out that do not score above `MODEL.ROI_HEADS.SCORE_THRESH_TEST`.

    Args:
        config: see `read_config`, or a config that has been read; it is not changed.
        weights: a detector's file, or the folder of its run, see `find_detector`.
        device: "cpu", "cuda" or "cuda:1"; None takes what the config says, or the CPU where there is no GPU.
        masks: predict masks, too, if the detector can.

    Attributes:
        cfg: the config, with `MODEL.WEIGHTS` the file that was read.
        model: the detector, in eval mode.

    Raises:
        UserError: no such file or device, a config of something else than a `GeneralizedRCNN`, or weights that are not
            those of a detector of this config.
    """

    def __init__(
        self, config: CfgNode | str | Path | None, weights: str | Path, device: str | None = None, *, masks: bool = True
    ) -> None:
        self.cfg = config.clone() if isinstance(config, CfgNode) else read_config(config, weights)
        self.cfg.defrost()
        self.cfg.MODEL.WEIGHTS = str(find_detector(Path(weights)))
        if device is not None:
            self.cfg.MODEL.DEVICE = device
            check_config(self.cfg)
        choose_device(self.cfg, asked=device is not None)
        self.model: Any = build_detector(self.cfg).eval()
        if not isinstance(self.model, GeneralizedRCNN):
            name = self.cfg.MODEL.META_ARCHITECTURE
            raise UserError(f"MODEL.META_ARCHITECTURE: only a GeneralizedRCNN can predict here, not {name}")
        load_weights(self.model, self.cfg, detector_only=True)
        if not masks:
            self.model.roi_heads.mask_on = False
        self._augmentations = AugmentationList(
            build_test_augmentations(self.cfg.INPUT.MIN_SIZE_TEST, self.cfg.INPUT.MAX_SIZE_TEST)
        )

    def __call__(self, image: Picture) -> Instances:
        """The objects in one image, the surest first.

        Args:
            image: (H, W, 3) uint8 RGB, an image of Pillow's, or a path.

        Returns:
            N instances on the CPU, in pixels of the image: `pred_boxes` (N, 4) x0, y0, x1, y1, `scores` (N,),
            `pred_classes` (N,) from 0 and, of detectors with masks, `pred_masks` (N, H, W) bool.

        Raises:
            UserError: the file can not be read.
            ValueError: an array of another shape or type.
        """
        return self.predict([image])[0]

    def predict(self, images: Sequence[Picture]) -> list[Instances]:
        """The objects in each of several images, which are computed together as far as they are padded to one size.

        Padding is seen by global attention. An image is not padded for the sake of others here, so that it does not
        matter which they are.
        """
        return [output["instances"].to("cpu") for output in self._run(images, self.model)]

    def predict_raw(self, images: Sequence[Picture]) -> list[Instances]:
        """The same as the model gives it, for `coco_annotations`: the masks of large images take no memory so.

        Returns:
            N instances for each image, on the model's device, in pixels of what the model sees: `pred_boxes`, `scores`,
            `pred_classes` and, of detectors with masks, `pred_masks` (N, 1, M, M), probabilities in the boxes.
        """
        return self._run(images, partial(self.model.inference, do_postprocess=False))

    @torch.no_grad()
    def _run(self, images: Sequence[Picture], model: Callable[[list[dict[str, Any]]], list[Any]]) -> list[Any]:
        """What `model` gives for each image, called with those together that are padded to one size."""
        inputs = [self._input(read_rgb(image)) for image in images]
        groups: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for index, sample in enumerate(inputs):
            groups[self._padded_size(sample["image"])].append(index)
        found: dict[int, Any] = {}
        for indices in groups.values():
            found |= zip(indices, model([inputs[index] for index in indices]), strict=True)
        return [found[index] for index in range(len(inputs))]

    def _input(self, pixels: NDArray[np.uint8]) -> dict[str, Any]:
        """What detectron2's mapper makes of an image in evaluation."""
        image, _ = augment(pixels, self._augmentations, self.cfg.INPUT.FORMAT)
        return {"image": image, "height": pixels.shape[0], "width": pixels.shape[1]}

    def _padded_size(self, image: torch.Tensor) -> tuple[int, ...]:
        """Height and width that the model pads an image (C, h, w) to."""
        constraints = self.model.backbone.padding_constraints
        if constraints.get("square_size"):
            return (constraints["square_size"],)
        divisor = constraints["size_divisibility"]
        return tuple(-(-side // divisor) * divisor for side in image.shape[1:])


def read_config(config: str | Path | None, weights: str | Path, overrides: Sequence[str] = ()) -> CfgNode:
    """The config of a detector.

    Args:
        config: a YAML file, its name under configs/, a run's folder, or None: the `config.yaml` beside the weights.
        weights: a run's folder, or a file in it.
        overrides: `KEY=VALUE` words.

    Raises:
        UserError: no such file, or one that is not right, see `load_det_config`.
    """
    if not Path(weights).exists():
        raise UserError(f"{weights}: no such file or folder; expected a detector's weights, or the folder of its run")
    if config is None:
        folder = Path(weights) if Path(weights).is_dir() else Path(weights).parent
        if not (folder / CONFIG).is_file():
            raise UserError(f"{folder} has no {CONFIG}: name the config that the detector was trained with")
        config = folder / CONFIG
    return load_det_config(str(config), overrides)


def read_rgb(image: Picture) -> NDArray[np.uint8]:
    """An image as (H, W, 3) uint8 RGB, upright, read as in training and evaluation.

    Raises:
        UserError: the file can not be read; names it.
        ValueError: an array of another shape or type.
    """
    if isinstance(image, (str, Path)):
        pixels = read_pixels(image)
    elif isinstance(image, Image.Image):
        pixels = np.asarray(to_rgb(ImageOps.exif_transpose(image)))
    else:
        pixels = np.asarray(image)
    if pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.dtype != np.uint8 or not pixels.size:
        raise ValueError(f"image: expected (H, W, 3) uint8 RGB, received {pixels.shape} {pixels.dtype}")
    return pixels


@dataclass(frozen=True)
class Classes:
    """What the classes of a detector are called.

    Attributes:
        names: by class, from 0.
        category_ids: what COCO files number them by.
    """

    names: tuple[str, ...]
    category_ids: tuple[int, ...]

    def categories(self) -> list[dict[str, Any]]:
        """As COCO files list them."""
        return [{"id": number, "name": name} for number, name in zip(self.category_ids, self.names, strict=True)]


def find_classes(predictor: Predictor, file: Path | None = None) -> Classes:
    """The classes of a detector.

    Args:
        predictor: the detector.
        file: a COCO file (.json) with the categories it was trained on, other lists are not needed, or a text file with
            one name a line; None: what its run recorded, and where nothing is recorded, numbers from 1, which is said
            in the log.

    Raises:
        UserError: the file can not be read, or has another number of classes than the detector.
    """
    wanted = predictor.cfg.MODEL.ROI_HEADS.NUM_CLASSES
    record = Path(predictor.cfg.MODEL.WEIGHTS).parent / RECORD
    classes = _recorded_classes(record) if file is None else _read_classes(file)
    if classes is None:
        log.warning(
            "%s has no names of classes: they are called class 1 to class %d, and so numbered; name them by --classes",
            record, wanted,
        )  # fmt: skip
        numbers = range(1, wanted + 1)
        return Classes(tuple(f"class {number}" for number in numbers), tuple(numbers))
    if len(classes.names) != wanted:
        raise UserError(f"{file or record}: has {len(classes.names)} classes, the detector {wanted}")
    return classes


def _recorded_classes(record: Path) -> Classes | None:
    """Those in a run's record, or None."""
    try:
        content = json.loads(record.read_text(encoding="utf-8"))
        return Classes(tuple(content["classes"]), tuple(content["category_ids"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _read_classes(file: Path) -> Classes:
    if file.suffix.lower() == ".json":
        categories = read_categories(file)  # by rising id, as detectron2 numbers classes
        return Classes(tuple(name for _, name in categories), tuple(number for number, _ in categories))
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: can not be read as text: {getattr(error, 'strerror', None) or error}") from None
    names = tuple(line.strip() for line in lines if line.strip())
    return Classes(names, tuple(range(1, len(names) + 1)))


def coco_annotations(
    instances: Instances, image_id: int, height: int, width: int, classes: Classes
) -> list[dict[str, Any]]:
    """Predictions of one image as COCO's annotations, which are its results with `area` and `iscrowd`.

    Args:
        instances: from `Predictor.predict_raw`.
        image_id: of the image.
        height, width: of the image as its file has it.
        classes: of the detector.

    Returns:
        For each `image_id`, `category_id`, `bbox` (x, y, width, height, to a thousandth of a pixel), `score`, `area`,
        `iscrowd` and, if there are masks, `segmentation`, a compressed RLE.
    """
    annotations = coco_results(instances, image_id, height, width, classes.category_ids)
    for annotation in annotations:
        annotation["bbox"] = [round(value, 3) for value in annotation["bbox"]]
        annotation["score"] = round(annotation["score"], 6)
        encoded = annotation.get("segmentation")
        _, _, box_width, box_height = annotation["bbox"]
        annotation["area"] = float(coco_mask.area(encoded)) if encoded else round(box_width * box_height, 3)
        annotation["iscrowd"] = 0
    return annotations
