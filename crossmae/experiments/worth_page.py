"""The page that answers if pretraining is worth it, from the rows of a grid of runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from typing import Any

from crossmae.errors import counted, printable
from crossmae.experiments.rows import SCORED_KINDS, Row
from crossmae.experiments.score_blocks import (
    bounds,
    cost_table,
    difference_curve,
    difference_table,
    run_table,
    score_curve,
    score_table,
)
from crossmae.experiments.statistics import (
    METRICS_OF_ROWS,
    Claim,
    Difference,
    Differences,
    Metric,
    Scores,
    describe_comparisons,
    describe_differences,
    describe_scope,
    describe_width,
    differences_of,
    equal_scores,
    missing_runs,
    one_decimal,
    points_of_one_image,
    scores_of,
)
from crossmae.reports import page
from crossmae.reports.page import Commands, Fact, PageBlock, Report, Section, Table, Words
from crossmae.training.versions import versions

CellFacts = Mapping[str, str | int | float | None]  # of a cell

ARM_WORDS = {
    "own": "CrossMAE on your images",
    "continued": "your weights, continued",
    "weights": "your weights",
    "random_equal_compute": "random weights, trained for longer",
    "random_pretraining_init": "random weights, as pretraining starts",
    "random_same_rates": "random weights, with the learning rates of pretrained ones",
    "random_detector_init": "random weights, as the detector starts",
}
LONGER, SAME_RATES, MINOR_CONTROL = "random_equal_compute", "random_same_rates", "random_detector_init"
WITH_EVEN_RATES = (LONGER, "random_pretraining_init", MINOR_CONTROL)
RANDOM_ARMS = (*WITH_EVEN_RATES, SAME_RATES)
PAIRS = (  # arm and control, the most important first
    ("own", "random_pretraining_init"),
    ("own", SAME_RATES),
    ("own", "random_detector_init"),
    ("own", "random_equal_compute"),
    ("continued", "weights"),
    ("weights", "random_pretraining_init"),
    ("weights", SAME_RATES),
    ("weights", "random_detector_init"),
    ("continued", "random_pretraining_init"),
    ("continued", SAME_RATES),
    ("continued", "random_detector_init"),
)
USEFUL_SCORE = 1.0  # percent
ACCURACY = "top1"
COARSE_SCORE = 1.0  # points by which one validation image changes an accuracy
NOTHING_YET = "There is no answer yet: no two arms have finished runs."
# Start of a sentence about places, by claim.
SUMMARIES: Mapping[Claim, str] = {
    "gain": "{arm} is better than {control} {places}",
    "loss": "{arm} is worse than {control} {places}",
    "nothing shown": "No difference is shown {places}",
    "no spread": "Results do not vary over the seeds {places}, so nothing is shown there",
    "one seed": "One seed was run {places}, which shows nothing",
    "no pair": "No pair of runs is there {places}",
}
UNANSWERED = (
    (
        "Other budgets and settings",
        "Where the page says nothing else, all runs have the same model, number of steps and highest learning rate. An "
        "arm may gain from more steps or from another learning rate, and random weights usually need more steps than "
        "pretrained weights.",
    ),
    (
        "Learning rates",
        "Unless a setting gives one decay to all runs, random weights have the same learning rate in all layers. "
        "Pretrained weights have a lower one in early layers, as the config says. A part of a difference may come from "
        "these rates: the arm random_same_rates, random weights with the rates of pretrained ones, shows how much. No "
        "other rates were tried.",
    ),
)
OF_INTERVALS = (
    (
        "Other validation images",
        "The intervals cover what the seeds change: the order of the images, the random numbers, and the choice of the "
        "labelled images below 100 %. They do not cover the choice of the validation images, which are the same in all "
        "runs.",
    ),
    (
        "A difference that is not shown",
        "It may still be there. The interval says how large it can be, over these seeds and validation images.",
    ),
)
WITHOUT_INTERVALS = (
    (
        "Other seeds and validation images",
        "No comparison has an interval, so nothing on this page says how much other seeds would change. The validation "
        "images are the same in all runs.",
    ),
    ("A difference that is not shown", "It may still be there, and be large."),
)
FEW_SEEDS = (
    "Few seeds",
    "Student's interval assumes that runs are spread like a normal distribution. Two or three runs cannot test it.",
)
NO_EQUAL_COMPUTE = (
    "Equal total compute",
    "No run trained random weights for as long as pretraining and fine-tuning take together. So this page compares "
    "equal fine-tuning only, and the table of costs shows what pretraining took in addition.",
)


def write_page(
    rows: Sequence[Row],
    target: Path,
    *,
    title: str,
    settings: Mapping[str, Any],
    arms: Mapping[str, str] = ARM_WORDS,
    failed: Mapping[str, str] | None = None,
    planned: Sequence[CellFacts] = (),
    limits: Sequence[tuple[str, str]] = (),
    val_images: int | None = None,
) -> str:
    """Write the page of a grid of runs.

    Runs of the grid without a row are listed as missing. The grid has all arms, shares and seeds of the rows and of the
    planned runs.

    Args:
        rows: results with the facts kind, arm, share, labelled and seed.
        target: HTML file in an existing folder.
        settings: what the runs have in common, shown by name.
        arms: words by arm, in the order of the page.
        failed: reasons by cell that failed.
        planned: facts of all cells of the grid, as in the rows.
        limits: headings and texts that limit what these runs show, in addition to the limits of all grids.
        val_images: validation images. None: unknown.

    Returns:
        The answer in words, one paragraph, for the terminal.
    """
    scored = [row for row in rows if row.facts.get("kind") in SCORED_KINDS]
    grid = [facts for facts in (*planned, *(row.facts for row in scored)) if facts.get("kind") in SCORED_KINDS]
    if scored and all(row.facts["kind"] == "classify" for row in scored):
        arms = {arm: words.replace("the detector", "the classifier") for arm, words in arms.items()}
    named = words_of(arms, {str(row.facts["arm"]) for row in scored})
    tables = {metric: scores_of(scored, metric.key, SCORED_KINDS) for metric in METRICS_OF_ROWS}
    tables = {metric: scores for metric, scores in tables.items() if scores}
    places, seeds = places_of(grid), sorted({int(facts["seed"] or 0) for facts in grid})
    pairs = [pair for pair in PAIRS if set(pair) <= named.keys()]
    compared = {metric: differences_of(scores, pairs, places) for metric, scores in tables.items() if metric.main}

    answer, lead, facts, sections = NOTHING_YET, "", list[Fact](), list[Section]()
    if compared and pairs:
        metric, differences = next(iter(compared.items()))
        answer = answer_of(differences[pairs[0]], places, pairs[0], named)
        if any(one.has_interval for one in differences[pairs[0]].values()):
            answer += f" {scope_of(metric, len(seeds), val_images)}"
        lead = lead_of(pairs[0], named, metric)
        facts = [difference_fact(differences[pairs[0]][share], metric, places[share]) for share in places]
        best = max(value for values in tables[metric].values() for value in values.values())
        warnings = warnings_of(metric, tables[metric], named, places, best, val_images)
        sections += [verdict_section(compared, places, named, len(seeds), val_images, warnings)]
    if tables:
        sections += score_sections(tables, compared, named, places, seeds)
        sections += [
            cost_section(rows, tables, named, places),
            limit_section(named, len(seeds), limits, count_intervals(compared) > 0),
        ]
    wanted = words_of(arms, {str(facts["arm"]) for facts in grid})
    sections += [missing_section(tables, wanted, places, seeds, failed or {})]
    sections += [run_section(rows, list(tables))] if rows else []
    sections += [setting_section(settings)] if settings else []
    Report(title, lead, facts, sections, environment_of(rows), answer=answer).write(target)
    return answer


def places_of(grid: Sequence[CellFacts]) -> dict[float, int]:
    """Return the number of labelled images by share, in rising order."""
    found = {float(facts["share"] or 0): int(facts.get("labelled") or facts["share"] or 0) for facts in grid}
    return dict(sorted(found.items()))


def words_of(arms: Mapping[str, str], found: Set[str]) -> dict[str, str]:
    """Keep the words of the found arms. Unknown arms keep their name."""
    return {arm: arms.get(arm, arm) for arm in [*arms, *sorted(found - arms.keys())] if arm in found}


def plain(words: str) -> str:
    """Write the words of an arm without a comma."""
    start, _, rest = words.partition(", ")
    return f"{start} ({rest})" if rest else start


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _headings(places: Mapping[float, int]) -> dict[float, str]:
    return {share: f"{labelled:,} ({share:g}{page.PERCENT})" for share, labelled in places.items()}


def answer_of(
    differences: Mapping[float, Difference],
    places: Mapping[float, int],
    pair: tuple[str, str],
    arms: Mapping[str, str],
) -> str:
    """Sum up a comparison: the numbers of labelled images by claim."""
    arm, control = (plain(arms[one]) for one in pair)
    by_claim: dict[Claim, list[str]] = {}
    for share, labelled in places.items():
        by_claim.setdefault(differences[share].claim, []).append(f"{labelled:,}")
    sentences = []
    if not by_claim.keys() & {"gain", "loss"}:
        sentences.append(f"These runs do not show a difference between {arm} and {control}.")
    for claim, text in SUMMARIES.items():
        numbers = by_claim.get(claim)
        if numbers and by_claim.keys() != {"nothing shown"}:
            listed = " and ".join(filter(None, [", ".join(numbers[:-1]), numbers[-1]]))
            where = f"at {listed} labelled images"
            sentences.append(_capital(text.format(arm=arm, control=control, places=where)) + ".")
    return " ".join(sentences)


def lead_of(pair: tuple[str, str], arms: Mapping[str, str], metric: Metric) -> str:
    """Explain the headline numbers."""
    arm, control = (plain(arms[one]) for one in pair)
    rates = (
        ", with the learning rates of its early layers,"
        if (pair[0] in WITH_EVEN_RATES) != (pair[1] in WITH_EVEN_RATES)
        else ""
    )
    longer = f", and {plain(arms[LONGER])} have more steps" if LONGER in arms else ""
    return (
        f"The same model was fine-tuned in the same way. Only the start of its encoder{rates} differs{longer}. The "
        f"numbers below are differences in {metric.name}: {arm}, minus {control}."
    )


def difference_fact(difference: Difference, metric: Metric, labelled: int) -> Fact:
    """Show a difference as a headline number, or that nothing is shown."""
    label, mean = f"{_capital(metric.name)} at {labelled:,} labelled images", difference.mean
    if mean is None or not difference.has_interval:
        reasons = {"one seed": "one seed", "no spread": "no spread over seeds"}
        return Fact(label, "not shown", reasons.get(difference.claim, "no pair of runs"))
    note = f"{bounds(mean)} with 95{page.PERCENT} confidence, {mean.runs} seeds"
    if difference.claim == "nothing shown":
        return Fact(label, "not shown", note)
    sign = "+" if mean.mean > 0 else "\N{MINUS SIGN}"
    return Fact(label, f"{sign}{one_decimal(abs(mean.mean))} {metric.unit}", note)


def verdict_section(
    compared: Mapping[Metric, Differences],
    places: Mapping[float, int],
    arms: Mapping[str, str],
    seeds: int,
    val_images: int | None,
    warnings: Sequence[tuple[str, str]],
) -> Section:
    """State what the differences of the first metric show.

    Args:
        val_images: validation images. None: unknown.
        warnings: headings and texts of what makes the verdict doubtful.
    """
    metric, differences = next(iter(compared.items()))
    verdicts = []
    for (arm, control), own in differences.items():
        by_place = {f"at {labelled:,} labelled images": own[share] for share, labelled in places.items()}
        texts = describe_differences(by_place, subject_of(arm, arms), metric.unit, val_images)
        heading = f"{_capital(plain(arms[arm]))}, compared with {plain(arms[control])}"
        verdicts.append([(heading if number == 0 else "", text) for number, text in enumerate(texts)])
    count = count_intervals(compared)
    blocks = [Words(verdicts[0], large=True)]
    blocks += [Words([paragraph for own in verdicts[1:] for paragraph in own])] if verdicts[1:] else []
    notes = [("How sure this is", f"{describe_width(seeds)} {describe_comparisons(count)}")]
    blocks += [Words([*warnings, *notes])]
    text = (
        f"Differences of {metric.name} between runs with the same seed, at equal fine-tuning, "
        f"{describe_scope(seeds, val_images)}."
    )
    if count:
        text += f" In brackets: the 95{page.PERCENT} interval of the mean over seeds."
    return Section("Verdict", text, blocks)


def count_intervals(compared: Mapping[Metric, Differences]) -> int:
    """Count the differences with an interval."""
    return sum(one.has_interval for found in compared.values() for own in found.values() for one in own.values())


def scope_of(metric: Metric, seeds: int, val_images: int | None) -> str:
    """Say for which seeds and validation images the answer holds."""
    scope, points = describe_scope(seeds, val_images), points_of_one_image(val_images)
    if metric.key == ACCURACY and points > COARSE_SCORE:
        scope += f", of which each one changes the score by {one_decimal(points)} points"
    return f"This holds {scope}."


def warnings_of(
    metric: Metric,
    scores: Scores,
    arms: Mapping[str, str],
    places: Mapping[float, int],
    best: float,
    val_images: int | None,
) -> list[tuple[str, str]]:
    """Warn of what makes intervals say little, as headings and texts.

    Args:
        best: highest score of all runs.
        val_images: validation images. None: unknown.
    """
    found, points = list[tuple[str, str]](), points_of_one_image(val_images)
    if points > COARSE_SCORE:
        change = f", and each one changes the score by {one_decimal(points)} points" if metric.key == ACCURACY else ""
        text = (
            f"There are only {counted(val_images or 0, 'validation image')}{change}. All seeds have the same "
            "ones, so nothing here says how much others would change. Name more validation images with --val-labels."
        )
        found.append(("Few validation images", text))
    for arm, same in equal_scores(scores, arms, places).items():
        where = " and ".join(f"{places[share]:,}" for share in same)
        text = (
            f"All seeds of {plain(arms[arm])} have the same score at {where} labelled images. Then the interval of a "
            "difference says little: scores are too coarse, or seeds change too little, to show how far runs vary."
        )
        found.append(("The same score in all seeds", text))
    if best < USEFUL_SCORE:
        trouble = f"The highest {metric.name} of all runs is {one_decimal(best)}{page.PERCENT}"
        text = f"{trouble}. Models that have learned nothing cannot differ: train longer."
        found.append(("Too short a training", text))
    return found


def subject_of(arm: str, arms: Mapping[str, str]) -> str:
    """Name an arm as the subject of a singular verb."""
    short = {"own": "own pretraining", "continued": "continued pretraining", "weights": "starting from your weights"}
    return short.get(arm, plain(arms[arm]))


def score_sections(
    tables: Mapping[Metric, Scores],
    compared: Mapping[Metric, Differences],
    arms: Mapping[str, str],
    places: Mapping[float, int],
    seeds: Sequence[int],
) -> list[Section]:
    """Show curves, differences and scores of all metrics."""
    headings = _headings(places)
    curves = [score_curve(tables[metric], arms, places, metric, RANDOM_ARMS) for metric in compared]
    scores = [score_table(found, arms, headings, seeds, metric) for metric, found in tables.items()]
    plots, lists = list[PageBlock](), list[PageBlock]()
    for metric, found in compared.items():
        named = {f"{arms[arm]} \N{MINUS SIGN} {arms[control]}": own for (arm, control), own in found.items()}
        drawn = {
            words: own for (words, own), pair in zip(named.items(), found, strict=True) if pair[1] != MINOR_CONTROL
        }
        if any(own[share].mean for own in drawn.values() for share in places):
            plots.append(difference_curve(drawn, places, metric))
        if named:
            lists.append(difference_table(named, headings, metric))
    text = "Runs with the same seed share their labelled images and random numbers, so they are good or bad together."
    if count_intervals(compared):
        text += " That is why a difference can be clear although the intervals of the two curves overlap."
    differences = [Section("Differences", text, [*plots, *lists])] if lists else []
    return [Section("Curves", "", curves), *differences, Section("Scores", "", scores)]


def cost_section(
    rows: Sequence[Row], tables: Mapping[Metric, Scores], arms: Mapping[str, str], places: Mapping[float, int]
) -> Section:
    """Show the costs of all arms, with and without the pretraining."""
    text = (
        "CPU time is the time of all processor cores together. Weights can be used again, for other labels and other "
        "models. Then the pretraining counts once."
    )
    if LONGER in arms:
        text += (
            f" Equal total compute: {plain(arms[LONGER])} have about the cost of own pretraining and fine-tuning "
            "together."
        )
    metric, scores = next(iter(tables.items()))
    table = cost_table(rows, scores, arms, _headings(places), SCORED_KINDS, metric, ("weights", "continued"), ("own",))
    return Section("Cost", text, [table])


def missing_section(
    tables: Mapping[Metric, Scores],
    arms: Mapping[str, str],
    places: Mapping[float, int],
    seeds: Sequence[int],
    failed: Mapping[str, str],
) -> Section:
    """List runs of the grid without a result, and cells that failed."""
    lost = missing_runs(next(iter(tables.values()), {}), list(arms), list(places), seeds)
    count = len(arms) * len(places) * len(seeds)
    text = f"All {counted(count, 'run')} of the grid are there." if count else "No run has finished."
    blocks: list[PageBlock] = []
    if lost:
        text = f"{len(lost)} of {counted(count, 'run')} of the grid have no result."
        table = [[arms[arm], f"{places[share]:,}", str(seed)] for arm, share, seed in lost]
        blocks.append(Table(["start of the encoder", "labelled images", "seed"], table, "Runs without a result."))
    if failed:
        text += f" {counted(len(failed), 'cell')} failed."
        blocks.append(Words([(printable(cell), printable(reason)) for cell, reason in failed.items()]))
    return Section("Missing runs", text, blocks)


def limit_section(arms: Mapping[str, str], seeds: int, own: Sequence[tuple[str, str]], has_intervals: bool) -> Section:
    """State the questions that the page does not answer."""
    limits = [*own, *(OF_INTERVALS if has_intervals else WITHOUT_INTERVALS), *UNANSWERED]
    limits += [FEW_SEEDS] if has_intervals and seeds <= 3 else []
    return Section("What this page cannot tell", "", [Words(limits if LONGER in arms else [*limits, NO_EQUAL_COMPUTE])])


def run_section(rows: Sequence[Row], metrics: Sequence[Metric]) -> Section:
    """List all runs, with their commands behind a click."""
    commands = [
        (f"{row.cell}, step {number}" if len(row.commands) > 1 else row.cell, page.folded(command))
        for row in rows
        for number, command in enumerate(row.commands, start=1)
    ]
    blocks: list[PageBlock] = [run_table(rows, [metric for metric in metrics if metric.main])]
    if commands:
        blocks.append(Commands(commands, folded=f"Commands of all {counted(len(rows), 'run')}"))
    return Section("Runs", "Commands run in the root of the repository.", blocks)


def setting_section(settings: Mapping[str, Any]) -> Section:
    """Show what the runs have in common."""
    rows = [[printable(name), page.short_value(value)] for name, value in settings.items()]
    return Section("Settings", "", [Table(["setting", "value"], rows)])


def environment_of(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """Describe the machines of the rows, and the page's versions."""
    machines = list(dict.fromkeys(tuple(sorted((key, str(value)) for key, value in row.machine.items() if value))
                                  for row in rows if row.machine))  # fmt: skip
    found = []
    for number, machine in enumerate(machines, start=1):
        name = "Machine" if len(machines) == 1 else f"Machine {number}"
        found.append((name, ", ".join(f"{key} {value}" for key, value in machine)))
    packages = ", ".join(f"{name} {version}" for name, version in versions().items())
    return [*found, ("This page", packages)]
