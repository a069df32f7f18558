"""Proves that names of files that are not UTF-8, or hold a line break, end no tool and tear no line of its output."""

from __future__ import annotations

import csv
import io
import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from crossmae.checkpoints.metadata import MODEL_ARGUMENTS, PIXEL_MEAN, PIXEL_STD
from crossmae.checkpoints.weights import save_weights
from crossmae.errors import SOME_FAILED_EXIT_CODE, USER_ERROR_EXIT_CODE
from crossmae.models.crossmae import CrossMAE
from tests.crossmae.classification.classifiers import write_classifier
from tests.crossmae.classification.labelled import CLASSES
from tests.tools.command_line import exit_code
from tools import make_shards, predict_classes, reconstruct

TOOLS = Path(__file__).parents[2] / "tools"
LATIN, LINES = os.fsdecode(b"caf\xe9.png"), "two\nlines.png"
SHOWN = ["caf\\udce9.png", "two\\nlines.png"]
BROKEN = os.fsdecode(b"broken\n\xff.png")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory: two images and a broken one with odd names."""
    monkeypatch.chdir(tmp_path)
    Path("photos").mkdir()
    for seed, name in enumerate((LATIN, LINES)):
        pixels = np.random.default_rng(seed).integers(0, 256, (48, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(Path("photos", name))
    Path("photos", BROKEN).write_bytes(b"no image")
    return tmp_path


def run_here(main: Callable[[list[str]], None], *words: str) -> tuple[int, str, list[str]]:
    """As `run`, in this process, which has the libraries already."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    streams = [io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors="strict") for _ in range(2)]
    with redirect_stdout(streams[0]), redirect_stderr(streams[1]):
        code = exit_code(main, *words)
    root.handlers, root.level = handlers, level
    told, errors = (bytes_of(stream) for stream in streams)
    return code, told, errors.replace("\r", "\n").splitlines()


def bytes_of(stream: io.TextIOWrapper) -> str:
    """Decode what was written to a stream."""
    stream.flush()
    assert isinstance(stream.buffer, io.BytesIO)
    return stream.buffer.getvalue().decode()


def run(tool: str, *words: str) -> tuple[int, str, list[str]]:
    """Exit code, output and lines of errors of a tool, in a terminal that takes UTF-8 alone."""
    terminal = os.environ | {"PYTHONIOENCODING": "utf-8:strict"}
    done = subprocess.run([sys.executable, TOOLS / tool, *words], env=terminal, capture_output=True, check=False)
    errors = done.stderr.decode()
    assert "Traceback" not in errors, errors
    return done.returncode, done.stdout.decode(), errors.replace("\r", "\n").splitlines()


def test_detection(folder: Path) -> None:
    pytest.importorskip("detectron2", reason="detectron2 is not installed: python tools/install_detectron2.py")
    from det.inference.video import write_video
    from tests.det.detectors import write_run
    from tests.det.inference.test_video import frames
    from tools import predict

    write_run(Path("run"))
    video = os.fsdecode(b"clip\n\xe9.mp4")
    Path("found").mkdir()
    write_video(Path("found/a.mp4"), frames(2, 10), 10)
    Path("found/a.mp4").rename(Path("photos", video))
    code, _, errors = run_here(predict.main, "--weights", "run", "photos", f"photos/{video}", "--output", "out")
    assert code == SOME_FAILED_EXIT_CODE
    assert errors[-1].startswith(f"{folder}/photos/broken\\n\\udcff.png: cannot be read as an image")
    assert errors[-2].startswith("error: of 4 files")
    images = json.loads(Path("out/predictions.json").read_text("utf-8"))["images"]
    assert [image["file_name"] for image in images] == [LATIN, LINES, video, video]
    assert {path.name for path in Path("out").iterdir()} == {LATIN, LINES, video, "predictions.json"}


def test_classification(folder: Path) -> None:
    write_classifier(Path("run"), CLASSES)
    words = ("--weights", "run", "photos", "--device", "cpu")
    code, told, errors = run("predict_classes.py", *words)
    assert code == SOME_FAILED_EXIT_CODE
    assert errors[-1].startswith("photos/broken\\n\\udcff.png: cannot be read as an image")
    assert [image["name"] for image in json.loads(told)["images"]] == [f"photos/{LATIN}", f"photos/{LINES}"]
    assert exit_code(predict_classes.main, *words, "--output", "found.csv") == SOME_FAILED_EXIT_CODE
    with open("found.csv", encoding="utf-8", newline="") as file:
        assert [row[0] for row in csv.reader(file)] == ["name", f"photos/{SHOWN[0]}", f"photos/{LINES}"]


def test_reconstruction(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    sizes = {"patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 2, "fuse_blocks": [0]}
    sizes |= {"decoder_embed_dim": 16, "decoder_depth": 1, "decoder_num_heads": 2, "img_size": [16, 24]}
    model = CrossMAE(**sizes | {"img_size": (16, 24), "fuse_blocks": (0,)})  # type: ignore[arg-type]
    metadata = {MODEL_ARGUMENTS: json.dumps(sizes), PIXEL_MEAN: "[0.5, 0.5, 0.5]", PIXEL_STD: "[0.25, 0.25, 0.25]"}
    Path("run").mkdir()
    save_weights("run/model.safetensors", model.state_dict(), metadata)
    assert exit_code(reconstruct.main, "run", "photos", "--mask-ratio", "0.5") == USER_ERROR_EXIT_CODE
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: photos/broken\\n\\udcff.png: cannot be read as an image")
    Path("photos", BROKEN).unlink()
    code, told, _ = run_here(reconstruct.main, "run", "photos", "--mask-ratio", "0.5")
    assert code == 0
    rows = {line.split()[0] for line in told.splitlines() if line.startswith("photos/")}
    assert rows == {f"photos/{name}" for name in SHOWN}
    images = json.loads(Path("reconstructions/psnr.json").read_text("utf-8"))["images"]
    assert [image["image"] for image in images] == [f"photos/{LATIN}", f"photos/{LINES}"]
    assert {path.name for path in Path("reconstructions/grids").iterdir()} == {LATIN, LINES}


def test_shards(folder: Path) -> None:
    assert exit_code(make_shards.main, "photos", "shards", "--skip-broken") == 0
    (line,) = Path("shards/broken.txt").read_text("utf-8").splitlines()
    assert line.startswith("photos/broken\\n\\udcff.png: cannot be read as an image")


def test_captions_and_logs_of_detection(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("detectron2", reason="detectron2 is not installed: python tools/install_detectron2.py")
    from det.training.console import LOG, log_file
    from tools.visualize_data import caption

    pixels = np.zeros((8, 8, 3), np.uint8)
    sample = {"file_name": f"photos/{LINES}", "instances": [], "width": 8, "height": 8, "image": torch.zeros(3, 8, 8)}
    assert caption(sample, pixels).splitlines()[0] == f"{SHOWN[1]}, objects: 0"
    monkeypatch.setattr(logging.getLogger(), "handlers", [])  # pytest's report cannot be sent with odd bytes in it
    with log_file(tmp_path, True) as start:
        start()
        logging.getLogger("det").warning("%s is odd", LATIN)
    assert f"{SHOWN[0]} is odd" in (tmp_path / LOG).read_text("utf-8")
