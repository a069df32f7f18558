"""Proves that the page answers by the right comparison, shows every number, and claims nothing without an interval."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from crossmae.experiments import worth_page
from crossmae.experiments.rows import Row
from crossmae.experiments.worth_page import write_page
from crossmae.reports.page import Commands, Report, Table, Words
from tests.crossmae.experiments.sample_rows import GAINS, make_row, sample_rows
from tests.crossmae.reports.pages import blocks_in, cells

RANDOM = "random weights (as pretraining starts)"


@pytest.fixture
def build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Build the page of rows without figures, which take half a second each, and return the report and the answer."""
    monkeypatch.setattr(worth_page, "score_curve", lambda *_: Words([]))
    monkeypatch.setattr(worth_page, "difference_curve", lambda *_: Words([]))

    def build(rows: Sequence[Row], **options: Any) -> tuple[Report, str]:
        reports: list[Report] = []
        write = Report.write
        monkeypatch.setattr(Report, "write", lambda report, path: reports.append(report) or write(report, path))
        answer = write_page(rows, tmp_path / "page.html", title="Worth it?", settings={"steps": 400}, **options)
        assert answer == reports[0].answer
        assert "Worth it?" in (tmp_path / "page.html").read_text("utf-8")
        return reports[0], answer

    return build


def table_with(report: Report, *columns: str) -> list[list[str]]:
    (found,) = (one for one in blocks_in(report, Table) if set(columns) <= set(one.columns))
    return cells(found)


def texts(report: Report) -> str:
    return "\n".join(f"{head}\n{text}" for words in blocks_in(report, Words) for head, text in words.paragraphs)


def test_learning_rates_are_named_only_where_they_differ(build: Any) -> None:
    rates = "with the learning rates of its early layers"
    for control, differ in (("random_pretraining_init", True), ("random_same_rates", False)):
        report, _ = build(sample_rows(["own", control]))
        assert (rates in report.lead) == differ


def test_the_answer_is_the_paired_difference_to_the_right_control(build: Any) -> None:
    rows = sample_rows()
    report, answer = build(rows)
    assert answer == (
        f"CrossMAE on your images is better than {RANDOM} at 40 and 120 labelled images. No difference is shown at 400 "
        "labelled images. This holds over these 3 seeds, on these validation images."
    )
    values = {(row.facts["arm"], row.facts["share"], row.facts["seed"]): row.numbers.get("mask_AP") for row in rows}
    differences = [values["own", 10, seed] - values["random_pretraining_init", 10, seed] for seed in range(3)]
    interval = stats.ttest_1samp(differences, 0).confidence_interval()
    assert report.facts[0].value == f"+{np.mean(differences):.1f} AP"
    assert report.facts[0].note.startswith(f"{interval.low:.1f} to {interval.high:.1f} with 95")
    assert report.facts[2].value == "not shown"
    large, others, _ = blocks_in(report, Words)[:3]
    assert large.large
    assert large.paragraphs[0] == (
        f"CrossMAE on your images, compared with {RANDOM}",
        f"At 40 labelled images, own pretraining adds {np.mean(differences):.1f} AP "
        f"({interval.low:.1f} to {interval.high:.1f}, 3 seeds).",
    )
    assert [head for head, _ in others.paragraphs if head] == [
        "CrossMAE on your images, compared with random weights (as the detector starts)",
        "Your weights (continued), compared with your weights",
        f"Your weights, compared with {RANDOM}",
        "Your weights, compared with random weights (as the detector starts)",
        f"Your weights (continued), compared with {RANDOM}",
        "Your weights (continued), compared with random weights (as the detector starts)",
    ]
    assert "This page makes 42 comparisons" in texts(report)  # 7 pairs, 3 shares, box and mask AP


def test_every_run_is_in_the_tables(build: Any) -> None:
    rows = sample_rows()
    report, _ = build(rows)
    found = table_with(report, "mean mask AP", "seed 0", "seed 1", "seed 2")
    assert len(found) == 15
    shown = {(row[0], row[1], seed): row[4 + seed] for row in found for seed in range(3)}
    words = worth_page.ARM_WORDS
    for row in rows:
        if row.facts["kind"] == "detect":
            place = f"{row.facts['labelled']} ({row.facts['share']} %)"
            assert shown[words[str(row.facts["arm"])], place, row.facts["seed"]] == f"{row.numbers['mask_AP']:.1f}"
    assert [line[0] for line in table_with(report, "run")] == [row.cell for row in rows]
    (commands,) = blocks_in(report, Commands)
    assert commands.folded == "Commands of all 51 runs"
    assert [re.sub(r" \\\n ", "", text) for _, text in commands.commands] == [row.commands[0] for row in rows]
    assert "A made-up CPU" in dict(report.environment)["Machine"]
    assert table_with(report, "setting") == [["steps", "400"]]


