"""Commands: they end with their parent, and their cost is what they and their children used."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from crossmae.experiments import commands
from crossmae.experiments.commands import (
    FREE,
    Cost,
    EnergyMeter,
    RunningCommand,
    busy_share,
    describe_machine,
    find_gpus,
    run_command,
)

SLEEP = [sys.executable, "-S", "-c", "import time; time.sleep(60)"]


def test_peak_memory_counts_descendants():
    hold = "x = bytearray(96 << 20); import time; time.sleep(0.8)"
    child = f"subprocess.run([sys.executable, '-S', '-c', {hold!r}])"
    parent = f"import subprocess, sys; x = bytearray(96 << 20); {child}"
    code, peak = run_command([sys.executable, "-S", "-c", parent])
    assert code == 0
    assert 2 * 96 << 20 <= peak < 4 * 96 << 20


def test_the_busy_share_counts_the_cores_of_this_process_only(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(psutil, "cpu_percent", lambda seconds, percpu: [100.0, 20.0, 60.0, 100.0])
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {1, 2}, raising=False)
    assert busy_share() == pytest.approx(0.4)


def test_a_program_that_computes_makes_its_core_busy():
    spin = subprocess.Popen([sys.executable, "-S", "-c", "while True: pass"])
    try:
        assert busy_share(0.5) > 0.5 / commands.count_cores()
    finally:
        spin.kill()
        spin.wait()


def finish(command: RunningCommand) -> int:
    while (code := command.poll()) is None:
        time.sleep(0.01)
    return code


def test_cost_counts_children(tmp_path: Path):
    work = "import sys, time\nwhile time.process_time() < 0.4: pass"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-S', '-c', {work!r}]); print('said')"
    with open(tmp_path / "log", "wb") as log:
        command = RunningCommand([sys.executable, "-S", "-c", parent], log)
        assert finish(command) == 0
    assert 0.4 <= command.cost.cpu_seconds < 5
    assert command.cost.cpu_seconds < command.cost.wall_seconds
    assert command.cost.gpu_seconds is None
    assert command.cost.energy_joules is None
    assert (tmp_path / "log").read_text() == "said\n"
    before = command.cost
    time.sleep(0.05)
    assert command.cost == before  # it has ended


def test_exit_codes_and_signals(tmp_path: Path):
    with open(tmp_path / "log", "wb") as log:
        assert finish(RunningCommand([sys.executable, "-S", "-c", "raise SystemExit(7)"], log)) == 7
        command = RunningCommand(SLEEP, log)
        command.send(signal.SIGTERM)
        assert finish(command) == -signal.SIGTERM
        command.send(signal.SIGTERM)  # it has ended: nothing happens
        command = RunningCommand(SLEEP, log)
        command.kill()
        assert command.poll() == -signal.SIGKILL


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a child of its parent's end")
def test_the_command_ends_with_its_parent(tmp_path: Path):
    parent = (
        "import sys, time; from crossmae.experiments.commands import RunningCommand; "
        "command = RunningCommand(sys.argv[2:], open(sys.argv[1], 'wb')); print(command.process.pid, flush=True); "
        "time.sleep(60)"
    )
    words = [sys.executable, "-c", parent, str(tmp_path / "log"), *SLEEP]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        child = psutil.Process(int(process.stdout.readline()))
        end = time.monotonic() + 30
        while child.cmdline() != SLEEP and time.monotonic() < end:  # it has only just started
            time.sleep(0.01)
        assert child.cmdline() == SLEEP
        process.kill()
    while psutil.pid_exists(child.pid) and time.monotonic() < end:
        if child.status() == psutil.STATUS_ZOMBIE:  # nobody waits for it here
            break
        time.sleep(0.01)
    assert not psutil.pid_exists(child.pid) or child.status() == psutil.STATUS_ZOMBIE


def test_costs_add_up():
    first = Cost(1.0, 2.0, None, 5.0, 100)
    assert FREE + first == first
    assert first + Cost(1.0, 1.0, 3.0, 7.0, 50) == Cost(2.0, 3.0, 3.0, 12.0, 100)
    assert (first + Cost(1.0, 1.0)).energy_joules is None  # a part is unknown
    assert Cost(1.23456, 2).numbers()["cpu_seconds"] == 1.235


def write_counter(folder: Path, name: str, microjoules: int) -> None:
    (folder / name).mkdir(exist_ok=True)
    (folder / name / "energy_uj").write_text(f"{microjoules}\n")
    (folder / name / "max_energy_range_uj").write_text("1000000000\n")


def test_energy_of_packages_wraps_around(tmp_path: Path):
    write_counter(tmp_path, "intel-rapl:0", 900_000_000)
    write_counter(tmp_path, "intel-rapl:1", 0)
    write_counter(tmp_path, "intel-rapl:0:0", 0)  # a part of package 0
    meter = EnergyMeter(powercap=tmp_path)
    write_counter(tmp_path, "intel-rapl:0", 100_000_000)
    write_counter(tmp_path, "intel-rapl:1", 30_000_000)
    write_counter(tmp_path, "intel-rapl:0:0", 50_000_000)
    meter.sample()
    assert meter.joules == pytest.approx(200 + 30)
    write_counter(tmp_path, "intel-rapl:0", 150_000_000)
    meter.sample()
    assert meter.joules == pytest.approx(200 + 30 + 50)


def test_energy_of_a_gpu_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    counter = iter([100.0, 350.0])
    monkeypatch.setattr(commands, "_gpu_joules", lambda gpu: next(counter))
    meter = EnergyMeter(0, powercap=tmp_path)
    meter.sample()
    assert meter.joules == pytest.approx(250)


def test_energy_without_counters_is_unknown(tmp_path: Path):
    meter = EnergyMeter(powercap=tmp_path)
    meter.sample()
    assert meter.joules is None


def test_visible_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho '0, NVIDIA A'\necho '1, NVIDIA B'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert find_gpus() == {0: "NVIDIA A", 1: "NVIDIA B"}
    assert describe_machine()["gpu"] == "NVIDIA A, NVIDIA B"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert find_gpus() == {1: "NVIDIA B"}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert find_gpus() == {}
    tool.unlink()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_gpus() == {}


# A command that saves when a signal asks it to stop, as the trainers do. It tells when it is ready, and what it did.
SAVING = """
import signal, sys, time
def stop(number, _):
    time.sleep(0.3)
    open(sys.argv[1], "w").write(f"saved after {number}")
    raise SystemExit(128 + number)
