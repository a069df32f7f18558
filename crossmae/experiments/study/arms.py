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
        epochs: length of pretraining. 0: the random weights that pretraining starts from. Detection has its length in
            `DetectionSettings`.
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


# Detection: things in photographs (tools/make_study_data.py). Epochs of 1 stand for the epochs of `DetectionSettings`.
def detection_arms(depth: int, mae_depth: int) -> tuple[Arm, ...]:
    """List the arms of detection.

    Args:
        depth: decoder blocks of CrossMAE.
        mae_depth: decoder blocks of MAE.
    """
    cross = {"decoder_depth": depth}
    return (
        Arm("random", "random weights, as pretraining starts", 0, model=cross),
        Arm("cross25", "CrossMAE, 25 % predicted", 1, model=cross),
        Arm("mae", "MAE", 1, MASK_RATIO, {"decoder": "self", "decoder_depth": mae_depth}),
        Arm("cross75", "CrossMAE, 75 % predicted", 1, MASK_RATIO, cross),
    )


DECAYED_RANDOM = "random_decay"  # random weights with the layer decay of pretrained ones, a control at few labels
DETECTION_ARMS = detection_arms(6, 4)  # half of the usual depths, as the encoder has half the depth of a ViT-S


@dataclass(frozen=True)
class DetectionSettings:
    """Configs and settings of the detection part at one size.

    Attributes:
        part: name of the part, also of its folder and of its cells.
        pretrain, detect: names of the configs.
        model: arguments of the model that differ between sizes and decide the arithmetic.
        data: arguments of `tools/make_study_data.py`.
        images: pictures of pretraining.
        epochs: length of pretraining. Random weights have none.
        pretrain_words, detect_words: changes of the configs.
        shares: percent of the labelled images, nested.
        arms_at_all_shares: arms that are measured at every share. The others only at the smallest.
        layer_decay: decay of the detector's learning rate over the layers of a pretrained encoder. Random weights have
            1.0, because their lower layers contain nothing to preserve.
        steps: steps of the detector, the same at every label share.
        pretrain_seconds, detect_seconds: expected seconds, CPU seconds without a GPU.
    """

    part: str
    pretrain: str
    detect: str
    model: Mapping[str, Any]
    arms: tuple[Arm, ...]
    seeds: tuple[int, ...]
    shares: tuple[float, ...]
    arms_at_all_shares: tuple[str, ...]
    data: tuple[str, ...]
    images: int
    epochs: int
    pretrain_words: tuple[str, ...]
    detect_words: tuple[str, ...]
    layer_decay: float
    steps: int
    pretrain_seconds: float
    detect_seconds: float


DETECTION_CPU = DetectionSettings(
    part="detection",
    pretrain="pretrain/things.yaml",
    detect="things_mask_rcnn.yaml",
    model={
        "img_size": 64,
        "patch_size": 8,
        "in_chans": 3,
        "embed_dim": 192,
        "depth": 6,
        "num_heads": 3,
        "decoder_embed_dim": 128,
        "decoder_num_heads": 4,
    },
    arms=DETECTION_ARMS,
    seeds=SEEDS,
    shares=(10.0, 100.0),
    arms_at_all_shares=("random", "cross25", "mae"),
    data=(),
    images=8000,
    epochs=17,  # 2,125 steps of 64 crops
    pretrain_words=(),
    detect_words=(),
    layer_decay=0.7,
    steps=400,
    pretrain_seconds=800,
    detect_seconds=360,
)

# Fifteen minutes of one large GPU: ViT-S at 224 px on the same pictures, larger and more. Not run on a GPU yet: the
# seconds are estimates from the arithmetic of docs/recipes.md, at a tenth of a GPU's peak.
DETECTION_GPU15 = DetectionSettings(
    part="gpu15",
    pretrain="pretrain/crossmae_vits_1gpu.yaml",
    detect="small_mask_rcnn.yaml",
    model={
        "img_size": 224,
        "patch_size": 16,
        "in_chans": 3,
        "embed_dim": 384,
        "depth": 12,
        "num_heads": 6,
        "decoder_embed_dim": 256,
        "decoder_num_heads": 8,
    },
    arms=detection_arms(12, 8),
    seeds=(0,),
    shares=(10.0,),
    arms_at_all_shares=(),
    data=("--size", "224", "--pretrain", "10000"),
    images=10000,
    epochs=40,
    pretrain_words=(
        "optim.batch_size=256",
        "optim.accumulate=1",
        "optim.lr=1.0e-3",
        "schedule.warmup_epochs=4",
        "data.workers=8",
    ),
    detect_words=(
        "INPUT.LSJ.SIZE=224",
        "INPUT.MIN_SIZE_TEST=224",
        "INPUT.MAX_SIZE_TEST=224",
        "MODEL.VIT.IMG_SIZE=224",
        "MODEL.VIT.PRETRAIN_IMG_SIZE=224",
        "MODEL.VIT.WINDOW_SIZE=14",
        "MODEL.VIT.SQUARE_PAD=224",
        "MODEL.ANCHOR_GENERATOR.SIZES=[[8],[16],[32],[64],[128]]",
        "SOLVER.IMS_PER_BATCH=16",
        "SOLVER.ACCUMULATE=1",
    ),
    layer_decay=0.7,
    steps=300,
    pretrain_seconds=120,
    detect_seconds=90,
)
