"""The plan spends the budget, and nothing beyond it: its arithmetic is checked against the sum of its parts."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crossmae.errors import UserError
from crossmae.experiments.pipeline.plan import (
    FEW_DETECT_IMAGES,
    FEW_DETECT_STEPS,
    FEWEST_DETECT_STEPS,
    MOST_DETECT_EPOCHS,
    MOST_PRETRAIN_EPOCHS,
    PAGE_SECONDS,
    Timing,
    describe_plan,
    detect_length,
    detect_steps_left,
    list_doubts,
    make_plan,
    parse_duration,
    planned_stages,
    pretrain_length,
)

PRETRAIN, DETECT = Timing(20.0, 0.25, 32), Timing(30.0, 0.9, 8)


@pytest.mark.parametrize(
    ("text", "seconds"), [("30m", 1800), ("1h30m", 5400), ("90s", 90), ("1.5h", 5400), ("2 h", 7200), ("30M", 1800)]
)
def test_durations(text: str, seconds: float):
    assert parse_duration(text, "--budget") == seconds


@pytest.mark.parametrize("text", ["", "30", "m", "30x", "-5m", "0m", "1h 5", "30min", "1e3s"])
def test_other_words_are_no_durations(text: str):
    with pytest.raises(UserError, match=r"^--budget: .* (Write|Give)"):
        parse_duration(text, "--budget")


def plan_for(budget: float, images: int = 400, detectors: int = 1, **changes: float):
    return make_plan(budget, 60.0, pretrain=(images, PRETRAIN), detect=(images, DETECT), detectors=detectors, **changes)


@given(st.floats(600, 20000), st.integers(50, 5000), st.integers(1, 2), st.floats(5, 95))
@settings(deadline=None)
def test_the_plan_fits_and_leaves_no_more_than_a_step_or_an_epoch(
    budget: float, images: int, detectors: int, share: float
):
    plan = plan_for(budget, images, detectors, pretrain_share=share)
    assert plan.pretrain is not None
    assert plan.detect is not None
    # An epoch of pretraining is the coarsest unit; it goes to the detector, except for its last steps.
    assert plan.seconds <= budget + 1e-6 or plan.pretrain.steps == 1 or plan.detect.steps <= FEWEST_DETECT_STEPS
    is_longest = plan.pretrain.epochs == MOST_PRETRAIN_EPOCHS and plan.detect.epochs >= MOST_DETECT_EPOCHS
    per_epoch = max(1, images // PRETRAIN.images) * PRETRAIN.step
    assert is_longest or budget - plan.seconds <= max(detectors * DETECT.step, per_epoch) + 0.1 * budget
    for length, timing in ((plan.pretrain, PRETRAIN), (plan.detect, DETECT)):
        assert length.seconds == pytest.approx(timing.overhead + length.steps * timing.step)


def test_seconds_are_the_sum_of_the_stages():
    plan = plan_for(3600, detectors=2)
    assert plan.pretrain is not None
    assert plan.detect is not None
    assert plan.seconds == pytest.approx(60 + plan.pretrain.seconds + 2 * plan.detect.seconds + PAGE_SECONDS)
    lines = describe_plan(plan, ["small crops", "large images"]).splitlines()
    assert [line.split()[0] for line in lines] == ["done", "pretrain", "detect-random", "detect-own", "report", "all"]
    assert "about 59 min" in lines[-1] or "about 1 h" in lines[-1]


def test_a_large_data_set_is_thinned_out_so_that_an_epoch_ends():
    length = pretrain_length(100.0, 10**6, PRETRAIN)
    assert length.epochs == 1
    assert length.steps == 400
    assert length.images == 400 * 32


def test_pretraining_has_whole_epochs():
    length = pretrain_length(100.0, 400, PRETRAIN)
    assert (length.images, length.epochs, length.steps) == (400, 33, 33 * 12)


def test_time_that_a_short_training_cannot_use_goes_to_the_other():
    few = make_plan(7200, 0.0, pretrain=(100, PRETRAIN), detect=(16, DETECT))
    assert few.pretrain is not None
    assert few.detect is not None
    assert few.detect.epochs == MOST_DETECT_EPOCHS
    assert few.pretrain.steps * PRETRAIN.step > 0.4 * 7200 * 1.05 or few.pretrain.epochs == MOST_PRETRAIN_EPOCHS


def test_a_budget_that_start_and_evaluation_eat_up_names_one_that_suffices():
    with pytest.raises(UserError, match=r"^--budget: 2 min 00 s is too short: .* Give (\d+)m or more\.$") as caught:
        plan_for(120)
    enough = int(str(caught.value).split("Give ")[1].split("m")[0])
    plan_for(60 * enough)
    with pytest.raises(UserError):
        plan_for(60 * (enough - 1) - 1)


def test_the_detector_gets_what_pretraining_left():
    plan = plan_for(1800)
    assert plan.detect is not None
    assert plan.pretrain is not None
    on_time = plan.spent + plan.pretrain.seconds
    steps = [detect_steps_left(plan, on_time + late, DETECT, 400) for late in (-(10**4), 0, 90, 10**4)]
    assert steps[1] == pytest.approx(plan.detect.steps, abs=1)
    assert steps[2] == pytest.approx(plan.detect.steps - 90 / DETECT.step, abs=1.5)
    assert steps[0] == plan.detect.steps * 3 // 2
    assert steps[3] == -(-plan.detect.steps // 2)


def test_without_labels_all_time_is_pretraining():
    plan = make_plan(1800, 60.0, pretrain=(400, PRETRAIN), detect=None)
    assert plan.detect is None
    assert plan.pretrain is not None
    assert plan.seconds == pytest.approx(1800, rel=0.01)


def test_a_few_images_get_a_few_steps():
    assert detect_length(10**6, 3, Timing(1.0, 0.1, 2)).steps == 150
    assert detect_length(10**6, 1, Timing(1.0, 0.1, 2)).steps == FEWEST_DETECT_STEPS


@given(st.floats(400, 1500), st.integers(1, 2), st.floats(5, 60))
@settings(deadline=None, max_examples=40)
def test_the_budget_named_in_a_doubt_has_enough_steps(budget: float, detectors: int, share: float):
    def doubts_of(budget: float) -> tuple[int, list[str]]:
        plan = plan_for(budget, detectors=detectors, pretrain_share=share)
        assert plan.detect is not None
        return plan.detect.steps, list_doubts(plan, plan.detect.steps, DETECT, object_pixels=0, pretrain_share=share)

    steps, found = doubts_of(budget)
    assert bool(found) == (steps < FEW_DETECT_STEPS)
    if found:
        enough = 60 * int(re.search(r"--budget (\d+)m has about", found[0])[1])
        assert doubts_of(enough)[0] >= FEW_DETECT_STEPS - 2
        assert doubts_of(enough - 120)[0] < FEW_DETECT_STEPS * 1.05


@pytest.mark.parametrize(("pixels", "doubted"), [(0, False), (6.4, True), (15.9, True), (16, False), (200, False)])
def test_objects_smaller_than_a_patch_are_a_doubt(pixels: float, doubted: bool):
    plan = plan_for(3600)
    found = list_doubts(plan, FEW_DETECT_STEPS, DETECT, object_pixels=pixels)
    assert [f"at most {pixels:.0f} pixels long" in one for one in found] == [True] * doubted


def test_few_labels_are_a_doubt_that_no_budget_mends():
    (found,) = list_doubts(plan_for(3600, FEW_DETECT_IMAGES - 1), FEWEST_DETECT_STEPS, DETECT, object_pixels=0)
    assert found.startswith("49 labelled images")
    assert "--budget" not in found


def test_steps_that_are_chosen_later_are_those_of_the_table():
    plan = plan_for(1800)
    assert plan.detect is not None
    steps = 2 * plan.detect.steps
    rows = {row.name: row for row in planned_stages(plan, ["small", "large"], steps)}
    assert f"{steps:,} steps, {2 * plan.detect.epochs:.3g} epochs of 400 images" in rows["detect-own"].what
    assert rows["detect-own"].seconds == plan.detect.seconds
    assert f"{plan.detect.steps:,} steps" in planned_stages(plan, ["small", "large"])[2].what
