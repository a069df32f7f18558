"""The backbone equals detectron2's own ViT and SimpleFeaturePyramid: features and gradients, from equal weights.

Square and non-square images, padded windows, relative positions with and without, tables resized from other sizes.
"""

import pytest
import torch

pytest.importorskip("detectron2", reason="detectron2 is not installed: python tools/install_detectron2.py")

from detectron2.layers import ShapeSpec
from detectron2.layers.batch_norm import LayerNorm as ChannelFirstLayerNorm
from detectron2.modeling.backbone.fpn import LastLevelMaxPool
from detectron2.modeling.backbone.vit import SimpleFeaturePyramid
from detectron2.modeling.backbone.vit import ViT as ReferenceViT
from detectron2.structures import ImageList

from crossmae.errors import UserError
from crossmae.models.layers import LayerNorm
from crossmae.models.positions import sincos_pos_embed
from det.backbone import vit
from det.backbone.vit import ChannelLayerNorm, ViT, build_crossmae_vitdet_backbone, build_pyramid
from det.config import load_det_config

SIZE = {"patch_size": 16, "embed_dim": 32, "depth": 4, "num_heads": 2}


def make_pair(rel_pos=True, window=3, img_size=128, drop_path=0.0):
    """Ours and detectron2's, with the same random weights: relative positions away from zero, so that they count."""
    torch.manual_seed(0)
    ours = ViT(img_size, 64, **SIZE, drop_path=drop_path, window_size=window, global_blocks=(1, 3), rel_pos=rel_pos)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))
    reference = ReferenceViT(
        img_size, **SIZE, drop_path_rate=drop_path, norm_layer=LayerNorm, use_rel_pos=rel_pos, window_size=window,
        window_block_indexes=(0, 2), pretrain_img_size=64, out_feature="last_feat",
    )  # fmt: skip
    reference.load_state_dict(ours.state_dict(), strict=True)
    pyramids = []
    for net in (ours, reference):
        torch.manual_seed(1)
        if net is ours:
            pyramids.append(build_pyramid(net, out_channels=16, square_pad=0))
        else:
            pyramids.append(SimpleFeaturePyramid(net, "last_feat", 16, (4.0, 2.0, 1.0, 0.5), LastLevelMaxPool(), "LN"))
    return pyramids


@pytest.mark.parametrize("rel_pos", [True, False])
@pytest.mark.parametrize(
    ("height", "width", "window"),
    [(128, 128, 4), (128, 128, 3), (96, 160, 3), (64, 224, 5)],
    ids=["whole windows", "padded windows", "not square", "other size than built for"],
)
def test_features_and_gradients_equal_detectron2(rel_pos, height, width, window):
    ours, reference = make_pair(rel_pos, window)
    imgs = torch.randn(2, 3, height, width)
    features, expected = ours(imgs), reference(imgs)
    assert list(features) == list(expected) == ["p2", "p3", "p4", "p5", "p6"]
    for name in expected:
        torch.testing.assert_close(features[name], expected[name], atol=1e-5, rtol=1e-5)
    for outputs in (features, expected):
        sum((level * level.detach().roll(1, 1)).mean() for level in outputs.values()).backward()
    gradients = dict(reference.named_parameters())
    for name, parameter in ours.named_parameters():
        assert parameter.grad.abs().max() > 0, name
        torch.testing.assert_close(parameter.grad, gradients[name].grad, atol=1e-5, rtol=1e-4)


def test_drop_path_grows_linearly_as_in_detectron2():
    ours, reference = make_pair(drop_path=0.3)
    rates = [getattr(block.drop_path, "drop_prob", 0.0) for block in ours.net.blocks]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3])
    assert rates == pytest.approx([getattr(block.drop_path, "drop_prob", 0.0) for block in reference.net.blocks])


def test_keys_and_shapes_are_those_of_the_published_adapter():
    cfg = load_det_config("coco_mask_rcnn.yaml")
    with torch.device("meta"):
        from detectron2.layers import ShapeSpec

        backbone = build_crossmae_vitdet_backbone(cfg, ShapeSpec(channels=3))
    shapes = {name: tuple(tensor.shape) for name, tensor in backbone.net.state_dict().items()}
    assert not {"cls_token", "norm.weight"} & set(shapes)
    assert shapes["pos_embed"] == (1, 197, 768)
    assert shapes["patch_embed.proj.weight"] == (768, 3, 16, 16)
    for index in range(12):
        length = 127 if index in (2, 5, 8, 11) else 27
        assert shapes[f"blocks.{index}.attn.rel_pos_h"] == shapes[f"blocks.{index}.attn.rel_pos_w"] == (length, 64)
    assert len(shapes) == 3 + 12 * 12 + 12 * 2
    assert {name: spec.stride for name, spec in backbone.output_shape().items()} == {
        "p2": 4, "p3": 8, "p4": 16, "p5": 32, "p6": 64,
    }  # fmt: skip
    assert backbone.padding_constraints == {"size_divisibility": 32, "square_size": 1024}
    assert backbone.eval().padding_constraints == {
        "size_divisibility": 32,
        "square_size": cfg.MODEL.VIT.SQUARE_PAD_TEST,
    }


