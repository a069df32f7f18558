"""Proves that a wheel works outside of a clone: configs, pages, tools and the command `crossmae` are in it.

The wheel is built from the source archive, as `python -m build` does, without a network. It is installed into an
environment that has the libraries of this one, but not this clone.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
from packaging.requirements import Requirement
from packaging.version import Version
from PIL import Image

import crossmae
from crossmae.doctor import read_lists
from crossmae.errors import COMMANDS
from tests.tools.labelled_squares import run_words, write_squares

ROOT = Path(__file__).parents[1]
LICENCES = ("LICENSE", "NOTICE", "THIRD_PARTY.md")
SOURCES = ("crossmae", "det", "tools", "configs", "pyproject.toml", "setup.py", "README.md", *LICENCES)
LIBRARIES = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
ENVIRONMENT = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
BUILD = "import sys; from setuptools import build_meta; print(getattr(build_meta, sys.argv[1])(sys.argv[2]))"
PRETRAIN = """pretrain --config-file pretrain/small.yaml data.train=IMAGES data.workers=0 output_dir=run
    model.name=crossmae_vit_tiny_patch16 model.img_size=64 model.depth=2 model.decoder_depth=1 optim.batch_size=4
    schedule.max_steps=2"""
IMPORTS = """
import importlib, json
names = ["crossmae", "det", "crossmae.training.config", "crossmae_toolkit.tools.pretrain", "crossmae.doctor"]
modules = [importlib.import_module(name) for name in names]
print(json.dumps([[module.__file__ for module in modules], str(modules[2].CONFIG_ROOT), modules[4].read_lists()]))
"""


def old_setuptools() -> bool:
    """Whether the installed setuptools cannot build the wheel."""
    try:
        return Version(metadata.version("setuptools")) < Version("77")
    except metadata.PackageNotFoundError:
        return True


pytestmark = pytest.mark.skipif(old_setuptools(), reason='setuptools is too old: pip install "setuptools>=77"')


def call(words: Sequence[str | Path], folder: Path, environment: dict[str, str] = ENVIRONMENT) -> str:
    """Run a command, and return what it prints."""
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{words}: {done.stdout[-2000:]} {done.stderr[-3000:]}"
    return done.stdout


def build(source: Path, kind: str, folder: Path) -> Path:
    """Build an archive or a wheel of the project in `source`."""
    words = [sys.executable, "-c", BUILD, f"build_{kind}", folder]
    return folder / call(words, source, dict(os.environ)).split()[-1]


def install(wheel: Path, folder: Path) -> Path:
    """Install a wheel into a new environment, and return the folder of its programs."""
    call([sys.executable, "-m", "venv", "--without-pip", folder], folder.parent)
    pip = [sys.executable, "-m", "pip", "--python", folder / "bin" / "python", "--disable-pip-version-check"]
    call([*pip, "install", "--no-deps", "--no-index", "--no-compile", wheel], folder.parent)
    # Written after the installation. A path in a .pth file is searched, but .pth files there are not read, which
    # would find the clone.
    (packages,) = folder.glob("lib/python*/site-packages")
    (packages / "libraries.pth").write_text("\n".join(LIBRARIES))
    return folder / "bin"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a clone has, without caches and earlier builds."""
    folder = tmp_path_factory.mktemp("source")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, folder)
    return folder


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    safe = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}  # Python 3.11.2 and 3.10 have no filter
    with tarfile.open(build(source, "sdist", folder)) as archive:
        archive.extractall(folder, **safe)
    return build(folder / f"crossmae-{crossmae.__version__}", "wheel", folder)


@pytest.fixture(scope="module")
def programs(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return install(wheel, tmp_path_factory.mktemp("environment") / "env")


def test_the_wheel_has_the_packages_tools_and_configs_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as file:
        names = set(file.namelist())
    information = f"crossmae-{crossmae.__version__}.dist-info/"
    files = {path.relative_to(ROOT) for name in SOURCES[:4] for path in (ROOT / name).rglob("*") if path.is_file()}
    kept = {str(path) for path in files if "__pycache__" not in path.parts}
    wanted = {name if name.startswith(("crossmae/", "det/")) else f"crossmae_toolkit/{name}" for name in kept}
    assert {name for name in names if not name.startswith(information)} == wanted
    assert {"crossmae/py.typed", "det/py.typed", "crossmae/reports/templates/report.html.j2"} <= wanted
    assert {f"{information}licenses/{name}" for name in LICENCES} <= names


def test_the_wheel_requires_what_pyproject_lists(programs: Path, tmp_path: Path) -> None:
    words = [programs / "python", "-c", IMPORTS]
    files, configs, lists = json.loads(call(words, tmp_path))
    assert all(path.startswith(str(programs.parent)) for path in [*files, configs])
    assert Path(configs).parts[-2:] == ("crossmae_toolkit", "configs")
    listed = {name: set(map(comparable, texts)) for name, texts in read_lists().items() if texts}
    assert {name: set(map(comparable, texts)) for name, texts in lists.items() if texts} == listed


def comparable(text: str) -> tuple[str, str, str, str]:
    """Return the parts of a requirement, in an order that does not depend on how it is written."""
    one = Requirement(text)
    return one.name.lower(), str(sorted(one.extras)), str(one.specifier), str(one.marker)


def test_from_images_to_converted_weights_in_an_empty_folder(programs: Path, tmp_path: Path) -> None:
    program = programs / "crossmae"
    overview = call([program, "--help"], tmp_path)
    assert all(f"\n  {name} " in overview for name in COMMANDS)
    (tmp_path / "IMAGES").mkdir()
    rng = np.random.default_rng(0)
    for number in range(8):
        Image.fromarray(rng.integers(0, 256, (64, 64, 3), np.uint8)).save(tmp_path / "IMAGES" / f"{number}.png")
    call([program, *PRETRAIN.split()], tmp_path)
    assert (tmp_path / "run" / "model.safetensors").is_file()
    assert "CrossMAE" in call([program, "inspect", "run"], tmp_path)
    told = call([program, "convert", "run", "backbone.pth", "--to", "detectron2"], tmp_path)
    assert "\nproof " in told
    assert (tmp_path / "backbone.pth").is_file()


@pytest.mark.slow
def test_from_labels_to_an_ap_in_an_empty_folder(programs: Path, tmp_path: Path) -> None:
    pytest.importorskip("detectron2", reason="detectron2 is not installed: python tools/install_detectron2.py")
    write_squares(tmp_path)
    told = call([programs / "crossmae", "run", *run_words("yolo")], tmp_path)
    assert "$ crossmae pretrain --config-file pretrain/laptop.yaml" in told
    assert "$ crossmae detect --config-file laptop_mask_rcnn.yaml" in told
    assert json.loads((tmp_path / "out/detect-own/results.json").read_text())["bbox"]["AP50"] is not None
    page = (tmp_path / "out/report.html").read_text()
    assert "crossmae predict" in page
    assert "tools/" not in page


def test_a_wrong_name_of_a_config_lists_those_of_the_wheel(programs: Path, tmp_path: Path) -> None:
    words = [programs / "crossmae", "detect", "--config-file", "absent.yaml"]
    done = subprocess.run(words, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: --config-file absent.yaml: no such file")
    assert "pretrain/demo.yaml" in done.stderr


def test_an_editable_installation_has_the_command(source: Path, tmp_path: Path) -> None:
    program = install(build(source, "editable", tmp_path), tmp_path / "env") / "crossmae"
    assert call([program, "pretrain", "--help"], tmp_path).startswith("usage: crossmae pretrain ")
