"""A tiny training run, for the tests of training."""

import importlib
import logging
import sys

import pytest

from tests.det.coco_files import TINY, write_coco


@pytest.fixture(autouse=True)
def quiet_root_logger():
    """The tool adds a console handler to the root logger; take it away again."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    root.handlers, root.level = handlers, level


@pytest.fixture
def no_pictures(monkeypatch):
    """Draw neither report nor pictures nor curves, which take seconds and have tests of their own."""
    for name in ("det.training.train", "det.training.evaluations"):
        monkeypatch.setattr(importlib.import_module(name), "write_report", lambda folder: folder / "report.html")
    monkeypatch.setattr(sys.modules["det.evaluation.evaluate"], "validation_pictures", lambda *_: [])
    monkeypatch.setattr(sys.modules["det.evaluation.evaluate"], "save_figure", lambda *_: None)


@pytest.fixture
def command(tmp_path):
    """The words of a command line for a tiny run in tmp_path / "out"."""
    (tmp_path / "tiny.yaml").write_text(TINY)
    path, images, _ = write_coco(tmp_path / "data")
    words = ["--config-file", str(tmp_path / "tiny.yaml"), "--train-json", str(path), "--train-images", str(images)]
    return [*words, "--val-json", str(path), "--val-images", str(images), f"OUTPUT_DIR={tmp_path / 'out'}"]
