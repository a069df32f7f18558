"""What this machine has, what is missing, and the command that mends it.

    python -m crossmae.doctor

Exit code 0 when everything needed for pretraining and detection is there, 1 otherwise. By itself it needs the
standard library alone and it reports every import that fails: it also runs where torch is missing or broken.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import importlib.util
import os
import platform
import re
import shlex
import shutil
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import crossmae

GIB = 2**30
LITTLE_DISK_GIB = 10
MANY = 3  # missing things, beyond which setting up the environment anew is the better advice
TESTED_PAIR = ("torch==2.11.0", "torchvision==0.26.0")  # as in requirements-tested.txt
TORCH_RANGE = ((2, 6), (2, 12))  # from, below; as in setup.py
PYTHON_RANGE = ((3, 10), (3, 13))
ATTENTION_BACKENDS = {
    "flash": "FLASH_ATTENTION",
    "mem-efficient": "EFFICIENT_ATTENTION",
    "cuDNN": "CUDNN_ATTENTION",
    "math": "MATH",
}


@dataclass(frozen=True)
class Library:
    """Something that is needed: the module to import, and the distributions that may have brought it."""

    name: str
    module: str
    distributions: tuple[str, ...]
    requirement: str  # what pip is given, as in setup.py; detectron2 is not pip's to find


@dataclass(frozen=True)
class Row:
    """One line of the table. `needed` marks a failure that makes the exit code 1."""

    name: str
    value: str
    fix: str = ""  # the command that mends it; empty: nothing to mend
    needed: bool = False


OPENCV = ("opencv-python-headless", "opencv-python", "opencv-contrib-python")
PRETRAINING = (
    # Ranges as in setup.py; a test compares them.
    Library("torch", "torch", ("torch",), "torch>=2.6,<2.12"),
    Library("torchvision", "torchvision", ("torchvision",), "torchvision>=0.21,<0.27"),
    Library("timm", "timm", ("timm",), "timm>=1.0.9,<2"),
    Library("numpy", "numpy", ("numpy",), "numpy>=1.24"),
    Library("pillow", "PIL", ("pillow",), "pillow>=10.1"),
    Library("pydantic", "pydantic", ("pydantic",), "pydantic>=2.7,<3"),
    Library("pyyaml", "yaml", ("pyyaml",), "pyyaml>=6"),
    Library("safetensors", "safetensors", ("safetensors",), "safetensors>=0.4.3"),
    Library("tqdm", "tqdm", ("tqdm",), "tqdm>=4.65"),
    Library("tensorboard", "tensorboard", ("tensorboard",), "tensorboard>=2.14"),
    Library("matplotlib", "matplotlib", ("matplotlib",), "matplotlib>=3.8"),
    Library("psutil", "psutil", ("psutil",), "psutil>=5.9"),
    Library("fsspec", "fsspec", ("fsspec",), "fsspec>=2023.10"),
    Library("jinja2", "jinja2", ("jinja2",), "jinja2>=3.1"),
    Library("scipy", "scipy", ("scipy",), "scipy>=1.9"),
    Library("scikit-learn", "sklearn", ("sklearn",), "scikit-learn>=1.3"),
)
DETECTION = (
    # The engine, because the bare package imports even where its requirements are missing.
    Library("detectron2", "detectron2.engine", ("sal-detectron2", "detectron2"), ""),
    Library("pycocotools", "pycocotools", ("pycocotools",), "pycocotools>=2.0.7"),
    Library("opencv", "cv2", OPENCV, "opencv-python-headless>=4.8"),
    Library("shapely", "shapely", ("shapely",), "shapely>=2"),
    Library("fvcore", "fvcore", ("fvcore",), "fvcore>=0.1.5,<0.1.6"),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the report; returns 1 when something needed is missing, else 0."""
    summary = "Print versions, devices, attention backends, what is missing and the command that mends it."
    argparse.ArgumentParser(prog="python -m crossmae.doctor", description=summary).parse_args(argv)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # third-party deprecations at import are not what this is about
        sections = {
            "versions": [python_row(), crossmae_row()],
            "pretraining": [library_row(library) for library in PRETRAINING],
            "detection": [*(library_row(library) for library in DETECTION), compiled_row(), model_zoo_row()],
            "devices": [cpu_row(), *gpu_rows(), disk_row()],
            "attention": attention_rows(),
        }
    print_report(sections)
    return int(any(row.needed for rows in sections.values() for row in rows))


