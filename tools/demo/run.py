"""Run the demo on real images: data, pretraining, two detectors, report. `make demo` runs this.

    python tools/demo/run.py                       # runs unfinished stages, in outputs/demo
    python tools/demo/run.py --output outputs/big  # writes to another folder
    python tools/demo/run.py --fresh               # runs every stage again

Each stage is a separate command. The command is printed before it runs, so that it can be copied and changed. A
finished stage is reused if its command and its config are unchanged and no earlier stage ran again. After a failure,
the next run continues with the failed stage. stages.json in the output folder records time and memory.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crossmae import __version__
from crossmae.errors import UserError, run_cli
from crossmae.experiments.commands import run_command
from crossmae.files import make_folder, read_json, sha256, write_json
from crossmae.reports.page import format_bytes, format_seconds

# Do not import torch or matplotlib here: they would slow down a `make demo` that has nothing to do.

ROOT = Path(__file__).resolve().parents[2]
RECORDS = "stages.json"
# The comparison: training images with labels, and training steps, of each of the two detectors.
LABELLED, DETECTOR_STEPS = 160, 200
PRETRAIN = "tools/pretrain.py --config-file pretrain/demo.yaml data.train=@/data/pretrain"
DETECT = (
    "tools/train_net.py --config-file demo_mask_rcnn.yaml --train-json @/data/annotations/few.json "
    "--train-images @/data/train --val-json @/data/annotations/val.json --val-images @/data/val "
    f"SOLVER.MAX_ITER={DETECTOR_STEPS}"
)
# Name; title; tool with arguments (@ is the output folder); outputs in that folder; file that decides the outcome.
STAGES = (
    (
        "data",
        "Compose handwritten digits over photographs",
        f"tools/make_demo_data.py --few {LABELLED} --output @/data",
        "data",
        "tools/make_demo_data.py",
    ),
    (
        "pretrain",
        "Pretrain CrossMAE on the training images, without their labels",
        f"{PRETRAIN} data.val=@/data/val probe.train=@/data/scenes/train probe.val=@/data/scenes/val "
        "output_dir=@/pretrain",
        "pretrain",
        "configs/pretrain/demo.yaml",
    ),
    (
        "start",
        "Write the random weights that pretraining starts from",
        f"{PRETRAIN} data.val=null probe.train=null probe.val=null log.pictures=0 "
        "schedule.max_steps=0 output_dir=@/start",
        "start",
        "configs/pretrain/demo.yaml",
    ),
    (
        "detect-random",
        "Train Mask R-CNN on few labelled images, from random weights, and evaluate it on held-out images",
        f"{DETECT} MODEL.WEIGHTS=@/start OUTPUT_DIR=@/detect-random",
        "detect-random",
        "configs/demo_mask_rcnn.yaml",
    ),
    (
        "detect-own",
        "Train and evaluate the same Mask R-CNN, from the pretrained encoder",
        f"{DETECT} MODEL.WEIGHTS=@/pretrain OUTPUT_DIR=@/detect-own",
        "detect-own",
        "configs/demo_mask_rcnn.yaml",
    ),
    ("report", "Put it all on one page", "tools/demo/report.py @", "report.html summary.txt", ""),
)


@dataclass(frozen=True)
class Stage:
    """One command of the demo.

    Attributes:
        arguments: arguments for the Python interpreter.
        outputs: names of files in the demo's folder. They are removed before the stage runs, and must exist afterwards.
        config: file that decides the outcome in addition to the command; None without such a file.
    """

    name: str
    title: str
    arguments: tuple[str, ...]
    outputs: tuple[str, ...]
    config: Path | None = None

    @property
    def command(self) -> str:
        """Command line for a shell in the current folder."""
        return shlex.join([_from_here(Path(sys.executable), "python"), *self.arguments])

    @property
    def fingerprint(self) -> str:
        """Hash of version, command and config, which decide the outcome."""
        decisive = [__version__, self.arguments, sha256(self.config) if self.config else ""]
        return hashlib.sha256(json.dumps(decisive).encode()).hexdigest()


def demo_stages(output: Path) -> list[Stage]:
    """List the demo's stages. All stages write only under `output`."""
    stages = []
    for name, title, command, outputs, config in STAGES:
        tool, *words = command.split()
        # @ is replaced after the split, because the folder's name may have spaces.
        arguments = (_from_here(ROOT / tool, str(ROOT / tool)), *(word.replace("@", str(output)) for word in words))
        stages.append(Stage(name, title, arguments, tuple(outputs.split()), ROOT / config if config else None))
    return stages


