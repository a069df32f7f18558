"""Things in photographs: no source in two splits, masks where the opacity is, the same bytes, packages named.

The packages are small fakes that the test writes: coloured discs with transparent surroundings, noise as photographs,
and a Qt resource file.
"""

from __future__ import annotations

import io
import json
import re
import runpy
import struct
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("pycocotools", reason="needs the extra [demo]")

from pycocotools.coco import COCO

from crossmae.errors import UserError
from tools import make_study_data as study_data
from tools.demo import things
from tools.demo.scenes import MIN_VISIBLE_SHARE
from tools.make_study_data import StudyDataSettings, compose_picture, load_sources, make_study_data

TOOL = Path(study_data.__file__)
SETTINGS = StudyDataSettings(train=22, val=11, pretrain=9, size=64, seed=3)
SPLITS = ("train", "val")
PER_CLASS = 6


def encoded(image: Image.Image, suffix: str) -> bytes:
    target = io.BytesIO()
    image.save(target, {".webp": "WEBP", ".jpg": "JPEG", ".png": "PNG"}[suffix])
    return target.getvalue()


def photograph(seed: int) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 9, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((150, 100))


def disc(seed: int) -> Image.Image:
    """Draw a disc with a soft edge, with black in the transparent pixels."""
    y, x = np.mgrid[:60, :90] - np.array([30, 45])[:, None, None]
    alpha = np.clip(25.5 - np.hypot(x, y), 0, 1)
    colour = np.random.default_rng(seed).integers(60, 256, 3)
    return Image.fromarray(np.dstack([(alpha > 0)[..., None] * colour, 255 * alpha]).astype(np.uint8))


