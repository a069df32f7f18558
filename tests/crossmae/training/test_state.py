"""Proves averaged weights and half precision, and that nothing is saved that is not finite."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from crossmae.checkpoints.run_checkpoint import complete_checkpoints
from crossmae.errors import UserError
from crossmae.pretraining.train import pretrain
from crossmae.training import loop
from crossmae.training import state as run_module
from crossmae.training.processes import Ranks
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


class ClippingAdamW(torch.optim.AdamW):
    """An optimizer that clips in its step, like detectron2's."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                nn.utils.clip_grad_norm_(parameter, 0.1)
        super().step(closure)


def small_state(
    kind: type[torch.optim.AdamW], clip: float | None, check_every: int, device: str = "cpu"
) -> run_module.TrainingState:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 3)).to(device)
    optimizer = kind(model.parameters(), lr=0.1, fused=True)
    values = ("fp32", 0.9, clip, False, None)
    return run_module.TrainingState(model, optimizer, Ranks(), *values, check_every=check_every)


def square_loss(model: nn.Module, batch: torch.Tensor, number: int) -> run_module.Losses:
    return {"loss": model(batch).square().mean()}


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("kind", [torch.optim.AdamW, ClippingAdamW])
@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize("bad", [None, 0, 3])
def test_a_deferred_check_leaves_the_state_before_the_first_bad_step(
    kind: type[torch.optim.AdamW], clip: float | None, bad: int | None, device: str
) -> None:
    """Good steps equal those of a check in every step, to the bit, and steps after a bad one change nothing."""
    batches = torch.randn(8, 5, 4, generator=torch.Generator().manual_seed(1)).to(device)
    checked, deferred = (small_state(kind, clip, every, device) for every in (1, 100))
    for number, batch in enumerate(batches):
        for state in (checked, deferred):
            if state is checked and bad is not None and number >= bad:
                continue
            state.forward_backward(square_loss, batch, number, 1, True)
            if number == bad:
                state.model[2].bias.grad[1] = float("inf")
            state.update(0.1)
    assert deferred.step == 8
    assert len(deferred.unread) == 8
    if bad is None:
        deferred.check_gradients()
    else:
        message = r"gradient is inf \(1 of 4 tensors hold NaN or infinity: 2\.bias\)"
        with pytest.raises(run_module.Diverged, match=message) as error:
            deferred.check_gradients()
        assert error.value.is_shared
    assert deferred.step == checked.step
    assert not deferred.unread
    for one, other in zip(checked.parameters, deferred.parameters, strict=True):
        assert torch.equal(one, other)
    for one, other in zip(checked.parameters, deferred.parameters, strict=True):
        one_state, other_state = checked.optimizer.state[one], deferred.optimizer.state[other]
        assert all(torch.equal(value, other_state[key]) for key, value in one_state.items())
    if bad is None:
        averages = [state.ema.module.state_dict() for state in (checked, deferred) if state.ema]
        assert all(torch.equal(value, averages[1][name]) for name, value in averages[0].items())


@pytest.mark.parametrize("precision", ["fp16", "fp32"])
def test_every_step_is_checked_where_an_update_cannot_be_skipped(precision: str) -> None:
    model = nn.Linear(4, 3)
    optimizer = torch.optim.SGD(model.parameters()) if precision == "fp32" else torch.optim.AdamW([model.weight])
    state = run_module.TrainingState(model, optimizer, Ranks(), precision, None, None, False, None, check_every=100)
    assert state.deferred is None


def test_a_check_is_due_after_some_steps() -> None:
    state = small_state(torch.optim.AdamW, None, 3)
    for number in range(7):
        state.forward_backward(square_loss, torch.ones(2, 4), number, 1, True)
        state.update(0.1)
        assert len(state.unread) == (number + 1) % 3


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"log": {"every_steps": 100}}, [3, 6]),  # a checkpoint after every epoch
        ({"log": {"every_steps": 2}, "checkpoint": {"every_epochs": 4}}, [2, 4, 6]),
        (
            {"log": {"every_steps": 100, "pictures": 1, "pictures_every_steps": 5}, "checkpoint": {"every_epochs": 4}},
            [5],
        ),
        ({"log": {"every_steps": 100}, "checkpoint": {"every_epochs": 4}, "schedule": {"max_steps": 7}}, [7]),
    ],
)
def test_a_run_with_deferred_checks_equals_others_and_names_the_bad_images(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], expected: list[int]
) -> None:
    """The gradient of step 5 is bad; the host reads that when a log line, a checkpoint or a measurement is due."""
    settings = settings | {"optim": {"accumulate": 1, "clip_grad": 1.0, "ema": 0.9}}
    pretrain(make_config(images, tmp_path / "checked", **settings))
    monkeypatch.setattr(loop, "steps_unread", lambda device: 100)
    pretrain(make_config(images, tmp_path / "deferred", **settings))
    assert_same(digest(tmp_path / "checked"), digest(tmp_path / "deferred"))

    forward, checks, seen = run_module.TrainingState.forward_backward, [], []
    check = run_module.TrainingState.check_gradients

    def explode(run: run_module.TrainingState, loss_of: Any, batch: Any, number: int, *given: Any) -> Any:
        loss = forward(run, loss_of, batch, number, *given)
        if number == 4:
            seen.extend(batch.indices.tolist())
            run.model.cls_token.grad.fill_(float("nan"))
        return loss

    def spy(run: run_module.TrainingState) -> None:
        checks.append(run.step)
        check(run)

    monkeypatch.setattr(run_module.TrainingState, "forward_backward", explode)
    monkeypatch.setattr(run_module.TrainingState, "check_gradients", spy)
    with pytest.raises(UserError, match=r"diverged after step 4 .*gradient is nan \(1 of \d+ .*: cls_token\)") as error:
        pretrain(make_config(images, tmp_path / "run", **settings))
    assert sorted(set(checks)) == expected
    names = sorted(path.name for path in images.iterdir())
    assert set(re.findall(r"\d+\.png", str(error.value))) == {names[index] for index in seen}
    assert all(int(folder.name[-8:]) <= 4 for folder in complete_checkpoints(tmp_path / "run"))
