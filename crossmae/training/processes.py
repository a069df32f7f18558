"""Training in several processes, one per GPU, as started by `torchrun`."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from crossmae.errors import USER_ERROR_EXIT_CODE, UserError

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """Global and local number of this process, and the number of processes."""

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1

    @property
    def is_main(self) -> bool:
        """True in the process that writes files."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """Sum `values` over all processes."""
        if self.world_size > 1:
            dist.all_reduce(values)
        return values

    def mean(self, values: Tensor) -> Tensor:
        """Average `values` over all processes."""
        return self.sum(values) / self.world_size

    def gather(self, value: T) -> list[T]:
        """Gather the values of all processes, ordered by process number."""
        if self.world_size == 1:
            return [value]
        values: list[T] = [value] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def together(self, step: Callable[[], T]) -> T:
        """Run `step` in every process, and continue only if all succeed.

        Raises:
            UserError: If `step` failed in this process and in no process with a lower number.
            SystemExit: If another process reports the error.
        """
        problem: UserError | None = None
        try:
            result = step()
        except UserError as error:
            problem = error
        failed = self.gather(problem is not None)
        if problem is not None and failed.index(True) == self.rank:
            raise problem
        if any(failed):
            raise SystemExit(USER_ERROR_EXIT_CODE)  # only one process reports the error
        return result

    def wait(self) -> None:
        """Wait for all processes."""
        if self.world_size > 1:
            dist.barrier()


def find_ranks() -> Ranks:
    """Read the process numbers from torchrun's environment variables."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return Ranks()
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in names if name not in os.environ]
    if missing:
        raise UserError(f"WORLD_SIZE: over 1, but {', '.join(missing)} not set. Start several processes by torchrun.")
    return Ranks(*(int(os.environ[name]) for name in names[:3]))


@contextmanager
def process_group(ranks: Ranks, device: torch.device, timeout_minutes: float = 30.0) -> Iterator[None]:
    """Connect the processes: NCCL on GPUs, Gloo on CPUs."""
    if ranks.world_size == 1:
        yield
        return
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.set_device(device)
    timeout = timedelta(minutes=timeout_minutes)  # the others wait while the main process validates and probes
    dist.init_process_group("nccl" if on_gpu else "gloo", timeout=timeout, device_id=device if on_gpu else None)
    try:
        yield
    finally:
        dist.destroy_process_group()
