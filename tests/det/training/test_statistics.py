"""Steps that are not logged have the same losses, gradients and random numbers, and wait for the device less often."""

import traceback
from collections import Counter

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.proposal_generator import RPN
from detectron2.modeling.roi_heads import fast_rcnn
from torch.utils._python_dispatch import TorchDispatchMode

from det.backbone import pooling
from det.backbone.weights import build_detector
from det.config import load_det_config
from det.training.statistics import UnreadNumbers, statistics_left_out
from det.training.steps import DetectorLoss
from tests.det.backbone.test_parity import inputs
from tests.det.coco_files import TINY

# Operations whose result the host waits for, on a GPU.
WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal")
MOST_WAITS = 29  # in a step of the tiny detector with two images
SAVED_WAITS = 23  # of those in a step of detectron2


class Waits(TorchDispatchMode):
    """Counts what a GPU would make the host wait for, by file."""

    def __init__(self):
        super().__init__()
        self.found = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::")
        by_mask = name == "index" and any(at is not None and at.dtype == torch.bool for at in args[1])
        if name in WAITS or by_mask:
            files = [frame.filename for frame in traceback.extract_stack()]
            own = [file for file in files if "/torch/" not in file and not file.endswith("training/statistics.py")]
            self.found[own[-2]] += 1  # the last file is this one
        return func(*args, **(kwargs or {}))


def waits_of_a_step(model, is_logged):
    """The waits of forward and backward of two images."""
    loss = DetectorLoss(0, 1, 0, lambda steps: is_logged)
    loss(model, inputs(), 0)  # the first step allocates
    with Waits() as waits:
        sum(loss(model, inputs(), 0).values()).backward()
    return waits.found


@pytest.fixture
def model(cfg):
    torch.manual_seed(0)
    return build_detector(cfg).train()


def test_a_step_waits_less_often_than_in_detectron2(cfg, model, monkeypatch):
    monkeypatch.setattr(pooling, "MOST_CELLS", 0)  # the gradient of a CPU: on a device, torchvision computes it
    theirs, logged, found = (
        waits_of_a_step(one, is_logged)
        for one, is_logged in ((build_model(cfg).train(), True), (model, True), (model, False))
    )
    assert found.total() <= MOST_WAITS, found
    assert theirs.total() - found.total() >= SAVED_WAITS, (found, theirs)
    assert logged.total() < theirs.total()
    ours = [file for file in [*found, *logged] if "detectron2" not in file]
    assert ours == [], "this project's own code waits for the device"


CASCADE = ["MODEL.ROI_HEADS.NAME=CascadeROIHeads", "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG=True"]


@pytest.mark.parametrize("words", [[], CASCADE, ["MODEL.MASK_ON=False"]], ids=["masks", "cascade", "boxes"])
def test_losses_gradients_and_random_numbers_are_the_same(words, tmp_path):
    (tmp_path / "tiny.yaml").write_text(TINY)
    torch.manual_seed(0)
    model = build_detector(load_det_config(str(tmp_path / "tiny.yaml"), words)).train()
    found = []
    for is_logged in (True, False):
        model.zero_grad()
        loss = DetectorLoss(0, 1, 0, lambda steps, is_logged=is_logged: is_logged)
        losses = loss(model, inputs(), 3)
        sum(losses.values()).backward()
        gradients = [one.grad.clone() for one in model.parameters() if one.grad is not None]
        found.append((list(losses), [*losses.values(), *gradients, torch.get_rng_state()]))
        assert bool(loss.scalars) == is_logged
    assert found[0][0] == found[1][0]
    assert all(map(torch.equal, found[0][1], found[1][1]))


def test_the_numbers_of_the_last_logged_part_stay(model):
    loss = DetectorLoss(0, 2, 0, lambda steps: steps == 2)
    for number, has_numbers in enumerate([False, False, False, True, True, True]):
        loss(model, inputs()[:1], number)
        assert bool(loss.scalars) == has_numbers
        if number == 3:
            last = dict(loss.scalars)
    assert loss.scalars == last
    every = DetectorLoss(0, 2, 0)
    every(model, inputs()[:1], 3)
    assert every.scalars == last


def test_detectron2_is_as_before_after_an_error():
    functions = [fast_rcnn._log_classification_stats, Matcher.__call__, RPN.losses]

    def fail():
        with statistics_left_out():
            raise KeyError(RPN.losses is functions[2])

    with pytest.raises(KeyError, match="False"):
        fail()
    assert [fast_rcnn._log_classification_stats, Matcher.__call__, RPN.losses] == functions


def test_no_number_is_read():
    one = torch.zeros(1, device="meta")  # reading it fails
    with UnreadNumbers():
        assert one.item() == 1
        assert bool(one)
        assert one.sum().device.type == "meta"
    with pytest.raises((RuntimeError, NotImplementedError)):
        one.item()


@pytest.mark.gpu
def test_a_gpu_reports_no_wait_in_code_of_this_project(cfg):
    """CUDA itself warns of every wait."""
    cfg.MODEL.DEVICE = "cuda"
    model = build_detector(cfg).train()
    loss = DetectorLoss(0, 1, 0, lambda steps: False)
    sum(loss(model, inputs(), 0).values()).backward()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with pytest.warns(UserWarning, match="called a synchronizing") as found:
            sum(loss(model, inputs(), 0).values()).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    files = {warning.filename for warning in found if "called a synchronizing" in str(warning.message)}
    own = [file for file in files if "/det/" in file and not file.endswith("training/statistics.py")]
    assert own == []
