"""Starting point of a run: the latest checkpoint of the run, or none."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from crossmae.checkpoints.run_checkpoint import FOLDER, checkpoint_names, latest_checkpoint, read_record, step_of
from crossmae.errors import UserError, shorten
from crossmae.files.claim import check_folder, check_unused
from crossmae.training.processes import Ranks
from crossmae.training.schedule import AnySchedule

log = logging.getLogger(__name__)

IMAGE_NAMES = "names of the images"  # in the fingerprint, as a hash
# Settings that checkpoints of earlier versions do not record, with the values that these versions had. None: unknown.
ADDED = {
    "data.crop_on": '"cpu"',
    "model.mask_block": "1",
    "model.class_tokens": "1",
    "optim.name": '"adamw"',
    IMAGE_NAMES: None,
}
WEIGHTS, EMA_WEIGHTS = "model.safetensors", "model_ema.safetensors"


def find_start(run: Path, resume: bool, kind: str, key: str = "output_dir", final: str = WEIGHTS) -> Path | None:
    """Find the checkpoint to continue from, None for a new run.

    Raises UserError if the folder is of another `kind` of run, if it contains a run and `resume` is false, or if it
    contains the `final` weights without a checkpoint. The message names `key`, the config key of the folder.
    """
    check_folder(run, kind, key)
    latest = latest_checkpoint(run)
    if latest and not resume:
        check_unused(run, key)
        raise UserError(
            f"{key}: {run} already holds a run ({latest.name}). Pass --resume to continue, or name another folder."
        )
    if not latest and (run / final).exists():
        raise UserError(f"{key}: {run} holds {final} but no complete checkpoint to continue from. Name another folder.")
    if resume and not latest:
        log.info("no checkpoint in %s yet: the training starts at step 0", run)
    return latest


def resumed_precision(precision: str, run: Path) -> str:
    """Replace "auto" by the precision that a run has recorded.

    The newest checkpoint that records one counts. A run without one keeps "auto".
    """
    for name in reversed(checkpoint_names(run)) if precision == "auto" else ():
        with suppress(UserError):
            fingerprint = read_record(run / FOLDER / name).get("fingerprint")
            found = fingerprint.get("precision") if isinstance(fingerprint, dict) else None
            if found in ("fp32", "bf16", "fp16"):
                return str(found)
    return precision


def is_complete(
    start: Path | None, last_step: int, fingerprint: Mapping[str, str], final: str = WEIGHTS, key: str = "output_dir"
) -> bool:
    """Return true if a run is complete, false if it can continue.

    Args:
        start: checkpoint to continue from; None for a new run.
        final: name of the final weights. Without them, the measurements of the last step may be missing.
        fingerprint: settings that must not change when the run is resumed.

    Raises:
        UserError: If the checkpoint was written with other settings.
    """
    if start is None:
        return False
    theirs = read_record(start).get("fingerprint")
    theirs = ADDED | (theirs if isinstance(theirs, dict) else {})
    if theirs[IMAGE_NAMES] is None:
        fingerprint = {key: mine for key, mine in fingerprint.items() if key != IMAGE_NAMES}
    changed = [
        f"{key} was {theirs.get(key)}, is {mine}" for key, mine in fingerprint.items() if mine != theirs.get(key)
    ]
    if changed:
        raise UserError(
            f"--resume: {start} is of a run with other settings: {shorten(changed)}. Repeat those settings, the "
            f"images and the number of processes, or name another {key}."
        )
    return step_of(start) >= last_step and (start.parents[1] / final).is_file()


def shorten_schedule(schedule: AnySchedule, start: Path | None, epochs: float | None, key: str) -> AnySchedule:
    """Shorten a schedule as its checkpoint records and the user asks.

    Args:
        start: checkpoint to continue from; None for a new run.
        epochs: length of the whole run; None: as recorded. The recorded length again changes nothing.
        key: config key of `epochs`.

    Raises:
        UserError: There is no run to shorten, the length is not between the steps done and the present end, or the
            record does not fit the schedule.
    """
    if start is None:
        if epochs:
            raise UserError(
                f"{key}: there is no run to shorten. Pass --resume in the folder of a run, or set {key} to its default."
            )
        return schedule
    done = step_of(start)
    for step, before, after in read_cuts(start):
        if before != schedule.total_steps:
            raise UserError(
                f"{key}: {start} is of a run of {before:,} steps that was shortened, and the settings are for "
                f"{schedule.total_steps:,}. Repeat the settings of the run."
            )
        schedule = schedule.shorten(step, after)
    if epochs and (steps := round(epochs * schedule.steps_per_epoch)) != schedule.total_steps:
        if not done < steps < schedule.total_steps:
            least, most = (number / schedule.steps_per_epoch for number in (done, schedule.total_steps))
            raise UserError(
                f"{key}: {epochs:g} would end the run at step {steps:,}, but it has done {done:,} of its "
                f"{schedule.total_steps:,} steps. Give more than {least:.4g} and fewer than {most:.4g} epochs."
            )
        schedule = schedule.shorten(done, steps)
    if schedule.cuts:
        step, before, after = schedule.cuts[-1]
        words = "%s: the run ends after step %d, not %d. From step %d on, the rest of the learning rates is compressed"
        log.info(words, key, after, before, step)
    return schedule


def read_cuts(start: Path) -> list[tuple[int, int, int]]:
    """Read `Schedule.cuts` from the record of a checkpoint."""
    plan = read_record(start).get("plan")
    rows = plan.get("cuts", []) if isinstance(plan, dict) else []
    numbers = [row for row in rows if isinstance(row, list) and [type(one) for one in row] == [int] * 3]
    if len(numbers) < len(rows) or not all(0 <= step < after < before for step, before, after in numbers):
        raise UserError(f"{start}: its record of a shortened schedule is damaged. Delete this checkpoint.")
    return [(step, before, after) for step, before, after in numbers]


def check_agreement(ranks: Ranks, step: int, fingerprint: Mapping[str, str], key: str = "output_dir") -> None:
    """Check that all processes have the same step and settings.

    The error names `key`, the config key of the folder.
    """
    told = ranks.gather({"step": str(step)} | dict(fingerprint))
    differing = sorted(key for key in told[0] if len({str(one[key]) for one in told}) > 1)
    if differing:
        values = ", ".join(f"{key} is {' or '.join(one[key] for one in told)}" for key in differing)
        raise UserError(
            f"{key}: the processes do not agree: {values}. Give every machine the same images and one shared folder."
        )
