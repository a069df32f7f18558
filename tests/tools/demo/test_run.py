"""`make demo` runs stages in order, reuses what is done, continues where it failed, removes only its own."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from crossmae.errors import UserError
from crossmae.models.sizes import model_arguments
from crossmae.pretraining.config import load_config
from crossmae.pretraining.initial_weights import build_model
from tools.demo.run import RECORDS, ROOT, Stage, demo_stages, run_stages

WRITE = "import sys; open(sys.argv[1], 'w').write('x'); open(sys.argv[2], 'a').write(sys.argv[3])"


@pytest.fixture
def three(tmp_path: Path) -> list[Stage]:
    """Three quick stages; each appends its letter to a journal next to the demo's folder."""
    (tmp_path / "b.yaml").write_text("first")
    return [quick(tmp_path, "a"), quick(tmp_path, "b", tmp_path / "b.yaml"), quick(tmp_path, "c")]


def quick(tmp_path: Path, name: str, config: Path | None = None) -> Stage:
    output, journal = tmp_path / "demo" / f"{name}.txt", tmp_path / "journal"
    arguments = ("-S", "-c", WRITE, str(output), str(journal), name)
    return Stage(name, f"title of {name}", arguments, (output.name,), config)


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
        three[1] = replace(three[1], arguments=(*three[1].arguments[:-1], "B"))
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
    three[1] = replace(good, arguments=("-S", "-c", "raise SystemExit(7)"))
    with pytest.raises(
        UserError,
        match=r"stage b: failed after .*: exit code 7\. .* command of the stage is: .* -c 'raise SystemExit\(7\)'",
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
    three[0] = replace(three[0], arguments=("-S", "-c", code))
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


def test_old_outputs_are_gone_before_a_stage_runs(tmp_path: Path):
    folder = tmp_path / "demo" / "out"
    folder.mkdir(parents=True)
    (folder / "leftover").touch()
    code = "import sys, pathlib; pathlib.Path(sys.argv[1]).mkdir()"  # fails where the folder exists
    run_stages([Stage("a", "t", ("-S", "-c", code, str(folder)), ("out",))], tmp_path / "demo")
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


def test_demo_commands_are_what_is_shown_and_write_inside_the_output(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(ROOT)
    output = Path("out put")
    for stage in demo_stages(output):
        assert tuple(shlex.split(stage.command)[1:]) == stage.arguments  # can be pasted, spaces or not
        assert str(ROOT) not in stage.command.partition(" ")[2]  # nothing of this machine in it
        assert (ROOT / stage.arguments[0]).is_file()
        assert all(len(Path(name).parts) == 1 and name != ".." for name in stage.outputs)
        assert stage.config is None or stage.config.is_file()


def test_the_detectors_differ_only_in_their_first_weights():
    stages = {stage.name: stage for stage in demo_stages(Path("out"))}
    random, own = (set(stages[name].arguments) for name in ("detect-random", "detect-own"))
    assert random - own == {"MODEL.WEIGHTS=out/start", "OUTPUT_DIR=out/detect-random"}
    assert own - random == {"MODEL.WEIGHTS=out/pretrain", "OUTPUT_DIR=out/detect-own"}


def test_random_weights_are_those_that_pretraining_starts_from(tmp_path: Path):
    start, run = (next(one for one in demo_stages(tmp_path) if one.name == name) for name in ("start", "pretrain"))
    (tmp_path / "data/pretrain").mkdir(parents=True)
    for number in range(64):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(tmp_path / f"data/pretrain/{number}.png")
    subprocess.run([sys.executable, *start.arguments], check=True, cwd=ROOT)
    configs = [load_config("pretrain/demo.yaml", one.arguments[3:]) for one in (start, run)]
    assert configs[0].model == configs[1].model
    assert configs[0].runtime.seed == configs[1].runtime.seed
    model, seed = configs[1].model, configs[1].runtime.seed
    arguments = model_arguments(model.name) | model.arguments()
    expected = build_model(arguments, seed, model.mask_ratio, model.predict_ratio).state_dict()
    written = load_file(tmp_path / "start/model.safetensors")
    assert written.keys() == expected.keys()
    assert all(torch.equal(written[key], expected[key]) for key in expected)


def test_nothing_to_do_is_quick_and_prints_the_table_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(ROOT)
    done = []
    for stage in demo_stages(tmp_path):
        record = {"name": stage.name, "fingerprint": stage.fingerprint, "status": "done"}
        done.append(record | {"seconds": 90.0, "peak_memory_bytes": 2**30})
        for output in stage.outputs:
            (tmp_path / output).write_text("mask 51.0")
    (tmp_path / RECORDS).write_text(json.dumps({"stages": done}))
    probe = (
        "import sys; from tools.demo.run import main; main(['--output', sys.argv[1]]); "
        "print(sorted({'torch', 'matplotlib', 'detectron2'} & set(sys.modules)))"
    )
    out = subprocess.run(
        [sys.executable, "-c", probe, str(tmp_path)], check=True, capture_output=True, text=True
    ).stdout
    assert out.count("reused") == len(done)
    assert "mask 51.0" in out
    assert "9 min 00 s" in out
    assert str(tmp_path / "report.html") in out
    assert out.endswith("[]\n")
