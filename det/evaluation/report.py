"""`report.html` of a detector's run, from the files in its folder.

The page names each missing or damaged file in the place of its content. It can be written after every evaluation, and
for a run that was interrupted.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.config import get_cfg

from crossmae.checkpoints.reading.files import find_file
from crossmae.data.images import read_image
from crossmae.errors import UserError, counted
from crossmae.models.class_names import list_names
from crossmae.reports import page, sections
from crossmae.reports.figures import MOST_CURVES, PlotKeys, curve_plots
from crossmae.reports.run_folder import REPORT, LoggedNumbers, RunFolder
from crossmae.training.config import read_yaml
from crossmae.training.log import LOG as TRAINING_LOG
from det.backbone.weights import find_detector
from det.config import (
    BEST,
    BEST_RECORD,
    CONFIG,
    FINAL,
    PICTURES,
    RECORD,
    RESULTS,
    add_crossmae_config,
    flatten,
)
from det.data.coco import OWN_TRAIN, OWN_VAL
from det.evaluation.pictures import find_pictures
from det.evaluation.run_files import (
    AP_TEXT,
    HEADLINE,
    TASKS,
    BestEvaluation,
    DetectionResults,
    RunRecord,
    describe_left_out,
    read_training_log,
)

LOSSES = {
    "loss_mask": "mask",
    "loss_box_reg": "box",
    "loss_cls": "class",
    "loss_rpn_cls": "proposal: object or not",
    "loss_rpn_loc": "proposal: box",
}
MEANING = {
    "APs": "objects under 32 x 32 pixels",
    "APm": "objects in between",
    "APl": "objects over 96 x 96 pixels",
    "APr": "rare classes",
    "APc": "common classes",
    "APf": "frequent classes",
    "ARs": "recall, objects under 32 x 32 pixels",
    "ARm": "recall, objects in between",
    "ARl": "recall, objects over 96 x 96 pixels",
}


def loss_plots(log: LoggedNumbers) -> PlotKeys:
    """Choose the plots of a detector's total loss and its parts."""
    names = {key for row in log.rows for key in row if key.startswith("loss_")}
    known = [key for key in LOSSES if key in names]
    parts = [(key, LOSSES.get(key, key.removeprefix("loss_"))) for key in (*known, *sorted(names - LOSSES.keys()))]
    plots = {"Total loss": ("loss", {"loss": "total loss"})}
    for first in range(0, len(parts), MOST_CURVES):
        title = "Its parts" if first == 0 else f"Its parts from {first + 1}"
        plots[title] = "loss", dict(parts[first : first + MOST_CURVES])
    return plots


def _shown(value: float | None, unit: str = "") -> str:
    return page.percent(value and value / 100, unit=unit)


def _bar(value: float | None) -> page.Bar:
    return page.bar(value and value / 100, unit="")


def ap_facts(results: DetectionResults, key: str, others: Sequence[str]) -> list[page.Fact]:
    """Show one metric as a headline number, with other metrics as remarks."""
    found = []
    for task, numbers in reversed(results.numbers.items()):
        note = ", ".join(f"{other} {_shown(numbers[other])}" for other in others)
        found.append(page.Fact(f"{TASKS[task].capitalize()} {key}", _shown(numbers[key], " %"), note))
    return found


def headline_table(results: DetectionResults) -> page.Table:
    """Show AP, AP50 and AP75 of boxes and masks."""
    rows: list[page.TableRow] = [
        [TASKS[task], *(_bar(found[key]) for key in HEADLINE)] for task, found in results.numbers.items()
    ]
    return page.Table(["", *HEADLINE], rows, "Average precision in percent. A full bar is 100.")


