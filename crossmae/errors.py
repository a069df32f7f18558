"""Errors that a user can cause, and how every command line shows them.

A library function raises `UserError` with the text `<file or key>: <what is wrong>. <What to do.>` A tool wraps its
main function in `run_cli`. The user then sees one line instead of a traceback.
"""

from __future__ import annotations

import errno
import importlib
import logging
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from io import TextIOWrapper
from pathlib import Path, PurePath
from typing import Any

SOME_FAILED_EXIT_CODE = 1
USER_ERROR_EXIT_CODE = 2
INTERRUPTED_EXIT_CODE = 130
LONGEST_MESSAGE = 4000  # characters
BROKEN_PIPE_EXIT_CODE = 141
# A wheel has tools/ and configs/ in this folder. A clone of the repository does not have it.
SHIPPED = Path(__file__).resolve().parents[1] / "crossmae_toolkit"
IN_WHEEL = SHIPPED.is_dir()
PROGRAMS = SHIPPED if IN_WHEEL else SHIPPED.parent  # the folder of tools/ and configs/
# The files that the subcommands of `crossmae` run.
COMMANDS = {
    "run": "tools/run.py",
    "pretrain": "tools/pretrain.py",
    "finetune": "tools/finetune.py",
    "probe": "tools/probe.py",
    "reconstruct": "tools/reconstruct.py",
    "detect": "tools/train_net.py",
    "evaluate": "tools/evaluate.py",
    "predict": "tools/predict.py",
    "predict-classes": "tools/predict_classes.py",
    "export": "tools/export_detector.py",
    "convert": "tools/convert_checkpoint.py",
    "inspect": "tools/inspect_checkpoint.py",
    "check": "tools/check_coco.py",
    "split": "tools/split_labels.py",
    "stats": "tools/dataset_stats.py",
    "shards": "tools/make_shards.py",
    "visualize": "tools/visualize_data.py",
    "report": "tools/report.py",
    "compare": "tools/compare.py",
    "worth": "tools/worth.py",
    "bench": "tools/benchmark.py",
    "demo": "tools/demo/run.py",
    "demo-data": "tools/make_demo_data.py",
    "doctor": "crossmae/doctor.py",
    "install-detectron2": "tools/install_detectron2.py",
}
# Disk errors, and what to do about them.
DISK_TROUBLE = {
    errno.ENOSPC: "Free space, or name another folder.",
    errno.EDQUOT: "Free space, or have the quota raised.",
    errno.EROFS: "Name a folder on a disk that can be written.",
    errno.EACCES: "Change its permissions, or name another folder.",
    errno.EIO: "Check the disk, or name another folder.",
    errno.ESTALE: "Check the network disk, or name another folder.",
    errno.EFBIG: "Raise the limit of file sizes (ulimit -f).",
    errno.ENAMETOOLONG: "Shorten the name.",
}
_PYTHON = r"[\w/.~+-]*python[\d.]*"  # an interpreter, with or without its path


def printable(name: object) -> str:
    """Escape line breaks, control characters and bytes that are not UTF-8.

    Errors, log messages, pages and pictures show names through this function. JSON and CSV files keep the original
    names: see `crossmae.files.ODD_BYTES`.
    """
    text = str(name)
    if text.isprintable():  # of every image, so it must be quick
        return text
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)


def name_commands(text: str) -> str:
    """Write subcommands of `crossmae` in place of scripts and of editable installs."""
    for name, path in COMMANDS.items():
        script = re.escape(path)
        # torchrun starts a script of Python, unless it is asked to start a program.
        text = re.sub(rf"(torchrun [^\n]*?) {script}\b", rf"\1 --no-python crossmae {name}", text)
        text = re.sub(rf"(?<![\w/.-])({_PYTHON} )?{script}\b", f"crossmae {name}", text)
    text = re.sub(rf"{_PYTHON} -m crossmae\.doctor\b", "crossmae doctor", text)
    return re.sub(r'pip install -e "?\.\[(\w+)\]"?', r'pip install "crossmae[\1]"', text)


def advise(text: str) -> str:
    """Name commands that exist for the reader.

    They are subcommands of `crossmae`, and scripts only if the user started a script of a clone.
    """
    return name_commands(text) if IN_WHEEL or is_subcommand() else text


def is_subcommand() -> bool:
    """Check whether this process was started as `crossmae NAME`."""
    return sys.argv[:1] != [] and sys.argv[0].startswith("crossmae ")  # set by tools/command.py


def repeat_command() -> str:
    """Tell how a training continues: by the same command, with --resume."""
    return "Repeat the command" if "--resume" in sys.argv else "Repeat the command with --resume"


class UserError(ValueError):
    """An error that the user can correct: a path, a key, a file, a combination of settings.

    The first argument is the message, one line. An optional second argument has lines that follow, such as a table.
    """

    def __str__(self) -> str:
        message, *details = self.args
        message = advise(printable(message))
        if len(message) > LONGEST_MESSAGE:  # a value of thousands of characters; the advice is at the end
            message = f"{message[: LONGEST_MESSAGE - 500]} [...] {message[-500:]}"
        return "\n".join([message, *details])


