"""The flow of the pipeline: look, split, measure, plan, pretrain, detect, report.

Everything that is decided lands in pipeline.json of the output folder. So the same command continues after an
interruption, and tools/report.py can write the page again.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from crossmae import __version__
from crossmae.checkpoints.reading import PIPELINE_DETECTOR, PIPELINE_RECORD
from crossmae.data.sources.source import Source, evenly_spaced
from crossmae.errors import UserError, counted
from crossmae.experiments.commands import busy_share, describe_machine
from crossmae.experiments.pipeline.inputs import (
    ImageFacts,
    describe_labels,
    images_next_to,
    labelled_paths,
    look_at_images,
    object_share,
    open_files,
    write_list,
    write_object_crops,
)
from crossmae.experiments.pipeline.plan import (
    FEWEST_DETECT_EPOCHS,
    PAGE_SECONDS,
    PRETRAIN_SHARE,
    SMALL_OBJECT,
    TimePlan,
    Timing,
    describe_plan,
    detect_steps_left,
    is_too_short,
    list_doubts,
    make_plan,
    planned_stages,
    refuse_short_budget,
)
from crossmae.experiments.pipeline.trainings import (
    LAPTOP,
    ONE_GPU,
    START_SECONDS,
    LabelledSplit,
    Recipe,
    Trainings,
    choose_size,
    images_per_step,
    settings_of_weights,
    smaller_size,
    time_detection,
    time_pretraining,
)
from crossmae.experiments.pipeline.typed import DIGEST_OF, command_of, describe_changes
from crossmae.experiments.stages import RECORDS, RESUME, Stage, run_stages
from crossmae.files import read_json, read_json_lines, sha256, write_json, write_text
from crossmae.files.claim import claim
from crossmae.reports.page import format_seconds
from crossmae.training.config import resolve_config_path

RECORD, PAGE = PIPELINE_RECORD, "report.html"
HELD_OUT, HELD_OUT_EVERY = 100, 20  # without labels: at most so many images, one of so many, for the held-out loss
MOST_BUSY = 0.25  # share of the cores that other programs may use without a warning
OWN, RANDOM = PIPELINE_DETECTOR, "detect-random"  # stages
# Key in the log of pretraining, what it tells about, words, factor, and 1 if larger is better.
FEATURE_CHECKS = (
    ("knn_accuracy", "features", "nearest neighbours (%)", 100.0, 1),
    ("val_loss", "reconstruction of held-out images", "loss", 1.0, -1),
)
STARTS = {RANDOM: "random weights", OWN: "own pretraining"}  # what the detectors start from


@dataclass(frozen=True)
class Request:
    """A request of the user.

    Attributes:
        images: images to pretrain on. labels: labels in any format; None: no detector.
        budget: seconds for everything.
        weights: where pretraining starts; None: random weights.
        pretrain_share: percent of the training time for pretraining.
        val_share: share of the labelled images that are held out, if the labels have no split of their own; None: the
            default of tools/split_labels.py.
        by_folder: images of a folder are all held out, or none of them.
        compare: train the same detector from random weights, too.
        size: longest side of the images that the detector sees; None: chosen by the images and the budget.
    """

    images: Path
    labels: Path | None
    output: Path
    budget: float
    weights: Path | None = None
    pretrain_share: float = PRETRAIN_SHARE
    val_share: float | None = None
    by_folder: bool = False
    compare: bool = False
    size: int | None = None
    seed: int = 0
    pretrain_settings: tuple[str, ...] = ()
    detect_settings: tuple[str, ...] = ()

    @property
    def stage_count(self) -> int:
        """Number of stages."""
        return 2 if self.labels is None else 4 + 2 * self.compare

    @property
    def detectors(self) -> list[str]:
        """Names of the stages that train detectors, in their order."""
        return [] if self.labels is None else [RANDOM, OWN] if self.compare else [OWN]


@dataclass(frozen=True)
class Decision:
    """Everything that was measured and decided before the first training.

    Attributes:
        batch: images of a step of pretraining.
        size: longest side of the images that the detector sees, in pixels.
        detect_timing: None: no detector.
        facts: images, labels and machine in words, by heading.
        detect_steps: steps of a detector, decided when pretraining has ended; None: not yet.
    """

    plan: TimePlan
    trainings: Trainings
    batch: int
    size: int
    detect_timing: Timing | None
    facts: dict[str, str]
    detect_steps: int | None = None


_DECISION, _REQUEST = TypeAdapter(Decision), TypeAdapter(Request)


def run_pipeline(request: Request, *, dry_run: bool = False, fresh: bool = False) -> None:
    """Run the unfinished stages of a request.

    Args:
        dry_run: stop after the plan.
        fresh: decide and run everything again.

    Raises:
        UserError: inputs do not fit, the budget is too short, a stage failed, or the folder holds another request.
    """
    with claim(request.output, "pipeline", "--output"):
        check_request(request, fresh=fresh)
        stages = list_stages(request, time.monotonic(), dry_run=dry_run)
        run_stages(stages, request.output, total=request.stage_count, fresh=fresh)


def check_request(request: Request, *, fresh: bool = False) -> None:
    """Compare a request with the request of the folder, and record it.

    Until a training has started, another request replaces the earlier one. Measurements of its speed are kept.

    Raises UserError if they differ.
    """
    path, ours = request.output / RECORD, _REQUEST.dump_python(request, mode="json") | {"version": __version__}
    for key in ("labels", "weights"):
        if (file := getattr(request, key)) and file.is_file():
            ours[f"{DIGEST_OF}{key}"] = sha256(file)
    known = read_json(path).get("request") if path.is_file() and not fresh else None
    if known is None or (known != ours and not has_training(request.output)):
        write_json(path, {"request": ours})
        return
    if changes := describe_changes(known, ours):
        raise UserError(
            f"--output: {request.output} holds a run with {changes}. Repeat the command of that run, name another "
            "folder, or add --fresh."
        )


def has_training(output: Path) -> bool:
    """Check whether a training of the folder has started."""
    path = output / RECORDS
    return path.is_file() and any(stage["name"] == "pretrain" for stage in read_json(path)["stages"])


def list_stages(request: Request, started: float, *, dry_run: bool = False) -> Iterator[Stage]:
    """Yield the stages, each when it can be decided.

    Args:
        started: time of `time.monotonic` at the start of the command.
    """
    output = request.output
    decided = read_json(output / RECORD).get("decision")
    look = None if decided else look_around(request)  # first: the split would complain about the wrong folder
    if request.labels is not None:
        yield split_stage(request)
    if look:
        decision = decide(request, look, started)
        keep(request, decision)
    else:
        decision = _DECISION.validate_python(decided)
    print_plan(decision, doubts_of(request, decision))
    if dry_run:
        return
    yield pretrain_stage(request, decision)
    crops = sum(1 for _ in decision.trainings.objects.glob("val/*/*")) if decision.trainings.objects else 0
    told = describe_features(output / "pretrain" / "log.jsonl", crops)
    print("\n".join(told), flush=True)
    decision = replace(decision, facts=decision.facts | {"After pretraining": ". ".join(told)})
    keep(request, decision)
    if decision.plan.detect:
        if request.compare:
            yield start_stage(request, decision)
        if decision.detect_steps is None:
            decision = replace(decision, detect_steps=choose_detect_steps(request, decision))
            keep(request, decision)
            print_steps(decision)
        for name in request.detectors:
            yield detect_stage(request, decision, name)
    yield report_stage(output)


def keep(request: Request, decision: Decision) -> None:
    """Record a decision, and what the page needs."""
    path, trainings = request.output / RECORD, decision.trainings
    command = command_of(_REQUEST.dump_python(request, mode="json", exclude_defaults=True))
    budget = (
        f"{format_seconds(request.budget)}. Looking at the data and measuring this machine took "
        f"{format_seconds(decision.plan.spent)}, which the time of the stages does not contain"
    )
    page: dict[str, Any] = {
        "title": f"{'A detector for' if request.labels else 'Pretraining on'} {request.images.name}",
        "facts": {"Command": command, "Budget": budget} | decision.facts,
        "plan": [
            stage._asdict() for stage in planned_stages(decision.plan, sizes_in_words(decision), decision.detect_steps)
        ],
        "arms": {name: STARTS[name] for name in request.detectors},
        "doubts": doubts_of(request, decision),
    }
    for split in ("train", "val"):
        if part := getattr(trainings, split):
            page[split] = {"json": str(part.json), "images": str(part.images)}
    decided = _DECISION.dump_python(decision, mode="json")
    write_json(path, read_json(path) | {"decision": decided, "page": page})


@dataclass(frozen=True)
class Look:
    """Images and machine before anything was written.

    Attributes:
        facts: images and machine in words, by heading.
    """

    source: Source
    images: ImageFacts
    recipe: Recipe
    facts: dict[str, str]


def look_around(request: Request) -> Look:
    """Look at images and machine, and describe them.

    Raises UserError if no image can be read, or if no machine could keep the budget.
    """
    pretraining = 2 * START_SECONDS  # to measure it, and to run it
    refuse_short_budget(request.budget, PAGE_SECONDS + pretraining + detector_starts(request), at_least=True)
    source = open_files(request.images, "IMAGES")
    images = look_at_images(source, "IMAGES")
    recipe, machine = choose_recipe()
    facts = {"Images": images.describe(), "Machine": machine}
    for key, text in facts.items():
        print(f"{key.lower()}: {text}", flush=True)
    if (busy := busy_share()) > MOST_BUSY:
        print(
            f"machine: other programs use {busy:.0%} of its cores. Measured times will be longer than on an idle "
            "machine, and the plan shorter. Stop these programs for more training in the same time.",
            flush=True,
        )
    return Look(source, images, recipe, facts)


def decide(request: Request, look: Look, started: float) -> Decision:
    """Read the split, measure this machine, and plan.

    Args:
        started: time of `time.monotonic` at the start of the command.
    """
    recipe, facts = look.recipe, dict(look.facts)
    trainings, count, labels = prepare_inputs(request, recipe, look.source, look.images)
    facts |= labels
    batch = images_per_step(recipe, count, trainings.pretrain_settings)
    print("measuring some steps of pretraining, with its start and evaluations", flush=True)
    pretrain = (count, time_pretraining(trainings, batch, count))
    known = time.monotonic() - started + PAGE_SECONDS + pretrain[1].overhead
    refuse_short_budget(request.budget, known + detector_starts(request), at_least=True)
    size = request.size or choose_size(recipe, look.images.long_side[1])

    def plan_for(size: int) -> tuple[TimePlan, Timing | None]:
        if trainings.train:
            print(f"measuring some steps of a detector on images of {size} pixels", flush=True)
        timing = time_detection(trainings, size) if trainings.train else None
        detect = (trainings.train.count, timing) if trainings.train and timing else None
        spent = time.monotonic() - started
        share, detectors = request.pretrain_share, len(request.detectors)
        plan = make_plan(
            request.budget, spent, pretrain=pretrain, detect=detect, detectors=detectors, pretrain_share=share
        )
        return plan, timing

    plan, timing = plan_for(size)
    least = SMALL_OBJECT / trainings.object_share if trainings.object_share else 0.0
    while request.size is None and plan.detect and is_too_short(plan.detect):
        smaller = smaller_size(recipe, size, plan.detect.epochs, FEWEST_DETECT_EPOCHS, least)
        if smaller is None:
            break
        size = smaller
        plan, timing = plan_for(size)
    if plan.pretrain and plan.pretrain.images < count:
        write_list(open_files(trainings.pretrain_list, "IMAGES"), (), plan.pretrain.images, trainings.pretrain_list)
    return Decision(plan, trainings, batch, size, timing, facts)


def detector_starts(request: Request) -> float:
    """Return the seconds in which detectors start.

    They start once to be measured, and then each to be trained.
    """
    return START_SECONDS * (1 + len(request.detectors)) if request.detectors else 0.0


def choose_recipe() -> tuple[Recipe, str]:
    """Choose the recipe for this machine, and describe the machine."""
    found = describe_machine()
    gpu, cores = found["gpu"], counted(found["cores"], "core")
    return (ONE_GPU if gpu else LAPTOP), f"{found['processor']}, {cores}, {gpu or 'no GPU'}"


def prepare_inputs(
    request: Request, recipe: Recipe, source: Source, images: ImageFacts
) -> tuple[Trainings, int, dict[str, str]]:
    """Write the lists of images and the crops of objects.

    Returns the inputs of the trainings, the number of images for pretraining, and the labels in words, by heading.
    """
    output = request.output
    about, contents = dict[str, Any](), dict[str, Any]()
    train = val = objects = None
    held_out, next_to = list[str](), list[str]()
    has_masks, share = False, 0.0
    if request.labels is not None:
        about = read_json(output / "data/split.json")
        train, val = read_split(output / "data", about)
        contents = {name: read_json(output / f"data/{name}.json") for name in about["images"]}
        held_out = labelled_paths(contents["val"], val.images)
        if request.by_folder:
            next_to = images_next_to(source, held_out, labelled_paths(contents["train"], train.images))
        has_masks = all(one.get("segmentation") for part in ("train", "val") for one in contents[part]["annotations"])
        share = object_share(contents["train"])
        crops = {
            part: write_object_crops(contents[part], one.images, part, output / "objects")
            for part, one in (("train", train), ("val", val))
        }
        objects = output / "objects" if all(crops.values()) else None
    else:
        chosen = evenly_spaced(len(source), min(HELD_OUT, len(source) // HELD_OUT_EVERY))
        held_out = [source.name(index) for index in chosen]
    count = write_list(source, [*held_out, *next_to], None, output / "pretrain.txt")
    if held_out:
        write_text(output / "held-out.txt", "".join(f"{Path(name).resolve()}\n" for name in held_out))
    fitting: tuple[tuple[str, ...], tuple[str, ...]] = ((), ())
    if request.weights:
        fitting = settings_of_weights(request.weights, recipe)
    trainings = Trainings(
        recipe=recipe,
        output=output,
        pretrain_list=output / "pretrain.txt",
        val_list=output / "held-out.txt" if held_out else None,
        objects=objects,
        train=train,
        val=val,
        has_masks=has_masks,
        has_broken=bool(images.broken),
        weights=request.weights,
        seed=request.seed,
        pretrain_settings=(*fitting[0], *request.pretrain_settings),
        detect_settings=(*fitting[1], *request.detect_settings),
        object_share=share,
    )
    return trainings, count, describe_labels(trainings, about, contents, len(next_to)) if about else {}


def read_split(folder: Path, about: Mapping[str, Any]) -> tuple[LabelledSplit, LabelledSplit]:
    """Find the two sides of a split.

    Args:
        folder: what tools/split_labels.py wrote. about: the content of its split.json.
    """
    folders = about["images"]
    if lacking := [name for name in ("train", "val") if name not in folders]:
        raise UserError(
            f"--labels: they have the splits {' and '.join(folders)}, and no {lacking[0]}. Split them again with "
            "tools/split_labels.py LABELS --again --output OUT, and name OUT."
        )
    counts = {name: about["counts"][name]["images"] for name in ("train", "val")}
    counts["train"] -= about["counts"]["train"]["empty"]  # the detector leaves them out
    train, val = (LabelledSplit(folder / f"{name}.json", Path(folders[name]), count) for name, count in counts.items())
    return train, val


def sizes_in_words(decision: Decision) -> list[str]:
    """Describe what pretraining and detection see."""
    config = decision.trainings.recipe.config(decision.trainings.pretrain_settings)
    heads = "Mask R-CNN" if decision.trainings.has_masks else "Faster R-CNN"
    return [
        f"{config.model.name} on crops of {config.model.img_size} pixels, {decision.batch} images a step",
        f"{heads} on images of {decision.size} pixels, {decision.trainings.detect_batch} images a step",
    ]


def doubts_of(request: Request, decision: Decision) -> list[str]:
    """List the reasons why the detector may find almost nothing."""
    if decision.plan.detect is None or decision.detect_timing is None:
        return []
    return list_doubts(
        decision.plan,
        decision.detect_steps or decision.plan.detect.steps,
        decision.detect_timing,
        object_pixels=decision.trainings.object_share * decision.size,
        pretrain_share=request.pretrain_share,
    )


def print_plan(decision: Decision, doubts: Sequence[str] = ()) -> None:
    """Print the plan, and why the detector may find almost nothing."""
    print(f"plan:\n{describe_plan(decision.plan, sizes_in_words(decision))}")
    if doubts:
        print(f"warning: this detector may find almost nothing ({'; '.join(doubts)})")
    print("stop any time with Ctrl-C; the same command continues", flush=True)


def split_stage(request: Request) -> Stage:
    """Build the stage that reads and splits the labels."""
    folder = request.output / "data"
    words: tuple[str, ...] = (str(request.labels), "--images", str(request.images), "--output", str(folder))
    words = (*words, "--seed", str(request.seed))
    if request.val_share is not None:
        words = (*words, "--val", f"{request.val_share:g}")
    words = (*words, "--by-folder") if request.by_folder else words
    return Stage(
        "split", "Read the labels, and hold out images for validation", "tools/split_labels.py", words, ("data",)
    )


def pretrain_stage(request: Request, decision: Decision) -> Stage:
    """Build the stage of pretraining."""
    trainings, length = decision.trainings, decision.plan.pretrain
    assert length is not None
    words = (*trainings.pretrain_words(length, decision.batch, request.output / "pretrain"), RESUME)
    title = "Continue pretraining from your weights" if request.weights else "Pretrain CrossMAE, without labels"
    config = resolve_config_path(trainings.recipe.pretrain)
    return Stage("pretrain", title, "tools/pretrain.py", words, ("pretrain",), config)


def start_stage(request: Request, decision: Decision) -> Stage:
    """Build the stage that writes the random weights of the comparison."""
    words = decision.trainings.start_words(decision.batch, request.output / "start")
    title = "Write the random weights that pretraining starts from"
    config = resolve_config_path(decision.trainings.recipe.pretrain)
    return Stage("start", title, "tools/pretrain.py", words, ("start",), config)


def detect_stage(request: Request, decision: Decision, name: str) -> Stage:
    """Build the stage of a detector."""
    weights = request.output / ("start" if name == RANDOM else "pretrain")
    steps = decision.detect_steps
    assert steps is not None
    words = (*decision.trainings.detect_words(steps, decision.size, weights, request.output / name), RESUME)
    title = f"Train a detector from {STARTS[name]}, and evaluate it on held-out images"
    config = resolve_config_path(decision.trainings.recipe.detect)
    return Stage(name, title, "tools/train_net.py", words, (name,), config)


def report_stage(output: Path) -> Stage:
    """Build the stage of the page."""
    return Stage("report", "Put it all on one page", "tools/report.py", (str(output),), (PAGE, "summary.txt"))


def choose_detect_steps(request: Request, decision: Decision) -> int:
    """Choose the steps of a detector by the time that is left."""
    assert decision.detect_timing is not None
    assert decision.trainings.train is not None
    records = {one["name"]: one["seconds"] for one in read_json(request.output / RECORDS)["stages"]}
    spent = decision.plan.spent + sum(records.get(name, 0.0) for name in ("pretrain", "start"))
    return detect_steps_left(decision.plan, spent, decision.detect_timing, decision.trainings.train.count)


def print_steps(decision: Decision) -> None:
    """Print the steps of a detector if the plan had clearly others."""
    planned, steps = decision.plan.detect.steps if decision.plan.detect else 0, decision.detect_steps
    if steps is not None and abs(steps - planned) > planned / 20:
        reason = "less" if steps > planned else "more"
        print(
            f"detector: {counted(steps, 'step')} in place of {planned:,}, because the stages before it took {reason} "
            "time than planned",
            flush=True,
        )


def describe_features(log_path: Path, crops: int = 0) -> list[str]:
    """Tell whether features and reconstruction improved in pretraining.

    Args:
        crops: number of held-out crops that nearest neighbours are measured on. Smaller differences than two standard
            errors are no improvement.
    """
    rows, told = read_json_lines(log_path), list[str]()
    for key, subject, name, unit, better in FEATURE_CHECKS:
        values = [unit * row[key] for row in rows if key in row]
        if len(values) < 2:
            continue
        chance = unit * chance_of(values[0] / unit, values[-1] / unit, crops) if key == "knn_accuracy" else 0.0
        change = better * (values[-1] - values[0])
        worse = "did not clearly change" if abs(change) < chance else "did not improve"
        verdict = "improved" if change > chance else worse
        of_crops = f" (of {crops:,} crops, differences below {chance:.2g} may be chance)" if chance else ""
        advice = "" if change > chance else ". Give a longer --budget, more images, or --weights"
        told.append(
            f"{subject} {verdict}: {name} {values[0]:.3g} at step 0, {values[-1]:.3g} at the end{of_crops}{advice}"
        )
    return told


def chance_of(before: float, after: float, crops: int) -> float:
    """Compute two standard errors of the difference of two shares.

    Args:
        crops: number of crops that each share is of; 0 gives 0.
    """
    share = (before + after) / 2
    return 2 * math.sqrt(2 * share * (1 - share) / crops) if crops else 0.0
