"""Proves that pictures and videos of ../shared/cases are read right, or named in one line."""

from __future__ import annotations

import json
import logging
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from crossmae.data.broken import warn_of_depth
from crossmae.data.pixels import centre_view, read_pixels
from crossmae.data.sources import open_source
from crossmae.pretraining.images import PretrainImages
from tests.cases.conftest import Tool, Written

needs_det = pytest.mark.skipif(find_spec("detectron2") is None, reason="detectron2: python tools/install_detectron2.py")
needs_av = pytest.mark.skipif(find_spec("av") is None, reason='PyAV is not installed: pip install -e ".[video]"')

# The folder, its number of images, and a pattern of what is logged.
IMAGES: dict[str, tuple[int, str]] = {
    "jfif": (7, "^$"),
    "formats": (7, r"1 \.npy are not read by this tool$"),
    "thin": (5, "^$"),  # 60,000 x 1 pixels
    "one_pixel": (5, "^$"),
    "lies": (8, "^$"),
    "anim": (4, "^$"),
}


@pytest.mark.parametrize("case", IMAGES)
def test_images_of_any_format_are_read(case: str, written: Written, caplog: pytest.LogCaptureFixture) -> None:
    count, logged = IMAGES[case]
    with caplog.at_level(logging.INFO):
        source = open_source(written("pretraining/images.py") / case, "data.train")
    assert re.search(logged, caplog.text.strip()), caplog.text
    assert len(source) == count
    caplog.clear()
    warn_of_depth(source, 8)
    frames = [record.message for record in caplog.records]
    assert all("3 frames, of which the first is read" in message for message in frames)
    assert bool(frames) == (case == "anim")
    training = PretrainImages(source, (32, 32), 16, (0.2, 1.0), 0.5, seed=0)
    for index in range(count):
        assert training[0, index][0].shape == (3, 32, 32)  # type: ignore[index]
        assert centre_view(read_pixels(source, index), (224, 224)).shape == (3, 224, 224)


# What is predicted, the size of every image or of the frames of a video, and the files that are written.
PREDICTED: dict[str, tuple[list[tuple[int, int]], str]] = {
    "changing/call.webm": ([(128, 96)] * 5 + [(64, 48)] * 5, "call.mp4"),
    "changing2/call.webm": ([(800, 600)] * 5 + [(640, 480)] * 5, "call.mp4"),
    "changing3/call.webm": ([(600, 800)] * 5 + [(800, 600)] * 5, "call.mp4"),
    "containers": ([(128, 96)] * 36, "a.mp4 b.mp4 c.mp4 d.mp4 e.mp4 f.mp4 g.mp4 h.png"),
    "anamorphic/dv.mkv": ([(171, 96)] * 5, "dv.mp4"),
    "jfif": ([(64, 64)] * 3, "0.png 1.png 2.png"),
    "[1] set (a)": ([(64, 64)], "x[2]*#.png"),
    "[1] set (a)/x[2]*#.png": ([(64, 64)], "x[2]*#.png"),
    "strip": ([(1, 1), (6000, 3)], "dot.png strip.png"),
    "blank": ([(64, 64)], "blank.png"),
    "long_text": ([(64, 64)], "render.png"),
}


@pytest.fixture(scope="session")
def detector(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.det.detectors import write_run

    return write_run(tmp_path_factory.mktemp("detector") / "run")


def predict(tool: Tool, detector: Path, output: Path, *inputs: Path) -> tuple[int, str, dict[str, Any]]:
    from tools.predict import main

    options = ("--score-threshold", "0.01", "--output", output, "MODEL.DEVICE=cpu")
    code, printed = tool(main, *inputs, "--weights", detector, *options)
    return code, printed, json.loads((output / "predictions.json").read_text("utf-8"))


@needs_det
@needs_av
@pytest.mark.parametrize("case", PREDICTED)
def test_what_is_predicted(case: str, written: Written, tool: Tool, detector: Path, tmp_path: Path) -> None:
    sizes, names = PREDICTED[case]
    path = written("detection/media.py") / case
    code, printed, content = predict(tool, detector, tmp_path / "out", path)
    assert code == 0, printed
    assert [(one["width"], one["height"]) for one in content["images"]] == sizes
    found = {str(file.relative_to(tmp_path / "out")) for file in (tmp_path / "out").rglob("*") if file.is_file()}
    assert found == {*names.split(" "), "predictions.json"}
    for annotation in content["annotations"]:
        (width, height), (x, y, w, h) = sizes[annotation["image_id"] - 1], annotation["bbox"]
        assert -0.01 <= x <= x + w <= width + 0.01
        assert -0.01 <= y <= y + h <= height + 0.01


@needs_det
def test_a_picture_over_the_limit_is_named(written: Written, tool: Tool, detector: Path, tmp_path: Path) -> None:
    path = written("detection/media.py") / "bomb"
    code, printed, content = predict(tool, detector, tmp_path / "out", path)
    assert (code, content["images"]) == (1, [])
    assert re.search(r"aerial\.png: .*200,?000,?000", printed), printed
