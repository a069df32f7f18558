"""Proves that fine-tuning resumes to the bit with its best score, that its steps are the published ones, that every
image is evaluated exactly once on any number of processes, and that bad input is refused before anything is written.
"""

from __future__ import annotations

import argparse
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy

from crossmae.checkpoints.metadata import ASSUMED
from crossmae.checkpoints.provenance import LICENCE, NON_COMMERCIAL, recorded_inheritance
from crossmae.checkpoints.run_checkpoint import complete_checkpoints, read_state
from crossmae.classification.classifier import load_classifier
from crossmae.classification.data import CentreViews, LabelledImages, Views, label_targets
from crossmae.classification.evaluation import evaluate as evaluation
from crossmae.classification.evaluation import files as evaluation_files
from crossmae.classification.evaluation.evaluate import EvaluationSet, evaluate
from crossmae.classification.evaluation.metrics import ClassificationScores, Predictions
from crossmae.classification.train import train as train_module
from crossmae.classification.train.config import FinetuneConfig
from crossmae.classification.train.objective import Objective, class_weights
from crossmae.classification.train.train import finetune
from crossmae.data.sources import open_source
from crossmae.errors import UserError
from crossmae.files import sha256
from crossmae.models.crossmae import CrossMAE
from crossmae.training.processes import Ranks
from crossmae.training.state import TrainingState
from tests.crossmae.classification.classifiers import write_classifier
from tests.crossmae.classification.labelled import CLASSES, write_classes
from tests.crossmae.reports.pages import draw_no_plots

