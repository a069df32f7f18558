"""Report the versions and devices of this machine, missing packages, and the command that fixes each problem.

    python -m crossmae.doctor

The exit code is 0 if everything that pretraining and detection need is installed, else 1. The report lists every import
that fails. It needs only the standard library, so it also runs if torch is missing or broken.
"""

from __future__ import annotations

import sys

if sys.version_info < (3, 10):  # noqa: UP036 - before imports that fail in an older Python
    raise SystemExit(
        f"python {sys.version.split()[0]} ({sys.executable}) is not supported: expected 3.10 or newer. "
        "Set up another one: make clean && make venv PYTHON=python3.12"
    )

import argparse
import ast
import importlib
import importlib.metadata
import os
import platform
import re
import shlex
import shutil
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import crossmae
from crossmae.errors import advise

ROOT = Path(__file__).parents[1]
IN_CLONE = (ROOT / "pyproject.toml").is_file()
GIB = 2**30
LITTLE_DISK_GIB = 10
MANY_MISSING = 3  # with more missing packages, the report suggests a new environment
# Modules whose name differs from the distribution's name. For detectron2 the engine is imported, because the package
# alone imports without its requirements.
MODULES = {
    "pillow": "PIL",
    "pyyaml": "yaml",
    "scikit-learn": "sklearn",
    "opencv-python-headless": "cv2",
    "hydra-core": "hydra",
    "detectron2": "detectron2.engine",
}


@dataclass(frozen=True)
class ReportLine:
    """A line of the report. `needed` marks a failure, which makes the exit code 1."""

    name: str
    value: str
    fix: str = ""  # the command that fixes the problem; empty without a problem
    needed: bool = False


def main(argv: Sequence[str] | None = None) -> int:
    """Print the report. Return 1 if a needed package is missing."""
    prog = sys.argv[0] if sys.argv[0] == "crossmae doctor" else "python -m crossmae.doctor"
    raw = argparse.RawDescriptionHelpFormatter
    argparse.ArgumentParser(prog=prog, description=__doc__, formatter_class=raw).parse_args(argv)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # other libraries warn about deprecations at import
        core, det = read_requirements()
        sections = {
            "versions": [ReportLine("python", f"{platform.python_version()}  ({sys.executable})"), _crossmae_row()],
            "pretraining": [*map(library_row, core)],
            "detection": [*map(library_row, ("detectron2", *det)), _compiled_row()],
            "devices": [_cpu_row(), *_gpu_rows(), _disk_row()],
            "attention": _attention_rows(),
        }
    print_report(sections)
    return int(any(row.needed for rows in sections.values() for row in rows))


def print_report(sections: dict[str, list[ReportLine]]) -> None:
    """Print the table, then one line for each command that fixes problems."""
    rows = [row for section in sections.values() for row in section]
    width = max(len(row.name) for row in rows)
    for title, section in sections.items():
        print(title)
        for row in section:
            print(f"  {row.name:<{width}}  {'MISSING: ' if row.needed else ''}{row.value}")
    missing = [row for row in rows if row.needed]
    optional = [row for row in rows if row.fix and not row.needed]
    for heading, chosen in (("needed, fix with", missing), ("optional, if you want it", optional)):
        if chosen:
            print(f"\n{heading}")
        for fix in dict.fromkeys(row.fix for row in chosen):  # one command may fix several rows
            print(f"  {', '.join(row.name for row in chosen if row.fix == fix)}:  {fix}")
    if len(missing) > MANY_MISSING:
        print(f"  all of it:  {'make venv' if IN_CLONE else pip_command('crossmae[det]')}")
    print(f"\n{len(missing)} needed but missing" if missing else "\neverything needed is there")


def read_requirements() -> tuple[list[str], list[str]]:
    """Read the requirements of pretraining and of detection.

    Requirements for other versions of Python are left out. Raises SystemExit if nothing records them.
    """
    lists = read_lists()
    both = (lists["core"] + lists["train"], lists["det"])
    core, det = ([one.partition(";")[0] for one in names if for_this_python(one)] for names in both)
    return core, det


