"""A grid of tiny commands, also as a program that a test can kill: python tiny_grid.py FOLDER [JOBS]."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

from crossmae.errors import run_cli, set_up_log
from crossmae.experiments.cells import Cell, Step, run_cells

# Works for a while and then writes its number, in one piece. Notes if another process does the same work.
WORK = """
import fcntl, os, sys, time
done, seconds = sys.argv[1], float(sys.argv[2])
with open(done + ".lock", "w") as lock:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        open(os.path.join(os.path.dirname(done), "overlap"), "w").close()
    end = time.time() + seconds
    while time.time() < end:
        pass
    with open(done + ".new", "w") as file:
        file.write(f"{os.getpid()} {' '.join(sys.argv[3:])}")
    os.replace(done + ".new", done)
    with open(os.path.join(os.path.dirname(done), "journal"), "a") as file:
        file.write(os.path.basename(done) + "\\n")
"""


def python_step(done: Path, code: str = WORK, *words: str, **options: object) -> Step:
    """A step that runs Python code, with the path of its file as the first argument."""
    return Step(("-S", "-c", code, str(done), *words), done, **options)  # type: ignore[arg-type]


def working_cell(folder: Path, name: str, seconds: float = 0.0, needs: tuple[str, ...] = (), steps: int = 1) -> Cell:
    """A cell whose steps work for some seconds each."""
    files = [folder / f"{name}-{number}" for number in range(steps)]
    commands = tuple(python_step(file, WORK, str(seconds)) for file in files)
    facts = {"kind": "work", "arm": name}
    return Cell(name, facts, commands, lambda: {"files": sum(file.exists() for file in files)}, needs, estimate=1.0)


def twelve_cells(folder: Path) -> list[Cell]:
    """Four chains of three cells, the needs after those that need them."""
    return [
        working_cell(folder, f"{chain}{number}", 0.05, (f"{chain}{number - 1}",) if number else (), steps=2)
        for number in (2, 1, 0)
        for chain in "abcd"
    ]


if __name__ == "__main__":
    set_up_log()
    FOLDER, JOBS = Path(sys.argv[1]), int(sys.argv[2])
    run_cli(
        lambda: logging.getLogger("tools").info(
            "%d rows", len(run_cells(twelve_cells(FOLDER), FOLDER / "results.jsonl", jobs=JOBS))
        )
    )
