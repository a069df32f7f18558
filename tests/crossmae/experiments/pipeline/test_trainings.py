"""The command lines of the pipeline are what the tools accept, and fit each other: sizes, batches and weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

pytest.importorskip("detectron2", reason="detectron2 is not installed: python tools/install_detectron2.py")

from crossmae.checkpoints.weights import save_weights
from crossmae.experiments.pipeline import trainings as module
from crossmae.experiments.pipeline.plan import Length, Timing
from crossmae.experiments.pipeline.trainings import (
    LAPTOP,
    ONE_GPU,
    START_SECONDS,
    LabelledSplit,
    Recipe,
    Trainings,
    choose_size,
    images_per_step,
    settings_of_weights,
    smaller_size,
)
from crossmae.models.crossmae import CrossMAE
from crossmae.models.sizes import model_arguments
from crossmae.pretraining.config import load_config
from det.config import load_det_config
from tools.train_net import build_parser

LENGTH = Length(64, 40, 640, 0.0)


def trainings_of(folder: Path, recipe: Recipe = LAPTOP, **changes: object) -> Trainings:
    split = LabelledSplit(folder / "val.json", folder, 7)
    values: dict[str, object] = {
        "recipe": recipe,
        "output": folder,
        "pretrain_list": folder / "list.txt",
        "val_list": folder / "held-out.txt",
        "objects": folder / "objects",
        "train": split,
        "val": split,
        "has_masks": True,
        "has_broken": False,
        "weights": None,
        "seed": 5,
    }
    return Trainings(**(values | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize("recipe", [LAPTOP, ONE_GPU], ids=["laptop", "gpu"])
def test_the_detector_is_built_for_the_encoder_that_is_pretrained(recipe: Recipe, tmp_path: Path):
    trainings = trainings_of(tmp_path, recipe)
    words = trainings.pretrain_words(LENGTH, 16, tmp_path / "pretrain")
    config = load_config(words[1], words[2:])
    assert config.optim.images_per_process == 16
    assert (config.schedule.epochs, config.schedule.warmup_epochs, config.runtime.seed) == (40, 2.0, 5)
    model = model_arguments(config.model.name) | config.model.arguments()
    for size in recipe.sizes:
        parsed = build_parser().parse_intermixed_args(trainings.detect_words(90, size, tmp_path, tmp_path / "detect"))
        cfg = load_det_config(parsed.config_file, parsed.overrides)
        vit = cfg.MODEL.VIT
        ours = (vit.EMBED_DIM, vit.DEPTH, vit.NUM_HEADS, vit.PATCH_SIZE, vit.PRETRAIN_IMG_SIZE)
        assert ours == tuple(model[key] for key in ("embed_dim", "depth", "num_heads", "patch_size", "img_size"))
        assert (size, size, size) == (cfg.INPUT.MAX_SIZE_TEST, cfg.INPUT.LSJ.SIZE, vit.IMG_SIZE)
        assert (cfg.SOLVER.MAX_ITER, cfg.SOLVER.IMS_PER_BATCH, cfg.SEED) == (90, 7, 5)


def test_the_random_weights_of_a_comparison_are_of_the_same_model(tmp_path: Path):
    trainings = trainings_of(tmp_path, pretrain_settings=("model.depth=3",))
    run, start = trainings.pretrain_words(LENGTH, 32, tmp_path), trainings.start_words(32, tmp_path)
    configs = [load_config(words[1], words[2:]) for words in (run, start)]
    assert configs[0].model == configs[1].model
    assert configs[0].runtime.seed == configs[1].runtime.seed
    assert configs[1].schedule.max_steps == 0


def test_settings_of_the_user_win(tmp_path: Path):
    trainings = trainings_of(
        tmp_path, pretrain_settings=("schedule.warmup_epochs=7",), detect_settings=("SOLVER.MAX_ITER=3",)
    )
    words = trainings.pretrain_words(LENGTH, 32, tmp_path)
    assert load_config(words[1], words[2:]).schedule.warmup_epochs == 7
    parsed = build_parser().parse_intermixed_args(trainings.detect_words(90, 256, None, tmp_path))
    assert load_det_config(parsed.config_file, parsed.overrides).SOLVER.MAX_ITER == 3


@pytest.mark.parametrize(
    ("images", "batch"), [(10000, 32), (128, 32), (127, 16), (9, 2), (3, 1)], ids=lambda value: str(value)
)
def test_few_images_make_small_steps(images: int, batch: int):
    assert images_per_step(LAPTOP, images) == batch


def test_a_short_run_has_two_evaluations_and_counts_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    ran: list[str] = []

    def time_run(_: str, words: tuple[str, ...], *__: object) -> Timing:
        ran.extend(words)
        return Timing(START_SECONDS + 2 * 7.0, 0.5, 32)

    monkeypatch.setattr(module, "_time", time_run)
    timing = module.time_pretraining(trainings_of(tmp_path), 32, 320)
    config = load_config(ran[2], ran[3:])
    assert config.probe.every_epochs == config.validation.every_epochs == config.schedule.epochs == 2
    full = trainings_of(tmp_path).pretrain_words(LENGTH, 32, tmp_path)
    every = load_config(full[1], full[2:]).probe.every_epochs
    evaluations = 1 + -(-LENGTH.epochs // every)
    assert timing == Timing(START_SECONDS + evaluations * 7.0, 0.5, 32)


def test_sizes():
    assert [choose_size(LAPTOP, side) for side in (1, 128, 129, 256, 4000)] == [128, 128, 192, 256, 512]
    assert smaller_size(LAPTOP, 512, 2.0, 8.0) == 256  # a quarter of the pixels
    assert smaller_size(LAPTOP, 512, 0.01, 8.0) == 128
    assert smaller_size(LAPTOP, 128, 0.01, 8.0) is None
    assert smaller_size(LAPTOP, 512, 0.01, 8.0, least=150.0) == 192
    assert smaller_size(LAPTOP, 192, 0.01, 8.0, least=150.0) is None


@pytest.mark.parametrize("recipe", [LAPTOP, ONE_GPU], ids=["laptop", "gpu"])
def test_weights_of_another_size_continue_and_fit_the_detector(recipe: Recipe, tmp_path: Path):
    arguments = {"img_size": 64, "patch_size": 16, "embed_dim": 48, "depth": 8, "num_heads": 4}
    arguments |= {"decoder_embed_dim": 32, "decoder_depth": 1, "decoder_num_heads": 2}
    torch.manual_seed(0)
    save_weights(tmp_path / "w.safetensors", CrossMAE(**arguments).state_dict(), {"model": json.dumps(arguments)})
    pretrain, detect = settings_of_weights(tmp_path / "w.safetensors", recipe)
    trainings = trainings_of(
        tmp_path, recipe, weights=tmp_path / "w.safetensors", pretrain_settings=pretrain, detect_settings=detect
    )
    words = trainings.pretrain_words(LENGTH, 4, tmp_path / "run")
    config = load_config(words[1], words[2:])
    model = model_arguments(config.model.name) | config.model.arguments()
    changed = {key for key in arguments if model[key] != arguments[key]}
    assert changed == {"img_size"}
    parsed = build_parser().parse_intermixed_args(trainings.detect_words(9, 256, None, tmp_path))
    vit = load_det_config(parsed.config_file, parsed.overrides).MODEL.VIT
    assert (vit.EMBED_DIM, vit.DEPTH, vit.NUM_HEADS) == (48, 8, 4)
    assert list(vit.GLOBAL_BLOCKS) == ([1, 3, 5, 7] if recipe.has_windows else [])


def test_weights_without_an_encoder_are_named(tmp_path: Path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    with pytest.raises(Exception, match=r"^--weights: .*a\.png"):
        settings_of_weights(tmp_path / "a.png", LAPTOP)
