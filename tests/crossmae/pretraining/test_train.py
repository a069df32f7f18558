"""Proves that training resumes to the bit, learns, writes what it promises, and refuses bad input."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tarfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from crossmae.checkpoints.provenance import NON_COMMERCIAL, recorded_licence
from crossmae.checkpoints.run_checkpoint import complete_checkpoints, read_state
from crossmae.errors import UserError
from crossmae.models.crossmae import CrossMAE, create_model
from crossmae.models.sizes import model_arguments
from crossmae.pretraining import train as train_module
from crossmae.pretraining.config import PretrainConfig
from crossmae.pretraining.train import pretrain
from crossmae.training import state as run_module

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for index in range(13):
        slope, phase = rng.uniform(-6, 6, (2, 3)), rng.uniform(0, 6, 3)
        waves = np.sin(np.einsum("kyx,kc->yxc", np.mgrid[0:1:32j, 0:1:32j], slope) + phase)
        Image.fromarray((127.5 + 127.5 * waves).astype(np.uint8)).save(folder / f"{index}.png")
    return folder


def make_config(images: Path, output: Path, **sections: Any) -> PretrainConfig:
    values: dict[str, Any] = {
        "output_dir": output,
        "data": {"train": str(images), "workers": 0},
        "model": {
            "name": "crossmae_vit_tiny_patch16",
            "img_size": 32,
            "patch_size": 8,
            "embed_dim": 16,
            "depth": 2,
            "num_heads": 2,
            "decoder_embed_dim": 16,
            "decoder_depth": 2,
            "decoder_num_heads": 2,
        },
        "optim": {"batch_size": 4, "base_lr": 0.1},
        "schedule": {"epochs": 4, "warmup_epochs": 1},
        "runtime": {"device": "cpu"},
        "log": {"every_steps": 1, "pictures": 0},  # drawing takes longer than training so little
        "checkpoint": {"every_epochs": 1},
    }
    for section, changes in sections.items():
        values[section] = values.get(section, {}) | changes if isinstance(changes, dict) else changes
    return PretrainConfig.model_validate(values)


def arguments(config: PretrainConfig) -> dict[str, Any]:
    return model_arguments(config.model.name) | config.model.arguments()


def build(config: PretrainConfig) -> CrossMAE:
    """The untrained model of a run."""
    return train_module.build_model(arguments(config), config.runtime.seed, 0.75, 0.25)


def digest(run: Path) -> dict[str, Any]:
    """Everything that an exact resume must reproduce."""
    folder = complete_checkpoints(run)[-1]
    state = read_state(folder)
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return {
        "weights": load_file(folder / "model.safetensors"),
        "moments": state["optimizer"]["state"],
        "curve": [(line["step"], line["loss"], line["lr"]) for line in lines if "loss" in line],
    }


def assert_same(first: dict[str, Any], second: dict[str, Any]) -> None:
    assert first["curve"] == second["curve"]
    assert first["weights"].keys() == second["weights"].keys()
    assert all(torch.equal(first["weights"][key], second["weights"][key]) for key in first["weights"])
    for index, moments in first["moments"].items():
        assert all(torch.equal(value, second["moments"][index][key]) for key, value in moments.items())


@pytest.mark.parametrize(("stop", "workers", "accumulate"), [(1, 0, 1), (3, 0, 1), (5, 2, 1), (4, 0, 2)])
def test_resume_is_exact_to_the_bit(images: Path, tmp_path: Path, stop: int, workers: int, accumulate: int) -> None:
    """A run of 3 steps per epoch (1.5 with accumulation), stopped at `stop`, equals one never stopped."""
    settings: dict[str, Any] = {"optim": {"accumulate": accumulate}, "data": {"workers": workers}}
    pretrain(make_config(images, tmp_path / "whole", **settings | {"data": {"workers": 0}}))
    pretrain(make_config(images, tmp_path / "parts", **settings, schedule={"max_steps": stop}))
    torch.manual_seed(1234)
    pretrain(make_config(images, tmp_path / "parts", **settings), resume=True)
    assert_same(digest(tmp_path / "whole"), digest(tmp_path / "parts"))


def test_accumulation_equals_one_large_batch(images: Path, tmp_path: Path) -> None:
    """Four images at once or two and two: the same images, so the same first update up to rounding."""
    for name, optim in (("whole", {"batch_size": 4}), ("parts", {"batch_size": 2, "accumulate": 2})):
        schedule = {"max_steps": 1, "warmup_epochs": 0}
        pretrain(make_config(images, tmp_path / name, optim=optim, schedule=schedule))
    whole, parts = digest(tmp_path / "whole"), digest(tmp_path / "parts")
    assert whole["curve"][0][1:] == pytest.approx(parts["curve"][0][1:], rel=1e-5)
    for index, moments in whole["moments"].items():
        expected = parts["moments"][index]["exp_avg"]
        torch.testing.assert_close(moments["exp_avg"], expected, rtol=1e-4, atol=1e-7)


def test_the_loss_falls_and_everything_promised_is_written(images: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    config = make_config(
        images,
        run,
        optim={"base_lr": 1.0},
        schedule={"epochs": 30, "warmup_epochs": 2},
        checkpoint={"every_epochs": 10, "keep": 2},
        log={"pictures": 2},
    )
    weights = pretrain(config)
    losses = [json.loads(line)["loss"] for line in (run / "log.jsonl").read_text().splitlines()]
    assert len(losses) == 90
    assert np.mean(losses[-6:]) < 0.8 * np.mean(losses[:6])
    assert [folder.name for folder in complete_checkpoints(run)] == ["step-00000060", "step-00000090"]
    assert (run / "config.yaml").is_file()
    assert list((run / "tensorboard").iterdir())
    with Image.open(run / "reconstructions" / "step-00000090.png") as picture:
        assert picture.width > 300
    record = json.loads((run / "checkpoints" / "step-00000090" / "run.json").read_text())
    assert record["batches_consumed"] == 90
    assert record["config"]["optim"]["batch_size"] == 4
    assert record["versions"]["torch"] == torch.__version__
    with safe_open(weights, "pt") as file:
        metadata = file.metadata()
    assert json.loads(metadata["pixel_mean"]) == list(config.data.mean)
    rebuilt = create_model(config.model.name, **config.model.arguments())
    rebuilt.load_state_dict(load_file(weights), strict=True)
    assert json.loads(metadata["model"])["embed_dim"] == rebuilt.embed_dim


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": {"train": "nowhere"}}, "data.train: nowhere does not exist"),
        ({"data": {"val": "nowhere"}}, "data.val: nowhere does not exist"),
        ({"optim": {"batch_size": 14}}, "needs 14 images, the data set has 13"),
        ({"optim": {"accumulate": 4}}, "optim.accumulate: a step needs 4 batches"),
        ({"model": {"img_size": 30}}, "model: img_size 30 .* 24 and 32"),
        ({"model": {"predict_ratio": 0.8}}, "model: predict_ratio 0.8 exceeds mask_ratio"),
        ({"model": {"mask_ratio": 0.99}}, "model: .*0 visible"),
        ({"runtime": {"device": "cuda:99"}}, "runtime.device: 'cuda:99'"),
        ({"schedule": {"warmup_epochs": 9}}, "schedule.warmup_epochs: 9"),
    ],
)
def test_bad_input_is_named_and_nothing_is_written(
    images: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        pretrain(make_config(images, tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


def test_a_truncated_image_stops_the_run_by_name(images: Path, tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for path in images.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "7.png").write_bytes((images / "7.png").read_bytes()[:60])
    with pytest.raises(UserError, match=r"7\.png: cannot be read"):
        pretrain(make_config(folder, tmp_path / "run"))
    assert not (tmp_path / "run").exists()
    with pytest.raises(UserError, match=r"7\.png: cannot be read"):  # found when its turn comes
        pretrain(make_config(folder, tmp_path / "run", data={"check": False}))
    assert complete_checkpoints(tmp_path / "run") == []


def test_a_loss_that_is_not_finite_stops_before_anything_is_saved(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = run_module.TrainingState
    forward, nan = state.forward_backward, float("nan")
    monkeypatch.setattr(state, "forward_backward", lambda *given, **named: forward(*given, **named) * nan)
    with pytest.raises(UserError, match="the loss is nan at step 1"):
        pretrain(make_config(images, tmp_path / "run"))
    assert complete_checkpoints(tmp_path / "run") == []


def test_a_used_folder_needs_resume_and_the_same_settings(images: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    pretrain(make_config(images, run, schedule={"max_steps": 1}))
    with pytest.raises(UserError, match=r"already holds a run .* --resume"):
        pretrain(make_config(images, run))
    with pytest.raises(UserError, match=r"other settings: .*optim\.base_lr was 0\.1, is 0\.2"):
        pretrain(make_config(images, run, optim={"base_lr": 0.2}), resume=True)


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stripes across or along, in folders train/ and val/ with one subfolder per class."""
    root = tmp_path_factory.mktemp("labelled")
    rng = np.random.default_rng(1)
    for split, count in (("train", 12), ("val", 6)):
        for name in ("across", "along"):
            (root / split / name).mkdir(parents=True)
            for index in range(count):
                wave = 127.5 + 100 * np.sin(np.arange(32) * rng.uniform(0.4, 0.9) + rng.uniform(0, 6))
                pixels = np.broadcast_to(wave[:, None] if name == "across" else wave, (32, 32))
                Image.fromarray(pixels.astype(np.uint8)).convert("RGB").save(root / split / name / f"{index}.png")
    return root


