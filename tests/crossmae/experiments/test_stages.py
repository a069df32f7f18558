"""Stages run in order, are reused when done, continue where they failed, and remove only their own outputs."""

from __future__ import annotations

import json
import shlex
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from crossmae.errors import UserError
from crossmae.experiments.stages import RECORDS, RESUME, Stage
from crossmae.experiments.stages import run_stages as run_all

WRITE = "import sys; open(sys.argv[1], 'w').write('x'); open(sys.argv[2], 'a').write(sys.argv[3])"


@pytest.fixture
def three(tmp_path: Path) -> list[Stage]:
    """Three quick stages; each appends its letter to a journal next to the demo's folder."""
    (tmp_path / "b.yaml").write_text("first")
    return [quick(tmp_path, "a"), quick(tmp_path, "b", tmp_path / "b.yaml"), quick(tmp_path, "c")]


def quick(tmp_path: Path, name: str, config: Path | None = None) -> Stage:
    output, journal = tmp_path / "demo" / f"{name}.txt", tmp_path / "journal"
    return scripted(tmp_path, name, WRITE, (output.name,), str(output), str(journal), name, config=config)


def scripted(
    tmp_path: Path, name: str, code: str, outputs: tuple[str, ...], *words: str, config: Path | None = None
) -> Stage:
    """A stage whose tool is a script with this code."""
    tool = tmp_path / f"{name}.py"
    tool.write_text(code)
    return Stage(name, f"title of {name}", str(tool), words, outputs, config)


def run_stages(stages: list[Stage], folder: Path, *, fresh: bool = False) -> float:
    return run_all(stages, folder, total=len(stages), fresh=fresh)


def journal(tmp_path: Path) -> str:
    """The letters of the stages that ran since the last look."""
    path = tmp_path / "journal"
    text = path.read_text() if path.exists() else ""
    path.unlink(missing_ok=True)
    return text


def records(tmp_path: Path) -> list[dict[str, object]]:
    return json.loads((tmp_path / "demo" / RECORDS).read_text())["stages"]


def test_second_run_reuses_everything(three: list[Stage], tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    first = run_stages(three, tmp_path / "demo")
    assert journal(tmp_path) == "abc"
    out = capfd.readouterr().out
    for stage in three:
        assert f"{stage.title}\n$ {stage.command}" in out
    assert [r["status"] for r in records(tmp_path)] == ["done"] * 3
    again = run_stages(three, tmp_path / "demo")
    assert journal(tmp_path) == ""
    assert again == first
    assert capfd.readouterr().out.count("reused") == 3


@pytest.mark.parametrize("change", ["config", "command", "output"])
def test_a_change_reruns_its_stage_and_those_after_it(three: list[Stage], tmp_path: Path, change: str):
    run_stages(three, tmp_path / "demo")
    journal(tmp_path)
    if change == "config":
        (tmp_path / "b.yaml").write_text("second")
    elif change == "command":
        three[1] = replace(three[1], words=(*three[1].words[:-1], "B"))
    else:
        (tmp_path / "demo" / three[1].outputs[0]).unlink()
    run_stages(three, tmp_path / "demo")
    assert journal(tmp_path).lower() == "bc"


def test_fresh_reruns_everything_even_with_broken_records(three: list[Stage], tmp_path: Path):
    run_stages(three, tmp_path / "demo")
    journal(tmp_path)
    (tmp_path / "demo" / RECORDS).write_text("{")
    run_stages(three, tmp_path / "demo", fresh=True)
    assert journal(tmp_path) == "abc"


def test_failed_stage_is_named_and_the_next_run_continues_there(three: list[Stage], tmp_path: Path):
    good = three[1]
    three[1] = scripted(tmp_path, "bad", "raise SystemExit(7)", good.outputs, "a b")
    three[1] = replace(three[1], name="b")
    with pytest.raises(
        UserError,
        match=r"stage b: failed after .*: exit code 7\. .* command of the stage is: .*bad\.py 'a b'",
    ):
        run_stages(three, tmp_path / "demo")
    assert journal(tmp_path) == "a"
    assert [r["status"] for r in records(tmp_path)] == ["done", "failed"]
    three[1] = good
    run_stages(three, tmp_path / "demo")
    assert journal(tmp_path) == "bc"


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("pass", r"stage a: failed .*: wrote no .*a\.txt"),
        ("import os; os.kill(os.getpid(), 9)", "killed by SIGKILL, which is what happens when memory runs out"),
    ],
)
def test_failure_of_a_stage_is_explained(three: list[Stage], tmp_path: Path, code: str, message: str):
    three[0] = scripted(tmp_path, "a", code, three[0].outputs)
    with pytest.raises(UserError, match=message):
        run_stages(three, tmp_path / "demo")
    assert records(tmp_path)[0]["status"] == "failed"


