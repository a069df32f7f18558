"""The page of a run and of the demo shows what the stages wrote, names what is missing, and what is broken."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

pytest.importorskip("detectron2", reason="detectron2 is not installed: python tools/install_detectron2.py")


from crossmae.checkpoints.reading import PIPELINE_RECORD
from crossmae.errors import UserError
from crossmae.experiments.pipeline.stage_section import Stages, stage_section
from crossmae.experiments.stages import RECORDS
from crossmae.experiments.worth.grid import ARMS
from crossmae.reports.page import Commands, Gallery, Missing, Plot, Section, Table, format_seconds
from crossmae.reports.run_folder import RunFolder
from det.data.coco import read_coco
from det.evaluation.resampling import ApDifference
from tools import convert_checkpoint, export_detector, predict, report
from tools.demo.run import PAGE, demo_stages
from tools.report import COUNT, PageInputs, PipelineRecord, main, read_arms
from tools.worth import build_parser

DEMO = PageInputs.model_validate(PAGE)
IMAGES = COUNT + 2
DETECTORS = ("detect-random", "detect-own")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A demo's folder with every artifact, small."""
    for name in (
        "data/annotations",
        "data/val",
        *(f"{arm}/inference" for arm in DETECTORS),
        "pretrain/reconstructions",
    ):
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
        "annotations": [{"id": i, "image_id": i, "area": 64, "iscrowd": 0, **shape} for i in ids],
        "categories": [{"id": 1, "name": "7"}],
    }
    write(tmp_path / "data/annotations/val.json", truth)
    write(tmp_path / "data/annotations/few.json", truth | {"images": truth["images"][:3]})
    # The detector from own pretraining finds every object, the other one every second.
    for arm, chosen, ap50 in ((DETECTORS[0], ids[::2], 50.8), (DETECTORS[1], ids, 65.43)):
        found = [{"image_id": i, "score": score, **shape} for i in chosen for score in (0.49, 0.5, 0.9)]
        values = {"AP": ap50 - 10, "AP50": ap50, "AP75": None, "AP-7": 12.5}
        classes = [{"name": "7", "objects": 14, "bbox": {"AP": ap50 - 10}, "segm": {"AP": 12.5}}]
        write(tmp_path / arm / "inference/coco_instances_results.json", found)
        write(tmp_path / arm / "results.json", {"bbox": values, "segm": values | {"AP": None}, "classes": classes})
        lines(tmp_path / arm / "log.jsonl", [{"step": i, "loss": 1.0, "loss_mask": 0.5} for i in (1, 3)])
        settings = {"SEED": 0, "SOLVER": {"MAX_ITER": 3, "LAYER_DECAY": 1.0 if arm == DETECTORS[0] else 0.7}}
        write(tmp_path / arm / "run.json", {"settings": settings})
    steps = [{"step": s, "loss": 1 / s, "lr": 0.1, "images_per_second": 9} for s in (1, 2)]
    lines(tmp_path / "pretrain/log.jsonl", steps)
    for step in (8, 16, 100):
        Image.new("RGB", (8, 8)).save(tmp_path / f"pretrain/reconstructions/step-{step:08d}.png")
    done = {"title": "Title", "status": "done", "seconds": 61.0, "peak_memory_bytes": 3 * 2**30}
    stages = [
        {"name": "data", "command": "python tools/a.py", **done},
        *({"name": name, "command": "python tools/c.py", **done} for name in ("pretrain", "start", *DETECTORS)),
        {"name": "report", "command": "python tools/b.py", **done, "status": "started", "seconds": 0.0},
    ]
    write(tmp_path / "stages.json", {"stages": stages})
    write(tmp_path / PIPELINE_RECORD, {"page": PAGE})
    return tmp_path


def write(path: Path, value: object) -> None:
    path.write_text(json.dumps(value))


