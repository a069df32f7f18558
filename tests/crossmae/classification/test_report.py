"""The page of a run shows the numbers of its files, names what is missing or damaged, and loads nothing."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image

from crossmae.classification.evaluation.files import write_evaluation, write_hardest
from crossmae.classification.evaluation.metrics import Predictions, score
from crossmae.classification.report import build_report, changed_from_defaults, write_report
from crossmae.classification.train.config import FinetuneConfig
from crossmae.reports.page import Commands, Gallery, Missing, Plot, Table
from crossmae.training.config import load_typed_config
from tests.crossmae.reports.pages import blocks_in, cells, draw_no_plots
from tools import predict_classes

NAMES = ("cat", "dog", "<b>rat")
SHARES = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.6, 0.3], [0.2, 0.1, 0.7], [0.5, 0.3, 0.2]])
LABELS = torch.tensor([0, 1, 2, 2])  # the last one is wrong


@pytest.fixture(autouse=True)
def quick_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    draw_no_plots(monkeypatch)


def predictions(several: bool = False) -> Predictions:
    """Of 40 images; a quarter of them are wrong, the last ones the most."""
    shares, labels = SHARES.repeat(10, 1), LABELS.repeat(10)
    best = shares.topk(3)
    losses = torch.arange(40) / 10
    features = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
    targets = torch.nn.functional.one_hot(labels).bool() if several else labels
    scores = shares if several else None
    everything = torch.arange(40)
    return Predictions(everything, targets, losses, best.indices, best.values, scores, features, everything)


def write_evaluated(folder: Path, several: bool = False, **about: Any) -> None:
    """The files of an evaluation, by those who write them."""
    found = predictions(several)
    facts = {"weights": "model_best.safetensors", "data": "/far/away/val", "versions": {"torch": "9.8.7"}, **about}
    write_evaluation(folder / "evaluation", found, score(found, 3), NAMES, "{}.png".format, facts)
    write_hardest(folder / "evaluation", found, lambda _: Image.new("L", (8, 8), 200), NAMES, "{}.png".format, most=2)


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a whole run, as training writes it."""
    run = tmp_path_factory.mktemp("runs") / "my run"
    write_evaluated(run, weights_are="averaged", epoch=1.0, step=10)
    config = {
        "output_dir": str(run),
        "data": {"train": "/far/away/train", "val": "/far/away/val", "crop_scale": [0.3, 1.0]},
        "model": {"name": "vit_tiny_patch16"},
        "schedule": {"epochs": 2},
    }
    content = FinetuneConfig.model_validate(config).model_dump(mode="json")
    (run / "config.yaml").write_text(yaml.safe_dump(content))
    steps = {"images_per_second": 50.0, "memory_gb": 1.25, "lr": 0.1}
    rows = [
        {"step": 10, "epoch": 1.0, "loss": 3.0, **steps},
        {"step": 10, "epoch": 1.0, "val_loss": 2.0, "top1": 0.5, "top5": 1.0, "top1_ema": 0.6},
        {"step": 20, "epoch": 2.0, "loss": 2.5, **steps},
    ]
    (run / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for step, images in ((10, 1), (20, 4321)):
        checkpoint = run / f"checkpoints/step-{step:08d}"
        checkpoint.mkdir(parents=True)
        record = {"plan": {"images": images, "images_per_step": 64}, "versions": {"timm": "1.2.3"}}
        (checkpoint / "run.json").write_text(json.dumps(record))
    for name in ("model.safetensors", "model_best.safetensors"):
        (run / name).touch()
    write_report(run)
    for name in ("confusion", "calibration", "embedding"):  # smaller, so faster to embed
        Image.new("RGB", (8, 8)).save(run / f"evaluation/{name}.png")
    return run


@pytest.fixture
def folder(whole_run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole_run, tmp_path / "my run"))


def blocks_of(folder: Path, kind: type) -> list[Any]:
    return blocks_in(build_report(folder), kind)


def titles(folder: Path) -> list[str]:
    return [section.title for section in build_report(folder).sections]


