"""Proves that help, wrong keys and `check_coco` need no heavy library, and that CrossMAE needs little but torch.

A fresh interpreter runs the commands, and tells after each of them which heavy libraries are loaded. Seconds are not
compared with a limit, because they depend on the machine.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from crossmae.errors import COMMANDS

ROOT = Path(__file__).parents[2]
HEAVY = ["torch", "torchvision", "detectron2", "timm", "matplotlib", "scipy", "sklearn", "pandas", "transformers"]
SCRIPTS = [*ROOT.glob("tools/*.py"), ROOT / "tools/demo/run.py"]
TOOLS = sorted(str(path.relative_to(ROOT)) for path in SCRIPTS)
RUN = """
import json, runpy, sys
heavy, commands = json.loads(sys.argv[1])
for command in commands:
    sys.argv, code = command, 0
    try:
        runpy.run_path(command[0], run_name="__main__")
    except SystemExit as stop:
        code = stop.code
    loaded = [name for name in heavy if name in sys.modules]
    print("\\nDONE " + json.dumps([command[0], code, loaded]))
"""
needs_detectron2 = pytest.mark.skipif(
    find_spec("detectron2") is None, reason="detectron2 is not installed: python tools/install_detectron2.py"
)


def start(*commands: list[str]) -> subprocess.CompletedProcess[str]:
    """Run the commands after each other in a fresh interpreter."""
    words = [sys.executable, "-c", RUN, json.dumps([HEAVY, commands])]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(words, capture_output=True, text=True, cwd=ROOT, env=environment, check=True)


def run(*commands: list[str]) -> tuple[list[list[object]], str]:
    """Exit code and loaded heavy libraries after each command, and everything on stderr."""
    done = start(*commands)
    return [json.loads(line[5:]) for line in done.stdout.splitlines() if line.startswith("DONE ")], done.stderr


@needs_detectron2
def test_help_of_every_tool_loads_no_heavy_library() -> None:
    results, _ = run(*([tool, "--help"] for tool in TOOLS))
    assert results == [[tool, 0, []] for tool in TOOLS]


@needs_detectron2
def test_help_of_every_subcommand_is_quick_and_has_examples_of_it() -> None:
    names = list(COMMANDS)
    texts = re.split(
        r"^DONE (.*)\n", start(*(["tools/command.py", name, "--help"] for name in names)).stdout, flags=re.M
    )
    assert [json.loads(text) for text in texts[1::2]] == [["tools/command.py", 0, []]] * len(names)
    for name, text in zip(names, texts[::2], strict=False):
        assert text.startswith(f"usage: crossmae {name} ")
        assert re.search(rf"\n    crossmae {name}( |$)", text, re.M), text
        assert not [path for path in COMMANDS.values() if path in text], text


@needs_detectron2
def test_a_wrong_key_is_found_before_heavy_libraries_are_loaded(tmp_path: Path) -> None:
    detector = ["--config-file", "demo_mask_rcnn.yaml", "SOLVER.BASE_RL=1"]
    commands = [
        ["tools/pretrain.py", "--config-file", "pretrain/demo.yaml", "data.tran=x"],
        ["tools/dataset_stats.py", "--config-file", "pretrain/demo.yaml", "data.tran=x"],
        ["tools/finetune.py", "--config-file", "finetune/small.yaml", "data.tran=x"],
        ["tools/probe.py", "--config-file", "probe.yaml", "data.tran=x"],
        ["tools/train_net.py", *detector],
        ["tools/visualize_data.py", *detector],
        ["tools/predict.py", *detector, "--weights", str(tmp_path), "photo.jpg"],
        ["tools/export_detector.py", *detector, "--weights", str(tmp_path), "--output", "detector.onnx"],
    ]
    results, errors = run(*commands)
    assert results == [[command[0], 2, []] for command in commands]
    assert errors.count("unknown key") == len(commands), errors


@needs_detectron2
def test_check_coco_loads_no_heavy_library(tmp_path: Path) -> None:
    from tests.det.coco_files import write_coco  # here, because it needs pycocotools

    path, images, _ = write_coco(tmp_path)
    results, errors = run(["tools/check_coco.py", str(path), str(images)])
    assert results == [["tools/check_coco.py", results[0][1], []]]
    assert results[0][1] in (0, 1), errors


@needs_detectron2
def test_a_config_alone_makes_the_backbone_known() -> None:
    """In a fresh interpreter, where no other module has registered it."""
    code = "import det.config as c; cfg = c.load_det_config('demo_mask_rcnn.yaml')\n"
    code += "import torch; from detectron2.modeling import build_backbone\n"
    code += "with torch.device('meta'): print(type(build_backbone(cfg)).__name__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.stdout.split() == ["FeaturePyramid"], done.stderr


def test_crossmae_loads_torch_only_and_costs_little_more() -> None:
    """The processor time of an import: the smaller of two, if the first pair does not show it."""
    code = f"import {{}}, sys, time; {{}}; print(time.process_time(), *[n for n in {HEAVY} if n in sys.modules])"
    sides = [code.format("torch", "torch"), code.format("crossmae", "crossmae.CrossMAE")]
    seconds: list[list[float]] = [[], []]
    for _ in range(2):
        for side, times in zip(sides, seconds, strict=True):
            words = [sys.executable, "-c", side]
            done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, check=True)
            spent, *loaded = done.stdout.split()
            times.append(float(spent))
            assert loaded == ["torch"]
        torch, ours = map(min, seconds)
        if ours < 1.3 * torch:
            break
    assert ours < 1.3 * torch