def test_a_new_backbone_starts_from_sine_cosine_positions_and_no_relative_ones():
    net = ViT(64, 48, **SIZE, window_size=2, global_blocks=(3,))
    torch.testing.assert_close(net.pos_embed.data, sincos_pos_embed(32, (3, 3)))
    assert net.pos_embed.requires_grad
    assert all(not t.any() for name, t in net.state_dict().items() if "rel_pos" in name)


def positions(mode, grid, window=2):
    """A net with random tables of 3 x 3, and its positions on a grid."""
    torch.manual_seed(0)
    net = ViT(64, 48, **SIZE, window_size=window, global_blocks=(3,), pos_embed_mode=mode)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if name.startswith("pos_embed"):
                parameter.normal_()
    return net, net.positions(*grid)[0]


def resized(table, grid):
    """A table of 9 rows as (rows, columns, width), bicubic as in PyTorch."""
    square = table.reshape(1, 3, 3, -1).permute(0, 3, 1, 2)
    return torch.nn.functional.interpolate(square, grid, mode="bicubic").permute(0, 2, 3, 1)[0]


@pytest.mark.parametrize("grid", [(4, 4), (5, 7), (1, 3)])
@pytest.mark.parametrize("window", [2, 3, 0])
def test_tiled_positions_are_the_same_in_every_window(grid, window):
    net, found = positions("tiled", grid, window)
    side = window or 3  # without windows, the table itself is the tile
    tile = resized(net.pos_embed[0, 1:], (side, side)) if side != 3 else net.pos_embed[0, 1:].reshape(3, 3, -1)
    for row in range(grid[0]):
        for column in range(grid[1]):
            assert torch.equal(found[row, column], tile[row % side, column % side])


def test_absolute_win_adds_a_resized_global_table_to_the_tiles():
    _, tiles = positions("tiled", (5, 7))
    net, found = positions("absolute_win", (5, 7))
    torch.testing.assert_close(found, tiles + resized(net.pos_embed_global[0], (5, 7)))
    net(torch.randn(1, 3, 80, 112))["last_feat"].square().mean().backward()
    assert net.pos_embed.grad.abs().max() > 0
    assert net.pos_embed_global.grad.abs().max() > 0


def test_a_new_absolute_win_starts_as_tiled():
    net = ViT(64, 48, **SIZE, window_size=2, pos_embed_mode="absolute_win", global_blocks=(3,))
    tiled = ViT(64, 48, **SIZE, window_size=2, pos_embed_mode="tiled", global_blocks=(3,))
    assert torch.equal(net.positions(5, 7), tiled.positions(5, 7))


def test_activation_checkpointing_changes_memory_but_no_number():
    """Drop path included: what is computed again must drop the same paths."""
    results = {}
    for on in (False, True):
        torch.manual_seed(0)
        net = ViT(64, 48, **SIZE, drop_path=0.5, window_size=3, global_blocks=(3,), activation_checkpointing=on)
        kept = []
        imgs = torch.randn(4, 3, 64, 64)
        with torch.autograd.graph.saved_tensors_hooks(lambda t, k=kept: k.append(t.numel()) or t, lambda t: t):
            out = net(imgs)["last_feat"]
        out.square().mean().backward()
        gradients = [parameter.grad for parameter in net.parameters() if parameter.grad is not None]
        results[on] = (out.detach(), gradients, sum(kept))
    (out, gradients, kept), (out_again, gradients_again, kept_again) = results[False], results[True]
    assert torch.equal(out, out_again)
    assert all(torch.equal(a, b) for a, b in zip(gradients, gradients_again, strict=True))
    assert kept_again < kept / 4


@pytest.mark.parametrize("stages", [-1, 0, 2, 4])
def test_frozen_stages_get_no_gradient_and_drop_no_paths(stages):
    net = ViT(64, 48, **SIZE, drop_path=0.5, window_size=2, global_blocks=(3,))
    net.freeze(stages)
    net.train()
    trained = {name for name, parameter in net.named_parameters() if parameter.requires_grad}
    expected = {name for name, _ in net.named_parameters()}
    if stages >= 0:
        expected = {name for name in expected if name.startswith("blocks.") and int(name.split(".")[1]) >= stages}
    assert trained == expected
    assert [block.training for block in net.blocks] == [index >= stages for index in range(4)]
    with pytest.raises(ValueError, match=r"FROZEN_STAGES 5 is more than DEPTH. Use at most 4"):
        net.freeze(5)


def test_the_fused_norm_is_detectron2s():
    torch.manual_seed(0)
    x = torch.randn(2, 6, 5, 3, requires_grad=True)
    results = []
    for norm in (ChannelLayerNorm(6), ChannelFirstLayerNorm(6)):
        with torch.no_grad():
            norm.weight.copy_(torch.linspace(0.5, 2, 6))
            norm.bias.copy_(torch.linspace(-1, 1, 6))
        out = norm(x)
        gradients = torch.autograd.grad(out.pow(3).sum(), [x, *norm.parameters()])
        results.append((out, *gradients))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    levels = build_pyramid(ViT(64, 64, **SIZE), 8)
    assert {type(module) for module in levels.modules() if isinstance(module, ChannelFirstLayerNorm)} == {
        ChannelLayerNorm
    }


