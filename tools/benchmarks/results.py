"""Tables, JSON and picture of benchmarks, and the description of the machine."""

from __future__ import annotations

import os
import platform
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from crossmae.doctor import installed_version
from crossmae.files import write_json
from crossmae.training.versions import versions
from tools.benchmarks.measuring import Gate, Row

FORMAT = 1
COMPARED = ("transformers", "detectron2", "sal-detectron2", "pycocotools", "hotcoco", "simplejpeg", "fvcore")
LEGEND = (
    "Ratio: time of the other side / ours, so above 1, ours is faster. Its range is that of the rounds. "
    "Memory: our peak / theirs. Gate: largest difference of the results, and its limit."
)


@dataclass(frozen=True)
class Growth:
    """Time and memory of one kind of work at growing sizes.

    Attributes:
        unit: what the sizes count.
        seconds: processor seconds at each size.
        megabytes: peak memory at each size, None if the system does not tell.
        exponent: e of the fit seconds = c * size ** e.
    """

    what: str
    unit: str
    sizes: tuple[int, ...]
    seconds: tuple[float, ...]
    megabytes: tuple[float | None, ...]
    exponent: float


def fit_exponent(sizes: Sequence[float], seconds: Sequence[float]) -> float:
    """Fit the exponent of a power law."""
    return float(np.polyfit(np.log(sizes), np.log(np.maximum(seconds, 1e-9)), 1)[0])


def format_rows(rows: Sequence[Row], style: str = "simple") -> str:
    """Format rows as a table in a style of tabulate."""
    from tabulate import tabulate

    widths = _WIDTHS if style == "simple" else None
    headers = ("suite", "what", "against", "goal", "ratio", "range", "memory", "gate", "ours / other", "verdict")
    return str(tabulate([_cells(row) for row in rows], headers, style, disable_numparse=True, maxcolwidths=widths))


_WIDTHS = [None, 44, 30, None, None, None, None, None, None, 30]


def _cells(row: Row) -> list[str]:
    goal = "" if row.goal is None else f"{row.goal:.3g}"
    ratio = "void" if row.void else "" if row.ratio is None else f"{row.ratio:.2f}"
    spread = "" if row.lowest is None or row.clock == "count" else f"{row.lowest:.2f}-{row.highest:.2f}"
    memory = "" if row.memory_ratio is None else "< 0.01" if row.memory_ratio < 0.01 else f"{row.memory_ratio:.2f}"
    if row.memory_goal is not None:
        memory += f" (<= {row.memory_goal:g})"
    times = "" if row.seconds is None else f"{_time(row.seconds)} / {_time(row.other_seconds or 0.0)}"
    remark = row.void or ": ".join(part for part in (row.verdict, row.note) if part)
    return [row.suite, row.what, row.against, goal, ratio, spread, memory, _gate(row.gate), times, remark]


def _gate(gate: Gate | None) -> str:
    return "" if gate is None else f"{gate.difference:.1e} <= {gate.limit:g}"


def _time(seconds: float) -> str:
    return (
        f"{seconds:.3g} s"
        if seconds >= 1
        else f"{seconds * 1e3:.3g} ms"
        if seconds >= 1e-3
        else f"{seconds * 1e6:.3g} us"
    )


def headline(row: Row) -> str:
    """Format the outcome of a row in a few words."""
    if row.void:
        return f"void, {row.void}"
    goal = "" if row.goal is None else f", goal {row.goal:g}"
    return row.note if row.ratio is None else f"{row.ratio:.2f}{goal}"


def format_growth(growths: Sequence[Growth], style: str = "simple") -> str:
    """Format growth as a text table, one line per size."""
    from tabulate import tabulate

    lines = []
    for growth in growths:
        for index, size in enumerate(growth.sizes):
            megabytes = growth.megabytes[index]
            memory = "" if megabytes is None else f"{megabytes:.1f}"
            first = (growth.what, f"{growth.exponent:.2f}") if index == 0 else ("", "")
            unit = growth.unit.replace("images", "image") if size == 1 else growth.unit
            lines.append([first[0], f"{size:,} {unit}", _time(growth.seconds[index]), memory, first[1]])
    return str(tabulate(lines, ("what", "size", "time", "MB", "exponent"), style, disable_numparse=True))


