"""Suite of the start of commands: processor seconds of whole processes against `import torch`."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from tools.benchmarks.measuring import Comparison, Gate, Row, ScratchFolder

Build = Callable[[], Comparison | Row]
ROOT = Path(__file__).resolve().parents[2]
# `import torch` takes 3.3 s where the goal of a command is 1 s.
COMMANDS = (
    ("tools/pretrain.py --help", ("tools/pretrain.py", "--help"), 0, 3.3),
    ("tools/train_net.py --help", ("tools/train_net.py", "--help"), 0, 3.3),
    ("a wrong key of tools/pretrain.py", ("tools/pretrain.py", "optim.nonsense=1"), 2, 3.3),
    ("tools/check_coco.py on one image", ("tools/check_coco.py", "{coco}", "--skip-images"), 0, 3.3),
    ("import crossmae; crossmae.CrossMAE", ("-c", "import crossmae; crossmae.CrossMAE"), 0, 1 / 1.15),
)


def start(commands: Sequence[tuple[str, tuple[str, ...], int, float]] = COMMANDS) -> list[Build]:
    """List the starts of commands.

    Args:
        commands: name, arguments of Python, expected exit code, and goal.
    """
    return [partial(compare_start, *command) for command in commands]


def write_small_coco(folder: Path) -> Path:
    """Write a sound COCO file with one object."""
    annotation = {
        **{"id": 1, "image_id": 1, "category_id": 1, "bbox": [8, 8, 24, 16], "area": 384, "iscrowd": 0},
        "segmentation": [[8, 8, 32, 8, 32, 24, 8, 24]],
    }
    content = {
        "images": [{"id": 1, "file_name": "1.png", "height": 64, "width": 64}],
        "annotations": [annotation],
        "categories": [{"id": 1, "name": "a"}],
    }
    (folder / "coco.json").write_text(json.dumps(content))
    return folder / "coco.json"


def run_python(arguments: Sequence[str]) -> int:
    """Run a process to its end, and return its exit code."""
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, check=False).returncode


def compare_start(what: str, arguments: Sequence[str], expected: int, goal: float) -> Comparison:
    """Compare a command with `import torch`, each in a new process."""
    folder = ScratchFolder()
    coco = str(write_small_coco(folder.path)) if "{coco}" in arguments else ""
    words = [word.replace("{coco}", coco) for word in arguments]
    return Comparison(
        what=what,
        against="python -c 'import torch'",
        ours=lambda: (run_python(words), folder)[0],
        other=lambda: run_python(["-c", "import torch"]),
        goals={"cpu": goal},
        gate=lambda: Gate(abs(run_python(words) - expected), 0),
        seconds="children",
        note="the gate compares exit codes",
    )
