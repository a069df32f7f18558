"""A detector pads, copies and normalises a batch at once, with the pixels, losses and weights of detectron2."""

import copy
import pickle

import pytest
import torch
from detectron2.modeling import GeneralizedRCNN, build_model
from detectron2.structures import BitMasks, Boxes, Instances, PolygonMasks, RotatedBoxes
from torch import nn

from crossmae.training.processes import Ranks
from crossmae.training.state import TrainingState
from det.backbone import vit
from det.backbone.detector import Detector, pad_images, to_device
from det.backbone.weights import build_detector
from det.training.steps import DetectorLoss
from tests.det.backbone.test_parity import inputs

SIZES = {"one": [(40, 56)], "equal": [(64, 64)] * 2, "odd": [(64, 33), (17, 64), (1, 1)]}


@pytest.fixture
def model(cfg):
    torch.manual_seed(0)
    return build_detector(cfg)


def convolutions(model):
    """Pyramid, proposals and heads; not the patch embedding, whose input is the image."""
    kinds = (nn.Conv2d, nn.ConvTranspose2d)
    named = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, kinds)]
    return [(name, layer) for name, layer in named if "patch_embed" not in name]


def watch_formats(model):
    """Note by name, in every pass, whether the input of a convolution is channels-last."""
    seen = {}

    def watch(name):
        return lambda layer, found: seen.update({name: found[0].is_contiguous(memory_format=torch.channels_last)})

    for name, layer in convolutions(model):
        layer.register_forward_pre_hook(watch(name))
    return seen


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float64])
@pytest.mark.parametrize("square", [0, 96])
@pytest.mark.parametrize("image_format", ["RGB", "BGR"])
def test_pixels_are_bitwise_those_of_detectron2(cfg, sizes, dtype, square, image_format):
    cfg.INPUT.FORMAT = image_format
    cfg.MODEL.PIXEL_MEAN, cfg.MODEL.VIT.SQUARE_PAD = [103.53, 0.1, 250.0], square
    model = build_detector(cfg).train()
    batch = [{"image": (255 * torch.rand(3, *size)).to(dtype)} for size in sizes]
    before = copy.deepcopy(batch)
    found, expected = model.preprocess_image(batch), GeneralizedRCNN.preprocess_image(model, batch)
    assert found.image_sizes == expected.image_sizes
    assert found.tensor.is_contiguous()
    assert found.tensor.dtype == expected.tensor.dtype
    assert torch.equal(found.tensor, expected.tensor)
    assert all(torch.equal(one["image"], two["image"]) for one, two in zip(batch, before, strict=True))


@pytest.mark.parametrize("constraints", [{}, {"size_divisiblity": 16, "square_size": 0}, {"square_size": 72}])
@pytest.mark.parametrize("divisor", [0, 1, 32])
def test_backbones_of_detectron2_pad_as_before(model, constraints, divisor):
    """Their constraints lack keys, or have them with another spelling."""

    class Other(nn.Module):
        size_divisibility, padding_constraints = divisor, constraints

    model.backbone = Other()
    batch = [{"image": torch.rand(3, 40, 56)}, {"image": torch.rand(3, 64, 33)}]
    expected = GeneralizedRCNN.preprocess_image(model, batch).tensor
    assert torch.equal(model.preprocess_image(batch).tensor, expected)


def test_images_that_do_not_make_one_batch_take_the_way_of_detectron2(cfg, model):
    mixed = [{"image": torch.rand(3, 9, 9)}, {"image": torch.full((3, 8, 8), 7, dtype=torch.uint8)}]
    expected = GeneralizedRCNN.preprocess_image(model, mixed).tensor
    assert torch.equal(model.preprocess_image(mixed).tensor, expected)
    model.backbone.square_pad_test = 8  # detectron2 crops one image that is too large
    large = [{"image": torch.rand(3, 16, 12)}]
    expected = GeneralizedRCNN.preprocess_image(model.eval(), large).tensor
    assert torch.equal(model.preprocess_image(large).tensor, expected)


def test_a_batch_is_copied_once_in_the_type_of_the_images():
    images = [torch.full((3, 2, 3), 5, dtype=torch.uint8), torch.full((3, 4, 1), 6, dtype=torch.uint8)]
    batch = pad_images(images, (8, 8))
    assert (batch.dtype, batch.shape) == (torch.uint8, (2, 3, 8, 8))
    for one, image in zip(batch, images, strict=True):
        assert torch.equal(one[:, : image.shape[1], : image.shape[2]], image)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_batch_is_pinned_for_a_gpu_alone(model, monkeypatch, device):
    """The copy to the device does not wait. Torch cannot pin without a GPU, so its calls are recorded."""
    pinned, copies, empty = [], [], torch.empty
    batch = [{"image": torch.full((3, *size), 9, dtype=torch.uint8)} for size in ((64, 48), (40, 63))]

    def make(*shape, pin_memory=False, **named):
        pinned.append(pin_memory)
        return empty(*shape, **named)

    def copy_to(tensor, place, **named):
        copies.append((tensor.dtype, tensor.shape, named))
        return tensor

    monkeypatch.setattr(Detector, "device", property(lambda _: torch.device(device)))
    expected = GeneralizedRCNN.preprocess_image(model, batch).tensor
    monkeypatch.setattr(torch, "empty", make)
    monkeypatch.setattr(torch.Tensor, "to", copy_to)
    found = model.preprocess_image(batch).tensor
    monkeypatch.undo()
    assert torch.equal(found, expected)
    assert pinned == [device == "cuda"]
    assert copies == [(torch.uint8, (2, 3, 64, 64), {"non_blocking": True})]


