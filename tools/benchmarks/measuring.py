"""Two sides measured in turn: processor and wall time, peak memory, after a check that both compute the same."""

from __future__ import annotations

import ctypes
import gc
import logging
import math
import resource
import shutil
import statistics
import sys
import tempfile
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

log = logging.getLogger(__name__)

Seconds = Literal["cpu", "wall", "children"]
LEAST_ROUNDS, MOST_ROUNDS = 3, 100
SHORTEST = 0.02  # seconds of a side in a round: shorter calls are repeated
MOST_CALLS = 1000  # of a side in a round
WARM_UP = {"cpu": 1, "cuda": 20}  # calls of each side before the first round
WARM_SECONDS = 3.0  # after which two calls are enough
NOISE = 1e-6  # of the largest tensor: smaller tensors are rounding errors
LEAST_BYTES = 2**20  # smaller peaks are noise, and give no ratio


@dataclass(frozen=True)
class Gate:
    """The largest difference of the results of two sides, and the limit that it must keep."""

    difference: float
    limit: float

    @property
    def holds(self) -> bool:
        """True if both sides compute the same. NaN is a difference."""
        return self.difference <= self.limit


@dataclass(frozen=True)
class Comparison:
    """Two functions that do the same work.

    Attributes:
        what, against: names of the work and of the other side.
        ours, other: do the work once. Their results are ignored.
        goals: ratio (other / ours) to reach, by kind of device.
        memory_goals: ratio of peak memory (ours / other) to stay below, by kind of device.
        gate: compares the results of both sides. None: they have none to compare, and `note` says why.
        seconds: what decides: processor seconds of this process or of its children, or wall time. On a GPU, wall time
            of the finished work decides.
        settle: called after every call, outside of the measured time.
    """

    what: str
    against: str
    ours: Callable[[], object]
    other: Callable[[], object]
    goals: Mapping[str, float] = field(default_factory=dict)
    memory_goals: Mapping[str, float] = field(default_factory=dict)
    gate: Callable[[], Gate] | None = None
    seconds: Seconds = "cpu"
    settle: Callable[[], object] | None = None
    note: str = ""


@dataclass(frozen=True)
class Row:
    """A line of the table. Ratios above 1 mean that ours is faster, or needs more memory.

    Attributes:
        ratio, lowest, highest: median and range over rounds of (seconds of the other side) / (ours).
        memory_ratio: peak memory of ours / of the other side, above what was in use before.
        gate: difference and limit; None: nothing to compare.
        void: why there is no ratio; empty if there is one.
        seconds, other_seconds: medians of a call.
        clock: "cpu", "wall" or "children", or "count" for ratios that are counted.
    """

    suite: str
    what: str
    against: str
    device: str = "cpu"
    goal: float | None = None
    ratio: float | None = None
    lowest: float | None = None
    highest: float | None = None
    wall_ratio: float | None = None
    memory_goal: float | None = None
    memory_ratio: float | None = None
    gate: Gate | None = None
    void: str = ""
    seconds: float | None = None
    other_seconds: float | None = None
    clock: str = "count"
    rounds: int = 0
    note: str = ""

    @property
    def verdict(self) -> str:
        """Outcome of the row: "void", "met", "missed", or empty without a goal."""
        if self.void:
            return "void"
        reached = []
        if self.goal is not None and self.ratio is not None:
            reached.append(self.ratio >= self.goal)
        if self.memory_goal is not None and self.memory_ratio is not None:
            reached.append(self.memory_ratio <= self.memory_goal)
        return ("met" if all(reached) else "missed") if reached else ""


@dataclass(frozen=True)
class Clock:
    """Two running clocks: the one that decides, and wall time."""

    decisive: Callable[[], float]
    wall: Callable[[], float] = time.perf_counter


@contextmanager
def exact_convolutions() -> Iterator[None]:
    """Compute convolutions in float32 on GPUs, where torch's default is TF32."""
    cudnn = torch.backends.cudnn
    before, cudnn.allow_tf32 = cudnn.allow_tf32, False
    try:
        yield
    finally:
        cudnn.allow_tf32 = before


def open_clock(device: torch.device, seconds: Seconds) -> Clock:
    """Choose the clocks for a device."""
    if device.type == "cuda" and seconds != "children":
        return Clock(_finished_time, _finished_time)
    decisive = {"cpu": time.process_time, "wall": time.perf_counter, "children": _children_time}
    return Clock(decisive[seconds])


def _finished_time() -> float:
    torch.cuda.synchronize()
    return time.perf_counter()


