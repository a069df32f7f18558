"""One step of a detector: its batch in parts, its random numbers and its losses."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from detectron2.utils.events import EventStorage
from torch import nn
from torch.utils.data import DataLoader

from crossmae.training.state import Diverged, Losses
from det.data.loader import refuse_unreadable
from det.training.statistics import statistics_left_out


class DetectorLoss:
    """Losses of a part of a batch.

    `parts` parts on one GPU give the same result as the same number of GPUs. The gradient of a step is the mean over
    its parts, just as it is the mean over the processes of a run on several GPUs. A part also draws the same random
    numbers as such a process. In both cases, losses that average over boxes or masks average over the boxes or masks of
    one part.

    Args:
        seed: source of all random numbers of a step, together with the number of the step and the rank.
        parts: number of parts in which a batch is computed.
        is_logged: returns true if detectron2's numbers are wanted after this number of steps.

    Attributes:
        scalars: numbers that detectron2's modules logged in the last part of a logged step, such as the accuracy of
            classes.
    """

    def __init__(self, seed: int, parts: int, rank: int, is_logged: Callable[[int], bool] = lambda steps: True) -> None:
        self.seed, self.parts, self.rank, self.is_logged = seed, parts, rank, is_logged
        self.scalars: dict[str, float] = {}

    def __call__(self, model: nn.Module, part: list[Any], number: int) -> Losses:
        """Compute the losses of the part with this number in the run.

        Raises Diverged if proposals are not finite.
        """
        step, place = divmod(number, self.parts)
        key = np.random.SeedSequence([self.seed, step, self.rank * self.parts + place])
        torch.manual_seed(int(key.generate_state(1, np.uint64)[0] >> np.uint64(1)))
        wanted = place == self.parts - 1 and self.is_logged(step + 1)
        with EventStorage(step) as storage, nullcontext() if wanted else statistics_left_out():
            try:
                losses: Losses = model(part)
            except FloatingPointError as error:  # of detectron2's proposals
                raise Diverged(" ".join(str(error).split()).rstrip("."), is_shared=False) from error
        if wanted:
            found = {name: float(value) for name, (value, _) in storage.latest().items()}
            self.scalars = {name: value for name, value in found.items() if math.isfinite(value)}
        return losses


def in_parts(open_loader: Callable[[range], DataLoader[Any]], parts: int) -> Callable[[int, int], Iterator[list[Any]]]:
    """Return `Job.open_batches` of batches in parts.

    Args:
        open_loader: returns the batches of some steps. A process's batch has a multiple of `parts` images.
    """

    def open_parts(first: int, last: int) -> Iterator[list[Any]]:
        for batch in open_loader(range(first // parts, last // parts)):
            refuse_unreadable(batch)
            size = len(batch) // parts
            for number in range(parts):
                yield batch[number * size : (number + 1) * size]

    return open_parts
