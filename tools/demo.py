"""The whole way on real images: data, pretraining, conversion, detection, report. `make demo` runs this.

    python tools/demo.py                       # everything that is not done yet, in outputs/demo
    python tools/demo.py --output outputs/big  # elsewhere
    python tools/demo.py --fresh               # all of it again

Each stage is a command of its own, shown before it runs, to be copied and changed at will. A stage that is
done is reused as long as its command, its configs and the stages before it are the same; where a stage
failed, the next run goes on.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import psutil

from crossmae import __version__
from crossmae.errors import UserError, run_cli
from crossmae.files import make_folder, read_json, sha256, write_json
from crossmae.reports.page import format_bytes, format_seconds

# What this file imports decides how long a `make demo` with nothing to do takes: no torch, no matplotlib.

ROOT = Path(__file__).resolve().parents[1]
RECORDS = "stages.json"
SAMPLE_SECONDS = 0.25
PATIENCE_SECONDS = 10  # for a stage to end by itself after Ctrl-C


@dataclass(frozen=True)
class Stage:
    """One command of the demo.

    Attributes:
        name: short, unique.
        title: what it does, for people.
        arguments: of the Python interpreter that runs this program.
        outputs: what it writes. Removed before it runs, and expected afterwards.
        configs: files beside the command that decide what it does.
    """

    name: str
    title: str
    arguments: tuple[str, ...]
    outputs: tuple[Path, ...]
    configs: tuple[Path, ...] = ()

    @property
    def command(self) -> str:
        """The command as one would type it here."""
        interpreter = Path(sys.executable)
        here = Path.cwd()
        python = str(interpreter.relative_to(here)) if interpreter.is_relative_to(here) else "python"
        return shlex.join([python, *self.arguments])


@dataclass
class StageRecord:
    """What is known of a stage that was started: an entry of stages.json."""

    name: str
    title: str
    command: str
    fingerprint: str
    status: str = "started"  # "started", "failed" or "done"
    seconds: float = 0.0
    peak_memory_bytes: int = 0
    ended: str = ""


# --- The stages of the demo -------------------------------------------------------------------------------


CONFIGS = ROOT / "configs"


def demo_stages(output: Path) -> list[Stage]:
    """The demo's stages; every file they write is under `output`."""

    def command(tool: str, arguments: str) -> tuple[str, ...]:
        # @ is the folder; filled in after the split, so that its name may hold spaces.
        return (_tool(tool), *(word.replace("@", str(output)) for word in arguments.split()))

    return [
        Stage(
            "data",
            "Compose handwritten digits over photographs",
            command("make_demo_data", "--output @/data"),
            outputs=(output / "data",),
            configs=(ROOT / "crossmae/demo_data.py",),
        ),
        Stage(
            "pretrain",
            "Pretrain CrossMAE on the training images, without their labels",
            command(
                "pretrain",
                "--config-file pretrain/demo.yaml data.train=@/data/pretrain data.val=@/data/val "
                "probe.train=@/data/scenes/train probe.val=@/data/scenes/val output_dir=@/pretrain",
            ),
            outputs=(output / "pretrain",),
            configs=(CONFIGS / "pretrain/demo.yaml",),
        ),
        Stage(
            "convert",
            "Make the encoder a detection backbone",
            command(
                "convert_checkpoint",
                "@/pretrain/model.safetensors @/encoder_detectron2.pth --to detectron2",
            ),
            outputs=(output / "encoder_detectron2.pth",),
        ),
        Stage(
            "detect",
            "Train Mask R-CNN on that backbone, and evaluate it on held-out images",
            command(
                "train_net",
                "--config-file demo_mask_rcnn.yaml "
                "--train-json @/data/annotations/train.json --train-images @/data/train "
                "--val-json @/data/annotations/val.json --val-images @/data/val "
                "MODEL.WEIGHTS=@/encoder_detectron2.pth OUTPUT_DIR=@/detect",
            ),
            outputs=(output / "detect",),
            configs=(CONFIGS / "demo_mask_rcnn.yaml",),
        ),
        Stage(
            "report",
            "Put it all on one page",
            command("demo_report", "@"),
            outputs=(output / "report.html", output / "summary.txt"),
        ),
    ]


def _tool(name: str) -> str:
    """The path of a tool, as short as the current folder allows."""
    path = ROOT / "tools" / f"{name}.py"
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


# --- Running stages ---------------------------------------------------------------------------------------


def run_stages(stages: Sequence[Stage], folder: Path, *, fresh: bool = False) -> list[StageRecord]:
    """Run in order the stages that are not done yet, and record each in `folder`/stages.json.

    A stage is done when it ended well with the same fingerprint and its outputs are still there. Once one has
    run, those after it run too, because what they were made from is new.

    Args:
        fresh: run all of them, whatever is recorded.

    Raises:
        UserError: a stage failed, a config file is missing, or stages.json is not what this program writes.
        ValueError: a stage's output is not inside `folder`; outputs are removed, so this must not be.
    """
    make_folder(folder, "--output")
    known = {} if fresh else _read_records(folder / RECORDS)
    records: list[StageRecord] = []
    previous, all_reused = "", True
    for number, stage in enumerate(stages, start=1):
        previous = fingerprint(stage, previous)
        record = known.get(stage.name)
        head = f"[{number}/{len(stages)}] {stage.name}"
        if all_reused and record is not None and _is_done(stage, record, previous):
            print(f"{head}: reused, took {_cost(record)}")
            records.append(record)
            continue
        all_reused = False
        record = StageRecord(stage.name, stage.title, stage.command, previous)
        records.append(record)
        print(f"\n{head}: {stage.title}\n$ {record.command}", flush=True)
        _run_stage(stage, record, records, folder)
        print(f"{head}: done in {_cost(record)}", flush=True)
    return records