def test_costs_are_with_and_without_the_pretraining(build: Any) -> None:
    found = table_with(build(sample_rows())[0], "CPU time with pretraining")
    costs = {(row[0], row[1]): row[3:] for row in found}
    assert costs["CrossMAE on your images", "40 (10 %)"] == ["5 min 10 s", "20 min 10 s"]
    assert costs["your weights, continued", "400 (100 %)"] == ["6 min 40 s", "21 min 40 s + given"]
    assert costs["your weights", "40 (10 %)"] == ["5 min 10 s", "-"]
    assert costs["random weights, as pretraining starts", "120 (30 %)"] == ["5 min 30 s", "5 min 30 s"]


def test_a_total_without_its_pretraining_is_not_shown(build: Any) -> None:
    rows = [row for row in sample_rows() if row.facts["kind"] != "pretrain"]
    found = table_with(build(rows)[0], "CPU time with pretraining")
    totals = {row[0]: row[4] for row in found if row[1] == "40 (10 %)"}
    assert totals["CrossMAE on your images"] == "-"
    assert totals["random weights, as pretraining starts"] == "5 min 10 s"


def test_energy_and_gpus_are_shown_if_all_runs_have_them(build: Any) -> None:
    rows = [replace(row, cost={**row.cost, "gpu_seconds": 60.0, "energy_joules": 5000.0}) for row in sample_rows()]
    found = table_with(build(rows)[0], "GPU time with pretraining", "energy with pretraining")
    assert found[0][5:] == ["1 min 00 s", "2 min 00 s", "5.0 kJ", "10.0 kJ"]
    rows[0] = replace(rows[0], cost={**rows[0].cost, "energy_joules": None})  # one pretraining was not measured
    assert table_with(build(rows)[0], "energy with pretraining")[0][7:] == ["5.0 kJ", "-"]


def test_one_seed_claims_nothing(build: Any) -> None:
    report, answer = build(sample_rows(seeds=[0]))
    assert "which shows nothing" in answer
    assert {fact.value for fact in report.facts} == {"not shown"}
    assert " adds " not in texts(report)
    assert "One seed has no interval" in texts(report)
    assert "No comparison has an interval." in texts(report)
    assert "This holds" not in answer
    assert "interval of the mean" not in report.sections[0].text
    assert "The interval" not in texts(report)  # nothing may refer to an interval that is not there
    assert "Few seeds" not in texts(report)
    assert "The interval says how large it can be" in texts(build(sample_rows())[0])


def test_seeds_without_effect_claim_nothing(build: Any) -> None:
    rows = [
        replace(row, numbers={"mask_AP": 10 + GAINS[str(row.facts["arm"])]}) for row in sample_rows() if row.numbers
    ]
    report, answer = build(rows)
    assert "Results do not vary over the seeds at 40, 120 and 400 labelled images" in answer
    assert " adds " not in texts(report)
    assert "Too short a training" not in texts(report)
    rows = [replace(row, numbers={"mask_AP": 0.0}) for row in rows]
    assert "The highest mask AP of all runs is 0.0" in texts(build(rows)[0])


def test_runs_that_differ_by_chance_show_no_difference(build: Any) -> None:
    rows = sample_rows(["own", "random_pretraining_init"], spread=40)
    answer = f"These runs do not show a difference between CrossMAE on your images and {RANDOM}."
    report, found = build(rows, val_images=200)
    assert found == f"{answer} This holds over these 3 seeds, on these 200 validation images."
    assert "Over these 3 seeds, on these 200 validation images, the interval excludes a gain above" in texts(report)
    assert "Few validation images" not in texts(report)


@pytest.mark.parametrize(("kind", "per_image"), [("classify", "each one changes the score by 8.3"), ("detect", "")])
def test_few_validation_images_are_warned_of(build: Any, kind: str, per_image: str) -> None:
    report, answer = build(sample_rows(kind=kind), val_images=12)
    assert "on these 12 validation images" in answer
    assert per_image in answer
    assert ("each one changes the score by 8.3 points" in texts(report)) == bool(per_image)
    assert "There are only 12 validation images" in texts(report)
    verdict = next(section for section in report.sections if section.title == "Verdict")
    assert "over these 3 seeds, on these 12 validation images" in verdict.text
    for enough, warned in ((99, True), (100, False)):
        assert ("Few validation images" in texts(build(sample_rows(kind=kind), val_images=enough)[0])) == warned


def test_equal_scores_of_an_arm_are_warned_of(build: Any) -> None:
    """An interval whose width comes from one arm only."""
    rows = sample_rows(["own", "random_pretraining_init"], kind="classify")
    assert "The same score" not in texts(build(rows)[0])
    equal = [
        replace(row, numbers={"top1": 50.0}) if (row.facts["arm"], row.facts["share"]) == ("own", 10) else row
        for row in rows
    ]
    report, answer = build(equal)
    assert "All seeds of CrossMAE on your images have the same score at 40 labelled images." in texts(report)
    assert "This holds over these 3 seeds" in answer  # the control varies, so there is an interval


