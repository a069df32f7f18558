"""Suites of one training step's parts: the optimizer's update, checkpoints, and a classifier's step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.data import Mixup
from timm.loss import SoftTargetCrossEntropy
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from crossmae.checkpoints.run_checkpoint import CheckpointWriter, complete_checkpoints
from crossmae.classification.data import LabelledImages
from crossmae.classification.train.config import LabelledDataConfig, LossConfig
from crossmae.classification.train.objective import Objective
from crossmae.classification.train.train import classification_loss
from crossmae.classification.vit import Architecture, build_vit
from crossmae.classification.vit import parameter_groups as layer_groups
from crossmae.data.pixels import Normalize
from crossmae.models.crossmae import CrossMAE
from crossmae.models.layers import LayerNorm
from crossmae.models.sizes import SIZES, model_arguments
from crossmae.pretraining.train import parameter_groups
from crossmae.training.devices import choose_precision
from crossmae.training.loop import steps_unread
from crossmae.training.optimizers import make_optimizer
from crossmae.training.processes import Ranks
from crossmae.training.state import TrainingState
from tools.benchmarks.measuring import Comparison, Gate, Row, ScratchFolder, largest_difference
from tools.benchmarks.pretraining import BETAS, LR, MEAN, STD, WEIGHT_DECAY, open_state

Build = Callable[[], Comparison | Row]
DECAY, CLIP = 0.999, 1.0


def optimizer(
    device: torch.device, size: str = "base_patch16", overrides: Mapping[str, Any] | None = None
) -> list[Build]:
    """List the update of all weights, with clipping and averaged weights."""
    arguments = model_arguments(f"crossmae_vit_{size}") | dict(overrides or {})
    return [partial(compare_updates, arguments, device)]


def make_state(
    arguments: Mapping[str, Any],
    device: torch.device,
    start: Path | None = None,
    ema: float | None = None,
    clip: float | None = None,
) -> TrainingState:
    """Build model, optimizer and state as the trainer does."""
    torch.manual_seed(0)
    model = CrossMAE(**arguments).to(device)
    made = make_optimizer("adamw", model, parameter_groups(model, WEIGHT_DECAY), LR, BETAS)
    return TrainingState(model, made, Ranks(), "fp32", ema, clip, False, start, check_every=steps_unread(device))


def give_gradients(parameters: list[nn.Parameter]) -> None:
    """Draw a gradient for every trained parameter."""
    draw = torch.Generator().manual_seed(1)
    for parameter in parameters:
        if parameter.requires_grad:
            parameter.grad = torch.randn(parameter.shape, generator=draw).to(parameter.device)


class PlainUpdate:
    """AdamW, clipping and averaged weights with torch's defaults and a loop over tensors.

    Attributes:
        average: averaged weights, in the order of the parameters.
    """

    def __init__(self, arguments: Mapping[str, Any], device: torch.device) -> None:
        torch.manual_seed(0)
        self.model = CrossMAE(**arguments).to(device)
        self.optimizer = torch.optim.AdamW(parameter_groups(self.model, WEIGHT_DECAY), lr=LR, betas=BETAS)
        self.parameters = list(self.model.parameters())
        self.average = [p.detach().clone() for p in self.parameters]

    def __call__(self) -> None:
        """Update once, and keep the gradients."""
        trained = [p for p in self.parameters if p.grad is not None]
        norm = torch.stack([p.grad.norm() for p in trained if p.grad is not None]).norm()
        scale = (CLIP / (norm + 1e-6)).clamp(max=1)
        for p in trained:
            assert p.grad is not None
            p.grad.mul_(scale)
        self.optimizer.step()
        for mean, p in zip(self.average, self.parameters, strict=True):
            mean.mul_(DECAY).add_(p.detach(), alpha=1 - DECAY)


def compare_updates(arguments: Mapping[str, Any], device: torch.device) -> Comparison:
    """Compare updates of the weights from the same gradients."""
    state, other = make_state(arguments, device, ema=DECAY, clip=CLIP), PlainUpdate(arguments, device)
    give_gradients(state.parameters)
    give_gradients(other.parameters)
    kept = [p.grad for p in state.parameters]

    def ours() -> None:
        for parameter, gradient in zip(state.parameters, kept, strict=True):
            parameter.grad = gradient
        state.update(LR)

    def gate() -> Gate:
        for _ in range(3):
            ours()
            other()
        difference = largest_difference(state.parameters, other.parameters)
        return Gate(difference, 1e-6)

    return Comparison(
        what=f"AdamW, clipping and EMA of {sum(p.numel() for p in state.parameters) / 1e6:.0f} M parameters",
        against="torch's default AdamW, tensor by tensor",
        ours=ours,
        other=other,
        goals={"cuda": 2.5},
        gate=gate,
    )


def checkpoint(
    device: torch.device, size: str = "base_patch16", overrides: Mapping[str, Any] | None = None
) -> list[Build]:
    """List the wait for a checkpoint, and a restart from it."""
    arguments = model_arguments(f"crossmae_vit_{size}") | dict(overrides or {})
    return [partial(compare_saves, arguments, device), partial(compare_restarts, arguments, device)]


class Checkpoints:
    """Checkpoints of the same state in a temporary folder, ours and torch's."""

    def __init__(self, arguments: Mapping[str, Any], device: torch.device) -> None:
        self.folder = ScratchFolder()
        self.ours, self.plain = self.folder.path / "run", self.folder.path / "plain.pt"
        self.state, self.writer = make_state(arguments, device), CheckpointWriter()
        give_gradients(self.state.parameters)
        self.state.update(LR)

    def save(self) -> None:
        """Begin to save ours under a new step."""
        self.state.step += 1
        self.state.save(self.writer, self.ours, 1, {}, {})

    def save_plain(self) -> None:
        """Save model and optimizer by `torch.save`."""
        state = {"model": self.state.model.state_dict(), "optimizer": self.state.optimizer.state_dict()}
        torch.save(state, self.plain)


