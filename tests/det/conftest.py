"""The config of a tiny detector, for the tests of `det`."""

import pytest


@pytest.fixture
def cfg(tmp_path):
    from det.config import load_det_config  # here, because some tests run without detectron2
    from tests.det.coco_files import TINY

    (tmp_path / "tiny.yaml").write_text(TINY)
    config = load_det_config(str(tmp_path / "tiny.yaml"))
    config.OUTPUT_DIR = str(tmp_path / "output")  # never the working folder
    return config
