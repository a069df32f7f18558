"""`report.html` of a fine-tuning run or an evaluation, from the files in its folder.

The page names each missing or damaged file in the place of its content. It can be written for a run that was
interrupted, and for an evaluation without training.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field, model_validator

from crossmae.checkpoints.run_checkpoint import FOLDER as CHECKPOINTS
from crossmae.checkpoints.run_checkpoint import RECORD as RUN_RECORD
from crossmae.classification.classifier import BEST
from crossmae.classification.evaluation.files import (
    CALIBRATION,
    CONFUSION_PNG,
    EMBEDDING,
    EVALUATION,
    HARDEST,
    HARDEST_RECORD,
    PER_CLASS_CSV,
)
from crossmae.classification.train.config import FinetuneConfig
from crossmae.data.images import read_image
from crossmae.errors import counted
from crossmae.files import leaves, read_json
from crossmae.reports import page, sections
from crossmae.reports.run_folder import REPORT, FileContent, LoggedNumbers, RunFolder, read_log
from crossmae.training.config import read_yaml
from crossmae.training.log import LOG
from crossmae.training.resume import WEIGHTS

CONFIG, FOLDER = "config.yaml", "evaluation"
SHOWN_PAIRS = 15  # shown pairs of confused classes
DATA_KEYS = {"data.train", "data.root", "data.val", "data.val_root"}  # settings that have their own section
WIDE = 900  # pixels: wider figures take the whole width of the page
EVALUATED, HARDEST_IMAGES = f"{FOLDER}/{EVALUATION}", f"{FOLDER}/{HARDEST}/{HARDEST_RECORD}"
HEADLINES = {  # label and meaning
    "top1": ("Top-1 accuracy", "share of images whose most probable class is the true one"),
    "top5": ("Top-5 accuracy", "share of images whose true class is among the five most probable"),
    "balanced_accuracy": ("Balanced accuracy", "mean of the classes' accuracies: every class counts the same"),
    "mean_ap": ("Mean average precision", "mean over the classes, each ranked by its probability"),
    "micro_f1": ("Micro F1", "of all pairs of image and class, a class counting as found from probability 0.5"),
    "macro_f1": ("Macro F1", "mean of the classes' F1, at probability 0.5"),
    "ece": ("Calibration error", "mean gap between probability and accuracy, in 15 bins of equal width"),
    "loss": ("Loss", "cross entropy per image, without label smoothing or class weights"),
}


class ClassRow(FileContent):
    """A class of an evaluation. Shares are fractions of 1, or None if undefined for lack of images."""

    name: str
    samples: int
    recall: float | None
    precision: float | None
    ap: float | None = None


class ConfusedClasses(FileContent):
    """Images of one class that were predicted as another class, and their share of the true class."""

    true: str
    predicted: str
    count: int
    share: float


class Evaluation(FileContent):
    """Content of `evaluation.json`: metrics by name, and `about` with facts on weights and data."""

    samples: int
    numbers: dict[str, float | None]
    top1_interval: tuple[float, float] | None = None
    classes: list[ClassRow]
    most_confused: list[ConfusedClasses] = Field([])
    about: dict[str, Any]

    @model_validator(mode="after")
    def _has_a_headline(self) -> Evaluation:
        if self.metric not in self.numbers:
            raise ValueError("numbers: has neither top1 nor mean_ap. Evaluate the classifier again.")
        return self

    @property
    def multi_label(self) -> bool:
        """True if an image can have several classes."""
        return self.metric == "mean_ap"

    @property
    def metric(self) -> str:
        """Name of the most important metric."""
        return "mean_ap" if "mean_ap" in self.numbers else "top1"


class HardImage(FileContent):
    """A wrongly classified image: its picture (or why there is none), and its classes with probabilities."""

    name: str
    picture: str | None
    fault: str = ""
    true: list[tuple[str, float]]
    predicted: list[tuple[str, float]]


class Hardest(FileContent):
    """Content of `hardest.json`: the number of wrong images, and the images with the highest losses."""

    wrong: int
    images: list[HardImage]


def _evaluation_sections(run: RunFolder, found: Evaluation | None, hardest: Hardest | None) -> list[page.Section]:
    multi_label = found is not None and found.multi_label
    confusions = [] if multi_label else [_confusion_section(run, found)]
    shown = [_result_section(run, found), _class_section(run, found), *confusions]
    return [*shown, _hardest_section(run, hardest), _feature_section(run, multi_label)]


def _result_section(run: RunFolder, found: Evaluation | None) -> page.Section:
    if found is None:
        return page.Section("Results", "", [run.missing(EVALUATED, "results")])
    rows: list[page.TableRow] = []
    for key in (key for key in HEADLINES if key in found.numbers):
        value, words = found.numbers[key], ": ".join(HEADLINES[key])
        plain = "-" if value is None else f"{value:.4f}" if key == "loss" else page.percent(value, 2)
        rows.append([words, plain if key in ("loss", "ece") else page.bar(value)])
    text = f"Of {_weights(found.about)}, on {_images(found)}. Each image counts exactly once."
    return page.Section("Results", text, [page.Table(["", "value"], rows, "A full bar is 100 %.")])


def _images(found: Evaluation) -> str:
    return f"{counted(found.samples, 'image')} of {counted(len(found.classes), 'class')}"


def _weights(about: Mapping[str, Any]) -> str:
    words, epoch = str(about.get("weights", "the weights")), about.get("epoch")
    if about.get("weights_are") == "averaged":
        words += ", averaged over the training"
    return f"{words}, at epoch {epoch:.4g}" if isinstance(epoch, (int, float)) else words


def _class_section(run: RunFolder, found: Evaluation | None) -> page.Section:
    text = (
        "Accuracy or recall: the share of a class's images that are recognised. Precision: the share of the images "
        "predicted as the class that are right. A dash means that there are no such images."
    )
    if found is None:
        return page.Section("Classes", text, [run.missing(EVALUATED, "classes")])
    rows: list[tuple[float | None, page.TableRow]] = []
    for one in found.classes:
        shares = [*([one.ap] if found.multi_label else []), one.recall, one.precision]
        rows.append((shares[0], [one.name, f"{one.samples:,}", *map(page.bar, shares)]))
    columns = [
        "class",
        "images",
        *(["average precision", "recall"] if found.multi_label else ["accuracy"]),
        "precision",
    ]
    orders = ("worst", "worst classes, the worst", "best classes, the best")
    captions = [f"The {words} first. A full bar is 100 %." for words in orders]
    tables = sections.class_tables(rows, columns, captions, f"{FOLDER}/{PER_CLASS_CSV}", worst_first=True)
    return page.Section("Classes", text, tables)


def _confusion_section(run: RunFolder, found: Evaluation | None) -> page.Section:
    pairs: page.PageBlock = run.missing(EVALUATED, "confused classes", "no class is taken for another")
    if found is not None and found.most_confused:
        rows = [
            [f"{one.true} taken for {one.predicted}", f"{one.count:,}", page.percent(one.share)]
            for one in found.most_confused[:SHOWN_PAIRS]
        ]
        pairs = page.Table(["", "images", "of the true class"], rows, "The most frequent confusions.")
    text = (
        "Which classes are taken for which, and whether the probabilities are right: of the images with a "
        "probability of 80\N{NO-BREAK SPACE}%, 80\N{NO-BREAK SPACE}% should be right."
    )
    figures = _figures(run, {CONFUSION_PNG: "confusion matrix", CALIBRATION: "calibration diagram"})
    return page.Section("Confusions and calibration", text, [*figures, pairs])


def _figures(run: RunFolder, names: Mapping[str, str]) -> list[page.PageBlock]:
    rows = [run.picture(f"{FOLDER}/{name}", read_image, what, lossless=True) for name, what in names.items()]
    wide = [row for row in rows if isinstance(row, page.PictureRow) and row.pictures[0].width > WIDE]
    small = [row for row in rows if row not in wide]
    return [*(page.Gallery([row], min_width=WIDE) for row in wide), *sections.gallery(small, 460)]


def _hardest_section(run: RunFolder, hardest: Hardest | None) -> page.Section:
    text = "Wrongly classified images with the highest loss: hard ones, or ones with a wrong label."
    if hardest is None:
        return page.Section("Hardest images", text, [run.missing(HARDEST_IMAGES, "hardest images")])
    if not hardest.images:
        why = "none were asked for (evaluation.hardest)" if hardest.wrong else "no image is classified wrongly"
        return page.Section("Hardest images", text, [run.missing(HARDEST_IMAGES, "hardest images", why)])
    if hardest.wrong > len(hardest.images):
        text += f" Of {counted(hardest.wrong, 'wrong image')}, the worst {len(hardest.images)}."
    caption = f"{HARDEST_IMAGES} has names and losses. Probabilities are the classifier's."
    pictures = [_hard_image(run, one) for one in hardest.images]
    return page.Section("Hardest images", text, sections.gallery(pictures, 190, caption))


def _hard_image(run: RunFolder, one: HardImage) -> page.PictureRow | page.Missing:
    what, caption = f"picture of {one.name}", _verdict(one)
    if one.picture is None:
        return run.missing(HARDEST_IMAGES, what, one.fault)
    name, lossless = f"{FOLDER}/{HARDEST}/{one.picture}", one.picture.endswith(".png")
    return run.picture(name, read_image, what, alt=f"{one.name}: {caption}", caption=caption, lossless=lossless)


def _verdict(one: HardImage) -> str:
    """Format "cat (2.9 %), taken for dog (97.1 %)"."""
    true, predicted = ([f"{name} ({page.percent(share)})" for name, share in row] for row in (one.true, one.predicted))
    if len(true) == len(predicted) == 1:
        return f"{true[0]}, taken for {predicted[0]}"
    parts = {"missed": [x for x in true if x not in predicted], "wrongly": [x for x in predicted if x not in true]}
    return "; ".join(f"{word} {', '.join(dict.fromkeys(names))}" for word, names in parts.items() if names)


def _feature_section(run: RunFolder, multi_label: bool) -> page.Section:
    text = "Inputs of the classifier's last layer in two dimensions. Images that lie together are alike to it. "
    if multi_label:
        text += "Crosses are images with a missed label, or with a wrong label, at probability 0.5."
    else:
        text += "The colour is the true class. Crosses are images that are classified wrongly."
    return page.Section("Features", text, _figures(run, {EMBEDDING: "picture of features"}))


def _training_section(run: RunFolder, log: LoggedNumbers) -> page.Section:
    both = {"": "", "_ema": ", averaged weights"}
    losses = {"loss": "training"} | {f"val_loss{end}": f"validation{words}" for end, words in both.items()}
    scores = {f"{key}{end}": f"top-{key[3:]}{words}" for key in ("top1", "top5") for end, words in both.items()}
    precisions = {f"mean_ap{end}": f"mean AP{words}" for end, words in both.items()}
    scored = {"Accuracy": ("accuracy", scores)}
    if log.values("mean_ap"):
        scored = {"Average precision": ("mean average precision", precisions)}
    plots = {
        "Loss": ("loss", losses),
        **scored,
        "Learning rate": ("learning rate", {"lr": "learning rate"}),
        "Speed": ("images per second", {"images_per_second": "images"}),
    }
    text = (
        "The training loss is measured on augmented images with smoothed labels, the validation loss on unchanged "
        "images. The two cannot be compared."
    )
    return sections.training_section(run, log, LOG, "epoch", plots, text)


def _command_section(folder: Path, weights: object, validated: bool, unfinished: bool) -> page.Section:
    absent = page.Missing(Path(WEIGHTS), "commands to use the classifier", "there are no weights")
    words, finetune = {}, ["finetune.py", "--config-file", str(folder / CONFIG)]
    if weights is not None:
        words["Classify images"] = ["predict_classes.py", "--weights", str(weights), "IMAGES", "--force"]
        if validated:
            words["Evaluate"] = [*finetune, "--eval-only", str(weights), "--force", f"output_dir={folder / 'again'}"]
    if unfinished:
        words["Continue the training"] = [*finetune, "--resume", f"output_dir={folder}"]
    blocks = [*([absent] if weights is None else []), *([sections.commands(words)] if words else [])]
    return page.Section("Using the classifier", "", blocks)


def changed_from_defaults(content: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """List key, value and default of changed settings, except data settings."""
    least = FinetuneConfig.model_validate({"output_dir": ".", "data": {}, "model": {}})
    defaults = leaves(least.model_dump(mode="json", exclude={"output_dir"}))
    return [row for row in sections.changed_settings(content, defaults) if row[0] not in DATA_KEYS]


def _data_section(run: RunFolder, data: Mapping[str, tuple[Any, Any]], has_config: bool) -> page.Section:
    given = [(name, path, count) for name, (path, count) in data.items() if path]
    rows = [[name, sections.path_end(path), f"{n:,}" if isinstance(n, int) else "-"] for name, path, n in given]
    if not rows:
        return page.Section("Data", "", [run.missing(CONFIG, "record of the data", "it names none")])
    caption = f"The ends of the paths; {CONFIG} has them whole." if has_config else "The ends of the paths."
    return page.Section("Data", "", [page.Table(["images", "from", "number"], rows, caption)])


def write_report(folder: Path) -> Path:
    """Write report.html of a possibly incomplete run, and return its path."""
    return build_report(folder).write(folder / REPORT)


def build_report(folder: Path) -> page.Report:
    """Build the page of a run."""
    run = RunFolder(folder)
    found = run.read(EVALUATED, Evaluation.read, None)
    hardest = run.read(HARDEST_IMAGES, Hardest.read, None)
    log = run.read(LOG, lambda path: read_log(path, "epoch"), LoggedNumbers())
    content: dict[str, Any] = run.read(CONFIG, read_yaml, {})
    settings = {name: section for name, section in content.items() if isinstance(section, dict)}
    data, about = settings.get("data", {}), found.about if found is not None else {}
    checkpoints = [path.relative_to(folder).as_posix() for path in folder.glob(f"{CHECKPOINTS}/step-*/{RUN_RECORD}")]
    record = _mapping(run.read(max(checkpoints, default=f"{CHECKPOINTS}/{RUN_RECORD}"), read_json, {}))
    plan, versions = _mapping(record.get("plan")), _mapping(record.get("versions", about.get("versions")))
    only_evaluated = found is not None and not log.rows and not run.has(CONFIG)
    unfinished = bool(log.rows) and not run.has(WEIGHTS)
    done, epochs = log.rows[-1]["epoch"] if log.rows else 0.0, settings.get("schedule", {}).get("epochs")
    progress = f"{done:.4g} of {counted(epochs, 'epoch')}" if isinstance(epochs, int) else f"{done:.4g} epochs"
    weights = folder if run.has(BEST, WEIGHTS) else about.get("weights") if only_evaluated else None
    splits = {
        "training": (data.get("train"), plan.get("images")),
        "validation": (about.get("data", data.get("val")), found.samples if found else None),
    }
    evaluation: Sequence[page.Section] = _evaluation_sections(run, found, hardest)
    if found is None:
        evaluation = sections.collapse(evaluation, "Evaluation", "Nothing is evaluated yet.")
        if len(evaluation) == 1 and settings and not data.get("val"):
            evaluation = [page.Section("Evaluation", "There were no images to evaluate on (data.val).")]
    result = ""
    if found is not None:
        value, interval = page.percent(found.numbers[found.metric]), _interval(found)
        result = f"{HEADLINES[found.metric][0]} {value}{interval and f' ({interval})'} on {_images(found)}. "
    use = _command_section(folder, weights, bool(data.get("val")), unfinished and bool(settings))
    shown = [*evaluation, use]
    if not only_evaluated:
        changed = changed_from_defaults(settings)
        own = sections.settings_section(run, CONFIG, not settings, changed, "this toolkit")
        shown = [*evaluation, _training_section(run, log), use, own]
    return page.Report(
        f"Classifier: {folder.resolve().name}",
        sections.lead(result, progress if unfinished else ""),
        _evaluation_facts(found) + _training_facts(log, plan, progress if log.rows else ""),
        [*shown, _data_section(run, splits, bool(settings))],
        [(name, str(version)) for name, version in versions.items()],
    )


def _mapping(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _interval(found: Evaluation) -> str:
    if found.top1_interval is None:
        return ""
    low, high = found.top1_interval
    return f"95% interval {100 * low:.1f} to {100 * high:.1f} %"


def _evaluation_facts(found: Evaluation | None) -> list[page.Fact]:
    digits = {"top1": 1, "top5": 1, "mean_ap": 1, "micro_f1": 1, "balanced_accuracy": 1, "ece": 2}
    return [
        page.Fact(HEADLINES[key][0], page.percent(found.numbers[key], count), _interval(found) if key == "top1" else "")
        for key, count in digits.items()
        if found is not None and key in found.numbers
    ]


def _training_facts(log: LoggedNumbers, plan: Mapping[str, Any], progress: str) -> list[page.Fact]:
    found: list[page.Fact] = []
    images, per_step = plan.get("images"), plan.get("images_per_step")
    speeds, memory = log.values("images_per_second"), log.values("memory_gb")
    if isinstance(images, int):
        found.append(page.Fact("Training images", f"{images:,}", progress))
    if speeds and isinstance(per_step, int):
        seconds = sum(steps * per_step / speed for steps, speed in log.spans("step", "images_per_second"))
        note = f"{np.median(speeds):,.0f} images per second (median), without evaluations"
        found.append(page.Fact("Training time", page.format_seconds(seconds), note))
    return found + ([page.Fact("Peak memory", f"{max(memory):.1f} GB", "of one process")] if memory else [])
