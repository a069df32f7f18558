"""Strict loading of `MODEL.WEIGHTS`: a pretraining checkpoint, a converted encoder or a whole detector.

The lists below name the tensors that may be new or left over. Any other difference is an error with a table.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from detectron2.modeling import GeneralizedRCNN, build_model
from torch import Tensor, nn

from crossmae.checkpoints.formats.facts import Facts, ModelFact, assumed, assumed_lines, encoder_facts
from crossmae.checkpoints.formats.recognition import mix_up
from crossmae.checkpoints.load_report import LoadReport
from crossmae.checkpoints.loading import check_plain, load, resampled
from crossmae.checkpoints.metadata import (
    DETECTOR_CONFIG,
    NORM_EPS_OF_PLAIN,
    PIXEL_MEAN,
    PIXEL_STD,
    UNKNOWN,
    assumed_names,
    recorded_config,
    recorded_numbers,
)
from crossmae.checkpoints.reading import detector_file, detector_folder
from crossmae.checkpoints.resample import fit
from crossmae.checkpoints.weights import Weights, encoder_arguments, encoder_home, encoder_tensors, read_weights
from crossmae.errors import UserError, counted
from crossmae.models.class_names import NamePairs, pair_names, rows_by_name, start_notes
from crossmae.models.linear import use_linear
from crossmae.training.config import read_yaml
from det.backbone.detector import Detector, use_channels_last, use_fast_layers
from det.backbone.vit import ViT
from det.classes import classes_of, recorded_classes, remember_classes
from det.config import CONFIG, flatten, lookup

log = logging.getLogger(__name__)

# A dense backbone does not use the class token. Tensors that exist only in detection start at zero.
DROPPED = (r"cls_token$",)
NEW = (r"blocks\.\d+\.attn\.rel_pos_[hw]$", r"pos_embed_global$")
# Layers of a detector that have one output per class.
CLASS_LAYERS = r"roi_heads\.(box_predictor(\.\d+)?\.(cls_score|bbox_pred)|mask_head\.predictor)\."
SCORES = r"roi_heads\.box_predictor(\.0)?\.cls_score\.weight"
# Settings that change the meaning of weights, but not their shapes.
COMPARED_SETTINGS = (
    *("INPUT.FORMAT", "MODEL.PIXEL_MEAN", "MODEL.PIXEL_STD"),
    *("MODEL.VIT.POS_EMBED", "MODEL.VIT.WINDOW_SIZE", "MODEL.VIT.GLOBAL_BLOCKS"),
)
# Arguments of the encoder that shapes or metadata show. In upper case, they are keys of MODEL.VIT.
SHOWN = ("embed_dim", "depth", "num_heads", "patch_size", "mlp_ratio", "pretrain_img_size")


def load_weights(model: nn.Module, cfg: CfgNode, *, detector_only: bool = False) -> LoadReport | None:
    """Load `MODEL.WEIGHTS`, an encoder or a detector, into a detector.

    In training, if the file is a detector with other classes than the model, its layers with one output per class are
    loaded row by row, by the names of the classes. Classes that the file does not have keep their random rows. If no
    class is in both, or names are unknown and the numbers of classes differ, these layers stay random.

    Evaluation needs trained heads: `detector_only` rejects a file with only an encoder.

    The model remembers the classes in the file (`classes_of`), unless it has classes already.

    Returns a report on every tensor, or None if `MODEL.WEIGHTS` is empty: the weights then stay random. Raises
    UserError if the file cannot be read, has another architecture or other pixel statistics, or a tensor is missing or
    left over.
    """
    weights = open_weights(cfg.MODEL.WEIGHTS, detector_only)
    return None if weights is None else _load(model, cfg, weights, detector_only)


def build_trained(cfg: CfgNode) -> nn.Module:
    """Build the detector in `MODEL.WEIGHTS`, with its number of classes.

    `MODEL.ROI_HEADS.NUM_CLASSES` changes in place. Raises the errors of `build_detector` and `load_weights`, and
    UserError for another model than a `GeneralizedRCNN`.
    """
    weights = open_weights(cfg.MODEL.WEIGHTS, detector_only=True)
    assert weights is not None  # else a UserError
    heads, number = cfg.MODEL.ROI_HEADS, count_classes(weights.tensors)
    if number and number != heads.NUM_CLASSES:
        log.info("MODEL.ROI_HEADS.NUM_CLASSES is %d, the number of classes of %s", number, weights.path)
        heads.NUM_CLASSES = number
    model = build_detector(cfg)
    if not isinstance(model, GeneralizedRCNN):
        name = cfg.MODEL.META_ARCHITECTURE
        raise UserError(f"MODEL.META_ARCHITECTURE: {name} cannot predict here. Use GeneralizedRCNN.")
    _load(model, cfg, weights, detector_only=True)
    return model


def open_weights(path: str, detector_only: bool) -> Weights | None:
    """Read `MODEL.WEIGHTS`, None if it is empty.

    A folder of tools/run.py means its detector if `detector_only`, else its pretraining.
    """
    if not path and detector_only:
        raise UserError("MODEL.WEIGHTS is empty. Name a trained detector, such as OUTPUT_DIR/model_final.safetensors.")
    if not path:
        log.warning("MODEL.WEIGHTS is empty: training starts from random weights")
        return None
    if "://" in path:
        raise UserError(f"MODEL.WEIGHTS: {path} is a URL. Download the file and name its path.")
    try:
        file = find_detector(Path(path)) if detector_only else Path(path)
        weights = read_weights(file)
        if detector_only and weights.format != "detector":
            raise mix_up(weights.path, weights.format, weights.metadata, "a detector")
    except UserError as error:
        raise UserError(f"MODEL.WEIGHTS: {error}") from error
    return weights


def _load(model: nn.Module, cfg: CfgNode, weights: Weights, detector_only: bool) -> LoadReport:
    try:
        if weights.format == "detector":
            config, recorded = weights.path.with_name(CONFIG), recorded_config(weights.metadata)
            if not recorded and config.is_file():
                recorded = dict(flatten(read_yaml(config)))
            source = weights.path if DETECTOR_CONFIG in weights.metadata else config
            warn_of_other_settings({key: lookup(cfg, key) for key in COMPARED_SETTINGS}, recorded, source)
            report = _load_detector(model, weights, config, detector_only)
            say_assumed(report.assumed, "Train it again with")
        else:
            check_pixels(weights, cfg.INPUT.FORMAT, cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD)
            report = _load_encoder(model, weights)
            say_assumed(report.assumed | _pixels(weights, cfg))
    except UserError as error:
        raise UserError(f"MODEL.WEIGHTS: {error}") from error
    log.info("weights from %s (%s): %s", weights.path, weights.format, report.summary())
    log.debug("%s", report.table())
    return report


def say_assumed(facts: Facts, word: str = "Set") -> None:
    """Log the values that the file does not tell, and their keys."""
    keys = {"num_heads": "MODEL.VIT.NUM_HEADS", "pixel_mean": "MODEL.PIXEL_MEAN", "pixel_std": "MODEL.PIXEL_STD"}
    for line in assumed_lines(facts, keys, word):
        log.warning("MODEL.WEIGHTS: %s", line)


def _pixels(weights: Weights, cfg: CfgNode) -> Facts:
    """Find pixel statistics that the file does not record."""
    given = {PIXEL_MEAN: cfg.MODEL.PIXEL_MEAN, PIXEL_STD: cfg.MODEL.PIXEL_STD}
    unknown = [key for key in given if weights.metadata.get(key, UNKNOWN) == UNKNOWN]
    return {key: ModelFact(list(given[key]), "assumed", "from the config", "[103.5,116.3,123.7]") for key in unknown}


def find_detector(path: Path) -> Path:
    """Find the best weights, else the last weights, of a run's folder.

    Other paths are returned unchanged. Raises UserError for a folder of tools/run.py without exactly one detector.
    """
    path = detector_folder(path)
    return (path.is_dir() and detector_file(path)) or path


def check_detector(path: Path) -> None:
    """Raise UserError if a path has something else than a detector."""
    weights = read_weights(find_detector(path), finite=False)
    if weights.format != "detector":
        raise mix_up(path, weights.format, weights.metadata, "a detector")


def build_detector(cfg: CfgNode) -> nn.Module:
    """Build detectron2's model. Errors name the section of the config.

    A `GeneralizedRCNN` is built as a `Detector`.
    """
    try:
        if GeneralizedRCNN.__name__ != cfg.MODEL.META_ARCHITECTURE:
            model: nn.Module = build_model(cfg)
        else:
            model = Detector(cfg).to(cfg.MODEL.DEVICE)
            use_channels_last(model)
    except UserError:
        raise
    except (KeyError, ValueError, AssertionError, TypeError) as error:
        raise UserError(f"MODEL: the detector cannot be built. {' '.join(str(error).split()) or error!r}") from error
    use_linear(model)
    use_fast_layers(model)
    return model


def _load_detector(model: nn.Module, weights: Weights, own_config: Path, detector_only: bool) -> LoadReport:
    number, wanted = count_classes(weights.tensors), count_classes(model.state_dict())
    recorded = recorded_classes(weights.path, weights.metadata, number) if number else None
    own = None if detector_only else classes_of(model)
    if detector_only and number and number != wanted:
        raise UserError(
            f"{weights.path}: has {counted(number, 'class')}, not MODEL.ROI_HEADS.NUM_CLASSES {wanted}. "
            f"Set MODEL.ROI_HEADS.NUM_CLASSES={number}."
        )
    pairs = pair_names(own.names, recorded.names) if own and recorded else None
    for words in start_notes(pairs) if pairs else ():
        log.warning("%s: %s", weights.path, words)
    new: tuple[str, ...] = ()
    if pairs and len(pairs.unknown) < len(pairs.found):
        weights = _rows_by_name(model, weights, pairs)
    elif pairs or number != wanted:
        if not pairs:
            words = "%s is for %d classes: the last layers of the heads start from random weights"
            log.warning(words, weights.path, number)
        new = (CLASS_LAYERS,)
        kept = {name: tensor for name, tensor in weights.tensors.items() if not re.match(CLASS_LAYERS, name)}
        weights = replace(weights, tensors=kept)
    elif own and number:
        words = "%s does not record the names of its %d classes. They are taken for the classes of the data, in order"
        log.warning(words, weights.path, number)
    if own is None:
        remember_classes(model, recorded if number == wanted else None)
    try:
        report = load(model, weights, new=new)
    except UserError as error:
        hint = f"Use the config next to it: --config-file {own_config}. " * own_config.is_file()
        raise UserError(f"{hint}{error}") from error
    if marks := assumed_names(weights.metadata):
        net: Any = model.get_submodule("backbone.net")
        values = {"num_heads": net.num_heads, "img_size": net.pretrain_img_size, "norm_eps": NORM_EPS_OF_PLAIN}
        values |= {"activation": "gelu"}
        report.assumed = {key: ModelFact(values[key], "assumed", "since pretraining") for key in values if key in marks}
    return report


def _rows_by_name(model: nn.Module, weights: Weights, pairs: NamePairs) -> Weights:
    """Order the rows of the last layers as the model's classes.

    Rows of classes that the file does not have come from the model.
    """
    if pairs.places == tuple(range(len(pairs.known))):
        return weights
    own, tensors = model.state_dict(), {}
    for name, found in weights.tensors.items():
        if not re.match(CLASS_LAYERS, name) or name not in own:
            continue
        parts, background = (4 if ".bbox_pred." in name else 1), int(".cls_score." in name)
        lengths = [parts * len(names) + background for names in (pairs.found, pairs.known)]
        if [len(own[name]), len(found)] != lengths or own[name].shape[1:] != found.shape[1:]:
            continue  # one output for all classes, or layers that do not fit
        tensors[name] = rows_by_name(own[name], found, pairs, parts)
        if background:
            tensors[name][-1] = found[-1]
    new = len(pairs.unknown)
    note = f"rows of {counted(len(pairs.found) - new, 'class')} by name, {new} new"
    notes = weights.notes | dict.fromkeys(tensors, note)
    return replace(weights, tensors=weights.tensors | tensors, notes=notes)


def _load_encoder(model: nn.Module, weights: Weights) -> LoadReport:
    net = model.get_submodule("backbone.net")
    if not isinstance(net, ViT):
        raise UserError("the file has only an encoder. Set MODEL.BACKBONE.NAME=build_crossmae_vitdet_backbone.")
    check_plain(weights, net.state_dict())
    weights = fit_patches(weights, net.patch_size)
    check_architecture(net, weights)
    return load(net, weights, part="encoder", new=NEW, dropped=DROPPED)


def count_classes(tensors: Mapping[str, Tensor]) -> int:
    """Count the classes of a detector. Return 0 for unknown heads."""
    scores = next((tensor for name, tensor in tensors.items() if re.fullmatch(SCORES, name)), None)
    return 0 if scores is None else len(scores) - 1  # the last row is for the background


def warn_of_other_settings(settings: Mapping[str, Any], recorded: Mapping[str, Any], path: Path) -> None:
    """Warn about settings that differ from the detector's recorded config."""
    for key, given in settings.items():
        value = recorded.get(key)
        if value is not None and value != (list(given) if isinstance(given, (tuple, list)) else given):
            log.warning("%s is %s, but the detector was trained with %s (%s)", key, given, value, path)


