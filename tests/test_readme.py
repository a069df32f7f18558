"""Proves that the README's commands work as written: each is run, word for word, on small data with small configs.

The first block runs in a shell, as a user runs it. The others run in this process, where nothing is imported again:
each line goes to the main function of `crossmae`, in the words that a shell would make of it.

The folder that a command runs in has files of the names in the README (IMAGES, TRAIN.json, ...), and configs of the
same names as the recipes, which come before those in configs/.
"""

from __future__ import annotations

import io
import json
import logging
import os
import re
import shlex
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from tests.crossmae.classification.labelled import write_classes
from tools.command import run_command

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
DETECTION = (ROOT / "docs/detection.md").read_text(encoding="utf-8")

PRETRAIN = {
    "output_dir": "outputs",
    "data": {"train": "IMAGES", "workers": 0},
    "model": {
        "name": "crossmae_vit_tiny_patch16",
        "img_size": 64,
        "embed_dim": 32,
        "depth": 2,
        "num_heads": 2,
        "decoder_embed_dim": 32,
        "decoder_depth": 2,
        "decoder_num_heads": 2,
    },
    "optim": {"batch_size": 4},
    "schedule": {"epochs": 1, "warmup_epochs": 0},
}
DETECT = {
    "_BASE_": "recipe.yaml",
    "INPUT": {
        "LSJ": {"ENABLED": False},
        "MIN_SIZE_TRAIN": [64],
        "MAX_SIZE_TRAIN": 64,
        "MIN_SIZE_TEST": 64,
        "MAX_SIZE_TEST": 64,
    },
    "MODEL": {
        "VIT": {
            "IMG_SIZE": 64,
            "PRETRAIN_IMG_SIZE": 64,
            "EMBED_DIM": 32,
            "DEPTH": 2,
            "NUM_HEADS": 2,
            "WINDOW_SIZE": 2,
            "GLOBAL_BLOCKS": [1],
            "OUT_CHANNELS": 16,
            "SQUARE_PAD": 64,
        },
        "ROI_BOX_HEAD": {"CONV_DIM": 16, "FC_DIM": 32},
        "ROI_MASK_HEAD": {"CONV_DIM": 16},
    },
    "SOLVER": {"MAX_ITER": 2, "IMS_PER_BATCH": 2, "ACCUMULATE": 2, "STEPS": [], "WARMUP_ITERS": 1},
    "DATALOADER": {"NUM_WORKERS": 0},
    "TEST": {"EVAL_PERIOD": 0},
}


def command(name: str, page: str = README) -> str:
    """The indented or fenced block after `<!-- test: name -->`."""
    match = re.search(rf"<!-- test: {name} -->\n((?:    [^\n]*\n)+|```python\n.*?```)", page, re.DOTALL)
    assert match, f"the page has no block for {name}"
    return match[1].removeprefix("```python\n").removesuffix("```")


