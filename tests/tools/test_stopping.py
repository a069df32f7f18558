"""Proves that SIGTERM to a trainer's whole group of processes saves the run, with workers that load images."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.crossmae.classification.labelled import write_classes

ROOT = Path(__file__).parents[2]
TRAINERS = {  # the file that grows with the run's steps, the checkpoints' names, and the setting of the run's end
    "pretrain": ("log.jsonl", "checkpoints/step-*", "schedule.max_steps"),
    "finetune": ("log.jsonl", "checkpoints/step-*", "schedule.max_steps"),
    "train_net": ("log.jsonl", "checkpoints/step-*", "SOLVER.MAX_ITER"),
}
VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}
DECODER = {"decoder_embed_dim": 16, "decoder_depth": 2, "decoder_num_heads": 2}
SECONDS = 60  # for a start on a busy machine


def write_config(folder: Path, trainer: str) -> list[str]:
    """Write the config and the data of a run of many steps; return the words of its command line."""
    config = folder / "config.yaml"
    if trainer == "train_net":
        pytest.importorskip("detectron2", reason="detectron2 is not installed: python tools/install_detectron2.py")
        from tests.det.coco_files import TINY, write_coco

        config.write_text(TINY)
        path, images, _ = write_coco(folder / "data")
        words = [f"--{split}-{kind}" for split in ("train", "val") for kind in ("json", "images")]
        named = [word for pair in zip(words, [path, images] * 2, strict=True) for word in map(str, pair)]
        settings = {"DATALOADER.NUM_WORKERS": 2, "SOLVER.MAX_ITER": 10_000, "SOLVER.CHECKPOINT_PERIOD": 10_000}
        settings |= {"OUTPUT_DIR": folder / "run", "TEST.EVAL_PERIOD": 3}
        return ["--config-file", str(config), *named, *(f"{key}={value}" for key, value in settings.items())]
    images = write_classes(folder / "images", per_class=4)
    values = {
        "output_dir": str(folder / "run"),
        "data": {"train": str(images), "workers": 2},
        "model": VIT | {"name": "vit_tiny_patch16"},
        "optim": {"batch_size": 4},
        "schedule": {"epochs": 10_000, "warmup_epochs": 1},
        "runtime": {"device": "cpu"},
        "log": {"every_steps": 1},
        "checkpoint": {"every_epochs": 10_000},
    }
    if trainer == "pretrain":
        values |= {"model": VIT | DECODER | {"name": "crossmae_vit_tiny_patch16"}}
        values |= {"log": {"every_steps": 1, "pictures": 0}}
    else:
        values |= {"data": {"train": str(images), "val": str(images), "workers": 2}}
    config.write_text(yaml.safe_dump(values))
    return ["--config-file", str(config)]


def start(trainer: str, words: list[str]) -> subprocess.Popen[str]:
    """Start the trainer as the head of a group of processes."""
    command = [sys.executable, str(ROOT / "tools" / f"{trainer}.py"), *words]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, start_new_session=True
    )


def wait_for(happened: Iterator[bool]) -> None:
    """Wait until the next value is true."""
    end = time.monotonic() + SECONDS
    while not next(happened):
        assert time.monotonic() < end
        time.sleep(0.02)


def grown(path: Path, process: subprocess.Popen[str]) -> Iterator[bool]:
    """Tell whether a file of a process that runs has content."""
    while process.poll() is None:
        yield path.is_file() and path.stat().st_size > 0
    raise AssertionError(process.communicate()[0])


def group_is_gone(group: int) -> Iterator[bool]:
    """Tell whether no process of the group is left."""
    while True:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            yield True
        yield False


def last_step(run: Path, pattern: str) -> int:
    """Return the number in the name of the last checkpoint."""
    return max(int(re.findall(r"\d+", path.name)[0]) for path in run.glob(pattern))


@pytest.mark.parametrize("trainer", TRAINERS)
def test_sigterm_to_the_group_saves_the_run_and_resume_continues(tmp_path: Path, trainer: str) -> None:
    log, checkpoints, length = TRAINERS[trainer]
    words, run = write_config(tmp_path, trainer), tmp_path / "run"
    process = start(trainer, words)
    wait_for(grown(run / log, process))
    os.killpg(process.pid, signal.SIGTERM)
    printed, _ = process.communicate(timeout=SECONDS)
    assert "Traceback" not in printed
    assert process.returncode == 128 + signal.SIGTERM, printed
    wait_for(group_is_gone(process.pid))

    stopped = last_step(run, checkpoints)
    process = start(trainer, [*words, f"{length}={stopped + 3}", "--resume"])
    printed, _ = process.communicate(timeout=SECONDS)
    assert process.returncode == 0, printed
    assert last_step(run, checkpoints) > stopped or (run / "model_final.pth").is_file()