@contextmanager
def named_by(key: str, path: str | Path) -> Iterator[None]:
    """Put a key before errors about the path that it names.

    Errors about something else stay as they are. A config key that a lower function put before the path is replaced.
    """
    try:
        yield
    except UserError as error:
        whole, name = str(error.args[0]), str(path).partition("::")[0]  # without a choice in the file
        head, _, rest = whole.partition(": ")
        names = {name, os.path.expanduser(name), str(Path(name).absolute())} - {".", ""}
        starts = tuple(f"{one}{following}" for one in names for following in (":", "/", " "))
        texts = (whole, rest) if "." in head or head == key else (whole,)
        found = next((text for text in texts if text.startswith(starts)), None)
        if found is not None:
            error.args = (f"{key}: {found}", *error.args[1:])
        raise


class PrintableFormatter(logging.Formatter):
    """Format of log records that escapes names in the arguments, so that a name cannot break a line."""

    def format(self, record: logging.LogRecord) -> str:
        if isinstance(record.args, tuple):
            record = copy(record)
            shown = (str, PurePath, BaseException)
            record.args = tuple(printable(arg) if isinstance(arg, shown) else arg for arg in record.args or ())
        return advise(super().format(record))


class ConsoleHandler(logging.Handler):
    """Console output above the progress bar: messages of this project, and warnings of all libraries.

    Of several processes, the main process shows messages. All processes show warnings.
    """

    def __init__(self) -> None:
        super().__init__()
        self.setFormatter(PrintableFormatter())

    def filter(self, record: logging.LogRecord) -> bool:
        is_own = record.name.split(".")[0] in ("crossmae", "det", "tools", "__main__")
        return record.levelno >= logging.WARNING or (is_own and os.environ.get("RANK", "0") == "0")

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        tqdm.write(self.format(record), file=sys.stderr)


def set_up_log(level: int = logging.INFO) -> None:
    """Print log messages to stderr."""
    logging.basicConfig(level=level, handlers=[ConsoleHandler()])


def free_space(path: Path) -> tuple[Path, int | None]:
    """Return the nearest existing folder, and its free bytes.

    None: the system does not tell.
    """
    path = path.absolute()
    there = next((folder for folder in (path, *path.parents) if os.path.isdir(folder)), Path(path.anchor))
    try:
        usage = shutil.disk_usage(there)
    except OSError:
        return there, None
    return there, usage.free if usage.total else None


def describe_disk_error(error: OSError, folder: Path) -> str:
    """Describe an error with the free space and what to do.

    The text is `<reason> (<free> free in <folder>). <What to do.>`
    """
    there, free = free_space(folder)
    space = "free space unknown" if free is None else f"{free / 1e9:.3g} GB free"
    reason = error.strerror or " ".join(str(error).split()) or type(error).__name__
    return f"{reason} ({space} in {there}). {DISK_TROUBLE.get(error.errno or 0, 'Name another folder.')}"


def run_cli(main: Callable[[], None]) -> None:
    """Run `main` and print user errors as one line.

    A `UserError` is printed to stderr as `error: ...`, with exit code 2. Ctrl-C gives exit code 130.
    """
    if isinstance(sys.stdout, TextIOWrapper):  # as for stderr: printing a name that is not UTF-8 must not fail
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        main()
        return
    except UserError as error:
        message = str(error)
    except BrokenPipeError:  # the program that reads the pipe has ended, such as `head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(BROKEN_PIPE_EXIT_CODE) from None
    except OSError as error:
        if error.errno not in DISK_TROUBLE:
            raise
        path = Path(os.fsdecode(error.filename)) if isinstance(error.filename, str | bytes) else None
        message = f"{printable(path or 'writing')}: {describe_disk_error(error, path.parent if path else Path())}"
    except MemoryError:
        message = "there is not enough memory for this"
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(INTERRUPTED_EXIT_CODE) from None
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(USER_ERROR_EXIT_CODE)


def exit_if_any(failures: Sequence[str], heading: str) -> None:
    """Print failures under a heading, if any, and exit with code 1."""
    if failures:
        print("\n".join([f"error: {heading}", *map(printable, failures)]), file=sys.stderr)
        raise SystemExit(SOME_FAILED_EXIT_CODE)


def import_extra(module: str, what: str, extra: str = "data") -> Any:
    """Import a library of an optional extra in pyproject.toml.

    Raises UserError if the library is not installed. The message names `what`, the feature that needs the library.
    """
    try:
        return importlib.import_module(module)
    except ImportError:
        library = module.partition(".")[0]
        raise UserError(f'{what} needs {library}: pip install -e ".[{extra}]"') from None


def shorten(names: Sequence[str], most: int = 5, separator: str = ", ") -> str:
    """List the first `most` names, and count the remaining names."""
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return separator.join(names[:most]) + more


def rough_time(seconds: float) -> str:
    """Format an estimated time, such as "55 min" or "3.1 days"."""
    minutes = round(seconds / 60)
    if seconds < 100:
        return f"{round(seconds)} s"
    if minutes < 120:
        return f"{minutes} min"
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    return f"{seconds / 86400:.1f} days"


def counted(number: int, noun: str, plural: str = "") -> str:
    """Format a count with its noun: "1 image", "1,600 images", "2 classes"."""
    several = plural or noun + ("es" if noun.endswith("s") else "s")
    return f"{number:,} {noun if number == 1 else several}"
