"""Proves that every named size has the published keys, shapes and parameter counts.

An unknown name is an error that lists the known ones.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from crossmae.models.crossmae import CrossMAE, create_model
from crossmae.models.sizes import list_models

MANIFESTS = Path(__file__).parents[4] / "shared/golden/state_dict_manifests.json"
# Method specification, table 1.2: all parameters, trainable, encoder without a final norm, plain MAE of 8
# decoder blocks.
TOTALS = {
    "small_patch16": (32_186_396, 32_060_316, 21_664_896, 28_330_880),
    "base_patch16": (127_286_428, 127_034_268, 85_797_120, 111_907_840),
    "large_patch16": (347_940_908, 347_638_316, 303_299_584, 329_541_888),
    "huge_patch14": (678_493_912, 678_033_368, 630_762_240, 657_074_508),
}
ENCODER = ("cls_token", "pos_embed", "patch_embed.", "blocks.")


def build(name: str, **overrides: object) -> CrossMAE:
    """On the meta device: shapes without memory or initialisation."""
    with torch.device("meta"):
        return create_model(name, **overrides)


@pytest.mark.skipif(not MANIFESTS.is_file(), reason=f"{MANIFESTS.name} is not here")
@pytest.mark.parametrize("family", ["crossmae", "mae"])
@pytest.mark.parametrize("size", TOTALS)
def test_state_dict_is_the_published_one(family: str, size: str) -> None:
    published = json.loads(MANIFESTS.read_text())[f"{family}_{size.split('_')[0]}"]
    ours = {key: list(tensor.shape) for key, tensor in build(f"{family}_vit_{size}").state_dict().items()}
    assert ours == published


@pytest.mark.parametrize("size", TOTALS)
def test_parameter_totals(size: str) -> None:
    model, plain = build(f"crossmae_vit_{size}"), build(f"mae_vit_{size}")
    every, trainable, encoder, mae = TOTALS[size]
    assert sum(p.numel() for p in model.parameters()) == every
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == trainable
    assert sum(p.numel() for name, p in model.named_parameters() if name.startswith(ENCODER)) == encoder
    assert sum(p.numel() for p in plain.parameters()) == mae


@pytest.mark.parametrize(
    ("overrides", "keys", "total"),
    [
        ({"img_size": 448}, 347, 128_039_068),
        ({"fuse_input": False}, 347, 127_286_428 - 12),
        ({"decoder": "cross_self"}, 419, None),
        # 322 published keys without fusion, plus the final norm that the published code forgets to make.
        ({"fuse_blocks": ()}, 324, None),
    ],
)
def test_keys_of_the_base_size(overrides: dict[str, object], keys: int, total: int | None) -> None:
    model = build("crossmae_vit_base_patch16", **overrides)
    assert len(model.state_dict()) == keys
    assert total is None or sum(p.numel() for p in model.parameters()) == total


def test_names() -> None:
    assert list_models() == [
        f"{family}_vit_{size}" for family in ("crossmae", "mae") for size in ("tiny_patch16", *TOTALS)
    ]
    with pytest.raises(ValueError, match=r"vit_giant.*crossmae_vit_tiny_patch16, .*mae_vit_huge_patch14"):
        create_model("vit_giant")
