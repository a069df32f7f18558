"""The flow of `crossmae run`: what is decided once stays, held-out images stay out, and another request is refused.

Trainings are not run here: their measured speed is given, and their files are written by the tests.
"""

from __future__ import annotations

import json
import shlex
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from crossmae.errors import UserError
from crossmae.experiments.pipeline import pipeline
from crossmae.experiments.pipeline.pipeline import OWN, RANDOM, RECORD, Request, check_request, list_stages
from crossmae.experiments.pipeline.plan import Timing
from crossmae.experiments.stages import RECORDS, Stage
from crossmae.files import read_json
from tools import split_labels
from tools.run import build_parser

SIDE, COUNT = 48, 40


@pytest.fixture
def request_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Request:
    """Labelled images, and measured seconds of a step without a training."""
    rng, content = np.random.default_rng(0), {"images": [], "annotations": [], "categories": [{"id": 1, "name": "a"}]}
    (tmp_path / "images").mkdir()
    for number in range(COUNT):
        Image.fromarray(rng.integers(0, 255, (SIDE, SIDE, 3), np.uint8)).save(tmp_path / f"images/{number}.png")
        content["images"].append({"id": number, "file_name": f"{number}.png", "width": SIDE, "height": SIDE})
        box = [5, 5, 16, 12]
        corners = [5, 5, 21, 5, 21, 17, 5, 17]
        annotation = {"id": number + 1, "image_id": number, "category_id": 1, "bbox": box, "segmentation": [corners]}
        content["annotations"].append(annotation | {"area": 192, "iscrowd": 0})
    (tmp_path / "labels.json").write_text(json.dumps(content))
    monkeypatch.setattr(pipeline, "busy_share", lambda: 0.0)
    monkeypatch.setattr(pipeline, "time_pretraining", lambda *_: Timing(10.0, 0.5, 8))
    monkeypatch.setattr(pipeline, "time_detection", lambda _, size: Timing(10.0, size / 256, 8))
    return Request(tmp_path / "images", tmp_path / "labels.json", tmp_path / "out", 900.0)


