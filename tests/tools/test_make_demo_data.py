"""The demo's data: the same bytes every time, exact masks, splits that share nothing, no half-written folder.

Masks are checked against an independent slow reference that paints the digits again, pixel by pixel, and with
pycocotools, which is what users' tools read them with.
"""

import errno
import importlib.util
import json
import runpy
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("pycocotools", reason="needs the extra [demo]")
for package in ("mlxtend", "skimage", "sklearn"):
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"needs the extra [demo]: {package}", allow_module_level=True)

from pycocotools.coco import COCO  # noqa: E402

from crossmae.errors import UserError  # noqa: E402
from tools import make_demo_data as demo_data  # noqa: E402
from tools.demo import scenes  # noqa: E402
from tools.make_demo_data import DemoDataSettings, compose_scene, make_demo_data  # noqa: E402

TOOL = Path(__file__).parents[2] / "tools" / "make_demo_data.py"
SETTINGS = DemoDataSettings(train=24, val=12, size=96, seed=3)
SPLITS = ("train", "val")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "data"
    assert make_demo_data(SETTINGS, folder) is True
    return folder


@pytest.fixture(scope="module")
def sources() -> dict[str, demo_data.SourceImages]:
    return demo_data.load_sources(SETTINGS.seed, SETTINGS.size)


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def read_annotations(folder: Path, split: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "annotations" / f"{split}.json").read_text())
    return content


def load_coco(folder: Path, split: str) -> COCO:
    return COCO(str(folder / "annotations" / f"{split}.json"))


def test_two_runs_are_byte_identical(data: Path, tmp_path: Path) -> None:
    make_demo_data(SETTINGS, tmp_path / "again")
    assert tree(tmp_path / "again") == tree(data)


def test_another_seed_gives_other_images_and_another_split_of_the_digits(data: Path, tmp_path: Path) -> None:
    make_demo_data(DemoDataSettings(train=2, val=2, size=96, seed=4), tmp_path / "other")
    assert (tmp_path / "other/train/000000.jpg").read_bytes() != (data / "train/000000.jpg").read_bytes()
    rows = [demo_data.load_sources(seed, 96)["val"].rows for seed in (3, 4)]
    assert not np.array_equal(rows[0][0], rows[1][0])


def test_every_image_is_drawn_on_its_own(data: Path) -> None:
    for folder in (*SPLITS, "classify/train", "classify/val", "scenes/train", "scenes/val"):
        images = list(tree(data / folder).values())
        assert len(set(images)) == len(images)
    for split in SPLITS:
        entries = read_annotations(data, split)["annotations"]
        counts = np.bincount([entry["image_id"] for entry in entries])[1:]
        assert set(counts) == {2, 3, 4}
        assert len({(*entry["bbox"], entry["mnist_row"]) for entry in entries}) == len(entries)


def test_scenes_have_a_folder_per_training_photograph_and_no_colour(data: Path) -> None:
    """Grey, and of a brightness and contrast that say nothing about the photograph."""
    names = {Path(name).stem for name in demo_data.PHOTOGRAPHS["train"]}
    for split in SPLITS:
        assert {folder.name for folder in (data / "scenes" / split).iterdir()} == names
    means = []
    for path in sorted((data / "scenes").rglob("*.jpg")):
        with Image.open(path) as image:
            assert (image.mode, image.size) == ("L", (96, 96))
            means.append(np.asarray(image).mean() / 255)
    assert 0.25 < min(means) < 0.4
    assert 0.6 < max(means) < 0.75


def test_an_image_does_not_depend_on_how_many_there_are(data: Path, tmp_path: Path) -> None:
    make_demo_data(DemoDataSettings(train=7, val=3, size=96, seed=3), tmp_path / "few")
    few, many = tree(tmp_path / "few"), tree(data)
    images = [name for name in few if name.endswith((".jpg", ".png"))]
    scenes = 2 * len(demo_data.PHOTOGRAPHS["train"])  # one of each photograph and split
    assert len(images) == 7 * 3 + 3 * 2 + scenes
    assert all(few[name] == many[name] for name in images)
    for split, count in (("train", 7), ("val", 3)):
        first = [a for a in read_annotations(data, split)["annotations"] if a["image_id"] <= count]
        assert read_annotations(tmp_path / "few", split)["annotations"] == first


def test_splits_share_no_photograph_and_no_handwriting(data: Path, sources: dict[str, demo_data.SourceImages]) -> None:
    used: dict[str, tuple[set[str], set[int]]] = {}
    for split in SPLITS:
        content = read_annotations(data, split)
        photographs = {image["photograph"] for image in content["images"]}
        rows = {annotation["mnist_row"] for annotation in content["annotations"]}
        allowed = {row for of_digit in sources[split].rows for row in of_digit.tolist()}
        assert photographs <= set(sources[split].photographs)
        assert rows <= allowed
        used[split] = set(sources[split].photographs), allowed
    assert not used["train"][0] & used["val"][0]
    assert not used["train"][1] & used["val"][1]
    assert len(used["train"][1] | used["val"][1]) == 5000