CPU = torch.device("cpu")
NO_AUTOCAST = torch.autocast("cpu", torch.bfloat16, enabled=False)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    write_classes(folder / "train", per_class=6)
    write_classes(folder / "val", per_class=3, seed=1)
    return folder


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw neither figures nor curves, which take most of the time of a tiny run and have tests of their own."""
    draw_no_plots(monkeypatch)
    monkeypatch.setattr(evaluation_files, "save_figure", lambda *_: None)


def evaluate_only(config: FinetuneConfig, weights: Path, force: bool = False) -> ClassificationScores:
    """As tools/finetune.py --eval-only."""
    runtime = config.runtime
    where, how = (config.output_dir, config.data, config.evaluation), (runtime.device, runtime.precision)
    return evaluation.evaluate_only(weights, *where, config.optim.batch_size, *how, force)


def make_config(images: Path, output: Path, **sections: Any) -> FinetuneConfig:
    values: dict[str, Any] = {
        "output_dir": output,
        "data": {"train": str(images / "train"), "val": str(images / "val"), "workers": 0},
        "model": {
            "name": "vit_tiny_patch16",
            "img_size": 32,
            "patch_size": 8,
            "embed_dim": 16,
            "depth": 2,
            "num_heads": 2,
        },
        "optim": {"batch_size": 6, "lr": 0.01},
        "schedule": {"epochs": 4, "warmup_epochs": 1},
        "runtime": {"device": "cpu"},
        "log": {"every_steps": 1},
        "evaluation": {"hardest": 0, "features": 4},
    }
    for section, changes in sections.items():
        values[section] = values.get(section, {}) | changes
    return FinetuneConfig.model_validate(values)


def lines(run: Path) -> list[dict[str, Any]]:
    timing = {"images_per_second", "data_wait_share", "memory_gb"}
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in timing} for row in rows]


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize("accumulate, stops", [(1, {3: 0, 7: 2}), (2, {2: 0})], ids=["whole", "in-parts"])
def test_resume_is_exact_to_the_bit_and_knows_the_best_score(
    images: Path, tmp_path: Path, accumulate: int, stops: dict[int, int]
) -> None:
    """With everything that is random: policies, erasing, mixing, drop path, averaged weights.

    `stops` has the steps after which a run is resumed, each with the number of workers of the resumption.
    """
    settings: dict[str, Any] = {
        "loss": {"mixup": 0.8, "cutmix": 1.0},
        "model": {"drop_path": 0.5},
        "optim": {"accumulate": accumulate, "ema": 0.9, "clip_grad": 1.0},
    }
    finetune(make_config(images, tmp_path / "whole", **settings))
    for stop, workers in stops.items():
        parts = tmp_path / f"parts-{stop}"
        finetune(make_config(images, parts, **settings, schedule={"max_steps": stop}))
        torch.manual_seed(1234)
        finetune(make_config(images, parts, **settings, data={"workers": workers}), resume=True)
        assert_resumed_exactly(tmp_path / "whole", parts, stop)


def assert_resumed_exactly(whole: Path, parts: Path, stop: int) -> None:
    """Compare a run that was resumed after the step `stop` with the unbroken one."""
    ends = [complete_checkpoints(run)[-1] for run in (whole, parts)]
    weights = [load_file(folder / "model.safetensors") for folder in ends]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    states = [read_state(folder) for folder in ends]
    if stop != 7:  # in the middle of an epoch: where a run is told to end it evaluates, which may find the best score
        assert states[0]["kept"] == states[1]["kept"]
    assert all(torch.equal(states[0]["ema"][key], states[1]["ema"][key]) for key in states[0]["ema"])
    # The part that ended early evaluated once more, where it ended.
    evaluated = [{row["step"]: row for row in lines(run) if "top1" in row} for run in (whole, parts)]
    assert all(evaluated[1][step] == row for step, row in evaluated[0].items())
    assert [row for row in lines(parts) if "loss" in row] == [row for row in lines(whole) if "loss" in row]


@pytest.mark.usefixtures("no_pictures")
def test_a_run_is_shortened(images: Path, tmp_path: Path) -> None:
    """4 epochs of 3 steps end after 3, with an evaluation; another restart changes nothing."""
    finetune(make_config(images, tmp_path / "whole", schedule={"max_steps": 4}))
    shutil.copytree(tmp_path / "whole", tmp_path / "parts")
    for name, more in (("whole", {}), ("parts", {"max_steps": 7}), ("parts", {})):
        finetune(make_config(images, tmp_path / name, schedule={"shorten_to": 3} | more), resume=True)
    found = [row for row in lines(tmp_path / "whole") if "loss" in row]
    assert found == [row for row in lines(tmp_path / "parts") if "loss" in row]
    assert len(found) == 9
    assert found[-1]["lr"] < 0.1 * 0.01
    assert lines(tmp_path / "whole")[-1].keys() >= {"top1"}


@pytest.mark.usefixtures("no_pictures")
def test_best_and_last_weights_are_kept_and_the_best_score_survives_a_restart(images: Path, tmp_path: Path) -> None:
    run, schedule = tmp_path / "run", {"epochs": 8}
    finetune(make_config(images, run, schedule=schedule | {"max_steps": 12}))
    best = max(row["top1"] for row in lines(run) if "top1" in row)
    state = read_state(complete_checkpoints(run)[-1])
    assert state["kept"]["best"]["score"] == pytest.approx(best)
    # A score that can not be reached: nothing of the rest of the run may count as best.
    before = (run / "model_best.safetensors").read_bytes()
    state["kept"]["best"]["score"] = 2.0
    folder = complete_checkpoints(run)[-1]
    torch.save(state, folder / "state.pt")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["state.pt"] = {
        "bytes": (folder / "state.pt").stat().st_size,
        "sha256": sha256(folder / "state.pt"),
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    finetune(make_config(images, run, schedule=schedule), resume=True)
    assert (run / "model_best.safetensors").read_bytes() == before
    assert read_state(complete_checkpoints(run)[-1])["kept"]["best"]["score"] == 2.0
    last = load_file(run / "model.safetensors")
    assert any(not torch.equal(last[key], tensor) for key, tensor in load_file(run / "model_best.safetensors").items())


def test_it_learns_and_the_best_weights_give_the_best_score_again(images: Path, tmp_path: Path) -> None:
    """Evaluated from the file alone, without any data to train on."""
    run = tmp_path / "run"
    data = {"auto_augment": None, "erase": 0.0, "class_names": ["bleu", "vert", "rouge"]}
    evaluation, optim = {"every_epochs": 10, "hardest": 3}, {"lr": 3e-3, "layer_decay": 1.0}
    finetune(make_config(images, run, data=data, schedule={"epochs": 30}, optim=optim, evaluation=evaluation))
    scores = [row["top1"] for row in lines(run) if "top1" in row]
    assert max(scores) == 1.0
    config = make_config(images, tmp_path / "alone", data={"train": "", "class_names": None})
    again = evaluate_only(config, run)
    assert again.top1 == max(scores)
    record = json.loads((tmp_path / "alone" / "evaluation" / "evaluation.json").read_text())
    first = json.loads((run / "evaluation" / "evaluation.json").read_text())
    assert record["numbers"]["loss"] == pytest.approx(first["numbers"]["loss"], rel=1e-6)
    assert [row["name"] for row in record["classes"]] == ["bleu", "vert", "rouge"]
    assert (tmp_path / "alone" / "report.html").is_file()
    assert (run / "report.html").is_file()


@pytest.mark.usefixtures("no_pictures")
def test_learning_rates_follow_schedule_and_layers(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Linear warm-up from 0 in the first epoch, half a cosine to min_lr after it, times decay ** (n + 1 - layer)."""
    seen: list[dict[str, float]] = []
    step = TrainingState.update

    def spy(state: TrainingState, lr: float) -> None:
        step(state, lr)
        seen.append({group["name"]: group["lr"] for group in state.optimizer.param_groups})

    monkeypatch.setattr(TrainingState, "update", spy)
    config = make_config(images, tmp_path / "run", optim={"layer_decay": 0.5}, schedule={"min_lr": 1e-3})
    finetune(config)
    assert len(seen) == 12
    expected = [0.0, 0.01 / 3, 0.02 / 3, 0.01]
    assert [rates["layer_3_decay"] for rates in seen[:4]] == pytest.approx(expected)
    middle = 1e-3 + (0.01 - 1e-3) * 0.5 * (1 + torch.cos(torch.tensor(torch.pi * 5 / 9)).item())
    assert seen[8]["layer_3_decay"] == pytest.approx(middle)
    assert seen[8]["layer_0_no_decay"] == pytest.approx(middle * 0.125)


