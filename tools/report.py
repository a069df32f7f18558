"""Write the results of `crossmae run` or the demo to one page, FOLDER/report.html, and the AP to FOLDER/summary.txt.

    python tools/report.py outputs/run

Both write this page at their end. The program can be run at any time. The page names missing or damaged files.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil
from pydantic import Field

from crossmae.checkpoints.reading import PIPELINE_RECORD
from crossmae.data.images import read_image
from crossmae.errors import UserError, advise, counted, run_cli
from crossmae.experiments.pipeline.stage_section import StageOfPlan, Stages, stage_section
from crossmae.experiments.stages import RECORDS
from crossmae.files import leaves, read_json, write_text
from crossmae.reports import page, sections
from crossmae.reports.figures import curve_plots
from crossmae.reports.run_folder import FileContent, LoggedNumbers, RunFolder, read_log
from crossmae.training.versions import versions
from det.data.coco import read_coco
from det.evaluation.run_files import AP_TEXT, TASKS, DetectionResults, RunRecord, describe_images, read_training_log

if TYPE_CHECKING:
    from det.evaluation.resampling import ApDifference

COUNT = 12  # number of held-out images on the page
PRETRAIN_LOG = "pretrain/log.jsonl"
# Files of each detector.
RESULTS, PREDICTIONS, LOG, RECORD = "results.json", "inference/coco_instances_results.json", "log.jsonl", "run.json"
LEAD = (
    "A masked autoencoder, CrossMAE, learned to reconstruct hidden patches of the images, without labels. Then a "
    "detector was trained from its encoder. Every number was measured by the commands shown, on the machine described "
    "at the end."
)
PRETRAINED_ONLY = (
    "A masked autoencoder, CrossMAE, learned to reconstruct hidden patches of the images. There were no labels, so "
    "there is no detector. Every number was measured by the commands shown, on the machine described at the end."
)
ONE_SEED = (
    "Each detector was trained once. Trainings that differ only in their seed also differ in AP, often by several "
    "points, so one seed of each shows nothing about the gain from pretraining. tools/worth.py trains with three seeds "
    "and computes intervals."
)
ONE_RUN = (
    "The detector was trained once. Trainings that differ only in their seed also differ in AP, often by several "
    "points. With --compare, tools/run.py also trains the same detector from random weights."
)
LOW_AP50 = 5.0  # percent: below it, a detector finds almost nothing
ALMOST_NOTHING = (
    "The detector finds almost nothing. Probable reasons: {reasons}. Compare true and predicted objects on the page: "
    "labels that are shifted, or that mark only some of the objects, have the same effect. "
)
ONE_OF_TWO = "Only one of the two detectors is trained, so there is nothing to compare yet."
HEADLINES = [f"{word} {key}" for key in ("AP", "AP50") for word in TASKS.values()]  # columns of the comparison


@dataclass(frozen=True)
class Arm:
    """One detector of the comparison: words for its start, and its files."""

    start: str
    folder: str
    results: DetectionResults | None
    predictions: list[Any] | None
    log: LoggedNumbers
    record: RunRecord

    @property
    def settings(self) -> dict[str, Any]:
        """Settings by dotted key."""
        return leaves(self.record.settings)

    def file(self, name: str) -> str:
        """Return the name of one of its files in the demo's folder."""
        return f"{self.folder}/{name}"


class LabelledFiles(FileContent):
    """A COCO file and the folder of its images, as names in the output folder or as absolute paths."""

    json_path: str = Field(alias="json")
    images: str


class PageInputs(FileContent):
    """Inputs of the page: the key "page" of pipeline.json.

    Attributes:
        arms: what each detector starts from, by folder.
        train, val: labelled images of the detectors.
        worth: images, and labels for the command that repeats the comparison.
        neighbours: what nearest neighbours measure.
        facts: images, labels and machine in words.
        plan: stages with expected times.
        doubts: why a detector may find almost nothing, known from the plan.
    """

    title: str
    lead: str = ""
    arms: dict[str, str] = Field({})
    train: LabelledFiles | None = None
    val: LabelledFiles | None = None
    worth: LabelledFiles | None = None
    neighbours: str = "the share of crops of objects and background whose class is found by the encoder's features"
    facts: dict[str, str] = Field({})
    plan: list[StageOfPlan] = Field([])
    doubts: list[str] = Field([])

    @property
    def stages(self) -> list[str]:
        """Names of the stages, except those before pretraining."""
        return ["pretrain", *(stage.name for stage in self.plan if stage.name != "done"), *self.arms]

    @property
    def annotations(self) -> str:
        """Name of the validation labels."""
        return self.val.json_path if self.val else "data/val.json"


