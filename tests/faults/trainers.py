"""The trainers under test: a tiny run of each with checkpoints, evaluations, pictures, a report, EMA, accumulation."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tests.crossmae.classification.labelled import write_classes
from tests.faults.zygote import Run, Zygote

VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}
DECODER = {"decoder_embed_dim": 16, "decoder_depth": 1, "decoder_num_heads": 2}
LOOP = "crossmae.training.state:TrainingState"


@dataclass(frozen=True)
class Trainer:
    """A command line that trains.

    Attributes:
        tool: name of the file in tools/.
        imports: modules that a start imports late.
        write: writes data and config into a folder, and returns the words of the command line. The run folder is
            `run` in the working folder.
        step: function called once in every step; an update of the weights.
        saving: function called in the middle of every save.
        judging: function called in every evaluation, and the number of its first call after a step.
        workers, timeout: words that set the number of loader workers, and how long processes wait for each other.
        halved: words for one of two processes, with half the batch each.
        unmixed: words that leave out what depends on the place of an image in its batch.
    """

    tool: str
    imports: tuple[str, ...]
    write: Callable[[Path], list[str]]
    judging: tuple[str, int]
    workers: str
    timeout: str
    halved: tuple[str, ...]
    unmixed: tuple[str, ...]
    step: str = f"{LOOP}.update"
    saving: str = "crossmae.checkpoints.run_checkpoint:sha256"

    def start(
        self,
        zygote: Zygote,
        words: list[str],
        folder: Path,
        fault: Mapping[str, Any] | None = None,
        environment: Mapping[str, str] | None = None,
        output: str | None = None,
    ) -> Run:
        """Start a run in the working folder `folder`. It prints to a file there."""
        name = output or f"printed-{len(list(folder.glob('printed-*')))}.txt"
        return zygote.start(self.tool, self.imports, words, folder, fault or {}, environment or {}, name)


def write_config(folder: Path, values: Mapping[str, Any]) -> list[str]:
    """Write a config, and return the words that name it."""
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(dict(values)))
    return ["--config-file", str(path)]


def shared_values(images: Path) -> dict[str, Any]:
    """Return the config that our own trainers share: 8 steps of 2 x 2 images."""
    return {
        "output_dir": "run",
        "data": {"train": str(images / "train"), "val": str(images / "val"), "workers": 0},
        "optim": {"batch_size": 2, "accumulate": 2, "ema": 0.9, "clip_grad": 1.0, "lr": 0.01},
        "schedule": {"epochs": 2, "warmup_epochs": 1},
        "runtime": {"device": "cpu"},
        "log": {"every_steps": 3},
        "checkpoint": {"every_steps": 3, "every_epochs": 1, "keep": 2},
    }


def write_images(folder: Path) -> Path:
    """Write labelled images: 18 to train on, so that the epoch ends in the middle of a step, and 6 others."""
    write_classes(folder / "images/train", per_class=6)
    write_classes(folder / "images/val", per_class=2, seed=1)
    return folder / "images"


def write_pretraining(folder: Path) -> list[str]:
    images = write_images(folder)
    values = shared_values(images)
    values |= {
        "model": VIT | DECODER | {"name": "crossmae_vit_tiny_patch16"},
        "log": {"every_steps": 3, "pictures": 1, "pictures_every_steps": 5},
        "validation": {"every_epochs": 1},
        "probe": {"train": str(images / "train"), "val": str(images / "val"), "every_epochs": 1, "k": 3},
    }
    return write_config(folder, values)


def write_finetuning(folder: Path) -> list[str]:
    values = shared_values(write_images(folder))
    values |= {
        "model": VIT | {"name": "vit_tiny_patch16", "drop_path": 0.5},
        "loss": {"mixup": 0.8},
        "evaluation": {"every_epochs": 1, "hardest": 2, "features": 4},
    }
    return write_config(folder, values)


def write_detection(folder: Path) -> list[str]:
    from tests.det.coco_files import TINY, write_coco

    (folder / "config.yaml").write_text(TINY)
    path, images, _ = write_coco(folder / "data")
    named = [
        f"--{split}-{kind}={value}"
        for split in ("train", "val")
        for kind, value in (("json", path), ("images", images))
    ]
    settings = {
        "OUTPUT_DIR": "run",
        "SOLVER.MAX_ITER": 8,
        "SOLVER.IMS_PER_BATCH": 2,
        "SOLVER.ACCUMULATE": 2,
        "SOLVER.BASE_LR": 0.01,
        "SOLVER.EMA.ENABLED": True,
        "SOLVER.CHECKPOINT_PERIOD": 3,
        "SOLVER.CHECKPOINTS_KEPT": 2,
        "TEST.EVAL_PERIOD": 5,
    }
    return [
        "--config-file",
        str(folder / "config.yaml"),
        *named,
        *(f"{key}={value}" for key, value in settings.items()),
    ]


OWN_WORDS = {"workers": "data.workers={}", "timeout": "runtime.timeout_minutes={}"}
HALVED = "optim.batch_size=1"
TRAINERS = {
    "pretrain": Trainer(
        tool="pretrain",
        imports=("crossmae.pretraining.train", "matplotlib.backends.backend_agg", "tensorboard.compat.proto"),
        write=write_pretraining,
        judging=("crossmae.pretraining.validation:HeldOut.loss", 3),
        halved=(HALVED,),
        unmixed=(),
        **OWN_WORDS,
    ),
    "finetune": Trainer(
        tool="finetune",
        imports=("crossmae.classification.train.train", "matplotlib.backends.backend_agg"),
        write=write_finetuning,
        judging=("crossmae.classification.train.train:evaluate", 1),
        halved=(HALVED, "loss.mixup=0"),  # an odd batch cannot be mixed
        unmixed=("loss.mixup=0", "model.drop_path=0", "data.erase=0"),
        **OWN_WORDS,
    ),
}
if importlib.util.find_spec("detectron2") is not None:
    TRAINERS["train_net"] = Trainer(
        tool="train_net",
        imports=("matplotlib.backends.backend_agg", "det.evaluation.report", "hotcoco"),
        write=write_detection,
        judging=("det.training.train:evaluate", 1),
        workers="DATALOADER.NUM_WORKERS={}",
        timeout="TIMEOUT_MINUTES={}",
        halved=("SOLVER.ACCUMULATE=1",),
        unmixed=(),
    )
