"""Proves that the host does not wait for the device in a training step, except where a check is due."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data._utils.pin_memory import pin_memory

from crossmae.classification.train.config import FinetuneConfig
from crossmae.classification.train.objective import Objective
from crossmae.classification.train.train import classification_loss
from crossmae.classification.vit import Architecture, build_vit, parameter_groups
from crossmae.data.pixels import Normalize
from crossmae.models.crossmae import CrossMAE
from crossmae.pretraining import train as pretraining
from crossmae.pretraining.device_crops import Cut, PackedCrops, pack_crops
from crossmae.training.optimizers import make_optimizer
from crossmae.training.processes import Ranks
from crossmae.training.state import Loss, TrainingState
from tests.crossmae.training.host_reads import HostReads

CPU = torch.device("cpu")
BETAS = (0.9, 0.95)
SIZE: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}
DECODER = {"decoder_embed_dim": 16, "decoder_depth": 2, "decoder_num_heads": 2}

Step = Callable[[int], None]


def trainer(model: nn.Module, groups: Any, loss: Loss, batch: Any, check_every: int, precision: str) -> Step:
    """A function that makes optimizer step `number` of two micro-batches."""
    optimizer = make_optimizer("adamw", model, groups, 1e-3, BETAS)
    state = TrainingState(model, optimizer, Ranks(), precision, 0.9, 1.0, False, None, check_every=check_every)

    def step(number: int) -> None:
        for part in range(2):
            state.losses.append(state.forward_backward(loss, batch, 2 * number + part, 2, part == 1))
        state.update(1e-3)

    return step


def on_host(device: torch.device, **values: Any) -> SimpleNamespace:
    """A batch as the loader gives it: pinned for a GPU."""
    return SimpleNamespace(**(pin_memory(values) if device.type == "cuda" else values))


def packed_crops() -> PackedCrops:
    sides = [(40, 50), (10, 12), (33, 20), (64, 64), (32, 32), (90, 17)]
    return pack_crops([Cut(torch.randint(256, (*side, 3), dtype=torch.uint8), True) for side in sides], (32, 32), 2**14)


def pretraining_step(
    check_every: int = 100,
    device: torch.device = CPU,
    precision: str = "bf16",
    crops: bool = False,
    **overrides: Any,
) -> Step:
    torch.manual_seed(0)
    model = CrossMAE(**SIZE, **DECODER, **overrides).to(device)
    images = packed_crops() if crops else torch.randint(256, (6, 3, 32, 32), dtype=torch.uint8)
    batch = on_host(device, images=images, noise=torch.rand(6, 16))
    normalize = Normalize((0.5,) * 3, (0.3,) * 3, device)
    loss = partial(pretraining.reconstruction_loss, normalize, 0.75, 0.25)
    return trainer(model, pretraining.parameter_groups(model, 0.05), loss, batch, check_every, precision)


def classification_step(
    check_every: int = 100, device: torch.device = CPU, precision: str = "bf16", several: bool = False, **loss: Any
) -> Step:
    torch.manual_seed(0)
    data = {"train": "nowhere", "erase": 0.5} | ({"separator": "|"} if several else {})
    config = FinetuneConfig.model_validate({"output_dir": "nowhere", "data": data, "model": {}, "loss": loss})
    labels = torch.randint(4, (6,))
    targets = nn.functional.one_hot(labels, 4).float() if several else labels
    labelled: Any = SimpleNamespace(classes=tuple("abcd"), targets=targets)
    model = build_vit(Architecture((32, 32), 8, 3, 16, 3, 2, 4.0), 4, drop_path=0.5).to(device)
    batch = on_host(device, images=torch.randint(256, (6, 3, 32, 32), dtype=torch.uint8), targets=targets)
    objective = Objective(config.loss, config.data, labelled, 6, device)
    normalize = Normalize((0.5,) * 3, (0.3,) * 3, device)
    of_batch = partial(classification_loss, objective, normalize, 0, 0)
    return trainer(model, parameter_groups(model, 0.05, 0.75), of_batch, batch, check_every, precision)


STEPS: dict[str, Callable[..., Step]] = {
    "crossmae": pretraining_step,
    "no fusion": partial(pretraining_step, fuse_blocks=()),
    "blocks of patches": partial(pretraining_step, mask_block=2, decoder="cross_self"),
    "crops on the device": partial(pretraining_step, crops=True),
    "mae": partial(pretraining_step, decoder="self"),
    "classifier": classification_step,
    "mixup and cutmix": partial(classification_step, mixup=0.8, cutmix=1.0),
    "several labels": partial(classification_step, several=True, mixup=0.8),
}


@pytest.mark.parametrize("name", STEPS)
def test_a_step_with_a_deferred_check_reads_nothing(name: str) -> None:
    step = STEPS[name]()
    step(0)  # the optimizer makes its moments
    with HostReads() as reads:
        for number in range(1, 5):
            step(number)
    assert not reads.found


@pytest.mark.parametrize("name", ["crossmae", "classifier"])
def test_a_check_in_every_step_is_counted(name: str) -> None:
    """The counter sees what the deferred check leaves out."""
    step = STEPS[name](check_every=1)
    with HostReads() as reads:
        step(0)
        step(1)
    assert reads.found == {"_local_scalar_dense": 2}


@pytest.mark.parametrize(
    "read",
    [
        lambda loss: loss.item(),
        lambda loss: loss.tolist(),
        lambda loss: loss.numpy(),
        lambda loss: loss.cpu(),
        float,
        bool,
        lambda loss: torch.equal(loss, loss),
        lambda loss: loss.expand(3)[loss.expand(3) > 0],
        lambda loss: torch.where(loss.expand(3) > 0),
        lambda loss: loss * torch.tensor([1.0, 2.0]),
    ],
)
def test_a_read_in_the_model_is_counted(monkeypatch: pytest.MonkeyPatch, read: Callable[[Any], Any]) -> None:
    loss = CrossMAE.loss

    def read_loss(*given: Any) -> torch.Tensor:
        value = loss(*given)
        read(value.detach())
        return value

    monkeypatch.setattr(CrossMAE, "loss", read_loss)
    step = pretraining_step()
    with HostReads() as reads:
        step(0)
    assert reads.found


@contextmanager
def forbidden_waiting() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", STEPS)
def test_a_step_on_a_gpu_does_not_wait(name: str, precision: str) -> None:
    """Not run on a GPU yet."""
    step = STEPS[name](device=torch.device("cuda"), precision=precision)
    step(0)
    torch.cuda.synchronize()
    with forbidden_waiting():
        for number in range(1, 5):
            step(number)
    torch.cuda.synchronize()
