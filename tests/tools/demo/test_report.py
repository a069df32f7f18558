"""The demo's page shows what the stages wrote, names what is missing, and what is broken."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

pytest.importorskip("detectron2", reason="detectron2 is not installed: python tools/install_detectron2.py")

from crossmae.errors import UserError
from crossmae.reports.page import Gallery, Missing, Plot, Table
from crossmae.reports.run_folder import RunFolder
from det.evaluation.run_files import DetectionResults
from tools.demo import report
from tools.demo.report import COUNT, RESULTS, STAGES, Stages, main

IMAGES = COUNT + 2


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A demo's folder with every artifact, small."""
    for name in ("data/annotations", "data/val", "detect/inference", "pretrain/reconstructions"):
        (tmp_path / name).mkdir(parents=True)
    mask = np.zeros((16, 16), np.uint8, order="F")
    mask[4:12, 4:12] = 1
    rle = coco_mask.encode(mask)
    segmentation = {"size": rle["size"], "counts": rle["counts"].decode()}
    shape = {"category_id": 1, "bbox": [4, 4, 8, 8], "segmentation": segmentation}
    ids = list(range(IMAGES, 0, -1))
    for i in ids:
        Image.new("RGB", (16, 16), (10 * i, 0, 0)).save(tmp_path / f"data/val/{i}.png")
    truth = {
        "images": [{"id": i, "file_name": f"{i}.png", "width": 16, "height": 16} for i in ids],
        "annotations": [{"id": i, "image_id": i, **shape} for i in ids],
        "categories": [{"id": 1, "name": "7"}],
    }
    found = [{"image_id": i, "score": score, **shape} for i in ids for score in (0.49, 0.5, 0.9)]
    values = {"AP": 40.0, "AP50": 71.24, "AP75": None, "AP-7": 12.5}
    write(tmp_path / "data/annotations/val.json", truth)
    write(tmp_path / "detect/inference/coco_instances_results.json", found)
    classes = [{"name": "7", "objects": 14, "bbox": {"AP": 12.5}, "segm": {"AP": 12.5}}]
    write(tmp_path / "detect/results.json", {"bbox": values, "segm": values | {"AP50": 65.43}, "classes": classes})
    steps = [{"step": s, "loss": 1 / s, "lr": 0.1, "images_per_second": 9} for s in (1, 2)]
    lines(tmp_path / "pretrain/log.jsonl", steps)
    losses = {"loss_mask": 0.5, "loss_cls": 0.5}
    lines(tmp_path / "detect/metrics.json", [{"iteration": i, "total_loss": 1.0, **losses} for i in (1, 2)])
    for step in (8, 16, 100):
        Image.new("RGB", (8, 8)).save(tmp_path / f"pretrain/reconstructions/step-{step:08d}.png")
    done = {"title": "Title", "status": "done", "seconds": 61.0, "peak_memory_bytes": 3 * 2**30}
    stages = [
        {"name": "data", "command": "python tools/a.py", **done},
        {"name": "report", "command": "python tools/b.py", **done, "status": "started", "seconds": 0.0},
    ]
    write(tmp_path / "stages.json", {"stages": stages})
    return tmp_path


def write(path: Path, value: object) -> None:
    path.write_text(json.dumps(value))