def print_report(sections: dict[str, list[Row]]) -> None:
    """The table, then one line for each thing to mend."""
    rows = [row for section in sections.values() for row in section]
    width = max(len(row.name) for row in rows)
    for title, section in sections.items():
        print(title)
        for row in section:
            print(f"  {row.name:<{width}}  {'MISSING: ' if row.needed else ''}{row.value}")
    missing = [row for row in rows if row.needed]
    for heading, chosen in (
        ("needed, mend with", missing),
        ("optional, if you want it", [row for row in rows if row.fix and not row.needed]),
    ):
        if chosen:
            print(f"\n{heading}")
        for fix in dict.fromkeys(row.fix for row in chosen):  # one command may mend several rows
            print(f"  {', '.join(row.name for row in chosen if row.fix == fix)}:  {fix}")
    if len(missing) > MANY:
        print("  all of it:  make venv")
    print(f"\n{len(missing)} needed but missing" if missing else "\neverything needed is there")


# Versions.


def python_row() -> Row:
    """The interpreter."""
    lowest, above = PYTHON_RANGE
    version = platform.python_version()
    if lowest <= sys.version_info[:2] < above:
        return Row("python", f"{version}  ({sys.executable})")
    expected = f"expected {dotted(lowest)} or newer, below {dotted(above)}"
    return Row("python", f"{version}, {expected}", "make clean && make venv PYTHON=python3.11", needed=True)


def crossmae_row() -> Row:
    """This package: it may run from a clone without being installed."""
    if installed_version(("crossmae",)) is None:
        return Row("crossmae", f"{crossmae.__version__}, not installed: found in the current folder", "make venv")
    return Row("crossmae", crossmae.__version__)


def library_row(library: Library) -> Row:
    """Version of a library that imports, otherwise why it does not."""
    try:
        module = importlib.import_module(library.module)
    except Exception as error:  # a broken binary may raise anything; the report must go on
        return broken_row(library, error)
    version = installed_version(library.distributions) or str(getattr(module, "__version__", "version unknown"))
    if library.name == "torch":
        return torch_row(version)
    return Row(library.name, version)


def torch_row(version: str) -> Row:
    """torch imports; is it a version that the code is made for?"""
    lowest, above = TORCH_RANGE
    if lowest <= release(version) < above:
        return Row("torch", version)
    side = "older" if release(version) < lowest else "newer"
    text = f"{version} is {side} than supported ({dotted(lowest)} or newer, below {dotted(above)})"
    return Row("torch", text, pip_command(*TESTED_PAIR), needed=True)


def broken_row(library: Library, error: Exception) -> Row:
    """A needed library did not import: the row says why and what mends it."""
    name, package = library.name, library.module.partition(".")[0]
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    if "torchvision::" in str(error):
        text = f"torch and torchvision are not builds of one kind ({reason})"
        return Row(name, text, pip_command("--force-reinstall", *TESTED_PAIR), needed=True)
    if isinstance(error, ModuleNotFoundError) and error.name not in (None, package, library.module):
        culprit = str(error.name).partition(".")[0]
        install = {other.module: other.requirement for other in (*PRETRAINING, *DETECTION)}
        return Row(name, f"needs {culprit}", pip_command(install.get(culprit, culprit)), needed=True)
    if name == "detectron2":
        return Row(name, reason, f"{python()} tools/install_detectron2.py", needed=True)
    if isinstance(error, ModuleNotFoundError):
        return Row(name, "not installed", pip_command(library.requirement), needed=True)
    fix = pip_command("--force-reinstall", "--no-deps", library.requirement)
    return Row(name, f"installed, but does not import ({reason})", fix, needed=True)


def compiled_row() -> Row:
    """detectron2's compiled operators: nothing here uses them."""
    name = "compiled operators"
    if not module_exists("detectron2"):
        return Row(name, "detectron2 is missing")
    if module_exists("detectron2._C"):
        return Row(name, "present")
    text = "absent: no rotated boxes, no deformable convolution; nothing here uses them"
    return Row(name, text, f"{python()} tools/install_detectron2.py --from git")


