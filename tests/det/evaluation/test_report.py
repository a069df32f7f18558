"""The page of a run shows the numbers of its files, names what is missing or damaged, and loads nothing."""

import json
import re
import shlex

import pytest
from PIL import Image

pytest.importorskip("detectron2", reason="detectron2 is not installed: python tools/install_detectron2.py")

from crossmae.errors import UserError
from crossmae.reports.page import Commands, Missing, Plot, Table
from crossmae.reports.run_folder import LoggedNumbers
from crossmae.training.config import read_yaml
from det.config import load_det_config
from det.evaluation.report import build_report, changed_from_defaults, loss_plots, write_report
from det.evaluation.run_files import DetectionResults, describe_images, read_training_log
from tests.crossmae.reports.pages import blocks_in, cells, draw_no_plots
from tests.det.coco_files import TINY
from tools import predict, train_net

NAMES = ("cat", "dog", "<b>rat")
AP = {"cat": 12.34, "dog": 56.78, "<b>rat": None}


@pytest.fixture(autouse=True)
def quick_plots(monkeypatch):
    draw_no_plots(monkeypatch)


def numbers(ap):
    return {"AP": ap, "AP50": ap + 20, "AP75": None, "APs": 1.5, "AR100": 77.7} | {f"AP-{n}": AP[n] for n in NAMES}


def logged(iteration, loss, **others):
    row = {"step": iteration, "loss": loss, "loss_mask": loss / 2, "loss_cls": loss / 2}
    return row | {"lr": 0.01, "images_per_second": 1.0, "data_wait_share": 0.5} | others


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def folder(tmp_path):
    """The folder of a whole run, as training writes it."""
    run = tmp_path / "my run"
    (run / "inference").mkdir(parents=True)
    (run / "pictures").mkdir()
    (tmp_path / "tiny.yaml").write_text(TINY)
    cfg = load_det_config(str(tmp_path / "tiny.yaml"), ["DATASETS.TRAIN=('own_coco_train',)"])
    (run / "config.yaml").write_text(cfg.dump())
    data = {f"own_coco_{split}": {"json": f"/far/away/{split}.json", "images": f"/far/pics/{split}"}
            for split in ("train", "val")}  # fmt: skip
    settings = {
        "number of training images": 4321,
        "SOLVER.IMS_PER_BATCH": 2,
        "SHA-256 of the json of own_coco_train": "0123456789abcdef" * 4,
    }
    record = {"classes": NAMES, "category_ids": [1, 2, 3], "versions": {"torch": "9.8.7"}, "data": data}
    (run / "run.json").write_text(json.dumps(record | {"settings": settings, "iterations": 40}))
    classes = [{"name": name, "objects": 10 + at, "bbox": {"AP": AP[name]}, "segm": {"AP": AP[name]}}
               for at, name in enumerate(NAMES)]  # fmt: skip
    results = {"bbox": numbers(41.23), "segm": numbers(34.56), "classes": classes}
    (run / "results.json").write_text(json.dumps(results))
    evaluation = {"bbox/AP": 41.23, "segm/AP": 34.56, "bbox/AP50": 61.23, "segm/AP50": 54.56}
    write_lines(run / "log.jsonl", [logged(20, 4.0), logged(40, 3.0), {"step": 40, **evaluation}])
    (run / "model_best.json").write_text(json.dumps({"iteration": 20, "segm/AP": 35.67}))
    for name in ("model_best.safetensors", "model_final.safetensors"):
        (run / name).touch()
    for name in ("inference/pr_curves_bbox.png", "inference/pr_curves_segm.png", "pictures/1-photo.png"):
        Image.new("RGB", (8, 8)).save(run / name)
    return run


def blocks_of(folder, kind):
    return blocks_in(build_report(folder), kind)


