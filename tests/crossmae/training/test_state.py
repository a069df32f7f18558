"""Proves averaged weights and half precision, and that nothing is saved that is not finite."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from crossmae.checkpoints.run_checkpoint import complete_checkpoints
from crossmae.errors import UserError
from crossmae.pretraining.train import pretrain
from crossmae.training import state as run_module
from tests.crossmae.pretraining.runs import assert_same, digest, log_lines, make_config


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

    def explode(run: run_module.TrainingState, *given: Any, **named: Any) -> run_module.Losses:
        loss = forward(run, *given, **named)
        run.model.cls_token.grad.fill_(float("inf"))
        return loss

    monkeypatch.setattr(run_module.TrainingState, "forward_backward", explode)
    with pytest.raises(
        UserError, match=r"after step 2 .*scale 8192\): fp16 skipped 3 steps in a row, .*precision=fp32"
    ):
        pretrain(make_config(images, tmp_path / "run", runtime={"precision": "fp16"}, log={"every_steps": 1}))


def test_a_loss_that_is_not_finite_stops_before_anything_is_saved(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = run_module.TrainingState
    forward, nan = state.forward_backward, float("nan")
    monkeypatch.setattr(state, "forward_backward", lambda *given: {"loss": forward(*given)["loss"] * nan})
    with pytest.raises(UserError, match=r"diverged after step 1 .*: loss is nan\. The last checkpoint stays"):
        pretrain(make_config(images, tmp_path / "run", log={"every_steps": 1}))
    assert complete_checkpoints(tmp_path / "run") == []


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
        match=rf"after step 6 .*: a weight is not finite \(model{suffix}: 1 of .*: cls_token\)\.",
    ):
        pretrain(make_config(images, tmp_path / "run", checkpoint={"keep": 1}, optim={"ema": 0.9}))
    assert [folder.name for folder in complete_checkpoints(tmp_path / "run")] == ["step-00000003"]


@pytest.mark.parametrize("change", ["missing", "left over", "another shape"])
def test_a_checkpoint_that_does_not_fit_the_model_is_refused(tmp_path: Path, change: str) -> None:
    """Nothing is resumed in part: the file of a checkpoint has the tensors of its run, or is of another model."""
    model, path = nn.Linear(3, 2), tmp_path / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    save_file(tensors, path)
    run_module.restore_weights(model, path)
    if change == "missing":
        del tensors["bias"]
    else:
        tensors["more" if change == "left over" else "bias"] = torch.zeros(5)
    save_file(tensors, path)
    with pytest.raises(UserError, match=r"model\.safetensors: does not fit the config: .*(bias|more).*\. Resume with"):
        run_module.restore_weights(model, path)
