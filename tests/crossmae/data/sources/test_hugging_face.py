"""Proves which columns of a Hugging Face data set on disk are used, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from crossmae.data.sources import open_source
from crossmae.errors import UserError
from tests.crossmae.data.sources.source_files import encoded

datasets = pytest.importorskip("datasets")


def save(folder: Path, features: dict[str, Any], rows: dict[str, list[Any]]) -> Path:
    datasets.disable_progress_bars()
    datasets.Dataset.from_dict(rows, features=datasets.Features(features)).save_to_disk(str(folder))
    return folder


def picture(index: int = 0) -> dict[str, Any]:
    return {"bytes": encoded(index), "path": None}


def test_splits_are_named(tmp_path: Path) -> None:
    rows = datasets.Dataset.from_dict({"x": [1]})
    datasets.DatasetDict({"train": rows, "test": rows}).save_to_disk(str(tmp_path / "d"))
    with pytest.raises(UserError, match=r"data.val: .*/d holds several data sets: train, test. .*data.val=.*/d/train"):
        open_source(tmp_path / "d", "data.val")


@pytest.mark.parametrize(
    ("features", "rows", "message"),
    [
        (["x"], {"x": [1]}, "no column of images"),
        (["a", "b"], {"a": [picture()], "b": [picture()]}, "several columns of images: a, b"),
        (["a"], {"a": []}, "not a whole .* with at least one row"),
    ],
)
def test_what_can_not_be_used_is_an_error(
    features: list[str], rows: dict[str, list[Any]], message: str, tmp_path: Path
) -> None:
    kinds = {name: datasets.Value("int64") if name == "x" else datasets.Image() for name in features}
    with pytest.raises(UserError, match=message):
        open_source(save(tmp_path / "d", kinds, rows), "data.train")


def test_a_damaged_data_set_is_an_error(tmp_path: Path) -> None:
    folder = save(tmp_path / "d", {"a": datasets.Image()}, {"a": [picture()]})
    (folder / "state.json").write_text("{}")
    with pytest.raises(UserError, match="not a whole Hugging Face data set"):
        open_source(folder, "data.train")


def test_images_may_be_files_elsewhere_and_rows_may_lack_one(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(encoded(3))
    cells = [{"bytes": None, "path": str(tmp_path / "x.png")}, None]
    source = open_source(save(tmp_path / "d", {"a": datasets.Image()}, {"a": cells}), "data.train")
    assert source.read(0) == encoded(3)
    with pytest.raises(UserError, match=r"/d\[1\]: the row has no image"):
        source.read(1)


def test_of_several_kinds_of_labels_the_one_called_label_counts(tmp_path: Path) -> None:
    kinds = {"a": datasets.Image(), "label": datasets.ClassLabel(names=["x", "y"])}
    kinds["other"] = datasets.ClassLabel(names=["p", "q", "r"])
    rows = {"a": [picture()], "label": [1], "other": [2]}
    source = open_source(save(tmp_path / "d", kinds, rows), "data.train")
    assert source.classes == ("x", "y")
    assert source.label(0) == 1


def test_rows_without_a_label_turn_labels_off(tmp_path: Path) -> None:
    kinds = {"a": datasets.Image(), "label": datasets.ClassLabel(names=["x", "y"])}
    folder = save(tmp_path / "d", kinds, {"a": [picture(), picture(1)], "label": [1, -1]})
    assert open_source(folder, "data.train").classes == ()
