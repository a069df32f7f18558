"""What an evaluation of frozen features found, for people: a table for the terminal, and a page."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from crossmae.reports.page import Bar, Block, Fact, Report, Section, Series, Table, format_seconds, line_plot

TITLES = {"knn": "Nearest neighbours", "linear": "Linear probe", "logistic": "Logistic regression",
          "few_shot": "Few images per class"}  # fmt: skip
LINEAR_NOTE = (
    "LARS as published, on the features of one central view of every image. The published protocol draws new random "
    "crops in every epoch, which gives other, usually higher numbers: tools/finetune.py with the recipe "
    "finetune/linear_probe_vitb does that."
)
REACH = (
    "LARS, which moves weights by a fixed share of their norm, leaves the head about where it started; raise "
    "linear.epochs or linear.base_lr, or go by logistic regression"
)


@dataclass(frozen=True)
class Line:
    """One accuracy with its 95% interval, if it has one; `method` is a key of TITLES."""

    method: str
    setting: str
    accuracy: float
    low: float | None
    high: float | None

    @property
    def interval(self) -> str:
        """ "97.1 - 98.0", in percent; "-" where there is none."""
        return "-" if self.low is None or self.high is None else f"{100 * self.low:.2f} - {100 * self.high:.2f}"


def lines(methods: Mapping[str, Any]) -> list[Line]:
    """The numbers that count, the first of a method its headline."""
    found: list[Line] = []
    if "knn" in methods:
        for name, words in (("chosen", "chosen on training images"), ("default", "as in pretraining's probe")):
            if cell := methods["knn"][name]:
                setting = f"k {cell['k']}, temperature {cell['temperature']:g}, {words}"
                found.append(_line("knn", setting, cell["val"]))
    if "linear" in methods:
        runs, mean = methods["linear"]["runs"], methods["linear"]["mean"]
        alone = f"BatchNorm and LARS, seed {runs[0]['seed']}"
        trust = "" if methods["linear"]["reach"] >= 1 else "; too few steps, not to be trusted"
        found.append(
            _line("linear", alone + trust, runs[0]["val"])
            if len(runs) == 1
            else _line("linear", f"BatchNorm and LARS, mean of {len(runs)} seeds{trust}", mean)
        )
    if "logistic" in methods:
        one = methods["logistic"]
        state = "" if one["converged"] else ", not converged"
        found.append(_line("logistic", f"L-BFGS, C {one['strength']:g}{state}", one["val"]))
    for shots in methods.get("few_shot", {}).get("shots", []):
        one = len(shots["accuracies"]) == 1
        setting = f"{shots['per_class']} per class, " + (
            "one seed" if one else f"mean of {shots['mean']['runs']} seeds"
        )
        found.append(_line("few_shot", setting, shots["accuracies"][0] if one else shots["mean"]))
    return found


def _line(method: str, setting: str, numbers: Mapping[str, Any]) -> Line:
    accuracy = numbers.get("accuracy", numbers.get("mean"))
    assert accuracy is not None  # of either kind, see `intervals`
    return Line(method, setting, accuracy, numbers["low"], numbers["high"])


def table(results: Mapping[str, Any]) -> str:
    """All of `lines` as text, in percent."""
    rows = [("method", "setting", "top-1 %", "95 % interval")]
    rows += [(TITLES[x.method], x.setting, f"{100 * x.accuracy:.2f}", x.interval) for x in lines(results["methods"])]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    footer = "intervals of means over seeds are of the seeds alone, others of the choice of validation images"
    shown = [
        f"{row[0]:{widths[0]}}  {row[1]:{widths[1]}}  {row[2]:>{widths[2]}}  {row[3]:>{widths[3]}}" for row in rows
    ]
    return "\n".join([*shown, footer])


def build_page(results: Mapping[str, Any]) -> Report:
    """The page of results as `results.json` has them."""
    methods = results["methods"]
    shown = lines(methods)
    headlines = {line.method: line for line in reversed(shown)}  # the first of each, but of few images the most
    headlines |= {line.method: line for line in shown if line.method == "few_shot"}
    facts = [Fact(TITLES[name], f"{100 * headlines[name].accuracy:.2f} %", headlines[name].setting) for name in methods]
    sections = [_overview(results)]
    for name, build in (("knn", _knn), ("linear", _linear), ("logistic", _logistic), ("few_shot", _few_shot)):
        if name in methods:
            sections.append(build(methods[name]))
    sections.append(_settings(results))
    train, val = results["data"]["train"], results["data"]["val"]
    weights = "an encoder with random weights" if results["weights"]["random"] else results["weights"]["path"]
    lead = f"Frozen features of {weights}: learned from on {train['description']}, classified: {val['description']}."
    return Report("Frozen features", lead, facts, sections, list(results["versions"].items()))


def _overview(results: Mapping[str, Any]) -> Section:
    rows: list[list[str | Bar]] = [
        [f"{TITLES[line.method]}: {line.setting}", _bar(line.accuracy), line.interval]
        for line in lines(results["methods"])
    ]
    text = (
        "Top-1 accuracy on validation images, in percent. The interval of a single number is Wilson's, which knows of "
        "the choice of validation images alone; that of a mean of several seeds is Student's."
    )
    return Section("Results", text, [Table(["method", "top-1", "95 % interval"], rows, "A full bar is 100.")])


def _knn(found: Mapping[str, Any]) -> Section:
    chosen = found["chosen"]
    text = (
        "Cosine on standardised features; votes weigh exp(similarity / temperature). The pair of the headline is the "
        f"best on {chosen['train']['images']:,} training images, each classified by the others: validation images have "
        "no part in the choice; the best of the first table would flatter."
    )
    return Section(
        TITLES["knn"],
        text,
        [_grid(found, "val", "validation images"), _grid(found, "train", "left-out training images")],
    )


def _grid(found: Mapping[str, Any], name: str, what: str) -> Block:
    temperatures = sorted({cell["temperature"] for cell in found["cells"]})
    rows: list[list[str | Bar]] = []
    for k in sorted({cell["k"] for cell in found["cells"]}):
        cells = {cell["temperature"]: cell[name]["accuracy"] for cell in found["cells"] if cell["k"] == k}
        rows.append([f"k {k}", *(_bar(cells[temperature]) for temperature in temperatures)])
    pair = f"k {found['chosen']['k']}, temperature {found['chosen']['temperature']:g}"
    caption = f"Top-1 in percent on {what}; chosen: {pair}. A full bar is 100."
    return Table([f"on {what}", *(f"temperature {value:g}" for value in temperatures)], rows, caption)


def _linear(found: Mapping[str, Any]) -> Section:
    rows: list[list[str | Bar]] = [
        [str(run["seed"]), _bar(run["val"]["accuracy"]), _line("linear", "", run["val"]).interval,
         _bar(run["train_accuracy"])]
        for run in found["runs"]
    ]  # fmt: skip
    settings = found["settings"]
    caption = (
        f"{settings['epochs']} epochs, {settings['batch_size']} images per step, learning rate {settings['base_lr']:g} "
        f"* {settings['batch_size']} / 256, {settings['warmup_epochs']:g} epochs of warm-up; no weight decay."
    )
    text = LINEAR_NOTE if found["reach"] >= 1 else f"Not to be trusted: with so few steps, {REACH}. {LINEAR_NOTE}"
    return Section(
        TITLES["linear"], text, [Table(["seed", "top-1", "95 % interval", "on training images"], rows, caption)]
    )


def _logistic(found: Mapping[str, Any]) -> Section:
    rows: list[list[str | Bar]] = [
        [f"{row['strength']:g}", _bar(row["held_out"]["accuracy"]), _line("logistic", "", row["held_out"]).interval]
        for row in found["table"]
    ]
    text = (
        f"L-BFGS on standardised features. C was chosen on a tenth of the training images, held out; then "
        f"C {found['strength']:g} was fitted again on all of them."
    )
    text += "" if found["converged"] else " That fit did not converge: raise logistic.max_iterations."
    text += " It is the largest C that was tried." if found["is_largest"] else ""
    return Section(TITLES["logistic"], text, [Table(["C", "top-1 held out", "95 % interval"], rows)])


def _few_shot(found: Mapping[str, Any]) -> Section:
    shots = found["shots"]
    counts = [one["per_class"] for one in shots]
    rows: list[list[str | Bar]] = [
        [f"{one['per_class']} per class", _bar(one["mean"]["mean"]), _line("few_shot", "", one["mean"]).interval,
         ", ".join(f"{100 * accuracy['accuracy']:.1f}" for accuracy in one["accuracies"])]
        for one in shots
    ]  # fmt: skip
    text = (
        f"Logistic regression with C {found['strength']:g} on a few training images of every class, other ones for "
        "every seed; features are standardised by those images alone."
    )
    blocks: list[Block] = [Table(["images", "mean top-1", "95 % interval", "of every seed"], rows)]
    if len(shots) > 1:
        curves = [Series("mean", counts, [100 * one["mean"]["mean"] for one in shots])]
        if all(one["mean"]["low"] is not None for one in shots):
            for name, label in (("low", "95 % interval, low"), ("high", "95 % interval, high")):
                curves.append(Series(label, counts, [100 * one["mean"][name] for one in shots]))
        caption = "Mean over seeds, and Student's interval of it."
        blocks.append(
            line_plot(
                curves,
                title="Top-1 by images per class",
                x_label="images per class",
                y_label="top-1 in %",
                caption=caption,
            )
        )
    return Section(TITLES["few_shot"], text, blocks)


def _settings(results: Mapping[str, Any]) -> Section:
    features, weights = results["features"], results["weights"]
    views = features["views"]
    rows: list[list[str | Bar]] = [
        ["weights, SHA-256", weights["sha256"][:16]],
        ["format", weights["format"]],
        ["width of the features", str(features["width"])],
        ["image, pixels", " x ".join(map(str, views["size"]))],
        ["crop of the scaled image", f"{views['crop_pct']:g}"],
        ["encoder run in, kept in", f"{features['precision']}, {features['dtype']}"],
    ]
    rows += [[f"time: {name}", format_seconds(seconds)] for name, seconds in results["seconds"].items()]
    text = f"{'; '.join(features['notes'])}. results.json has all settings."
    return Section("Features", text, [Table(["", ""], rows)])


def _bar(accuracy: float) -> Bar:
    return Bar(f"{100 * accuracy:.2f}", accuracy)
