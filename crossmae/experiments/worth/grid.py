"""The runs of the question: pretraining, and fine-tuning from each start, at each number of labels, for each seed."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from crossmae.errors import UserError
from crossmae.experiments.cells import Cell, Step
from crossmae.experiments.worth.inputs import LabelledPart, Labels
from crossmae.files import read_json, read_json_lines
from crossmae.models.sizes import model_arguments
from crossmae.pretraining.config import load_config

# The starts of the encoder, in the order of the runs: the shortest way to a first answer.
ARMS = (
    "random_pretraining_init",
    "own",
    "random_same_rates",
    "random_detector_init",
    "weights",
    "continued",
    "random_equal_compute",
)
NEEDS_WEIGHTS = ("weights", "continued")
EQUAL_COMPUTE, SAME_RATES = "random_equal_compute", "random_same_rates"
USUAL_ARMS = tuple(arm for arm in ARMS if arm not in (EQUAL_COMPUTE, *NEEDS_WEIGHTS))
MINOR_CONTROLS = (SAME_RATES, "random_detector_init")
PRETRAINED = {"own": "pretrain-own", "continued": "pretrain-continued"}
APS_OF_RESULTS = (
    ("segm", "AP", "mask_AP"),
    ("bbox", "AP", "box_AP"),
    ("segm", "AP50", "mask_AP50"),
    ("bbox", "AP50", "box_AP50"),
)
EPOCHS_OF_LABELS = 50  # passes over all labelled images that decide the number of fine-tuning steps, within limits
HELD_OUT_IMAGES = 256  # images of the held-out loss of pretraining
TIMED_PRETRAINING, TIMED_FINE_TUNING = 12, 20  # steps of a timing run. A detector logs its speed every 20 steps


@dataclass(frozen=True)
class Preset:
    """Configs of one size, and limits of the numbers of steps.

    Attributes:
        pretrain, detect, classify: names of the configs.
        detect_batch: images per step of the detector.
        pretrain_steps, fine_tune_steps: fewest and most steps, unless the user gives other numbers.
        detect_settings: changes of the detector's config.
    """

    pretrain: str
    detect: str
    classify: str
    detect_batch: int
    pretrain_steps: tuple[int, int]
    fine_tune_steps: tuple[int, int]
    detect_settings: tuple[str, ...] = ()

    def encoder(self, settings: Sequence[str] = ()) -> dict[str, Any]:
        """Return name and arguments of the model that is pretrained."""
        config = load_config(self.pretrain, ["data.train=IMAGES", "output_dir=OUT", *settings])
        return {"name": config.model.name} | model_arguments(config.model.name) | config.model.arguments()


PRESETS = {
    "demo": Preset(
        "pretrain/demo.yaml",
        "demo_mask_rcnn.yaml",
        "finetune/small.yaml",
        8,
        (450, 1500),
        (200, 400),
        ("SOLVER.LAYER_DECAY=0.7",),  # the config's 1.0 overwrites what pretraining learned
    ),
    "small": Preset(
        "pretrain/small.yaml", "small_mask_rcnn.yaml", "finetune/small.yaml", 8, (3000, 30000), (1000, 10000)
    ),
    "base": Preset(
        "pretrain/crossmae_vits_1gpu.yaml",
        "coco_mask_rcnn_vits.yaml",
        "finetune/vits.yaml",
        16,
        (5000, 100000),
        (2000, 40000),
        ("SOLVER.IMS_PER_BATCH=16", "SOLVER.ACCUMULATE=4"),
    ),
}


@dataclass(frozen=True)
class Budget:
    """Lengths of the runs, the same for all arms.

    Attributes:
        pretrain_epochs, warmup_epochs, pretrain_steps: length of pretraining.
        fine_tune_steps: steps of fine-tuning, the same for all shares.
        extra_steps: steps of fine-tuning that take as long as pretraining; 0: unknown.
    """

    pretrain_epochs: int
    warmup_epochs: float
    pretrain_steps: int
    fine_tune_steps: int
    extra_steps: int = 0


@dataclass(frozen=True)
class Question:
    """Everything that decides the runs.

    Attributes:
        images: unlabelled images; count: their number.
        output: folder for everything that is written.
        weights: the user's weights. None: without the arms that need them.
        shares: percentages of the labelled images.
        pretrain_settings, fine_tune_settings: changes of the configs, as KEY=VALUE.
    """

    images: Path
    count: int
    labels: Labels
    output: Path
    preset: Preset
    arms: tuple[str, ...]
    shares: tuple[float, ...]
    seeds: tuple[int, ...]
    weights: Path | None = None
    pretrain_settings: tuple[str, ...] = ()
    fine_tune_settings: tuple[str, ...] = ()


def choose_budget(question: Question, steps: int | None, extra_steps: int = 0) -> Budget:
    """Choose the lengths of the runs from the numbers of images.

    Args:
        steps: fine-tuning steps. None: 50 passes over all labelled images, within the limits of the size.
    """
    given = ["data.train=IMAGES", "output_dir=OUT", *question.pretrain_settings]
    config = load_config(question.preset.pretrain, given)
    batch = config.optim.images_per_process
    per_epoch = question.count // config.optim.batch_size // config.optim.accumulate
    if per_epoch < 1:
        raise UserError(
            f"IMAGES: {question.count} images do not fill a step of {batch}. Add images, or lower the size of a step: "
            f"--pretrain-set optim.batch_size={max(question.count, 1)} optim.accumulate=1"
        )
    schedule, (least, most) = config.schedule, question.preset.pretrain_steps
    epochs = schedule.epochs
    if not any(word.startswith("schedule.epochs=") for word in question.pretrain_settings):
        epochs = max(1, math.ceil(min(max(epochs * per_epoch, least), most) / per_epoch))
    warmup = round(schedule.warmup_epochs / schedule.epochs * epochs, 3)
    total = epochs * per_epoch
    total = total if schedule.max_steps is None else min(total, schedule.max_steps)
    images_per_step = question.preset.detect_batch if question.labels.task == "detect" else class_step(question)
    if steps is None:
        least, most = question.preset.fine_tune_steps
        steps = min(max(round(EPOCHS_OF_LABELS * question.labels.all_images / images_per_step), least), most)
    return Budget(epochs, warmup, total, steps, extra_steps)


def class_batch(question: Question) -> int:
    """Return the images that a classifier takes at a time, by default."""
    return min(32, min(question.labels.counts.values()))


def class_step(question: Question) -> int:
    """Return the images per step of a classifier in all shares.

    Raises UserError if the user wants more than the smallest share has.
    """
    smallest, pairs = min(question.labels.counts.values()), [one.split("=", 1) for one in question.fine_tune_settings]
    given = {key: int(value) for key, value in pairs if value.isdecimal()}
    images = given.get("optim.batch_size", class_batch(question)) * given.get("optim.accumulate", 1)
    if images > smallest:
        raise UserError(
            f"--fine-tune-set: a step has {images} images, but the smallest share only {smallest}. Lower "
            "optim.batch_size or optim.accumulate, or give larger --shares."
        )
    return max(images, 1)


def build_cells(question: Question, budget: Budget) -> list[Cell]:
    """List all runs, one seed after the other."""
    cells = []
    for seed in question.seeds:
        if {"random_pretraining_init", SAME_RATES, EQUAL_COMPUTE} & set(question.arms):
            cells.append(pretrain_cell(question, budget, "initial", seed))
        for arm in ("own", "continued"):
            if arm in question.arms:
                cells.append(pretrain_cell(question, budget, arm, seed))
        build = detect_cell if question.labels.task == "detect" else classify_cell
        cells += [build(question, budget, arm, share, seed) for share in question.shares for arm in question.arms]
    return cells


def runs_of(question: Question) -> Path:
    """Return the folder of the runs."""
    return question.output / "runs"


def pretrain_cell(question: Question, budget: Budget, arm: str, seed: int) -> Cell:
    """Build a pretraining run, or the weights that it starts with ("initial")."""
    name = f"initial-seed{seed}" if arm == "initial" else f"pretrain-{arm}-seed{seed}"
    run = runs_of(question) / name
    words = pretrain_words(question, budget, run, seed)
    facts: dict[str, Any] = {"kind": "pretrain", "arm": arm, "seed": seed, "images": question.count}
    if arm == "initial":
        words += ("schedule.max_steps=0",)
        facts |= {"kind": "initial", "arm": "random_pretraining_init"}
    else:
        facts["steps"] = budget.pretrain_steps
        words += held_out_words(question, budget)
    if arm == "continued":
        words += (f"model.init={question.weights}",)
    step = Step(words, run / "model.safetensors", ("--resume",), run, run)
    return Cell(name, facts, (step,), lambda: last_loss(run))


def pretrain_words(question: Question, budget: Budget, run: Path, seed: int) -> tuple[str, ...]:
    """Write the command of a pretraining run."""
    every = max(1, math.ceil(budget.pretrain_epochs / 8))
    return (
        "tools/pretrain.py",
        "--config-file",
        question.preset.pretrain,
        f"data.train={question.images}",
        "data.val=null",
        "probe.train=null",
        "probe.val=null",
        "health.band=[]",
        "log.pictures=0",
        f"schedule.epochs={budget.pretrain_epochs}",
        f"schedule.warmup_epochs={budget.warmup_epochs:g}",
        f"checkpoint.every_epochs={every}",
        "checkpoint.keep=1",
        f"runtime.seed={seed}",
        f"output_dir={run}",
        *question.pretrain_settings,
    )


def held_out_words(question: Question, budget: Budget) -> tuple[str, ...]:
    """Write the settings for the held-out loss at the end of pretraining."""
    val = question.labels.val
    root = (f"data.val_root={val.images}",) if val.images else ()
    every = f"validation.every_epochs={budget.pretrain_epochs}"
    return (f"data.val={val.labels}", *root, every, f"validation.images={HELD_OUT_IMAGES}")


def last_loss(run: Path) -> dict[str, float]:
    """Read the last held-out loss of a pretraining run."""
    losses = [row["val_loss"] for row in read_json_lines(run / "log.jsonl") if "val_loss" in row]
    return {"val_loss": losses[-1]} if losses else {}


def start_of(question: Question, arm: str, seed: int) -> tuple[str, tuple[str, ...]]:
    """Return the weights that an arm starts with, and the cells needed.

    The weights are "" for the initialisation of the fine-tuned model itself.
    """
    if arm == "random_detector_init":
        return "", ()
    if arm == "weights":
        return str(question.weights), ()
    cell = f"{PRETRAINED[arm]}-seed{seed}" if arm in PRETRAINED else f"initial-seed{seed}"
    return str(runs_of(question) / cell / "model.safetensors"), (cell,)


def fine_tune_facts(question: Question, budget: Budget, kind: str, arm: str, share: float, seed: int) -> dict[str, Any]:
    """Return the facts of a fine-tuning run."""
    facts = {"kind": kind, "arm": arm, "share": share, "labelled": question.labels.counts[share], "seed": seed}
    return facts | {"steps": budget.fine_tune_steps + (budget.extra_steps if arm == EQUAL_COMPUTE else 0)}


def even_rates(question: Question, arm: str, key: str) -> tuple[str, ...]:
    """Give all layers of random weights the full learning rate.

    Random weights have nothing in their lower layers to preserve. The arm with the rates of pretrained weights shows
    what this changes. The user's own setting of `key` wins.
    """
    given = any(word.startswith(f"{key}=") for word in question.fine_tune_settings)
    is_even = arm.startswith("random") and arm != SAME_RATES
    return (f"{key}=1.0",) if is_even and not given else ()


def detect_cell(question: Question, budget: Budget, arm: str, share: float, seed: int) -> Cell:
    """Build a run of the detector."""
    name = f"detect-{arm}-share{share:g}-seed{seed}"
    run, (weights, needs) = runs_of(question) / name, start_of(question, arm, seed)
    facts = fine_tune_facts(question, budget, "detect", arm, share, seed)
    train = question.labels.train[seed, share]
    words = detect_words(question, train, facts["steps"], run, seed)
    words += (*even_rates(question, arm, "SOLVER.LAYER_DECAY"), f"MODEL.WEIGHTS={weights}")
    step = Step(words, run / "results.json", ("--resume",), run, run)
    return Cell(name, facts, (step,), lambda: read_detection(run), needs)


def detect_words(question: Question, train: LabelledPart, steps: int, run: Path, seed: int) -> tuple[str, ...]:
    """Write the command of a detector's run, without its weights."""
    val = question.labels.val
    return (
        "tools/train_net.py",
        "--config-file",
        question.preset.detect,
        *("--train-json", str(train.labels), "--train-images", str(train.images)),
        *("--val-json", str(val.labels), "--val-images", str(val.images)),
        *question.preset.detect_settings,
        *(() if question.labels.has_masks else ("MODEL.MASK_ON=False",)),
        f"SOLVER.MAX_ITER={steps}",
        f"SOLVER.WARMUP_ITERS={max(1, steps // 20)}",
        f"SOLVER.CHECKPOINT_PERIOD={max(1, math.ceil(steps / 4))}",
        "SOLVER.CHECKPOINTS_KEPT=1",
        "TEST.EVAL_PERIOD=0",
        f"SEED={seed}",
        f"OUTPUT_DIR={run}",
        *question.fine_tune_settings,
    )