def model_zoo_row() -> Row:
    """`detectron2.model_zoo` imports pkg_resources, which setuptools no longer has; nothing here uses it."""
    if module_exists("pkg_resources"):
        return Row("model zoo", "detectron2.model_zoo can be imported")
    text = "detectron2.model_zoo cannot be imported: no pkg_resources; nothing here uses it"
    return Row("model zoo", text, pip_command("setuptools<82"))


# Devices.


def cpu_row() -> Row:
    """Cores that this process may use, and memory."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    try:
        memory = f"{os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / GIB:.0f} GiB memory"
    except (AttributeError, ValueError, OSError):  # not on every system
        memory = "memory unknown"
    return Row("CPU", f"{cores} cores, {memory}, {platform.machine()}")


def gpu_rows() -> list[Row]:
    """One row a GPU: name, memory, compute capability, bfloat16; or one that says why there is none."""
    torch = try_import("torch")
    if torch is None:
        return [Row("GPU", "unknown without torch")]
    if torch.cuda.is_available():
        return [gpu_row(torch, index) for index in range(torch.cuda.device_count())]
    if shutil.which("nvidia-smi") is None:
        return [Row("GPU", "none: everything runs on the CPU")]
    built_for = f"CUDA {torch.version.cuda}" if torch.version.cuda else "the CPU alone"
    text = f"a driver is there, but torch, built for {built_for}, cannot use it: update one of the two"
    return [Row("GPU", text)]


def gpu_row(torch: Any, index: int) -> Row:
    """What the recipes depend on: memory, and whether bfloat16 is native."""
    gpu = torch.cuda.get_device_properties(index)
    bf16 = "native bfloat16" if (gpu.major, gpu.minor) >= (8, 0) else "no native bfloat16"
    text = f"{gpu.name}, {gpu.total_memory / GIB:.0f} GiB, capability {gpu.major}.{gpu.minor}, {bf16}"
    return Row(f"GPU {index}", text)


def disk_row() -> Row:
    """Free space where the runs would be written."""
    free = shutil.disk_usage(Path.cwd()).free / GIB
    warning = ": little for checkpoints" if free < LITTLE_DISK_GIB else ""
    return Row("disk", f"{free:.0f} GiB free in the current folder{warning}")


def attention_rows() -> list[Row]:
    """For each kind of device, the backends that really run a small scaled_dot_product_attention."""
    torch = try_import("torch")
    if torch is None:
        return [Row("attention", "unknown without torch")]
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    return [Row(f"on {device}", ", ".join(attention_backends(device)) or "none") for device in devices]


def attention_backends(device: str) -> list[str]:
    """Names of the attention backends that run on `device`, in the half precision that training uses."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    half = torch.float16 if device == "cuda" and not torch.cuda.is_bf16_supported() else torch.bfloat16
    query = torch.zeros(1, 2, 16, 64, device=device, dtype=half)  # (batch, heads, tokens, head width)
    found = []
    for name, backend in ATTENTION_BACKENDS.items():
        try:
            with sdpa_kernel([getattr(SDPBackend, backend)]):
                torch.nn.functional.scaled_dot_product_attention(query, query, query)
        except RuntimeError:  # torch's "no available kernel"
            continue
        found.append(name)
    return found


# Small pieces.


def try_import(module: str) -> ModuleType | None:
    """A module, or None where it does not import, for whatever reason."""
    try:
        return importlib.import_module(module)
    except Exception:  # its own row says why
        return None


def module_exists(module: str) -> bool:
    """Whether a module can be found, without running it (its parents are imported)."""
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def installed_version(distributions: Sequence[str]) -> str | None:
    """Version of the first of these distributions that is installed."""
    for name in distributions:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def release(version: str) -> tuple[int, ...]:
    """Major and minor number of a version: "2.11.0+cu130" gives (2, 11)."""
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2])


def dotted(version: tuple[int, ...]) -> str:
    """(3, 10) as "3.10"."""
    return ".".join(map(str, version))


def python() -> str:
    """This interpreter as one would type it here."""
    path = Path(sys.executable)
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def pip_command(*arguments: str) -> str:
    """A line for the shell that installs into this interpreter."""
    return shlex.join([python(), "-m", "pip", "install", *arguments])


if __name__ == "__main__":
    raise SystemExit(main())
