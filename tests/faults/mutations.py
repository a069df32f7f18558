"""Mutation check: disable one guard at a time, and see that a test fails.

    python tests/faults/mutations.py [NAME ...]

The product is changed in a copy of the tree. The tests of a guard run twice: as they are, which must pass, and without
the guard, which must fail. The table at the end has one line per guard. The exit code is 1 if a guard is not tested.
All guards take about ten minutes. `test_mutations.py` holds that every pattern still occurs exactly once.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
CHECKPOINT, STATE = "crossmae/checkpoints/run_checkpoint.py", "crossmae/training/state.py"
WRITING, BATCHES = "crossmae/files/writing.py", "crossmae/data/batches.py"
KILLS, SIGNALS, RANKS = (f"tests/faults/test_{name}.py" for name in ("kills", "signals", "ranks"))
RUN_CHECKPOINT, EXACT = "tests/crossmae/checkpoints/test_run_checkpoint.py", "tests/crossmae/training/test_loop.py"


@dataclass(frozen=True)
class Mutation:
    """A guard that is disabled.

    Attributes:
        guard: words for the table.
        file, pattern, replacement: the text of the product that is replaced; it occurs once.
        tests: arguments of pytest for the few tests that must fail without the guard.
    """

    guard: str
    file: str
    pattern: str
    replacement: str
    tests: tuple[str, ...]


MUTATIONS = {
    "rename": Mutation(
        "files are complete or absent",
        WRITING,
        "        os.replace(temporary, path)\n",
        "        shutil.copyfile(temporary, path)\n",
        (KILLS, "-k", "flushed and pretrain"),
    ),
    "fsync": Mutation(
        "content is on disk before its name",
        WRITING,
        "        sync_file(temporary)\n",
        "",
        (KILLS, "-k", "flushed and pretrain"),
    ),
    "fsync_folder": Mutation(
        "the name is on disk",
        WRITING,
        "        sync_folder(path.parent)\n",
        "",
        (KILLS, "-k", "flushed and pretrain"),
    ),
    "digest": Mutation(
        "flipped bits in a checkpoint are found",
        CHECKPOINT,
        "if contents and sha256(path) != digest:",
        "if contents and not digest:",
        (RUN_CHECKPOINT, "-k", "zoo"),
    ),
    "copied": Mutation(
        "training does not change a checkpoint that is being written",
        CHECKPOINT,
        "        return copy.copy_(value.detach(), non_blocking=value.is_cuda)\n",
        "        return value\n",
        (RUN_CHECKPOINT, "-k", "values_of_its_step"),
    ),
    "measured_after_the_save": Mutation(
        "measurements wait for the checkpoint of their step",
        "crossmae/training/loop.py",
        "        if due:\n            self.writer.wait()\n",
        "",
        (EXACT, "-k", "measurements_do"),
    ),
    "thread_errors": Mutation(
        "a checkpoint that cannot be written ends the run",
        CHECKPOINT,
        "            writing.result()\n",
        "            pass\n",
        (RUN_CHECKPOINT, "-k", "error_of_the_thread"),
    ),
    "manifest": Mutation(
        "the manifest is the commit",
        CHECKPOINT,
        '        return f"no {MANIFEST}, so it was never completed"\n',
        "        return None\n",
        (RUN_CHECKPOINT, "-k", "zoo"),
    ),
    "retention": Mutation(
        "older checkpoints stay until the new one was read",
        CHECKPOINT,
        "if reason := _reading_error(new, set(tensors)):",
        'if reason := "":',
        (RUN_CHECKPOINT, "-k", "older_checkpoints or does_not_open"),
    ),
    "keep": Mutation(
        "the newest checkpoints are kept",
        CHECKPOINT,
        "for old in upto[:-keep]:",
        "for old in upto[:keep]:",
        (RUN_CHECKPOINT, "-k", "retention"),
    ),
    "lock": Mutation(
        "one run at a time in a folder",
        "crossmae/files/claim.py",
        "        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)\n",
        "        pass\n",
        ("tests/crossmae/files/test_claim.py", "-k", "second"),
    ),
    "sweep": Mutation(
        "files of running processes stay",
        "crossmae/files/leftovers.py",
        "return is_ours and not is_running(",
        "return is_ours or not is_running(",
        ("tests/crossmae/files/test_leftovers.py",),
    ),
    "keyed_samples": Mutation(
        "crops and masks depend on seed, epoch and image",
        BATCHES,
        "torch.default_generator.manual_seed(",
        "abs(",
        (EXACT, "-k", "exact"),
    ),
    "keyed_order": Mutation(
        "the order of the images depends on seed and epoch",
        BATCHES,
        "rng = np.random.default_rng([seed, epoch])",
        "rng = np.random.default_rng()",
        (EXACT, "-k", "exact"),
    ),
    "keyed_detection": Mutation(
        "the detector's augmentation depends on seed and image",
        "det/data/loader.py",
        "    np.random.seed(np.random.SeedSequence(key).generate_state(4))\n",
        "",
        ("tests/det/data/test_loader.py", "-k", "seed"),
    ),
    "optimizer": Mutation(
        "a resumed run has the optimizer's moments",
        STATE,
        '        self.optimizer.load_state_dict(state["optimizer"])\n',
        "",
        (EXACT, "-k", "exact"),
    ),
    "ema": Mutation(
        "a resumed run has the averaged weights",
        STATE,
        '            self.ema.module.load_state_dict(state["ema"])\n',
        "            pass\n",
        ("tests/crossmae/training/test_state.py", "-k", "ema"),
    ),
    "pending_losses": Mutation(
        "a resumed run has the losses since the last line of the log",
        STATE,
        '        own = own_losses(state["losses"], self.ranks.rank)\n',
        "        own: list[Losses] = []\n",
        (SIGNALS, "-k", "finetune-step-SIGTERM"),
    ),
    "log": Mutation(
        "the log is cut after the step of the checkpoint",
        "crossmae/training/log.py",
        ' if row["step"] < step or (row["step"] == step and "loss" in row)]',
        "]",
        ("tests/crossmae/training/test_log.py", "-k", "cut"),
    ),
    "finite_gradient": Mutation(
        "the gradient is finite before every update",
        STATE,
        "if not self.scaler.is_enabled() and not norm.isfinite():",
        "if self.scaler.is_enabled() and not norm.isfinite():",
        (RANKS, "-k", "NaN and pretrain"),
    ),
    "deferred_gradient": Mutation(
        "updates after a gradient that is not finite are skipped on the device",
        STATE,
        "        optimizer.found_inf = self.found  # type: ignore[attr-defined]\n",
        "",
        ("tests/crossmae/training/test_state.py", "-k", "deferred_check_leaves"),
    ),
    "deferred_check": Mutation(
        "deferred checks precede every measurement",
        "crossmae/training/loop.py",
        "            state.check_gradients()\n            self.forget_names()\n",
        "            pass\n",
        ("tests/crossmae/training/test_state.py", "-k", "names_the_bad_images"),
    ),
    "finite_weights": Mutation(
        "weights are finite before every save",
        STATE,
        "if told := [text for texts in self.ranks.gather(told) for text in texts]:",
        "if told := []:",
        ("tests/crossmae/training/test_state.py", "-k", "not_finite"),
    ),
    "strict_resume": Mutation(
        "a checkpoint of another model is refused",
        STATE,
        "        model.load_state_dict(tensors)\n",
        "        model.load_state_dict(tensors, strict=False)\n",
        ("tests/crossmae/training/test_state.py", "-k", "does_not_fit"),
    ),
    "strict_loading": Mutation(
        "weights that fit only in part are refused",
        "crossmae/checkpoints/loading.py",
        "    if problem or not report.ok:\n",
        "    if problem:\n",
        ("tests/crossmae/checkpoints/test_pretrained.py",),
    ),
    "signals_in_workers": Mutation(
        "loader workers leave signals to the run",
        "crossmae/data/workers.py",
        '    if hasattr(signal, "sigwaitinfo"):\n',
        "    if False:\n",
        (SIGNALS, "-k", "finetune-step-SIGTERM"),
    ),
    "stop_in_evaluation": Mutation(
        "a signal ends an evaluation",
        "crossmae/training/signals.py",
        "        if number < shared and request.is_agreed():\n            raise StopAsked\n",
        "        if number < shared and request.is_agreed():\n            pass\n",
        (SIGNALS, "-k", "train_net and judging"),
    ),
    "stop_in_main_process": Mutation(
        "a signal ends what the main process measures alone",
        "crossmae/training/signals.py",
        "        request.is_alone = True\n",
        "        pass\n",
        (RANKS, "-k", "measures_alone"),
    ),
    "agreement": Mutation(
        "processes stop together",
        "crossmae/training/signals.py",
        "        self.number = max(number for number, _ in told) or None\n",
        "",
        (RANKS, "-k", "signal_to_one and pretrain"),
    ),
    "boxes": Mutation(
        "boxes are clipped to their image before they are counted",
        "det/data/loader.py",
        'np.clip(box, 0, 2 * (record["width"], record["height"]))',
        "box",
        ("tests/det/data/test_loader.py", "-k", "no_image_shows"),
    ),
    "paths_of_coco": Mutation(
        "images of a COCO file stay in their folder",
        "det/data/coco_checks.py",
        "    return _LEAVES.search(name) is not None\n",
        "    return False\n",
        ("tests/det/data/test_coco_checks.py", "-k", "leav or unsafe"),
    ),
    "paths_of_labels": Mutation(
        "images of labels stay in their folder",
        "crossmae/data/annotations/records.py",
        '        if name.startswith("../"):',
        "        if not name:",
        ("tests/crossmae/data/annotations/test_read.py", "-k", "outside_of"),
    ),
    "shared_labels": Mutation(
        "training and validation never take the same images of one label folder",
        "crossmae/data/annotations/read.py",
        "    if shared and not found.has_splits:",
        "    if not found:",
        ("tests/crossmae/data/annotations/test_read.py", "-k", "a_split_is_written"),
    ),
    "classes_on_both_sides": Mutation(
        "a class of two images is on both sides of a split",
        "crossmae/data/annotations/split.py",
        "        if one != WITHOUT_OBJECTS and lacking and left[one] == 1:",
        "        if not one:",
        ("tests/crossmae/data/annotations/test_split.py", "-k", "both_sides or long_tail"),
    ),
    "equal_files": Mutation(
        "images of the same bytes stay on one side of a split",
        "crossmae/data/annotations/split.py",
        "        at if length is None or counts[length] < 2 else (length, sha256(path))",
        "        at",
        ("tests/crossmae/data/annotations/test_split.py", "-k", "together"),
    ),
    "xml_entities": Mutation(
        "XML with entities of its own is refused",
        "crossmae/files/parsing.py",
        '    if "<!ENTITY" in text:',
        "    if not text:",
        ("tests/crossmae/data/annotations/test_read.py", "-k", "entities"),
    ),
    "paths_of_lists": Mutation(
        "images of a list stay in their folder",
        "crossmae/data/sources/lists.py",
        'return parts.is_absolute() or PureWindowsPath(name).is_absolute() or ".." in parts.parts',
        "return False",
        ("tests/crossmae/data/test_sources.py", "-k", "outside"),
    ),
    "restricted_pickle": Mutation(
        "a checkpoint's state runs no code",
        CHECKPOINT,
        'return torch.load(folder / STATE, map_location="cpu", weights_only=True, mmap=mapped)',
        'return torch.load(folder / STATE, map_location="cpu", weights_only=False, mmap=mapped)',
        (RUN_CHECKPOINT, "-k", "running_code"),
    ),
}


def copy_tree(folder: Path) -> None:
    """Copy the files that git knows, and new ones that it does not ignore."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    for name in listed.stdout.decode().split("\0"):
        source = ROOT / name
        if name and source.is_file():
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target)


