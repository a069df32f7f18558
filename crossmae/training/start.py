"""Where a run starts from: its own latest checkpoint, or nothing."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path

from crossmae.checkpoints.run_checkpoint import RECORD, latest_checkpoint
from crossmae.errors import UserError
from crossmae.training.config import RunConfig
from crossmae.training.schedule import Plan, fingerprint

log = logging.getLogger(__name__)

WEIGHTS, EMA_WEIGHTS = "model.safetensors", "model_ema.safetensors"


def find_start(run: Path, resume: bool) -> Path | None:
    """The checkpoint to go on from, or None for a new run.

    Raises:
        UserError: the folder holds a run and `resume` was not asked for, or weights without a checkpoint.
    """
    latest = latest_checkpoint(run)
    if latest and not resume:
        raise UserError(
            f"output_dir: {run} already holds a run ({latest.name}); pass --resume to go on, or name another"
        )
    if not latest and (run / WEIGHTS).exists():
        raise UserError(
            f"output_dir: {run} holds {WEIGHTS} but no complete checkpoint to go on from; name another folder"
        )
    if resume and not latest:
        log.info("--resume: no complete checkpoint in %s, starting from scratch", run)
    return latest


def check_settings(folder: Path, config: RunConfig, plan: Plan, extra: Mapping[str, str] | None = None) -> None:
    """Make sure that a run can go on from a checkpoint.

    Args:
        extra: what the kind of training adds to the fingerprint.

    Raises:
        UserError: it is of a run whose settings differ in what decides data, model or schedule.
    """
    theirs: dict[str, str] = json.loads((folder / RECORD).read_text(encoding="utf-8")).get("fingerprint", {})
    mine = fingerprint(config, plan) | dict(extra or {})
    changed = [f"{key} was {theirs.get(key)}, is {mine[key]}" for key in mine if mine[key] != theirs.get(key)]
    if changed:
        raise UserError(
            f"--resume: {folder} is of a run with other settings: {'; '.join(changed)}; what decides model, batches "
            "and schedule, and the number of processes and images, can not change: for that start in another folder"
        )
