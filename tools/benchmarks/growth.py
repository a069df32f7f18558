"""Suite of growth: time and memory against image size, batch, number of files and number of annotations."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from crossmae.data.sources import open_source
from crossmae.models.crossmae import CrossMAE
from crossmae.models.sizes import model_arguments
from tools.benchmarks.measuring import ScratchFolder, peak_memory
from tools.benchmarks.pretraining import make_batch, our_step
from tools.benchmarks.results import Growth, fit_exponent

Build = Callable[[], Growth]
CPU = torch.device("cpu")
REPEATS = 3  # the fastest counts


def growth(
    sides: Sequence[int] = (112, 224, 448),
    batches: Sequence[int] = (1, 4, 16),
    files: Sequence[int] = (1_000, 10_000, 100_000, 1_000_000),
    annotations: Sequence[int] = (1_000, 10_000, 100_000),
    size: str = "small_patch16",
    overrides: Mapping[str, Any] | None = None,
) -> list[Build]:
    """List the growth of steps, files and annotations.

    Args:
        sides: sides of images in pixels, for a batch of 2.
        batches: images of a batch.
        size: model of the steps.
    """
    arguments = model_arguments(f"crossmae_vit_{size}") | dict(overrides or {})
    return [
        partial(grow, "pretraining step, batch 2", "pixels a side", sides, partial(step_of_side, arguments)),
        partial(grow, "pretraining step", "images a batch", batches, partial(step_of_batch, arguments)),
        partial(grow, "a folder opened", "files", files, partial(opened_files, listed=False)),
        partial(grow, "a list opened", "files", files, partial(opened_files, listed=True)),
        partial(grow, "a COCO file, checked and loaded", "annotations", annotations, read_annotations),
    ]


def grow(what: str, unit: str, sizes: Sequence[int], prepare: Callable[[int], Callable[[], object]]) -> Growth:
    """Measure prepared work at each size, and fit the exponent."""
    seconds, megabytes = [], []
    gc.collect()
    for size in sizes:
        work = prepare(size)
        work()
        peak = peak_memory(work, CPU)
        megabytes.append(None if peak is None else peak / 1e6)
        found = []
        for _ in range(REPEATS):
            before = time.process_time()
            work()
            found.append(time.process_time() - before)
        seconds.append(min(found))
    return Growth(what, unit, tuple(sizes), tuple(seconds), tuple(megabytes), fit_exponent(sizes, seconds))


def step_of_side(arguments: Mapping[str, Any], side: int) -> Callable[[], object]:
    """Prepare a step on two images of a side in pixels."""
    changed = dict(arguments) | {"img_size": side}
    return our_step(CrossMAE(**changed), make_batch(changed, 2, CPU), "fp32")


def step_of_batch(arguments: Mapping[str, Any], images: int) -> Callable[[], object]:
    """Prepare a step on a number of images."""
    return our_step(CrossMAE(**arguments), make_batch(arguments, images, CPU), "fp32")


def opened_files(files: int, listed: bool) -> Callable[[], object]:
    """Prepare the opening of a list or folder of empty files."""
    folder = ScratchFolder()
    for number in range(files):
        place = folder.path / f"{number // 10_000:04d}"
        if number % 10_000 == 0:
            place.mkdir()
        (place / f"{number:07d}.jpg").touch()
    names = [f"{number // 10_000:04d}/{number:07d}.jpg" for number in range(files)]
    text = folder.path / "list.txt"
    text.write_text("\n".join(names) + "\n")
    value = text if listed else folder.path
    return lambda: (open_source(value, "data.train"), folder)[0]


def read_annotations(annotations: int) -> Callable[[], object]:
    """Prepare the reading of a COCO file."""
    from tools.benchmarks.cocoeval import read_dataset, write_dataset

    folder = ScratchFolder()
    path = write_dataset(folder.path, annotations)
    return lambda: (read_dataset(path), folder)[0]
