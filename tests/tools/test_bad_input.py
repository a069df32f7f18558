"""Proves that bad input ends in one line on stderr that names the file or key, exit code 2, and nothing written.

The options of the tools stay as they are published.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import save_file

from crossmae.errors import USER_ERROR_EXIT_CODE, run_cli
from crossmae.models.crossmae import create_model
from tests.det.coco_files import TINY, write_coco
from tools import convert_checkpoint, dataset_stats, make_shards, pretrain, reconstruct, train_net

MODEL = {"embed_dim": 24, "depth": 2, "num_heads": 2}
MODEL |= {"decoder_embed_dim": 8, "decoder_depth": 1, "decoder_num_heads": 1}


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with everything right: images, a COCO file, two configs, weights; `OUT` is where output would go."""
    monkeypatch.chdir(tmp_path)
    write_coco(tmp_path / "data")
    config = {
        "output_dir": "OUT",
        "data": {"train": "data/images", "workers": 0},
        "model": {"name": "crossmae_vit_tiny_patch16", "img_size": 32, "patch_size": 8, **MODEL},
        "optim": {"batch_size": 2},
        "schedule": {"epochs": 1, "warmup_epochs": 0},
        "runtime": {"device": "cpu"},
    }
    (tmp_path / "pretrain.yaml").write_text(yaml.safe_dump(config))
    (tmp_path / "detect.yaml").write_text(TINY)
    model = create_model("crossmae_vit_tiny_patch16", img_size=32, patch_size=8, **MODEL)
    save_file(model.state_dict(), tmp_path / "right.safetensors")
    other = create_model("crossmae_vit_tiny_patch16", img_size=32, patch_size=8, **MODEL | {"embed_dim": 32})
    save_file(other.state_dict(), tmp_path / "other.safetensors")
    return tmp_path


def pretrain_with(*words: str) -> Callable[[], None]:
    return lambda: pretrain.main(["--config-file", "pretrain.yaml", *words])


def detect_with(*words: str, json_file: str = "data/coco.json") -> Callable[[], None]:
    paths = ["--train-json", json_file, "--train-images", "data/images"]
    return lambda: train_net.main(["--config-file", "detect.yaml", *paths, "OUTPUT_DIR=OUT", *words])


def edit_coco(files: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    content = json.loads((files / "data/coco.json").read_text())
    change(content)
    (files / "data/coco.json").write_text(json.dumps(content))


def truncate(files: Path) -> None:
    path = files / "data/images/3.png"
    path.write_bytes(path.read_bytes()[:100])


def empty(files: Path) -> None:
    (files / "empty").mkdir()


NOTHING: Callable[[Path], Any] = lambda files: None  # noqa: E731 - the default of a table

CASES: list[tuple[str, Callable[[Path], Any], Callable[[], None], list[str]]] = [
    ("no data folder", NOTHING, pretrain_with("data.train=nowhere"), ["data.train", "nowhere"]),
    ("no image", empty, pretrain_with("data.train=empty"), ["data.train", "empty"]),
    ("truncated image", truncate, pretrain_with(), ["data/images/3.png"]),
    ("unknown key", NOTHING, pretrain_with("optim.learning_rate=1"), ["optim.learning_rate"]),
    ("batch too large", NOTHING, pretrain_with("optim.batch_size=9"), ["optim.batch_size", "9", "5"]),
    ("no such config", NOTHING, lambda: pretrain.main(["--config-file", "absent.yaml"]), ["absent.yaml"]),
    ("detection: truncated image", truncate, detect_with(), ["data/images/3.png"]),
    ("detection: unknown key", NOTHING, detect_with("MODEL.VIT.DEPHT=3"), ["MODEL.VIT.DEPHT", "MODEL.VIT.DEPTH"]),
    ("detection: batch too large", NOTHING, detect_with("SOLVER.IMS_PER_BATCH=9"), ["SOLVER.IMS_PER_BATCH", "9"]),
    (
        "another architecture",
        NOTHING,
        detect_with("MODEL.WEIGHTS=other.safetensors"),
        ["MODEL.WEIGHTS", "other.safetensors", "MODEL.VIT.EMBED_DIM", "32"],
    ),
    ("no weights there", NOTHING, detect_with("MODEL.WEIGHTS=absent.pth"), ["MODEL.WEIGHTS", "absent.pth"]),
    (
        "json without annotations",
        lambda files: edit_coco(files, lambda content: content.pop("annotations")),
        detect_with(),
        ["data/coco.json", "annotations"],
    ),
    (
        "path leaves the folder",
        lambda files: edit_coco(files, lambda content: content["images"][1].update(file_name="../../secret.png")),
        detect_with(),
        ["data/coco.json", "images[1]", "../../secret.png"],
    ),
    ("no json", NOTHING, detect_with(json_file="absent.json"), ["absent.json"]),
    (
        "conversion of no checkpoint",
        lambda files: (files / "page.pth").write_text("<!DOCTYPE html><html></html>"),
        lambda: convert_checkpoint.main(["page.pth", "OUT.pth", "--to", "detectron2"]),
        ["page.pth", "web page"],
    ),
]


@pytest.mark.parametrize(("prepare", "call", "told"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_bad_input(
    files: Path,
    capsys: pytest.CaptureFixture[str],
    prepare: Callable[[Path], Any],
    call: Callable[[], None],
    told: list[str],
) -> None:
    prepare(files)
    before = sorted(files.rglob("*"))
    with pytest.raises(SystemExit) as exit_info:
        run_cli(call)
    assert exit_info.value.code == USER_ERROR_EXIT_CODE
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    for part in told:
        assert part in lines[0]
    assert sorted(files.rglob("*")) == before


def test_the_right_input_is_accepted(files: Path) -> None:
    """What the cases above spoil does work unspoilt."""
    pretrain_with()()
    assert (files / "OUT/model.safetensors").is_file()
    detect_with("MODEL.WEIGHTS=right.safetensors", "OUTPUT_DIR=OUT2", "SOLVER.MAX_ITER=1")()
    assert (files / "OUT2/model_final.safetensors").is_file()


@pytest.mark.parametrize(
    ("tool", "options"),
    [
        (dataset_stats, "config-file images output threads"),
        (
            make_shards,
            "root short-side quality images-per-shard max-pixels workers uncompressed keep-original skip-broken verify",
        ),
        (reconstruct, "output mask-ratio gif-ratios no-gif seed max-pixels device set force"),
    ],
)
def test_options_are_frozen(tool: Any, options: str) -> None:
    found = {option for action in tool.build_parser()._actions for option in action.option_strings}
    assert found == {"-h", "--help", *(f"--{name}" for name in options.split())}
