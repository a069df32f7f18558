"""A step in parts has the mean gradient of its parts, and is the step of as many processes; the moving average."""

import contextlib
import copy
import functools

import pytest
import torch
import torch.distributed as dist

pytest.importorskip("detectron2", reason="detectron2 is not installed: python tools/install_detectron2.py")

from detectron2.modeling import build_model
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from timm.utils import ModelEmaV3
from torch.nn.parallel import DistributedDataParallel

from crossmae.training.state import MAX_SKIPPED
from det.config import load_det_config
from det.training.steps import StepTrainer
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


def one_step(model, batch, parts, **arguments):
    """The state of a trainer after one step by SGD, and the losses that it wrote."""
    model = copy.deepcopy(model)
    trainer = StepTrainer(model, [batch], torch.optim.SGD(model.parameters(), 1.0), 0, parts, **arguments)
    with EventStorage() as storage:
        trainer.iter = 0
        trainer.run_step()
        return model, {name: value for name, (value, _) in storage.latest().items()}


@pytest.mark.parametrize("parts", [1, 2, 3, 6])
def test_parts_make_the_step_of_the_whole_batch_where_losses_are_means_over_images(parts):
    batch = list(torch.randn(6, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    model = Quadratic()
    losses = model(batch)
    (gradient,) = torch.autograd.grad(sum(losses.values()), [model.weight])
    stepped, written = one_step(model, batch, parts)
    torch.testing.assert_close(stepped.weight, model.weight - gradient, atol=1e-12, rtol=0)
    assert written["a"] == pytest.approx(losses["a"].item())
    assert written["total_loss"] == pytest.approx(sum(losses.values()).item())


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
        trainer = StepTrainer(model, [], torch.optim.SGD(model.parameters(), 1.0), 0, 2)
        trainer.iter = 0
        trainer._seed(number)
        with EventStorage():
            sum(model([sample]).values()).backward()
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
    comm.create_local_process_group(2)
    wrapped = DistributedDataParallel(model, broadcast_buffers=False)
    trainer = StepTrainer(wrapped, [batch[rank : rank + 1]], torch.optim.SGD(model.parameters(), 1.0), 0)
    with EventStorage():
        trainer.iter = 0
        trainer.run_step()
    if rank == 0:
        torch.save(model.state_dict(), out)
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
    average = ModelEmaV3(model, 0.9, use_warmup=True, warmup_power=1)
    batch = list(torch.ones(2, 2, dtype=torch.float64))
    trainer = StepTrainer(model, [batch] * 50, torch.optim.SGD(model.parameters(), 0.01), 0, average=average)
    expected = model.weight.detach().clone()
    with EventStorage():
        for step in range(50):
            trainer.iter = step
            trainer.run_step()
            decay = 0.0 if step == 0 else min(0.9, step / (1 + step))
            expected = decay * expected + (1 - decay) * model.weight.detach()
    torch.testing.assert_close(average.module.weight.detach(), expected)
    assert not torch.equal(average.module.weight, model.weight)


def test_a_loss_that_is_not_finite_leaves_the_weights_alone():
    model = Quadratic()
    before = model.weight.detach().clone()
    batch = [torch.full((2,), float("inf"), dtype=torch.float64)]
    trainer = StepTrainer(model, [batch], torch.optim.SGD(model.parameters(), 1.0), 0)
    trainer.iter = 0
    with EventStorage(), pytest.raises(FloatingPointError):
        trainer.run_step()
    assert torch.equal(model.weight, before)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("parts", [1, 2])
def test_a_gradient_that_is_not_finite_leaves_the_weights_alone(parts, value):
    """The losses are finite; of two parts the last one spoils the sum."""
    model = Quadratic()
    before = model.weight.detach().clone()
    trainer = StepTrainer(
        model, [list(torch.ones(2, 2, dtype=torch.float64))], torch.optim.SGD([model.weight]), 0, parts
    )
    seen = []
    model.weight.register_hook(
        lambda grad: torch.full_like(grad, value) if seen.append(1) or len(seen) == parts else grad
    )
    trainer.iter = 0
    with EventStorage(), pytest.raises(FloatingPointError, match=r"norm of the gradient .* infinity: weight"):
        trainer.run_step()
    assert torch.equal(model.weight, before)


@pytest.mark.parametrize("skipped", [MAX_SKIPPED - 1, MAX_SKIPPED])
def test_float16_may_skip_a_few_steps_in_a_row(skipped):
    """The scale falls until gradients are finite; then counting begins again."""
    model = Quadratic().float()
    batches = [list(torch.ones(2, 2))] * (skipped + 1)
    trainer = StepTrainer(model, batches, torch.optim.SGD([model.weight], 1e-3), 0)
    trainer.scaler = torch.amp.GradScaler("cpu")
    before = model.weight.detach().clone()
    model.weight.register_hook(lambda grad: torch.full_like(grad, torch.inf) if trainer.iter < skipped else grad)
    fails = pytest.raises(FloatingPointError, match=f"float16 skipped {MAX_SKIPPED} steps in a row")
    with EventStorage(), fails if skipped == MAX_SKIPPED else contextlib.nullcontext():
        for step in range(skipped + 1):
            trainer.iter = step
            trainer.run_step()
    assert model.weight.isfinite().all()
    assert torch.equal(model.weight, before) == (skipped == MAX_SKIPPED)
    assert trainer.skipped == (MAX_SKIPPED if skipped == MAX_SKIPPED else 0)


def test_a_run_that_becomes_float16_begins_with_a_new_scale(caplog):
    """The settings of mixed precision may change on resume, and a run on the CPU has none."""
    caplog.set_level("INFO")
    models = Quadratic(), Quadratic()
    trainers = [StepTrainer(model, [], torch.optim.SGD(model.parameters(), 1.0), 0) for model in models]
    trainers[1].scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for trainer in trainers:
        trainer.iter = 0
    plain, scaled = (trainer.state_dict() for trainer in trainers)
    assert "grad_scaler" not in plain["_trainer"]
    assert scaled["_trainer"]["grad_scaler"]["scale"] == 8
    trainers[1].load_state_dict(plain)
    assert "the scale of gradients starts again" in caplog.text
    trainers[1].scaler = torch.amp.GradScaler("cpu")
    trainers[1].load_state_dict(scaled)
    assert trainers[1].scaler.get_scale() == 8
