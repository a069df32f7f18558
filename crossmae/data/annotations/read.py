"""Recognition of annotation formats by what is there, and one function that reads all of them.

The readers are our own. `supervision` 0.31 (MIT) was tried on the cases of the tests. It rounds polygons to whole
pixels and keeps each as a mask of its image, fails for a gap in the class numbers or a byte-order mark, reads neither
the splits of a data.yaml nor masks of values, and has to be told the format and all folders.
"""

from __future__ import annotations

import os
import shlex
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from crossmae.data.annotations import coco_files, labelme, mask_files, voc, yolo
from crossmae.data.annotations.records import (
    IMAGE_FOLDERS,
    UNSPLIT,
    AnnotatedSplit,
    AnnotationSet,
    ImageFinder,
    build_set,
    is_image_name,
    relative_files,
    write_content,
)
from crossmae.data.paths import COMPANIONS
from crossmae.errors import UserError, counted, printable, shorten
from crossmae.files import load_json, load_yaml, make_folder

OPENED = 3  # files of a kind that are looked into
MASK_FOLDERS = COMPANIONS - {"label", "labels", "annotation", "annotations", "annot", "annots"}
KNOWN = "COCO json, YOLO, Pascal VOC, LabelMe and masks as PNG files"
MASK_LAYOUT = (
    "A mask of images/a.png is masks/a.png or masks/CLASS/a.png, and a folder that images have, too, is no class: "
    "see docs/data.md"
)
# Other formats by words at the start of a file: what they are, and what to export instead.
OTHER_STARTS = {
    "<annotations": ("CVAT's own XML", "Export it from CVAT as COCO 1.0"),
    '"_via_img_metadata"': ("a project of VIA", "Export it from VIA in COCO format"),
    '"via': ("a project of VIA", "Export it from VIA in COCO format"),
    '"annotation_results"': ("an export of Label Studio", "Export it from Label Studio as COCO or YOLO"),
    '"completed_by"': ("an export of Label Studio in its own format", "Export it from Label Studio as COCO or YOLO"),
    '"FeatureCollection"': ("GeoJSON", "Convert it to COCO format in pixels of the images"),
    '"classTitle"': ("a project of Supervisely", "Export it from Supervisely in COCO format"),
    '"coordinates"': ("CreateML", "Export it in COCO format"),
}
OTHER_KINDS = {
    ".csv": ("a table", "Export the annotations as COCO or YOLO"),
    ".tfrecord": ("TFRecord", "Export the annotations as COCO or YOLO"),
    ".record": ("TFRecord", "Export the annotations as COCO or YOLO"),
    ".zip": ("an archive", "Unpack it, and name the folder"),
    ".tar": ("an archive", "Unpack it, and name the folder"),
    ".gz": ("an archive", "Unpack it, and name the folder"),
    ".parquet": ("Parquet", "Export the annotations as COCO or YOLO"),
    ".npy": ("a NumPy array", "Write each mask as a PNG file"),
    ".ndjson": ("NDJSON", "Export the annotations as COCO or YOLO"),
}


@dataclass
class _Found:
    """Label files of a folder by format, relative to the folder."""

    coco: list[str] = field(default_factory=list)
    labelme: list[str] = field(default_factory=list)
    voc: list[str] = field(default_factory=list)
    yaml: list[str] = field(default_factory=list)
    rows: list[str] = field(default_factory=list)

    def formats(self) -> dict[str, str]:
        """Return the first file of each format that was found."""
        by_name = {
            coco_files.COCO_FORMAT: self.coco,
            labelme.LABELME_FORMAT: self.labelme,
            voc.VOC_FORMAT: self.voc,
            yolo.YOLO_FORMAT: self.yaml or self.rows,
        }
        return {name: files[0] for name, files in by_name.items() if files}


def is_coco_path(labels: Path) -> bool:
    """Check for a file that is read as COCO json without conversion."""
    return labels.suffix.lower() not in (".yaml", ".yml", ".xml", ".txt") and not labels.is_dir()


def has_annotations(path: Path) -> bool:
    """Check for a data.yaml, or a folder with label files.

    Masks are not recognised, because they look like images.
    """
    return path.suffix.lower() in (".yaml", ".yml") or (
        path.is_dir() and bool(_look(path, relative_files(path)).formats())
    )


