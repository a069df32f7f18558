"""Proves that threads change neither order nor errors, and that work does not run far ahead."""

from __future__ import annotations

import time
from itertools import count

import pytest

from crossmae.data.parallel import AHEAD, map_in_order


def test_order_is_kept_and_memory_bounded() -> None:
    started: list[int] = []

    def slow_at_first(number: int) -> int:
        started.append(number)
        time.sleep(0.02 if number % 7 == 0 else 0)
        return number * number

    results = map_in_order(slow_at_first, count(), threads=3)
    for number in range(30):
        assert next(results) == number * number
        assert len(started) <= number + 1 + AHEAD * 3
    results.close()  # type: ignore[attr-defined]


def test_the_first_error_in_order_is_raised() -> None:
    def fail(number: int) -> int:
        if number in (5, 6):
            raise ValueError(str(number))
        return number

    results = map_in_order(fail, range(100), threads=4)
    assert [next(results) for _ in range(5)] == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match="5"):
        next(results)


def test_fewer_items_than_threads() -> None:
    assert list(map_in_order(str, [1, 2], threads=8)) == ["1", "2"]
    assert list(map_in_order(str, [], threads=8)) == []