def read_detection(run: Path) -> dict[str, float]:
    """Read the AP of a detector in percent, and remove its weights."""
    results = read_json(run / "results.json")
    numbers = {
        name: float(results[task][key])
        for task, key, name in APS_OF_RESULTS
        if task in results and results[task].get(key) is not None
    }
    remove_weights(run, "model_*.safetensors")
    return numbers


def remove_weights(run: Path, *patterns: str) -> None:
    """Remove the weights of a finished run."""
    for pattern in patterns:
        for path in run.glob(pattern):
            path.unlink()


def classify_cell(question: Question, budget: Budget, arm: str, share: float, seed: int) -> Cell:
    """Build a run of the classifier."""
    name = f"classify-{arm}-share{share:g}-seed{seed}"
    run, (weights, needs) = runs_of(question) / name, start_of(question, arm, seed)
    facts = fine_tune_facts(question, budget, "classify", arm, share, seed)
    words = classify_words(question, question.labels.train[seed, share], facts["labelled"], facts["steps"], run, seed)
    start = (*even_rates(question, arm, "optim.layer_decay"), *((f"model.init={weights}",) if weights else ()))
    step = Step((*words, *start), run / "model.safetensors", ("--resume",), run, run)
    return Cell(name, facts, (step,), lambda: read_classification(run), needs)


