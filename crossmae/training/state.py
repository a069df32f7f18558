"""What is trained, and how: model, optimizer, precision, averaged weights, position; and checkpoints of all that."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Protocol, cast

import psutil
import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from crossmae.checkpoints.loading import load
from crossmae.checkpoints.run_checkpoint import MODEL, read_state, save_checkpoint
from crossmae.checkpoints.weights import describe_non_finite
from crossmae.data.broken import Broken
from crossmae.data.sources import Source
from crossmae.errors import UserError
from crossmae.training.config import RunConfig
from crossmae.training.devices import open_autocast
from crossmae.training.log import BROKEN, BrokenImages
from crossmae.training.optimizer import MAX_SKIPPED, lr_at, scaled_step
from crossmae.training.processes import Ranks
from crossmae.training.schedule import Plan, fingerprint
from crossmae.training.versions import versions

log = logging.getLogger(__name__)


class AnyBatch(Protocol):
    """A micro-batch of any kind of training."""

    @property
    def broken(self) -> tuple[Broken, ...]:
        """Images that others stand in for."""


Loss = Callable[[nn.Module, Any], Tensor]


class Run:
    """Steps of one model; every learning rate is that of the schedule times the group's `lr_scale`.

    Args:
        config, plan, ranks: of the run.
        model: on its device.
        source: of the training images, for the names of broken ones.
        optimizer: of the model.
        loss: of the model, as it is called in parallel, and a micro-batch.
        start: the checkpoint to go on from.
    """

    def __init__(
        self,
        config: RunConfig,
        plan: Plan,
        ranks: Ranks,
        model: nn.Module,
        source: Source,
        optimizer: torch.optim.Optimizer,
        loss: Loss,
        start: Path | None,
    ) -> None:
        self.config, self.plan, self.ranks, self.model = config, plan, ranks, model
        self.device = next(model.parameters()).device
        self.optimizer, self.loss = optimizer, loss
        self.step = self.skipped = 0
        self.losses: list[Tensor] = []  # of the micro-batches since the last line of the log
        self.kept: dict[str, Any] = {}  # what observers want to find again after a restart
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=plan.precision == "fp16")
        self.autocast = open_autocast(plan.precision, self.device)
        state = None
        if start:
            log.info("going on from %s", start)
            load(model, start / MODEL)
            state = read_state(start)
        self.ema = ModelEmaV3(model, config.optim.ema, use_warmup=True) if config.optim.ema else None
        # Only steps are compiled: evaluation has other shapes, which would make those of a step dynamic, too.
        self.parallel: nn.Module = cast(nn.Module, torch.compile(model)) if config.runtime.compile else model
        if ranks.world_size > 1:
            ids = [self.device] if self.device.type == "cuda" else None
            self.parallel = DistributedDataParallel(
                self.parallel, ids, broadcast_buffers=False, gradient_as_bucket_view=True
            )
        name = BROKEN if ranks.is_main else f"broken.rank{ranks.rank}.jsonl"
        path = config.output_dir / name
        self.broken = BrokenImages(path, source, config.data.broken_budget, resumed=start is not None)
        if state is not None:
            self._load(state)

    def _load(self, state: dict[str, Any]) -> None:
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
        """The model and, where there is one, its average, by the suffix that their numbers get in the log."""
        return {"": self.model} if self.ema is None else {"": self.model, "_ema": self.ema.module}

    def forward_backward(self, batch: AnyBatch, micro_batches: int, last: bool) -> Tensor:
        """Loss of one micro-batch, detached; gradients are added up, and with the last one shared among processes."""
        self.broken.add(batch.broken)
        model = self.parallel
        local = model.no_sync() if isinstance(model, DistributedDataParallel) and not last else nullcontext()
        with local:
            with self.autocast:
                loss = self.loss(model, batch)
            self.scaler.scale(loss / micro_batches).backward()
        return loss.detach()

    def optimizer_step(self) -> float:
        """Clip, update at the step's learning rate, clear the gradients; returns that learning rate.

        Raises:
            UserError: fp16 gradients were not finite for too many steps in a row.
        """
        plan, clip = self.plan, self.config.optim.clip_grad
        lr = lr_at(self.step, plan.peak_lr, plan.warmup_steps, plan.total_steps, self.config.schedule.min_lr)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)
        if clip is not None:
            self.scaler.unscale_(self.optimizer)
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), clip)
        was_skipped = scaled_step(self.scaler, self.optimizer)
        self.skipped = self.skipped + 1 if was_skipped else 0
        if self.skipped >= MAX_SKIPPED:
            raise UserError(
                f"fp16 skipped {self.skipped} steps in a row up to step {self.step + 1}, because gradients were not "
                "finite; the last checkpoint stays. Use runtime.precision=bf16 or fp32, or lower optim.base_lr"
            )
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        if self.ema is not None and not was_skipped:
            self.ema.update(self.model, self.step)
        return lr

    def check_weights(self) -> None:
        """Refuse to save a model, or its average, that is not finite.

        Raises:
            UserError: a parameter or a buffer is not finite.
        """
        for suffix, model in self.models.items():
            if found := describe_non_finite(model.state_dict()):
                raise UserError(
                    f"a weight is not finite after step {self.step}; the last checkpoint stays. "
                    f"model{suffix}: {found}. Lower optim.base_lr, set optim.clip_grad, or use runtime.precision=fp32"
                )

    def save(self, metadata: Mapping[str, str], extra: Mapping[str, str]) -> None:
        """Write a checkpoint of the current step.

        Args:
            metadata: of the weights.
            extra: what the kind of training adds to the fingerprint.
        """
        config, plan = self.config, self.plan
        record = {
            "step": self.step,
            "batches_consumed": plan.batches_done(self.step),
            "plan": dataclasses.asdict(plan),
            "config": config.model_dump(mode="json"),
            "fingerprint": fingerprint(config, plan) | dict(extra),
            "versions": versions(),
        }
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
        save_checkpoint(config.output_dir, self.step, tensors, dict(metadata), state, record, config.checkpoint.keep)


def finite_mean(losses: Sequence[Tensor], step: int, lr: float, ranks: Ranks) -> float:
    """Mean of the losses since the last line, over all processes, so that all of them stop together.

    Raises:
        UserError: one of them is not finite.
    """
    mean = ranks.mean(torch.stack(list(losses)).mean()).item()
    if not math.isfinite(mean):
        raise UserError(
            f"the loss is {mean} at step {step} (learning rate {lr:.3g}); the last checkpoint stays. "
            "Lower optim.base_lr, set optim.clip_grad, or use runtime.precision=fp32"
        )
    return mean


def memory_gb(device: torch.device) -> float:
    """Peak memory in GB: of the device, or on a CPU the resident memory of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return float(psutil.Process().memory_info().rss) / 1e9
