"""Batches of detection depend on the seed and their number alone; augmentation and targets are right; what can not be
used is named."""

import json
import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask

pytest.importorskip("detectron2", reason="detectron2 is not installed: python tools/install_detectron2.py")

import detectron2.data.transforms as T
from detectron2.data import DatasetCatalog, get_detection_dataset_dicts
from detectron2.data.datasets import load_coco_json
from detectron2.structures import BitMasks, BoxMode
from torch.utils.data._utils.pin_memory import pin_memory

from crossmae.data.broken import Unreadable
from crossmae.errors import UserError
from det.config import InputKeys
from det.data.coco import register_coco, use_own_data
from det.data.loader import (
    NamingMapper,
    SampleBatch,
    build_augmentations,
    build_test_loader,
    build_train_loader,
    check_objects_left,
    keyed_numpy_randomness,
    refuse_unreadable,
    training_records,
    training_samples,
)
from tests.det.batches import train_batches
from tests.det.coco_files import annotation, save, write_coco


def samples(cfg, first, workers, rank=0, world_size=1):
    loader = train_batches(cfg, DatasetCatalog.get("test_set"), first, workers, rank, world_size)
    return [[(s["image_id"], s["image"].numpy(), s["instances"].gt_boxes.tensor.numpy()) for s in b] for b in loader]


def assert_same(a, b):
    assert len(a) == len(b)
    for batch_a, batch_b in zip(a, b, strict=True):
        for (id_a, image_a, boxes_a), (id_b, image_b, boxes_b) in zip(batch_a, batch_b, strict=True):
            assert id_a == id_b
            np.testing.assert_array_equal(image_a, image_b)
            np.testing.assert_array_equal(boxes_a, boxes_b)


def test_batches_depend_on_the_seed_and_their_number_alone(tmp_path, cfg):
    """Whatever the workers, wherever a run starts; random flip and scale included, and bitmasks cropped with boxes."""
    path, images, _ = write_coco(tmp_path / "a")
    register_coco("test_set", path, images, masks=True)
    cfg.INPUT.LSJ.ENABLED, cfg.INPUT.LSJ.SIZE = True, 64
    whole = samples(cfg, 0, workers=0)
    assert len(whole) == cfg.SOLVER.MAX_ITER
    assert_same(whole, samples(cfg, 0, workers=2))
    assert_same(whole[2:], samples(cfg, 2, workers=0))
    cfg.SEED = 1
    with pytest.raises(AssertionError):
        assert_same(whole, samples(cfg, 0, workers=0))


def test_a_spawned_worker_reads_the_batches_of_a_forked_one(tmp_path, cfg, start_method):
    """As on macOS and Windows: jitter and copy-paste. The loader of evaluations is sent, too."""
    path, images, _ = write_coco(tmp_path / "a")
    register_coco("test_set", path, images, masks=True)
    cfg.INPUT.LSJ.ENABLED, cfg.INPUT.LSJ.SIZE = True, 64
    cfg.INPUT.COPY_PASTE.ENABLED, cfg.INPUT.COPY_PASTE.PROB = True, 1.0
    found = []
    for method in ("fork", "spawn"):
        start_method(method)
        found.append(samples(cfg, 0, workers=1))
    assert len(found[0]) == cfg.SOLVER.MAX_ITER
    assert_same(*found)
    loader = build_test_loader("test_set", NamingMapper(cfg, False), 0)
    dataset, collate = pickle.loads(pickle.dumps((loader.dataset, loader.collate_fn)))
    (sent,), (kept,) = collate([dataset[1]]), loader.collate_fn([loader.dataset[1]])
    assert sent["file_name"] == kept["file_name"]
    np.testing.assert_array_equal(sent["image"], kept["image"])


