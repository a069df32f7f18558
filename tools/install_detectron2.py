"""Install detectron2, which has no release on the package index.

    python tools/install_detectron2.py                # upstream's Python sources: no compiler needed
    python tools/install_detectron2.py --wheel FILE   # the same sources, from a downloaded wheel
    python tools/install_detectron2.py --from git     # builds upstream with its compiled operators

By default, sal-detectron2 0.7.2 is installed. It has upstream's sources of commit a59f0563, with ViTDet. Only the
version string, a fix for Python 3.11 in data/common.py, a test helper and the packaged configs differ from
upstream. The wheel also has a compiled extension for Python 3.10 and an unwanted package `tools`. This program removes
both. The rest is pure Python, so the wheel gets the tag of every Python version. Without the extension, rotated boxes
and deformable convolution do not work. This toolkit uses neither.

This program uses only the standard library, because other packages may not be installed yet.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import importlib.metadata
import importlib.util
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from fnmatch import fnmatch
from functools import partial
from pathlib import Path

INDEX_NAME = "sal-detectron2"
INDEX_VERSION = "0.7.2"
WHEEL_SHA256 = "491af0c7f79bdb2d178e46f6cb16a97c4ac968d45c41ea3f6b6435d59bbee561"
OUR_VERSION = f"{INDEX_VERSION}+purepy"  # a local version, so that `pip list` shows that it was changed

UPSTREAM_NAME = "detectron2"
UPSTREAM_URL = "https://github.com/facebookresearch/detectron2.git"
UPSTREAM_COMMIT = "a59f05630a8f205756064244bf5beb8661f96180"
BUILD_TOOL = "setuptools>=70.1,<82"  # builds wheels without other packages since 70.1; torch 2.11 requires < 82

CHECKED_MODULES = ("detectron2", "detectron2.modeling", "detectron2.engine")
# Lines of METADATA to replace. The checked sha256 ensures that the wheel has these lines.
METADATA_EDITS: dict[str, str] = {
    f"Version: {INDEX_VERSION}": f"Version: {OUR_VERSION}",
    # Only the compiled extension needs numpy 1. The Python sources run on numpy 1 and 2.
    "Requires-Dist: numpy<2": "Requires-Dist: numpy",
    # black only formats lazy configs (LazyConfig.to_py). Upstream requires fvcore and iopath.
    "Requires-Dist: black": "Requires-Dist: fvcore<0.1.6,>=0.1.5\nRequires-Dist: iopath<0.1.10,>=0.1.7",
}
PURE_WHEEL_FILE = (
    "Wheel-Version: 1.0\nGenerator: crossmae-install-detectron2\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
)

log = partial(print, flush=True)  # flushed, so that pip's messages appear in order


class InstallError(Exception):
    """A failed step: nothing was installed, or the installed package does not work."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line. Return 0, or 2 after an `error:` line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--from", dest="source", choices=("index", "git"), default="index", help="default: index")
    where.add_argument("--wheel", type=Path, metavar="FILE", help=f"a downloaded {INDEX_NAME} {INDEX_VERSION} wheel")
    parser.add_argument("--force", action="store_true", help="install even if a working detectron2 is there")
    args = parser.parse_args(argv)
    try:
        if importlib.util.find_spec("pip") is None:
            raise InstallError(f"{sys.executable}: pip is missing. Install it: {sys.executable} -m ensurepip")
        if importlib.util.find_spec("torch") is None:
            raise InstallError(f'torch: is missing. Install it first: {sys.executable} -m pip install -e ".[det]"')
        if not args.force and (found := working_installation(args.source)):
            print(f"{found} is installed and works: nothing to do (--force installs again)")
            return 0
        with tempfile.TemporaryDirectory(prefix="install-detectron2-") as folder:
            if args.source == "git":
                # torch first: the extension links against its libraries.
                modules = ("torch", *CHECKED_MODULES, "detectron2._C")
                install(build_upstream(Path(folder)), INDEX_NAME, modules, force=args.force)
            else:
                wheel = fetch_pure_python(Path(folder), args.wheel)
                install(wheel, UPSTREAM_NAME, CHECKED_MODULES, force=args.force)
    except InstallError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def working_installation(source: str) -> str | None:
    """Return name and version of a working detectron2, or None.

    If `source` is "git", only a build of upstream is accepted.
    """
    upstream, pure = installed_version(UPSTREAM_NAME), installed_version(INDEX_NAME)
    found = f"{UPSTREAM_NAME} {upstream}" if upstream else None
    if not upstream and source != "git" and pure == OUR_VERSION:
        found = f"{INDEX_NAME} {pure}"
    return found if found and not import_failure() else None