def run(stages: Iterator[Stage], output: Path) -> list[Stage]:
    """Run the split, and write what trainings would have written."""
    found, records = [], []
    for stage in stages:
        found.append(stage)
        if stage.name == "split":
            subprocess.run(stage.arguments, check=True, capture_output=True)
        for name in stage.outputs:
            (output / name).mkdir(exist_ok=True)
        if stage.name == "pretrain":
            rows = [{"step": 0, "knn_accuracy": 0.3}, {"step": 9, "knn_accuracy": 0.4}]
            (output / "pretrain" / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        records.append({"name": stage.name, "seconds": 100.0})
        (output / RECORDS).write_text(json.dumps({"stages": records}))
    return found


def start(request: Request) -> list[Stage]:
    request.output.mkdir(exist_ok=True)
    check_request(request)
    return run(list_stages(request, 0.0), request.output)


@pytest.fixture(autouse=True)
def _clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """The look at the data takes 60 seconds."""
    monkeypatch.setattr(pipeline.time, "monotonic", lambda: 60.0)


def test_the_stages_in_order_and_the_held_out_images_stay_out(
    request_of: Request, capsys: pytest.CaptureFixture[str]
) -> None:
    stages = start(request_of)
    output = request_of.output
    assert [stage.name for stage in stages] == ["split", "pretrain", OWN, "report"]
    assert request_of.stage_count == len(stages)
    train, val = (read_json(output / f"data/{name}.json") for name in ("train", "val"))
    names = [{image["file_name"] for image in part["images"]} for part in (train, val)]
    assert (len(names[0]), len(names[1])) == (32, 8)
    pretrained = {Path(line).name for line in (output / "pretrain.txt").read_text().splitlines()}
    assert pretrained == names[0]
    assert {Path(line).name for line in (output / "held-out.txt").read_text().splitlines()} == names[1]
    assert "features improved: nearest neighbours (%) 30 at step 0, 40 at the end" in capsys.readouterr().out
    page = read_json(output / RECORD)["page"]
    assert page["arms"] == {OWN: "own pretraining"}
    assert "nearest neighbours (%) 30 at step 0, 40 at the end" in page["facts"]["After pretraining"]
    typed = build_parser().parse_args(shlex.split(page["facts"]["Command"])[2:])
    assert (typed.images, typed.labels, typed.output) == (request_of.images, request_of.labels, output)
    assert (typed.budget, typed.seed, typed.by_folder) == ("15m", 0, False)
    assert page["facts"]["Budget"].startswith("15 min 00 s. ")
    assert page["val"]["json"] == str(output / "data/val.json")


@pytest.mark.parametrize("kind", ["coco", "masks"])
def test_unlabelled_images_are_pretrained_on_and_not_held_out(request_of: Request, kind: str) -> None:
    bare = {f"{number}.png" for number in range(0, COUNT, 4)}
    path = request_of.labels
    assert path is not None
    if kind == "coco":
        content = read_json(path)
        content["images"] = [image for image in content["images"] if image["file_name"] not in bare]
        kept = {image["id"] for image in content["images"]}
        content["annotations"] = [one for one in content["annotations"] if one["image_id"] in kept]
        path.write_text(json.dumps(content))
    else:
        path = path.parent / "masks"
        path.mkdir()
        for name in {f"{number}.png" for number in range(COUNT)} - bare:
            Image.fromarray(np.eye(SIDE, dtype=np.uint8)).save(path / name)
    request = replace(request_of, labels=path)
    start(request)
    labelled = [
        {image["file_name"] for image in read_json(request.output / f"data/{name}.json")["images"]}
        for name in ("train", "val")
    ]
    assert [len(names) for names in labelled] == [24, 6]
    assert not bare & (labelled[0] | labelled[1])
    pretrained = {Path(line).name for line in (request.output / "pretrain.txt").read_text().splitlines()}
    assert pretrained == labelled[0] | bare
    told = read_json(request.output / RECORD)["page"]["facts"]["Labels"]
    assert told.endswith("24 images for training, 6 for validation, 10 unlabelled, for pretraining only")


def test_the_detector_gets_the_time_that_is_left(request_of: Request, capsys: pytest.CaptureFixture[str]) -> None:
    words = {stage.name: stage.words for stage in start(request_of)}[OWN]
    # 900 s: 60 for the look, 100 for pretraining, 20 for the page, 10 for start and evaluation; 128 pixels: 0.5 s.
    planned = read_json(request_of.output / RECORD)["decision"]["plan"]["detect"]["steps"]
    steps = int(next(word for word in words if word.startswith("SOLVER.MAX_ITER=")).partition("=")[2])
    assert steps == min(int((900 - 60 - 100 - 20 - 10) / 0.5), planned * 3 // 2, 400)
    assert "in place of" not in capsys.readouterr().out
    decision = pipeline._DECISION.validate_python(read_json(request_of.output / RECORD)["decision"])
    for other, word in ((planned - 50, "more"), (planned + 50, "less")):
        pipeline.print_steps(replace(decision, detect_steps=other))
        assert f"detector: {other} steps in place of {planned}, " in (told := capsys.readouterr().out)
        assert f"took {word} time than planned" in told


def test_a_decision_is_made_once(request_of: Request, monkeypatch: pytest.MonkeyPatch) -> None:
    first = start(request_of)
    for name in ("time_pretraining", "time_detection", "look_at_images"):
        monkeypatch.setattr(pipeline, name, None)
    monkeypatch.setattr(pipeline.time, "monotonic", lambda: 10**6)
    again = start(request_of)
    assert [stage.fingerprint for stage in again] == [stage.fingerprint for stage in first]


def test_a_dry_run_stops_after_the_plan_and_the_real_run_uses_it(
    request_of: Request, capsys: pytest.CaptureFixture[str]
) -> None:
    request_of.output.mkdir()
    check_request(request_of)
    stages = run(list_stages(request_of, 0.0, dry_run=True), request_of.output)
    assert [stage.name for stage in stages] == ["split"]
    plan = capsys.readouterr().out.partition("plan:\n")[2]
    assert [line.split()[0] for line in plan.splitlines()[:5]] == ["done", "pretrain", OWN, "report", "all"]
    start(request_of)
    assert plan.splitlines()[:5] == capsys.readouterr().out.partition("plan:\n")[2].splitlines()[:5]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("budget", r"--budget 15m, not --budget 15m1s"),
        ("labels", r"--labels \S*labels\.json, not --labels \S*other\.json"),
        ("digest of labels", r"another content of --labels, not --labels \S*labels\.json"),
        ("seed", r"--seed 0, not --seed 1"),
        ("detect_settings", r"no --detect-set, not --detect-set A=1 'B=2 3'"),
    ],
)
def test_another_request_in_the_same_folder_is_refused(
    request_of: Request, change: str, told: str, tmp_path: Path
) -> None:
    start(request_of)
    other = request_of
    if change == "digest of labels":
        path = tmp_path / "labels.json"
        path.write_text(path.read_text().replace('"a"', '"b"'))
    elif change == "labels":
        (tmp_path / "other.json").write_text("{}")
        other = replace(request_of, labels=tmp_path / "other.json")
    else:
        other = replace(
            request_of, **{change: {"budget": 901.0, "seed": 1, "detect_settings": ("A=1", "B=2 3")}[change]}
        )
    with pytest.raises(UserError, match=rf"^--output: \S* holds a run with {told}\. Repeat the command of that run"):
        check_request(other)
    check_request(other, fresh=True)
    assert "decision" not in read_json(request_of.output / RECORD)


