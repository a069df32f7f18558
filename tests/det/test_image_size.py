"""`INPUT.SIZE` sets every key that depends on the size of images, given keys win, and no config changes without it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

pytest.importorskip("detectron2", reason="detectron2 is not installed: python tools/install_detectron2.py")

from detectron2.config import CfgNode, get_cfg

import det
from crossmae.errors import UserError
from crossmae.training.config import CONFIG_ROOT
from det.config import flatten, load_det_config

CONFIGS = sorted(path for path in CONFIG_ROOT.glob("*.yaml") if "probe" not in path.stem)
OF_MACHINE = ("MODEL.DEVICE", "SOLVER.AMP.ENABLED")  # `choose_device` sets them


def settings(cfg: CfgNode) -> dict[str, object]:
    return {key: value for key, value in flatten(cfg) if key not in OF_MACHINE}


def written(cfg: CfgNode) -> str:
    """All keys as text: YAML has no nested tuples."""
    return json.dumps(cfg, sort_keys=True)


def changes(name: str, *words: str) -> dict[str, object]:
    """The keys that words change."""
    before = settings(load_det_config(name))
    return {key: value for key, value in settings(load_det_config(name, words)).items() if value != before[key]}


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str], str]:
    def _write(text: str) -> str:
        (tmp_path / "mine.yaml").write_text(text)
        return str(tmp_path / "mine.yaml")

    return _write


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_detectron2_merges_every_config_to_the_same_keys(path: Path, tmp_path: Path) -> None:
    """detectron2's own reader derives nothing. So a config without a size is the same as before there was one."""
    ours, theirs, again = load_det_config(str(path)), get_cfg(), get_cfg()
    det.add_crossmae_config(theirs)
    theirs.merge_from_file(str(path))
    assert settings(ours) == settings(theirs)
    assert ours.INPUT.SIZE == 0
    det.add_crossmae_config(again)
    (tmp_path / "config.yaml").write_text(ours.dump())  # of a run
    again.merge_from_file(str(tmp_path / "config.yaml"))
    assert written(again) == written(ours)


def test_a_config_of_an_older_run_has_no_size_and_loads(tmp_path: Path) -> None:
    cfg = load_det_config("small_mask_rcnn.yaml")
    values = yaml.safe_load(cfg.dump())
    del values["INPUT"]["SIZE"]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values))
    assert written(load_det_config(str(tmp_path))) == written(cfg)


def test_one_key_moves_all_that_depend_on_it() -> None:
    assert changes("small_mask_rcnn.yaml", "INPUT.SIZE=384") == {
        "INPUT.SIZE": 384,
        "INPUT.LSJ.SIZE": 384,
        "INPUT.MIN_SIZE_TRAIN": (384,),
        "INPUT.MAX_SIZE_TRAIN": 384,
        "INPUT.MIN_SIZE_TEST": 384,
        "INPUT.MAX_SIZE_TEST": 384,
        "MODEL.VIT.IMG_SIZE": 384,
        "MODEL.VIT.SQUARE_PAD": 384,
        "MODEL.ANCHOR_GENERATOR.SIZES": [[12], [24], [48], [96], [192]],
    }


def test_it_does_what_the_configs_for_other_sizes_do_by_hand() -> None:
    """small_mask_rcnn.yaml is own_mask_rcnn.yaml at 512 pixels for another encoder."""
    by_hand = settings(load_det_config("small_mask_rcnn.yaml"))
    by_key = settings(load_det_config("own_mask_rcnn.yaml", ["INPUT.SIZE=512"]))
    other = {key for key, value in by_hand.items() if value != by_key[key]}
    encoder = {f"MODEL.VIT.{key}" for key in ("EMBED_DIM", "NUM_HEADS", "PRETRAIN_IMG_SIZE", "WINDOW_SIZE")}
    costs = {"MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", "SOLVER.ACCUMULATE", "OUTPUT_DIR"}
    unused_with_jitter = {"INPUT.MIN_SIZE_TRAIN", "INPUT.MAX_SIZE_TRAIN"}
    assert other == encoder | costs | unused_with_jitter | {"INPUT.SIZE"}


def test_a_grid_that_fits_into_a_window_has_none() -> None:
    assert changes("small_mask_rcnn.yaml", "INPUT.SIZE=256")["MODEL.VIT.WINDOW_SIZE"] == 0
    assert "MODEL.VIT.WINDOW_SIZE" not in changes("small_mask_rcnn.yaml", "INPUT.SIZE=272")
    smaller = changes("small_mask_rcnn.yaml", "INPUT.SIZE=256", "MODEL.VIT.PATCH_SIZE=8")
    assert "MODEL.VIT.WINDOW_SIZE" not in smaller, "32 x 32 patches of 8 pixels"


