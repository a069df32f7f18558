"""A folder to share: the weights with their metadata in one file, and a model card."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from crossmae.checkpoints.formats.model_card import LICENCE_TAG, model_card
from crossmae.checkpoints.formats.training_record import CONFIG, LOG, read_run
from crossmae.checkpoints.metadata import STEP, TRAINING, UNKNOWN, VERSION
from crossmae.checkpoints.provenance import CARD, LICENCE, SAID, licence_notice, licence_tag
from crossmae.checkpoints.run_checkpoint import FOLDER, MODEL
from crossmae.checkpoints.weights import Weights, detect_format, save_weights
from crossmae.errors import UserError, shorten
from crossmae.files import check_writable, expand_path, write_text


def save_folder(
    folder: str | Path,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    *,
    licence: str = "",
    base_model: str = "",
    force: bool = False,
) -> Path:
    """Write `model.safetensors` and its model card `README.md` to a folder.

    Args:
        licence: tag of the licence, such as "mit" or "apache-2.0". Weights that inherit a licence keep it.
        base_model: name on a model hub of the model that the training started from, such as "facebook/vit-mae-base".
        force: replace these two files in a folder that has files.

    Returns:
        The folder.

    Raises:
        UserError: the folder has files, or the licence contradicts the inherited one. Nothing is written then.
    """
    folder = expand_path(folder, "folder")
    check_folder_is_free(folder, force)
    metadata = with_licence(metadata, licence)
    card = model_card(folder.resolve().name, detect_format(tensors), tensors, metadata, base_model)
    save_weights(folder / MODEL, tensors, metadata, force=True)
    write_text(folder / CARD, card)
    return folder


def check_folder_is_free(folder: Path, force: bool) -> None:
    """Raise UserError if files in a folder must not be replaced."""
    check_writable(folder, "folder")
    held = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    if FOLDER in held or LOG in held:
        raise UserError(f"folder: {folder} holds a run, which must stay as it is. Name another folder.")
    if held and not force:
        raise UserError(f"folder: {folder} has files ({shorten(held)}). Name another folder, or set force=True.")


def with_licence(metadata: Mapping[str, str], given: str) -> dict[str, str]:
    """Add a licence to the metadata of weights that inherit none.

    Raises UserError if the licence is no tag, or contradicts the inherited one.
    """
    inherited = licence_tag(note := metadata.get(LICENCE, ""))
    if given and not LICENCE_TAG.fullmatch(given):
        raise UserError(f"licence: {given[:80]!r} is no tag of a licence. Use one such as apache-2.0, mit or other.")
    if given and inherited and given != inherited:
        raise UserError(
            f"licence: the weights inherit {inherited}, not {given} ({note}). Leave licence out. If the note is wrong, "
            f"correct {CARD} afterwards."
        )
    return {**metadata, LICENCE: SAID.format(licence=given)} if given and not inherited else dict(metadata)


def source_metadata(weights: Weights) -> dict[str, str]:
    """Return the metadata of weights, completed by their licence, source and run.

    The run is looked for in the folder of the file. A file of another program is the source itself.
    """
    metadata = dict(weights.metadata)
    if notice := licence_notice(weights):
        metadata[LICENCE] = notice
    if VERSION not in metadata:
        metadata.setdefault("source_file", weights.path.name)
    run = weights.path.parents[2] if weights.path.parent.parent.name == FOLDER else weights.path.parent
    if TRAINING not in metadata and (run / CONFIG).is_file() and (run / LOG).is_file():
        step = metadata.get(STEP, UNKNOWN)
        metadata |= read_run(run, int(step) if step.isdecimal() and len(step) < 16 else None).metadata()
    return metadata
