"""Pictures that are shrunk much more than the training images are named, and others are not."""

import pytest

from det.backbone.record import describe_shrunk, size_metadata

METADATA = size_metadata([(256, 256), (256, 256), (4000, 90)])


@pytest.mark.parametrize(("side", "is_told"), [(256, False), (510, False), (520, True), (100, False)])
def test_pictures_of_twice_the_size_are_told(side: int, is_told: bool) -> None:
    assert bool(describe_shrunk(METADATA, {"a.png": (side, side)}, 192, 192)) == is_told


def test_the_line_has_counts_and_sizes() -> None:
    line = describe_shrunk(METADATA, {"small.png": (256, 256), "frames.png": (1100, 2200)}, 192, 192)
    assert line.startswith("1 of 2 pictures, such as frames.png: 2,200 x 1,100 pixels are shrunk to 192 x 96. ")
    assert "trained on pictures of about 256 x 256 pixels" in line


@pytest.mark.parametrize("metadata", [{}, {"training_size": "[0, 0]"}, {"training_size": "x"}, {"training_size": "7"}])
def test_without_a_record_nothing_is_told(metadata: dict[str, str]) -> None:
    assert describe_shrunk(metadata, {"a.png": (9000, 9000)}, 192, 192) == ""


def test_without_resizing_nothing_is_told() -> None:
    assert describe_shrunk(METADATA, {"a.png": (9000, 9000)}, 0, 192) == ""
