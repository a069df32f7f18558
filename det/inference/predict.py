"""Prediction with a trained detector: images to `Instances`, and instances to COCO annotations."""

from __future__ import annotations

import logging
import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data.transforms import AugmentationList
from detectron2.modeling.postprocessing import detector_postprocess
from detectron2.structures import Instances
from numpy.typing import NDArray
from PIL import Image, ImageOps
from pycocotools import mask as coco_mask
from torch import nn

from crossmae.checkpoints.formats.model_folder import save_folder, source_metadata
from crossmae.checkpoints.weights import read_weights
from crossmae.data.images import ImageLimits, read_image, to_rgb
from crossmae.errors import UserError, counted
from crossmae.files import decode_text, read_file
from crossmae.models.class_names import describe_difference, list_names, pair_names
from det.backbone.detector import padded_size
from det.backbone.record import detector_metadata
from det.backbone.weights import build_trained, find_detector
from det.classes import Classes, classes_of, match_ids
from det.config import RECORD, check_config, choose_device, flatten, image_limits
from det.data.coco import read_categories
from det.data.loader import ResizeShortestEdge, augment
from det.inference.arguments import read_config
from det.inference.paste import coco_results
from det.inference.precision import check_precision, detect
from det.library_warnings import library_warnings_ignored

log = logging.getLogger(__name__)

ImageLike = NDArray[np.uint8] | Image.Image | str | Path