def test_the_page_has_the_numbers_of_the_files(folder):
    assert write_report(folder) == folder / "report.html"
    html = (folder / "report.html").read_text()
    assert 'class="card missing"' not in html
    facts = {fact.label: (fact.value, fact.note) for fact in build_report(folder).facts}
    assert facts == {
        "Mask AP": ("34.6 %", "AP50 54.6, AP75 -"),
        "Box AP": ("41.2 %", "AP50 61.2, AP75 -"),
        "Best mask AP": ("35.7 %", "after 20 iterations: model_best.safetensors"),
        "Training images": ("4,321", "3 classes"),
        "Training time": ("1 min 20 s", "40 iterations, 1 images per second (median), without evaluations"),
    }
    headline, others, classes, settings, data = blocks_of(folder, Table)
    assert cells(headline) == [["box", "41.2", "61.2", "-"], ["mask", "34.6", "54.6", "-"]]
    assert ["AR100: recall of the best 100 in an image", "77.7", "77.7"] in cells(others)
    assert cells(classes) == [["dog", "11", "56.8", "56.8"], ["cat", "10", "12.3", "12.3"], ["<b>rat", "12", "-", "-"]]
    assert ["MODEL.VIT.EMBED_DIM", "24", "768"] in cells(settings)
    assert "own_coco" not in html
    assert cells(data)[0] == ["training", "away/train.json", "pics/train", "0123456789abcdef"]
    assert "<b>rat" not in html
    assert "/far/" not in re.sub(r"<pre>.*?</pre>", "", html, flags=re.DOTALL)  # whole paths are in commands only
    assert all(text in html for text in ("Detector: my run", "9.8.7", "2 blocks, width 24, patches of 8 pixels"))
    curves = {plot.title: json.loads(plot.svg) for plot in blocks_of(folder, Plot)}
    assert curves["Total loss"] == {"total loss": [[20, 40], [4.0, 3.0]]}
    assert curves["AP over the training"] == {"box AP": [[40], [41.23]], "mask AP": [[40], [34.56]]}
    assert curves["Waiting for data"]["waiting for data"] == [[20, 40], [0.5, 0.5]]
    assert set(curves) >= {"AP50 over the training", "Its parts", "Learning rate"}


REQUIRED = {
    "run.json": ("run.json",),
    "config.yaml": ("config.yaml",),
    "log.jsonl": ("log.jsonl",),
    "results.json": ("results.json",),
    "inference/pr_curves_bbox.png": ("inference/pr_curves_bbox.png",),
    "inference/pr_curves_segm.png": ("inference/pr_curves_segm.png",),
    "pictures/1-photo.png": ("pictures/*.png", "pictures/1-photo.png"),
}


@pytest.mark.parametrize("name", REQUIRED)
@pytest.mark.parametrize("content", [None, b"\xff\x00 {", b'{"a": "b"}', b"[1, 2]"])
def test_whatever_is_missing_or_damaged_is_named_in_its_place(folder, name, content):
    whole = len(build_report(folder).sections)
    (folder / name).unlink() if content is None else (folder / name).write_bytes(content)
    report = build_report(folder)
    missing = [block for section in report.sections for block in section.blocks if isinstance(block, Missing)]
    described = {"config.yaml", "run.json"} if content == b'{"a": "b"}' else set()  # a config, and a record, of nothing
    assert {str(block.path) for block in missing} <= set(REQUIRED[name])
    assert missing or name in described
    assert len(report.sections) == whole
    assert str(folder) not in " ".join(block.why for block in missing)


def test_a_folder_with_nothing_names_everything(tmp_path):
    html = write_report(tmp_path).read_text()
    for names in REQUIRED.values():
        assert f"<code>{names[0]}</code>" in html
    assert build_report(tmp_path).facts == []


def test_a_run_without_evaluation_says_so_once(folder):
    for name in ("results.json", "model_best.json", *(name for name in REQUIRED if "/" in name)):
        (folder / name).unlink()
    write_lines(folder / "log.jsonl", [logged(20, 4.0)])
    titles = [section.title for section in build_report(folder).sections]
    assert titles == ["Evaluation", "Training", "Using the detector", "Settings", "Data"]


def test_a_run_that_was_cut_off_tells_how_far_it_came_and_how_to_go_on(folder):
    (folder / "model_final.safetensors").unlink()
    write_lines(folder / "log.jsonl", [logged(20, 4.0)])
    report = build_report(folder)
    assert "was cut off, after 20 of 40 iterations" in report.lead
    (block,) = blocks_of(folder, Commands)
    resume = shlex.split(block.commands[-1][1].replace("\\\n", ""))
    given = train_net.build_parser().parse_intermixed_args(resume[2:])
    assert given.resume
    assert (given.train_json, given.val_images) == ("/far/away/train.json", "/far/pics/val")


