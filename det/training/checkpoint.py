"""Files of a detector's run: weights for use, a record of the run, and the settings that a continuation must share.

`crossmae.checkpoints.run_checkpoint` has the checkpoints to continue from.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import detectron2
import torch
from detectron2.data import MetadataCatalog
from torch import Tensor

from crossmae.checkpoints.formats.training_record import logged_figures, recorded_training
from crossmae.checkpoints.metadata import CLASSES, STEP
from crossmae.checkpoints.reading import EARLIER_BEST, EARLIER_FINAL
from crossmae.checkpoints.reading.files import read_safetensors
from crossmae.checkpoints.run_checkpoint import MODEL, read_state, step_of
from crossmae.checkpoints.weights import save_weights
from crossmae.errors import UserError
from crossmae.files import sha256, write_json
from crossmae.training.resume import find_start
from crossmae.training.versions import versions
from det.classes import CATEGORY_IDS, registered_classes
from det.config import FINAL, LAST, RECORD

log = logging.getLogger(__name__)

# Settings that decide the order of the data, the model or the schedule.
_SHARED = ("SEED", "DATASETS.TRAIN", "DATALOADER.FILTER_EMPTY_ANNOTATIONS", "INPUT.", "MODEL.", "SOLVER.")
# Settings that may change although they match `_SHARED`: device, weights, length of training, settings of evaluation.
_FREE = (
    "INPUT.SIZE",  # the keys that it sets are shared
    "MODEL.DEVICE",
    "MODEL.WEIGHTS",
    "MODEL.VIT.ACTIVATION_CHECKPOINTING",
    "MODEL.VIT.ATTENTION",
    "SOLVER.ACCUMULATE",
    "SOLVER.EPOCHS",
    "SOLVER.AMP.",
    "SOLVER.CHECKPOINT",
    "SOLVER.MAX_ITER",
    "SOLVER.SHORTEN_TO",
)


def write_detector(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], step: int) -> None:
    """Write the weights of a detector for use.

    The metadata get the figures that the run in this folder logged at this step. A `.pth` file of the
    same name, which earlier versions wrote, is replaced.
    """
    figures = logged_figures(path.parent, step)
    training = recorded_training(metadata).model_copy(update={"figures": figures, "step": step if figures else None})
    save_weights(path, tensors, {**metadata, **training.metadata(), STEP: str(step)}, force=True)
    if path.suffix == ".safetensors":
        path.with_suffix(".pth").unlink(missing_ok=True)


def write_final(folder: Path, decay: float | None, metadata: Mapping[str, str], checkpoint: Path) -> None:
    """Write `model_final.safetensors` from a checkpoint: the averaged weights if there are any."""
    tensors = read_state(checkpoint, mapped=True)["ema"] if decay else read_safetensors(checkpoint / MODEL)[0]
    write_detector(folder / FINAL, tensors, metadata, step_of(checkpoint))
    log.info("final weights: %s", folder / FINAL)


def find_checkpoint(folder: Path, resume: bool) -> Path | None:
    """Find the checkpoint to continue from, None for a new run.

    Raises UserError as `find_start` does, and for a run of detectron2 or of an earlier version.
    """
    start = find_start(folder, resume, "detection", "OUTPUT_DIR", FINAL)
    if start is None and any((folder / name).exists() for name in (LAST, EARLIER_BEST, EARLIER_FINAL)):
        raise UserError(
            f"OUTPUT_DIR: {folder} has weights of detectron2 or of an earlier version, which cannot be continued. "
            "Start a new run in another OUTPUT_DIR, with MODEL.WEIGHTS of this one."
        )
    return start


def shared_settings(values: Mapping[str, Any], num_images: int, processes: int) -> dict[str, Any]:
    """Select the settings that a run and its continuation must share.

    Takes the config's values by dotted key. Returns JSON values.
    """
    keys = [key for key in values if key.startswith(_SHARED) and not key.startswith(_FREE)]
    settings = {key: values[key] for key in keys if not key.endswith("_TEST")}
    files = {name: MetadataCatalog.get(name).get("json_file") for name in values["DATASETS.TRAIN"]}
    settings |= {f"SHA-256 of the json of {name}": sha256(Path(path)) for name, path in files.items() if path}
    settings["number of training images"] = num_images
    settings["processes x SOLVER.ACCUMULATE"] = processes * values["SOLVER.ACCUMULATE"]
    decoded: dict[str, Any] = json.loads(json.dumps(settings))
    return decoded


def data_names(train: Sequence[str], test: Sequence[str]) -> dict[str, str]:
    """Name the files of the data sets by split.

    Data sets without a file have their registered names.
    """
    first = {split: names[0] for split, names in (("train", train), ("val", test)) if names}
    return {split: str(MetadataCatalog.get(name).get("json_file", name)) for split, name in first.items()}


def record_run(
    folder: Path,
    train: Sequence[str],
    test: Sequence[str],
    settings: Mapping[str, Any],
    iterations: int,
    listed: int,
    processes: int,
) -> None:
    """Write a run's classes, versions, data sets and `shared_settings`.

    Args:
        listed: number of training images with those that are left out because they have no objects.
    """
    sets = {name: MetadataCatalog.get(name) for name in (*train, *test)}
    data = {name: {"json": meta.get("json_file"), "images": meta.get("image_root")} for name, meta in sets.items()}
    libraries = versions() | {"detectron2": detectron2.__version__, "processes": processes}
    if torch.cuda.is_available():
        libraries["gpu"] = torch.cuda.get_device_name()
    trained = registered_classes(train[0])
    classes = {CLASSES: list(trained.names), CATEGORY_IDS: list(trained.category_ids)} if trained else {}
    run = {"iterations": iterations, "versions": libraries, "data": data, "settings": settings}
    run["listed_images"] = listed
    write_json(folder / RECORD, classes | run)