def test_until_a_training_starts_the_request_may_change(request_of: Request) -> None:
    request_of.output.mkdir()
    check_request(request_of)
    run(list_stages(request_of, 0.0, dry_run=True), request_of.output)
    other = replace(request_of, budget=1200.0)
    check_request(other)
    assert "decision" not in read_json(request_of.output / RECORD)
    run(list_stages(other, 0.0), request_of.output)
    with pytest.raises(UserError, match=r"with --budget 20m, not --budget 15m\."):
        check_request(request_of)


def test_a_budget_that_no_machine_could_keep_is_refused_before_anything_runs(request_of: Request) -> None:
    with pytest.raises(
        UserError, match=r"^--budget: 1 min 30 s is too short: .* at least 1 min 00 s of it. Give 2m or more"
    ):
        start(replace(request_of, budget=90.0))
    assert [path.name for path in request_of.output.iterdir()] == [RECORD]


def test_a_slow_machine_is_known_before_a_detector_is_measured(
    request_of: Request, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "time_pretraining", lambda *_: Timing(500.0, 0.5, 8))
    monkeypatch.setattr(pipeline, "time_detection", None)
    # 60 s until now, 500 s of pretraining, two starts of 10 s, 20 s for the page: 600 s of 900 s.
    with pytest.raises(
        UserError, match=r"^--budget: 15 min 00 s is too short: .* at least 10 min 00 s of it. Give 17m"
    ):
        start(request_of)


def test_broken_images_are_found_before_the_labels_are_split(request_of: Request) -> None:
    for path in request_of.images.iterdir():
        path.write_bytes(b"no image")
    with pytest.raises(UserError, match=r"^IMAGES: none of 40 images can be read"):
        start(request_of)
    assert not (request_of.output / "data").exists()


