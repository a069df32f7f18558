"""Proves that `crossmae NAME` is the main function of its file: the same messages, exit codes and arguments.

tests/tools/test_start.py has the help of every subcommand.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from crossmae.errors import COMMANDS, UserError
from tests.tools.command_line import exit_code
from tests.tools.test_start import HEAVY
from tools import check_coco, command, inspect_checkpoint

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _restored(monkeypatch: pytest.MonkeyPatch) -> None:
    """Restore what a subcommand changes in its process."""
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    for module in (check_coco, inspect_checkpoint):
        monkeypatch.setattr(module, "__doc__", module.__doc__)


@pytest.mark.parametrize("name", ["check", "inspect"])
def test_a_subcommand_is_the_function_of_its_file(name: str) -> None:
    module = command.load(name)
    assert module in (check_coco, inspect_checkpoint)
    assert module.__file__ == str(ROOT / COMMANDS[name])


def test_every_subcommand_has_its_file_and_its_line() -> None:
    lines = dict(re.findall(r"^  ([a-z0-9-]+) +(\S.*)$", command.overview(), re.MULTILINE))
    assert lines.keys() >= COMMANDS.keys()
    for name, path in COMMANDS.items():
        first = (ROOT / path).read_text("utf-8").splitlines()[0]
        assert first == f'"""{lines[name]}'
        assert lines[name].endswith(".")


def test_messages_and_exit_codes_are_those_of_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = exit_code(inspect_checkpoint.main, str(tmp_path / "absent.pth"))
    message = capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        command.main(["inspect", str(tmp_path / "absent.pth")])
    assert (stop.value.code, capsys.readouterr().err) == (code, message) == (2, message)
    assert message.startswith("error: FILE: ")


def test_an_exit_code_that_is_returned_is_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "load", lambda name: SimpleNamespace(main=lambda: 3))
    with pytest.raises(SystemExit, match="3"):
        command.main(["doctor"])
    monkeypatch.setattr(command, "load", lambda name: SimpleNamespace(main=lambda: 0))
    command.main(["doctor"])


def test_arguments_reach_the_function(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []
    monkeypatch.setattr(command, "load", lambda name: SimpleNamespace(main=lambda: seen.append(sys.argv)))
    command.main(["predict-classes", "--weights", "a b", "--help"])
    assert seen == [["crossmae predict-classes", "--weights", "a b", "--help"]]


@pytest.mark.parametrize(
    "name, advice",
    [("pretain", "Did you mean pretrain?"), ("instal", "Did you mean install-detectron2?"), ("", "Choose")],
)
def test_an_unknown_name_proposes_the_nearest(name: str, advice: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        command.main([name])
    assert advice in capsys.readouterr().err


@pytest.mark.parametrize(
    "error, advice",
    [
        (ModuleNotFoundError("No module named 'sklearn'", name="sklearn.metrics"), r'"crossmae\[train\]"'),
        (ModuleNotFoundError("No module named 'cv2'", name="cv2"), r'"crossmae\[det\]"'),
        (ImportError("det needs detectron2; install it"), "crossmae install-detectron2"),
    ],
)
def test_a_missing_library_is_named_with_its_command(
    error: ImportError, advice: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def main() -> None:
        raise error

    monkeypatch.setattr(command, "load", lambda name: SimpleNamespace(main=main))
    with pytest.raises(UserError, match=f"^crossmae probe: .* is not installed. Run: .*{advice}"):
        command.run_command(["probe"])


def test_an_import_error_of_another_kind_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    def main() -> None:
        raise ImportError("a fault of ours", name="crossmae.nothing")

    monkeypatch.setattr(command, "load", lambda name: SimpleNamespace(main=main))
    with pytest.raises(ImportError, match="a fault of ours"):
        command.run_command(["probe"])


def completed(line: str, folder: Path) -> list[str]:
    """What a shell is told about the end of a line, by an interpreter that loads no heavy library for it."""
    answer = folder / "answer"
    asked = {"COMP_LINE": line, "COMP_POINT": str(len(line)), "COMP_TYPE": "9", "_ARGCOMPLETE_IFS": "\n"}
    asked |= {"_ARGCOMPLETE": "1", "_ARGCOMPLETE_STDOUT_FILENAME": str(answer)}
    words = [sys.executable, "-X", "importtime", ROOT / "tools/command.py"]
    done = subprocess.run(words, cwd=folder, env=os.environ | asked, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert not [name for name in HEAVY if re.search(rf"\| +{name}$", done.stderr, re.M)]
    return answer.read_text("utf-8").replace("\\", "").split()


def test_tab_completes_subcommands(tmp_path: Path) -> None:
    assert completed("crossmae ", tmp_path) == ["-h", "--help", "--version", *COMMANDS]
    assert completed("crossmae install", tmp_path) == ["install-detectron2"]


@pytest.mark.parametrize("name", ["pretrain", "check", "install-detectron2"])
def test_tab_completes_the_options_of_a_subcommand(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="0"):
        command.main([name, "--help"])
    arguments = capsys.readouterr().out.partition("\noptions:\n")[2]
    options = re.findall(r"^  (?:-\w, )?(--[\w-]+)", arguments, re.M)
    assert completed(f"crossmae {name} --", tmp_path) == options
    assert "--help" in options


def test_tab_completes_the_names_of_configs_and_files(tmp_path: Path) -> None:
    (tmp_path / "pretrain").mkdir()
    (tmp_path / "pretrain" / "mine.yaml").touch()
    found = completed("crossmae pretrain --resume --config-file pretrain/", tmp_path)
    assert {"pretrain/small.yaml", "pretrain/mine.yaml"} < set(found)
    assert all(name.startswith("pretrain/") for name in found)
