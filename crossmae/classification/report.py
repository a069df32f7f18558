"""The page of a fine-tuning run or of an evaluation, `report.html`: what the files in its folder tell.

What can not be shown for lack of a file is named in its place, so that the page can be written for a run that was cut
off, and for an evaluation without training.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from crossmae.classification.evaluation.files import CALIBRATION, CONFUSION_PNG, EMBEDDING, EVALUATION, PER_CLASS_CSV
from crossmae.classification.evaluation.hardest import HARDEST
from crossmae.classification.evaluation.hardest import RECORD as HARDEST_RECORD
from crossmae.classification.run_files import (
    CONFIG,
    FOLDER,
    REPORT,
    ClassRow,
    Evaluation,
    HardImage,
    Run,
    read_run,
)
from crossmae.classification.train.config import FinetuneConfig
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
from crossmae.training.config import Section as ConfigSection
from crossmae.training.log import LOG
from crossmae.training.start import WEIGHTS

MOST_CLASSES = 50  # in a table
MOST_PAIRS = 15  # of confused classes
DATA_KEYS = {"data.train", "data.root", "data.val", "data.val_root"}  # have a section of their own
WIDE = 900  # pixels from which a figure takes the whole width
NAMES = {  # of the headline numbers: label and meaning
    "top1": ("Top-1 accuracy", "share of images whose most probable class is the true one"),
    "top5": ("Top-5 accuracy", "share of images whose true class is among the five most probable"),
    "balanced_accuracy": ("Balanced accuracy", "mean of the classes' accuracies: every class counts the same"),
    "mean_ap": ("Mean average precision", "mean over the classes, each ranked by its probability"),
    "micro_f1": ("Micro F1", "of all pairs of image and class, a class counting as found from probability 0.5"),
    "macro_f1": ("Macro F1", "mean of the classes' F1, at probability 0.5"),
    "ece": ("Calibration error", "mean gap between probability and accuracy, in 15 bins of equal width"),
    "loss": ("Loss", "cross entropy per image, without label smoothing or class weights"),
}


# --- Words ------------------------------------------------------------------------------------------------


def percent(share: float | None, digits: int = 1) -> str:
    """A share in percent; what is not defined is a dash."""
    return "-" if share is None else f"{100 * share:.{digits}f}\N{NO-BREAK SPACE}%"


def _missing(run: Run, name: str, what: str, why: str = "the file does not exist") -> Missing:
    """Says that `what` can not be shown, for lack of a file or of something in it."""
    return Missing(Path(name), what, run.faults.get(name, why))


def _bar(share: float | None) -> Bar:
    return Bar(percent(share), share or 0.0)


# --- What the evaluation found ----------------------------------------------------------------------------


def _evaluation_sections(run: Run) -> list[Section]:
    """All of it; a single section where there is nothing."""
    parts = [_result_section, _class_section, _confusion_section, _hardest_section]
    sections = [section for part in [*parts, _feature_section] for section in part(run)]
    if run.evaluation is None and all(isinstance(block, Missing) for one in sections for block in one.blocks):
        if run.config and not (run.config.get("data") or {}).get("val"):
            return [Section("Evaluation", "There were no images to evaluate on (data.val).", [])]
        text = "Nothing is evaluated yet."
        return [Section("Evaluation", text, [block for one in sections for block in one.blocks])]
    return sections


def _result_section(run: Run) -> list[Section]:
    found = run.evaluation
    if found is None:
        return [Section("Results", "", [_missing(run, f"{FOLDER}/{EVALUATION}", "results")])]
    rows: list[list[str | Bar]] = []
    for key, (label, meaning) in NAMES.items():
        if key in found.numbers:
            rows.append([f"{label}: {meaning}", _shown(key, found.numbers[key])])
    text = f"Of {_weights(found)}, on {_images(found)}; each counts exactly once."
    return [Section("Results", text, [Table(["", "value"], rows, "A full bar is 100 %.")])]


def _shown(key: str, value: float | None) -> str | Bar:
    """A headline number as a cell of a table."""
    if key == "loss":
        return "-" if value is None else f"{value:.4f}"
    return percent(value, 2) if key == "ece" else _bar(value)


def _images(found: Evaluation) -> str:
    return f"{counted(found.samples, 'image')} of {counted(len(found.classes), 'class', 'classes')}"


def _weights(found: Evaluation) -> str:
    """Which weights were evaluated, in words."""
    about = found.about
    words = str(about.get("weights", "the weights"))
    if about.get("weights_are") == "averaged":
        words += ", averaged over the training"
    epoch = about.get("epoch")
    return f"{words}, at epoch {epoch:.4g}" if isinstance(epoch, (int, float)) else words


def _class_section(run: Run) -> list[Section]:
    blocks: list[Block] = [_missing(run, f"{FOLDER}/{EVALUATION}", "classes")]
    text = (
        "Accuracy of a class, or its recall: the share of its images that are recognised. Precision: the share of what "
        "was taken for it that is right. A dash is where there are no such images."
    )
    if run.evaluation is not None:
        blocks = class_tables(run.evaluation.classes, run.evaluation.multi_label)
    return [Section("Classes", text, blocks)]


def class_tables(classes: Sequence[ClassRow], multi_label: bool) -> list[Block]:
    """Every class, the worst first; of many, the worst and the best."""
    by_key = [(one.ap if multi_label else one.recall, one) for one in classes]
    defined = [one for share, one in sorted(by_key, key=lambda pair: pair[0] or 0.0) if share is not None]
    if len(classes) <= MOST_CLASSES:
        undefined = [one for share, one in by_key if share is None]
        return [_class_table([*defined, *undefined], multi_label, "The worst first; a full bar is 100 %.")]
    half = MOST_CLASSES // 2
    worst, best = defined[:half], defined[half:][-half:][::-1]
    others = f"{len(classes) - len(worst) - len(best)} of {len(classes)}"
    rest = f"{FOLDER}/{PER_CLASS_CSV} has the other {others} classes, too."
    return [
        _class_table(worst, multi_label, "The worst classes, the worst first; a full bar is 100 %."),
        _class_table(best, multi_label, f"The best classes, the best first; a full bar is 100 %. {rest}"),
    ]


def _class_table(classes: Sequence[ClassRow], multi_label: bool, caption: str) -> Table:
    rows: list[list[str | Bar]] = []
    for one in classes:
        shares = [*([one.ap] if multi_label else []), one.recall, one.precision]
        rows.append([one.name, f"{one.samples:,}", *map(_bar, shares)])
    columns = ["average precision", "recall"] if multi_label else ["accuracy"]
    return Table(["class", "images", *columns, "precision"], rows, caption)


def _confusion_section(run: Run) -> list[Section]:
    """Which classes are taken for which, and how sure of itself the classifier is; none for multi-label ones."""
    found = run.evaluation
    if found is not None and found.multi_label:
        return []
    names = {CONFUSION_PNG: "confusion matrix", CALIBRATION: "calibration diagram"}
    pictures = _pictures(run, {f"{FOLDER}/{name}": what for name, what in names.items()})
    pairs: Block = _missing(run, f"{FOLDER}/{EVALUATION}", "confused classes", "no class is taken for another")
    if found is not None and found.most_confused:
        rows = [
            [f"{one.true} taken for {one.predicted}", f"{one.count:,}", percent(one.share)]
            for one in found.most_confused[:MOST_PAIRS]
        ]
        pairs = Table(["", "images", "of the true class"], rows, "The most frequent confusions.")
    text = (
        "Which classes are taken for which; and whether probabilities mean what they say: of the images with a "
        "probability of 80\N{NO-BREAK SPACE}%, 80\N{NO-BREAK SPACE}% should be right."
    )
    return [Section("Confusions and calibration", text, [*pictures, pairs])]


def _pictures(run: Run, names: Mapping[str, str]) -> list[Block]:
    """Figures of the evaluation by their files, small ones side by side; of each that is not there, which it is."""
    wide: list[Block] = []
    small: list[page.PictureRow] = []
    faults: list[Block] = []
    for name, what in names.items():
        path = run.folder / name
        if not path.is_file():
            faults.append(_missing(run, name, what))
            continue
        try:
            row = page.PictureRow([page.embed_image(read_image(path), alt=what, lossless=True)])
        except UserError as error:
            faults.append(_missing(run, name, what, str(error).removeprefix(f"{path}: ")))
            continue
        if row.pictures[0].width > WIDE:
            wide.append(page.Gallery([row], min_width=WIDE))
        else:
            small.append(row)
    return [*wide, *([page.Gallery(small, min_width=460)] if small else []), *faults]


def _hardest_section(run: Run) -> list[Section]:
    """Pictures of the images that the classifier is most wrong about."""
    folder, record = f"{FOLDER}/{HARDEST}", f"{FOLDER}/{HARDEST}/{HARDEST_RECORD}"
    text = "Wrongly classified images with the highest loss: hard ones, or ones with a wrong label."
    if run.hardest is None:
        return [Section("Hardest images", text, [_missing(run, record, "hardest images")])]
    rows: list[page.PictureRow] = []
    faults: list[Block] = []
    for one in run.hardest.images:
        try:
            rows.append(_hard_picture(run.folder / folder, one))
        except UserError as error:
            name = one.picture or HARDEST_RECORD
            why = str(error).removeprefix(f"{run.folder / folder / name}: ")
            faults.append(_missing(run, f"{folder}/{name}", f"picture of {one.name}", why))
    if not run.hardest.images:
        why = "no image is classified wrongly" if run.hardest.wrong == 0 else "none were asked for (evaluation.hardest)"
        faults = [_missing(run, record, "hardest images", why)]
    elif run.hardest.wrong > len(run.hardest.images):
        text += f" Of {run.hardest.wrong:,} wrong images, the worst {len(run.hardest.images)}."
    caption = f"{record} has names and losses. Probabilities are the classifier's."
    return [Section("Hardest images", text, [*([page.Gallery(rows, 190, caption)] if rows else []), *faults])]


def _hard_picture(folder: Path, one: HardImage) -> page.PictureRow:
    """The image above what it is and what it was taken for.

    Raises:
        UserError: it can not be shown.
    """
    if one.picture is None:
        raise UserError(one.fault)
    caption = _verdict(one)
    image = read_image(folder / one.picture)
    picture = page.embed_image(image, alt=f"{one.name}: {caption}", lossless=one.picture.endswith(".png"))
    return page.PictureRow([picture], caption)


def _verdict(one: HardImage) -> str:
    """ "cat (2.9 %), taken for dog (97.1 %)"; where several classes go with an image, which are missed or wrong."""
    named = [f"{name} ({percent(share)})" for name, share in (*one.true, *one.predicted)]
    if len(one.true) == len(one.predicted) == 1:
        return f"{named[0]}, taken for {named[1]}"
    true, predicted = set(named[: len(one.true)]), set(named[len(one.true) :])
    parts = {"missed": true - predicted, "wrongly": predicted - true}
    return "; ".join(
        f"{word} {', '.join(name for name in dict.fromkeys(named) if name in names)}"
        for word, names in parts.items()
        if names
    )


def _feature_section(run: Run) -> list[Section]:
    text = "What the classifier's last layer is given, in two dimensions: images that lie together are alike to it. "
    if run.evaluation is not None and run.evaluation.multi_label:
        text += "Crosses are images with a label that is missed, or with one too many, at probability 0.5."
    else:
        text += "The colour is that of the true class; crosses are images that it gets wrong."
    return [Section("Features", text, _pictures(run, {f"{FOLDER}/{EMBEDDING}": "picture of features"}))]


# --- What the training left -------------------------------------------------------------------------------


def _curve(run: Run, keys: Mapping[str, str], title: str, y_label: str) -> Block:
    return curve(run.log.rows, Path(LOG), "epoch", keys, title, y_label)


def _training_sections(run: Run) -> list[Section]:
    """The curves; no section for an evaluation alone."""
    if run.is_evaluation:
        return []
    if not run.log.rows:
        return [Section("Training", "", [_missing(run, LOG, "curves of the training", "no line of it can be read")])]
    both = {"": "", "_ema": ", averaged weights"}
    losses = {"loss": "training"} | {f"val_loss{end}": f"validation{words}" for end, words in both.items()}
    accuracies = {f"{key}{end}": f"top-{key[3:]}{words}" for key in ("top1", "top5") for end, words in both.items()}
    precisions = {f"mean_ap{end}": f"mean AP{words}" for end, words in both.items()}
    several = any("mean_ap" in row for row in run.log.rows)
    blocks = [
        _curve(run, losses, "Loss", "loss"),
        _curve(run, precisions, "Average precision", "mean average precision")
        if several
        else _curve(run, accuracies, "Accuracy", "accuracy"),
        _curve(run, {"lr": "learning rate"}, "Learning rate", "learning rate"),
        _curve(run, {"images_per_second": "images"}, "Speed", "images per second"),
    ]
    text = (
        "The training loss is of augmented, perhaps mixed images and smoothed labels; the validation loss is of images "
        "as they are: the two can not be compared with each other."
    )
    if run.log.damaged:
        text += f" Left out: {counted(run.log.damaged, 'damaged line')} of {LOG}."
    return [Section("Training", text, blocks)]


def _command_sections(run: Run) -> list[Section]:
    """How to use the classifier, evaluate it again, go on with its training."""
    about = run.evaluation.about if run.evaluation is not None else {}
    weights = run.folder if run.has_weights else about.get("weights") if run.is_evaluation else None
    config = str(run.folder / CONFIG)
    blocks: list[Block] = []
    commands: dict[str, list[str]] = {}
    if weights is None:
        blocks.append(Missing(Path(WEIGHTS), "commands to use the classifier", "there are no weights"))
    else:
        commands["Tell the classes of images"] = ["predict_classes.py", "--weights", str(weights), "IMAGES"]
        if run.config.get("data", {}).get("val"):
            words = ["finetune.py", "--config-file", config, "--eval-only", str(weights)]
            commands["Evaluate"] = [*words, f"output_dir={run.folder / 'again'}"]
    if run.is_unfinished and run.config:
        words = ["finetune.py", "--config-file", config, "--resume", f"output_dir={run.folder}"]
        commands["Go on with the training"] = words
    lines = [
        (title, folded(shlex.join(["python", f"tools/{words[0]}", *words[1:]]))) for title, words in commands.items()
    ]
    return [Section("Using the classifier", "", [*blocks, *([page.Commands(lines)] if lines else [])])]


def _setting_sections(run: Run) -> list[Section]:
    if run.is_evaluation:
        return []
    text = f"What differs from the defaults of this toolkit; {CONFIG} has all settings."
    blocks: list[Block] = [_missing(run, CONFIG, "settings", "the file is empty")]
    if run.config:
        changed = changed_settings(run.config)
        blocks = [Table(["setting", "value", "default"], [[key, *map(short_value, pair)] for key, *pair in changed])]
    return [Section("Settings", text, blocks)]


def changed_settings(config: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """Key, value and default of what a config, as YAML holds it, has other than by default, but for the data."""
    defaults = leaves(_defaults(FinetuneConfig))
    return [
        (key, value, defaults.get(key))
        for key, value in leaves(config).items()
        if (key not in defaults or defaults[key] != value) and key not in DATA_KEYS
    ]


def _defaults(schema: type[ConfigSection]) -> dict[str, Any]:
    """The default values of a config, those that have one, as YAML holds them."""
    found: dict[str, Any] = {}
    for name, field in schema.model_fields.items():
        if not field.is_required():
            found[name] = field.default
        elif isinstance(field.annotation, type) and issubclass(field.annotation, ConfigSection):
            found[name] = _defaults(field.annotation)
    return {
        name: value.model_dump(mode="json") if isinstance(value, ConfigSection) else value
        for name, value in found.items()
    }


def _data_sections(run: Run) -> list[Section]:
    """Where images came from."""
    data = run.config.get("data") or {}
    about = run.evaluation.about if run.evaluation is not None else {}
    counts = {"training": run.plan.get("images"), "validation": run.evaluation.samples if run.evaluation else None}
    paths = {"training": data.get("train"), "validation": about.get("data", data.get("val"))}
    rows = []
    for name, path in paths.items():
        if path:
            rows.append(
                [
                    name,
                    "/".join(Path(str(path)).parts[-2:]),
                    f"{counts[name]:,}" if isinstance(counts[name], int) else "-",
                ]
            )
    if not rows:
        return [Section("Data", "", [_missing(run, CONFIG, "record of the data", "it names none")])]
    caption = f"The ends of the paths; {CONFIG} has them whole." if run.config else "The ends of the paths."
    table = Table(["images", "from", "number"], rows, caption)
    return [Section("Data", "", [table])]


# --- The page ---------------------------------------------------------------------------------------------


def write_report(folder: Path) -> Path:
    """Write the page of a run, `folder`/report.html, from what is in its folder.

    Args:
        folder: `output_dir` of a fine-tuning or of an evaluation, in whatever state.

    Returns:
        Path of the page.

    Raises:
        OSError: the folder can not be written in.
    """
    path = folder / REPORT
    build_report(folder).write(path)
    return path


def build_report(folder: Path, faults: Mapping[str, str] | None = None) -> Report:
    """The page of a run; what is missing is named on it, with the reason from `faults` where it is known."""
    run = read_run(folder, faults or {})
    parts: list[Callable[[Run], list[Section]]] = [
        _evaluation_sections,
        _training_sections,
        _command_sections,
        _setting_sections,
        _data_sections,
    ]
    sections = [section for part in parts for section in part(run)]
    return Report(f"Classifier: {folder.resolve().name}", _lead(run), _facts(run), sections, list(run.versions.items()))


def _lead(run: Run) -> str:
    """The result, and whether the training came to its end."""
    words, found = "", run.evaluation
    if found is not None:
        interval = f" ({_interval(found)})" if found.top1_interval else ""
        words = f"{NAMES[found.metric][0]} {percent(found.numbers[found.metric])}{interval} on {_images(found)}. "
    if run.is_unfinished:
        words += f"The training goes on, or was cut off, after {_progress(run)}. "
    return f"{words}Everything here is from files in the run's folder, named as they are there."


def _interval(found: Evaluation) -> str:
    """Of the top-1 accuracy, for images drawn independently."""
    if found.top1_interval is None:
        return ""
    low, high = found.top1_interval
    return f"95% interval {100 * low:.1f} to {100 * high:.1f} %"


def _progress(run: Run) -> str:
    """How many epochs are done, and of how many if that is known."""
    done, total = run.log.rows[-1].get("epoch", 0.0), (run.config.get("schedule") or {}).get("epochs")
    return f"{done:.4g} of {total:,} epochs" if isinstance(total, int) else f"{done:.4g} epochs"


def _facts(run: Run) -> list[Fact]:
    """The headline numbers that there are."""
    found: list[Fact] = []
    if run.evaluation is not None:
        for key in ("top1", "top5", "mean_ap", "micro_f1", "balanced_accuracy", "ece"):
            if key in run.evaluation.numbers:
                value = percent(run.evaluation.numbers[key], 2 if key == "ece" else 1)
                found.append(Fact(NAMES[key][0], value, _interval(run.evaluation) if key == "top1" else ""))
    images = run.plan.get("images")
    if isinstance(images, int):
        found.append(Fact("Training images", f"{images:,}", _progress(run) if run.log.rows else ""))
    speeds, memory = run.log.values("images_per_second"), run.log.values("memory_gb")
    if speeds and isinstance(run.plan.get("images_per_step"), int):
        note = f"{np.median(speeds):,.0f} images per second (median), without evaluations"
        found.append(Fact("Training time", page.format_seconds(run.log.seconds(run.plan["images_per_step"])), note))
    if memory:
        found.append(Fact("Peak memory", f"{max(memory):.1f} GB", "of one process"))
    return found
