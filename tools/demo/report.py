"""Put the demo's results on one page, FOLDER/report.html, and its COCO table into FOLDER/summary.txt.

    python tools/demo_report.py outputs/demo

It may be run at any time: what is not there yet is named on the page.
"""

from __future__ import annotations

import argparse
import math
import os
import platform
import re
from collections.abc import Sequence
from pathlib import Path

import detectron2
import numpy as np
import psutil
import torch

from crossmae.data.images import read_image
from crossmae.errors import UserError, run_cli
from crossmae.files import read_json, read_json_lines, write_text
from crossmae.reports import page
from crossmae.reports.figures import curve_plots
from crossmae.reports.run_folder import FileContent
from crossmae.training.versions import versions
from det.data.coco import read_coco
from det.evaluation.evaluate import format_results
from det.evaluation.pictures import SCORE_THRESHOLD, Comparison, compare_images
from det.evaluation.report import AP_TEXT, ap_facts, class_blocks, headline_table, loss_plots
from det.evaluation.run_files import DetectionResults, read_metrics

PICTURES = 12
SIDE = 480  # pixels of a drawn picture, shown at about half of it: crisp on dense screens
LEAD = (
    "A masked autoencoder, CrossMAE, learned from images without labels by reconstructing patches that were "
    "hidden from it; its encoder then became the backbone of a Mask R-CNN that finds and outlines "
    "handwritten digits in photographs. Digits and photographs are real, the held-out images share none of "
    "either with the training images, and every number here was measured on the machine described at the "
    "end, by the commands shown."
)


# --- Sections ---------------------------------------------------------------------------------------------


def result_section(path: Path) -> page.Section:
    """Show average precision, of all classes and by class."""
    blocks: list[page.PageBlock] = [page.Missing(path, "average precision")]
    if path.exists():
        results = DetectionResults.read(path)
        blocks = [headline_table(results), *class_blocks(results, path)]
    return page.Section("Average precision", AP_TEXT, blocks)


def prediction_section(folder: Path) -> page.Section:
    """Show the detector's instances on held-out images, next to the true ones."""
    paths = [
        folder / name
        for name in ("data/annotations/val.json", "data/val", "detect/inference/coco_instances_results.json")
    ]
    text = (
        f"The first {PICTURES} held-out images by id, not a selection. Detections with a score of at least "
        f"{SCORE_THRESHOLD} are drawn, each with its class and score; a class has the same colour on both "
        "sides."
    )
    absent = [page.Missing(path, "pictures of detections") for path in paths if not path.exists()]
    blocks: Sequence[page.PageBlock] = absent or [page.Gallery(prediction_rows(*paths))]
    return page.Section("Held-out images", text, blocks)


def prediction_rows(annotations: Path, images: Path, predictions: Path) -> list[page.PictureRow]:
    """Draw ground truth and prediction of the first images by id.

    Raises:
        UserError: one of the JSON files is not in COCO's format, or an image cannot be read; names it.
    """
    truth, found = read_coco(annotations), read_json(predictions)
    if not isinstance(found, list):
        raise UserError(f"{predictions}: expected a list of detections, as tools/train_net.py writes it")
    try:
        chosen = sorted(truth["images"], key=lambda image: image["id"])[:PICTURES]
        drawn = compare_images(truth, images, found, chosen, SCORE_THRESHOLD, SIDE)
        return [_picture_row(image["id"], pair) for image, pair in zip(chosen, drawn, strict=True)]
    except UserError:
        raise
    except KeyError as error:
        raise UserError(f"{annotations} or {predictions}: an entry has no {error}") from None
    except (TypeError, ValueError) as error:
        raise UserError(f"{annotations} or {predictions}: {error}") from None


def _picture_row(number: int, pair: Comparison) -> page.PictureRow:
    """Show an image with its true and with the predicted instances."""
    pictures = []
    for label, drawn, classes in (
        ("ground truth", pair.truth, pair.true_classes),
        ("prediction", pair.prediction, pair.found_classes),
    ):
        alt = f"image {number}, {label}: {', '.join(classes) or 'nothing'}"
        pictures.append(page.embed_image(drawn, alt=alt, label=label, density=2))
    digits = page.counted(len(pair.true_classes), "digit")
    return page.PictureRow(pictures, f"Image {number}: {digits}, {page.counted(len(pair.found_classes), 'detection')}")


