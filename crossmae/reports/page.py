"""Self-contained report pages: one HTML file with its styles, figures and images.

A page is data: a `Report` of `Section`s of blocks, rendered through `templates/report.html.j2`. The template escapes
every string except the SVG of `crossmae.reports.figures.line_plot`. A content security policy in the page forbids the
browser to load anything.
"""

from __future__ import annotations

import base64
import io
import math
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from numpy.typing import NDArray
from PIL import Image

from crossmae.files import write_text

LONGEST_VALUE = 60  # characters of a setting in a table
LONGEST_COMMAND = 100  # characters of a command on one line
PERCENT = "\N{NO-BREAK SPACE}%"


@dataclass(frozen=True)
class Fact:
    """A headline number: its label, its value with unit, and a remark."""

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
    """Pictures side by side, above one caption."""

    pictures: Sequence[Picture]
    caption: str = ""


@dataclass(frozen=True)
class Bar:
    """A table cell with a bar of a share between 0 and 1 behind its text."""

    text: str
    share: float


TableRow = Sequence[str | Bar]  # of a table


class PageBlock:
    """Base of what a section shows below its text."""

    @property
    def kind(self) -> str:
        """The block's name in the template."""
        return type(self).__name__.lower()


@dataclass(frozen=True)
class Gallery(PageBlock):
    """Picture rows, as many side by side as fit when each is at least `min_width` CSS pixels wide."""

    rows: Sequence[PictureRow]
    min_width: int = 420
    caption: str = ""


@dataclass(frozen=True)
class Plot(PageBlock):
    """A figure as inline SVG with a caption."""

    svg: Markup
    title: str
    caption: str


@dataclass(frozen=True)
class Table(PageBlock):
    """A table whose first column is text and whose other columns are formatted numbers."""

    columns: Sequence[str]
    rows: Sequence[TableRow]
    caption: str = ""
    footer: Sequence[str] = ()


@dataclass(frozen=True)
class Commands(PageBlock):
    """Commands to copy, each with a heading."""

    commands: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Missing(PageBlock):
    """A notice in place of a block: which file is missing or damaged."""

    path: Path
    what: str
    why: str = "the file does not exist"


@dataclass(frozen=True)
class Section:
    """A headed part of the page: a text, then blocks."""

    title: str
    text: str = ""
    blocks: Sequence[PageBlock] = ()

    @property
    def anchor(self) -> str:
        """The section's id within the page."""
        return re.sub(r"[^a-z0-9]+", "-", self.title.lower()).strip("-")


@dataclass(frozen=True)
class Report:
    """A page, whose `environment` lists (name, value) at its end."""

    title: str
    lead: str
    facts: Sequence[Fact] = ()
    sections: Sequence[Section] = ()
    environment: Sequence[tuple[str, str]] = ()
    created: datetime = field(default_factory=lambda: datetime.now(timezone.utc))

    def to_html(self) -> str:
        """Render the page."""
        environment = Environment(
            loader=PackageLoader("crossmae.reports"),
            autoescape=True,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        return environment.get_template("report.html.j2").render(report=self, groups=_side_by_side)

    def write(self, path: Path) -> Path:
        """Write the page atomically into an existing folder, and return its path."""
        write_text(path, self.to_html())
        return path


def _side_by_side(blocks: Sequence[PageBlock]) -> list[list[PageBlock]]:
    """Group neighbouring plots, which stand side by side on a wide page."""
    groups: list[list[PageBlock]] = []
    for block in blocks:
        if groups and isinstance(block, Plot) and isinstance(groups[-1][0], Plot):
            groups[-1].append(block)
        else:
            groups.append([block])
    return groups


def embed_image(
    image: NDArray[np.uint8] | Image.Image, *, alt: str, label: str = "", density: float = 1.0, lossless: bool = False
) -> Picture:
    """Encode an RGB image as a picture inside the page.

    Args:
        image: (H, W, 3) uint8 RGB, or a PIL image.
        density: image pixels per CSS pixel; 2 is crisp on high-resolution screens.
        lossless: PNG, for drawings and text; else JPEG, with full colour resolution for thin coloured lines.
    """
    picture = (Image.fromarray(image) if isinstance(image, np.ndarray) else image).convert("RGB")
    buffer, kind = io.BytesIO(), "png" if lossless else "jpeg"
    picture.save(buffer, kind, optimize=True, **({} if lossless else {"quality": 86, "subsampling": 0}))
    source = f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"
    return Picture(source, round(picture.width / density), round(picture.height / density), alt, label)


def counted(number: int, noun: str, plural: str = "") -> str:
    """Write a count with its noun: "1 image", "1,600 images"."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


def percent(share: float | None, digits: int = 1, unit: str = PERCENT) -> str:
    """Write a share of 1 in percent, or a dash if undefined."""
    return "-" if share is None or math.isnan(share) else f"{100 * share:.{digits}f}{unit}"


def bar(share: float | None, digits: int = 1, unit: str = PERCENT) -> Bar:
    """Make a cell of a share of 1, in percent."""
    filled = 0.0 if share is None or math.isnan(share) else min(max(share, 0.0), 1.0)
    return Bar(percent(share, digits, unit), filled)


def folded(command: str) -> str:
    """Break a long shell command into pasteable lines of one option each."""
    if len(command) <= LONGEST_COMMAND:
        return command
    lines: list[list[str]] = [[]]
    for word in shlex.split(command):
        if word.startswith("--") or "=" in word:
            lines.append([])
        lines[-1].append(word)
    return " \\\n  ".join(shlex.join(line) for line in lines)


def short_value(value: Any) -> str:
    """Write a setting as text that fits into a table."""
    text = "-" if value is None else str(value) or repr(value)
    return text if len(text) <= LONGEST_VALUE else f"{text[: LONGEST_VALUE - 1]}…"


def format_seconds(seconds: float) -> str:
    """Format a duration such as "0.4 s" or "3 min 05 s"."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def format_bytes(count: float) -> str:
    """Write a size in memory for people: "12 MiB", "1.84 GiB"."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"
