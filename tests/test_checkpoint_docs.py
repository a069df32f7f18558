"""Proves that every command and every Python line of docs/checkpoints.md works as written, on small files."""

from __future__ import annotations

import json
import re
import shlex
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch

from crossmae.checkpoints.metadata import MODEL_ARGUMENTS
from crossmae.checkpoints.weights import save_weights
from crossmae.models.crossmae import CrossMAE
from crossmae.models.encoder import ViTEncoder
from tools import convert_checkpoint, inspect_checkpoint

DOCS = (Path(__file__).parents[1] / "docs/checkpoints.md").read_text(encoding="utf-8")
SMALL: dict[str, Any] = {"embed_dim": 24, "depth": 2, "num_heads": 3}
DECODER: dict[str, Any] = {"decoder_embed_dim": 16, "decoder_depth": 1, "decoder_num_heads": 2}
COMMANDS = [found.split("  #")[0].strip() for found in re.findall(r"crossmae ((?:convert|inspect) [^`\n]+)", DOCS)]
TOOLS = {"convert": convert_checkpoint, "inspect": inspect_checkpoint}


def own(path: str, decoder: str = "self", **size: Any) -> None:
    arguments = SMALL | DECODER | {"decoder": decoder, "img_size": 32, "patch_size": 8} | size
    save_weights(path, CrossMAE(**arguments).state_dict(), {MODEL_ARGUMENTS: json.dumps(arguments)})


def detector(path: str) -> None:
    encoder = dict(ViTEncoder(**SMALL, img_size=32, patch_size=8).state_dict())
    del encoder["cls_token"]
    tables = {f"blocks.{i}.attn.rel_pos_{side}": torch.randn(3 + 4 * i, 8) for i in range(2) for side in "hw"}
    tensors = {f"backbone.net.{name}": tensor for name, tensor in (encoder | tables).items()}
    record = {MODEL_ARGUMENTS: json.dumps(SMALL)}
    torch.save({"model": tensors, "crossmae_metadata": record}, path)


def mmpretrain(path: str) -> None:
    renamed = {"mlp.fc1": "ffn.layers.0.0", "mlp.fc2": "ffn.layers.1", "norm": "ln", "blocks": "layers"}
    renamed |= {"patch_embed.proj": "patch_embed.projection"}
    pattern = re.compile("|".join(renamed))
    plain = ViTEncoder(img_size=32, patch_size=8, embed_dim=384, depth=1, num_heads=6).state_dict()
    named = {f"backbone.{pattern.sub(lambda found: renamed[found[0]], name)}": plain[name] for name in plain}
    torch.save({"meta": {}, "state_dict": named}, path)


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Everything that the page names."""
    monkeypatch.chdir(tmp_path)
    for folder in ("run", "run448"):
        Path(folder).mkdir()
    own("SRC")
    own("weights.pth", "cross")
    own("rgb.pth", "cross")
    own("run/model.safetensors", "cross")
    own("run448/model.safetensors", "cross", img_size=64)
    own("vith14.pth", "cross", patch_size=14, img_size=28)
    detector("detector.pth")
    mmpretrain("mmpretrain.pth")
    return tmp_path


def test_all_of_them_are_found() -> None:
    assert len(COMMANDS) == 15
    targets = {words[words.index("--to") + 1] for words in map(shlex.split, COMMANDS) if "--to" in words}
    assert targets == {"crossmae", "mae", "timm", "hf-vit", "hf-vitmae", "detectron2"}


@pytest.mark.parametrize("command", COMMANDS)
def test_commands(files: Path, command: str, capsys: pytest.CaptureFixture[str]) -> None:
    if "--to hf" in command:
        pytest.importorskip("transformers")
    tool, *words = shlex.split(command)
    smaller = {"224": "32", "448": "64"} if "--img-size" in words else {}
    TOOLS[tool].main([smaller.get(word, word) for word in words])
    if "convert" in tool:
        assert Path(words[1]).exists()
        assert "NOT EQUAL" not in (out := capsys.readouterr().out)
        assert re.search(r"^proof +(max difference|outputs bit-equal)", out, re.MULTILINE)


def test_python(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    blocks = re.findall(r"```python\n(.*?)```", DOCS, re.DOTALL)
    assert len(blocks) == 2
    exec(textwrap.dedent(blocks[1]).replace("img_size=384", "img_size=64"), {})
    assert (files / "vit-hf/config.json").is_file()


def test_other_libraries_open_what_was_written(files: Path) -> None:
    timm, transformers = pytest.importorskip("timm"), pytest.importorskip("transformers")
    lines = re.findall(r"```python\n(.*?)```", DOCS, re.DOTALL)[0].splitlines()
    names: dict[str, Any] = {"timm": timm, "transformers": transformers}
    for source, words in (
        ("SRC", "vit-timm --to timm"),
        ("SRC", "vit-hf --to hf-vit"),
        ("SRC", "mae-hf --to hf-vitmae"),
    ):
        convert_checkpoint.main([source, *words.split()])
    opened = [eval(line.split("#")[0], names) for line in lines if "local-dir" in line or "from_pretrained" in line]
    assert [type(model).__name__ for model in opened] == ["VisionTransformer", "ViTModel", "ViTMAEForPreTraining"]
