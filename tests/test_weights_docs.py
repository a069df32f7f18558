"""Proves that the commands and programs of docs/weights.md work as written, on small files of the same layouts."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

pytest.importorskip("detectron2", reason="detectron2 is not installed: python tools/install_detectron2.py")

from crossmae.checkpoints.metadata import MODEL_ARGUMENTS, PICKLED_METADATA
from crossmae.classification.vit import Architecture, build_vit
from crossmae.errors import COMMANDS as SCRIPTS
from crossmae.models.crossmae import CrossMAE
from tests.test_readme import DETECT, FINETUNE, PRETRAIN, PROBE
from tests.test_readme import folder as readme_folder

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/weights.md").read_text("utf-8")
ARGUMENTS: dict[str, Any] = {"img_size": 64, "patch_size": 16, "embed_dim": 32, "depth": 2, "num_heads": 2}
ARGUMENTS |= {"decoder_embed_dim": 32, "decoder_depth": 2, "decoder_num_heads": 2}
BLOCK = re.search(r"<!-- test: uses -->\n((?:    [^\n]*\n)+)", PAGE)
assert BLOCK is not None
COMMANDS = [line.split("  #")[0].strip() for line in BLOCK[1].replace("\\\n", " ").splitlines()]
RUNS = {"pretrain": PRETRAIN, "finetune": FINETUNE, "probe": PROBE}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data of the README's tests, small configs of the page's names, and files in the published layouts."""
    made = readme_folder.__wrapped__ if hasattr(readme_folder, "__wrapped__") else readme_folder._get_wrapped_function()
    folder: Path = made(tmp_path_factory)
    for name, content in (("pretrain/continue", PRETRAIN), ("finetune/vitb", FINETUNE), ("own_mask_rcnn", DETECT)):
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(content))
    record = {PICKLED_METADATA: {MODEL_ARGUMENTS: json.dumps(ARGUMENTS)}}
    torch.save({"model": CrossMAE(**ARGUMENTS).state_dict(), "epoch": 3, **record}, folder / "WEIGHTS")
    vit = build_vit(Architecture((64, 64), 16, 3, 32, 2, 2, 4.0), 3, "avg")
    record[PICKLED_METADATA][MODEL_ARGUMENTS] = json.dumps({"num_heads": 2, "img_size": 64})
    torch.save({"model": vit.state_dict(), **record}, folder / "FINETUNED")
    return folder


def test_every_use_has_a_command() -> None:
    names = ("inspect", "pretrain", "finetune", "probe", "detect", "convert", "reconstruct", "predict-classes")
    assert [command.split()[:2] for command in COMMANDS] == [["crossmae", name] for name in names]


def run(command: str) -> Callable[[], None]:
    name, *words = shlex.split(command)[1:]
    return lambda: import_module(SCRIPTS[name].removesuffix(".py").replace("/", ".")).main(words)


def test_the_commands_and_the_folders_to_share(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In order: each tool takes the file as it is, and the runs that it leaves are saved and loaded."""
    monkeypatch.chdir(place)
    for command in COMMANDS:
        run(command)()
    for name in ("more/model.safetensors", "classifier/model.safetensors", "detector/model_final.safetensors"):
        assert (place / "outputs" / name).is_file(), name
    (place / "outputs/more").rename(place / "outputs/mine")
    (code,) = re.findall(r"<!-- test: sharing -->\n```python\n(.*?)```", PAGE, re.DOTALL)
    with pytest.raises(Exception, match=r"inherit cc-by-nc-4\.0, not apache-2\.0"):
        exec(code, {})
    exec(code.replace(', licence="apache-2.0"', ""), {})
    for name in ("mine-vit", "mine-classes", "mine-detector"):
        card = (place / name / "README.md").read_text()
        assert "license: cc-by-nc-4.0" in card, name
        assert "The training started from `WEIGHTS`." in card
    assert "base_model: owner/mine-vit" in (place / "mine-classes/README.md").read_text()