def log_lines(run: Path, key: str) -> list[tuple[int, float]]:
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [(line["step"], line[key]) for line in lines if key in line]


def judged(labelled: Path) -> dict[str, Any]:
    return {
        "data": {"val": str(labelled / "val")},
        "validation": {"every_epochs": 2},
        "probe": {
            "train": str(labelled / "train"),
            "val": str(labelled / "val"),
            "every_epochs": 2,
            "k": 3,
        },
        "log": {"pictures_every_steps": 5, "pictures": 2},
    }


def test_validation_and_probe_start_before_training_and_are_the_same_in_every_run(
    images: Path, labelled: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Fixed masks and crops: with another batch size, equal weights have an equal held-out loss."""
    for name, optim in (("one", {"batch_size": 4}), ("other", {"batch_size": 3, "accumulate": 2})):
        with caplog.at_level("INFO"):
            pretrain(make_config(images, tmp_path / name, **judged(labelled), optim=optim))
    one, other = (log_lines(tmp_path / name, "val_loss") for name in ("one", "other"))
    assert [step for step, _ in one] == [0, 6, 12]
    assert one[0][1] == pytest.approx(other[0][1], rel=1e-5)
    assert one[-1][1] < one[0][1]
    accuracies = log_lines(tmp_path / "one", "knn_accuracy")
    assert [step for step, _ in accuracies] == [0, 6, 12]
    assert all(0 <= value <= 1 for _, value in accuracies)
    assert "validation loss: " in caplog.text
    assert "kNN accuracy: " in caplog.text
    pictures = {
        f"{folder}/{path.stem}"
        for folder in ("reconstructions", "fusion")
        for path in (tmp_path / "one" / folder).iterdir()
    }
    steps = (0, 5, 10, 12)
    assert pictures == {f"{name}/step-{step:08d}" for name in ("reconstructions", "fusion") for step in steps}


def test_the_held_out_loss_is_the_mean_over_all_masked_patches(images: Path, labelled: Path, tmp_path: Path) -> None:
    """Equal to one forward pass over everything, whatever the batches and the predict ratio."""
    config = make_config(images, tmp_path / "run", **judged(labelled), schedule={"max_steps": 1})
    weights = pretrain(config)
    model = build(config)
    model.load_state_dict(load_file(weights))
    paths = sorted((labelled / "val").rglob("*.png"))
    pixels = torch.stack([torch.from_numpy(np.asarray(Image.open(path))).permute(2, 0, 1) for path in paths]) / 255
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (config.data.mean, config.data.std))
    noise = np.stack([np.random.default_rng([0, i]).random(16, dtype=np.float32) for i in range(len(paths))])
    expected = model((pixels - mean) / std, 0.75, 0.75, torch.from_numpy(noise)).loss.item()
    assert log_lines(tmp_path / "run", "val_loss")[-1][1] == pytest.approx(expected, rel=1e-4)


def test_ema_is_the_average_of_the_weights_and_survives_a_restart(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[torch.Tensor] = []
    step = run_module.TrainingState.update

    def spy(run: run_module.TrainingState, lr: float) -> None:
        step(run, lr)
        seen.append(run.model.cls_token.detach().clone())

    monkeypatch.setattr(run_module.TrainingState, "update", spy)
    optim = {"ema": 0.5}
    pretrain(make_config(images, tmp_path / "whole", optim=optim))
    expected = seen[0]
    for count, value in enumerate(seen[1:], start=1):
        decay = min(1 - (1 + count) ** (-2 / 3), 0.5)  # warms up, so that the random start is forgotten
        expected = decay * expected + (1 - decay) * value
    averaged = load_file(tmp_path / "whole" / "model_ema.safetensors")
    torch.testing.assert_close(averaged["cls_token"], expected)
    pretrain(make_config(images, tmp_path / "parts", optim=optim, schedule={"max_steps": 5}))
    pretrain(make_config(images, tmp_path / "parts", optim=optim), resume=True)
    again = load_file(tmp_path / "parts" / "model_ema.safetensors")
    assert all(torch.equal(averaged[name], again[name]) for name in averaged)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_follows_full_precision_and_resumes_to_the_bit(
    images: Path, tmp_path: Path, precision: str
) -> None:
    runtime = {"precision": precision}
    pretrain(make_config(images, tmp_path / "full"))
    pretrain(make_config(images, tmp_path / "whole", runtime=runtime, optim={"clip_grad": 1e3}))
    full, half = (dict(log_lines(tmp_path / name, "loss")) for name in ("full", "whole"))
    assert half != full
    assert list(half.values()) == pytest.approx(list(full.values()), rel=0.02)
    pretrain(
        make_config(images, tmp_path / "parts", runtime=runtime, optim={"clip_grad": 1e3}, schedule={"max_steps": 4})
    )
    pretrain(make_config(images, tmp_path / "parts", runtime=runtime, optim={"clip_grad": 1e3}), resume=True)
    assert_same(digest(tmp_path / "whole"), digest(tmp_path / "parts"))


def test_fp16_stops_after_too_many_skipped_steps(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_module, "MAX_SKIPPED", 3)
    forward = run_module.TrainingState.forward_backward

    def explode(run: run_module.TrainingState, *given: Any, **named: Any) -> torch.Tensor:
        loss = forward(run, *given, **named)
        run.model.cls_token.grad.fill_(float("inf"))
        return loss

    monkeypatch.setattr(run_module.TrainingState, "forward_backward", explode)
    with pytest.raises(UserError, match=r"fp16 skipped 3 steps in a row up to step 3.*bf16 or fp32"):
        pretrain(make_config(images, tmp_path / "run", runtime={"precision": "fp16"}, log={"every_steps": 1}))


def test_activation_checkpointing_changes_nothing_but_memory(images: Path, tmp_path: Path) -> None:
    for name, on in (("plain", False), ("again", True)):
        pretrain(
            make_config(images, tmp_path / name, runtime={"activation_checkpointing": on}, schedule={"max_steps": 3})
        )
    assert_same(digest(tmp_path / "plain"), digest(tmp_path / "again"))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_compiled_step_has_no_graph_break_and_trains_the_same(
    images: Path, labelled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    """`fullgraph=True` refuses a break; validation, of other shapes, does not make the step compile again."""
    settings = judged(labelled) | {"schedule": {"epochs": 2}, "optim": {"ema": 0.9}}
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    compile_ = partial(torch.compile, backend=backend, fullgraph=True)
    monkeypatch.setattr(torch, "compile", compile_)
    torch.compiler.reset()
    for name, on in (("eager", False), ("compiled", True)):
        runtime = {"precision": precision, "compile": on, "activation_checkpointing": on and precision == "fp32"}
        pretrain(make_config(images, tmp_path / name, **settings, runtime=runtime))
    assert len(graphs) == 1
    for key in ("loss", "val_loss"):
        eager, compiled = (log_lines(tmp_path / name, key) for name in ("eager", "compiled"))
        assert [v for _, v in compiled] == pytest.approx([v for _, v in eager], rel=1e-3)


def test_no_micro_batch_is_dropped(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """3 batches per epoch, 3 epochs, 2 in a step: 9 batches in 5 steps, the last of one batch with its whole weight."""
    used: list[int] = []
    forward = run_module.TrainingState.forward_backward

    def spy(run: run_module.TrainingState, loss: Any, batch: Any, number: int, *given: Any) -> torch.Tensor:
        assert number == len(used)
        used.append(given[0])
        return forward(run, loss, batch, number, *given)

    monkeypatch.setattr(run_module.TrainingState, "forward_backward", spy)
    pretrain(make_config(images, tmp_path / "run", optim={"accumulate": 2}, schedule={"epochs": 3}))
    assert used == [2] * 8 + [1]
    record = json.loads((tmp_path / "run/checkpoints/step-00000005/run.json").read_text())
    assert record["batches_consumed"] == 9


def test_broken_images_are_replaced_counted_and_listed_and_the_budget_holds(
    images: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for path in images.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    for name in ("3.png", "7.png"):
        (folder / name).write_bytes(b"\x89PNG nothing")
    data = {"broken": "substitute", "broken_budget": 0.2}
    for name, more in (("checked", {}), ("unchecked", {"check": False}), ("workers", {"check": False, "workers": 1})):
        pretrain(make_config(folder, tmp_path / name, data=data | more))
        rows = [json.loads(line) for line in (tmp_path / name / "broken.jsonl").read_text().splitlines()]
        assert sorted(Path(row["name"]).name for row in rows) == ["3.png", "7.png"]
        assert all("cannot be read" in row["reason"] for row in rows)
    assert_same(digest(tmp_path / "checked"), digest(tmp_path / "unchecked"))
    assert_same(digest(tmp_path / "checked"), digest(tmp_path / "workers"))
    assert "2 so far" in caplog.text
    with pytest.raises(UserError, match=r"2 of 13 images are broken, data.broken_budget allows 1; they are listed in"):
        pretrain(make_config(folder, tmp_path / "over", data=data | {"broken_budget": 0.1}))


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (4, "RGBA")])
@pytest.mark.parametrize("bit_depth", [8, 16])
def test_any_number_of_channels_from_file_to_picture(tmp_path: Path, channels: int, mode: str, bit_depth: int) -> None:
    (tmp_path / "images").mkdir()
    rng = np.random.default_rng(0)
    for index in range(8):
        pixels = rng.integers(0, 256, (40, 24, channels), np.uint8)
        Image.fromarray(pixels.squeeze(), mode).save(tmp_path / "images" / f"{index}.png")
    statistics = {"mean": [0.5] * channels, "std": [0.3] * channels, "bit_depth": bit_depth}
    model = {"in_chans": channels, "img_size": [40, 24]}
    once: dict[str, Any] = {"schedule": {"max_steps": 1}, "log": {"pictures": 2}}
    config = make_config(tmp_path / "images", tmp_path / "run", data=statistics, model=model, **once)
    weights = pretrain(config)
    assert load_file(weights)["patch_embed.proj.weight"].shape[1] == channels
    assert (tmp_path / "run/reconstructions/step-00000001.png").is_file()
    with safe_open(weights, "pt") as file:
        assert file.metadata()["bit_depth"] == str(bit_depth)


def test_a_run_starts_from_given_weights(images: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """From the same model everything, from another decoder or grid the encoder; a foreign encoder is refused whole."""
    first = pretrain(make_config(images, tmp_path / "first", schedule={"max_steps": 2}))
    source = load_file(first)
    with caplog.at_level("INFO"):
        config = make_config(images, tmp_path / "same", model={"init": first})
        model = build(config)
        train_module.start_from(model, first, arguments(config), config.data)
        assert all(torch.equal(tensor, source[name]) for name, tensor in model.state_dict().items())
        assert "the whole model comes from" in caplog.text

        config = make_config(images, tmp_path / "other", model={"decoder_depth": 1, "img_size": [64, 32]})
        model = build(config)
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        train_module.start_from(model, first, arguments(config), config.data)
    state = model.state_dict()
    blocks = [name for name in state if name.startswith(("blocks.", "patch_embed.", "cls_token"))]
    assert all(torch.equal(state[name], source[name]) for name in blocks)
    assert all(torch.equal(state[name], before[name]) for name in state if name not in blocks)
    assert "the encoder comes from" in caplog.text
    assert "sine-cosine positions made again, 4 x 4 to 8 x 4" in caplog.text
    config = make_config(images, tmp_path / "wide", model={"embed_dim": 32})
    model = build(config)
    with pytest.raises(UserError, match=r"embed_dim 16, but the model expects embed_dim 32"):
        train_module.start_from(model, first, arguments(config), config.data)
    pretrain(make_config(images, tmp_path / "run", model={"init": first}, schedule={"max_steps": 1}))
    # A step at the first step's learning rate, 0: the weights are still those it started from.
    assert all(
        torch.equal(tensor, source[name]) for name, tensor in load_file(tmp_path / "run/model.safetensors").items()
    )
    assert recorded_licence(tmp_path / "run/model.safetensors") is None


def test_the_licence_of_weights_goes_with_what_is_trained_from_them(images: Path, tmp_path: Path) -> None:
    first = pretrain(make_config(images, tmp_path / "first", schedule={"max_steps": 1}))
    torch.save({"model": load_file(first)}, tmp_path / "published.pth")  # without the record of our own training
    settings: dict[str, Any] = {"model": {"init": tmp_path / "published.pth"}}
    pretrain(make_config(images, tmp_path / "run", **settings, schedule={"max_steps": 1}))
    assert recorded_licence(tmp_path / "run/model.safetensors") == NON_COMMERCIAL
    (tmp_path / "published.pth").unlink()
    pretrain(make_config(images, tmp_path / "run", **settings, schedule={"max_steps": 2}), resume=True)
    assert recorded_licence(tmp_path / "run/model.safetensors") == NON_COMMERCIAL


@pytest.mark.parametrize("shuffle_shards", [None, 2])
def test_shards_train_like_files_and_resume_to_the_bit(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shuffle_shards: int | None
) -> None:
    """The same images in the same order give the same run; a pool of shards gives another order, resumed as exactly."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    paths = sorted(images.iterdir())
    for number in range(4):
        with tarfile.open(tmp_path / f"s-{number}.tar", "w") as tar:
            for path in paths[4 * number : 4 * number + 4]:
                tar.add(path, path.name)
    data = {"train": str(tmp_path / "s-{0..3}.tar"), "shuffle_shards": shuffle_shards}
    pretrain(make_config(images, tmp_path / "files"))
    pretrain(make_config(images, tmp_path / "whole", data=data))
    pretrain(make_config(images, tmp_path / "parts", data=data, schedule={"max_steps": 5}))
    pretrain(make_config(images, tmp_path / "parts", data=data | {"workers": 2}), resume=True)
    files, whole, parts = (digest(tmp_path / name) for name in ("files", "whole", "parts"))
    assert_same(whole, parts)
    assert (files["curve"] == whole["curve"]) is (shuffle_shards is None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": {"val": "nowhere"}}, r"data.val: nowhere does not exist .*. To do without: data.val=null"),
        ({"probe": {"train": "nowhere", "val": "{val}"}}, r"probe.train: .*To do without: probe.train=null"),
        (
            {"probe": {"train": "{train}", "val": "{images}"}},
            r"probe.train has the classes across, along \(2\), .*none",
        ),
        ({"probe": {"train": "{train}", "val": "{val}", "k": 30}}, r"probe.k: 30 neighbours of 24 images"),
        ({"model": {"init": "nowhere"}}, r"no such file or folder: nowhere"),
    ],
)
def test_what_judges_or_starts_a_run_is_looked_at_before_it(
    images: Path, labelled: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    places = {"{train}": str(labelled / "train"), "{val}": str(labelled / "val"), "{images}": str(images)}
    named = {
        section: {key: places.get(str(value), value) for key, value in keys.items()}
        for section, keys in changes.items()
    }
    with pytest.raises(UserError, match=message):
        pretrain(make_config(images, tmp_path / "run", **named))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("number", "outcome", "workers"), [("SIGINT", KeyboardInterrupt, 1), ("SIGTERM", SystemExit, 0)]
)
def test_a_signal_ends_the_run_after_the_step_and_nothing_is_lost(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: str, outcome: Any, workers: int
) -> None:
    """Also in the middle of a step of two batches, and of the losses of a line of the log."""
    settings: dict[str, Any] = {
        "data": {"workers": workers},
        "log": {"every_steps": 4},
        "optim": {"batch_size": 2, "accumulate": 2, "ema": 0.9},
    }
    pretrain(make_config(images, tmp_path / "whole", **settings))
    forward = run_module.TrainingState.forward_backward

    waiting = ["the first batch of step 5"]

    def interrupted(run: run_module.TrainingState, *given: Any, **named: Any) -> torch.Tensor:
        if run.step == 4 and waiting:
            waiting.clear()
            signal.raise_signal(getattr(signal, number))
        return forward(run, *given, **named)

    config = make_config(images, tmp_path / "parts", **settings, checkpoint={"every_epochs": 4})
    monkeypatch.setattr(run_module.TrainingState, "forward_backward", interrupted)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where tests run in the background
    try:
        with pytest.raises(outcome):
            pretrain(config)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    assert [folder.name for folder in complete_checkpoints(tmp_path / "parts")] == ["step-00000005"]
    pretrain(config, resume=True)
    whole, parts = (digest(tmp_path / name) for name in ("whole", "parts"))
    assert len(whole.pop("curve")) > len(parts["curve"])  # the whole run wrote a line at its own checkpoints, too
    by_step = dict(log_lines(tmp_path / "parts", "loss"))
    assert set(by_step) == {4, 8, 12}
    assert_same(whole | {"curve": parts["curve"]}, parts)