class PipelineRecord(FileContent):
    """The content of pipeline.json that the page uses."""

    page: PageInputs


def read_arms(run: RunFolder, inputs: PageInputs, record: Stages) -> list[Arm]:
    """Read the detectors whose stages are done.

    With an empty record of the stages, all detectors are read.
    """
    unfinished = record.unfinished(inputs.stages)
    return [read_arm(run, start, folder) for folder, start in inputs.arms.items() if folder not in unfinished]


def read_arm(run: RunFolder, start: str, folder: str) -> Arm:
    """Read what the page needs from the folder of a detector."""
    return Arm(
        start,
        folder,
        run.read(f"{folder}/{RESULTS}", DetectionResults.read, None),
        run.read(f"{folder}/{PREDICTIONS}", read_predictions, None),
        run.read(f"{folder}/{LOG}", read_training_log, LoggedNumbers()),
        run.read(f"{folder}/{RECORD}", RunRecord.read, RunRecord()),
    )


def comparison_section(
    run: RunFolder, inputs: PageInputs, arms: Sequence[Arm], differences: Mapping[str, ApDifference]
) -> page.Section:
    """Show the AP of the detectors, and what a difference shows."""
    found = [arm for arm in arms if arm.results]
    text = training_text(run, inputs, arms)
    caption = f"AP and AP50 on held-out images, in percent. A full bar is 100. {text}{AP_TEXT}"
    blocks: list[page.PageBlock] = [comparison_table(found, differences, caption)] if found else []
    blocks += [run.missing(arm.file(RESULTS), f"average precision from {arm.start}") for arm in arms if not arm.results]
    low = explain_low_ap(arms, inputs.doubts)
    if len(arms) < 2:
        return page.Section("Result", advise(low + (ONE_OF_TWO if len(inputs.arms) > 1 else ONE_RUN)), blocks)
    if not differences:
        needed = (inputs.annotations, *(arm.file(PREDICTIONS) for arm in arms))
        blocks += [run.missing(name, "difference of the APs") for name in needed if name in run.faults]
    if inputs.worth and inputs.train and inputs.val:
        blocks.append(worth_command(run.path, inputs.worth, inputs.train, inputs.val))
    return page.Section("Comparison", advise(low + verdict(differences)), blocks)


def explain_low_ap(arms: Sequence[Arm], doubts: Sequence[str]) -> str:
    """Tell why no detector finds anything.

    Returns "" if one does.

    Args:
        doubts: reasons that the plan knows.
    """
    found = [value for arm in arms if (value := headlines(arm.results)[HEADLINES.index("box AP50")]) is not None]
    if not found or max(found) >= LOW_AP50:
        return ""
    return ALMOST_NOTHING.format(reasons="; ".join(doubts) or "a short training, or objects that are hard to find")


def training_text(run: RunFolder, inputs: PageInputs, arms: Sequence[Arm]) -> str:
    """Tell how the detectors were trained."""
    few = run.read(inputs.train.json_path, read_coco, None) if inputs.train else None
    labelled = counted(len(few["images"]), "labelled image") if few else "the same labelled images"
    if found := [arm.record.training_images for arm in arms if arm.record.training_images]:
        labelled = describe_images(*found[0], "labelled image")
    steps = {int(max(logged)) for arm in arms if (logged := arm.log.values("step"))}
    length = f" for {counted(steps.pop(), 'step')}" if len(steps) == 1 else ""
    if len(arms) < 2:
        return f"The detector was trained{length} on {labelled}. "
    order = "with the same seed and the same order of the images"
    return f"Both detectors were trained{length} on {labelled}, {order}. {differing_settings(arms)}"


def differing_settings(arms: Sequence[Arm]) -> str:
    """Name the settings that differ, with the values of each detector."""
    if not all(arm.settings for arm in arms):
        return ""
    keys = sorted({key for arm in arms for key in arm.settings})
    changed = {key: [arm.settings.get(key) for arm in arms] for key in keys}
    texts = [
        f"{key} ({', '.join(f'{value} from {arm.start}' for value, arm in zip(values, arms, strict=True))})"
        for key, values in changed.items()
        if any(value != values[0] for value in values)
    ]
    if not texts:
        return "All settings are the same. Only the first weights of the encoder differ. "
    why = "Layer decay keeps what pretraining has learned, and random weights have nothing to keep. "
    names = f"The first weights of the encoder differ, and these settings: {', '.join(texts)}. "
    return names + (why if "SOLVER.LAYER_DECAY" in " ".join(texts) else "")