def test_missing_and_failed_cells_are_listed(build: Any) -> None:
    rows = [row for row in sample_rows() if row.cell != "detect-own-share30-seed1"]
    report, _ = build(rows, failed={"detect-own-share30-seed1": "exit code 1"})
    missing = next(section for section in report.sections if section.title == "Missing runs")
    assert missing.text == "1 of 45 runs of the grid have no result. 1 cell failed."
    assert cells(missing.blocks[0]) == [["CrossMAE on your images", "120", "1"]]  # type: ignore[arg-type]
    assert "exit code 1" in texts(report)
    assert "missing" in table_with(report, "mean mask AP")[5]


def test_planned_runs_are_missed_before_their_arm_has_a_row(build: Any) -> None:
    rows = sample_rows()
    done = [row for row in rows if row.facts["arm"] != "own" and row.facts["share"] != 100]
    report, _ = build(done, planned=[row.facts for row in rows])
    missing = next(section for section in report.sections if section.title == "Missing runs")
    assert missing.text == "21 of 45 runs of the grid have no result."
    found = cells(missing.blocks[0])  # type: ignore[arg-type]
    assert ["CrossMAE on your images", "40", "0"] in found
    assert ["your weights", "400", "2"] in found


def test_the_lead_says_what_differs(build: Any) -> None:
    rates = "Only the start of its encoder, with the learning rates of its early layers, differs."
    assert rates in build(sample_rows())[0].lead
    assert "Only the start of its encoder differs." in build(sample_rows(["weights", "continued"]))[0].lead


def test_a_page_without_runs(build: Any) -> None:
    report, answer = build([], failed={"pretrain-own-seed0": "killed by SIGKILL"})
    assert answer == "There is no answer yet: no two arms have finished runs."
    assert [section.title for section in report.sections] == ["Missing runs", "Settings"]
    one_arm = build(sample_rows(["own"]))[0]
    assert "Scores" in [section.title for section in one_arm.sections]
    assert "Verdict" not in [section.title for section in one_arm.sections]


def test_equal_total_compute_is_an_arm(build: Any) -> None:
    longer = [
        make_row(row.facts | {"arm": "random_equal_compute"}, {"mask_AP": row.numbers["mask_AP"] + 1}, 1200)
        for row in sample_rows()
        if row.facts["arm"] == "random_pretraining_init"
    ]
    with_longer, without = build(sample_rows() + longer)[0], build(sample_rows())[0]
    assert "compared with random weights (trained for longer)" in texts(with_longer)
    assert "Equal total compute" in texts(without)
    assert "Equal total compute" not in texts(with_longer)
    costs = {row[0]: row[3:] for row in table_with(with_longer, "CPU time with pretraining")}
    assert costs["random weights, trained for longer"] == ["20 min 00 s", "20 min 00 s"]


def test_classes_have_accuracies(build: Any) -> None:
    report, _ = build(sample_rows(kind="classify"))
    assert "points" in report.facts[0].value
    assert len(table_with(report, "mean top-1 accuracy")) == 15
    assert "own pretraining adds" in texts(report)
    assert "points" in texts(report)
    assert "random weights (as the classifier starts)" in texts(report)
    assert "detector" not in texts(report)


def test_wide_tables_wrap_and_no_number_stands_out_by_its_place(build: Any, tmp_path: Path) -> None:
    tables = blocks_in(build(sample_rows())[0], Table)
    assert all(table.wrap for table in tables if len(table.columns) > 4)
    assert "first-child .value" not in (tmp_path / "page.html").read_text("utf-8")


def test_unknown_arms_keep_their_name(build: Any) -> None:
    rows = [replace(row, facts={**row.facts, "arm": "mae"}) for row in sample_rows(["own"])] + sample_rows(["own"])
    assert "mae" in {row[0] for row in table_with(build(rows)[0], "mean mask AP")}


def test_figures_name_axes_arms_and_units(tmp_path: Path) -> None:
    write_page(sample_rows(["own", "random_pretraining_init"]), tmp_path / "page.html", title="t", settings={})
    page = (tmp_path / "page.html").read_text("utf-8")
    assert page.count("<svg") == 4
    assert "vertical lines their 95" in page
    write_page(sample_rows(["own"], seeds=[0]), tmp_path / "one.html", title="t", settings={})
    one = (tmp_path / "one.html").read_text("utf-8")
    assert "vertical lines" not in one
    assert "There are no intervals." in one
    for text in ("labelled images (logarithmic)", "mask AP in %", "difference in AP", "CrossMAE on your images", "400"):
        assert f">{text}</text>" in page
