"""Install detectron2, which has no release of its own on the package index.

    python tools/install_detectron2.py                # upstream's Python sources: no compiler needed
    python tools/install_detectron2.py --wheel FILE   # the same from a wheel that was downloaded elsewhere
    python tools/install_detectron2.py --from git     # builds upstream with its compiled operators

The default takes the distribution sal-detectron2 0.7.2. It carries upstream's sources of commit a59f0563
(with ViTDet), identical but for the version string, one fix for Python 3.11 in data/common.py, a test helper
and the packaged configs. It is tagged for Python 3.10 because of a compiled extension, and it puts a package
named `tools` into site-packages. Without those two it is plain Python, so it is re-tagged for every Python.
What is lost: rotated boxes and deformable convolution, which nothing here uses.

Standard library only: this runs when only pip, torch and the requirements of `det` are there.
"""

from __future__ import annotations

import argparse
import base64
import csv
import hashlib
import importlib.metadata
import importlib.util
import io
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path

INDEX_NAME = "sal-detectron2"
INDEX_VERSION = "0.7.2"
WHEEL_SHA256 = "491af0c7f79bdb2d178e46f6cb16a97c4ac968d45c41ea3f6b6435d59bbee561"
OUR_VERSION = f"{INDEX_VERSION}+purepy"  # a local version, so that `pip list` shows that it was changed

UPSTREAM_NAME = "detectron2"
UPSTREAM_URL = "https://github.com/facebookresearch/detectron2.git"
UPSTREAM_COMMIT = "a59f05630a8f205756064244bf5beb8661f96180"
BUILD_TOOL = "setuptools>=70.1,<82"  # builds wheels by itself since 70.1; torch 2.11 wants it below 82

CHECKED_MODULES = ("detectron2", "detectron2.modeling", "detectron2.engine")

# Lines of METADATA to replace. Each must be there exactly once: the sha256 fixes the file.
METADATA_EDITS: dict[str, tuple[str, ...]] = {
    f"Version: {INDEX_VERSION}": (f"Version: {OUR_VERSION}",),
    # The cap belongs to the compiled extension; the Python sources run on numpy 1 and 2.
    "Requires-Dist: numpy<2": ("Requires-Dist: numpy",),
    # black only pretty-prints lazy configs (LazyConfig.to_py); the other two are upstream's own.
    "Requires-Dist: black": ("Requires-Dist: fvcore<0.1.6,>=0.1.5", "Requires-Dist: iopath<0.1.10,>=0.1.7"),
}

PURE_WHEEL_FILE = (
    "Wheel-Version: 1.0\nGenerator: crossmae-install-detectron2\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
)


class InstallError(Exception):
    """Nothing was installed, or what was installed does not work; the message says why and what to do."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code (0, or 2 with one `error:` line on stderr)."""
    args = parse_args(argv)
    try:
        check_prerequisites()
        found = None if args.force else working_installation(args.source)
        if found is not None:
            print(f"{found} is installed and imports: nothing to do (--force installs again)")
            return 0
        with tempfile.TemporaryDirectory(prefix="install-detectron2-") as folder:
            if args.source == "git":
                install_from_git(Path(folder), force=args.force)
            else:
                install_pure_python(Path(folder), args.wheel, force=args.force)
    except InstallError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line: `source` ("index" or "git"), `wheel` (a path or None), `force`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--from", dest="source", choices=("index", "git"), default="index", help="default: index")
    where.add_argument("--wheel", type=Path, metavar="FILE", help=f"a downloaded {INDEX_NAME} {INDEX_VERSION} wheel")
    parser.add_argument("--force", action="store_true", help="install even if a working detectron2 is there")
    return parser.parse_args(argv)


def check_prerequisites() -> None:
    """Raise InstallError unless this interpreter has pip and torch."""
    if importlib.util.find_spec("pip") is None:
        raise InstallError(f"{sys.executable} has no pip; add it with: {sys.executable} -m ensurepip")
    if importlib.util.find_spec("torch") is None:
        raise InstallError(f'detectron2 needs torch first: {sys.executable} -m pip install -e ".[det]"')


def working_installation(source: str) -> str | None:
    """What is installed and serves (`source` "git": only an upstream build does), or None."""
    candidates = [(UPSTREAM_NAME, None)] if source == "git" else [(UPSTREAM_NAME, None), (INDEX_NAME, OUR_VERSION)]
    for name, wanted in candidates:
        version = installed_version(name)
        if version is not None and wanted in (None, version) and import_failure() is None:
            return f"{name} {version}"
    return None


