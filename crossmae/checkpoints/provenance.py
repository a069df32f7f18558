"""Provenance and licence of converted weights."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from pathlib import Path

from safetensors import safe_open

from crossmae import __version__
from crossmae.checkpoints.metadata import (
    ASSUMED,
    DETECTOR_CONFIG,
    PIXEL_MEAN,
    PIXEL_STD,
    PUBLISHED_ARGUMENTS,
    RANDOM_WEIGHTS,
    STARTED_FROM,
    TRAINING,
    UNKNOWN,
    VERSION,
    marked,
)
from crossmae.checkpoints.reading.files import HUB_CONFIG, shards
from crossmae.checkpoints.weights import Weights
from crossmae.files import sha256

LICENCE = "licence"
NON_COMMERCIAL = (
    "The source has the layout of the published CrossMAE and MAE files. If it is one of them, or "
    "was trained from one: those weights are licensed CC BY-NC 4.0 (non-commercial), "
    "and converted weights keep that licence."
)
STATED = "The source says: {licence}. Converted weights keep the licence of their source."
SAID = "The author says: {licence}."  # of weights of this toolkit, when they are saved to share
UNSTATED = (
    "The source does not state its licence. Converted weights keep the licence of their source. "
    "The published CrossMAE and MAE weights are CC BY-NC 4.0 (non-commercial)."
)
CARD = "README.md"
NON_COMMERCIAL_TAG = "cc-by-nc-4.0"
_STATED_TAG = re.compile(r"The (?:source|author) says: ([\w+-]+(?:\.[\w+-]+)*)\.")
_CARD_LICENCE = re.compile(r"^license(?:_name)?:\s*['\"]?([\w.+-]+)", re.MULTILINE)


def licence_notice(weights: Weights) -> str | None:
    """Return a note on the licence, or None.

    Weights that were trained with this toolkit have no note, unless they started from licensed weights. A licence tag
    in the model card is quoted but not trusted: transformers' copies of the MAE weights have another tag than the MAE
    repository (method specification, section 5).
    """
    if LICENCE in weights.metadata:
        return weights.metadata[LICENCE]
    if VERSION in weights.metadata or weights.format == "detector":  # detectors of this toolkit have no note either
        return None
    card = _text(weights.path.with_name(CARD))[:4096]
    tag = _CARD_LICENCE.search(card.split("---")[1]) if card.startswith("---") else None
    masked = weights.format in ("crossmae", "mae", "linear_probe") or PUBLISHED_ARGUMENTS in weights.metadata
    if not masked and '"vit_mae"' not in _text(weights.path.with_name(HUB_CONFIG)):
        return STATED.format(licence=tag[1]) if tag else UNSTATED
    return f"{STATED.format(licence=tag[1])} {NON_COMMERCIAL}" if tag else NON_COMMERCIAL


def licence_tag(note: str) -> str:
    """Return the tag of the licence in a note, "" if unknown.

    Model hubs use such tags.
    """
    if NON_COMMERCIAL in note:
        return NON_COMMERCIAL_TAG
    stated = _STATED_TAG.match(note)
    return stated[1] if stated else ""


def provenance(weights: Weights) -> dict[str, str]:
    """Build the metadata of a converted file.

    Pixel statistics that the source does not record are "unknown". If the source itself was converted, its own source
    is recorded as `origin_*`.
    """
    earlier = {key: value for key, value in weights.metadata.items() if key.startswith("source_")}
    origin = {f"origin_{key.removeprefix('source_')}": value for key, value in earlier.items()}
    sums = [sha256(file) for file in (weights.path, *shards(weights.path))]  # one file, or an index and its shards
    source = {
        "source_file": weights.path.name,
        "source_sha256": sums[0] if len(sums) == 1 else hashlib.sha256("\n".join(sums).encode()).hexdigest(),
        "source_format": weights.format if weights.layout == "plain" else f"{weights.layout}: {weights.format}",
    }
    kept = {key: value for key, value in weights.metadata.items() if key not in (DETECTOR_CONFIG, TRAINING)}
    metadata = {PIXEL_MEAN: UNKNOWN, PIXEL_STD: UNKNOWN} | origin | kept | source
    metadata["converter_version"] = __version__
    notice = licence_notice(weights)
    return metadata | {LICENCE: notice} if notice else metadata


def inherited(
    licence: str | None = None, assumed: Iterable[str] = (), started_from: str = RANDOM_WEIGHTS
) -> dict[str, str]:
    """Build the metadata that trained weights inherit from their initial weights.

    `assumed` has the names of the facts that the file of the initial weights does not tell. `started_from` is the name
    of this file.
    """
    notes = {LICENCE: licence} if licence else {}
    return {STARTED_FROM: started_from} | notes | (marked(names) if (names := set(assumed)) else {})


def recorded_inheritance(path: Path) -> dict[str, str]:
    """Read the inherited metadata of a run's checkpoint."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
    return {key: metadata[key] for key in (STARTED_FROM, LICENCE, ASSUMED) if key in metadata}


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