def read_annotations(labels: Path, images: Path | None = None) -> AnnotationSet:
    """Read annotations of any known format.

    Args:
        labels: a COCO json, a data.yaml of YOLO, or a folder with label files of any format.
        images: folder that file names will be relative to. None: the images are where the labels say, or near them.

    Raises UserError if the format is unknown or ambiguous, or a label file has a fault.
    """
    if images is not None and not images.is_dir():
        raise UserError(f"{images}: is no folder. Name the folder of the images.")
    if labels.is_dir():
        return _read_folder(labels, images)
    if not labels.exists():
        raise UserError(f"{labels}: no such file or folder. Name annotations: {KNOWN}.")
    suffix = labels.suffix.lower()
    if suffix in (".yaml", ".yml"):
        return build_set(yolo.read_yolo_yaml(labels, images), labels, images)
    text = _start(labels)
    single = {".xml": "<annotation>" in text, ".txt": yolo.are_rows(text), ".json": _looks_like_labelme(labels)}
    if single.get(suffix) or is_image_name(labels.name):
        raise UserError(f"{labels}: is the label of one image. Name the folder of such files: {labels.parent}")
    if suffix == ".json" and not _recognize_other([labels]):
        content = coco_files.read_lists(labels)
        folder = coco_files.find_images(labels, content, images)
        return AnnotationSet(coco_files.COCO_FORMAT, {UNSPLIT: AnnotatedSplit(folder, content, labels)}, [])
    raise UserError(f"{labels}: {_recognize_other([labels]) or f'is of no known format. Name one of {KNOWN}'}.")


def coco_file(
    labels: Path, images: Path | None, split: str, target: Path, *, shared: bool, log: Callable[[str], None]
) -> tuple[Path, Path]:
    """Return a COCO file and the image folder of one split.

    A COCO json stays where it is. Anything else is written to `target`.

    Args:
        split: "train", "val" or "test". Annotations without splits are taken as a whole, unless they are `shared`.
        shared: another split is taken from the same annotations.
        log: gets a line about what was read and written.

    Raises the errors of `read_annotations`, and UserError if there is no such split.
    """
    found = read_annotations(labels, images)
    if shared and not found.has_splits:
        raise UserError(
            f"{labels}: has no splits, so training and validation would be the same. Split it: "
            f"python tools/split_labels.py {shlex.quote(str(labels))} --output OUT"
        )
    one = choose_split(found, labels, split)
    for remark in found.remarks:
        log(f"{labels}: {remark}")
    if one.json_path is not None:
        return one.json_path, one.images
    make_folder(target.parent, "OUTPUT_DIR")
    write_content(target, one.content)
    objects, names = (len(one.content[key]) for key in ("annotations", "categories"))
    log(
        f"{labels}: {found.format}, {counted(len(one.content['images']), 'image')}, {counted(objects, 'object')}, "
        f"{counted(names, 'class')}: written to {target} in COCO format"
    )
    return target, one.images


def choose_split(found: AnnotationSet, labels: Path, split: str) -> AnnotatedSplit:
    """Return a split, or all images of annotations without splits.

    Raises UserError if there are other splits only.
    """
    if not found.has_splits:
        return found.splits[UNSPLIT]
    if split not in found.splits:
        there = " and ".join(found.splits)
        raise UserError(
            f"{labels}: has no split {split!r}, only {there}. Split it again: "
            f"python tools/split_labels.py {shlex.quote(str(labels))} --again --output OUT"
        )
    return found.splits[split]


def _read_folder(folder: Path, images: Path | None) -> AnnotationSet:
    names = relative_files(folder)
    found = _look(folder, names)
    formats = found.formats()
    if len(formats) > 1:
        listed = " and ".join(f"{name} ({file})" for name, file in formats.items())
        raise UserError(f"{folder}: has labels of several formats: {listed}. Name the folder or file of one of them.")
    if found.coco:
        return coco_files.read_coco_files(folder, found.coco, images)
    if found.yaml:
        if len(found.yaml) > 1:
            raise UserError(f"{folder}: has several YAML files of YOLO: {shorten(found.yaml, 3)}. Name one of them.")
        return build_set(yolo.read_yolo_yaml(folder / found.yaml[0], images), folder, images)
    finder = _open_images(folder, names, images)
    if found.voc:
        reading = voc.read_voc(folder, found.voc, finder)
    elif found.labelme:
        reading = labelme.read_labelme(folder, found.labelme, finder)
    elif found.rows:
        reading = yolo.read_yolo_folder(folder, found.rows, finder)
    else:
        masks, finder = _find_masks(folder, names, finder)
        reading = mask_files.read_masks(folder, masks, finder)
    return build_set(reading, folder, images)