def class_blocks(results: DetectionResults, source: Path) -> list[page.PageBlock]:
    """Rank all classes, or the best and worst of many classes."""
    if not results.classes:
        return [page.Missing(source, "AP by class", "the file has none")]
    *others, decisive = results.numbers
    rows: list[tuple[float | None, page.TableRow]] = [
        (one.ap(decisive), [one.name, f"{one.objects:,}", *(_bar(one.ap(task)) for task in (*others, decisive))])
        for one in results.classes
    ]
    which = ("AP of all classes", f"Highest {TASKS[decisive]} AP", f"Lowest {TASKS[decisive]} AP")
    captions = [f"{words}, in percent. A full bar is 100." for words in which]
    columns = ["class", "objects", *(f"{TASKS[task]} AP" for task in (*others, decisive))]
    return sections.class_tables(rows, columns, captions, source.name, worst_first=False)


def _evaluation_sections(
    run: RunFolder, results: DetectionResults | None, log: LoggedNumbers
) -> Sequence[page.Section]:
    if results is None:
        headlines: list[page.PageBlock] = [run.missing(RESULTS, "average precision")]
        classes: list[page.PageBlock] = [run.missing(RESULTS, "AP by class")]
    else:
        headlines, classes = [headline_table(results), _metric_table(results)], class_blocks(results, Path(RESULTS))
        if results.false_alarms:
            headlines.insert(0, _false_alarm_table(results))
    objects = "Objects: the number of objects of a class in the validation images, without crowd regions."
    if results is not None and results.left_out:
        listed = list_names(results.left_out)
        objects += f" The data do not list these classes of the detector, so they are not scored: {listed}."
    found = [
        page.Section("Average precision", f"On the validation images, by the last evaluation. {AP_TEXT}", headlines),
        _progress_section(run, log),
        _picture_section(run),
        page.Section("Classes", objects, classes),
        _recall_section(run, TASKS if results is None else results.numbers),
    ]
    text = "Nothing is evaluated yet, or there is no validation data (--val-json)."
    return sections.collapse(found, "Evaluation", text)


def _metric_table(results: DetectionResults) -> page.Table:
    """Show every metric except AP, AP50, AP75 and the classes."""
    found = list(results.numbers.values())
    rows = []
    for name in found[0]:
        if name not in HEADLINE and not name.startswith("AP-"):
            recall = re.fullmatch(r"AR(\d+)", name)
            meaning = f"recall of the best {recall[1]} in an image" if recall else MEANING.get(name, "")
            rows.append([f"{name}: {meaning}".removesuffix(": "), *(_shown(numbers.get(name)) for numbers in found)])
    caption = "In percent. A dash: the validation images have no such objects."
    return page.Table(["", *(TASKS[task] for task in results.numbers)], rows, caption)


def _false_alarm_table(results: DetectionResults) -> page.Table:
    """Show how many detections there are where nothing is annotated."""
    rows = [[f"{row.score:g}", f"{row.detections:,}", f"{row.images:,}"] for row in results.false_alarms]
    caption = "The validation images have no annotations: AP is undefined, and every detection is a false alarm."
    return page.Table(["score from", "detections", "images with detections"], rows, caption)


def _progress_section(run: RunFolder, log: LoggedNumbers) -> page.Section:
    found = [task for task in TASKS if log.values(f"{task}/AP")]
    plots = {
        f"{key} over the training": (f"{key} in %", {f"{task}/{key}": f"{TASKS[task]} {key}" for task in found})
        for key in ("AP", "AP50")
    }
    why = "no evaluation is logged in it"
    absent = [run.missing(TRAINING_LOG, "average precision over the training", why)]
    blocks = curve_plots(log.rows, Path(TRAINING_LOG), "step", plots) if found else absent
    return page.Section("Over the training", "The results of each evaluation during the training.", blocks)