def test_interrupted_stage_is_not_taken_for_done(three: list[Stage], tmp_path: Path):
    run_stages(three, tmp_path / "demo")
    journal(tmp_path)
    content = records(tmp_path)
    content[2]["status"] = "started"  # as when the machine goes down
    (tmp_path / "demo" / RECORDS).write_text(json.dumps({"stages": content}))
    run_stages(three, tmp_path / "demo")
    assert journal(tmp_path) == "c"


def test_a_stage_that_sigterm_ends_is_recorded_and_continues(three: list[Stage], tmp_path: Path):
    """The signal reaches only the program of the stages, as `kill PID` does."""
    asks = "import os, signal, time; os.kill(os.getppid(), signal.SIGTERM); time.sleep(60)"
    good, three[1] = three[1], replace(scripted(tmp_path, "bad", asks, three[1].outputs), name="b")
    with pytest.raises(SystemExit) as ended:
        run_stages(three, tmp_path / "demo")
    assert ended.value.code == 128 + signal.SIGTERM
    assert [r["status"] for r in records(tmp_path)] == ["done", "stopped"]
    assert journal(tmp_path) == "a"
    three[1] = good
    run_stages(three, tmp_path / "demo")
    assert journal(tmp_path) == "bc"


def test_old_outputs_are_gone_before_a_stage_runs(tmp_path: Path):
    folder = tmp_path / "demo" / "out"
    folder.mkdir(parents=True)
    (folder / "leftover").touch()
    code = "import sys, pathlib; pathlib.Path(sys.argv[1]).mkdir()"  # fails where the folder exists
    run_stages([scripted(tmp_path, "a", code, ("out",), str(folder))], tmp_path / "demo")
    assert list(folder.iterdir()) == []


def test_a_link_is_removed_but_not_what_it_points_to(tmp_path: Path):
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "file").touch()
    (tmp_path / "demo").mkdir()
    link = tmp_path / "demo" / "a.txt"
    link.symlink_to(precious)
    run_stages([quick(tmp_path, "a")], tmp_path / "demo")
    assert link.read_text() == "x"
    assert (precious / "file").exists()


@pytest.mark.parametrize("content", ["{", "[]", '{"stages": [{}]}'])
def test_broken_records_are_an_error(three: list[Stage], tmp_path: Path, content: str):
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / RECORDS).write_text(content)
    with pytest.raises(UserError, match=RECORDS):
        run_stages(three, tmp_path / "demo")
    assert journal(tmp_path) == ""


COUNT_TO_TWO = """
import pathlib, sys
folder = pathlib.Path(sys.argv[1])
folder.mkdir(exist_ok=True)
attempts = len(list(folder.iterdir()))
(folder / f"attempt-{attempts}").touch()
raise SystemExit(0 if attempts == 1 else 3)
"""


