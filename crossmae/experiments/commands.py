"""Commands as child processes that end with their parent, and their cost: time, memory and energy."""

from __future__ import annotations

import dataclasses
import os
import platform
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, BinaryIO

import psutil

from crossmae.errors import PROGRAMS

# Do not import torch here: this module also serves commands that have nothing to compute.

SAMPLE_SECONDS = 0.25
# Signals that ask to stop and that may reach the parent only, unlike Ctrl-C. See `crossmae.data.workers.SIGNALS`.
PASSED_ON = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGHUP", "SIGUSR1") if hasattr(signal, name))
POWERCAP = Path("/sys/class/powercap")
# Linux ends the child if its parent ends, even by SIGKILL. `exec` keeps that wish and the number of the process.
UNTIL_PARENT_ENDS = (
    "import ctypes, os, signal, sys; ctypes.CDLL(None).prctl(1, signal.SIGKILL); "
    "os.getppid() == int(sys.argv[1]) or os._exit(1); os.execv(sys.argv[2], sys.argv[2:])"
)


@dataclass(frozen=True)
class Cost:
    """Resources that commands used.

    Attributes:
        cpu_seconds: user and system time of the commands and of the processes that they waited for.
        gpu_seconds: time on a GPU. None: no GPU.
        energy_joules: energy of processors and GPUs. None: not measured.
    """

    cpu_seconds: float = 0.0
    wall_seconds: float = 0.0
    gpu_seconds: float | None = None
    energy_joules: float | None = None
    peak_memory_bytes: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        """Add up two costs.

        Energy of which a part is unknown is unknown.
        """
        return Cost(
            self.cpu_seconds + other.cpu_seconds,
            self.wall_seconds + other.wall_seconds,
            _sum_known(self.gpu_seconds, other.gpu_seconds),
            None
            if None in (self.energy_joules, other.energy_joules)
            else _sum_known(self.energy_joules, other.energy_joules),
            max(self.peak_memory_bytes, other.peak_memory_bytes),
        )

    def numbers(self) -> dict[str, float | None]:
        """Round the numbers to what is worth a line in a file."""
        return {key: None if value is None else round(value, 3) for key, value in dataclasses.asdict(self).items()}


FREE = Cost(energy_joules=0.0)


def _sum_known(*values: float | None) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) if known else None


class EnergyMeter:
    """Energy counters of the processor packages, and of one GPU.

    The counters belong to the machine: they also count what other programs use.

    Args:
        gpu: index of the GPU. None: no GPU.
    """

    def __init__(self, gpu: int | None = None, powercap: Path = POWERCAP) -> None:
        self.gpu = gpu
        self.packages = [zone for zone in sorted(powercap.glob("intel-rapl:*")) if zone.name.count(":") == 1]
        self.before = self._read()
        self.joules: float | None = 0.0 if self.before else None

    def sample(self) -> None:
        """Add the energy since the last sample.

        Call this often, because the counters wrap around.
        """
        now = self._read()
        for name, joules in now.items():
            if self.joules is not None and name in self.before:
                used = joules - self.before[name]
                self.joules += used if used >= 0 else used + self._range(name)
        self.before = now

    def _read(self) -> dict[str, float]:
        found = {}
        for zone in self.packages:
            try:
                found[zone.name] = int((zone / "energy_uj").read_text()) / 1e6
            except (OSError, ValueError):  # since 2020, most systems let only root read the counters
                continue
        joules = _gpu_joules(self.gpu) if self.gpu is not None else None
        return found if joules is None else found | {"gpu": joules}

    def _range(self, name: str) -> float:
        for zone in self.packages:
            if zone.name == name:
                return int((zone / "max_energy_range_uj").read_text()) / 1e6
        return 0.0  # a GPU's counter does not wrap around


def _gpu_joules(gpu: int) -> float | None:
    try:
        import pynvml  # type: ignore[import-not-found, import-untyped, unused-ignore]

        pynvml.nvmlInit()
        return float(pynvml.nvmlDeviceGetTotalEnergyConsumption(pynvml.nvmlDeviceGetHandleByIndex(gpu))) / 1e3
    except Exception:  # not installed, no driver, or an old GPU: each has its own error
        return None


class RunningCommand:
    """A command that runs in a process group of its own.

    Ctrl-C in the terminal does not reach the command: the parent decides what to forward. If the parent is killed, so
    is the command.

    Args:
        command: program and arguments.
        log: file to which output and errors are appended.
        environment: changes of the environment.
        on_gpu: its time is time on a GPU, too.
        meter: energy counters that count for this command only. None: energy stays unknown.
    """

    def __init__(
        self,
        command: Sequence[str],
        log: BinaryIO,
        environment: Mapping[str, str] | None = None,
        on_gpu: bool = False,
        meter: EnergyMeter | None = None,
    ) -> None:
        self.started, self.on_gpu, self.meter = time.monotonic(), on_gpu, meter
        self.cpu_seconds, self.peak, self.sampled = 0.0, 0, 0.0
        self.process = subprocess.Popen(
            guarded(command),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=PROGRAMS,
            env=os.environ | dict(environment or {}),
            start_new_session=True,
        )

    def poll(self) -> int | None:
        """Return the exit code, None while the command runs.

        The code is negative if a signal ended the command. Each call may sample memory and energy.
        """
        if self.process.returncode is None:
            if time.monotonic() - self.sampled >= SAMPLE_SECONDS:
                self._sample()
            ended, status, usage = os.wait4(self.process.pid, os.WNOHANG)
            if ended:
                self.process.returncode = os.waitstatus_to_exitcode(status)
                self.cpu_seconds = usage.ru_utime + usage.ru_stime
                self.ended = time.monotonic()
                if self.meter:
                    self.meter.sample()
        return self.process.returncode

    def send(self, number: signal.Signals) -> None:
        """Send a signal to the command and its children."""
        if self.process.returncode is None:
            os.killpg(self.process.pid, number)

    def kill(self) -> None:
        """Kill the command and wait for its end."""
        self.send(signal.SIGKILL)
        while self.poll() is None:
            time.sleep(0.01)

    @property
    def cost(self) -> Cost:
        """The cost until now, exact once the command has ended."""
        seconds = (time.monotonic() if self.process.returncode is None else self.ended) - self.started
        energy = self.meter.joules if self.meter else None
        return Cost(self.cpu_seconds, seconds, seconds if self.on_gpu else None, energy, self.peak)

    def _sample(self) -> None:
        self.sampled = time.monotonic()
        processes = list(_family(self.process.pid))
        self.peak = max(self.peak, sum(map(_resident, processes)))
        self.cpu_seconds = max(self.cpu_seconds, sum(map(_cpu_seconds, processes)))
        if self.meter:
            self.meter.sample()