def comparison_table(arms: Sequence[Arm], differences: Mapping[str, ApDifference], caption: str) -> page.Table:
    """Show the AP of each detector, and the differences below."""
    rows: list[page.TableRow] = [
        [arm.start, *(page.bar(ap and ap / 100, unit="") for ap in headlines(arm.results))] for arm in arms
    ]
    known = [signed(differences[task].value) if task in differences else "-" for task in TASKS]
    footer = ["difference", *known, *("" for _ in HEADLINES[len(known) :])]
    return page.Table(["start", *HEADLINES], rows, caption, footer if len(arms) > 1 else ())


def worth_command(folder: Path, labelled: LabelledFiles, train: LabelledFiles, val: LabelledFiles) -> page.Commands:
    """Show the command that repeats the comparison with three seeds."""
    words = [folder / labelled.images, folder / labelled.json_path, "--label-images", folder / train.images]
    words += ["--val-labels", folder / val.json_path, "--val-images", folder / val.images]
    words += ["--arms", "random_pretraining_init,own", "--shares", "10,100"]
    return sections.commands({"The same question with three seeds": ["worth.py", *map(str, words)]})


def headlines(results: DetectionResults | None) -> list[float | None]:
    """List the numbers of `HEADLINES` in percent, None if undefined."""
    numbers = results.numbers if results else {}
    return [numbers.get(task, {}).get(key) for key in ("AP", "AP50") for task in TASKS]


def ap_differences(
    run: RunFolder, inputs: PageInputs, arms: Sequence[Arm], truth: dict[str, Any] | None
) -> dict[str, ApDifference]:
    """Compute the AP of the second detector minus the first, by task.

    Returns nothing without two detectors, or if a file is missing or damaged. `run.faults` has the reason then.
    """
    if len(arms) < 2:
        return {}
    from det.evaluation.resampling import bootstrap_difference, match_detections  # slow import

    first, second = (arm.predictions for arm in arms)
    if truth is None or first is None or second is None:
        return {}
    try:
        return {
            task: bootstrap_difference(match_detections(truth, first, task), match_detections(truth, second, task))
            for task in TASKS
            if all(task in arm.results.numbers for arm in arms if arm.results)
        }
    except (KeyError, TypeError, ValueError, IndexError, AssertionError) as error:
        run.faults[arms[1].file(PREDICTIONS)] = f"the detections do not fit {inputs.annotations}: {error!r}"
        return {}


def verdict(differences: Mapping[str, ApDifference]) -> str:
    """Tell what the differences show, and what they do not show."""
    if not differences:
        return f"The difference is unknown, because a file is missing or damaged. {ONE_SEED}"
    measured = [
        f"{signed(found.value)} {TASKS[task]} AP ({signed(found.low)} to {signed(found.high)})"
        for task, found in differences.items()
    ]
    open_tasks = [TASKS[task] for task, found in differences.items() if found.low <= 0 <= found.high]
    if open_tasks:
        names = " and ".join(open_tasks)
        so = f"For these two, other held-out images could give a difference of {names} AP with the other sign."
    else:
        so = "For these two, other held-out images would most likely give differences of the same sign."
    return (
        f"Own pretraining minus random weights: {', '.join(measured)}. In parentheses: the middle 95 % of 1,000 "
        f"resamplings of the held-out images. {so} {ONE_SEED}"
    )


def signed(value: float) -> str:
    """Format a difference with its sign: "+1.2", "-0.3", "0.0"."""
    return "0.0" if abs(value) < 0.05 else f"{value:+.1f}"


def class_section(run: RunFolder, arms: Sequence[Arm]) -> page.Section:
    """Show the AP of every class for both detectors."""
    found = {arm.start: {one.name: one for one in arm.results.classes} for arm in arms if arm.results}
    names = {name: one.objects for classes in found.values() for name, one in classes.items()}
    if not names:
        return page.Section("Classes", "", [run.missing(arm.file(RESULTS), "AP by class") for arm in arms])
    rows: list[page.TableRow] = []
    for name, objects in names.items():
        aps = [classes[name].ap(task) if name in classes else None for task in TASKS for classes in found.values()]
        rows.append([name, f"{objects:,}", *(page.bar(value and value / 100, unit="") for value in aps)])
    columns = ["class", "objects", *(f"{word} AP, {start}" for word in TASKS.values() for start in found)]
    return page.Section("Classes", "", [page.Table(columns, rows, "AP in percent. A full bar is 100.")])