class Predictor:
    """A trained detector, which is called with an image or a list of images.

        predictor = Predictor.from_pretrained("outputs/run")
        instances = predictor("photo.jpg")
        instances.pred_boxes, instances.scores, instances.pred_classes, instances.pred_masks
        predictor.names(instances)
        predictor.draw("photo.jpg", instances).save("found.png")

    Images are read, resized and padded as in evaluation. Objects have a score above
    `MODEL.ROI_HEADS.SCORE_THRESH_TEST`. `highest_score` tells why there are none.

    Args:
        config: a config, which is not changed, or an argument of `read_config`. None uses the config in the file of the
            weights, or next to it.
        weights: a detector's file or its folder. None uses `MODEL.WEIGHTS` of a config. A path given for `config` alone
            names the weights.
        device: "cpu", "cuda" or "cuda:1". None uses the config, or the CPU if there is no GPU.
        masks: predict masks if the detector has them.

    Attributes:
        cfg: the config. Its `MODEL.WEIGHTS` is the file that was read.
        model: the detector, in evaluation mode.
        class_names: names of the classes in order, None if the detector does not record them.

    Raises:
        UserError: the file or the device does not exist, the device does not have `TEST.PRECISION`, the config is not
            for a `GeneralizedRCNN`, or the weights do not fit the config.
    """

    @library_warnings_ignored()
    def __init__(
        self,
        config: CfgNode | str | Path | None = None,
        weights: str | Path | None = None,
        device: str | None = None,
        *,
        masks: bool = True,
    ) -> None:
        if weights is None:
            config, weights = (config, config.MODEL.WEIGHTS) if isinstance(config, CfgNode) else (None, config)
        if not weights:
            raise UserError("weights: no detector is named. Name its file, or the folder of its run.")
        self.cfg = config.clone() if isinstance(config, CfgNode) else read_config(config, weights)
        self.cfg.defrost()
        self.weights = find_detector(Path(weights))
        self.cfg.MODEL.WEIGHTS = str(self.weights)
        if device is not None:
            self.cfg.MODEL.DEVICE = device
            check_config(self.cfg)
        choose_device(self.cfg, asked=device is not None)
        self._precision = self.cfg.TEST.PRECISION
        check_precision(self._precision, torch.device(self.cfg.MODEL.DEVICE))
        model: Any = build_trained(self.cfg)
        self.model: Any = model.eval()
        if not masks:
            self.model.roi_heads.mask_on = False
        recorded = classes_of(self.model)
        self.class_names = recorded.names if recorded else None
        heads, inputs = self.cfg.MODEL.ROI_HEADS, self.cfg.INPUT
        self.num_classes, self.score_threshold, self._format = heads.NUM_CLASSES, heads.SCORE_THRESH_TEST, inputs.FORMAT
        resize = ResizeShortestEdge(inputs.MIN_SIZE_TEST, inputs.MAX_SIZE_TEST, "choice")
        self.limits = image_limits(inputs.MAX_PIXELS)
        self._augmentations = AugmentationList([resize])

    @classmethod
    def from_pretrained(cls, path: str | Path, device: str | None = None, *, masks: bool = True) -> Predictor:
        """Load a detector: its file, its run's folder, or a saved folder."""
        return cls(None, path, device, masks=masks)

    def save_pretrained(
        self, folder: str | Path, *, licence: str = "", base_model: str = "", force: bool = False
    ) -> Path:
        """Save the detector as `model.safetensors`, with its model card `README.md`.

        The file has the present weights and config. `save_folder` documents the arguments, result and errors.
        """
        metadata = source_metadata(read_weights(self.weights, finite=False))
        metadata |= detector_metadata(dict(flatten(self.cfg)), classes_of(self.model))
        options = {"licence": licence, "base_model": base_model}
        return save_folder(folder, self.model.state_dict(), metadata, **options, force=force)

    @overload
    def __call__(self, image: ImageLike) -> Instances: ...

    @overload
    def __call__(self, image: list[ImageLike] | tuple[ImageLike, ...]) -> list[Instances]: ...

    def __call__(self, image: ImageLike | list[ImageLike] | tuple[ImageLike, ...]) -> Instances | list[Instances]:
        """Find the objects in one image or several, highest score first.

        An image is (H, W, 3) uint8 RGB, a Pillow image, or a path. Returns N instances on the CPU, in pixels of the
        image: `pred_boxes` (N, 4) x0, y0, x1, y1; `scores` (N,); `pred_classes` (N,) from 0; and `pred_masks` (N, H, W)
        bool if the detector has masks. A list of images gives a list of results. Raises UserError for a file that
        cannot be read, and ValueError for a wrong array.
        """
        if isinstance(image, list | tuple):
            return self.predict(image)
        return self.predict([image])[0]

    def names(self, instances: Instances) -> list[str]:
        """Return the class name of each of N instances."""
        return [self._name(number) for number in instances.pred_classes.tolist()]

    def draw(self, image: ImageLike, instances: Instances) -> Image.Image:
        """Draw masks, boxes, names and scores on a copy of an image.

        Takes the results of a call. Small images are enlarged. Raises ValueError if the instances are of an image of
        another size.
        """
        from det.inference.draw import draw_large, instances_from_predictions  # slow import

        pixels = read_rgb(image, self.limits)
        if instances.image_size != pixels.shape[:2]:
            raise ValueError(f"instances: of an image of {instances.image_size}, not of {pixels.shape[:2]} pixels")
        names = [self._name(number) for number in range(self.num_classes)]
        return Image.fromarray(draw_large(pixels, instances_from_predictions(instances, names)))

    def _name(self, number: int) -> str:
        return self.class_names[number] if self.class_names else f"class {number + 1}"

    def predict(self, images: Sequence[ImageLike]) -> list[Instances]:
        """Find the objects in several images.

        Images with the same padded size are computed together. No image is padded to the size of another image, because
        global attention sees padding. The result therefore does not depend on the other images.
        """
        return self._run(images, self._detect_and_paste)

    def predict_raw(self, images: Sequence[ImageLike]) -> list[Instances]:
        """Find objects with small masks that cover only their boxes.

        For each image, returns N instances on the model's device, in pixels of the model's input: `pred_boxes`,
        `scores`, `pred_classes`, and `pred_masks` (N, 1, M, M) if the detector has masks: probabilities inside the
        boxes.
        """
        return self._run(images, self._detect)

    def highest_score(self, images: ImageLike | Sequence[ImageLike]) -> float:
        """Find the highest score in images, below the threshold too.

        Takes one image or several. Returns 0 if there are no proposals. Masks are not predicted. The
        detector runs again for this.
        """
        several = images if isinstance(images, Sequence) and not isinstance(images, str) else [images]
        heads = self.model.roi_heads
        last = heads.box_predictor[-1] if isinstance(heads.box_predictor, nn.ModuleList) else heads.box_predictor
        settings = last.test_score_thresh, heads.mask_on
        last.test_score_thresh, heads.mask_on = 0.0, False
        try:
            return max((float(found.scores.max()) for found in self.predict_raw(several) if len(found)), default=0.0)
        finally:
            last.test_score_thresh, heads.mask_on = settings

    def _detect(self, inputs: list[dict[str, Any]]) -> list[Instances]:
        return detect(self.model, inputs, self._precision)

    def _detect_and_paste(self, inputs: list[dict[str, Any]]) -> list[Instances]:
        pairs = zip(self._detect(inputs), inputs, strict=True)
        return [detector_postprocess(found, one["height"], one["width"]).to("cpu") for found, one in pairs]

    @library_warnings_ignored()
    @torch.no_grad()
    def _run(
        self, images: Sequence[ImageLike], model: Callable[[list[dict[str, Any]]], list[Instances]]
    ) -> list[Instances]:
        """Call `model` once for each padded size."""
        inputs: list[dict[str, Any]] = []
        groups: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for index, pixels in enumerate(read_rgb(image, self.limits) for image in images):
            image, _ = augment(pixels, self._augmentations, self._format)  # as in evaluation
            inputs.append({"image": image, "height": pixels.shape[0], "width": pixels.shape[1]})
            groups[padded_size([image.shape[1:]], self.model.backbone)].append(index)
        found: dict[int, Instances] = {}
        for indices in groups.values():
            found |= zip(indices, model([inputs[index] for index in indices]), strict=True)
        return [found[index] for index in range(len(inputs))]