def installed_version(name: str) -> str | None:
    """Version of an installed distribution, or None."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


# The default way: plain Python, no compiler.


def install_pure_python(folder: Path, wheel: Path | None, *, force: bool) -> None:
    """Fetch (or take `wheel`), verify, strip and re-tag, install, check; says each step.

    Raises:
        InstallError: a step failed. Up to and including the sha256 check nothing has been installed.
    """
    say("detectron2 has no release of its own on the package index. Installing upstream's Python sources of")
    say(f"commit {UPSTREAM_COMMIT[:8]} from {INDEX_NAME} {INDEX_VERSION}; no compiler is needed.")
    if wheel is None:
        say(f"[1/5] fetch {INDEX_NAME}=={INDEX_VERSION} with pip")
        wheel = download_wheel(folder)
    else:
        say(f"[1/5] take {wheel}")
    say(f"[2/5] verify sha256 {WHEEL_SHA256}")
    verify_sha256(wheel, WHEEL_SHA256)
    say("[3/5] strip the extension for Python 3.10 and the stray package `tools`, re-tag py3-none-any")
    pure = make_pure_wheel(wheel, folder)
    say(f"[4/5] install {pure.name} with pip")
    install_wheel(pure, replaces=UPSTREAM_NAME, force=force)
    say(f"[5/5] import {', '.join(CHECKED_MODULES)}")
    check_import()
    say(f"detectron2 is ready ({OUR_VERSION}), without rotated boxes and deformable convolution.")


def download_wheel(folder: Path) -> Path:
    """The wheel from the package index, by name and version, in `folder`."""
    # The wheel is tagged for Python 3.10 only: without these options pip would refuse it on any other.
    tags = ("--python-version", "3.10", "--implementation", "cp", "--abi", "cp310")
    requirement = f"{INDEX_NAME}=={INDEX_VERSION}"
    pip("download", "--no-deps", "--only-binary=:all:", *tags, "--dest", str(folder), requirement)
    wheels = sorted(folder.glob("*.whl"))
    if len(wheels) != 1:
        raise InstallError(f"pip download {requirement}: expected one wheel, got {[w.name for w in wheels]}")
    return wheels[0]


def verify_sha256(wheel: Path, expected: str) -> None:
    """Raise InstallError unless `wheel` is a file with that sha256 (hexadecimal)."""
    try:
        actual = hashlib.sha256(wheel.read_bytes()).hexdigest()
    except OSError as error:
        raise InstallError(f"cannot read {wheel}: {error.strerror}; nothing was installed") from None
    if actual != expected:
        raise InstallError(
            f"{wheel.name}: sha256 is {actual}, expected {expected}: this is not the file that was checked, "
            "nothing was installed"
        )


def make_pure_wheel(source: Path, folder: Path) -> Path:
    """Write `source` without its extension and `tools`, tagged py3-none-any, to `folder`; returns its path.

    METADATA is edited by METADATA_EDITS, top_level.txt names detectron2 alone, and RECORD lists the
    sha256 and the size of every file anew, as the binary distribution format wants it.
    """
    stem = f"{INDEX_NAME.replace('-', '_')}-"
    old_info, new_info = f"{stem}{INDEX_VERSION}.dist-info", f"{stem}{OUR_VERSION}.dist-info"
    target = folder / f"{stem}{OUR_VERSION}-py3-none-any.whl"
    record: list[tuple[str, str, str]] = []
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as new:
        for member in old.infolist():
            if is_stripped(member.filename) or member.filename == f"{old_info}/RECORD":
                continue
            content = rewritten(member.filename.removeprefix(f"{old_info}/"), old.read(member))
            name = member.filename.replace(old_info, new_info, 1)
            add_file(new, name, content, member.date_time)
            record.append((name, record_hash(content), str(len(content))))
        record_name = f"{new_info}/RECORD"
        add_file(new, record_name, csv_lines([*record, (record_name, "", "")]), old.infolist()[0].date_time)
    return target


def is_stripped(name: str) -> bool:
    """Whether a member of the index's wheel is left out."""
    return name.startswith("tools/") or fnmatch(name, "detectron2/_C*.so")


def rewritten(name: str, content: bytes) -> bytes:
    """Content of a member for the new wheel; for files in .dist-info, `name` is relative to it."""
    if name == "METADATA":
        return edit_metadata(content.decode()).encode()
    if name == "WHEEL":
        return PURE_WHEEL_FILE.encode()
    if name == "top_level.txt":
        return b"detectron2\n"
    return content