def format_page(rows: Sequence[Row], growths: Sequence[Growth], command: str, device: torch.device) -> str:
    """Format all tables in Markdown, with command, machine and date."""
    about, found = describe_machine(device), versions()
    place = about.get("gpu") or f"{about['processor']}, {about['cores']} cores, {torch.get_num_threads()} thread(s)"
    date = datetime.now(timezone.utc).date()
    others = ", ".join(f"{name} {version}" for name, version in compared_versions().items())
    lines = [f"`{command}`", f"{date}, {place}, torch {found['torch']}, revision {found['git']}. {others}", LEGEND]
    lines += [format_rows(rows, "github")] if rows else []
    lines += [format_growth(growths, "github")] if growths else []
    return "\n\n".join(lines) + "\n"


def compared_versions() -> dict[str, str]:
    """Find the versions of the installed libraries that the suites use."""
    return {name: version for name in COMPARED if (version := installed_version(name))}


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Describe processor, memory and GPU."""
    about: dict[str, Any] = {
        "system": platform.platform(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "load": [round(load, 2) for load in os.getloadavg()] if hasattr(os, "getloadavg") else None,
    }
    if device.type == "cuda":
        about["gpu"] = torch.cuda.get_device_name(device)
    return about


def _processor() -> str:
    """Read the name of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def build_record(
    command: str, device: torch.device, minutes: float | None, rows: Sequence[Row], growths: Sequence[Growth]
) -> dict[str, Any]:
    """Collect everything that a file of results holds."""
    return {
        "format": FORMAT,
        "command": command,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": versions() | compared_versions(),
        "machine": describe_machine(device),
        "threads": torch.get_num_threads(),
        "device": device.type,
        "minutes": minutes,
        "rows": [asdict(row) | {"verdict": row.verdict} for row in rows],
        "growth": [asdict(growth) for growth in growths],
    }


def write_record(path: Path, record: Mapping[str, Any]) -> None:
    """Write the results as JSON."""
    write_json(path, record)


def draw(rows: Sequence[Row], path: Path, title: str) -> None:
    """Draw ratios with their ranges next to the goals."""
    from matplotlib.figure import Figure

    shown = [row for row in rows if row.ratio is not None and row.ratio > 0]
    height = 1.6 + 0.34 * max(len(shown), 1)
    figure = Figure(figsize=(11, height), layout="constrained")
    axes = figure.subplots()
    axes.set_xscale("log")
    axes.axvline(1, color="0.6", linewidth=1)
    for place, row in enumerate(shown):
        assert row.ratio is not None
        colour = {"met": "tab:green", "missed": "tab:red"}.get(row.verdict, "tab:blue")
        axes.plot([row.lowest or row.ratio, row.highest or row.ratio], [place, place], color=colour, linewidth=1.5)
        axes.plot(row.ratio, place, "o", color=colour)
        if row.goal is not None:
            axes.plot(row.goal, place, "|", color="black", markersize=14, markeredgewidth=2)
    labels = [textwrap.shorten(f"{row.suite}: {row.what}, against {row.against}", 110) for row in shown]
    axes.set_yticks(range(len(shown)), labels, fontsize=7)
    axes.margins(y=0.01)
    axes.invert_yaxis()
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("{x:g}")
    axes.tick_params(axis="x", which="both", labelsize=7)
    figure.supxlabel(
        "seconds of the other side / ours (flops: counted arithmetic); line: range; black mark: goal\n"
        "green: goal met, red: missed, blue: no goal",
        fontsize=9,
    )
    figure.suptitle("\n".join(textwrap.wrap(title, 120)), fontsize=9)
    figure.savefig(path, dpi=120)