def test_losses_are_bitwise_those_of_detectron2(cfg, model, monkeypatch):
    monkeypatch.setattr(vit, "CHANNELS_LAST", ())
    theirs = build_model(cfg)
    assert list(theirs.state_dict()) == list(model.state_dict())
    theirs.load_state_dict(model.state_dict())
    losses = [DetectorLoss(0, 1, 0)(one.train(), inputs(), 0) for one in (model, theirs)]
    assert all(torch.equal(losses[0][name], losses[1][name]) for name in losses[1])


def test_copies_of_a_detector_are_detectors(model):
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(other) is Detector
        found = [DetectorLoss(0, 1, 0)(one.train(), inputs(), 0)["loss_cls"] for one in (model, other)]
        assert torch.equal(*found)


def test_ground_truth_moves_with_all_its_fields():
    truth = Instances((8, 9), gt_boxes=Boxes(torch.rand(2, 4)), gt_classes=torch.tensor([1, 2]), note=["a", "b"])
    truth.gt_masks = BitMasks(torch.rand(2, 8, 9) > 0.5)
    moved = to_device(truth, torch.device("meta"))
    assert {field.device.type for field in (moved.gt_boxes, moved.gt_classes, moved.gt_masks)} == {"meta"}
    assert (moved.note, moved.image_size) == (["a", "b"], (8, 9))
    truth.gt_masks = PolygonMasks([[[0, 0, 4, 0, 4, 4]], [[0, 0, 4, 0, 4, 4]]])
    same = to_device(truth, torch.device("cpu"))
    assert torch.equal(same.gt_boxes.tensor, truth.gt_boxes.tensor)
    assert same.gt_masks is truth.gt_masks
    truth.gt_boxes = RotatedBoxes(torch.rand(2, 5))
    assert type(to_device(truth, torch.device("cpu")).gt_boxes) is RotatedBoxes


@pytest.mark.parametrize("box_head", [0, 1])
def test_channels_last_reaches_every_convolution_and_changes_only_rounding(cfg, box_head, monkeypatch):
    cfg.MODEL.ROI_BOX_HEAD.NUM_CONV = box_head
    cfg.MODEL.ROI_BOX_HEAD.CONV_DIM = 8
    model = build_detector(cfg)
    seen = watch_formats(model)
    losses, gradients = [], []
    for devices in ((), ("cpu",)):
        monkeypatch.setattr(vit, "CHANNELS_LAST", devices)
        losses.append(DetectorLoss(0, 1, 0)(model.train(), inputs(), 0))
        model.zero_grad()
        sum(losses[-1].values()).backward()
        gradients.append({name: one.grad.clone() for name, one in model.named_parameters()})
    assert len(seen) == len(convolutions(model))
    assert all(seen.values()), seen
    torch.testing.assert_close(losses[0], losses[1], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-5, rtol=1e-4)


def test_weights_gradients_and_moments_stay_contiguous(model):
    """So that checkpoints, averages and fused optimizers see the same tensors on every device."""
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    state = TrainingState(model.train(), optimizer, Ranks(), "fp32", 0.9, None, False, None)
    state.forward_backward(DetectorLoss(0, 1, 0), inputs(), 0, 1, True)
    assert all(one.grad.is_contiguous() for one in model.parameters() if one.grad is not None)
    state.update(1e-3)
    moments = [one for kept in optimizer.state.values() for one in kept.values()]
    assert all(one.is_contiguous() for one in [*model.state_dict().values(), *moments])
    assert all(one.is_contiguous() for one in state.ema.module.state_dict().values())


@pytest.mark.gpu
def test_a_gpu_computes_the_features_of_the_cpu_from_a_pinned_batch(cfg):
    found = []
    torch.backends.cudnn.allow_tf32, before = False, torch.backends.cudnn.allow_tf32
    try:
        for device in ("cpu", "cuda"):
            cfg.MODEL.DEVICE = device
            torch.manual_seed(0)
            model = build_detector(cfg).eval()
            images = model.preprocess_image(inputs())
            expected = GeneralizedRCNN.preprocess_image(model, inputs())
            assert torch.equal(images.tensor, expected.tensor)
            with torch.no_grad():
                found.append({name: one.cpu() for name, one in model.backbone(images.tensor).items()})
    finally:
        torch.backends.cudnn.allow_tf32 = before
    torch.testing.assert_close(found[0], found[1], atol=1e-4, rtol=1e-3)


@pytest.mark.gpu
def test_channels_last_reaches_every_convolution_on_a_gpu(cfg):
    cfg.MODEL.DEVICE = "cuda"
    model = build_detector(cfg).train()
    seen = watch_formats(model)
    losses = DetectorLoss(0, 1, 0)(model, inputs(), 0)
    sum(losses.values()).backward()
    assert all(seen.values()), seen
    assert all(one.grad.is_contiguous() for one in model.parameters() if one.grad is not None)
