"""The plan of the question and its execution: time, runs, and the page with the answer."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil

from crossmae.errors import UserError, shorten
from crossmae.experiments.cells import Cell, FailedCells, expected_seconds, finished_rows, run_cells
from crossmae.experiments.commands import count_cores, find_gpus
from crossmae.experiments.rows import SCORED_KINDS, Row, read_rows
from crossmae.experiments.worth.grid import (
    ARMS,
    EQUAL_COMPUTE,
    MINOR_CONTROLS,
    NEEDS_WEIGHTS,
    PRESETS,
    USUAL_ARMS,
    Budget,
    Question,
    build_cells,
    choose_budget,
    estimated,
    timing_cells,
)
from crossmae.experiments.worth.inputs import (
    LabelledPart,
    check_unchanged,
    check_weights,
    count_images,
    prepare_labels,
)
from crossmae.experiments.worth.model_sizes import ModelSizes, sizes_of
from crossmae.files import make_folder
from crossmae.files.claim import keep_kind
from crossmae.reports.page import format_seconds

log = logging.getLogger(__name__)

RESULTS, PAGE = "results.jsonl", "report.html"
KIND = "comparison"  # of the output folder
MEMORY_OF_JOB = 4 * 2**30  # bytes that a run of the sizes for processors needs at most
OWN_KEYS = {  # settings that the plan decides, and the option to use instead
    "output_dir": "--output",
    "OUTPUT_DIR": "--output",
    "runtime.seed": "--seeds",
    "SEED": "--seeds",
    "data.train": "IMAGES",
    "model.init": "--weights",
    "MODEL.WEIGHTS": "--weights",
    "SOLVER.MAX_ITER": "--steps",
    "SOLVER.EPOCHS": "--steps",
}
OWN_KEYS_BY_FLAG = {
    "--pretrain-set": OWN_KEYS | {"schedule.max_steps": "schedule.epochs"},
    "--fine-tune-set": OWN_KEYS | {"schedule.max_steps": "--steps", "schedule.epochs": "--steps"},
}


def check_settings(flag: str, settings: Sequence[str]) -> None:
    """Raise UserError for settings that the plan decides.

    A word that is not KEY=VALUE is an error, too.
    """
    for word in settings:
        key, sign, _ = word.partition("=")
        if not sign:
            raise UserError(f"{flag}: {word} is no setting. Write KEY=VALUE.")
        if instead := OWN_KEYS_BY_FLAG[flag].get(key):
            raise UserError(f"{flag}: {key} is decided by the plan. Use {instead}.")


def choose_arms(arms: Sequence[str] | None, has_weights: bool, equal_compute: bool) -> tuple[str, ...]:
    """Choose the arms, in the order of the runs.

    Raises UserError if an arm is unknown, or needs weights or another arm that are not given.
    """
    if arms is None:
        arms = [*USUAL_ARMS, *(NEEDS_WEIGHTS if has_weights else ())]
    if unknown := [arm for arm in arms if arm not in ARMS]:
        raise UserError(f"--arms: {unknown[0]} is unknown. Choose among {', '.join(ARMS)}.")
    if not has_weights and (lacking := [arm for arm in arms if arm in NEEDS_WEIGHTS]):
        raise UserError(f"--arms: {lacking[0]} needs weights to start from. Name them with --weights.")
    chosen = {*arms, *([EQUAL_COMPUTE] if equal_compute else [])}
    if EQUAL_COMPUTE in chosen and "own" not in chosen:
        raise UserError(f"--arms: {EQUAL_COMPUTE} takes as long as own, which is not among the arms. Add own.")
    return tuple(arm for arm in ARMS if arm in chosen)


def choose_jobs(gpus: Sequence[int] | None, jobs: int | None) -> tuple[int, list[int]]:
    """Choose the number of runs at once, and the GPUs.

    By default, each GPU has a run. Without a GPU, a run has two cores, if memory suffices.
    """
    found = list(find_gpus()) if gpus is None else list(gpus)
    by_memory = int(psutil.virtual_memory().available // MEMORY_OF_JOB)
    return jobs or max(1, min(count_cores() // 2, by_memory)), found


def prepare_question(
    images: Path,
    labels: LabelledPart,
    val: LabelledPart | None,
    output: Path,
    *,
    size: str,
    arms: tuple[str, ...],
    shares: Sequence[float] | None,
    seeds: Sequence[int],
    weights: Path | None,
    pretrain_settings: Sequence[str] = (),
    fine_tune_settings: Sequence[str] = (),
) -> Question:
    """Check everything that the user gave, and write label subsets.

    Raises UserError before anything runs.
    """
    count, preset = count_images(images), PRESETS[size]
    keep_kind(output, KIND, "--output")
    found = prepare_labels(labels, val, images, shares, seeds, output / "labels")
    if found.task == "detect":
        check_sizes(preset.encoder(), preset.encoder(pretrain_settings), fine_tune_settings)
    if weights:
        presets = {name: preset.encoder() for name, preset in PRESETS.items()}
        check_weights(weights, preset.encoder(pretrain_settings), presets)
    files = {"--weights": weights, "--val-labels": val and found.val.labels}
    contents: dict[str, Path | int] = {f"{key}: {path}": path for key, path in files.items() if path and path.is_file()}
    check_unchanged(output, output / RESULTS, contents | {f"IMAGES: {images}": count})
    return Question(
        images=images,
        count=count,
        labels=found,
        output=output,
        preset=preset,
        arms=arms,
        shares=tuple(sorted(found.counts)),
        seeds=tuple(seeds),
        weights=weights,
        pretrain_settings=tuple(pretrain_settings),
        fine_tune_settings=tuple(fine_tune_settings),
    )


def check_sizes(usual: Mapping[str, Any], ours: Mapping[str, Any], fine_tune_settings: Sequence[str]) -> None:
    """Check that the detector's encoder has the sizes of pretraining.

    Args:
        usual: arguments of the encoder in the configs; ours: as the user changed them.

    Raises UserError for sizes that the user changed for pretraining only.
    """
    given = {word.partition("=")[0] for word in fine_tune_settings}
    names = {key: f"MODEL.VIT.{key.upper()}" for key in ("embed_dim", "depth", "num_heads") if usual[key] != ours[key]}
    if lacking := [f"{name}={ours[key]}" for key, name in names.items() if name not in given]:
        raise UserError(f"--pretrain-set: the detector has other sizes. Add --fine-tune-set {' '.join(lacking)}.")


@dataclass(frozen=True)
class Plan:
    """The runs, with expected CPU seconds.

    Attributes:
        load: wall seconds for each CPU second of the timing runs. It is below 1 with several cores, and above 1 on a
            busy machine.
    """

    cells: list[Cell]
    budget: Budget
    load: float


def make_plan(question: Question, steps: int | None, gpus: Sequence[int], runs: bool = True) -> Plan:
    """Measure the seconds of a step, and list the runs.

    Args:
        runs: measure what has not been measured.

    Raises UserError if nothing must run and something has not been measured, or no run has a score.
    """
    budget = choose_budget(question, steps)
    results = question.output / "timing" / RESULTS
    timed = timing_cells(question, budget)
    if not runs and len(finished_rows(timed, results)) < len(timed):
        raise _no_results(question.output)
    log.info("A short run of each kind comes first. It also checks data and settings")
    make_folder(results.parent, "--output")
    rows = run_cells(timed, results, gpus=gpus[:1])
    timings = {str(row.facts["kind"]): seconds_of_kind(row) for row in rows}
    if EQUAL_COMPUTE in question.arms:
        budget = replace(budget, extra_steps=steps_of_pretraining(rows, budget.pretrain_steps, on_gpu=bool(gpus)))
    wall, cpu = (sum(float(row.cost[key] or 0) for row in rows) for key in ("wall_seconds", "cpu_seconds"))
    cells = estimated(build_cells(question, budget), timings)
    if not runs and not _scored(finished_rows(cells, question.output / RESULTS).values()):
        raise _no_results(question.output)
    return Plan(cells, budget, wall / cpu)


def _no_results(output: Path) -> UserError:
    return UserError(
        f"--page: {output} has no results of this command. Give the options of the runs, or leave --page out."
    )


def _scored(rows: Iterable[Row]) -> list[str]:
    """Name the cells with a score."""
    return [row.cell for row in rows if row.facts.get("kind") in SCORED_KINDS]


def seconds_of_kind(row: Row, cost: str = "cpu_seconds") -> tuple[float, float]:
    """Split the seconds of a timing run: start, and a step.

    Args:
        cost: "cpu_seconds" or "wall_seconds".
    """
    wall, seconds = float(row.cost["wall_seconds"] or 0), float(row.cost[cost] or 0)
    share = min(row.numbers["steps"] * row.numbers["step_seconds"] / wall, 1.0)
    return seconds * (1 - share), seconds * share / row.numbers["steps"]


def steps_of_pretraining(rows: Sequence[Row], pretrain_steps: int, on_gpu: bool) -> int:
    """Return the number of fine-tuning steps that take as long as pretraining.

    Time is CPU time, or on a GPU the time of the run.

    Args:
        rows: timing runs of pretraining and of fine-tuning.
    """
    cost = "wall_seconds" if on_gpu else "cpu_seconds"
    found = {row.facts["kind"] == "pretrain": seconds_of_kind(row, cost) for row in rows}
    (start, pretrain_step), (_, step) = found[True], found[False]
    return round((start + pretrain_step * pretrain_steps) / step)


def describe_plan(question: Question, plan: Plan, jobs: int, gpus: Sequence[int]) -> str:
    """Write the table of the plan, and the cost of smaller grids."""
    cells, budget = plan.cells, plan.budget
    rows = finished_rows(cells, question.output / RESULTS)
    pairs = [(cell, rows[cell.name]) for cell in cells if cell.name in rows]
    seconds = {cell.name: expected_seconds(cell, pairs, "cpu_seconds") for cell in cells}
    kinds: dict[str, list[Cell]] = defaultdict(list)
    for cell in cells:
        kinds[str(cell.facts["kind"])].append(cell)
    lines = [f"{'kind':<10} {'runs':>5} {'done':>5} {'CPU minutes each':>17} {'in all':>12}"]
    for kind, members in kinds.items():
        total = sum(seconds[cell.name] for cell in members) / 60
        done = sum(cell.name in rows for cell in members)
        lines.append(f"{kind:<10} {len(members):>5} {done:>5} {total / len(members):>17.1f} {total:>12.1f}")
    at_once = len(gpus) or jobs
    left = sum(seconds[cell.name] for cell in cells if cell.name not in rows)
    wall = left * plan.load if at_once == 1 or gpus else left * max(plan.load, 1.0)
    where = f"on {len(gpus)} GPU{'s' * (len(gpus) > 1)}" if gpus else f"with {at_once} at once on {count_cores()} cores"
    sizes = sizes_of_question(question)
    lines += [
        f"{question.labels.task}: {budget.fine_tune_steps} steps in every arm and share. Pretraining: "
        f"{budget.pretrain_steps} steps, {budget.pretrain_epochs} epochs of {question.count} images.",
        f"Pretraining sees crops of {sizes.crop} pixels, and {sizes.fine_tuning}. Encoder: {sizes.encoder}. --size and "
        "settings change this.",
        f"All runs: {sum(seconds.values()) / 3600:.2f} CPU hours, of which {left / 3600:.2f} are left: about "
        f"{format_seconds(wall / at_once)}, {where}.",
    ]
    return "\n".join([*lines, *describe_smaller(question, cells, seconds)])


def describe_smaller(question: Question, cells: Sequence[Cell], seconds: Mapping[str, float]) -> list[str]:
    """Write what smaller grids would cost."""
    shares = (question.shares[0], question.shares[-1])
    options = {
        f"--seeds {question.seeds[0]} (no intervals)": lambda facts: facts["seed"] == question.seeds[0],
        f"--shares {shares[0]:g},{shares[1]:g}": lambda facts: facts.get("share", shares[0]) in shares,
        f"without {' and '.join(MINOR_CONTROLS)} (--arms)": lambda facts: facts["arm"] not in MINOR_CONTROLS,
    }
    found = []
    for words, keeps in options.items():
        kept = [cell for cell in cells if keeps(cell.facts)]
        if len(kept) < len(cells):
            found.append(f"  {words}: {sum(seconds[cell.name] for cell in kept) / 3600:.2f} CPU hours")
    return ["A smaller grid would take:", *found] if found else []


def answer(
    question: Question,
    plan: Plan,
    *,
    jobs: int,
    gpus: Sequence[int],
    minutes: float | None,
    settings: Mapping[str, Any],
) -> str:
    """Run the grid, and write the page. Return the verdict in words.

    The page is also written if runs failed or time ran out. Raises the errors of `run_cells`.
    """
    failed: Mapping[str, str] = {}
    try:
        run_cells(plan.cells, question.output / RESULTS, jobs=jobs, gpus=gpus, minutes=minutes)
    except FailedCells as error:
        failed = error.reasons
        log.warning("%s: lists the failed runs", question.output / PAGE)
        raise
    finally:
        verdict = write_answer(question, plan, settings, failed)
    return verdict


def write_answer(
    question: Question, plan: Plan, settings: Mapping[str, Any], failed: Mapping[str, str] | None = None
) -> str:
    """Write the page from the finished runs.

    A page with scores of other options stays until a run of these options has a score.

    Args:
        failed: reasons by run that failed.

    Returns the verdict in words.
    """
    from crossmae.experiments.worth_page import NOTHING_YET, write_page  # imports matplotlib

    rows, budget = finished_rows(plan.cells, question.output / RESULTS), plan.budget
    others = [row for row in read_rows(question.output / RESULTS) if row.cell not in rows]
    if _scored(others) and not _scored(rows.values()) and (question.output / PAGE).exists():
        log.warning("%s: shows runs with other options, and is kept until a run of these options has a score", PAGE)
        return NOTHING_YET
    if others:
        named = shorten(sorted(row.cell for row in others))
        log.warning("runs with other options or another version are not on the page: %s", named)
    sizes = sizes_of_question(question)
    shown = {
        **settings,
        "Images for pretraining": f"{question.count:,} in {question.images}",
        "Pretraining": f"{question.preset.pretrain}, {budget.pretrain_steps:,} steps",
        "Images in pretraining": f"crops of {sizes.crop} pixels",
        "Images in fine-tuning": sizes.fine_tuning,
        "Encoder": sizes.encoder,
        "Fine-tuning": f"{fine_tune_config(question)}, {budget.fine_tune_steps:,} steps",
        "Validation": f"{question.labels.val_images:,} images, {question.labels.val.labels}",
    }
    return write_page(
        list(rows.values()),
        question.output / PAGE,
        title="Is pretraining worth it?",
        settings=shown,
        failed=failed,
        planned=[cell.facts for cell in plan.cells],
        val_images=question.labels.val_images,
        limits=(*question.labels.remarks, sizes.limit(budget.fine_tune_steps)),
    )


def sizes_of_question(question: Question) -> ModelSizes:
    """Find the sizes of images and encoder in the runs."""
    task, settings = question.labels.task, (question.pretrain_settings, question.fine_tune_settings)
    return sizes_of(question.preset, task, *settings)


def fine_tune_config(question: Question) -> str:
    """Return the name of the config of fine-tuning."""
    return question.preset.detect if question.labels.task == "detect" else question.preset.classify
