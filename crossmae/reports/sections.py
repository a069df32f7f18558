"""Page parts that reports on different kinds of runs share."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from crossmae.errors import advise, counted
from crossmae.files import leaves
from crossmae.reports import page
from crossmae.reports.figures import PlotKeys, curve_plots
from crossmae.reports.page import Commands, Gallery, Missing, PageBlock, PictureRow, Section, Table, TableRow
from crossmae.reports.run_folder import LoggedNumbers, RunFolder

MOST_CLASSES = 50  # largest number of rows in one table


def lead(found: str, unfinished: str) -> str:
    """Write the first lines of a page: the result and the progress."""
    state = f"The training continues, or was cut off, after {unfinished}. " if unfinished else ""
    return f"{found}{state}Everything here is from files in the run's folder, named as they are there."


def collapse(sections: Sequence[Section], title: str, text: str) -> Sequence[Section]:
    """Merge the sections into one if all their blocks are missing."""
    blocks = [block for section in sections for block in section.blocks]
    return [Section(title, text, blocks)] if all(isinstance(block, Missing) for block in blocks) else sections


def gallery(rows: Sequence[PictureRow | Missing], min_width: int, caption: str = "") -> list[PageBlock]:
    """Put picture rows into one gallery, followed by notices of missing pictures."""
    found = [row for row in rows if isinstance(row, PictureRow)]
    missing = [row for row in rows if isinstance(row, Missing)]
    return [*([Gallery(found, min_width, caption)] if found else []), *missing]


def class_tables(
    classes: Sequence[tuple[float | None, TableRow]],
    columns: Sequence[str],
    captions: Sequence[str],
    source: str,
    *,
    worst_first: bool,
) -> list[PageBlock]:
    """Rank all classes, or the best and the worst of many classes.

    Args:
        classes: for each class, the score for the ranking (None if undefined) and the row of the table.
        captions: captions for the table of all classes, the first of two tables, and the second of two tables.
        source: the file that contains all classes.
        worst_first: start with the lowest score; the second table then starts with the highest score.
    """
    scored = [(score, row) for score, row in classes if score is not None]
    ranked = [row for _, row in sorted(scored, key=lambda one: one[0], reverse=not worst_first)]
    if len(classes) <= MOST_CLASSES:
        return [Table(columns, [*ranked, *(row for score, row in classes if score is None)], captions[0])]
    half, count = MOST_CLASSES // 2, len(classes)
    first, last = ranked[:half], ranked[half:][-half:]
    others = f"{source} has the other {count - len(first) - len(last)} of {count} classes."
    second = Table(columns, last[::-1] if worst_first else last, f"{captions[2]} {others}")
    return [Table(columns, first, captions[1]), second]


def training_section(run: RunFolder, log: LoggedNumbers, name: str, x: str, plots: PlotKeys, text: str) -> Section:
    """Plot the log file `name` of a training over `x`."""
    if not log.rows:
        return Section("Training", "", [run.missing(name, "curves of the training", "no line of it can be read")])
    if log.damaged:
        text += f" Left out: {counted(log.damaged, 'damaged line')} of {name}."
    return Section("Training", text, curve_plots(log.rows, Path(name), x, plots))


def commands(words: Mapping[str, Sequence[str]]) -> Commands:
    """Show commands, each a script of tools/ with its arguments, by heading."""
    lines = {title: shlex.join(["python", f"tools/{script}", *rest]) for title, (script, *rest) in words.items()}
    return Commands([(title, page.folded(advise(line))) for title, line in lines.items()])


def changed_settings(content: Mapping[str, Any], defaults: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """List key, value and default of settings that differ from the defaults."""
    found = leaves(content).items()
    return [(key, value, defaults.get(key)) for key, value in found if key not in defaults or defaults[key] != value]


def settings_section(
    run: RunFolder, name: str, empty: bool, changed: Sequence[tuple[str, Any, Any]], whose: str
) -> Section:
    """Show the changed settings of a file, or that it is `empty`."""
    rows = [[key, page.short_value(value), page.short_value(default)] for key, value, default in changed]
    table = Table(["setting", "value", "default"], rows)
    block = run.missing(name, "settings", "the file is empty") if empty else table
    return Section("Settings", f"What differs from the defaults of {whose}; {name} has all settings.", [block])


def path_end(path: object) -> str:
    """Shorten a path to its last two parts."""
    return "/".join(Path(str(path)).parts[-2:])