def prediction_section(
    run: RunFolder, inputs: PageInputs, arms: Sequence[Arm], truth: dict[str, Any] | None
) -> page.Section:
    """Show true objects and the predictions of the detectors, side by side."""
    from det.evaluation.pictures import compare_pictures  # slow import

    what = "pictures of detections"
    absent = [arm.file(PREDICTIONS) for arm in arms if arm.predictions is None]
    blocks: list[page.PageBlock] = [run.missing(name, what) for name in absent]
    found = {arm.start: arm.predictions for arm in arms if arm.predictions is not None}
    if truth is None:
        blocks.append(run.missing(inputs.annotations, what))
    elif found and inputs.val:
        try:
            drawn = compare_pictures(truth, run.path / inputs.val.images, found, COUNT)
            alt = f"true objects on the left, then predictions from {' and '.join(found)}"
            pictures = [page.embed_image(pixels, alt=f"image {name}: {alt}", density=2) for name, pixels in drawn]
            blocks.insert(0, page.Gallery([page.PictureRow([picture]) for picture in pictures], min_width=700))
        except (UserError, KeyError, TypeError, ValueError) as error:
            names = ", ".join(arm.file(PREDICTIONS) for arm in arms if arm.predictions is not None)
            blocks.append(page.Missing(Path(names), what, f"it does not fit {inputs.annotations}: {error}"))
    text = (
        f"Up to {COUNT} held-out images, spread evenly over their ids: none was selected by hand. True objects are on "
        "the left, next to them the predictions with their scores, from 0.5 on, or the best of a detector that has few "
        "such scores. A class has the same colour everywhere. A label that would hide a small object is left out."
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
        "From top to bottom: a held-out image, the patches that the encoder saw, the prediction of the decoder, and "
        "both together. The model predicts normalised patches. Each patch is shown with the true mean and contrast of "
        "its pixels. After so short a pretraining, the prediction has little structure inside a patch: "
        "docs/pretraining.md shows a longer one. The fusion weights show how every decoder block mixes the encoder's "
        "maps."
    )
    return page.Section("Reconstructions", text, blocks)


def pretraining_section(run: RunFolder, inputs: PageInputs) -> page.Section:
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
        "held-out loss is measured on images that pretraining does not see. Nearest neighbours is "
        f"{inputs.neighbours}. The first values are from step 0, before any training."
    )
    if rates := log.values("images_per_second"):
        text += f" The median speed was {np.median(rates):.0f} images per second."
    return replace(sections.training_section(run, log, PRETRAIN_LOG, "step", plots, text), title="Pretraining")


def detector_section(run: RunFolder, arms: Sequence[Arm]) -> page.Section:
    """Plot the total losses of the detectors."""
    rows = [{"step": row["step"], arm.start: row["loss"]} for arm in arms for row in arm.log.rows if "loss" in row]
    missing = [run.missing(arm.file(LOG), f"loss from {arm.start}") for arm in arms if not arm.log.rows]
    text = "The total loss of Mask R-CNN is the sum of the losses of proposals, classes, boxes and masks."
    labels = {arm.start: f"from {arm.start}" for arm in arms if arm.log.rows}
    source = Path(" and ".join(arm.file(LOG) for arm in arms))
    plots = curve_plots(rows, source, "step", {"Total loss": ("loss", labels)}) if labels else []
    return page.Section("Detector training", text, [*plots, *missing])


def facts(arms: Sequence[Arm], record: Stages, unfinished: Mapping[str, str]) -> list[page.Fact]:
    """List the headline numbers that are available."""
    found = []
    for task, word in reversed(TASKS.items()):
        for arm in reversed(arms):
            numbers = arm.results.numbers.get(task) if arm.results else None
            if numbers:
                value = page.percent(numbers["AP"] and numbers["AP"] / 100)
                found.append(page.Fact(f"{word.capitalize()} AP", value, f"from {arm.start}, one seed"))
    if any(stage.status == "done" for stage in record.stages):
        seconds, memory = record.totals
        which = "the stages that are done" if unfinished else "all stages, one after the other"
        found.append(page.Fact("Time", seconds, which))
        found.append(page.Fact("Peak memory", memory, f"of the largest {'of these stages' if unfinished else 'stage'}"))
    return found


def environment() -> list[tuple[str, str]]:
    """List facts about machine and versions as (name, value) pairs."""
    import detectron2  # slow import
    import torch  # slow import

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


def data_section(inputs: PageInputs) -> page.Section:
    """Describe images, labels and machine."""
    table = page.Table(["", ""], [[name, text] for name, text in inputs.facts.items()])
    return page.Section("Data", "", [table])


