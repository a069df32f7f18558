"""A script that uses the public interface meets no warning of a library, whatever its filters are."""

from __future__ import annotations

import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("detectron2", reason="detectron2 is not installed: python tools/install_detectron2.py")

from det.data.masks import decode_segmentation
from det.library_warnings import KNOWN, library_warnings_ignored
from tests.det.coco_files import annotation
from tests.det.detectors import write_run

SCRIPT = """
import sys
import numpy as np
import det
predictor = det.Predictor.from_pretrained(sys.argv[1])
pixels = np.full((48, 64, 3), 90, np.uint8)
found = predictor(pixels)
assert len(predictor.names(found)) == len(found) > 0
predictor.draw(pixels, found)
predictor.save_pretrained(sys.argv[1] + "/saved")
assert len(det.Predictor.from_pretrained(sys.argv[1] + "/saved")(pixels)) == len(found)
"""


def test_a_script_with_warnings_as_errors_predicts(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    errors = [
        word for name in ("UserWarning", "FutureWarning", "DeprecationWarning") for word in ("-W", f"error::{name}")
    ]
    command = [sys.executable, *errors, "-c", SCRIPT, str(run)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stderr.splitlines() if "has no class names" not in line]
    assert lines == []


def test_masks_are_decoded_in_silence() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert decode_segmentation(annotation(1, 1, 1)["segmentation"], 64, 64).any()


def test_other_warnings_and_other_modules_stay() -> None:
    @library_warnings_ignored()
    def warn(text: str, category: type[Warning], module: str) -> None:
        warnings.warn_explicit(text, category, "file.py", 1, module)

    text, category, _ = KNOWN[1]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn(text, category, "torch.functional")
        assert not caught
        warn(text, category, "mine")
        warn("something else", category, "torch.functional")
        np.log(np.float64(-1.0))
    assert [str(one.message) for one in caught[:2]] == [text, "something else"]
    assert len(caught) == 3
