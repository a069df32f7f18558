"""Self-contained report pages: one HTML file with its styles, figures and images inside.

A page is data: a `Report` of `Section`s of blocks (`Plot`, `Gallery`, `Table`, `Commands`, `Missing`),
rendered through `templates/report.html.j2`. The template escapes every string; the one exception is the SVG
that `line_plot` makes. A content security policy in the page forbids the browser to load anything, so that
"self-contained" is enforced.
"""

from __future__ import annotations

import base64
import io
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape
from numpy.typing import NDArray
from PIL import Image

from crossmae.files import write_text

# Colours that no figure would use by accident; in the SVG each becomes a CSS variable, so that figures follow
# the reader's light or dark mode like the rest of the page.
_SERIES = ("#01fe01", "#01fe02", "#01fe03", "#01fe04", "#01fe05", "#01fe06")
_CSS_COLORS = {color: f"var(--series-{i})" for i, color in enumerate(_SERIES, start=1)}
_CSS_COLORS |= {"#01fe11": "var(--muted)", "#01fe12": "var(--line)"}
_TEXT, _GRID = "#01fe11", "#01fe12"
_SIZE_INCHES = (4.6, 2.9)  # small on purpose: the labels stay readable when a phone scales the figure down
LONGEST_VALUE = 60  # characters of a setting in a table
SMOOTH_FROM = 40  # points; shorter curves are shown as they are


# --- What a page is made of -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fact:
    """One headline number: what it is, its value with unit, and a remark."""

    label: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Picture:
    """An image as data URI, with its size in CSS pixels and a short label shown on it."""

    source: str
    width: int
    height: int
    alt: str
    label: str = ""


@dataclass(frozen=True)
class PictureRow:
    """Pictures that belong together, side by side, above one caption."""

    pictures: Sequence[Picture]
    caption: str = ""


@dataclass(frozen=True)
class Gallery:
    """Rows of pictures; as many side by side as fit when each is at least `min_width` CSS pixels wide."""

    rows: Sequence[PictureRow]
    min_width: int = 420
    caption: str = ""
    kind: ClassVar[str] = "gallery"


@dataclass(frozen=True)
class Plot:
    """A figure as inline SVG, and its caption; neighbouring plots stand side by side on a wide page."""

    svg: Markup
    title: str
    caption: str
    kind: ClassVar[str] = "plot"


@dataclass(frozen=True)
class Bar:
    """A table cell with a bar behind its text; `share` between 0 and 1."""

    text: str
    share: float


@dataclass(frozen=True)
class Table:
    """A table whose first column is text and whose other columns are numbers, already formatted."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str | Bar]]
    caption: str = ""
    footer: Sequence[str] = ()
    kind: ClassVar[str] = "table"


@dataclass(frozen=True)
class Commands:
    """Commands to copy, each with a heading."""

    commands: Sequence[tuple[str, str]]
    kind: ClassVar[str] = "commands"


@dataclass(frozen=True)
class Missing:
    """Says in place of a figure which file it would have been made from, instead of leaving it out."""

    path: Path
    what: str
    why: str = "the file does not exist"
    kind: ClassVar[str] = "missing"


Block = Plot | Gallery | Table | Commands | Missing


@dataclass(frozen=True)
class Section:
    """A headed part of the page: an introduction, then blocks."""

    title: str
    text: str = ""
    blocks: Sequence[Block] = ()

    @property
    def anchor(self) -> str:
        """The section's id within the page."""
        return re.sub(r"[^a-z0-9]+", "-", self.title.lower()).strip("-")


