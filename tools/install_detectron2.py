"""Install detectron2, which has no release on the package index.

    python tools/install_detectron2.py                # Python sources from the index, else from upstream's Git
    python tools/install_detectron2.py --from git     # Python sources of 2026, from upstream's Git
    python tools/install_detectron2.py --save FOLDER  # only writes the wheel, for a machine without a network
    python tools/install_detectron2.py --wheel FILE   # there: installs the wheel
    python tools/install_detectron2.py --compile      # builds upstream with its compiled operators

Only --compile needs a compiler. Both sources are pinned by the SHA-256 of their files, and Git's also by its commit:

- The index has sal-detectron2 0.7.2, a wheel with upstream's sources of commit a59f0563 of 2024, with ViTDet. The
  version string, a fix for Python 3.11 in data/common.py, a test helper and the packaged configs differ from upstream.
- Upstream's Git has commit 02b5c4e2 of June 2026.

The Python files get a wheel for every version of Python. Compiled code and other packages are left out. Without the
compiled operators, rotated boxes and deformable convolution do not work. This toolkit uses neither.

This program uses only the standard library, because other packages may not be installed yet.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import importlib.metadata
import importlib.util
import io
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

INDEX_WHEEL = "sal-detectron2==0.7.2"
UPSTREAM_URL = "https://github.com/facebookresearch/detectron2.git"
UPSTREAM_COMMIT = "02b5c4e295e990042a714712c21dc79b731e8833"
BUILD_TOOL = "setuptools>=77.0.3,<82"  # torch 2.14 requires the lower bound, torch 2.11 the upper
CHECKED_MODULES = ("detectron2", "detectron2.modeling", "detectron2.engine")

Files = dict[str, bytes]  # by path in the wheel: the package, and its LICENSE


@dataclass(frozen=True)
class Release:
    """Tested Python sources: the distribution that they are installed as, and the SHA-256 of `fingerprint`."""

    name: str
    version: str  # a local version, so that `pip list` shows that compiled code was left out
    sha256: str


SNAPSHOT = Release("sal-detectron2", "0.7.2+purepy", "6f95a2bf17ad593f92a7514a52a7fea3bbfccde52aa08e3bbd0379cc07c0f219")
UPSTREAM = Release(
    "detectron2", "0.6+02b5c4e2.purepy", "a0b1ea40057c29135651c0d4a51ca18920e5b46d6d1af9ea0de466c9730cd3c3"
)
# Where upstream's setup.py takes packaged files from. Everything else in its repository is left out.
PACKAGED = {
    "detectron2/": "detectron2/",
    "configs/": "detectron2/model_zoo/configs/",
    "projects/PointRend/point_rend/": "detectron2/projects/point_rend/",
    "projects/DeepLab/deeplab/": "detectron2/projects/deeplab/",
    "projects/Panoptic-DeepLab/panoptic_deeplab/": "detectron2/projects/panoptic_deeplab/",
}
# Of both releases, without black, which only formats lazy configs (LazyConfig.to_py), and without numpy 1, which only
# the compiled extension of the index needs.
METADATA = """Metadata-Version: 2.1
Name: {name}
Version: {version}
Summary: Python sources of detectron2, without its compiled operators
Home-page: https://github.com/facebookresearch/detectron2
License: Apache-2.0
License-File: LICENSE
Requires-Python: >=3.8
Requires-Dist: Pillow>=7.1
Requires-Dist: matplotlib
Requires-Dist: pycocotools>=2.0.2
Requires-Dist: termcolor>=1.1
Requires-Dist: yacs>=0.1.8
Requires-Dist: tabulate
Requires-Dist: cloudpickle
Requires-Dist: tqdm>4.29.0
Requires-Dist: tensorboard
Requires-Dist: numpy
Requires-Dist: fvcore<0.1.6,>=0.1.5
Requires-Dist: iopath<0.1.10,>=0.1.7
Requires-Dist: omegaconf<2.4,>=2.1
Requires-Dist: hydra-core>=1.1
Requires-Dist: packaging
"""
WHEEL = "Wheel-Version: 1.0\nGenerator: crossmae-install-detectron2\nRoot-Is-Purelib: true\nTag: py3-none-any\n"

OTHER_MACHINE = "A machine with a network makes the wheel by --save FOLDER, and --wheel FILE installs it here."

log = partial(print, flush=True)  # flushed, so that pip's messages appear in order


class InstallError(Exception):
    """A failed step: nothing was installed, or the installed package does not work."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line. Return 0, or 2 after an `error:` line."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.save is not None and args.source == "compile":
        parser.error("--save: only for Python sources, and --compile depends on the machine. Leave one of the two out.")
    try:
        check_tools(args.save is None)
        if args.save is None and not args.force and (found := working_installation(args.source)):
            print(f"{found} is installed and works: nothing to do (--force installs again)")
            return 0
        with tempfile.TemporaryDirectory(prefix="install-detectron2-") as name:
            folder = Path(name)
            if args.source == "compile":
                # torch first: the extension links against its libraries.
                modules = ("torch", *CHECKED_MODULES, "detectron2._C")
                install(build_compiled(args.repository, folder), "detectron2", modules, force=args.force)
                return 0
            try:
                release, files = find_sources(args.source, args.wheel, args.repository, folder)
            except InstallError as error:
                raise InstallError(f"{error} Nothing was installed. {OTHER_MACHINE}") from None
            wheel = write_wheel(files, release, folder if args.save is None else args.save)
            if args.save is None:
                install(wheel, release.name, CHECKED_MODULES, force=args.force)
            else:
                log(f"{wheel} is ready. On the other machine: --wheel {wheel.name}")
    except InstallError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--from", dest="source", choices=("index", "git"), default="index", help="default: index")
    where.add_argument("--wheel", type=Path, metavar="FILE", help="a wheel of --save, or sal-detectron2 0.7.2")
    where.add_argument(
        "--compile", dest="source", action="store_const", const="compile", help="build C++ operators: minutes"
    )
    parser.add_argument("--save", type=Path, metavar="FOLDER", help="write the wheel there, and install nothing")
    parser.add_argument("--repository", metavar="URL", default=UPSTREAM_URL, help="a copy of upstream's Git")
    parser.add_argument("--force", action="store_true", help="install even if a working detectron2 is there")
    return parser