def lines(path: Path, rows: list[dict[str, float]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_whole_page(folder: Path, capsys: pytest.CaptureFixture[str]):
    main([str(folder)])
    html, summary = (folder / "report.html").read_text(), (folder / "summary.txt").read_text()
    assert "65.4 %" in html
    assert "71.2" in summary
    assert "65.4" in summary
    assert "1 min 01 s" in html
    assert "python tools/b.py" in html
    assert 'class="card missing"' not in html
    assert "report.html" in capsys.readouterr().out


def test_pictures_are_of_a_fixed_number_of_held_out_images(folder: Path):
    (gallery,) = report.prediction_section(RunFolder(folder)).blocks
    assert isinstance(gallery, Gallery)
    alts = [picture.alt for row in gallery.rows for picture in row.pictures]
    assert len(set(alts)) == COUNT
    assert alts[0].startswith("image 1.png: ")


def test_reconstructions_are_the_first_and_the_last_step(folder: Path):
    (gallery,) = report.reconstruction_section(RunFolder(folder)).blocks
    assert isinstance(gallery, Gallery)
    assert [row.caption for row in gallery.rows] == ["After 8 steps", "After 100 steps"]


def test_curves_and_tables(folder: Path):
    run = RunFolder(folder)
    curves = [*report.pretraining_section(run).blocks, *report.detector_section(run).blocks]
    titles = [block.title for block in curves if isinstance(block, Plot)]
    assert titles == ["Reconstruction loss", "Learning rate", "Total loss", "Its parts"]
    assert [block.what for block in curves if isinstance(block, Missing)] == []
    summary, by_class = report.result_section(run, DetectionResults.read(folder / RESULTS)).blocks
    assert isinstance(summary, Table)
    assert isinstance(by_class, Table)
    assert [[getattr(cell, "text", cell) for cell in row] for row in summary.rows] == [
        ["box", "40.0", "71.2", "-"],
        ["mask", "40.0", "65.4", "-"],
    ]
    assert [getattr(cell, "text", cell) for cell in by_class.rows[0]] == ["7", "14", "12.5", "12.5"]
    assert [getattr(cell, "share", None) for cell in by_class.rows[0]] == [None, None, 0.125, 0.125]


def test_report_in_the_making_has_no_time_of_its_own(folder: Path):
    table = report.stage_section(RunFolder(folder), Stages.read(folder / STAGES)).blocks[0]
    assert isinstance(table, Table)
    assert [row[1] for row in table.rows] == ["1 min 01 s", "this page"]
    assert list(table.footer) == ["all", "1 min 01 s", "3.00 GiB"]


def test_empty_folder_names_every_missing_file(tmp_path: Path):
    main([str(tmp_path)])
    missing = {str(block.path) for block in missing_blocks(tmp_path)}
    assert missing == {
        "data/annotations/val.json",
        "detect/inference/coco_instances_results.json",
        "detect/results.json",
        "detect/metrics.json",
        "pretrain/log.jsonl",
        "pretrain/reconstructions/step-*.png",
        "stages.json",
    }
    html = (tmp_path / "report.html").read_text()
    assert all(f"{name}</code>" in html for name in missing)


def missing_blocks(folder: Path) -> list[Missing]:
    sections = report.build_report(RunFolder(folder), None).sections
    return [block for section in sections for block in section.blocks if isinstance(block, Missing)]


def test_log_without_the_values_is_named(folder: Path):
    lines(folder / "pretrain/log.jsonl", [{"step": 1}])
    blocks = report.pretraining_section(RunFolder(folder)).blocks
    assert [type(block) for block in blocks] == [Missing] * 2


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("detect/results.json", {"bbox": {"AP": 1}}, "bbox: has no AP, AP50, AP75"),
        ("detect/results.json", [], "expected a JSON object"),
        ("data/annotations/val.json", {"images": []}, "&#39;images&#39; is empty"),
        ("detect/inference/coco_instances_results.json", {}, "expected a list of detections"),
        ("detect/inference/coco_instances_results.json", [{}], "does not fit data/annotations/val.json: &#39;score"),
        ("stages.json", {"stages": [{}]}, "unexpected content: stages: 0: name: Field required"),
    ],
)
def test_wrong_files_are_named(folder: Path, name: str, content: object, message: str):
    write(folder / name, content)
    main([str(folder)])
    html = (folder / "report.html").read_text()
    assert message in html
    assert f"{name}</code>" in html


def test_folder_that_does_not_exist(tmp_path: Path):
    with pytest.raises(UserError, match="no such folder"):
        main([str(tmp_path / "nowhere")])


def test_environment_names_machine_and_versions():
    values = dict(report.environment())
    assert values["Cores"]
    assert "torch " in values["Packages"]
    assert "crossmae" in values["Packages"] or "numpy" in values["Packages"]