def test_the_page_has_the_numbers_of_the_files(folder: Path) -> None:
    assert write_report(folder) == folder / "report.html"
    html = (folder / "report.html").read_text()
    assert 'class="card missing"' not in html
    report = build_report(folder)
    facts = {fact.label: (fact.value.replace("\N{NO-BREAK SPACE}", " "), fact.note) for fact in report.facts}
    assert facts.pop("Calibration error")[0].endswith(" %")
    assert facts == {
        "Top-1 accuracy": ("75.0 %", "95% interval 59.8 to 85.8 %"),  # Wilson, of 30 in 40
        "Balanced accuracy": ("83.3 %", ""),
        "Training images": ("4,321", "2 of 2 epochs"),
        "Training time": ("26 s", "50 images per second (median), without evaluations"),  # 20 steps of 64 images
        "Peak memory": ("1.2 GB", "of one process"),
    }
    assert report.lead.replace("\N{NO-BREAK SPACE}", " ").startswith(
        "Top-1 accuracy 75.0 % (95% interval 59.8 to 85.8 %) on 40 images of 3 classes. Everything"
    )
    _, classes, confused, settings, data = map(cells, blocks_of(folder, Table))
    assert classes[0] == ["<b>rat", "20", "50.0 %", "100.0 %"]
    assert sorted(classes[1:]) == [["cat", "10", "100.0 %", "50.0 %"], ["dog", "10", "100.0 %", "100.0 %"]]
    assert confused == [["<b>rat taken for cat", "10", "50.0 %"]]
    assert ["data.crop_scale", "[0.3, 1.0]", "[0.08, 1.0]"] in settings
    assert data == [["training", "away/train", "4,321"], ["validation", "away/val", "40"]]
    curves = {plot.title: json.loads(plot.svg) for plot in blocks_of(folder, Plot)}
    assert curves["Loss"] == {"training": [[1.0, 2.0], [3.0, 2.5]], "validation": [[1.0], [2.0]]}
    assert curves["Accuracy"] == {
        "top-1": [[1.0], [0.5]],
        "top-1, averaged weights": [[1.0], [0.6]],
        "top-5": [[1.0], [1.0]],
    }
    assert "Of model_best.safetensors, averaged over the training, at epoch 1" in html
    assert "/far/" not in re.sub(r"<pre>.*?</pre>", "", html, flags=re.DOTALL)  # whole paths are in commands only
    assert all(text in html for text in ("Classifier: my run", "1.2.3", "Of 10 wrong images, the worst 2."))


def test_the_hardest_images_are_shown_with_their_classes(folder: Path) -> None:
    *_, hardest, _ = blocks_of(folder, Gallery)
    captions = [row.caption.replace("\N{NO-BREAK SPACE}", " ") for row in hardest.rows]
    # Losses of 3.9 and 3.5: the true class had the probabilities exp(-3.9) and exp(-3.5).
    assert captions == [f"<b>rat ({share} %), taken for cat (50.0 %)" for share in ("2.0", "3.0")]
    assert [row.pictures[0].alt.partition(":")[0] for row in hardest.rows] == ["39.png", "35.png"]


NEEDED = [
    "config.yaml",
    "log.jsonl",
    "evaluation/evaluation.json",
    "evaluation/confusion.png",
    "evaluation/calibration.png",
    "evaluation/embedding.png",
    "evaluation/hardest/hardest.json",
    "evaluation/hardest/01.png",
]


@pytest.mark.parametrize("name", NEEDED)
@pytest.mark.parametrize("content", [None, b"\xff\x00 {", b'{"a": "b"}', b"[1, 2]"])
def test_whatever_is_missing_or_damaged_is_named_in_its_place(folder: Path, name: str, content: bytes | None) -> None:
    (folder / name).unlink() if content is None else (folder / name).write_bytes(content)
    missing = blocks_of(folder, Missing)
    assert {str(block.path) for block in missing} == {name}
    assert str(folder) not in " ".join(block.why for block in missing)