def _recall_section(run: RunFolder, tasks: Mapping[str, Any]) -> page.Section:
    text = (
        "From the surest prediction to the least sure, recall grows and precision falls. The bold curve is the mean "
        "over all classes. The thin curves are single classes, if there are few."
    )
    blocks: list[page.PageBlock] = []
    for task in tasks:
        name, what = f"inference/pr_curves_{task}.png", f"precision over recall of {TASKS[task]} predictions"
        blocks += sections.gallery([run.picture(name, read_image, what, density=1.3, lossless=True)], 900)
    return page.Section("Precision and recall", text, blocks)


def _picture_section(run: RunFolder) -> page.Section:
    text = (
        "True objects on the left, predicted objects with their scores on the right. A class has the same colour on "
        "both sides. A label that would hide a small object is left out. The images are spread evenly over the "
        "validation set, not selected."
    )
    rows = []
    for path in find_pictures(run.path / PICTURES):
        alt = f"image {path.stem.partition('-')[2]}: true objects on the left, predicted objects on the right"
        rows.append(run.picture(f"{PICTURES}/{path.name}", read_image, "validation picture", alt=alt, density=2))
    none = run.missing(f"{PICTURES}/*.png", "validation pictures", "there are none")
    return page.Section("Validation pictures", text, sections.gallery(rows or [none], 460))


def _command_section(folder: Path, data: Mapping[str, Mapping[str, Any]], unfinished: bool) -> page.Section:
    train_net = ["train_net.py", "--config-file", str(folder / CONFIG)]
    try:
        weights = find_file(find_detector(folder))
    except UserError:
        absent = page.Missing(Path(FINAL), "commands to use the detector", "there are no weights")
        return page.Section("Using the detector", "", [absent])
    train, val = _own_data(data, "train", OWN_TRAIN), _own_data(data, "val", OWN_VAL)
    evaluated = [f"MODEL.WEIGHTS={weights}", f"OUTPUT_DIR={folder / 'evaluation'}"]
    words = {
        "Find objects in images, folders and videos": ["predict.py", "--weights", str(weights), "IMAGES", "--force"],
        "Evaluate": [*train_net, "--eval-only", *val, *evaluated],
    }
    if unfinished:
        resumed = [*train_net, "--resume", *train, *val, f"OUTPUT_DIR={folder}"]
        words["Continue the training (add --num-gpus as before)"] = resumed
    return page.Section("Using the detector", f"{weights.name} has the weights.", [sections.commands(words)])


def _own_data(data: Mapping[str, Mapping[str, Any]], split: str, name: str) -> list[str]:
    """Make the command-line flags for a data set with two paths."""
    if name not in data:
        return []
    return [f"--{split}-json", str(data[name].get("json")), f"--{split}-images", str(data[name].get("images"))]


