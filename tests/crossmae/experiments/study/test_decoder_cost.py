"""Proves the counts of decoders: the formulas against fvcore and against a count by hand, and the paper's ratios."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from crossmae.experiments.study import decoder_cost
from crossmae.experiments.study.arms import FASHION_MODEL
from crossmae.experiments.study.decoder_cost import compare, count_products, decoder_formula, time_decoders
from crossmae.models.crossmae import CrossMAE
from crossmae.models.sizes import model_arguments

TINY: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
TINY |= {"decoder_embed_dim": 16, "decoder_depth": 3, "decoder_num_heads": 2}


@pytest.mark.parametrize("predicted", [0.25, 0.5, 0.75])
@pytest.mark.parametrize("changes", [{}, {"fuse_blocks": ()}, {"decoder": "self"}, {"in_chans": 1}])
def test_the_formula_is_what_fvcore_counts(changes: dict[str, Any], predicted: float) -> None:
    arguments = TINY | changes
    counted = count_products(CrossMAE(**arguments), predicted)["decoder"]
    assert decoder_formula(arguments, predicted) == pytest.approx(counted, rel=1e-9)


def test_a_count_by_hand() -> None:
    # 16 patches: 4 visible, 4 predicted. A block: q, proj, MLP of 4 tokens; k, v of 5 tokens; scores and mix of 4 x 5.
    block = 2 * 4 * 10 * 16 * 16 + 2 * 5 * 32 * 32 + 2 * 2 * 4 * 5 * 16
    fused, head = 2 * 5 * 32 * 3 * 3, 2 * 4 * 16 * 192
    assert decoder_formula(TINY | {"decoder": "cross", "in_chans": 3}, 0.25) == 3 * block + fused + head
    linear = 2 * 4 * 10 * 16 * 16 + 2 * 5 * 32 * 32
    assert decoder_formula(TINY, 0.25, attention=False) == 3 * linear + fused + head


@pytest.mark.parametrize(
    ("size", "with_attention", "linear"), [("small", 2.72, 2.49), ("base", 2.60, 2.48), ("large", 2.41, 2.30)]
)
def test_the_ratios_of_docs_recipes(size: str, with_attention: float, linear: float) -> None:
    cross, mae = (model_arguments(f"{family}_vit_{size}_patch16") for family in ("crossmae", "mae"))
    assert decoder_formula(mae, 0.75) / decoder_formula(cross, 0.25) == pytest.approx(with_attention, abs=0.02)
    ratio = decoder_formula(mae, 0.75, attention=False) / decoder_formula(cross, 0.25, attention=False)
    assert ratio == pytest.approx(linear, abs=0.01)


def test_the_encoder_is_counted_apart() -> None:
    encoders = {
        decoder: count_products(CrossMAE(**TINY, decoder=decoder), 0.25)["encoder"] for decoder in ("cross", "self")
    }
    n, width = 5, 32  # a class token and 4 visible patches; only these patches are projected
    by_hand = 2 * (24 * n * width**2 + 4 * n**2 * width) + 2 * 4 * 192 * width
    assert encoders == {"cross": by_hand, "self": by_hand}


def test_decoders_are_timed_in_turn() -> None:
    models = [(CrossMAE(**TINY), 0.25), (CrossMAE(**TINY, decoder="self"), 0.75)]
    seconds = time_decoders(models, images=2, rounds=2)
    assert len(seconds) == 2
    assert min(seconds) > 0


def test_seconds_are_of_one_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, seen = torch.get_num_threads(), []
    monkeypatch.setattr(decoder_cost, "compare", lambda *_: seen.append(torch.get_num_threads()))
    try:
        torch.set_num_threads(2)
        decoder_cost.main(["--output", str(tmp_path / "decoder.json"), "--sizes", "small"])
    finally:
        torch.set_num_threads(before)
    assert seen == [1]


def test_a_comparison_has_every_depth_and_share() -> None:
    arguments = dict(FASHION_MODEL)
    found = compare("fashion_mnist", arguments, arguments | {"decoder": "self", "decoder_depth": 4}, rounds=1)
    assert [(row["depth"], row["predicted"]) for row in found["rows"]] == [
        (d, p) for d in (2, 4, 6) for p in (0.25, 0.75)
    ]
    assert all(row["ratio"] == pytest.approx(row["formula"], rel=0.05) for row in found["rows"])
