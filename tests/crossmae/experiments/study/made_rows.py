"""Rows of a made-up study, for tests of verdicts and pages."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from crossmae.experiments.rows import Row
from crossmae.experiments.study.arms import FASHION_ARMS, SEEDS

MACHINE = {"processor": "A made-up CPU", "cores": 2, "gpu": None, "torch": "2.11.0", "python": "3.11.9"}
TOP1 = {"random": 45.0, "mae_d4": 76.0, "cross25_d6": 76.0, "cross25_d6_equal": 76.5, "cross25_d4_equal": 76.5}
TOP1 |= {"cross25_d6_nofusion": 75.8, "cross75_d6": 76.0, "cross25_d4": 75.0, "cross25_d2": 74.0}
AP = {"random": 10.0, "cross25": 18.0, "cross75": 18.0, "mae": 17.0}


def make_rows(
    top1: Mapping[str, float] | None = None,
    ap: Mapping[str, float] | None = None,
    spread: float = 0.1,
    formula: float = 2.6,
) -> list[Row]:
    """Make the rows of a whole study. Means of arms can be changed, and the runs differ by `spread`."""
    rng, rows = np.random.default_rng(0), [decoder_row(formula)]
    means = TOP1 | dict(top1 or {})
    for seed in SEEDS:
        for arm in FASHION_ARMS:
            facts = {"part": "fashion_mnist", "arm": arm.name, "seed": seed}
            losses = {"val_loss_epoch0": 1.9, f"val_loss_epoch{arm.epochs}": 0.6, "val_loss": 0.6}
            flops = {"megaflop_per_image": 120.0, "pretraining_tflop": 1.5 * arm.epochs}
            rows.append(make_row(facts | {"kind": "pretrain"}, losses | flops))
            values = {key: means[arm.name] + rng.normal(0, spread) for key in ("top1", "knn", "linear")}
            rows.append(make_row(facts | {"kind": "finetune", "labelled": 1000}, {"top1": values.pop("top1")}))
            rows.append(make_row(facts | {"kind": "probe", "labelled": 12800}, values))
        for arm_name, mean in (AP | dict(ap or {})).items():
            for share, labelled in ((10, 200), (100, 2000)):
                facts = {"part": "detection", "kind": "detect", "arm": arm_name, "seed": seed}
                score = mean + rng.normal(0, spread) + (0 if share == 10 else 5)
                numbers = {"mask_AP": score, "box_AP": score + 2}
                rows.append(make_row(facts | {"share": share, "labelled": labelled}, numbers))
    return rows


def decoder_row(formula: float) -> Row:
    """Make the row of the decoders: counted 2.6, and a ratio by formula."""
    names = {"ratio": 2.6, "formula": formula, "linear_only": 2.5, "seconds_ratio": 2.0}
    facts = {"part": "decoder", "kind": "decoder"}
    return make_row(facts, {f"base_d12_25_{name}": value for name, value in names.items()})


def make_row(facts: Mapping[str, Any], numbers: Mapping[str, float]) -> Row:
    """Make a row with costs, a command and a machine."""
    name = "-".join(str(facts[key]) for key in ("part", "kind", "arm", "share", "seed") if key in facts)
    cost: dict[str, float | None] = {"cpu_seconds": 300.0, "wall_seconds": 330.0, "peak_memory_bytes": 1e9}
    return Row(name, dict(facts), dict(numbers), cost, (f"python tools/some.py {name}",), "f", MACHINE, "2026-11-29")
