"""Put the demo's results on one page, FOLDER/report.html, and its COCO table into FOLDER/summary.txt.

    python tools/demo_report.py outputs/demo

It may be run at any time: what is not there yet is named on the page.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from crossmae.data.images import read_image
from crossmae.errors import UserError, run_cli
from crossmae.files import read_json, read_json_lines, write_text
from crossmae.reports import page as page
from crossmae.reports.page import Block, Fact, Missing, Report, Section, counted, curve, folded
from det.data.coco import read_coco
from det.evaluation.evaluate import format_results
from det.evaluation.pictures import SCORE_THRESHOLD, Comparison, compare_images
from det.evaluation.report import AP_TEXT, ap_facts, class_tables, headline_table, loss_curves
from det.evaluation.run_files import read_metrics, read_results

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


def result_section(folder: Path) -> Section:
    """Average precision, all together and by class."""
    path = folder / "detect/results.json"
    blocks: list[Block] = [Missing(path, "average precision")]
    if path.exists():
        results = read_results(path)
        blocks = [headline_table(results), *class_tables(results, path)]
    return Section("Average precision", AP_TEXT, blocks)


def prediction_section(folder: Path) -> Section:
    """The detector's instances drawn over held-out images, beside the true ones."""
    annotations, images = folder / "data/annotations/val.json", folder / "data/val"
    predictions = folder / "detect/inference/coco_instances_results.json"
    text = (
        f"The first {PICTURES} held-out images by id, not a selection. Detections with a score of at least "
        f"{SCORE_THRESHOLD} are drawn, each with its class and score; a class has the same colour on both "
        "sides."
    )
    absent = [
        Missing(path, "pictures of detections") for path in (annotations, images, predictions) if not path.exists()
    ]
    blocks: Sequence[Block] = absent or [page.Gallery(prediction_rows(annotations, images, predictions))]
    return Section("Held-out images", text, blocks)


def prediction_rows(annotations: Path, images: Path, predictions: Path) -> list[page.PictureRow]:
    """Ground truth and prediction of the first images by id.

    Raises:
        UserError: one of the JSON files is not in COCO's format, or an image can not be read; names it.
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
    """One image twice: with its true instances, and with the predicted ones."""
    pictures = []
    for label, drawn, classes in (
        ("ground truth", pair.truth, pair.true_classes),
        ("prediction", pair.prediction, pair.found_classes),
    ):
        alt = f"image {number}, {label}: {', '.join(classes) or 'nothing'}"
        pictures.append(page.embed_image(drawn, alt=alt, label=label, density=2))
    digits, detections = counted(len(pair.true_classes), "digit"), counted(len(pair.found_classes), "detection")
    return page.PictureRow(pictures, f"Image {number}: {digits}, {detections}")


def reconstruction_section(folder: Path) -> Section:
    """The first and the last picture of reconstructions that pretraining wrote, and its fusion weights."""
    where = folder / "pretrain/reconstructions"
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
        return Section("Reconstructions", text, [Missing(where / "step-*.png", "reconstructions")])
    rows = []
    for step in dict.fromkeys((min(steps), max(steps))):
        alt = f"input, masked and reconstructed images after {step} steps"
        rows.append(page.PictureRow([page.embed_image(read_image(steps[step]), alt=alt)], f"After {step} steps"))
    fusion = max((folder / "pretrain/fusion").glob("step-*.png"), default=None)
    blocks: list[Block] = [page.Gallery(rows, min_width=900)]
    if fusion is not None:
        picture = page.embed_image(read_image(fusion), alt="learned weight of each encoder map in each decoder block")
        blocks.append(page.Gallery([page.PictureRow([picture], "Fusion weights at the end")]))
    return Section("Reconstructions", text, blocks)


def pretraining_section(folder: Path) -> Section:
    """Loss and learning rate of the pretraining."""
    path = folder / "pretrain/log.jsonl"
    if not path.exists():
        return Section("Pretraining", "", [Missing(path, "curves of the pretraining")])
    rows = read_json_lines(path)
    blocks: list[Block] = [
        curve(rows, path, "step", {"loss": "loss"}, "Reconstruction loss", "loss"),
        curve(rows, path, "step", {"lr": "learning rate"}, "Learning rate", "learning rate"),
    ]
    for key, title, label in (
        ("val_loss", "Held-out loss", "loss"),
        ("knn_accuracy", "Nearest neighbours", "accuracy"),
    ):
        if any(key in row for row in rows):
            blocks.append(curve(rows, path, "step", {key: title.lower()}, title, label))
    rates = [row["images_per_second"] for row in rows if "images_per_second" in row]
    speed = f" It went through {np.median(rates):.0f} images per second (median)." if rates else ""
    text = (
        "Mean squared error of hidden patches, each with its pixels normalised to mean 0 and variance 1. The held-out "
        "loss is of photographs and handwriting that training does not see. Nearest neighbours: how many grey crops "
        "of photographs are told apart by the encoder's features alone; at step 0 the encoder is random."
    )
    return Section("Pretraining", text + speed, blocks)


def detector_section(folder: Path) -> Section:
    """Losses of the detector's training."""
    path = folder / "detect/metrics.json"
    if not path.exists():
        return Section("Detector training", "", [Missing(path, "curves of the detector's training")])
    text = "Mask R-CNN: the total loss is the sum of those of proposals, classes, boxes and masks."
    return Section("Detector training", text, loss_curves(read_metrics(path), path))