def threshold_below(score: float) -> float:
    """Return the next lower threshold of one digit, at least 0."""
    if score <= 0:
        return 0.0
    unit = 10.0 ** min(math.floor(math.log10(score)), -1)
    digit = math.ceil(score / unit - 1e-9) - 1
    return round(digit * unit if digit else 0.9 * unit, 12)


def read_rgb(image: ImageLike, limits: ImageLimits | None = None) -> NDArray[np.uint8]:
    """Read an image as training does: upright (H, W, 3) uint8 RGB.

    Raises UserError for a file that cannot be read or has more pixels than the limits, and ValueError for an array of
    another shape or type.
    """
    if isinstance(image, (str, Path)):
        image = read_image(image, limits or image_limits())
    elif isinstance(image, Image.Image):
        image = to_rgb(ImageOps.exif_transpose(image))
    pixels = np.asarray(image)
    if pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.dtype != np.uint8 or not pixels.size:
        raise ValueError(f"image: expected (H, W, 3) uint8 RGB, received {pixels.shape} {pixels.dtype}")
    return pixels


def find_classes(predictor: Predictor, file: Path | None = None) -> Classes:
    """Find the names and category ids of a detector's classes.

    `file` is a JSON file with COCO's `categories`, or a text file with one name per line. Its names are matched with
    the names that the detector records, and its ids are used. Classes that it does not list are left out. If the
    detector does not record names, they come from the file in order. Without both, the names are numbers from 1, with a
    warning. Raises UserError if the file has other names or another number of names.
    """
    wanted, recorded = predictor.num_classes, classes_of(predictor.model)
    if file is None and recorded is None:
        log.warning(
            "%s has no class names, so they are class 1 to class %d. Name them with --classes.",
            *(predictor.weights.with_name(RECORD), wanted),
        )
        numbers = range(1, wanted + 1)
        return Classes(tuple(f"class {number}" for number in numbers), tuple(numbers))
    given = recorded if file is None else _read_classes(file)
    assert given is not None
    if recorded is None and len(given.names) != wanted:
        raise UserError(f"{file}: has {counted(len(given.names), 'class name')}. The detector needs {wanted}.")
    if file is None or recorded is None:
        return given
    pairs = pair_names(given.names, recorded.names)
    if pairs.unknown:
        raise UserError(
            f"{file}: its classes differ, the detector does not know {describe_difference(pairs)}. Leave "
            "out --classes, or name a file with its classes."
        )
    for note in pairs.notes():
        log.warning("%s: compared with the detector's classes, %s", file, note)
    if pairs.absent:
        log.warning("%s: detections of classes that it does not list are left out: %s", file, list_names(pairs.absent))
    return Classes(recorded.names, match_ids(pairs, given.category_ids))


def _read_classes(file: Path) -> Classes:
    if file.suffix.lower() == ".json":
        categories = read_categories(file)  # sorted by id, as detectron2 numbers the classes
        return Classes(tuple(name for _, name in categories), tuple(number for number, _ in categories))
    lines = decode_text(read_file(file), file).splitlines()
    names = tuple(line.strip() for line in lines if line.strip())
    return Classes(names, tuple(range(1, len(names) + 1)))


def coco_annotations(
    instances: Instances, image_id: int, height: int, width: int, classes: Classes
) -> list[dict[str, Any]]:
    """Convert predictions of one image to COCO annotations.

    Takes instances from `Predictor.predict_raw`. Returns the results of `coco_results` with `area` and `iscrowd`. Boxes
    are rounded to a thousandth of a pixel.
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