FINETUNE = {
    "model": {"pool": "avg"},
    "data": {"workers": 0},
    "optim": {"batch_size": 4},
    "schedule": {"epochs": 1, "warmup_epochs": 0},
    "output_dir": "outputs",
}
PROBE = {
    "data": {"workers": 0},
    "methods": ["knn", "linear", "few_shot"],
    "knn": {"k": [1, 3], "temperature": [0.07]},
    "linear": {"epochs": 2, "warmup_epochs": 1, "seeds": [0]},
    "few_shot": {"shots": [1], "seeds": [0]},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("user")
    (folder / "IMAGES").mkdir()
    (folder / "PICTURES").symlink_to("IMAGES")
    (folder / "outputs/run").mkdir(parents=True)
    (folder / "outputs/run/detect-own").symlink_to("../detector")  # `crossmae run` calls it so
    images, annotations = [], []
    rng = np.random.default_rng(0)
    for number in range(1, 7):
        pixels = rng.integers(0, 256, (64, 64, 3), np.uint8)
        Image.fromarray(pixels).save(folder / "IMAGES" / f"{number}.png")
        images.append({"id": number, "file_name": f"{number}.png", "width": 64, "height": 64})
        x, y, side = (int(v) for v in rng.integers(4, 30, 3))
        corners = [x, y, x + side, y, x + side, y + side, x, y + side]
        box = {"bbox": [x, y, side, side], "area": side**2, "segmentation": [corners], "iscrowd": 0}
        annotations.append({"id": number, "image_id": number, "category_id": 1 + number % 2, **box})
    content = {"images": images, "annotations": annotations}
    content["categories"] = [{"id": 1, "name": "square"}, {"id": 2, "name": "box"}]
    (folder / "LABELS").mkdir()
    for image in images:
        (folder / "LABELS" / f"{image['id']}.txt").write_text(f"{image['id'] % 2} 0.5 0.5 0.25 0.25\n")
    (folder / "LABELS" / "classes.txt").write_text("square\nbox\n")
    for name in ("TRAIN.json", "VAL.json"):
        (folder / name).write_text(json.dumps(content))
    (folder / "pretrain").mkdir()
    (folder / "pretrain" / "small.yaml").write_text(yaml.safe_dump(PRETRAIN))
    for name in ("LABELLED", "HELD_OUT_LABELLED"):
        write_classes(folder / name, per_class=4, side=64, seed=len(name))
    (folder / "finetune").mkdir()
    (folder / "finetune" / "small.yaml").write_text(yaml.safe_dump(FINETUNE))
    (folder / "probe.yaml").write_text(yaml.safe_dump(PROBE))
    for source, name in (("coco_mask_rcnn", "coco_mask_rcnn"), ("own_mask_rcnn", "recipe")):
        (folder / f"{name}.yaml").write_text((ROOT / "configs" / f"{source}.yaml").read_text())
    (folder / "small_mask_rcnn.yaml").write_text(yaml.safe_dump(DETECT))
    return folder


def run(script: str, folder: Path) -> str:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        ["bash", "-ec", script], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout + done.stderr


def run_here(block: str, folder: Path) -> str:
    """Run the commands of a block in this process, and return what they print."""
    printed = io.StringIO()
    for line in block.replace("\\\n", " ").splitlines():
        program, *words = shlex.split(line, comments=True)
        assert program == "crossmae"
        with pytest.MonkeyPatch.context() as patch, redirect_stdout(printed), redirect_stderr(printed):
            patch.chdir(folder)
            patch.setattr(sys, "argv", list(sys.argv))  # which the command changes
            run_command(words)
    return printed.getvalue()


@pytest.fixture
def root_logger() -> Iterator[None]:
    """Take away the console handlers that the tools add to the root logger."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    root.handlers, root.level = handlers, level


def run_python(script: str, folder: Path) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-c", textwrap.dedent(script)]
    return subprocess.run(words, cwd=folder, capture_output=True, text=True, check=False)


@pytest.mark.usefixtures("root_logger")
def test_from_a_folder_of_images_to_an_ap(folder: Path) -> None:
    """The commands in the order of the README, each from what the one before it left."""
    assert "PSNR" in run(command("pretrain"), folder)
    assert (folder / "outputs/mine/model.safetensors").is_file()
    assert (folder / "outputs/reconstructions/overview-1.png").is_file()
    assert run_here(command("convert"), folder).count("\nproof ") == 2
    assert (folder / "encoder.pth").is_file()
    assert (folder / "outputs/mine-timm/config.json").is_file()
    run_here(command("classify"), folder)
    assert (folder / "outputs/classifier/report.html").is_file()
    assert len(json.loads((folder / "outputs/classes.json").read_text())["images"]) == 6
    assert (folder / "outputs/probe/report.html").is_file()
    assert "AP50" in run_here(command("detect"), folder)
    assert (folder / "outputs/split/val.json").is_file()
    results = json.loads((folder / "outputs/detector/results.json").read_text())
    assert {"bbox", "segm"} <= results.keys()
    assert json.loads((folder / "outputs/evaluation/results.json").read_text()) == results
    run_here(command("use"), folder)
    assert len(list((folder / "found").glob("*.png"))) == 6
    done = run_python(command("predictor") + command("backbone", DETECTION), folder)
    assert "tensor(" in done.stdout, done.stderr
    assert (folder / "found.png").is_file()
    assert "torch.Size([1, 256, 64, 48])" in done.stdout


def test_the_python_example_runs(folder: Path) -> None:
    done = run_python(command("python"), folder)
    assert "torch.Size([2, 4, 768])" in done.stdout, done.stderr


def test_every_link_in_the_docs_leads_somewhere() -> None:
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), ROOT / "CONTRIBUTING.md"]:
        for target in re.findall(r"\]\((?!http|#)([^)#]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_every_file_that_the_docs_name_exists() -> None:
    """Paths in backticks that look like files of this repository."""
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), ROOT / "CONTRIBUTING.md"]:
        text = page.read_text(encoding="utf-8")
        for name in re.findall(r"`((?:crossmae|det|tools|configs|tests|docs)/[\w./-]*\w)`", text):
            assert (ROOT / name).exists(), f"{page.name}: {name}"


def test_every_config_that_the_docs_name_exists() -> None:
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        text = page.read_text(encoding="utf-8")
        for name in re.findall(
            r"(?:--config-file |`)((?:pretrain/|finetune/)\w+\.yaml|\w+_mask_rcnn\w*\.yaml)\b", text
        ):
            assert (ROOT / "configs" / name).exists(), f"{page.name}: {name}"
