"""Proves what the command line that checks COCO files prints and writes, its exit codes, and that its words work."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("detectron2", reason="detectron2 is not installed: python tools/install_detectron2.py")

from crossmae.errors import USER_ERROR_EXIT_CODE
from det.data.coco import register_coco
from tests.det.coco_files import save, write_coco
from tests.tools.command_line import exit_code
from tools.check_coco import FAULTY_EXIT_CODE, main


@pytest.fixture
def content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A sound data set: coco.json and images in the current folder."""
    monkeypatch.chdir(tmp_path)
    _, _, written = write_coco(tmp_path, kind="polygon")
    return written


def run(*arguments: str) -> int:
    return exit_code(main, *arguments)


def damage(content: dict[str, Any]) -> bytes:
    """Two empty boxes and a missing image; returns the file."""
    for index in (4, 6):
        content["annotations"][index]["bbox"] = [8, 8, 0, 16]
    content["images"][0]["file_name"] = "no.png"
    return save(Path(), content).read_bytes()


def test_a_sound_file_is_told_with_what_is_good_to_know(
    content: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("coco.json", "images") == 0
    assert capsys.readouterr().out.splitlines() == [
        "5 images, 10 annotations, 2 categories, 0 crowd regions, 10 polygon masks, 0 run-length masks, 0 without mask",
        "category-id-gaps         information      1 of 2 categories, id 3",
        "    ids are not 1, 2, 3, ... in a row, which is fine: classes are numbered by rising id",
        "no faults",
    ]


def test_faults_are_a_table_and_an_exit_code_and_the_words_to_paste_work(
    content: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    before = damage(content)
    assert run("coco.json", "images", "--json", "out/report.json") == FAULTY_EXIT_CODE
    lines = capsys.readouterr().out.splitlines()
    assert "missing-image            droppable error  1 of 5 images, id 1" in lines
    assert "empty-box                droppable error  2 of 10 annotations, id 6, 8" in lines
    assert "      annotations[6] (id 8): bbox [8, 8, 0, 16]" in lines

    report = json.loads(Path("out/report.json").read_text())
    assert report["counts"]["annotations"] == 10
    kinds = {one["kind"]: one for one in report["findings"]}
    assert set(kinds) == {"category-id-gaps", "missing-image", "empty-box"}
    assert (kinds["empty-box"]["count"], kinds["empty-box"]["rank"]) == (2, "droppable error")
    assert [entry["id"] for entry in kinds["empty-box"]["first"]] == [6, 8]

    words = lines[-1].partition("DATASETS.DROP=")[2].rstrip('"')
    summary = register_coco("test_set", "coco.json", "images", drop=ast.literal_eval(words))
    assert summary.num_images == 4
    assert Path("coco.json").read_bytes() == before


def test_images_are_not_looked_at_unless_wanted(content: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    damage(content)
    assert run("coco.json", "--skip-images") == FAULTY_EXIT_CODE
    told = capsys.readouterr().out
    assert "empty-box" in told
    assert "missing-image" not in told


def test_what_only_evaluation_needs_is_asked_for(content: dict[str, Any]) -> None:
    del content["annotations"][0]["area"]
    save(Path(), content)
    assert run("coco.json", "images") == 0
    assert run("coco.json", "images", "--evaluation") == FAULTY_EXIT_CODE


def test_masks_are_missed_only_where_others_have_one(content: dict[str, Any]) -> None:
    for entry in content["annotations"][1:]:
        del entry["segmentation"]
    save(Path(), content)
    assert run("coco.json", "images") == FAULTY_EXIT_CODE
    del content["annotations"][0]["segmentation"]
    save(Path(), content)
    assert run("coco.json", "images") == 0


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("coco.json", "nowhere"), "IMAGES: nowhere is no folder"),
        (("coco.json",), "IMAGES: no folder is named"),
        (("absent.json", "images"), "absent.json: no such file"),
        (("images/1.png", "images"), "images/1.png: not valid JSON"),
        (("coco.json", "images", "--json", "./coco.json"), "--json: coco.json is the file to be checked"),
        (("coco.json", "images", "--json", "images"), "images: is a folder"),
        (("coco.json", "nowhere", "--skip-images"), "--skip-images: nowhere would be ignored. Leave out one"),
    ],
)
def test_wrong_words_are_one_line(
    words: tuple[str, ...], told: str, content: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(Path().rglob("*"))
    assert run(*words) == USER_ERROR_EXIT_CODE
    told_nothing, error = capsys.readouterr()
    error = error.strip()
    assert told_nothing == ""
    assert error.startswith(f"error: {told}")
    assert "\n" not in error
    assert sorted(Path().rglob("*")) == before


def test_names_that_do_not_print_are_shown_with_escapes(
    content: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    content["images"][0]["file_name"] = "a\ud800\n.png"
    Path("images", "\udcff.png").write_bytes(b"")  # a name that is no UTF-8
    content["images"][1]["file_name"] = "\udcff.png"
    content["categories"][0]["name"] = "b\nc"
    save(Path(), content)
    assert run("coco.json", "images", "--json", "report.json") == FAULTY_EXIT_CODE
    told = capsys.readouterr().out
    assert "images[0] (id 1): a\\ud800\\n.png" in told
    assert "images[1] (id 2): images/\\udcff.png: cannot be read as an image" in told
    assert "categories[0] (id 3): 'b\\nc'" in told
    assert "images/\\\\udcff.png" in Path("report.json").read_text()
