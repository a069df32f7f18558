"""One fault in a run: at the i-th file event in the run folder, or at the k-th call of a function.

The product has no hook for faults. Python's audit events report every file that Python code opens, renames or deletes,
before it happens. Writing and fsync have no such event, so this module wraps them. A fault at a write first writes half
of the bytes: a torn file. TensorBoard's files do not count, because another thread writes them. Two things are left
out, because they take most of the time and no kill of a process can tell: waiting for the disk, and drawing.
"""

from __future__ import annotations

import builtins
import functools
import importlib
import io
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from markupsafe import Markup
from matplotlib.figure import Figure
from PIL import Image

from crossmae.reports.page import Plot

AUDITED = {
    "os.rename": "rename",
    "os.remove": "unlink",
    "os.mkdir": "mkdir",
    "os.rmdir": "rmdir",
    "os.chmod": "chmod",
    "shutil.rmtree": "rmtree",
}
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
UNCOUNTED = "tensorboard"
DRAWN: dict[str, Callable[..., Any]] = {  # functions that draw, and what replaces them
    "crossmae.reports.figures:line_plot": lambda curves, *, title, caption, **_: Plot(
        Markup("<svg></svg>"), title, caption
    ),
    "crossmae.pretraining.train:reconstruction_figure": lambda *_: Figure(),
    "crossmae.pretraining.train:fusion_figure": lambda *_: Figure(),
    "crossmae.classification.evaluation.files:confusion_figure": lambda *_: Figure(),
    "crossmae.classification.evaluation.files:calibration_figure": lambda *_: Figure(),
    "det.evaluation.evaluate:precision_recall_figure": lambda *_, **named: Figure(),
}


class InjectedError(Exception):
    """The exception of a fault that raises."""


def inject(fault: dict[str, Any], run: Path) -> None:
    """Prepare the fault of this process.

    Keys of `fault`: `act` (kill, wait, raise, nan or none), then either `event`, the number of a file event, or `call`
    (module:function or module:Class.method) with `number`. `record` names a file for the list of the events.
    """
    act = {"kill": kill, "wait": wait, "raise": fail, "nan": None, "none": None}[fault.get("act", "none")]
    draw_nothing()
    if "record" in fault:
        FileEvents(run, Path(fault["record"]), fault.get("event"), act).install()
    if "call" in fault:
        at_call(fault["call"], fault.get("number", 1), act)


def draw_nothing() -> None:
    """Let figures be empty, and pictures be saved without compression."""
    for place, empty in DRAWN.items():
        module, _, name = place.partition(":")
        if module in sys.modules:
            setattr(sys.modules[module], name, empty)
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "png")

    def save(_: Figure, target: Any, format: str = "png", **named: Any) -> None:
        if isinstance(target, io.StringIO):
            target.write("<svg></svg>")
        else:
            Path(target).write_bytes(buffer.getvalue())

    Figure.savefig = save  # type: ignore[assignment]
    compress = Image.Image.save
    Image.Image.save = functools.partialmethod(compress, compress_level=0)  # type: ignore[assignment]


def kill() -> None:
    """End this process as the kernel does when memory is short."""
    os.kill(os.getpid(), signal.SIGKILL)


def wait() -> None:
    """Wait until the test has deleted the marker, and run handlers of signals in the meantime."""
    marker = Path(f"waiting.{os.getpid()}")
    marker.touch()
    while marker.exists():
        time.sleep(0.002)


def fail() -> None:
    """Raise an error that no code of the product expects."""
    raise InjectedError("an injected fault")


