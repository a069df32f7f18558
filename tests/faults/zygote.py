"""Runs of the trainers' command lines, each forked from one process that has imported everything.

Importing torch takes seconds, and a test of kills starts a run hundreds of times. `Zygote` is the side of the test.
`python -m tests.faults.zygote` is the other side: it reads requests as JSON lines and forks a child for each. The child
leads its own session, so that a test can signal the whole group, and ends as any Python process ends.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
HANDLED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
SINGLE = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}  # a fork copies one thread only
LATEST = 0.005  # seconds between two looks at a child


@dataclass
class Run:
    """A started run.

    Attributes:
        folder: working folder of the run. The run folder is `folder`/run.
        output: name of the file in `folder` that has what the run prints. Runs of one name append to one file.
    """

    zygote: Zygote
    pid: int
    folder: Path
    output: str

    @property
    def printed(self) -> str:
        """Everything that the run has printed so far."""
        return (self.folder / self.output).read_text("utf-8", "replace")

    @property
    def marker(self) -> Path:
        """File that exists while the run waits at its fault."""
        return self.folder / f"waiting.{self.pid}"

    def wait(self, seconds: float = 60) -> int:
        """Wait for the end of the run, and return the exit code: -9 after SIGKILL."""
        code = self.zygote.ask({"do": "wait", "pid": self.pid, "seconds": seconds})
        assert code is not None, f"still running after {seconds} s:\n{self.printed}"
        return int(code)

    def wait_for_fault(self, seconds: float = 60) -> None:
        """Wait until the run waits at its fault."""
        end = time.monotonic() + seconds
        while not self.marker.exists():
            assert time.monotonic() < end, self.printed
            assert self.is_running(), self.printed
            time.sleep(LATEST)

    def signal_group(self, number: int) -> None:
        """Signal every process of the run."""
        os.killpg(self.pid, number)

    def is_running(self) -> bool:
        """Check that the run has not ended."""
        return self.zygote.ask({"do": "wait", "pid": self.pid, "seconds": 0}) is None

    def go_on(self) -> None:
        """Let a run continue that waits at its fault."""
        self.marker.unlink()

    def is_gone(self, seconds: float = 10) -> bool:
        """Check that no process of the group is left."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            try:
                os.killpg(self.pid, 0)
            except ProcessLookupError:
                return True
            time.sleep(0.05)
        return False


class Zygote:
    """The process that forks runs, as a context manager."""

    def __enter__(self) -> Zygote:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.zygote"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=os.environ | SINGLE | {"PYTHONPATH": str(ROOT)},
            start_new_session=True,
        )
        return self

    def __exit__(self, *_: object) -> None:
        assert self.process.stdin is not None
        with self.process:
            self.process.stdin.close()

    def ask(self, request: dict[str, Any]) -> Any:
        """Send a request and return the answer."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        assert line, "the zygote has ended"
        return json.loads(line)

    def load(self, tool: str, imports: Sequence[str]) -> None:
        """Import tools/`tool`.py and modules, so that later starts take no time."""
        self.ask({"do": "load", "tool": tool, "imports": list(imports)})

    def start(
        self,
        tool: str,
        imports: Sequence[str],
        words: Sequence[str],
        folder: Path,
        fault: Mapping[str, Any],
        environment: Mapping[str, str],
        output: str,
    ) -> Run:
        """Start tools/`tool`.py with the given words in the working folder `folder`."""
        folder.mkdir(parents=True, exist_ok=True)
        request = {"do": "start", "tool": tool, "imports": list(imports), "words": list(words), "folder": str(folder)}
        request |= {"fault": dict(fault), "environment": dict(environment), "output": output}
        return Run(self, int(self.ask(request)), folder, output)


def serve() -> dict[str, Any] | None:
    """Answer requests. Return a request in the child that runs it, None at the end of the test."""
    children: set[int] = set()
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if request["do"] in ("load", "start"):
                for name in (f"tools.{request['tool']}", *request["imports"]):
                    importlib.import_module(name)
            if request["do"] == "load":
                answer(None)
            elif request["do"] == "start":
                gc.freeze()  # the collector of a child then leaves the shared memory alone
                pid = os.fork()
                if not pid:
                    return dict(request)
                children.add(pid)
                answer(pid)
            else:
                code = wait(request["pid"], request["seconds"])
                if code is not None:
                    children.discard(request["pid"])
                answer(code)
        except BrokenPipeError:  # the test was killed
            break
    for pid in children:
        os.killpg(pid, signal.SIGKILL)
    return None


def answer(value: int | None) -> None:
    """Send an answer to the test."""
    sys.stdout.write(f"{json.dumps(value)}\n")
    sys.stdout.flush()


def wait(pid: int, seconds: float) -> int | None:
    """Wait for a child, and return its exit code, None if it still runs."""
    end = time.monotonic() + seconds
    while True:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() >= end:
            return None
        time.sleep(LATEST)


def run(request: dict[str, Any]) -> None:
    """Become a run: own session, own output, default signals, and the fault."""
    os.setsid()
    os.chdir(request["folder"])
    os.environ.update(request["environment"])
    printed = os.open(request["output"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for source, target in ((os.open(os.devnull, os.O_RDONLY), 0), (printed, 1), (printed, 2)):
        os.dup2(source, target)
    for number in HANDLED:  # tests may run in the background, where Ctrl-C is ignored
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)

    from crossmae.errors import run_cli
    from tests.faults.injection import inject

    inject(request["fault"], Path(request["folder"], "run"))
    main = importlib.import_module(f"tools.{request['tool']}").main
    run_cli(lambda: main(request["words"]))


if __name__ == "__main__":
    if (found := serve()) is not None:
        run(found)
