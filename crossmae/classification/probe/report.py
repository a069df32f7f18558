"""Results of a probe of frozen features: a table for the terminal, and a report page."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from crossmae.reports.figures import line_plot
from crossmae.reports.page import Bar, Fact, PageBlock, Report, Section, Table, TableRow, bar, format_seconds

TITLES = {"knn": "Nearest neighbours", "linear": "Linear probe", "logistic": "Logistic regression",
          "few_shot": "Few images per class"}  # fmt: skip
LINEAR_NOTE = (
    "LARS as published, on the features of one central view of every image. The published protocol draws new random "
    "crops in every epoch, which gives other, usually higher numbers: crossmae finetune with the recipe "
    "finetune/linear_probe_vitb does that."
)
REACH = (
    "LARS moves weights by a fixed share of their norm, so the head stays close to where it started. Raise "
    "linear.epochs or linear.base_lr, or use logistic regression"
)


class Score(NamedTuple):
    """Accuracy of one method of TITLES, with its 95% interval as text."""

    method: str
    setting: str
    accuracy: float
    interval: str


def scores(methods: Mapping[str, Any]) -> list[Score]:
    """List the most important scores, by method."""
    found: list[Score] = []

    def add(method: str, setting: str, numbers: Mapping[str, Any]) -> None:
        accuracy = numbers.get("accuracy", numbers.get("mean"))
        found.append(Score(method, setting, accuracy, _interval(numbers)))

    if knn := methods.get("knn"):
        for name, words in (("chosen", "chosen on training images"), ("default", "as in pretraining's probe")):
            if cell := knn[name]:
                add("knn", f"{_pair(cell)}, {words}", cell["val"])
    if one := methods.get("linear"):
        runs = one["runs"]
        seeds = f"seed {runs[0]['seed']}" if len(runs) == 1 else f"mean of {len(runs)} seeds"
        trust = "" if one["reach"] >= 1 else "; too few steps, not to be trusted"
        add("linear", f"BatchNorm and LARS, {seeds}{trust}", runs[0]["val"] if len(runs) == 1 else one["mean"])
    if one := methods.get("logistic"):
        state = "" if one["converged"] else ", not converged"
        add("logistic", f"L-BFGS, C {one['strength']:g}{state}", one["val"])
    for shots in methods.get("few_shot", {}).get("shots", []):
        single = len(shots["accuracies"]) == 1
        seeds = "one seed" if single else f"mean of {shots['mean']['runs']} seeds"
        numbers = shots["accuracies"][0] if single else shots["mean"]
        add("few_shot", f"{shots['per_class']} per class, {seeds}", numbers)
    return found


def _pair(cell: Mapping[str, Any]) -> str:
    return f"k {cell['k']}, temperature {cell['temperature']:g}"


def _interval(numbers: Mapping[str, Any]) -> str:
    """Format an interval in percent: "97.10 - 98.00"."""
    low, high = numbers["low"], numbers["high"]
    return "-" if low is None or high is None else f"{100 * low:.2f} - {100 * high:.2f}"


def _bar(accuracy: float) -> Bar:
    return bar(accuracy, digits=2, unit="")


def table(results: Mapping[str, Any]) -> str:
    """Format the most important scores as a text table, in percent."""
    rows = [("method", "setting", "top-1 %", "95 % interval")]
    rows += [(TITLES[x.method], x.setting, f"{100 * x.accuracy:.2f}", x.interval) for x in scores(results["methods"])]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    layout = "{:%d}  {:%d}  {:>%d}  {:>%d}" % tuple(widths)  # noqa: UP031
    footer = "intervals of means over seeds cover only the seeds, others the choice of validation images"
    left_out = [f"{sentence}." for sentence in results.get("left_out", ())]
    return "\n".join([*(layout.format(*row) for row in rows), footer, *left_out])


def build_page(results: Mapping[str, Any]) -> Report:
    """Build the page from the content of `results.json`."""
    methods = results["methods"]
    found = scores(methods)
    headlines = {one.method: one for one in reversed(found)}  # the first score of each method
    headlines |= {one.method: one for one in found if one.method == "few_shot"}  # the last: most images
    facts = [Fact(TITLES[name], f"{100 * headlines[name].accuracy:.2f} %", headlines[name].setting) for name in methods]
    builders = {"knn": _knn, "linear": _linear, "logistic": _logistic, "few_shot": _few_shot}
    text = (
        "Top-1 accuracy on validation images, in percent. The interval of a single number is Wilson's, which covers "
        "only the choice of validation images. The interval of a mean over seeds is Student's."
    )
    if left_out := results.get("left_out"):
        text += f" {'. '.join(left_out)}."
    rows: list[TableRow] = [[f"{TITLES[one.method]}: {one.setting}", _bar(one.accuracy), one.interval] for one in found]
    sections = [
        Section("Results", text, [Table(["method", "top-1", "95 % interval"], rows, "A full bar is 100.")]),
        *(build(methods[name]) for name, build in builders.items() if name in methods),
        _features(results["features"], results["weights"], results["seconds"]),
    ]
    train, val = results["data"]["train"], results["data"]["val"]
    weights = "an encoder with random weights" if results["weights"]["random"] else results["weights"]["path"]
    lead = f"Frozen features of {weights}. Trained on {train['description']}, tested on {val['description']}."
    return Report("Frozen features", lead, facts, sections, list(results["versions"].items()))


def _knn(found: Mapping[str, Any]) -> Section:
    chosen, cells = found["chosen"], found["cells"]
    text = (
        "Cosine on standardised features. Votes weigh exp(similarity / temperature). The pair of the headline is the "
        f"best on {chosen['train']['images']:,} training images, each classified by the others. Validation images do "
        "not decide, because the best score of the first table would be optimistic."
    )
    temperatures = sorted({cell["temperature"] for cell in cells})
    blocks: list[PageBlock] = []
    for name, what in (("val", "validation images"), ("train", "left-out training images")):
        accuracies = {(cell["k"], cell["temperature"]): cell[name]["accuracy"] for cell in cells}
        rows: list[TableRow] = [
            [f"k {k}", *(_bar(accuracies[k, temperature]) for temperature in temperatures)]
            for k in sorted({cell["k"] for cell in cells})
        ]
        caption = f"Top-1 in percent on {what}; chosen: {_pair(chosen)}. A full bar is 100."
        blocks.append(Table([f"on {what}", *(f"temperature {value:g}" for value in temperatures)], rows, caption))
    return Section(TITLES["knn"], text, blocks)


def _linear(found: Mapping[str, Any]) -> Section:
    rows: list[TableRow] = [
        [str(run["seed"]), _bar(run["val"]["accuracy"]), _interval(run["val"]), _bar(run["train_accuracy"])]
        for run in found["runs"]
    ]
    settings = found["settings"]
    caption = (
        f"{settings['epochs']} epochs, {settings['batch_size']} images per step, learning rate {settings['base_lr']:g} "
        f"* {settings['batch_size']} / 256, {settings['warmup_epochs']:g} epochs of warm-up; no weight decay."
    )
    text = LINEAR_NOTE if found["reach"] >= 1 else f"Too few steps to be trusted. {REACH}. {LINEAR_NOTE}"
    columns = ["seed", "top-1", "95 % interval", "on training images"]
    return Section(TITLES["linear"], text, [Table(columns, rows, caption)])


def _logistic(found: Mapping[str, Any]) -> Section:
    rows: list[TableRow] = [
        [f"{row['strength']:g}", _bar(row["held_out"]["accuracy"]), _interval(row["held_out"])]
        for row in found["table"]
    ]
    text = (
        f"L-BFGS on standardised features. C was chosen on a held-out tenth of the training images. Then "
        f"C {found['strength']:g} was fitted on all training images."
    )
    text += "" if found["converged"] else " That fit did not converge: raise logistic.max_iterations."
    text += " It is the largest C that was tried." if found["is_largest"] else ""
    return Section(TITLES["logistic"], text, [Table(["C", "top-1 held out", "95 % interval"], rows)])


def _few_shot(found: Mapping[str, Any]) -> Section:
    shots, means = found["shots"], [one["mean"] for one in found["shots"]]
    rows: list[TableRow] = []
    for one in shots:
        each = ", ".join(f"{100 * accuracy['accuracy']:.1f}" for accuracy in one["accuracies"])
        rows.append([f"{one['per_class']} per class", _bar(one["mean"]["mean"]), _interval(one["mean"]), each])
    text = (
        f"Logistic regression with C {found['strength']:g} on a few training images of every class, which the seed "
        "draws. Only these images standardise the features."
    )
    blocks: list[PageBlock] = [Table(["images", "mean top-1", "95 % interval", "of every seed"], rows)]
    if len(shots) > 1:
        labels = {"mean": "mean"}
        if all(mean["low"] is not None for mean in means):
            labels |= {"low": "95 % interval, low", "high": "95 % interval, high"}
        counts = [one["per_class"] for one in shots]
        curves = {label: (counts, [100 * mean[name] for mean in means]) for name, label in labels.items()}
        words = {"x_label": "images per class", "y_label": "top-1 in %"}
        caption = "Mean over seeds, with Student's interval."
        blocks.append(line_plot(curves, title="Top-1 by images per class", caption=caption, **words))
    return Section(TITLES["few_shot"], text, blocks)


def _features(features: Mapping[str, Any], weights: Mapping[str, Any], seconds: Mapping[str, float]) -> Section:
    views = features["views"]
    rows = [
        ["weights, SHA-256", weights["sha256"][:16]],
        ["format", weights["format"]],
        ["width of the features", str(features["width"])],
        ["image, pixels", " x ".join(map(str, views["size"]))],
        ["crop of the scaled image", f"{views['crop_pct']:g}"],
        ["encoder run in, kept in", f"{features['precision']}, {features['dtype']}"],
        *([f"time: {name}", format_seconds(duration)] for name, duration in seconds.items()),
    ]
    text = f"{'; '.join(features['notes'])}. results.json has all settings."
    return Section("Features", text, [Table(["", ""], rows)])
