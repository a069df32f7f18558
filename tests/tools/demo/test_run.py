"""`make demo` runs the stages of `crossmae run` on composed pictures, and nothing outside its folder."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from crossmae.errors import PROGRAMS
from crossmae.experiments.stages import RECORDS, RESUME
from crossmae.models.sizes import model_arguments
from crossmae.pretraining.config import load_config
from crossmae.pretraining.initial_weights import build_model
from tools.demo.run import demo_stages


def test_demo_commands_are_what_is_shown_and_write_inside_the_output(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(PROGRAMS)
    output = Path("out put")
    for stage in demo_stages(output):
        assert shlex.split(stage.command)[1:] == [stage.tool, *stage.words]  # can be pasted, spaces or not
        assert str(PROGRAMS) not in stage.command.partition(" ")[2]  # nothing of this machine in it
        assert (PROGRAMS / stage.tool).is_file()
        assert all(len(Path(name).parts) == 1 and name != ".." for name in stage.outputs)
        assert stage.config is None or stage.config.is_file()


def test_the_detectors_differ_only_in_their_first_weights():
    stages = {stage.name: stage for stage in demo_stages(Path("out"))}
    random, own = (set(stages[name].words) for name in ("detect-random", "detect-own"))
    assert random - own == {"MODEL.WEIGHTS=out/start", "OUTPUT_DIR=out/detect-random"}
    assert own - random == {"MODEL.WEIGHTS=out/pretrain", "OUTPUT_DIR=out/detect-own"}


def test_random_weights_are_those_that_pretraining_starts_from(tmp_path: Path):
    start, run = (next(one for one in demo_stages(tmp_path) if one.name == name) for name in ("start", "pretrain"))
    (tmp_path / "data/pretrain").mkdir(parents=True)
    for number in range(64):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(tmp_path / f"data/pretrain/{number}.png")
    subprocess.run(start.arguments, check=True, cwd=PROGRAMS)
    configs = [
        load_config("pretrain/demo.yaml", [word for word in one.words[2:] if word != RESUME]) for one in (start, run)
    ]
    assert configs[0].model == configs[1].model
    assert configs[0].runtime.seed == configs[1].runtime.seed
    model, seed = configs[1].model, configs[1].runtime.seed
    arguments = model_arguments(model.name) | model.arguments()
    expected = build_model(arguments, seed, model.mask_ratio, model.predict_ratio).state_dict()
    written = load_file(tmp_path / "start/model.safetensors")
    assert written.keys() == expected.keys()
    assert all(torch.equal(written[key], expected[key]) for key in expected)


def test_nothing_to_do_is_quick_and_prints_the_table_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(PROGRAMS)
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
