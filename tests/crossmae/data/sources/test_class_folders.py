"""Proves that folders which are no classes are named, and that sound class folders stay silent."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from crossmae.classification.data import find_classes
from crossmae.data.sources import open_source
from tests.crossmae.data.test_found_names import touch

DOUBTED = {
    "siteA/cat/1.png siteA/dog/1.png siteB/cat/1.png siteB/dog/1.png": "have the same subfolders cat, dog. If these",
    "images/1.png masks/1.png": "images, masks read like images and pictures about them, not classes. Name .*/images",
}
SOUND = [
    "cat/1.png dog/1.png",
    "cat/train/1.png cat/val/1.png dog/train/1.png dog/val/1.png",
    "cat/seq1/1.png cat/seq2/1.png dog/seq1/1.png dog/seq2/1.png",
    "cat/images/1.png cat/masks/1.png dog/images/1.png dog/masks/1.png",
    "cat/left/1.png cat/right/1.png dog/left/1.png dog/right/1.png",
    "cat/wild/1.png cat/tame/1.png dog/wild/1.png dog/house/1.png",
    "mask/1.png no_mask/1.png",
]


@pytest.mark.parametrize("files", DOUBTED)
def test_folders_that_may_be_no_classes_are_named(files: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    find_classes(open_source(touch(tmp_path, *files.split()), "data.train"), "data.train")
    with pytest.raises(AssertionError, match=f"data.train: .*{DOUBTED[files]}"):
        raise AssertionError(caplog.text)


@pytest.mark.parametrize("files", SOUND)
def test_sound_classes_stay_silent(files: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        find_classes(open_source(touch(tmp_path, *files.split()), "data.train"), "data.train")
    assert not caplog.text


def test_a_class_folder_under_two_names_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    touch(tmp_path, "cat/1.png", "dog/1.png")
    (tmp_path / "feline").symlink_to("cat")
    assert find_classes(open_source(tmp_path, "data.train"), "data.train") == ("cat", "dog", "feline")
    assert "cat, feline are one folder, so its images are in 2 classes. Remove the links" in caplog.text
