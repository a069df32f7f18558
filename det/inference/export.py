"""Export of a trained detector to one file that runs without this package: ONNX or `torch.export`.

The graph contains all steps from normalisation to the mask head (`det/inference/export_graph.py`). A file is kept only
if it agrees with detectron2's inference. Shapes: H, W of the input, N detections, M side of a mask.
"""

from __future__ import annotations

import io
import json
import logging
import os
from collections.abc import Callable, Mapping
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from warnings import catch_warnings, simplefilter

import numpy as np
import torch
import torch.nn.functional as F
from detectron2.modeling import GeneralizedRCNN
from detectron2.structures import ImageList
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

import crossmae
from crossmae.errors import UserError, import_extra
from crossmae.files import allow_reading, check_destination, sync_file, sync_folder, temporary_folder
from crossmae.files.leftovers import SHARED_SECONDS, sweep
from det.inference.export_graph import ExportableBackbone, ExportableDetector, obstacle

log = logging.getLogger(__name__)

Arrays = dict[str, NDArray[Any]]

ONNX, TORCH = ".onnx", ".pt2"
OPSET = 18
INPUTS = ("image", "image_size")
INPUT_NOTE = (
    "image: float32 (1, 3, H, W), RGB, 0 to 255, the picture at the top left, anything next to it; "
    "image_size: int64 (2,), height and width of the picture"
)
ONE_FILE_BYTES = 1_900_000_000  # ONNX files are limited to 2 GiB; larger weights get their own file
# Largest allowed differences between file and detector: pixels, scores, mask probabilities, and features divided by the
# largest feature of their level. "unpaired" counts detections without a partner.
LIMITS = {"unpaired": 0.0, "boxes": 0.01, "scores": 1e-4, "masks": 1e-3, "features": 1e-4}


@dataclass(frozen=True)
class Parity:
    """Largest absolute differences of compared detections or feature maps, by kind (see `LIMITS`)."""

    compared: int
    differences: dict[str, float]

    def exceeded(self) -> list[str]:
        """List the kinds of output whose difference exceeds its limit."""
        return [kind for kind, value in self.differences.items() if not value <= LIMITS[kind]]

    def __str__(self) -> str:
        return ", ".join(f"{kind} {value:.2g} (limit {LIMITS[kind]:g})" for kind, value in self.differences.items())


def export_detector(
    model: GeneralizedRCNN,
    path: Path,
    img_size: int | tuple[int, int],
    *,
    backbone_only: bool = False,
    check: bool = True,
    image: NDArray[np.uint8] | None = None,
    metadata: Mapping[str, str] | None = None,
    force: bool = False,
) -> Parity | None:
    """Export a detector for images of fixed size.

    There are two inputs. `image` (1, 3, H, W) is float32 RGB from 0 to 255, for every detector. `image_size` (2,) is
    the int64 height and width of the picture in the top left corner of the image; the rest of the image is ignored. See
    `fit_image`. Outputs, highest score first:

        boxes    (N, 4)     float32, x0, y0, x1, y1 in pixels of the input
        scores   (N,)       float32
        classes  (N,)       int64, from 0
        masks    (N, M, M)  float32, probabilities inside the box, if the detector has masks

    With `backbone_only`, the outputs are the feature maps: `p2` (1, C, H / 4, W / 4) and so on. Thresholds and limits
    come from the config. Above 1000 candidates, detectron2 suppresses overlaps class by class. The graph always shifts
    each class to other coordinates instead. Detections whose overlap equals the threshold, except for rounding, may
    therefore differ.

    Args:
        model: on the CPU, in evaluation mode.
        path: `.onnx`, or `.pt2` for `torch.export.load`. Large ONNX weights are written to `<name>.onnx.data`.
        img_size: H and W in pixels, or one number for both. Multiples of the backbone's divisor.
        check: run the file on the CPU, and return its differences from the model, which must be within `LIMITS`.
        image: picture for the check, (h, w, 3) uint8 RGB. None uses coloured shapes.

    Raises:
        UserError: the model cannot be exported as requested, a library is missing, or the differences exceed `LIMITS`.
            Nothing is written then.
    """
    height, width = size = (img_size, img_size) if isinstance(img_size, int) else img_size
    _check_request(model, path, size, backbone_only, force)
    for library in ["onnxscript", *(["onnxruntime"] if check else [])] if path.suffix == ONNX else []:
        import_extra(library, f"export to {path.suffix}", "export")
    about = {"input": INPUT_NOTE, "img_size": json.dumps([height, width]), "torch": torch.__version__}
    about |= {"crossmae": crossmae.__version__, **(metadata or {})}
    inputs = fit_image(_shapes(size) if image is None else image, size)
    sweep(path.parent, depth=0, min_age=SHARED_SECONDS)
    with temporary_folder(path) as folder, torch.no_grad(), catch_warnings():
        simplefilter("ignore")  # warnings about library internals
        draft = folder / path.name
        _write(model, draft, size, backbone_only, about)
        parity = _check(model, draft, inputs, backbone_only) if check else None
        for file in sorted(folder.iterdir(), reverse=True):  # separate weights first
            allow_reading(file)
            sync_file(file)
            os.replace(file, path.with_name(file.name))
        sync_folder(path.parent)
    return parity


