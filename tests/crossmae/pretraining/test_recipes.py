"""Proves that every recipe in configs/pretrain/ is what its header says: the published model, the published step and
learning rate under each of its launch commands, and arithmetic that comes out.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from crossmae.data.batches import BatchPlan
from crossmae.models.crossmae import CrossMAE, create_model
from crossmae.pretraining.config import PretrainConfig, load_config
from crossmae.pretraining.train import lr_factor
from crossmae.training.config import CONFIG_ROOT, resolve_config_path
from crossmae.training.schedule import Schedule, make_schedule

RECIPES = sorted((CONFIG_ROOT / "pretrain").glob("*.yaml"))
TABLE = (CONFIG_ROOT.parent / "docs" / "recipes.md").read_text(encoding="utf-8")
NEEDED = ["data.train=IMAGES", "output_dir=OUT"]
IMAGENET = 1_281_167
SECTIONS = [name for name in PretrainConfig.model_fields if name not in ("output_dir", "checkpoint")] + ["checkpoint"]


@dataclass(frozen=True)
class Published:
    """Parameters: method specification, 1.2; steps: 1.9 and 2.8."""

    parameters: int
    fixed: int  # the two position tables, (L + 1) * (E + D)
    mask_ratio: float
    predict_ratio: float | None  # None: plain MAE, to which it does not apply
    lr: float
    epochs: int
    warmup_epochs: int


# fmt: off
PUBLISHED = {
    "crossmae_vits":      Published( 32_186_396, 197 * ( 384 + 256), 0.75, 0.75, 2.4e-3, 800, 40),
    "crossmae_vits_1gpu": Published( 32_186_396, 197 * ( 384 + 256), 0.75, 0.75, 2.4e-3, 800, 40),
    "crossmae_vitb":      Published(127_286_428, 197 * ( 768 + 512), 0.75, 0.25, 8.0e-4, 800, 40),
    "crossmae_vitl":      Published(347_940_908, 197 * (1024 + 512), 0.75, 0.75, 2.4e-3, 800, 40),
    "crossmae_vith":      Published(678_493_912, 257 * (1280 + 512), 0.75, 0.25, 8.0e-4, 800, 40),
    "crossmae_vitb_448":  Published(128_039_068, 785 * ( 768 + 512), 0.75, 0.25, 8.0e-4, 400, 20),
    "mae_vits":           Published( 28_330_880, 197 * ( 384 + 256), 0.75, None, 2.4e-3, 800, 40),
    "mae_vitb":           Published(111_907_840, 197 * ( 768 + 512), 0.75, None, 2.4e-3, 800, 40),
    "mae_vitl":           Published(329_541_888, 197 * (1024 + 512), 0.75, None, 2.4e-3, 800, 40),
    "mae_vith":           Published(657_074_508, 257 * (1280 + 512), 0.75, None, 2.4e-3, 800, 40),
}
# fmt: on
LAUNCHES = ("CPU smoke", "1 GPU", "8 GPUs", "2 nodes")


@dataclass(frozen=True)
class Launch:
    """One launch command of a header."""

    label: str
    processes: int
    name: str
    words: list[str]

    @cached_property
    def config(self) -> PretrainConfig:
        return load_config(self.name, self.words)


def header(path: Path) -> str:
    """The comment that a file opens with, without its signs."""
    lines = path.read_text(encoding="utf-8").splitlines()
    end = next(number for number, line in enumerate(lines) if not line.startswith("#"))
    return "\n".join(line.removeprefix("#").removeprefix(" ") for line in lines[:end])


def launches(path: Path) -> list[Launch]:
    """Every command of a header. A label ends in a colon, the command is the whole next line: it can be copied."""
    found = re.findall(r"^  ([^:(,\n]+)[^:\n]*:\n    ((?:crossmae|torchrun) .*)$", header(path), re.MULTILINE)
    return [parse_launch(label.strip(), command) for label, command in found]


def parse_launch(label: str, command: str) -> Launch:
    launcher, script, arguments = command.partition("crossmae pretrain ")
    assert script, f"{label}: {command}"
    options = shlex.split(launcher)
    assert not options or (options[0], options[-1]) == ("torchrun", "--no-python"), f"{label}: {command}"
    counts = {option: int(value) for option, value in pairwise(options) if value.isdigit()}
    flag, name, *words = shlex.split(arguments)
    assert flag == "--config-file"
    return Launch(label, counts.get("--nnodes", 1) * counts.get("--nproc-per-node", 1), name, words)


def schedule_of(config: PretrainConfig, images: int = IMAGENET, processes: int = 1) -> Schedule:
    with torch.device("meta"):
        model = create_model(config.model.name, **config.model.arguments())
    ratio = config.model.mask_ratio
    factor, _ = lr_factor(config.optim.lr_rule, ratio, model.scored_ratio(ratio, config.model.predict_ratio))
    batches = BatchPlan(images, config.optim.batch_size, seed=0, world_size=processes)
    return make_schedule(batches, config.optim, config.schedule, factor)


@cache
def build(path: Path) -> tuple[PretrainConfig, CrossMAE]:
    config = load_config(str(path), NEEDED)
    with torch.device("meta"):
        return config, create_model(config.model.name, **config.model.arguments())


def step_gflop(path: Path) -> float:
    """Forward and backward of one image: three times the forward's matrix products (2 per multiply and add).

    Symbols: L patches, V visible tokens, M predicted patches, E and D widths, P values of a patch.
    """
    config, model = build(path)
    visible, _, M = model.patch_counts(config.model.mask_ratio, config.model.predict_ratio)
    L, V, E = model.num_patches, visible + 1, model.embed_dim
    P, D = model.decoder_pred.weight.shape
    N = len(model.decoder_blocks)
    flop = 2 * (V - 1) * P * E + model.depth * (24 * V * E**2 + 4 * V**2 * E)
    if model.decoder == "self":
        flop += 2 * V * E * D + N * (24 * (L + 1) * D**2 + 4 * (L + 1) ** 2 * D) + 2 * (L + 1) * D * P
    else:
        mixing = 2 * N * (model.depth + 1) * V * E
        flop += mixing + N * (20 * M * D**2 + 4 * V * E * D + 4 * M * V * D) + 2 * M * D * P
    return 3 * flop / 1e9


def test_the_published_recipes_are_all_there() -> None:
    assert {path.stem for path in RECIPES} == PUBLISHED.keys() | {
        "continue",
        "demo",
        "laptop",
        "small",
        "fashion_mnist",
        "things",
    }


@pytest.mark.parametrize("name", ["crossmae_vits", "mae_vits"])
def test_the_arithmetic_counts_what_torch_counts(name: str) -> None:
    path = CONFIG_ROOT / "pretrain" / f"{name}.yaml"
    config, model = build(path)
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        model(torch.empty(1, 3, 224, 224), config.model.mask_ratio, config.model.predict_ratio)
    assert step_gflop(path) == pytest.approx(3 * counter.get_total_flops() / 1e9, rel=1e-6)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
class TestEveryRecipe:
    def test_it_builds(self, path: Path) -> None:
        config, model = build(path)
        assert sum(model.patch_counts(config.model.mask_ratio, config.model.predict_ratio)) == model.num_patches

    def test_its_header_says_what_it_is_and_how_to_start_it(self, path: Path) -> None:
        text = path.read_text(encoding="utf-8")
        assert text.startswith("# ")
        for word in ("Reproduces:", "Launch"):
            assert re.search(rf"^{word}", header(path), re.MULTILINE), word
        named = re.findall(r"--config-file (\S+)", header(path))
        assert named
        assert all(resolve_config_path(name) == path for name in named)

    def test_its_sections_are_in_the_order_of_the_config(self, path: Path) -> None:
        found = re.findall(r"^(?:# )?(\w+):", path.read_text(encoding="utf-8"), re.MULTILINE)
        order = [name for name in found if name in SECTIONS]
        assert order == sorted(order, key=SECTIONS.index)

    def test_every_setting_that_its_comments_name_exists(self, path: Path) -> None:
        for line in path.read_text(encoding="utf-8").splitlines():
            words = re.findall(rf"\b(?:{'|'.join(SECTIONS)})\.\w+=[^\s,;:)]+", line.partition("#")[2])
            if words:
                load_config(str(path), [*NEEDED, *(word.rstrip(".") for word in words)])


@pytest.mark.parametrize("name", PUBLISHED)
class TestPublishedRecipe:
    def test_it_is_the_published_model(self, name: str) -> None:
        expected = PUBLISHED[name]
        config, model = build(CONFIG_ROOT / "pretrain" / f"{name}.yaml")
        assert sum(p.numel() for p in model.parameters()) == expected.parameters
        trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert trainable == expected.parameters - expected.fixed
        assert config.model.mask_ratio == expected.mask_ratio
        assert config.model.norm_pix_loss
        assert (model.decoder == "self") == (expected.predict_ratio is None)
        assert ("predict_ratio" in config.model.model_fields_set) == (expected.predict_ratio is not None)
        if expected.predict_ratio is not None:
            assert config.model.predict_ratio == expected.predict_ratio

    def test_the_user_names_images_and_output(self, name: str) -> None:
        """No default path that fails late or fills the wrong disk."""
        with pytest.raises(ValueError, match=r"missing key 'output_dir'.*missing key 'data.train'"):
            load_config(f"pretrain/{name}.yaml")

    def test_every_launch_makes_the_published_steps(self, name: str) -> None:
        expected = PUBLISHED[name]
        smoke, *full = launches(CONFIG_ROOT / "pretrain" / f"{name}.yaml")
        assert tuple(launch.label for launch in (smoke, *full)) == LAUNCHES
        assert [launch.processes for launch in (smoke, *full)] == [1, 1, 8, 16]
        assert smoke.config.runtime.device == "cpu"
        assert schedule_of(smoke.config).last_step == 2
        assert schedule_of(smoke.config).images_per_step == 4
        for launch in full:
            config, plan = launch.config, schedule_of(launch.config, processes=launch.processes)
            assert plan.images_per_step == 4096, launch.label
            assert plan.peak_lr == pytest.approx(expected.lr), launch.label
            assert plan.last_step == plan.total_steps
            assert (config.schedule.epochs, config.schedule.warmup_epochs) == (expected.epochs, expected.warmup_epochs)
            assert (config.optim.weight_decay, config.optim.betas) == (0.05, (0.9, 0.95))
            assert (config.data.crop_scale, config.data.flip) == ((0.2, 1.0), 0.5)

    def test_its_comments_count_right(self, name: str) -> None:
        path = CONFIG_ROOT / "pretrain" / f"{name}.yaml"
        text, expected = path.read_text(encoding="utf-8"), PUBLISHED[name]
        factor = 1.0 if expected.predict_ratio is None else expected.predict_ratio / expected.mask_ratio
        arithmetic = re.search(r"base_lr: 1\.5e-4  # \* 4096 / 256( \* [\d.]+ / [\d.]+)? = ([\d.e-]+)", text)
        assert arithmetic
        assert float(arithmetic[2]) == pytest.approx(expected.lr) == pytest.approx(1.5e-4 * 4096 / 256 * factor)
        step = re.search(r"accumulate: (\d+)  # (\d+) images \* (\d+) micro-batch(?:es)? \* (\d+) GPUs? = 4096", text)
        assert step
        assert step[1] == step[3]
        assert int(step[2]) * int(step[3]) * int(step[4]) == 4096

    def test_its_cost_follows_from_the_arithmetic(self, name: str) -> None:
        path = CONFIG_ROOT / "pretrain" / f"{name}.yaml"
        text = " ".join(header(path).split())
        cost = re.search(r"Cost:.* ([\d.]+) GFLOP .*\* (\d+) epochs \* 1,281,167 images: at least ([\d.]+) hours", text)
        assert cost
        gflop = step_gflop(path)
        assert float(cost[1]) == pytest.approx(gflop, abs=0.051)
        assert int(cost[2]) == PUBLISHED[name].epochs
        hours = gflop * 1e9 * PUBLISHED[name].epochs * IMAGENET / 790e12 / 3600
        assert float(cost[3]) == pytest.approx(hours, abs=0.1)
        assert "on a GPU yet" in text

    def test_the_table_of_all_recipes_agrees(self, name: str) -> None:
        expected = PUBLISHED[name]
        row = next(line for line in TABLE.splitlines() if line.startswith(f"| `{name}.yaml` |"))
        assert f"| {expected.epochs} |" in row
        assert f"| {(expected.parameters - expected.fixed) / 1e6:.1f} M |" in row


def test_small_learns_whatever_the_batch_and_fits_a_few_images() -> None:
    path = CONFIG_ROOT / "pretrain" / "small.yaml"
    assert [launch.label for launch in launches(path)] == ["CPU smoke", "1 GPU"]
    config = load_config(str(path), [*NEEDED, "optim.batch_size=8"])
    assert schedule_of(config, images=1000).peak_lr == pytest.approx(5e-4)
    assert config.data.val is config.probe.train is None
    assert config.data.broken == "error"
    assert f"{step_gflop(path):.1f} GFLOP per image" in header(path)
