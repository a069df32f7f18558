"""Proves on real data that pretraining with this toolkit is worth something: on Fashion-MNIST, a tiny encoder that it
pretrained beats the same network from random weights, fine-tuned at equal budget over three seeds, and its frozen
features beat random ones. `make study` runs it and leaves runs, pages and summary.json in outputs/fashion_mnist; what
is there already is not computed again. Measured numbers: docs/results.md.

The data are Debian's package dataset-fashion-mnist.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from scipy import stats

from crossmae.classification.evaluation.metrics import mean_of

ROOT = Path(__file__).parents[1]
DATA = Path("/usr/share/datasets/fashion-mnist")
OUT = ROOT / "outputs" / "fashion_mnist"
SEEDS = (0, 1, 2)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not DATA.is_dir(), reason="needs Debian's package dataset-fashion-mnist"),
]


def run(tool: str, folder: Path, marker: str, *words: str) -> Path:
    """Run a tool into a folder, unless the file that it writes last is there."""
    if not (folder / marker).is_file():
        words = (*words, f"output_dir={folder}", *(["--resume"] if (folder / "checkpoints").is_dir() else []))
        environment = os.environ | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "2")}
        subprocess.run([sys.executable, f"tools/{tool}.py", *words], cwd=ROOT, env=environment, check=True)
    return folder


def finetuned(start: str, seed: int, *words: str) -> dict[str, object]:
    """Numbers of one fine-tuning run on 100 labels of each class, evaluated once, at its end."""
    config = ("--config-file", "finetune/fashion_mnist.yaml", f"runtime.seed={seed}")
    folder = run("finetune", OUT / f"{start}-{seed}", "report.html", *config, *words)
    content = json.loads((folder / "evaluation" / "evaluation.json").read_text())
    return {"top1": content["numbers"]["top1"], "interval": content["top1_interval"]}


def probed(start: str, *words: str) -> dict[str, object]:
    config = ("--config-file", "probe_fashion_mnist.yaml", "--force")
    folder = run("probe", OUT / f"probe-{start}", "report.html", *config, *words)
    content: dict[str, object] = json.loads((folder / "results.json").read_text())
    return content


def test_pretraining_is_worth_something() -> None:
    pretrained = run("pretrain", OUT / "pretrain", "model.safetensors", "--config-file", "pretrain/fashion_mnist.yaml")
    runs = {
        "pretrained": [finetuned("pretrained", seed, f"model.init={pretrained}") for seed in SEEDS],
        # A network from scratch has nothing in its lower layers to preserve: no decay of their learning rates.
        "scratch": [finetuned("scratch", seed, "optim.layer_decay=1") for seed in SEEDS],
    }
    probes = {"pretrained": probed("pretrained", f"weights={pretrained}"), "random": probed("random", "weights=null")}
    top1 = {start: [float(one["top1"]) for one in of_start] for start, of_start in runs.items()}  # type: ignore[arg-type]
    gains = [a - b for a, b in zip(top1["pretrained"], top1["scratch"], strict=True)]
    interval = stats.ttest_1samp(gains, 0).confidence_interval(0.95)
    summary: dict[str, Any] = {
        "finetuning": {start: {"top1": values, "mean": asdict(mean_of(values))} for start, values in top1.items()},
        "gain": {"of_each_seed": gains, "mean": sum(gains) / len(gains), "interval": list(map(float, interval))},
        "probes": {start: one["methods"] for start, one in probes.items()},
    }
    (OUT / "summary.json").write_text(json.dumps(summary, indent=2))
    assert min(gains) > 0
    pretrained_knn, random_knn = (summary["probes"][start]["knn"]["default"]["val"] for start in probes)
    assert pretrained_knn["low"] > random_knn["high"]
    pretrained_linear, random_linear = (summary["probes"][start]["linear"]["mean"] for start in probes)
    assert pretrained_linear["low"] > random_linear["high"]