@pytest.mark.parametrize("suffix", ["", "_ema"])
def test_weights_that_are_not_finite_are_never_saved(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    """A finite loss before the update says nothing of the weights after it."""
    step = run_module.TrainingState.update

    def explode(run: run_module.TrainingState, lr: float) -> None:
        step(run, lr)
        if run.step == 6:
            run.models[suffix].cls_token.data.fill_(float("nan"))

    monkeypatch.setattr(run_module.TrainingState, "update", explode)
    with pytest.raises(
        UserError,
        match=rf"a weight is not finite after step 6; the last checkpoint stays\. model{suffix}: 1 of .*: cls_token\.",
    ):
        pretrain(make_config(images, tmp_path / "run", checkpoint={"keep": 1}, optim={"ema": 0.9}))
    assert [folder.name for folder in complete_checkpoints(tmp_path / "run")] == ["step-00000003"]


def test_a_resumed_run_knows_its_first_loss(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or the health check would take a loss that fell long ago for one that does not move."""
    firsts: set[float] = set()

    class Spy(train_module.Health):
        def warnings(self, share: float, loss: float, first: float) -> list[str]:
            firsts.add(first)
            return super().warnings(share, loss, first)

    monkeypatch.setattr(train_module, "Health", Spy)
    pretrain(make_config(images, tmp_path / "run", schedule={"max_steps": 6}))
    pretrain(make_config(images, tmp_path / "run"), resume=True)
    assert firsts == {log_lines(tmp_path / "run", "loss")[0][1]}


@pytest.mark.parametrize(
    ("rule", "factor", "words"),
    [
        ("published", 1 / 3, "base_lr 0.001 * 64 / 256 * 0.25 / 0.75 (lr_rule published: predict / mask ratio)"),
        ("none", 1.0, "base_lr 0.001 * 64 / 256 (lr_rule none)"),
        ("inverse", 3.0, "base_lr 0.001 * 64 / 256 * 0.75 / 0.25 (lr_rule inverse: mask / predict ratio)"),
    ],
)
def test_the_learning_rate_rule_is_logged_as_arithmetic(rule: str, factor: float, words: str) -> None:
    optim = make_config(Path("images"), Path("out"), optim={"base_lr": 1e-3, "lr_rule": rule}).optim
    assert train_module.LR_RULES[rule](0.75, 0.25) == pytest.approx(factor)  # method specification, 1.9
    assert train_module.lr_rule(optim, 64, 0.75, 0.25) == words


def test_settings_without_effect_are_named() -> None:
    quiet = make_config(Path("images"), Path("out"))
    assert quiet.ignored(is_plain=False, has_shards=False) == {}
    loud = make_config(
        Path("images"),
        Path("out"),
        model={"decoder": "self", "fuse_input": False},
        optim={"lr": 1e-3, "lr_rule": "none"},
        validation={"images": 5},
        probe={"k": 3},
        data={"broken_budget": 0.5, "shuffle_shards": 3},
    )
    found = loud.ignored(is_plain=True, has_shards=False)
    assert sorted(key for keys in found.values() for key in keys) == [
        "data.broken_budget",
        "data.shuffle_shards",
        "model.fuse_input",
        "optim.base_lr",
        "optim.lr_rule",
        "probe.k",
        "validation.images",
    ]


def test_a_complete_run_only_gets_its_weights_back(images: Path, tmp_path: Path) -> None:
    config = make_config(images, tmp_path / "run", optim={"ema": 0.9}, schedule={"max_steps": 3})
    weights = pretrain(config)
    before = {name: (tmp_path / "run" / name).read_bytes() for name in ("model.safetensors", "log.jsonl")}
    averaged = load_file(tmp_path / "run" / "model_ema.safetensors")
    for name in ("model.safetensors", "model_ema.safetensors"):
        (tmp_path / "run" / name).unlink()
    assert pretrain(config, resume=True) == weights
    assert {name: (tmp_path / "run" / name).read_bytes() for name in before} == before
    again = load_file(tmp_path / "run" / "model_ema.safetensors")
    assert all(torch.equal(averaged[name], again[name]) for name in averaged)


def test_a_fresh_start_forgets_an_earlier_try(images: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "log.jsonl").write_text('{"step": 0, "val_loss": 9}\n')
    (run / "broken.jsonl").write_text('{"name": "old.png", "reason": "gone"}\n' * 5)
    pretrain(make_config(images, run, data={"broken": "substitute"}, schedule={"max_steps": 1}))
    assert "val_loss" not in (run / "log.jsonl").read_text()
    assert not (run / "broken.jsonl").exists()


def test_many_channels_pass_the_check_of_images(tmp_path: Path) -> None:
    tifffile = pytest.importorskip("tifffile")
    (tmp_path / "images").mkdir()
    for index in range(4):
        pixels = np.random.default_rng(index).integers(0, 65536, (5, 40, 40), np.uint16)
        tifffile.imwrite(tmp_path / "images" / f"{index}.tif", pixels, photometric="minisblack")
    data = {"mean": [0.5] * 5, "std": [0.3] * 5, "bit_depth": 16}
    config = make_config(
        tmp_path / "images", tmp_path / "run", data=data, model={"in_chans": 5}, schedule={"max_steps": 1}
    )
    assert load_file(pretrain(config))["patch_embed.proj.weight"].shape[1] == 5


def test_a_decoder_of_another_kind_is_not_taken_over(
    images: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Shapes do not show the number of heads, which maps were fused, or what was predicted."""
    first = pretrain(make_config(images, tmp_path / "first", schedule={"max_steps": 1}))
    for changes in ({"decoder_num_heads": 4}, {"norm_pix_loss": False}):
        config = make_config(images, tmp_path / "other", model=changes)
        model = build(config)
        before = model.mask_token.clone()
        with caplog.at_level("INFO"):
            train_module.start_from(model, first, arguments(config), config.data)
        assert torch.equal(model.mask_token, before)
        assert f"the file's model has other {next(iter(changes))}" in caplog.text


def test_what_flatters_or_loses_is_told(images: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    deep = tmp_path / "deep"
    deep.mkdir()
    for index in range(4):
        Image.fromarray(np.full((40, 40), 3000 + index, np.uint16)).save(deep / f"{index}.png")
    pretrain(make_config(deep, tmp_path / "one", data={"val": str(deep)}, schedule={"max_steps": 1}))
    assert "4 of 4 images of data.val are also in data.train" in caplog.text
    assert "0.png has more than 8 bits, which are cut; data.bit_depth=16 keeps them" in caplog.text


@pytest.mark.slow
def test_two_processes_equal_one_and_resume_to_the_bit(images: Path, labelled: Path, tmp_path: Path) -> None:
    """Two processes with half the batch each see the same images as one: equal curves and weights up to rounding."""
    single = make_config(images, tmp_path / "single", **judged(labelled))
    pretrain(single)
    half = make_config(images, tmp_path / "half", **judged(labelled), optim={"batch_size": 2})
    path = tmp_path / "half.yaml"
    path.write_text(yaml.safe_dump(half.model_dump(mode="json")))

    def launch(*words: str) -> None:
        module = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        command = [*module, str(ROOT / "tools/pretrain.py"), "--config-file", str(path), *words]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        assert done.returncode == 0, done.stderr[-3000:]

    launch()
    for key in ("loss", "val_loss", "knn_accuracy"):
        one, two = (log_lines(tmp_path / name, key) for name in ("single", "half"))
        assert [step for step, _ in one] == [step for step, _ in two]
        assert [v for _, v in two] == pytest.approx([v for _, v in one], rel=1e-4)
    weights = {name: load_file(tmp_path / name / "model.safetensors") for name in ("single", "half")}
    for name, tensor in weights["single"].items():
        torch.testing.assert_close(weights["half"][name], tensor, rtol=1e-3, atol=2e-4)  # Adam enlarges rounding
    whole = digest(tmp_path / "half")
    launch(f"output_dir={tmp_path / 'parts'}", "schedule.max_steps=4")
    launch(f"output_dir={tmp_path / 'parts'}", "--resume")
    assert_same(whole, digest(tmp_path / "parts"))
    with pytest.raises(UserError, match="processes was 2, is 1"):
        pretrain(half, resume=True)


def test_processes_without_an_address_are_an_error(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match=r"RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT not set: .*torchrun"):
        pretrain(make_config(images, tmp_path / "run"))
