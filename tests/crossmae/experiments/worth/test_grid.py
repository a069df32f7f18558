"""The runs of the question differ between arms in the start only, and their commands are what the tools accept."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from crossmae.errors import UserError
from crossmae.experiments.cells import check_cells, run_cells
from crossmae.experiments.worth.grid import (
    ARMS,
    PRESETS,
    TIMED_FINE_TUNING,
    Question,
    build_cells,
    choose_budget,
    estimated,
    pretrain_cell,
    timing_cells,
)
from crossmae.experiments.worth.inputs import LabelledPart
from crossmae.models.sizes import model_arguments
from crossmae.pretraining.config import load_config
from crossmae.pretraining.initial_weights import build_model
from tests.crossmae.classification.labelled import write_classes
from tests.crossmae.experiments.worth.test_inputs import write_labels
from tests.crossmae.experiments.worth.tiny_question import ask, tiny_preset


@pytest.fixture
def question(tmp_path: Path) -> Question:
    """A grid of two shares, two seeds and all arms."""
    labels = write_labels(tmp_path)
    preset, shares, seeds = tiny_preset(tmp_path / "configs"), (50.0, 100.0), (3, 4)
    question = ask(tmp_path / "out", tmp_path / "train", labels, preset, ARMS, shares, seeds)
    return replace(question, weights=tmp_path / "weights.pth")


EVEN_RATES = "SOLVER.LAYER_DECAY=1.0"


def test_arms_differ_in_their_start_and_layer_decay_only(question: Question):
    budget = replace(choose_budget(question, 7), extra_steps=5)
    cells = {cell.name: cell for cell in build_cells(question, budget)}
    check_cells(list(cells.values()))
    assert len(cells) == 2 * 3 + 2 * 2 * len(ARMS)  # of each seed: first weights, two pretrainings
    for share in (50, 100):
        commands, starts = set(), set()
        for arm in ARMS[:-1]:
            (step,) = cells[f"detect-{arm}-share{share}-seed4"].steps
            words = [word.replace(f"detect-{arm}-", "detect-") for word in step.arguments]
            starts |= {word for word in words if word.startswith("MODEL.WEIGHTS=")}
            assert (EVEN_RATES in words) == (arm.startswith("random") and arm != "random_same_rates")
            commands.add(tuple(word for word in words if not word.startswith("MODEL.WEIGHTS=") and word != EVEN_RATES))
        assert len(commands) == 1
        assert len(starts) == 5
        assert "SOLVER.MAX_ITER=7" in next(iter(commands))
        assert "SEED=4" in next(iter(commands))
        longer = cells[f"detect-random_equal_compute-share{share}-seed4"]
        assert "SOLVER.MAX_ITER=12" in longer.steps[0].arguments
        assert longer.facts["steps"] == 12
    facts = cells["detect-own-share50-seed3"].facts
    assert facts == {"kind": "detect", "arm": "own", "share": 50.0, "labelled": 10, "seed": 3, "steps": 7}
    assert cells["detect-own-share50-seed3"].needs == ("pretrain-own-seed3",)
    assert cells["detect-random_pretraining_init-share50-seed3"].needs == ("initial-seed3",)
    assert cells["detect-weights-share50-seed3"].needs == ()


def test_a_given_layer_decay_holds_for_all_arms(question: Question):
    question = replace(question, fine_tune_settings=("SOLVER.LAYER_DECAY=0.9",))
    cells = build_cells(question, choose_budget(question, 7))
    decays = {word for cell in cells for word in cell.steps[0].arguments if word.startswith("SOLVER.LAYER_DECAY")}
    assert decays == {"SOLVER.LAYER_DECAY=0.9"}


def test_pretraining_differs_in_seed_and_start_only(question: Question):
    cells = {cell.name: cell for cell in build_cells(question, choose_budget(question, None))}
    own, continued = (set(cells[f"pretrain-{arm}-seed3"].steps[0].arguments) for arm in ("own", "continued"))
    assert {word for word in continued - own if "output_dir" not in word} == {f"model.init={question.weights}"}
    other = set(cells["pretrain-own-seed4"].steps[0].arguments)
    assert {word.partition("=")[0] for word in own ^ other} == {"runtime.seed", "output_dir"}


def test_first_weights_are_those_of_step_zero(question: Question, tmp_path: Path):
    """The control starts with the weights that pretraining with the same seed starts with."""
    budget = choose_budget(question, None)
    cell = pretrain_cell(question, budget, "initial", 3)
    run_cells([cell], tmp_path / "results.jsonl")
    config = load_config(question.preset.pretrain, ["output_dir=OUT"])
    arguments = model_arguments(config.model.name) | config.model.arguments()
    model = build_model(arguments, 3, config.model.mask_ratio, config.model.predict_ratio)
    written = load_file(cell.steps[0].done)
    assert written.keys() == model.state_dict().keys()
    assert all(torch.equal(written[name], tensor) for name, tensor in model.state_dict().items())


def test_budgets_follow_the_images(question: Question):
    preset = PRESETS["demo"]
    # 32 epochs of the config, at least 450 steps, at most one epoch beyond 1,500 steps
    for count, epochs, steps in ((2000, 32, 992), (640, 45, 450), (64, 450, 450), (100_000, 1, 1562)):
        budget = choose_budget(replace(question, preset=preset, count=count), None)
        assert (budget.pretrain_epochs, budget.pretrain_steps) == (epochs, steps)
        assert budget.warmup_epochs == pytest.approx(epochs / 16, abs=1e-3)
    given = replace(question, preset=preset, count=640, pretrain_settings=("schedule.epochs=4", "schedule.max_steps=9"))
    assert choose_budget(given, None).pretrain_steps == 9
    with pytest.raises(UserError, match="IMAGES: 3 images do not fill a step of 64"):
        choose_budget(replace(question, preset=preset, count=3), None)
    for images, steps in ((10, 200), (50, 312), (1000, 400)):
        labels = replace(question.labels, all_images=images)
        budget = choose_budget(replace(question, preset=preset, count=640, labels=labels), None)
        assert budget.fine_tune_steps == steps


def test_estimates_follow_the_steps(question: Question):
    cells = build_cells(question, replace(choose_budget(question, 7), extra_steps=5))
    found = {cell.name: cell.estimate for cell in estimated(cells, {"pretrain": (2.0, 1.0), "detect": (3.0, 2.0)})}
    assert found["initial-seed3"] == 2.0
    assert found["pretrain-own-seed3"] == 2.0 + 5  # an epoch of five steps
    assert found["detect-own-share50-seed3"] == 3.0 + 7 * 2
    assert found["detect-random_equal_compute-share50-seed3"] == 3.0 + 12 * 2


def test_timing_runs_have_few_steps(question: Question):
    names = [cell.name for cell in timing_cells(question, choose_budget(question, None))]
    assert names == ["pretrain", "detect"]
    (words,) = [cell.steps[0].arguments for cell in timing_cells(question, choose_budget(question, None))[1:]]
    assert f"SOLVER.MAX_ITER={TIMED_FINE_TUNING}" in words
    without = replace(question, arms=("random_detector_init",))
    assert [cell.name for cell in timing_cells(without, choose_budget(without, None))] == ["detect"]


def test_all_shares_of_a_classifier_have_the_same_number_of_steps(tmp_path: Path):
    labels, preset = LabelledPart(write_classes(tmp_path / "classes", per_class=20)), tiny_preset(tmp_path / "configs")
    question = ask(tmp_path / "out", tmp_path / "classes", labels, preset, ("random_detector_init",))
    for settings, images in ((), 20), (("optim.batch_size=8",), 8), (("optim.batch_size=3", "optim.accumulate=2"), 6):
        given = replace(question, fine_tune_settings=settings)
        for cell in build_cells(given, choose_budget(given, 30)):
            epochs = next(word for word in cell.steps[0].arguments if word.startswith("schedule.epochs="))
            per_epoch = int(cell.facts["labelled"] or 0) // images
            assert per_epoch * int(epochs.partition("=")[2]) >= 30
    with pytest.raises(UserError, match="a step has 21 images, but the smallest share only 20"):
        choose_budget(replace(question, fine_tune_settings=("optim.batch_size=21",)), 30)


@pytest.mark.usefixtures("in_process")
def test_cells_of_a_classifier(tmp_path: Path):
    """Real tools: pretraining, a classifier that starts from it, and a classifier with its own initialisation."""
    labels, preset = LabelledPart(write_classes(tmp_path / "classes", per_class=10)), tiny_preset(tmp_path / "configs")
    arms = ("own", "random_detector_init")
    question = ask(tmp_path / "out", tmp_path / "classes", labels, preset, arms, shares=(100.0,))
    rows = run_cells(build_cells(question, choose_budget(question, None)), tmp_path / "out/results.jsonl")
    assert [row.facts["kind"] for row in rows] == ["pretrain", "classify", "classify"]
    assert rows[0].numbers["val_loss"] > 0
    assert all(0 <= row.numbers["top1"] <= 100 for row in rows[1:])
    assert [row.facts["labelled"] for row in rows[1:]] == [15, 15]  # half of 30 are held out