def for_this_python(requirement: str) -> bool:
    """Check that a requirement has no marker for other versions of Python."""
    marker = re.sub(r"[ '\"]", "", requirement.partition(";")[2])
    return not version_problem(platform.python_version(), marker)


def read_lists() -> dict[str, list[str]]:
    """Read all lists of requirements: "core", and the extras by name.

    They are in pyproject.toml in a clone of the repository, and in the metadata of an installed wheel. Extras that an
    extra includes are left out. Raises SystemExit if there is neither.
    """
    lists = _lists_of_clone() if IN_CLONE else _lists_of_wheel()
    return {name: [one for one in texts if library_name(one) != "crossmae"] for name, texts in lists.items()}


def _lists_of_clone() -> dict[str, list[str]]:
    text = (ROOT / "pyproject.toml").read_text("utf-8")
    head, _, rest = text.partition("\n[project.optional-dependencies]\n")
    core, extras = _lists_in(head.partition("\n[project]\n")[2]), _lists_in(rest.partition("\n[")[0])
    return {"core": core["dependencies"], **extras}


def _lists_in(table: str) -> dict[str, list[str]]:
    # Python 3.10 reads no TOML, but a list of strings with comments is the same in Python.
    found = re.findall(r"^([\w-]+) = (\[.*?\])(?:  #[^\n]*)?$", table, re.DOTALL | re.MULTILINE)
    return {name: ast.literal_eval(texts) for name, texts in found}


def _lists_of_wheel() -> dict[str, list[str]]:
    try:
        requirements = importlib.metadata.requires("crossmae") or []
    except importlib.metadata.PackageNotFoundError:
        raise SystemExit(f"{ROOT}: crossmae is not installed here. Run the doctor in a clone, or install it.") from None
    lists: dict[str, list[str]] = {"core": []}
    for requirement in requirements:
        found = re.search(r"""(?: and )?extra == ['"]([\w-]+)['"]""", requirement)
        plain = requirement if found is None else requirement.replace(found[0], "")
        lists.setdefault(found[1] if found else "core", []).append(plain.strip("; "))
    return lists


def tested_pair() -> list[str]:
    """Return pip requirements of torch and torchvision.

    They name the tested versions in a clone of the repository, and the supported ranges in a wheel.
    """
    pins = (ROOT / "requirements-tested.txt").read_text("utf-8").splitlines() if IN_CLONE else read_lists()["core"]
    return [pin for pin in pins if library_name(pin) in ("torch", "torchvision")]


def _crossmae_row() -> ReportLine:
    if installed_version("crossmae"):
        return ReportLine("crossmae", crossmae.__version__)
    return ReportLine("crossmae", f"{crossmae.__version__}, not installed: found in the current folder", "make venv")


def library_row(requirement: str) -> ReportLine:
    """Report the version of a required library, or its problem and fix."""
    name = library_name(requirement)
    try:
        module = importlib.import_module(MODULES.get(name, name))
    except Exception as error:  # a broken binary may raise anything; the report must continue
        return broken_row(requirement, error)
    version = installed_version("sal-detectron2") if name == "detectron2" else ""
    version = version or installed_version(name) or str(getattr(module, "__version__", "version unknown"))
    problem = version_problem(version, requirement)
    if not problem:
        return ReportLine(name, version)
    fix = pip_command(*(tested_pair() if name in ("torch", "torchvision") else [requirement]))
    return ReportLine(name, f"{version} is {problem} than supported ({requirement})", fix, needed=True)


def library_name(requirement: str) -> str:
    """Return the name in a requirement: "torch" for "torch>=2.8,<3"."""
    return re.split(r"[<>=\[]", requirement)[0]


def version_problem(version: str, requirement: str) -> str:
    """Return "older" or "newer" for a version outside a range, else ""."""
    found = release(version)
    for sign, limit in re.findall(r"(>=|<)([\d.]+)", requirement):
        if found and (found < release(limit)) == (sign == ">="):
            return "older" if sign == ">=" else "newer"
    return ""


def release(version: str) -> list[int]:
    """Return the numbers of a version: "2.11.0+cu130" gives [2, 11, 0]."""
    return [int(number) for number in re.split(r"[^\d.]", version)[0].split(".") if number]


