"""Find the cut-outs and photographs that `make_study_data.py` composes, in Debian packages.

Both tables were checked by eye. Cut-outs are photographs with transparent surroundings: drawings, cartoons, rendered
images, silhouettes, glass and mirrored copies are left out. Photographs show none of the classes in the foreground,
and no subject twice.
"""

from __future__ import annotations

import fnmatch
import io
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from crossmae.errors import UserError

STAMPS_PACKAGE = "tuxpaint-stamps-default"
STAMPS = "usr/share/tuxpaint/stamps"
# Folders and files (without .png) of the stamps. The longest entry that fits decides.
CLASSES = {
    "bird": "animals/birds",
    "hoofed mammal": """
        animals/mammals/bovines animals/mammals/camel animals/mammals/deer animals/mammals/equines
        animals/mammals/elephant animals/mammals/giraffe animals/mammals/hippopotamus animals/mammals/pig
        animals/mammals/pig_golden animals/mammals/pig_golden2 animals/mammals/rhino_black animals/mammals/wildboar
    """,
    "other mammal": "animals/mammals animals/marsupials",
    "small animal": "animals/amphibians animals/fish animals/insects animals/lizards animals/shellfish",
    "food": """
        food plants/mushrooms plants/trees/rambutan seasonal/christmas/Christmas_pudding seasonal/christmas/Mince_Pie
        seasonal/christmas/Roast_turkey
    """,
    "flower": "plants/flowers",
    "coin": "symbols/money",
    "household thing": """
        household animals/mammals/bears/toys clothes/clothespin_new clothes/clothespin_old hobbies/binoculars
        hobbies/camera_35mm medical/mercurythermometer medical/stethoscope medical/syringe
        seasonal/christmas/German_Christmas_toy sports/trophy_cup town/uk_post_box town/usps_mailbox
    """,
    "instrument": "hobbies/music",
    "vehicle": "vehicles military/vehicles space/apollo_lander",
    "planet": "space/moon space/planets",
}
LEFT_OUT = """
    animals/insects/bee animals/mammals/aquatic/whale animals/mammals/echidna animals/mammals/hedgehog
    food/nuts/walnut_shelled food/pizza household/arttools/highlighter household/dishes/glass household/key
    military/vehicles/ww2_german_gun plants/flowers/appooppanthady space/planets/0_sun symbols/money/00_symbols
    vehicles/7spoke256 vehicles/emergency/sedan_police vehicles/wheel_tractor
"""
DRAWN_FOLDER = "cartoon"
COPIES = ("*_mirror", "*_flip", "*_mirror_flip")


class PhotographSource(NamedTuple):
    """A folder or Qt resource file (.rcc) of a package, and patterns for the names of its photographs."""

    package: str
    place: str
    names: str


GCOMPRIS = "usr/share/gcompris-qt/rcc"
PHOTOGRAPHS = (
    PhotographSource("gcompris-qt-data", f"{GCOMPRIS}/explore_monuments.rcc", "*.webp"),
    PhotographSource(
        "gcompris-qt-data",
        f"{GCOMPRIS}/details.rcc",
        "Louvre_*_background.webp FanoeWindmill_background.webp EgeskovSlot*_background.webp Gizah*_background.webp "
        "EilanDonan*_background.webp TowerBridge*_background.webp NDP_background.webp Nagoya_background.webp "
        "OperaSidney_background.webp",
    ),
    PhotographSource(
        "gcompris-qt-data",
        f"{GCOMPRIS}/categorization.rcc",
        "dam?.webp solar[24578].webp monument[12].webp parthenon.webp zimniPalace.webp burj.webp empireState.webp",
    ),
    PhotographSource("gcompris-qt-data", f"{GCOMPRIS}/clickgame.rcc", "sea?.webp"),
    PhotographSource(
        "tuxpaint-data",
        "usr/share/tuxpaint/templates",
        "burnt_bark.jpg cliff.jpg corn_maze.jpg lighthouse.jpg mossy_bark.jpg mossy_log.jpg mudstone.jpg "
        "ocean_splash.jpg ocean_waves.jpg redwoods_above.jpg rocks.jpg spiders_web.jpg sun_behind_clouds.jpg "
        "sun_behind_leaves.jpg trees_above.jpg trees_at_dusk.jpg wool_mill_machine.jpg",
    ),
    PhotographSource(
        "mate-backgrounds",
        "usr/share/backgrounds/mate/nature",
        "Aqua.jpg Blinds.jpg Dune.jpg GreenMeadow.jpg RainDrops.jpg Storm.jpg Wood.jpg",
    ),
    PhotographSource(
        "lomiri-wallpapers-16.04",
        "usr/share/backgrounds",
        "Bridge_by_* aitzgorri_by_* analogpattern_by_* life_by_* picosdeeuropa_by_* sunset_by_*",
    ),
)


class Cutout(NamedTuple):
    """A photographed object, cropped to its opaque pixels."""

    name: str  # path below the stamps
    image: Image.Image  # RGBA


def missing(package: str, place: str) -> UserError:
    """Return the error that names the commands which get a Debian package."""
    return UserError(
        f"{package}: the package is missing or of another version, without {place}. Install it: apt-get install "
        f"{package}, or without root: apt-get download {package} && dpkg -x {package}_*.deb FOLDER, and give "
        "--packages FOLDER."
    )