def test_ranks_share_a_batch(tmp_path, cfg):
    path, images, _ = write_coco(tmp_path / "a")
    register_coco("test_set", path, images, masks=True)
    whole = samples(cfg, 0, workers=0)
    halves = [samples(cfg, 0, workers=0, rank=rank, world_size=2) for rank in (0, 1)]
    for number, batch in enumerate(whole):
        assert [sample[0] for sample in batch] == [half[number][0][0] for half in halves]


@pytest.mark.parametrize(
    ("batch", "world_size", "message"),
    [(6, 1, "SOLVER.IMS_PER_BATCH: 6 is more than the 5 training images"), (3, 2, "cannot be divided over 2")],
)
def test_batches_that_can_not_be_filled_are_refused(tmp_path, cfg, batch, world_size, message):
    path, images, _ = write_coco(tmp_path / "a")
    register_coco("test_set", path, images, masks=True)
    cfg.SOLVER.IMS_PER_BATCH = batch
    with pytest.raises(UserError, match=message):
        train_batches(cfg, DatasetCatalog.get("test_set"), world_size=world_size)


def test_an_image_of_another_size_than_annotated_is_named(tmp_path, cfg):
    """The file has changed since it was checked."""
    _, images, _ = write_coco(tmp_path)
    record = {"file_name": str(images / "1.png"), "height": 64, "width": 60, "annotations": []}
    sample = NamingMapper(cfg, True)(record)
    assert isinstance(sample, Unreadable)
    assert str(images / "1.png") in sample.message
    assert json.dumps(sample.message).count("\\n") == 0


@pytest.mark.parametrize("masks", ["bitmask", "polygon"])
def test_objects_that_no_image_shows_stop_training(tmp_path, cfg, masks):
    """Whatever is wrong with them, and though every augmentation of training could lose all."""
    path, images, _ = write_coco(tmp_path / "a", kind="polygon")
    register_coco("test_set", path, images, masks=True)
    cfg.INPUT.MASK_FORMAT, cfg.INPUT.MIN_SIZE_TRAIN = masks, (1,)
    records = DatasetCatalog.get("test_set")
    check_objects_left(records, NamingMapper(cfg, True))
    first, *others = [one for record in records for one in record["annotations"]]
    for entry in others[:4]:
        entry["segmentation"] = [[value + 200 for value in entry["segmentation"][0]]]
    first["iscrowd"] = 1
    check_objects_left(records, NamingMapper(cfg, True))
    for entry in others[4:7]:
        entry["bbox"] = [70, 70, 9, 9]
    message = (
        "DATASETS.TRAIN: of 9 objects in 5 images, only 2 are left .* 3 boxes are empty .* and 4 masks cover no pixel"
    )
    with pytest.raises(UserError, match=message):
        check_objects_left(records, NamingMapper(cfg, True))


def mapped(cfg, annotations, folder):
    """What the mapper makes of one image of 64 x 64 pixels."""
    _, images, _ = write_coco(folder / "mapped", images=1)
    for entry in annotations:
        entry["bbox_mode"] = BoxMode.XYWH_ABS
    return NamingMapper(cfg, True)({"file_name": str(images / "1.png"), "annotations": annotations})


@pytest.mark.parametrize("masks", [True, False])
def test_crowd_regions_are_no_targets(tmp_path, cfg, masks):
    cfg.MODEL.MASK_ON, cfg.INPUT.RANDOM_FLIP = masks, "none"
    crowd = annotation(1, 1, 0, (0, 0, 60, 60)) | {"iscrowd": 1}
    sample = mapped(cfg, [crowd, annotation(2, 1, 1), annotation(3, 1, 2, (30, 20, 20, 30))], tmp_path)
    instances = sample["instances"]
    assert instances.gt_classes.tolist() == [1, 2]
    assert instances.gt_boxes.tensor.tolist() == [[8, 8, 32, 24], [30, 20, 50, 50]]
    assert instances.has("gt_masks") == masks
    if masks:
        assert instances.gt_masks.tensor.flatten(1).sum(1).tolist() == [24 * 16, 20 * 30]


