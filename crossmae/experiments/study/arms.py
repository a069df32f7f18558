"""Arms of the study: models, lengths and learning rates. All settings that a reader may want to change are here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

SEEDS = (0, 1, 2)  # of pretraining, and of the fine-tuning that follows
MASK_RATIO = 0.75


@dataclass(frozen=True)
class Arm:
    """A way to pretrain.

    Attributes:
        model: arguments of `CrossMAE` that differ from the arguments of its part of the study.
        predicted: share of all patches that is decoded.
        epochs: length of pretraining. 0: the random weights that pretraining starts from.
        text: the arm in words.
    """

    name: str
    text: str
    epochs: int
    predicted: float = 0.25
    model: Mapping[str, Any] = field(default_factory=dict)

    @property
    def words(self) -> tuple[str, ...]:
        """Words of `tools/pretrain.py` for the model."""
        words = [f"model.{key}={_yaml(value)}" for key, value in self.model.items()]
        return (*words, *([] if self.is_mae else [f"model.predict_ratio={self.predicted}"]))

    @property
    def is_mae(self) -> bool:
        """True for MAE's decoder."""
        return self.model.get("decoder") == "self"


def _yaml(value: Any) -> str:
    return str(list(value)) if isinstance(value, tuple) else str(value)


# Fashion-MNIST. The encoder has half the depth of a ViT-S, so decoders of 4, 8 and 12 blocks become 2, 4 and 6.
FASHION_MODEL: Mapping[str, Any] = {
    "img_size": 28,
    "patch_size": 4,
    "in_chans": 1,
    "embed_dim": 128,
    "depth": 6,
    "num_heads": 4,
    "decoder_embed_dim": 64,
    "decoder_num_heads": 2,
}
FASHION_PER_CLASS = 1280  # pictures of the subset that pretraining and probes see: 12,800 in all
FASHION_BATCH = 128  # 100 steps in an epoch
FASHION_EPOCHS = 9
FASHION_RATES = (5.0e-4, 1.0e-3, 2.0e-3)  # learning rates to choose from, the middle one until there is a choice
FASHION_RATE_EPOCHS = 3
# Lengths at equal compute: 9 epochs of MAE cost as many operations as 11.9 and 12.9 epochs of these arms.
FASHION_ARMS = (
    Arm("random", "random weights, as pretraining starts", 0, model={"decoder_depth": 6}),
    Arm("cross25_d6", "CrossMAE, 25 % predicted, 6 blocks (of 12)", FASHION_EPOCHS, model={"decoder_depth": 6}),
    Arm("mae_d4", "MAE, 4 blocks (of 8)", FASHION_EPOCHS, MASK_RATIO, {"decoder": "self", "decoder_depth": 4}),
    Arm("cross25_d6_equal", "CrossMAE, 25 %, 6 blocks, compute of MAE", 12, model={"decoder_depth": 6}),
    Arm(
        "cross25_d6_nofusion",
        "CrossMAE, 25 %, 6 blocks, no fusion of maps",
        FASHION_EPOCHS,
        model={"decoder_depth": 6, "fuse_blocks": ()},
    ),
    Arm("cross25_d4", "CrossMAE, 25 %, 4 blocks (of 8)", FASHION_EPOCHS, model={"decoder_depth": 4}),
    Arm("cross25_d4_equal", "CrossMAE, 25 %, 4 blocks, compute of MAE", 13, model={"decoder_depth": 4}),
    Arm("cross75_d6", "CrossMAE, 75 %, 6 blocks (of 12)", FASHION_EPOCHS, MASK_RATIO, {"decoder_depth": 6}),
    Arm("cross25_d2", "CrossMAE, 25 %, 2 blocks (of 4)", FASHION_EPOCHS, model={"decoder_depth": 2}),
)
