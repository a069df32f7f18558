"""Self-contained report pages: one HTML file with its styles, figures and images.

A page is described by data: a `Report` has `Section`s, and a section has blocks. The template
`templates/report.html.j2` escapes every string except the SVG of `crossmae.reports.figures.line_plot`. A content
security policy in the page stops the browser from loading any other file.
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

from crossmae.errors import printable
from crossmae.files import write_text

LONGEST_VALUE = 60  # characters of a setting in a table
LONGEST_COMMAND = 100  # characters of a command on one line
PERCENT = "\N{NO-BREAK SPACE}%"


@dataclass(frozen=True)
class Fact:
    """A headline number: label, value with unit, and an optional note."""

    label: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Picture:
    """An image as data URI, with its size in CSS pixels."""

    source: str
    width: int
    height: int
    alt: str


@dataclass(frozen=True)
class PictureRow:
    """Pictures side by side, above one caption."""

    pictures: Sequence[Picture]
    caption: str = ""


@dataclass(frozen=True)
class Bar:
    """A table cell with text in front of a bar. The length of the bar is a share between 0 and 1."""

    text: str
    share: float


TableRow = Sequence[str | Bar]  # cells of one row


class PageBlock:
    """Base class of the blocks below the text of a section."""

    @property
    def kind(self) -> str:
        """Name of the block in the template."""
        return type(self).__name__.lower()


@dataclass(frozen=True)
class Gallery(PageBlock):
    """Picture rows. Rows stand side by side if each is at least `min_width` CSS pixels wide."""

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
    """A table with text in the first column, which can `wrap`, and formatted numbers in the other columns.

    With `prose`, every column has text that wraps.
    """

    columns: Sequence[str]
    rows: Sequence[TableRow]
    caption: str = ""
    footer: Sequence[str] = ()
    wrap: bool = False
    prose: bool = False


@dataclass(frozen=True)
class Words(PageBlock):
    """Paragraphs, each with a heading or "". Conclusions are large."""

    paragraphs: Sequence[tuple[str, str]]
    large: bool = False


@dataclass(frozen=True)
class Commands(PageBlock):
    """Commands to copy, each with a heading. With the text `folded`, a click on the text shows them."""

    commands: Sequence[tuple[str, str]]
    folded: str = ""


@dataclass(frozen=True)
class Missing(PageBlock):
    """A notice in place of a block. The notice names the missing or damaged file."""

    path: Path
    what: str
    why: str = "the file does not exist"


@dataclass(frozen=True)
class Section:
    """A part of the page: title, text, then blocks."""

    title: str
    text: str = ""
    blocks: Sequence[PageBlock] = ()

    @property
    def anchor(self) -> str:
        """HTML id of the section."""
        return re.sub(r"[^a-z0-9]+", "-", self.title.lower()).strip("-")


@dataclass(frozen=True)
class Report:
    """HTML report page.

    Attributes:
        environment: (name, value) pairs, shown at the end of the page.
        answer: conclusion in large words, above the lead.
    """

    title: str
    lead: str
    facts: Sequence[Fact] = ()
    sections: Sequence[Section] = ()
    environment: Sequence[tuple[str, str]] = ()
    created: datetime = field(default_factory=lambda: datetime.now(timezone.utc))
    answer: str = ""

    def to_html(self) -> str:
        """Render the page as HTML."""
        environment = Environment(
            loader=PackageLoader("crossmae.reports"),
            autoescape=True,
            finalize=_shown,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        return environment.get_template("report.html.j2").render(report=self, groups=_side_by_side)

    def write(self, path: Path) -> Path:
        """Write the page atomically into an existing folder, and return `path`."""
        write_text(path, self.to_html())
        return path


def _shown(value: Any) -> Any:
    """Escape names in a text, but keep its own line breaks."""
    if not isinstance(value, str) or isinstance(value, Markup) or value.isprintable():
        return value
    return "".join(letter if letter in "\n\N{NO-BREAK SPACE}" else printable(letter) for letter in value)


def _side_by_side(blocks: Sequence[PageBlock]) -> list[list[PageBlock]]:
    """Group adjacent plots, which are side by side on a wide page."""
    groups: list[list[PageBlock]] = []
    for block in blocks:
        if groups and isinstance(block, Plot) and isinstance(groups[-1][0], Plot):
            groups[-1].append(block)
        else:
            groups.append([block])
    return groups


def embed_image(
    image: NDArray[np.uint8] | Image.Image, *, alt: str, density: float = 1.0, lossless: bool = False
) -> Picture:
    """Encode an RGB image as a picture inside the page.

    Args:
        image: (H, W, 3) uint8 RGB, or a PIL image.
        density: image pixels per CSS pixel; 2 is sharp on high-resolution screens.
        lossless: true: PNG, for drawings and text. False: JPEG, with full colour resolution for thin coloured lines.
    """
    picture = (Image.fromarray(image) if isinstance(image, np.ndarray) else image).convert("RGB")
    buffer, kind = io.BytesIO(), "png" if lossless else "jpeg"
    picture.save(buffer, kind, **({} if lossless else {"quality": 86, "subsampling": 0, "optimize": True}))
    source = f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"
    return Picture(source, round(picture.width / density), round(picture.height / density), alt)


def percent(share: float | None, digits: int = 1, unit: str = PERCENT) -> str:
    """Format a share as percent, or as a dash if undefined."""
    return "-" if share is None or math.isnan(share) else f"{100 * share:.{digits}f}{unit}"


def bar(share: float | None, digits: int = 1, unit: str = PERCENT) -> Bar:
    """Make a table cell with a share as percent and bar."""
    filled = 0.0 if share is None or math.isnan(share) else min(max(share, 0.0), 1.0)
    return Bar(percent(share, digits, unit), filled)


def folded(command: str) -> str:
    """Break a long shell command before each option or `key=value` word."""
    if len(command) <= LONGEST_COMMAND:
        return command
    lines: list[list[str]] = [[]]
    for word in shlex.split(command):
        if word.startswith("--") or "=" in word:
            lines.append([])
        lines[-1].append(word)
    return " \\\n  ".join(shlex.join(line) for line in lines)


def short_value(value: Any) -> str:
    """Format a setting as text that fits into a table."""
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
    """Format a memory size: "12 MiB", "1.84 GiB"."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"
