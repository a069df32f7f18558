"""Ratios are those of the two sides' seconds, and a row whose sides differ has no ratio."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from tools.benchmarks.measuring import (
    Clock,
    Comparison,
    Gate,
    Row,
    largest_difference,
    measure,
    open_clock,
    peak_memory,
)

CPU = torch.device("cpu")


class FakeTime:
    """Processor and wall seconds that pass only by `work`."""

    def __init__(self) -> None:
        self.cpu, self.wall, self.calls = 0.0, 0.0, ""

    def work(self, name: str, *seconds: float) -> Callable[[], None]:
        """Return a function that takes these processor seconds, one per call, the last for all further calls."""
        left = list(seconds)

        def run() -> None:
            spent = left.pop(0) if len(left) > 1 else left[0]
            self.cpu, self.wall, self.calls = self.cpu + spent, self.wall + 3 * spent, self.calls + name

        return run

    @property
    def clock(self) -> Clock:
        return Clock(lambda: self.cpu, lambda: self.wall)


def compare(time: FakeTime, ours: Callable[[], None], other: Callable[[], None], budget: float = 0.0, **more) -> Row:
    comparison = Comparison("work", "other", ours, other, **more)
    return measure(comparison, "suite", CPU, budget, time.clock, with_memory=False)


def test_sides_alternate_after_a_warm_up_and_the_ratio_is_the_median_of_rounds():
    time = FakeTime()
    # The first call warms up. Then: 4 / 2, 9 / 3, 40 / 4.
    row = compare(time, time.work("a", 100, 2, 3, 4), time.work("b", 1, 4, 9, 40), goals={"cpu": 2.5, "cuda": 9})
    assert time.calls == "ab" + "ab" * 3
    assert (row.ratio, row.lowest, row.highest, row.rounds) == (3.0, 2.0, 10.0, 3)
    assert (row.seconds, row.other_seconds, row.wall_ratio) == (3.0, 9.0, 3.0)
    assert (row.goal, row.verdict, row.clock, row.void) == (2.5, "met", "cpu", "")


def test_rounds_fill_the_budget_and_short_calls_are_repeated():
    time = FakeTime()
    row = compare(time, time.work("a", 1), time.work("b", 1), budget=6 + 6 * 5)  # a round takes 6 wall seconds
    assert row.rounds == 5
    time = FakeTime()
    row = compare(time, time.work("a", 0.001), time.work("b", 0.002))  # 3 and 6 wall milliseconds
    assert time.calls == "ab" + "ab" + 3 * ("a" * 7 + "b" * 7)  # single calls are too short to count
    assert row.ratio == pytest.approx(2.0)
    assert row.seconds == pytest.approx(0.001)


def test_settling_is_not_measured():
    time = FakeTime()
    settle = time.work("s", 50)
    row = compare(time, time.work("a", 1), time.work("b", 2), settle=settle)
    assert (row.ratio, time.calls) == (2.0, "asbs" + "asbs" * 3)


@pytest.mark.parametrize("difference", [2e-5, math.nan, math.inf])
def test_a_broken_gate_voids_the_row_before_anything_is_measured(difference):
    time = FakeTime()
    row = compare(time, time.work("a", 1), time.work("b", 9), gate=lambda: Gate(difference, 1e-5), goals={"cpu": 2})
    assert (row.ratio, row.verdict, time.calls) == (None, "void", "")
    assert "differ" in row.void


def test_a_verdict_needs_both_time_and_memory():
    about = {"suite": "s", "what": "w", "against": "a", "ratio": 2.0}
    assert Row(**about).verdict == ""
    assert Row(**about, goal=2.0).verdict == "met"
    assert Row(**about, goal=2.1).verdict == "missed"
    assert Row(**about, goal=2.0, memory_goal=0.5, memory_ratio=0.6).verdict == "missed"
    assert Row(**about, goal=2.0, memory_goal=0.5, memory_ratio=0.4).verdict == "met"


def test_differences_are_relative_and_found_with_nan_and_shapes():
    one = torch.tensor([1.0, 2.0])
    assert largest_difference([one, one], [one, one + 0.25]) == pytest.approx(0.25 / 2.25)
    assert largest_difference([1e-4 * one, one], [2e-4 * one, one]) == pytest.approx(0.5)  # a small gradient
    assert largest_difference([1e-8 * one, one], [-1e-9 * one, one]) < 0.02  # rounding errors next to a tensor of ones
    assert largest_difference([one * 0], [one * 0]) == 0
    assert largest_difference([one], [one * 0]) > 1
    assert math.isnan(largest_difference([one, one], [one * math.nan, one]))
    assert largest_difference([one], [one[:1]]) == math.inf
    assert largest_difference([one], [one, one]) == math.inf


def test_peak_memory_is_that_of_one_call():
    size = 64 * 2**20
    kept = torch.ones(size // 4)  # in use before, so it does not count
    found = peak_memory(lambda: torch.ones(size).sum(), CPU)
    if found is None:
        pytest.skip("this system does not tell the peak memory of a process")
    assert 3.8 * size <= found <= 4.6 * size  # some pages may have been there before
    small = peak_memory(lambda: kept.sum(), CPU)
    assert small is not None
    assert small < size / 4


def test_processor_seconds_do_not_count_waiting():
    import time

    clock = open_clock(CPU, "cpu")
    before, wall = clock.decisive(), clock.wall()
    time.sleep(0.05)
    assert clock.decisive() - before < 0.04 <= clock.wall() - wall
