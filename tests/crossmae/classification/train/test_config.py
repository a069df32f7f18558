"""Proves that every recipe in configs/finetune/ is what its header says: the published model, the published step,
learning rate and augmentation under each of its launch commands (method specification, 1.10 and 1.11).
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from PIL import Image

from crossmae.classification.train.augment import build_policy, keyed_everywhere
from crossmae.classification.train.config import FinetuneConfig
from crossmae.classification.train.train import architecture_from
from crossmae.classification.vit import build_vit, parameter_groups
from crossmae.data.batches import BatchPlan
from crossmae.training.config import CONFIG_ROOT, load_typed_config, resolve_config_path
from crossmae.training.schedule import Schedule, make_schedule

RECIPES = sorted((CONFIG_ROOT / "finetune").glob("*.yaml"))
NEEDED = ["data.train=IMAGES", "output_dir=OUT", "model.init=WEIGHTS"]
ORDER = ("data", "model", "loss", "optim", "schedule", "runtime", "log", "evaluation", "checkpoint")
IMAGENET = 1_281_167


@dataclass(frozen=True)
class Published:
    """Parameters with 1000 classes, groups of two for each layer, and the settings of 1.10."""

    parameters: int
    groups: int
    epochs: int
    lr: float
    layer_decay: float
    drop_path: float


PUBLISHED = {
    "vits": Published(22_050_664, 28, 100, 2e-3, 0.65, 0.1),
    "vitb": Published(86_567_656, 28, 100, 2e-3, 0.65, 0.1),
    "vitl": Published(304_326_632, 52, 50, 4e-3, 0.75, 0.2),
    "vith": Published(632_045_800, 68, 50, 4e-3, 0.75, 0.3),
}


def header(path: Path) -> str:
    lines = path.read_text(encoding="utf-8").splitlines()
    end = next(number for number, line in enumerate(lines) if not line.startswith("#"))
    return "\n".join(line.removeprefix("#").removeprefix(" ") for line in lines[:end])


def launches(path: Path) -> dict[str, tuple[int, FinetuneConfig]]:
    """Processes and config of every training command, by its label."""
    found = re.findall(r"^  ([^:(,\n]+)[^:\n]*:\n    ((?:crossmae|torchrun) .*)$", header(path), re.MULTILINE)
    parsed = {}
    for label, command in found:
        launcher, _, arguments = command.partition("crossmae finetune ")
        starter = shlex.split(launcher)
        assert not starter or (starter[0], starter[-1]) == ("torchrun", "--no-python"), command
        options = dict(pairwise(starter))
        flag, name, *words = shlex.split(arguments)
        assert (flag, resolve_config_path(name)) == ("--config-file", path)
        config = load_typed_config(FinetuneConfig, name, words)
        parsed[label.strip()] = (int(options.get("--nproc-per-node", 1)), config)
    return parsed


def schedule_of(processes: int, config: FinetuneConfig) -> Schedule:
    batches = BatchPlan(IMAGENET, config.optim.batch_size, 0, world_size=processes)
    return make_schedule(batches, config.optim, config.schedule)


def test_the_recipes_are_all_there() -> None:
    assert {path.stem for path in RECIPES} == PUBLISHED.keys() | {"small", "linear_probe_vitb", "fashion_mnist"}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
class TestEveryRecipe:
    def test_its_commands_for_afterwards_are_accepted(self, path: Path) -> None:
        """Evaluation alone needs neither weights to start from nor images to train on."""
        for words in re.findall(r"^    crossmae finetune (.* --eval-only .*)$", header(path), re.MULTILINE):
            flag, name, *rest = shlex.split(words)
            config = load_typed_config(FinetuneConfig, name, [word for word in rest if "=" in word])
            assert (flag, config.data.val, config.model.init) == ("--config-file", "HELD_OUT", None)

    def test_its_header_says_what_it_is_and_how_to_start_it(self, path: Path) -> None:
        for word in ("Reproduces:", "Cost:", "Launch"):
            assert re.search(rf"^{word}", header(path), re.MULTILINE), word
        assert launches(path)

    def test_its_sections_are_in_order(self, path: Path) -> None:
        found = re.findall(r"^(\w+):", path.read_text(encoding="utf-8"), re.MULTILINE)
        assert found == sorted(found, key=ORDER.index)

    def test_every_setting_that_its_comments_name_exists(self, path: Path) -> None:
        for line in path.read_text(encoding="utf-8").splitlines():
            words = re.findall(rf"\b(?:{'|'.join(ORDER)})\.\w+=[^\s,;:)]+", line.partition("#")[2])
            for word in words:  # as a shell would hand them over
                load_typed_config(FinetuneConfig, str(path), [*NEEDED, word.rstrip(".'")])


@pytest.mark.parametrize("name", PUBLISHED)
class TestPublishedRecipe:
    def test_it_is_the_published_model(self, name: str) -> None:
        config = load_typed_config(FinetuneConfig, f"finetune/{name}.yaml", NEEDED)
        with torch.device("meta"):
            architecture = architecture_from(config.model.given(), str(config.model.name))
            model = build_vit(architecture, 1000, config.model.pool, config.model.drop_path, config.model.head)
        assert sum(p.numel() for p in model.parameters()) == PUBLISHED[name].parameters
        assert len(parameter_groups(model, 0.05, config.optim.layer_decay)) == PUBLISHED[name].groups

    def test_every_launch_makes_the_published_steps(self, name: str) -> None:
        expected = PUBLISHED[name]
        found = launches(CONFIG_ROOT / "finetune" / f"{name}.yaml")
        assert list(found) == ["CPU smoke", "1 GPU", "8 GPUs"]
        assert schedule_of(*found.pop("CPU smoke")).last_step == 2
        for label, (processes, config) in found.items():
            plan = schedule_of(processes, config)
            assert plan.images_per_step == 1024, label
            assert plan.peak_lr == pytest.approx(expected.lr)
            assert (config.schedule.epochs, config.schedule.warmup_epochs) == (expected.epochs, 5)
            assert config.schedule.min_lr == 1e-6
            optim, data, loss = config.optim, config.data, config.loss
            assert (optim.layer_decay, config.model.drop_path) == (expected.layer_decay, expected.drop_path)
            assert (optim.weight_decay, optim.betas, optim.clip_grad, optim.ema) == (0.05, (0.9, 0.999), None, None)
            assert (data.auto_augment, data.erase, data.crop_scale) == ("rand-m9-mstd0.5-inc1", 0.25, (0.08, 1.0))
            assert (loss.smoothing, loss.mixup, loss.cutmix) == (0.1, 0.8, 1.0)
            assert (loss.mixup_prob, loss.mixup_switch_prob, loss.mixup_mode) == (1.0, 0.5, "batch")
            assert config.model.pool == "avg"

    def test_it_says_where_readme_and_paper_disagree(self, name: str) -> None:
        assert "Table 11" in header(CONFIG_ROOT / "finetune" / f"{name}.yaml")


def test_the_linear_probe_is_the_published_one() -> None:
    found = launches(CONFIG_ROOT / "finetune" / "linear_probe_vitb.yaml")
    for label in ("1 GPU", "8 GPUs"):
        processes, config = found[label]
        plan = schedule_of(processes, config)
        assert (plan.images_per_step, plan.peak_lr) == (16384, pytest.approx(6.4))
        assert (config.schedule.epochs, config.schedule.warmup_epochs, config.schedule.min_lr) == (90, 10, 0)
        assert (config.model.head, config.model.freeze, config.optim.name) == ("batchnorm", True, "lars")
        assert config.optim.weight_decay == config.loss.smoothing == config.data.erase == 0
        assert config.data.auto_augment is None


def test_no_seed_ends_an_epoch() -> None:
    """The policy of every recipe runs on images of 5,000 seeds."""
    configs = [load_typed_config(FinetuneConfig, str(path), NEEDED) for path in RECIPES]
    names = sorted({config.data.auto_augment for config in configs if config.data.auto_augment})
    assert names
    image = Image.radial_gradient("L").convert("RGB").resize((8, 8))
    for name in names:
        policy = build_policy(name, (8, 8), (0.5, 0.5, 0.5))
        for seed in range(5000):
            with keyed_everywhere(seed):
                assert policy(image).size == (8, 8), (name, seed)
