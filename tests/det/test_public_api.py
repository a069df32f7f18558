"""The public names of `det`, and what importing it says where detectron2 is missing."""

import subprocess
import sys

import pytest


def test_without_detectron2_the_error_names_the_command():
    code = "import sys; sys.modules['detectron2'] = None\ntry:\n import det\nexcept ImportError as e: print(e)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "det needs detectron2; install it with: python tools/install_detectron2.py"


def test_public_names():
    pytest.importorskip("detectron2", reason="detectron2 is not installed: python tools/install_detectron2.py")
    import det

    assert det.__all__ == [
        "Predictor",
        "ViT",
        "add_crossmae_config",
        "build_backbone",
        "build_crossmae_vitdet_backbone",
        "evaluate",
        "load_det_config",
        "load_weights",
        "register_coco",
        "set_image_size",
        "train",
    ]
    assert all(hasattr(det, name) for name in det.__all__)


def test_importing_registers_the_backbone():
    pytest.importorskip("detectron2", reason="detectron2 is not installed: python tools/install_detectron2.py")
    from detectron2.modeling import BACKBONE_REGISTRY

    import det

    assert BACKBONE_REGISTRY.get("build_crossmae_vitdet_backbone") is det.build_crossmae_vitdet_backbone
