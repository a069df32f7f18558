"""Training state and its checkpoints: model, optimizer, precision, averaged weights and position."""

from __future__ import annotations

import inspect
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import psutil
import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from crossmae.checkpoints.reading.files import read_safetensors
from crossmae.checkpoints.run_checkpoint import MODEL, STATE, CheckpointWriter, read_state
from crossmae.checkpoints.weights import check_finite, describe_non_finite
from crossmae.errors import UserError, shorten
from crossmae.training.devices import compile_blocks, open_autocast
from crossmae.training.optimizers import can_skip
from crossmae.training.processes import Ranks
from crossmae.training.versions import versions

# In step t, the decay is at most 1 - (1 + t) ** -EMA_POWER, so that the average forgets the first weights in short
# runs, too. With a power of 1, it would be the mean of all weights until then.
EMA_POWER = 2 / 3

log = logging.getLogger(__name__)

MAX_SKIPPED = 20  # largest number of consecutive steps that fp16 may skip because a gradient is not finite

Losses = dict[str, Tensor]  # one loss, "loss", or several losses that are added up
# Arguments: model, micro-batch, number of the micro-batch in the run.
Loss = Callable[[nn.Module, Any, int], Losses]


class Diverged(ArithmeticError):
    """A loss, a gradient or a weight is not finite. The message has no advice.

    Attributes:
        is_shared: all processes raise it in the same step. Otherwise the other processes end with this one.
    """

    def __init__(self, message: str, is_shared: bool = True) -> None:
        super().__init__(message)
        self.is_shared = is_shared


