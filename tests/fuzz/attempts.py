"""Attempts: a reader gets a changed input, within limits of time and memory, watched for what it opens and starts."""

from __future__ import annotations

import logging
import random
import resource
import shutil
import signal
import sys
import traceback
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from crossmae.errors import UserError
from tests.fuzz.mutations import OUTSIDE, SENTINEL, TEXTS, YAML, mutated
from tests.fuzz.targets import Target

SECONDS = 3.0  # of processor time
MEMORY = 768 << 20  # bytes of address space beyond what the process has
LONGEST = 4500  # characters of an error
STARTS = ("os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen", "socket.connect", "urllib.Request")
_seen: list[str] = []
_watching: list[Path] = []


class TooSlow(BaseException):
    """No `except Exception` keeps it from ending the attempt."""


def _watch(event: str, arguments: tuple[Any, ...]) -> None:
    if not _watching:
        return
    if event in STARTS:
        _seen.append(f"{event}{arguments}"[:200])
    elif event == "open" and isinstance(arguments[0], str | bytes):
        name = arguments[0] if isinstance(arguments[0], str) else arguments[0].decode(errors="replace")
        if "secret" in name or "passwd" in name or "environ" in name:
            _seen.append(f"open {name}"[:200])


sys.addaudithook(_watch)


@contextmanager
def limited() -> Iterator[None]:
    """Limits of processor time and address space."""

    def stop(*_: Any) -> None:
        raise TooSlow

    before, handler = resource.getrlimit(resource.RLIMIT_AS), signal.signal(signal.SIGPROF, stop)
    if sys.platform == "linux":
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY, before[1]))
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        resource.setrlimit(resource.RLIMIT_AS, before)
        signal.signal(signal.SIGPROF, handler)


def fault_of(target: Target, folder: Path, words: list[str]) -> str:
    """Read an input. Returns what breaks the promise, or "": success, or an error of one line."""
    _seen.clear()
    _watching.append(folder)
    try:
        with limited(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            target.read(folder, words)
    except UserError as error:
        message = str(UserError(error.args[0]))
        if not message or "\n" in message or len(message) > LONGEST:
            return f"not one line: {message[:300]!r}"
        if any(word in message.lower() for word in ("memoryerror", "allocat")):
            return f"asked for too much memory: {message[:300]!r}"
    except TooSlow:
        return f"took more than {SECONDS} s of processor time"
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)
        ours = [frame for frame in where if "/crossmae/" in frame.filename or "/det/" in frame.filename]
        frames = ", ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in (ours[-3:] or where[-2:]))
        return f"{type(error).__name__}: {str(error)[:150]} ({frames})"
    finally:
        _watching.clear()
    if _seen and not (target.anywhere and _seen[0].startswith("open")):
        return f"reached {_seen[0]}"
    return "the code in it ran" if list(folder.rglob(SENTINEL)) or Path(SENTINEL).exists() else ""


def attempt(name: str, target: Target, folder: Path, number: int, sound: Mapping[Path, bytes]) -> str:
    """Change one file or word by the seed `name` and `number`, read, and mend. Returns the fault."""
    rng = random.Random(f"{name} {number}")
    if target.keys:
        key = rng.choice(target.keys)
        words = [f"{key}={rng.choice(YAML if rng.random() < 0.8 else TEXTS)}"]
        fault = fault_of(target, folder, words)
        return f"{name} {number}: {words[0][:100]!r}: {fault}" if fault else ""
    path = rng.choice([path for path in sound if path.suffix not in target.kept])
    path.write_bytes(mutated(path.name, sound[path], rng))
    fault = fault_of(target, folder, [str(path.relative_to(folder))])
    for other, content in sound.items():
        if other == path or other.suffix not in target.kept:
            with suppress(FileNotFoundError):
                if other.read_bytes() == content:
                    continue
            other.parent.mkdir(parents=True, exist_ok=True)
            other.write_bytes(content)
    return f"{name} {number}: {path.name}: {fault}" if fault else ""


def run_attempts(name: str, target: Target, numbers: range, home: Path) -> list[str]:
    """Make the sound files in an empty folder, see that they are read, and return the faults of all attempts."""
    folder = home / "input"
    folder.mkdir(parents=True)
    (home / OUTSIDE.removeprefix("../")).parent.mkdir(exist_ok=True)
    (home / OUTSIDE.removeprefix("../")).write_bytes(b"secret")
    target.make(folder)
    sound = {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
    logging.disable(logging.CRITICAL)
    try:
        return [fault for number in numbers if (fault := attempt(name, target, folder, number, sound))]
    finally:
        logging.disable(logging.NOTSET)
        shutil.rmtree(home, ignore_errors=True)