def compare_saves(arguments: Mapping[str, Any], device: torch.device) -> Comparison:
    """Compare how long training waits for a checkpoint."""
    files = Checkpoints(arguments, device)

    def gate() -> Gate:
        files.save()
        files.writer.wait()
        again = make_state(arguments, device, complete_checkpoints(files.ours)[-1])
        return Gate(largest_difference(again.model.state_dict().values(), files.state.model.state_dict().values()), 0.0)

    return Comparison(
        what="time that training waits for a checkpoint",
        against="torch.save",
        ours=files.save,
        other=files.save_plain,
        goals=dict.fromkeys(("cpu", "cuda"), 10.0),
        gate=gate,
        seconds="wall",
        settle=files.writer.wait,
    )


def compare_restarts(arguments: Mapping[str, Any], device: torch.device) -> Comparison:
    """Compare restarts from a checkpoint, with building the model."""
    files = Checkpoints(arguments, device)
    files.save()
    files.save_plain()
    files.writer.wait()
    start = complete_checkpoints(files.ours)[-1]

    def ours() -> TrainingState:
        return make_state(arguments, device, start)

    def other() -> TrainingState:
        state = make_state(arguments, device)
        found = torch.load(files.plain, map_location="cpu", weights_only=True)
        state.model.load_state_dict(found["model"])
        state.optimizer.load_state_dict(found["optimizer"])
        return state

    def tensors(state: TrainingState) -> Iterator[Tensor]:
        yield from state.model.state_dict().values()
        for moments in state.optimizer.state_dict()["state"].values():
            yield from (moments["exp_avg"], moments["exp_avg_sq"])

    return Comparison(
        what="restart from a checkpoint",
        against="torch.load, without a check",
        ours=ours,
        other=other,
        goals={"cpu": 1.0},
        gate=lambda: Gate(largest_difference(tensors(ours()), tensors(other())), 0.0),
        seconds="wall",
    )


