"""Proves the plan of the study: unique cells, equal compute, paired seeds, lengths, learning rates and kept rows."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from crossmae.errors import UserError
from crossmae.experiments.cells import Cell, check_cells
from crossmae.experiments.rows import Row, append_row, read_rows
from crossmae.experiments.study.arms import (
    DETECTION_CPU,
    DETECTION_GPU15,
    FASHION_ARMS,
    FASHION_MODEL,
    FASHION_RATES,
    SEEDS,
)
from crossmae.experiments.study.fashion_mnist import RATE_ARMS, choose_rates, operations_of
from crossmae.experiments.study.grid import (
    GPU15,
    GPU_MINUTES,
    PARTS,
    link_packages,
    link_sources,
    linked_packages,
    publish,
    show_plan,
    study_cells,
)
from crossmae.experiments.study.predictions import PREDICTIONS
from tests.crossmae.experiments.study.made_rows import make_row

FOLDER = Path("outputs/study")
MINUTE, HOUR = 60.0, 3600.0


@pytest.fixture(scope="module")
def cells() -> list[Cell]:
    return study_cells(FOLDER)


@pytest.mark.parametrize("parts", [PARTS, [GPU15], *([part] for part in PARTS)])
def test_names_are_unique_and_needs_exist(parts: list[str]) -> None:
    check_cells(study_cells(FOLDER, parts))


def test_the_study_fits_its_time(cells: list[Cell]) -> None:
    assert sum(cell.estimate for cell in cells) <= 10 * HOUR
    assert max(cell.estimate for cell in cells) <= 20 * MINUTE
    preset = study_cells(FOLDER, [GPU15])
    assert sum(cell.estimate for cell in preset[1:]) <= GPU_MINUTES * MINUTE


def test_every_number_has_commands_inside_the_repository(cells: list[Cell]) -> None:
    for cell in [*cells, *study_cells(FOLDER, [GPU15])]:
        assert cell.steps
        for step in cell.steps:
            assert not [word for word in step.arguments if "=/" in word or word.startswith("/")]


def decisive(cell: Cell) -> set[str]:
    """The words of a command without the places that name the arm and the seed."""
    words = " ".join(cell.steps[0].arguments)
    for name in (
        f"{cell.facts['arm']}-{cell.facts['seed']}",
        f"labels-{cell.facts['seed']}",
        f"seed{cell.facts['seed']}",
    ):
        words = words.replace(name, "@")
    return set(words.split())


@pytest.mark.parametrize("kind", ["pretrain", "finetune", "probe", "detection_pretrain", "detect"])
def test_arms_differ_in_their_own_words_only(cells: list[Cell], kind: str) -> None:
    own = [cell for cell in cells if cell.facts["kind"] == kind]
    seeds = Counter((cell.facts["arm"], cell.facts.get("share")) for cell in own)
    assert set(seeds.values()) == {len(SEEDS)}
    allowed = r"model\..+" if kind != "detect" else r"model\.weights|solver\.layer_decay"
    for cell in own:
        same = next(one for one in own if one.facts.get("share") == cell.facts.get("share"))
        keys = {word.lower().partition("=")[0] for word in decisive(cell) ^ decisive(same)}
        allowed_here = f"(runtime\\.)?seed|schedule\\..+|optim\\..+|{allowed}"
        assert not [key for key in keys if not re.fullmatch(allowed_here, key)]


def test_fine_tuning_starts_from_its_own_arm_and_seed(cells: list[Cell]) -> None:
    by_name = {cell.name: cell for cell in cells}
    for cell in cells:
        if cell.facts["kind"] not in ("finetune", "probe", "detect"):
            continue
        start = by_name[next(name for name in cell.needs if "pretrain" in name)]
        run = start.steps[0].done.parent
        assert any(f"={run}" in word for word in cell.steps[0].arguments)
        arm = str(cell.facts["arm"]).removesuffix("_decay")
        assert (start.facts["arm"], start.facts["seed"]) == (arm, cell.facts["seed"])


def test_equal_compute_is_equal() -> None:
    total = {arm.name: operations_of(arm, FASHION_MODEL) * arm.epochs for arm in FASHION_ARMS}
    for name in ("cross25_d6_equal", "cross25_d4_equal"):
        assert total[name] == pytest.approx(total["mae_d4"], rel=0.02)
    assert total["cross25_d6"] < 0.8 * total["mae_d4"]


def test_settings_say_the_arithmetic_of_the_configs() -> None:
    """The arguments that operations are counted with are those of the model that is pretrained."""
    from crossmae.models.sizes import model_arguments
    from crossmae.pretraining.config import load_config

    given = ("data.train=IMAGES", "output_dir=OUT")
    for settings in (DETECTION_CPU, DETECTION_GPU15):
        model = load_config(settings.pretrain, given).model
        arguments = model_arguments(model.name) | model.arguments()
        assert {key: arguments[key] for key in settings.model} == dict(settings.model)
    model = load_config("pretrain/fashion_mnist.yaml", given).model
    assert {key: value for key, value in model.arguments().items() if key in FASHION_MODEL} == dict(FASHION_MODEL)


def test_predicted_arms_exist() -> None:
    names = {arm.name for arm in (*FASHION_ARMS, *DETECTION_CPU.arms)}
    assert {arm for one in PREDICTIONS for pair in one.pairs for arm in pair} <= names


def rate_row(arm: str, lr: float, accuracy: float) -> Row:
    return make_row({"part": "fashion_mnist", "kind": "rate", "arm": arm, "lr": lr, "seed": 0}, {"knn_train": accuracy})


def test_learning_rates_are_chosen_once_all_are_measured() -> None:
    cross, mae = RATE_ARMS
    rows = [rate_row(cross, lr, 80 + index) for index, lr in enumerate(FASHION_RATES)]
    rows += [rate_row(mae, lr, 80 - index) for index, lr in enumerate(FASHION_RATES)]
    assert choose_rates(rows) == {cross: FASHION_RATES[-1], mae: FASHION_RATES[0]}
    assert choose_rates(rows[:-1]) == {cross: FASHION_RATES[-1], mae: FASHION_RATES[1]}
    chosen = study_cells(FOLDER, ["fashion_mnist"], rows)
    words = {cell.facts["arm"]: cell.steps[0].arguments for cell in chosen if cell.facts["kind"] == "pretrain"}
    assert f"optim.lr={FASHION_RATES[-1]:g}" in words["cross25_d2"]
    assert f"optim.lr={FASHION_RATES[0]:g}" in words["mae_d4"]


def test_the_newest_row_of_a_cell_is_kept(tmp_path: Path) -> None:
    old = make_row({"part": "decoder", "kind": "decoder"}, {"x": 1.0})
    other, new = replace(old, cell="other"), replace(old, numbers={"x": 2.0}, finished="2026-11-30")
    for row in (old, other):
        append_row(tmp_path / "kept.jsonl", row)
    append_row(tmp_path / "results.jsonl", new)
    rows = publish(tmp_path / "results.jsonl", tmp_path / "kept.jsonl")
    assert {row.cell: row.numbers["x"] for row in rows} == {old.cell: 2.0, "other": 1.0}
    assert read_rows(tmp_path / "kept.jsonl") == rows
    assert publish(tmp_path / "none.jsonl", tmp_path / "kept.jsonl") == rows


def test_rows_that_are_not_published_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    kept = make_row({"part": "decoder", "kind": "decoder"}, {"x": 1.0})
    append_row(tmp_path / "kept.jsonl", kept)
    append_row(tmp_path / "results.jsonl", kept)
    publish(tmp_path / "results.jsonl", tmp_path / "kept.jsonl")
    assert not caplog.records
    append_row(tmp_path / "results.jsonl", replace(kept, numbers={"x": 2.0}, finished="2020-01-01"))
    rows = publish(tmp_path / "results.jsonl", tmp_path / "kept.jsonl")
    assert [row.numbers for row in rows] == [{"x": 1.0}]
    assert kept.cell in caplog.text


def test_the_plan_counts_what_is_missing(cells: list[Cell]) -> None:
    done = replace(make_row({"part": "decoder", "kind": "decoder"}, {}), cell="decoder-cost")
    lines = show_plan(cells, [done]).splitlines()
    assert len(lines) == len(cells) + 2
    assert f"{len(cells) - 1} missing" in lines[-1]


def test_data_sets_are_linked(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "other").mkdir()
    for name in ("set", "other", "other"):
        link_sources(tmp_path / "study", {"fashion-mnist": tmp_path / name})
        assert (tmp_path / "study" / "sources" / "fashion-mnist").resolve() == tmp_path / name
    with pytest.raises(UserError, match="--fashion-mnist"):
        link_sources(tmp_path / "study", {"fashion-mnist": tmp_path / "missing"})


def test_the_packages_of_the_last_call_stay(tmp_path: Path) -> None:
    places = [tmp_path / name for name in ("a", "b")]
    for place in places:
        place.mkdir()
    for given, expected in ((places, places), ([], places), (places[1:], places[1:]), ([], places[1:])):
        link_packages(tmp_path / "study", given)
        assert [link.resolve() for link in linked_packages(tmp_path / "study")] == expected
    places[1].rmdir()
    with pytest.raises(UserError, match=r"--packages: .* is gone"):
        link_packages(tmp_path / "study", [])
    with pytest.raises(UserError, match="--packages: "):
        link_packages(tmp_path / "study", places[1:])
