"""Put the demo's results on one page, FOLDER/report.html, and its COCO table into FOLDER/summary.txt.

    python tools/demo_report.py outputs/demo

It may be run at any time: what is not there yet is named on the page.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import math
import os
import platform
import re
import shlex
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from crossmae import report as page
from crossmae.errors import UserError, run_cli
from crossmae.files import write_text
from crossmae.images import read_image
from crossmae.report import Bar, Block, Fact, Missing, Report, Section, Series, read_json, read_json_lines

PICTURES = 12
SCORE_THRESHOLD = 0.5
SIDE = 480  # pixels of a drawn picture, shown at about half of it: crisp on dense screens
TASKS = {"bbox": "box", "segm": "mask"}
METRICS = ("AP", "AP50", "AP75")
DETECTOR_LOSSES = {
    "loss_mask": "mask",
    "loss_box_reg": "box",
    "loss_cls": "class",
    "loss_rpn_cls": "proposal: object or not",
    "loss_rpn_loc": "proposal: box",
}
LEAD = (
    "A masked autoencoder, CrossMAE, learned from images without labels by reconstructing patches that were "
    "hidden from it; its encoder then became the backbone of a Mask R-CNN that finds and outlines "
    "handwritten digits in photographs. Digits and photographs are real, the held-out images share none of "
    "either with the training images, and every number here was measured on the machine described at the "
    "end, by the commands shown."
)


# --- Average precision ------------------------------------------------------------------------------------


def read_results(path: Path) -> dict[str, dict[str, float]]:
    """COCO results: {"bbox": {"AP": 31.2, ..., "AP-<class>": ...}, "segm": {...}}, in percent; null is NaN.

    Raises:
        UserError: not such a file; names it.
    """
    content = read_json(path)
    results = {}
    for task in TASKS:
        values = content.get(task) if isinstance(content, dict) else None
        if not isinstance(values, dict) or not set(METRICS) <= values.keys():
            raise UserError(f"{path}: expected {task!r} with {', '.join(METRICS)}, as tools/train_net.py writes it")
        wrong = {key: value for key, value in values.items() if not isinstance(value, (int, float, type(None)))}
        if wrong:
            raise UserError(f"{path}: {task}: expected numbers, received {wrong}")
        results[task] = {key: math.nan if value is None else float(value) for key, value in values.items()}
    return results


def class_names(results: Mapping[str, Mapping[str, float]]) -> list[str]:
    """The classes that have an AP of their own."""
    return [name.removeprefix("AP-") for name in results["bbox"] if name.startswith("AP-")]


def percent(value: float) -> str:
    """An AP with one decimal; a class without objects has none."""
    return "-" if math.isnan(value) else f"{value:.1f}"


# --- Sections ---------------------------------------------------------------------------------------------


def result_section(folder: Path) -> Section:
    """Average precision, all together and by class."""
    path = folder / "detect/results.json"
    blocks: list[Block] = [Missing(path, "average precision")]
    if path.exists():
        results = read_results(path)
        rows = [_ap_row(TASKS[task], [results[task][metric] for metric in METRICS]) for task in TASKS]
        blocks = [
            page.Table(["", *METRICS], rows, "Average precision in percent, by the COCO evaluation (pycocotools).")
        ]
        names = class_names(results)
        if names:
            by_class = [_ap_row(name, [results[task].get(f"AP-{name}", math.nan) for task in TASKS]) for name in names]
            caption = "AP in percent by class; a full bar is 100."
            blocks.append(page.Table(["class", *(f"{name} AP" for name in TASKS.values())], by_class, caption))
    text = (
        "AP50 counts a detection as right when its overlap with the true object (IoU) is at least 0.5; AP "
        "is the mean over ten such thresholds from 0.5 to 0.95."
    )
    return Section("Average precision", text, blocks)


def _ap_row(name: str, values: Sequence[float]) -> list[str | Bar]:
    return [name, *(Bar(percent(v), 0.0 if math.isnan(v) else min(max(v / 100, 0.0), 1.0)) for v in values)]


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
    truth = read_json(annotations)
    if not isinstance(truth, dict) or any(
        not isinstance(truth.get(k), list) for k in ("images", "annotations", "categories")
    ):
        raise UserError(f"{annotations}: expected a COCO file with lists `images`, `annotations` and `categories`")
    found = read_json(predictions)
    if not isinstance(found, list):
        raise UserError(f"{predictions}: expected a list of detections, as detectron2 writes it")
    try:
        categories = {category["id"]: str(category["name"]) for category in truth["categories"]}
        true_of = _by_image(truth["annotations"])
        sure_of = _by_image([entry for entry in found if entry["score"] >= SCORE_THRESHOLD])
        chosen = sorted(truth["images"], key=lambda image: image["id"])[:PICTURES]
        return [_picture_row(image, images, true_of[image["id"]], sure_of[image["id"]], categories) for image in chosen]
    except UserError:
        raise
    except KeyError as error:
        raise UserError(f"{annotations} or {predictions}: an entry has no {error}") from None
    except (TypeError, ValueError) as error:
        raise UserError(f"{annotations} or {predictions}: {error}") from None


def _by_image(entries: Sequence[Mapping[str, Any]]) -> defaultdict[int, list[Mapping[str, Any]]]:
    grouped = defaultdict(list)
    for entry in entries:
        grouped[entry["image_id"]].append(entry)
    return grouped


def _picture_row(
    image: Mapping[str, Any],
    folder: Path,
    true: Sequence[Mapping[str, Any]],
    found: Sequence[Mapping[str, Any]],
    categories: Mapping[int, str],
) -> page.PictureRow:
    """One image twice: with its true instances, and with the predicted ones."""
    from det.draw import draw_instances, instances_from_coco  # seconds, as it brings detectron2

    pixels = np.asarray(read_image(folder / image["file_name"]))
    pictures = []
    for label, entries in (("ground truth", true), ("prediction", found)):
        instances = instances_from_coco(entries, categories, *pixels.shape[:2])
        drawn = draw_instances(pixels, instances, longest_side=SIDE)
        alt = f"image {image['id']}, {label}: " + (", ".join(instance.name for instance in instances) or "nothing")
        pictures.append(page.embed_image(drawn, alt=alt, label=label, density=2))
    caption = f"Image {image['id']}: {_count(len(true), 'digit')}, {_count(len(found), 'detection')}"
    return page.PictureRow(pictures, caption)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


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
        _curve(rows, path, "step", {"loss": "loss"}, "Reconstruction loss", "loss"),
        _curve(rows, path, "step", {"lr": "learning rate"}, "Learning rate", "learning rate"),
    ]
    for key, title, label in (
        ("val_loss", "Held-out loss", "loss"),
        ("knn_accuracy", "Nearest neighbours", "accuracy"),
    ):
        if any(key in row for row in rows):
            blocks.append(_curve(rows, path, "step", {key: title.lower()}, title, label))
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
    rows = read_json_lines(path)
    present = {key: label for key, label in DETECTOR_LOSSES.items() if any(key in row for row in rows)}
    blocks = [_curve(rows, path, "iteration", {"total_loss": "total loss"}, "Total loss", "loss")]
    if present:
        blocks.append(_curve(rows, path, "iteration", present, "Its parts", "loss"))
    text = "Mask R-CNN: the total loss is the sum of those of proposals, classes, boxes and masks."
    return Section("Detector training", text, blocks)


def _curve(
    rows: Sequence[Mapping[str, Any]], path: Path, x: str, keys: Mapping[str, str], title: str, y_label: str
) -> Block:
    """A plot of logged values over steps; says so when the log has none."""
    series = []
    for key, label in keys.items():
        points = [(row[x], row[key]) for row in rows if x in row and key in row]
        if points:
            series.append(Series(label, *zip(*points, strict=True)))
    if not series:
        return Missing(path, f"curve of the {y_label}", f"no line of it has {x!r} and {', '.join(map(repr, keys))}")
    count = len(series[0].x)
    caption = f"{y_label.capitalize()} by {x}, {_count(count, 'logged value')}."
    if count >= page.SMOOTH_FROM:
        caption += " Faint: as logged; strong: running mean over 5 % of the values."
    return page.line_plot(series, title=title, x_label=x, y_label=y_label, caption=caption)


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


def folded(command: str) -> str:
    """A long shell command over several lines, one option or `key=value` each; it can be pasted as it is."""
    if len(command) <= 100:
        return command
    lines: list[list[str]] = [[]]
    for word in shlex.split(command):
        if word.startswith("--") or "=" in word:
            lines.append([])
        lines[-1].append(word)
    return " \\\n  ".join(shlex.join(line) for line in lines)


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
    found = []
    path = folder / "detect/results.json"
    if path.exists():
        results = read_results(path)
        for task, name in reversed(TASKS.items()):
            values = results[task]
            note = f"AP {percent(values['AP'])}, AP75 {percent(values['AP75'])}"
            found.append(Fact(f"{name} AP50".capitalize().replace("ap", "AP"), f"{percent(values['AP50'])} %", note))
    if stages:
        done = sum(stage["status"] == "done" for stage in stages)
        found.append(
            Fact("Time", page.format_seconds(_seconds(stages)), f"{_count(done, 'stage')}, one after the other")
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
    import torch  # seconds; det.draw has brought it already where there are detections to draw

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
    from det.evaluate import format_results  # seconds, as it brings detectron2

    return f"COCO average precision on held-out images, in percent\n\n{format_results(read_results(results))}\n"


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
