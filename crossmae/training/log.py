"""What a run writes for people while it trains: JSON lines, TensorBoard, Weights & Biases, pictures, one live line."""

from __future__ import annotations

import importlib
import json
import logging
import math
import secrets
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from crossmae.data.broken import Broken
from crossmae.data.sources import Source
from crossmae.errors import UserError
from crossmae.files import write_text
from crossmae.reports.figures import save_figure
from crossmae.training.config import RunConfig
from crossmae.training.schedule import Plan

log = logging.getLogger(__name__)

NAMES = {
    "val_loss": "validation loss",
    "val_loss_ema": "validation loss of the averaged weights",
    "knn_accuracy": "kNN accuracy",
    "knn_accuracy_ema": "kNN accuracy of the averaged weights",
    "top1": "top-1 accuracy",
    "top1_ema": "top-1 accuracy of the averaged weights",
    "top5": "top-5 accuracy",
    "top5_ema": "top-5 accuracy of the averaged weights",
    "mean_ap": "mean average precision",
    "mean_ap_ema": "mean average precision of the averaged weights",
}
LOG, BROKEN = "log.jsonl", "broken.jsonl"


class RunLog:
    """The writers of a run, in its folder; a context manager that closes them.

    Args:
        config, plan: of the run.
        step: that it goes on from; lines of the log after it are dropped, because they will be written again.
        is_main: whether this process writes at all.
        resumed: whether there is a checkpoint; without one, nothing of an earlier try in the folder stays.
        word: what is being done, for the progress bar.

    Raises:
        UserError: Weights & Biases was asked for and can not be used.
    """

    def __init__(
        self, config: RunConfig, plan: Plan, step: int, is_main: bool, resumed: bool, word: str = "pretrain"
    ) -> None:
        self.config, self.plan, self.is_main, self.first_step, self.word = config, plan, is_main, step, word
        self.rows: list[dict[str, Any]] = []
        self.wandb = start_wandb(config, resumed) if is_main and config.log.wandb else None
        if is_main and resumed:
            self.rows = truncate_log(config.output_dir / LOG, step)
        elif is_main:
            (config.output_dir / LOG).unlink(missing_ok=True)
            shutil.rmtree(config.output_dir / "tensorboard", ignore_errors=True)

    def __enter__(self) -> RunLog:
        plan, folder = self.plan, self.config.output_dir
        self.bar = tqdm(
            total=plan.last_step,
            initial=self.first_step,
            desc=self.word,
            unit="step",
            dynamic_ncols=True,
            disable=not self.is_main,
        )
        self.redirect = logging_redirect_tqdm()  # a warning goes above the live line, not into it
        self.redirect.__enter__()
        if self.is_main:
            self.lines = open(folder / LOG, "a", encoding="utf-8")
            self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=self.first_step + 1)
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()
        self.redirect.__exit__(None, None, None)
        if self.is_main:
            self.board.close()
            self.lines.close()
        if self.wandb is not None:
            self.wandb.finish()

    def record(self, step: int, values: Mapping[str, float], live: str = "") -> None:
        """One line of the log, and one point of every curve.

        Args:
            step: steps done.
            values: by name.
            live: words for the live line; empty leaves it as it is.
        """
        if not self.is_main:
            return
        rounded = {key: float(f"{value:.6g}") for key, value in values.items()}
        line = {"step": step, "epoch": round(self.plan.epoch(step), 4), **rounded}
        self.rows.append(line)
        self.lines.write(json.dumps(line) + "\n")
        self.lines.flush()
        for key, value in values.items():
            self.board.add_scalar(key, value, step)
        if self.wandb is not None:
            self.wandb.log(dict(values), step=step)
        if live:
            self.bar.set_postfix_str(live)

    def picture(self, step: int, name: str, figure: Figure) -> None:
        """Write a figure as `name`/step-<8 digits>.png, and to TensorBoard."""
        folder = self.config.output_dir / name
        folder.mkdir(exist_ok=True)
        path = folder / f"step-{step:08d}.png"
        save_figure(figure, path)
        self.board.add_figure(name, figure, step)
        if self.wandb is not None:
            self.wandb.log({name: importlib.import_module("wandb").Image(str(path))}, step=step)

    def announce(self, step: int, values: Mapping[str, float]) -> None:
        """Say what was measured at a step, above the live line."""
        if self.is_main:
            log.info("step %d: %s", step, describe(values))

    def summary(self) -> list[str]:
        """For each quantity that was measured more than once, what it was at first and what it became."""
        lines = []
        for key, name in NAMES.items():
            if ends := self.first_and_last(key):
                (first_step, first), (last_step, last) = ends
                start = "of the weights it started from" if first_step == 0 else f"at step {first_step}"
                lines.append(f"{name}: {first:.4f} {start}, {last:.4f} at step {last_step}")
        return lines

    def first_and_last(self, key: str) -> tuple[tuple[int, float], tuple[int, float]] | None:
        """(step, value) of the first and of the last line that has `key`; None where fewer than two have."""
        found = [(int(row["step"]), float(row[key])) for row in self.rows if key in row]
        return (found[0], found[-1]) if len(found) > 1 else None