def test_images_without_objects_are_counted(folder):
    record = json.loads((folder / "run.json").read_text())
    for listed, shown in ((4331, ("4,321 of 4,331", "10 without objects are left out, 3 classes")),
                          (4322, ("4,321 of 4,322", "1 without objects is left out, 3 classes")),
                          (4321, ("4,321", "3 classes"))):  # fmt: skip
        (folder / "run.json").write_text(json.dumps(record | {"listed_images": listed}))
        (fact,) = (fact for fact in build_report(folder).facts if fact.label == "Training images")
        assert (fact.value, fact.note) == shown
    assert describe_images(79, 89) == "79 of 89 images (10 without objects are left out)"
    assert describe_images(1, 1) == "1 image"


def test_the_commands_are_ones_that_the_tools_take(folder):
    (block,) = blocks_of(folder, Commands)
    find, evaluate = (shlex.split(command.replace("\\\n", "")) for _, command in block.commands)
    found = predict.build_parser().parse_intermixed_args(find[2:])
    assert (found.weights, found.force) == (folder / "model_best.safetensors", True)  # so it also works again
    given = train_net.build_parser().parse_intermixed_args(evaluate[2:])
    cfg = load_det_config(given.config_file, given.overrides)
    assert given.eval_only
    assert given.val_json == "/far/away/val.json"
    assert str(folder / "model_best.safetensors") == cfg.MODEL.WEIGHTS
    assert str(folder / "evaluation") == cfg.OUTPUT_DIR  # the results of the run stay


def test_text_instead_of_a_number_is_named(folder):
    results = json.loads((folder / "results.json").read_text())
    results["bbox"]["AP"] = "high"
    (folder / "results.json").write_text(json.dumps(results))
    with pytest.raises(UserError, match=r"results.json: unexpected content: bbox: AP: .*number"):
        DetectionResults.read(folder / "results.json")


def test_the_stages_of_a_cascade_are_one_curve(tmp_path):
    staged = {f"loss_{kind}_stage{stage}": float(stage + 1) for kind in ("cls", "box_reg") for stage in range(3)}
    write_lines(tmp_path / "log.jsonl", [{"step": 1, "loss": 9.0, "loss_mask": 1.0, **staged}])
    (row,) = read_training_log(tmp_path / "log.jsonl").rows
    assert row == {"step": 1, "loss": 9.0, "loss_mask": 1.0, "loss_cls": 6.0, "loss_box_reg": 6.0}


def test_more_parts_than_a_plot_takes_are_in_two():
    plots = loss_plots(LoggedNumbers([{"loss_mask": 1.0} | {f"loss_{number}": 1.0 for number in range(6)}]))
    assert list(plots) == ["Total loss", "Its parts", "Its parts from 7"]
    assert plots["Its parts"][1] == {"loss_mask": "mask"} | {f"loss_{number}": str(number) for number in range(5)}


def test_a_detector_without_masks_has_no_empty_columns(folder):
    results = json.loads((folder / "results.json").read_text())
    del results["segm"]
    for one in results["classes"]:
        del one["segm"]
    (folder / "results.json").write_text(json.dumps(results))
    (folder / "inference/pr_curves_segm.png").unlink()
    assert blocks_of(folder, Missing) == []
    assert cells(blocks_of(folder, Table)[2])[0] == ["dog", "11", "56.8"]


def test_settings_are_those_that_differ_from_the_defaults(tmp_path):
    (tmp_path / "plain.yaml").write_text("{}")
    words = ["MODEL.DEVICE=cpu", "SOLVER.BETAS=(0.9, 0.95)", "SOLVER.STEPS=(30000,)", "MODEL.VIT.GLOBAL_BLOCKS=[1]"]
    cfg = load_det_config(str(tmp_path / "plain.yaml"), words)
    (tmp_path / "config.yaml").write_text(cfg.dump())
    assert changed_from_defaults(read_yaml(tmp_path / "config.yaml")) == [
        ("MODEL.DEVICE", "cpu", "cuda"),
        ("MODEL.VIT.GLOBAL_BLOCKS", [1], [2, 5, 8, 11]),
        ("SOLVER.BETAS", [0.9, 0.95], [0.9, 0.999]),
    ]


def test_peak_memory_is_shown_where_it_is_logged(folder):
    write_lines(folder / "log.jsonl", [logged(20, 4.0, memory_gb=3.04), logged(40, 3.0)])
    assert build_report(folder).facts[-1].value == "3.0 GB"