@pytest.mark.parametrize("mask_format", ["polygon", "bitmask"])
@pytest.mark.parametrize("jitter", [True, False])
def test_an_image_without_objects_has_no_targets(tmp_path, cfg, mask_format, jitter):
    """With DATALOADER.FILTER_EMPTY_ANNOTATIONS False, of which detectron2 makes no sample once boxes are recomputed."""
    cfg.INPUT.LSJ.ENABLED, cfg.INPUT.LSJ.SIZE, cfg.INPUT.MASK_FORMAT = jitter, 64, mask_format
    instances = mapped(cfg, [annotation(1, 1, 0) | {"iscrowd": 1}], tmp_path)["instances"]
    assert len(instances) == 0
    assert instances.gt_boxes.tensor.shape == (0, 4)
    assert len(instances.gt_masks) == 0


def test_objects_that_augmentation_leaves_without_a_pixel_are_no_targets(tmp_path, cfg):
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.RANDOM_FLIP = (8,), "none"
    sample = mapped(cfg, [annotation(1, 1, 0), annotation(2, 1, 1, (1, 1, 2, 2))], tmp_path)
    assert sample["instances"].gt_classes.tolist() == [0]


def test_boxes_of_whole_numbers_are_not_rounded(tmp_path, cfg):
    """detectron2's resize would write into an array of integers."""
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.RANDOM_FLIP = (40,), "none"
    sample = mapped(cfg, [annotation(1, 1, 0, (5, 7, 11, 13))], tmp_path)
    np.testing.assert_allclose(sample["instances"].gt_boxes.tensor, np.array([[5, 7, 16, 20]]) * 0.625)


def test_a_mask_that_can_not_be_used_names_its_image(tmp_path, cfg):
    cfg.INPUT.MASK_FORMAT = "polygon"
    sample = mapped(cfg, [annotation(1, 1, 0, kind="polygon"), annotation(2, 1, 1)], tmp_path)
    assert isinstance(sample, Unreadable)
    with pytest.raises(UserError, match=r"1\.png: cannot be used: .*object 1 is no polygon. Set INPUT.MASK_FORMAT"):
        refuse_unreadable([sample])


@pytest.mark.parametrize("is_train", [True, False])
def test_a_strip_keeps_a_pixel(tmp_path, cfg, is_train):
    """detectron2's resize to a longest side would leave it no height."""
    path = tmp_path / "strip.png"
    Image.fromarray(np.zeros((1, 400, 3), np.uint8)).save(path)
    sample = NamingMapper(cfg, is_train)({"file_name": str(path), "height": 1, "width": 400})
    assert tuple(sample["image"].shape) == (3, 1, 64)


def test_files_are_read_as_in_pretraining(tmp_path, cfg):
    """16 bits are scaled, not cut off; transparency lies over white; the order of channels is the config's."""
    cfg.INPUT.RANDOM_FLIP = "none"
    deep, clear, colour = (tmp_path / f"{name}.png" for name in ("deep", "clear", "colour"))
    Image.fromarray(np.full((64, 64), 3000, np.uint16)).save(deep)
    Image.fromarray(np.zeros((64, 64, 4), np.uint8)).save(clear)
    Image.fromarray(np.full((64, 64, 3), (10, 20, 30), np.uint8)).save(colour)
    for file_format, path, expected in [
        ("RGB", deep, [11, 11, 11]),
        ("RGB", clear, [255, 255, 255]),
        ("RGB", colour, [10, 20, 30]),
        ("BGR", colour, [30, 20, 10]),
    ]:
        cfg.INPUT.FORMAT = file_format
        sample = NamingMapper(cfg, False)({"file_name": str(path), "height": 64, "width": 64})
        assert sample["image"][:, 5, 5].tolist() == expected
    cfg.INPUT.MAX_PIXELS = 4095
    sample = NamingMapper(cfg, True)({"file_name": str(colour), "height": 64, "width": 64, "annotations": []})
    with pytest.raises(UserError, match=r"colour\.png: has 64 x 64 = 4,096 pixels, INPUT\.MAX_PIXELS is 4,095"):
        refuse_unreadable([sample])


