"""Freezes the public names, and proves that importing the package is light and does not need detectron2."""

from __future__ import annotations

import subprocess
import sys

import pytest

import crossmae

PUBLIC = {
    "CrossMAE",
    "CrossMAEOutput",
    "PretrainConfig",
    "UserError",
    "ViTEncoder",
    "__version__",
    "checkpoints",
    "create_model",
    "list_models",
    "load_config",
    "pretrain",
    "read_weights",
}


def test_public_names() -> None:
    assert set(crossmae.__all__) == PUBLIC
    for name in PUBLIC:
        assert getattr(crossmae, name) is not None
    with pytest.raises(AttributeError, match="nothing"):
        _ = crossmae.nothing


def test_the_core_needs_only_torch_and_timm() -> None:
    """With every other library blocked, the package imports, and the model builds and runs."""
    code = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        blocked = {"detectron2", "det", "pydantic", "tensorboard", "matplotlib", "psutil", "jinja2", "cv2"}
        if name.split(".")[0] in blocked:
            raise ImportError(f"blocked: {name}")
sys.meta_path.insert(0, Block())
import crossmae
assert "torch" not in sys.modules
import torch
model = crossmae.create_model("crossmae_vit_tiny_patch16", img_size=32)
print(model(torch.zeros(1, 3, 32, 32)).loss.item() >= 0)
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "True", done.stderr