def guarded(command: Sequence[str]) -> list[str]:
    """Let a command end with its parent, on Linux."""
    if sys.platform != "linux":
        return list(command)
    return [sys.executable, "-I", "-S", "-c", UNTIL_PARENT_ENDS, str(os.getpid()), *command]


def run_command(command: Sequence[str]) -> tuple[int, int]:
    """Run a command in the terminal.

    A signal of `PASSED_ON` is passed on to the command, which may save before it ends. If the parent is killed, so is
    the command.

    Returns its exit code and its peak memory (bytes). The exit code is negative if a signal ended the command. Memory
    is the sum over the command and its descendants of resident memory, sampled four times a second. Shared pages count
    once for each process.

    Raises:
        KeyboardInterrupt: after Ctrl-C, once the command has ended.
        SystemExit: after a signal of `PASSED_ON`, once the command has ended, with 128 + its number.
    """
    is_interrupted, peak, passed = False, 0, 0
    with heard(PASSED_ON) as numbers:
        process = subprocess.Popen(guarded(command))
        while process.returncode is None:
            try:
                for number in numbers[passed:]:
                    process.send_signal(number)
                    passed += 1
                peak = max(peak, resident_bytes(process.pid))
                process.wait(timeout=SAMPLE_SECONDS)
            except subprocess.TimeoutExpired:
                continue
            except KeyboardInterrupt:  # the terminal also interrupts the command, which saves and ends
                if is_interrupted:
                    raise
                is_interrupted = True
    if is_interrupted:
        raise KeyboardInterrupt
    if numbers:
        raise SystemExit(128 + numbers[0])
    return process.returncode, peak


@contextmanager
def heard(signals: Sequence[signal.Signals]) -> Iterator[list[int]]:
    """Collect the numbers of signals that arrive.

    Signals that the shell ignores, such as SIGHUP for nohup, stay ignored. Outside the main thread nothing is heard.
    """
    numbers: list[int] = []
    is_main = threading.current_thread() is threading.main_thread()
    wanted = [one for one in signals if is_main and signal.getsignal(one) is not signal.SIG_IGN]
    before = {one: signal.signal(one, lambda number, _: numbers.append(number)) for one in wanted}
    try:
        yield numbers
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)


def resident_bytes(pid: int) -> int:
    """Measure the resident memory of a process and its descendants."""
    return sum(map(_resident, _family(pid)))


def _family(pid: int) -> Iterator[psutil.Process]:
    try:
        root = psutil.Process(pid)
        yield from (root, *root.children(recursive=True))
    except psutil.NoSuchProcess:  # the process has ended
        return


def _resident(process: psutil.Process) -> int:
    try:
        return int(process.memory_info().rss)
    except psutil.NoSuchProcess:
        return 0


def _cpu_seconds(process: psutil.Process) -> float:
    try:
        times = process.cpu_times()
        return float(times.user + times.system + times.children_user + times.children_system)
    except psutil.NoSuchProcess:
        return 0.0


def count_cores() -> int:
    """Count the processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def busy_share(seconds: float = 1.0) -> float:
    """Measure which share of its cores other programs use, 0 to 1.

    Args:
        seconds: time of the measurement, in which this process sleeps.
    """
    used = psutil.cpu_percent(seconds, percpu=True)
    own = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(len(used))
    shares = [used[core] for core in own if core < len(used)]
    return sum(shares) / len(shares) / 100 if shares else 0.0


def find_gpus() -> dict[int, str]:
    """List the visible NVIDIA GPUs: name by index."""
    tool, visible = shutil.which("nvidia-smi"), os.environ.get("CUDA_VISIBLE_DEVICES")
    if not tool:
        return {}
    query = [tool, "--query-gpu=index,name", "--format=csv,noheader"]
    lines = subprocess.run(query, capture_output=True, text=True, check=False).stdout.splitlines()
    found = {int(index): name.strip() for index, _, name in (line.partition(",") for line in lines) if index.isdigit()}
    if visible is None:
        return found
    return {index: name for index, name in found.items() if str(index) in visible.split(",")}


def describe_machine() -> dict[str, Any]:
    """Describe processor, GPU and versions, as a row of results has them."""
    gpus = sorted(set(find_gpus().values()))
    return {
        "processor": _processor(),
        "cores": count_cores(),
        "gpu": ", ".join(gpus) or None,
        "torch": metadata.version("torch"),
        "python": platform.python_version(),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        lines = []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