# Large-scale jitter is what the papers say, and masks and boxes of every form move with the pixels. Expected values
# come from the formulas, computed here with numpy, Pillow's resize and pycocotools' polygons on the whole image: flip;
# r = s * SIZE / longest side, s uniform in MIN_SCALE .. MAX_SCALE; crop that leaves out u times the excess.
HEIGHT, WIDTH, SIZE = 60, 90, 64
# A concave polygon, and an object of two parts.
POLYGONS = [
    [[12.0, 7.5, 70.2, 12.0, 61.0, 50.0, 40.0, 21.3, 15.5, 44.0]],
    [[2, 2, 20, 3, 9, 30], [60, 30, 85, 33, 80, 55]],
]


@pytest.fixture
def jitter(cfg):
    cfg.INPUT.LSJ.ENABLED, cfg.INPUT.LSJ.SIZE = True, SIZE
    return cfg


@pytest.fixture
def photo(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (HEIGHT, WIDTH, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    return pixels


def raster(polygons, height, width):
    return coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(polygons, height, width))).astype(bool)


def segmentation(number, form):
    """One of the two objects as a data set may hold it."""
    if form == "polygon":
        return POLYGONS[number]
    mask = raster(POLYGONS[number], HEIGHT, WIDTH)
    if form == "array":
        return mask
    if form == "counts":
        flat = mask.flatten(order="F")
        changes = np.flatnonzero(np.diff(flat.astype(int))) + 1
        return {"size": [HEIGHT, WIDTH], "counts": np.diff(np.concatenate([[0], changes, [flat.size]])).tolist()}
    encoded = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": encoded["size"], "counts": encoded["counts"].decode()}


def record(tmp_path, forms, by_json=True):
    """What detectron2 makes of a COCO file with both objects, or what a data set registered in Python may be."""
    masks = [segmentation(number, form) for number, form in enumerate(forms)]
    annotations = [
        {"id": n + 1, "image_id": 1, "category_id": n, "bbox": [5, 5, 20, 20], "area": 1, "iscrowd": 0,
         "segmentation": mask if by_json else []}
        for n, mask in enumerate(masks)
    ]  # fmt: skip
    image = {"id": 1, "file_name": "photo.png", "height": HEIGHT, "width": WIDTH}
    categories = [{"id": 0, "name": "a"}, {"id": 1, "name": "b"}]
    content = {"images": [image], "annotations": annotations, "categories": categories}
    (entry,) = load_coco_json(str(save(tmp_path, content)), str(tmp_path))
    if not by_json:
        for annotation, mask in zip(entry["annotations"], masks, strict=True):
            annotation["segmentation"] = mask
    return entry


class Published:
    """Large-scale jitter by its formulas, from the same random numbers."""

    def __init__(self, jitter, *key):
        rng = np.random.RandomState()
        rng.seed(np.random.SeedSequence(key).generate_state(4))
        self.axis = {"none": None, "horizontal": 1, "vertical": 0}[jitter.INPUT.RANDOM_FLIP]
        self.flipped = self.axis is not None and rng.uniform() < 0.5
        lsj = jitter.INPUT.LSJ
        ratio = rng.uniform(lsj.MIN_SCALE, lsj.MAX_SCALE) * lsj.SIZE / max(HEIGHT, WIDTH)
        self.height, self.width = round(HEIGHT * ratio), round(WIDTH * ratio)
        u = rng.uniform()
        self.top, self.left = (round(u * max(side - lsj.SIZE, 0)) for side in (self.height, self.width))

    def flip(self, pixels):
        return np.flip(pixels, self.axis) if self.flipped else pixels

    def crop(self, pixels):
        return pixels[self.top : self.top + SIZE, self.left : self.left + SIZE]

    def image(self, pixels):
        whole = Image.fromarray(np.ascontiguousarray(self.flip(pixels))).resize(
            (self.width, self.height), Image.BILINEAR
        )
        return self.crop(np.asarray(whole))

    def mask(self, mask):
        whole = Image.fromarray(self.flip(mask).astype(np.uint8)).resize((self.width, self.height), Image.NEAREST)
        return self.crop(np.asarray(whole).astype(bool))

    def polygon_mask(self, polygons):
        """The moved corners, filled on the whole image, which is cropped afterwards."""
        moved = []
        for polygon in polygons:
            points = np.array(polygon, float).reshape(-1, 2)
            if self.flipped:
                side = 1 - self.axis  # x is axis 1 of an image and number 0 of a point
                points[:, side] = (WIDTH, HEIGHT)[side] - points[:, side]
            moved.append((points * (self.width / WIDTH, self.height / HEIGHT)).reshape(-1).tolist())
        return self.crop(raster(moved, self.height, self.width))


