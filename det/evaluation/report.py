"""The page of a run, `report.html`: what the files in its folder tell, whether the run is complete or not.

What can not be shown for lack of a file is named in its place, so that the page can be written after every evaluation,
and for a run that was cut off.
"""

from __future__ import annotations

import json
import math
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.config import get_cfg

from crossmae.data.images import read_image
from crossmae.errors import UserError
from crossmae.reports import page as page
from crossmae.reports.page import (
    Bar,
    Block,
    Fact,
    Missing,
    Report,
    Section,
    Table,
    counted,
    curve,
    folded,
    leaves,
    short_value,
)
from det.backbone.weights import find_detector
from det.config import add_crossmae_config, leaf_keys, lookup
from det.data.coco import OWN_TRAIN, OWN_VAL
from det.evaluation.pictures import find_pictures
from det.evaluation.run_files import (
    CONFIG,
    HEADLINE,
    METRICS,
    PICTURES,
    RECORD,
    REPORT,
    RESULTS,
    TASKS,
    ClassScore,
    Metrics,
    Results,
    Run,
    read_run,
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
AP_TEXT = (
    "AP50 counts a detection as right when its overlap with the true object (IoU) is at least 0.5; AP "
    "is the mean over ten such thresholds from 0.5 to 0.95."
)
MOST_CURVES = 6  # in one plot
MOST_CLASSES = 50  # in a table


# --- Words ------------------------------------------------------------------------------------------------


def percent(value: float) -> str:
    """An AP with one decimal; a class without objects has none."""
    return "-" if math.isnan(value) else f"{value:.1f}"


# --- Blocks that the demo's page shows, too ---------------------------------------------------------------


def loss_curves(metrics: Metrics, source: Path) -> list[Block]:
    """The total loss of a detector, and its parts; those of the stages of a cascade are added up."""
    rows = [_without_stages(row) for row in metrics.rows]
    names = {key for row in rows for key in row if key.startswith("loss_")}
    known = [(key, label) for key, label in LOSSES.items() if key in names]
    parts = known + [(key, key.removeprefix("loss_")) for key in sorted(names - LOSSES.keys())]
    blocks: list[Block] = [curve(rows, source, "iteration", {"total_loss": "total loss"}, "Total loss", "loss")]
    for first in range(0, len(parts), MOST_CURVES):
        title = "Its parts" if first == 0 else f"Its parts from {first + 1}"
        blocks.append(curve(rows, source, "iteration", dict(parts[first : first + MOST_CURVES]), title, "loss"))
    return blocks


def _without_stages(row: Mapping[str, float]) -> dict[str, float]:
    merged: dict[str, float] = {}
    for key, value in row.items():
        name = re.sub(r"_stage\d+$", "", key) if key.startswith("loss_") else key
        merged[name] = merged.get(name, 0.0) + value
    return merged


def ap_facts(results: Results, key: str, others: Sequence[str]) -> list[Fact]:
    """One metric of masks and of boxes as headline numbers, with others as remarks."""
    found = []
    for task in reversed(results.tasks):
        numbers = results.numbers[task]
        note = ", ".join(f"{other} {percent(numbers[other])}" for other in others)
        found.append(Fact(f"{TASKS[task].capitalize()} {key}", f"{percent(numbers[key])} %", note))
    return found


def headline_table(results: Results) -> Table:
    """AP, AP50 and AP75 of boxes and masks."""
    rows: list[list[str | Bar]] = [
        [TASKS[task], *(_bar(results.numbers[task][key]) for key in HEADLINE)] for task in results.tasks
    ]
    return Table(["", *HEADLINE], rows, "Average precision in percent; a full bar is 100.")


def class_tables(results: Results, source: Path) -> list[Block]:
    """Every class with its objects and its AP, the highest first; of many classes, the highest and the lowest."""
    if not results.classes:
        return [Missing(source, "AP by class", "the file has none")]
    task, count = results.tasks[-1], len(results.classes)
    scored = [one for one in results.classes if not math.isnan(one.ap[task])]
    scored.sort(key=lambda one: -one.ap[task])
    if count <= MOST_CLASSES:
        ranked = scored + [one for one in results.classes if math.isnan(one.ap[task])]
        return [_class_table(ranked, results.tasks, "AP in percent by class; a full bar is 100.")]
    half = MOST_CLASSES // 2
    top, low = scored[:half], scored[half:][-half:]
    rest = f"{source.name} has the other {count - len(top) - len(low)} of {count} classes, too."
    return [
        _class_table(top, results.tasks, f"Highest {TASKS[task]} AP, in percent; a full bar is 100."),
        _class_table(low, results.tasks, f"Lowest {TASKS[task]} AP, in percent; a full bar is 100. {rest}"),
    ]


def _class_table(classes: Sequence[ClassScore], tasks: Sequence[str], caption: str) -> Table:
    rows: list[list[str | Bar]] = [
        [one.name, f"{one.objects:,}", *(_bar(one.ap[task]) for task in tasks)] for one in classes
    ]
    return Table(["class", "objects", *(f"{TASKS[task]} AP" for task in tasks)], rows, caption)


def _bar(value: float) -> Bar:
    return Bar(percent(value), 0.0 if math.isnan(value) else min(max(value / 100, 0.0), 1.0))


# --- Sections ---------------------------------------------------------------------------------------------


def _missing(run: Run, name: str, what: str, why: str = "the file does not exist") -> Missing:
    """Says that `what` can not be shown, for lack of a file or of something in it."""
    return Missing(Path(name), what, run.faults.get(name, why))


def _evaluation_sections(run: Run) -> list[Section]:
    """What evaluations found; a single section where there is nothing of it."""
    parts = [_result_section, _progress_section, _picture_section, _class_section, _recall_section]
    sections = [part(run) for part in parts]
    blocks = [block for section in sections for block in section.blocks]
    if not all(isinstance(block, Missing) for block in blocks):
        return sections
    return [Section("Evaluation", "Nothing is evaluated yet, or there is no validation data (--val-json).", blocks)]


def _result_section(run: Run) -> Section:
    blocks: list[Block] = [_missing(run, RESULTS, "average precision")]
    if run.results is not None:
        blocks = [headline_table(run.results), _metric_table(run.results)]
    return Section("Average precision", f"On the validation images, by the last evaluation. {AP_TEXT}", blocks)


def _metric_table(results: Results) -> Table:
    """Everything but AP, AP50, AP75 and the classes."""
    names = [name for name in results.numbers[results.tasks[0]] if name not in HEADLINE and not name.startswith("AP-")]
    rows = []
    for name in names:
        recall = re.fullmatch(r"AR(\d+)", name)
        meaning = f"recall of the best {recall[1]} in an image" if recall else MEANING.get(name, "")
        values = (results.numbers[task].get(name, math.nan) for task in results.tasks)
        rows.append([f"{name}: {meaning}".removesuffix(": "), *map(percent, values)])
    caption = "In percent; a dash where the validation images have no such objects."
    return Table(["", *(TASKS[task] for task in results.tasks)], rows, caption)


def _progress_section(run: Run) -> Section:
    found = [task for task in TASKS if run.metrics.values(f"{task}/AP")]
    blocks: list[Block] = [
        curve(
            run.metrics.rows, Path(METRICS), "iteration",
            {f"{task}/{key}": f"{TASKS[task]} {key}" for task in found}, f"{key} over the training", f"{key} in %",
        )
        for key in ("AP", "AP50") if found
    ]  # fmt: skip
    absent = _missing(run, METRICS, "average precision over the training", "no evaluation is logged in it")
    return Section("Over the training", "What each evaluation during the training found.", blocks or [absent])


def _class_section(run: Run) -> Section:
    blocks: list[Block] = [_missing(run, RESULTS, "AP by class")]
    if run.results is not None:
        blocks = class_tables(run.results, Path(RESULTS))
    text = "Objects: how many the validation images have of a class, crowd regions not counted."
    return Section("Classes", text, blocks)


def _recall_section(run: Run) -> Section:
    text = (
        "From the surest prediction to the least sure, recall grows and precision falls. The bold curve is the mean of "
        "all classes; where they are few, each has a curve of its own."
    )
    tasks = run.results.tasks if run.results is not None else TASKS
    names = {f"inference/pr_curves_{task}.png": f"precision over recall of {TASKS[task]} predictions" for task in tasks}
    return Section("Precision and recall", text, [_image(run, name, what) for name, what in names.items()])


def _image(run: Run, name: str, what: str) -> Block:
    """A figure of the run, or which file it would have been."""
    path = run.folder / name
    if not path.is_file():
        return _missing(run, name, what)
    try:
        picture = page.embed_image(read_image(path), alt=what, density=1.3, lossless=True)
    except UserError as error:
        return _missing(run, name, what, str(error).removeprefix(f"{path}: "))
    return page.Gallery([page.PictureRow([picture])], min_width=900)


def _picture_section(run: Run) -> Section:
    text = (
        "True objects on the left, predicted ones with their scores on the right; a class has the same colour on both "
        "sides. The images are spread evenly over the validation set, not selected."
    )
    rows: list[page.PictureRow] = []
    faults: list[Block] = []
    for path in find_pictures(run.folder / PICTURES):
        name = path.stem.partition("-")[2]
        try:
            alt = f"image {name}: true objects on the left, predicted ones on the right"
            rows.append(page.PictureRow([page.embed_image(read_image(path), alt=alt, density=2)]))
        except UserError as error:
            why = str(error).removeprefix(f"{path}: ")
            faults.append(_missing(run, f"{PICTURES}/{path.name}", "validation picture", why))
    if not rows and not faults:
        faults = [_missing(run, f"{PICTURES}/*.png", "validation pictures", "there are none")]
    return Section("Validation pictures", text, [*([page.Gallery(rows, min_width=460)] if rows else []), *faults])


def _training_section(run: Run) -> Section:
    rows, source = run.metrics.rows, Path(METRICS)
    if not rows:
        return Section("Training", "", [_missing(run, METRICS, "curves of the training", "no line of it can be read")])
    seconds = {"time": "whole iteration", "data_time": "of it, waiting for data"}
    blocks = [
        *loss_curves(run.metrics, source),
        curve(rows, source, "iteration", {"lr": "learning rate"}, "Learning rate", "learning rate"),
        curve(rows, source, "iteration", seconds, "Speed", "seconds"),
    ]
    text = "The total loss is the sum of those of proposals, classes, boxes and masks; medians of 20 iterations."
    if run.metrics.damaged:
        text += f" Left out: {counted(run.metrics.damaged, 'damaged line')} of {source}."
    return Section("Training", text, blocks)


def _command_section(run: Run) -> Section:
    weights, config = find_detector(run.folder), str(run.folder / CONFIG)
    if weights == run.folder:
        absent = Missing(Path("model_*.pth"), "commands to use the detector", "there are no weights")
        return Section("Using the detector", "", [absent])
    evaluation = [*_own_data(run, "val"), f"MODEL.WEIGHTS={weights}", f"OUTPUT_DIR={run.folder / 'evaluation'}"]
    commands = {
        "Find objects in images, folders and videos": ["predict.py", "--weights", str(weights), "IMAGES"],
        "Evaluate": ["train_net.py", "--config-file", config, "--eval-only", *evaluation],
    }
    if run.is_unfinished:
        data = _own_data(run, "train") + _own_data(run, "val")
        commands["Go on with the training (add --num-gpus as before)"] = [
            "train_net.py", "--config-file", config, "--resume", *data, f"OUTPUT_DIR={run.folder}"
        ]  # fmt: skip
    lines = [
        (title, folded(shlex.join(["python", f"tools/{words[0]}", *words[1:]]))) for title, words in commands.items()
    ]
    return Section("Using the detector", f"{weights.name} has the weights.", [page.Commands(lines)])


def _own_data(run: Run, split: str) -> list[str]:
    """The flags for a data set that is named by two paths; none for those that detectron2 knows."""
    paths = run.record.data.get({"train": OWN_TRAIN, "val": OWN_VAL}[split])
    if paths is None:
        return []
    return [f"--{split}-json", str(paths.get("json")), f"--{split}-images", str(paths.get("images"))]


def _setting_section(run: Run) -> Section:
    text = f"What differs from the defaults of detectron2 and of this toolkit; {CONFIG} has all settings."
    blocks: list[Block] = [_missing(run, CONFIG, "settings", "the file is empty")]
    if run.config:
        rows = [[key, short_value(value), short_value(default)] for key, value, default in changed_settings(run.config)]
        blocks = [Table(["setting", "value", "default"], rows)]
    return Section("Settings", text, blocks)


def changed_settings(config: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """Key, value and default of what a config, as YAML holds it, has other than by default."""
    cfg = get_cfg()
    add_crossmae_config(cfg)
    defaults = {key: json.loads(json.dumps(lookup(cfg, key))) for key in leaf_keys(cfg)}  # tuples become lists
    return [
        (key, value, defaults.get(key))
        for key, value in leaves(config).items()
        if key not in defaults or defaults[key] != value
    ]


def _data_section(run: Run) -> Section:
    rows = []
    for name, paths in run.record.data.items():
        ends = ["/".join(Path(str(paths.get(key, "-"))).parts[-2:]) for key in ("json", "images")]
        rows.append([name, *ends, str(run.record.settings.get(f"SHA-256 of the json of {name}", "-"))[:16]])
    if not rows:
        return Section("Data", "", [_missing(run, RECORD, "record of the data", "the file has none")])
    caption = f"The ends of the paths, and the beginning of the annotations' SHA-256; {RECORD} has them whole."
    return Section("Data", "", [Table(["data set", "annotations", "images", "SHA-256"], rows, caption)])


# --- The page ---------------------------------------------------------------------------------------------


def write_report(folder: Path) -> Path:
    """Write the page of a run, `folder`/report.html, from what is in its folder.

    Args:
        folder: `OUTPUT_DIR` of a training or an evaluation, in whatever state.

    Returns:
        Path of the page.

    Raises:
        OSError: the folder can not be written in.
    """
    path = folder / REPORT
    build_report(folder).write(path)
    return path


def build_report(folder: Path) -> Report:
    """The page of a run; what is missing is named on it."""
    run = read_run(folder)
    parts = [_training_section, _command_section, _setting_section, _data_section]
    sections = [*_evaluation_sections(run), *(part(run) for part in parts)]
    versions = [(name, str(version)) for name, version in run.record.versions.items()]
    return Report(f"Detector: {folder.resolve().name}", _lead(run), _facts(run), sections, versions)


def _lead(run: Run) -> str:
    """What was trained, and whether to the end."""
    state = f"The training goes on, or was cut off, after {_progress(run)}. " if run.is_unfinished else ""
    return (
        f"{_detector(run.config)}. {state}Everything here is from files in the run's folder, named as they are there."
    )


def _detector(config: Mapping[str, Any]) -> str:
    try:
        model, vit = config["MODEL"], config["MODEL"]["VIT"]
        stages = "Cascade " if model["ROI_HEADS"]["NAME"] == "CascadeROIHeads" else ""
        size = f"{vit['DEPTH']} blocks, width {vit['EMBED_DIM']}, patches of {vit['PATCH_SIZE']} pixels"
        return f"{stages}{'Mask' if model['MASK_ON'] else 'Faster'} R-CNN with a plain ViT as its backbone: {size}"
    except (KeyError, TypeError):  # no config, or one of something else
        return "A detector"


def _facts(run: Run) -> list[Fact]:
    """The headline numbers that there are."""
    found = [] if run.results is None else ap_facts(run.results, "AP", ("AP50", "AP75"))
    if run.best is not None:
        note = f"after {counted(run.best.iteration, 'iteration')}: model_best.pth"
        found.append(Fact(f"Best {TASKS[run.best.task]} AP", f"{percent(run.best.ap)} %", note))
    images = run.record.settings.get("number of training images")
    if isinstance(images, int):
        note = counted(len(run.record.classes), "class", "classes") if run.record.classes else ""
        found.append(Fact("Training images", f"{images:,}", note))
    times, memory = run.metrics.values("time"), run.metrics.values("peak_memory_bytes")
    if times:
        note = f"{_progress(run)} of {np.median(times):.3g} s, without evaluations"
        found.append(Fact("Training time", _about(run.metrics.seconds()), note))
    if memory:
        found.append(Fact("Peak memory", page.format_bytes(max(memory)), "of one GPU"))
    return found


def _progress(run: Run) -> str:
    """How many iterations are done, and of how many if that is known and more."""
    done, total = int(run.metrics.rows[-1]["iteration"]), run.record.iterations
    return f"{done:,} of {total:,} iterations" if total > done else counted(done, "iteration")


def _about(seconds: float) -> str:
    """A duration to one decimal, of the largest fitting unit."""
    unit, length = next((u, n) for u, n in (("h", 3600), ("min", 60), ("s", 1)) if seconds >= n or n == 1)
    return f"{seconds / length:.1f} {unit}"