def live_line(loss: float, lr: float, images_per_second: float, data_wait_share: float, memory_gb: float) -> str:
    """What stands behind the progress bar and its remaining time."""
    return (
        f"loss {loss:.4f}, lr {lr:.2e}, {images_per_second:.0f} img/s, "
        f"waiting for data {data_wait_share:.0%}, {memory_gb:.1f} GB"
    )


def describe(values: Mapping[str, float]) -> str:
    """Numbers by name, in words."""
    return ", ".join(f"{NAMES.get(key, key.replace('_', ' '))} {value:.4f}" for key, value in values.items())


class BrokenImages:
    """Keeps count of images that others stand in for, each once, also over restarts, and lists them in a file.

    Each process counts those that it met.

    Args:
        path: of the list, JSON lines with the keys name and reason.
        source: that they come from.
        budget: share of the source that may be broken.
        resumed: whether the list of an earlier part of this run goes on.
    """

    def __init__(self, path: Path, source: Source, budget: float, resumed: bool) -> None:
        self.path, self.source, self.most = path, source, math.floor(budget * len(source))
        if not resumed:
            path.unlink(missing_ok=True)
        self.known = {str(row["name"]) for row in _read_lines(path) if "name" in row}

    def add(self, broken: Sequence[Broken]) -> None:
        """Count and list those that are new.

        Raises:
            UserError: there are more than the budget allows.
        """
        for image in broken:
            name = self.source.name(image.index)
            if name in self.known:
                continue
            self.known.add(name)
            row = {"name": name, "reason": image.message}
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            log.warning("another image stands in for a broken one (%d so far): %s", len(self.known), image.message)
        if len(self.known) > self.most:
            raise UserError(
                f"{len(self.known)} of {len(self.source)} images are broken, data.broken_budget allows {self.most}; "
                f"they are listed in {self.path}"
            )


def truncate_log(path: Path, step: int) -> list[dict[str, Any]]:
    """Drop the lines after `step`, which a resumed run will write again; returns those that stay."""
    rows = [row for row in _read_lines(path) if row.get("step", math.inf) <= step]
    if path.exists():
        write_text(path, "".join(json.dumps(row) + "\n" for row in rows))
    return rows


def _read_lines(path: Path) -> list[dict[str, Any]]:
    """The JSON lines of a file; none if there is no file, and without a last one torn by a kill."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def start_wandb(config: RunConfig, resumed: bool) -> Any:
    """A run of Weights & Biases, named after the output folder; the same one when a run goes on.

    Raises:
        UserError: wandb is not installed, or does not let us in.
    """
    try:
        wandb = importlib.import_module("wandb")
    except ImportError:
        raise UserError('log.wandb needs the package wandb: pip install -e ".[wandb]", or set log.wandb=null') from None
    name = config.output_dir.resolve().name
    identity = config.output_dir / "wandb_id.txt"
    if not (resumed and identity.exists()):
        write_text(identity, secrets.token_hex(4))
    try:
        return wandb.init(
            project=config.log.wandb,
            name=name,
            id=identity.read_text(encoding="utf-8").strip(),
            resume="allow",
            dir=str(config.output_dir),
            config=config.model_dump(mode="json"),
        )
    except Exception as error:  # no account, no network, no such project: errors of many kinds
        raise UserError(
            f"log.wandb: Weights & Biases can not be used: {' '.join(str(error).split())}; run `wandb login`, set "
            "WANDB_MODE=offline, or log.wandb=null"
        ) from error