def fingerprint(stage: Stage, previous: str) -> str:
    """A hash of what decides a stage's outcome: version, command, configs, and the stages before it.

    Raises:
        UserError: a config file does not exist.
    """
    for config in stage.configs:
        if not config.is_file():
            raise UserError(f"stage {stage.name}: its config {config} does not exist")
    configs = [[path.name, sha256(path)] for path in stage.configs]
    decisive = [__version__, stage.arguments, configs, previous]
    return hashlib.sha256(json.dumps(decisive).encode()).hexdigest()


def _is_done(stage: Stage, record: StageRecord, expected: str) -> bool:
    return (
        record.status == "done" and record.fingerprint == expected and all(output.exists() for output in stage.outputs)
    )


def _run_stage(stage: Stage, record: StageRecord, records: Sequence[StageRecord], folder: Path) -> None:
    """Run one stage and keep its record, `records[-1]`, true in every outcome."""
    for output in stage.outputs:
        _remove(output, folder)
    _write_records(folder / RECORDS, records)
    started = time.perf_counter()
    record.status = "failed"
    try:
        code, record.peak_memory_bytes = run_command([sys.executable, *stage.arguments])
        absent = [str(output) for output in stage.outputs if not output.exists()]
        record.status = "done" if code == 0 and not absent else "failed"
    finally:
        record.seconds = round(time.perf_counter() - started, 3)
        record.ended = datetime.now(timezone.utc).isoformat(timespec="seconds")
        _write_records(folder / RECORDS, records)
    if record.status == "failed":
        what = f"wrote no {', '.join(absent)}" if code == 0 else _exit_reason(code)
        raise UserError(
            f"stage {stage.name} failed after {format_seconds(record.seconds)}: {what}; its command was: "
            f"{record.command} -- mend the cause and run the demo again: it goes on with this stage"
        )


def run_command(command: Sequence[str]) -> tuple[int, int]:
    """Run a command attached to this terminal.

    Returns:
        Its exit code (negative: the signal that ended it), and the highest sum of the resident memory, in
        bytes, of it and its descendants. The sum is sampled four times a second; it counts shared pages once
        per process.
    """
    process = subprocess.Popen(command)
    peak = _resident_bytes(process.pid)
    try:
        while True:
            try:
                return process.wait(timeout=SAMPLE_SECONDS), peak
            except subprocess.TimeoutExpired:
                peak = max(peak, _resident_bytes(process.pid))
    except BaseException:
        _stop(process)
        raise


def _resident_bytes(pid: int) -> int:
    """Resident memory of a process and its descendants; a process that ends meanwhile counts nothing."""
    total = 0
    try:
        root = psutil.Process(pid)
        processes = [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return 0
    for process in processes:
        try:
            total += process.memory_info().rss
        except (psutil.NoSuchProcess, psutil.ZombieProcess):
            continue
    return total


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Let a stage end by itself, as Ctrl-C reaches it too; end it and its descendants if it does not."""
    try:
        process.wait(timeout=PATIENCE_SECONDS)
    except subprocess.TimeoutExpired:
        descendants = psutil.Process(process.pid).children(recursive=True)
        for victim in (*descendants, process):
            victim.kill()
        process.wait()


def _exit_reason(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    hint = ", which is what happens when memory runs out" if code == -signal.SIGKILL else ""
    return f"killed by {signal.Signals(-code).name}{hint}"


def _remove(path: Path, folder: Path) -> None:
    """Remove an output of an earlier run, only ever inside the demo's folder."""
    # The parent is resolved, not the path: a link is removed as a link, never what it points to.
    inside = path.parent.resolve() / path.name
    if not inside.is_relative_to(folder.resolve()) or inside == folder.resolve():
        raise ValueError(f"{path}: an output of a stage must be inside {folder}")
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.exists():
        shutil.rmtree(path)


# --- Records ----------------------------------------------------------------------------------------------


def _write_records(path: Path, records: Sequence[StageRecord]) -> None:
    write_json(path, {"stages": [asdict(record) for record in records]})


def _read_records(path: Path) -> dict[str, StageRecord]:
    """What earlier runs recorded, by stage; nothing if there was none."""
    if not path.exists():
        return {}
    content: Any = read_json(path)
    names = {field.name for field in fields(StageRecord)}
    stages = content.get("stages") if isinstance(content, dict) else None
    if not isinstance(stages, list) or any(not isinstance(s, dict) or s.keys() != names for s in stages):
        raise UserError(f"{path}: not written by this program; --fresh starts all over")
    return {stage["name"]: StageRecord(**stage) for stage in stages}


def _cost(record: StageRecord) -> str:
    return f"{format_seconds(record.seconds)}, peak memory {format_bytes(record.peak_memory_bytes)}"


# --- Command line -----------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> None:
    """Run what is not done, then print the COCO table and where the page is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output", type=Path, default=Path("outputs/demo"), help="folder to work in (default: %(default)s)"
    )
    parser.add_argument("--fresh", action="store_true", help="run every stage again")
    args = parser.parse_args(argv)
    records = run_stages(demo_stages(args.output), args.output, fresh=args.fresh)
    seconds = sum(record.seconds for record in records)
    print(f"\n{(args.output / 'summary.txt').read_text('utf-8')}")
    print(f"All stages took {format_seconds(seconds)}. The page to look at: {args.output / 'report.html'}")


if __name__ == "__main__":
    run_cli(main)