def lines(path: Path, rows: list[dict[str, float]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_whole_page(folder: Path, capsys: pytest.CaptureFixture[str]):
    main([str(folder)])
    html, summary = (folder / "report.html").read_text(), (folder / "summary.txt").read_text()
    for number in ("40.8", "50.8", "55.4", "65.4"):
        assert number in html
        assert number in summary
    for page in (html, " ".join(summary.split())):
        assert "one seed of each shows nothing about the gain from pretraining" in page
        assert "tools/worth.py" in page
    assert "5 min 05 s" in html
    assert "not finished" not in html
    assert "python tools/b.py" in html
    assert 'class="card missing"' not in html
    assert "report.html" in capsys.readouterr().out
    assert "almost nothing" not in html + summary


@pytest.mark.parametrize("doubts", [[], ["9 steps of a detector", "objects of 3 pixels"]])
def test_an_ap_near_zero_is_explained(folder: Path, doubts: list[str]):
    for arm in DETECTORS:
        values = {"AP": 0.2, "AP50": 0.9, "AP75": 0.0}
        write(folder / arm / "results.json", {"bbox": values, "segm": values, "classes": []})
    write(folder / PIPELINE_RECORD, {"page": PAGE | {"doubts": doubts}})
    main([str(folder)])
    for text in ((folder / "report.html").read_text(), " ".join((folder / "summary.txt").read_text().split())):
        assert "finds almost nothing. Probable reasons: " in text
        assert ("; ".join(doubts) or "a short training") in text


def sections(folder: Path) -> dict[str, Section]:
    """The sections of the page by title."""
    run = RunFolder(folder)
    inputs = PipelineRecord.read(folder / PIPELINE_RECORD).page
    record = run.read(RECORDS, Stages.read, Stages())
    arms, truth = read_arms(run, inputs, record), run.read(inputs.annotations, read_coco, None)
    found = report.build_report(
        run, inputs, record, arms, truth, report.ap_differences(run, inputs, arms, truth)
    ).sections
    return {section.title: section for section in found}


def test_pictures_are_of_a_fixed_number_of_held_out_images_with_both_detectors(folder: Path):
    (gallery,) = sections(folder)["Held-out images"].blocks
    assert isinstance(gallery, Gallery)
    alts = [picture.alt for row in gallery.rows for picture in row.pictures]
    assert len(set(alts)) == COUNT
    assert alts[0].startswith("image 1.png: ")
    assert alts[0].endswith("predictions from random weights and own pretraining")
    (picture,) = gallery.rows[0].pictures
    assert picture.width > 2.5 * picture.height  # three panels in a row


def test_comparison_has_both_detectors_and_the_difference(folder: Path):
    section = sections(folder)["Comparison"]
    table, commands = section.blocks
    assert isinstance(table, Table)
    assert isinstance(commands, Commands)
    assert list(table.columns) == ["start", "box AP", "mask AP", "box AP50", "mask AP50"]
    assert [[getattr(cell, "text", cell) for cell in row] for row in table.rows] == [
        ["random weights", "40.8", "-", "50.8", "50.8"],
        ["own pretraining", "55.4", "-", "65.4", "65.4"],
    ]
    # By the rules of COCO: 100 % of the objects, minus 7 of 14, with the best detection of each image.
    assert list(table.footer) == ["difference", "+49.5", "+49.5", "", ""]
    assert "for 3 steps on 3 labelled images" in table.caption
    differ = "and these settings: SOLVER.LAYER_DECAY (1.0 from random weights, 0.7 from own pretraining). Layer decay"
    assert differ in table.caption
    assert "MAX_ITER" not in table.caption
    ((_, line),) = commands.commands
    python, tool, *words = shlex.split(line.replace("\\\n", ""))
    assert (python, tool) == ("python", "tools/worth.py")
    parsed = build_parser().parse_args(words)
    assert parsed.arms == ["random_pretraining_init", "own"]
    assert set(parsed.arms) <= set(ARMS)
    assert parsed.label_images == folder / "data/train"


@pytest.mark.parametrize(
    ("box", "mask", "words"),
    [
        ((-0.4, 6.0), (0.2, 6.0), "could give a difference of box AP with the other sign."),
        ((0.2, 6.0), (-0.4, 6.0), "could give a difference of mask AP with the other sign."),
        ((-0.4, 6.0), (-3.0, 0.4), "could give a difference of box and mask AP with the other sign."),
        ((0.2, 6.0), (-6.0, -0.2), "would most likely give differences of the same sign."),
    ],
)
def test_verdict_follows_from_the_intervals_and_never_claims_a_gain(
    box: tuple[float, float], mask: tuple[float, float], words: str
):
    text = report.verdict({"bbox": ApDifference(2.0, *box), "segm": ApDifference(-0.04, *mask)})
    assert f"+2.0 box AP ({box[0]:+.1f} to {box[1]:+.1f}), 0.0 mask AP (" in text
    assert words in text
    assert text.endswith(report.ONE_SEED)
    assert report.verdict({}).endswith(report.ONE_SEED)


def test_the_page_tells_if_no_setting_differs(folder: Path):
    arms = read_arms(RunFolder(folder), DEMO, Stages.read(folder / RECORDS))
    assert "SOLVER.LAYER_DECAY" in report.differing_settings(arms)
    shutil.copy(folder / DETECTORS[0] / "run.json", folder / DETECTORS[1])
    same = report.differing_settings(read_arms(RunFolder(folder), DEMO, Stages.read(folder / RECORDS)))
    assert same == "All settings are the same. Only the first weights of the encoder differ. "
    (folder / DETECTORS[1] / "run.json").unlink()
    assert report.differing_settings(read_arms(RunFolder(folder), DEMO, Stages.read(folder / RECORDS))) == ""


@pytest.mark.parametrize("arm", DETECTORS)
def test_missing_detector_leaves_the_other_one_and_no_difference(folder: Path, arm: str):
    shutil.rmtree(folder / arm)
    found = sections(folder)
    table, *missing, _ = found["Comparison"].blocks
    assert isinstance(table, Table)
    names = [str(block.path) for block in missing if isinstance(block, Missing)]
    assert names == [f"{arm}/results.json", f"{arm}/inference/coco_instances_results.json"]
    assert len(table.rows) == 1
    assert list(table.footer) == []
    assert "The difference is unknown" in found["Comparison"].text
    assert [type(block) for block in found["Held-out images"].blocks] == [Gallery, Missing]
    main([str(folder)])
    assert "The difference is unknown" in (folder / "summary.txt").read_text()


def test_reconstructions_are_the_first_and_the_last_step(folder: Path):
    (gallery,) = report.reconstruction_section(RunFolder(folder)).blocks
    assert isinstance(gallery, Gallery)
    assert [row.caption for row in gallery.rows] == ["After 8 steps", "After 100 steps"]


def test_curves_and_tables(folder: Path):
    found = sections(folder)
    curves = [*found["Pretraining"].blocks, *found["Detector training"].blocks]
    titles = [block.title for block in curves if isinstance(block, Plot)]
    assert titles == ["Reconstruction loss", "Learning rate", "Total loss"]
    assert [block.what for block in curves if isinstance(block, Missing)] == []
    total = next(block for block in curves if isinstance(block, Plot) and block.title == "Total loss")
    assert all(f"from {start}" in total.svg for start in ("random weights", "own pretraining"))
    (by_class,) = found["Classes"].blocks
    assert isinstance(by_class, Table)
    assert [getattr(cell, "text", cell) for cell in by_class.rows[0]] == ["7", "14", "40.8", "55.4", "12.5", "12.5"]
    assert [getattr(cell, "share", 0) for cell in by_class.rows[0]] == [0, 0, 0.408, 0.5543, 0.125, 0.125]


def test_the_next_commands_are_taken_and_replace_no_files(folder: Path):
    run = RunFolder(folder)
    (block,) = report.next_section(run, DEMO, read_arms(run, DEMO, Stages.read(folder / RECORDS)), {}).blocks
    assert isinstance(block, Commands)
    words = {title: shlex.split(command.replace("\\\n", "")) for title, command in block.commands}
    tools = {"Find objects in other images": predict, "Export": export_detector}
    for title, tool in tools.items():
        given = tool.build_parser().parse_intermixed_args(words[title][2:])
        assert given.weights == folder / "detect-own"
        assert not given.force
    convert = convert_checkpoint.build_parser().parse_args(words["Convert the pretrained encoder"][2:])
    assert not convert.force


def test_report_in_the_making_has_no_time_of_its_own(folder: Path):
    table = stage_section(RunFolder(folder), Stages.read(folder / RECORDS), [], {}).blocks[0]
    assert isinstance(table, Table)
    assert [row[1] for row in table.rows] == [*["1 min 01 s"] * 5, "this page"]
    assert list(table.footer) == ["all", "5 min 05 s", "3.00 GiB"]


@pytest.mark.parametrize(
    ("status", "later", "told"),
    [
        ("stopped", 0, "the stage pretrain is stopped, the stage detect-random is not started, "),
        ("failed", 2, "the stage detect-random is failed, the stage detect-own is not started"),
        ("started", 3, "the stage detect-own is not finished"),
    ],
    ids=["in pretraining", "first detector", "second detector"],
)
def test_an_unfinished_run_tells_what_is_done_and_claims_nothing_else(folder: Path, status: str, later: int, told: str):
    """What an earlier run of other settings left in the folders of later stages does not count."""
    record = json.loads((folder / RECORDS).read_text())
    record["stages"] = record["stages"][: later + 2]
    record["stages"][-1] |= {"status": status, "seconds": 999.0, "peak_memory_bytes": 2**40}
    write(folder / RECORDS, record)
    main([str(folder)])
    html, summary = (folder / "report.html").read_text(), " ".join((folder / "summary.txt").read_text().split())
    done = ["data", "pretrain", "start", "detect-random"][: later + 1]
    for text in (html, summary):
        assert f"This run is not finished: {told}" in text
        assert f"Done: {', '.join(done)}. The same command continues." in text
    assert ("detector was trained" in html) == ("detect-random" in done)  # the first of two
    run = RunFolder(folder)
    stages = Stages.read(folder / RECORDS)
    arms = read_arms(run, DEMO, stages)
    assert [arm.folder for arm in arms] == [name for name in done if name in DETECTORS]
    facts = {fact.label: fact for fact in report.facts(arms, stages, stages.unfinished(DEMO.stages))}
    assert (facts["Time"].value, facts["Time"].note) == (format_seconds(61 * len(done)), "the stages that are done")
    assert facts["Peak memory"].value == "3.00 GiB"
    assert ("Mask AP" in facts or "Box AP" in facts) == bool(arms)
    table = stage_section(run, stages, [], stages.unfinished(DEMO.stages)).blocks[0]
    assert isinstance(table, Table)
    assert [row[0] for row in table.rows][:5] == ["data", "pretrain", *(["start"] if later else []), *DETECTORS]


def test_empty_folder_names_every_missing_file(tmp_path: Path):
    write(tmp_path / PIPELINE_RECORD, {"page": PAGE})
    main([str(tmp_path)])
    missing = {str(block.path) for block in missing_blocks(tmp_path)}
    assert missing == {
        "data/annotations/val.json",
        *(f"{arm}/inference/coco_instances_results.json" for arm in DETECTORS),
        *(f"{arm}/results.json" for arm in DETECTORS),
        *(f"{arm}/log.jsonl" for arm in DETECTORS),
        "pretrain/log.jsonl",
        "pretrain/reconstructions/step-*.png",
        "stages.json",
    }
    html = (tmp_path / "report.html").read_text()
    assert all(f"{name}</code>" in html for name in missing)
    written = {output for stage in demo_stages(tmp_path) for output in stage.outputs} | {RECORDS}
    assert {Path(name).parts[0] for name in missing} <= written


def missing_blocks(folder: Path) -> list[Missing]:
    return [block for one in sections(folder).values() for block in one.blocks if isinstance(block, Missing)]


def test_log_without_the_values_is_named(folder: Path):
    lines(folder / "pretrain/log.jsonl", [{"step": 1}])
    blocks = report.pretraining_section(RunFolder(folder), DEMO).blocks
    assert [type(block) for block in blocks] == [Missing] * 2


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("detect-own/results.json", {"bbox": {"AP": 1}}, "bbox: has no AP, AP50, AP75"),
        ("detect-own/results.json", [], "expected a JSON object"),
        ("data/annotations/val.json", {"images": []}, "&#39;images&#39; is empty"),
        ("detect-own/inference/coco_instances_results.json", {}, "expected a list of detections"),
        (
            "detect-own/inference/coco_instances_results.json",
            [{}],
            "does not fit data/annotations/val.json: &#39;image_id",
        ),
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