def stage_section(stages: Sequence[Mapping[str, Any]], path: Path) -> Section:
    """Time, peak memory and command of every stage."""
    if not stages:
        return Section("Stages", "", [Missing(path, "record of the stages")])
    rows = []
    for stage in stages:
        done = stage["status"] == "done"
        unfinished = "this page" if stage["name"] == "report" else stage["status"]
        time = page.format_seconds(stage["seconds"]) if done else unfinished
        memory = page.format_bytes(stage["peak_memory_bytes"]) if done else "-"
        rows.append([stage["name"], time, memory])
    total = ["all", page.format_seconds(_seconds(stages)), page.format_bytes(_peak(stages))]
    caption = (
        "Time on the clock, start of the program included. Peak memory: the highest sum of resident memory "
        "of a stage's processes, sampled four times a second; memory that processes share counts once for "
        "each of them."
    )
    table = page.Table(["stage", "time", "peak memory"], rows, caption, total)
    commands = page.Commands([(stage["title"], folded(stage["command"])) for stage in stages])
    return Section("Stages", "Each stage is a command of its own; run them in this order.", [table, commands])


# --- The page ---------------------------------------------------------------------------------------------


def read_stages(path: Path) -> list[dict[str, Any]]:
    """The stages that tools/demo.py recorded; none if it was not used.

    Raises:
        UserError: the file is not what tools/demo.py writes.
    """
    if not path.exists():
        return []
    content = read_json(path)
    needed = {"name", "title", "command", "status", "seconds", "peak_memory_bytes"}
    stages = content.get("stages") if isinstance(content, dict) else None
    if not isinstance(stages, list) or not all(isinstance(stage, dict) and needed <= stage.keys() for stage in stages):
        raise UserError(f"{path}: expected `stages`, each with {', '.join(sorted(needed))}")
    return stages


def _seconds(stages: Sequence[Mapping[str, Any]]) -> float:
    return sum(stage["seconds"] for stage in stages if stage["status"] == "done")


def _peak(stages: Sequence[Mapping[str, Any]]) -> int:
    return max((stage["peak_memory_bytes"] for stage in stages if stage["status"] == "done"), default=0)


def facts(folder: Path, stages: Sequence[Mapping[str, Any]]) -> list[Fact]:
    """The headline numbers that there are."""
    found: list[Fact] = []
    path = folder / "detect/results.json"
    if path.exists():
        found += ap_facts(read_results(path), "AP50", ("AP", "AP75"))
    if stages:
        done = sum(stage["status"] == "done" for stage in stages)
        found.append(
            Fact("Time", page.format_seconds(_seconds(stages)), f"{counted(done, 'stage')}, one after the other")
        )
        found.append(Fact("Peak memory", page.format_bytes(_peak(stages)), "of the largest stage"))
    return found


def environment() -> list[tuple[str, str]]:
    """Machine and versions, as (name, value)."""
    distributions = importlib.metadata.packages_distributions()
    versions = []
    for package in ("crossmae", "torch", "torchvision", "timm", "detectron2", "numpy"):
        if package in distributions:
            versions.append(f"{package} {importlib.metadata.version(distributions[package][0])}")
    memory = page.format_bytes(psutil.virtual_memory().total)
    return [
        ("Processor", _processor()),
        ("Cores", f"{len(os.sched_getaffinity(0))} usable of {os.cpu_count()}"),
        ("Memory", memory),
        ("GPU", _gpu()),
        ("System", f"{platform.system()} {platform.release()}, Python {platform.python_version()}"),
        ("Packages", ", ".join(versions)),
    ]


def _processor() -> str:
    try:
        match = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        match = None
    return match[1] if match else platform.processor() or platform.machine()


def _gpu() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "none"


def build_report(folder: Path) -> Report:
    """The demo's page from what is in its folder.

    Raises:
        UserError: a file is there, but is not what its stage writes; names it.
    """
    stages = read_stages(folder / "stages.json")
    parts: list[Callable[[Path], Section]] = [
        prediction_section,
        result_section,
        reconstruction_section,
        pretraining_section,
        detector_section,
    ]
    sections = [part(folder) for part in parts]
    sections.append(stage_section(stages, folder / "stages.json"))
    return Report("CrossMAE demo: digits in photos", LEAD, facts(folder, stages), sections, environment())


def summary(results: Path) -> str:
    """The COCO table for a terminal."""
    numbers = read_results(results).numbers
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
