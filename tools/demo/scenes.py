"""Compose images with exact masks, and write a data set all or nothing. Shared by the tools that make data."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from crossmae.errors import UserError
from crossmae.files import load_json, name_write_errors, put_in_place, sha256, temporary_folder, write_json

MIN_VISIBLE_SHARE = 0.8  # share of an object's pixels that later objects may not cover
MIN_VISIBLE_AREA = 40  # pixels
MAX_TRIES = 40  # attempts to place an object, and attempts to compose an image

Array = NDArray[Any]
progress = partial(tqdm, unit="img", dynamic_ncols=True)


def package_file(package: str, relative: str) -> Path:
    """Return the path of a file in a Python package.

    The package is not imported. Raises UserError if the package or the file is missing.
    """
    spec = importlib.util.find_spec(package)
    path = Path(spec.origin).parent / relative if spec and spec.origin else None
    if path is None or not path.is_file():
        raise UserError(f"the demo's data needs {package} with its file {relative}. Install it: pip install -e .[demo]")
    return path


def crop_photograph(rng: np.random.Generator, photographs: dict[str, Image.Image], size: int) -> tuple[str, Array]:
    """Crop a random square from a random photograph, and maybe flip it.

    The side of the square is at least half the shorter side of the photograph. Returns the file name and the pixels
    (size, size, 3) uint8.
    """
    name = list(photographs)[rng.integers(len(photographs))]
    photograph = photographs[name]
    side = min(photograph.size) * rng.uniform(0.5, 1.0)
    left, top = (rng.uniform(0, length - side) for length in photograph.size)
    box = (left, top, left + side, top + side)
    crop = photograph.resize((size, size), Image.Resampling.BICUBIC, box, reducing_gap=2.0)
    if rng.random() < 0.5:
        crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return name, np.asarray(crop)


def ink_box(image: Array) -> tuple[int, int, int, int]:
    """Return the box (left, top, right, bottom) of the pixels above 0."""
    return Image.fromarray(image).getbbox()  # type: ignore[return-value]  # no image is empty


def is_hidden(own: Array, visible: Array, cover: Array) -> bool:
    """Check whether a mask `cover` leaves too little of an object visible.

    `own` is the mask of the whole object, `visible` the part that is visible so far. All masks are (size, size) bool.
    """
    left = np.count_nonzero(visible & ~cover)
    return bool(left < max(MIN_VISIBLE_AREA, MIN_VISIBLE_SHARE * np.count_nonzero(own)))


def coco_annotation(annotation_id: int, image_id: int, category_id: int, visible: Array) -> dict[str, Any]:
    """Describe a mask as a COCO annotation with compressed RLE.

    `visible` is (size, size) bool and not empty.
    """
    from pycocotools import mask as coco_mask

    left, top, right, bottom = ink_box(visible)
    rle = coco_mask.encode(np.asfortranarray(visible, dtype=np.uint8))
    return {
        "id": annotation_id,
        "image_id": image_id,
        "category_id": category_id,
        "bbox": [left, top, right - left, bottom - top],
        "area": int(np.count_nonzero(visible)),
        "iscrowd": 0,
        "segmentation": {"size": rle["size"], "counts": rle["counts"].decode("ascii")},
    }


def save_jpeg(pixels: Array, path: Path) -> None:
    """Save a JPEG with full resolution of colour.

    `pixels` is (H, W, 3) uint8. JPEG usually halves the resolution of colour. Then colours would cross the edges of the
    exact masks.
    """
    Image.fromarray(pixels).save(path, quality=95, subsampling=0)


def write_coco(root: Path, split: str, content: Mapping[str, Any]) -> None:
    """Write the COCO annotations of a split."""
    (root / "annotations").mkdir(exist_ok=True)
    (root / "annotations" / f"{split}.json").write_text(json.dumps(content) + "\n", encoding="utf-8")


def is_complete(output: Path, record: Mapping[str, Any], kind: str, *, force: bool) -> bool:
    """Check whether `output` has the data of the settings `record`, unchanged.

    Raises UserError if it has other or damaged data and `force` is not given, or if it is not `kind` ("demo data").
    """
    if not (output.is_file() or (output.is_dir() and any(output.iterdir()))):
        return False
    found, digest = read_manifest(output, kind)
    if force:
        return False
    if (found, digest) != (record, hash_folder(output)):
        raise UserError(
            f"{output}: the data were changed, or have other settings (found {found}, expected {record}). "
            "Replace them with --force, or give another --output."
        )
    return True


def replace_folder(output: Path, record: Mapping[str, Any], write: Callable[[Path], Mapping[str, Any]]) -> None:
    """Write a data set all or nothing, and replace `output`.

    `write` fills an empty folder, and returns further entries for the manifest.
    """
    with name_write_errors(output):
        output.parent.mkdir(parents=True, exist_ok=True)
    with temporary_folder(output) as place:
        unfinished = place / output.name
        unfinished.mkdir()
        further = write(unfinished)
        write_json(unfinished / "manifest.json", {"settings": record, "sha256": hash_folder(unfinished), **further})
        put_in_place(unfinished, output)


def read_manifest(output: Path, kind: str) -> tuple[dict[str, Any], str]:
    """Read settings and hash of existing data.

    Raises UserError if `output` is not data of this `kind`.
    """
    try:
        manifest = load_json((output / "manifest.json").read_text(encoding="utf-8"))
        manifest["settings"]["generator_version"]
        return manifest["settings"], manifest.get("sha256", "")
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{output}: exists and is not {kind}. Give another --output.") from None


def hash_folder(root: Path) -> str:
    """Return the SHA-256 of all names and contents, without the manifest."""
    digest = hashlib.sha256()
    for path in sorted(p for p in root.rglob("*") if p.is_file() and p != root / "manifest.json"):
        digest.update(f"{path.relative_to(root).as_posix()}\n".encode())
        digest.update(bytes.fromhex(sha256(path)))
    return digest.hexdigest()


def check_range(name: str, value: int, low: int, high: int) -> None:
    """Raise UserError if a number is out of range."""
    if not low <= value <= high:
        raise UserError(f"{name}={value} is out of range. Give a number from {low} to {high}.")
