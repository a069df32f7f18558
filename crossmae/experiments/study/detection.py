"""Cells of the study on things in photographs: pretraining, and a detector at two label shares."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from crossmae.errors import PROGRAMS
from crossmae.experiments.cells import Cell, Step
from crossmae.experiments.study.arms import DECAYED_RANDOM, Arm, DetectionSettings
from crossmae.experiments.study.fashion_mnist import pretraining_numbers, resumed
from crossmae.experiments.study.label_subset import COUNTS, VAL
from crossmae.experiments.worth.grid import read_detection
from crossmae.files import read_json

RowFacts = dict[str, str | int | float | None]
DATA_SECONDS, SUBSET_SECONDS = 300.0, 15.0


def detection_cells(study: Path, settings: DetectionSettings, packages: Sequence[Path] = ()) -> list[Cell]:
    """List the cells: data, then label subsets and arms, seed by seed.

    Args:
        study: folder of the study. The part has a folder of its name in it.
        packages: folders with extracted packages, for `tools/make_study_data.py`.
    """
    folder, cells = study / settings.part, [data_cell(study / settings.part, settings, packages)]
    for seed in settings.seeds:
        cells.append(subset_cell(folder, settings, seed))
        for arm in settings.arms:
            cells.append(pretrain_cell(folder, settings, arm, seed))
            shares = settings.shares if arm.name in settings.arms_at_all_shares else settings.shares[:1]
            cells += [detect_cell(folder, settings, arm, share, seed) for share in shares]
            if not arm.epochs:
                cells.append(detect_cell(folder, settings, arm, shares[0], seed, DECAYED_RANDOM))
    return cells


def data_cell(folder: Path, settings: DetectionSettings, packages: Sequence[Path]) -> Cell:
    """Compose the pictures."""
    output = folder / "things"
    words = ["tools/make_study_data.py", *settings.data, "--output", str(output)]
    words += ["--packages", *map(str, packages)] if packages else []
    facts = {"part": settings.part, "kind": "detection_data"}
    step = Step(tuple(words), output / "manifest.json")
    return Cell(f"{settings.part}-data", facts, (step,), lambda: data_numbers(output), estimate=DATA_SECONDS)


def data_numbers(output: Path) -> dict[str, float]:
    """Read the numbers of images of a data set."""
    settings = read_json(PROGRAMS / output / "manifest.json")["settings"]
    return {key: float(settings[key]) for key in ("train", "val", "pretrain", "size")}


def subset_cell(folder: Path, settings: DetectionSettings, seed: int) -> Cell:
    """Draw the label subsets of a seed."""
    output = folder / f"labels-{seed}"
    annotations = folder / "things" / "annotations"
    jsons = ("--json", str(annotations / "train.json"), "--val-json", str(annotations / "val.json"))
    shares = (f"{share:g}" for share in settings.shares)
    words = (*jsons, "--one-class", "--seed", str(seed), "--output", str(output), "--shares", *shares)
    step = Step(("-m", "crossmae.experiments.study.label_subset", *words), output / COUNTS)
    facts: RowFacts = {"part": settings.part, "kind": "label_subset", "seed": seed}
    return Cell(
        f"{settings.part}-labels-seed{seed}",
        facts,
        (step,),
        lambda: {name: float(count) for name, count in read_json(PROGRAMS / output / COUNTS).items()},
        (f"{settings.part}-data",),
        SUBSET_SECONDS,
    )


def pretrain_cell(folder: Path, settings: DetectionSettings, arm: Arm, seed: int) -> Cell:
    """Pretrain an arm on the pictures without labels."""
    output = folder / f"{arm.name}-{seed}" / "pretrain"
    third = max(1, settings.epochs // 3)
    words = (
        "tools/pretrain.py",
        "--config-file",
        settings.pretrain,
        f"data.train={folder / 'things' / 'pretrain'}",
        f"data.val={folder / 'things' / 'val'}",
        "data.workers=0",
        "probe.train=null",
        "probe.val=null",
        *arm.words,
        f"schedule.epochs={settings.epochs}",
        *settings.pretrain_words,
        f"validation.every_epochs={third}",
        f"checkpoint.every_epochs={third}",
        "checkpoint.keep=1",
        f"runtime.seed={seed}",
        f"output_dir={output}",
        *(() if arm.epochs else ("schedule.max_steps=0",)),
    )
    epochs = settings.epochs if arm.epochs else 0
    counted = (arm, settings.model, epochs * settings.images)
    return Cell(
        f"{settings.part}-pretrain-{arm.name}-seed{seed}",
        {"part": settings.part, "kind": "detection_pretrain", "arm": arm.name, "seed": seed, "epochs": epochs},
        (resumed(words, output, "model.safetensors"),),
        lambda: pretraining_numbers(output, *counted),
        (f"{settings.part}-data",),
        settings.pretrain_seconds if epochs else 20,
    )


def detect_cell(
    folder: Path, settings: DetectionSettings, arm: Arm, share: float, seed: int, control: str | None = None
) -> Cell:
    """Train the detector on a share of the labels, and evaluate it.

    Args:
        control: name of the arm if random weights get the layer decay of pretrained ones.
    """
    place, things, name = folder / f"{arm.name}-{seed}", folder / "things", control or arm.name
    output = folder / f"{name}-{seed}" / f"detect-share{share:g}"
    decay = settings.layer_decay if arm.epochs or control else 1.0
    labels = folder / f"labels-{seed}" / f"train-share{share:g}-seed{seed}.json"
    words = (
        "tools/train_net.py",
        "--config-file",
        settings.detect,
        *("--train-json", str(labels), "--train-images", str(things / "train")),
        *("--val-json", str(labels.parent / VAL), "--val-images", str(things / "val")),
        f"MODEL.WEIGHTS={place / 'pretrain' / 'model.safetensors'}",
        *settings.detect_words,
        f"SOLVER.LAYER_DECAY={decay:g}",
        f"SOLVER.MAX_ITER={settings.steps}",
        f"SOLVER.WARMUP_ITERS={max(1, settings.steps // 20)}",
        f"SOLVER.CHECKPOINT_PERIOD={max(1, settings.steps // 3)}",
        "SOLVER.CHECKPOINTS_KEPT=1",
        "TEST.EVAL_PERIOD=0",
        f"SEED={seed}",
        f"OUTPUT_DIR={output}",
    )
    step = Step(words, output / "results.json", ("--resume",), output, output)
    facts: RowFacts = {"part": settings.part, "kind": "detect", "arm": name, "share": share, "seed": seed}
    return Cell(
        f"{settings.part}-detect-{name}-share{share:g}-seed{seed}",
        facts,
        (step,),
        lambda: read_detection(PROGRAMS / output),
        (f"{settings.part}-pretrain-{arm.name}-seed{seed}", f"{settings.part}-labels-seed{seed}"),
        settings.detect_seconds,
    )
