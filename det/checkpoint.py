"""Checkpoints of a detector's run: whole or not there, strict on reading; `model` is always what is evaluated."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from detectron2.checkpoint import DetectionCheckpointer
from torch import nn

from crossmae.errors import UserError
from crossmae.files import write_atomically, write_text
from det.run_files import LAST

# With a moving average, `model` is the average, and here are the weights that training goes on from.
TRAINED = "trained_model"


class AtomicCheckpointer(DetectionCheckpointer):
    """detectron2's checkpoints, but a reader sees a whole file or none, and resuming is strict.

    Args:
        model: that is trained.
        save_dir: folder.
        average: the moving average of its weights, if one is kept.
        checkpointables: what else has a state.
    """

    def __init__(self, model: nn.Module, save_dir: str, average: nn.Module | None = None, **checkpointables: Any):
        super().__init__(model, save_dir, **checkpointables)
        self.average = average

    def save(self, name: str, **kwargs: Any) -> None:
        """Write `<name>.pth`, then name it in `last_checkpoint`."""
        if not self.save_dir or not self.save_to_disk:
            return
        state = {key: value.state_dict() for key, value in self.checkpointables.items()}
        self.write(f"{name}.pth", self.weights() | state | kwargs)
        self.tag_last_checkpoint(f"{name}.pth")

    def weights(self) -> dict[str, Any]:
        """The weights that are evaluated and, where they differ, those that are trained."""
        trained = self.model.state_dict()
        if self.average is None:
            return {"model": trained}
        return {"model": self.average.state_dict(), TRAINED: trained}

    def write(self, file_name: str, content: dict[str, Any]) -> None:
        """One file in the folder, atomically."""
        write_atomically(Path(self.save_dir, file_name), lambda path: torch.save(content, path))

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        """Name the newest checkpoint."""
        write_text(Path(self.save_dir, LAST), last_filename_basename)

    def _load_file(self, filename: str) -> Any:
        try:
            content = super()._load_file(filename)
        except Exception as error:  # torch raises pickle errors, runtime errors and others for the same cause
            raise UserError(
                f"{filename}: can not be read: {' '.join(str(error).split())[:300]}; name an older checkpoint in "
                f"{Path(self.save_dir, LAST)}"
            ) from error
        if self.average is not None and TRAINED in content:
            self.average.load_state_dict(content["model"])
            content["model"] = content.pop(TRAINED)
        return content

    def _log_incompatible_keys(self, incompatible: Any) -> None:
        wrong = [*incompatible.missing_keys, *incompatible.unexpected_keys]
        wrong += [name for name, *_ in incompatible.incorrect_shapes]
        if wrong:
            raise UserError(
                f"{self.get_checkpoint_file()} is of another model than the config: {len(wrong)} tensors are missing, "
                f"left over or of another shape, like {wrong[0]}; resume with the config it was trained with"
            )