def objective_of(config: FinetuneConfig, labelled: LabelledImages) -> Objective:
    return Objective(config.loss, config.data, labelled, config.optim.batch_size, CPU)


def test_the_losses_are_timms(images: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    logits, targets, pixels = torch.randn(6, 3), torch.tensor([0, 1, 2, 2, 1, 0]), torch.rand(6, 3, 32, 32)
    labelled = train_module.open_labelled(make_config(images, tmp_path), Ranks())
    plain = objective_of(make_config(images, tmp_path, data={"erase": 0.0}), labelled)
    same, unchanged = plain.augment(pixels.clone(), targets)
    assert torch.equal(same, pixels)
    assert torch.equal(unchanged, targets)
    torch.testing.assert_close(plain.loss(logits, targets), LabelSmoothingCrossEntropy(0.1)(logits, targets))
    mixed = objective_of(make_config(images, tmp_path, loss={"mixup": 0.8}), labelled)
    changed, soft = mixed.augment(pixels.clone(), targets)
    assert not torch.equal(changed, pixels)
    torch.testing.assert_close(soft.sum(1), torch.ones(6))
    torch.testing.assert_close(mixed.loss(logits, soft), SoftTargetCrossEntropy()(logits, soft))
    weighted = make_config(images, tmp_path, loss={"class_weights": {"green": 2.0, "red": 3.0}, "smoothing": 0.0})
    losses = F.cross_entropy(logits, targets, reduction="none") * (targets + 1)
    torch.testing.assert_close(objective_of(weighted, labelled).loss(logits, targets), losses.sum() / 12)


def test_balanced_weights_are_inverse_to_the_number_of_images() -> None:
    targets = torch.tensor([0] * 6 + [1] * 3 + [2])
    weights = class_weights("balanced", targets, CLASSES)
    torch.testing.assert_close(weights, torch.tensor([10 / 18, 10 / 9, 10 / 3]))
    assert weights is not None
    assert (weights[targets]).sum() == pytest.approx(10)  # on average, an image weighs 1
    with pytest.raises(UserError, match=r"there is none of green\. Leave them out"):
        class_weights("balanced", torch.tensor([0, 2]), CLASSES)


class Waiting(Exception):
    """The other processes are not there yet."""


class Shared(Ranks):
    """Several processes, one after the other: each leaves its part for the last one, which gathers them."""

    parts: list[list[Predictions]]

    def gather(self, value: Any) -> list[Any]:
        if not isinstance(value, list):
            return [value] * self.world_size
        self.parts.append(value)
        if len(self.parts) < self.world_size:
            raise Waiting
        return self.parts


@pytest.mark.parametrize("world_size", [2, 4, 11])
def test_every_image_is_evaluated_once_on_any_number_of_processes(images: Path, world_size: int) -> None:
    """To the bit, also where processes have unequal shares, or none at all (9 images); batches of any size."""
    source = open_source(images / "val", "data.val")
    views = Views((32, 32), 0.875, (0.5,) * 3, (0.5,) * 3, 8)
    val = CentreViews(source, label_targets(source, "data.val", CLASSES), views)
    torch.manual_seed(0)
    settings = make_config(images, images, evaluation={"features": 5})
    _, model, _ = train_module.build_model(settings.model, settings.data, 0, CLASSES, None)
    torch.nn.init.normal_(model.head.weight)
    model.double()

    def answers(ranks: Ranks, batch_size: int) -> Predictions:
        data = EvaluationSet(val, batch_size, 0, 5)
        return evaluate(Doubled(model), data, CPU, NO_AUTOCAST, ranks)

    whole = answers(Ranks(), 4)
    assert whole.indices.tolist() == list(range(9))
    parts: list[list[Predictions]] = []
    for rank in range(world_size):
        ranks = Shared(rank, rank, world_size)
        object.__setattr__(ranks, "parts", parts)
        if rank < world_size - 1:
            with pytest.raises(Waiting):
                answers(ranks, 3)
        else:
            shared = answers(ranks, 3)
    for name in ("indices", "labels", "losses", "top_classes", "top_scores", "features", "feature_indices"):
        assert torch.equal(getattr(whole, name), getattr(shared, name)), name


class Doubled(torch.nn.Module):
    """A model in double precision on pixels of single: batches of any size then round to the same."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model, self.head, self.forward_head = model, model.head, model.forward_head

    def forward_features(self, images: torch.Tensor) -> torch.Tensor:
        return self.model.forward_features(images.double())


def published_file(path: Path) -> dict[str, torch.Tensor]:
    """A pretraining file in the published layout, with a namespace inside."""
    torch.manual_seed(3)
    tensors = CrossMAE(32, 8, 3, 16, 2, 2, decoder_embed_dim=16, decoder_depth=2, decoder_num_heads=2).state_dict()
    torch.save({"model": tensors, "epoch": 799, "args": argparse.Namespace(mask_ratio=0.75)}, path)
    return tensors


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize("pool", ["avg", "cls"])
def test_a_published_file_goes_straight_in(
    images: Path, tmp_path: Path, pool: str, caplog: pytest.LogCaptureFixture
) -> None:
    tensors = published_file(tmp_path / "pretrain.pth")
    model = {"init": tmp_path / "pretrain.pth", "pool": pool}
    schedule = {"max_steps": 1, "min_lr": 0}
    config = make_config(images, tmp_path / "run", model=model, optim={"lr": 1e-12}, schedule=schedule)
    caplog.set_level("INFO")
    finetune(config)
    after = load_file(tmp_path / "run" / "model.safetensors")
    for name in ("cls_token", "patch_embed.proj.weight", "blocks.1.attn.qkv.weight"):
        torch.testing.assert_close(after[name], tensors[name], rtol=0, atol=1e-10)
    assert ("no final norm" in caplog.text) == (pool == "cls")
    assert recorded_inheritance(tmp_path / "run/model.safetensors").get(LICENCE) == NON_COMMERCIAL
    assert recorded_inheritance(tmp_path / "run/model_best.safetensors").get(LICENCE) == NON_COMMERCIAL
    for name in ("model", "model_best"):  # the config gives the heads, and sine-cosine positions show the grid
        assert recorded_inheritance(tmp_path / f"run/{name}.safetensors")[ASSUMED] == '["activation", "norm_eps"]'
    assert "model.init: norm_eps: 1e-06 is assumed as in timm, the file does not tell." in caplog.text
    other = {"init": tmp_path / "pretrain.pth", "depth": 3}
    with pytest.raises(UserError, match="depth 2, not 3"):
        finetune(make_config(images, tmp_path / "other", model=other))
    assert not (tmp_path / "other").exists()


@pytest.mark.usefixtures("no_pictures")
def test_a_linear_probe_trains_the_head_alone(images: Path, tmp_path: Path) -> None:
    published_file(tmp_path / "pretrain.pth")
    model = {"init": tmp_path / "pretrain.pth", "freeze": True, "head": "batchnorm", "drop_path": 0.9}
    optim = {"name": "lars", "weight_decay": 0.0, "lr": 100.0}
    config = make_config(images, tmp_path / "run", model=model, optim=optim, data={"auto_augment": None})
    head = (
        train_module.build_model(config.model, config.data, config.runtime.seed, CLASSES, None)[1]
        .head[1]
        .weight.detach()
        .clone()
    )
    finetune(config)
    classifier = load_classifier(tmp_path / "run")
    encoder = torch.load(tmp_path / "pretrain.pth", weights_only=False)["model"]
    state = classifier.model.state_dict()
    assert all(torch.equal(state[name], encoder[name]) for name in state if name in encoder)
    assert state["head.0.num_batches_tracked"] > 0
    assert not torch.allclose(state["head.1.weight"], head, rtol=0, atol=1e-3)
    assert set(read_state(complete_checkpoints(tmp_path / "run")[-1])["optimizer"]["state"]) == {0, 1}
    model["drop_path"] = 0
    without = make_config(images, tmp_path / "same", model=model, optim=optim, data={"auto_augment": None})
    finetune(without)  # a frozen encoder drops nothing
    same = load_file(tmp_path / "same" / "model.safetensors")
    assert all(
        torch.equal(same[name], tensor) for name, tensor in load_file(tmp_path / "run/model.safetensors").items()
    )


@pytest.mark.usefixtures("no_pictures")
def test_several_labels_per_image(images: Path, tmp_path: Path) -> None:
    rows = ["path,label"]
    for path in sorted((images / "train").rglob("*.png")):
        rows.append(f"{path},{path.parent.name}" + (";light" if int(path.stem) % 2 else ""))
    (tmp_path / "list.csv").write_text("\n".join(rows))
    data = {"train": str(tmp_path / "list.csv"), "val": str(tmp_path / "list.csv"), "separator": ";"}
    finetune(make_config(images, tmp_path / "run", data=data, loss={"cutmix": 1.0}))
    assert all(0 <= row["mean_ap"] <= 1 for row in lines(tmp_path / "run") if "mean_ap" in row)
    classifier = load_classifier(tmp_path / "run")
    assert classifier.multi_label
    assert classifier.classes == ("blue", "green", "light", "red")
    again = evaluate_only(make_config(images, tmp_path / "alone", data=data | {"train": ""}), tmp_path / "run")
    best = read_state(complete_checkpoints(tmp_path / "run")[-1])["kept"]["best"]
    assert again.mean_ap == pytest.approx(best["score"])
    with pytest.raises(UserError, match=r"data\.separator: the classifier predicts several labels"):
        evaluate_only(make_config(images, tmp_path / "other", data=data | {"separator": None}), tmp_path / "run")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": {"train": ""}}, r"data\.train: missing\. Name"),
        ({"model": {"name": None}}, "neither init nor name is given"),
        ({"data": {"train": "nowhere"}}, "data.train: nowhere does not exist"),
        ({"data": {"per_class": 7}}, r"data\.per_class: fewer than 7 images of blue \(6\)"),
        ({"data": {"auto_augment": "rand-m9-what1"}}, "data.auto_augment"),
        ({"model": {"init": "nowhere.pth"}}, "model.init: nowhere.pth: no such file or folder"),
        ({"model": {"img_size": 30}}, "model: img_size .* multiple of patch_size 8"),
        ({"optim": {"batch_size": 20}}, "needs 20 images, the data set has 18"),
        ({"loss": {"class_weights": {"cat": 1.0}}}, "loss.class_weights: cat: no class of data.train"),
        ({"schedule": {"warmup_epochs": 9}}, "schedule.warmup_epochs: 9"),
    ],
)
def test_bad_input_is_named_and_nothing_is_written(
    images: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        finetune(make_config(images, tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {"name": "vit_giant"}}, "expected one of vit_tiny_patch16"),
        ({"loss": {"cutmix_minmax": [0.5, 0.5]}}, "expected two shares"),
        ({"loss": {"class_weights": "ballanced"}}, "balanced, or weights by class"),
        ({"model": {"in_chans": 5}, "data": {"mean": [0.5] * 5, "std": [0.5] * 5}}, "data.auto_augment: is for grey"),
        ({"model": {"drop_path": 1.0}}, "less than 1"),
        ({"data": {"separator": ""}}, "at least 1 character"),
        ({"optim": {"name": "lars"}}, "model.freeze=true"),
        ({"loss": {"mixup": 0.8}, "optim": {"batch_size": 5}}, "need an even one"),
        ({"data": {"color_jitter": 0.3}}, "auto_augment=null"),
    ],
)
def test_contradictions_are_refused_by_the_config(
    images: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make_config(images, tmp_path, **changes)


def test_the_folder_of_a_pretraining_is_refused_by_its_kind(images: Path, tmp_path: Path) -> None:
    (tmp_path / ".claim.json").write_text('{"kind": "pretraining"}')
    for resume in (False, True):
        with pytest.raises(UserError, match=r"output_dir: .* the folder of a pretraining run, not of fine-tuning\."):
            finetune(make_config(images, tmp_path), resume=resume)


@pytest.mark.usefixtures("no_pictures")
def test_another_set_of_classes_is_not_the_same_run(images: Path, tmp_path: Path) -> None:
    finetune(make_config(images, tmp_path / "run", schedule={"max_steps": 1}))
    write_classes(tmp_path / "train", per_class=6)
    (tmp_path / "train" / "green").rename(tmp_path / "train" / "leaf")
    data = {"train": str(tmp_path / "train"), "val": str(tmp_path / "train")}
    with pytest.raises(UserError, match=r"other settings: classes was .*green"):
        finetune(make_config(images, tmp_path / "run", data=data), resume=True)


def test_a_broken_image_of_val_is_found_before_anything_is_trained(images: Path, tmp_path: Path) -> None:
    folder = write_classes(tmp_path / "val", per_class=2)
    (folder / "green" / "1.png").write_bytes((folder / "green" / "1.png").read_bytes()[:100])
    with pytest.raises(UserError, match=r"data\.val: .*green/1\.png: cannot be read .*\. Repair or remove"):
        finetune(make_config(images, tmp_path / "run", data={"val": str(folder)}))
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("no_pictures")
def test_what_does_not_decide_may_change_on_resume_and_what_does_may_not(images: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    finetune(make_config(images, run, schedule={"max_steps": 3}))
    with pytest.raises(UserError, match=r"other settings: evaluation\.crop_pct was None, is 0\.5"):
        finetune(make_config(images, run, evaluation={"crop_pct": 0.5}), resume=True)
    changed = make_config(images, run, evaluation={"batch_size": 2}, data={"class_names": ["b", "g", "r"]})
    finetune(changed, resume=True)


@pytest.mark.usefixtures("no_pictures")
def test_an_evaluation_does_not_replace_that_of_a_run(images: Path, tmp_path: Path) -> None:
    finetune(make_config(images, tmp_path / "run", schedule={"max_steps": 1}))
    with pytest.raises(UserError, match="has a run with its own evaluation"):
        evaluate_only(make_config(images, tmp_path / "run"), tmp_path / "run")
    elsewhere = make_config(images, tmp_path / "alone")
    evaluate_only(elsewhere, tmp_path / "run")
    with pytest.raises(UserError, match=r"has an evaluation already\. Name another folder, or replace it with --force"):
        evaluate_only(elsewhere, tmp_path / "run")
    evaluate_only(elsewhere, tmp_path / "run", force=True)


def test_nothing_of_an_earlier_try_stays(images: Path, tmp_path: Path) -> None:
    """A run that ended before its first checkpoint may have left best weights, of which a new one knows nothing."""
    run = tmp_path / "run"
    (run / "evaluation").mkdir(parents=True)
    (run / "model_best.safetensors").write_bytes(b"old")
    (run / "evaluation" / "evaluation.json").write_text("{}")
    finetune(make_config(images, run, schedule={"max_steps": 1}, data={"val": None}))
    assert not (run / "model_best.safetensors").exists()
    assert not (run / "evaluation").exists()


def test_a_finished_run_that_is_resumed_writes_its_page(images: Path, tmp_path: Path) -> None:
    config = make_config(images, tmp_path / "run", schedule={"max_steps": 1})
    finetune(config)
    (tmp_path / "run" / "report.html").unlink()
    finetune(config, resume=True)
    assert (tmp_path / "run" / "report.html").is_file()


def test_several_labels_are_mixed_as_their_images_are(images: Path, tmp_path: Path) -> None:
    """Of constant images, the brightness of a mixed one tells the share of each: its targets must have the same."""
    rows = ["path,label"] + [f"{path},{path.parent.name}" for path in sorted((images / "train").rglob("*.png"))]
    (tmp_path / "list.csv").write_text("\n".join(rows))
    data = {"train": str(tmp_path / "list.csv"), "val": None, "separator": "|", "erase": 0.0}
    config = make_config(images, tmp_path, data=data, loss={"mixup": 0.8, "mixup_mode": "elem"})
    objective = objective_of(config, train_module.open_labelled(config, Ranks()))
    targets = torch.tensor([[1.0, 0, 1], [0, 1, 0], [0, 0, 0], [1, 1, 1], [0, 0, 1], [1, 0, 0]])
    values = torch.tensor([0.0, 1, 2, 3, 4, 5])
    images_of, mixed = objective.augment(values[:, None, None, None].expand(6, 3, 32, 32).clone(), targets)
    share = (images_of[:, 0, 0, 0] - values.flip(0)) / (values - values.flip(0))
    assert bool(((share > 0) & (share < 1)).any())
    torch.testing.assert_close(mixed, share[:, None] * targets + (1 - share[:, None]) * targets.flip(0))


def test_of_equal_scores_the_lower_loss_is_the_best() -> None:
    """Few images give equal scores often, and the first of them may come from an untrained network."""

    kept: dict[str, Any] = {}
    found = []
    for step, (top1, loss) in enumerate([(0.5, 1.0), (0.5, 0.9), (0.5, 0.95), (0.5, 0.9), (0.6, 2.0), (0.5, 0.1)]):
        found.append(
            train_module.is_best(kept, step, ClassificationScores(samples=2, loss=loss, classes=(), top1=top1), "")
        )
    assert found == [True, True, False, True, True, False]
    assert kept["best"]["step"] == 4


@pytest.mark.usefixtures("no_pictures")
def test_a_run_goes_on_without_the_file_that_it_started_from(images: Path, tmp_path: Path) -> None:
    published_file(tmp_path / "pretrain.pth")
    model = {"init": tmp_path / "pretrain.pth"}
    finetune(make_config(images, tmp_path / "run", model=model, schedule={"max_steps": 3}))
    (tmp_path / "pretrain.pth").unlink()
    finetune(make_config(images, tmp_path / "run", model=model, schedule={"max_steps": 4}), resume=True)
    assert complete_checkpoints(tmp_path / "run")[-1].name == "step-00000004"


def logits_of(weights: Path, images: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return load_classifier(weights).model(images)


def test_a_classifier_starts_a_training_on_other_classes_row_by_row(
    images: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    write_classifier(tmp_path / "old", ("red", "Blue ", "grey"))
    init = tmp_path / "old/model_best.safetensors"
    model = {"name": None, "init": init, **dict.fromkeys(("img_size", "patch_size", "embed_dim", "depth", "num_heads"))}
    config = make_config(images, tmp_path / "run", model=model, data={"mean": (0.4, 0.5, 0.6), "std": (0.2, 0.2, 0.3)})
    how = (config.data, config.runtime.seed)
    pixels = torch.rand(2, 3, 16, 24, generator=torch.Generator().manual_seed(0))
    old = logits_of(tmp_path / "old", pixels)
    built = train_module.build_model(config.model, *how, ("blue", "green", "red"), None)[1].eval()
    new = built(pixels)
    assert torch.allclose(new[:, [0, 2]], old[:, [1, 0]], atol=1e-6)
    assert "keeps the classes 'blue', 'red'. New, from random weights: 'green'. Left out: 'grey'" in caplog.text
    train_module.build_model(config.model, *how, ("ship", "plane"), None)
    assert "is not used, because none of its classes is in data.train" in caplog.text
    other = config.model.model_copy(update={"pool": "cls"})
    train_module.build_model(other, *how, ("blue", "red"), None)
    assert "it is for another model.head or model.pool" in caplog.text


@pytest.mark.usefixtures("no_pictures")
def test_some_of_the_classes_are_evaluated_among_all_or_among_themselves(
    images: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_classifier(tmp_path / "all", ("red", "green", "teal", "blue"))
    rows = [f"{path},{path.parent.name}" for path in sorted((images / "val").rglob("*.png"))]
    (tmp_path / "list.csv").write_text("\n".join(["path,label", *(row for row in rows if "green" not in row)]))
    data = {"val": str(tmp_path / "list.csv"), "train": ""}
    among_all = evaluate_only(make_config(images, tmp_path / "a", data=data), tmp_path / "all")
    assert len(among_all.classes) == 4
    assert "has 2 of the classifier's 4 classes, not 'green', 'teal'. The softmax is over all classes" in caplog.text
    evaluation = {"softmax": "present"}
    few = evaluate_only(make_config(images, tmp_path / "b", data=data, evaluation=evaluation), tmp_path / "all")
    assert "The softmax is over the present classes only" in caplog.text
    assert [one.samples for one in few.classes] == [3, 3]
    assert sum(one.predictions for one in few.classes) == 6
    assert few.top1 >= among_all.top1
    assert json.loads((tmp_path / "b/evaluation/evaluation.json").read_text())["about"]["softmax"] == "present"


def test_classes_without_names_are_compared_by_number(
    images: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = open_source(images / "val", "data.val")
    classifier = load_classifier(write_classifier(tmp_path, ("0", "1", "2")))
    assert evaluation.match_classes(classifier, source, "all") is classifier  # `label_targets` refuses these
    unnamed = replace(classifier, names_known=False)
    assert evaluation.match_classes(unnamed, source, "all").classes == CLASSES
    assert "does not record the names of its 3 classes. They are taken for the data's, in order: blue" in caplog.text


@pytest.mark.usefixtures("no_pictures")
# torch hides this warning of its own access, but not from pytest, which turns it into an error.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_compiled_blocks_train_the_same_and_evaluations_compile_nothing(
    images: Path, tmp_path: Path, graphs: list[Any]
) -> None:
    """All blocks share their code, also with activation checkpointing and averaged weights."""
    settings: dict[str, Any] = {"optim": {"ema": 0.9, "batch_size": 4}, "model": {"drop_path": 0.0}}
    for name, on in (("eager", False), ("compiled", True)):
        runtime = {"compile": on, "activation_checkpointing": on}
        finetune(make_config(images, tmp_path / name, **settings, runtime=runtime))
    assert len(graphs) == 1
    eager, compiled = (lines(tmp_path / name) for name in ("eager", "compiled"))
    assert len(eager) == len(compiled)
    for one, other in zip(eager, compiled, strict=True):
        assert other == pytest.approx(one, rel=1e-3)
