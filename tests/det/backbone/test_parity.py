"""A whole Mask R-CNN on our backbone equals the same one on detectron2's own classes, from the same weights.

Losses, gradients of every parameter, and detections; drop path, padded windows and relative positions included.
"""

import copy

import pytest
import torch

pytest.importorskip("detectron2", reason="detectron2 is not installed: python tools/install_detectron2.py")

from detectron2.modeling import build_model
from detectron2.modeling.backbone.vit import SimpleFeaturePyramid
from detectron2.modeling.backbone.vit import ViT as ReferenceViT
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils.events import EventStorage

from crossmae.models.layers import LayerNorm
from det.config import load_det_config
from tests.det.coco_files import TINY

SQUARE = 64


@pytest.fixture(scope="module", params=["blocks", "folded", "materialized"])
def models(request, tmp_path_factory):
    """Ours and the reference, with equal random weights, relative positions away from zero."""
    path = tmp_path_factory.mktemp("config") / "tiny.yaml"
    path.write_text(TINY)
    words = [f"MODEL.VIT.SQUARE_PAD={SQUARE}", f"MODEL.VIT.SQUARE_PAD_TEST={SQUARE}"]
    cfg = load_det_config(str(path), [*words, f"MODEL.VIT.ATTENTION={request.param}"])
    torch.manual_seed(0)
    ours = build_model(cfg)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))
    reference = copy.deepcopy(ours)
    vit = cfg.MODEL.VIT
    net = ReferenceViT(
        vit.IMG_SIZE, vit.PATCH_SIZE, embed_dim=vit.EMBED_DIM, depth=vit.DEPTH, num_heads=vit.NUM_HEADS,
        drop_path_rate=vit.DROP_PATH, norm_layer=LayerNorm, use_rel_pos=True, window_size=vit.WINDOW_SIZE,
        window_block_indexes=(0,), pretrain_img_size=vit.PRETRAIN_IMG_SIZE, out_feature="last_feat",
    )  # fmt: skip
    pyramid = SimpleFeaturePyramid(net, "last_feat", vit.OUT_CHANNELS, (2.0, 1.0), None, "LN", SQUARE)
    pyramid.load_state_dict(ours.backbone.state_dict(), strict=True)
    reference.backbone = pyramid
    return ours, reference


def inputs():
    """Two images of different sizes, neither a square, with two objects each."""
    generator = torch.Generator().manual_seed(1)
    batch = []
    for height, width in ((64, 48), (40, 64)):
        masks = torch.zeros(2, height, width, dtype=torch.bool)
        masks[0, 4:30, 6:26] = True
        masks[1, 12:36, 20:44] = True
        truth = Instances((height, width), gt_classes=torch.tensor([0, 2]), gt_masks=BitMasks(masks))
        truth.gt_boxes = Boxes(torch.tensor([[6.0, 4.0, 26.0, 30.0], [20.0, 12.0, 44.0, 36.0]]))
        image = torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=generator)
        batch.append({"image": image, "height": height, "width": width, "instances": truth})
    return batch


def test_losses_and_all_gradients_are_equal(models):
    results = []
    for model in models:
        model.train().zero_grad()
        torch.manual_seed(3)  # of drop path, which spares every block here, and of the proposals that are sampled
        with EventStorage():
            losses = model(inputs())
        sum(losses.values()).backward()
        results.append((losses, {name: parameter.grad for name, parameter in model.named_parameters()}))
    (losses, gradients), (expected_losses, expected_gradients) = results
    assert set(losses) == {"loss_rpn_cls", "loss_rpn_loc", "loss_cls", "loss_box_reg", "loss_mask"}
    for name, value in expected_losses.items():
        torch.testing.assert_close(losses[name], value, atol=1e-5, rtol=1e-5)
    assert gradients.keys() == expected_gradients.keys()
    for name, value in expected_gradients.items():
        assert value.abs().max() > 0, name
        torch.testing.assert_close(gradients[name], value, atol=1e-5, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}")