@pytest.mark.parametrize(("busy", "warned"), [(0.2, False), (0.6, True)])
def test_a_busy_machine_is_said(
    request_of: Request, busy: float, warned: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(pipeline, "busy_share", lambda: busy)
    start(request_of)
    assert ("machine: other programs use 60% of its cores." in capsys.readouterr().out) == warned


@pytest.mark.parametrize("share", [None, 0.35])
def test_a_share_is_given_to_the_split_if_the_user_gave_one(request_of: Request, share: float | None) -> None:
    words = pipeline.split_stage(replace(request_of, val_share=share)).words
    assert split_labels.build_parser().parse_args(words).val == share


def test_a_comparison_has_the_same_detector_from_the_random_weights_of_pretraining(request_of: Request) -> None:
    request = replace(request_of, compare=True)
    stages = {stage.name: stage for stage in start(request)}
    assert list(stages) == ["split", "pretrain", "start", RANDOM, OWN, "report"]
    assert request.stage_count == len(stages)
    random, own = (set(stages[name].words) for name in (RANDOM, OWN))
    out = request.output
    assert random - own == {f"MODEL.WEIGHTS={out / 'start'}", f"OUTPUT_DIR={out / RANDOM}"}
    assert own - random == {f"MODEL.WEIGHTS={out / 'pretrain'}", f"OUTPUT_DIR={out / OWN}"}


def test_a_slow_machine_gets_smaller_images(request_of: Request, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "choose_size", lambda *_: 512)
    monkeypatch.setattr(pipeline, "time_detection", lambda _, size: Timing(10.0, 40 * (size / 512) ** 2, 8))
    start(request_of)
    decision = read_json(request_of.output / RECORD)["decision"]
    assert decision["size"] < 512
    assert decision["plan"]["detect"]["epochs"] >= 8


def test_small_objects_keep_the_size_of_their_images(request_of: Request, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "choose_size", lambda *_: 512)
    monkeypatch.setattr(pipeline, "time_detection", lambda _, size: Timing(10.0, 40 * (size / 512) ** 2, 8))
    monkeypatch.setattr(pipeline, "object_share", lambda _: 16 / 300)
    start(request_of)
    assert read_json(request_of.output / RECORD)["decision"]["size"] == 320


def test_images_without_objects_are_no_epochs_of_the_detector(request_of: Request, tmp_path: Path) -> None:
    content = json.loads((tmp_path / "labels.json").read_text())
    content["annotations"] = content["annotations"][: COUNT // 2]
    (tmp_path / "labels.json").write_text(json.dumps(content))
    start(request_of)
    counts = read_json(request_of.output / "data/split.json")["counts"]
    decision = read_json(request_of.output / RECORD)["decision"]
    assert decision["trainings"]["train"]["count"] == counts["train"]["images"] - counts["train"]["empty"] < 32
    assert decision["plan"]["detect"]["images"] == decision["trainings"]["train"]["count"]
    assert decision["trainings"]["val"]["count"] == counts["val"]["images"] == 8


def test_a_plan_that_may_find_nothing_says_so_before_the_training_and_on_the_page(
    request_of: Request, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(pipeline, "object_share", lambda _: 0.01)
    start(request_of)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: ")]
    doubts = read_json(request_of.output / RECORD)["page"]["doubts"]
    assert line == f"warning: this detector may find almost nothing ({'; '.join(doubts)})"
    assert "32 labelled images" in doubts[0]
    assert "pixels long as the detector sees them" in doubts[1]


@pytest.mark.parametrize(
    ("neighbours", "losses", "told"),
    [
        ((0.35, 0.4), (0.9, 0.5), ["features did not clearly change", "reconstruction of held-out images improved"]),
        ((0.3, 0.4), (0.9, 0.5), ["features improved", "reconstruction of held-out images improved"]),
        ((0.4, 0.3), (0.9, 0.5), ["features did not improve", "reconstruction of held-out images improved"]),
        ((), (0.9, 0.9), ["reconstruction of held-out images did not improve"]),
        ((0.3,), (), []),
    ],
)
def test_features_and_reconstruction_have_lines_of_their_own(
    neighbours: tuple[float, ...], losses: tuple[float, ...], told: list[str], tmp_path: Path
) -> None:
    rows = [{"knn_accuracy": value} for value in neighbours] + [{"val_loss": value} for value in losses]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = pipeline.describe_features(tmp_path / "log.jsonl", 200)
    assert [line.partition(":")[0] for line in found] == told


def test_without_labels_there_is_only_pretraining(request_of: Request) -> None:
    request = replace(request_of, labels=None)
    stages = start(request)
    assert [stage.name for stage in stages] == ["pretrain", "report"]
    held_out = (request.output / "held-out.txt").read_text().splitlines()
    pretrained = (request.output / "pretrain.txt").read_text().splitlines()
    assert len(held_out) == COUNT // 20
    assert len(pretrained) == COUNT - len(held_out)
    assert not set(held_out) & set(pretrained)


def test_masks_are_left_out_if_an_object_has_none(request_of: Request, tmp_path: Path) -> None:
    content = json.loads((tmp_path / "labels.json").read_text())
    for annotation in content["annotations"]:
        del annotation["segmentation"]
    (tmp_path / "labels.json").write_text(json.dumps(content))
    words = {stage.name: stage.words for stage in start(request_of)}[OWN]
    assert "MODEL.MASK_ON=False" in words


@pytest.mark.parametrize("by_folder", [True, False])
def test_unlabelled_images_of_held_out_folders_are_pretrained_on_only_without_by_folder(
    request_of: Request, tmp_path: Path, by_folder: bool
) -> None:
    """Five folders of eight images: two are unlabelled in each. A folder without labels is pretrained on."""
    content = json.loads((tmp_path / "labels.json").read_text())
    for number, image in enumerate(content["images"]):
        image["file_name"] = f"clip_{number % 5}/{number}.png"
        (tmp_path / f"images/clip_{number % 5}").mkdir(exist_ok=True)
        (tmp_path / f"images/{number}.png").rename(tmp_path / "images" / image["file_name"])
    content["images"] = content["images"][:30]
    content["annotations"] = content["annotations"][:30]
    (tmp_path / "labels.json").write_text(json.dumps(content))
    (tmp_path / "images/bare").mkdir()
    Image.new("RGB", (SIDE, SIDE)).save(tmp_path / "images/bare/x.png")
    request = replace(request_of, by_folder=by_folder)
    start(request)
    held_out = {Path(line) for line in (request.output / "held-out.txt").read_text().splitlines()}
    pretrained = {Path(line) for line in (request.output / "pretrain.txt").read_text().splitlines()}
    folders = {path.parent for path in held_out}
    told = read_json(request.output / RECORD)["page"]["facts"]["Labels"]
    everything = set((tmp_path / "images").rglob("*.png"))
    if by_folder:
        (folder,) = folders
        assert pretrained == {path for path in everything if path.parent != folder}
        assert told.endswith(
            f"24 images for training, 6 for validation (held out: {folder.name}), 9 unlabelled, for pretraining only; "
            "2 unlabelled images of held-out folders are left out"
        )
    else:
        assert pretrained == everything - held_out
        assert told.endswith("24 images for training, 6 for validation, 11 unlabelled, for pretraining only")


def test_by_folder_keeps_the_training_images_of_labels_with_splits(request_of: Request, tmp_path: Path) -> None:
    """The labels split a folder: its training images stay, its unlabelled images do not."""
    content = json.loads((tmp_path / "labels.json").read_text())
    labels = tmp_path / "labels"
    labels.mkdir()
    for name, numbers in (("train", range(20)), ("val", range(20, 30))):
        part = {"images": content["images"], "annotations": content["annotations"]}
        part = {key: [value[number] for number in numbers] for key, value in part.items()}
        (labels / f"{name}.json").write_text(json.dumps(content | part))
    request = replace(request_of, labels=labels, by_folder=True)
    start(request)
    pretrained = {Path(line).name for line in (request.output / "pretrain.txt").read_text().splitlines()}
    assert pretrained == {f"{number}.png" for number in range(20)}
    told = read_json(request.output / RECORD)["page"]["facts"]["Labels"]
    assert told.endswith("10 for validation; 10 unlabelled images of held-out folders are left out")
