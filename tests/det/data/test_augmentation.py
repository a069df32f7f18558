"""Large-scale jitter is what the papers say, and masks and boxes of every form move with the pixels.

Expected values come from the formulas, computed here with numpy, Pillow's resize and pycocotools' polygons on the whole
image: flip; r = s * SIZE / longest side, s uniform in MIN_SCALE .. MAX_SCALE; crop that leaves out u times the excess.
"""

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

pytest.importorskip("detectron2", reason="detectron2 is not installed: python tools/install_detectron2.py")

import detectron2.data.transforms as T
from detectron2.data.datasets import load_coco_json
from detectron2.structures import BitMasks

from det.config import InputKeys, load_det_config
from det.data.loader import NamingMapper, build_augmentations, keyed_numpy_randomness
from tests.det.coco_files import TINY, save

HEIGHT, WIDTH, SIZE = 60, 90, 64
# A concave polygon, and an object of two parts.
POLYGONS = [
    [[12.0, 7.5, 70.2, 12.0, 61.0, 50.0, 40.0, 21.3, 15.5, 44.0]],
    [[2, 2, 20, 3, 9, 30], [60, 30, 85, 33, 80, 55]],
]


@pytest.fixture
def cfg(tmp_path):
    (tmp_path / "tiny.yaml").write_text(TINY)
    cfg = load_det_config(str(tmp_path / "tiny.yaml"))
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

    def __init__(self, cfg, *key):
        rng = np.random.RandomState()
        rng.seed(np.random.SeedSequence(key).generate_state(4))
        self.axis = {"none": None, "horizontal": 1, "vertical": 0}[cfg.INPUT.RANDOM_FLIP]
        self.flipped = self.axis is not None and rng.uniform() < 0.5
        lsj = cfg.INPUT.LSJ
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


def mapped(mapper, entry, *key):
    with keyed_numpy_randomness(*key):
        return mapper(entry)


@pytest.mark.parametrize("flip", ["none", "horizontal", "vertical"])
@pytest.mark.parametrize(
    "forms", [("polygon", "polygon"), ("rle", "counts"), ("array", "array"), ("polygon", "rle")], ids="-".join
)
def test_pixels_masks_and_boxes_are_those_of_the_formulas(tmp_path, cfg, photo, forms, flip):
    cfg.INPUT.RANDOM_FLIP = flip
    entry = record(tmp_path, forms, by_json="array" not in forms)
    mapper, seen = NamingMapper(cfg, True), set()
    for key in range(12):
        sample, reference = mapped(mapper, entry, key), Published(cfg, key)
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


def test_masks_as_polygons_cover_the_same_pixels(tmp_path, cfg, photo):
    cfg.INPUT.MASK_FORMAT = "polygon"
    mapper, entry = NamingMapper(cfg, True), record(tmp_path, ("polygon", "polygon"))
    for key in range(12):
        sample, reference = mapped(mapper, entry, key), Published(cfg, key)
        instances = sample["instances"]
        filled = BitMasks.from_polygon_masks(instances.gt_masks, *instances.image_size).tensor.numpy()
        for number, mask, box in zip(instances.gt_classes, filled, instances.gt_boxes, strict=True):
            expected = reference.polygon_mask(POLYGONS[number])
            assert (mask ^ expected).sum() <= 2 + 0.02 * expected.sum()  # corners are rounded where the crop cuts
            assert np.abs(box.numpy() - box_of(expected)).max() <= 1.5  # sharp corners fill no pixel


def jitters(cfg, count=1500):
    """Flip, scale, and the two shares of the excess that are left out, seen from where three corners go."""
    augmentations, image = (
        T.AugmentationList(build_augmentations(InputKeys.model_validate(cfg.INPUT))),
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


def test_scale_flip_and_crop_have_the_published_distribution(cfg):
    flipped, upside_down, scales, left_out, excess = map(np.array, zip(*jitters(cfg), strict=True))
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
def test_other_flips(cfg, flip, columns, rows):
    cfg.INPUT.RANDOM_FLIP = flip
    flipped, upside_down, *_ = zip(*jitters(cfg, 400), strict=True)
    assert abs(np.mean(flipped) - columns) < 0.08 * (columns > 0) + 1e-9
    assert abs(np.mean(upside_down) - rows) < 0.08 * (rows > 0) + 1e-9


def test_a_strip_keeps_one_pixel(tmp_path, cfg):
    """64 * 0.1 pixels long, it would be 0.02 high."""
    Image.fromarray(np.full((2, 600, 3), 7, np.uint8)).save(tmp_path / "strip.png")
    cfg.INPUT.LSJ.MAX_SCALE = 0.1
    sample = NamingMapper(cfg, True)({"file_name": str(tmp_path / "strip.png"), "annotations": []})
    assert sample["image"].shape == (3, 1, 6)


def test_without_jitter_sizes_are_detectron2s(tmp_path, cfg, photo):
    """Shortest side one of MIN_SIZE_TRAIN, unless the longest would pass MAX_SIZE_TRAIN; half of them flipped."""
    cfg.INPUT.LSJ.ENABLED = False
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MAX_SIZE_TRAIN, cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING = (40, 64), 75, "choice"
    mapper, entry = NamingMapper(cfg, True), record(tmp_path, ("polygon", "rle"))
    seen = set()
    for key in range(30):
        sample = mapped(mapper, entry, key)
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
