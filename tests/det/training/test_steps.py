"""A step in parts has the mean gradient of its parts, and is the step of as many processes; the moving average."""

import copy
import functools
import math

import pytest
import torch
import torch.distributed as dist

pytest.importorskip("detectron2", reason="detectron2 is not installed: python tools/install_detectron2.py")

from detectron2.modeling import build_model

from crossmae.training.processes import Ranks
from crossmae.training.state import Diverged, TrainingState
from det.config import load_det_config
from det.training.steps import DetectorLoss, in_parts
from tests.det.backbone.test_parity import inputs
from tests.det.coco_files import TINY


class Quadratic(torch.nn.Module):
    """A loss that is a mean over images, so that a step in parts must equal the whole one."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.float64))

    def forward(self, batch):
        x = torch.stack(batch)
        return {"a": (x @ self.weight).square().mean(), "b": (x * self.weight).abs().mean()}


def one_step(model, batch, parts, rank=0, world_size=1):
    """The model after one step by SGD, and the logged losses."""
    model = copy.deepcopy(model)
    state = TrainingState(
        model, torch.optim.SGD(model.parameters(), 1.0), Ranks(rank, rank, world_size), "fp32", None, None, False, None
    )
    loss = DetectorLoss(0, parts, rank)
    for number, part in enumerate(in_parts(lambda steps: [batch for _ in steps], parts)(0, parts)):
        state.losses.append(state.forward_backward(loss, part, number, parts, number == parts - 1))
    state.update(1.0)
    return model, state.mean_losses()


@pytest.mark.parametrize("parts", [1, 2, 3, 6])
def test_parts_make_the_step_of_the_whole_batch_where_losses_are_means_over_images(parts):
    batch = list(torch.randn(6, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    model = Quadratic()
    losses = model(batch)
    (gradient,) = torch.autograd.grad(sum(losses.values()), [model.weight])
    stepped, written = one_step(model, batch, parts)
    torch.testing.assert_close(stepped.weight, model.weight - gradient, atol=1e-12, rtol=0)
    assert written["a"] == pytest.approx(losses["a"].item())
    assert written["loss"] == pytest.approx(sum(losses.values()).item())


@pytest.fixture(scope="module")
def detector(tmp_path_factory):
    path = tmp_path_factory.mktemp("config") / "tiny.yaml"
    path.write_text(TINY)
    torch.manual_seed(0)
    return build_model(load_det_config(str(path)))


def test_a_detectors_step_in_parts_has_the_mean_gradient_of_the_parts(detector):
    """Boxes are sampled and paths are dropped by the numbers of the part: those that its process would draw."""
    batch = inputs()
    expected = {name: torch.zeros_like(p) for name, p in detector.named_parameters()}
    for number, sample in enumerate(batch):
        model = copy.deepcopy(detector)
        sum(DetectorLoss(0, 2, 0)(model, [sample], number).values()).backward()
        for name, parameter in model.named_parameters():
            expected[name] += parameter.grad / 2
    stepped, _ = one_step(detector, batch, 2)
    before = dict(detector.named_parameters())
    for name, parameter in stepped.named_parameters():
        torch.testing.assert_close(before[name] - parameter, expected[name], atol=1e-5, rtol=1e-3)


def run_process(rank, model, batch, out):
    """One of two processes, with its half of the batch, in a group that talks over gloo."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{out}.group", rank=rank, world_size=2)
    stepped, _ = one_step(model, batch[rank : rank + 1], 1, rank, 2)
    if rank == 0:
        torch.save(stepped.state_dict(), out)
    dist.destroy_process_group()


def test_two_parts_make_the_step_of_two_processes(detector, tmp_path):
    out = tmp_path / "stepped.pth"
    batch = inputs()
    target = functools.partial(run_process, model=detector, batch=batch, out=str(out))
    torch.multiprocessing.start_processes(target, nprocs=2, start_method="fork")
    expected = torch.load(out, weights_only=True)
    stepped, _ = one_step(detector, batch, 2)
    before = detector.state_dict()
    for name, tensor in stepped.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], atol=1e-6, rtol=1e-5)
    assert any(not torch.equal(before[name], tensor) for name, tensor in expected.items())


def test_the_average_follows_the_weights_and_warms_up():
    model = Quadratic()
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    state = TrainingState(model, optimizer, Ranks(), "fp32", 0.9, None, False, None)
    batch = list(torch.ones(2, 2, dtype=torch.float64))
    expected = model.weight.detach().clone()
    for step in range(50):
        state.forward_backward(DetectorLoss(0, 1, 0), batch, step, 1, True)
        state.update(0.01)
        decay = 0.0 if step == 0 else min(0.9, 1 - (1 + step) ** (-2 / 3))
        expected = decay * expected + (1 - decay) * model.weight.detach()
    torch.testing.assert_close(state.ema.module.weight.detach(), expected)
    assert not torch.equal(state.ema.module.weight, model.weight)


@pytest.mark.parametrize("steps", [40, 150, 350, 1000])
def test_the_average_of_a_short_run_is_of_its_last_fifth(steps):
    """A decay for long runs must not keep the first weights of a short one: their weights count almost nothing."""
    state = TrainingState(
        Quadratic(), torch.optim.SGD([torch.zeros(1)], 0.01), Ranks(), "fp32", 0.998, None, False, None
    )
    decays = []
    for step in range(steps):
        state.ema.update(state.model, step)
        decays.append(state.ema.get_decay(step))
    shares = [(1 - decay) * math.prod(decays[step + 1 :]) for step, decay in enumerate(decays)]
    assert sum(shares[: steps // 2]) < 0.15
    assert sum(shares[-steps // 3 :]) > 0.6


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("parts", [1, 2])
def test_a_gradient_that_is_not_finite_leaves_the_weights_alone(parts, value):
    """The losses are finite; of two parts the last one spoils the sum."""
    model = Quadratic()
    before = model.weight.detach().clone()
    state = TrainingState(model, torch.optim.SGD([model.weight]), Ranks(), "fp32", None, None, False, None)
    seen = []
    model.weight.register_hook(
        lambda grad: torch.full_like(grad, value) if seen.append(1) or len(seen) == parts else grad
    )
    for number in range(parts):
        batch = list(torch.ones(1, 2, dtype=torch.float64))
        state.forward_backward(DetectorLoss(0, parts, 0), batch, number, parts, number == parts - 1)
    with pytest.raises(Diverged, match=r"norm of the gradient .* infinity: weight"):
        state.update(1e-3)
    assert torch.equal(model.weight, before)
    assert state.step == 0