for name in ("SIGTERM", "SIGHUP", "SIGUSR1"):
    signal.signal(getattr(signal, name), stop)
print("ready", flush=True)
time.sleep(60)
"""
IGNORING = "import time; print('ready', flush=True); time.sleep(60)"
DEFAULTS = "import signal, sys; signal.signal(signal.SIGHUP, signal.SIG_DFL); "  # nohup would ignore SIGHUP
RUN = DEFAULTS + "from crossmae.experiments.commands import run_command; print(run_command(sys.argv[1:]))"


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGTERM, SAVING), (signal.SIGTERM, IGNORING), (signal.SIGHUP, SAVING), (signal.SIGUSR1, SAVING)],
    ids=["SIGTERM-saves", "SIGTERM-dies", "SIGHUP", "SIGUSR1"],
)
def test_a_signal_to_the_parent_ends_the_command_and_then_the_parent(
    tmp_path: Path, number: signal.Signals, code: str
) -> None:
    """The exit code is that of a trainer: 128 + the number of the signal."""
    saved, words = tmp_path / "saved", [sys.executable, "-S", "-c", code]
    with subprocess.Popen(
        [sys.executable, "-c", RUN, *words, str(saved)], stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        (child,) = psutil.Process(process.pid).children()
        process.send_signal(number)
        assert process.wait(30) == 128 + number
        assert not psutil.pid_exists(child.pid)  # the parent has waited for it
        assert process.stdout.read() == ""
    assert saved.exists() == (code == SAVING)
    if code == SAVING:
        assert saved.read_text() == f"saved after {int(number)}"


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a child of its parent's end")
def test_a_command_in_the_terminal_ends_with_its_killed_parent() -> None:
    words = [sys.executable, "-c", RUN, sys.executable, "-S", "-c", IGNORING]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.kill()
        assert process.stdout.read() == ""  # the command held the other end of the pipe


def test_a_command_leaves_the_handlers_of_signals_as_they_were() -> None:
    before = [signal.getsignal(number) for number in commands.PASSED_ON]
    assert run_command([sys.executable, "-S", "-c", "raise SystemExit(7)"])[0] == 7
    assert [signal.getsignal(number) for number in commands.PASSED_ON] == before