def test_inference_needs_no_square():
    """Padding to a square in training alone; whatever is in evaluation, the stride of the last level divides it."""
    pyramid = build_pyramid(ViT(64, 64, **SIZE, window_size=3), 8, square_pad=128)
    image = torch.rand(3, 33, 90)
    shapes = []
    for mode in (True, False):
        pyramid.train(mode)
        batch = ImageList.from_tensors([image], 0, padding_constraints=pyramid.padding_constraints)
        shapes.append(tuple(batch.tensor.shape[-2:]))
    assert shapes == [(128, 128), (64, 96)]


def test_sides_that_are_no_multiple_of_the_patch_are_refused():
    with pytest.raises(ValueError, match=r"images: \(64, 70\) does not fit the patches. Pad to multiples of 16"):
        ViT(64, 64, **SIZE)(torch.zeros(1, 3, 64, 70))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("MODEL.VIT.PATCH_SIZE=14", "MODEL.VIT: img_size 1024 is not a multiple of patch_size 14"),
        ("MODEL.VIT.NUM_HEADS=5", "MODEL.VIT.NUM_HEADS: 5 does not divide MODEL.VIT.EMBED_DIM 768"),
        ("MODEL.VIT.SCALE_FACTORS=[3.0]", r"MODEL.VIT: SCALE_FACTORS \[3.0\] is not possible. Use neighbours of"),
        (
            "MODEL.VIT.SCALE_FACTORS=[2.0, 0.5]",
            r"MODEL.VIT: SCALE_FACTORS \[2.0, 0.5\] is not possible. Use neighbours of",
        ),
        ("MODEL.VIT.SCALE_FACTORS=[]", r"MODEL.VIT: SCALE_FACTORS \[\] is not possible. Use neighbours of"),
        ("MODEL.VIT.NORM=XN", "MODEL.VIT: NORM 'XN' is unknown. Use LN, GN, "),
    ],
)
def test_impossible_settings_name_the_section(override, message):
    from detectron2.layers import ShapeSpec

    words = [override, "MODEL.VIT.SQUARE_PAD=0", "MODEL.VIT.SQUARE_PAD_TEST=0"]
    with torch.device("meta"), pytest.raises(UserError, match=message):
        build_crossmae_vitdet_backbone(load_det_config("coco_mask_rcnn.yaml", words), ShapeSpec(channels=3))


@pytest.mark.parametrize("scale_factors", [(2.0, 1.0), (4.0, 2.0), (1.0, 0.5)])
def test_images_of_any_size_are_padded_to_what_the_backbone_divides(scale_factors: tuple[float, ...]) -> None:
    pyramid = build_pyramid(
        ViT(32, 32, 8, 3, 16, 1, 2, window_size=0, global_blocks=(), rel_pos=False), 8, scale_factors, "LN", False
    )
    images = [torch.rand(3, 25, 31), torch.rand(3, 17, 9)]
    batch = ImageList.from_tensors(images, 0, padding_constraints=pyramid.padding_constraints)
    features = pyramid(batch.tensor)
    strides = {name: shape.stride for name, shape in pyramid.output_shape().items()}
    for name, feature in features.items():
        assert tuple(side * strides[name] for side in feature.shape[-2:]) == tuple(batch.tensor.shape[-2:])


def test_heads_that_read_a_level_that_is_not_there_are_refused() -> None:
    cfg = load_det_config("coco_mask_rcnn.yaml", ["MODEL.VIT.PATCH_SIZE=8"])
    with pytest.raises(UserError, match=r"MODEL.RPN.IN_FEATURES: .*'p6'.*PATCH_SIZE 8. Choose from .*'p5'\]"):
        build_crossmae_vitdet_backbone(cfg, ShapeSpec(channels=3))


@pytest.mark.parametrize("mode", ["resize", "absolute_win"])
def test_contiguous_tokens_are_bitwise_those_of_a_channels_first_view(mode, monkeypatch):
    monkeypatch.setattr(vit, "CHANNELS_LAST", ())
    torch.manual_seed(0)
    net = ViT(64, 64, **SIZE, window_size=3, pos_embed_mode=mode)
    imgs = torch.randn(2, 3, 64, 96)
    found = []
    for is_view in (False, True):
        if is_view:
            x = net.patch_embed(imgs)
            x = x + net.positions(x.shape[1], x.shape[2])
            assert not x.is_contiguous()
            for block in net.blocks:
                x = block(x)
            features = x.permute(0, 3, 1, 2)
        else:
            features = net(imgs)["last_feat"]
            assert features.is_contiguous()
        net.zero_grad()
        features.square().sum().backward()
        found.append([features.detach(), *(parameter.grad.clone() for parameter in net.parameters())])
    assert all(map(torch.equal, *found))