def _from_here(path: Path, otherwise: str) -> str:
    here = Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else otherwise


def run_stages(stages: Sequence[Stage], folder: Path, *, fresh: bool = False) -> float:
    """Run the unfinished stages. Return the total seconds of all stages.

    Each stage is recorded in stages.json. Once a stage has run, all later stages run as well, because their inputs are
    new. With `fresh`, every stage runs.

    Raises:
        UserError: a stage failed, or stages.json was not written by this program.
    """
    make_folder(folder, "--output")
    known = {} if fresh else _read_records(folder / RECORDS)
    records: list[dict[str, Any]] = []
    for number, stage in enumerate(stages, start=1):
        head = f"[{number}/{len(stages)}] {stage.name}"
        wanted = {"status": "done", "fingerprint": stage.fingerprint}
        record = known.get(stage.name, {})
        if wanted.items() <= record.items() and all((folder / name).exists() for name in stage.outputs):
            records.append(record)
            how = "reused, took"
        else:
            known, how = {}, "done in"
            print(f"\n{head}: {stage.title}\n$ {stage.command}", flush=True)
            record = _run_stage(stage, records, folder)
        peak = format_bytes(record["peak_memory_bytes"])
        print(f"{head}: {how} {format_seconds(record['seconds'])}, peak memory {peak}", flush=True)
    return sum(record["seconds"] for record in records)


def _run_stage(stage: Stage, records: list[dict[str, Any]], folder: Path) -> dict[str, Any]:
    """Run a stage. Append its record, and return it.

    Raises UserError if the stage fails or does not write its outputs.
    """
    record = {"name": stage.name, "title": stage.title, "command": stage.command, "fingerprint": stage.fingerprint}
    records.append(record | {"status": "started", "seconds": 0.0, "peak_memory_bytes": 0})
    write_json(folder / RECORDS, {"stages": records})
    for path in (folder / name for name in stage.outputs):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:  # of a link, only the link is removed
            path.unlink(missing_ok=True)
    started, peak, failure = time.perf_counter(), 0, "interrupted"
    try:
        code, peak = run_command([sys.executable, *stage.arguments])
        absent = [str(folder / name) for name in stage.outputs if not (folder / name).exists()]
        failure = f"wrote no {', '.join(absent)}" if absent else ""
        if code < 0:
            hint = ", which is what happens when memory runs out" if code == -signal.SIGKILL else ""
            failure = f"killed by {signal.Signals(-code).name}{hint}"
        elif code:
            failure = f"exit code {code}"
    finally:
        seconds, status = round(time.perf_counter() - started, 3), "failed" if failure else "done"
        records[-1] |= {"status": status, "seconds": seconds, "peak_memory_bytes": peak}
        write_json(folder / RECORDS, {"stages": records})
    if failure:
        raise UserError(
            f"stage {stage.name}: failed after {format_seconds(seconds)}: {failure}. Run the demo again: it continues "
            f"with this stage. The command of the stage is: {stage.command}"
        )
    return records[-1]


def _read_records(path: Path) -> dict[str, dict[str, Any]]:
    try:
        return {stage["name"]: stage for stage in read_json(path)["stages"]} if path.exists() else {}
    except (TypeError, KeyError):
        raise UserError(f"{path}: was not written by this program. Start again with --fresh.") from None


def main(argv: Sequence[str] | None = None) -> None:
    """Run unfinished stages, then print the table and the page's path."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("outputs/demo"), help="folder (default: %(default)s)")
    parser.add_argument("--fresh", action="store_true", help="run every stage again")
    args = parser.parse_args(argv)
    seconds = run_stages(demo_stages(args.output), args.output, fresh=args.fresh)
    print(f"\n{(args.output / 'summary.txt').read_text('utf-8')}\nAll stages took {format_seconds(seconds)}.")
    print(f"Open this page in a browser: {args.output / 'report.html'}")


if __name__ == "__main__":
    run_cli(main)