def box_of(mask):
    y, x = mask.nonzero()
    return [x.min(), y.min(), x.max() + 1, y.max() + 1]


def mapped_by_key(mapper, entry, *key):
    with keyed_numpy_randomness(*key):
        return mapper(entry)


@pytest.mark.parametrize("flip", ["none", "horizontal", "vertical"])
@pytest.mark.parametrize(
    "forms", [("polygon", "polygon"), ("rle", "counts"), ("array", "array"), ("polygon", "rle")], ids="-".join
)
def test_pixels_masks_and_boxes_are_those_of_the_formulas(tmp_path, jitter, photo, forms, flip):
    jitter.INPUT.RANDOM_FLIP = flip
    entry = record(tmp_path, forms, by_json="array" not in forms)
    mapper, seen = NamingMapper(jitter, True), set()
    for key in range(12):
        sample, reference = mapped_by_key(mapper, entry, key), Published(jitter, key)
        np.testing.assert_array_equal(sample["image"].numpy().transpose(1, 2, 0), reference.image(photo))
        expected = {
            number: reference.polygon_mask(POLYGONS[number])
            if form == "polygon"
            else reference.mask(raster(POLYGONS[number], HEIGHT, WIDTH))
            for number, form in enumerate(forms)
        }
        expected = {number: mask for number, mask in expected.items() if mask.any()}
        instances = sample["instances"]
        assert instances.gt_classes.tolist() == list(expected)
        for number, mask, box in zip(expected, instances.gt_masks.tensor.numpy(), instances.gt_boxes, strict=True):
            # Corners at a tenth of a pixel are rounded to fifths, this way or that way.
            assert (mask ^ expected[number]).sum() <= (2 if forms[number] == "polygon" else 0)
            assert box.tolist() == box_of(mask)
        seen.add((reference.flipped, reference.top > 0, reference.height < SIZE))
    assert len(seen) > 2 + (flip != "none")  # flipped and not, cropped and not


def test_masks_as_polygons_cover_the_same_pixels(tmp_path, jitter, photo):
    jitter.INPUT.MASK_FORMAT = "polygon"
    mapper, entry = NamingMapper(jitter, True), record(tmp_path, ("polygon", "polygon"))
    for key in range(12):
        sample, reference = mapped_by_key(mapper, entry, key), Published(jitter, key)
        instances = sample["instances"]
        filled = BitMasks.from_polygon_masks(instances.gt_masks, *instances.image_size).tensor.numpy()
        for number, mask, box in zip(instances.gt_classes, filled, instances.gt_boxes, strict=True):
            expected = reference.polygon_mask(POLYGONS[number])
            assert (mask ^ expected).sum() <= 2 + 0.02 * expected.sum()  # corners are rounded where the crop cuts
            assert np.abs(box.numpy() - box_of(expected)).max() <= 1.5  # sharp corners fill no pixel


