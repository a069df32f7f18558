"""All suites by name, and their run within a number of minutes."""

from __future__ import annotations

import contextlib
import gc
import importlib
import io
import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from tools.benchmarks.measuring import LEAST_ROUNDS, Comparison, Row, measure
from tools.benchmarks.results import Growth

log = logging.getLogger(__name__)

Build = Callable[[], Comparison | Row | Growth]
# Suite: its module, and whether it runs on a chosen device.
SUITES: dict[str, tuple[str, bool]] = {
    "flops": ("pretraining", False),
    "pretrain": ("pretraining", True),
    "fusion": ("pretraining", True),
    "attention": ("backbone", True),
    "vitdet": ("backbone", True),
    "detector": ("detector", True),
    "loader": ("loader", False),
    "cocoeval": ("cocoeval", True),
    "optimizer": ("training", True),
    "checkpoint": ("training", True),
    "finetune": ("training", True),
    "start": ("start", False),
    "growth": ("growth", False),
}
ON_GPU = tuple(name for name, (_, takes_device) in SUITES.items() if takes_device)
MINUTES = 1.0  # for a suite, if the total is not given


def open_suite(name: str, device: torch.device, **sizes: Any) -> list[Build]:
    """Return the measurements of a suite, none of which has begun.

    Args:
        sizes: arguments of the suite's function. By default, it measures the sizes of the goals.
    """
    module, takes_device = SUITES[name]
    build: Callable[..., list[Build]] = getattr(importlib.import_module(f"tools.benchmarks.{module}"), name)
    return build(device, **sizes) if takes_device else build(**sizes)


def run_suite(
    name: str,
    builds: Sequence[Build],
    device: torch.device,
    seconds: float,
    report: Callable[[Row | Growth], None],
    least: int = LEAST_ROUNDS,
    with_memory: bool = True,
) -> None:
    """Make the measurements of a suite, and report each.

    A measurement that fails is reported as a void row, so that the others continue.

    Args:
        seconds: wall time for the suite; every measurement has an equal share of what is left.
    """
    end = time.monotonic() + seconds
    for number, build in enumerate(builds):
        share = max(end - time.monotonic(), 0.0) / (len(builds) - number)
        try:
            # Progress bars and messages of the product are not of interest here. Errors are in the row.
            with contextlib.redirect_stderr(io.StringIO()):
                found = build()
                if isinstance(found, Comparison):
                    found = measure(found, name, device, share, least=least, with_memory=with_memory)
        except Exception as error:  # of any library: the table names it
            log.debug("%s", name, exc_info=True)
            found = Row(name, describe_build(build), "", device.type, void=describe_failure(error))
        report(found)
        if device.type == "cuda":
            gc.collect()  # compiled models are in cycles
            torch.cuda.empty_cache()


def describe_build(build: Build) -> str:
    """Name a measurement that failed before it had a name."""
    return getattr(getattr(build, "func", build), "__name__", "measurement").replace("_", " ")


def describe_failure(error: Exception) -> str:
    """Describe an error in one line."""
    return f"failed: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
