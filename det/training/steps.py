"""One optimizer step: the batch in parts, mixed precision, and the moving average of the weights."""

from __future__ import annotations

import contextlib
import logging
import time
from typing import Any

import numpy as np
import torch
from detectron2.engine import SimpleTrainer
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from crossmae.checkpoints.weights import describe_non_finite
from crossmae.training.state import MAX_SKIPPED, scaled_step
from det.data.loader import refuse_unreadable

log = logging.getLogger(__name__)


class StepTrainer(SimpleTrainer):
    """detectron2's trainer, extended by batches in parts, mixed precision and a moving average.

    `parts` parts on one GPU give the same result as the same number of GPUs. The gradient of a step is the mean over
    its parts, just as it is the mean over the processes of a run on several GPUs. A part also draws the same random
    numbers as such a process. In both cases, losses that average over boxes or masks average over the boxes or masks of
    one part.

    Args:
        seed: source of all random numbers of a step, together with the number of the step and the rank.
        parts: number of parts in which a batch is computed.
        precision: precision of autocast. None computes in float32.
        average: moving average of the weights, updated after every step.
    """

    def __init__(
        self,
        model: nn.Module,
        data_loader: Any,
        optimizer: torch.optim.Optimizer,
        seed: int,
        parts: int = 1,
        precision: torch.dtype | None = None,
        average: ModelEmaV3 | None = None,
    ) -> None:
        super().__init__(model, data_loader, optimizer)
        self.seed, self.parts, self.precision, self.average = seed, parts, precision, average
        # bfloat16 has the range of float32, so it needs no loss scaling
        self.scaler = torch.amp.GradScaler("cuda", enabled=precision == torch.float16)
        self.skipped = 0  # consecutive skipped steps

    def run_step(self) -> None:
        """Run one step and record its losses.

        Raises FloatingPointError if a loss or gradient is not finite. The weights then stay as before the step.
        """
        if torch.cuda.is_available():
            peak = torch.cuda.max_memory_allocated()
            get_event_storage().put_scalar("peak_memory_bytes", peak, smoothing_hint=False)
        start = time.perf_counter()
        batch = refuse_unreadable(next(self._data_loader_iter))
        data_time = time.perf_counter() - start
        self.optimizer.zero_grad()
        losses: dict[str, Tensor] = {}
        size = len(batch) // self.parts
        for number in range(self.parts):
            self._seed(number)
            last = number == self.parts - 1
            several = isinstance(self.model, nn.parallel.DistributedDataParallel)
            # Only the backward pass of the last part averages gradients over the processes.
            with contextlib.nullcontext() if last or not several else self.model.no_sync():
                for name, value in self._backward(batch[number * size : (number + 1) * size]).items():
                    losses[name] = losses.get(name, 0) + value
        self._write_metrics(losses, data_time)
        self._update()
        if self.average is not None:
            self.average.update(getattr(self.model, "module", self.model), step=self.iter + 1)

    def _backward(self, part: list[Any]) -> dict[str, Tensor]:
        """Add the gradients of a part, and return its losses."""
        with torch.autocast("cuda", self.precision) if self.precision else contextlib.nullcontext():
            losses = {name: value / self.parts for name, value in self.model(part).items()}
            total = torch.stack([value.float() for value in losses.values()]).sum()
        self.scaler.scale(total).backward()
        return {name: value.detach() for name, value in losses.items()}

    def _update(self) -> None:
        if not self.scaler.is_enabled():
            gradients = {name: p.grad for name, p in self.model.named_parameters() if p.grad is not None}
            norm = nn.utils.get_total_norm(gradients.values())
            if not norm.isfinite():
                found = describe_non_finite(gradients) or "no single gradient is infinite"
                raise FloatingPointError(f"the norm of the gradient is {norm.item()}: {found}.")
        self.skipped = self.skipped + 1 if scaled_step(self.scaler, self.optimizer) else 0
        if self.skipped >= MAX_SKIPPED:
            raise FloatingPointError(
                f"float16 skipped {self.skipped} steps in a row, because gradients were not finite. "
                "Use SOLVER.AMP.PRECISION bf16."
            )

    def _seed(self, part: int) -> None:
        key = np.random.SeedSequence([self.seed, self.iter, comm.get_rank() * self.parts + part])
        torch.manual_seed(int(key.generate_state(1, np.uint64)[0] >> np.uint64(1)))

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = super().state_dict()
        inner = {"iteration": state["iteration"], "optimizer": state.pop("optimizer")}
        scale = {"grad_scaler": self.scaler.state_dict()} if self.scaler.is_enabled() else {}
        return state | {"_trainer": inner | scale}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        inner = state_dict["_trainer"]
        super().load_state_dict(state_dict | {"optimizer": inner["optimizer"]})
        if self.scaler.is_enabled() and "grad_scaler" in inner:
            self.scaler.load_state_dict(inner["grad_scaler"])
        elif self.scaler.is_enabled():
            log.info("the checkpoint is of a run without float16: the scale of gradients starts again")