def write_rcc(path: Path, files: dict[str, bytes]) -> None:
    """Write a Qt resource file of version 1 with one folder in its root."""
    names, contents, nodes = b"", b"", b""
    for name, content in {"photos": b"", **files}.items():
        offset = len(names)
        names += struct.pack(">HI", len(name), 0) + name.encode("utf-16-be")
        if name == "photos":
            nodes += struct.pack(">IHII", 0, 2, 1, 1) + struct.pack(">IHII", offset, 2, len(files), 2)
        else:
            nodes += struct.pack(">IHHHI", offset, 0, 0, 0, len(contents))
            contents += struct.pack(">I", len(content)) + content
    offsets = (20, 20 + len(nodes), 20 + len(nodes) + len(contents))
    path.write_bytes(struct.pack(">4s4I", b"qres", 1, *offsets) + nodes + contents + names)


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Write fakes of the packages, the stamps apart from the photographs."""
    stamps, photographs = tmp_path_factory.mktemp("stamps"), tmp_path_factory.mktemp("photographs")
    for number, places in enumerate(things.CLASSES.values()):
        folder = stamps / things.STAMPS / places.split()[0]
        (folder / "cartoon").mkdir(parents=True)
        for k in range(PER_CLASS):
            disc(100 * number + k).save(folder / f"thing{k}.png")
        disc(0).save(folder / "thing0_mirror.png")
        disc(1).save(folder / "cartoon" / "drawing.png")
    for number, source in enumerate(things.PHOTOGRAPHS):
        patterns = re.sub(r"\[(.).*?\]", r"\1", source.names).replace("?", "1").replace("*", "x").split()
        names = [pattern if "." in pattern else f"{pattern}.jpg" for pattern in patterns]
        files = {name: encoded(photograph(50 * number + k), Path(name).suffix) for k, name in enumerate(names)}
        place = photographs / source.place
        place.parent.mkdir(parents=True, exist_ok=True)
        if place.suffix == ".rcc":
            write_rcc(place, files)
        else:
            place.mkdir(parents=True, exist_ok=True)
            for name, content in files.items():
                (place / name).write_bytes(content)
    return [stamps, photographs]


@pytest.fixture(scope="module")
def data(packages: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("study") / "data"
    assert make_study_data(SETTINGS, folder, packages) is True
    return folder


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def read_annotations(folder: Path, split: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "annotations" / f"{split}.json").read_text())
    return content


def test_two_runs_are_byte_identical_and_another_seed_is_not(data: Path, packages: list[Path], tmp_path: Path) -> None:
    make_study_data(SETTINGS, tmp_path / "again", packages[::-1])
    assert tree(tmp_path / "again") == tree(data)
    make_study_data(StudyDataSettings(2, 2, 2, 64, seed=4), tmp_path / "other", packages)
    for name in ("train/000000.jpg", "val/000000.jpg", "pretrain/000000.jpg"):
        assert (tmp_path / "other" / name).read_bytes() != (data / name).read_bytes()


def test_a_larger_set_begins_with_the_smaller_one(data: Path, packages: list[Path], tmp_path: Path) -> None:
    make_study_data(StudyDataSettings(7, 3, 2, 64, seed=3), tmp_path / "few", packages)
    few, many = tree(tmp_path / "few"), tree(data)
    images = [name for name in few if name.endswith(".jpg")]
    assert len(images) == 12
    assert all(few[name] == many[name] for name in images)
    for split, count in (("train", 7), ("val", 3)):
        first = [a for a in read_annotations(data, split)["annotations"] if a["image_id"] <= count]
        assert read_annotations(tmp_path / "few", split)["annotations"] == first


def test_splits_share_no_source_and_divide_all_of_them_2_to_1(data: Path, packages: list[Path]) -> None:
    sources = load_sources(SETTINGS.seed, SETTINGS.size, packages)
    photographs = [set(sources[split].photographs) for split in SPLITS]
    assert not photographs[0] & photographs[1]
    assert photographs[0] | photographs[1] == set(things.load_photographs(packages, 64))
    for train, val in zip(sources["train"].cutouts, sources["val"].cutouts, strict=True):
        names = [{cutout.name for cutout in group} for group in (train, val)]
        assert (len(names[0]), len(names[1]), len(names[0] | names[1])) == (4, 2, PER_CLASS)
    listed = json.loads((data / "manifest.json").read_text())["sources"]
    for split, allowed in zip(SPLITS, photographs, strict=True):
        content = read_annotations(data, split)
        assert set(listed[split]["photographs"]) == allowed
        assert {image["photograph"] for image in content["images"]} <= allowed
        cutouts = {cutout.name for group in sources[split].cutouts for cutout in group}
        assert {entry["cutout"] for entry in content["annotations"]} <= cutouts


def test_pretraining_images_are_other_images_of_the_sources_of_train(data: Path, packages: list[Path]) -> None:
    train = load_sources(SETTINGS.seed, SETTINGS.size, packages)["train"]
    counts = []
    for index in range(SETTINGS.pretrain):
        picture = compose_picture(SETTINGS.seed, "pretrain", index, train, SETTINGS.size)
        with Image.open(data / "pretrain" / f"{index:06d}.jpg") as image:
            assert np.abs(np.asarray(image) - picture.pixels.astype(int)).mean() < 5
        counts.append(len(picture.things))
    assert 0 in counts
    assert max(counts) > 1
    assert not set(tree(data / "pretrain").values()) & set(tree(data / "train").values())


def test_a_mask_is_where_the_cutout_is_at_least_half_opaque() -> None:
    white = Image.new("RGBA", (90, 60), "white")
    white.putalpha(disc(0).getchannel("A"))
    cutout = things.Cutout("white", white)
    for seed in range(20):
        canvas, painted = np.zeros((96, 96, 3), dtype=np.float32), list[study_data.Thing]()
        assert study_data.place_thing(np.random.default_rng(seed), canvas, painted, [cutout], 0)
        opacity = canvas[..., 0] / canvas.max()
        sure = np.abs(opacity - 0.5) > 1e-3
        assert np.array_equal(painted[0].own[sure], (opacity >= 0.5)[sure])
        assert painted[0].own.sum() >= study_data.MIN_AREA * 96 * 96


def test_transparent_black_leaves_no_halo() -> None:
    image = disc(7)
    for seed in range(20):
        colour, alpha = study_data.render_cutout(np.random.default_rng(seed), image, 128)
        centre = colour[alpha > 0.99].mean(axis=0)
        rim = colour[(alpha >= 0.4) & (alpha < 0.9)]
        assert len(rim) > 10
        assert np.abs(rim.mean(axis=0) - centre).max() < 5


def test_masks_are_what_later_things_leave_visible(data: Path, packages: list[Path]) -> None:
    train = load_sources(SETTINGS.seed, SETTINGS.size, packages)["train"]
    coco = COCO(str(data / "annotations/train.json"))
    overlaps = 0
    for index in range(SETTINGS.train):
        picture = compose_picture(SETTINGS.seed, "train", index, train, SETTINGS.size)
        top = np.full((SETTINGS.size, SETTINGS.size), -1)
        for order, thing in enumerate(picture.things):
            overlaps += int((top[thing.own] >= 0).sum())
            top[thing.own] = order
        entries = coco.loadAnns(coco.getAnnIds(index + 1))
        for order, (thing, entry) in enumerate(zip(picture.things, entries, strict=True)):
            mask = coco.annToMask(entry).astype(bool)
            assert np.array_equal(mask, top == order)
            assert mask.sum() >= MIN_VISIBLE_SHARE * thing.own.sum()
            y, x = np.nonzero(mask)
            assert entry["bbox"] == [x.min(), y.min(), np.ptp(x) + 1, np.ptp(y) + 1]
            assert entry["area"] == mask.sum()
            assert list(things.CLASSES)[entry["category_id"] - 1] == things.class_of(entry["cutout"])
    assert overlaps > 0  # otherwise nothing was tested


def test_every_class_is_in_both_splits_and_images_have_1_to_4_things(data: Path) -> None:
    for split in SPLITS:
        content = read_annotations(data, split)
        assert [category["name"] for category in content["categories"]] == list(things.CLASSES)
        assert {a["category_id"] for a in content["annotations"]} == set(range(1, len(things.CLASSES) + 1))
        counts = np.bincount([entry["image_id"] for entry in content["annotations"]])[1:]
        assert len(counts) == len(content["images"])
        assert (counts.min(), counts.max()) == (1, 4)


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("animals/birds/owl", "bird"),
        ("animals/birds/cartoon/owl", None),
        ("animals/birdsong", None),
        ("animals/mammals/elephant", "hoofed mammal"),
        ("animals/mammals/deer/doe", "hoofed mammal"),
        ("animals/mammals/dogs/fox", "other mammal"),
        ("animals/mammals/hedgehog", None),
        ("animals/mammals/bears/bear", "other mammal"),
        ("animals/mammals/bears/toys/edward_bear", "household thing"),
        ("household/tools/measuring_tape_mirror", None),
        ("symbols/money/00_symbols/euro", None),
        ("symbols/chess/b_1_king", None),
    ],
)
def test_the_longest_entry_decides_the_class_and_copies_and_cartoons_have_none(name: str, label: str | None) -> None:
    assert things.class_of(name) == label


def test_a_missing_package_is_named_with_the_commands_that_get_it(packages: list[Path], tmp_path: Path) -> None:
    command = r"apt-get install {0}, or .* apt-get download {0} && dpkg -x {0}_\*\.deb FOLDER"
    with pytest.raises(UserError, match="^tuxpaint-stamps-default: .*" + command.format("tuxpaint-stamps-default")):
        make_study_data(SETTINGS, tmp_path / "data", packages[1:])
    with pytest.raises(UserError, match="^gcompris-qt-data: .*" + command.format("gcompris-qt-data")):
        make_study_data(SETTINGS, tmp_path / "data", packages[:1])
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_packages_share_is_passed_over_if_the_files_are_elsewhere(tmp_path: Path) -> None:
    source = things.PhotographSource("some-wallpapers", "usr/share/backgrounds", "sunset_by_*")
    roots = [tmp_path / "other", tmp_path / "right"]
    for root, name in zip(roots, ("mate.jpg", "sunset_by_me.jpg"), strict=True):
        (root / source.place).mkdir(parents=True)
        photograph(0).save(root / source.place / name)
    assert list(things.find_files(source, roots)) == ["sunset_by_me.jpg"]
    with pytest.raises(UserError, match=r"some-wallpapers: .*of another version, without .*/sunset_by_\*"):
        things.find_files(source, roots[:1])


@pytest.mark.parametrize("damage", [b"", b"qres", b"JPEG" + bytes(40), None])
def test_a_damaged_resource_file_is_named(damage: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "photos.rcc"
    write_rcc(path, {"a.webp": b"first", "b.webp": b"second"})
    assert dict(things.read_rcc(path)) == {"a.webp": b"first", "b.webp": b"second"}
    path.write_bytes(path.read_bytes()[:60] if damage is None else damage)
    with pytest.raises(UserError, match=r"photos\.rcc: is (no|a damaged) Qt resource file"):
        dict(things.read_rcc(path))


def test_a_folder_of_someone_else_is_never_replaced(packages: list[Path], tmp_path: Path) -> None:
    (tmp_path / "holiday.jpg").write_bytes(b"precious")
    for force in (False, True):
        with pytest.raises(UserError, match="is not study data"):
            make_study_data(SETTINGS, tmp_path, packages, force=force)
    assert list(tree(tmp_path)) == ["holiday.jpg"]


def test_command_line_makes_reuses_and_refuses(
    packages: Sequence[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def call(train: int, *folders: Path) -> str:
        options = ["--size", "64", "--train", str(train), "--val", "1", "--pretrain", "0"]
        given = [word for folder in folders for word in ("--packages", str(folder))]
        monkeypatch.setattr(sys, "argv", [str(TOOL), "--output", str(tmp_path / "data"), *options, *given])
        runpy.run_path(str(TOOL), run_name="__main__")
        return capsys.readouterr().out

    assert "made 2 train, 1 val and 0 pretrain images" in call(2, *packages)
    assert "reused" in call(2)  # needs no package
    with pytest.raises(SystemExit):
        call(3, *packages)
    message = capsys.readouterr().err
    assert re.match(r"error: .*found .*'train': 2.* expected .*'train': 3.*--force", message)