def test_no_scene_or_sample_is_in_both_splits_under_another_name(sources: dict[str, demo_data.SourceImages]) -> None:
    """Two photographs show the same motorcycle, and MNIST may have the same pixels twice."""
    assert [sum("motorcycle" in name for name in names) for names in demo_data.PHOTOGRAPHS.values()] == [2, 0]
    train, val = ({source.digits[row].tobytes() for rows in source.rows for row in rows} for source in sources.values())
    assert not train & val


def test_pretraining_folder_is_the_training_images_and_nothing_held_out(data: Path) -> None:
    contents = {name: set(tree(data / name).values()) for name in ("train", "val", "pretrain")}
    assert contents["pretrain"] == contents["train"]
    assert not contents["pretrain"] & contents["val"]


@pytest.mark.parametrize("few", [7, 100])
def test_few_annotations_are_of_the_first_training_images(data: Path, tmp_path: Path, few: int) -> None:
    make_demo_data(DemoDataSettings(train=12, val=1, size=96, seed=3, few=few), tmp_path / "data")
    part, whole = read_annotations(tmp_path / "data", "few"), read_annotations(data, "train")
    assert part["images"] == whole["images"][: min(few, 12)]
    ids = {image["id"] for image in part["images"]}
    assert part["annotations"] == [one for one in whole["annotations"] if one["image_id"] in ids]
    assert part["categories"] == whole["categories"]


def test_masks_of_an_image_do_not_overlap_and_boxes_and_areas_are_exact(data: Path) -> None:
    for split in SPLITS:
        coco = load_coco(data, split)
        for image_id in coco.getImgIds():
            entries = coco.loadAnns(coco.getAnnIds(image_id))
            masks = [coco.annToMask(entry) for entry in entries]
            assert 2 <= len(masks) <= 5
            assert np.sum(masks, axis=0).max() == 1
            for entry, mask in zip(entries, masks, strict=True):
                y, x = np.nonzero(mask)
                assert entry["bbox"] == [x.min(), y.min(), np.ptp(x) + 1, np.ptp(y) + 1]
                assert entry["area"] == len(x) >= scenes.MIN_VISIBLE_AREA
                assert entry["iscrowd"] == 0


def test_occlusion_agrees_with_painting_one_pixel_at_a_time(sources: dict[str, demo_data.SourceImages]) -> None:
    covered = 0
    for index in range(12):
        scene = compose_scene(0, "train", index, sources["train"], 96, (2, 5), (24, 48))
        top = np.full((96, 96), -1)
        for order, instance in enumerate(scene.instances):
            for y, x in zip(*np.nonzero(instance.own), strict=True):
                covered += top[y, x] >= 0
                top[y, x] = order
        for order, instance in enumerate(scene.instances):
            assert np.array_equal(instance.visible, top == order)
            share = instance.visible.sum() / instance.own.sum()
            assert share >= scenes.MIN_VISIBLE_SHARE
    assert covered > 0  # otherwise nothing was tested


def test_masks_are_where_the_digits_colour_is(sources: dict[str, demo_data.SourceImages]) -> None:
    for index in range(12):
        scene = compose_scene(0, "classify/train", index, sources["train"], 96, (1, 1), (40, 60))
        (digit,) = scene.instances
        near = np.abs(scene.pixels - digit.colour).max(axis=2) <= 1
        inside = digit.own.copy()  # the mask without its outline, where the digit is half transparent
        for shift, axis in ((1, 0), (-1, 0), (1, 1), (-1, 1)):
            inside &= np.roll(digit.own, shift, axis)
        assert inside.any()
        assert near[inside].mean() >= 0.8


def test_digits_stand_out_from_what_they_were_painted_on(sources: dict[str, demo_data.SourceImages]) -> None:
    weights = [0.299, 0.587, 0.114]
    for seed in range(40):
        rng = np.random.default_rng(seed)
        _, photograph = scenes.crop_photograph(rng, sources["train"].photographs, 96)
        canvas, instances = photograph.astype(np.float32), list[demo_data.Instance]()
        if not demo_data.place_digit(rng, canvas, instances, sources["train"], seed % 10, (24, 48)):
            assert np.array_equal(canvas, photograph)  # a digit without a place leaves no trace
            continue
        behind = photograph[instances[0].own] @ weights
        contrast = np.abs(behind - instances[0].colour @ weights)
        assert np.mean(contrast >= demo_data.MIN_CONTRAST - 1e-3) >= 1 - demo_data.MAX_UNREADABLE_SHARE


