"""Proves that pretraining learns, writes what it promises, and refuses bad input."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError
from safetensors import safe_open
from safetensors.torch import load_file

from crossmae.checkpoints.pretrained import load_pretrained
from crossmae.checkpoints.run_checkpoint import complete_checkpoints
from crossmae.data.pixels import Normalize
from crossmae.errors import UserError
from crossmae.models.crossmae import create_model
from crossmae.pretraining.reconstruction import reconstruct
from crossmae.pretraining.train import lr_factor, parameter_groups, pretrain
from crossmae.training import state
from crossmae.training.devices import compile_blocks, compile_obstacle
from tests.crossmae.pretraining.runs import assert_same, digest, judged, log_lines, make_config


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
        ({"optim": {"batch_size": 14}}, "needs 14 images, the data set has 13"),
        ({"optim": {"accumulate": 4}}, "optim.accumulate: a step needs 4 batches"),
        ({"model": {"img_size": 30}}, "model: img_size 30 .* 24 and 32"),
        ({"model": {"predict_ratio": 0.8}}, "model: predict_ratio 0.8 exceeds mask_ratio"),
        ({"model": {"mask_ratio": 0.99}}, "model: .*0 visible"),
        ({"runtime": {"device": "cuda:99"}}, "runtime.device: 'cuda:99'"),
        ({"schedule": {"warmup_epochs": 9}}, "schedule.warmup_epochs: 9"),
        ({"data": {"val": "nowhere"}}, r"data.val: nowhere does not exist .*. To do without: data.val=null"),
        ({"probe": {"train": "nowhere", "val": "{val}"}}, r"probe.train: .*To do without: probe.train=null"),
        (
            {"probe": {"train": "{train}", "val": "{images}"}},
            r"probe.train: .* across, along \(2\), but .*none",
        ),
        ({"probe": {"train": "{train}", "val": "{val}", "k": 30}}, r"probe.k: 30 neighbours of 24 images"),
        ({"model": {"init": "nowhere"}}, r"model.init: nowhere: no such file or folder"),
    ],
)
def test_bad_input_is_named_and_nothing_is_written(
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


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores")  # torch's advice about fp32
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_run_on_a_gpu_compiles_its_blocks_and_trains_the_same(
    images: Path, labelled: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, precision: str
) -> None:
    """Not run on a GPU yet. `auto` compiles, evaluations included in the run do not."""
    if obstacle := compile_obstacle(torch.device("cuda")):
        pytest.skip(obstacle)
    settings = judged(labelled) | {"schedule": {"epochs": 2}, "optim": {"ema": 0.9, "clip_grad": 1.0}}
    for compiled in (False, "auto"):
        caplog.clear()
        runtime = {"device": "cuda", "precision": precision, "compile": compiled}
        with caplog.at_level("INFO"):
            pretrain(make_config(images, tmp_path / str(compiled), **settings, runtime=runtime))
        assert ("the blocks are compiled" in caplog.text) == (compiled == "auto")
    for key in ("loss", "val_loss"):
        eager, found = (log_lines(tmp_path / name, key) for name in ("False", "auto"))
        assert [v for _, v in found] == pytest.approx([v for _, v in eager], rel=2e-2)


# torch hides this warning of its own access, but not from pytest, which turns it into an error.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_compiled_step_has_no_graph_break_and_trains_the_same(
    images: Path,
    labelled: Path,
    tmp_path: Path,
    graphs: list[Any],
    caplog: pytest.LogCaptureFixture,
    precision: str,
) -> None:
    """`fullgraph=True` refuses a break; blocks share their code; evaluations of other shapes compile nothing."""
    settings = judged(labelled) | {"schedule": {"epochs": 2}, "optim": {"ema": 0.9}}
    for name, on in (("eager", False), ("compiled", True)):
        runtime = {"precision": precision, "compile": on, "activation_checkpointing": on and precision == "fp32"}
        with caplog.at_level("INFO"):
            pretrain(make_config(images, tmp_path / name, **settings, runtime=runtime))
        assert ("the blocks are compiled" in caplog.text) == on
    assert len(graphs) == 3  # a block of the encoder, a block of the decoder, the mix of the maps
    for key in ("loss", "val_loss"):
        eager, compiled = (log_lines(tmp_path / name, key) for name in ("eager", "compiled"))
        assert [v for _, v in compiled] == pytest.approx([v for _, v in eager], rel=1e-3)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_blocks_that_cannot_be_compiled_are_an_error_with_advice(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def backend(graph: Any, inputs: Any) -> Any:
        raise ValueError("no such instruction")

    monkeypatch.setattr(state, "compile_blocks", partial(compile_blocks, backend=backend))
    torch.compiler.reset()
    config = make_config(images, tmp_path / "run", runtime={"compile": True})
    with pytest.raises(UserError, match=r"compile: torch cannot compile .*no such instruction.*compile=false\.$"):
        pretrain(config)


@pytest.mark.parametrize(
    ("channels", "mode", "bit_depth"), [(1, "L", 8), (1, "L", 16), (4, "RGBA", 8), (4, "RGBA", 16), (5, None, 16)]
)
def test_any_number_of_channels_from_file_to_picture(
    tmp_path: Path, channels: int, mode: str | None, bit_depth: int
) -> None:
    (tmp_path / "images").mkdir()
    rng = np.random.default_rng(0)
    for index in range(8):
        pixels = rng.integers(0, 256, (40, 24, channels), np.uint8)
        if mode is None:
            tifffile = pytest.importorskip("tifffile")
            planes = np.moveaxis(pixels, -1, 0).astype(np.uint16)
            tifffile.imwrite(tmp_path / f"images/{index}.tif", planes, photometric="minisblack")
        else:
            Image.fromarray(pixels.squeeze(), mode).save(tmp_path / f"images/{index}.png")
    statistics = {"mean": [0.5] * channels, "std": [0.3] * channels, "bit_depth": bit_depth}
    model = {"in_chans": channels, "img_size": [40, 24]}
    once: dict[str, Any] = {"schedule": {"max_steps": 1}, "log": {"pictures": 2}}
    config = make_config(tmp_path / "images", tmp_path / "run", data=statistics, model=model, **once)
    weights = pretrain(config)
    assert load_file(weights)["patch_embed.proj.weight"].shape[1] == channels
    assert (tmp_path / "run/reconstructions/step-00000001.png").is_file()
    with safe_open(weights, "pt") as file:
        assert file.metadata()["bit_depth"] == str(bit_depth)


@pytest.mark.parametrize(
    ("rule", "factor", "words"),
    [
        ("published", 1 / 3, " * 0.25 / 0.75 (lr_rule published: predict / mask ratio)"),
        ("none", 1.0, " (lr_rule none)"),
        ("inverse", 3.0, " * 0.75 / 0.25 (lr_rule inverse: mask / predict ratio)"),
    ],
)
def test_the_learning_rate_rule_is_logged_as_arithmetic(rule: str, factor: float, words: str) -> None:
    assert lr_factor(rule, 0.75, 0.25) == (pytest.approx(factor), words)  # method specification, 1.9


def test_what_flatters_or_loses_is_told(images: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    deep = tmp_path / "deep"
    deep.mkdir()
    for index in range(4):
        Image.fromarray(np.full((40, 40), 3000 + index, np.uint16)).save(deep / f"{index}.png")
    pretrain(make_config(deep, tmp_path / "one", data={"val": str(deep)}, schedule={"max_steps": 1}))
    assert "4 of 4 images of data.val are also in data.train" in caplog.text
    assert "0.png has more than 8 bits, which are cut; data.bit_depth=16 keeps them" in caplog.text


def test_vit_base_has_the_published_groups() -> None:
    with torch.device("meta"):
        model = create_model("crossmae_vit_base_patch16")
    without, with_decay = parameter_groups(model, 0.05)
    assert (len(without["params"]), len(with_decay["params"])) == (232, 113)
    assert (without["weight_decay"], with_decay["weight_decay"]) == (0.0, 0.05)
    trainable = {id(p) for p in model.parameters() if p.requires_grad}
    assert {id(p) for group in (without, with_decay) for p in group["params"]} == trainable
    decayed = {id(p) for p in with_decay["params"]}
    assert {id(model.cls_token), id(model.mask_token), id(model.wfm.linear.weight)} <= decayed


@pytest.mark.parametrize("decoder", ["cross", "self"])
def test_mask_blocks_and_class_tokens_hold_from_the_run_to_its_pictures(
    labelled: Path, tmp_path: Path, decoder: str
) -> None:
    """Training, held-out loss, neighbours, pictures and the reloaded model agree, and a run resumes to the bit."""
    settings = judged(labelled)
    settings["model"] = {"decoder": decoder, "mask_block": 2, "class_tokens": 3}
    settings["probe"]["pool"] = "cls"
    train = labelled / "train"
    weights = pretrain(make_config(train, tmp_path / "whole", **settings))
    pretrain(make_config(train, tmp_path / "parts", **settings, schedule={"max_steps": 7}))
    pretrain(make_config(train, tmp_path / "parts", **settings), resume=True)
    assert_same(digest(tmp_path / "whole"), digest(tmp_path / "parts"))
    for key in ("val_loss", "knn_accuracy"):
        whole, parts = (log_lines(tmp_path / run, key) for run in ("whole", "parts"))
        assert len(whole) == 3
        assert set(whole) <= set(parts)  # the part that ended early measured once more, where it ended
    assert list((tmp_path / "whole/reconstructions").iterdir())

    pretrained = load_pretrained(weights)
    stored = load_file(weights)
    assert all(torch.equal(tensor, stored[name]) for name, tensor in pretrained.model.state_dict().items())
    assert stored["cls_token"].shape == (1, 3, 16)
    assert len(stored["cls_token"][0].unique(dim=0)) == 3
    normalize = Normalize(pretrained.mean, pretrained.std, torch.device("cpu"))
    images, noise = torch.rand(3, 3, 32, 32), torch.rand(3, 16)
    panels = reconstruct(pretrained.model, images, 0.75, noise, normalize)
    hidden = torch.nn.functional.avg_pool2d(panels.hidden.float(), 16)  # blocks of 2 x 2 patches of 8 pixels
    assert hidden.flatten(1).sort().values.tolist() == 3 * [[0.0, 1.0, 1.0, 1.0]]
    assert torch.equal(torch.where(panels.hidden, 0.0, panels.pasted - panels.input), torch.zeros_like(images))


def test_options_that_do_not_fit_are_named_and_those_that_are_off_are_not_recorded(
    images: Path, tmp_path: Path
) -> None:
    for changes, message in (
        ({"mask_block": 3}, r"model: mask_block 3 does not divide the 4 x 4 patches .* Choose mask_block from 1, 2,"),
        ({"mask_block": 4}, "into several blocks"),
    ):
        with pytest.raises(UserError, match=message):
            pretrain(make_config(images, tmp_path / "run", model=changes))
        assert not (tmp_path / "run").exists()
    for section, key, value in (
        ("model", "mask_block", 0),
        ("model", "class_tokens", 0),
        ("model", "class_tokens", 65),
        ("optim", "name", "sgd"),
    ):
        with pytest.raises(ValidationError, match=rf"{section}.{key}"):
            make_config(images, tmp_path / "run", **{section: {key: value}})
    first = pretrain(make_config(images, tmp_path / "run", schedule={"max_steps": 1}))
    with safe_open(first, "pt") as file:
        assert not {"mask_block", "class_tokens"} & json.loads(file.metadata()["model"]).keys()
    with pytest.raises(UserError, match=r"model.init: .* has 1 class token\. Set model.class_tokens=1"):
        pretrain(make_config(images, tmp_path / "other", model={"init": first, "class_tokens": 2}))
    model = {"init": first, "mask_block": 2}
    pretrain(make_config(images, tmp_path / "blocks", model=model, schedule={"max_steps": 1}))
    start, end = (load_file(tmp_path / name / "model.safetensors") for name in ("run", "blocks"))
    assert all(torch.equal(start[name], end[name]) for name in start)  # the decoder, too; the first rate is 0