def at_call(place: str, number: int, act: Callable[[], None] | None) -> None:
    """Wrap a function so that its call with a number, counted from 1, starts with the fault.

    Without an `act`, the loss function that the call gets as its first argument returns NaN.
    """
    module, _, path = place.partition(":")
    *owners, name = path.split(".")
    owner: Any = functools.reduce(getattr, owners, importlib.import_module(module))
    original = getattr(owner, name)
    calls = 0

    @functools.wraps(original)
    def wrapped(*given: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls != number:
            return original(*given, **named)
        if act is None:
            return original(given[0], lambda *inputs: poisoned(given[1](*inputs)), *given[2:], **named)
        act()
        return original(*given, **named)

    setattr(owner, name, wrapped)


def poisoned(loss: Any) -> Any:
    """Multiply a loss, or each of several losses, by NaN."""
    if isinstance(loss, dict):
        return {name: poisoned(value) for name, value in loss.items()}
    return loss * float("nan")


class FileEvents:
    """Counter of the file events in a folder, with a fault at one of them.

    Args:
        record: file for one line per event: the kind, and the path relative to the folder.
        number: event of the fault, counted from 0; None: no fault.
    """

    def __init__(self, folder: Path, record: Path, number: int | None, act: Callable[[], None] | None) -> None:
        self.folder, self.number, self.act = str(folder), number, act
        self.record = os.open(record, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        self.count, self.process = 0, os.getpid()

    def install(self) -> None:
        """Watch this process until it ends."""
        self.watch_c_writers()
        self.watch_fsync()
        opened = builtins.open

        def watched_open(file: Any, mode: str = "r", *given: Any, **named: Any) -> Any:
            handle = opened(file, mode, *given, **named)
            if set(mode) & set("wax+") and self.inside(file):
                self.watch_handle(handle, str(file))
            return handle

        builtins.open = io.open = watched_open  # type: ignore[assignment]
        sys.addaudithook(self.audit)

    def audit(self, event: str, given: tuple[Any, ...]) -> None:
        """Count an audit event that changes files."""
        if event == "open" and isinstance(given[2], int) and given[2] & WRITING:
            self.note("open", given[0])
        elif event in AUDITED:
            folder = given[-1] if event in ("os.remove", "os.rmdir", "os.mkdir") else -1
            source = given[0] if event == "os.rename" else None
            self.note(AUDITED[event], given[0] if source is None else given[1], folder, source=source)

    def inside(self, path: Any, folder: int = -1) -> str | None:
        """Return a path relative to the run folder, None outside of it; `folder` is a descriptor, or -1."""
        if not isinstance(path, (str, bytes, os.PathLike)):
            return None
        start = os.getcwd() if folder == -1 else os.readlink(f"/proc/self/fd/{folder}")
        whole = os.path.normpath(os.path.join(start, os.fsdecode(path)))
        if whole != self.folder and not whole.startswith(self.folder + os.sep):
            return None
        relative = os.path.relpath(whole, self.folder)
        return None if relative.startswith(UNCOUNTED) else relative

    def note(
        self, kind: str, path: Any, folder: int = -1, torn: Callable[[], None] | None = None, source: Any = None
    ) -> None:
        """Count an event. At the chosen event, tear the file and run the fault.

        Args:
            source: earlier name of a renamed file.
        """
        name = self.inside(path, folder)
        if name is None or os.getpid() != self.process:  # workers only read
            return
        name += f" from {self.inside(source)}" if source else ""
        os.write(self.record, f"{kind} {name.replace(str(self.process), 'PID')}\n".encode())
        self.count += 1
        if self.count - 1 == self.number and self.act:
            if torn:
                torn()
            self.act()

    def watch_handle(self, handle: Any, path: str) -> None:
        """Count the writes, flushes and the end of an open file."""
        write, flush, close = handle.write, handle.flush, handle.close

        def counted_write(data: Any) -> Any:
            self.note("write", path, torn=lambda: (write(data[: len(data) // 2]), flush()))  # type: ignore[func-returns-value]
            return write(data)

        def counted(kind: str, original: Callable[[], None]) -> Callable[[], None]:
            def call() -> None:
                if not handle.closed:
                    self.note(kind, path)
                original()

            return call

        handle.write, handle.flush, handle.close = counted_write, counted("flush", flush), counted("close", close)

    def watch_c_writers(self) -> None:
        """Count the files that torch and safetensors write without Python's `open`."""
        save, serialize = torch.save, safetensors.torch.serialize_file

        def counted_save(value: Any, path: Any, *given: Any, **named: Any) -> None:
            self.note("open", path)
            save(value, path, *given, **named)
            self.note("write", path, torn=lambda: os.truncate(path, os.path.getsize(path) // 2))

        def counted_serialize(tensors: Any, path: Any, *given: Any, **named: Any) -> None:
            self.note("open", path)
            serialize(tensors, path, *given, **named)
            self.note("write", path, torn=lambda: os.truncate(path, os.path.getsize(path) // 2))

        torch.save, safetensors.torch.serialize_file = counted_save, counted_serialize  # type: ignore[assignment]

    def watch_fsync(self) -> None:
        """Count the calls of fsync in place of waiting for the disk."""

        def counted(descriptor: Any) -> None:
            number = descriptor if isinstance(descriptor, int) else descriptor.fileno()
            self.note("fsync", os.readlink(f"/proc/self/fd/{number}"))

        os.fsync = counted