def reconstruction_section(folder: Path) -> page.Section:
    """Show first and last reconstructions, and the fusion weights."""
    where = folder / "reconstructions"
    steps = {
        int(match[1]): path for path in where.glob("step-*.png") if (match := re.fullmatch(r"step-(\d+)", path.stem))
    }
    text = (
        "Held-out images, the part of them that the encoder saw, what the decoder made of the rest, and both "
        "together. Pixel normalisation is undone: each patch is scaled back by its own mean and contrast, so its "
        "structure is the model's, its brightness given. The weights are those by which every block of the decoder "
        "mixes the encoder's maps."
    )
    if not steps:
        return page.Section("Reconstructions", text, [page.Missing(where / "step-*.png", "reconstructions")])
    figures = {
        steps[step]: (f"input, masked and reconstructed images after {step} steps", f"After {step} steps")
        for step in dict.fromkeys((min(steps), max(steps)))
    }
    blocks = [page.Gallery([_figure(path, *words) for path, words in figures.items()], min_width=900)]
    if fusion := max((folder / "fusion").glob("step-*.png"), default=None):
        alt = "learned weight of each encoder map in each decoder block"
        blocks.append(page.Gallery([_figure(fusion, alt, "Fusion weights at the end")]))
    return page.Section("Reconstructions", text, blocks)


def _figure(path: Path, alt: str, caption: str) -> page.PictureRow:
    return page.PictureRow([page.embed_image(read_image(path), alt=alt)], caption)


def pretraining_section(path: Path) -> page.Section:
    """Show loss and learning rate of the pretraining."""
    if not path.exists():
        return page.Section("Pretraining", "", [page.Missing(path, "curves of the pretraining")])
    rows = read_json_lines(path)
    plots = {
        "loss": ("Reconstruction loss", "loss", "loss"),
        "lr": ("Learning rate", "learning rate", "learning rate"),
        "val_loss": ("Held-out loss", "held-out loss", "loss"),
        "knn_accuracy": ("Nearest neighbours", "nearest neighbours", "accuracy"),
    }
    shown = {
        title: (y_label, {key: label})
        for key, (title, label, y_label) in plots.items()
        if key in ("loss", "lr") or any(key in row for row in rows)
    }
    rates = [row["images_per_second"] for row in rows if "images_per_second" in row]
    speed = f" It went through {np.median(rates):.0f} images per second (median)." if rates else ""
    text = (
        "Mean squared error of hidden patches, each with its pixels normalised to mean 0 and variance 1. The held-out "
        "loss is of photographs and handwriting that training does not see. Nearest neighbours: how many grey crops "
        "of photographs are told apart by only the encoder's features; at step 0 the encoder is random."
    )
    return page.Section("Pretraining", text + speed, curve_plots(rows, path, "step", shown))


def detector_section(path: Path) -> page.Section:
    """Show the losses of the detector's training."""
    if not path.exists():
        return page.Section("Detector training", "", [page.Missing(path, "curves of the detector's training")])
    log = read_metrics(path)
    text = "Mask R-CNN: the total loss is the sum of those of proposals, classes, boxes and masks."
    return page.Section("Detector training", text, curve_plots(log.rows, path, "iteration", loss_plots(log)))


# --- The page ---------------------------------------------------------------------------------------------


class StageRecord(FileContent):
    """A stage of the demo as stages.json has it."""

    name: str
    title: str
    command: str
    status: str
    seconds: float
    peak_memory_bytes: int


class Stages(FileContent):
    """Content of stages.json."""

    stages: list[StageRecord]


def _totals(stages: Sequence[StageRecord]) -> tuple[str, str]:
    """Write time and peak memory of all finished stages."""
    done = [stage for stage in stages if stage.status == "done"]
    peak = max((stage.peak_memory_bytes for stage in done), default=0)
    return page.format_seconds(sum(stage.seconds for stage in done)), page.format_bytes(peak)


