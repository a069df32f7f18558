"""Proves that the model computes the method: a slow reference, gradients everywhere, exact inverses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from crossmae.models.crossmae import CrossMAE, patchify, unpatchify
from crossmae.models.masking import MaskCounts, gather_tokens
from tests.crossmae.reference import cut_patches, reference_loss

TINY: dict[str, Any] = {
    "img_size": 16,
    "patch_size": 4,
    "embed_dim": 16,
    "depth": 3,
    "num_heads": 2,
    "decoder_embed_dim": 8,
    "decoder_depth": 2,
    "decoder_num_heads": 2,
}


def tiny(**overrides: Any) -> CrossMAE:
    """A tiny model whose every parameter is random, so that no bias is zero and no norm trivial."""
    torch.manual_seed(0)
    model = CrossMAE(**TINY | overrides)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def inputs(model: CrossMAE, batch: int = 2) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    size = [side * model.patch_size for side in model.grid]
    imgs = torch.randn(batch, model.in_chans, *size, generator=generator)
    return imgs, torch.rand(batch, model.num_patches, generator=generator)


def check_gradients(model: CrossMAE) -> None:
    """Every trainable parameter has a finite gradient that is not zero, every other parameter has none."""
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) is parameter.requires_grad, name
        if parameter.grad is not None:
            assert torch.isfinite(parameter.grad).all(), name
            assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize(
    ("overrides", "fused"),
    [
        ({}, [0, 1, 2]),
        ({"fuse_input": False, "norm_pix_loss": False}, [0, 1, 2]),
        ({"fuse_blocks": (-1, 0)}, [0, 2]),
        ({"img_size": (8, 24), "in_chans": 2}, [0, 1, 2]),
        ({"class_tokens": 3}, [0, 1, 2]),
    ],
)
def test_equals_the_slow_reference(overrides: dict[str, Any], fused: list[int]) -> None:
    model = tiny(**overrides).double()
    imgs, noise = inputs(model)
    imgs = imgs.double()
    out = model(imgs, 0.75, 0.25, noise)
    L = model.num_patches
    expected, predictions = reference_loss(
        dict(model.named_parameters()),
        imgs,
        noise,
        patch_size=4,
        heads=2,
        decoder_heads=2,
        num_visible=L // 4,
        num_dropped=L // 2,
        fused=fused,
        fuse_input=model.fuse_input,
        norm_pix=model.norm_pix_loss,
    )
    # The loss is float32 by contract; the predictions agree to double precision.
    torch.testing.assert_close(out.loss.double(), expected.detach(), rtol=1e-6, atol=1e-6, check_dtype=False)
    torch.testing.assert_close(out.pred, torch.stack(predictions), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("decoder", ["cross", "cross_self", "self"])
@pytest.mark.parametrize("fuse_blocks", [None, (0, -1), (1,), ()])
@pytest.mark.parametrize("fuse_input", [True, False])
@pytest.mark.parametrize("norm_pix_loss", [True, False])
def test_every_trainable_parameter_gets_a_finite_gradient(
    decoder: Any, fuse_blocks: tuple[int, ...] | None, fuse_input: bool, norm_pix_loss: bool
) -> None:
    model = tiny(decoder=decoder, fuse_blocks=fuse_blocks, fuse_input=fuse_input, norm_pix_loss=norm_pix_loss)
    imgs, noise = inputs(model)
    model(imgs, 0.75, 0.5, noise).loss.backward()
    check_gradients(model)


def test_blocks_after_the_last_fused_one_are_frozen_and_not_run() -> None:
    model = tiny(fuse_blocks=(1,))
    assert not any(p.requires_grad for p in model.blocks[2].parameters())
    assert all(p.requires_grad for p in model.blocks[:2].parameters())
    model.blocks[2].register_forward_hook(lambda *_: pytest.fail("block 2 was run"))
    model(*inputs(model)[:1])


@pytest.mark.parametrize(("decoder", "same"), [("cross", True), ("cross_self", False)])
def test_decoding_a_subset_equals_decoding_all_and_selecting(decoder: Any, same: bool) -> None:
    """Method specification, section 6, oracle 3: true without decoder self-attention, false with it."""
    model = tiny(decoder=decoder).double()
    imgs, noise = inputs(model)
    imgs = imgs.double()
    some, all_masked = model(imgs, 0.75, 0.25, noise), model(imgs, 0.75, 0.75, noise)
    where = [torch.isin(a, s).nonzero()[:, 0] for a, s in zip(all_masked.predict_idx, some.predict_idx, strict=True)]
    selected = gather_tokens(all_masked.pred, torch.stack(where))
    assert torch.allclose(selected, some.pred, atol=1e-10) is same


def test_without_fusion_every_decoder_block_sees_the_normed_last_block() -> None:
    model = tiny(fuse_blocks=())
    imgs, noise = inputs(model)
    out = model(imgs, 0.75, 0.25, noise)
    tokens = model.embed(imgs, out.visible_idx)
    for block in model.blocks:
        tokens = block(tokens)
    for context in model.encode(imgs, out.visible_idx):
        torch.testing.assert_close(context, model.norm(tokens))
    assert not {"wfm", "dec_norms"} & {name for name, _ in model.named_children()}


def test_plain_mae_ignores_predict_ratio_and_decodes_everything() -> None:
    model = tiny(decoder="self")
    imgs, noise = inputs(model)
    first, second = model(imgs, 0.75, 0.25, noise), model(imgs, 0.75, 0.75, noise)
    assert torch.equal(first.loss, second.loss)
    assert first.pred.shape == (2, model.num_patches, 48)
    masked = torch.ones(2, model.num_patches, dtype=torch.bool).scatter(1, first.visible_idx, False)
    errors = (first.pred - model.targets(imgs, first.predict_idx)).square().mean(-1)
    torch.testing.assert_close(first.loss, errors[masked].mean())


def test_pixels_that_are_neither_visible_nor_predicted_do_not_matter() -> None:
    model = tiny()
    imgs, noise = inputs(model)
    out = model(imgs, 0.75, 0.25, noise)
    used = torch.zeros(2, model.num_patches, dtype=torch.bool)
    used = used.scatter(1, out.visible_idx, True).scatter(1, out.predict_idx, True)
    patches = patchify(imgs, 4)
    patches[~used] = 1e3
    changed = model(unpatchify(patches, model.grid, 4), 0.75, 0.25, noise)
    assert torch.equal(changed.loss, out.loss)
    patches[used] += 1.0
    assert not torch.equal(model(unpatchify(patches, model.grid, 4), 0.75, 0.25, noise).pred, out.pred)


def test_predictions_do_not_see_the_predicted_pixels() -> None:
    model = tiny()
    imgs, noise = inputs(model)
    out = model(imgs, 0.75, 0.25, noise)
    patches = patchify(imgs, 4)
    patches.scatter_(1, out.predict_idx.unsqueeze(-1).expand(-1, -1, 48), 1e3)
    assert torch.equal(model(unpatchify(patches, model.grid, 4), 0.75, 0.25, noise).pred, out.pred)


def test_patchify_is_exact_and_channel_last() -> None:
    imgs = torch.randn(2, 3, 8, 12)
    patches = patchify(imgs, 4)
    assert torch.equal(unpatchify(patches, (2, 3), 4), imgs)
    for index, patch in enumerate(cut_patches(imgs[1], 4)):
        assert torch.equal(patches[1, index], patch.reshape(-1))


def test_initialisation_is_the_published_one() -> None:
    torch.manual_seed(0)
    model = CrossMAE()
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            bound = (6 / sum(module.weight.shape)) ** 0.5
            largest = module.weight.abs().max().item()
            assert 0.9 * bound < largest <= bound * (1 + 1e-6), name
            if module.bias is not None:
                assert module.bias.abs().sum() == 0, name
        elif isinstance(module, nn.LayerNorm):
            assert module.eps == 1e-6, name
            assert (module.weight == 1).all(), name
            assert (module.bias == 0).all(), name
    conv = model.patch_embed.proj
    bound = (6 / (768 + 768)) ** 0.5
    assert 0.99 * bound < conv.weight.abs().max().item() <= bound * (1 + 1e-6)
    assert conv.bias is not None
    assert 0 < conv.bias.abs().max().item() <= 768**-0.5  # torch's default
    assert abs(model.cls_token.std().item() - 0.02) < 0.003
    assert abs(model.mask_token.std().item() - 0.02) < 0.003
    assert abs(model.wfm.linear.weight.std().item() - 0.283) < 0.03  # specification, 1.6


def test_mixed_precision_belongs_to_the_caller() -> None:
    model = tiny()
    imgs, noise = inputs(model)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(imgs, 0.75, 0.25, noise)
    assert out.pred.dtype == torch.bfloat16
    assert out.loss.dtype == torch.float32
    torch.testing.assert_close(out.loss, model(imgs, 0.75, 0.25, noise).loss, rtol=0.05, atol=0.05)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"decoder": "none"}, "cross, cross_self, self"),
        ({"fuse_blocks": (3,)}, "there are 3 blocks"),
        ({"fuse_blocks": (2, -1)}, "twice"),
        ({"img_size": 18}, "16 and 20"),
        ({"img_size": (16, 2)}, "nearest valid sizes are 4 and 8"),
        ({"num_heads": 3}, "16 cannot be split over 3"),
        ({"embed_dim": 18, "num_heads": 2}, "width of 18 .* divisible by 4"),
    ],
)
def test_impossible_arguments_say_what_is_possible(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CrossMAE(**TINY | overrides)


def test_wrong_input_shapes_are_named() -> None:
    model = tiny()
    with pytest.raises(ValueError, match=r"\(3, 16, 20\) .* needs \(3, 16, 16\)"):
        model(torch.zeros(1, 3, 16, 20))
    with pytest.raises(ValueError, match=r"\(1, 15\) .* \(batch, 16\)"):
        model(torch.zeros(1, 3, 16, 16), noise=torch.zeros(1, 15))


def test_counts_of_the_model() -> None:
    assert tiny().patch_counts(0.75, 0.25) == MaskCounts(4, 8, 4)
    assert tiny(decoder="self").patch_counts(0.75, 0.25) == MaskCounts(4, 0, 12)


@pytest.mark.parametrize(
    ("decoder", "overrides", "backend"),
    [
        ("cross", {}, "aot_eager"),
        ("cross", {"fuse_blocks": ()}, "eager"),
        ("cross", {"fuse_blocks": (0,), "fuse_input": False, "norm_pix_loss": False}, "eager"),
        ("cross_self", {}, "aot_eager"),
        ("self", {}, "aot_eager"),
        ("cross", {"mask_block": 2, "class_tokens": 3}, "eager"),
        *(
            pytest.param("cross", overrides, "aot_eager", marks=pytest.mark.slow)
            for overrides in (
                {"fuse_blocks": ()},
                {"fuse_blocks": (0,), "fuse_input": False, "norm_pix_loss": False},
                {"mask_block": 2, "class_tokens": 3},
            )
        ),
    ],
)
def test_model_and_loss_compile_without_a_graph_break(decoder: Any, overrides: dict[str, Any], backend: str) -> None:
    """`fullgraph=True` refuses a break or a value read back; loss and gradients equal those of the model itself.

    The graph is found by either backend. Only "aot_eager" traces the gradients too, which takes most of the time.
    """
    model = tiny(decoder=decoder, **{"depth": 2, "decoder_depth": 1} | overrides)
    imgs, noise = inputs(model)
    expected = model(imgs, 0.75, 0.25, noise).loss
    expected.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    loss = compiled(imgs, 0.75, 0.25, noise).loss
    loss.backward()
    torch.testing.assert_close(loss, expected)
    for name, parameter in model.named_parameters():
        if name in gradients:
            torch.testing.assert_close(parameter.grad, gradients[name], msg=name)


@pytest.mark.parametrize("img_size", [16, (8, 24)])
@pytest.mark.parametrize("in_chans", [1, 3, 5])
@pytest.mark.parametrize(("patch_size", "mask_ratio", "predict_ratio"), [(4, 0.75, 0.25), (8, 0.5, 0.5), (4, 0.6, 0.6)])
@pytest.mark.parametrize("decoder", ["cross", "cross_self", "self"])
def test_every_shape_trains(
    img_size: Any, in_chans: int, patch_size: int, mask_ratio: float, predict_ratio: float, decoder: Any
) -> None:
    """Sizes, patches, channels and ratios: the right counts, an exact patchify, gradients everywhere."""
    if (img_size, patch_size) == ((8, 24), 8) and mask_ratio == 0.5:
        mask_ratio = predict_ratio = 0.6  # of three patches, one visible
    model = tiny(img_size=img_size, in_chans=in_chans, patch_size=patch_size, decoder=decoder)
    imgs, noise = inputs(model)
    assert torch.equal(unpatchify(patchify(imgs, patch_size), model.grid, patch_size), imgs)
    out = model(imgs, mask_ratio, predict_ratio, noise)
    counts = model.patch_counts(mask_ratio, predict_ratio)
    assert out.visible_idx.shape == (2, counts.visible)
    assert out.pred.shape[-1] == patch_size**2 * in_chans
    out.loss.backward()
    check_gradients(model)


def test_activation_checkpointing_gives_the_same_gradients() -> None:
    for decoder in ("cross", "self"):
        grads = []
        for on in (False, True):
            model = tiny(decoder=decoder)
            model.activation_checkpointing = on
            model(*inputs(model)[:1], 0.75, 0.25, inputs(model)[1]).loss.backward()
            grads.append([p.grad for p in model.parameters() if p.grad is not None])
        assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("decoder", ["cross", "cross_self", "self"])
@pytest.mark.parametrize("fuse_blocks", [None, ()])
def test_every_one_of_several_class_tokens_is_trained_and_read(decoder: Any, fuse_blocks: Any) -> None:
    model = tiny(decoder=decoder, fuse_blocks=fuse_blocks, class_tokens=4)
    imgs, noise = inputs(model)
    out = model(imgs, 0.75, 0.25, noise)
    out.loss.backward()
    check_gradients(model)
    gradient = model.cls_token.grad
    assert gradient is not None
    assert gradient.abs().sum(dim=2).min() > 0
    assert len(gradient[0].unique(dim=0)) == 4  # tokens that differ learn to differ
    assert model.embed(imgs, out.visible_idx).shape == (2, 4 + 4, 16)
    assert out.pred.shape == (2, 16 if decoder == "self" else 4, 48)
    for token in range(4):
        contexts = [context.clone() for context in model.encode(imgs, out.visible_idx)]
        for context in contexts:
            context[:, token, ::2] += 1  # a norm removes what is the same everywhere
        changed = model.reconstruct(imgs, contexts, out.visible_idx, out.predict_idx)
        assert not torch.equal(changed.loss, out.loss)


def test_several_equal_class_tokens_of_a_one_block_mae_count_as_one() -> None:
    """Attention weighs a repeated key twice; a block without it, here by zero values, treats all tokens alike."""
    several, one = tiny(decoder="self", class_tokens=3), tiny(decoder="self")
    state = one.state_dict()
    several.load_state_dict(state | {"cls_token": state["cls_token"].expand(1, 3, -1)})
    for model in (several, one):
        for block in (*model.blocks, *model.decoder_blocks):
            block.attn.proj.weight.data.zero_()
    imgs, noise = inputs(one)
    assert torch.equal(several(imgs, 0.75, 0.75, noise).pred, one(imgs, 0.75, 0.75, noise).pred)


@pytest.mark.parametrize("decoder", ["cross", "self"])
def test_the_model_masks_in_its_blocks(decoder: Any) -> None:
    model = tiny(decoder=decoder, mask_block=2)
    imgs, noise = inputs(model, batch=8)
    plain = tiny(decoder=decoder)(imgs, 0.75, 0.25, noise)
    out = model(imgs, 0.75, 0.25, noise)
    assert out.visible_idx.shape == plain.visible_idx.shape
    corners = out.visible_idx.min(dim=1).values
    assert set(corners.tolist()) <= {0, 2, 8, 10}
    assert torch.equal(out.visible_idx.sort().values, corners[:, None] + torch.tensor([0, 1, 4, 5]))
    assert not torch.equal(out.loss, plain.loss)


def test_options_out_of_range_are_named() -> None:
    with pytest.raises(ValueError, match="mask_block 3 does not divide the 4 x 4 patches"):
        tiny(mask_block=3)
    with pytest.raises(ValueError, match="class_tokens 0 is too small"):
        tiny(class_tokens=0)


def test_projected_visible_patches_equal_the_convolution_of_the_image() -> None:
    torch.manual_seed(0)
    model = CrossMAE(img_size=(24, 32), patch_size=8, embed_dim=32, depth=1, num_heads=2, decoder_depth=1).double()
    imgs, idx = torch.randn(2, 3, 24, 32, dtype=torch.float64), torch.tensor([[11, 0, 4], [7, 3, 8]])
    results = []
    for tokens in (model.embed(imgs, idx)[:, 1:], gather_tokens(model.embed(imgs)[:, 1:], idx)):
        model.zero_grad()
        tokens.square().sum().backward()
        results.append([tokens, *(parameter.grad for parameter in model.patch_embed.parameters())])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-12)