def classify_words(
    question: Question, train: LabelledPart, labelled: int, steps: int, run: Path, seed: int
) -> tuple[str, ...]:
    """Write the command of a classifier's run, without its weights."""
    encoder, batch = question.preset.encoder(question.pretrain_settings), class_batch(question)
    sizes = [f"model.{key}={encoder[key]}" for key in ("img_size", "patch_size", "embed_dim", "depth", "num_heads")]
    name = encoder["name"].partition("_")[2]  # crossmae_vit_tiny_patch16 is vit_tiny_patch16 here
    epochs = math.ceil(steps / max(labelled // class_step(question), 1))
    return (
        "tools/finetune.py",
        "--config-file",
        question.preset.classify,
        f"data.train={train.labels}",
        f"data.val={question.labels.val.labels}",
        f"model.name={name}",
        *sizes,
        f"optim.batch_size={batch}",
        f"schedule.epochs={epochs}",
        f"schedule.warmup_epochs={epochs / 20:g}",
        f"schedule.max_steps={steps}",
        f"evaluation.every_epochs={epochs}",  # only the last weights count, not the best of many
        "evaluation.hardest=0",
        "evaluation.features=0",
        f"checkpoint.every_epochs={max(1, math.ceil(epochs / 4))}",
        f"runtime.seed={seed}",
        f"output_dir={run}",
        *question.fine_tune_settings,
    )


def read_classification(run: Path) -> dict[str, float]:
    """Read the accuracy of a classifier in percent, and remove its weights."""
    last = [row["top1"] for row in read_json_lines(run / "log.jsonl") if "top1" in row][-1]
    remove_weights(run, "checkpoints/*/*", "model_best.safetensors")
    return {"top1": 100 * last}


def timing_cells(question: Question, budget: Budget) -> list[Cell]:
    """Build one short run of each kind, to measure its seconds."""
    folder, seed, share = question.output / "timing", question.seeds[0], max(question.shares)
    cells = []
    if {*PRETRAINED} & set(question.arms):
        run = folder / "pretrain"
        words = pretrain_words(question, budget, run, seed)
        limit = f"schedule.max_steps={min(TIMED_PRETRAINING, budget.pretrain_steps)}"
        step = Step((*words, "log.every_steps=1", limit), run / "model.safetensors", folder=run)
        cells.append(Cell("pretrain", {"kind": "pretrain"}, (step,), timing_reader(run / "log.jsonl")))
    kind, train, run = question.labels.task, question.labels.train[seed, share], folder / question.labels.task
    if kind == "detect":
        words = (*detect_words(question, train, TIMED_FINE_TUNING, run, seed), "MODEL.WEIGHTS=")
        step = Step(words, run / "results.json", folder=run)
        cells.append(Cell(kind, {"kind": kind}, (step,), timing_reader(run / "log.jsonl")))
    else:
        labelled = question.labels.counts[share]
        words = (*classify_words(question, train, labelled, TIMED_FINE_TUNING, run, seed), "log.every_steps=1")
        step = Step(words, run / "model.safetensors", folder=run)
        cells.append(Cell(kind, {"kind": kind}, (step,), timing_reader(run / "log.jsonl")))
    return cells


def timing_reader(log_path: Path) -> Callable[[], dict[str, float]]:
    """Return a reader of a log's steps and a step's median seconds."""

    def read() -> dict[str, float]:
        rows = [row for row in read_json_lines(log_path) if "images_per_second" in row]
        record = read_json(next(log_path.parent.glob("checkpoints/*/run.json")))
        speeds = sorted(row["images_per_second"] for row in rows[len(rows) // 3 :])
        seconds = record["plan"]["images_per_step"] / speeds[len(speeds) // 2]
        return {"steps": rows[-1]["step"], "step_seconds": seconds}

    return read


def estimated(cells: Sequence[Cell], timings: Mapping[str, tuple[float, float]]) -> list[Cell]:
    """Give the cells their expected CPU seconds.

    Args:
        timings: CPU seconds without steps, and for each step, by kind.
    """

    def seconds(cell: Cell) -> float:
        kind = str(cell.facts["kind"])
        start, step = timings.get("pretrain" if kind == "initial" else kind, (0.0, 0.0))
        return start + step * float(cell.facts.get("steps") or 0)

    return [replace(cell, estimate=round(seconds(cell), 3)) for cell in cells]
