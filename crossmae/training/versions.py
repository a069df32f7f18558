"""Software versions for the logs and checkpoints of a run."""

from __future__ import annotations

import importlib
import platform
import subprocess
from pathlib import Path

import crossmae


def versions() -> dict[str, str]:
    """Collect the versions of crossmae, Python and important libraries."""
    found = {"crossmae": crossmae.__version__, "git": git_revision(), "python": platform.python_version()}
    for library in ("torch", "torchvision", "timm", "numpy"):
        # `__version__` also contains the build, such as 2.11.0+cu130.
        found[library] = str(importlib.import_module(library).__version__)
    return found


def git_revision() -> str:
    """Return the git revision, with -dirty if the checkout has changes."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return "unknown"
    return done.stdout.strip() or "unknown"
