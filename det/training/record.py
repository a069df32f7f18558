"""The record of a detector's run: its classes, versions, data, and the settings that a continuation must share."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import detectron2
import torch
from detectron2.data import MetadataCatalog
from detectron2.utils import comm

from crossmae.errors import UserError
from crossmae.files import sha256, write_json
from crossmae.training.versions import versions
from det.config import RECORD

# Settings that decide the order of data, the model and the schedule.
_SHARED = ("SEED", "DATASETS.TRAIN", "DATALOADER.FILTER_EMPTY_ANNOTATIONS", "INPUT.", "MODEL.", "SOLVER.")
# Settings among them that may differ: where and how long to train, and what only evaluation reads.
_FREE = (
    "MODEL.DEVICE",
    "MODEL.WEIGHTS",
    "MODEL.VIT.ACTIVATION_CHECKPOINTING",
    "MODEL.VIT.ATTENTION",
    "SOLVER.ACCUMULATE",
    "SOLVER.EPOCHS",
    "SOLVER.AMP.",
    "SOLVER.CHECKPOINT",
    "SOLVER.MAX_ITER",
)


def shared_settings(values: Mapping[str, Any], num_images: int) -> dict[str, Any]:
    """Select the settings that a run and its continuation must share.

    Args:
        values: of the config, by dotted key.
        num_images: size of the training set.

    Returns:
        Values by key, as JSON holds them.
    """
    keys = [key for key in values if key.startswith(_SHARED) and not key.startswith(_FREE)]
    settings = {key: values[key] for key in keys if not key.endswith("_TEST")}
    files = {name: MetadataCatalog.get(name).get("json_file") for name in values["DATASETS.TRAIN"]}
    settings |= {f"SHA-256 of the json of {name}": sha256(Path(path)) for name, path in files.items() if path}
    settings["number of training images"] = num_images
    settings["processes x SOLVER.ACCUMULATE"] = comm.get_world_size() * values["SOLVER.ACCUMULATE"]
    decoded: dict[str, Any] = json.loads(json.dumps(settings))
    return decoded


def check_continues(folder: Path, settings: Mapping[str, Any]) -> None:
    """Compare the settings of a continuation with the record in `folder`.

    Raises:
        UserError: names what differs, with both values; or the record is gone or damaged.
    """
    try:
        recorded = json.loads((folder / RECORD).read_text(encoding="utf-8"))["settings"]
        keys = recorded.keys() | settings.keys()
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise UserError(
            f"--resume: {folder / RECORD} is missing or damaged, so that nothing tells whether this is the same run. "
            "Start a new one from MODEL.WEIGHTS in another OUTPUT_DIR."
        ) from None
    changed = [
        f"{key} was {recorded.get(key)!r}, now {settings.get(key)!r}"
        for key in sorted(keys)
        if recorded.get(key) != settings.get(key)
    ]
    if changed:
        raise UserError(f"--resume: {folder} holds a run with other settings: {'; '.join(changed)}")


def record_run(
    folder: Path, train: Sequence[str], test: Sequence[str], settings: Mapping[str, Any], iterations: int
) -> None:
    """Write the classes, versions, data and shared settings of a run.

    Args:
        folder: of the run.
        train, test: names of the data sets.
        settings: see `shared_settings`.
        iterations: steps of the run.
    """
    sets = {name: MetadataCatalog.get(name) for name in (*train, *test)}
    data = {name: {"json": meta.get("json_file"), "images": meta.get("image_root")} for name, meta in sets.items()}
    libraries = versions() | {"detectron2": detectron2.__version__, "processes": comm.get_world_size()}
    if torch.cuda.is_available():
        libraries["gpu"] = torch.cuda.get_device_name()
    names = sets[train[0]]
    classes = {"classes": list(names.thing_classes), "category_ids": list(names.thing_dataset_id_to_contiguous_id)}
    run = {"iterations": iterations, "versions": libraries, "data": data, "settings": settings}
    write_json(folder / RECORD, classes | run)