def fit_patches(weights: Weights, patch_size: int) -> Weights:
    """Resize patch filters that do not fit the pyramid, such as 14.

    An image that is enlarged by the same factor as the filters gives the same tokens (FlexiViT, arXiv 2212.08013,
    section 3.4). ViTDet also resized the filters of ViT-H/14. The grid of the position embeddings does not change. The
    pretraining image size therefore grows with the patch: 224 pixels become 256. Encoders with patches of 2^n pixels
    are returned unchanged.
    """
    encoder = encoder_tensors(weights)
    arguments = encoder_arguments(encoder, weights.metadata)
    old = arguments["patch_size"]
    if old == patch_size or old & (old - 1) == 0:
        return weights
    tensors, notes, arguments = fit(encoder, arguments, {"patch_size": patch_size})
    log.info("patch filters of %s resized from %d to %d pixels", weights.path, old, patch_size)
    home = encoder_home(weights.tensors)
    return resampled(weights, {f"{home}{name}": tensors[name] for name in notes}, notes, arguments)


def check_architecture(net: ViT, weights: Weights) -> None:
    """Reject a file with another encoder than `MODEL.VIT.*` describes."""
    found = encoder_arguments(encoder_tensors(weights), weights.metadata)
    found["pretrain_img_size"] = found.pop("img_size", net.pretrain_img_size)
    if "num_heads" in assumed(encoder_facts(encoder_tensors(weights), weights.metadata)):
        found.pop("num_heads")  # the config decides, and `say_assumed` logs that
    wrong = [name for name in SHOWN if found.get(name, getattr(net, name)) != getattr(net, name)]
    if wrong:
        given = ", ".join(f"MODEL.VIT.{name.upper()} {getattr(net, name)}" for name in wrong)
        words = " ".join(f"MODEL.VIT.{name.upper()}={found[name]}" for name in wrong)
        raise UserError(f"{weights.path}: {given} does not fit the encoder in the file. Set {words}")


def check_pixels(weights: Weights, image_format: str, mean: Sequence[float], std: Sequence[float]) -> None:
    """Reject pixel statistics (0 to 255) that differ from the encoder's file."""
    for field, key, given in ((PIXEL_MEAN, "PIXEL_MEAN", list(mean)), (PIXEL_STD, "PIXEL_STD", list(std))):
        if weights.metadata.get(field, UNKNOWN) == UNKNOWN:
            continue
        if image_format != "RGB":
            raise UserError(
                f"{weights.path}: the encoder was pretrained on RGB, not {image_format}. Set INPUT.FORMAT=RGB."
            )
        wanted = [255 * value for value in recorded_numbers(weights.metadata, field)]
        if len(given) != len(wanted) or max(abs(a - b) for a, b in zip(given, wanted, strict=True)) > 0.01:
            rounded = [round(value, 3) for value in wanted]
            raise UserError(
                f"{weights.path}: MODEL.{key} {given} is not that of pretraining. Set MODEL.{key}={rounded}"
            )
