"""Copy-paste composes as its definition says, pixel by pixel, and depends on seed, epoch and index alone."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

pytest.importorskip("detectron2", reason="detectron2 is not installed: python tools/install_detectron2.py")

import torch
from detectron2.data.datasets import load_coco_json
from detectron2.structures import BitMasks, Boxes, Instances

from crossmae.errors import UserError
from det.config import check_config
from det.data.copy_paste import paste_objects
from det.data.loader import KeyedSamples, refuse_unreadable, training_samples
from tests.det.batches import train_batches
from tests.det.coco_files import write_coco

FILL = (7, 8, 9)


@pytest.fixture
def cfg(cfg):
    cfg.INPUT.LSJ.ENABLED, cfg.INPUT.LSJ.SIZE, cfg.INPUT.COPY_PASTE.ENABLED = True, 64, True
    return cfg


@pytest.fixture
def records(tmp_path):
    path, images, _ = write_coco(tmp_path / "data")
    for entry in (records := load_coco_json(str(path), str(images))):
        for annotation in entry["annotations"]:
            annotation["category_id"] -= 1
    return records


def scene(rng, height, width, objects):
    """An image and rectangles full of holes, none of them empty; boxes are not those of the masks."""
    masks = np.zeros((objects, height, width), bool)
    for mask in masks:
        y, x = rng.integers(height), rng.integers(width)
        mask[y : y + rng.integers(1, height + 1), x : x + rng.integers(1, width + 1)] = True
        mask &= rng.random(mask.shape) < 0.8
        mask[y, x] = True
    instances = Instances((height, width))
    instances.gt_masks = BitMasks(torch.from_numpy(masks))
    instances.gt_boxes = Boxes(torch.zeros(objects, 4))
    instances.gt_classes = torch.from_numpy(rng.integers(0, 90, objects))
    image = torch.from_numpy(rng.integers(100, 256, (3, height, width)).astype(np.uint8))
    return {"image": image, "instances": instances, "image_id": int(rng.integers(99))}


def composed(sample, other, chosen):
    """Image, masks and classes by loops over pixels."""
    above = [(mask, label) for mask, label, take in zip(*fields(other), chosen, strict=True) if take]
    below = list(zip(*fields(sample), strict=True))
    height, width = sample["image"].shape[1:]
    for mask, _ in above:
        for y, x in np.argwhere(mask):
            height, width = max(height, y + 1), max(width, x + 1)
    image = np.zeros((3, height, width), np.uint8)
    masks = np.zeros((len(below) + len(above), height, width), bool)

    def value(array, y, x, outside=False):
        return array[y, x] if y < array.shape[0] and x < array.shape[1] else outside

    for y, x in np.ndindex(height, width):
        pasted = [value(mask, y, x) for mask, _ in above]
        image[:, y, x] = [
            value((other if any(pasted) else sample)["image"].numpy()[channel], y, x, FILL[channel])
            for channel in range(3)
        ]
        masks[:, y, x] = [value(mask, y, x) and not any(pasted) for mask, _ in below] + pasted
    classes = [label for _, label in below + above]
    seen = [index for index, mask in enumerate(masks) if mask.any()]
    return image, masks[seen], [classes[index] for index in seen]


def fields(sample):
    return sample["instances"].gt_masks.tensor.numpy(), sample["instances"].gt_classes.tolist()


sides = st.integers(1, 9)


@settings(max_examples=120, deadline=None)
@given(st.integers(0, 2**32 - 1), sides, sides, sides, sides, st.integers(0, 4), st.lists(st.booleans(), max_size=4))
def test_composition_is_that_of_a_loop_over_pixels(seed, height, width, other_height, other_width, objects, chosen):
    """Images of any two sizes, none or many objects; boxes are tight, the first sample is left as it was."""
    rng = np.random.default_rng(seed)
    sample, other = scene(rng, height, width, objects), scene(rng, other_height, other_width, len(chosen))
    before = sample["image"].clone(), sample["instances"].gt_masks.tensor.clone()
    result = paste_objects(sample, other, torch.tensor(chosen, dtype=torch.bool), FILL)
    if not any(chosen):
        assert result is sample
        return
    image, masks, classes = composed(sample, other, chosen)
    instances = result["instances"]
    np.testing.assert_array_equal(result["image"].numpy(), image)
    np.testing.assert_array_equal(instances.gt_masks.tensor.numpy(), masks)
    assert instances.gt_classes.tolist() == classes
    assert instances.image_size == image.shape[1:]
    for mask, box in zip(masks, instances.gt_boxes, strict=True):
        y, x = mask.nonzero()
        assert box.tolist() == [x.min(), y.min(), x.max() + 1, y.max() + 1]
    assert result["image_id"] == sample["image_id"]
    torch.testing.assert_close((sample["image"], sample["instances"].gt_masks.tensor), before, rtol=0, atol=0)


def test_every_subset_is_equally_likely_and_prob_is_how_often():
    """Seen from the classes, which are unique: 8 subsets of 3 objects; the empty one looks as if nothing was pasted."""
    sample, other = scene(np.random.default_rng(0), 4, 4, 0), scene(np.random.default_rng(1), 4, 4, 3)
    other["instances"].gt_classes = torch.tensor([1, 2, 4])
    samples = KeyedSamples([sample, other], lambda record: record, 0, 0.6, FILL)
    counts, rounds = np.zeros(8, int), 1500
    for number in range(rounds):  # every other time, the sample itself is drawn, which has no objects
        counts[samples[number, 0]["instances"].gt_classes.sum()] += 1
    expected = np.array([0.7 + 0.3 / 8] + [0.3 / 8] * 7) * rounds
    assert ((counts - expected) ** 2 / expected).sum() < 18.5  # chi squared with 7 degrees of freedom, p = 0.01


def test_a_second_image_that_can_not_be_read_is_handed_on(cfg, records):
    cfg.INPUT.COPY_PASTE.PROB = 1.0
    with open(records[3]["file_name"], "wb") as file:
        file.write(b"no image")
    samples = training_samples(cfg, records)
    with pytest.raises(UserError, match=r"4\.png: cannot be read as an image"):
        refuse_unreadable([samples[epoch, 0] for epoch in range(30)])


def run(cfg, records, workers=0, first=0):
    batches = train_batches(cfg, records, first, workers)
    return [(s["image_id"], s["image"], *map(tensors, fields(s))) for batch in batches for s in batch]


def tensors(values):
    return torch.as_tensor(values)


def same(a, b):
    return len(a) == len(b) and all(
        x[0] == y[0] and all(map(torch.equal, x[1:], y[1:])) for x, y in zip(a, b, strict=True)
    )


def test_batches_depend_on_seed_and_number_alone(cfg, records):
    cfg.INPUT.COPY_PASTE.PROB = 0.7
    whole = run(cfg, records)
    assert same(whole, run(cfg, records, workers=2))
    assert same(whole[4:], run(cfg, records, first=2))
    cfg.SEED = 1
    assert not same(whole, run(cfg, records))


def test_probability_zero_is_no_copy_paste_and_one_changes_only_what_is_pasted(cfg, records):
    cfg.INPUT.COPY_PASTE.ENABLED = False
    without = run(cfg, records)
    cfg.INPUT.COPY_PASTE.ENABLED, cfg.INPUT.COPY_PASTE.PROB = True, 0.0
    assert same(without, run(cfg, records))
    cfg.INPUT.COPY_PASTE.PROB = 1.0
    changed, fill = 0, torch.tensor(training_samples(cfg, records).fill)[:, None, None]
    for (_, old, *_), (_, new, masks, _) in zip(without, run(cfg, records), strict=True):
        untouched, grown = ~masks.any(dim=0), torch.ones(new.shape[1:], dtype=torch.bool)
        height, width = old.shape[1:]
        grown[:height, :width] = False
        assert (new == fill)[:, untouched & grown].all()
        assert torch.equal(new[:, :height, :width][:, untouched[:height, :width]], old[:, untouched[:height, :width]])
        assert masks.flatten(1).any(dim=1).all()
        changed += not torch.equal(new[:, :height, :width], old)
    assert changed >= 3


def test_polygons_are_pasted_as_bitmasks(cfg, tmp_path, caplog):
    path, images, _ = write_coco(tmp_path / "polygons", kind="polygon")
    records = load_coco_json(str(path), str(images))
    cfg.INPUT.MASK_FORMAT = "polygon"
    with caplog.at_level("INFO"):
        samples = training_samples(cfg, records)
    assert "masks are bitmasks, not INPUT.MASK_FORMAT polygon" in caplog.text
    assert all(isinstance(samples[0, index]["instances"].gt_masks, BitMasks) for index in range(len(records)))


def test_the_pasted_image_is_augmented_on_its_own(cfg, tmp_path):
    """Of one image, pasted onto itself, the objects come in other sizes than they have."""
    path, images, _ = write_coco(tmp_path / "one", images=1)
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(images / "1.png")
    records = load_coco_json(str(path), str(images))
    cfg.INPUT.COPY_PASTE.PROB = 1.0
    samples = training_samples(cfg, records)
    pairs = [samples[epoch, 0]["instances"] for epoch in range(20)]
    areas = [one.gt_boxes.area()[one.gt_classes == 3].tolist() for one in pairs]
    assert any(len(both) == 2 and abs(both[0] - both[1]) > 20 for both in areas)


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [("INPUT.LSJ", "ENABLED", False), ("MODEL", "MASK_ON", False), ("MODEL", "KEYPOINT_ON", True)],
)
def test_what_contradicts_it_is_refused(cfg, section, key, value):
    check_config(cfg)
    node = cfg.INPUT.LSJ if section == "INPUT.LSJ" else cfg.MODEL
    node[key] = value
    with pytest.raises(
        UserError, match=rf"COPY_PASTE.ENABLED: {section}.{key} is {value}. Set {section}.{key}={not value}"
    ):
        check_config(cfg)
    cfg.INPUT.COPY_PASTE.ENABLED = False
    check_config(cfg)
