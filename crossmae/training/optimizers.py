"""AdamW, and Muon for the matrices of the blocks with AdamW for everything else."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from crossmae.errors import UserError

_IN_BLOCK = re.compile(r"(decoder_)?blocks\.\d+\.")


class MuonWithAdamW(torch.optim.Optimizer):
    """Muon and AdamW as one optimizer, with one list of groups and one state for checkpoints.

    Muon (torch.optim.Muon, momentum 0.95) scales its steps so that the learning rate and the weight decay of AdamW fit
    (arXiv 2502.16982, 2.2). Queries, keys and values of a layer are one matrix, as they are stored.

    Args:
        hidden, others: parameter groups for Muon and for AdamW.
    """

    def __init__(
        self, hidden: list[dict[str, Any]], others: list[dict[str, Any]], lr: float, betas: tuple[float, float]
    ) -> None:
        self.muon = torch.optim.Muon(hidden, lr=lr, adjust_lr_fn="match_rms_adamw")
        self.adamw = torch.optim.AdamW(others, lr=lr, betas=betas, fused=True)
        self.hidden = len(hidden)
        super().__init__(self.muon.param_groups + self.adamw.param_groups, {})

    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Update all parameters. A closure is not supported."""
        assert closure is None
        # A restart replaces the groups and the state, so both parts get them at every step.
        self.muon.param_groups = self.param_groups[: self.hidden]
        self.adamw.param_groups = self.param_groups[self.hidden :]
        self.muon.state = self.adamw.state = self.state
        self.muon.step()
        self.adamw.step()


def make_optimizer(
    name: str, model: nn.Module, groups: list[dict[str, Any]], lr: float, betas: tuple[float, float]
) -> torch.optim.Optimizer:
    """Build AdamW, or with `name` "muon" the optimizer `MuonWithAdamW`.

    Args:
        groups: parameter groups of the model for AdamW, split here for Muon.

    Raises:
        UserError: torch has no Muon, or no matrix of a block is trained.
    """
    if name != "muon":
        return torch.optim.AdamW(groups, lr=lr, betas=betas, fused=True)
    if not hasattr(torch.optim, "Muon"):
        raise UserError(f"optim.name: torch {torch.__version__} has no Muon. Install torch 2.9 or later, or use adamw.")
    hidden, others = split_groups(model, groups)
    if not hidden:
        raise UserError("optim.name: muon has no matrix to train, all blocks are frozen. Use adamw.")
    return MuonWithAdamW(hidden, others, lr, betas)


def can_skip(optimizer: torch.optim.Optimizer) -> bool:
    """Check for an optimizer that can skip an update without the host.

    Such an optimizer reads its attribute `found_inf`, which is public for the loss scaler of mixed precision.
    """
    return isinstance(optimizer, torch.optim.AdamW) and all(group["fused"] for group in optimizer.param_groups)


def split_groups(
    model: nn.Module, groups: Iterable[dict[str, Any]]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Split groups into matrices of encoder and decoder blocks, and all others.

    Both keep the other settings of a group. Empty groups are left out.
    """
    matrices = {id(p) for name, p in model.named_parameters() if p.ndim == 2 and _IN_BLOCK.match(name)}
    hidden: list[dict[str, Any]] = []
    others: list[dict[str, Any]] = []
    for group in groups:
        for is_hidden, split in ((True, hidden), (False, others)):
            if held := [p for p in group["params"] if (id(p) in matrices) == is_hidden]:
                split.append(group | {"params": held})
    return hidden, others