def run_tests(folder: Path, tests: tuple[str, ...]) -> int:
    """Run tests in a copy of the tree, and return pytest's exit code: 0 passed, 1 failed."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests]
    environment = os.environ | {"PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, check=False).returncode


def mutate(folder: Path, mutation: Mutation) -> str:
    """Disable a guard in a copy of the tree, run its tests, and return the result."""
    path = folder / mutation.file
    text = path.read_text("utf-8")
    if text.count(mutation.pattern) != 1:
        return "PATTERN LOST"
    if run_tests(folder, mutation.tests) != 0:
        return "FAILS WITH THE GUARD"
    path.write_text(text.replace(mutation.pattern, mutation.replacement), encoding="utf-8")
    try:
        code = run_tests(folder, mutation.tests)
    finally:
        path.write_text(text, encoding="utf-8")
    return "caught" if code == 1 else f"NOT CAUGHT (pytest: {code})"


def main() -> None:
    """Check the named guards, by default all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(MUTATIONS)}; default: all")
    names = parser.parse_args().names or list(MUTATIONS)
    if unknown := sorted(set(names) - set(MUTATIONS)):
        parser.error(f"unknown: {', '.join(unknown)}")
    rows = []
    with tempfile.TemporaryDirectory(prefix="mutations-") as folder:
        copy_tree(Path(folder))
        for name in names:
            rows.append((name, MUTATIONS[name].guard, mutate(Path(folder), MUTATIONS[name])))
            sys.stderr.write(f"{name}: {rows[-1][2]}\n")
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    for row in rows:
        sys.stdout.write("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() + "\n")
    sys.exit(any(result != "caught" for _, _, result in rows))


if __name__ == "__main__":
    main()
