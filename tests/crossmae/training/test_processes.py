"""Proves how processes find each other, and that compiled blocks and deferred checks work in several.

tests/faults/test_ranks.py proves that whole runs train like one.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from crossmae.errors import UserError
from crossmae.models.crossmae import CrossMAE
from crossmae.training import state as state_module
from crossmae.training.devices import compile_blocks
from crossmae.training.processes import Ranks, find_ranks
from crossmae.training.state import Diverged, Losses, TrainingState

STEPS, PARTS, PROCESSES, IMAGES = 3, 2, 2, 4
CASES = (None, (1, 1))  # step and process of a gradient that is not finite


def test_processes_without_an_address_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match=r"RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT not set\. .*torchrun"):
        find_ranks()


def masked_loss(model: nn.Module, batch: tuple[Tensor, Tensor], number: int) -> Losses:
    images, noise = batch
    return {"loss": model(images, noise=noise).loss}


def train_share(ranks: Ranks, compiled: bool, check_every: int, bad: tuple[int, int] | None) -> dict[str, Any]:
    """Train on this process's share of fixed batches. The gradient of the step and process `bad` is infinite."""
    torch.manual_seed(0)
    model = CrossMAE(16, 4, 3, 16, 3, 2, 16, 3, 2)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)
    state = TrainingState(model, optimizer, ranks, "fp32", 0.9, 0.1, compiled, None, check_every=check_every)
    images = torch.randn(STEPS, PARTS, IMAGES, 3, 16, 16)
    noise = torch.rand(STEPS, PARTS, IMAGES, 16)
    own, error = IMAGES // ranks.world_size, ""
    share = slice(ranks.rank * own, (ranks.rank + 1) * own)
    try:
        for step in range(STEPS):
            for part in range(PARTS):
                pixels = images[step, part, share]
                if bad == (step, ranks.rank):
                    pixels = pixels * float("inf")
                batch = (pixels, noise[step, part, share])
                state.forward_backward(masked_loss, batch, step * PARTS + part, PARTS, part == PARTS - 1)
            state.update(0.01)
        state.check_gradients()
    except Diverged as diverged:
        error = str(diverged)
    return {"weights": model.state_dict(), "step": state.step, "error": error, "unread": len(state.unread)}


def process(rank: int, folder: str) -> None:
    """Train in one of several processes with compiled blocks, and write the results of all cases."""
    warnings.filterwarnings("ignore")
    state_module.compile_blocks = lambda model: compile_blocks(model, backend="eager")  # type: ignore[assignment]
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=PROCESSES)
    ranks = Ranks(rank, rank, PROCESSES)
    results = [train_share(ranks, compiled=True, check_every=100, bad=bad) for bad in CASES]
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_compiled_blocks_and_deferred_checks_equal_one_process(tmp_path: Path) -> None:
    """Gradients are accumulated over two micro-batches, and only those of the last one are exchanged."""
    torch.multiprocessing.spawn(process, (str(tmp_path),), PROCESSES)
    results = [torch.load(tmp_path / f"{rank}.pt") for rank in range(PROCESSES)]
    for bad, first, second in zip(CASES, *results, strict=True):
        expected = train_share(Ranks(), compiled=False, check_every=1, bad=bad and (bad[0], 0))
        for result in (first, second):
            assert result["step"] == expected["step"] == (STEPS if bad is None else bad[0])
            assert ("gradient is nan" in result["error"]) == (bad is not None)
            assert result["unread"] == 0
        for name, value in expected["weights"].items():
            assert torch.equal(second["weights"][name], first["weights"][name])
            if not name.endswith(("attn.qkv.bias", "attn.kv.bias")):  # AdamW scales up the rounding of unused biases
                torch.testing.assert_close(first["weights"][name], value, rtol=1e-4, atol=1e-5, msg=name)
