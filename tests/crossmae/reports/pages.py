"""What tests of pages share: plots that draw nothing, and the blocks of a page."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from markupsafe import Markup

from crossmae.reports import figures
from crossmae.reports.figures import line_plot
from crossmae.reports.page import Plot, Report, Table

EVIL = """--> <script>alert("1")</script> & 'quoted' </style>"""


def plot(title: str = "Loss", points: int = 3) -> Plot:
    """Draw curves whose labels hold markup."""
    curves = {f"{title} again": (range(points), np.linspace(3, 1, points)), EVIL: ([0, 1], [2, 1])}
    return line_plot(curves, title=title, x_label=EVIL, y_label="loss", caption=EVIL)


def draw_no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep what a plot is given, as JSON: a real figure takes half a second."""

    def plot(curves: Mapping[str, Sequence[Any]], *, title: str, caption: str, **_: Any) -> Plot:
        return Plot(Markup(json.dumps({label: [list(x), list(y)] for label, (x, y) in curves.items()})), title, caption)

    monkeypatch.setattr(figures, "line_plot", plot)


def blocks_in(report: Report, kind: type) -> list[Any]:
    """List the blocks of one kind on a page."""
    return [block for section in report.sections for block in section.blocks if isinstance(block, kind)]


def cells(table: Table) -> list[list[str]]:
    """Read the texts of a table, spaces made plain."""
    texts = [[getattr(cell, "text", cell) for cell in row] for row in table.rows]
    return [[text.replace("\N{NO-BREAK SPACE}", " ") for text in row] for row in texts]
