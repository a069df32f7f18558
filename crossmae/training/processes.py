"""Training in several processes, one per GPU, as started by `torchrun`."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from crossmae.errors import USER_ERROR_EXIT_CODE, UserError, repeat_command

T = TypeVar("T")

FAILED, READ = "failed", "read"  # keys of the store: the rank that failed first, and how many processes know it
READING_SECONDS = 5.0  # longest time that a failed process waits for the others to know it
LOST = r"gloo|connection (closed|reset)|broken pipe|timed? ?out|nccl"  # in errors of torch, not of this toolkit


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
    """Connect the processes: NCCL on GPUs, Gloo on CPUs.

    If one process fails, it tells its error to the others, and they end without an error of their own.

    Args:
        timeout_minutes: longest time that a process waits for the others. They wait while the main process validates.

    Raises:
        UserError: Another process ended without a reason, or did not answer in time.
        SystemExit: Another process failed and reports its error.
    """
    if ranks.world_size == 1:
        yield
        return
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.set_device(device)
    timeout = timedelta(minutes=timeout_minutes)
    store, rank, world_size = next(iter(dist.rendezvous("env://", timeout=timeout)))
    own = {"store": dist.PrefixStore("crossmae", store), "rank": rank, "world_size": world_size}
    dist.init_process_group("nccl" if on_gpu else "gloo", timeout=timeout, device_id=device if on_gpu else None, **own)
    failure: BaseException | None = None
    try:
        yield
    except BaseException as error:
        failure = error
        if is_lost(error):
            end_with_others(store, error, timeout_minutes)
        with suppress(RuntimeError):  # the store may be gone with its process
            store.set(FAILED, str(ranks.rank))
        raise
    finally:
        dist.destroy_process_group()
        if failure is not None and not is_lost(failure):
            wait_for_readers(store, ranks)


def is_lost(error: BaseException) -> bool:
    """Recognise the error of a process whose partner is gone or silent."""
    return isinstance(error, dist.DistError) or (
        type(error) is RuntimeError and re.search(LOST, str(error), re.IGNORECASE) is not None
    )


def end_with_others(store: dist.Store, error: BaseException, timeout_minutes: float) -> NoReturn:
    """End this process, because another one is gone or silent."""
    with suppress(RuntimeError):
        if store.check([FAILED]):
            store.add(READ, 1)
            raise SystemExit(USER_ERROR_EXIT_CODE)  # the other process reports its error
    reason = shorten_line(str(error))
    raise UserError(
        f"processes: another process of the run ended, or did not answer within {timeout_minutes:g} minutes: {reason}. "
        f"The last checkpoint stays. Look for its own error above. {repeat_command()} to continue."
    ) from error


def wait_for_readers(store: dist.Store, ranks: Ranks) -> None:
    """Keep this process until the others know that it failed."""
    end = time.monotonic() + READING_SECONDS
    with suppress(RuntimeError):
        while time.monotonic() < end and store.add(READ, 0) < ranks.world_size - 1:
            time.sleep(0.05)


def shorten_line(text: str) -> str:
    """Return the first line of an error, without its C++ part."""
    lines = text.strip().splitlines() or [""]
    return re.sub(r"^\[\S*:\d+\]\s*|\s*Exception raised from.*", "", lines[0])[:200]