def changed_from_defaults(content: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """List key, value and default of changed settings.

    Internal names of own data are left out.
    """
    cfg = get_cfg()
    add_crossmae_config(cfg)
    defaults = json.loads(json.dumps(dict(flatten(cfg))))  # tuples become lists
    found = sections.changed_settings(content, defaults)
    return [row for row in found if row[1] not in ([OWN_TRAIN], [OWN_VAL])]  # the section "Data" has the files


def _data_section(run: RunFolder, record: RunRecord) -> page.Section:
    rows, own = [], {OWN_TRAIN: "training", OWN_VAL: "validation"}
    for name, paths in record.data.items():
        ends = [sections.path_end(paths.get(key, "-")) for key in ("json", "images")]
        rows.append([own.get(name, name), *ends, str(record.settings.get(f"SHA-256 of the json of {name}", "-"))[:16]])
    if not rows:
        return page.Section("Data", "", [run.missing(RECORD, "record of the data", "the file has none")])
    caption = f"Ends of the paths, and first characters of the annotations' SHA-256. Both are complete in {RECORD}."
    return page.Section("Data", "", [page.Table(["data set", "annotations", "images", "SHA-256"], rows, caption)])


def write_report(folder: Path) -> Path:
    """Write the report.html of a run, and return its path."""
    return build_report(folder).write(folder / REPORT)


def build_report(folder: Path) -> page.Report:
    """Build the page of a run, which may be incomplete."""
    run = RunFolder(folder)
    record = run.read(RECORD, RunRecord.read, RunRecord())
    settings: dict[str, Any] = run.read(CONFIG, read_yaml, {})
    log = run.read(TRAINING_LOG, read_training_log, LoggedNumbers())
    results = run.read(RESULTS, DetectionResults.read, None)
    best = run.read(BEST_RECORD, BestEvaluation.read, None)
    unfinished = bool(log.rows) and not run.has(FINAL)
    done, total = int(log.rows[-1]["step"]) if log.rows else 0, record.iterations
    progress = f"{done:,} of {total:,} iterations" if total > done else counted(done, "iteration")
    changed = changed_from_defaults(settings)
    plots = {
        **loss_plots(log),
        "Learning rate": ("learning rate", {"lr": "learning rate"}),
        "Speed": ("images per second", {"images_per_second": "images"}),
        "Waiting for data": ("share of the time", {"data_wait_share": "waiting for data"}),
    }
    text = "The total loss is the sum of the losses of proposals, classes, boxes and masks."
    return page.Report(
        f"Detector: {folder.resolve().name}",
        sections.lead(f"{_detector(settings)}. ", progress if unfinished else ""),
        _accuracy_facts(results, best) + _training_facts(record, log, progress),
        [
            *_evaluation_sections(run, results, log),
            sections.training_section(run, log, TRAINING_LOG, "step", plots, text),
            _command_section(folder, record.data, unfinished),
            sections.settings_section(run, CONFIG, not settings, changed, "detectron2 and of this toolkit"),
            _data_section(run, record),
        ],
        [(name, str(version)) for name, version in record.versions.items()],
    )


def _detector(settings: Mapping[str, Any]) -> str:
    try:
        model, vit = settings["MODEL"], settings["MODEL"]["VIT"]
        stages = "Cascade " if model["ROI_HEADS"]["NAME"] == "CascadeROIHeads" else ""
        size = f"{vit['DEPTH']} blocks, width {vit['EMBED_DIM']}, patches of {vit['PATCH_SIZE']} pixels"
        return f"{stages}{'Mask' if model['MASK_ON'] else 'Faster'} R-CNN with a plain ViT as its backbone: {size}"
    except (KeyError, TypeError):  # the config is missing or has unknown keys
        return "A detector"


def _accuracy_facts(results: DetectionResults | None, best: BestEvaluation | None) -> list[page.Fact]:
    found = [] if results is None else ap_facts(results, "AP", ("AP50", "AP75"))
    if best is not None:
        note = f"after {counted(best.iteration, 'iteration')}: {BEST}"
        scores = {"box": best.bbox, "mask": best.segm}
        found += [page.Fact(f"Best {task} AP", _shown(ap, " %"), note) for task, ap in scores.items() if ap is not None]
    return found


def _training_facts(record: RunRecord, log: LoggedNumbers, progress: str) -> list[page.Fact]:
    found = []
    if images := record.training_images:
        used, listed = images
        number = f"{used:,}" if used == listed else f"{used:,} of {listed:,}"
        notes = (describe_left_out(listed - used), counted(len(record.classes), "class") if record.classes else "")
        found.append(page.Fact("Training images", number, ", ".join(filter(None, notes))))
    speeds, per_step = log.values("images_per_second"), record.settings.get("SOLVER.IMS_PER_BATCH")
    if speeds and isinstance(per_step, int):
        seconds = sum(steps * per_step / speed for steps, speed in log.spans("step", "images_per_second"))
        note = f"{progress}, {np.median(speeds):.3g} images per second (median), without evaluations"
        found.append(page.Fact("Training time", page.format_seconds(seconds), note))
    if memory := log.values("memory_gb"):
        found.append(page.Fact("Peak memory", f"{max(memory):.1f} GB", "of one process"))
    return found
