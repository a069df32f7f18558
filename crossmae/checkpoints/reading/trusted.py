"""Unrestricted unpickling, only for `tools/convert_checkpoint.py --trust`."""

from __future__ import annotations

import logging
import pickle
from pathlib import Path
from typing import Any

import torch

from crossmae.checkpoints.reading.unpickle import damaged
from crossmae.errors import UserError
from crossmae.files import sha256

log = logging.getLogger(__name__)


def read_trusted(path: Path, kind: str) -> Any:
    """Unpickle a "pickle" or "torch" file, running any code in it."""
    log.warning("%s: sha256 %s: --trust: read without restriction, any code in it runs now", path, sha256(path))
    try:
        if kind == "torch":
            return torch.load(path, map_location="cpu", weights_only=False)
        with open(path, "rb") as file:
            return pickle.load(file, encoding="latin1")
    except (ImportError, AttributeError) as error:
        raise UserError(
            f"{path}: refers to a module that is not installed: {error}. In the program that wrote the file, save only "
            "the state dict: torch.save(model.state_dict(), ...)"
        ) from None
    except MemoryError:
        raise
    except Exception as error:  # wrong bytes can raise almost any exception
        raise damaged(path, error) from None