def load_cutouts(roots: Sequence[Path], side: int) -> dict[str, list[Cutout]]:
    """Load the cut-outs of each class, sorted by name.

    Cut-outs have at most `side` pixels per side. Raises UserError if the package is missing.
    """
    folder = next((root / STAMPS for root in (*roots, Path("/")) if (root / STAMPS).is_dir()), None)
    if folder is None:
        raise missing(STAMPS_PACKAGE, STAMPS)
    found: dict[str, list[Cutout]] = {name: [] for name in CLASSES}
    for path in sorted(folder.rglob("*.png")):
        name = path.relative_to(folder).with_suffix("").as_posix()
        label = class_of(name)
        if label is not None:
            found[label].append(Cutout(name, load_cutout(path, side)))
    for label, cutouts in found.items():
        if len(cutouts) < 3:
            raise missing(STAMPS_PACKAGE, f"3 cut-outs of the class {label!r} in {STAMPS}")
    return found


def class_of(name: str) -> str | None:
    """Return the class of a stamp, or None without a class.

    `name` is the path below the stamps, without suffix.
    """
    if DRAWN_FOLDER in name.split("/") or any(fnmatch.fnmatchcase(name, copy) for copy in COPIES):
        return None
    entries = {entry: label for label, places in CLASSES.items() for entry in places.split()}
    entries |= dict.fromkeys(LEFT_OUT.split(), "")
    fitting = [entry for entry in entries if name == entry or name.startswith(f"{entry}/")]
    return entries[max(fitting, key=len)] or None if fitting else None


def load_cutout(path: Path, side: int) -> Image.Image:
    """Load a cut-out as RGBA, cropped to its opaque pixels.

    The result has at most `side` pixels per side. Raises UserError if no pixel is opaque.
    """
    image = Image.open(path).convert("RGBA")
    box = Image.fromarray(np.asarray(image)[..., 3] >= 128).getbbox()
    if box is None:
        raise UserError(f"{path}: has no opaque pixel. Install the package again.")
    image = image.crop(box)
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    return image


def load_photographs(roots: Sequence[Path], side: int) -> dict[str, Image.Image]:
    """Load the RGB photographs by package and name.

    Photographs have at most `side` pixels per side. Raises UserError if a package is missing.
    """
    return {
        f"{source.package}/{name}": load_photograph(file, side)
        for source in PHOTOGRAPHS
        for name, file in find_files(source, roots).items()
    }


def find_files(source: PhotographSource, roots: Sequence[Path]) -> dict[str, Path | bytes]:
    """Find the files of a source, by name.

    The first of `roots` that has all files is taken, then the installed package. Packages share folders, so a folder
    may be there without these files.
    """
    lacking = source.place
    for place in (root / source.place for root in (*roots, Path("/")) if (root / source.place).exists()):
        files = dict(read_rcc(place)) if place.suffix == ".rcc" else {p.name: p for p in place.iterdir()}
        matches = {pattern: sorted(fnmatch.filter(files, pattern)) for pattern in source.names.split()}
        absent = [pattern for pattern, names in matches.items() if not names]
        if not absent:
            return {name: files[name] for names in matches.values() for name in names}
        lacking = f"{source.place}/{absent[0]}"
    raise missing(source.package, lacking)


def load_photograph(file: Path | bytes, side: int) -> Image.Image:
    """Load an RGB photograph of at most `side` pixels per side."""
    encoded = Image.open(io.BytesIO(file) if isinstance(file, bytes) else file)
    encoded.draft("RGB", (side, side))  # a JPEG is decoded at a fraction of its size
    photograph = encoded.convert("RGB")
    photograph.thumbnail((side, side), Image.Resampling.LANCZOS)
    return photograph


def read_rcc(path: Path) -> Iterator[tuple[str, bytes]]:
    """Yield name and content of files in a Qt resource file.

    Compressed files are skipped: images are not compressed again. The header has the offsets of a tree, of names and of
    contents. A node of the tree is a folder or a file.
    """
    data = path.read_bytes()
    try:
        magic, version, tree, contents, names = struct.unpack_from(">4s4I", data)
        if magic != b"qres":
            raise UserError(f"{path}: is no Qt resource file. Install the package again.")
        node_size = 14 if version < 2 else 22  # from version 2 on, with the time of modification
        folders = [0]
        while folders:
            count, first = struct.unpack_from(">2I", data, tree + folders.pop() * node_size + 6)
            for node in range(first, first + count):
                name, flags = struct.unpack_from(">IH", data, tree + node * node_size)
                if flags & 2:
                    folders.append(node)
                elif not flags & 5:  # neither zlib nor Zstandard
                    (length,) = struct.unpack_from(">H", data, names + name)
                    start = names + name + 6  # after the length and a hash
                    (offset,) = struct.unpack_from(">I", data, tree + node * node_size + 10)
                    (size,) = struct.unpack_from(">I", data, contents + offset)
                    content = data[contents + offset + 4 : contents + offset + 4 + size]
                    yield data[start : start + 2 * length].decode("utf-16-be"), content
    except struct.error:
        raise UserError(f"{path}: is a damaged Qt resource file. Install the package again.") from None
