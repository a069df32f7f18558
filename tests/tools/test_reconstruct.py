"""Proves what the command line of the reconstruction tool prints, refuses and leaves alone."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from crossmae.checkpoints.metadata import MODEL_ARGUMENTS, PIXEL_MEAN, PIXEL_STD
from crossmae.checkpoints.pretrained import parse_settings
from crossmae.checkpoints.weights import save_weights
from crossmae.errors import USER_ERROR_EXIT_CODE, UserError
from crossmae.models.crossmae import CrossMAE
from crossmae.pretraining.gallery import Result
from tests.tools.command_line import exit_code
from tools.reconstruct import main, table

SHARED = Path(__file__).parents[3] / "shared/golden"
TINY = {"img_size": [16, 24], "patch_size": 8, "in_chans": 1, "embed_dim": 24, "depth": 2, "num_heads": 2}
TINY |= {"decoder_embed_dim": 16, "decoder_depth": 2, "decoder_num_heads": 2, "fuse_blocks": [1]}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory: a run with a model of grey images, and two photographs."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = CrossMAE(**TINY | {"img_size": (16, 24), "fuse_blocks": (1,)})  # type: ignore[arg-type]
    metadata = {MODEL_ARGUMENTS: json.dumps(TINY), PIXEL_MEAN: "[0.5]", PIXEL_STD: "[0.25]"}
    Path("run").mkdir()
    save_weights("run/model.safetensors", model.state_dict(), metadata)
    for seed, name in enumerate(("one.png", "two.png")):
        Image.fromarray(np.random.default_rng(seed).integers(0, 256, (20, 30, 3), dtype=np.uint8)).save(name)
    return tmp_path


def run(*arguments: str | Path) -> int:
    """Exit code of the command."""
    return exit_code(main, *map(str, arguments))


def test_output(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("run", "one.png", "two.png", "--mask-ratio", "0.5") == 0
    out = capsys.readouterr().out.splitlines()
    assert out[:3] == [
        "weights  run/model.safetensors",
        "model    width 24, depth 2, decoder 'cross', image 16 x 24, channels 1, patches 6",
        "",
    ]
    record = json.loads((folder / "reconstructions/psnr.json").read_text())
    rows = {image["image"]: (image["psnr_masked"], image["psnr_pasted"]) for image in record["images"]}
    rows["mean"] = (record["mean"]["psnr_masked"], record["mean"]["psnr_pasted"])
    printed = {line.split()[0]: line.split()[1:] for line in out[4:7]}
    assert printed == {name: [f"{value:.2f}" for value in values] for name, values in rows.items()}
    assert out[-1] == "pictures in reconstructions, numbers in reconstructions/psnr.json"
    with Image.open(folder / "reconstructions/animations/two.gif") as gif:
        assert gif.n_frames == 2 * 8 - 2  # 0.1 to 0.8: beyond, none of 6 patches would be visible


@pytest.mark.parametrize("name", ["crossmae", "mae"])
def test_published_layout(folder: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    path = SHARED / f"{name}_official_layout.pth"
    if not path.exists():
        pytest.skip(f"{path.name} is not here")
    command = [path, "*.png", "--no-gif", "--set", "num_heads=2", "decoder_num_heads=2"]
    assert run(*command) == 0
    assert "assumed  pixel_mean: [0.485, 0.456, 0.406] is assumed as in ImageNet" in capsys.readouterr().out
    written = {path.name for path in Path("reconstructions").rglob("*.*")}
    assert written == {"one.png", "overview-1.png", "psnr.json", "two.png"}


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("gone", "one.png"), "CKPT: gone: no such file or folder"),
        (("run", "gone.png"), "IMAGES: gone.png: no such file or folder"),
        (("run", "encoder.pth"), "encoder.pth: cannot be read as an image"),
        (
            ("encoder.pth", "one.png"),
            "encoder.pth: an encoder, not a whole pretraining model with its decoder. Start from it: ",
        ),
        (("whole.pth", "one.png"), "the file does not show img_size and num_heads and decoder_num_heads. Add --set"),
        (("run", "one.png", "--mask-ratio", "0.99"), "mask ratio 0.99: leaves no patch of 6 to see"),
        (("run", "one.png", "--gif-ratios", "0.5", "2"), "mask ratio 2.0"),
        (("run", "one.png", "--seed", "-1"), "--seed: -1 is negative"),
        (("run", "one.png", "--device", "abacus"), "--device: 'abacus' cannot be used"),
        (("run", "one.png", "--set", "num_heads"), "--set num_heads: not KEY=VALUE"),
        (("run", "one.png", "--set", "heads=2"), "heads: unknown model argument"),
        (("run", "one.png", "--output", "one.png"), "--output"),
    ],
)
def test_errors_are_one_line_and_write_nothing(
    folder: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], told: str
) -> None:
    model = CrossMAE(**TINY | {"img_size": (16, 24), "fuse_blocks": (1,)}).state_dict()  # type: ignore[arg-type]
    torch.save(model, "whole.pth")
    encoder = {key: value for key, value in model.items() if key.startswith(("cls", "pos", "pat", "blo"))}
    torch.save(encoder, "encoder.pth")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert run(*arguments) == USER_ERROR_EXIT_CODE
    error = capsys.readouterr().err.split("\r")[-1].lstrip()
    assert error.startswith("error: ")
    assert told in error
    assert error.count("\n") == 1
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_existing_pictures_stay(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("run", "one.png", "--no-gif") == 0
    before = Path("reconstructions/overview-1.png").read_bytes()
    assert run("run", "two.png", "--no-gif") == USER_ERROR_EXIT_CODE
    assert "output files already exist" in capsys.readouterr().err
    assert Path("reconstructions/overview-1.png").read_bytes() == before
    assert run("run", "two.png", "--no-gif", "--force") == 0
    assert Path("reconstructions/overview-1.png").read_bytes() != before


def test_settings_are_yaml() -> None:
    assert parse_settings(["fuse_blocks=[0,-1]", "norm_pix_loss=false", "img_size=224"]) == {
        "fuse_blocks": [0, -1],
        "norm_pix_loss": False,
        "img_size": 224,
    }
    with pytest.raises(UserError, match="not KEY=VALUE"):
        parse_settings(["fuse_blocks=[0"])


def test_table_of_perfect_matches() -> None:
    perfect = Result("a.png", "a", float("inf"), float("inf"))
    assert table([perfect]).splitlines()[1:] == [f"a.png  {'inf':>8}  {'inf':>8}", f"mean   {'inf':>8}  {'inf':>8}"]