def jitters(jitter, count=1500):
    """Flip, scale, and the two shares of the excess that are left out, seen from where three corners go."""
    augmentations, image = (
        T.AugmentationList(build_augmentations(InputKeys.model_validate(jitter.INPUT))),
        np.zeros((30, 40, 3), np.uint8),
    )
    for key in range(count):
        with keyed_numpy_randomness(key):
            augmented = T.AugInput(image)
            corners = augmentations(augmented).apply_coords(np.array([[0.0, 0.0], [40.0, 0.0], [0.0, 30.0]]))
        width, height = corners[1, 0] - corners[0, 0], corners[2, 1] - corners[0, 1]
        size = np.abs([width, height])
        assert augmented.image.shape[:2] == tuple(np.minimum(size, SIZE)[::-1].round())
        left_out = -corners.min(axis=0)
        excess = np.maximum(size - SIZE, 0)
        yield width < 0, height < 0, size / SIZE, left_out, excess


def distance_to_uniform(values, low, high):
    """Kolmogorov and Smirnov's; above 1.63 / sqrt(n) in one of a hundred samples."""
    ordered = (np.sort(values) - low) / (high - low)
    return np.abs(ordered - (np.arange(len(ordered)) + 0.5) / len(ordered)).max() * len(ordered) ** 0.5


def test_scale_flip_and_crop_have_the_published_distribution(jitter):
    flipped, upside_down, scales, left_out, excess = map(np.array, zip(*jitters(jitter), strict=True))
    assert abs(flipped.mean() - 0.5) < 0.04
    assert not upside_down.any()
    assert distance_to_uniform(scales[:, 0], 0.1, 2.0) < 1.63  # of the long side; the other keeps the aspect
    assert np.abs(scales[:, 1] * 4 - scales[:, 0] * 3).max() < 4 / SIZE
    assert (left_out[excess == 0] == 0).all()
    enough = excess[:, 0] > 16
    shares = left_out[enough, 0] / excess[enough, 0]
    assert distance_to_uniform(shares, 0, 1) < 1.63
    both = excess[:, 1] > 16  # detectron2's crop moves along a diagonal
    assert np.abs(left_out[both, 1] / excess[both, 1] - left_out[both, 0] / excess[both, 0]).max() < 1.01 / 16


@pytest.mark.parametrize(("flip", "columns", "rows"), [("none", 0, 0), ("vertical", 0, 0.5)])
def test_other_flips(jitter, flip, columns, rows):
    jitter.INPUT.RANDOM_FLIP = flip
    flipped, upside_down, *_ = zip(*jitters(jitter, 400), strict=True)
    assert abs(np.mean(flipped) - columns) < 0.08 * (columns > 0) + 1e-9
    assert abs(np.mean(upside_down) - rows) < 0.08 * (rows > 0) + 1e-9


def test_a_strip_keeps_one_pixel(tmp_path, jitter):
    """64 * 0.1 pixels long, it would be 0.02 high."""
    Image.fromarray(np.full((2, 600, 3), 7, np.uint8)).save(tmp_path / "strip.png")
    jitter.INPUT.LSJ.MAX_SCALE = 0.1
    sample = NamingMapper(jitter, True)({"file_name": str(tmp_path / "strip.png"), "annotations": []})
    assert sample["image"].shape == (3, 1, 6)


