"""Classes of a detector: their names in the weight file or the run, and the categories of data that they mean.

A class is a number for the model only. Wherever a detector meets data, the names decide.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from crossmae.checkpoints.metadata import CLASSES
from crossmae.errors import UserError, counted
from crossmae.files import load_json
from crossmae.models.class_names import NamePairs, describe_difference, list_names, pair_names
from det.config import RECORD

if TYPE_CHECKING:
    from torch import nn

log = logging.getLogger(__name__)

CATEGORY_IDS = "category_ids"  # key of the metadata and of `run.json`, next to CLASSES
_ATTRIBUTE = "class_record"


@dataclass(frozen=True)
class Classes:
    """Names of a detector's classes in order, and their category ids in a COCO file, None for classes left out."""

    names: tuple[str, ...]
    category_ids: tuple[int | None, ...]

    def by_id(self) -> dict[int, str]:
        """Return names by category id, without classes left out."""
        pairs = zip(self.category_ids, self.names, strict=True)
        return {number: name for number, name in pairs if number is not None}

    def metadata(self) -> dict[str, str]:
        """Return the names and ids as metadata of a weight file."""
        values = {CLASSES: self.names, CATEGORY_IDS: self.category_ids}
        return {key: json.dumps(value, ensure_ascii=False) for key, value in values.items()}


def registered_classes(name: str) -> Classes | None:
    """Return the classes of a data set, None if unknown yet."""
    from detectron2.data import MetadataCatalog  # slow import

    metadata = MetadataCatalog.get(name)
    names = metadata.get("thing_classes")
    if names is None:
        return None
    numbers = metadata.get("thing_dataset_id_to_contiguous_id", range(1, len(names) + 1))  # LVIS has no gaps
    return Classes(tuple(names), tuple(numbers))


def remember_classes(model: nn.Module, classes: Classes | None) -> None:
    """Attach the known classes to a detector."""
    setattr(model, _ATTRIBUTE, classes)


def classes_of(model: nn.Module) -> Classes | None:
    """Return the classes of a detector, None if their names are unknown."""
    return getattr(model, _ATTRIBUTE, None)


def recorded_classes(path: Path, metadata: Mapping[str, str], number: int | None = None) -> Classes | None:
    """Read the classes that a weight file or its run records.

    The metadata of the file come first, then the `run.json` next to it.

    Raises UserError if a `number` is given and there are not so many names.
    """
    record = path if CLASSES in metadata else path.parent / RECORD
    try:
        if CLASSES in metadata:
            names, ids = (load_json(metadata[key]) for key in (CLASSES, CATEGORY_IDS))
        else:
            content = load_json(record.read_text(encoding="utf-8"))
            names, ids = content[CLASSES], content[CATEGORY_IDS]
        classes = Classes(tuple(map(str, names)), tuple(ids))
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if number is not None and len(classes.names) != number:
        raise UserError(
            f"{record}: has {counted(len(classes.names), 'class name')}. The detector {path.name} needs {number}, so "
            "name the weights in their own run folder."
        )
    return classes


def without_spare(found: Classes, known: Classes | None, empty: Collection[int | None], data: str) -> Classes:
    """Leave out categories without objects that a detector does not know.

    `empty` has the ids of categories without objects. Tools list such categories for the background. If nothing would
    be left, all stay, so that the comparison names them.
    """
    unknown = set(pair_names(found.names, known.names).unknown) if known else set()
    rows = list(zip(found.names, found.category_ids, strict=True))
    kept = [(name, number) for name, number in rows if name not in unknown or number not in empty]
    if not kept or len(kept) == len(rows):
        return found
    spare = [name for name, number in rows if (name, number) not in kept]
    log.warning("%s: categories without objects that the detector does not know: %s", data, list_names(spare))
    return Classes(*(tuple(column) for column in zip(*kept, strict=True)))


def match_categories(
    classes: Classes | None, number: int, ids: Sequence[int | None], names: Sequence[str], data: str
) -> tuple[int | None, ...]:
    """Find the category id of each class of a detector by name.

    `data` names the data set, with category `ids` and `names`, and the detector has `number` classes. The id is None
    for classes that the data set does not list. Logs what differs. If the names of the classes are unknown, the order
    of ids decides. Raises the errors of `pair_categories`.
    """
    pairs = pair_categories(classes, number, names, data)
    if pairs is None:
        log.warning(
            "%s: the detector does not record the names of its classes. Its %d classes are taken for these categories, "
            "in the order of their ids: %s",
            *(data, number, list_names(names)),
        )
        return tuple(ids)
    for note in pairs.notes():
        log.warning("%s: compared with the detector's classes, %s", data, note)
    if pairs.absent:
        log.warning(
            "%s: lists %d of the detector's %d classes. Only these are scored. Detections of other classes are left "
            "out: %s",
            *(data, len(names), number, list_names(pairs.absent)),
        )
    return match_ids(pairs, ids)


def pair_categories(classes: Classes | None, number: int, names: Sequence[str], data: str) -> NamePairs | None:
    """Pair the categories of `data` with a detector's classes.

    Returns None if the names of the classes are unknown.

    Raises:
        UserError: the data have other classes, or the names are unknown and the numbers differ.
    """
    if classes is None:
        if len(names) == number:
            return None
        raise UserError(
            f"{data}: has {counted(len(names), 'category', 'categories')} ({list_names(names)}), but the detector has "
            f"{counted(number, 'class')}, whose names are unknown. List the detector's classes in its order, or "
            "name another detector."
        )
    pairs = pair_names(names, classes.names)
    if pairs.unknown:
        raise UserError(
            f"{data}: its categories differ, the detector does not know {describe_difference(pairs)}. Give classes "
            "that mean the same the same name, or name a detector that was trained on these classes."
        )
    return pairs


def match_ids(pairs: NamePairs, ids: Sequence[int | None]) -> tuple[int | None, ...]:
    """Order the ids of the found names as the known names.

    The id of an absent name is None.
    """
    found = {place: number for place, number in zip(pairs.places, ids, strict=True) if place is not None}
    return tuple(found.get(place) for place in range(len(pairs.known)))
