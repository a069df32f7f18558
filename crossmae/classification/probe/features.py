"""Features of a frozen encoder: choice of block, norm and pooling, then extraction for a source.

| file                                              | block, unless another is asked for | final norm               |
| ------------------------------------------------- | ---------------------------------- | ------------------------ |
| CrossMAE                                          | the last one whose map is mixed    | has none                 |
| MAE, DINO, timm, fine-tuned with the class token  | the last                           | the file's own           |
| fine-tuned with average pooling                   | the last                           | none: fc_norm is left out |

A final norm belongs to the last block only. The output of an earlier block is used without a norm.

Shapes: B batch, N images, E width of the features.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from crossmae.checkpoints.formats.facts import MODEL_KEYS, ModelFact, assumed, assumed_lines
from crossmae.checkpoints.metadata import (
    BIT_DEPTH,
    MODEL_ARGUMENTS,
    PIXEL_MEAN,
    PIXEL_STD,
    PUBLISHED_ARGUMENTS,
    recorded_arguments,
    recorded_bit_depth,
    recorded_value,
)
from crossmae.checkpoints.pretrained import IMAGENET_MEAN, IMAGENET_STD
from crossmae.checkpoints.weights import Weights, detect_format, encoder_home
from crossmae.classification.data import CentreViews, Views, evaluation_batches
from crossmae.classification.probe.config import LabelledConfig
from crossmae.classification.vit import Architecture, architecture_of, build_vit, load_encoder_weights
from crossmae.data.batches import keyed_randomness
from crossmae.data.pixels import Normalize, published_crop_pct
from crossmae.data.sources import Source
from crossmae.errors import UserError
from crossmae.files import load_json
from crossmae.models.crossmae import create_model, resolve_blocks
from crossmae.models.sizes import model_arguments
from crossmae.pretraining.config import FeaturePool
from crossmae.pretraining.neighbours import pool_tokens
from crossmae.training.devices import open_autocast

log = logging.getLogger(__name__)


class FrozenEncoder(nn.Module):
    """Encoder from normalised pixels (B, C, H, W) to float32 features (B, E), pooled from the output of `block`.

    `notes` are sentences about the choices made for the encoder.
    """

    def __init__(
        self, vit: VisionTransformer, architecture: Architecture, block: int, norm: bool, pool: FeaturePool, *notes: str
    ) -> None:
        super().__init__()
        self.vit, self.architecture = vit.eval().requires_grad_(False), architecture
        self.block, self.norm, self.pool, self.notes = block, norm, pool, notes

    @property
    def width(self) -> int:
        """Width E of the features."""
        return int(self.vit.embed_dim) * (2 if self.pool == "cls_avg" else 1)

    def forward(self, imgs: Tensor) -> Tensor:
        found: Any = self.vit.forward_intermediates(
            imgs,
            indices=[self.block],
            return_prefix_tokens=True,
            norm=self.norm,
            stop_early=True,
            output_fmt="NLC",
            intermediates_only=True,
        )
        patches, prefix = found[0]
        return pool_tokens(torch.cat([prefix, patches], dim=1).float(), self.pool, prefix.shape[1])


def random_weights(name: str, seed: int, **given: Any) -> Weights:
    """Draw the initial weights of a pretraining run with this seed.

    Given arguments replace the arguments of the named size, unless they are None. Raises UserError if the sizes do not
    fit together.
    """
    given = {key: value for key, value in given.items() if value is not None}
    with keyed_randomness(seed):
        torch.manual_seed(seed)  # as pretraining does
        try:
            model = create_model(name, **given)
        except ValueError as error:
            raise UserError(f"model: {error}") from None
    heads = given.get("num_heads", model_arguments(name)["num_heads"])
    recorded = {"img_size": [side * model.patch_size for side in model.grid], "num_heads": heads}
    tensors = dict(model.state_dict())
    return Weights(Path("random weights"), detect_format(tensors), tensors, {MODEL_ARGUMENTS: json.dumps(recorded)})


def open_encoder(weights: Weights, pool: FeaturePool, block: int | None, seed: int = 0, **given: Any) -> FrozenEncoder:
    """Build an encoder and load its weights from a file.

    A `block` of None uses the table of this module. The `seed` decides the random weights that the file lacks.
    `architecture_of` receives the values in `given`.

    Raises:
        UserError: the file has no encoder, or no class token to pool; the block does not exist; the file does not tell
            which block was trained last; or `architecture_of` or `load_encoder_weights` raises it.
    """
    architecture = architecture_of(weights, **given)
    home, depth = encoder_home(weights.tensors) or "", architecture.depth
    if pool != "avg" and f"{home}cls_token" not in weights.tensors:
        raise UserError(f"features.pool: {weights.path} has no class token. Use features.pool=avg.")
    chosen = last_trained_block(weights, depth) if block is None else block
    if not -depth <= chosen < depth:
        raise UserError(f"features.block: {weights.path} has no block {chosen}. Choose from -{depth} to {depth - 1}.")
    chosen %= depth
    is_last, has_norm = chosen == depth - 1, f"{home}norm.weight" in weights.tensors
    with keyed_randomness(seed):
        # In class-token mode the model has a final norm. If the file has no final norm, the norm must be left out.
        vit = build_vit(architecture, 0, pool="cls" if has_norm else "avg")
        report = load_encoder_weights(vit, weights)
    log.info("%s: %d tensors used, %d left out", weights.path, report.count("used"), report.count("dropped"))
    if has_norm:
        why = "the file's own" if is_last else "it belongs after the last block only"
    else:
        why = "the file has none" if is_last else "the file has none, and it is not the last block"
    notes = [f"features of block {chosen} of 0 .. {depth - 1}, pooled by {pool!r}"]
    notes += [f"final norm {'applied' if has_norm and is_last else 'not applied'}: {why}"]
    if f"{home}cls_token" not in weights.tensors:
        notes.append("the file has no class token, a random one is used: features differ a little from the original")
    heads = [name for name in ("fc_norm", "head") if any(key.startswith(f"{home}{name}.") for key in weights.tensors)]
    notes += [f"not used: {' and '.join(heads)} of the fine-tuned model"] if heads else []
    told = () if given.get("num_heads") is None else ("num_heads",)
    notes += assumed_lines(assumed(report.assumed, told), MODEL_KEYS)
    return FrozenEncoder(vit, architecture, chosen, has_norm and is_last, pool, *notes)


def last_trained_block(weights: Weights, depth: int) -> int:
    """Find the last trained block. In CrossMAE: the last mixed block.

    Raises:
        UserError: only some feature maps are mixed, and the file does not tell which maps.
    """
    mixing = weights.tensors.get("wfm.linear.weight")
    ours = recorded_arguments(weights.metadata)
    if "fuse_blocks" in ours or mixing is None:
        # None mixes all blocks, [] mixes none. With a plain MAE decoder the setting has no effect.
        blocks = ours.get("fuse_blocks") if ours.get("decoder") != "self" else None
        return resolve_blocks(tuple(blocks), depth)[-1] if blocks else depth - 1
    published = recorded_value(weights.metadata, PUBLISHED_ARGUMENTS, dict).get("use_fm")
    if published not in (None, [-1]):
        return resolve_blocks(tuple(published), depth)[-1]
    if published is None and mixing.shape[1] < depth:
        raise UserError(
            f"{weights.path}: {mixing.shape[1]} of {depth + 1} maps are mixed, but the file does not record which. "
            "Set features.block to the last trained block."
        )
    return depth - 1


def choose_views(weights: Weights, architecture: Architecture, data: LabelledConfig) -> tuple[Views, list[str]]:
    """Complete the settings from the file's record, and list assumptions.

    Raises:
        UserError: mean or deviation does not have one value per channel.
    """
    channels, size, notes = architecture.in_chans, architecture.img_size, []
    statistics: list[tuple[float, ...]] = []
    for key, record, usual in (("mean", PIXEL_MEAN, IMAGENET_MEAN), ("std", PIXEL_STD, IMAGENET_STD)):
        given, recorded = getattr(data, key), _recorded(weights, record)
        if given is not None and recorded is not None and list(given) != recorded:
            log.warning("%s was trained with data.%s=%s, not %s", weights.path, key, recorded, list(given))
        values = tuple(given or recorded or usual)
        if len(values) != channels:
            wrong = f"{list(values)} has not one value for each of the {channels} channels"
            raise UserError(f"data.{key}: {wrong}. Measure them with tools/dataset_stats.py.")
        statistics.append(values)
        if given is None and recorded is None:
            notes += assumed_lines(
                {record: ModelFact(list(values), "assumed", "as in ImageNet")}, {record: f"data.{key}"}
            )
    crop_pct = data.crop_pct or _recorded(weights, "crop_pct") or published_crop_pct(size)
    depth = data.bit_depth or (recorded_bit_depth(weights.metadata) if BIT_DEPTH in weights.metadata else None)
    if depth is None and _recorded(weights, PIXEL_MEAN) is None:
        notes += assumed_lines(
            {BIT_DEPTH: ModelFact(8, "assumed", "as in most pictures")}, {BIT_DEPTH: "data.bit_depth"}
        )
    bit_depth = depth or 8
    return Views(size, crop_pct, statistics[0], statistics[1], bit_depth), notes


def _recorded(weights: Weights, key: str) -> Any:
    """Read a value of the metadata. Return None if it is unknown."""
    try:
        return load_json(weights.metadata.get(key, "null"))
    except ValueError:
        return None


def extract(
    encoder: FrozenEncoder,
    source: Source,
    labels: Tensor,
    views: Views,
    device: torch.device,
    precision: str = "fp32",
    dtype: torch.dtype = torch.bfloat16,
    batch_size: int = 256,
    workers: int = 0,
    name: str = "images",
) -> Tensor:
    """Extract the features (N, E) of a source to the CPU.

    Memory has only a few batches in addition to the result, of type `dtype`. The `encoder` is moved to the device.
    `name` is shown in the progress bar and in errors.

    Raises:
        UserError: an image cannot be read, a feature is not finite, or a batch is too large for the GPU.
    """
    how = (batch_size, workers, device.type == "cuda", f"features of {name}", name)
    batches = evaluation_batches(CentreViews(source, labels, views), range(len(source)), *how)
    normalize, autocast = Normalize(views.mean, views.std, device), open_autocast(precision, device)
    features = torch.empty(len(source), encoder.to(device).width, dtype=dtype)
    with torch.inference_mode():
        for batch, rows in zip(batches, features.split(batch_size), strict=True):
            try:
                with autocast:
                    rows.copy_(encoder(normalize(batch.images.to(device, non_blocking=True))))
            except torch.OutOfMemoryError:
                raise UserError(f"features.batch_size: {batch_size} images fill the GPU's memory. Lower it.") from None
            if not bool(torch.isfinite(rows).all()):
                raise UserError(f"{name}: features are not finite. Try runtime.precision=fp32.")
    return features