def test_without_jitter_sizes_are_detectron2s(tmp_path, jitter, photo):
    """Shortest side one of MIN_SIZE_TRAIN, unless the longest would pass MAX_SIZE_TRAIN; half of them flipped."""
    jitter.INPUT.LSJ.ENABLED = False
    jitter.INPUT.MIN_SIZE_TRAIN, jitter.INPUT.MAX_SIZE_TRAIN, jitter.INPUT.MIN_SIZE_TRAIN_SAMPLING = (
        (40, 64),
        75,
        "choice",
    )
    mapper, entry = NamingMapper(jitter, True), record(tmp_path, ("polygon", "rle"))
    seen = set()
    for key in range(30):
        sample = mapped_by_key(mapper, entry, key)
        size = tuple(sample["image"].shape[1:])
        shrunk = np.asarray(Image.fromarray(photo).resize(size[::-1], Image.BILINEAR))
        pixels = sample["image"].numpy().transpose(1, 2, 0)
        flipped = not np.array_equal(pixels, shrunk)
        if flipped:
            np.testing.assert_array_equal(pixels, np.flip(shrunk, 1))
        masks = sample["instances"].gt_masks.tensor.numpy()
        inside = np.array([[5, 5, 25, 25]]) * size[0] / HEIGHT  # the annotated box, not that of the mask
        expected = np.abs([size[1], 0, size[1], 0] - inside)[:, [2, 1, 0, 3]] if flipped else inside
        np.testing.assert_allclose(sample["instances"].gt_boxes.tensor.numpy(), expected.repeat(2, 0), rtol=1e-5)
        assert masks.shape == (2, *size)
        seen.add((size, flipped))
    assert seen == {(size, flipped) for size in ((40, 60), (50, 75)) for flipped in (False, True)}


@pytest.mark.parametrize("form", ["bitmask", "polygon"])
def test_ground_truth_is_pinned_and_nothing_else_changes(cfg, tmp_path, monkeypatch, form):
    """Without a GPU, torch cannot pin: a copy stands for it."""
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor, *_: pinned.append(tensor.shape) or tensor.clone())
    cfg.INPUT.MASK_FORMAT = form
    path, images, _ = write_coco(tmp_path / "data", images=2, kind="polygon")
    use_own_data(cfg, (str(path), str(images)), None)
    records = get_detection_dataset_dicts(cfg.DATASETS.TRAIN)
    (batch, *_), (again, *_) = (list(train_batches(cfg, records)) for _ in range(2))
    found = pin_memory(again)
    assert isinstance(found, list)
    for one, other in zip(batch, found, strict=True):
        truth, moved = one["instances"], other["instances"]
        assert one["file_name"] == other["file_name"]
        assert torch.equal(one["image"], other["image"])
        assert torch.equal(truth.gt_boxes.tensor, moved.gt_boxes.tensor)
        assert torch.equal(truth.gt_classes, moved.gt_classes)
        assert type(truth.gt_masks) is type(moved.gt_masks)
    assert len(pinned) == (6 if form == "bitmask" else 4)
    assert SampleBatch([Unreadable("lost"), {}]).pin_memory() == [Unreadable("lost"), {}]


@pytest.mark.parametrize("is_filtered", [True, False])
def test_records_are_those_of_detectron2_and_the_images_left_out_are_counted(cfg, tmp_path, is_filtered):
    """Of five images, one has no annotation, and one only a crowd region."""
    path, images, _ = write_coco(tmp_path / "data", images=5)
    content = json.loads(path.read_text())
    first, second, *_ = (image["id"] for image in content["images"])
    content["annotations"] = [one for one in content["annotations"] if one["image_id"] != first]
    for one in content["annotations"]:
        one["iscrowd"] = int(one["image_id"] == second)
    path.write_text(json.dumps(content))
    use_own_data(cfg, (str(path), str(images)), None)
    cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS = is_filtered
    expected = get_detection_dataset_dicts(cfg.DATASETS.TRAIN, is_filtered)
    assert training_records(cfg) == (expected, 5)
    assert len(expected) == (3 if is_filtered else 5)


@pytest.mark.gpu
@pytest.mark.parametrize("workers", [0, 1])
def test_ground_truth_is_pinned_on_a_gpu(cfg, tmp_path, workers):
    path, images, _ = write_coco(tmp_path / "data", images=4)
    use_own_data(cfg, (str(path), str(images)), None)
    samples = training_samples(cfg, get_detection_dataset_dicts(cfg.DATASETS.TRAIN))
    for batch in build_train_loader(samples, 2, range(2), workers=workers, pin_memory=True):
        for sample in batch:
            truth = sample["instances"]
            tensors = [truth.gt_boxes.tensor, truth.gt_masks.tensor, truth.gt_classes]
            assert all(one.is_pinned() for one in tensors)
