"""Boxes are pooled as by detectron2: features bit by bit, and gradients except for rounding."""

import pytest
import torch
from detectron2.layers import ROIAlign
from detectron2.layers.batch_norm import LayerNorm as ChannelFirstLayerNorm

from det.backbone import pooling
from det.backbone.pooling import RegionAlign
from det.backbone.vit import ChannelLayerNorm
from det.backbone.weights import build_detector


def boxes():
    """Boxes of three images in no order: inside, at and over the edges, thin, tiny and empty. The second has none."""
    draw = torch.Generator().manual_seed(0)
    corners = torch.rand(40, 2, generator=draw) * 90 - 10
    found = torch.cat([corners, corners + torch.rand(40, 2, generator=draw) * 60], dim=1)
    odd = [[0, 0, 72, 56], [-30, -30, -20, -20], [200, 9, 220, 20], [5, 5, 5, 5], [5, 5, 5.01, 40], [9, 8, 7, 6]]
    found = torch.cat([found, torch.tensor(odd)])
    return torch.cat([2 * torch.randint(0, 2, (len(found), 1), generator=draw).float(), found], dim=1)


def pooled(kind, rois, scale, ratio, aligned, memory_format=torch.contiguous_format):
    draw = torch.Generator().manual_seed(1)
    features = torch.randn(3, 5, 14, 18, generator=draw).contiguous(memory_format=memory_format).requires_grad_()
    out = kind((3, 4), scale, ratio, aligned)(features, rois)
    (gradient,) = torch.autograd.grad((out * torch.randn(out.shape, generator=draw)).sum(), features)
    return out, gradient


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("ratio", [0, 1, 3])
@pytest.mark.parametrize("scale", [0.25, 0.0625])
def test_gradients_are_those_of_torchvision(scale, ratio, aligned, monkeypatch):
    monkeypatch.setattr(pooling, "CHUNK", 7)
    rois = boxes()
    expected, expected_gradient = pooled(ROIAlign, rois, scale, ratio, aligned)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        found, gradient = pooled(RegionAlign, rois, scale, ratio, aligned, memory_format)
        assert torch.equal(found, expected)
        torch.testing.assert_close(gradient, expected_gradient, atol=2e-5, rtol=1e-5)
    assert expected_gradient.abs().max() > 0.1
    assert gradient[1].abs().max() == 0


def test_no_boxes_have_no_gradient():
    out, gradient = pooled(RegionAlign, torch.zeros(0, 5), 0.25, 0, True)
    assert (out.shape, gradient.abs().max()) == ((0, 5, 3, 4), 0)


def test_large_maps_and_evaluation_take_the_way_of_torchvision(monkeypatch):
    monkeypatch.setattr(pooling, "_Pooled", None)
    layer, rois = RegionAlign((2, 2), 0.25, 0), torch.tensor([[0, 0, 0, 40.0, 40.0]])
    large = torch.rand(1, 2, 65, 64, requires_grad=True)
    small = torch.rand(1, 2, 64, 64, requires_grad=True)
    assert layer(large, rois).grad_fn is not None
    with torch.no_grad():
        layer(small, rois)
    layer(small.detach(), rois)
    with pytest.raises(AttributeError):
        layer(small, rois)


def test_a_detector_has_the_faster_layers(cfg):
    """The heads, too. With masks, one pooler each for boxes and masks."""
    cfg.MODEL.ROI_BOX_HEAD.NUM_CONV, cfg.MODEL.ROI_BOX_HEAD.NORM, cfg.MODEL.ROI_MASK_HEAD.NORM = 1, "LN", "LN"
    kinds = [type(module) for module in build_detector(cfg).roi_heads.modules()]
    assert (kinds.count(RegionAlign), kinds.count(ROIAlign)) == (2, 0)
    assert (kinds.count(ChannelLayerNorm), kinds.count(ChannelFirstLayerNorm)) == (2, 0)
