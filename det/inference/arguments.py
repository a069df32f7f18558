"""Arguments of the tools that predict with a detector, and its config, read before torch is imported."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from yacs.config import CfgNode

from crossmae.checkpoints.metadata import DETECTOR_CONFIG, safetensors_metadata
from crossmae.checkpoints.reading import detector_folder, hub_advice, weights_file
from crossmae.errors import UserError, named_by
from det.config import CONFIG, load_det_config

COCO_FILE = "predictions.json"
LABEL_FORMATS = {"yolo": ".txt", "labelme": ".json"}  # of other tools: the suffix of their files


def add_detector_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that name a detector and its classes."""
    parser.add_argument(
        "--weights", type=Path, required=True, metavar="PATH", help="a detector's file, or the folder of its run"
    )
    parser.add_argument("--config-file", metavar="NAME", help="a YAML file, or its name under configs/ (the run's own)")
    parser.add_argument(
        "--classes", type=Path, metavar="FILE", help="class names: a COCO file, or a text with one per line (the run's)"
    )


def read_config(
    config_file: str | Path | None, weights: str | Path, overrides: Sequence[str] = (), key: str = "weights"
) -> CfgNode:
    """Read the config of a detector, and apply `KEY=VALUE` words.

    `config_file` is a YAML file, a name under configs/, or a run's folder. None uses the config in the file of the
    `weights`, which are a file or a folder. A file without a config needs `config.yaml` next to it. Errors name `key`,
    the option or argument of the weights.
    """
    if not Path(weights).exists():
        raise UserError(
            f"{key}: {weights}: no such file or folder. Name a detector's weights, or the folder of its run."
            f"{hub_advice(Path(weights))}"
        )
    if config_file is not None:
        return load_det_config(str(config_file), overrides)
    with named_by(key, weights):
        weights = detector_folder(Path(weights))
    file, folder = weights_file(weights), weights if weights.is_dir() else weights.parent
    try:
        if file and DETECTOR_CONFIG in safetensors_metadata(file):
            return load_det_config(str(file), overrides)
        if not (folder / CONFIG).is_file():
            raise UserError(f"{folder}: has no {CONFIG}. Name the config of its training by --config-file.")
        return load_det_config(str(folder / CONFIG), overrides)
    except UserError:
        from det.backbone.weights import check_detector  # slow import

        with named_by(key, weights):
            check_detector(weights)  # weights of another kind explain the error better
        raise