def next_section(
    run: RunFolder, inputs: PageInputs, arms: Sequence[Arm], unfinished: Mapping[str, str]
) -> page.Section:
    """Show what can be done with the results."""
    wanted: dict[str, list[str]] = {}
    if arms and arms[-1].results and inputs.val:
        weights, val = str(run.path / arms[-1].folder), inputs.val
        wanted["Find objects in other images"] = [*("predict.py", "--weights", weights, "IMAGES", "--output", "found")]
        wanted["Evaluate on other labels"] = [
            *("train_net.py", "--config-file", f"{weights}/config.yaml", "--eval-only"),
            *("--val-json", str(run.path / val.json_path), "--val-images", str(run.path / val.images)),
            *(f"MODEL.WEIGHTS={weights}", "OUTPUT_DIR=evaluation"),
        ]
        wanted["Export"] = ["export_detector.py", "--weights", weights, "--output", "detector.onnx"]
    if "pretrain" not in unfinished:
        wanted["Convert the pretrained encoder"] = [
            *("convert_checkpoint.py", str(run.path / "pretrain"), "encoder-timm", "--to", "timm")
        ]
    text = "First repeat the command of this run, which continues it." if unfinished else ""
    return page.Section("What next", text, [sections.commands(wanted)] if wanted else [])


def build_report(
    run: RunFolder,
    inputs: PageInputs,
    record: Stages,
    arms: Sequence[Arm],
    truth: dict[str, Any] | None,
    differences: Mapping[str, ApDifference],
) -> page.Report:
    """Build the page from the files in the folder of a run."""
    unfinished = record.unfinished(inputs.stages)
    detection = [
        comparison_section(run, inputs, arms, differences),
        prediction_section(run, inputs, arms, truth),
        class_section(run, arms),
    ]
    shown = [
        *(detection if arms else []),
        reconstruction_section(run),
        pretraining_section(run, inputs),
        *([detector_section(run, arms)] if arms else []),
        *([data_section(inputs)] if inputs.facts else []),
        next_section(run, inputs, arms, unfinished),
        stage_section(run, record, inputs.plan, unfinished),
    ]
    lead = inputs.lead or (LEAD if arms else PRETRAINED_ONLY)
    lead = record.describe(unfinished) if unfinished else lead
    return page.Report(inputs.title, lead, facts(arms, record, unfinished), shown, environment())


def summary(
    arms: Sequence[Arm], differences: Mapping[str, ApDifference], unfinished: str = "", doubts: Sequence[str] = ()
) -> str:
    """Format the results for a terminal.

    Args:
        doubts: why a detector may find almost nothing.
        unfinished: what is not finished, in words; "" for a finished run.
    """
    if unfinished:
        return "\n".join(textwrap.wrap(unfinished, 110)) + "\n"
    if not arms:
        return "No labels, so no detector was trained. The page has reconstructions and curves.\n"
    lines = ["COCO average precision on held-out images, in percent, one seed each", ""]
    lines.append(f"{'':<18}{''.join(f'{key:>11}' for key in HEADLINES)}")
    for arm in arms:
        cells = ("-" if value is None else f"{value:.1f}" for value in headlines(arm.results))
        lines.append(f"{arm.start:<18}" + "".join(f"{cell:>11}" for cell in cells))
    text = verdict(differences) if len(arms) > 1 else ONE_RUN
    text = advise(explain_low_ap(arms, doubts) + text)
    return "\n".join([*lines, "", *textwrap.wrap(text, 110)]) + "\n"


def main(argv: Sequence[str] | None = None) -> None:
    """Write the page and the summary."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="output folder of `crossmae run` or the demo, such as outputs/run")
    run = RunFolder(parser.parse_args(argv).folder)
    if not run.path.is_dir():
        raise UserError(f"{run.path}: no such folder. Run tools/run.py first.")
    inputs = PipelineRecord.read(run.path / PIPELINE_RECORD).page
    record = run.read(RECORDS, Stages.read, Stages())
    arms = read_arms(run, inputs, record)
    truth = run.read(inputs.annotations, read_coco, None) if arms else None
    differences = ap_differences(run, inputs, arms, truth)
    target = run.path / "report.html"
    build_report(run, inputs, record, arms, truth, differences).write(target)
    left = record.unfinished(inputs.stages)
    text = summary(arms, differences, record.describe(left) if left else "", inputs.doubts)
    write_text(run.path / "summary.txt", text)
    print(f"wrote {target}, {target.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    run_cli(main)