@pytest.mark.parametrize(("change", "attempts"), [("", 2), ("words", 1), ("fresh", 1), ("earlier", 1)])
def test_only_a_stage_that_can_resume_keeps_what_its_own_attempt_left(tmp_path: Path, change: str, attempts: int):
    folder = tmp_path / "demo"
    stages = [quick(tmp_path, "a"), scripted(tmp_path, "b", COUNT_TO_TWO, ("out",), str(folder / "out"), RESUME)]
    with pytest.raises(UserError, match="exit code 3"):
        run_stages(stages, folder)
    content = json.loads((folder / RECORDS).read_text())
    content["stages"][1] |= {"seconds": 1000.0, "peak_memory_bytes": 2**50}
    (folder / RECORDS).write_text(json.dumps(content))
    if change == "words":
        stages[1] = replace(stages[1], words=(*stages[1].words, "--other"))
    if change == "earlier":
        stages[0] = replace(stages[0], words=(*stages[0].words[:-1], "A"))
    if attempts == 2:
        run_stages(stages, folder)
    else:
        with pytest.raises(UserError, match="exit code 3"):
            run_stages(stages, folder, fresh=change == "fresh")
    assert len(list((folder / "out").iterdir())) == attempts
    last = records(tmp_path)[1]
    assert (last["seconds"] > 1000, last["peak_memory_bytes"] == 2**50) == (attempts == 2,) * 2  # both attempts count


def test_a_later_stage_can_depend_on_what_an_earlier_one_wrote(three: list[Stage], tmp_path: Path):
    def stages() -> Iterator[Stage]:
        yield three[0]
        word = (tmp_path / "demo" / "a.txt").read_text()
        yield replace(three[1], words=(*three[1].words[:-1], word))

    run_all(stages(), tmp_path / "demo", total=2)
    assert journal(tmp_path) == "ax"


def test_commands_outside_of_a_clone_are_subcommands(three: list[Stage], monkeypatch: pytest.MonkeyPatch):
    stage = Stage("pretrain", "t", "tools/pretrain.py", ("data.train=a b",), ("run",))
    assert shlex.split(stage.command)[-2:] == ["tools/pretrain.py", "data.train=a b"]
    monkeypatch.setattr("crossmae.experiments.stages.IN_WHEEL", True)
    assert stage.command == "crossmae pretrain 'data.train=a b'"


def test_a_stage_of_a_subcommand_is_a_subcommand(monkeypatch: pytest.MonkeyPatch):
    stage = Stage("pretrain", "t", "tools/pretrain.py", ("--help",), ("run",))
    assert stage.arguments[1].endswith("tools/pretrain.py")
    monkeypatch.setattr("sys.argv", ["crossmae run", "IMAGES"])
    assert stage.command == "crossmae pretrain --help"
    told = subprocess.run(stage.arguments, capture_output=True, text=True, check=True).stdout
    assert told.startswith("usage: crossmae pretrain ")


def test_printed_paths_are_the_shortest_that_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    words = (f"{tmp_path}/here/a b", f"data.train={tmp_path}/x", "data.val=y", "/", "-x", f"{tmp_path}/here/-z", "a=")
    stage = Stage("pretrain", "t", "tools/pretrain.py", words, ("run",))
    printed = shlex.split(stage.short_command)[2:]
    assert printed == ["a b", "data.train=../x", "data.val=y", "/", "-x", f"{tmp_path}/here/-z", "a="]
    assert shlex.split(stage.command)[2:] == list(words)


@pytest.mark.parametrize(
    ("exit_code", "advice"),
    [(2, "Correct what the line above says, then repeat the command: it continues"), (3, "Repeat the command: it")],
)
def test_an_error_of_the_input_is_to_be_corrected_first(
    three: list[Stage], tmp_path: Path, exit_code: int, advice: str
):
    three[0] = scripted(tmp_path, "a", f"raise SystemExit({exit_code})", three[0].outputs)
    with pytest.raises(UserError, match=rf"exit code {exit_code}\. {advice}"):
        run_stages(three, tmp_path / "demo")