def finetune(
    device: torch.device,
    size: str = "base_patch16",
    images: int | None = None,
    img_size: int = 224,
    classes: int = 1000,
    overrides: Mapping[str, Any] | None = None,
) -> list[Build]:
    """List a classifier's training step with mixup."""
    chosen = SIZES[size]
    values: dict[str, Any] = {"embed_dim": chosen.embed_dim, "depth": chosen.depth, "num_heads": chosen.num_heads}
    values |= {"patch_size": chosen.patch_size} | dict(overrides or {})
    count = images or (256 if device.type == "cuda" else 8)
    return [partial(compare_classifiers, values, count, img_size, classes, device)]


class LabelledBatch:
    """Random uint8 images with classes."""

    def __init__(self, images: int, img_size: int, classes: int, device: torch.device) -> None:
        draw = torch.Generator().manual_seed(0)
        shape = (images, 3, img_size, img_size)
        self.images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=draw).to(device)
        self.targets = torch.randint(0, classes, (images,), generator=draw).to(device)


def compare_classifiers(
    values: Mapping[str, Any], images: int, img_size: int, classes: int, device: torch.device
) -> Comparison:
    """Compare a step with timm's model, mixup and loss."""
    torch.manual_seed(0)
    ours = build_vit(Architecture((img_size, img_size), in_chans=3, mlp_ratio=4.0, **values), classes).to(device)
    other = VisionTransformer(
        img_size=img_size, num_classes=classes, global_pool="avg", norm_layer=LayerNorm, **values
    ).to(device)
    other.load_state_dict(ours.state_dict(), strict=True)
    batch = LabelledBatch(images, img_size, classes, device)
    pixels = Normalize(MEAN, STD, device)(batch.images)
    precision = choose_precision("auto", device)

    def gate() -> Gate:
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            return Gate(largest_difference([ours.eval()(pixels)], [other.eval()(pixels)]), 1e-5)

    return Comparison(
        what=f"step of a classifier of width {values['embed_dim']}, batch {images}, mixup, {precision}",
        against="timm's model, mixup and loss",
        ours=our_classifier_step(ours, batch, classes, precision),
        other=their_classifier_step(other, pixels, batch.targets, classes),
        goals={"cuda": 1.6},
        gate=gate,
    )


def our_classifier_step(
    model: VisionTransformer, batch: LabelledBatch, classes: int, precision: str
) -> Callable[[], None]:
    """Return a step as the classifier's trainer makes it."""
    device, names = batch.images.device, tuple(map(str, range(classes)))
    source: Any = None  # only the names of the classes are read
    labelled = LabelledImages(source, batch.targets.cpu(), names, names, None, None)
    data, loss = LabelledDataConfig(erase=0.0), LossConfig(mixup=0.8)
    objective = Objective(loss, data, labelled, len(batch.images), device)
    made = make_optimizer("adamw", model, layer_groups(model, WEIGHT_DECAY, 0.65), LR, (0.9, 0.999))
    state = open_state(model, made, precision)
    compute = partial(classification_loss, objective, Normalize(MEAN, STD, device), 0, 0)
    model.train()

    def step() -> None:
        model.train()
        state.forward_backward(compute, batch, state.step, 1, True)
        state.update(LR)

    return step


def their_classifier_step(
    model: VisionTransformer, pixels: Tensor, targets: Tensor, classes: int
) -> Callable[[], None]:
    """Return a step as a plain script makes it.

    On a GPU, the step computes in fp16.
    """
    made = torch.optim.AdamW(layer_groups(model, WEIGHT_DECAY, 0.65), lr=LR, betas=(0.9, 0.999))
    mix, loss = Mixup(0.8, label_smoothing=0.1, num_classes=classes), SoftTargetCrossEntropy()
    is_half = pixels.device.type == "cuda"
    scaler = torch.amp.GradScaler(pixels.device.type, enabled=is_half)

    def step() -> None:
        model.train()
        np.random.seed(0)
        mixed, shares = mix(pixels.clone(), targets)
        with torch.autocast(pixels.device.type, torch.float16, enabled=is_half):
            value = loss(model(mixed), shares)
        made.zero_grad()
        scaler.scale(value).backward()
        scaler.step(made)
        scaler.update()

    return step