def _check_request(model: GeneralizedRCNN, path: Path, size: tuple[int, int], backbone_only: bool, force: bool) -> None:
    if path.suffix not in (ONNX, TORCH):
        raise UserError(f"{path}: unknown suffix. Use {ONNX}, or {TORCH} for torch.export.load.")
    if not path.parent.is_dir():
        raise UserError(f"{path}: there is no folder {path.parent}. Create it.")
    for file in (path, path.with_name(f"{path.name}.data")):
        check_destination(file, force=force)
    divisor = model.backbone.padding_constraints["size_divisibility"]
    if any(side <= 0 or side % divisor for side in size):
        raise UserError(f"image size: {size[0]} x {size[1]} does not fit. Use multiples of {divisor} pixels.")
    reason = None if backbone_only else obstacle(model)
    if reason:
        raise UserError(f"the detector cannot be exported: {reason}. Export its backbone with --backbone-only.")


def _write(
    model: GeneralizedRCNN, path: Path, size: tuple[int, int], backbone_only: bool, metadata: dict[str, str]
) -> None:
    exportable = (ExportableBackbone if backbone_only else ExportableDetector)(model, size).eval()
    example = (torch.zeros(1, 3, *size), torch.tensor(size))
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):  # a failure prints the whole graph
            program = torch.export.export(exportable, example)
        if path.suffix == TORCH:
            torch.export.save(program, path, extra_files={"metadata.json": json.dumps(metadata, indent=2)})
            return
        spec = program.call_spec.out_spec
        assert spec is not None
        position: dict[str, int] = spec.unflatten(range(spec.num_leaves))
        onnx = torch.onnx.export(
            program,
            input_names=INPUTS,
            output_names=sorted(position, key=position.__getitem__),
            opset_version=OPSET,
            dynamo=True,  # not the default before torch 2.9
            verbose=False,
        )
    except Exception as error:  # exporters raise all types of exceptions
        hint = "" if backbone_only else ". Export its backbone with --backbone-only."
        first = str(error).strip().split("\n")[0]
        raise UserError(f"the detector cannot be exported: {type(error).__name__}: {first}{hint}") from error
    assert onnx is not None
    onnx.model.metadata_props.update(metadata)
    weights = sum(tensor.nbytes for tensor in program.state_dict.values())
    onnx.save(path, external_data=weights > ONE_FILE_BYTES)


def load_exported(path: Path) -> Callable[[Mapping[str, NDArray[Any]]], Arrays]:
    """Load an exported file as a function from inputs to outputs."""
    if path.suffix == ONNX:
        runtime = import_extra("onnxruntime", f"running {path.suffix}", "export")
        options = runtime.SessionOptions()
        options.log_severity_level = 3  # log only errors
        session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        names = [output.name for output in session.get_outputs()]
        return lambda inputs: dict(zip(names, session.run(None, dict(inputs)), strict=True))
    module = torch.export.load(path).module()

    def run(inputs: Mapping[str, NDArray[Any]]) -> Arrays:
        with torch.no_grad():
            outputs = module(*(torch.from_numpy(inputs[name]) for name in INPUTS))
        return {name: tensor.numpy() for name, tensor in outputs.items()}

    return run


