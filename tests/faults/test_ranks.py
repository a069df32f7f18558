"""Proves that two processes train like one, and that they end together, with the first cause as the last line.

The processes are started with torchrun's environment variables, and meet through Gloo on the CPU. As under torchrun,
the process that starts them keeps the store by which they meet.
"""

from __future__ import annotations

import json
import re
import signal
import time
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed import TCPStore

from crossmae.checkpoints.run_checkpoint import MODEL, complete_checkpoints
from tests.faults.conftest import Whole, WholeOf
from tests.faults.digests import TIMINGS, differences, digest
from tests.faults.test_signals import CODES, ONE_IN_EVERY_TEST, ends, only_last
from tests.faults.trainers import LOOP, TRAINERS
from tests.faults.zygote import Run, Zygote

DEADLINE = 60  # seconds for the end of all processes on a busy machine; waiting for each other would take minutes
OUTPUT = "printed.txt"
BAR = re.compile(r"\d+%\|")
STORES: list[TCPStore] = []  # a store ends with its object
LOSS = f"{LOOP}.forward_backward"


def start_two(
    whole: Whole, zygote: Zygote, folder: Path, words: list[str], faults: Mapping[int, dict[str, Any]]
) -> list[Run]:
    """Start two processes of a run, with half the batch each. Both print to one file, as under torchrun."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    STORES.append(store)
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
    shared |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "GLOO_SOCKET_IFNAME": "lo"}
    words = [*whole.words, *whole.trainer.halved, *words]
    return [
        whole.trainer.start(
            zygote,
            words,
            folder,
            faults.get(rank),
            shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            OUTPUT,
        )
        for rank in range(2)
    ]


def wait_for_both(runs: list[Run], seconds: float = DEADLINE) -> list[int]:
    """Wait for the ends of the processes, and return their exit codes. End those that do not end."""
    end = time.monotonic() + seconds
    try:
        return [run.wait(max(end - time.monotonic(), 0)) for run in runs]
    finally:
        for run in runs:
            if not run.is_gone(0.2):
                run.signal_group(signal.SIGKILL)


def last_line(folder: Path) -> str:
    """Return the last line that the processes have printed, without progress bars."""
    lines = [line for line in (folder / OUTPUT).read_text().splitlines() if line.strip() and not BAR.search(line)]
    return lines[-1]


def log_rows(run: Path) -> list[dict[str, Any]]:
    """Read the log."""
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def last_weights(run: Path) -> dict[str, Tensor]:
    """Read the weights of the last checkpoint, without the biases of keys.

    Attention does not depend on the biases of its keys. Their gradients are rounding, which AdamW scales up.
    """
    weights = load_file(complete_checkpoints(run)[-1] / MODEL)
    for name, bias in weights.items():
        if name.endswith(("attn.qkv.bias", "attn.kv.bias")):
            bias.view(-1, bias.numel() // (3 if name.endswith("qkv.bias") else 2))[-2] = 0  # (q,) k, v
    return weights


def unbroken_pair(whole: Whole, zygote: Zygote, folder: Path, words: list[str]) -> Path:
    """Run two processes to the end, and return their run folder."""
    assert wait_for_both(start_two(whole, zygote, folder, words, {})) == [0, 0], (folder / OUTPUT).read_text()
    return folder / "run"


@pytest.fixture(scope="module")
def pair_of(
    whole_of: WholeOf, zygote: Zygote, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], dict[str, Any]]:
    """Return a function that returns the digest of an unbroken run of two processes, which is run once."""
    return cache(lambda name: digest(unbroken_pair(whole_of(name), zygote, tmp_path_factory.mktemp("pair"), [])))


@pytest.mark.parametrize("name", TRAINERS)
def test_two_processes_equal_one_with_the_same_global_batch(
    name: str, whole_of: WholeOf, zygote: Zygote, tmp_path: Path
) -> None:
    whole = whole_of(name)
    words = list(whole.trainer.unmixed)
    alone = whole.trainer.start(zygote, [*whole.words, *words], tmp_path / "alone")
    pair = unbroken_pair(whole, zygote, tmp_path / "two", words)
    assert alone.wait() == 0, alone.printed
    one, two = log_rows(tmp_path / "alone/run"), log_rows(pair)
    assert [row["step"] for row in one] == [row["step"] for row in two]
    for row, other in zip(one, two, strict=True):
        same = {key: value for key, value in other.items() if key in row and key not in TIMINGS}
        assert same == pytest.approx({key: row[key] for key in same}, rel=1e-6, abs=1e-6)
    expected = last_weights(tmp_path / "alone/run")
    for key, weights in last_weights(pair).items():
        torch.testing.assert_close(
            weights, expected[key], rtol=1e-6, atol=1e-6, msg=lambda found, key=key: f"{key}: {found}"
        )


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name == "finetune" else []) for name in TRAINERS]
)
def test_a_signal_to_one_process_stops_both_and_nothing_is_lost(
    name: str, whole_of: WholeOf, pair_of: Callable[[str], dict[str, Any]], zygote: Zygote, tmp_path: Path
) -> None:
    whole, expected = whole_of(name), pair_of(name)
    fault = {"act": "wait", "call": whole.trainer.step, "number": 4}
    runs = start_two(whole, zygote, tmp_path / "parts", [], {1: fault})
    runs[1].wait_for_fault()
    runs[1].signal_group(signal.SIGTERM)
    runs[1].go_on()
    assert wait_for_both(runs) == [CODES["SIGTERM"]] * 2, runs[0].printed
    assert "Traceback" not in runs[0].printed
    saved = ends(tmp_path / "parts/run")[-1]
    assert saved < whole.steps
    single = whole.trainer.start(zygote, [*whole.words, *whole.trainer.halved, "--resume"], tmp_path / "parts")
    assert single.wait() == 2  # it would see other images
    run = unbroken_pair(whole, zygote, tmp_path / "parts", ["--resume"])
    found = differences(only_last(expected, whole.steps), only_last(digest(run), whole.steps))
    assert not found, "\n".join(found)


def test_a_signal_interrupts_what_the_main_process_measures_alone(
    whole_of: WholeOf, pair_of: Callable[[str], dict[str, Any]], zygote: Zygote, tmp_path: Path
) -> None:
    whole, expected = whole_of("pretrain"), pair_of("pretrain")
    # Two sets of images for each of two models before the first step. The seventh is the last model's after it.
    fault = {"act": "wait", "call": "crossmae.pretraining.validation:encode_images", "number": 7}
    runs = start_two(whole, zygote, tmp_path / "parts", [], {0: fault})
    runs[0].wait_for_fault()
    runs[0].signal_group(signal.SIGTERM)
    runs[0].go_on()
    assert wait_for_both(runs) == [CODES["SIGTERM"]] * 2, runs[0].printed
    run = tmp_path / "parts/run"
    assert [row["step"] for row in log_rows(run) if "knn_accuracy" in row] == [0]
    assert unbroken_pair(whole, zygote, tmp_path / "parts", ["--resume"]) == run
    found = differences(only_last(expected, whole.steps), only_last(digest(run), whole.steps))
    assert not found, "\n".join(found)


FAULTS = {  # the fault, the process that has it, and what the last line holds
    "a loss is NaN": ({"act": "nan", "call": LOSS, "number": 7}, 1, "the norm of the gradient is nan"),
    "an exception": ({"act": "raise", "call": LOSS, "number": 7}, 1, "InjectedError: an injected fault"),
    "an exception in a save": ({"act": "raise", "call": "saving", "number": 1}, 0, "InjectedError: an injected fault"),
    "SIGKILL": ({"act": "kill", "call": LOSS, "number": 7}, 1, "error: "),
}


# A fault takes the same way for every trainer. Each trainer has some in every test.
IN_EVERY_TEST = {"pretrain": ["a loss is NaN"], "finetune": ["SIGKILL"], "train_net": list(FAULTS)[1:3]}
PAIRS = [
    pytest.param(name, case, marks=[] if case in IN_EVERY_TEST[name] else [pytest.mark.slow])
    for name in TRAINERS
    for case in FAULTS
]


@pytest.mark.parametrize("name, case", PAIRS)
def test_processes_end_together_and_the_cause_is_the_last_line(
    name: str, case: str, whole_of: WholeOf, zygote: Zygote, tmp_path: Path
) -> None:
    whole = whole_of(name)
    fault, rank, expected = FAULTS[case]
    place = whole.trainer.saving if fault["call"] == "saving" else fault["call"]
    runs = start_two(whole, zygote, tmp_path, [], {rank: fault | {"call": place}})
    codes = wait_for_both(runs)
    assert 0 not in codes, runs[0].printed
    assert expected in last_line(tmp_path), runs[0].printed
    assert ("Traceback" in runs[0].printed) == ("exception" in case)


@pytest.mark.parametrize("name", ONE_IN_EVERY_TEST)
def test_a_frozen_process_ends_the_other_one(name: str, whole_of: WholeOf, zygote: Zygote, tmp_path: Path) -> None:
    """torchrun then ends the frozen process."""
    whole = whole_of(name)
    fault = {"act": "wait", "call": LOSS, "number": 2}
    runs = start_two(whole, zygote, tmp_path, [whole.trainer.timeout.format(0.15)], {1: fault})
    runs[1].wait_for_fault()
    runs[1].signal_group(signal.SIGSTOP)
    try:
        assert runs[0].wait(DEADLINE) not in (0, None)
    finally:
        runs[1].signal_group(signal.SIGKILL)
    assert "error: " in last_line(tmp_path)
    assert "Traceback" not in runs[0].printed
