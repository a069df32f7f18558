"""Proves what the command line that measures data prints and writes, and that its words can be pasted."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from crossmae.errors import USER_ERROR_EXIT_CODE
from crossmae.pretraining.config import load_config
from tests.crossmae.data.sources.source_files import write_tree
from tests.tools.command_line import exit_code
from tools.dataset_stats import main


def run(*arguments: str) -> int:
    """Exit code of the command."""
    return exit_code(main, "--config-file", "c.yaml", *arguments)


@pytest.fixture(autouse=True)
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_tree(Path("tree"))
    config = {"data": {"train": "tree"}, "model": {"name": "crossmae_vit_tiny_patch16", "img_size": 32}}
    Path("c.yaml").write_text(yaml.safe_dump(config))


def test_the_words_fit_the_config(capsys: pytest.CaptureFixture[str]) -> None:
    for channels in (3, 1):  # the config's own mean has three values: it does not stand in the way
        assert run(f"model.in_chans={channels}", "--output", "out/stats.json") == 0
        lines = capsys.readouterr().out.splitlines()
        assert lines[0] == "9 images of 3 classes in the folder tree"
        assert lines[2] == "short side  10 / 14 / 18 (min / median / max)"
        words = shlex.split(next(line for line in lines if line.startswith("paste: "))[7:])
        config = load_config("c.yaml", ["output_dir=x", f"model.in_chans={channels}", *words])
        written = json.loads(Path("out/stats.json").read_text())
        np.testing.assert_allclose(config.data.mean, written["mean"], atol=5e-5)
        np.testing.assert_allclose(config.data.std, written["std"], atol=5e-5)
        assert written["images"] == 9


def test_a_sample(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--images", "4") == 0
    assert "images      4\n" in capsys.readouterr().out


def test_the_low_part_of_16_bits_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    Path("deep").mkdir()
    Image.fromarray(np.arange(4096, dtype=np.uint16).reshape(64, 64)).save("deep/x.png")
    words = ("data.train=deep", "model.in_chans=1", "data.bit_depth=16")
    assert run(*words) == 0
    assert "warning: the largest value is 4095 of 65535" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("data.train=nowhere",), "data.train: nowhere does not exist"),
        (("--images", "0"), "--images: 0 is too small"),
        (("data.trian=x",), "unknown key 'data.trian' (did you mean 'data.train'?)"),
        (("data.train=black",), "channel 0, 1, 2 has the same value everywhere"),
        (("data.train=broken",), "broken/x.png: cannot be read as an image"),
    ],
)
def test_errors_are_one_line_and_nothing_is_written(
    words: tuple[str, ...], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("black", "broken"):
        Path(name).mkdir()
    Image.new("RGB", (9, 9)).save("black/x.png")
    Path("broken/x.png").write_bytes(b"broken")
    assert run(*words, "--output", "stats.json") == USER_ERROR_EXIT_CODE
    error = capsys.readouterr().err.rpartition("\r")[2].strip()  # after the bars
    assert error.startswith("error: ")
    assert told in error
    assert "\n" not in error
    assert not Path("stats.json").exists()
