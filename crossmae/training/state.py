"""Training state and its checkpoints: model, optimizer, precision, averaged weights and position."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, cast

import psutil
import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from crossmae.checkpoints.loading import load
from crossmae.checkpoints.run_checkpoint import MODEL, read_state, save_checkpoint
from crossmae.checkpoints.weights import describe_non_finite
from crossmae.errors import UserError
from crossmae.training.devices import open_autocast
from crossmae.training.processes import Ranks
from crossmae.training.versions import versions

log = logging.getLogger(__name__)

MAX_SKIPPED = 20  # largest number of consecutive steps that fp16 may skip because a gradient is not finite
AGAINST_OVERFLOW = "Lower optim.base_lr, set optim.clip_grad, or use runtime.precision=fp32."

Loss = Callable[[nn.Module, Any, int], Tensor]  # arguments: model, micro-batch, number of the micro-batch in the run


class TrainingState:
    """Model, optimizer and position of a run between two steps.

    Args:
        model: model on its device; changed in place.
        precision: "fp32", "bf16" or "fp16".
        ema: decay of the averaged weights; None: no average.
        clip_grad: largest norm of the gradients; None: no clipping.
        start: checkpoint to continue from; None: a new run.

    Attributes:
        skipped: consecutive steps that fp16 skipped.
        losses: losses of the micro-batches since the last line of the log.
        kept: values that callbacks store in checkpoints and read after a restart.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        ranks: Ranks,
        precision: str,
        ema: float | None,
        clip_grad: float | None,
        compiled: bool,
        start: Path | None,
    ) -> None:
        self.model, self.optimizer, self.ranks, self.clip_grad = model, optimizer, ranks, clip_grad
        self.device = next(model.parameters()).device
        self.step = self.skipped = 0
        self.losses: list[Tensor] = []
        self.kept: dict[str, Any] = {}
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=precision == "fp16")
        self.autocast = open_autocast(precision, self.device)
        state = None
        if start:
            log.info("continuing from %s", start)
            load(model, start / MODEL)
            state = read_state(start)
        self.ema = ModelEmaV3(model, ema, use_warmup=True) if ema else None
        # Only training steps are compiled. Evaluation uses other shapes and would make the compiled shapes dynamic.
        self.parallel: nn.Module = cast(nn.Module, torch.compile(model)) if compiled else model
        if ranks.world_size > 1:
            ids = [self.device] if self.device.type == "cuda" else None
            self.parallel = DistributedDataParallel(
                self.parallel, ids, broadcast_buffers=False, gradient_as_bucket_view=True
            )
        if state is None:
            return
        self.step = int(state["step"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.skipped = int(state["skipped"])
        self.losses = [loss.to(self.device) for loss in state["losses"]]
        self.kept = dict(state.get("kept", {}))
        if self.ema is not None:
            self.ema.module.load_state_dict(state["ema"])

    @property
    def models(self) -> dict[str, nn.Module]:
        """Model and averaged model, by the suffix of their metrics."""
        return {"": self.model} if self.ema is None else {"": self.model, "_ema": self.ema.module}

    def forward_backward(self, loss_of: Loss, batch: Any, number: int, micro_batches: int, last: bool) -> Tensor:
        """Add the gradients of a micro-batch, and return the detached loss.

        Args:
            micro_batches: number of micro-batches in the step. The step minimises the mean loss over its micro-batches.
            last: true for the last micro-batch of a step. Processes then average their gradients.
        """
        model = self.parallel
        with model.no_sync() if isinstance(model, DistributedDataParallel) and not last else nullcontext():
            with self.autocast:
                loss = loss_of(model, batch, number)
            self.scaler.scale(loss / micro_batches).backward()
        return loss.detach()

    def update(self, lr: float) -> None:
        """Clip the gradients, update weights and average, count the step.

        Args:
            lr: learning rate; each parameter group multiplies it by its own `lr_scale`.

        Raises:
            UserError: If fp16 gradients were not finite in too many consecutive steps.
        """
        if self.clip_grad is not None:
            self.scaler.unscale_(self.optimizer)
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip_grad)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)
        was_skipped = scaled_step(self.scaler, self.optimizer)
        self.skipped = self.skipped + 1 if was_skipped else 0
        if self.skipped >= MAX_SKIPPED:
            raise UserError(
                f"runtime.precision: fp16 skipped {self.skipped} steps in a row up to step {self.step + 1}, because "
                "gradients were not finite. The last checkpoint stays. Use bf16 or fp32, or lower optim.base_lr."
            )
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        if self.ema is not None and not was_skipped:
            self.ema.update(self.model, self.step)

    def mean_loss(self, lr: float) -> float:
        """Average the losses since the last log line, over all processes.

        Raises UserError if the mean is not finite.
        """
        mean = self.ranks.mean(torch.stack(self.losses).mean()).item()
        if not math.isfinite(mean):
            raise UserError(
                f"optim.base_lr: the loss is {mean} at step {self.step} (learning rate {lr:.3g}). The last checkpoint "
                f"stays. {AGAINST_OVERFLOW}"
            )
        return mean

    def check_weights(self) -> None:
        """Raise UserError if a weight or averaged weight is not finite."""
        for suffix, model in self.models.items():
            if found := describe_non_finite(model.state_dict()):
                raise UserError(
                    f"optim.base_lr: a weight is not finite after step {self.step} (model{suffix}: {found}). The last "
                    f"checkpoint stays. {AGAINST_OVERFLOW}"
                )

    def save(self, run: Path, keep: int, metadata: Mapping[str, str], record: Mapping[str, Any]) -> None:
        """Write a checkpoint of the current step."""
        state = {
            "step": self.step,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "skipped": self.skipped,
            "losses": [loss.cpu() for loss in self.losses],
            "kept": self.kept,
        }
        if self.ema is not None:
            state["ema"] = self.ema.module.state_dict()
        tensors = {name: tensor.contiguous() for name, tensor in self.model.state_dict().items()}
        record = {"step": self.step, **record, "versions": versions()}
        save_checkpoint(run, self.step, tensors, dict(metadata), state, record, keep)


def memory_gb(device: torch.device) -> float:
    """Measure the peak GPU memory, or the resident CPU memory, in GB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return float(psutil.Process().memory_info().rss) / 1e9


def scaled_step(scaler: torch.amp.GradScaler, optimizer: torch.optim.Optimizer) -> bool:
    """Update the weights. Return true if fp16 skipped a non-finite gradient."""
    scale = scaler.get_scale()  # always 1 without fp16
    scaler.step(optimizer)
    scaler.update()
    return scaler.get_scale() < scale