def test_squares_stay_and_rectangles_stay() -> None:
    vit = load_det_config("coco_mask_rcnn.yaml", ["INPUT.SIZE=512"]).MODEL.VIT
    assert (vit.SQUARE_PAD, vit.SQUARE_PAD_TEST) == (512, 512)
    vit = load_det_config("own_mask_rcnn.yaml", ["INPUT.SIZE=512"]).MODEL.VIT
    assert (vit.SQUARE_PAD, vit.SQUARE_PAD_TEST) == (512, 0)


@pytest.mark.parametrize("words", [["INPUT.SIZE=384", "INPUT.LSJ.SIZE=256"], ["INPUT.LSJ.SIZE=256", "INPUT.SIZE=384"]])
def test_given_keys_win_whatever_the_order(words: list[str]) -> None:
    cfg = load_det_config("small_mask_rcnn.yaml", words)
    assert (cfg.INPUT.LSJ.SIZE, cfg.INPUT.MAX_SIZE_TEST, cfg.MODEL.VIT.SQUARE_PAD) == (256, 384, 384)


def test_a_size_sets_the_keys_of_earlier_layers_only(write: Callable[[str], str]) -> None:
    name = write(f"_BASE_: {CONFIG_ROOT / 'small_mask_rcnn.yaml'}\nINPUT: {{SIZE: 256, MAX_SIZE_TEST: 512}}")
    cfg = load_det_config(name)
    assert (cfg.INPUT.LSJ.SIZE, cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST) == (256, 256, 512)
    assert cfg.MODEL.ANCHOR_GENERATOR.SIZES == [[8], [16], [32], [64], [128]]
    again = load_det_config(name, ["INPUT.SIZE=512"])
    assert (again.INPUT.MIN_SIZE_TEST, again.INPUT.MAX_SIZE_TEST, again.MODEL.VIT.IMG_SIZE) == (512, 512, 512)
    assert again.MODEL.ANCHOR_GENERATOR.SIZES == [[16], [32], [64], [128], [256]]


def test_the_config_that_a_run_wrote_gives_the_same_keys_again(tmp_path: Path) -> None:
    cfg = load_det_config("small_mask_rcnn.yaml", ["INPUT.SIZE=256", "INPUT.LSJ.SIZE=128"])
    (tmp_path / "config.yaml").write_text(cfg.dump())
    assert written(load_det_config(str(tmp_path))) == written(cfg)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["INPUT.SIZE=500"], "INPUT.SIZE: 500 does not fit the patches. Use a multiple of MODEL.VIT.PATCH_SIZE 16"),
        (["INPUT.SIZE=-16"], "INPUT.SIZE: -16 does not fit the patches"),
        (["INPUT.SIZE=big"], "INPUT.SIZE cannot be 'big'. Use a value of type int"),
        (["INPUT.MIN_SIZE_TEST=800"], "INPUT.MIN_SIZE_TEST: 800 is more than INPUT.MAX_SIZE_TEST 512 of INPUT.SIZE"),
        (["INPUT.LSJ.SIZE=1024"], "SQUARE_PAD: images of INPUT.LSJ.SIZE 1024 do not fit into 512 of INPUT.SIZE"),
        (
            ["INPUT.MIN_SIZE_TRAIN=(400,800)", "INPUT.LSJ.ENABLED=False"],
            "INPUT.MIN_SIZE_TRAIN: 800 is more than INPUT.MAX_SIZE_TRAIN 512 of INPUT.SIZE",
        ),
        (
            ["INPUT.MAX_SIZE_TEST=1024"],
            "SQUARE_PAD_TEST: images of INPUT.MAX_SIZE_TEST 1024 do not fit into 512 of INPUT.SIZE",
        ),
    ],
)
def test_a_contradiction_names_both_keys(words: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_det_config("coco_mask_rcnn.yaml", ["INPUT.SIZE=512", *words])


def test_a_script_sets_the_size_by_a_function() -> None:
    cfg = get_cfg()
    det.add_crossmae_config(cfg)
    cfg.merge_from_file(str(CONFIG_ROOT / "own_mask_rcnn.yaml"))
    det.set_image_size(cfg, 512)
    assert settings(cfg) == settings(load_det_config("own_mask_rcnn.yaml", ["INPUT.SIZE=512"]))
