"""Checkpoints of a detector's run: atomic writing, strict reading, and a record of its settings.

In a checkpoint, `model` has the evaluated weights.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import detectron2
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.data import MetadataCatalog
from detectron2.utils import comm
from torch import nn

from crossmae.checkpoints.metadata import CLASSES, PICKLED_METADATA
from crossmae.checkpoints.reading.torch_file import read_torch_file
from crossmae.checkpoints.weights import check_finite, describe_non_finite
from crossmae.errors import UserError
from crossmae.files import sha256, write_atomically, write_json, write_text
from crossmae.training.versions import versions
from det.classes import CATEGORY_IDS, classes_of
from det.config import CHECKPOINT, LAST, RECORD
from det.data.coco import registered_classes

log = logging.getLogger(__name__)

# With a moving average, `model` has the average, and this key has the weights that training continues from.
TRAINED = "trained_model"
NAME_LIMIT = 256  # number of characters of `last_checkpoint` that are read
# Settings that decide the order of the data, the model or the schedule.
_SHARED = ("SEED", "DATASETS.TRAIN", "DATALOADER.FILTER_EMPTY_ANNOTATIONS", "INPUT.", "MODEL.", "SOLVER.")
# Settings that may change although they match `_SHARED`: device, weights, length of training, settings of evaluation.
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
_REPAIR = "Write the name of a checkpoint in this folder into it, such as model_0004999.pth or model_final.pth."


class AtomicCheckpointer(DetectionCheckpointer):
    """detectron2's checkpoints of a run folder, with atomic writing and strict reading.

    If there is a moving `average` of the weights, the average and the trained weights are saved. `metadata` is written
    with them, and kept on resuming.
    """

    def __init__(self, model: nn.Module, save_dir: str, average: nn.Module | None = None, **checkpointables: Any):
        super().__init__(model, save_dir, **checkpointables)
        self.average = average
        self.metadata: dict[str, str] = {}

    def save(self, name: str, **kwargs: Any) -> None:
        """Write `<name>.pth`, then record its name in the file `last_checkpoint`."""
        if not self.save_dir or not self.save_to_disk:
            return
        state = {key: value.state_dict() for key, value in self.checkpointables.items()}
        self.write(f"{name}.pth", self.weights() | state | kwargs)
        write_text(Path(self.save_dir, LAST), f"{name}.pth")

    def weights(self) -> dict[str, Any]:
        """Return the evaluated weights and, if different, the trained weights."""
        trained = self.model.state_dict()
        if self.average is None:
            return {"model": trained}
        return {"model": self.average.state_dict(), TRAINED: trained}

    def write(self, file_name: str, content: dict[str, Any]) -> None:
        """Write one file of the folder, with the names of the classes.

        Rejects weights that are not finite.
        """
        for key in ("model", TRAINED):
            if found := describe_non_finite(content.get(key, {})):
                raise UserError(
                    f"{Path(self.save_dir, file_name)}: not written, because {found} (in `{key}`). Lower "
                    "SOLVER.BASE_LR and start a new run in another OUTPUT_DIR."
                )
        classes = classes_of(self.model)
        metadata = self.metadata | (classes.metadata() if classes else {})
        content = content | ({PICKLED_METADATA: metadata} if metadata else {})
        write_atomically(Path(self.save_dir, file_name), lambda path: torch.save(content, path))

    def resume(self, path: Path, max_iter: int) -> int:
        """Load a checkpoint and return the next step."""
        self.load(str(path))
        first: int = self.checkpointables["trainer"].iter + 1  # the checkpoint has the number of the finished step
        if first > max_iter:
            raise UserError(
                f"--resume: {first} steps are done already, of {max_iter}. Raise SOLVER.MAX_ITER or SOLVER.EPOCHS."
            )
        log.info("resuming after iteration %d from %s", first, path)
        return first

    def load(self, path: str, checkpointables: list[str] | None = None) -> dict[str, Any]:
        """Load a checkpoint of this model. Reject weights that are not finite."""
        rest: dict[str, Any] = super().load(path, checkpointables)
        for model in (self.model, self.average):
            if model is not None:
                check_finite(model.state_dict(), Path(path))
        return rest

    def _load_file(self, filename: str) -> Any:
        """Read a checkpoint without executing code in it."""
        advice = f"Name an older checkpoint in {Path(self.save_dir, LAST)}."
        try:
            content = read_torch_file(Path(filename))
        except UserError as error:
            raise UserError(f"{str(error).rstrip('.')}. {advice}") from error
        wanted = ("model", *self.checkpointables)
        missing = [key for key in wanted if not isinstance(content, dict) or not isinstance(content.get(key), dict)]
        if missing:
            raise UserError(
                f"{filename}: has no {', '.join(missing)}, so it is no checkpoint of a training run. {advice}"
            )
        self.metadata = content.get(PICKLED_METADATA, {})
        if self.average is not None and TRAINED in content:
            self.average.load_state_dict(content["model"])
            content["model"] = content.pop(TRAINED)
        return {key: content[key] for key in wanted}  # other keys would change how detectron2 loads

    def _log_incompatible_keys(self, incompatible: Any) -> None:
        wrong = [*incompatible.missing_keys, *incompatible.unexpected_keys]
        wrong += [name for name, *_ in incompatible.incorrect_shapes]
        if wrong:
            path = last_checkpoint(Path(self.save_dir))
            raise UserError(
                f"{path}: does not fit the config: {len(wrong)} tensors are missing, left over or of another shape, "
                f"such as {wrong[0]}. Resume with the config of the run."
            )


def find_checkpoint(folder: Path, resume: bool) -> Path | None:
    """Find the checkpoint to resume from. Return None for a new run."""
    if not resume:
        if (folder / LAST).exists() or (folder / RECORD).is_file():
            raise UserError(
                f"OUTPUT_DIR: {folder} already has a run. Continue it with --resume, or name another folder."
            )
        return None
    found = last_checkpoint(folder)
    if found is None:
        log.info("--resume: no checkpoint in %s yet, starting from MODEL.WEIGHTS", folder)
    return found


def last_checkpoint(folder: Path) -> Path | None:
    """Find the checkpoint that the file `last_checkpoint` names."""
    record = folder / LAST
    try:
        with open(record, encoding="utf-8", errors="replace") as file:
            text = file.read(NAME_LIMIT)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"{record}: cannot be read: {error.strerror}. {_REPAIR}") from None
    name = text.removesuffix("\n")
    if not CHECKPOINT.fullmatch(name):
        raise UserError(f"{record}: {name[:60]!r} is not the name of a checkpoint. {_REPAIR}")
    path = folder / name
    if not path.is_file():
        raise UserError(f"{record}: {name} does not exist. {_REPAIR}")
    if path.resolve().parent != folder.resolve():
        raise UserError(f"{record}: {name} is a link to a file outside {folder}. Copy the file into the folder.")
    return path


def shared_settings(values: Mapping[str, Any], num_images: int) -> dict[str, Any]:
    """Select the settings that a run and its continuation must share.

    Takes the config's values by dotted key. Returns JSON values.
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
    """Reject a continuation whose settings differ from the recorded settings."""
    try:
        recorded = json.loads((folder / RECORD).read_text(encoding="utf-8"))["settings"]
        keys = recorded.keys() | settings.keys()
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise UserError(
            f"--resume: {folder / RECORD} is missing or damaged, so the settings cannot be compared. Start a new run "
            "from MODEL.WEIGHTS in another OUTPUT_DIR."
        ) from None
    pairs = {key: (recorded.get(key), settings.get(key)) for key in sorted(keys)}
    changed = ", ".join(f"{key} was {old!r}, now {new!r}" for key, (old, new) in pairs.items() if old != new)
    if changed:
        raise UserError(f"--resume: settings of the run have changed: {changed}. Restore them, or start a new run.")


def record_run(
    folder: Path, train: Sequence[str], test: Sequence[str], settings: Mapping[str, Any], iterations: int
) -> None:
    """Write a run's classes, versions, data sets and `shared_settings`."""
    sets = {name: MetadataCatalog.get(name) for name in (*train, *test)}
    data = {name: {"json": meta.get("json_file"), "images": meta.get("image_root")} for name, meta in sets.items()}
    libraries = versions() | {"detectron2": detectron2.__version__, "processes": comm.get_world_size()}
    if torch.cuda.is_available():
        libraries["gpu"] = torch.cuda.get_device_name()
    trained = registered_classes(train[0])
    classes = {CLASSES: list(trained.names), CATEGORY_IDS: list(trained.category_ids)} if trained else {}
    run = {"iterations": iterations, "versions": libraries, "data": data, "settings": settings}
    write_json(folder / RECORD, classes | run)