def broken_row(requirement: str, error: Exception) -> ReportLine:
    """Report why a needed library cannot be imported, and the fix."""
    name = library_name(requirement)
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    if "torchvision::" in str(error):
        reason = f"torch and torchvision are not builds of one kind ({reason})"
        return ReportLine(name, reason, pip_command("--force-reinstall", *tested_pair()), needed=True)
    if name == "detectron2":
        return ReportLine(name, reason, install_detectron2(), needed=True)
    # If the library itself is installed but lacks a dependency, the same command installs the dependency.
    again = () if isinstance(error, ModuleNotFoundError) else ("--force-reinstall", "--no-deps")
    return ReportLine(name, reason, pip_command(*again, requirement), needed=True)


def _compiled_row() -> ReportLine:
    if try_import("detectron2._C"):
        return ReportLine("compiled operators", "present")
    value = "absent: no rotated boxes, no deformable convolution; nothing here uses them"
    return ReportLine("compiled operators", value, f"{install_detectron2()} --compile")


def _cpu_row() -> ReportLine:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    try:
        memory = f"{os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / GIB:.0f} GiB memory"
    except (AttributeError, ValueError, OSError):  # not available on every system
        memory = "memory unknown"
    return ReportLine("CPU", f"{cores} cores, {memory}, {platform.machine()}")


def _gpu_rows() -> list[ReportLine]:
    torch = try_import("torch")
    if torch is None:
        return [ReportLine("GPU", "unknown without torch")]
    rows = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        gpu = torch.cuda.get_device_properties(index)
        bf16 = "native bfloat16" if gpu.major >= 8 else "no native bfloat16"
        memory = f"{gpu.total_memory / GIB:.0f} GiB"
        rows.append(ReportLine(f"GPU {index}", f"{gpu.name}, {memory}, capability {gpu.major}.{gpu.minor}, {bf16}"))
    if rows or shutil.which("nvidia-smi") is None:
        return rows or [ReportLine("GPU", "none: everything runs on the CPU")]
    built_for = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPUs only"
    return [
        ReportLine("GPU", f"a driver is there, but torch, built for {built_for}, cannot use it. Update one of the two.")
    ]


def _disk_row() -> ReportLine:
    free = shutil.disk_usage(Path.cwd()).free / GIB
    warning = ": little for checkpoints" if free < LITTLE_DISK_GIB else ""
    return ReportLine("disk", f"{free:.0f} GiB free in the current folder{warning}")


def _attention_rows() -> list[ReportLine]:
    torch = try_import("torch")
    if torch is None:
        return [ReportLine("attention", "unknown without torch")]
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    return [ReportLine(f"on {device}", ", ".join(attention_backends(device)) or "none") for device in devices]


def attention_backends(device: str) -> list[str]:
    """List the attention backends that work in half precision on a device."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    from crossmae.training.devices import has_bf16

    half = torch.bfloat16 if has_bf16(torch.device(device)) else torch.float16
    query = torch.zeros(1, 2, 16, 64, device=device, dtype=half)  # (batch, heads, tokens, head width)
    found = []
    for name in ("FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION", "MATH"):
        try:
            with sdpa_kernel([getattr(SDPBackend, name)]):
                torch.nn.functional.scaled_dot_product_attention(query, query, query)
        except RuntimeError:  # torch's "no available kernel"
            continue
        found.append(name.lower().removesuffix("_attention"))
    return found


def try_import(module: str) -> Any:
    """Return the imported module, or None if the import fails."""
    try:
        return importlib.import_module(module)
    except Exception:
        return None


def installed_version(distribution: str) -> str:
    """Return the version of an installed distribution, "" if it is missing."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return ""


def install_detectron2() -> str:
    """Return the shell command that installs detectron2 for this interpreter."""
    return advise(f"{shlex.quote(sys.executable)} tools/install_detectron2.py")


def pip_command(*arguments: str) -> str:
    """Return the shell command that runs `pip install` for this interpreter."""
    return shlex.join([sys.executable, "-m", "pip", "install", *arguments])


if __name__ == "__main__":
    raise SystemExit(main())
