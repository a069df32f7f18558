"""Write the demo's results to one page, FOLDER/report.html, and the COCO table to FOLDER/summary.txt.

    python tools/demo/report.py outputs/demo

The program can be run at any time. The page names missing or damaged files.
"""

from __future__ import annotations

import argparse
import math
import os
import platform
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import detectron2
import numpy as np
import psutil
import torch
from pydantic import Field

from crossmae.data.images import read_image
from crossmae.errors import UserError, run_cli
from crossmae.files import read_json, write_text
from crossmae.reports import page, sections
from crossmae.reports.run_folder import FileContent, LoggedNumbers, RunFolder, read_log
from crossmae.training.versions import versions
from det.data.coco import read_coco
from det.evaluation.evaluate import format_results
from det.evaluation.pictures import validation_pictures
from det.evaluation.report import AP_TEXT, ap_facts, class_blocks, headline_table, loss_plots
from det.evaluation.run_files import DetectionResults, read_metrics

COUNT = 12  # number of held-out images on the page
RESULTS, STAGES = "detect/results.json", "stages.json"
PRETRAIN_LOG, DETECT_LOG = "pretrain/log.jsonl", "detect/metrics.json"
ANNOTATIONS, PREDICTIONS = "data/annotations/val.json", "detect/inference/coco_instances_results.json"
LEAD = (
    "A masked autoencoder, CrossMAE, learned to reconstruct hidden patches of unlabelled images. Its encoder became "
    "the backbone of a Mask R-CNN, which outlines handwritten digits in photographs. Digits and photographs are real. "
    "The held-out images share none of them with the training images. Every number was measured by the commands shown, "
    "on the machine described at the end."
)


class StageRecord(FileContent):
    """The record of one stage in stages.json."""

    name: str
    title: str
    command: str
    status: str
    seconds: float
    peak_memory_bytes: int


class Stages(FileContent):
    """The content of stages.json."""

    stages: list[StageRecord] = Field([])

    @property
    def totals(self) -> tuple[str, str]:
        """Total time and highest peak memory of all finished stages, as text."""
        done = [stage for stage in self.stages if stage.status == "done"]
        peak = max((stage.peak_memory_bytes for stage in done), default=0)
        return page.format_seconds(sum(stage.seconds for stage in done)), page.format_bytes(peak)


def result_section(run: RunFolder, results: DetectionResults | None) -> page.Section:
    """Show average precision over all classes and for each class."""
    blocks: list[page.PageBlock] = [run.missing(RESULTS, "average precision")]
    if results is not None:
        blocks = [headline_table(results), *class_blocks(results, Path(RESULTS))]
    return page.Section("Average precision", AP_TEXT, blocks)


def prediction_section(run: RunFolder) -> page.Section:
    """Show true and predicted objects on held-out images, side by side."""
    truth, found = run.read(ANNOTATIONS, read_coco, None), run.read(PREDICTIONS, read_predictions, None)
    what = "pictures of detections"
    absent = [name for name, content in ((ANNOTATIONS, truth), (PREDICTIONS, found)) if content is None]
    blocks: list[page.PageBlock] = [run.missing(name, what) for name in absent]
    if truth is not None and found is not None:
        try:
            drawn = validation_pictures(truth, run.path / "data/val", found, COUNT)
            alt = "true objects on the left, predicted ones on the right"
            pictures = [page.embed_image(pixels, alt=f"image {name}: {alt}", density=2) for name, pixels in drawn]
            blocks = [page.Gallery([page.PictureRow([picture]) for picture in pictures], min_width=460)]
        except (UserError, KeyError, TypeError, ValueError) as error:
            blocks = [page.Missing(Path(PREDICTIONS), what, f"it does not fit {ANNOTATIONS}: {error}")]
    text = (
        f"{COUNT} held-out images, spread evenly over their ids: none was selected by hand. True objects are on the "
        "left, predicted objects with their scores on the right. A class has the same colour on both sides."
    )
    return page.Section("Held-out images", text, blocks)


def read_predictions(path: Path) -> list[Any]:
    """Read a COCO results file.

    Raises UserError if the file is not a list.
    """
    found = read_json(path)
    if not isinstance(found, list):
        raise UserError(f"{path}: expected a list of detections. tools/train_net.py writes such a file.")
    return found


def reconstruction_section(run: RunFolder) -> page.Section:
    """Show the first and last reconstructions, and the last fusion weights."""
    steps = sorted((run.path / "pretrain/reconstructions").glob("step-*.png"))
    rows: list[page.PictureRow | page.Missing] = []
    for path in dict.fromkeys(steps[:1] + steps[-1:]):
        caption = f"After {int(path.stem.removeprefix('step-'))} steps"
        alt = f"input, masked and reconstructed images, {caption.lower()}"
        name = f"pretrain/reconstructions/{path.name}"
        rows.append(run.picture(name, read_image, "reconstructions", alt=alt, caption=caption))
    none = run.missing("pretrain/reconstructions/step-*.png", "reconstructions")
    blocks = sections.gallery(rows or [none], 900)
    if weights := max((run.path / "pretrain/fusion").glob("step-*.png"), default=None):
        alt, caption = "learned weight of each encoder map in each decoder block", "Fusion weights at the end"
        row = run.picture(f"pretrain/fusion/{weights.name}", read_image, "fusion weights", alt=alt, caption=caption)
        blocks += sections.gallery([row], 420)
    text = (
        "From left to right: a held-out image, the patches that the encoder saw, the prediction of the decoder, and "
        "both together. The model predicts normalised patches. Each patch is shown with the true mean and contrast of "
        "its pixels. The fusion weights show how every decoder block mixes the encoder's maps."
    )
    return page.Section("Reconstructions", text, blocks)


