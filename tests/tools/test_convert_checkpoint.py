"""Proves what the command line of the converter prints, refuses and leaves alone."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from crossmae.checkpoints.weights import VERSION, read_weights, save_weights
from crossmae.errors import USER_ERROR_EXIT_CODE, run_cli
from crossmae.model import CrossMAE
from tools.convert_checkpoint import build_parser, main

TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 3}
TINY |= {"decoder_embed_dim": 16, "decoder_depth": 2, "decoder_num_heads": 2}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    torch.save({"model": CrossMAE(**TINY).state_dict()}, tmp_path / "a.pth")
    return tmp_path / "a.pth"


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> int:
    """Exit code of the command."""
    monkeypatch.setattr(sys, "argv", ["convert_checkpoint.py", *map(str, arguments)])
    try:
        run_cli(main)
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def test_output(source: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    destination = source.parent / "b.pth"
    assert run(monkeypatch, source, destination, "--to", "detectron2") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"source       {source} (")
    assert lines[2].startswith("format       crossmae: 79 tensors, ")
    assert lines[3] == "encoder      embed_dim 24, depth 3, patch_size 8, in_chans 3, mlp_ratio 4.0, img_size 32"
    assert lines[4] == "pixels       mean unknown, std unknown"
    assert "  dropped  cls_token                 1  no place in detectron2's ViT" in lines
    assert "  used     blocks.0-2               36  as backbone.net.*" in lines
    assert "  39 used, 40 dropped" in lines
    assert lines[-2].startswith(f"destination  {destination} (")
    assert lines[-1].startswith("licence ")
    assert read_weights(destination).format == "detectron2"


def test_own_weights_get_no_licence_notice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run").mkdir()
    save_weights(tmp_path / "run/model.safetensors", CrossMAE(**TINY).state_dict(), {VERSION: "0.1.0"})
    assert run(monkeypatch, tmp_path / "run", tmp_path / "b.safetensors", "--to", "crossmae") == 0
    out = capsys.readouterr().out
    assert "licence" not in out
    assert "  79 used\n" in out


@pytest.mark.parametrize(
    ("names", "told"),
    [
        (("gone.pth", "b.pth", "--to", "detectron2"), "no such file or folder"),
        (("a.pth", "b.pth", "--to", "onnx"), "--to onnx: unknown format; known: detectron2, crossmae"),
        (("a.pth", "b.txt", "--to", "detectron2"), "the suffix says the kind of file to write"),
        (("a.pth", "old.pth", "--to", "detectron2"), "exists already"),
        (("a.pth", "a.pth", "--to", "detectron2", "--force"), "source and destination are the same file"),
        (("resnet.pth", "b.pth", "--to", "detectron2"), "no ViT encoder in it"),
    ],
)
def test_errors_are_one_line_and_write_nothing(
    source: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    names: tuple[str, ...],
    told: str,
) -> None:
    monkeypatch.chdir(source.parent)
    torch.save({"conv1.weight": torch.zeros(2)}, "resnet.pth")
    Path("old.pth").write_bytes(b"old")
    before = {path: path.read_bytes() for path in Path().iterdir()}
    assert run(monkeypatch, *names) == USER_ERROR_EXIT_CODE
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert told in error
    assert error.count("\n") == 1
    assert {path: path.read_bytes() for path in Path().iterdir()} == before


def test_force_overwrites_and_leaves_the_source(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = source.read_bytes()
    destination = source.parent / "b.pth"
    destination.write_bytes(b"old")
    assert run(monkeypatch, source, destination, "--to", "detectron2", "--force") == 0
    assert read_weights(destination).format == "detectron2"
    assert source.read_bytes() == before


def test_options_are_frozen() -> None:
    options = {option for action in build_parser()._actions for option in action.option_strings}
    assert options == {"-h", "--help", "--to", "--force"}
