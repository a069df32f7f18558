"""Proves what the command lines of the converter and of the inspector print, refuse and leave alone."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from crossmae.checkpoints.metadata import MODEL_ARGUMENTS, VERSION
from crossmae.checkpoints.weights import read_weights, save_weights
from crossmae.errors import USER_ERROR_EXIT_CODE, run_cli
from crossmae.models.crossmae import CrossMAE
from tools import convert_checkpoint, inspect_checkpoint

TINY: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 3}
TINY |= {"decoder_embed_dim": 16, "decoder_depth": 2, "decoder_num_heads": 2}
HEADS = ("--set", "num_heads=3", "decoder_num_heads=2")


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    torch.save({"model": CrossMAE(**TINY).state_dict(), "epoch": 3}, tmp_path / "a.pth")
    return tmp_path / "a.pth"


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path, tool: Any = convert_checkpoint) -> int:
    """Exit code of the command."""
    monkeypatch.setattr(sys, "argv", ["tool.py", *map(str, arguments)])
    try:
        run_cli(tool.main)
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def test_output(source: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, source, "b.pth", "--to", "detectron2", "--set", "num_heads=3") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"source       {source} (")
    assert lines[1].startswith("sha256       ")
    assert lines[2] == "content      a CrossMAE pretraining model, encoder and decoder"
    assert lines[3] == "also in it   epoch"
    assert "  dropped  cls_token                 1  a dense backbone has no class token" in lines
    assert "  used     blocks.0-2               36" in lines
    (counts,) = [line for line in lines if line.startswith("  39 used, 40 dropped (")]
    assert "1 a dense backbone has no class token" in counts
    said = {line.split()[0]: line for line in lines if line and not line.startswith(" ")}
    assert "(file)" in said["proof"]
    assert said["destination"].startswith("destination  b.pth (")
    assert said["report"] == "report       b.pth.conversion.json"
    assert said["licence"]
    assert read_weights("b.pth").format == "detectron2"


def test_own_weights_get_no_licence_notice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run").mkdir()
    metadata = {VERSION: "0.1.0", MODEL_ARGUMENTS: json.dumps(TINY)}
    save_weights(tmp_path / "run/model.safetensors", CrossMAE(**TINY).state_dict(), metadata)
    assert run(monkeypatch, tmp_path / "run", tmp_path / "b.safetensors", "--to", "crossmae") == 0
    out = capsys.readouterr().out
    assert "licence" not in out
    assert "  79 used\n" in out


def test_every_option_reaches_the_conversion(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ema = {key: 2 * value for key, value in CrossMAE(**TINY).state_dict().items()}
    torch.save({"model": torch.load(source)["model"], "model_ema": ema}, "both.pth")
    words = "--img-size 32 64 --patch-size 16 --in-chans 1 --channels mean --encoder-only --ema --report r.json"
    assert (
        run(monkeypatch, "both.pth", "c.safetensors", "--to", "crossmae", *words.split(), "--set", "num_heads=3") == 0
    )
    kept = read_weights("c.safetensors")
    assert kept.tensors["patch_embed.proj.weight"].shape == (24, 1, 16, 16)
    assert kept.tensors["pos_embed"].shape == (1, 9, 24)
    assert torch.equal(kept.tensors["blocks.0.attn.qkv.weight"], ema["blocks.0.attn.qkv.weight"])
    assert kept.format == "encoder"
    assert json.loads(Path("r.json").read_text())["proof"]["equal"]


@pytest.mark.parametrize(
    ("names", "told"),
    [
        (("gone.pth", "b.pth", "--to", "detectron2"), "SRC: gone.pth: no such file or folder"),
        (("a.pth", "b.pth", "--to", "detectron2"), "num_heads=16"),
        (("a.pth", "b.pth", "--to", "crossmae", "--img-size", "1", "2", "3", *HEADS), "one number or (height, width)"),
        (("a.pth", "b.pth", "--to", "crossmae", "--img-size", "33", *HEADS), "33 is not a multiple of patch_size 8"),
        (("a.pth", "b.pth", "--to", "crossmae", "--set", "num_heads"), "not KEY=VALUE"),
        (("a.pth", "b.pth", "--to", "crossmae", "--ema", *HEADS), "has no EMA weights"),
    ],
)
def test_errors_are_one_line_and_write_nothing(
    source: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    names: tuple[str, ...],
    told: str,
) -> None:
    before = {path: path.read_bytes() for path in Path().iterdir()}
    assert run(monkeypatch, *names) == USER_ERROR_EXIT_CODE
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert told in error
    assert error.count("\n") == 1
    assert {path: path.read_bytes() for path in Path().iterdir()} == before


def test_force_overwrites_and_leaves_the_source(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = source.read_bytes()
    Path("b.pth").write_bytes(b"old")
    assert run(monkeypatch, source, "b.pth", "--to", "detectron2", "--force", "--set", "num_heads=3") == 0
    assert read_weights("b.pth").format == "detectron2"
    assert source.read_bytes() == before


def test_options_are_frozen() -> None:
    options = {option for action in convert_checkpoint.build_parser()._actions for option in action.option_strings}
    assert options == {
        "-h", "--help", "--to", "--img-size", "--patch-size", "--in-chans", "--channels", "--window", "--encoder-only",
        "--ema", "--drop", "--set", "--tolerance", "--report", "--force", "--trust",
    }  # fmt: skip
    options = {option for action in inspect_checkpoint.build_parser()._actions for option in action.option_strings}
    assert options == {"-h", "--help", "--no-values", "--json", "--force"}


def test_inspection(source: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, source, "--json", "a.json", tool=inspect_checkpoint) == 0
    out = capsys.readouterr().out
    lines = {line.split("  ")[0].strip(): line for line in out.splitlines()}
    assert "a CrossMAE pretraining model" in lines["content"]
    assert "embed_dim 24, depth 3, patch_size 8" in lines["encoder"]
    assert "every value" in lines["finite"]
    assert lines["timm"].split()[1] == "yes"
    assert json.loads(Path("a.json").read_text())["becomes"]["hf-vit"]["possible"]
    assert run(monkeypatch, source, "--json", "a.json", tool=inspect_checkpoint) == USER_ERROR_EXIT_CODE
