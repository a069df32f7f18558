"""Compose "things in photographs": photographed cut-outs over photographs, with exact masks.

    python tools/make_study_data.py                              # outputs/study/things, minutes on one core
    python tools/make_study_data.py --packages FOLDER OTHER      # packages that `dpkg -x` extracted there
    python tools/make_study_data.py --train 500 --val 100 --pretrain 0 --size 192 --output outputs/few

The sources are files of five Debian packages, and nothing is downloaded: 309 cut-outs in 11 classes from
tuxpaint-stamps-default, and 110 photographs from gcompris-qt-data, tuxpaint-data, mate-backgrounds and
lomiri-wallpapers-16.04. With root: `apt-get install` them. Without root: `apt-get download` them, then `dpkg -x` each
.deb to one folder. The output folder contains

    train/ val/                     JPEG images with 1 to 4 things
    annotations/{train,val}.json    COCO format
    pretrain/                       other images of the sources of train, without labels; a quarter has no thing
    manifest.json                   settings, a hash of all other files, and the sources of each split with packages

A third of the cut-outs of each class and of the photographs is in val, and these are in no image of train or pretrain.
The mask of a thing has the pixels with an opacity of at least one half that no later thing covers, as compressed RLE.

The same settings and packages give the same bytes. Image i of a split depends only on (seed, split, i, size), so a
larger data set begins with the images of a smaller one. A second run reuses unchanged data.

Licences, by Debian: GPL-2+ for tuxpaint-stamps-default, tuxpaint-data and mate-backgrounds; CC BY 1.0 to 3.0, CC BY-SA
2.0 to 4.0, CC0, GPL-2+, GPL-3 or public domain for the photographs in gcompris-qt-data; CC BY 4.0 or CC BY-SA 3.0 and
4.0 for lomiri-wallpapers-16.04. /usr/share/doc/PACKAGE/copyright names the authors of each file.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a tool is run as a file, and tools/ is not installed

from crossmae.errors import run_cli
from tools.demo.scenes import (
    MAX_TRIES,
    Array,
    check_range,
    coco_annotation,
    crop_photograph,
    is_complete,
    is_hidden,
    package_file,
    progress,
    replace_folder,
    save_jpeg,
    write_coco,
)
from tools.demo.things import CLASSES, PHOTOGRAPHS, STAMPS_PACKAGE, Cutout, load_cutouts, load_photographs

GENERATOR_VERSION = 1  # to be raised whenever the same settings give other bytes

VAL_SHARE = 3  # one of so many sources is in val
LONGEST_SIDE = (24 / 128, 80 / 128)  # smallest and largest side of a thing, as shares of the image
MAX_ENLARGEMENT = 1.5  # of a cut-out, so that it is as sharp as the photograph
MAX_ROTATION = 15.0  # degrees
MIN_AREA = 0.006  # of the image; 98 pixels at 128, so that thin things are not tiny, too
MIN_DIFFERENCE = 25.0  # mean difference (0 to 255) of a thing's pixels from those that it covers
EMPTY_SHARE = 0.25  # of the images in pretrain
COUNTS = (1, 4)  # smallest and largest number of things in an image
STREAMS = ("train", "val", "pretrain", "split")  # the position of a name seeds its random numbers
LIMITS = {
    "train": (1, 1_000_000),
    "val": (1, 1_000_000),
    "pretrain": (0, 1_000_000),
    "size": (64, 1024),
    "seed": (0, 2**32 - 1),
}


@dataclass(frozen=True)
class StudyDataSettings:
    """Settings that determine every byte of the data, for given versions of the packages, NumPy and Pillow.

    `train`, `val` and `pretrain` are numbers of images, `size` is the side of the images in pixels.
    """

    train: int = 2000
    val: int = 300
    pretrain: int = 8000
    size: int = 128
    seed: int = 0

    def __post_init__(self) -> None:
        for name, (low, high) in LIMITS.items():
            check_range(name, getattr(self, name), low, high)


class Sources(NamedTuple):
    """The photographs and cut-outs of a split."""

    photographs: dict[str, Image.Image]  # by package and file name
    cutouts: list[list[Cutout]]  # by label


class Thing(NamedTuple):
    """An object in an image, with masks (size, size) bool."""

    label: int  # position of the class in CLASSES
    name: str  # of the cut-out
    own: Array  # mask of the whole object
    visible: Array  # mask without the pixels that later objects cover; updated in place


class Picture(NamedTuple):
    """A composed image."""

    pixels: Array  # (size, size, 3) uint8
    photograph: str
    things: list[Thing]  # in painting order


def load_sources(seed: int, size: int, packages: Sequence[Path]) -> dict[str, Sources]:
    """Load and split the sources.

    Photographs have at most 4 * `size` pixels per side, cut-outs at most `size`.
    """
    photographs = load_photographs(packages, 4 * size)
    cutouts = load_cutouts(packages, size)
    rng = np.random.default_rng([seed, STREAMS.index("split")])
    parts = {name: split_names(rng, [cutout.name for cutout in group]) for name, group in cutouts.items()}
    of_photographs = split_names(rng, list(photographs))
    return {
        split: Sources(
            {name: photographs[name] for name in of_photographs[split]},
            [[cutout for cutout in group if cutout.name in parts[label][split]] for label, group in cutouts.items()],
        )
        for split in ("train", "val")
    }


def split_names(rng: np.random.Generator, names: list[str]) -> dict[str, list[str]]:
    """Divide names at random, about 2 : 1, into train and val."""
    order = rng.permutation(len(names)).tolist()
    held_out = max(1, round(len(names) / VAL_SHARE))
    return {"train": [names[i] for i in sorted(order[held_out:])], "val": [names[i] for i in sorted(order[:held_out])]}


def compose_picture(seed: int, stream: str, index: int, sources: Sources, size: int) -> Picture:
    """Compose image `index` of one of the `STREAMS`.

    The image has a thing of the class `index % classes`. The other classes are drawn evenly.
    """
    rng = np.random.default_rng([seed, STREAMS.index(stream), index])
    if stream == "pretrain" and rng.random() < EMPTY_SHARE:
        name, pixels = crop_photograph(rng, sources.photographs, size)
        return Picture(pixels, name, [])
    classes = len(sources.cutouts)
    count = int(rng.integers(COUNTS[0], COUNTS[1] + 1))
    labels = rng.permutation([index % classes, *rng.integers(0, classes, count - 1)]).tolist()
    for _ in range(MAX_TRIES):
        name, pixels = crop_photograph(rng, sources.photographs, size)
        canvas = pixels.astype(np.float32)
        things: list[Thing] = []
        if all(place_thing(rng, canvas, things, sources.cutouts[label], label) for label in labels):
            return Picture(np.rint(canvas).astype(np.uint8), name, things)
    raise RuntimeError(f"no room for the classes {labels} in {size} pixels: {stream} {index}, seed {seed}")


def place_thing(
    rng: np.random.Generator, canvas: Array, things: list[Thing], cutouts: list[Cutout], label: int
) -> bool:
    """Paint one of `cutouts` on `canvas` (size, size, 3), and append it.

    Cut-out, size, angle, light and place are drawn again until the thing is large enough, differs from its
    background, and hides no earlier thing. Returns False if MAX_TRIES draws fail. Then nothing is painted.
    """
    for _ in range(MAX_TRIES):
        cutout = cutouts[rng.integers(len(cutouts))]
        colour, alpha = render_cutout(rng, cutout.image, len(canvas))
        if max(alpha.shape) > len(canvas):
            continue
        top, left = (int(rng.integers(len(canvas) - length + 1)) for length in alpha.shape)
        window = np.s_[top : top + alpha.shape[0], left : left + alpha.shape[1]]
        own = np.zeros(canvas.shape[:2], dtype=bool)
        own[window] = alpha >= 0.5
        if np.count_nonzero(own) < MIN_AREA * own.size or any(is_hidden(t.own, t.visible, own) for t in things):
            continue
        if np.abs(colour - canvas[window])[own[window]].mean() < MIN_DIFFERENCE:
            continue
        canvas[window] += alpha[..., None] * (colour - canvas[window])
        for earlier in things:
            earlier.visible[own] = False
        things.append(Thing(label, cutout.name, own, own.copy()))
        return True
    return False


def render_cutout(rng: np.random.Generator, image: Image.Image, size: int) -> tuple[Array, Array]:
    """Scale, flip, turn and light a cut-out at random.

    `size` is the side of the image in pixels. Returns the colour (h, w, 3) in [0, 255] and the opacity (h, w) in [0,
    1].
    """
    side = min(rng.uniform(*LONGEST_SIDE) * size, MAX_ENLARGEMENT * max(image.size))
    scale = side / max(image.size)
    width, height = (max(1, round(scale * length)) for length in image.size)
    image = image.resize((width, height), Image.Resampling.BICUBIC, reducing_gap=2.0)
    if rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    # Pillow weights colours by opacity, so transparent pixels leave no halo.
    image = image.rotate(rng.uniform(-MAX_ROTATION, MAX_ROTATION), Image.Resampling.BICUBIC, expand=True)
    pixels = np.asarray(image, dtype=np.float32)
    alpha: Array = pixels[..., 3] / 255
    colour: Array = pixels[..., :3]
    mean = colour[alpha >= 0.5].mean() if (alpha >= 0.5).any() else 0.0
    colour = (mean + rng.uniform(0.85, 1.15) * (colour - mean)) * rng.uniform(0.85, 1.15)
    return np.clip(colour, 0, 255), alpha


def make_study_data(
    settings: StudyDataSettings, output: Path, packages: Sequence[Path] = (), force: bool = False
) -> bool:
    """Write the data set, all or nothing. Return False if it exists.

    `packages` are folders with extracted Debian packages. `force` replaces damaged data and data with other settings,
    but never a folder that this function did not write.

    Raises:
        UserError: `output` has other content or cannot be written, or a package is missing.
    """
    output = output.absolute()
    record = {"generator_version": GENERATOR_VERSION, **asdict(settings)}
    if is_complete(output, record, "study data", force=force):
        return False
    package_file("pycocotools", "mask.py")
    sources = load_sources(settings.seed, settings.size, packages)
    replace_folder(output, record, partial(write_data, settings, sources))
    return True


def write_data(settings: StudyDataSettings, sources: dict[str, Sources], root: Path) -> dict[str, Any]:
    """Write images and annotations under the empty folder `root`.

    Returns the further entries of the manifest: the sources of each split.
    """
    write_detection(settings.seed, settings.size, "train", settings.train, sources["train"], root)
    write_detection(settings.seed, settings.size, "val", settings.val, sources["val"], root)
    (root / "pretrain").mkdir()
    for index in progress(range(settings.pretrain), "pretrain"):
        picture = compose_picture(settings.seed, "pretrain", index, sources["train"], settings.size)
        save_jpeg(picture.pixels, root / "pretrain" / f"{index:06d}.jpg")
    return {"sources": {split: list_sources(of_split) for split, of_split in sources.items()}}


def list_sources(sources: Sources) -> dict[str, Any]:
    """List photographs and cut-outs, with the packages that have their licences."""
    named = {label: [cutout.name for cutout in group] for label, group in zip(CLASSES, sources.cutouts, strict=True)}
    return {"photographs": list(sources.photographs), "cutouts": {STAMPS_PACKAGE: named}}


def write_detection(seed: int, size: int, split: str, count: int, sources: Sources, root: Path) -> None:
    """Write the images and COCO annotations of a split."""
    (root / split).mkdir()
    packages = list(dict.fromkeys(source.package for source in PHOTOGRAPHS))
    images, annotations = list[dict[str, Any]](), list[dict[str, Any]]()
    for index in progress(range(count), split):
        picture = compose_picture(seed, split, index, sources, size)
        image = {"id": index + 1, "file_name": f"{index:06d}.jpg", "width": size, "height": size}
        license_id = packages.index(picture.photograph.partition("/")[0]) + 1
        images.append(image | {"license": license_id, "photograph": picture.photograph})
        for thing in picture.things:
            entry = coco_annotation(len(annotations) + 1, index + 1, thing.label + 1, thing.visible)
            annotations.append(entry | {"cutout": thing.name})
        save_jpeg(picture.pixels, root / split / f"{index:06d}.jpg")
    licenses = [f"terms of the Debian packages {STAMPS_PACKAGE} and {package}" for package in packages]
    content = {
        "info": {"description": f"things in photographs, {split}", "version": str(GENERATOR_VERSION)},
        "licenses": [{"id": i, "name": name, "url": ""} for i, name in enumerate(licenses, 1)],
        "images": images,
        "annotations": annotations,
        "categories": [{"id": i, "name": name, "supercategory": "thing"} for i, name in enumerate(CLASSES, 1)],
    }
    write_coco(root, split, content)


def main() -> None:
    """Write the data set that the command line describes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default_output = Path("outputs/study/things")
    parser.add_argument("--output", type=Path, default=default_output, help="folder (default: %(default)s)")
    helps = {
        "train": "labelled training images",
        "val": "held-out images",
        "pretrain": "images without labels",
        "size": "side in pixels",
        "seed": "random seed",
    }
    for name, what in helps.items():
        default = getattr(StudyDataSettings, name)
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N", help=f"{what} (default: %(default)s)")
    what = "folders with extracted packages, searched before the installed packages"
    parser.add_argument("--packages", type=Path, nargs="+", action="extend", default=[], metavar="FOLDER", help=what)
    parser.add_argument("--force", action="store_true", help="replace study data of other settings")
    args = parser.parse_args()
    settings = StudyDataSettings(args.train, args.val, args.pretrain, args.size, args.seed)
    made = make_study_data(settings, args.output, args.packages, force=args.force)
    counts = f"{args.train} train, {args.val} val and {args.pretrain} pretrain images"
    print(f"{args.output}: {f'made {counts}' if made else 'reused, complete and unchanged'}")


if __name__ == "__main__":
    run_cli(main)
