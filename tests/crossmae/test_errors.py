"""Proves what a command line shows: one line for what users cause, a traceback for what they do not."""

from __future__ import annotations

import errno
import logging
import os
import pickle
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from crossmae.errors import (
    DISK_TROUBLE,
    INTERRUPTED_EXIT_CODE,
    USER_ERROR_EXIT_CODE,
    PrintableFormatter,
    UserError,
    counted,
    exit_if_any,
    free_space,
    name_commands,
    named_by,
    repeat_command,
    run_cli,
)


def raising(error: BaseException) -> Callable[[], None]:
    def main() -> None:
        raise error

    return main


@pytest.mark.parametrize(
    ("error", "code", "shown"),
    [
        (UserError("two\nlines.png: broken"), USER_ERROR_EXIT_CODE, "error: two\\nlines.png: broken\n"),
        (UserError("caf\udce9.png", "| table |"), USER_ERROR_EXIT_CODE, "error: caf\\udce9.png\n| table |\n"),
        (MemoryError(), USER_ERROR_EXIT_CODE, "error: there is not enough memory for this\n"),
        (KeyboardInterrupt(), INTERRUPTED_EXIT_CODE, "interrupted\n"),
    ],
)
def test_the_users_trouble_is_one_line(
    capsys: pytest.CaptureFixture[str], error: BaseException, code: int, shown: str
) -> None:
    with pytest.raises(SystemExit) as exit_info:
        run_cli(raising(error))
    assert exit_info.value.code == code
    assert capsys.readouterr().err == shown


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "Repeat the command with --resume"),
        (["--resume", "output_dir=out"], "Repeat the command"),
    ],
)
def test_who_has_given_resume_is_not_told_to_add_it(
    monkeypatch: pytest.MonkeyPatch, words: list[str], told: str
) -> None:
    monkeypatch.setattr(sys, "argv", ["crossmae pretrain", *words])
    assert repeat_command() == told


@pytest.mark.parametrize("number", DISK_TROUBLE, ids=errno.errorcode.get)
def test_trouble_with_the_disk_names_file_space_and_remedy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], number: int
) -> None:
    """Also of writers that are not ours, such as tensorboard's."""
    with pytest.raises(SystemExit) as exit_info:
        run_cli(raising(OSError(number, os.strerror(number), str(tmp_path / "a.pth"))))
    assert exit_info.value.code == USER_ERROR_EXIT_CODE
    shown = capsys.readouterr().err
    start, end = (
        f"error: {tmp_path}/a.pth: {os.strerror(number)} (",
        f" GB free in {tmp_path}). {DISK_TROUBLE[number]}\n",
    )
    assert shown.startswith(start)
    assert shown.endswith(end)
    free = float(shown.removeprefix(start).removesuffix(end))
    assert free == pytest.approx(shutil.disk_usage(tmp_path).free / 1e9, rel=0.05)


@pytest.mark.parametrize("name", ["x" * 300, "gone/x"])
def test_free_space_is_that_of_the_nearest_folder(tmp_path: Path, name: str) -> None:
    assert free_space(tmp_path / name / "y")[0] == tmp_path


@pytest.mark.parametrize("error", [ValueError("a bug"), OSError(errno.ENOTTY, "a bug")])
def test_our_own_trouble_keeps_its_traceback(error: Exception) -> None:
    with pytest.raises(type(error), match="a bug"):
        run_cli(raising(error))


def test_a_copy_of_an_error_reads_the_same() -> None:
    error = UserError("two\nlines.png", "a\ntable")
    assert str(pickle.loads(pickle.dumps(error))) == str(error) == "two\\nlines.png\na\ntable"


