"""Cells of the study on Fashion-MNIST: pretraining, fine-tuning with 1,000 labels, and probes of frozen features."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from crossmae.errors import PROGRAMS
from crossmae.experiments.cells import Cell, Step
from crossmae.experiments.rows import Row
from crossmae.experiments.study.arms import (
    FASHION_ARMS,
    FASHION_BATCH,
    FASHION_EPOCHS,
    FASHION_MODEL,
    FASHION_PER_CLASS,
    FASHION_RATE_EPOCHS,
    FASHION_RATES,
    MASK_RATIO,
    SEEDS,
    Arm,
)
from crossmae.files import read_json, read_json_lines

SOURCE = "sources/fashion-mnist"  # link to the data set, so that no command names a place outside the study
FASHION_CLASSES = 10
RATE_ARMS = ("cross25_d6", "mae_d4")  # whose learning rates serve all arms of CrossMAE, and of MAE
# Expected CPU seconds, from short runs on one busy core of an Intel Xeon.
SECONDS_PER_EPOCH, SECONDS_PER_MAE_EPOCH, FINETUNE_SECONDS, PROBE_SECONDS = 43.0, 54.0, 170.0, 80.0


def rate_cells(folder: Path) -> list[Cell]:
    """List the cells that must be finished before learning rates are chosen.

    Args:
        folder: folder of the study. It has the link `sources/fashion-mnist`.
    """
    by_name = {arm.name: arm for arm in FASHION_ARMS}
    rates = [rate_cell(folder, by_name[name], lr) for lr in FASHION_RATES for name in RATE_ARMS]
    return [subset_cell(folder), *rates]


def arm_cells(folder: Path, rates: Mapping[str, float], seeds: Sequence[int] = SEEDS) -> list[Cell]:
    """List the cells of every arm, seed by seed.

    Args:
        rates: learning rates from `choose_rates`.
    """
    cells = []
    for seed in seeds:
        for arm in FASHION_ARMS:
            lr = rates[RATE_ARMS[arm.is_mae]]
            cells += [pretrain_cell(folder, arm, seed, lr), finetune_cell(folder, arm, seed)]
            cells.append(probe_cell(folder, arm, seed))
    return cells


def choose_rates(rows: Sequence[Row]) -> dict[str, float]:
    """Choose a learning rate for CrossMAE and one for MAE.

    The keys are RATE_ARMS. The best rate has the best kNN accuracy among the training pictures. Until all rates are
    measured, it is the middle one.
    """
    found: dict[str, dict[float, float]] = {name: {} for name in RATE_ARMS}
    for row in rows:
        if (row.facts.get("part"), row.facts.get("kind")) == ("fashion_mnist", "rate"):
            found[str(row.facts["arm"])][float(row.facts["lr"] or 0)] = row.numbers["knn_train"]
    middle = FASHION_RATES[len(FASHION_RATES) // 2]
    return {
        name: max(values, key=lambda lr: values[lr]) if values.keys() >= set(FASHION_RATES) else middle
        for name, values in found.items()
    }


def subset_cell(folder: Path) -> Cell:
    """Cut out the pictures that pretraining and probes see."""
    output = folder / "fashion_mnist" / "subset"
    words = ("--source", str(folder / SOURCE), "--output", str(output), "--per-class", str(FASHION_PER_CLASS))
    step = Step(("-m", "crossmae.experiments.study.idx_subset", *words), output / "train-images-idx3-ubyte.gz")
    facts = {"part": "fashion_mnist", "kind": "subset"}
    count = float(FASHION_CLASSES * FASHION_PER_CLASS)
    return Cell("fashion-subset", facts, (step,), lambda: {"images": count}, estimate=10)


def pretrain_words(folder: Path, arm: Arm, seed: int, output: Path, epochs: int, lr: float) -> tuple[str, ...]:
    """Compose the command that pretrains an arm."""
    return (
        "tools/pretrain.py",
        "--config-file",
        "pretrain/fashion_mnist.yaml",
        f"data.train={folder / 'fashion_mnist' / 'subset'}",
        f"data.val={folder / SOURCE}",
        "data.workers=0",
        *arm.words,
        f"optim.batch_size={FASHION_BATCH}",
        f"optim.lr={lr:g}",
        f"schedule.epochs={epochs}",
        f"validation.every_epochs={FASHION_RATE_EPOCHS}",
        f"checkpoint.every_epochs={FASHION_RATE_EPOCHS}",
        f"runtime.seed={seed}",
        f"output_dir={output}",
    )


def resumed(words: tuple[str, ...], output: Path, last: str) -> Step:
    """Make a step of a command that can continue from its checkpoints."""
    return Step(words, output / last, ("--resume",), output / "checkpoints")


def pretrain_cell(folder: Path, arm: Arm, seed: int, lr: float) -> Cell:
    """Pretrain an arm.

    Random weights come from a run that ends before its first step.
    """
    output = folder / "fashion_mnist" / f"{arm.name}-{seed}" / "pretrain"
    words = pretrain_words(folder, arm, seed, output, arm.epochs or FASHION_EPOCHS, lr)
    words += () if arm.epochs else ("schedule.max_steps=0",)
    per_epoch = SECONDS_PER_MAE_EPOCH if arm.is_mae or arm.predicted == MASK_RATIO else SECONDS_PER_EPOCH
    return Cell(
        f"fashion-pretrain-{arm.name}-seed{seed}",
        fashion_facts("pretrain", arm, seed) | {"epochs": arm.epochs, "lr": lr if arm.epochs else None},
        (resumed(words, output, "model.safetensors"),),
        lambda: pretraining_numbers(output, arm, FASHION_MODEL, FASHION_CLASSES * FASHION_PER_CLASS * arm.epochs),
        needs=("fashion-subset",),
        estimate=10 + per_epoch * (arm.epochs or 0.3),
    )


def finetune_cell(folder: Path, arm: Arm, seed: int) -> Cell:
    """Fine-tune with 1,000 labels, and evaluate once, at the end."""
    place = folder / "fashion_mnist" / f"{arm.name}-{seed}"
    output = place / "finetune"
    words = (
        "tools/finetune.py",
        "--config-file",
        "finetune/fashion_mnist.yaml",
        f"data.train={folder / SOURCE}",
        f"data.val={folder / SOURCE}",
        "data.workers=0",
        f"model.init={place / 'pretrain'}",
        # Random weights have nothing in their lower layers to preserve: no decay of their learning rates.
        *(() if arm.epochs else ("optim.layer_decay=1",)),
        f"runtime.seed={seed}",
        f"output_dir={output}",
    )
    return Cell(
        f"fashion-finetune-{arm.name}-seed{seed}",
        fashion_facts("finetune", arm, seed) | {"labelled": 1000},
        (resumed(words, output, "report.html"),),
        lambda: {"top1": 100 * read_json(PROGRAMS / output / "evaluation" / "evaluation.json")["numbers"]["top1"]},
        needs=(f"fashion-pretrain-{arm.name}-seed{seed}",),
        estimate=FINETUNE_SECONDS,
    )


def probe_cell(folder: Path, arm: Arm, seed: int) -> Cell:
    """Probe the frozen features with the labels of the subset."""
    place = folder / "fashion_mnist" / f"{arm.name}-{seed}"
    facts = fashion_facts("probe", arm, seed) | {"labelled": FASHION_CLASSES * FASHION_PER_CLASS}
    step = probe_step(folder, place / "pretrain", place / "probe")
    needs = (f"fashion-pretrain-{arm.name}-seed{seed}",)
    name = f"fashion-probe-{arm.name}-seed{seed}"
    return Cell(name, facts, (step,), lambda: probe_numbers(place / "probe"), needs, PROBE_SECONDS)


def probe_step(folder: Path, weights: Path, output: Path, methods: str = "knn,linear") -> Step:
    """Compose the command that probes with the labels of the subset."""
    words = (
        "tools/probe.py",
        "--config-file",
        "probe_fashion_mnist.yaml",
        "--force",
        f"weights={weights}",
        f"methods=[{methods}]",
        f"data.train={folder / 'fashion_mnist' / 'subset'}",
        f"data.val={folder / SOURCE}",
        "data.workers=0",
        f"output_dir={output}",
    )
    return Step(words, output / "report.html")


def rate_cell(folder: Path, arm: Arm, lr: float) -> Cell:
    """Pretrain for a third of the length, and measure kNN.

    kNN leaves one out among the training pictures, so no test picture decides about a learning rate.
    """
    place = folder / "fashion_mnist" / "rates" / f"{arm.name}-{lr:g}"
    words = pretrain_words(folder, arm, 0, place / "pretrain", FASHION_RATE_EPOCHS, lr)
    steps = (
        resumed(words, place / "pretrain", "model.safetensors"),
        probe_step(folder, place / "pretrain", place / "probe", "knn"),
    )
    per_epoch = SECONDS_PER_MAE_EPOCH if arm.is_mae else SECONDS_PER_EPOCH
    return Cell(
        f"fashion-rate-{arm.name}-lr{lr:g}",
        fashion_facts("rate", arm, 0) | {"lr": lr},
        steps,
        lambda: held_out_numbers(place / "pretrain") | probe_numbers(place / "probe"),
        needs=("fashion-subset",),
        estimate=10 + FASHION_RATE_EPOCHS * per_epoch + PROBE_SECONDS,
    )


def fashion_facts(kind: str, arm: Arm, seed: int) -> dict[str, str | int | float | None]:
    """Collect what every cell of an arm has in its row."""
    return {"part": "fashion_mnist", "kind": kind, "arm": arm.name, "seed": seed}


def held_out_numbers(run: Path) -> dict[str, float]:
    """Read the held-out losses of a run by epoch, and the last."""
    losses = {
        row["epoch"]: row["val_loss"] for row in read_json_lines(PROGRAMS / run / "log.jsonl") if "val_loss" in row
    }
    by_epoch = {f"val_loss_epoch{round(epoch)}": loss for epoch, loss in losses.items()}
    return by_epoch | {"val_loss": losses[max(losses)]}


def pretraining_numbers(run: Path, arm: Arm, model: Mapping[str, Any], images: int) -> dict[str, float]:
    """Read the losses of a pretraining run, and count its operations.

    Args:
        images: images that the run saw, repetitions counted.
    """
    counted = operations_of(arm, model)
    numbers = held_out_numbers(run) | {"megaflop_per_image": counted / 1e6}
    return numbers | {"pretraining_tflop": counted * images / 1e12}


def operations_of(arm: Arm, model: Mapping[str, Any]) -> float:
    """Count the operations of a training step of an arm, per image."""
    return _operations(tuple((dict(model) | dict(arm.model)).items()), arm.predicted)


@cache
def _operations(arguments: tuple[tuple[str, Any], ...], predicted: float) -> float:
    from crossmae.experiments.study.decoder_cost import training_operations  # imports torch, which takes seconds

    return training_operations(dict(arguments), predicted)


def probe_numbers(output: Path) -> dict[str, float]:
    """Read the accuracies of a probe, in percent.

    `knn_train` leaves one out among the training pictures: k and temperature are chosen by it, and so is a learning
    rate.
    """
    methods = read_json(PROGRAMS / output / "results.json")["methods"]
    chosen = methods["knn"]["chosen"]
    numbers = {"knn": 100 * chosen["val"]["accuracy"], "knn_train": 100 * chosen["train"]["accuracy"]}
    if "linear" in methods:
        numbers["linear"] = 100 * methods["linear"]["mean"]["mean"]
    return numbers
