"""The port of the published design is the same model: our weights fit, and give the same loss and gradients."""

from __future__ import annotations

import pytest
import torch

from crossmae.models.crossmae import CrossMAE
from crossmae.models.sizes import model_arguments
from tools.benchmarks.published import PublishedCrossMAE

TINY = {"img_size": 64, "embed_dim": 32, "depth": 3, "num_heads": 2, "decoder_embed_dim": 16, "decoder_num_heads": 2}


@pytest.mark.parametrize("predict_ratio", [0.25, 0.75])
@pytest.mark.parametrize("patch_size", [8, 16])
def test_loss_and_gradients_are_equal(patch_size, predict_ratio):
    torch.manual_seed(0)
    ours = CrossMAE(**TINY, patch_size=patch_size, decoder_depth=4)
    other = PublishedCrossMAE(**TINY, patch_size=patch_size, decoder_depth=4)
    with torch.no_grad():
        for parameter in ours.parameters():  # biases and norms count, too
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    other.load_state_dict(ours.state_dict(), strict=True)
    images, noise = torch.randn(3, 3, 64, 64), torch.rand(3, ours.num_patches)
    loss, expected = ours(images, 0.75, predict_ratio, noise).loss, other(images, 0.75, predict_ratio, noise)
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)
    loss.backward()
    expected.backward()
    gradients = dict(other.named_parameters())
    for name, parameter in ours.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, gradients[name].grad, atol=1e-5, rtol=1e-4)


def test_the_base_size_has_the_published_tensors():
    arguments = {key: value for key, value in model_arguments("crossmae_vit_base_patch16").items() if key != "decoder"}
    with torch.device("meta"):
        model = PublishedCrossMAE(**arguments)
    assert len(model.state_dict()) == 347
    assert sum(tensor.numel() for tensor in model.state_dict().values()) == 127_286_428