def _children_time() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def measure(
    comparison: Comparison,
    suite: str,
    device: torch.device,
    budget: float,
    clock: Clock | None = None,
    least: int = LEAST_ROUNDS,
    with_memory: bool = True,
) -> Row:
    """Check the gate, then run both sides in turn.

    Args:
        budget: wall seconds for the row. At least `least` rounds are measured, however long they take.
        clock: replaces the clocks of the device in tests.
    """
    kind = device.type
    with exact_convolutions():
        gate = comparison.gate() if comparison.gate else None
    about: dict[str, Any] = {
        "suite": suite,
        "what": comparison.what,
        "against": comparison.against,
        "device": kind,
        "goal": comparison.goals.get(kind),
        "memory_goal": comparison.memory_goals.get(kind),
        "gate": gate,
        "note": comparison.note,
    }
    if gate and not gate.holds:
        return Row(**about, void=f"results differ by {gate.difference:.3g}, more than {gate.limit:g}")
    clock = clock or open_clock(device, comparison.seconds)
    begun, settle = clock.wall(), comparison.settle or (lambda: None)
    sides = (comparison.ours, comparison.other)
    for number in range(WARM_UP.get(kind, 1) - (gate is not None)):  # the gate has called both sides
        if number >= 2 and clock.wall() - begun > WARM_SECONDS:
            break
        for side in sides:
            side()
            settle()
    with_memory = with_memory and comparison.seconds != "children"
    gc.collect()
    peaks = [_peak_of(side, settle, device) if with_memory else None for side in sides]
    rounds: list[list[tuple[float, float]]] = []
    calls, last = 1, 0.0
    while len(rounds) < least or (len(rounds) < MOST_ROUNDS and clock.wall() - begun + last <= budget):
        started = clock.wall()
        found = [_time_calls(side, settle, clock, calls) for side in sides]
        last = clock.wall() - started
        shortest = min(wall for _, wall in found)
        if calls == 1 and shortest < SHORTEST and not comparison.settle:
            calls = min(MOST_CALLS, math.ceil(SHORTEST / max(shortest, 1e-9)))
            if calls > 1:
                continue  # too short to measure by single calls
        rounds.append(found)
    return Row(**about, **summarise(rounds), memory_ratio=_memory_ratio(*peaks), clock=_clock_name(comparison, kind))


def _peak_of(side: Callable[[], object], settle: Callable[[], object], device: torch.device) -> int | None:
    found = peak_memory(side, device)
    settle()
    return found


def _clock_name(comparison: Comparison, kind: str) -> str:
    return "wall" if kind == "cuda" and comparison.seconds == "cpu" else comparison.seconds


def _time_calls(
    side: Callable[[], object], settle: Callable[[], object], clock: Clock, calls: int
) -> tuple[float, float]:
    """Return decisive and wall seconds of a call."""
    wall, decisive = clock.wall(), clock.decisive()
    for _ in range(calls):
        side()
    took = (clock.decisive() - decisive) / calls, (clock.wall() - wall) / calls
    settle()
    return took


def summarise(rounds: Iterable[list[tuple[float, float]]]) -> dict[str, Any]:
    """Summarise rounds of (decisive, wall) seconds of both sides."""
    found = list(rounds)
    ratios = [other[0] / max(ours[0], 1e-9) for ours, other in found]
    return {
        "ratio": statistics.median(ratios),
        "lowest": min(ratios),
        "highest": max(ratios),
        "wall_ratio": statistics.median(other[1] / max(ours[1], 1e-9) for ours, other in found),
        "seconds": statistics.median(ours[0] for ours, _ in found),
        "other_seconds": statistics.median(other[0] for _, other in found),
        "rounds": len(found),
    }


def _memory_ratio(ours: int | None, other: int | None) -> float | None:
    if ours is None or other is None or max(ours, other) < LEAST_BYTES:
        return None
    return ours / max(other, 1)


def peak_memory(run: Callable[[], object], device: torch.device) -> int | None:
    """Measure the bytes that a call needs at its peak.

    Bytes in use before are not counted. None: the system does not tell. On Linux, the highest resident size of the
    process is reset before the call.
    """
    if device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    try:
        ctypes.CDLL(None).malloc_trim(0)  # pages of earlier calls would hide those of this one
        Path("/proc/self/clear_refs").write_text("5")
        resident = _status("VmRSS")
    except (OSError, AttributeError):
        return None
    run()
    return max(_status("VmHWM") - resident, 0)


def _status(key: str) -> int:
    """Read bytes from the status of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


class ScratchFolder:
    """A temporary folder that disappears with the last function that holds it."""

    def __init__(self) -> None:
        self.path = Path(tempfile.mkdtemp(prefix="crossmae-benchmark-"))
        weakref.finalize(self, shutil.rmtree, self.path, True)


def largest_difference(ours: Iterable[Tensor], other: Iterable[Tensor]) -> float:
    """Find the largest difference of tensors, relative to their largest values.

    A difference is divided by the largest value of its tensor on the other side, so that small gradients count as much
    as large outputs. Tensors of rounding errors alone, a millionth of the largest tensor, do not count. NaN is a
    difference. Other shapes or another number of tensors are an infinite difference.
    """
    ones, twos = ([tensor.detach().double() for tensor in side] for side in (ours, other))
    if [one.shape for one in ones] != [two.shape for two in twos]:
        return math.inf
    scales = [float(two.abs().max()) for two in twos]
    least = max(NOISE * max(scales, default=0.0), sys.float_info.min)
    found = [
        float((one - two).abs().max()) / max(scale, least) for one, two, scale in zip(ones, twos, scales, strict=True)
    ]
    return math.nan if any(map(math.isnan, [*found, *scales])) else max(found, default=0.0)