def stage_section(stages: Sequence[StageRecord], path: Path) -> page.Section:
    """Show time, peak memory and command of every stage."""
    if not stages:
        return page.Section("Stages", "", [page.Missing(path, "record of the stages")])
    rows = []
    for stage in stages:
        row = [stage.name, "this page" if stage.name == "report" else stage.status, "-"]
        if stage.status == "done":
            row[1:] = [page.format_seconds(stage.seconds), page.format_bytes(stage.peak_memory_bytes)]
        rows.append(row)
    caption = (
        "Time on the clock, start of the program included. Peak memory: the highest sum of resident memory "
        "of a stage's processes, sampled four times a second; memory that processes share counts once for "
        "each of them."
    )
    table = page.Table(["stage", "time", "peak memory"], rows, caption, ["all", *_totals(stages)])
    commands = page.Commands([(stage.title, page.folded(stage.command)) for stage in stages])
    return page.Section("Stages", "Each stage is a command of its own; run them in this order.", [table, commands])


def facts(results: Path, stages: Sequence[StageRecord]) -> list[page.Fact]:
    """List the headline numbers that there are."""
    found = ap_facts(DetectionResults.read(results), "AP50", ("AP", "AP75")) if results.exists() else []
    if stages:
        done = sum(stage.status == "done" for stage in stages)
        time, peak = _totals(stages)
        found.append(page.Fact("Time", time, f"{page.counted(done, 'stage')}, one after the other"))
        found.append(page.Fact("Peak memory", peak, "of the largest stage"))
    return found


def environment() -> list[tuple[str, str]]:
    """Describe machine and versions, as (name, value)."""
    libraries = versions() | {"detectron2": detectron2.__version__}
    try:
        processor = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        processor = None
    return [
        ("Processor", processor[1] if processor else platform.processor() or platform.machine()),
        ("Cores", f"{len(os.sched_getaffinity(0))} usable of {os.cpu_count()}"),
        ("Memory", page.format_bytes(psutil.virtual_memory().total)),
        ("GPU", torch.cuda.get_device_name() if torch.cuda.is_available() else "none"),
        ("System", f"{platform.system()} {platform.release()}, Python {libraries.pop('python')}"),
        ("Packages", ", ".join(f"{name} {version}" for name, version in libraries.items())),
    ]


def build_report(folder: Path) -> page.Report:
    """Build the demo's page from the files in its folder.

    Raises:
        UserError: a file is not what its stage writes; names it.
    """
    results, record = folder / "detect/results.json", folder / "stages.json"
    stages = Stages.read(record).stages if record.exists() else []
    sections = [
        prediction_section(folder),
        result_section(results),
        reconstruction_section(folder / "pretrain"),
        pretraining_section(folder / "pretrain/log.jsonl"),
        detector_section(folder / "detect/metrics.json"),
        stage_section(stages, record),
    ]
    return page.Report("CrossMAE demo: digits in photos", LEAD, facts(results, stages), sections, environment())


def summary(results: Path) -> str:
    """Lay out the COCO table for a terminal."""
    numbers = {
        task: {key: math.nan if value is None else value for key, value in found.items()}
        for task, found in DetectionResults.read(results).numbers.items()
    }
    return f"COCO average precision on held-out images, in percent\n\n{format_results(numbers)}\n"


def main(argv: Sequence[str] | None = None) -> None:
    """Write page and summary."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="the demo's folder, such as outputs/demo")
    args = parser.parse_args(argv)
    if not args.folder.is_dir():
        raise UserError(f"{args.folder}: no such folder; `python tools/demo.py` makes it")
    report = build_report(args.folder)
    results = args.folder / "detect/results.json"
    target = args.folder / "report.html"
    write_text(args.folder / "summary.txt", summary(results) if results.exists() else f"{results}: not there yet\n")
    report.write(target)
    print(f"wrote {target}, {target.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    run_cli(main)
