"""Rows of a made-up grid, for tests of statistics and pages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from crossmae.experiments.rows import Row

GAINS = {"random_detector_init": 0.0, "random_pretraining_init": 2.0, "own": 7.0, "weights": 9.0, "continued": 11.0}
USUAL = tuple(GAINS)
GAINS |= {"random_same_rates": 1.0}
MACHINE = {"processor": "A made-up CPU", "cores": 2, "gpu": None, "torch": "2.11.0", "python": "3.11.9"}


def sample_rows(
    arms: Sequence[str] = USUAL,
    shares: Mapping[float, int] | None = None,
    seeds: Sequence[int] = (0, 1, 2),
    spread: float = 1.5,
    kind: str = "detect",
) -> list[Row]:
    """Make rows of which the gain of an arm shrinks with the labels."""
    rng, rows = np.random.default_rng(0), []
    for seed in seeds:
        rows += [
            make_row(
                {"kind": "pretrain", "arm": arm, "share": None, "labelled": None, "seed": seed}, {"val_loss": 0.6}, 900
            )
            for arm in ("own", "continued")
            if arm in arms
        ]
    for share, labelled in (shares or {10: 40, 30: 120, 100: 400}).items():
        for seed in seeds:
            shared = rng.normal(0, spread)
            for arm in arms:
                facts = {"kind": kind, "arm": arm, "share": share, "labelled": labelled, "seed": seed}
                score = 20 + 8 * np.log10(labelled / 40) + GAINS[arm] * (40 / labelled) ** 0.5 + shared
                score += rng.normal(0, spread / 2)
                numbers = {"mask_AP": score, "box_AP": score + 5, "mask_AP50": score + 18, "box_AP50": score + 22}
                rows.append(make_row(facts, numbers if kind == "detect" else {"top1": score + 40}, 300 + labelled / 4))
    return rows


def make_row(facts: Mapping[str, str | int | float | None], numbers: Mapping[str, float], seconds: float) -> Row:
    """Make a row with costs, commands and a machine."""
    share = "" if facts["share"] is None else f"-share{facts['share']:g}"
    name = f"{facts['kind']}-{facts['arm']}{share}-seed{facts['seed']}"
    tool = {"pretrain": "pretrain", "detect": "train_net", "classify": "finetune"}[str(facts["kind"])]
    command = (
        f"python tools/{tool}.py --config-file small.yaml data.train=subset{share}.json output_dir=out/{name} "
        f"runtime.seed={facts['seed']} runtime.device=cpu"
    )
    cost = {
        "cpu_seconds": seconds,
        "wall_seconds": seconds * 1.1,
        "gpu_seconds": None,
        "energy_joules": None,
        "peak_memory_bytes": 2.1e9,
    }
    return Row(name, facts, numbers, cost, (command,), "f", MACHINE, "2026-11-29T23:00:00Z")