def _look(folder: Path, names: list[str]) -> _Found:
    """Recognise label files of a folder by the first of each kind."""
    by_kind: dict[str, list[str]] = {}
    for name in names:
        by_kind.setdefault(os.path.splitext(name)[1].lower(), []).append(name)
    found = _Found()
    jsons = by_kind.get(".json", [])
    usual = [name for name in jsons if os.path.basename(name).startswith((coco_files.ROBOFLOW, coco_files.INSTANCES))]
    found.coco = [name for name in usual or (jsons if len(jsons) < 50 else []) if coco_files.is_coco(folder / name)]
    if any(_looks_like_labelme(folder / name) for name in jsons[:OPENED]):
        found.labelme = [name for name in jsons if name not in found.coco]
    if any("<annotation>" in _start(folder / name) for name in by_kind.get(".xml", [])[:OPENED]):
        found.voc = by_kind[".xml"]
    yamls = [name for kind in (".yaml", ".yml") for name in by_kind.get(kind, []) if name.count("/") < 2]
    found.yaml = [name for name in yamls if _is_yolo_yaml(folder / name)]
    texts = [name for name in by_kind.get(".txt", []) if not _is_list(name)]
    filled = (text for name in texts if (text := _start(folder / name)).strip())
    looked = [text for _, text in zip(range(OPENED), filled, strict=False)]
    if texts and all(map(yolo.are_rows, looked)) and (looked or not found.formats()):
        found.rows = texts
    return found


def _is_list(name: str) -> bool:
    """Check for text files without labels, such as lists of images."""
    base = os.path.basename(name).lower()
    lists = ("train.txt", "val.txt", "valid.txt", "test.txt", "trainval.txt", "requirements.txt", "license.txt")
    return base in (*yolo.CLASS_FILES, *lists) or base.startswith("readme") or "imagesets/" in name.lower()


def _start(path: Path) -> str:
    try:
        with open(path, "rb") as file:
            return file.read(coco_files.SNIFFED_BYTES).decode("utf-8-sig", errors="replace")
    except OSError:
        return ""


def _looks_like_labelme(path: Path) -> bool:
    """Check the start of a json for the keys of LabelMe."""
    text = _start(path)
    if '"shapes"' in text:
        return '"imagePath"' in text or '"shape_type"' in text or '"imageData"' in text
    try:
        return len(text) < coco_files.SNIFFED_BYTES and labelme.is_labelme(load_json(text))
    except ValueError:
        return False


def _is_yolo_yaml(path: Path) -> bool:
    try:
        content = load_yaml(_start(path))
    except ValueError:
        return False
    return isinstance(content, dict) and "names" in content and bool({"train", "val", "test", "nc"} & content.keys())


def _open_images(folder: Path, names: list[str], images: Path | None) -> ImageFinder:
    """Find the images in their folder, or among or near the labels."""
    if images is not None:
        return ImageFinder(images, _without_masks(relative_files(images)))
    if any(map(is_image_name, names)):
        return ImageFinder(folder, _without_masks(names))
    parent = folder.absolute().parent
    places = [parent / name for name in IMAGE_FOLDERS if (parent / name).is_dir()]
    return ImageFinder(places[0], relative_files(places[0])) if places else ImageFinder(folder, [])


def _without_masks(names: list[str]) -> list[str]:
    """Leave out files in folders such as `SegmentationClass`, unless all are there."""
    return [name for name in names if not MASK_FOLDERS & {part.lower() for part in name.split("/")[:-1]}] or names


def _find_masks(folder: Path, names: list[str], finder: ImageFinder) -> tuple[list[str], ImageFinder]:
    """Choose the mask files of a folder, and the other images.

    Raises UserError if there are none.
    """
    masks = [name for name in names if os.path.splitext(name)[1].lower() in mask_files.MASK_SUFFIXES]
    if finder.folder == os.path.abspath(folder):  # images and masks in one tree
        inside = [name for name in masks if COMPANIONS & {part.lower() for part in name.split("/")[:-1]}]
        ended = [name for name in masks if os.path.splitext(name)[0].lower().endswith(mask_files.MASK_ENDINGS)]
        masks = inside or ended
        finder = ImageFinder(folder, [name for name in finder.names if name not in set(masks)])
    if not masks or not finder.names:
        raise UserError(f"{folder}: {_describe_unknown(folder, names)}")
    return masks, finder


def _describe_unknown(folder: Path, names: list[str]) -> str:
    if other := _recognize_other([folder / name for name in names if not is_image_name(name)][:20]):
        return f"{other}."
    kinds = Counter(os.path.splitext(name)[1].lower() or "no suffix" for name in names)
    there = shorten([f"{count:,} {printable(kind)}" for kind, count in kinds.most_common()]) or "no files"
    pictures = bool(names) and all(map(is_image_name, names))
    advice = "If they are masks, name the images with --images" if pictures else f"Name one of {KNOWN}"
    return f"no annotations of a known format: {there}. {advice}. {MASK_LAYOUT}."


def _recognize_other(paths: list[Path]) -> str:
    """Name another format, and what to do, or return ""."""
    for path in paths:
        text = _start(path)
        kind = OTHER_KINDS.get(path.suffix.lower()) or next(
            (kind for word, kind in OTHER_STARTS.items() if word in text), None
        )
        if kind and not ('"images"' in text and '"categories"' in text):
            return f"{printable(path.name)} looks like {kind[0]}. {kind[1]}"
    return ""