class DeferredCheck:
    """Check of the gradients on the device, so that the host does not wait for every step.

    From the first step on whose gradient is not finite, the optimizer skips its updates: model and moments stay as they
    were before the step until the host reads the check. The average of the weights moves on, but a run saves nothing
    before it has read the check.

    Args:
        optimizer: one that `can_skip`.
        parameters: parameters by name.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, parameters: Sequence[tuple[str, nn.Parameter]], device: torch.device
    ) -> None:
        self.parameters = parameters
        self.found = torch.zeros((), device=device)  # 1 from the first gradient on that is not finite
        self.steps: list[tuple[Tensor, Tensor, list[str]]] = []  # norm, and the norms of tensors with these names
        optimizer.found_inf = self.found  # type: ignore[attr-defined]

    def add(self) -> Tensor:
        """Compute the norm of all gradients of a step, and note it."""
        gradients = {name: p.grad for name, p in self.parameters if p.grad is not None}
        norms = torch.stack(torch._foreach_norm(list(gradients.values())))
        norm = torch.linalg.vector_norm(norms)
        self.found.logical_or_(norm.isfinite().logical_not())
        self.steps.append((norm, norms, list(gradients)))
        return norm

    def read(self) -> tuple[int, str] | None:
        """Wait for the device, and forget the steps.

        Returns:
            Number of steps since before the first gradient that is not finite, and a description. None if all are
            finite.
        """
        steps, self.steps = self.steps, []
        if not self.found.item():
            return None
        totals = torch.stack([norm for norm, _, _ in steps]).tolist()
        first = next(index for index, total in enumerate(totals) if not math.isfinite(total))
        _, norms, names = steps[first]
        bad = [name for name, norm in zip(names, norms.tolist(), strict=True) if not math.isfinite(norm)]
        found = f"{len(bad)} of {len(names)} tensors hold NaN or infinity: {shorten(bad)}" if bad else ""
        return len(steps) - first, describe_gradient(totals[first], found)


class TrainingState:
    """Model, optimizer and position of a run between two steps.

    Args:
        model: model on its device; changed in place.
        precision: "fp32", "bf16" or "fp16".
        ema: decay of the averaged weights; None: no average.
        clip_grad: largest norm of the gradients; None: no clipping.
        compiled: compile the blocks of the model in training steps.
        start: checkpoint to continue from; None: a new run.
        check_every: steps after which the host reads whether the gradients were finite. It is 1 for optimizers that
            cannot skip an update on the device, and for fp16, whose scaler waits for the device in every step.

    Attributes:
        skipped: consecutive steps that fp16 skipped.
        losses: losses of the micro-batches since the last line of the log. The average of several processes is logged.
        kept: values that callbacks store in checkpoints and read after a restart.
        deferred: the check of the gradients on the device; None: the host checks every step.
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
        check_every: int = 1,
    ) -> None:
        self.model, self.optimizer, self.ranks, self.clip_grad = model, optimizer, ranks, clip_grad
        self.parameters = list(model.parameters())  # walking through the modules in every step would take time
        self.device = self.parameters[0].device
        self.step = self.skipped = 0
        self.losses: list[Losses] = []
        self.kept: dict[str, Any] = {}
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=precision == "fp16")
        self.autocast = open_autocast(precision, self.device)
        self.check_every = check_every
        state = None
        if start:
            log.info("continuing from %s", start)
            restore_weights(model, start / MODEL)
            # An optimizer on the CPU keeps these tensors, and the file is deleted after a later checkpoint.
            state = read_state(start, mapped=self.device.type != "cpu")
        self.ema = ModelEmaV3(model, ema, use_warmup=True, warmup_power=EMA_POWER) if ema else None
        # In place, after the copy for the average. Copies are not compiled.
        self.is_compiled = compiled and bool(compile_blocks(model))
        self.parallel = model if ranks.world_size == 1 else average_gradients(model, self.is_compiled)
        if state is not None and start is not None:
            self.restore(state, start)
        self.deferred = None
        if check_every > 1 and not self.scaler.is_enabled() and can_skip(optimizer):
            self.deferred = DeferredCheck(optimizer, list(model.named_parameters()), self.device)

    def restore(self, state: Mapping[str, Any], start: Path) -> None:
        """Continue from everything but the weights of a checkpoint."""
        self.step = int(state["step"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.skipped = int(state["skipped"])
        own = own_losses(state["losses"], self.ranks.rank)
        self.losses = [{name: loss.to(self.device) for name, loss in losses.items()} for losses in own]
        self.kept = dict(state.get("kept", {}))
        if self.ema is not None:
            self.ema.module.load_state_dict(state["ema"])
        self.check_finite(start / STATE)

    @property
    def models(self) -> dict[str, nn.Module]:
        """Model and averaged model, by the suffix of their metrics."""
        return {"": self.model} if self.ema is None else {"": self.model, "_ema": self.ema.module}

    def evaluating(self) -> AbstractContextManager[Any]:
        """Run compiled blocks as they are.

        Only training steps are compiled. Evaluations have other shapes, and each would be compiled.
        """
        return torch.compiler.set_stance("force_eager") if self.is_compiled else nullcontext()

    def check_finite(self, path: Path) -> None:
        """Reject averaged weights and moments that are not finite."""
        averaged = {} if self.ema is None else self.ema.module.state_dict()
        check_finite(averaged, path)
        for number, moments in self.optimizer.state_dict()["state"].items():
            check_finite({f"{number}.{key}": one for key, one in moments.items() if isinstance(one, Tensor)}, path)

    def forward_backward(self, loss_of: Loss, batch: Any, number: int, micro_batches: int, last: bool) -> Losses:
        """Add the gradients of a micro-batch, and return the detached losses.

        Args:
            micro_batches: number of micro-batches in the step. The step minimises the mean loss over its micro-batches.
            last: true for the last micro-batch of a step. Processes then average their gradients.
        """
        model = self.parallel
        with model.no_sync() if isinstance(model, DistributedDataParallel) and not last else nullcontext():
            with self.autocast:
                losses = loss_of(model, batch, number)
            self.scaler.scale(add_up(losses) / micro_batches).backward()
        return {name: loss.detach() for name, loss in losses.items()}

    def update(self, lr: float) -> None:
        """Check and clip the gradients, update weights and average, count the step.

        Args:
            lr: learning rate; each parameter group multiplies it by its own `lr_scale`.

        Raises:
            Diverged: The gradient is not finite, in all processes. Model and optimizer are as before the step. With
                `check_every`, see `check_gradients`. Or fp16 gradients were not finite in too many consecutive steps.
        """
        if not self.scaler.is_enabled() or self.clip_grad is not None:
            self.scaler.unscale_(self.optimizer)
            norm = self.gradient_norm()
            if self.clip_grad is not None:
                clip_grads_with_norm_(self.parameters, self.clip_grad, norm)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)
        was_skipped = scaled_step(self.scaler, self.optimizer)
        self.skipped = self.skipped + 1 if was_skipped else 0
        if self.skipped >= MAX_SKIPPED:
            raise Diverged(f"fp16 skipped {self.skipped} steps in a row, because gradients were not finite")
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        if self.ema is not None and not was_skipped:
            self.ema.update(self.model, self.step)
        if len(self.unread) >= self.check_every:
            self.check_gradients()

    @property
    def unread(self) -> Sequence[Any]:
        """Steps whose gradients the host has not checked yet."""
        return self.deferred.steps if self.deferred else ()

    def check_gradients(self) -> None:
        """Check the gradients since the last check.

        This waits for the device. It must precede every use of the weights that outlasts the run.

        Raises:
            Diverged: A gradient was not finite, in all processes. `step`, model and optimizer are as before its step.
        """
        if self.deferred is not None and self.unread and (found := self.deferred.read()):
            behind, text = found
            self.step -= behind
            raise Diverged(text)

    def gradient_norm(self) -> Tensor:
        """Compute the norm of all gradients.

        Raises Diverged if it is not finite. With fp16, the update is skipped instead.
        """
        if self.deferred is not None:
            return self.deferred.add()
        norm = get_total_norm([p.grad for p in self.parameters if p.grad is not None])
        if not self.scaler.is_enabled() and not norm.isfinite():
            gradients = {name: p.grad for name, p in self.model.named_parameters() if p.grad is not None}
            raise Diverged(describe_gradient(norm.item(), describe_non_finite(gradients)))
        return norm

    def mean_losses(self) -> dict[str, float]:
        """Average the losses since the last log line, over all processes.

        "loss" is the sum of the losses.

        Raises Diverged if a mean is not finite.
        """
        names = list(self.losses[0])
        columns = [[losses[name].float() for losses in self.losses] for name in names]
        means = self.ranks.mean(torch.stack([torch.stack(column).mean() for column in columns])).tolist()
        found = dict(zip(names, means, strict=True))
        if not all(map(math.isfinite, means)):
            raise Diverged(", ".join(f"{name} is {mean}" for name, mean in found.items() if not math.isfinite(mean)))
        return {"loss": sum(means)} | found

    def check_weights(self) -> None:
        """Raise Diverged if a weight is not finite in any process."""
        found = [describe_non_finite(model.state_dict()) for model in self.models.values()]
        told = [f"model{suffix}: {text}" for suffix, text in zip(self.models, found, strict=True) if text]
        if told := [text for texts in self.ranks.gather(told) for text in texts]:
            raise Diverged(f"a weight is not finite ({told[0]})")

    def save(
        self, writer: CheckpointWriter, run: Path, keep: int, metadata: Mapping[str, str], record: Mapping[str, Any]
    ) -> None:
        """Begin to write a checkpoint of the current step.

        All processes call this. The first process writes. Raises UserError if the checkpoint before cannot be written.
        """
        losses = self.ranks.gather([{name: loss.cpu() for name, loss in one.items()} for one in self.losses])
        if not self.ranks.is_main:
            return
        state = {
            "step": self.step,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "skipped": self.skipped,
            "losses": losses,
            "kept": self.kept,
        }
        if self.ema is not None:
            state["ema"] = self.ema.module.state_dict()
        record = {"step": self.step, **record, "versions": versions()}
        writer.save(run, self.step, self.model.state_dict(), metadata, state, record, keep)


def average_gradients(model: nn.Module, compiled: bool) -> DistributedDataParallel:
    """Wrap a model to average gradients over processes, during the backward pass.

    Compiled blocks stay inside of the wrapper: the gradients of a block are sent while the blocks before it are
    computed. `static_graph` would bring nothing, since all trained parameters are used in every step. The gradients are
    views of the buckets that are sent. Micro-batches that are not sent add to the same gradients. Without `device_ids`,
    the wrapper leaves the copies of a batch to the loss.
    """
    if compiled:
        torch._dynamo.config.optimize_ddp = False  # it would split a block that is larger than a bucket
    # Buffers are constants, which need no sending. torch 2.14 renamed the argument.
    renamed = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
    constant: dict[str, Any] = {"forward_sync_buffers" if renamed else "broadcast_buffers": False}
    return DistributedDataParallel(model, gradient_as_bucket_view=True, **constant)


def describe_gradient(norm: float, found: str) -> str:
    """Describe a gradient that is not finite."""
    return f"the norm of the gradient is {norm} ({found or 'no single gradient is infinite'})"


def add_up(losses: Losses) -> Tensor:
    """Add up the losses in float32 or more."""
    values = [value.to(torch.promote_types(value.dtype, torch.float32)) for value in losses.values()]
    return values[0] if len(values) == 1 else torch.stack(values).sum()


def own_losses(saved: list[Any], rank: int) -> list[Losses]:
    """Return the losses of one process.

    Earlier versions saved one loss of the first process.
    """
    if not saved:
        return []
    if isinstance(saved[0], Tensor):
        return [{"loss": loss} for loss in saved]
    losses: list[Losses] = saved[rank]
    return losses


def restore_weights(model: nn.Module, path: Path) -> None:
    """Load the weights of a checkpoint of the same model.

    Raises UserError if a tensor is missing, left over, of another shape, or not finite.
    """
    tensors, _ = read_safetensors(path)
    check_finite(tensors, path)
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        wrong = " ".join(str(error).split())[:300]
        raise UserError(f"{path}: does not fit the config: {wrong}. Resume with the config of the run.") from None


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