def edit_metadata(text: str) -> str:
    """METADATA with METADATA_EDITS applied; InstallError when a line to replace is not there exactly once."""
    lines = text.splitlines()
    for old, new in METADATA_EDITS.items():
        if lines.count(old) != 1:
            raise InstallError(f"METADATA: expected the line {old!r} once, found it {lines.count(old)} times")
        at = lines.index(old)
        lines[at : at + 1] = new
    return "\n".join(lines) + "\n"


def add_file(
    archive: zipfile.ZipFile, name: str, content: bytes, date_time: tuple[int, int, int, int, int, int]
) -> None:
    """Add a file readable by all; a fixed date keeps the wheel the same from run to run."""
    member = zipfile.ZipInfo(name, date_time)
    member.external_attr = 0o644 << 16
    member.compress_type = zipfile.ZIP_DEFLATED
    archive.writestr(member, content)


def record_hash(content: bytes) -> str:
    """Hash of a file as RECORD wants it: url-safe base64 of the sha256, unpadded."""
    return "sha256=" + base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()


def csv_lines(rows: Sequence[tuple[str, str, str]]) -> bytes:
    """RECORD's text."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue().encode()


# The other way: upstream's own build.


def install_from_git(folder: Path, *, force: bool) -> None:
    """Build upstream at the pinned commit, install, check; says each step.

    Raises:
        InstallError: git or a compiler is missing, or a step failed. Until the build has succeeded, what was
            installed before stays.
    """
    say(f"building detectron2 {UPSTREAM_COMMIT[:8]} with its compiled operators: this takes many minutes")
    if shutil.which("git") is None:
        raise InstallError("--from git needs git on the PATH; without one leave it out")
    compilers = (os.environ.get("CXX", "c++"), "g++", "clang++")
    if not any(shutil.which(compiler) for compiler in compilers):
        raise InstallError("--from git needs a C++ compiler (g++ or clang++); without one leave it out")
    say(f"[1/4] have {BUILD_TOOL}")
    pip("install", BUILD_TOOL)
    say("[2/4] fetch and build with pip, against the torch that is installed")
    # Its setup.py imports torch, which an isolated build environment does not have.
    options = ("--no-deps", "--no-build-isolation", "--wheel-dir", str(folder))
    pip("wheel", *options, f"git+{UPSTREAM_URL}@{UPSTREAM_COMMIT}")
    (wheel,) = folder.glob("*.whl")
    say(f"[3/4] install {wheel.name} with pip")
    install_wheel(wheel, replaces=INDEX_NAME, force=force)
    say(f"[4/4] import {', '.join((*CHECKED_MODULES, 'detectron2._C'))}")
    # torch first: the extension links against its libraries.
    check_import(("torch", *CHECKED_MODULES, "detectron2._C"))
    say("detectron2 is ready, with its compiled operators")


# Shared by both.


def say(text: str) -> None:
    """Print at once: pip's own messages must appear in between."""
    print(text, flush=True)


def install_wheel(wheel: Path, *, replaces: str, force: bool) -> None:
    """Install `wheel` and its requirements, after removing `replaces`, which owns the same files."""
    if installed_version(replaces) is not None:
        pip("uninstall", "--yes", replaces)
    pip("install", *(("--force-reinstall", "--no-deps") if force else ()), str(wheel))


def pip(*arguments: str) -> None:
    """Run this interpreter's pip; its errors appear as it writes them, its chatter does not."""
    quiet = ("--quiet", "--quiet", "--disable-pip-version-check")  # twice: errors only
    code = subprocess.run([sys.executable, "-m", "pip", *quiet, *arguments], check=False).returncode
    if code != 0:
        raise InstallError(f"pip {arguments[0]} failed with exit code {code}; its own message is above")


def check_import(modules: Sequence[str] = CHECKED_MODULES) -> None:
    """Raise InstallError unless a fresh interpreter imports every module."""
    failure = import_failure(modules)
    if failure is not None:
        raise InstallError(f"the installed detectron2 does not import: {failure}; see python -m crossmae.doctor")


def import_failure(modules: Sequence[str] = CHECKED_MODULES) -> str | None:
    """Last line of what a fresh interpreter says when it cannot import `modules`, or None when it can."""
    command = [sys.executable, "-c", "".join(f"import {module}\n" for module in modules)]
    # From an empty folder: in the clone, `tools` and `det` would be importable by accident.
    with tempfile.TemporaryDirectory(prefix="install-detectron2-") as folder:
        result = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if result.returncode == 0:
        return None
    return (result.stderr.strip().splitlines() or [f"exit code {result.returncode}"])[-1]


if __name__ == "__main__":
    raise SystemExit(main())