def test_a_folder_with_nothing_names_everything(tmp_path: Path) -> None:
    html = write_report(tmp_path).read_text()
    for name in set(NEEDED) - {"evaluation/hardest/01.png"}:
        assert f"<code>{name}</code>" in html
    assert build_report(tmp_path).facts == []
    assert titles(tmp_path) == ["Evaluation", "Training", "Using the classifier", "Settings", "Data"]


def test_an_evaluation_alone_has_no_training_to_miss(tmp_path: Path) -> None:
    write_evaluated(tmp_path, weights="/models/x.safetensors")
    html = write_report(tmp_path).read_text()
    assert 'class="card missing"' not in html
    assert not {"Training", "Settings"} & set(titles(tmp_path))
    (block,) = blocks_of(tmp_path, Commands)
    (command,) = (command for _, command in block.commands)
    given = predict_classes.build_parser().parse_intermixed_args(shlex.split(command)[2:])
    assert given.weights == Path("/models/x.safetensors")
    assert "9.8.7" in html


def test_several_classes_per_image_have_no_confusions(tmp_path: Path) -> None:
    write_evaluated(tmp_path, several=True)
    html = write_report(tmp_path).read_text()
    assert 'class="card missing"' not in html
    assert "Confusions and calibration" not in titles(tmp_path)
    assert build_report(tmp_path).facts[0].label == "Mean average precision"
    _, classes, _ = blocks_of(tmp_path, Table)
    assert classes.columns == ["class", "images", "average precision", "recall", "precision"]
    hardest = blocks_of(tmp_path, Gallery)[0]
    assert hardest.rows[0].caption.replace("\N{NO-BREAK SPACE}", " ") == "<b>rat (20.0 %), taken for cat (50.0 %)"


def test_a_run_that_was_cut_off_tells_how_far_it_came_and_how_to_go_on(folder: Path) -> None:
    for name in ("model.safetensors", "model_best.safetensors"):
        (folder / name).unlink()
    lines = (folder / "log.jsonl").read_text().splitlines()
    (folder / "log.jsonl").write_text(f"{lines[0]}\n{lines[1]}\n{lines[2][:20]}")
    report = build_report(folder)
    assert "was cut off, after 1 of 2 epochs" in report.lead
    training = next(section for section in report.sections if section.title == "Training")
    assert "Left out: 1 damaged line of log.jsonl." in training.text
    (block,) = blocks_of(folder, Commands)
    ((_, command),) = block.commands
    words = shlex.split(command.replace("\\\n", ""))
    assert words[:2] == ["python", "tools/finetune.py"]
    assert words[4:] == ["--resume", f"output_dir={folder}"]
    load_typed_config(FinetuneConfig, words[3], words[5:])


def test_the_commands_are_ones_that_the_tools_take(folder: Path) -> None:
    (block,) = blocks_of(folder, Commands)
    classes, evaluate = (shlex.split(command.replace("\\\n", "")) for _, command in block.commands)
    given = predict_classes.build_parser().parse_intermixed_args(classes[2:])
    assert (given.weights, given.force) == (folder, True)  # so the command also works the second time
    assert evaluate[4:7] == ["--eval-only", str(folder), "--force"]
    config = load_typed_config(FinetuneConfig, evaluate[3], evaluate[7:])
    assert config.data.val == "/far/away/val"
    assert config.output_dir == folder / "again"  # the results of the run stay


def test_settings_are_those_that_differ_from_the_defaults(tmp_path: Path) -> None:
    words = ["loss.mixup=0.8", "optim.betas=[0.9, 0.95]", "model.name=vit_tiny_patch16", "data.train=x", "output_dir=y"]
    (tmp_path / "plain.yaml").write_text("{}")
    config = load_typed_config(FinetuneConfig, str(tmp_path / "plain.yaml"), words)
    content = yaml.safe_load(yaml.safe_dump(config.model_dump(mode="json")))
    del content["output_dir"]
    assert sorted(changed_from_defaults(content)) == [
        ("loss.mixup", 0.8, 0.0),
        ("model.name", "vit_tiny_patch16", None),
        ("optim.betas", [0.9, 0.95], [0.9, 0.999]),
    ]
