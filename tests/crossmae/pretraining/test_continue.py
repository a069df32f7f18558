"""configs/pretrain/continue.yaml starts from files with the layout of published weights, as its header says."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from crossmae.errors import UserError
from crossmae.models.crossmae import CrossMAE
from crossmae.pretraining.config import load_config
from crossmae.pretraining.train import pretrain

SIZE = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}
DECODER = {"decoder_embed_dim": 16, "decoder_depth": 2, "decoder_num_heads": 2}
SMALL = [f"model.{key}={value}" for key, value in (SIZE | DECODER).items()]
ENCODER = ("cls_token", "pos_embed", "patch_embed.", "blocks.", "norm.")
SMOKE = ["optim.batch_size=4", "data.workers=0", "runtime.device=cpu", "schedule.max_steps=0", "log.pictures=0"]


def published(path: Path, decoder: str, encoder_only: bool) -> dict[str, Tensor]:
    """Write a training checkpoint as published: tensors under "model", and nothing on their sizes."""
    torch.manual_seed(1)
    tensors = dict(CrossMAE(**SIZE, **DECODER, decoder=decoder).state_dict())
    for name in tensors:
        if not name.endswith("pos_embed"):
            tensors[name] = torch.randn_like(tensors[name])
    if encoder_only:
        tensors = {name: tensor for name, tensor in tensors.items() if name.startswith(ENCODER)}
    torch.save({"model": tensors, "epoch": 800}, path)
    return tensors


@pytest.mark.parametrize(
    ("decoder", "encoder_only", "model", "whole"),
    [
        ("self", False, "mae_vit_base_patch16", True),
        ("self", True, "crossmae_vit_base_patch16", False),
        ("self", False, "crossmae_vit_base_patch16", False),
        ("cross", False, "crossmae_vit_base_patch16", True),
    ],
    ids=["mae", "mae-encoder", "mae-into-crossmae", "crossmae"],
)
def test_it_starts_from_published_weights(
    decoder: str, encoder_only: bool, model: str, whole: bool, images: Path, tmp_path: Path
) -> None:
    """The weights before the first step are those of the file, except a decoder that the file does not have."""
    source = published(tmp_path / "public.pth", decoder, encoder_only)
    words = [f"model.init={tmp_path / 'public.pth'}", f"model.name={model}", f"data.train={images}"]
    config = load_config("pretrain/continue.yaml", [*words, *SMALL, *SMOKE, f"output_dir={tmp_path / 'out'}"])
    start = load_file(pretrain(config))
    taken = {name for name in start if name in source and torch.equal(start[name], source[name])}
    if whole:
        assert taken == start.keys()
    else:
        encoder = {name for name in start if name.startswith(ENCODER) and not name.startswith("norm.")}
        assert encoder <= taken
        assert not [name for name in taken - encoder if name.startswith(("decoder_blocks", "decoder_pred"))]


def test_without_weights_it_does_not_start(images: Path, tmp_path: Path) -> None:
    config = load_config(
        "pretrain/continue.yaml", [*SMALL, *SMOKE, f"data.train={images}", f"output_dir={tmp_path}/out"]
    )
    with pytest.raises(UserError, match="WEIGHTS"):
        pretrain(config)
    assert not (tmp_path / "out").exists()