def fit_image(image: NDArray[np.uint8], size: tuple[int, int]) -> Arrays:
    """Resize an RGB picture (h, w, 3) to an export's input size.

    Returns:
        `image` (1, 3, H, W) float32: the resized picture with its proportions, and zeros to the right or below.
        `image_size` (2,) int64: height and width of the resized picture. To convert the detector's boxes to the
        original picture, multiply x by w / image_size[1] and y by h / image_size[0].
    """
    h, w = image.shape[:2]
    scale = min(size[0] / h, size[1] / w)
    height, width = (max(1, round(side * scale)) for side in (h, w))
    resized = Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR)
    canvas = np.zeros((1, 3, *size), np.float32)
    canvas[0, :, :height, :width] = np.asarray(resized).transpose(2, 0, 1)
    return {"image": canvas, "image_size": np.array([height, width], np.int64)}


def _shapes(size: tuple[int, int]) -> NDArray[np.uint8]:
    random = np.random.default_rng(0)
    height, width = size[0], max(1, size[1] * 3 // 4)
    picture = random.integers(90, 150, (height, width, 3)).astype(np.uint8)
    rows, columns = np.ogrid[:height, :width]
    for number in range(24):
        y, x, radius = random.uniform(0, height), random.uniform(0, width), random.uniform(0.03, 0.2) * height
        far = np.maximum(abs(rows - y), abs(columns - x)) if number % 2 else np.hypot(rows - y, columns - x)
        picture[far < radius] = random.integers(0, 256, 3)
    return picture


def _check(model: GeneralizedRCNN, path: Path, inputs: Arrays, backbone_only: bool) -> Parity:
    """Compare a file with its model. Reject differences over `LIMITS`."""
    exported = load_exported(path)(inputs)
    if backbone_only:
        eager = _eager_features(model, inputs)[1]
        apart = [np.abs(eager[name].numpy() - exported[name]).max() / eager[name].abs().max() for name in eager]
        parity = Parity(len(eager), {"features": float(max(apart))})
    else:
        parity = compare_detections(eager_detections(model, inputs), exported)
    if parity.exceeded():
        raise UserError(
            f"{path.name}: differs from the detector, so it is not kept: {parity}. Try another picture with --image, "
            "because this one may have scores or overlaps right at a threshold, or skip the check with --no-check."
        )
    if not parity.compared:
        log.warning("the detector finds nothing in the picture, so the check proves little. Name another picture.")
    return parity


@torch.no_grad()
def _eager_features(model: GeneralizedRCNN, inputs: Arrays) -> tuple[ImageList, dict[str, Tensor]]:
    """Compute the padded image and the feature maps as detectron2 does."""
    height, width = (int(side) for side in inputs["image_size"])
    image = torch.from_numpy(inputs["image"])[:, :, :height, :width]
    image = image.flip(1) if model.input_format == "BGR" else image
    below, right = inputs["image"].shape[2] - height, inputs["image"].shape[3] - width
    padded = F.pad((image - model.pixel_mean) / model.pixel_std, (0, right, 0, below))
    return ImageList(padded, [(height, width)]), model.backbone(padded)


@torch.no_grad()
def eager_detections(model: GeneralizedRCNN, inputs: Arrays) -> Arrays:
    """Compute the expected outputs for inputs from `fit_image`."""
    images, features = _eager_features(model, inputs)
    proposals, _ = model.proposal_generator(images, features)
    (found,), _ = model.roi_heads(images, features, proposals)
    outputs = {"boxes": found.pred_boxes.tensor, "scores": found.scores, "classes": found.pred_classes}
    if found.has("pred_masks"):
        outputs["masks"] = found.pred_masks[:, 0]
    return {name: tensor.numpy() for name, tensor in outputs.items()}


def compare_detections(expected: Arrays, received: Arrays) -> Parity:
    """Pair detections by class and position, and measure their differences."""
    count, others = len(expected["scores"]), len(received["scores"])
    if not count or not others:
        return Parity(count, {"unpaired": float(max(count, others))})
    apart = np.abs(expected["boxes"][:, None] - received["boxes"]).max(axis=2)
    apart += np.abs(expected["scores"][:, None] - received["scores"])
    apart[expected["classes"][:, None] != received["classes"]] = np.inf
    partner = apart.argmin(axis=1)
    paired = np.isfinite(apart.min(axis=1))
    differences = {"unpaired": float(max(count, others) - len(set(partner[paired].tolist())))}
    for name in ("boxes", "scores", "masks"):
        if name in expected:
            far = np.abs(expected[name][paired] - received[name][partner[paired]])
            differences[name] = float(far.max(initial=0.0))
    return Parity(count, differences)