@dataclass(frozen=True)
class Report:
    """A page. `environment` is a list of (name, value) shown at its end."""

    title: str
    lead: str
    facts: Sequence[Fact] = ()
    sections: Sequence[Section] = ()
    environment: Sequence[tuple[str, str]] = ()
    created: datetime = field(default_factory=lambda: datetime.now(timezone.utc))

    def to_html(self) -> str:
        """The page as text.

        Raises:
            jinja2.UndefinedError: the template uses what the page does not have (a mistake in this package).
        """
        environment = Environment(
            loader=PackageLoader("crossmae.reports"),
            autoescape=True,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        return environment.get_template("report.html.j2").render(report=self, groups=_side_by_side)

    def write(self, path: Path) -> None:
        """Write the page to `path`, whole or not at all; its folder must exist."""
        write_text(path, self.to_html())


def _side_by_side(blocks: Sequence[Block]) -> list[list[Block]]:
    """Blocks in groups: plots that follow each other form one group, every other block one of its own."""
    groups: list[list[Block]] = []
    for block in blocks:
        if groups and block.kind == "plot" and groups[-1][-1].kind == "plot":
            groups[-1].append(block)
        else:
            groups.append([block])
    return groups


# --- Images -----------------------------------------------------------------------------------------------


def embed_image(
    image: NDArray[np.uint8] | Image.Image,
    *,
    alt: str,
    label: str = "",
    density: float = 1.0,
    lossless: bool = False,
) -> Picture:
    """An RGB image as a picture inside the page.

    Args:
        image: (H, W, 3) uint8 RGB, or a PIL image.
        density: image pixels per CSS pixel; 2 makes the picture crisp on high-resolution screens.
        lossless: PNG, for drawings and text; else JPEG, with full colour resolution for thin coloured lines.
    """
    picture = (Image.fromarray(image) if isinstance(image, np.ndarray) else image).convert("RGB")
    buffer = io.BytesIO()
    if lossless:
        picture.save(buffer, format="PNG", optimize=True)
    else:
        picture.save(buffer, format="JPEG", quality=86, subsampling=0, optimize=True)
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    source = f"data:image/{'png' if lossless else 'jpeg'};base64,{data}"
    return Picture(source, round(picture.width / density), round(picture.height / density), alt, label)


# --- Curves -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Series:
    """One curve: equally long x and y; y may hold NaN, which leaves a gap."""

    label: str
    x: Sequence[float]
    y: Sequence[float]


def line_plot(
    series: Sequence[Series], *, title: str, x_label: str, y_label: str, caption: str, log_y: bool = False
) -> Plot:
    """Curves over one pair of axes; a long one faintly, under its running mean over 5 % of its points.

    Raises:
        ValueError: no series, more than six, or x and y of unequal length.
    """
    _check_series(series)
    # Imported here: half a second that `make demo` need not spend when all is done.
    import matplotlib as mpl
    from matplotlib.figure import Figure

    style: Any = {
        "svg.fonttype": "none",  # text stays text: selectable, and in the page's own font
        "svg.hashsalt": title,  # the same figure gives the same bytes
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.spines.left": False,
    }
    style |= dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color", "axes.edgecolor"), _TEXT)
    buffer = io.StringIO()
    with mpl.rc_context(style):
        figure = Figure(figsize=_SIZE_INCHES, layout="constrained")
        _draw_curves(figure, series, log_y)
        axes = figure.axes[0]
        axes.set(xlabel=x_label, ylabel=y_label)
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return Plot(_themed_svg(buffer.getvalue(), title), title, caption)


def curve(
    rows: Sequence[Mapping[str, Any]], source: Path, x: str, keys: Mapping[str, str], title: str, y_label: str
) -> Plot | Missing:
    """A plot of logged values over steps; says so when the log has none.

    Args:
        rows: of the log.
        source: the log's file, to name.
        x: key of the steps or epochs.
        keys: labels by key of the values.
        title: of the plot; one of its own on the page.
        y_label: what the values are.
    """
    series = []
    for key, label in keys.items():
        points = [(row[x], row[key]) for row in rows if x in row and key in row]
        if points:
            series.append(Series(label, *zip(*points, strict=True)))
    if not series:
        return Missing(source, f"curve of the {y_label}", f"no line of it has {x!r} and {', '.join(map(repr, keys))}")
    count = max(len(one.x) for one in series)
    caption = f"{y_label[0].upper()}{y_label[1:]} by {x}, {counted(count, 'logged value')}."
    if count >= SMOOTH_FROM:
        caption += " Faint: as logged; strong: running mean over 5 % of the values."
    return line_plot(series, title=title, x_label=x, y_label=y_label, caption=caption)


def _check_series(series: Sequence[Series]) -> None:
    if not 1 <= len(series) <= len(_SERIES):
        raise ValueError(f"series: expected 1 to {len(_SERIES)} curves, received {len(series)}")
    for curve in series:
        if len(curve.x) != len(curve.y):
            raise ValueError(f"series {curve.label!r}: {len(curve.x)} values of x but {len(curve.y)} of y")


def _draw_curves(figure: Any, series: Sequence[Series], log_y: bool) -> None:
    """Draw every series into new axes of a matplotlib figure."""
    axes = figure.add_subplot()
    axes.grid(axis="y", color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(length=0)
    if log_y:
        axes.set_yscale("log")
    for curve, color in zip(series, _SERIES, strict=False):
        y = np.asarray(curve.y, dtype=np.float64)
        if len(y) >= SMOOTH_FROM:
            axes.plot(curve.x, y, color=color, linewidth=0.8, alpha=0.3)
            y = running_mean(y, width=max(3, len(y) // 20))
        axes.plot(curve.x, y, color=color, linewidth=1.8, label=curve.label, marker="o" if len(y) == 1 else None)
    if len(series) > 1:
        axes.legend(frameon=False, fontsize=8)


def running_mean(values: NDArray[np.float64], width: int) -> NDArray[np.float64]:
    """The mean over a centred window of `width` values, (n,) -> (n,); fewer at both ends, NaN left out."""
    half = width // 2
    return np.array([_mean_or_nan(values[max(0, i - half) : i + half + 1]) for i in range(len(values))])


def _mean_or_nan(values: NDArray[np.float64]) -> float:
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if finite.size else float("nan")


def _themed_svg(svg: str, title: str) -> Markup:
    """Matplotlib's SVG made fit for a page: theme colours, unique ids, fluid size, accessible name."""
    svg = svg[svg.index("<svg") :]
    for color, variable in _CSS_COLORS.items():
        svg = svg.replace(color, variable)
    prefix = re.sub(r"\W+", "-", title.lower())
    svg = re.sub(r'\bid="', f'id="{prefix}-', svg)
    svg = re.sub(r'(url\(|href=")#', rf"\g<1>#{prefix}-", svg)
    svg = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", svg)
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    head = f'<svg role="img" aria-label="{escape(title)}"'
    return Markup(re.sub(r'<svg[^>]*? (viewBox="[^"]*")[^>]*>', rf"{head} \1>", svg, count=1))


# --- Words -----------------------------------------------------------------------------------------------


def counted(number: int, noun: str, plural: str = "") -> str:
    """ "1 image", "1,600 images"."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


def folded(command: str) -> str:
    """A long shell command over several lines, one option or `key=value` each; it can be pasted as it is."""
    if len(command) <= 100:
        return command
    lines: list[list[str]] = [[]]
    for word in shlex.split(command):
        if word.startswith("--") or "=" in word:
            lines.append([])
        lines[-1].append(word)
    return " \\\n  ".join(shlex.join(line) for line in lines)


def leaves(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Values by dotted key; tuples as lists."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            found |= leaves(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = list(value) if isinstance(value, tuple) else value
    return found


def short_value(value: Any) -> str:
    """A setting as text that fits into a table."""
    text = "-" if value is None else str(value) or repr(value)
    return text if len(text) <= LONGEST_VALUE else f"{text[: LONGEST_VALUE - 1]}…"


def format_seconds(seconds: float) -> str:
    """A duration for people: "0.4 s", "12 s", "3 min 05 s", "2 h 10 min"."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def format_bytes(count: float) -> str:
    """A size in memory for people: "12 MiB", "1.84 GiB"."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"