def test_failures_are_one_line_each(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        exit_if_any(["a\nb.png: broken", "\udce9.png: broken"], "of 2 files:")
    assert capsys.readouterr().err == "error: of 2 files:\na\\nb.png: broken\n\\udce9.png: broken\n"


def test_names_cannot_break_a_line_of_the_log() -> None:
    arguments = ("two\nlines", Path("caf\udce9"), OSError("a\tb"), 3)
    record = logging.LogRecord("x", logging.INFO, "", 0, "%s\n%s %s %d", arguments, None)
    assert PrintableFormatter().format(record) == "two\\nlines\ncaf\\udce9 a\\tb 3"
    assert record.args == arguments  # other handlers get the original
    plain = logging.LogRecord("x", logging.INFO, "", 0, "100%", (), None)
    assert PrintableFormatter().format(plain) == "100%"


@pytest.mark.parametrize(
    ("message", "told"),
    [
        ("a/b: is bad. Mend it.", "KEY: a/b: is bad. Mend it."),
        ("a/b/c.pth: is bad. Mend it.", "KEY: a/b/c.pth: is bad. Mend it."),
        ("a/b has no head. Name another.", "KEY: a/b has no head. Name another."),
        ("MODEL.WEIGHTS: a/b: is bad. Mend it.", "KEY: a/b: is bad. Mend it."),
        ("KEY: a/b: is bad. Mend it.", "KEY: a/b: is bad. Mend it."),
        ("a/bc: is bad. Mend it.", "a/bc: is bad. Mend it."),
        ("num_heads: a/b: fits nothing. Set it.", "num_heads: a/b: fits nothing. Set it."),
        ("num_heads: is bad in a/b. Set it.", "num_heads: is bad in a/b. Set it."),
    ],
)
def test_errors_about_a_path_name_its_key(message: str, told: str) -> None:
    with pytest.raises(UserError) as caught, named_by("KEY", "a/b::ema"):
        raise UserError(message, "a table")
    assert caught.value.args == (told, "a table")


@pytest.mark.parametrize(
    ("number", "words", "told"),
    [
        (0, ("image",), "0 images"),
        (1, ("image",), "1 image"),
        (1600, ("image",), "1,600 images"),
        (1, ("class",), "1 class"),
        (2, ("class",), "2 classes"),
        (2, ("category", "categories"), "2 categories"),
        (1, ("kind of faults", "kinds of faults"), "1 kind of faults"),
    ],
)
def test_counts_have_the_right_form(number: int, words: tuple[str, ...], told: str) -> None:
    assert counted(number, *words) == told


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("python tools/train_net.py --resume", "crossmae detect --resume"),
        ("Run `/a-b/.venv/bin/python3.11 tools/install_detectron2.py`.", "Run `crossmae install-detectron2`."),
        ("by tools/predict.py or tools/predict_classes.py", "by crossmae predict or crossmae predict-classes"),
        (
            "torchrun --nproc-per-node 8 tools/pretrain.py a=1",
            "torchrun --nproc-per-node 8 --no-python crossmae pretrain a=1",
        ),
        (
            'pip install -e ".[det]", then python -m crossmae.doctor',
            'pip install "crossmae[det]", then crossmae doctor',
        ),
        ("pip install -e .[demo]", 'pip install "crossmae[demo]"'),
        ("python tools/study.py", "python tools/study.py"),  # no subcommand
        ("my/tools/predict.py and mytools/predict.py", "my/tools/predict.py and mytools/predict.py"),
    ],
)
def test_commands_are_named_as_in_a_wheel(text: str, told: str) -> None:
    assert name_commands(text) == told


def test_advice_depends_on_the_reader(monkeypatch: pytest.MonkeyPatch) -> None:
    error = UserError("a.json: is bad. Check it: python tools/check_coco.py a.json")
    record = logging.LogRecord("x", logging.INFO, "", 0, "see python tools/check_coco.py", (), None)
    monkeypatch.setattr("sys.argv", ["tools/train_net.py"])
    assert str(error) == error.args[0]
    assert PrintableFormatter().format(record) == record.msg
    monkeypatch.setattr("sys.argv", ["crossmae detect"])
    assert str(error) == "a.json: is bad. Check it: crossmae check a.json"
    assert PrintableFormatter().format(record) == "see crossmae check"
    monkeypatch.setattr("sys.argv", ["my_program.py"])
    monkeypatch.setattr("crossmae.errors.IN_WHEEL", True)
    assert str(error) == "a.json: is bad. Check it: crossmae check a.json"