def pretraining_section(run: RunFolder) -> page.Section:
    """Plot loss, learning rate and validation of pretraining."""
    log = run.read(PRETRAIN_LOG, lambda path: read_log(path, "step"), LoggedNumbers())
    plots = {
        "Reconstruction loss": ("loss", {"loss": "loss"}),
        "Learning rate": ("learning rate", {"lr": "learning rate"}),
    }
    if log.values("val_loss"):
        plots["Held-out loss"] = "loss", {"val_loss": "held-out loss"}
    if log.values("knn_accuracy"):
        plots["Nearest neighbours"] = "accuracy", {"knn_accuracy": "nearest neighbours"}
    text = (
        "The loss is the mean squared error of hidden patches. Each patch is normalised to mean 0 and variance 1. The "
        "held-out loss is measured on other photographs and other handwriting. Nearest neighbours is the share of "
        "grayscale crops whose photograph is found by the encoder's features. The encoder is random at step 0."
    )
    if rates := log.values("images_per_second"):
        text += f" The median speed was {np.median(rates):.0f} images per second."
    return replace(sections.training_section(run, log, PRETRAIN_LOG, "step", plots, text), title="Pretraining")


def detector_section(run: RunFolder) -> page.Section:
    """Plot the losses of the detector's training."""
    log = run.read(DETECT_LOG, read_metrics, LoggedNumbers())
    text = "The total loss of Mask R-CNN is the sum of the losses of proposals, classes, boxes and masks."
    shown = sections.training_section(run, log, DETECT_LOG, "iteration", loss_plots(log), text)
    return replace(shown, title="Detector training")


def stage_section(run: RunFolder, record: Stages) -> page.Section:
    """Show the time, peak memory and command of every stage."""
    if not record.stages:
        return page.Section("Stages", "", [run.missing(STAGES, "record of the stages")])
    rows = []
    for stage in record.stages:
        row = [stage.name, "this page" if stage.name == "report" else stage.status, "-"]
        if stage.status == "done":
            row[1:] = [page.format_seconds(stage.seconds), page.format_bytes(stage.peak_memory_bytes)]
        rows.append(row)
    caption = (
        "The time includes the start of the program. Peak memory is the highest sum of the resident memory of a "
        "stage's processes, sampled four times a second. Shared memory counts once for each process."
    )
    table = page.Table(["stage", "time", "peak memory"], rows, caption, ["all", *record.totals])
    commands = page.Commands([(stage.title, page.folded(stage.command)) for stage in record.stages])
    return page.Section("Stages", "Each stage is one command. Run the commands in this order.", [table, commands])


def facts(results: DetectionResults | None, record: Stages) -> list[page.Fact]:
    """List the headline numbers that are available."""
    found = ap_facts(results, "AP50", ("AP", "AP75")) if results else []
    if record.stages:
        seconds, memory = record.totals
        found.append(page.Fact("Time", seconds, "all stages, one after the other"))
        found.append(page.Fact("Peak memory", memory, "of the largest stage"))
    return found


def environment() -> list[tuple[str, str]]:
    """List facts about machine and versions as (name, value) pairs."""
    cpuinfo = Path("/proc/cpuinfo")
    model = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text() if cpuinfo.exists() else "", re.MULTILINE)
    libraries = versions() | {"detectron2": detectron2.__version__}
    return [
        ("Processor", model[1] if model else platform.processor() or platform.machine()),
        ("Cores", f"{len(os.sched_getaffinity(0))} usable of {os.cpu_count()}"),
        ("Memory", page.format_bytes(psutil.virtual_memory().total)),
        ("GPU", torch.cuda.get_device_name() if torch.cuda.is_available() else "none"),
        ("System", f"{platform.system()} {platform.release()}"),
        ("Packages", ", ".join(f"{name} {version}" for name, version in libraries.items())),
    ]


def build_report(run: RunFolder, results: DetectionResults | None) -> page.Report:
    """Build the demo's page from the files in the demo's folder."""
    record = run.read(STAGES, Stages.read, Stages())
    training = (reconstruction_section(run), pretraining_section(run), detector_section(run))
    shown = [prediction_section(run), result_section(run, results), *training, stage_section(run, record)]
    return page.Report("CrossMAE demo: digits in photos", LEAD, facts(results, record), shown, environment())


def summary(results: DetectionResults) -> str:
    """Format the COCO table for a terminal."""
    numbers = {
        task: {key: math.nan if value is None else value for key, value in found.items()}
        for task, found in results.numbers.items()
    }
    return f"COCO average precision on held-out images, in percent\n\n{format_results(numbers)}\n"


def main(argv: Sequence[str] | None = None) -> None:
    """Write the page and the summary."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="the demo's folder, such as outputs/demo")
    run = RunFolder(parser.parse_args(argv).folder)
    if not run.path.is_dir():
        raise UserError(f"{run.path}: no such folder. Run the demo first: python tools/demo/run.py")
    results = run.read(RESULTS, DetectionResults.read, None)
    target = run.path / "report.html"
    text = summary(results) if results else f"{run.path / RESULTS}: {run.faults[RESULTS]}\n"
    build_report(run, results).write(target)
    write_text(run.path / "summary.txt", text)
    print(f"wrote {target}, {target.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    run_cli(main)
