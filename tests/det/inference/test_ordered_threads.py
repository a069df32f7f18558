"""Threads give the results of a loop, in its order, hold few items, and end at an error or a stop with its name."""

import threading
import time

import pytest
import torch
from tqdm import tqdm

from crossmae.data.parallel import AHEAD
from crossmae.errors import UserError
from det.inference.ordered_threads import MOST_THREADS, encode_in_order, host_threads


@pytest.fixture(autouse=True)
def bar():
    """Start tqdm's own thread, which begins with its first bar, before threads are counted."""
    with tqdm(disable=True) as bar:
        yield bar


def slow_square(number):
    time.sleep(0.002 * (number % 3))  # so that later items are ready before earlier ones
    return number * number


@pytest.mark.parametrize("threads", [0, 1, 3])
def test_results_are_in_order(threads):
    assert list(encode_in_order(slow_square, range(40), threads, str)) == [number**2 for number in range(40)]
    assert list(encode_in_order(slow_square, [], threads, str)) == []


@pytest.mark.parametrize("threads", [0, 2])
def test_few_items_are_held(threads):
    taken, most = 0, 0

    def items():
        nonlocal taken
        while taken < 60:
            taken += 1
            yield taken

    for given, _ in enumerate(encode_in_order(slow_square, items(), threads, str)):
        most = max(most, taken - given)
        time.sleep(0.001)
    assert given == 59
    assert 1 <= most <= max(AHEAD * threads, 1)


@pytest.mark.parametrize("threads", [0, 1, 3])
def test_an_error_names_its_item_and_ends_the_threads(threads):
    def fail(number):
        if number == 5:
            raise KeyError("lost\nmask")
        return slow_square(number)

    before, given = threading.active_count(), []
    with pytest.raises(RuntimeError, match=r"photo 5\.jpg: the predictions cannot be encoded: 'lost\\nmask'") as caught:
        given.extend(encode_in_order(fail, range(100), threads, "photo {}.jpg".format))
    assert isinstance(caught.value.__cause__, KeyError)
    assert threading.active_count() == before


@pytest.mark.parametrize("error", [UserError("a: wrong. Repair it."), MemoryError(), torch.OutOfMemoryError()])
@pytest.mark.parametrize("threads", [0, 2])
def test_errors_for_the_user_stay_as_they_are(threads, error):
    def fail(number):
        raise error

    with pytest.raises(type(error)) as caught:
        list(encode_in_order(fail, range(3), threads, str))
    assert caught.value is error


@pytest.mark.parametrize("threads", [0, 2])
def test_a_stop_between_items_waits_only_for_running_calls(threads):
    """As `until_stop` stops an evaluation."""
    called = []

    def items():
        yield from range(7)
        raise KeyboardInterrupt

    def slow(number):
        called.append(number)
        time.sleep(0.1)
        return number

    begun, before = time.monotonic(), threading.active_count()
    with pytest.raises(KeyboardInterrupt):
        list(encode_in_order(slow, items(), threads, str))
    assert time.monotonic() - begun < 2
    assert threading.active_count() == before
    assert len(called) <= (4 if threads else 7)


def test_a_reader_that_ends_early_ends_the_threads():
    before = threading.active_count()
    results = encode_in_order(slow_square, range(100), 2, str)
    assert next(results) == 0
    results.close()
    assert threading.active_count() == before


def test_a_cpu_has_no_threads_and_a_gpu_a_few(monkeypatch):
    assert host_threads(torch.device("cpu")) == 0
    assert 1 <= host_threads(torch.device("cuda")) <= MOST_THREADS
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1000")
    assert host_threads(torch.device("cuda")) == 1
