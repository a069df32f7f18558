"""Freezes the public names, and proves that importing the package is light and does not need detectron2."""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import suppress
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import crossmae
from crossmae.doctor import MODULES, library_name, read_lists

PUBLIC = {
    "Classifier",
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


CORE_CODE = """
import json, sys
from importlib.machinery import PathFinder
blocked = set(json.loads(sys.argv[1]))
finders = list(sys.meta_path)
class WithoutBlocked:
    find_distributions = staticmethod(PathFinder.find_distributions)
    def find_spec(self, name, path=None, target=None):
        found = (finder.find_spec(name, path, target) for finder in finders)
        return None if name.split(".")[0] in blocked else next(filter(None, found), None)
sys.meta_path[:] = [WithoutBlocked()]
import crossmae
from crossmae.checkpoints import convert, inspect, load
from crossmae.checkpoints.metadata import MODEL_ARGUMENTS
from crossmae.checkpoints.pretrained import load_pretrained
from crossmae.checkpoints.weights import save_weights
sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
sizes |= {"decoder_embed_dim": 16, "decoder_depth": 1, "decoder_num_heads": 1}
save_weights("model.safetensors", crossmae.CrossMAE(**sizes).state_dict(), {MODEL_ARGUMENTS: json.dumps(sizes)})
model = load_pretrained("model.safetensors").model
print(len(load(model, "model.safetensors").entries) == len(model.state_dict()))
for target, name in (("detectron2", "backbone.pth"), ("timm", "timm"), ("hf-vit", "hf"), ("mae", "encoder.pth")):
    convert("model.safetensors", name, target, encoder_only=True)
    print(bool(inspect(name).lines()))
print(sorted(blocked & {name.split(".")[0] for name in sys.modules}))
"""


def libraries_beyond_the_core() -> set[str]:
    """Modules that an extra installs, except those that the core brings along."""
    lists = read_lists()
    core, queue = set(), [library_name(one) for one in lists["core"]]
    while queue:
        name = canonicalize_name(queue.pop())
        if name not in core:
            core.add(name)
            with suppress(metadata.PackageNotFoundError):
                wanted = map(Requirement, metadata.requires(name) or ())
                queue += [one.name for one in wanted if one.marker is None or one.marker.evaluate({"extra": ""})]
    extras = {library_name(one) for name in lists.keys() - {"core", "dev"} for one in lists[name]} | {"detectron2"}
    return {MODULES.get(name, name).partition(".")[0] for name in extras if canonicalize_name(name) not in core}


def test_models_weight_files_and_conversion_need_the_core_only(tmp_path: Path) -> None:
    blocked = libraries_beyond_the_core()
    assert {"tensorboard", "matplotlib", "scipy", "sklearn", "cv2", "pycocotools", "transformers"} <= blocked
    words = [sys.executable, "-c", CORE_CODE, json.dumps(sorted(blocked))]
    done = subprocess.run(words, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.stdout.split() == ["True"] * 5 + ["[]"], done.stderr