def check_tools(needs_torch: bool) -> None:
    """Raise InstallError if pip, or torch where it is needed, is missing."""
    if importlib.util.find_spec("pip") is None:
        raise InstallError(f"{sys.executable}: pip is missing. Install it: {sys.executable} -m ensurepip")
    if needs_torch and importlib.util.find_spec("torch") is None:
        raise InstallError(f'torch: is missing. Install it first: {sys.executable} -m pip install -e ".[det]"')


def working_installation(source: str) -> str | None:
    """Return name and version of a working detectron2, or None.

    Any detectron2 is good enough for "index". "compile" needs the compiled operators.
    """
    upstream, snapshot = installed_version(UPSTREAM.name), installed_version(SNAPSHOT.name)
    found = None
    if upstream and (source != "git" or upstream == UPSTREAM.version):
        found = f"{UPSTREAM.name} {upstream}"
    elif source == "index" and snapshot == SNAPSHOT.version:
        found = f"{SNAPSHOT.name} {snapshot}"
    modules = ("torch", *CHECKED_MODULES, "detectron2._C") if source == "compile" else CHECKED_MODULES
    return found if found and not import_failure(modules) else None


def installed_version(name: str) -> str | None:
    """Return the version of an installed distribution, or None."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def find_sources(source: str, wheel: Path | None, repository: str, folder: Path) -> tuple[Release, Files]:
    """Read pinned sources from a wheel, the index or Git.

    If the index has no wheel or another one, Git is next. Raises InstallError if no source has the pinned files.
    """
    if wheel is not None:
        log(f"[1/5] take {wheel}")
        return verified(read_wheel(wheel), str(wheel), (SNAPSHOT, UPSTREAM))
    refused = ""
    if source == "index":
        log(f"detectron2 has no release on the package index. {INDEX_WHEEL} has its Python sources.")
        try:
            return verified(fetch_from_index(folder), INDEX_WHEEL, (SNAPSHOT,))
        except InstallError as error:
            refused = f"{error} "
            log(f"{refused}Upstream's Git is next.")
    try:
        return verified(fetch_from_git(repository, folder), repository, (UPSTREAM,))
    except InstallError as error:
        raise InstallError(f"{refused}{error}") from None


def fetch_from_index(folder: Path) -> Files:
    """Download the wheel of the index, and read its Python sources."""
    log(f"[1/5] fetch {INDEX_WHEEL} with pip")
    # The wheel is tagged for Python 3.10. Without these options, pip refuses it on other versions.
    tags = ("--python-version", "3.10", "--implementation", "cp", "--abi", "cp310")
    options = ("--no-deps", "--only-binary=:all:", "--retries", "2", "--dest", str(folder))
    pip("download", *options, *tags, INDEX_WHEEL)
    (wheel,) = folder.glob("*.whl")
    return read_wheel(wheel)


def fetch_from_git(repository: str, folder: Path) -> Files:
    """Fetch the pinned commit, and read its Python sources."""
    log(f"[1/5] fetch commit {UPSTREAM_COMMIT[:8]} of {repository}")
    clone = folder / "clone"
    git("init", "--quiet", str(clone))
    git("-C", str(clone), "fetch", "--quiet", "--depth", "1", repository, UPSTREAM_COMMIT)
    # Line ends stay as they are, also on Windows.
    archive = git("-C", str(clone), "-c", "core.autocrlf=false", "archive", "--format=tar", UPSTREAM_COMMIT)
    files = {}
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        for member in tar:
            for start, home in PACKAGED.items():
                if member.name.startswith(start) and member.name.endswith((".py", ".yaml", ".json")):
                    files[home + member.name.removeprefix(start)] = _content(tar, member)
            if member.name == "LICENSE":
                files["LICENSE"] = _content(tar, member)
    return files


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    return b"" if file is None else file.read()


def read_wheel(wheel: Path) -> Files:
    """Read the Python sources and the licence in a wheel.

    Raises InstallError if the wheel cannot be read.
    """
    files = {}
    try:
        with zipfile.ZipFile(wheel) as archive:
            for name in archive.namelist():
                if name.startswith("detectron2/") and not name.endswith((".so", ".pyd", "/")):
                    files[name] = archive.read(name)
                elif name.partition("/")[0].endswith(".dist-info") and name.endswith("/LICENSE"):
                    files["LICENSE"] = archive.read(name)
    except (OSError, zipfile.BadZipFile) as error:
        reason = getattr(error, "strerror", None) or error
        raise InstallError(f"{wheel}: cannot be read: {reason}.") from None
    return files


def fingerprint(files: Files) -> str:
    """Compute the SHA-256 of the names and contents of files."""
    lines = [f"{hashlib.sha256(content).hexdigest()} {name}\n" for name, content in sorted(files.items())]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def verified(files: Files, origin: str, releases: Sequence[Release]) -> tuple[Release, Files]:
    """Return the release that the files are, and the files.

    Raises InstallError if they are none of `releases`.
    """
    log("[2/5] verify the SHA-256 of the Python files, without compiled code and other packages")
    actual = fingerprint(files)
    for release in releases:
        if release.sha256 == actual:
            return release, files
    expected = " or ".join(release.sha256 for release in releases)
    raise InstallError(f"{origin}: the SHA-256 of the files is {actual}, expected {expected}.")


def write_wheel(files: Files, release: Release, folder: Path) -> Path:
    """Write a pure Python wheel to `folder`.

    The wheel has the same bytes in every run, on every system with the same zlib. RECORD lists the SHA-256 and the
    size of every file, as the binary distribution format requires.
    """
    stem = f"{release.name.replace('-', '_')}-{release.version}"
    information = f"{stem}.dist-info"
    metadata = METADATA.format(name=release.name, version=release.version)
    parts = {name: content for name, content in files.items() if name != "LICENSE"}
    parts |= {f"{information}/LICENSE": files["LICENSE"], f"{information}/METADATA": metadata.encode()}
    parts |= {f"{information}/WHEEL": WHEEL.encode(), f"{information}/top_level.txt": b"detectron2\n"}
    record = [f"{name},sha256={_digest(content)},{len(content)}\n" for name, content in parts.items()]
    parts[f"{information}/RECORD"] = "".join([*record, f"{information}/RECORD,,\n"]).encode()
    wheel = folder / f"{stem}-py3-none-any.whl"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in parts.items():
                member = zipfile.ZipInfo(name)  # dated 1980
                member.external_attr = 0o644 << 16  # readable by all
                archive.writestr(member, content, zipfile.ZIP_DEFLATED)
    except OSError as error:
        raise InstallError(f"{wheel}: cannot be written: {error.strerror}. Name another folder.") from None
    log(f"[3/5] write {wheel.name}, for every version of Python")
    return wheel


def _digest(content: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()


def build_compiled(repository: str, folder: Path) -> Path:
    """Build a wheel of upstream with its compiled operators."""
    log(f"building detectron2 {UPSTREAM_COMMIT[:8]} with its compiled operators takes many minutes")
    if shutil.which("git") is None:
        raise InstallError("git: is missing. Install git, or leave --compile out.")
    log(f"[1/5] install {BUILD_TOOL}")
    pip("install", BUILD_TOOL)
    log("[2-3/5] fetch, and build with a C++ compiler against the torch that is installed")
    # upstream's setup.py imports torch, which an isolated build environment does not have.
    options = ("--no-deps", "--no-build-isolation", "--wheel-dir", str(folder))
    address = repository if "://" in repository else Path(repository).absolute().as_uri()
    pip("wheel", *options, f"git+{address}@{UPSTREAM_COMMIT}")
    (wheel,) = folder.glob("*.whl")
    return wheel


def install(wheel: Path, name: str, modules: Sequence[str], *, force: bool) -> None:
    """Install `wheel`, the only detectron2 from then on, and import `modules`.

    Raises:
        InstallError: pip failed, or a module cannot be imported.
    """
    log(f"[4/5] install {wheel.name} with pip")
    for other in {SNAPSHOT.name, UPSTREAM.name} - {name}:  # it has the same files
        if installed_version(other) is not None:
            pip("uninstall", "--yes", other)
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


def git(*arguments: str) -> bytes:
    """Run git, and return what it prints.

    Raises InstallError if git fails or is missing.
    """
    if shutil.which("git") is None:
        raise InstallError("git: is missing. Install git.")
    done = subprocess.run(["git", *arguments], stdout=subprocess.PIPE, check=False)
    if done.returncode != 0:
        raise InstallError(f"git failed with exit code {done.returncode}. See the message of git above.")
    return done.stdout


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
