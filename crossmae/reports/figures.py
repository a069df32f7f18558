"""Figures: how a matplotlib figure is saved."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure

from crossmae.files import write_atomically

DPI = 120


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure as PNG, at its own resolution and atomically."""
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png", dpi=DPI))