def test_every_category_occurs_in_both_splits_and_names_the_right_digit(
    data: Path, sources: dict[str, demo_data.SourceImages]
) -> None:
    _, labels = demo_data.load_digits()
    for split in SPLITS:
        content = read_annotations(data, split)
        names = {category["id"]: category["name"] for category in content["categories"]}
        assert names == {digit + 1: str(digit) for digit in range(10)}
        assert {a["category_id"] for a in content["annotations"]} == set(names)
        assert all(names[a["category_id"]] == str(labels[a["mnist_row"]]) for a in content["annotations"])
        ids = [a["id"] for a in content["annotations"]]
        assert ids == list(range(1, len(ids) + 1))


def test_folders_have_the_images_and_digits_that_the_settings_and_annotations_name(data: Path) -> None:
    for split, count in (("train", SETTINGS.train), ("val", SETTINGS.val)):
        images = read_annotations(data, split)["images"]
        assert sorted(image["file_name"] for image in images) == sorted(tree(data / split))
        for image in images:
            with Image.open(data / split / image["file_name"]) as picture:
                assert (picture.size, picture.mode) == ((image["width"], image["height"]), "RGB")
        folders = sorted(path.name for path in (data / "classify" / split).iterdir())
        assert folders == [str(digit) for digit in range(10)]
        assert len(tree(data / "classify" / split)) == count


def test_a_second_run_reuses_what_is_there(data: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in data.rglob("*")}
    assert make_demo_data(SETTINGS, data) is False
    assert before == {path: path.stat().st_mtime_ns for path in data.rglob("*")}


def test_other_settings_are_refused_and_force_replaces_them(tmp_path: Path) -> None:
    small, other = DemoDataSettings(train=2, val=1, size=64), DemoDataSettings(train=1, val=1, size=64)
    make_demo_data(small, tmp_path / "data")
    before = tree(tmp_path)
    with pytest.raises(UserError, match=r"found .*'train': 2.* expected .*'train': 1.*--force"):
        make_demo_data(other, tmp_path / "data")
    assert tree(tmp_path) == before
    assert make_demo_data(other, tmp_path / "data", force=True) is True
    assert len(tree(tmp_path / "data" / "train")) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_damaged_data_is_refused_and_force_mends_it(tmp_path: Path) -> None:
    settings = DemoDataSettings(train=2, val=1, size=64)
    make_demo_data(settings, tmp_path / "data")
    before = tree(tmp_path)
    (tmp_path / "data/train/000001.jpg").unlink()
    with pytest.raises(UserError, match="the data were changed"):
        make_demo_data(settings, tmp_path / "data")
    make_demo_data(settings, tmp_path / "data", force=True)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("content", [None, "no json", "{}", '{"settings": {"lr": 1}}'])
def test_a_folder_of_someone_else_is_never_replaced(tmp_path: Path, content: str | None) -> None:
    (tmp_path / "holiday.jpg").write_bytes(b"precious")
    if content is not None:
        (tmp_path / "manifest.json").write_text(content)
    before = tree(tmp_path)
    for force in (False, True):
        with pytest.raises(UserError, match="is not demo data"):
            make_demo_data(SETTINGS, tmp_path, force=force)
    assert tree(tmp_path) == before


def test_a_failure_half_way_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(demo_data, "write_classification", fail)
    with pytest.raises(UserError, match=r"data: cannot be written: No space left on device \(.* GB free in "):
        make_demo_data(DemoDataSettings(train=1, val=1, size=64), tmp_path / "data")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("package", ["mlxtend", "skimage", "sklearn"])
def test_a_missing_package_is_named_with_its_remedy(
    package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else find_spec(name))
    with pytest.raises(UserError, match=rf"needs {package} .*: pip install -e \.\[demo\]"):
        make_demo_data(DemoDataSettings(train=1, val=1, size=64), tmp_path / "data")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("name", "value"), [("train", 0), ("val", -1), ("size", 63), ("size", 4096), ("seed", -1)])
def test_settings_out_of_range_are_named(name: str, value: int) -> None:
    with pytest.raises(UserError, match=f"{name}={value} is out of range"):
        DemoDataSettings(**{name: value})


def test_command_line_makes_reuses_and_refuses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def call(*args: str) -> str:
        monkeypatch.setattr(sys, "argv", [str(TOOL), "--output", str(tmp_path / "data"), "--size", "64", *args])
        runpy.run_path(str(TOOL), run_name="__main__")
        return capsys.readouterr().out

    assert "made 2 train and 1 val images" in call("--train", "2", "--val", "1")
    assert "reused" in call("--train", "2", "--val", "1")
    with pytest.raises(SystemExit) as stop:
        call("--train", "3", "--val", "1")
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert message.count("\n") == 1