def installed_version(name: str) -> str | None:
    """Return the version of an installed distribution, or None."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def fetch_pure_python(folder: Path, wheel: Path | None) -> Path:
    """Download the wheel, or use `wheel`, then verify and strip it.

    Returns the path of a pure Python wheel in `folder`.
    """
    log(f"detectron2 has no release on the package index. {INDEX_NAME} {INDEX_VERSION} has its Python sources")
    log(f"of commit {UPSTREAM_COMMIT[:8]}. No compiler is needed.")
    log(f"[1/5] {f'take {wheel}' if wheel else f'fetch {INDEX_NAME}=={INDEX_VERSION} with pip'}")
    if wheel is None:
        # The wheel is tagged for Python 3.10. Without these options, pip refuses it on other versions.
        tags = ("--python-version", "3.10", "--implementation", "cp", "--abi", "cp310")
        options = ("--no-deps", "--only-binary=:all:", "--dest", str(folder))
        pip("download", *options, *tags, f"{INDEX_NAME}=={INDEX_VERSION}")
        (wheel,) = folder.glob("*.whl")
    log(f"[2/5] verify sha256 {WHEEL_SHA256}")
    verify_sha256(wheel)
    log("[3/5] strip the extension for Python 3.10 and the stray package `tools`, re-tag py3-none-any")
    return make_pure_wheel(wheel, folder)


def verify_sha256(wheel: Path) -> None:
    """Raise InstallError if `wheel` cannot be read or is another file."""
    try:
        actual = hashlib.sha256(wheel.read_bytes()).hexdigest()
    except OSError as error:
        raise InstallError(f"{wheel}: cannot be read: {error.strerror}. Nothing was installed.") from None
    if actual != WHEEL_SHA256:
        raise InstallError(
            f"{wheel.name}: sha256 is {actual}, expected {WHEEL_SHA256}. Nothing was installed. Download the wheel "
            "again, or pass --from git."
        )


def make_pure_wheel(source: Path, folder: Path) -> Path:
    """Write a pure Python copy of the wheel `source` to `folder`.

    The compiled extension and the package `tools` are left out, and the tag is py3-none-any. RECORD lists the sha256
    and the size of every file, as the binary distribution format requires. Files keep their dates, so that every run
    writes the same bytes.
    """
    stem = f"{INDEX_NAME.replace('-', '_')}-"
    old_info, new_info = f"{stem}{INDEX_VERSION}.dist-info", f"{stem}{OUR_VERSION}.dist-info"
    target = folder / f"{stem}{OUR_VERSION}-py3-none-any.whl"
    record: list[str] = []
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as new:

        def add(name: str, content: bytes, like: zipfile.ZipInfo) -> None:
            member = zipfile.ZipInfo(name, like.date_time)
            member.external_attr = 0o644 << 16  # readable by all
            member.compress_type = zipfile.ZIP_DEFLATED
            new.writestr(member, content)

        metadata = old.read(f"{old_info}/METADATA").decode().splitlines()
        replaced = {
            f"{new_info}/METADATA": "\n".join(METADATA_EDITS.get(line, line) for line in metadata) + "\n",
            f"{new_info}/WHEEL": PURE_WHEEL_FILE,
            f"{new_info}/top_level.txt": "detectron2\n",
        }
        for member in old.infolist():
            name = member.filename.replace(old_info, new_info, 1)
            if name.startswith("tools/") or fnmatch(name, "detectron2/_C*.so") or name == f"{new_info}/RECORD":
                continue
            content = replaced[name].encode() if name in replaced else old.read(member)
            add(name, content, member)
            digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
            record.append(f"{name},sha256={digest},{len(content)}\n")
        record.append(f"{new_info}/RECORD,,\n")
        add(f"{new_info}/RECORD", "".join(record).encode(), old.infolist()[0])
    return target


def build_upstream(folder: Path) -> Path:
    """Build a wheel of upstream at the pinned commit."""
    log(f"building detectron2 {UPSTREAM_COMMIT[:8]} with its compiled operators takes many minutes")
    if shutil.which("git") is None:
        raise InstallError("--from git needs git on the PATH. Install git, or leave --from git out.")
    log(f"[1/5] install {BUILD_TOOL}")
    pip("install", BUILD_TOOL)
    log("[2-3/5] fetch, and build with a C++ compiler against the torch that is installed")
    # upstream's setup.py imports torch, which an isolated build environment does not have.
    options = ("--no-deps", "--no-build-isolation", "--wheel-dir", str(folder))
    pip("wheel", *options, f"git+{UPSTREAM_URL}@{UPSTREAM_COMMIT}")
    (wheel,) = folder.glob("*.whl")
    return wheel


def install(wheel: Path, replaced: str, modules: Sequence[str], *, force: bool) -> None:
    """Install `wheel` in place of `replaced`, and import `modules`.

    Raises:
        InstallError: pip failed, or a module cannot be imported.
    """
    log(f"[4/5] install {wheel.name} with pip")
    if installed_version(replaced) is not None:  # it has the same files
        pip("uninstall", "--yes", replaced)
    pip("install", *(("--force-reinstall", "--no-deps") if force else ()), str(wheel))
    log(f"[5/5] import {', '.join(modules)}")
    if failure := import_failure(modules):
        raise InstallError(f"the installed detectron2 does not import: {failure}. Run python -m crossmae.doctor.")
    without = "" if "detectron2._C" in modules else ", without rotated boxes and deformable convolution"
    log(f"detectron2 is ready{without}")


def pip(*arguments: str) -> None:
    """Run this interpreter's pip, showing only errors.

    Raises InstallError if pip fails.
    """
    quiet = ("--quiet", "--quiet", "--disable-pip-version-check")  # twice: errors only
    code = subprocess.run([sys.executable, "-m", "pip", *quiet, *arguments], check=False).returncode
    if code != 0:
        raise InstallError(f"pip {arguments[0]} failed with exit code {code}. See the message of pip above.")


def import_failure(modules: Sequence[str] = CHECKED_MODULES) -> str | None:
    """Import modules in a new interpreter. Return the error, or None."""
    command = [sys.executable, "-c", f"import {', '.join(modules)}"]
    # The current folder is empty, because `tools` and `det` could be imported by accident in the clone.
    with tempfile.TemporaryDirectory(prefix="install-detectron2-") as folder:
        result = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if result.returncode == 0:
        return None
    return (result.stderr.strip().splitlines() or [f"exit code {result.returncode}"])[-1]


if __name__ == "__main__":
    raise SystemExit(main())
