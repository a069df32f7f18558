"""What a run was made with, for its records."""

from __future__ import annotations

import importlib
import platform
import subprocess
from pathlib import Path

import crossmae


def versions() -> dict[str, str]:
    """Versions of the toolkit, its git revision where there is one, Python and the libraries that decide numbers."""
    found = {"crossmae": crossmae.__version__, "git": git_revision(), "python": platform.python_version()}
    for library in ("torch", "torchvision", "timm", "numpy"):
        # The module's own version: it also tells the build, such as 2.11.0+cu130.
        found[library] = str(importlib.import_module(library).__version__)
    return found


def git_revision() -> str:
    """The revision of the checkout, with -dirty if it has changes; "unknown" without git or outside a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return "unknown"
    return done.stdout.strip() or "unknown"
